//! A machine for unit tests and fuzz targets: pages in a vector, grants and ports in tables, one
//! device behind the bus. One world serves both ends, so a grant is mapped as the very page it
//! names. Not a simulator: no faults, no schedule; it misses everything that needs two schedules.

use std::boxed::Box;
use std::cell::RefCell;
use std::vec::Vec;

use platter_xen::{
    Bus, Direction, DomId, GrantCopy, Gref, Hypervisor, Mmio, PAGE_BYTES, Port, Refusal, Region,
};

/// Registers behind the bus.
pub trait Registers {
    fn read_u32(&mut self, offset: usize) -> u32;
    fn write_u32(&mut self, offset: usize, value: u32);
}

/// Machine addresses are scattered: page n is at frame `n * 7 + 3`.
const FRAME_STEP: u64 = 7;
const FRAME_BASE: u64 = 3;

#[derive(Default)]
pub struct Fake {
    pub pages: Vec<u8>,
    pub frames_max: usize,
    /// Frames that are out.
    pub taken: usize,
    /// Page of each gref, `None` once revoked.
    pub grants: Vec<Option<u32>>,
    /// So many grants at once, if that is bounded.
    pub grants_max: Option<usize>,
    /// Grants that the other side still maps.
    pub keeps: Vec<Gref>,
    /// Pending bit of each port; index is the port.
    pub ports: Vec<bool>,
    /// Notifications sent, per port.
    pub notified: Vec<u32>,
    pub registers: Option<RefCell<Box<dyn Registers>>>,
}

impl Fake {
    pub fn new(frames_max: usize) -> Fake {
        Fake { frames_max, ..Fake::default() }
    }

    fn at(&self, region: Region, offset: usize, len: usize) -> usize {
        assert!(offset + len <= region.bytes(), "access beyond its region");
        region.first_page as usize * PAGE_BYTES + offset
    }

    /// Index into `pages` of a machine address, as a device sees it.
    pub fn dma(address: u64) -> usize {
        let frame = address / PAGE_BYTES as u64;
        assert!(
            frame >= FRAME_BASE && (frame - FRAME_BASE).is_multiple_of(FRAME_STEP),
            "not our page"
        );
        let page = (frame - FRAME_BASE) / FRAME_STEP;
        page as usize * PAGE_BYTES + (address % PAGE_BYTES as u64) as usize
    }

    pub fn bytes(&self, region: Region, offset: usize, len: usize) -> Vec<u8> {
        let at = self.at(region, offset, len);
        self.pages[at..at + len].to_vec()
    }

    fn new_port(&mut self) -> Port {
        self.ports.push(false);
        self.notified.push(0);
        Port(self.ports.len() as u32 - 1)
    }

    fn copy_one(&mut self, op: &GrantCopy) -> i16 {
        let Some(Some(page)) = self.grants.get(op.gref.0 as usize).copied() else { return -3 };
        let theirs = page as usize * PAGE_BYTES + op.gref_offset as usize;
        let ours = self.at(op.page, op.page_offset as usize, op.len as usize);
        let (from, to) = match op.direction {
            Direction::FromGuest => (theirs, ours),
            Direction::ToGuest => (ours, theirs),
        };
        self.pages.copy_within(from..from + op.len as usize, to);
        0
    }
}

impl Hypervisor for Fake {
    fn frames_alloc(&mut self, pages: usize) -> Option<Region> {
        if self.frames_left() < pages {
            return None;
        }
        let first_page = (self.pages.len() / PAGE_BYTES) as u32;
        self.pages.resize(self.pages.len() + pages * PAGE_BYTES, 0);
        self.taken += pages;
        Some(Region { first_page, pages: pages as u32 })
    }
    fn frames_free(&mut self, region: Region) {
        self.taken -= region.pages as usize;
    }
    fn frames_left(&self) -> usize {
        self.frames_max - self.taken
    }
    fn dma_address(&self, region: Region, index: usize) -> u64 {
        let page = u64::from(region.page(index).first_page);
        (page * FRAME_STEP + FRAME_BASE) * PAGE_BYTES as u64
    }
    fn read(&self, region: Region, offset: usize, into: &mut [u8]) {
        let at = self.at(region, offset, into.len());
        into.copy_from_slice(&self.pages[at..at + into.len()]);
    }
    fn write(&mut self, region: Region, offset: usize, from: &[u8]) {
        let at = self.at(region, offset, from.len());
        self.pages[at..at + from.len()].copy_from_slice(from);
    }
    fn load_u32(&self, region: Region, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(region, offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }
    fn store_u32(&mut self, region: Region, offset: usize, value: u32) {
        self.write(region, offset, &value.to_le_bytes());
    }
    fn fence(&self) {}
    fn move_bytes(&mut self, from: (Region, usize), to: (Region, usize), len: usize) {
        let source = self.at(from.0, from.1, len);
        let target = self.at(to.0, to.1, len);
        self.pages.copy_within(source..source + len, target);
    }
    fn zero(&mut self, region: Region, offset: usize, len: usize) {
        let at = self.at(region, offset, len);
        self.pages[at..at + len].fill(0);
    }
    fn grant(&mut self, _: DomId, page: Region, _: bool) -> Result<Gref, Refusal> {
        assert_eq!(page.pages, 1);
        if self.grants_max.is_some_and(|most| self.grants.iter().flatten().count() >= most) {
            return Err(Refusal::Full);
        }
        self.grants.push(Some(page.first_page));
        Ok(Gref(self.grants.len() as u32 - 1))
    }
    fn revoke(&mut self, gref: Gref) -> bool {
        if self.keeps.contains(&gref) {
            return false;
        }
        self.grants[gref.0 as usize].take().is_some()
    }
    fn map(&mut self, _: DomId, grefs: &[Gref]) -> Result<Region, Refusal> {
        let mut first = None;
        for (index, gref) in grefs.iter().enumerate() {
            let page = self.grants.get(gref.0 as usize).copied().flatten();
            let page = page.ok_or(Refusal::Grant(-3))?;
            let start = *first.get_or_insert(page);
            assert_eq!(start + index as u32, page, "the fake maps contiguous pages only");
        }
        Ok(Region { first_page: first.ok_or(Refusal::Full)?, pages: grefs.len() as u32 })
    }
    fn unmap(&mut self, _: Region) {}
    fn copy(&mut self, ops: &mut [GrantCopy]) {
        for op in ops {
            op.status = self.copy_one(op);
        }
    }
    fn bind_interdomain(&mut self, _: DomId, _: Port) -> Result<Port, Refusal> {
        Ok(self.new_port())
    }
    fn alloc_unbound(&mut self, _: DomId) -> Result<Port, Refusal> {
        Ok(self.new_port())
    }
    fn close_port(&mut self, _: Port) {}
    fn notify(&mut self, port: Port) {
        self.notified[port.0 as usize] += 1;
    }
    fn take_pending(&mut self, port: Port) -> bool {
        core::mem::take(&mut self.ports[port.0 as usize])
    }
}

impl Bus for Fake {
    fn map_mmio(&mut self, _: u64, pages: usize) -> Result<Mmio, Refusal> {
        Ok(Mmio { first_page: 0, pages: pages as u32 })
    }
    fn unmap_mmio(&mut self, _: Mmio) {}
    fn mmio_read_u32(&self, mmio: Mmio, offset: usize) -> u32 {
        assert!(offset + 4 <= mmio.pages as usize * PAGE_BYTES);
        self.registers.as_ref().map_or(!0, |device| device.borrow_mut().read_u32(offset))
    }
    fn mmio_write_u32(&mut self, mmio: Mmio, offset: usize, value: u32) {
        assert!(offset + 4 <= mmio.pages as usize * PAGE_BYTES);
        if let Some(device) = &self.registers {
            device.borrow_mut().write_u32(offset, value);
        }
    }
}
