//! Making a VHDX larger.
//!
//! Order guarded: the BAT entries of the new blocks are set, or a longer BAT is in place, before
//! the virtual disk size changes; all of it goes through the log. Entries beyond the disk mean
//! nothing, so a power cut in between leaves the old size.

use crate::fault::ImageFault;
use crate::format::{Ctx, with_writer};
use crate::meta::{BLOCK_BYTES, Phase};
use crate::types::{ResizePlan, SECTOR_BYTES, Step};

use super::Vhdx;
use super::create::regions;
use super::header::{DISK_BYTES_MAX, MIB, REGION_OFFSETS, TABLE_BYTES};
use super::load::Region;
use super::map::ENTRY_FULL;
use super::write::Writer;

/// A BAT that is being moved.
pub(super) struct Moving {
    to: Region,
    /// Bytes copied, and bytes of both region tables looked at.
    copied: u64,
    compared: u64,
}

impl Vhdx {
    pub(super) fn grow(&mut self, ctx: &mut Ctx, sectors: u64) -> Step<ResizePlan> {
        with_writer(self, Vhdx::writer_slot, |layer, writer| layer.grow_with(ctx, writer, sectors))
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
        let needed = last + 8 - self.bat.offset;
        if needed > self.bat.length {
            self.move_bat(ctx, writer, needed.next_multiple_of(MIB))?;
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
        writer.growing = None;
        if let Some(end) = grow {
            writer.reserve_until(end);
            ctx.files.grow(self.file, end);
        }
        Ok(ResizePlan { grow: grow.map(|end| (self.file, end)) })
    }

    /// Copies the BAT to a longer region behind everything, then lets both region tables name it.
    fn move_bat(&mut self, ctx: &mut Ctx, writer: &mut Writer, length: u64) -> Step<()> {
        if !writer.can_grow() {
            let field = "a longer BAT in a VHDX in a store of fixed size";
            return Err(ImageFault::unsupported(self.file, field, length).into());
        }
        if writer.moving.is_none() {
            let to = Region { offset: writer.end().next_multiple_of(MIB), length };
            // The last block first, so that the file is long enough from then on.
            writer.begin(ctx.meta, self.log, 1)?;
            ctx.meta.create(self.file, to.offset + length - BLOCK_BYTES, Phase::TABLE)?;
            writer.reserve_until(to.offset + length);
            ctx.files.grow(self.file, to.offset + length);
            writer.moving = Some(Moving { to, copied: 0, compared: 0 });
        }
        let mut moving = writer.moving.take().expect("just set");
        let to = moving.to;
        let metadata = (self.metadata.offset, self.metadata.length);
        let result = self.copy_bat(ctx, writer, &mut moving).and_then(|()| {
            let old = regions((self.bat.offset, self.bat.length), metadata);
            self.compare_tables(ctx, &mut moving, &old)
        });
        writer.moving = Some(moving);
        result?;
        writer.begin(ctx.meta, self.log, 2)?;
        let new = regions((to.offset, to.length), metadata);
        REGION_OFFSETS.iter().try_for_each(|&at| ctx.meta.reserve(self.file, at))?;
        for at in REGION_OFFSETS {
            ctx.meta.put(self.file, at, &new[..BLOCK_BYTES as usize], Phase::TABLE);
        }
        writer.moving = None;
        self.bat = to;
        Ok(())
    }

    /// The new region is behind the end of the file, so it is zeros but for what is copied.
    fn copy_bat(&self, ctx: &mut Ctx, writer: &mut Writer, moving: &mut Moving) -> Step<()> {
        while moving.copied < self.bat.length {
            let mut block = [0; BLOCK_BYTES as usize];
            ctx.meta.get(self.file, self.bat.offset + moving.copied, &mut block)?;
            if block.iter().any(|&b| b != 0) {
                writer.begin(ctx.meta, self.log, 1)?;
                let at = moving.to.offset + moving.copied;
                ctx.meta.create(self.file, at, Phase::TABLE)?;
                ctx.meta.put(self.file, at, &block, Phase::TABLE);
            }
            moving.copied += BLOCK_BYTES;
        }
        Ok(())
    }

    /// Are the region tables what this engine would write? One that holds more is left alone.
    fn compare_tables(&self, ctx: &mut Ctx, moving: &mut Moving, old: &[u8]) -> Step<()> {
        while moving.compared < 2 * TABLE_BYTES {
            let within = moving.compared % TABLE_BYTES;
            let table = REGION_OFFSETS[(moving.compared / TABLE_BYTES) as usize];
            let mut block = [0; BLOCK_BYTES as usize];
            ctx.meta.get(self.file, table + within, &mut block)?;
            let want = &old[within as usize..][..BLOCK_BYTES as usize];
            // The order of the two regions is free: the first block only has to hold as many.
            let alike = if within == 0 { block[8..16] == want[8..16] } else { block == want };
            if !alike {
                let field = "a longer BAT in a VHDX whose region table holds more than usual";
                return Err(ImageFault::unsupported(self.file, field, table + within).into());
            }
            moving.compared += BLOCK_BYTES;
        }
        Ok(())
    }

    /// Sets the BAT entries of the blocks to come: not present, or, for a fixed disk, one behind
    /// the other at the end of the file, whose new end is given. It goes on where it stopped.
    fn set_entries(&self, ctx: &mut Ctx, writer: &mut Writer, blocks: u64) -> Step<Option<u64>> {
        let block_bytes = self.geometry.block_sectors * SECTOR_BYTES;
        let old = self.blocks();
        let start = writer.end().next_multiple_of(MIB);
        let ratio = self.geometry.chunk_ratio;
        let mut block = match writer.growing {
            Some((target, next)) if target == blocks => next,
            _ => old,
        };
        while block < blocks {
            let entry = match self.geometry.leave_allocated {
                true => (start + (block - old) * block_bytes) | ENTRY_FULL,
                false => 0,
            };
            self.set_entry(ctx, writer, self.entry_at(block), entry)?;
            if block % ratio == ratio - 1 && (self.geometry.has_parent || block + 1 < blocks) {
                self.set_entry(ctx, writer, self.bitmap_entry_at(block), 0)?;
            }
            block += 1;
            writer.growing = Some((blocks, block));
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
        Ok(Some(end))
    }

    fn set_entry(&self, ctx: &mut Ctx, writer: &mut Writer, at: u64, entry: u64) -> Step<()> {
        if self.entry(ctx, at)? != entry {
            writer.begin(ctx.meta, self.log, 1)?;
            ctx.meta.set(self.file, at, &entry.to_le_bytes(), Phase::TABLE)?;
        }
        Ok(())
    }
}
