//! Which address holds what. One page of code decides it all; nothing else computes an address.
//!
//! ```text
//! 0x0000_0000_0000  nothing: null pointers and their fields fault
//! VIRT_BASE         all our memory, address = VIRT_BASE + 4096 * pfn:
//!                   kernel image, then what the domain builder put behind it (p2m list, start
//!                   info, xenstore and console page, page tables), new page tables, heap, pool
//! WINDOW_BASE       pages of others: shared info, grant table, device registers, mapped grants
//! ```
//! The windows have page tables of their own, made at start, so mapping never allocates.

/// Bytes in a page, as an address.
pub(crate) const PAGE: u64 = platter_xen::PAGE_BYTES as u64;
/// Bits of an address within its page.
pub(crate) const PAGE_SHIFT: u32 = 12;

/// Address of pfn 0. Also stands in linker/platter.ld and in the ELF note; all must agree.
pub(crate) const VIRT_BASE: u64 = 1 << 20;

/// Start of the windows: 128 GiB, beyond any memory that is mapped below.
pub(crate) const WINDOW_BASE: u64 = 128 << 30;
/// Memory that is used at most; the direct map ends where the windows begin.
pub(crate) const MEMORY_PAGES_MAX: u64 = (WINDOW_BASE - VIRT_BASE) / PAGE;

/// The page shared with Xen: event bits and time (Xen public/xen.h, `struct shared_info`).
pub(crate) const SHARED_INFO: u64 = WINDOW_BASE;

/// Frames of our grant table (Xen common/grant_table.c: `gnttab_max_frames` is 64 by default).
pub(crate) const GRANT_TABLE: u64 = WINDOW_BASE + 64 * PAGE;
pub(crate) const GRANT_TABLE_FRAMES_MAX: usize = 64;

/// Device registers: 1 MiB, many times an NVMe controller's (16 KiB).
pub(crate) const MMIO: u64 = WINDOW_BASE + 256 * PAGE;
pub(crate) const MMIO_PAGES: usize = 256;

/// Mapped grants: ring pages, 16 for each of 128 rings.
pub(crate) const GRANT_MAPS: u64 = WINDOW_BASE + 512 * PAGE;
pub(crate) const GRANT_MAPS_PAGES: usize = 2048;

/// Where the windows end: five L1 tables.
pub(crate) const WINDOW_END: u64 = GRANT_MAPS + GRANT_MAPS_PAGES as u64 * PAGE;

/// Xen's table from machine frame to pfn, readable by every PV guest
/// (Xen public/arch-x86/xen-x86_64.h, `MACH2PHYS_VIRT_START`).
pub(crate) const MACHINE_TO_PFN: u64 = 0xffff_8000_0000_0000;

/// The number of the page that holds an address below 2^44.
pub(crate) const fn page_number(address: u64) -> u32 {
    assert!(address >> PAGE_SHIFT <= u32::MAX as u64, "an address beyond the windows");
    (address >> PAGE_SHIFT) as u32
}

/// The first address of a page.
pub(crate) const fn page_address(page: u32) -> u64 {
    (page as u64) << PAGE_SHIFT
}
