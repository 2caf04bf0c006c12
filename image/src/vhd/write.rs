//! Writing a VHD.
//!
//! Order guarded (data-then-map): a block's data comes first; a flush syncs it, then writes the
//! footer behind everything and the bitmaps, syncs, then writes the BAT, and syncs. A new block
//! overwrites the old footer: until the new one is written only the copy at byte 0 is good,
//! which every reader that survives a power cut uses. New blocks lie behind everything (the
//! BAT, XenServer's batmap, the locators, all blocks), so that no table is overwritten.
//! It must never use space that an earlier footer write of an unfinished flush may still reach.

use crate::fault::{FaultKind, ImageFault};
use crate::files::FileInfo;
use crate::format::{Ctx, Own, read_only, with_writer};
use crate::image::PLANS_MAX;
use crate::meta::{BLOCK_BYTES, Phase};
use crate::types::{
    DiscardPlan, FileNo, Prelude, Prepared, SECTOR_BYTES, SectorRange, Step, Stop, WritePlan,
};

use super::Vhd;
use super::header::{BAT_UNUSED, FOOTER_BYTES, Kind};
use super::map::bit_run;
use super::resize::Moving;

/// Largest bitmap written whole on allocation: one cache block, for blocks of 16 MiB. That of a
/// larger block is cleared by a prelude, and then gets only the bits of what is written.
const BITMAP_BYTES_MAX: u64 = BLOCK_BYTES;
/// Sectors whose bits lie in one cache block.
const BLOCK_BITS: u64 = BLOCK_BYTES * 8;

/// Sectors whose bits are set together, so that a bitmap holds only whole bytes: libvhdi reads
/// it byte by byte, and Windows itself writes 4 KiB at least. What the guest did not write of
/// them is copied from what the image reads there.
const GROUP: u64 = 8;

/// What a plan makes visible.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Effect {
    /// All sectors are there.
    Nothing,
    /// The bits of the sectors become set.
    Bits,
    /// The block gets its place.
    Block,
}

/// A write in flight: sectors of a block, those that are copied around it included.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Plan {
    effect: Effect,
    block: u64,
    /// Byte of the block's bitmap.
    bitmap: u64,
    first: u64,
    count: u64,
}

/// Sectors of a block that a write covers.
#[derive(Clone, Copy)]
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

/// What only the top layer of a writable image has.
pub(super) struct Writer {
    footer: [u8; FOOTER_BYTES],
    /// First byte behind everything, where the footer belongs.
    next: u64,
    /// Space from here on was never written: it reads as zeros.
    fresh_from: u64,
    /// Where the footer of a file that cannot grow stays: blocks end before it.
    fixed_footer: Option<u64>,
    /// BAT entries looked at for `next`.
    scanned: u64,
    /// The footer at the end is missing: the first write brings a new one.
    recovered: bool,
    footer_dirty: bool,
    /// The footer with a new size: written last.
    new_footer: Option<[u8; FOOTER_BYTES]>,
    /// A fixed disk's old footer, now the guest's.
    wipe: Option<u64>,
    /// A BAT being moved.
    pub moving: Option<Moving>,
    /// How far the flush under way is, and the sector it was given last.
    stage: u8,
    handing_out: [u8; FOOTER_BYTES],
    /// Places of blocks that were reserved and given back: they hold anything.
    spares: heapless::Vec<u64, PLANS_MAX>,
    plans: [Option<Plan>; PLANS_MAX],
}

impl Writer {
    pub fn new(vhd: &Vhd, info: FileInfo, footer: &[u8; FOOTER_BYTES]) -> Writer {
        // The old footer, good or damaged, lies in the last sector: a block may start there.
        let end = info.size_bytes.saturating_sub(1) / SECTOR_BYTES * SECTOR_BYTES;
        // A file that cannot grow (a logical volume) keeps its footer at its very end, as
        // libvhd has it, so the end of the blocks is found by the BAT.
        let (next, fresh_from, fixed_footer) = if info.can_grow {
            let whole = info.size_bytes.next_multiple_of(SECTOR_BYTES);
            let damaged = vhd.note.is_some() && vhd.kind != Kind::Fixed;
            (if damaged { whole } else { end }, info.size_bytes, None)
        } else {
            (vhd.table_offset + vhd.entries as u64 * 4, u64::MAX, Some(end))
        };
        Writer {
            footer: *footer,
            next,
            fresh_from,
            fixed_footer,
            scanned: if info.can_grow { u64::MAX } else { 0 },
            recovered: vhd.note.is_some() && vhd.kind != Kind::Fixed && info.can_grow,
            footer_dirty: false,
            new_footer: None,
            wipe: None,
            moving: None,
            stage: 0,
            handing_out: [0; FOOTER_BYTES],
            spares: heapless::Vec::new(),
            plans: [None; PLANS_MAX],
        }
    }

    pub fn is_dirty(&self) -> bool {
        self.footer_dirty || self.new_footer.is_some()
    }

    pub fn own_bytes(&self) -> &[u8] {
        &self.handing_out
    }

    pub fn footer(&self) -> &[u8; FOOTER_BYTES] {
        self.new_footer.as_ref().unwrap_or(&self.footer)
    }

    pub fn next(&self) -> u64 {
        self.next
    }

    pub fn can_grow(&self) -> bool {
        self.fixed_footer.is_none()
    }

    /// A write that copies sectors around it must not meet one that changes them.
    fn wait_for_others(&self, whole: Span) -> Step<()> {
        let meets = |plan: &Plan| {
            let end = plan.first + plan.count;
            plan.block == whole.block && plan.first < whole.end() && whole.first < end
        };
        if self.plans.iter().flatten().any(meets) { Err(Stop::Busy) } else { Ok(()) }
    }

    /// Takes everything up to `end` for metadata.
    pub fn reserve_until(&mut self, end: u64) {
        self.next = end;
        self.footer_dirty = true;
    }

    /// A repair gives places back; none may be used again that was kept for that.
    pub fn forget_spares(&mut self) {
        self.spares.clear();
    }

    /// A repair found that everything ends at `end`: nothing behind it is in use. Says how long
    /// the file is to be. One that cannot be cut has no end of its own.
    pub fn end_at(&mut self, end: u64) -> u64 {
        assert!(self.can_grow(), "a store of fixed size has nothing behind the last block");
        self.next = end;
        self.footer_dirty = true;
        self.fresh_from = end + FOOTER_BYTES as u64;
        self.fresh_from
    }

    /// Where a fixed disk's footer goes now that the disk ends at `end`: it ends the file, so it
    /// stays where it is if that is behind the disk (by their geometry some end before it).
    pub fn move_fixed_footer(&mut self, end: u64) {
        if end <= self.next {
            return;
        }
        self.wipe.get_or_insert(self.next);
        self.next = end;
    }

    /// The footer after all tables are durable.
    pub fn replace_footer(&mut self, footer: [u8; FOOTER_BYTES]) {
        self.new_footer = Some(footer);
    }

    /// The footer behind new blocks comes before they stand in the BAT. A footer with a new size
    /// comes last, behind everything and at 0; a fixed disk has no tables to wait for, and its
    /// old footer is wiped only then.
    pub fn flush_own(&mut self, file: FileNo, kind: Kind, phase: Phase) -> Own {
        let end = self.fixed_footer.unwrap_or(self.next);
        let fixed = kind == Kind::Fixed;
        let resized = |fixed_too: bool| self.new_footer.filter(|_| fixed == fixed_too);
        loop {
            let (due, write) = match self.stage {
                0 => (Phase::BEFORE, self.footer_dirty.then_some((end, self.footer))),
                1 => (Phase::TABLE, resized(true).map(|footer| (end, footer))),
                2 => (Phase::DIRECTORY, self.wipe.map(|old| (old, [0; FOOTER_BYTES]))),
                3 => (Phase::HEADER, resized(false).map(|footer| (end, footer))),
                4 => (Phase::HEADER, resized(false).map(|footer| (0, footer))),
                _ => return Own::Nothing,
            };
            if due > phase {
                return Own::Nothing;
            }
            self.stage += 1;
            if let Some((offset, bytes)) = write
                && due == phase
            {
                self.handing_out = bytes;
                return Own::Write { file, offset };
            }
        }
    }

    pub fn flushed(&mut self, ok: bool) {
        if ok {
            self.footer = *self.footer();
            self.new_footer = None;
            self.wipe = None;
            self.footer_dirty = false;
        }
        self.stage = 0;
    }
}

impl Vhd {
    /// Finds the end of all blocks of a file that cannot grow, going on where it stopped.
    pub(super) fn find_end(&mut self, ctx: &mut Ctx) -> Step<()> {
        let Some(mut writer) = self.writer.take() else { return Ok(()) };
        let result = self.scan_bat(ctx, &mut writer);
        self.writer = Some(writer);
        result
    }

    fn scan_bat(&self, ctx: &mut Ctx, writer: &mut Writer) -> Step<()> {
        if writer.scanned == 0 {
            // Among it the batmap and the locators, which may lie behind the BAT.
            let fixed = self.fixed_stretches(ctx)?;
            let end = fixed.iter().map(|&(_, end)| end).max().unwrap_or(0);
            writer.next = writer.next.max(end * SECTOR_BYTES);
        }
        while writer.scanned < self.entries as u64 {
            let entry = ctx.meta.get_u32_be(self.file, self.entry_offset(writer.scanned))?;
            if entry != BAT_UNUSED {
                let end = entry as u64 * SECTOR_BYTES + self.block_bytes();
                writer.next = writer.next.max(end);
            }
            writer.scanned += 1;
        }
        Ok(())
    }

    pub(super) fn prepare_range(
        &mut self,
        ctx: &mut Ctx,
        slot: u16,
        range: SectorRange,
    ) -> Step<WritePlan> {
        with_writer(self, Vhd::writer_slot, |layer, writer| layer.plan(ctx, writer, slot, range))
    }

    fn plan(
        &self,
        ctx: &mut Ctx,
        writer: &mut Writer,
        slot: u16,
        range: SectorRange,
    ) -> Step<WritePlan> {
        if self.kind == Kind::Fixed {
            let plan = Plan { effect: Effect::Nothing, block: 0, bitmap: 0, first: 0, count: 0 };
            writer.plans[slot as usize] = Some(plan);
            return Ok(self.write_plan(slot, range.count, range.start_bytes()));
        }
        if writer.recovered && ctx.meta.flushing() {
            // The end of that flush would take the footer for written.
            return Err(Stop::Busy);
        }
        writer.footer_dirty |= core::mem::take(&mut writer.recovered);
        let block = range.start / self.block_sectors;
        let first = range.start % self.block_sectors;
        let span = Span { block, first, count: range.count.min(self.block_sectors - first) };
        match self.block(ctx, block)? {
            Some(bitmap) => self.plan_old(ctx, writer, slot, span, bitmap),
            None => self.plan_new(ctx, writer, slot, span),
        }
    }

    /// A write into a block that has its place.
    fn plan_old(
        &self,
        ctx: &mut Ctx,
        writer: &mut Writer,
        slot: u16,
        span: Span,
        bitmap: u64,
    ) -> Step<WritePlan> {
        let Span { block, first, mut count } = span;
        let (present, run) = bit_run(ctx, self.file, bitmap, first, count)?;
        let (mut head, mut tail) = (first, span.end());
        let over = present && run == count;
        if !over {
            // As far as the bits lie in one cache block, in whole groups.
            let byte = bitmap + first / 8;
            count = count.min((BLOCK_BYTES - byte % BLOCK_BYTES) * 8 - first % 8);
            let around = self.group(Span { count, ..span });
            (head, tail) = (around.first, around.end());
            let end = first + count;
            if head < first
                && bit_run(ctx, self.file, bitmap, head, first - head)? == (true, first - head)
            {
                head = first;
            }
            if end < tail && bit_run(ctx, self.file, bitmap, end, tail - end)? == (true, tail - end)
            {
                tail = end;
            }
        }
        let whole = Span { block, first: head, count: tail - head };
        let data = bitmap + self.bitmap_bytes;
        if data + whole.end() * SECTOR_BYTES > ctx.files.size(self.file) {
            // It could be written, but what is missing of it could not be read.
            let field = "VHD block, cut off by the end of the file";
            return Err(ImageFault::corrupt(self.file, field, data, block).into());
        }
        writer.wait_for_others(whole)?;
        if !over {
            ctx.meta.pin(self.file, bitmap + first / 8)?;
        }
        let effect = if over { Effect::Nothing } else { Effect::Bits };
        writer.plans[slot as usize] =
            Some(Plan { effect, block, bitmap, first: head, count: tail - head });
        let mut plan = self.write_plan(slot, count, data + first * SECTOR_BYTES);
        self.copy_around(&mut plan, Span { count, ..span }, whole);
        Ok(plan)
    }

    /// The groups that a span touches, as far as the disk reaches.
    fn group(&self, span: Span) -> Span {
        let first = span.first - span.first % GROUP;
        let disk_end = self.sectors - span.block * self.block_sectors;
        let end = span.end().next_multiple_of(GROUP).min(self.block_sectors).min(disk_end);
        Span { first, count: end.max(span.end()) - first, ..span }
    }

    /// What lies in `whole` around `span` is copied from what the image reads now.
    fn copy_around(&self, plan: &mut WritePlan, span: Span, whole: Span) {
        let start = span.block * self.block_sectors;
        if whole.first < span.first {
            plan.head = Some(SectorRange::new(start + whole.first, span.first - whole.first));
        }
        if span.end() < whole.end() {
            plan.tail = Some(SectorRange::new(start + span.end(), whole.end() - span.end()));
        }
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

    /// Reserves a place for an absent block.
    fn plan_new(
        &self,
        ctx: &mut Ctx,
        writer: &mut Writer,
        slot: u16,
        span: Span,
    ) -> Step<WritePlan> {
        let Span { block, first, mut count } = span;
        if self.is_large() {
            count = count.min(BLOCK_BITS - first % BLOCK_BITS);
        }
        let span = Span { count, ..span };
        // A flush under way may be writing the footer where the block would go.
        if writer.plans.iter().flatten().any(|plan| plan.block == block) || ctx.meta.flushing() {
            return Err(Stop::Busy);
        }
        let spare = writer.spares.last().copied();
        let bitmap = spare.unwrap_or_else(|| self.place(writer.next));
        let end = bitmap + self.block_bytes();
        if bitmap / SECTOR_BYTES >= BAT_UNUSED as u64 {
            let fault = ImageFault::new(FaultKind::Full, self.file, "a VHD file's sectors");
            return Err(ImageFault { value: bitmap / SECTOR_BYTES, ..fault }.into());
        }
        if writer.fixed_footer.is_some_and(|footer| end > footer) {
            let fault = ImageFault::new(FaultKind::Full, self.file, "a VHD block's end");
            let limit = writer.fixed_footer.unwrap_or(0);
            return Err(ImageFault { value: end, limit, ..fault }.into());
        }
        self.pin_new(ctx, block, bitmap, first)?;
        match spare {
            Some(_) => {
                writer.spares.pop();
            }
            None => {
                writer.next = end;
                writer.footer_dirty |= writer.fixed_footer.is_none();
                ctx.files.grow(self.file, end);
            }
        }
        let data = bitmap + self.bitmap_bytes;
        let mut plan = self.write_plan(slot, count, data + first * SECTOR_BYTES);
        let mut whole = span;
        if self.is_large() {
            // Never fresh: an earlier footer lies in it.
            let (file, len) = (self.file, self.bitmap_bytes);
            let zero = Prelude::Zero { file, offset: bitmap, len };
            plan.preludes.push(zero).expect("room for three preludes");
        }
        if self.is_large() || self.kind == Kind::Differencing {
            whole = self.group(span);
        }
        if self.kind == Kind::Dynamic {
            let fresh = spare.is_none() && data >= writer.fresh_from;
            self.zero_around(&mut plan, data, fresh, span);
        } else {
            self.copy_around(&mut plan, span, whole);
        }
        let Span { first, count, .. } = whole;
        writer.plans[slot as usize] =
            Some(Plan { effect: Effect::Block, block, bitmap, first, count });
        Ok(plan)
    }

    /// Has a block's bitmap more than one cache block?
    fn is_large(&self) -> bool {
        self.bitmap_bytes > BITMAP_BYTES_MAX
    }

    /// Pins what the commit of a new block changes: its BAT entry, and its bitmap, or of a large
    /// one the cache block with the bits from `first` on, as zeros.
    fn pin_new(&self, ctx: &mut Ctx, block: u64, bitmap: u64, first: u64) -> Step<()> {
        let entry = self.entry_offset(block);
        if !self.is_large() {
            // It lies in one cache block, unless at a spare place of an odd alignment.
            return pin_all(ctx, self.file, [bitmap, bitmap + self.bitmap_bytes - 1, entry]);
        }
        ctx.meta.pin(self.file, entry)?;
        ctx.meta.forget(self.file, bitmap, self.bitmap_bytes);
        let bits = bitmap + first / BLOCK_BITS * BLOCK_BYTES;
        let made = ctx.meta.create_pinned(self.file, bits, Phase::BEFORE);
        if made.is_err() {
            ctx.meta.unpin(self.file, entry);
        }
        made
    }

    /// QEMU reads no bitmaps of a dynamic disk, so the rest of a new block must read as zeros,
    /// and its bits are set where that is cheap. Fresh space does; its last sector is written so
    /// that the file is as long as the block.
    fn zero_around(&self, plan: &mut WritePlan, data: u64, fresh: bool, span: Span) {
        let after = span.end();
        let end = self.block_sectors;
        let (head, tail) =
            if fresh { (0..0, after.max(end - 1)..end) } else { (0..span.first, after..end) };
        for zeros in [head, tail] {
            if !zeros.is_empty() {
                let offset = data + zeros.start * SECTOR_BYTES;
                let len = (zeros.end - zeros.start) * SECTOR_BYTES;
                let zero = Prelude::Zero { file: self.file, offset, len };
                plan.preludes.push(zero).expect("room for two preludes");
            }
        }
    }

    /// Where a block goes that may start at byte `from`: its data begins at a multiple of
    /// 4 KiB, as XenServer does it, for aligned I/O and so that no cache block holds data.
    pub(super) fn place(&self, from: u64) -> u64 {
        let from = from.next_multiple_of(SECTOR_BYTES);
        (from + self.bitmap_bytes).next_multiple_of(BLOCK_BYTES) - self.bitmap_bytes
    }

    pub(super) fn commit_plan(&mut self, ctx: &mut Ctx, slot: u16) {
        let file = self.file;
        let Plan { effect, block, bitmap, first, count } = self.take_plan(slot);
        match effect {
            Effect::Nothing => {}
            Effect::Bits => {
                set_bits(ctx, file, bitmap, first, count);
                ctx.meta.unpin(file, bitmap + first / 8);
            }
            Effect::Block => {
                let fills = self.kind == Kind::Dynamic && !self.is_large();
                self.fill_bitmap(ctx, bitmap);
                if !fills {
                    set_bits(ctx, file, bitmap, first, count);
                }
                let entry = ((bitmap / SECTOR_BYTES) as u32).to_be_bytes();
                ctx.meta.put(file, self.entry_offset(block), &entry, Phase::TABLE);
                self.unpin_new(ctx, block, bitmap, first);
            }
        }
    }

    pub(super) fn abandon_plan(&mut self, ctx: &mut Ctx, slot: u16) {
        let Plan { effect, block, bitmap, first, .. } = self.take_plan(slot);
        match effect {
            Effect::Nothing => {}
            Effect::Bits => ctx.meta.unpin(self.file, bitmap + first / 8),
            Effect::Block => {
                self.unpin_new(ctx, block, bitmap, first);
                if self.is_large() {
                    ctx.meta.forget(self.file, bitmap, self.bitmap_bytes);
                }
                let writer = self.writer.as_mut().expect("a plan has a writer");
                writer.spares.push(bitmap).expect("no more spares than plans in flight");
            }
        }
    }

    fn take_plan(&mut self, slot: u16) -> Plan {
        let writer = self.writer.as_mut().expect("a plan has a writer");
        writer.plans[slot as usize].take().expect("a plan in flight")
    }

    fn unpin_new(&self, ctx: &mut Ctx, block: u64, bitmap: u64, first: u64) {
        if self.is_large() {
            ctx.meta.unpin(self.file, bitmap + first / BLOCK_BITS * BLOCK_BYTES);
            return ctx.meta.unpin(self.file, self.entry_offset(block));
        }
        for offset in [bitmap, bitmap + self.bitmap_bytes - 1, self.entry_offset(block)] {
            ctx.meta.unpin(self.file, offset);
        }
    }

    /// A new block's whole bitmap: all set for a dynamic disk, clear for a differencing one. A
    /// large one is clear already.
    fn fill_bitmap(&self, ctx: &mut Ctx, bitmap: u64) {
        if self.is_large() {
            return;
        }
        let byte = if self.kind == Kind::Dynamic { 0xff } else { 0 };
        for unit in (0..self.bitmap_bytes).step_by(SECTOR_BYTES as usize) {
            let bytes = [byte; SECTOR_BYTES as usize];
            ctx.meta.put(self.file, bitmap + unit, &bytes, Phase::BEFORE);
        }
    }

    pub(super) fn discard_range(
        &mut self,
        ctx: &mut Ctx,
        range: SectorRange,
        zero: bool,
    ) -> Step<DiscardPlan> {
        if self.writer.is_none() {
            return Err(read_only(self.file, "the file is open read-only").into());
        }
        let (found, sectors) = self.map_range(ctx, range)?;
        use crate::format::Found;
        Ok(match found {
            // Nothing says "zeros" here but absence without a parent.
            Found::Absent if zero && self.kind == Kind::Differencing => {
                DiscardPlan { sectors: 0, punch: None }
            }
            Found::Data { file, offset } if !zero => {
                DiscardPlan { sectors, punch: Some((file, offset, sectors * SECTOR_BYTES)) }
            }
            Found::Data { .. } => DiscardPlan { sectors: 0, punch: None },
            _ => DiscardPlan { sectors, punch: None },
        })
    }
}

/// Pins all or none.
fn pin_all(ctx: &mut Ctx, file: FileNo, offsets: [u64; 3]) -> Step<()> {
    for (done, &offset) in offsets.iter().enumerate() {
        if let Err(stop) = ctx.meta.pin(file, offset) {
            offsets[..done].iter().for_each(|&pinned| ctx.meta.unpin(file, pinned));
            return Err(stop);
        }
    }
    Ok(())
}

/// Sets bits of a bitmap whose cache block is pinned.
fn set_bits(ctx: &mut Ctx, file: FileNo, bitmap: u64, first: u64, count: u64) {
    let end = first + count;
    for byte in first / 8..end.div_ceil(8) {
        let from = first.max(byte * 8) - byte * 8;
        let to = end.min(byte * 8 + 8) - byte * 8;
        let mask = (0xffu8 >> from) & ((0xff00u16 >> to) as u8);
        let old = ctx.meta.get_u8(file, bitmap + byte).expect("the bitmap is pinned");
        ctx.meta.put(file, bitmap + byte, &[old | mask], Phase::BEFORE);
    }
}
