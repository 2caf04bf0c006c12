//! Writing a VHDX: where new blocks go, and which bits and BAT entries change.
//!
//! Order guarded (data-then-map): data first; entries and bits only change in cache blocks that
//! a flush puts through the log (see `log`). The GUIDs that say "this file was written" change
//! before anything else does. Space that a discard frees is used again only after a flush.
//! It must never let more blocks become dirty than one log entry holds.

use alloc::vec::Vec;

use crate::fault::{FaultKind, ImageFault};
use crate::files::FileInfo;
use crate::format::{Ctx, Found, Own, with_writer};
use crate::image::PLANS_MAX;
use crate::memory::{LACK, SPARE_BYTES, filled, is_left};
use crate::meta::{BLOCK_BYTES, Meta, Phase};
use crate::types::{
    DiscardPlan, FileNo, Prelude, Prepared, SECTOR_BYTES, SectorRange, Step, Stop, WritePlan,
};

use super::Vhdx;
use super::header::{Guid, Header, MIB};
use super::load::Region;
use super::log::{Journal, entry_blocks_max};
use super::map::{BLOCK_BITS, ENTRY_BITMAP, ENTRY_FULL, ENTRY_PARTIAL, ENTRY_ZERO, State};
use super::resize::Moving;

/// Logical sectors whose bits are set together, so that bitmaps hold only whole bytes: readers
/// that take a byte at a time exist (libvhdi).
const GROUP: u64 = 8;
/// Cache blocks that one plan changes: a BAT entry, the bitmap's, and the bitmap itself.
const PINS_MAX: usize = 3;
/// Freed places kept; more are leaked.
const SPARES_MAX: usize = 2 * PLANS_MAX;

/// BAT entries and MiB of a file that are looked at for free places at open: 1 MiB of BAT, 1 TiB.
const SCAN_BLOCKS_MAX: u64 = 1 << 17;
const SCAN_MIB_MAX: u64 = 1 << 20;

/// Sectors of a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Span {
    block: u64,
    first: u64,
    count: u64,
}

impl Span {
    fn end(self) -> u64 {
        self.first + self.count
    }
}

/// A write in flight.
struct Plan {
    /// What it writes, copies around it included.
    whole: Span,
    /// New BAT entry of the block.
    entry: Option<u64>,
    /// Byte of the bitmap block in which the bits of `whole` become set.
    bits: Option<u64>,
    /// The bitmap block is new.
    new_bitmap: bool,
    /// Place reserved for the block.
    place: Option<u64>,
    pins: heapless::Vec<u64, PINS_MAX>,
}

/// What only the top layer of a writable image has.
pub(super) struct Writer {
    journal: Journal,
    /// First byte behind everything.
    next: u64,
    can_grow: bool,
    /// BAT entries looked at for `next`, in a file that cannot grow.
    scanned: u64,
    /// The block whose stale bits are being cleared, and the cache block of bits that is next.
    clearing: Option<(u64, u64)>,
    /// A BAT being moved.
    pub moving: Option<Moving>,
    /// Blocks that the disk grows to, and the next whose BAT entry is to be set.
    pub growing: Option<(u64, u64)>,
    /// While the file is opened: one bit for each MiB that something uses.
    used: Option<Vec<u64>>,
    spares: heapless::Vec<u64, SPARES_MAX>,
    /// Places that are free once the flush is durable.
    freed: heapless::Vec<u64, PLANS_MAX>,
    plans: [Option<Plan>; PLANS_MAX],
}

impl Writer {
    pub fn new(seed: u64, info: FileInfo, header: Header, slot: usize) -> Writer {
        Writer {
            journal: Journal::new(seed, header, slot, info.size_bytes),
            next: info.size_bytes,
            can_grow: info.can_grow,
            scanned: 0,
            clearing: None,
            moving: None,
            growing: None,
            used: None,
            spares: heapless::Vec::new(),
            freed: heapless::Vec::new(),
            plans: [const { None }; PLANS_MAX],
        }
    }

    pub fn file_guid_changed(&self) -> bool {
        self.journal.file_guid_changed()
    }

    pub fn want_file_guid(&mut self) {
        self.journal.want_file_guid();
    }

    pub fn data_write_guid(&self) -> Guid {
        self.journal.data_write_guid()
    }

    pub fn log_guid_set(&self) -> bool {
        self.journal.log_guid_set()
    }

    pub fn want_empty_log(&mut self) {
        self.journal.want_empty_log();
    }

    pub fn replay_done(&mut self) {
        self.journal.replaying = false;
    }

    pub fn is_dirty(&self) -> bool {
        self.journal.is_dirty()
    }

    pub fn own_bytes(&self) -> &[u8] {
        self.journal.own_bytes()
    }

    pub fn flush_own(&mut self, meta: &Meta, file: FileNo, log: Region, phase: Phase) -> Own {
        self.journal.flush_own(meta, file, log, phase)
    }

    pub fn flushed(&mut self, ok: bool) {
        self.journal.flushed(ok);
        if ok {
            for &place in &self.freed {
                if self.spares.len() < PLANS_MAX {
                    self.spares.push(place).expect("there is room for half of them");
                }
            }
            self.freed.clear();
        }
    }

    /// Changes the GUIDs before the first write, and keeps the log entry's room: `blocks` more
    /// may become dirty.
    pub fn begin(&mut self, meta: &Meta, log: Region, blocks: usize) -> Step<()> {
        if !self.journal.data_guid_changed() {
            self.journal.want_data_guid();
            return Err(Stop::NeedFlush);
        }
        let pinned: usize = self.plans.iter().flatten().map(|plan| plan.pins.len()).sum();
        let dirty = meta.dirty_blocks();
        if (dirty + pinned + blocks) as u64 > entry_blocks_max(log) {
            return Err(if dirty > 0 { Stop::NeedFlush } else { Stop::Busy });
        }
        Ok(())
    }

    /// Something uses this stretch of the file.
    fn mark_used(&mut self, offset: u64, len: u64) {
        self.next = self.next.max(offset + len);
        let Some(used) = &mut self.used else { return };
        for mib in offset / MIB..(offset + len) / MIB {
            if let Some(word) = used.get_mut((mib / 64) as usize) {
                *word |= 1 << (mib % 64);
            }
        }
    }

    pub fn can_grow(&self) -> bool {
        self.can_grow
    }

    /// First byte behind everything.
    pub fn end(&self) -> u64 {
        self.next
    }

    /// Sets the end of everything anew: it only grows.
    pub fn reserve_until(&mut self, end: u64) {
        self.next = self.next.max(end);
        self.journal.end = self.journal.end.max(end);
    }

    /// A write that copies sectors around it must not meet one that changes them.
    fn wait_for_others(&self, whole: Span) -> Step<()> {
        let meets = |p: &Plan| {
            let p = p.whole;
            p.block == whole.block && p.first < whole.end() && whole.first < p.end()
        };
        if self.plans.iter().flatten().any(meets) { Err(Stop::Busy) } else { Ok(()) }
    }

    /// A block that gets its place must not meet any other plan for it.
    fn wait_for_block(&self, block: u64) -> Step<()> {
        let same = |p: &Plan| p.whole.block == block;
        if self.plans.iter().flatten().any(same) { Err(Stop::Busy) } else { Ok(()) }
    }
}

impl Vhdx {
    fn block_bytes(&self) -> u64 {
        self.geometry.block_sectors * SECTOR_BYTES
    }

    /// Finds the end of all blocks and free places between them, going on where it stopped. In
    /// a file that can grow new blocks go behind its end, so a large BAT is not read for that.
    pub(super) fn find_end(&mut self, ctx: &mut Ctx) -> Step<()> {
        let Some(mut writer) = self.writer.take() else { return Ok(()) };
        let size = ctx.files.size(self.file);
        let result = if self.blocks() > SCAN_BLOCKS_MAX || size / MIB > SCAN_MIB_MAX {
            let blocks = if writer.can_grow { 0 } else { self.blocks() };
            self.scan_bat(ctx, &mut writer, 0, blocks)
        } else {
            self.scan_bat(ctx, &mut writer, size / MIB, self.blocks())
        };
        let result = match result {
            // Blocks go behind the end: a broken entry is the request's affair that meets it.
            Err(Stop::Fault(_)) if writer.can_grow => Ok(()),
            result => result,
        };
        if writer.can_grow && result.is_ok() {
            writer.used = None;
            writer.next = size;
            writer.reserve_until(size);
        }
        self.writer = Some(writer);
        result
    }

    /// Looks at the BAT entries of `blocks` blocks, and for free places in `mib` of the file.
    fn scan_bat(&self, ctx: &mut Ctx, writer: &mut Writer, mib: u64, blocks: u64) -> Step<()> {
        if writer.used.is_none() {
            let end = |r: &Region| r.offset + r.length;
            let known = [self.log, self.bat, self.metadata];
            let regions = known.iter().chain(&self.others);
            writer.next = regions.map(end).max().expect("there are three at least");
            let used = filled(0, mib.div_ceil(64) as usize).filter(|_| is_left(SPARE_BYTES));
            writer.used = Some(used.ok_or(LACK)?);
        }
        let ratio = self.geometry.chunk_ratio;
        while writer.scanned < blocks {
            let block = writer.scanned;
            let state = self.state(ctx, block)?;
            let bitmap = match self.geometry.has_parent && block.is_multiple_of(ratio) {
                true => self.bitmap_block(ctx, block)?,
                false => None,
            };
            if let State::Full(at) | State::Partial(at) = state {
                writer.mark_used(at, self.block_bytes());
            }
            if let Some(at) = bitmap {
                writer.mark_used(at, MIB);
            }
            writer.scanned += 1;
        }
        self.find_spares(writer, mib);
        Ok(())
    }

    /// Keeps free places as long as a block. New blocks go behind `next`, so that all of these lie
    /// before it: in a store of fixed size the rest is free too, and would be given out twice.
    fn find_spares(&self, writer: &mut Writer, mib: u64) {
        let Some(used) = writer.used.take() else { return };
        let mib = if writer.can_grow { mib } else { mib.min(writer.next / MIB) };
        let per_block = self.block_bytes() / MIB;
        let is_used = |at: u64| used[(at / 64) as usize] & (1 << (at % 64)) != 0;
        let mut at = 1;
        while at + per_block <= mib && writer.spares.len() < PLANS_MAX {
            let taken = (at..at + per_block).find(|&m| is_used(m));
            match taken {
                Some(taken) => at = taken + 1,
                None if self.in_metadata(at * MIB, self.block_bytes()) => at += 1,
                None => {
                    writer.spares.push(at * MIB).expect("there is room for half of them");
                    at += per_block;
                }
            }
        }
    }

    pub(super) fn blocks(&self) -> u64 {
        self.geometry.sectors.div_ceil(self.geometry.block_sectors)
    }

    pub(super) fn prepare_range(
        &mut self,
        ctx: &mut Ctx,
        slot: u16,
        range: SectorRange,
    ) -> Step<WritePlan> {
        with_writer(self, Vhdx::writer_slot, |layer, writer| layer.plan(ctx, writer, slot, range))
    }

    fn plan(
        &self,
        ctx: &mut Ctx,
        writer: &mut Writer,
        slot: u16,
        range: SectorRange,
    ) -> Step<WritePlan> {
        writer.begin(ctx.meta, self.log, PINS_MAX)?;
        let per_block = self.geometry.block_sectors;
        let (block, first) = (range.start / per_block, range.start % per_block);
        let span = Span { block, first, count: range.count.min(per_block - first) };
        let all = first == 0 && span.count == per_block.min(self.disk_end(block));
        match self.state(ctx, block)? {
            State::Full(_) => self.plan_over(ctx, writer, slot, span),
            State::Partial(_) => self.plan_partial(ctx, writer, slot, span, all),
            State::NotPresent if self.geometry.has_parent && !all => {
                self.plan_new_partial(ctx, writer, slot, span)
            }
            _ => self.plan_new(ctx, writer, slot, span),
        }
    }

    /// Sectors of the disk from the block's first one on.
    fn disk_end(&self, block: u64) -> u64 {
        self.geometry.sectors - block * self.geometry.block_sectors
    }

    fn write_plan(&self, slot: u16, sectors: u64, offset: u64) -> WritePlan {
        WritePlan {
            prepared: Prepared { slot },
            sectors,
            file: self.file,
            offset,
            head: None,
            tail: None,
            preludes: heapless::Vec::new(),
        }
    }

    /// A write where all is present: nothing becomes visible.
    fn plan_over(
        &self,
        ctx: &mut Ctx,
        writer: &mut Writer,
        slot: u16,
        span: Span,
    ) -> Step<WritePlan> {
        let start = span.block * self.geometry.block_sectors + span.first;
        let found = self.map_range(ctx, SectorRange::new(start, span.count))?;
        let (Found::Data { offset, .. }, count) = found else {
            panic!("what is present has a place");
        };
        let whole = Span { count, ..span };
        writer.wait_for_others(whole)?;
        let plan = Plan {
            whole,
            entry: None,
            bits: None,
            new_bitmap: false,
            place: None,
            pins: heapless::Vec::new(),
        };
        writer.plans[slot as usize] = Some(plan);
        Ok(self.write_plan(slot, count, offset))
    }

    /// A write into a block that is partially present.
    fn plan_partial(
        &self,
        ctx: &mut Ctx,
        writer: &mut Writer,
        slot: u16,
        span: Span,
        all: bool,
    ) -> Step<WritePlan> {
        let State::Partial(offset) = self.state(ctx, span.block)? else {
            panic!("the block is partially present");
        };
        if offset + self.block_bytes() > ctx.files.size(self.file) {
            let field = "VHDX block, cut off by the end of the file";
            return Err(ImageFault::corrupt(self.file, field, offset, span.block).into());
        }
        let Some(bitmap) = self.bitmap_block(ctx, span.block)? else {
            let field = "VHDX block, partially present without a sector bitmap";
            let at = self.entry_at(span.block);
            return Err(ImageFault::corrupt(self.file, field, at, span.block).into());
        };
        let span = if all { span } else { self.within_cache_block(span) };
        let (present, run) = self.presence(ctx, bitmap, span.block, span.first, span.count)?;
        if present && run == span.count {
            return self.plan_over(ctx, writer, slot, span);
        }
        let mut whole = if all { span } else { self.group(span) };
        if self.all_present(ctx, bitmap, span.block, whole.first, span.first)? {
            whole = Span { first: span.first, count: whole.end() - span.first, ..whole };
        }
        if self.all_present(ctx, bitmap, span.block, span.end(), whole.end())? {
            whole.count = span.end() - whole.first;
        }
        writer.wait_for_others(whole)?;
        let (entry, bits, at) = if all {
            (Some(offset | ENTRY_FULL), None, self.entry_at(span.block))
        } else {
            (None, Some(bitmap), self.bits_at(bitmap, span))
        };
        let pins = pin_all(ctx, self.file, &[at])?;
        let plan = Plan { whole, entry, bits, new_bitmap: false, place: None, pins };
        writer.plans[slot as usize] = Some(plan);
        let data = offset + span.first * SECTOR_BYTES;
        let mut plan = self.write_plan(slot, span.count, data);
        self.copy_around(&mut plan, span, whole);
        if all && span.count < self.geometry.block_sectors {
            // The disk ends in this block. What lies behind becomes present too, and shows if it
            // grows.
            let end = offset + span.count * SECTOR_BYTES;
            self.zero(&mut plan, end, offset + self.block_bytes() - end);
        }
        Ok(plan)
    }

    /// Are the sectors from `first` to `end` of a block there? True for none.
    fn all_present(
        &self,
        ctx: &mut Ctx,
        bitmap: u64,
        block: u64,
        first: u64,
        end: u64,
    ) -> Step<bool> {
        if first >= end {
            return Ok(false);
        }
        let count = end - first;
        Ok(self.presence(ctx, bitmap, block, first, count)? == (true, count))
    }

    /// As much of a span as has its bits in one cache block.
    fn within_cache_block(&self, span: Span) -> Span {
        let logical = self.geometry.logical;
        let bit = self.first_bit(span.block) + span.first / logical;
        let room = (BLOCK_BITS - bit % BLOCK_BITS) * logical - span.first % logical;
        Span { count: span.count.min(room), ..span }
    }

    /// The groups of logical sectors that a span touches, as far as the disk reaches.
    fn group(&self, span: Span) -> Span {
        let group = GROUP * self.geometry.logical;
        let first = span.first - span.first % group;
        let limit = self.geometry.block_sectors.min(self.disk_end(span.block));
        let end = span.end().next_multiple_of(group).min(limit);
        Span { first, count: end - first, ..span }
    }

    /// Byte of the bitmap where the bits of a span begin.
    fn bits_at(&self, bitmap: u64, span: Span) -> u64 {
        bitmap + (self.first_bit(span.block) + span.first / self.geometry.logical) / 8
    }

    /// What lies in `whole` around `span` is copied from what the image reads now.
    fn copy_around(&self, plan: &mut WritePlan, span: Span, whole: Span) {
        let start = span.block * self.geometry.block_sectors;
        if whole.first < span.first {
            plan.head = Some(SectorRange::new(start + whole.first, span.first - whole.first));
        }
        if span.end() < whole.end() {
            plan.tail = Some(SectorRange::new(start + span.end(), whole.end() - span.end()));
        }
    }

    /// The first sectors of a block in this file: the rest stays the parent's.
    fn plan_new_partial(
        &self,
        ctx: &mut Ctx,
        writer: &mut Writer,
        slot: u16,
        span: Span,
    ) -> Step<WritePlan> {
        writer.wait_for_block(span.block)?;
        let span = self.within_cache_block(span);
        let whole = self.group(span);
        let old_bitmap = self.bitmap_block(ctx, span.block)?;
        match old_bitmap {
            Some(bitmap) => self.clear_bits(ctx, writer, bitmap, span.block)?,
            None => self.wait_for_bitmap(writer, span.block)?,
        }
        let spare = writer.spares.last().copied();
        let mut end = writer.next.next_multiple_of(MIB);
        let mut take = |len: u64| {
            let at = end;
            end += len;
            at
        };
        let bitmap = old_bitmap.unwrap_or_else(|| take(MIB));
        let place = spare.unwrap_or_else(|| take(self.block_bytes()));
        self.check_room(ctx, writer, end)?;
        let bits_at = self.bits_at(bitmap, whole);
        let pins = match old_bitmap {
            Some(_) => pin_all(ctx, self.file, &[self.entry_at(span.block), bits_at])?,
            None => self.pin_new_bitmap(ctx, writer, span.block, bits_at)?,
        };
        self.take_place(ctx, writer, spare, end);
        writer.clearing = None;
        let mut plan = self.write_plan(slot, span.count, place + span.first * SECTOR_BYTES);
        self.copy_around(&mut plan, span, whole);
        if old_bitmap.is_none() {
            let from = if writer.can_grow { MIB - BLOCK_BYTES } else { 0 };
            self.zero(&mut plan, bitmap + from, MIB - from);
        }
        if spare.is_none() && whole.end() < self.geometry.block_sectors {
            // So that the file is as long as the block.
            self.zero(&mut plan, place + self.block_bytes() - SECTOR_BYTES, SECTOR_BYTES);
        }
        writer.plans[slot as usize] = Some(Plan {
            whole,
            entry: Some(place | ENTRY_PARTIAL),
            bits: Some(bitmap),
            new_bitmap: old_bitmap.is_none(),
            place: Some(place),
            pins,
        });
        Ok(plan)
    }

    /// Pins what changes when a block's sector bitmap is new. A store of fixed size holds anything
    /// there, so the cache starts from zeros, not from a read; that comes last, for zeros left by
    /// a plan that stops would lie over whatever gets the place instead.
    fn pin_new_bitmap(
        &self,
        ctx: &mut Ctx,
        writer: &Writer,
        block: u64,
        bits_at: u64,
    ) -> Step<heapless::Vec<u64, PINS_MAX>> {
        let entries = [self.entry_at(block), self.bitmap_entry_at(block)];
        if writer.can_grow {
            return pin_all(ctx, self.file, &[entries[0], entries[1], bits_at]);
        }
        if ctx.meta.flushing() {
            // What the log entry under way holds must not change.
            return Err(Stop::Busy);
        }
        let mut pins = pin_all(ctx, self.file, &entries)?;
        let bits_block = bits_at / BLOCK_BYTES * BLOCK_BYTES;
        if let Err(stop) = ctx.meta.create_pinned(self.file, bits_block, Phase::TABLE) {
            pins.iter().for_each(|&pinned| ctx.meta.unpin(self.file, pinned));
            return Err(stop);
        }
        pins.push(bits_at).expect("no more than there are kinds of them");
        Ok(pins)
    }

    fn zero(&self, plan: &mut WritePlan, offset: u64, len: u64) {
        let zero = Prelude::Zero { file: self.file, offset, len };
        plan.preludes.push(zero).expect("two preludes at most");
    }

    /// Another plan may be making the bitmap block of this chunk.
    fn wait_for_bitmap(&self, writer: &Writer, block: u64) -> Step<()> {
        let chunk = |block: u64| block / self.geometry.chunk_ratio;
        let same = |p: &Plan| p.new_bitmap && chunk(p.whole.block) == chunk(block);
        if writer.plans.iter().flatten().any(same) { Err(Stop::Busy) } else { Ok(()) }
    }

    /// Bits of a block that is not present mean nothing and may be set: clears them, going on
    /// where it stopped.
    fn clear_bits(&self, ctx: &mut Ctx, writer: &mut Writer, bitmap: u64, block: u64) -> Step<()> {
        let first = bitmap + self.first_bit(block) / 8;
        let len = (self.geometry.block_sectors / self.geometry.logical / 8).max(1);
        let mut done = match writer.clearing {
            Some((of, done)) if of == block => done,
            _ => 0,
        };
        while done < len {
            let at = first + done;
            let mut unit = [0; SECTOR_BYTES as usize];
            let room = SECTOR_BYTES - at % SECTOR_BYTES;
            let piece = &mut unit[..room.min(len - done) as usize];
            ctx.meta.get(self.file, at, piece)?;
            if piece.iter().any(|&b| b != 0) {
                if ctx.meta.flushing() {
                    // What the log entry under way holds must not change.
                    return Err(Stop::Busy);
                }
                writer.begin(ctx.meta, self.log, PINS_MAX + 1)?;
                piece.fill(0);
                ctx.meta.set(self.file, at, piece, Phase::TABLE)?;
            }
            done += piece.len() as u64;
            writer.clearing = Some((block, done));
        }
        Ok(())
    }

    fn check_room(&self, ctx: &Ctx, writer: &Writer, end: u64) -> Result<(), ImageFault> {
        let size = ctx.files.size(self.file);
        if !writer.can_grow && end > size && end > writer.next {
            let fault = ImageFault::new(FaultKind::Full, self.file, "a VHDX block's end");
            return Err(ImageFault { value: end, limit: size, ..fault });
        }
        Ok(())
    }

    fn take_place(&self, ctx: &mut Ctx, writer: &mut Writer, spare: Option<u64>, end: u64) {
        if spare.is_some() {
            writer.spares.pop();
        }
        if end > writer.next {
            writer.next = end;
            if writer.can_grow {
                ctx.files.grow(self.file, end);
            }
        }
    }

    /// A block that becomes fully present: all of it is written, or the rest is zeros.
    fn plan_new(
        &self,
        ctx: &mut Ctx,
        writer: &mut Writer,
        slot: u16,
        span: Span,
    ) -> Step<WritePlan> {
        writer.wait_for_block(span.block)?;
        let spare = writer.spares.last().copied();
        let behind = writer.next.next_multiple_of(MIB);
        let place = spare.unwrap_or(behind);
        let end = if spare.is_some() { writer.next } else { place + self.block_bytes() };
        self.check_room(ctx, writer, end)?;
        let pins = pin_all(ctx, self.file, &[self.entry_at(span.block)])?;
        self.take_place(ctx, writer, spare, end);
        let mut plan = self.write_plan(slot, span.count, place + span.first * SECTOR_BYTES);
        let fresh = spare.is_none() && writer.can_grow;
        let all = self.geometry.block_sectors;
        let (head, tail) = match fresh {
            true => (0..0, span.end().max(all - 1)..all),
            false => (0..span.first, span.end()..all),
        };
        for zeros in [head, tail] {
            if !zeros.is_empty() {
                let len = (zeros.end - zeros.start) * SECTOR_BYTES;
                self.zero(&mut plan, place + zeros.start * SECTOR_BYTES, len);
            }
        }
        writer.plans[slot as usize] = Some(Plan {
            whole: span,
            entry: Some(place | ENTRY_FULL),
            bits: None,
            new_bitmap: false,
            place: Some(place),
            pins,
        });
        Ok(plan)
    }

    fn take_plan(&mut self, ctx: &mut Ctx, slot: u16) -> Plan {
        let writer = self.writer.as_mut().expect("a plan has a writer");
        let plan = writer.plans[slot as usize].take().expect("a plan in flight");
        plan.pins.iter().for_each(|&at| ctx.meta.unpin(self.file, at));
        plan
    }

    pub(super) fn commit_plan(&mut self, ctx: &mut Ctx, slot: u16) {
        // Nothing can come between the end of the pins and the changes.
        let plan = self.take_plan(ctx, slot);
        let block = plan.whole.block;
        if let Some(bitmap) = plan.bits {
            self.set_bits(ctx, bitmap, plan.whole);
            if plan.new_bitmap {
                let entry = (bitmap | ENTRY_BITMAP).to_le_bytes();
                ctx.meta.put(self.file, self.bitmap_entry_at(block), &entry, Phase::TABLE);
            }
        }
        if let Some(entry) = plan.entry {
            ctx.meta.put(self.file, self.entry_at(block), &entry.to_le_bytes(), Phase::TABLE);
        }
        let len = self.block_bytes();
        let writer = self.writer.as_mut().expect("a plan has a writer");
        if let Some(place) = plan.place {
            writer.journal.end = writer.journal.end.max(place + len);
        }
        if let (Some(bitmap), true) = (plan.bits, plan.new_bitmap) {
            writer.journal.end = writer.journal.end.max(bitmap + MIB);
        }
    }

    pub(super) fn abandon_plan(&mut self, ctx: &mut Ctx, slot: u16) {
        let plan = self.take_plan(ctx, slot);
        let writer = self.writer.as_mut().expect("a plan has a writer");
        if let Some(place) = plan.place {
            // A place too many is leaked.
            let _ = writer.spares.push(place);
        }
    }

    /// Sets the bits of a span; their cache block was pinned until just now.
    fn set_bits(&self, ctx: &mut Ctx, bitmap: u64, span: Span) {
        let logical = self.geometry.logical;
        let base = self.first_bit(span.block);
        let (first, end) = (base + span.first / logical, base + span.end().div_ceil(logical));
        for byte in first / 8..end.div_ceil(8) {
            let from = first.max(byte * 8) - byte * 8;
            let to = end.min(byte * 8 + 8) - byte * 8;
            let mask = (0xffu8 << from) & (0xffu16 >> (8 - to)) as u8;
            let old = ctx.meta.get_u8(self.file, bitmap + byte).expect("it is resident");
            ctx.meta.put(self.file, bitmap + byte, &[old | mask], Phase::TABLE);
        }
    }

    pub(super) fn discard_range(
        &mut self,
        ctx: &mut Ctx,
        range: SectorRange,
        zero: bool,
    ) -> Step<DiscardPlan> {
        with_writer(self, Vhdx::writer_slot, |layer, writer| {
            layer.discard_with(ctx, writer, range, zero)
        })
    }

    fn discard_with(
        &self,
        ctx: &mut Ctx,
        writer: &mut Writer,
        range: SectorRange,
        zero: bool,
    ) -> Step<DiscardPlan> {
        writer.begin(ctx.meta, self.log, 1)?;
        let per_block = self.geometry.block_sectors;
        let block = range.start / per_block;
        let all = range.start.is_multiple_of(per_block)
            && range.count >= per_block.min(self.disk_end(block));
        let state = self.state(ctx, block)?;
        let place = match state {
            State::Full(place) | State::Partial(place) => Some(place),
            _ => None,
        };
        // A fixed disk keeps its blocks. In a child, libvhdi shows the parent through a block of
        // zeros: good enough for what was let go, not for what must read as zeros.
        let keeps = self.geometry.leave_allocated || zero && self.geometry.has_parent;
        if all && place.is_some() && !keeps {
            writer.wait_for_block(block)?;
            ctx.meta.reserve(self.file, self.entry_at(block))?;
            let entry = ENTRY_ZERO.to_le_bytes();
            ctx.meta.put(self.file, self.entry_at(block), &entry, Phase::TABLE);
            if let Some(place) = place {
                let _ = writer.freed.push(place);
            }
            let sectors = per_block.min(self.disk_end(block)).min(range.count);
            return Ok(DiscardPlan { sectors, punch: None });
        }
        let (found, sectors) = self.map_range(ctx, range)?;
        Ok(match found {
            Found::Absent if zero => DiscardPlan { sectors: 0, punch: None },
            Found::Data { .. } if zero => DiscardPlan { sectors: 0, punch: None },
            Found::Data { file, offset } => {
                DiscardPlan { sectors, punch: Some((file, offset, sectors * SECTOR_BYTES)) }
            }
            _ => DiscardPlan { sectors, punch: None },
        })
    }
}

/// Pins all or none.
fn pin_all(ctx: &mut Ctx, file: FileNo, offsets: &[u64]) -> Step<heapless::Vec<u64, PINS_MAX>> {
    let mut pins = heapless::Vec::new();
    for &offset in offsets {
        if let Err(stop) = ctx.meta.pin(file, offset) {
            pins.iter().for_each(|&pinned| ctx.meta.unpin(file, pinned));
            return Err(stop);
        }
        pins.push(offset).expect("no more than there are kinds of them");
    }
    Ok(pins)
}
