//! A submission queue and its completion queue, one page each, and the PRP lists of its
//! commands (NVMe 1.4, 4.1, 4.3, 4.6).
//!
//! Guards: a slot is the command identifier; it is free, or its command is at the controller.
//! A completion counts only with the phase tag of this lap and for a slot in use. The queues
//! fit one page each, because our frames are not contiguous for a device (CAP.CQR).

use alloc::vec::Vec;

use platter_xen::{Bus, Hypervisor, Mmio, PAGE_BYTES, Region};

use super::command::{CQE_BYTES, Command, Completion, SQE_BYTES};
use crate::disk::{DiskIo, DiskTag};

/// Most entries of a queue: what one page of submission entries holds.
pub const ENTRIES_MAX: u16 = (PAGE_BYTES / SQE_BYTES) as u16;
/// Bytes of a slot's PRP list: 31 addresses; also a deallocate range.
const LIST_BYTES: usize = 256;
/// Slots that share a page of lists.
const LISTS_PER_PAGE: usize = PAGE_BYTES / LIST_BYTES;

/// An operation that is, or was, at the controller.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Work {
    pub tag: DiskTag,
    pub unit: u8,
    pub io: DiskIo,
    /// How often it was sent again.
    pub retries: u8,
}

/// What a slot holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Slot {
    /// `None` for an admin command.
    pub work: Option<Work>,
    pub sent_ns: u64,
    /// An Abort was sent for it.
    pub aborting: bool,
}

/// The two rings and the slots.
pub struct Queue {
    pub id: u16,
    sq: Region,
    cq: Region,
    lists: Option<Region>,
    entries: u16,
    tail: u16,
    head: u16,
    phase: bool,
    slots: Vec<Option<Slot>>,
    used: u16,
}

/// What a completion queue held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Taken {
    Nothing,
    /// A command's completion and what its slot held.
    Command(Completion, Slot),
    /// An identifier that no command of ours has.
    Unknown,
}

impl Queue {
    /// Takes its frames: 2, and 4 for lists when `with_lists`.
    pub fn new<H: Hypervisor>(hv: &mut H, id: u16, with_lists: bool) -> Option<Queue> {
        let pages = usize::from(ENTRIES_MAX).div_ceil(LISTS_PER_PAGE);
        let sq = hv.frames_alloc(1);
        let cq = hv.frames_alloc(1);
        let lists = if with_lists { hv.frames_alloc(pages) } else { None };
        let (Some(sq), Some(cq), true) = (sq, cq, lists.is_some() == with_lists) else {
            [sq, cq, lists].into_iter().flatten().for_each(|region| hv.frames_free(region));
            return None;
        };
        Some(Queue {
            id,
            sq,
            cq,
            lists,
            entries: ENTRIES_MAX,
            tail: 0,
            head: 0,
            phase: true,
            slots: alloc::vec![None; usize::from(ENTRIES_MAX)],
            used: 0,
        })
    }

    /// As after a controller reset, with this many entries (2 to [`ENTRIES_MAX`]).
    pub fn reset<H: Hypervisor>(&mut self, hv: &mut H, entries: u16) {
        assert!((2..=ENTRIES_MAX).contains(&entries) && self.used == 0, "an empty queue");
        hv.zero(self.sq, 0, PAGE_BYTES);
        hv.zero(self.cq, 0, PAGE_BYTES);
        self.entries = entries;
        (self.tail, self.head, self.phase) = (0, 0, true);
    }

    /// Gives its frames back: no device writes to them any more.
    pub fn free<H: Hypervisor>(self, hv: &mut H) {
        let regions = [Some(self.sq), Some(self.cq), self.lists];
        regions.into_iter().flatten().for_each(|region| hv.frames_free(region));
    }

    pub fn entries(&self) -> u16 {
        self.entries
    }

    pub fn used(&self) -> u16 {
        self.used
    }

    /// One entry always stays empty, or a full ring would look like an empty one (4.1.2).
    pub fn has_room(&self) -> bool {
        self.used + 1 < self.entries
    }

    pub fn sq_address<H: Hypervisor>(&self, hv: &H) -> u64 {
        hv.dma_address(self.sq, 0)
    }

    pub fn cq_address<H: Hypervisor>(&self, hv: &H) -> u64 {
        hv.dma_address(self.cq, 0)
    }

    /// A free slot.
    pub fn free_slot(&self) -> Option<u16> {
        if !self.has_room() {
            return None;
        }
        self.slots.iter().position(Option::is_none).map(|slot| slot as u16)
    }

    /// Writes bytes to a slot's list; the address for the device.
    pub fn put_list<H: Hypervisor>(&self, hv: &mut H, slot: u16, at: usize, bytes: &[u8]) -> u64 {
        let lists = self.lists.expect("only I/O queues have lists");
        assert!(at + bytes.len() <= LIST_BYTES, "longer than a list");
        let offset = usize::from(slot) * LIST_BYTES;
        hv.write(lists, offset + at, bytes);
        hv.dma_address(lists, offset / PAGE_BYTES) + (offset % PAGE_BYTES) as u64
    }

    /// Writes a command into the ring; it is the controller's with the next
    /// [`ring`](Self::ring).
    pub fn push<H: Hypervisor>(&mut self, hv: &mut H, slot: u16, command: &Command, held: Slot) {
        let place = &mut self.slots[usize::from(slot)];
        assert!(place.is_none(), "a slot in use");
        *place = Some(held);
        self.used += 1;
        assert!(self.used < self.entries, "more commands than entries");
        hv.write(self.sq, usize::from(self.tail) * SQE_BYTES, &command.emit(slot));
        self.tail = (self.tail + 1) % self.entries;
    }

    /// Tells the controller the tail (3.1.24). `stride` is the distance of doorbells.
    pub fn ring<H: Bus>(&self, hv: &mut H, mmio: Mmio, stride: usize) {
        let offset = super::regs::DOORBELLS + usize::from(self.id) * 2 * stride;
        hv.mmio_write_u32(mmio, offset, u32::from(self.tail));
    }

    /// The next completion. The caller reports the head when it has taken all.
    pub fn take<H: Hypervisor>(&mut self, hv: &H) -> Taken {
        let at = usize::from(self.head) * CQE_BYTES;
        // The phase tag first (4.6): what the same entry holds is complete when it is right.
        let last = hv.load_u32(self.cq, at + 12);
        if (last >> 16 & 1 == 1) != self.phase {
            return Taken::Nothing;
        }
        let mut bytes = [0; CQE_BYTES];
        hv.read(self.cq, at, &mut bytes);
        bytes[12..].copy_from_slice(&last.to_le_bytes());
        self.head += 1;
        if self.head == self.entries {
            self.head = 0;
            self.phase = !self.phase;
        }
        let completion = Completion::parse(&bytes);
        let slot = self.slots.get_mut(usize::from(completion.cid)).and_then(Option::take);
        let Some(slot) = slot else { return Taken::Unknown };
        self.used -= 1;
        Taken::Command(completion, slot)
    }

    /// Tells the controller the head of the completion queue (3.1.25).
    pub fn report_head<H: Bus>(&self, hv: &mut H, mmio: Mmio, stride: usize) {
        let offset = super::regs::DOORBELLS + (usize::from(self.id) * 2 + 1) * stride;
        hv.mmio_write_u32(mmio, offset, u32::from(self.head));
    }

    /// Slots in use, with their numbers.
    pub fn busy(&mut self) -> impl Iterator<Item = (u16, &mut Slot)> {
        let slots = (0..).zip(&mut self.slots);
        slots.filter_map(|(number, slot)| slot.as_mut().map(|slot| (number, slot)))
    }

    /// Takes one operation back from a controller that was stopped.
    pub fn take_back(&mut self) -> Option<Slot> {
        let slot = self.slots.iter_mut().find_map(Option::take)?;
        self.used -= 1;
        Some(slot)
    }
}
