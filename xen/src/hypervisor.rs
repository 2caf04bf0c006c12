//! Seam 1: what platter needs of the machine, as safe methods.
//!
//! `arch` implements this with hypercalls, `sim` with a deterministic world; nothing else does.
//! Memory that another domain can write is never handed out as a reference: it is named by a
//! [`Region`] and copied, once, into private memory. An implementation asserts that a region is
//! one it gave out and that the access lies inside it: both are ours to keep, not a guest's.

/// Bytes in a page of x86 (Xen public/arch-x86/xen.h, `PAGE_SIZE`).
pub const PAGE_BYTES: usize = 4096;

/// A domain identifier (Xen public/xen.h, `domid_t`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct DomId(pub u16);

/// A grant reference, meaningful only with the domain that gave it (public/grant_table.h).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Gref(pub u32);

/// A local event channel port (public/event_channel.h).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Port(pub u32);

/// A run of pages, contiguous in our address space, that other domains or devices may share:
/// our own frames (from [`Hypervisor::frames_alloc`]) or mapped grants (from
/// [`Hypervisor::map`]). Never part of the Rust heap.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Region {
    /// Number of the first page in the implementation's own numbering.
    pub first_page: u32,
    /// Length in pages, at least 1.
    pub pages: u32,
}

impl Region {
    /// Length in bytes.
    pub const fn bytes(self) -> usize {
        self.pages as usize * PAGE_BYTES
    }

    /// Page `index` of this region as a region of its own. Panics when out of range.
    pub fn page(self, index: usize) -> Region {
        assert!(index < self.pages as usize, "page index beyond its region");
        Region { first_page: self.first_page + index as u32, pages: 1 }
    }
}

/// Which way [`Hypervisor::copy`] moves bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    FromGuest,
    ToGuest,
}

/// One GNTTABOP_copy between a granted page of `domid` and one page of a region of ours.
/// Neither side may cross its page: `gref_offset + len` and `page_offset + len` are at most 4096.
#[derive(Clone, Copy, Debug)]
pub struct GrantCopy {
    pub domid: DomId,
    pub gref: Gref,
    /// Byte offset in the granted page.
    pub gref_offset: u16,
    /// Our page: a one-page region.
    pub page: Region,
    /// Byte offset in our page.
    pub page_offset: u16,
    /// Bytes to copy, 1 to 4096.
    pub len: u16,
    pub direction: Direction,
    /// Filled by [`Hypervisor::copy`]: GNTST_okay is 0, everything else is a refusal.
    pub status: i16,
}

/// Why the hypervisor refused something. Carries Xen's own number for the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// A grant operation failed with this GNTST_* status (public/grant_table.h).
    Grant(i16),
    /// A hypercall returned this negative errno (public/errno.h).
    Errno(i32),
    /// Our own table of ports, grants or address space is full.
    Full,
}

/// The machine, seen by everything above `arch`.
pub trait Hypervisor {
    // Our own memory.

    /// Takes `pages` zeroed frames, contiguous in address (not in machine memory). `None` when
    /// the pool is used up. Called at start and attach only, never on the request path.
    fn frames_alloc(&mut self, pages: usize) -> Option<Region>;
    /// Gives frames back. They must not be granted or in use by a device any more.
    fn frames_free(&mut self, region: Region);
    /// Frames left in the pool.
    fn frames_left(&self) -> usize;
    /// The address a device uses for page `index` of `region` (PV: machine frame << 12).
    fn dma_address(&self, region: Region, index: usize) -> u64;

    // Shared memory, by copy only.

    /// Copies `into.len()` bytes out of `region` from `offset`, reading each byte exactly once.
    fn read(&self, region: Region, offset: usize, into: &mut [u8]);
    /// Copies `from` into `region` at `offset`.
    fn write(&mut self, region: Region, offset: usize, from: &[u8]);
    /// One aligned volatile 32-bit load, ordered before all that follows (acquire).
    fn load_u32(&self, region: Region, offset: usize) -> u32;
    /// One aligned volatile 32-bit store, ordered after all that precedes (release).
    fn store_u32(&mut self, region: Region, offset: usize, value: u32);
    /// A full memory barrier (store-load): needed after publishing `req_event` and `rsp_prod`.
    fn fence(&self);
    /// Copies bytes between two of our regions, for what no grant copy can place directly.
    fn move_bytes(&mut self, from: (Region, usize), to: (Region, usize), len: usize);
    /// Zeroes `len` bytes of `region` from `offset`.
    fn zero(&mut self, region: Region, offset: usize, len: usize);

    // Grants that we give.

    /// Grants `domid` access to our one-page region.
    fn grant(&mut self, domid: DomId, page: Region, writable: bool) -> Result<Gref, Refusal>;
    /// Ends a grant. False when the other side still has it mapped: try again later, and keep
    /// the page until it succeeds.
    fn revoke(&mut self, gref: Gref) -> bool;

    // Grants that we take.

    /// Maps pages of `domid`, contiguous and in order. All or nothing.
    fn map(&mut self, domid: DomId, grefs: &[Gref]) -> Result<Region, Refusal>;
    fn unmap(&mut self, region: Region);
    /// Runs a batch of grant copies and fills each `status`. Never fails as a whole.
    fn copy(&mut self, ops: &mut [GrantCopy]);

    // Events. All are masked; the loop polls.

    fn bind_interdomain(&mut self, domid: DomId, remote: Port) -> Result<Port, Refusal>;
    fn alloc_unbound(&mut self, domid: DomId) -> Result<Port, Refusal>;
    fn close_port(&mut self, port: Port);
    /// Tells the other end, at the latest before the next sleep.
    fn notify(&mut self, port: Port);
    /// Atomically reads and clears the pending bit of `port`.
    fn take_pending(&mut self, port: Port) -> bool;
}
