//! Making a VMDK larger: its only extent, or the last of several up to the split kinds' 2 GiB.
//!
//! Order guarded: a sparse extent's longer directories are written behind everything, with room
//! for all new grain tables (QEMU writes over the header where a directory entry is 0), then the
//! header that names them and the capacity, in one sector, then the extent's [line](super::line) in
//! the descriptor; a flat extent's file grows first.

use crate::append::{Shape, Space};
use crate::fault::{FaultKind, ImageFault};
use crate::format::Ctx;
use crate::meta::{BLOCK_BYTES, Phase};
use crate::types::{ResizePlan, SECTOR_BYTES, Step};

use super::Vmdk;
use super::create::{SPARSE_SECTORS_MAX, SPLIT_SECTORS};
use super::extent::Body;
use super::header;
use super::line::Text;
use super::sparse::Tables;

/// Longer directories that are being made.
#[derive(Clone, Copy)]
pub(super) struct Growth {
    /// New entries of each, and where they start; the redundant one is 0 for none.
    entries: u64,
    directories: [u64; 2],
    /// First byte of the new tables, and one past the last.
    tables: u64,
    end: u64,
    /// Bytes of each directory written.
    written: u64,
}

impl Growth {
    fn directory_bytes(entries: u64) -> u64 {
        (entries * 4).next_multiple_of(BLOCK_BYTES)
    }

    fn plan(tables: &Tables, space: &mut Space, entries: u64) -> Result<Growth, ImageFault> {
        let header = &tables.header;
        let copies = 1 + u64::from(header.redundant != 0);
        let fresh = (entries - header.directory_entries()) * tables.table_bytes() * copies;
        let directory = Growth::directory_bytes(entries);
        let len = directory * copies + fresh.next_multiple_of(BLOCK_BYTES);
        let start = space.take_fresh(len, BLOCK_BYTES.max(header.grain_bytes()))?;
        let redundant = if copies == 2 { start + directory } else { 0 };
        Ok(Growth {
            entries,
            directories: [start, redundant],
            tables: start + directory * copies,
            end: start + len,
            written: 0,
        })
    }

    /// Copies the old entries and adds the new ones, both copies.
    fn write(&mut self, ctx: &mut Ctx, tables: &Tables) -> Step<()> {
        let header = &tables.header;
        let old = header.directory_entries();
        let table_sectors = tables.table_bytes() / SECTOR_BYTES;
        let copies = 1 + u64::from(header.redundant != 0);
        while self.written < Growth::directory_bytes(self.entries) {
            let first = self.written / 4;
            for (copy, from) in (0..copies).zip([header.directory, header.redundant]) {
                let mut block = [0; BLOCK_BYTES as usize];
                let kept = old.saturating_sub(first).min(BLOCK_BYTES / 4) as usize * 4;
                ctx.read(tables.file, from + first * 4, &mut block[..kept])?;
                for (n, entry) in block.chunks_exact_mut(4).enumerate().skip(kept / 4) {
                    let n = first + n as u64;
                    if n < self.entries {
                        let table = (n - old) * copies + copy;
                        let sector = self.tables / SECTOR_BYTES + table * table_sectors;
                        entry.copy_from_slice(&(sector as u32).to_le_bytes());
                    }
                }
                let to = self.directories[copy as usize] + self.written;
                ctx.meta.create(tables.file, to, Phase::BEFORE)?;
                ctx.meta.put(tables.file, to, &block, Phase::BEFORE);
            }
            self.written += BLOCK_BYTES;
        }
        Ok(())
    }
}

impl Vmdk {
    pub(super) fn grow(&mut self, ctx: &mut Ctx, sectors: u64) -> Step<ResizePlan> {
        self.first_write(ctx)?;
        let file = self.file;
        let number = self.extents.len() - 1;
        let extent = &mut self.extents[number];
        extent.check_writable()?;
        let sectors = sectors - extent.start;
        if number > 0 && sectors > SPLIT_SECTORS.max(extent.sectors) {
            let what = "sectors of a split VMDK's last extent (it gets no new one: convert it)";
            return Err(ImageFault::limit(file, what, sectors, SPLIT_SECTORS).into());
        }
        let writing = self.writing.as_mut().expect("a writable layer");
        if writing.edit.is_some() {
            // The descriptor's last change is not written yet.
            return Err(crate::types::Stop::NeedFlush);
        }
        if let (None, Some(place), Some((_, cid))) = (&writing.text, self.text_at, self.cid) {
            let digits = &writing.digits[..cid.count];
            writing.text = Some(Text::read(ctx, file, place, (cid, digits))?);
        }
        let change = writing.text.as_ref().map(|text| text.plan(number, sectors)).transpose()?;
        let grow = match &mut extent.body {
            Body::Flat(offset) => {
                let end = *offset + sectors * SECTOR_BYTES;
                let info = ctx.files.info(extent.file);
                if !info.can_grow && end > info.size_bytes {
                    let fault = ImageFault::new(FaultKind::Full, extent.file, "a flat extent");
                    let (value, limit) = (end, info.size_bytes);
                    return Err(ImageFault { value, limit, ..fault }.into());
                }
                // The file may hold more than the extent: it is never cut.
                (end > info.size_bytes).then_some((extent.file, end))
            }
            Body::Sparse(tables, Some(space)) => {
                let growth = &mut writing.growth;
                grow_sparse(ctx, tables, space, growth, sectors)?.map(|end| (extent.file, end))
            }
            _ => return Err(ImageFault::unsupported(file, "growing such an extent", 0).into()),
        };
        if let Some((file, end)) = grow {
            ctx.files.grow(file, end);
        }
        extent.sectors = sectors;
        if let (Some(change), Some(text)) = (change, &mut writing.text) {
            writing.edit = Some(text.make(change));
            ctx.files.grow(file, text.end());
        }
        // Entries of new directories come after the header that names them.
        writing.first.ask();
        Ok(ResizePlan { grow })
    }
}

/// Gives the end of the file, if it has to grow.
fn grow_sparse(
    ctx: &mut Ctx,
    tables: &mut Tables,
    space: &mut Space,
    growth: &mut Option<Growth>,
    sectors: u64,
) -> Step<Option<u64>> {
    if sectors > SPARSE_SECTORS_MAX {
        let (file, what) = (tables.file, "sectors of a sparse VMDK extent");
        return Err(ImageFault::limit(file, what, sectors, SPARSE_SECTORS_MAX).into());
    }
    let header = &tables.header;
    let entries = sectors.div_ceil(header.table_entries * header.grain_sectors);
    let mut end = None;
    let mut directories = [header.directory, header.redundant];
    if entries > header.directory_entries() {
        if growth.is_none_or(|growth| growth.entries != entries) {
            *growth = Some(Growth::plan(tables, space, entries)?);
        }
        let growing = growth.as_mut().expect("just planned");
        growing.write(ctx, tables)?;
        (directories, end) = (growing.directories, Some(growing.end));
    }
    ctx.meta.reserve(tables.file, 0)?;
    let mut put = |at, value: u64| {
        ctx.meta.put(tables.file, at, &value.to_le_bytes(), Phase::DIRECTORY);
    };
    put(header::CAPACITY_AT, sectors);
    if end.is_some() {
        put(header::DIRECTORY_AT, directories[0] / SECTOR_BYTES);
        put(header::REDUNDANT_AT, directories[1] / SECTOR_BYTES);
    }
    *growth = None;
    let header = &mut tables.header;
    (header.sectors, header.directory, header.redundant) =
        (sectors, directories[0], directories[1]);
    Ok(end)
}
