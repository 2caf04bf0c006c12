//! A disk of the storage domain itself, served by a blkback: a [`Device`] with one unit (Xen
//! public/io/blkif.h, seen from the frontend).
//!
//! Guards: an operation that was taken is answered once, over any number of backend restarts:
//! what a backend did not answer is sent again to the next one, once that is known to serve the
//! same disk. Data pages are the pool's, which
//! is granted once and for ever, so no operation changes a grant. A backend's answers are
//! allegations: one that matches no request of that ring breaks it, and the device starts a new
//! cycle. Must never: use a ring that the backend does not show Connected for, or answer a flush
//! that no backend confirmed when the backend has a cache.

mod handshake;
mod life;
#[cfg(test)]
mod return_tests;
mod ring;
#[cfg(test)]
mod tests;

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use platter_xen::blkif::op;
use platter_xen::ring::FrontRing;
use platter_xen::vbd::DiskNodes;
use platter_xen::xenbus::XenbusState;
use platter_xen::{DomId, Gref, Hypervisor, Port, Region};

use crate::bytes::Mark;
use crate::disk::{Device, DiskDone, DiskIo, DiskOp, DiskSubmit, DiskTag, Geometry, Held};
use crate::pool::{Pool, RUN_PAGES_MAX};
use crate::store::StoreFault;

pub use handshake::{BackNodes, FrontFault, FrontStep};

/// Queues that we ask for at most.
const QUEUES_MAX: usize = 4;
/// Pages of all rings together: 128 requests, as many as the block store has.
const RING_PAGES: usize = 4;
/// Requests with more than 11 segments at once: each needs a granted page of descriptors.
const INDIRECT_PAGES: usize = 32;
/// Most sectors of one discard (ours: 1 GiB, so that none takes seconds).
const DISCARD_SECTORS_MAX: u32 = 2 << 20;
/// How often an operation is sent to a new backend.
const RESENDS_MAX: u8 = 5;
/// What a failed request is: `BLKIF_RSP_ERROR` has no more to say than EIO.
const FAILED: StoreFault = StoreFault::Io(5);

/// An operation, or what is left of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Work {
    tag: DiskTag,
    io: DiskIo,
    /// Sectors that are done: a backend that takes fewer segments gets it in parts.
    done: u32,
    resends: u8,
}

/// A request at the backend. Its index is the `id`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Slot {
    work: Work,
    /// Sectors that this request covers.
    sectors: u32,
    /// What the response must repeat.
    operation: u8,
    /// The ring that it went to, and its response must come from.
    ring: u8,
    /// Index of its page of descriptors.
    indirect: Option<u8>,
}

/// Counters for the statistics.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Times that a backend was connected.
    pub connects: u64,
    /// Operations sent again to a new backend.
    pub resends: u64,
    pub errors: u64,
    /// Rings found broken: a backend's mistake.
    pub broken: u64,
}

/// What is granted to the backend beside the pool, for all its cycles.
struct Shared {
    rings: Region,
    ring_grefs: Vec<Gref>,
    indirect: Region,
    indirect_grefs: Vec<Gref>,
}

/// See the module's head.
pub struct Blkfront {
    domid: DomId,
    /// `virtual-device`, which requests carry as `handle`.
    handle: u16,
    own: XenbusState,
    wanted: bool,
    /// Number of the backend's domain in the pool.
    peer: Option<usize>,
    shared: Option<Shared>,
    /// What backends that were left have perhaps not let go of.
    left: Vec<Shared>,
    /// One for each queue; they outlive the rings, until the backend has let go.
    ports: heapless::Vec<Port, QUEUES_MAX>,
    /// None while no backend is connected, or when one of them was found broken.
    rings: heapless::Vec<FrontRing, QUEUES_MAX>,
    /// Where the search for a ring with room begins.
    next_ring: usize,
    /// Our directory counts queues, or numbers pages, since some cycle or other.
    queues_named: bool,
    pages_named: bool,
    /// Of the last backend that was connected; `None` before the first.
    nodes: Option<DiskNodes>,
    slots: Vec<Option<Slot>>,
    indirect_free: Vec<u8>,
    /// To be sent (again), in order.
    pending: VecDeque<Work>,
    /// To be sent again if the next backend serves the same disk.
    held: VecDeque<Work>,
    /// Connections after the first, and what the backend of the last one said of its disk.
    returns: u32,
    identity: Mark,
    done: VecDeque<DiskDone>,
    /// The toolstack took it away.
    gone: bool,
    /// The backend's directory was gone without a close before.
    vanished: bool,
    /// While no backend is connected: until when operations wait for one, and whether that is
    /// over.
    wait_until_ns: Option<u64>,
    waits_in_vain: bool,
    /// Backends with a cache that vanished.
    losses: u32,
    counters: Counters,
}

impl Blkfront {
    /// A device whose frontend directory names backend domain `domid` and `handle` as its
    /// `virtual-device`. Nothing happens before [`Blkfront::update`].
    pub fn new(domid: DomId, handle: u16) -> Blkfront {
        let slots = 32 * RING_PAGES;
        Blkfront {
            domid,
            handle,
            own: XenbusState::Initialising,
            wanted: true,
            peer: None,
            shared: None,
            left: Vec::new(),
            ports: heapless::Vec::new(),
            rings: heapless::Vec::new(),
            next_ring: 0,
            queues_named: false,
            pages_named: false,
            nodes: None,
            slots: alloc::vec![None; slots],
            indirect_free: (0..INDIRECT_PAGES as u8).collect(),
            pending: VecDeque::with_capacity(2 * slots),
            held: VecDeque::with_capacity(2 * slots),
            returns: 0,
            identity: Mark::NONE,
            done: VecDeque::with_capacity(2 * slots),
            gone: false,
            vanished: false,
            wait_until_ns: None,
            waits_in_vain: false,
            losses: 0,
            counters: Counters::default(),
        }
    }

    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// The event channels, while there are some: their events mean [`Device::poll`].
    pub fn ports(&self) -> &[Port] {
        &self.ports
    }

    /// Operations go out now.
    pub fn is_connected(&self) -> bool {
        !self.rings.is_empty() && self.own == XenbusState::Connected
    }

    /// The backend broke a ring: call [`Blkfront::update`], though no node changed.
    pub fn is_broken(&self) -> bool {
        self.own == XenbusState::Connected && self.rings.is_empty()
    }

    fn answer(&mut self, work: Work, result: Result<(), StoreFault>) {
        self.counters.errors += u64::from(result.is_err());
        self.done.push_back(DiskDone { tag: work.tag, result, held: Held::Nobody });
    }

    /// The rings are not used any more: what was on them is ours again.
    fn take_all_back(&mut self) {
        self.rings.clear();
        for index in 0..self.slots.len() {
            let Some(slot) = self.slots[index].take() else { continue };
            self.indirect_free.extend(slot.indirect);
            let mut work = slot.work;
            if work.resends == RESENDS_MAX {
                self.fail_unfinished(work);
                continue;
            }
            work.resends += 1;
            self.counters.resends += 1;
            self.pending.push_back(work);
        }
    }

    /// The backend is lost. `orderly`: it showed Closing, and so finished what it had begun.
    fn disconnect(&mut self, orderly: bool) {
        self.losses += u32::from(self.has_cache() && !orderly);
        self.take_all_back();
    }

    /// The backend has a volatile cache: what it answered is durable only after a flush.
    fn has_cache(&self) -> bool {
        self.nodes.is_some_and(|nodes| nodes.flush || nodes.barrier)
    }

    fn close_ports<H: Hypervisor>(&mut self, hv: &mut H) {
        self.ports.iter().for_each(|port| hv.close_port(*port));
        self.ports.clear();
    }

    /// Segments of one request at most.
    fn segments_max(&self) -> usize {
        let indirect = self.nodes.map_or(0, |nodes| usize::from(nodes.indirect_segments_max));
        indirect.clamp(platter_xen::blkif::SEGMENTS_DIRECT_MAX, RUN_PAGES_MAX)
    }
}

impl<H: Hypervisor> Device<H> for Blkfront {
    fn units(&self) -> usize {
        usize::from(self.nodes.is_some())
    }

    fn unit_number(&self, _: usize) -> Option<u32> {
        None
    }

    fn geometry(&self, unit: usize) -> Option<Geometry> {
        let nodes = self.nodes.as_ref().filter(|_| unit == 0 && !self.gone)?;
        let unit = u64::from(nodes.sector_bytes / 512);
        let discards = nodes.discard_granularity_bytes.is_some();
        Some(Geometry {
            sectors: nodes.sectors / unit * unit,
            block_bytes: nodes.sector_bytes,
            io_bytes_max: (self.segments_max() * platter_xen::PAGE_BYTES) as u32,
            read_only: nodes.info & platter_xen::blkif::info::READONLY != 0,
            discard_sectors_max: if discards { DISCARD_SECTORS_MAX } else { 0 },
            discard_unit: nodes.discard_granularity_bytes.unwrap_or(512).div_ceil(512),
            discard_first: nodes.discard_alignment_bytes / 512,
            zeroes_sectors_max: 0,
        })
    }

    fn is_away(&self) -> bool {
        !self.is_connected()
    }

    fn losses(&self) -> u32 {
        self.losses
    }

    fn returns(&self) -> u32 {
        self.returns
    }

    fn identity(&self) -> u64 {
        self.identity.0
    }

    fn settle(&mut self, verdict: &dyn Fn(DiskTag) -> Option<bool>) {
        for _ in 0..self.held.len() {
            let Some(work) = self.held.pop_front() else { return };
            match verdict(work.tag) {
                Some(true) => self.pending.push_back(work),
                Some(false) => self.answer(work, Err(StoreFault::Gone)),
                None => self.held.push_back(work),
            }
        }
    }

    fn is_left(&mut self, hv: &mut H) -> bool {
        // Once nobody maps a ring, nobody reads it; and a backend connects when the one before has
        // let go.
        self.end_left(hv);
        self.left.is_empty() && (self.shared.is_none() || self.is_connected())
    }

    fn submit(
        &mut self,
        hv: &mut H,
        pool: &Pool,
        _: usize,
        tag: DiskTag,
        io: DiskIo,
    ) -> DiskSubmit {
        let in_vain = self.waits_in_vain && !self.is_connected();
        if self.gone || self.nodes.is_none() || in_vain {
            return DiskSubmit::Fault(StoreFault::Gone);
        }
        let work = Work { tag, io, done: 0, resends: 0 };
        // What was taken earlier goes first.
        if !self.is_connected() || !self.pending.is_empty() || !self.send(hv, pool, work) {
            return DiskSubmit::NoRoom;
        }
        self.publish(hv);
        DiskSubmit::Taken
    }

    fn poll(&mut self, hv: &mut H, pool: &Pool, now_ns: u64) -> Option<DiskDone> {
        self.watch_the_wait(now_ns);
        if let Some(done) = self.done.pop_front() {
            return Some(done);
        }
        if self.is_connected() {
            self.take_responses(hv);
        }
        if self.is_connected() && !self.pending.is_empty() {
            self.send_pending(hv, pool);
        }
        self.done.pop_front()
    }

    fn poll_at_ns(&self) -> Option<u64> {
        if !self.done.is_empty() {
            return Some(0);
        }
        self.wait_until_ns.filter(|_| !self.waits_in_vain && !self.gone)
    }
}

/// The request type of an operation that moves data.
fn transfer_op(io: &DiskIo) -> u8 {
    if io.op == DiskOp::Write { op::WRITE } else { op::READ }
}
