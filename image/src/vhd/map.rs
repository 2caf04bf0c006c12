//! Where the sectors of a dynamic or differencing VHD lie: the BAT and the sector bitmaps.
//!
//! It must never follow a BAT entry into the metadata or beyond the end of the file.

use crate::fault::ImageFault;
use crate::format::{Ctx, Found};
use crate::types::{FileNo, SECTOR_BYTES, SectorRange, Step};

use super::Vhd;
use super::header::{BAT_UNUSED, FOOTER_BYTES, HEADER_BYTES, Kind};

/// Absent blocks taken together in one answer: BAT entries of one cache block at most.
const ABSENT_BLOCKS_MAX: u64 = 512;

impl Vhd {
    /// Byte of the BAT entry of a block.
    pub(super) fn entry_offset(&self, block: u64) -> u64 {
        assert!(block < self.entries as u64, "the BAT covers the disk: checked at open");
        self.table_offset + block * 4
    }

    /// Byte of the block's bitmap, its data right behind; `None` for an absent block.
    pub(super) fn block(&self, ctx: &mut Ctx, block: u64) -> Step<Option<u64>> {
        let entry_offset = self.entry_offset(block);
        let entry = ctx.meta.get_u32_be(self.file, entry_offset)?;
        if entry == BAT_UNUSED {
            return Ok(None);
        }
        let offset = entry as u64 * SECTOR_BYTES;
        if self.overlaps_metadata(offset) {
            let field = "VHD BAT entry, into the metadata";
            return Err(ImageFault::corrupt(self.file, field, entry_offset, entry as u64).into());
        }
        if offset + self.bitmap_bytes > ctx.files.size(self.file) {
            let field = "VHD BAT entry, beyond the end of the file";
            return Err(ImageFault::corrupt(self.file, field, entry_offset, entry as u64).into());
        }
        Ok(Some(offset))
    }

    /// Bytes of a block with its bitmap.
    pub(super) fn block_bytes(&self) -> u64 {
        self.bitmap_bytes + self.block_sectors * SECTOR_BYTES
    }

    /// Does a block at this byte touch the footer's copy, the header or the BAT?
    pub(super) fn overlaps_metadata(&self, offset: u64) -> bool {
        let end = offset + self.block_bytes();
        let touches = |start: u64, len: u64| offset < start + len && start < end;
        touches(0, FOOTER_BYTES as u64)
            || touches(self.header_offset, HEADER_BYTES as u64)
            || touches(self.table_offset, self.entries as u64 * 4)
    }

    pub(super) fn map_range(&self, ctx: &mut Ctx, range: SectorRange) -> Step<(Found, u64)> {
        if self.kind == Kind::Fixed {
            let found = Found::Data { file: self.file, offset: range.start_bytes() };
            return Ok((found, range.count));
        }
        let block = range.start / self.block_sectors;
        let within = range.start % self.block_sectors;
        let count = range.count.min(self.block_sectors - within);
        let Some(offset) = self.block(ctx, block)? else {
            return self.absent(ctx, range, block, count);
        };
        let (present, sectors) = bit_run(ctx, self.file, offset, within, count)?;
        if !present {
            return Ok((Found::Absent, sectors));
        }
        let data = offset + self.bitmap_bytes + within * SECTOR_BYTES;
        let held = ctx.files.size(self.file).saturating_sub(data) / SECTOR_BYTES;
        if held == 0 {
            let field = "VHD block, cut off by the end of the file";
            return Err(ImageFault::corrupt(self.file, field, data, block).into());
        }
        Ok((Found::Data { file: self.file, offset: data }, sectors.min(held)))
    }

    /// An absent block and those behind it.
    fn absent(
        &self,
        ctx: &mut Ctx,
        range: SectorRange,
        block: u64,
        mut sectors: u64,
    ) -> Step<(Found, u64)> {
        let mut next = block + 1;
        while sectors < range.count
            && next - block < ABSENT_BLOCKS_MAX
            && !self.entry_offset(next).is_multiple_of(crate::meta::BLOCK_BYTES)
            && ctx.meta.get_u32_be(self.file, self.entry_offset(next))? == BAT_UNUSED
        {
            sectors = range.count.min(sectors + self.block_sectors);
            next += 1;
        }
        Ok((Found::Absent, sectors))
    }
}

/// The first of up to `count` bits from bit `first` of a bitmap, and how many are like it. The
/// most significant bit of a byte comes first ("Data Block", and XenServer since version 1.1).
pub(super) fn bit_run(
    ctx: &mut Ctx,
    file: FileNo,
    bitmap: u64,
    first: u64,
    count: u64,
) -> Step<(bool, u64)> {
    const UNIT_BITS: u64 = SECTOR_BYTES * 8;
    let mut unit = [0; SECTOR_BYTES as usize];
    let end = first + count;
    let mut at = first;
    let mut want = None;
    while at < end {
        ctx.meta.get(file, bitmap + at / UNIT_BITS * SECTOR_BYTES, &mut unit)?;
        let unit_end = end.min((at / UNIT_BITS + 1) * UNIT_BITS);
        while at < unit_end {
            let byte = unit[(at % UNIT_BITS / 8) as usize];
            let bit = (byte << (at % 8)) & 0x80 != 0;
            if *want.get_or_insert(bit) != bit {
                return Ok((!bit, at - first));
            }
            let whole = at.is_multiple_of(8) && unit_end - at >= 8;
            let alike = byte == if bit { 0xff } else { 0 };
            at += if whole && alike { 8 } else { 1 };
        }
    }
    Ok((want.expect("count is not 0"), count))
}
