//! Making a VDI larger: within the room that stands between map and data, or, beyond it, with a
//! longer map where the first blocks were (VirtualBox moves these blocks to the end as well).
//!
//! Order guarded: the map first gets all entries that it has room for, and the number of blocks
//! says so. A block that must go is copied behind all others, with the count that covers it; both
//! are durable before its entry names the copy, and all entries are before anything is written
//! where the blocks were. The new map stands there, durable, before the header names it, with the
//! start of the data, the number of blocks and the size, all in one sector. A power cut leaves the
//! old disk or the new one. No entry of the new map is written before the header is durable. It
//! must never write into the old map anything but the new places of moved blocks.
//!
//! When every block that the old map has room for is in use, moved blocks lie behind all that the
//! header admits: QEMU reads them, but its check calls them too large, and VirtualBox refuses the
//! image, until it is grown again. No order avoids that. The new map must lie before the data
//! (VirtualBox: offData), so where blocks are that the old map names; these must be named
//! elsewhere first, by the old map, whose indices are all in use, or by a copy of it, for which
//! there is as little room; and a new offData under the old map names other bytes for every block
//! at once, so all of them would have to be copied, below 4 GiB (offData has 32 bits).

use crate::append::{Space, Use};
use crate::fault::ImageFault;
use crate::format::Ctx;
use crate::meta::{BLOCK_BYTES, Phase};
use crate::types::{ResizePlan, SECTOR_BYTES, Step, Stop};

use super::header::{BLOCKS_MAX, Kind, at};
use super::{BlockMap, FREE, Vdi, Writing, ZERO};

/// A longer map that is being made where the first blocks are.
pub(super) struct Moving {
    /// Blocks of the new disk.
    blocks: u64,
    /// The first blocks of the data, which go.
    count: u64,
    map_offset: u64,
    /// Entries looked at, and the copy of the block that the next one names: where, and how far.
    entry: u64,
    copy: Option<(u64, u64)>,
    /// Blocks' old places are free, durably, and forgotten by the cache.
    is_cleared: bool,
    /// Bytes of the new map written.
    written: u64,
}

impl Moving {
    fn plan(map: &BlockMap, blocks: u64) -> Result<Moving, ImageFault> {
        let header = &map.header;
        let map_offset = header.data_offset.next_multiple_of(BLOCK_BYTES);
        let end = map_offset + (blocks * 4).next_multiple_of(BLOCK_BYTES);
        let count = (end - header.data_offset).div_ceil(header.block_bytes);
        let data_offset = header.data_offset + count * header.block_bytes;
        if data_offset > u32::MAX.into() {
            let (field, limit) = ("offData of a VDI with a longer map", u32::MAX.into());
            return Err(ImageFault::limit(map.file, field, data_offset, limit));
        }
        Ok(Moving {
            blocks,
            count,
            map_offset,
            entry: 0,
            copy: None,
            is_cleared: false,
            written: 0,
        })
    }

    /// Moves the blocks that are in the way, entry by entry.
    fn clear(&mut self, ctx: &mut Ctx, map: &mut BlockMap, space: &mut Space) -> Step<()> {
        let (file, block_bytes) = (map.file, map.header.block_bytes);
        while self.entry < map.header.blocks.into() {
            let at = map.entry_at(self.entry);
            let value = u64::from(ctx.meta.get_u32_le(file, at)?);
            if value < self.count {
                let from = map.header.data_offset + value * block_bytes;
                self.copy_block(ctx, map, space, from)?;
                let (to, _) = self.copy.expect("a block was copied");
                ctx.meta.reserve(file, at)?;
                ctx.meta.reserve(file, 0)?;
                let place = ((to - map.header.data_offset) / block_bytes) as u32;
                map.header.allocated = map.header.allocated.max(place + 1);
                let allocated = map.header.allocated.to_le_bytes();
                ctx.meta.put(file, super::at::ALLOCATED, &allocated, Phase::BEFORE);
                ctx.meta.put(file, at, &place.to_le_bytes(), Phase::TABLE);
                self.copy = None;
            }
            self.entry += 1;
        }
        Ok(())
    }

    /// Copies a block through the cache, which the caller flushes as it fills.
    fn copy_block(
        &mut self,
        ctx: &mut Ctx,
        map: &BlockMap,
        space: &mut Space,
        from: u64,
    ) -> Step<()> {
        let (file, block_bytes) = (map.file, map.header.block_bytes);
        if self.copy.is_none() {
            ctx.meta.read_again(file, from, block_bytes)?;
            let to = space.take(Use::Clusters, block_bytes, block_bytes)?;
            space.used();
            ctx.files.grow(file, to + block_bytes);
            self.copy = Some((to, 0));
        }
        let (to, done) = self.copy.as_mut().expect("just set");
        while *done < block_bytes {
            let (from, to) = (from + *done, *to + *done);
            let room = |at: u64| BLOCK_BYTES - at % BLOCK_BYTES;
            let len = room(from).min(room(to)).min(block_bytes - *done) as usize;
            let mut bytes = [0; BLOCK_BYTES as usize];
            ctx.read(file, from, &mut bytes[..len])?;
            ctx.meta.set(file, to, &bytes[..len], Phase::BEFORE)?;
            *done += len as u64;
        }
        Ok(())
    }

    /// Writes the longer map, its entries counted from where the data will start.
    fn write(&mut self, ctx: &mut Ctx, map: &BlockMap) -> Step<()> {
        let old = u64::from(map.header.blocks);
        while self.written < (self.blocks * 4).next_multiple_of(BLOCK_BYTES) {
            let first = self.written / 4;
            let mut block = [0; BLOCK_BYTES as usize];
            for (entry, bytes) in (first..).zip(block.chunks_exact_mut(4)) {
                let value = match entry < old {
                    true => ctx.meta.get_u32_le(map.file, map.entry_at(entry))?,
                    false => FREE,
                };
                let moved = if value < ZERO { value - self.count as u32 } else { value };
                bytes.copy_from_slice(&moved.to_le_bytes());
            }
            let to = self.map_offset + self.written;
            ctx.meta.create(map.file, to, Phase::BEFORE)?;
            ctx.meta.put(map.file, to, &block, Phase::BEFORE);
            self.written += BLOCK_BYTES;
        }
        Ok(())
    }
}

impl Vdi {
    pub(super) fn grow(&mut self, ctx: &mut Ctx, sectors: u64) -> Step<ResizePlan> {
        let (map, writing) = self.first_write(ctx)?;
        let file = map.file;
        if map.header.kind == Kind::Static {
            return Err(ImageFault::unsupported(file, "growing a static VDI", sectors).into());
        }
        let blocks = sectors.div_ceil(map.header.block_bytes / SECTOR_BYTES);
        if blocks > BLOCKS_MAX.into() {
            let limit = BLOCKS_MAX.into();
            return Err(ImageFault::limit(file, "blocks of a VDI", blocks, limit).into());
        }
        let blocks = blocks.max(map.header.blocks.into());
        let room = map.entries_max().min(BLOCKS_MAX.into());
        if blocks > room {
            if u64::from(map.header.blocks) < room {
                set_size(ctx, map, writing, room, map.header.disk_bytes / SECTOR_BYTES)?;
                return Err(Stop::NeedFlush);
            }
            move_map(ctx, map, writing, blocks)?;
        }
        set_size(ctx, map, writing, blocks, sectors)?;
        Ok(ResizePlan { grow: None })
    }
}

/// Makes new entries of the map free and changes the header: the new map if there is one, and the
/// size.
fn set_size(
    ctx: &mut Ctx,
    map: &mut BlockMap,
    writing: &mut Writing,
    blocks: u64,
    sectors: u64,
) -> Step<()> {
    let file = map.file;
    writing.free_to = writing.free_to.max(map.header.blocks.into());
    while writing.free_to < blocks {
        let at = map.entry_at(writing.free_to);
        ctx.meta.set(file, at, &FREE.to_le_bytes(), Phase::TABLE)?;
        writing.free_to += 1;
    }
    ctx.meta.reserve(file, 0)?;
    if ctx.meta.is_dirty_at(file, at::ALLOCATED) {
        // A block's count stands in this sector, and must not wait for the size: it comes before
        // the block's entry, the size after all entries.
        return Err(Stop::NeedFlush);
    }
    let header = &mut map.header;
    if let Some(moving) = writing.moving.take() {
        header.map_offset = moving.map_offset;
        header.data_offset += moving.count * header.block_bytes;
        header.allocated = header.allocated.saturating_sub(moving.count as u32);
    }
    header.blocks = blocks as u32;
    header.disk_bytes = sectors * SECTOR_BYTES;
    let reach = header.data_offset + blocks * header.block_bytes;
    let space = writing.space.as_mut().expect("the map is scanned");
    space.rebase(header.data_offset);
    space.reach(ctx.files.info(file), reach);
    for (at, value) in [
        (at::MAP, header.map_offset as u32),
        (at::DATA, header.data_offset as u32),
        (at::BLOCKS, header.blocks),
        (at::ALLOCATED, header.allocated),
    ] {
        ctx.meta.put(file, at, &value.to_le_bytes(), Phase::HEADER);
    }
    let bytes = header.disk_bytes.to_le_bytes();
    ctx.meta.put(file, at::DISK_BYTES, &bytes, Phase::HEADER);
    // A new block's count stands in the same sector and comes before its entry.
    writing.first.ask();
    Ok(())
}

/// Makes the longer map; the header is left to the caller.
fn move_map(ctx: &mut Ctx, map: &mut BlockMap, writing: &mut Writing, blocks: u64) -> Step<()> {
    let space = writing.space.as_mut().expect("the map is scanned");
    if writing.moving.as_ref().is_none_or(|moving| moving.blocks != blocks) {
        writing.moving = Some(Moving::plan(map, blocks)?);
        let header = &map.header;
        let moved = writing.moving.as_ref().expect("just set").count;
        let reach = header.data_offset + (blocks + moved) * header.block_bytes;
        space.reach(ctx.files.info(map.file), reach);
        space.start_at(header.data_offset + moved * header.block_bytes);
    }
    let moving = writing.moving.as_mut().expect("just set");
    moving.clear(ctx, map, space)?;
    if !moving.is_cleared {
        if ctx.meta.is_dirty() {
            return Err(Stop::NeedFlush);
        }
        let len = moving.count * map.header.block_bytes;
        ctx.meta.read_again(map.file, map.header.data_offset, len)?;
        moving.is_cleared = true;
    }
    moving.write(ctx, map)?;
    writing.free_to = blocks;
    Ok(())
}
