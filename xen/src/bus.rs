//! Seam 2's second half: what a PCI device driver needs beyond [`crate::Hypervisor`].
//!
//! It lives beside seam 1 and not in `storage`, because `arch` implements it and depends on this
//! crate alone. Config space is not here: a PV domain reaches it through pciif, safe code.

use crate::Refusal;

/// A mapped range of device registers, in the implementation's own numbering.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mmio {
    pub first_page: u32,
    pub pages: u32,
}

/// Device registers, by volatile access only. Offsets are in bytes from the start of the range;
/// an access beyond it or unaligned is our own mistake and asserted.
pub trait Bus {
    /// Maps `pages` pages of registers at a machine address (a BAR's value, page aligned).
    fn map_mmio(&mut self, machine_address: u64, pages: usize) -> Result<Mmio, Refusal>;
    fn unmap_mmio(&mut self, mmio: Mmio);
    fn mmio_read_u32(&self, mmio: Mmio, offset: usize) -> u32;
    fn mmio_write_u32(&mut self, mmio: Mmio, offset: usize, value: u32);

    /// As two halves, the lower first; a machine that can does it at once.
    fn mmio_read_u64(&self, mmio: Mmio, offset: usize) -> u64 {
        let low = u64::from(self.mmio_read_u32(mmio, offset));
        u64::from(self.mmio_read_u32(mmio, offset + 4)) << 32 | low
    }

    /// As two halves, the lower first.
    fn mmio_write_u64(&mut self, mmio: Mmio, offset: usize, value: u64) {
        self.mmio_write_u32(mmio, offset, value as u32);
        self.mmio_write_u32(mmio, offset + 4, (value >> 32) as u32);
    }
}
