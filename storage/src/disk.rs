//! What a block device is to the block store: units (a disk, NVMe namespaces) that take reads,
//! writes, flushes and discards of 512-byte sectors, asynchronously, each answered once.
//!
//! Guards: a tag is the caller's and is answered exactly once through [`Device::poll`]; data
//! pages belong to the device from a taken submit to its answer. A device never waits, reads no
//! clock and never reports a flush that its hardware or backend did not confirm. What a device
//! that lost its cache takes with it is the block store's account, file by file.

use platter_xen::Hypervisor;

use crate::StoreFault;
use crate::pool::Pool;

/// The unit of every sector number here, whatever the disk's own block size (as on blkif).
pub const SECTOR_BYTES: u32 = 512;

/// No disk is served beyond these: sizes in bytes stay below 2^63, as files' do.
pub const SECTORS_MAX: u64 = i64::MAX as u64 / SECTOR_BYTES as u64;

/// The caller's name for one outstanding operation of a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DiskTag(pub u16);

/// What a unit is and can do, once it is ready.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Capacity in 512-byte sectors.
    pub sectors: u64,
    /// The smallest unit it reads and writes: 512 to 4096, a power of two.
    pub block_bytes: u32,
    /// Most bytes of one read or write, a multiple of 4096.
    pub io_bytes_max: u32,
    pub read_only: bool,
    /// Most sectors of one discard, which leaves the range to read as anything; 0: none taken.
    pub discard_sectors_max: u32,
    /// Discards begin and end at multiples of so many sectors, counted from this one on.
    pub discard_unit: u32,
    pub discard_first: u32,
    /// Most sectors of one operation that makes a range read as zeros; 0: none taken.
    pub zeroes_sectors_max: u32,
}

/// What to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DiskOp {
    Read,
    Write,
    /// Everything answered before is made durable. `sector`, `sectors` and `page` mean nothing.
    Flush,
    Discard,
    /// Makes the range read as zeros, giving the space back where the device can.
    Zeroes,
}

/// One operation. Ranges are proved by the caller: aligned to the block, inside the capacity.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DiskIo {
    pub op: DiskOp,
    /// First 512-byte sector.
    pub sector: u64,
    /// Length in 512-byte sectors, within the limits of [`Geometry`].
    pub sectors: u32,
    /// First page of the data in the pool; the data starts at its byte 0.
    pub page: u16,
}

/// The answer to a submit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DiskSubmit {
    /// Taken whole; an answer will come.
    Taken,
    /// No room now; nothing was done.
    NoRoom,
    /// Refused for good; no answer will come.
    Fault(StoreFault),
}

/// One answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DiskDone {
    pub tag: DiskTag,
    pub result: Result<(), StoreFault>,
    pub held: Held,
}

/// Who may still write to the pages of an operation that failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Held {
    Nobody,
    /// A backend, by its number as a peer of the pool: until [`Device::is_left`] says so and it
    /// has let go of the pages.
    Backend(usize),
    /// A device that cannot be stopped: they are never used again.
    Device,
}

/// Something with disks in it. Static dispatch: `H` is the machine or the simulator.
pub trait Device<H: Hypervisor> {
    /// Units so far; grows while namespaces are found, never shrinks.
    fn units(&self) -> usize;

    /// What follows the device's name in the name of a unit: the namespace's number of an NVMe
    /// controller, nothing for a disk that is its own device.
    fn unit_number(&self, unit: usize) -> Option<u32>;

    /// Geometry of one unit; `None` while it is not ready, absent or gone.
    fn geometry(&self, unit: usize) -> Option<Geometry>;

    /// It waits for somebody who may not come for a long time, and operations with it.
    fn is_away(&self) -> bool {
        false
    }

    /// How often a volatile cache was lost so far, and with it perhaps writes that were answered
    /// and not flushed.
    fn losses(&self) -> u32;

    /// How often it came back after it was away: perhaps as another disk under the same name.
    fn returns(&self) -> u32 {
        0
    }

    /// What it says of itself, as a number: that of another disk is another one.
    fn identity(&self) -> u64 {
        0
    }

    /// What was unanswered when it went away waits for this verdict: sent again, answered
    /// [`StoreFault::Gone`], or, at `None`, kept waiting.
    fn settle(&mut self, verdict: &dyn Fn(DiskTag) -> Option<bool>) {
        let _ = verdict;
    }

    /// No backend takes requests any more off rings that we gave up: pages that are
    /// [`Held::Backend`] come back as their grants end.
    fn is_left(&mut self, hv: &mut H) -> bool {
        let _ = hv;
        false
    }

    /// Starts an operation.
    fn submit(
        &mut self,
        hv: &mut H,
        pool: &Pool,
        unit: usize,
        tag: DiskTag,
        io: DiskIo,
    ) -> DiskSubmit;

    /// Takes in events and yields the next answer; the caller calls until `None`.
    fn poll(&mut self, hv: &mut H, pool: &Pool, now_ns: u64) -> Option<DiskDone>;

    /// When [`poll`](Self::poll) must be called next even without an event: 0 means again at
    /// once (a polled device with work outstanding), `None` that events suffice.
    fn poll_at_ns(&self) -> Option<u64>;
}
