//! The xenstore handshake of one disk: given the backend's nodes as they are now, what to write
//! below `device/vbd/<n>`. The decision is [`platter_xen::blkfront::decide`]; here it is done.
//!
//! Guards that rings and grants outlive every cycle: they are made once, because a backend is
//! known to have unmapped them only when it shows Closed, and the next cycle begins after that.

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use platter_xen::blkfront::{FrontAction, FrontView, decide};
use platter_xen::blkif::Abi;
use platter_xen::ring::FrontRing;
use platter_xen::vbd::{BACK_KEYS, BackFault, Connect, DiskNodes, Queue, front_nodes};
use platter_xen::xenbus::XenbusState;
use platter_xen::xenstore::decimal;
use platter_xen::{DomId, Hypervisor, Refusal, Region};

use super::{Blkfront, INDIRECT_PAGES, QUEUES_MAX, RING_PAGES, Shared};
use crate::bytes::Mark;
use crate::pool::Pool;

/// The backend's nodes as they stand; a missing one is `None`.
#[derive(Clone, Copy, Debug)]
pub struct BackNodes<'a, V> {
    pub state: Option<&'a [u8]>,
    /// What the toolstack told it to serve: another value is another disk.
    pub params: Option<&'a [u8]>,
    /// Values of [`platter_xen::vbd::BACK_KEYS`].
    pub values: &'a [Option<V>; 12],
}

/// Why a disk cannot be connected.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FrontFault {
    /// No frames for the ring and the pages of descriptors.
    Memory,
    /// No grants or event channel.
    Refused(Refusal),
    Nodes(BackFault),
}

/// What the caller does next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum FrontStep {
    /// Nothing, until a node of the backend changes.
    Wait,
    /// Write these nodes below our own directory, in this order, then ask again.
    Write(Vec<(String, String)>),
    /// As `Wait`, with a reason for people.
    Refused(FrontFault),
}

impl Blkfront {
    /// Decides from the backend's nodes. Call at each event on the backend's `state` with all
    /// nodes read anew, and after each write.
    pub fn update<H: Hypervisor, V: AsRef<[u8]>>(
        &mut self,
        hv: &mut H,
        pool: &mut Pool,
        back: BackNodes<'_, V>,
    ) -> FrontStep {
        let theirs = back.state.and_then(XenbusState::parse);
        // A ring that was found broken is closed in good order, then comes a new cycle.
        let wanted = self.wanted && !self.is_broken();
        let view = FrontView { own: self.own, back: theirs, wanted };
        match decide(&view) {
            FrontAction::Wait => {
                if self.is_connected() && theirs == Some(XenbusState::Connected) {
                    self.look_again(&back);
                }
                FrontStep::Wait
            }
            FrontAction::Publish => match self.offer(hv, pool, &back) {
                Ok(nodes) => self.write(XenbusState::Initialised, nodes),
                Err(fault) => FrontStep::Refused(fault),
            },
            FrontAction::Connect => match DiskNodes::parse(back.values) {
                Ok(nodes) => {
                    self.returns += u32::from(self.nodes.is_some());
                    self.held.append(&mut self.pending);
                    let block_bytes = nodes.sector_bytes.to_le_bytes();
                    let params = back.params.unwrap_or_default();
                    self.identity = Mark::NONE.with(params).with(&block_bytes);
                    self.nodes = Some(nodes);
                    self.counters.connects += 1;
                    self.vanished = false;
                    self.write(XenbusState::Connected, Vec::new())
                }
                Err(fault) => FrontStep::Refused(FrontFault::Nodes(fault)),
            },
            FrontAction::Close => {
                self.leave(theirs);
                self.write(XenbusState::Closing, Vec::new())
            }
            FrontAction::Release => {
                self.leave(theirs);
                self.close_ports(hv);
                self.write(XenbusState::Closed, Vec::new())
            }
            FrontAction::Restart => self.write(XenbusState::Initialising, Vec::new()),
        }
    }

    /// Orderly is what goes by way of Closing; a backend that shows anything else has not
    /// finished what it took.
    fn leave(&mut self, theirs: Option<XenbusState>) {
        let orderly = matches!(theirs, Some(XenbusState::Closing | XenbusState::Closed));
        if self.own == XenbusState::Connected {
            self.vanished = theirs.is_none();
            self.disconnect(orderly);
        }
        self.rings.clear();
    }

    /// The size may have changed while we are connected.
    fn look_again<V: AsRef<[u8]>>(&mut self, back: &BackNodes<'_, V>) {
        if let (Ok(now), Some(nodes)) = (DiskNodes::parse(back.values), &mut self.nodes) {
            nodes.sectors = now.sectors;
        }
    }

    fn write(&mut self, state: XenbusState, mut nodes: Vec<(String, String)>) -> FrontStep {
        self.own = state;
        nodes.push(("state".to_string(), state.number().to_string()));
        FrontStep::Write(nodes)
    }

    /// Rings, grants and a port for a new cycle.
    fn offer<H: Hypervisor, V: AsRef<[u8]>>(
        &mut self,
        hv: &mut H,
        pool: &mut Pool,
        back: &BackNodes<'_, V>,
    ) -> Result<Vec<(String, String)>, FrontFault> {
        if self.shared.is_none() {
            self.shared = Some(self.share(hv, pool)?);
        }
        self.close_ports(hv);
        self.rings.clear();
        let Some(shared) = &self.shared else { return Err(FrontFault::Memory) };
        let (count, pages) = layout(back);
        let mut queues = heapless::Vec::new();
        for index in 0..count {
            let port = hv.alloc_unbound(self.domid).map_err(FrontFault::Refused)?;
            let first = index * pages;
            let first_page = shared.rings.page(first).first_page;
            let region = Region { first_page, pages: pages as u32 };
            let ring = FrontRing::init(hv, region, Abi::X86_64);
            let grefs = shared.ring_grefs[first..][..pages].iter().copied().collect();
            let pushed = self.ports.push(port).is_ok() && self.rings.push(ring).is_ok();
            assert!(pushed && queues.push(Queue { grefs, port }).is_ok(), "queues that fit");
        }
        let mut nodes = front_nodes(&Connect { abi: Abi::X86_64, queues });
        self.take_back_names(&mut nodes, count, pages);
        // The pool's grants are for ever, so a backend may keep its mappings of them.
        nodes.push(("feature-persistent".to_string(), "1".to_string()));
        Ok(nodes)
    }

    /// What earlier cycles named stays in our directory: once queues were counted or pages
    /// numbered there, they always are.
    fn take_back_names(&mut self, nodes: &mut Vec<(String, String)>, count: usize, pages: usize) {
        self.queues_named |= count > 1;
        self.pages_named |= pages > 1;
        if self.queues_named && count == 1 {
            nodes.push(("multi-queue-num-queues".to_string(), "1".to_string()));
        }
        if self.pages_named && pages == 1 {
            let single = |(key, gref): &(String, String)| {
                key.ends_with("ring-ref").then(|| (alloc::format!("{key}0"), gref.clone()))
            };
            let numbered: Vec<(String, String)> = nodes.iter().filter_map(single).collect();
            nodes.extend(numbered);
            nodes.push(("ring-page-order".to_string(), "0".to_string()));
        }
    }

    /// Grants the pool, the ring and the pages of descriptors: once for all cycles.
    fn share<H: Hypervisor>(&mut self, hv: &mut H, pool: &mut Pool) -> Result<Shared, FrontFault> {
        if self.peer.is_none() {
            self.peer = Some(pool.grant_to(hv, self.domid).map_err(FrontFault::Refused)?);
        }
        let rings = hv.frames_alloc(RING_PAGES).ok_or(FrontFault::Memory)?;
        let Some(indirect) = hv.frames_alloc(INDIRECT_PAGES) else {
            hv.frames_free(rings);
            return Err(FrontFault::Memory);
        };
        let (ring_grefs, indirect_grefs) = (Vec::new(), Vec::new());
        let mut shared = Shared { rings, ring_grefs, indirect, indirect_grefs };
        match shared.grant_all(hv, self.domid) {
            Ok(()) => Ok(shared),
            Err(refusal) => {
                // It is tried again at every event of the backend.
                shared.end(hv);
                Err(FrontFault::Refused(refusal))
            }
        }
    }
}

impl Shared {
    fn grant_all<H: Hypervisor>(&mut self, hv: &mut H, domid: DomId) -> Result<(), Refusal> {
        let parts = [(self.rings, &mut self.ring_grefs), (self.indirect, &mut self.indirect_grefs)];
        for (region, grefs) in parts {
            for page in 0..region.pages as usize {
                grefs.push(hv.grant(domid, region.page(page), true)?);
            }
        }
        Ok(())
    }
}

/// Queues, and pages of each ring, by what the backend offers: as many queues as we know, and
/// the pages shared among them. Before Connected only these limits need to be there.
fn layout<V: AsRef<[u8]>>(back: &BackNodes<'_, V>) -> (usize, usize) {
    let offered = |key: &str| {
        let index = BACK_KEYS.iter().position(|name| *name == key)?;
        decimal(back.values[index].as_ref()?.as_ref())
    };
    let queues = offered("multi-queue-max-queues").unwrap_or(1).clamp(1, QUEUES_MAX as u64);
    let order_max = (RING_PAGES / queues as usize).ilog2();
    let order = offered("max-ring-page-order").unwrap_or(0).min(u64::from(order_max));
    (queues as usize, 1 << order)
}
