//! Where the sectors of a VHDX lie: the BAT and the sector bitmaps ([MS-VHDX] 2.4, 2.5).
//!
//! It must never follow an entry into the headers, the log, the metadata or the BAT.

use crate::fault::ImageFault;
use crate::format::{Ctx, Found};
use crate::meta::BLOCK_BYTES;
use crate::types::{SECTOR_BYTES, SectorRange, Step};

use super::Vhdx;
use super::header::MIB;

/// Absent blocks taken together in one answer.
const ABSENT_BLOCKS_MAX: u64 = 512;

/// Bits of a sector bitmap in one cache block.
pub(super) const BLOCK_BITS: u64 = BLOCK_BYTES * 8;

/// State of a payload block ([MS-VHDX] 2.5.1.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum State {
    /// The parent's, zeros without one.
    NotPresent,
    /// Zeros: explicitly, or because nobody cares.
    Zero,
    /// All of it lies at this byte.
    Full(u64),
    /// Some of it lies at this byte, by the sector bitmap.
    Partial(u64),
}

/// BAT entries ([MS-VHDX] 2.5.1): state in the low three bits, MiB from bit 20 on.
pub(super) const ENTRY_ZERO: u64 = 2;
pub(super) const ENTRY_FULL: u64 = 6;
pub(super) const ENTRY_PARTIAL: u64 = 7;
/// A sector bitmap block that is there ([MS-VHDX] 2.5.1.2).
pub(super) const ENTRY_BITMAP: u64 = 6;
const STATE_MASK: u64 = 7;
const OFFSET_MASK: u64 = !(MIB - 1);
/// Largest place of a block: no file is longer than `i64::MAX`.
const OFFSET_MAX: u64 = 1 << 62;

impl Vhdx {
    /// Byte of the BAT entry of a payload block.
    pub(super) fn entry_at(&self, block: u64) -> u64 {
        self.bat.offset + (block + block / self.geometry.chunk_ratio) * 8
    }

    /// Byte of the BAT entry of the sector bitmap block for this payload block.
    pub(super) fn bitmap_entry_at(&self, block: u64) -> u64 {
        let ratio = self.geometry.chunk_ratio;
        let chunk = block / ratio;
        self.bat.offset + (chunk * (ratio + 1) + ratio) * 8
    }

    pub(super) fn entry(&self, ctx: &mut Ctx, at: u64) -> Step<u64> {
        let mut bytes = [0; 8];
        self.get(ctx, at, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    pub(super) fn state(&self, ctx: &mut Ctx, block: u64) -> Step<State> {
        let at = self.entry_at(block);
        let entry = self.entry(ctx, at)?;
        let offset = entry & OFFSET_MASK;
        let len = self.geometry.block_sectors * SECTOR_BYTES;
        let state = match entry & STATE_MASK {
            0 => return Ok(State::NotPresent),
            // 5 is what version 0.95 called UNMAPPED (QEMU takes it too).
            1 | 2 | 3 | 5 => return Ok(State::Zero),
            6 => State::Full(offset),
            7 if self.geometry.has_parent => State::Partial(offset),
            _ => {
                let field = "VHDX BAT entry's state";
                return Err(ImageFault::corrupt(self.file, field, at, entry).into());
            }
        };
        self.check_place(at, entry, offset, len)?;
        Ok(state)
    }

    fn check_place(&self, at: u64, entry: u64, offset: u64, len: u64) -> Result<(), ImageFault> {
        if offset > OFFSET_MAX {
            let field = "VHDX BAT entry, beyond the end of any file";
            return Err(ImageFault::corrupt(self.file, field, at, entry));
        }
        if self.in_metadata(offset, len) {
            let field = "VHDX BAT entry, into the metadata";
            return Err(ImageFault::corrupt(self.file, field, at, entry));
        }
        Ok(())
    }

    pub(super) fn in_metadata(&self, offset: u64, len: u64) -> bool {
        let known = [self.log, self.bat, self.metadata];
        let mut regions = known.iter().chain(&self.others);
        offset < MIB || regions.any(|region| region.touches(offset, len))
    }

    /// Byte of the sector bitmap block for this payload block, `None` if it is not there.
    pub(super) fn bitmap_block(&self, ctx: &mut Ctx, block: u64) -> Step<Option<u64>> {
        let at = self.bitmap_entry_at(block);
        let entry = self.entry(ctx, at)?;
        if entry & STATE_MASK != ENTRY_BITMAP {
            return Ok(None);
        }
        let offset = entry & OFFSET_MASK;
        self.check_place(at, entry, offset, MIB)?;
        if offset + MIB > ctx.files.size(self.file) {
            let field = "VHDX sector bitmap, beyond the end of the file";
            return Err(ImageFault::corrupt(self.file, field, at, entry).into());
        }
        Ok(Some(offset))
    }

    /// Bits of a bitmap block before those of this payload block.
    pub(super) fn first_bit(&self, block: u64) -> u64 {
        let ratio = self.geometry.chunk_ratio;
        block % ratio * (self.geometry.block_sectors / self.geometry.logical)
    }

    pub(super) fn map_range(&self, ctx: &mut Ctx, range: SectorRange) -> Step<(Found, u64)> {
        let per_block = self.geometry.block_sectors;
        let block = range.start / per_block;
        let within = range.start % per_block;
        let count = range.count.min(per_block - within);
        match self.state(ctx, block)? {
            State::Full(offset) => self.data(ctx, block, offset, within, count),
            State::Partial(offset) => {
                let Some(bitmap) = self.bitmap_block(ctx, block)? else {
                    let field = "VHDX block, partially present without a sector bitmap";
                    let at = self.entry_at(block);
                    return Err(ImageFault::corrupt(self.file, field, at, block).into());
                };
                let (present, run) = self.presence(ctx, bitmap, block, within, count)?;
                match present {
                    true => self.data(ctx, block, offset, within, run),
                    false => Ok((Found::Absent, run)),
                }
            }
            absent => self.absent(ctx, range, block, count, absent),
        }
    }

    fn data(
        &self,
        ctx: &Ctx,
        block: u64,
        offset: u64,
        within: u64,
        count: u64,
    ) -> Step<(Found, u64)> {
        let data = offset + within * SECTOR_BYTES;
        let held = ctx.files.size(self.file).saturating_sub(data) / SECTOR_BYTES;
        if held == 0 {
            let field = "VHDX block, cut off by the end of the file";
            return Err(ImageFault::corrupt(self.file, field, data, block).into());
        }
        let sectors = count.min(held);
        if self.overlay.as_ref().is_some_and(|o| o.touches(data, sectors * SECTOR_BYTES)) {
            let field = "a VHDX log that changes data, read-only: open the file for writing once";
            return Err(ImageFault::unsupported(self.file, field, data).into());
        }
        Ok((Found::Data { file: self.file, offset: data }, sectors))
    }

    /// A block that is nowhere in the file, and those behind it in the same state.
    fn absent(
        &self,
        ctx: &mut Ctx,
        range: SectorRange,
        block: u64,
        mut sectors: u64,
        state: State,
    ) -> Step<(Found, u64)> {
        let mut next = block + 1;
        while sectors < range.count
            && next - block < ABSENT_BLOCKS_MAX
            && self.entry_at(next) / BLOCK_BYTES == self.entry_at(block) / BLOCK_BYTES
            && self.state(ctx, next)? == state
        {
            sectors = range.count.min(sectors + self.geometry.block_sectors);
            next += 1;
        }
        let absent = state == State::NotPresent && self.geometry.has_parent;
        Ok((if absent { Found::Absent } else { Found::Zero }, sectors))
    }

    /// Is guest sector `within` of a partially present block in this file, and how many of up
    /// to `count` from there on are like it.
    pub(super) fn presence(
        &self,
        ctx: &mut Ctx,
        bitmap: u64,
        block: u64,
        within: u64,
        count: u64,
    ) -> Step<(bool, u64)> {
        let logical = self.geometry.logical;
        let first = self.first_bit(block) + within / logical;
        let end = self.first_bit(block) + (within + count).div_ceil(logical);
        let (bit, run) = self.bit_run(ctx, bitmap, first, end - first)?;
        Ok((bit, count.min(run * logical - within % logical)))
    }

    /// The first of `count` bits from bit `first` of a bitmap, and how many are like it. The
    /// least significant bit of a byte comes first ([MS-VHDX] 2.4).
    fn bit_run(&self, ctx: &mut Ctx, bitmap: u64, first: u64, count: u64) -> Step<(bool, u64)> {
        const UNIT_BITS: u64 = SECTOR_BYTES * 8;
        let mut unit = [0; SECTOR_BYTES as usize];
        // One cache block of bits at most: a longer run is answered in pieces.
        let end = (first + count).min((first / BLOCK_BITS + 1) * BLOCK_BITS);
        let mut at = first;
        let mut want = None;
        while at < end {
            self.get(ctx, bitmap + at / UNIT_BITS * SECTOR_BYTES, &mut unit)?;
            let unit_end = end.min((at / UNIT_BITS + 1) * UNIT_BITS);
            while at < unit_end {
                let byte = unit[(at % UNIT_BITS / 8) as usize];
                let bit = (byte >> (at % 8)) & 1 != 0;
                if *want.get_or_insert(bit) != bit {
                    return Ok((!bit, at - first));
                }
                let whole = at.is_multiple_of(8) && unit_end - at >= 8;
                let alike = byte == if bit { 0xff } else { 0 };
                at += if whole && alike { 8 } else { 1 };
            }
        }
        Ok((want.expect("count is not 0"), end - first))
    }
}
