//! The metadata cache: every table of every format is read and written through it, in blocks of
//! 4 KiB, set-associative, of a size fixed at open.
//!
//! Order guarded here (data-then-map): each dirty sector carries a *phase*; a flush first syncs
//! the data, then writes phase after phase with a sync between. A block that is dirty or being
//! written is never evicted. Bytes are marked clean when they are handed out for writing and
//! dirty again if the flush fails, so a change made meanwhile is never lost.
//! It must never read a file itself, and never grow.

use alloc::vec::Vec;

use crate::fault::ImageFault;
use crate::memory::{SPARE_BYTES, as_much_as_fits, filled, is_left};
use crate::types::{BlockRef, FileNo, Step, Stop};

/// Bytes in a cache block. Tables are aligned to 512 bytes at least and entries to their own
/// size, so no entry crosses a block.
pub const BLOCK_BYTES: u64 = 4096;
/// Unit of dirtiness: the smallest cluster or sector of any format.
const UNIT_BYTES: u64 = 512;
const UNITS: usize = (BLOCK_BYTES / UNIT_BYTES) as usize;
/// Ways of a set: more blocks than any one step needs at once.
const WAYS: usize = 8;
/// Ways of a set that are kept from being dirty all at once: as many as one step needs.
const WAYS_KEPT: usize = 5;

/// When a dirty sector is written in a flush: lower phases are durable before higher ones.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Phase(pub u8);

impl Phase {
    /// Refcounts, footers: what must be there before anything points at new space.
    pub const BEFORE: Phase = Phase(0);
    /// What makes blocks of `BEFORE` found: refcount table entries.
    pub const REACH: Phase = Phase(1);
    /// Tables whose entries point at data.
    pub const TABLE: Phase = Phase(2);
    /// Tables that point at tables.
    pub const DIRECTORY: Phase = Phase(3);
    /// Headers that make all that valid.
    pub const HEADER: Phase = Phase(4);
    /// Number of phases.
    pub const COUNT: u8 = 5;
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Free,
    /// Asked for by a `Miss`, not filled yet.
    Loading,
    Ready,
}

#[derive(Clone, Copy)]
struct Slot {
    state: State,
    file: FileNo,
    /// Offset in the file in blocks.
    block: u64,
    /// Recently used (clock).
    used: bool,
    /// One bit a 512-byte unit: changed since it was last handed out.
    dirty: u8,
    /// One bit a unit: handed out in the flush under way.
    writing: u8,
    phase: [Phase; UNITS],
    /// Plans in flight that will change this block when they are committed.
    pins: u16,
}

const EMPTY: Slot = Slot {
    state: State::Free,
    file: FileNo(0),
    block: 0,
    used: false,
    dirty: 0,
    writing: 0,
    phase: [Phase::BEFORE; UNITS],
    pins: 0,
};

/// The cache of one image.
pub struct Meta {
    slots: Vec<Slot>,
    bytes: Vec<u8>,
    sets: usize,
    dirty_slots: usize,
    /// Slots with pins.
    pinned_slots: usize,
    /// Slots whose loading a caller has been asked for.
    loading: usize,
    flush: Option<FlushCursor>,
    /// Blocks dirty at which `NeedFlush` is asked for.
    dirty_max: usize,
}

#[derive(Clone, Copy)]
struct FlushCursor {
    phase: u8,
    slot: usize,
    written: bool,
}

impl Meta {
    /// A cache of `budget_bytes`, or less if that leaves not as much again (for the index of a
    /// chain) and some; at least one set (32 KiB).
    pub fn new(budget_bytes: usize) -> Result<Meta, ImageFault> {
        let sets = budget_bytes / (BLOCK_BYTES as usize * WAYS);
        let of = |sets| {
            let meta = Meta::of(sets)?;
            is_left(meta.bytes.len() + SPARE_BYTES).then_some(meta)
        };
        as_much_as_fits(sets, of)
    }

    fn of(sets: usize) -> Option<Meta> {
        let count = sets * WAYS;
        Some(Meta {
            slots: filled(EMPTY, count)?,
            bytes: filled(0, count * BLOCK_BYTES as usize)?,
            sets,
            dirty_slots: 0,
            pinned_slots: 0,
            loading: 0,
            flush: None,
            dirty_max: (count / 2).max(WAYS / 2),
        })
    }

    /// None at all, for what is never opened.
    pub fn none() -> Meta {
        Meta::of(0).expect("it takes no memory")
    }

    /// Bytes of all blocks. What one step needs at once must be well below that.
    pub fn capacity_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Copies `into.len()` bytes at `offset` of `file`; the range lies within one block.
    pub fn get(&mut self, file: FileNo, offset: u64, into: &mut [u8]) -> Step<()> {
        let at = self.resident(file, offset, into.len())?;
        into.copy_from_slice(&self.bytes[at..at + into.len()]);
        Ok(())
    }

    /// The bytes themselves, within one block.
    pub fn slice(&mut self, file: FileNo, offset: u64, len: usize) -> Step<&[u8]> {
        let at = self.resident(file, offset, len)?;
        Ok(&self.bytes[at..at + len])
    }

    /// One byte of `file`.
    pub fn get_u8(&mut self, file: FileNo, offset: u64) -> Step<u8> {
        let mut b = [0];
        self.get(file, offset, &mut b)?;
        Ok(b[0])
    }

    pub fn get_u32_be(&mut self, file: FileNo, offset: u64) -> Step<u32> {
        let mut b = [0; 4];
        self.get(file, offset, &mut b)?;
        Ok(u32::from_be_bytes(b))
    }

    pub fn get_u64_be(&mut self, file: FileNo, offset: u64) -> Step<u64> {
        let mut b = [0; 8];
        self.get(file, offset, &mut b)?;
        Ok(u64::from_be_bytes(b))
    }

    pub fn get_u32_le(&mut self, file: FileNo, offset: u64) -> Step<u32> {
        let mut b = [0; 4];
        self.get(file, offset, &mut b)?;
        Ok(u32::from_le_bytes(b))
    }

    pub fn get_u64_le(&mut self, file: FileNo, offset: u64) -> Step<u64> {
        let mut b = [0; 8];
        self.get(file, offset, &mut b)?;
        Ok(u64::from_le_bytes(b))
    }

    /// Makes sure that the block with `offset` is resident and that there is room to dirty it,
    /// so that a `put` right after cannot fail. Call it for every block of a change before the
    /// first `put`.
    pub fn reserve(&mut self, file: FileNo, offset: u64) -> Step<()> {
        let at = self.resident(file, offset, 1)?;
        let slot = &self.slots[at / BLOCK_BYTES as usize];
        if slot.dirty == 0 && self.dirty_slots >= self.dirty_max {
            return Err(Stop::NeedFlush);
        }
        Ok(())
    }

    /// Changes bytes of a block that was reserved in this step (asserted), within one block.
    pub fn put(&mut self, file: FileNo, offset: u64, bytes: &[u8], phase: Phase) {
        let slot = self.find(file, offset / BLOCK_BYTES).expect("put into a block not reserved");
        assert!(self.slots[slot].state == State::Ready);
        self.write_slot(slot, (offset % BLOCK_BYTES) as usize, bytes, phase);
    }

    /// Reserves a block and keeps it resident until [`Meta::unpin`], so that a commit, later,
    /// can `put` into it. `Busy` when a quarter of the cache is pinned.
    pub fn pin(&mut self, file: FileNo, offset: u64) -> Step<()> {
        self.reserve(file, offset)?;
        let index = self.find(file, offset / BLOCK_BYTES).expect("just reserved");
        if self.slots[index].pins == 0 {
            if self.pinned_slots >= (self.slots.len() / 4).max(2) {
                return Err(Stop::Busy);
            }
            self.pinned_slots += 1;
        }
        self.slots[index].pins += 1;
        Ok(())
    }

    /// [`Meta::create`] and [`Meta::pin`] in one: nothing is changed if it stops.
    pub fn create_pinned(&mut self, file: FileNo, offset: u64, phase: Phase) -> Step<()> {
        if self.pinned_slots >= (self.slots.len() / 4).max(2) {
            return Err(Stop::Busy);
        }
        self.create(file, offset, phase)?;
        let index = self.find(file, offset / BLOCK_BYTES).expect("just created");
        if self.slots[index].pins == 0 {
            self.pinned_slots += 1;
        }
        self.slots[index].pins += 1;
        Ok(())
    }

    /// Ends one pin.
    pub fn unpin(&mut self, file: FileNo, offset: u64) {
        let index = self.find(file, offset / BLOCK_BYTES).expect("unpin of a block not pinned");
        let slot = &mut self.slots[index];
        slot.pins = slot.pins.checked_sub(1).expect("unpin of a block not pinned");
        if slot.pins == 0 {
            self.pinned_slots -= 1;
        }
    }

    /// Changes bytes if their block is resident or can be loaded: reserve and put in one.
    pub fn set(&mut self, file: FileNo, offset: u64, bytes: &[u8], phase: Phase) -> Step<()> {
        self.reserve(file, offset)?;
        self.put(file, offset, bytes, phase);
        Ok(())
    }

    /// Makes the block at `offset` resident as zeros without reading it, for space that holds
    /// nothing yet. The block becomes dirty as a whole.
    pub fn create(&mut self, file: FileNo, offset: u64, phase: Phase) -> Step<()> {
        assert!(offset.is_multiple_of(BLOCK_BYTES));
        if self.dirty_slots >= self.dirty_max {
            return Err(Stop::NeedFlush);
        }
        let slot = match self.find(file, offset / BLOCK_BYTES) {
            Some(slot) if self.slots[slot].state == State::Loading => return Err(Stop::Busy),
            Some(slot) => slot,
            None => self.take(file, offset / BLOCK_BYTES, State::Ready)?,
        };
        self.write_slot(slot, 0, &[0; BLOCK_BYTES as usize], phase);
        Ok(())
    }

    /// Drops what is cached of a range that changed hands (allocated anew, or freed), dirty or
    /// not. Of blocks that the range only touches in part, changes within it are dropped and
    /// the rest is kept; what they then read as within it must be put before it is used.
    pub fn forget(&mut self, file: FileNo, offset: u64, len: u64) {
        let end = offset.saturating_add(len);
        let (first, last) = (offset / BLOCK_BYTES, end.div_ceil(BLOCK_BYTES));
        if last - first <= self.slots.len() as u64 {
            for block in first..last {
                if let Some(index) = self.find(file, block) {
                    self.forget_slot(index, offset, end);
                }
            }
        } else {
            for index in 0..self.slots.len() {
                let slot = &self.slots[index];
                if slot.state != State::Free && slot.file == file {
                    self.forget_slot(index, offset, end);
                }
            }
        }
    }

    fn forget_slot(&mut self, index: usize, offset: u64, end: u64) {
        let slot = &mut self.slots[index];
        let start = slot.block.saturating_mul(BLOCK_BYTES);
        let whole = start >= offset && start.saturating_add(BLOCK_BYTES) <= end;
        if slot.state == State::Loading && whole {
            // What was asked for is the old bytes: the answer finds no block that waits for it.
            *slot = EMPTY;
            self.loading -= 1;
            return;
        }
        if slot.state != State::Ready || start >= end {
            return;
        }
        let was_dirty = slot.dirty != 0;
        for unit in 0..UNITS {
            let at = start + unit as u64 * UNIT_BYTES;
            if at >= offset && at + UNIT_BYTES <= end {
                slot.dirty &= !(1 << unit);
                slot.writing &= !(1 << unit);
            }
        }
        let clean = slot.dirty == 0;
        if was_dirty && clean {
            self.dirty_slots -= 1;
        }
        // A block touched in part stays: tables of others in it would be read again and again.
        if whole && clean && slot.writing == 0 && slot.pins == 0 {
            *slot = EMPTY;
        }
    }

    /// Forgets clean blocks that a range touches, so that they are read again: what they hold
    /// was changed beside the cache. All must be clean, and nothing in flight.
    pub fn read_again(&mut self, file: FileNo, offset: u64, len: u64) -> Step<()> {
        let blocks = offset / BLOCK_BYTES..offset.saturating_add(len).div_ceil(BLOCK_BYTES);
        let touched = |slot: &Slot| {
            slot.state == State::Ready && slot.file == file && blocks.contains(&slot.block)
        };
        if self.slots.iter().any(|slot| touched(slot) && slot.dirty != 0) {
            return Err(Stop::NeedFlush);
        }
        for slot in self.slots.iter_mut().filter(|slot| touched(slot)) {
            assert!(slot.pins == 0 && slot.writing == 0, "a block in use");
            *slot = EMPTY;
        }
        Ok(())
    }

    /// Takes in what a `Miss` asked for. Anything else is ignored: only a block that is being
    /// loaded may be filled, so a late answer never overwrites a newer block.
    pub fn fill(&mut self, block: BlockRef, bytes: &[u8]) {
        let Some(slot) = self.find(block.file, block.offset / BLOCK_BYTES) else { return };
        if self.slots[slot].state != State::Loading || !block.offset.is_multiple_of(BLOCK_BYTES) {
            return;
        }
        let at = slot * BLOCK_BYTES as usize;
        let len = bytes.len().min(BLOCK_BYTES as usize);
        self.bytes[at..at + len].copy_from_slice(&bytes[..len]);
        self.bytes[at + len..at + BLOCK_BYTES as usize].fill(0);
        self.slots[slot].state = State::Ready;
        self.loading -= 1;
    }

    /// The read for a `Miss` failed: whoever needs the block next is asked for it again.
    pub fn fill_failed(&mut self, block: BlockRef) {
        if let Some(slot) = self.find(block.file, block.offset / BLOCK_BYTES)
            && self.slots[slot].state == State::Loading
        {
            self.slots[slot] = EMPTY;
            self.loading -= 1;
        }
    }

    /// Anything to write?
    pub fn is_dirty(&self) -> bool {
        self.dirty_slots > 0
    }

    /// A change of a resident sector waits to be written, in whatever phase.
    pub fn is_dirty_at(&self, file: FileNo, offset: u64) -> bool {
        let unit = offset % BLOCK_BYTES / UNIT_BYTES;
        self.find(file, offset / BLOCK_BYTES)
            .is_some_and(|slot| self.slots[slot].dirty & (1 << unit) != 0)
    }

    /// A flush is under way.
    pub fn flushing(&self) -> bool {
        self.flush.is_some()
    }

    /// Starts handing out dirty units, phase by phase.
    pub fn flush_begin(&mut self) {
        assert!(self.flush.is_none(), "one flush at a time");
        self.flush = Some(FlushCursor { phase: 0, slot: 0, written: false });
    }

    /// The next run of dirty units of the current phase, or `None` when the phase is done: then
    /// sync, and [`Meta::flush_next_phase`].
    pub fn flush_next(&mut self) -> Option<(FileNo, u64, &[u8])> {
        let cursor = self.flush.expect("flush_next outside a flush");
        // Around the end: a block before the cursor may have been changed meanwhile.
        let count = self.slots.len();
        for index in (cursor.slot..count).chain(0..cursor.slot) {
            let Some((first, count)) = self.slots[index].dirty_run(Phase(cursor.phase)) else {
                continue;
            };
            self.flush = Some(FlushCursor { slot: index, written: true, ..cursor });
            let slot = &mut self.slots[index];
            let mask = ((1u16 << count) - 1) << first;
            slot.dirty &= !(mask as u8);
            slot.writing |= mask as u8;
            if slot.dirty == 0 {
                self.dirty_slots -= 1;
            }
            let slot = &self.slots[index];
            let unit = UNIT_BYTES as usize;
            let at = index * BLOCK_BYTES as usize + first * unit;
            let offset = slot.block * BLOCK_BYTES + (first * unit) as u64;
            return Some((slot.file, offset, &self.bytes[at..at + count * unit]));
        }
        None
    }

    /// Moves on to the next phase; false when there is none.
    pub fn flush_next_phase(&mut self) -> bool {
        let cursor = self.flush.expect("flush_next_phase outside a flush");
        let phase = cursor.phase + 1;
        self.flush = Some(FlushCursor { phase, slot: 0, written: false });
        phase < Phase::COUNT
    }

    /// The phase that the flush is in.
    pub fn phase(&self) -> Phase {
        Phase(self.flush.expect("phase outside a flush").phase)
    }

    /// Blocks with changed units.
    pub fn dirty_blocks(&self) -> usize {
        self.dirty_slots
    }

    /// The first block at or after place `from` of the cache that has changed units: its place,
    /// file, offset and bytes. The places of dirty blocks do not change during a flush.
    pub fn dirty_block(&self, from: usize) -> Option<(usize, FileNo, u64, &[u8])> {
        let index = (from..self.slots.len()).find(|&i| self.slots[i].dirty != 0)?;
        let slot = &self.slots[index];
        let at = index * BLOCK_BYTES as usize;
        let bytes = &self.bytes[at..at + BLOCK_BYTES as usize];
        Some((index, slot.file, slot.block * BLOCK_BYTES, bytes))
    }

    /// Any unit of the current phase still to be handed out?
    pub fn phase_dirty(&self) -> bool {
        let cursor = self.flush.expect("phase_dirty outside a flush");
        let (before, after) = self.slots.split_at(cursor.slot);
        // From the cursor on, where the next one is found soon.
        let mut slots = after.iter().chain(before);
        slots.any(|slot| slot.dirty_run(Phase(cursor.phase)).is_some())
    }

    /// Was anything of the current phase handed out, so that a sync must follow?
    pub fn phase_written(&self) -> bool {
        self.flush.expect("phase_written outside a flush").written
    }

    /// Ends the flush: what was handed out is clean, or dirty again if `ok` is false.
    pub fn flush_end(&mut self, ok: bool) {
        self.flush = None;
        for slot in &mut self.slots {
            if !ok && slot.writing != 0 {
                if slot.dirty == 0 {
                    self.dirty_slots += 1;
                }
                slot.dirty |= slot.writing;
            }
            slot.writing = 0;
        }
    }

    /// Position in `bytes` of `offset` of `file`, resident; else the reason to wait.
    fn resident(&mut self, file: FileNo, offset: u64, len: usize) -> Step<usize> {
        let within = offset % BLOCK_BYTES;
        assert!(within as usize + len <= BLOCK_BYTES as usize, "an access across cache blocks");
        let block = offset / BLOCK_BYTES;
        if let Some(slot) = self.find(file, block) {
            self.slots[slot].used = true;
            return match self.slots[slot].state {
                State::Ready => Ok(slot * BLOCK_BYTES as usize + within as usize),
                _ => Err(Stop::Busy),
            };
        }
        self.take(file, block, State::Loading)?;
        self.loading += 1;
        Err(Stop::Miss(BlockRef { file, offset: block * BLOCK_BYTES, len: BLOCK_BYTES as u32 }))
    }

    fn set_of(&self, file: FileNo, block: u64) -> usize {
        // Fibonacci hashing: neighbours spread over the sets, whatever the table's stride.
        let key = (block ^ ((file.0 as u64) << 48)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((key >> 32) as usize % self.sets) * WAYS
    }

    fn find(&self, file: FileNo, block: u64) -> Option<usize> {
        let set = self.set_of(file, block);
        (set..set + WAYS).find(|&i| {
            let slot = &self.slots[i];
            slot.state != State::Free && slot.block == block && slot.file == file
        })
    }

    /// Takes a way for a block: free, else clean and not used lately, else clean.
    fn take(&mut self, file: FileNo, block: u64, state: State) -> Step<usize> {
        let set = self.set_of(file, block);
        let ways = set..set + WAYS;
        let evictable =
            |s: &Slot| s.state == State::Ready && s.dirty == 0 && s.writing == 0 && s.pins == 0;
        // A step that needs several blocks of one set must not see them push each other out.
        let usable = |s: &Slot| s.state == State::Free || evictable(s);
        let left = ways.clone().filter(|&i| usable(&self.slots[i])).count();
        let dirty = ways.clone().any(|i| self.slots[i].dirty != 0);
        if left < WAYS_KEPT && dirty && self.flush.is_none() {
            return Err(Stop::NeedFlush);
        }
        let mut chosen = ways.clone().find(|&i| self.slots[i].state == State::Free);
        for _ in 0..2 {
            if chosen.is_some() {
                break;
            }
            chosen = ways.clone().find(|&i| evictable(&self.slots[i]) && !self.slots[i].used);
            if chosen.is_none() {
                ways.clone().for_each(|i| self.slots[i].used = false);
            }
        }
        let Some(index) = chosen else {
            return Err(Stop::Busy);
        };
        self.slots[index] = Slot { state, file, block, used: true, ..EMPTY };
        Ok(index)
    }

    fn write_slot(&mut self, index: usize, within: usize, bytes: &[u8], phase: Phase) {
        assert!(within + bytes.len() <= BLOCK_BYTES as usize, "a change across cache blocks");
        let at = index * BLOCK_BYTES as usize + within;
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        let slot = &mut self.slots[index];
        slot.used = true;
        if slot.dirty == 0 {
            self.dirty_slots += 1;
        }
        let unit = UNIT_BYTES as usize;
        for u in within / unit..=(within + bytes.len().max(1) - 1) / unit {
            slot.dirty |= 1 << u;
            slot.phase[u] = phase;
        }
    }
}

impl Slot {
    /// First run of dirty units of `phase`: first unit and count.
    fn dirty_run(&self, phase: Phase) -> Option<(usize, usize)> {
        if self.dirty == 0 {
            return None;
        }
        let hit = |u: usize| self.dirty & (1 << u) != 0 && self.phase[u] == phase;
        let first = (0..UNITS).find(|&u| hit(u))?;
        Some((first, (first..UNITS).take_while(|&u| hit(u)).count()))
    }
}

#[cfg(test)]
mod tests {
    //! Would miss: what formats make of the cache; their own tests read whole images.

    use super::*;

    #[test]
    fn what_is_forgotten_of_a_block_leaves_the_rest_resident() {
        let mut meta = Meta::new(0).unwrap();
        let file = FileNo(0);
        let Err(Stop::Miss(block)) = meta.get_u8(file, 0) else { panic!("not resident") };
        meta.fill(block, &[7; BLOCK_BYTES as usize]);
        meta.set(file, 512, &[1], Phase::TABLE).unwrap();
        meta.set(file, 1024, &[2], Phase::TABLE).unwrap();
        meta.forget(file, 512, 512);
        assert_eq!((meta.get_u8(file, 0), meta.get_u8(file, 1024)), (Ok(7), Ok(2)));
        meta.forget(file, 1024, 512);
        assert!(!meta.is_dirty());
        assert_eq!(meta.get_u8(file, 0), Ok(7));
        meta.forget(file, 0, BLOCK_BYTES);
        assert!(matches!(meta.get_u8(file, 0), Err(Stop::Miss(_))));
    }

    #[test]
    fn a_late_answer_does_not_fill_a_block_that_changed_hands() {
        let mut meta = Meta::new(0).unwrap();
        let file = FileNo(0);
        let Err(Stop::Miss(late)) = meta.get_u8(file, 0) else { panic!("not resident") };
        meta.forget(file, 0, 2 * BLOCK_BYTES);
        assert_eq!(meta.loading, 0);
        meta.create(file, 0, Phase::TABLE).unwrap();
        meta.forget(file, 0, BLOCK_BYTES);
        meta.fill(late, &[7; BLOCK_BYTES as usize]);
        assert!(matches!(meta.get_u8(file, 0), Err(Stop::Miss(_))));
        // In part: it is still the place of others' tables.
        meta.forget(file, 512, 512);
        meta.fill(late, &[7; BLOCK_BYTES as usize]);
        assert_eq!(meta.get_u8(file, 0), Ok(7));
    }
}
