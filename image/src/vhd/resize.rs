//! Making a VHD larger.
//!
//! Order guarded: a longer BAT is written behind everything first, then the header that names
//! it, then the footers that give the new size; each is durable before the next, so that a
//! power cut leaves the old size or the new one. The header's change and each footer lie in one
//! sector. A fixed disk's new footer comes before the old one is wiped from what has become the
//! guest's: a power cut between the two leaves the old footer in the first new sector, which
//! nobody has written. The old BAT stays as a gap.

use crate::fault::ImageFault;
use crate::format::{Ctx, with_writer};
use crate::meta::{BLOCK_BYTES, Phase};
use crate::types::{ResizePlan, SECTOR_BYTES, Step};

use super::Vhd;
use super::header::{self, FOOTER_BYTES, GEOMETRY_MAX, Geometry, HEADER_BYTES, Kind, SECTORS_MAX};
use super::write::Writer;

/// A BAT that is being copied to a longer one.
pub(super) struct Moving {
    table_offset: u64,
    entries: u32,
    /// Entries copied.
    done: u64,
}

impl Vhd {
    pub(super) fn grow(&mut self, ctx: &mut Ctx, sectors: u64) -> Step<ResizePlan> {
        if sectors > SECTORS_MAX {
            return Err(
                ImageFault::limit(self.file, "VHD size in sectors", sectors, SECTORS_MAX).into()
            );
        }
        with_writer(self, Vhd::writer_slot, |layer, writer| layer.grow_with(ctx, writer, sectors))?;
        Ok(ResizePlan { grow: None })
    }

    fn grow_with(&mut self, ctx: &mut Ctx, writer: &mut Writer, sectors: u64) -> Step<()> {
        let needed = sectors.div_ceil(self.block_sectors);
        if self.kind == Kind::Fixed {
            if !writer.can_grow() {
                let field = "growing a fixed VHD in a store of fixed size";
                return Err(ImageFault::unsupported(self.file, field, sectors).into());
            }
            writer.move_fixed_footer(sectors * SECTOR_BYTES);
        } else if needed > self.entries as u64 {
            self.move_table(ctx, writer, needed)?;
        }
        let mut footer = *writer.footer();
        let size = sectors * SECTOR_BYTES;
        let geometry = geometry_for(&footer, sectors);
        header::set_size(&mut footer, size, geometry);
        writer.replace_footer(footer);
        self.sectors = sectors;
        Ok(())
    }

    /// Copies the BAT behind everything, then lets the header name the copy.
    fn move_table(&mut self, ctx: &mut Ctx, writer: &mut Writer, needed: u64) -> Step<()> {
        if !writer.can_grow() {
            let field = "a longer BAT in a VHD in a store of fixed size";
            return Err(ImageFault::unsupported(self.file, field, needed).into());
        }
        let batmap = header::has_batmap(writer.footer());
        if writer.moving.is_none() {
            let table_offset = writer.next().next_multiple_of(BLOCK_BYTES);
            let mut end = table_offset + (needed * 4).next_multiple_of(SECTOR_BYTES);
            if batmap {
                end += SECTOR_BYTES + needed.div_ceil(8).next_multiple_of(SECTOR_BYTES);
            }
            // The table is written in whole blocks of the cache, and the footer ends the file.
            let end = end.next_multiple_of(BLOCK_BYTES);
            writer.reserve_until(end);
            ctx.files.grow(self.file, end);
            writer.moving = Some(Moving { table_offset, entries: needed as u32, done: 0 });
        }
        let mut moving = writer.moving.take().expect("just set");
        let result = self.copy_table(ctx, &mut moving, batmap);
        let (table_offset, entries) = (moving.table_offset, moving.entries);
        writer.moving = Some(moving);
        result?;
        let mut bytes = [0; HEADER_BYTES];
        ctx.read(self.file, self.header_offset, &mut bytes)?;
        ctx.meta.reserve(self.file, self.header_offset)?;
        header::set_table(&mut bytes, table_offset, entries);
        let first = &bytes[..SECTOR_BYTES as usize];
        ctx.meta.put(self.file, self.header_offset, first, Phase::DIRECTORY);
        writer.moving = None;
        (self.table_offset, self.entries) = (table_offset, entries);
        Ok(())
    }

    fn copy_table(&self, ctx: &mut Ctx, moving: &mut Moving, batmap: bool) -> Step<()> {
        const PER_BLOCK: u64 = BLOCK_BYTES / 4;
        let padded = (moving.entries as u64 * 4).next_multiple_of(SECTOR_BYTES);
        while moving.done < padded / 4 {
            let mut block = [0xff; BLOCK_BYTES as usize];
            let old = (self.entries as u64).saturating_sub(moving.done).min(PER_BLOCK);
            let from = self.table_offset + moving.done * 4;
            if old > 0 {
                ctx.read(self.file, from, &mut block[..old as usize * 4])?;
            }
            let to = moving.table_offset + moving.done * 4;
            ctx.meta.create(self.file, to, Phase::BEFORE)?;
            let len = (padded - moving.done * 4).min(BLOCK_BYTES) as usize;
            ctx.meta.put(self.file, to, &block[..len], Phase::BEFORE);
            moving.done += PER_BLOCK;
        }
        if batmap {
            let at = moving.table_offset + padded;
            ctx.meta.reserve(self.file, at)?;
            let header = header::empty_batmap(at + SECTOR_BYTES, moving.entries);
            ctx.meta.put(self.file, at, &header, Phase::BEFORE);
        }
        Ok(())
    }
}

/// The geometry, or the largest one where a reader that goes by it would see another size.
fn geometry_for(footer: &[u8; FOOTER_BYTES], sectors: u64) -> Geometry {
    let geometry = Geometry::of(sectors);
    let by_geometry = header::creator_uses_geometry(footer);
    if by_geometry && geometry.sectors() != sectors { GEOMETRY_MAX } else { geometry }
}
