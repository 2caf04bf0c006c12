//! [`Machine`]: the one implementation of [`Hypervisor`] that is real.
//!
//! What another domain, Xen or a device can write is never referred to, only copied, and only
//! where a region was given out: each access is checked against the maps of what is taken, so a
//! forged or stale [`Region`] is a panic and never a stray write. It knows no protocol.

use core::ptr;
use core::sync::atomic::{Ordering, compiler_fence, fence};

use platter_xen::{DomId, GrantCopy, Gref, Hypervisor, PAGE_BYTES, Port, Refusal, Region};

use crate::events::Outbox;
use crate::grants::{CopyBatch, GrantMaps, GrantTable};
use crate::hypercall::{self, POLL_PORTS_MAX};
use crate::layout::{GRANT_MAPS, MMIO_PAGES, PAGE_SHIFT, page_address, page_number};
use crate::paging::AddressSpace;
use crate::runs::Runs;
use crate::{console, copy, events, shared};

/// With more ports than one poll takes, how long the ports left out may wait.
const CROWDED_POLL_NS: u64 = 1_000_000;

/// What the kernel learns at its start.
#[derive(Clone, Copy, Debug)]
pub struct BootInfo {
    /// Our own number.
    pub domid: DomId,
    /// All memory of the domain, the kernel's own included.
    pub memory_pages: usize,
    /// The xenstore ring (Xen public/io/xs_wire.h), one page, shared with the xenstore domain.
    pub xenstore_page: Region,
    pub xenstore_port: Port,
    /// System time of the kernel's first instruction.
    pub start_ns: u64,
    /// `cmdline=` or `extra=` of the domain's configuration.
    pub cmdline: &'static str,
}

/// Why the domain ends (Xen public/sched.h, SHUTDOWN_*). A crash is what a panic gives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shutdown {
    Poweroff,
    Reboot,
}

/// The machine. There is one, made before the kernel's main function.
pub struct Machine {
    pub(crate) space: AddressSpace,
    pool: Runs,
    /// Number of the pool's first page.
    pool_start: u32,
    grants: GrantTable,
    maps: GrantMaps,
    copies: CopyBatch,
    pub(crate) mmio: Runs,
    xenstore_page: Region,
    /// Events are gathered.
    gathers: bool,
    outbox: Outbox,
}

impl Machine {
    /// # Safety
    /// From `pool_start` to the end of `space` all is unused, and writable as far as it is
    /// mapped; the xenstore page is mapped, and the windows hold nothing but the shared page.
    /// Once only.
    pub(crate) unsafe fn new(
        space: AddressSpace,
        pool_start: u32,
        xenstore_page: Region,
    ) -> Machine {
        let pool_pages = page_number(space.end()) - pool_start;
        Machine {
            space,
            pool: Runs::new(pool_pages as usize),
            pool_start,
            grants: GrantTable::new(),
            maps: GrantMaps::new(),
            copies: CopyBatch::new(),
            mmio: Runs::new(MMIO_PAGES),
            xenstore_page,
            gathers: false,
            outbox: Outbox::new(),
        }
    }

    /// System time in ns.
    pub fn now_ns(&self) -> u64 {
        shared::now_ns()
    }

    /// From now on an event leaves at once, or, if they are gathered, with the next sleep or
    /// [`Machine::send_events`], and no sooner.
    pub fn gather_events(&mut self, gathers: bool) {
        self.gathers = gathers;
        self.send_events();
    }

    /// Sends the events that were gathered.
    pub fn send_events(&mut self) {
        self.outbox.send();
    }

    /// Sleeps until one of `ports` is pending or the time has come; `u64::MAX` is never. May
    /// return early: Xen ends a sleep on several ports at any event of the domain, the console's
    /// too. The caller looks at the pending bits. Beyond 127 ports, whether one of the rest was
    /// pending before is looked at after a millisecond.
    pub fn poll(&mut self, ports: &[Port], deadline_ns: u64) {
        let mut numbers = [0u32; POLL_PORTS_MAX];
        // The last place is kept for the console, while it has something left to say.
        let listed = &ports[..ports.len().min(POLL_PORTS_MAX - 1)];
        let mut count = 0;
        for port in listed.iter().copied().chain(console::before_sleep()) {
            numbers[count] = port.0;
            count += 1;
        }
        let deadline_ns = match listed.len() < ports.len() {
            true => deadline_ns.min(self.now_ns().saturating_add(CROWDED_POLL_NS)),
            false => deadline_ns,
        };
        let timeout_ns = if deadline_ns == u64::MAX { 0 } else { deadline_ns.max(1) };
        self.outbox.sleep(&mut numbers[..count], timeout_ns);
    }

    /// Ends the domain.
    pub fn shutdown(&mut self, why: Shutdown) -> ! {
        self.send_events();
        console::flush();
        hypercall::sched_shutdown(match why {
            Shutdown::Poweroff => xen_sys::SHUTDOWN_poweroff,
            Shutdown::Reboot => xen_sys::SHUTDOWN_reboot,
        })
    }

    /// Index within the pool of pages that are all given out.
    fn in_pool(&self, first_page: u32, pages: usize) -> Option<usize> {
        let index = first_page.checked_sub(self.pool_start)? as usize;
        self.pool.all_taken(index, pages).then_some(index)
    }

    fn in_maps(&self, first_page: u32, pages: usize) -> Option<usize> {
        let index = first_page.checked_sub(page_number(GRANT_MAPS))? as usize;
        self.maps.all_mapped(index, pages).then_some(index)
    }

    /// The address of `len` bytes of a region, after a check that each page is given out.
    fn locate(&self, region: Region, offset: usize, len: usize) -> u64 {
        let end = offset.checked_add(len);
        assert!(end.is_some_and(|end| end <= region.bytes()), "access beyond its region");
        let first_page = region.first_page + (offset / PAGE_BYTES) as u32;
        let pages = (offset % PAGE_BYTES + len).div_ceil(PAGE_BYTES).max(1);
        let known = self.in_pool(first_page, pages).is_some()
            || self.in_maps(first_page, pages).is_some()
            || first_page == self.xenstore_page.first_page && pages == 1;
        assert!(known, "a region that was not given out: page {first_page:#x}");
        page_address(region.first_page) + offset as u64
    }

    fn locate_u32(&self, region: Region, offset: usize) -> *mut u32 {
        assert!(offset % 4 == 0, "unaligned index");
        self.locate(region, offset, 4) as *mut u32
    }

    /// The machine frame of a one-page region of the pool.
    fn pool_mfn(&self, page: Region) -> u64 {
        assert!(page.pages == 1, "one page is asked for");
        assert!(self.in_pool(page.first_page, 1).is_some(), "not a frame of the pool");
        self.space.mfn(page_address(page.first_page))
    }
}

impl Hypervisor for Machine {
    fn frames_alloc(&mut self, pages: usize) -> Option<Region> {
        let index = self.pool.take(pages)?;
        let first_page = self.pool_start + index as u32;
        self.space.map_until(page_address(first_page) + (pages * PAGE_BYTES) as u64);
        // SAFETY: the pages are the pool's, mapped writable, and were given to nobody.
        unsafe { copy::zero(page_address(first_page) as *mut u8, pages * PAGE_BYTES) };
        Some(Region { first_page, pages: pages as u32 })
    }

    fn frames_free(&mut self, region: Region) {
        let Region { first_page, pages } = region;
        let index = self.in_pool(first_page, pages as usize).expect("not frames of the pool");
        let granted = self.grants.gives_away(&self.space, first_page, pages as usize);
        assert!(!granted, "freed frames that are still granted");
        self.pool.give(index, pages as usize);
    }

    fn frames_left(&self) -> usize {
        self.pool.left()
    }

    fn dma_address(&self, region: Region, index: usize) -> u64 {
        self.pool_mfn(region.page(index)) << PAGE_SHIFT
    }

    fn read(&self, region: Region, offset: usize, into: &mut [u8]) {
        let from = self.locate(region, offset, into.len()) as *const u8;
        // SAFETY: the source is mapped and no Rust object; the target is a private slice.
        unsafe { copy::forward(into.as_mut_ptr(), from, into.len()) };
    }

    fn write(&mut self, region: Region, offset: usize, from: &[u8]) {
        let to = self.locate(region, offset, from.len()) as *mut u8;
        // SAFETY: the target is mapped writable and no Rust object; the source is a slice.
        unsafe { copy::forward(to, from.as_ptr(), from.len()) };
    }

    fn load_u32(&self, region: Region, offset: usize) -> u32 {
        let at = self.locate_u32(region, offset);
        // SAFETY: mapped and aligned; others write it, hence volatile.
        let value = unsafe { ptr::read_volatile(at) };
        // x86 keeps loads in order, so only the compiler has to.
        compiler_fence(Ordering::Acquire);
        value
    }

    fn store_u32(&mut self, region: Region, offset: usize, value: u32) {
        let at = self.locate_u32(region, offset);
        // x86 keeps stores in order, so only the compiler has to.
        compiler_fence(Ordering::Release);
        // SAFETY: mapped writable and aligned; others read it, hence volatile.
        unsafe { ptr::write_volatile(at, value) };
    }

    fn fence(&self) {
        fence(Ordering::SeqCst);
    }

    fn move_bytes(&mut self, from: (Region, usize), to: (Region, usize), len: usize) {
        let source = self.locate(from.0, from.1, len) as *const u8;
        let target = self.locate(to.0, to.1, len) as *mut u8;
        // SAFETY: both are mapped and no Rust objects; the routine allows an overlap.
        unsafe { copy::overlapping(target, source, len) };
    }

    fn zero(&mut self, region: Region, offset: usize, len: usize) {
        let to = self.locate(region, offset, len) as *mut u8;
        // SAFETY: mapped writable and no Rust object.
        unsafe { copy::zero(to, len) };
    }

    fn grant(&mut self, domid: DomId, page: Region, writable: bool) -> Result<Gref, Refusal> {
        let mfn = self.pool_mfn(page);
        self.grants.grant(&mut self.space, domid, mfn, writable)
    }

    fn revoke(&mut self, gref: Gref) -> bool {
        self.grants.revoke(gref)
    }

    fn map(&mut self, domid: DomId, grefs: &[Gref]) -> Result<Region, Refusal> {
        let index = self.maps.map(domid, grefs)?;
        let first_page = page_number(GRANT_MAPS) + index as u32;
        Ok(Region { first_page, pages: grefs.len() as u32 })
    }

    fn unmap(&mut self, region: Region) {
        let index = self.in_maps(region.first_page, region.pages as usize);
        self.maps.unmap(index.expect("not a mapped grant"), region.pages as usize);
    }

    fn copy(&mut self, ops: &mut [GrantCopy]) {
        let Machine { copies, space, pool, pool_start, .. } = self;
        copies.run(ops, |op| {
            let index = op.page.first_page.checked_sub(*pool_start);
            let ours = index.is_some_and(|index| pool.all_taken(index as usize, 1));
            assert!(ours && op.page.pages == 1, "not a frame of the pool");
            space.mfn(page_address(op.page.first_page))
        });
    }

    fn bind_interdomain(&mut self, domid: DomId, remote: Port) -> Result<Port, Refusal> {
        events::bind_interdomain(domid, remote)
    }

    fn alloc_unbound(&mut self, domid: DomId) -> Result<Port, Refusal> {
        events::alloc_unbound(domid)
    }

    fn close_port(&mut self, port: Port) {
        self.send_events();
        events::close(port);
    }

    fn notify(&mut self, port: Port) {
        match self.gathers {
            true => self.outbox.put(port),
            false => events::send(port),
        }
    }

    fn take_pending(&mut self, port: Port) -> bool {
        shared::take_pending(port)
    }
}
