//! An NVMe controller as a [`Device`]: its namespaces are the units (NVM Express 1.4).
//!
//! Guards: an operation that was taken is answered once, whatever the controller does. A command
//! that takes too long is aborted, then the controller is reset and everything that was with it
//! is sent again (reads, writes of the same bytes, flushes and deallocations may be repeated);
//! a controller that cannot be stopped keeps its pages for ever ([`Held::Device`]). Completions are
//! polled: no interrupt is enabled. Must never: wait, or use a page that the controller may
//! still write.

mod bringup;
mod command;
mod identify;
mod pci;
mod queue;
mod recovery;
mod regs;
#[cfg(test)]
mod tests;

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use platter_xen::{Bus, Hypervisor, Mmio, PAGE_BYTES, Region};

use crate::disk::{Device, DiskDone, DiskIo, DiskOp, DiskSubmit, DiskTag, Geometry, Held};
use crate::pool::{Pool, RUN_PAGES_MAX};
use crate::store::StoreFault;
use bringup::Phase;
use command::{Command, Status, range};
use queue::{ENTRIES_MAX, Queue, Slot, Taken, Work};

pub use identify::{
    ControllerInfo, Health, NAMESPACES_MAX, NamespaceInfo, Unusable, parse_namespace_list,
};
pub use pci::{Function, PciRefusal, Probe};

/// I/O queue pairs at most (ours): one vCPU needs more than one only for depth.
const PAIRS_MAX: usize = 4;
/// How often an operation is sent again after a transient status or a reset.
const RETRIES_MAX: u8 = 3;
/// Most blocks of a Write Zeroes (NLB is 16 bits, zero based; NVMe 1.4, 6.16).
const ZEROES_BLOCKS_MAX: u32 = 65_536;
/// Most sectors of one deallocation (ours: 1 GiB, so that none takes seconds).
const DISCARD_SECTORS_MAX: u32 = 2 << 20;
/// How soon to look again while commands are out: a quarter of what they took lately, so that
/// looking costs little and delays an answer by little; within these bounds (ours).
const LOOK_AGAIN_NS_MIN: u64 = 10_000;
const LOOK_AGAIN_NS_MAX: u64 = 250_000;
/// When nothing was sent or came back for long, a sixteenth of that time, up to this (ours): a
/// controller that swallowed a command is no reason to be busy until it is aborted.
const LOOK_SELDOM_NS_MAX: u64 = 250_000_000;

/// How long an orderly shutdown may take (ours; Linux waits as long by default).
const SHUTDOWN_NS: u64 = 5_000_000_000;

/// A namespace that can be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Namespace {
    nsid: u32,
    /// `None` while it is not there.
    info: Option<NamespaceInfo>,
    /// Of the first look: block size, NGUID and EUI64.
    first: Option<(u32, [u8; 24])>,
}

impl Namespace {
    const fn new(nsid: u32) -> Namespace {
        Namespace { nsid, info: None, first: None }
    }

    /// One that has become another meanwhile, or was formatted to another block size, in whose
    /// blocks what waits was not cut, is gone.
    fn see(&mut self, info: Option<NamespaceInfo>) {
        let what = |info: NamespaceInfo| (info.block_bytes, info.unique);
        self.first = self.first.or(info.map(what));
        self.info = info.filter(|info| self.first == Some(what(*info)));
    }
}

/// Counters for the statistics.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    pub timeouts: u64,
    pub aborts: u64,
    pub resets: u64,
    /// Commands that ended with an error status.
    pub errors: u64,
    pub retries: u64,
    /// The last error status: type and code.
    pub last_status: u16,
}

/// See the module's head.
pub struct Nvme {
    mmio: Mmio,
    stride: usize,
    entries_max: u16,
    timeout_ns: u64,
    /// It is of version 1.1 or later.
    has_list: bool,
    phase: Phase,
    admin: Queue,
    pairs: Vec<Queue>,
    /// Pairs that the controller granted and that exist.
    pairs_live: usize,
    /// A page for what Identify and log pages answer.
    page: Region,
    info: Option<ControllerInfo>,
    /// What the controller was before it went away.
    expected: Option<ControllerInfo>,
    /// It is not the one that was expected, and is not used.
    is_another: bool,
    namespaces: Vec<Namespace>,
    /// Operations that wait to be sent (again), in order.
    pending: VecDeque<Work>,
    /// Answers not yet given.
    done: VecDeque<DiskDone>,
    next_pair: usize,
    /// Next look for commands that take too long, and for the health page.
    next_check_ns: u64,
    next_health_ns: u64,
    now_ns: u64,
    /// What a command took lately, as far as we looked: a moving average.
    latency_ns: u64,
    /// When an operation was last sent or came back; `MAX` until the next poll tells the time.
    stirred_ns: u64,
    /// Resets since a command last succeeded.
    resets_in_vain: u8,
    counters: Counters,
    health: Option<Health>,
    /// Times that it was reset from below, and so perhaps lost its volatile cache.
    losses: u32,
    shuts_down_by_ns: Option<u64>,
    events_wanted: bool,
    namespaces_changed: bool,
}

/// Why a controller cannot be used at all.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unfit {
    /// Its registers read as all ones.
    Gone,
    /// It lacks the NVM command set or pages of 4 KiB.
    Capabilities,
    /// Its doorbells lie beyond the registers that were mapped.
    Doorbells,
    /// No frames for its queues.
    Memory,
}

/// Pages of registers to map: the controller's own and the doorbells of our queues with the
/// usual stride.
pub const MMIO_PAGES: usize = 2;

/// The admin queue, so many pairs and a page for answers: all of it or nothing.
fn memory<H: Hypervisor>(hv: &mut H, pairs_max: usize) -> Option<(Queue, Vec<Queue>, Region)> {
    let mut queues: Vec<Queue> =
        (0..=pairs_max as u16).map_while(|id| Queue::new(hv, id, id > 0)).collect();
    let page = hv.frames_alloc(1);
    if let Some(page) = page
        && queues.len() == pairs_max + 1
    {
        return Some((queues.remove(0), queues, page));
    }
    queues.into_iter().for_each(|queue| queue.free(hv));
    page.into_iter().for_each(|page| hv.frames_free(page));
    None
}

impl Nvme {
    /// Starts a controller whose first [`MMIO_PAGES`] pages of BAR0 are mapped.
    pub fn new<H: Hypervisor + Bus>(hv: &mut H, mmio: Mmio) -> Result<Nvme, Unfit> {
        let cap = regs::Cap(hv.mmio_read_u64(mmio, regs::CAP));
        if cap.0 == u64::MAX {
            return Err(Unfit::Gone);
        }
        if !cap.has_nvm_commands() || !cap.has_small_pages() || cap.entries_max() < 2 {
            return Err(Unfit::Capabilities);
        }
        let stride = cap.doorbell_stride();
        let doorbells = (mmio.pages as usize * PAGE_BYTES).saturating_sub(regs::DOORBELLS);
        // Admin queue and one pair at least: four doorbells.
        let pairs_max = (doorbells / (2 * stride)).saturating_sub(1).min(PAIRS_MAX);
        if pairs_max == 0 {
            return Err(Unfit::Doorbells);
        }
        let (admin, pairs, page) = memory(hv, pairs_max).ok_or(Unfit::Memory)?;
        let entries_max = cap.entries_max().min(u32::from(ENTRIES_MAX)) as u16;
        let work_max = pairs_max * usize::from(ENTRIES_MAX);
        let mut nvme = Nvme {
            mmio,
            stride,
            entries_max,
            timeout_ns: cap.timeout_ns(),
            has_list: hv.mmio_read_u32(mmio, regs::VS) >= regs::VERSION_1_1,
            phase: Phase::Start,
            admin,
            pairs,
            pairs_live: 0,
            page,
            info: None,
            expected: None,
            is_another: false,
            namespaces: Vec::with_capacity(NAMESPACES_MAX),
            pending: VecDeque::with_capacity(2 * work_max),
            done: VecDeque::with_capacity(2 * work_max),
            next_pair: 0,
            next_check_ns: 0,
            next_health_ns: 0,
            now_ns: 0,
            latency_ns: 0,
            stirred_ns: 0,
            resets_in_vain: 0,
            counters: Counters::default(),
            health: None,
            losses: 0,
            shuts_down_by_ns: None,
            events_wanted: false,
            namespaces_changed: false,
        };
        nvme.stop(hv);
        Ok(nvme)
    }

    /// Takes the place of another, whose disks are in use: the same numbers for its namespaces,
    /// and nothing at all when it is not that very controller (serial number and model).
    pub fn succeed(&mut self, old: &Nvme) {
        self.namespaces.clear();
        let away = |known: &Namespace| Namespace { info: None, ..*known };
        self.namespaces.extend(old.namespaces.iter().map(away));
        self.expected = old.info.or(old.expected);
    }

    /// Serial, model and firmware, once identified.
    pub fn info(&self) -> Option<&ControllerInfo> {
        self.info.as_ref()
    }

    /// It is not the controller whose place it took, and is not used.
    pub fn is_another(&self) -> bool {
        self.is_another
    }

    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// The last SMART page, read once a minute.
    pub fn health(&self) -> Option<Health> {
        self.health
    }

    /// All namespaces are known and operations go out.
    pub fn is_ready(&self) -> bool {
        self.phase == Phase::Ready
    }

    /// It has failed for good, or was taken away.
    pub fn is_dead(&self) -> bool {
        matches!(self.phase, Phase::Dead { .. })
    }

    /// Asks for an orderly shutdown, which saves the drive an unsafe one in its statistics: call
    /// until it says true, which is when the shutdown is complete (CSTS.SHST), when it has taken
    /// too long, or when there is nothing to shut down. What is outstanding fails; nothing is
    /// taken afterwards.
    pub fn shut_down<H: Hypervisor + Bus>(&mut self, hv: &mut H, now_ns: u64) -> bool {
        if self.is_ready() {
            hv.mmio_write_u32(self.mmio, regs::CC, regs::CC_ENABLED | regs::CC_SHUTDOWN);
            self.die(false);
            self.shuts_down_by_ns = Some(now_ns.saturating_add(SHUTDOWN_NS));
        }
        let Some(by_ns) = self.shuts_down_by_ns else { return self.is_dead() };
        let csts = regs::Csts(hv.mmio_read_u32(self.mmio, regs::CSTS));
        if csts.is_gone() || csts.is_shut_down() {
            self.phase = Phase::Dead { stopped: true };
            return true;
        }
        now_ns >= by_ns
    }

    /// Gives back what a dead controller no longer writes to, and its registers.
    pub fn free<H: Hypervisor + Bus>(self, hv: &mut H) {
        hv.unmap_mmio(self.mmio);
        if self.phase == (Phase::Dead { stopped: true }) {
            hv.frames_free(self.page);
            self.pairs.into_iter().chain([self.admin]).for_each(|queue| queue.free(hv));
        }
    }

    fn namespace(&self, unit: usize) -> Option<(u32, NamespaceInfo)> {
        let namespace = self.namespaces.get(unit)?;
        Some((namespace.nsid, namespace.info?))
    }

    /// Operations not answered.
    fn outstanding(&self) -> usize {
        let out: u16 = self.pairs.iter().map(Queue::used).sum();
        usize::from(out) + self.pending.len()
    }

    /// Sends an operation to a pair with room; false when there is none.
    fn send<H: Hypervisor + Bus>(&mut self, hv: &mut H, pool: &Pool, work: Work) -> bool {
        let Some((nsid, info)) = self.namespace(usize::from(work.unit)) else {
            let gone = Err(StoreFault::Gone);
            self.done.push_back(DiskDone { tag: work.tag, result: gone, held: Held::Nobody });
            return true;
        };
        for _ in 0..self.pairs_live {
            self.next_pair = (self.next_pair + 1) % self.pairs_live;
            let pair = &mut self.pairs[self.next_pair];
            let Some(slot) = pair.free_slot() else { continue };
            let command = build(hv, pool, pair, slot, nsid, &info, work.io);
            let held = Slot { work: Some(work), sent_ns: self.now_ns, aborting: false };
            pair.push(hv, slot, &command, held);
            pair.ring(hv, self.mmio, self.stride);
            self.stirred_ns = u64::MAX;
            return true;
        }
        false
    }

    /// Takes completions from all pairs.
    fn take_completions<H: Hypervisor + Bus>(&mut self, hv: &mut H) {
        for index in 0..self.pairs_live {
            let mut any = false;
            loop {
                match self.pairs[index].take(hv) {
                    Taken::Nothing => break,
                    Taken::Unknown => return self.reset(hv),
                    Taken::Command(completion, slot) => {
                        any = true;
                        self.stirred_ns = u64::MAX;
                        let Some(work) = slot.work else { continue };
                        let took_ns = self.now_ns.saturating_sub(slot.sent_ns);
                        self.latency_ns = self.latency_ns / 8 * 7 + took_ns / 8;
                        self.complete(work, completion.status);
                    }
                }
            }
            if any {
                self.pairs[index].report_head(hv, self.mmio, self.stride);
            }
        }
    }

    /// One operation came back.
    fn complete(&mut self, mut work: Work, status: Status) {
        let mut result = Ok(());
        if status.is_success() {
            self.resets_in_vain = 0;
        } else {
            self.counters.errors += 1;
            self.counters.last_status = status.code();
            if status.is_transient() && work.retries < RETRIES_MAX {
                work.retries += 1;
                self.counters.retries += 1;
                return self.pending.push_back(work);
            }
            result = Err(status.fault());
        }
        self.done.push_back(DiskDone { tag: work.tag, result, held: Held::Nobody });
    }

    /// Sends what waits while there is room.
    fn send_pending<H: Hypervisor + Bus>(&mut self, hv: &mut H, pool: &Pool) {
        while let Some(work) = self.pending.pop_front() {
            if !self.send(hv, pool, work) {
                self.pending.push_front(work);
                return;
            }
        }
    }
}

/// The command of an operation. Its pages become a PRP entry and a list (NVMe 1.4, 4.3).
fn build<H: Hypervisor>(
    hv: &mut H,
    pool: &Pool,
    pair: &Queue,
    slot: u16,
    nsid: u32,
    info: &NamespaceInfo,
    io: DiskIo,
) -> Command {
    let unit = info.block_bytes / 512;
    let (slba, blocks) = (io.sector / u64::from(unit), io.sectors / unit);
    match io.op {
        DiskOp::Flush => Command::flush(nsid),
        DiskOp::Zeroes => Command::write_zeroes(nsid, slba, blocks, info.zeroes_deallocate),
        DiskOp::Discard => {
            let at = pair.put_list(hv, slot, 0, &range(slba, blocks));
            Command::deallocate(nsid, at)
        }
        DiskOp::Read | DiskOp::Write => {
            let pages = (io.sectors as usize * 512).div_ceil(PAGE_BYTES);
            assert!((1..=RUN_PAGES_MAX).contains(&pages), "pages of one transfer");
            let first = pool.dma_address(hv, io.page);
            let second = match pages {
                1 => 0,
                2 => pool.dma_address(hv, io.page + 1),
                _ => {
                    let mut list = [0; (RUN_PAGES_MAX - 1) * 8];
                    for (entry, page) in list.chunks_exact_mut(8).zip(1..pages as u16) {
                        let address = pool.dma_address(hv, io.page + page);
                        entry.copy_from_slice(&address.to_le_bytes());
                    }
                    pair.put_list(hv, slot, 0, &list[..(pages - 1) * 8])
                }
            };
            Command::transfer(io.op == DiskOp::Write, nsid, slba, blocks, (first, second))
        }
    }
}

impl<H: Hypervisor + Bus> Device<H> for Nvme {
    fn units(&self) -> usize {
        self.namespaces.len()
    }

    fn unit_number(&self, unit: usize) -> Option<u32> {
        self.namespaces.get(unit).map(|namespace| namespace.nsid)
    }

    fn geometry(&self, unit: usize) -> Option<Geometry> {
        let (_, info) = self.namespace(unit)?;
        let controller = self.info.as_ref().filter(|_| !self.is_dead())?;
        let unit = info.block_bytes / 512;
        let most = (RUN_PAGES_MAX * PAGE_BYTES) as u64;
        let transfer = controller.transfer_bytes_max.map_or(most, |limit| limit.min(most));
        let zeroes = if controller.write_zeroes { ZEROES_BLOCKS_MAX * unit } else { 0 };
        let discard = if controller.dataset_management { DISCARD_SECTORS_MAX } else { 0 };
        Some(Geometry {
            sectors: info.sectors(),
            block_bytes: info.block_bytes,
            io_bytes_max: transfer as u32,
            read_only: info.write_protected,
            discard_sectors_max: discard,
            discard_unit: unit,
            discard_first: 0,
            zeroes_sectors_max: zeroes,
        })
    }

    fn losses(&self) -> u32 {
        self.losses
    }

    fn submit(
        &mut self,
        hv: &mut H,
        pool: &Pool,
        unit: usize,
        tag: DiskTag,
        io: DiskIo,
    ) -> DiskSubmit {
        if self.is_dead() || self.namespace(unit).is_none() {
            return DiskSubmit::Fault(StoreFault::Gone);
        }
        // What was taken before a reset goes first.
        if !self.is_ready() || !self.pending.is_empty() {
            return DiskSubmit::NoRoom;
        }
        let work = Work { tag, unit: unit as u8, io, retries: 0 };
        if self.send(hv, pool, work) { DiskSubmit::Taken } else { DiskSubmit::NoRoom }
    }

    fn poll(&mut self, hv: &mut H, pool: &Pool, now_ns: u64) -> Option<DiskDone> {
        if let Some(done) = self.done.pop_front() {
            return Some(done);
        }
        self.now_ns = now_ns;
        if self.is_ready() {
            self.take_completions(hv);
        }
        self.stirred_ns = self.stirred_ns.min(now_ns);
        self.advance(hv);
        if self.is_ready() {
            self.watch(hv);
        }
        if self.is_ready() {
            self.send_pending(hv, pool);
        }
        self.done.pop_front()
    }

    fn poll_at_ns(&self) -> Option<u64> {
        match self.phase {
            Phase::Dead { .. } => None,
            _ if !self.done.is_empty() => Some(0),
            Phase::Ready if self.outstanding() == 0 => Some(self.next_check_ns),
            Phase::Ready => {
                let soon_ns = (self.latency_ns / 4).clamp(LOOK_AGAIN_NS_MIN, LOOK_AGAIN_NS_MAX);
                let quiet_ns = self.now_ns.saturating_sub(self.stirred_ns);
                let seldom_ns = (quiet_ns / 16).min(LOOK_SELDOM_NS_MAX);
                Some(self.now_ns.saturating_add(soon_ns.max(seldom_ns)))
            }
            _ => Some(self.now_ns.saturating_add(bringup::STEP_NS)),
        }
    }
}
