//! Device registers, for drivers of devices that the administrator gave to the domain.
//!
//! A BAR's value is a machine address; Xen lets us map it when the toolstack has permitted the
//! range, and makes the mapping uncached. Pages that hold an MSI-X table silently become
//! read-only, so a write there is a fault: drivers poll and leave MSI-X alone.

use core::ptr;

use platter_xen::{Bus, Mmio, PAGE_BYTES, Refusal};

use crate::Machine;
use crate::layout::{MMIO, PAGE, PAGE_SHIFT, page_address, page_number};

/// EINVAL (Xen public/errno.h).
const EINVAL: i32 = -22;

impl Machine {
    /// Index in the device window of a mapping that exists.
    fn mmio_index(&self, mmio: Mmio) -> usize {
        let index = mmio.first_page.checked_sub(page_number(MMIO));
        let known = index.filter(|&i| self.mmio.all_taken(i as usize, mmio.pages as usize));
        known.expect("registers that were not mapped") as usize
    }

    fn register(&self, mmio: Mmio, offset: usize, bytes: usize) -> u64 {
        self.mmio_index(mmio);
        let end = offset.checked_add(bytes);
        let inside = end.is_some_and(|end| end <= mmio.pages as usize * PAGE_BYTES);
        assert!(inside && offset % bytes == 0, "no such register: {offset:#x}");
        page_address(mmio.first_page) + offset as u64
    }

    fn unmap_run(&mut self, index: usize, mapped: usize, pages: usize) {
        for i in 0..mapped {
            self.space.unmap(MMIO + (index + i) as u64 * PAGE);
        }
        self.space.settle();
        self.mmio.give(index, pages);
    }
}

impl Bus for Machine {
    fn map_mmio(&mut self, machine_address: u64, pages: usize) -> Result<Mmio, Refusal> {
        if machine_address % PAGE != 0 || pages == 0 {
            return Err(Refusal::Errno(EINVAL));
        }
        let index = self.mmio.take(pages).ok_or(Refusal::Full)?;
        for i in 0..pages {
            let address = MMIO + (index + i) as u64 * PAGE;
            let mfn = (machine_address >> PAGE_SHIFT) + i as u64;
            if let Err(errno) = self.space.map_device(address, mfn) {
                self.unmap_run(index, i, pages);
                return Err(Refusal::Errno(errno));
            }
        }
        Ok(Mmio { first_page: page_number(MMIO) + index as u32, pages: pages as u32 })
    }

    fn unmap_mmio(&mut self, mmio: Mmio) {
        let index = self.mmio_index(mmio);
        self.unmap_run(index, mmio.pages as usize, mmio.pages as usize);
    }

    fn mmio_read_u32(&self, mmio: Mmio, offset: usize) -> u32 {
        let at = self.register(mmio, offset, 4) as *const u32;
        // SAFETY: a mapped register, aligned.
        unsafe { ptr::read_volatile(at) }
    }

    fn mmio_write_u32(&mut self, mmio: Mmio, offset: usize, value: u32) {
        let at = self.register(mmio, offset, 4) as *mut u32;
        // SAFETY: a mapped register, aligned. What the device then does is its driver's charge.
        unsafe { ptr::write_volatile(at, value) };
    }

    fn mmio_read_u64(&self, mmio: Mmio, offset: usize) -> u64 {
        let at = self.register(mmio, offset, 8) as *const u64;
        // SAFETY: a mapped register, aligned.
        unsafe { ptr::read_volatile(at) }
    }

    fn mmio_write_u64(&mut self, mmio: Mmio, offset: usize, value: u64) {
        let at = self.register(mmio, offset, 8) as *mut u64;
        // SAFETY: a mapped register, aligned. What the device then does is its driver's charge.
        unsafe { ptr::write_volatile(at, value) };
    }
}
