//! Making a VHDX larger.
//!
//! Order guarded: the BAT entries of the new blocks are set, or a longer BAT is in place, before
//! the virtual disk size changes; all of it goes through the log. Entries beyond the disk mean
//! nothing, so a power cut in between leaves the old size.

use crate::fault::ImageFault;
use crate::format::{Ctx, read_only};
use crate::meta::{BLOCK_BYTES, Phase};
use crate::types::{ResizePlan, SECTOR_BYTES, Step};

use super::Vhdx;
use super::header::{DISK_BYTES_MAX, MIB};
use super::map::ENTRY_FULL;
use super::write::Writer;

impl Vhdx {
    pub(super) fn grow(&mut self, ctx: &mut Ctx, sectors: u64) -> Step<ResizePlan> {
        let Some(mut writer) = self.writer.take() else {
            return Err(read_only(self.file, "the file is open read-only").into());
        };
        let result = self.grow_with(ctx, &mut writer, sectors);
        self.writer = Some(writer);
        result
    }

    fn grow_with(&mut self, ctx: &mut Ctx, writer: &mut Writer, sectors: u64) -> Step<ResizePlan> {
        let size = sectors * SECTOR_BYTES;
        if size > DISK_BYTES_MAX {
            let field = "VHDX virtual disk size";
            return Err(ImageFault::limit(self.file, field, size, DISK_BYTES_MAX).into());
        }
        if !sectors.is_multiple_of(self.geometry.logical) {
            let field = "a VHDX size that is not whole logical sectors";
            return Err(ImageFault::unsupported(self.file, field, sectors).into());
        }
        let blocks = sectors.div_ceil(self.geometry.block_sectors);
        let last = if self.geometry.has_parent {
            self.bitmap_entry_at(blocks - 1)
        } else {
            self.entry_at(blocks - 1)
        };
        if last + 8 > self.bat.offset + self.bat.length {
            let field = "growing a VHDX beyond the blocks that its BAT has room for";
            return Err(ImageFault::unsupported(self.file, field, blocks).into());
        }
        let grow = self.set_entries(ctx, writer, blocks)?;
        writer.begin(ctx.meta, self.log, 2)?;
        let bytes = size.to_le_bytes();
        let here = (BLOCK_BYTES - self.size_at % BLOCK_BYTES).min(8) as usize;
        ctx.meta.reserve(self.file, self.size_at)?;
        if here < 8 {
            ctx.meta.reserve(self.file, self.size_at + here as u64)?;
            let rest = self.size_at + here as u64;
            ctx.meta.put(self.file, rest, &bytes[here..], Phase::TABLE);
        }
        ctx.meta.put(self.file, self.size_at, &bytes[..here], Phase::TABLE);
        self.geometry.sectors = sectors;
        Ok(ResizePlan { grow })
    }

    /// Sets the BAT entries of the blocks to come: not present, or, for a fixed disk, one behind
    /// the other at the end of the file. Called again it does the same again.
    fn set_entries(
        &self,
        ctx: &mut Ctx,
        writer: &mut Writer,
        blocks: u64,
    ) -> Step<Option<(crate::types::FileNo, u64)>> {
        let block_bytes = self.geometry.block_sectors * SECTOR_BYTES;
        let old = self.blocks();
        let start = writer.end().next_multiple_of(MIB);
        let ratio = self.geometry.chunk_ratio;
        for block in old..blocks {
            let entry = match self.geometry.leave_allocated {
                true => (start + (block - old) * block_bytes) | ENTRY_FULL,
                false => 0,
            };
            self.set_entry(ctx, writer, self.entry_at(block), entry)?;
            if block % ratio == ratio - 1 && (self.geometry.has_parent || block + 1 < blocks) {
                self.set_entry(ctx, writer, self.bitmap_entry_at(block), 0)?;
            }
        }
        if self.geometry.has_parent && old.div_ceil(ratio) < blocks.div_ceil(ratio) {
            self.set_entry(ctx, writer, self.bitmap_entry_at(blocks - 1), 0)?;
        }
        if !self.geometry.leave_allocated || blocks == old {
            return Ok(None);
        }
        let end = start + (blocks - old) * block_bytes;
        if !writer.can_grow() {
            let field = "growing a fixed VHDX in a store of fixed size";
            return Err(ImageFault::unsupported(self.file, field, end).into());
        }
        writer.reserve_until(end);
        ctx.files.grow(self.file, end);
        Ok(Some((self.file, end)))
    }

    fn set_entry(&self, ctx: &mut Ctx, writer: &mut Writer, at: u64, entry: u64) -> Step<()> {
        if self.entry(ctx, at)? != entry {
            writer.begin(ctx.meta, self.log, 1)?;
            ctx.meta.set(self.file, at, &entry.to_le_bytes(), Phase::TABLE)?;
        }
        Ok(())
    }
}
