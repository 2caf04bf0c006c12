//! Making a VMDK larger: one sparse or flat extent.
//!
//! Order guarded: a sparse extent's longer directories are written behind everything, with room
//! for all new grain tables (QEMU writes over the header where a directory entry is 0), then the
//! header that names them and the capacity, in one sector, then the extent's line in the
//! descriptor; a flat extent's file grows first. The line is changed within one sector: digits
//! that are more than before are taken from a comment before it, so that nothing else moves.

use alloc::vec;
use alloc::vec::Vec;

use crate::append::{Shape, Space};
use crate::fault::{FaultKind, ImageFault};
use crate::format::Ctx;
use crate::meta::{BLOCK_BYTES, Phase};
use crate::types::{FileNo, ResizePlan, SECTOR_BYTES, Step};

use super::create::SPARSE_SECTORS_MAX;
use super::extent::Body;
use super::header;
use super::sparse::Tables;
use super::{Vmdk, descriptor_text};

/// A change of the descriptor, to be written by the next flush.
pub(super) struct Edit {
    pub at: u64,
    pub bytes: heapless::Vec<u8, { SECTOR_BYTES as usize }>,
    pub is_sent: bool,
}

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
        let [extent] = &mut self.extents[..] else {
            let what = "growing a VMDK of several extents: convert it";
            return Err(ImageFault::unsupported(file, what, self.extents.len() as u64).into());
        };
        extent.check_writable()?;
        let writing = self.writing.as_mut().expect("a writable layer");
        if writing.edit.is_some() {
            // The descriptor's last change is not written yet.
            return Err(crate::types::Stop::NeedFlush);
        }
        let edit = match descriptor_text(ctx, file, self.text_at, &mut writing.text)? {
            Some((at, text)) => Some(line_edit(file, at, text, sectors)?),
            None => None,
        };
        let grow = match &mut extent.body {
            Body::Flat(offset) => {
                let end = *offset + sectors * SECTOR_BYTES;
                let info = ctx.files.info(extent.file);
                if !info.can_grow && end > info.size_bytes {
                    let fault = ImageFault::new(FaultKind::Full, extent.file, "a flat extent");
                    let (value, limit) = (end, info.size_bytes);
                    return Err(ImageFault { value, limit, ..fault }.into());
                }
                Some((extent.file, end))
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
        if let (Some((start, edit)), Some(text)) = (edit, &mut writing.text) {
            text[start..start + edit.bytes.len()].copy_from_slice(&edit.bytes);
            writing.edit = Some(edit);
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

/// The change of the only extent's line to another size: where in the text, and what to write.
fn line_edit(
    file: FileNo,
    at: u64,
    text: &[u8],
    sectors: u64,
) -> Result<(usize, Edit), ImageFault> {
    let refuse = |what| Err(ImageFault::unsupported(file, what, sectors));
    let mut offset = 0;
    let mut comment: Option<(usize, usize)> = None;
    for line in text.split_inclusive(|&b| b == b'\n') {
        let start = offset;
        offset += line.len();
        let body = line.trim_ascii_end();
        if body.first() == Some(&b'#') && start > 0 {
            comment = Some((start, start + body.len()));
        }
        let indent = body.len() - body.trim_ascii_start().len();
        if !body[indent..].starts_with(b"RW") {
            continue;
        }
        let digits = body.iter().position(u8::is_ascii_digit).unwrap_or(body.len());
        let rest = &body[digits..];
        let count = rest.iter().position(|b| !b.is_ascii_digit()).unwrap_or(rest.len());
        let (from, to) = (start + digits, start + digits + count);
        let new = alloc::format!("{sectors}");
        let more = new.len().saturating_sub(count);
        let mut bytes: Vec<u8> = vec![b' '; count.saturating_sub(new.len())];
        bytes.extend(new.as_bytes());
        let mut first = from;
        if more > 0 {
            let Some((_, end)) = comment.filter(|(start, end)| end - start > more) else {
                return refuse(
                    "growing a VMDK whose descriptor has no room for the size: convert it",
                );
            };
            bytes.splice(0..0, text[end..from].iter().copied());
            first = end - more;
        }
        assert!(bytes.len() == to - first, "nothing else moves");
        let place = at + first as u64;
        let one_sector = place / SECTOR_BYTES == (at + to as u64 - 1) / SECTOR_BYTES;
        let Ok(bytes) = heapless::Vec::from_slice(&bytes) else {
            return refuse("growing a VMDK whose extent's line is too long: convert it");
        };
        if !one_sector {
            return refuse("growing a VMDK whose extent's line crosses a sector: convert it");
        }
        return Ok((first, Edit { at: place, bytes, is_sent: false }));
    }
    refuse("growing a VMDK whose descriptor has no writable extent")
}

#[cfg(test)]
mod tests {
    //! Would miss: the order of the writes; the power-cut tests of the images hold that.

    use super::*;

    #[test]
    fn a_longer_number_takes_its_room_from_the_comment() {
        let text = "# Disk DescriptorFile\nCID=1\r\n# Extent description\r\nRW 99 FLAT \"a\" 0\n";
        let (first, edit) = line_edit(FileNo(0), 0, text.as_bytes(), 123_456).unwrap();
        let mut after = text.as_bytes().to_vec();
        after[first..first + edit.bytes.len()].copy_from_slice(&edit.bytes);
        let after = core::str::from_utf8(&after).unwrap();
        assert_eq!(after.len(), text.len());
        assert!(after.contains("\r\n# Extent descrip\r\nRW 123456 FLAT \"a\" 0\n"), "{after}");
        let (first, edit) = line_edit(FileNo(0), 0, text.as_bytes(), 88).unwrap();
        assert_eq!((first, &edit.bytes[..]), (text.find("99").unwrap(), &b"88"[..]));
        assert!(line_edit(FileNo(0), 0, b"# D\nRW 9 FLAT \"a\" 0\n", 100).is_err());
        let far = line_edit(FileNo(0), 512 - 55, text.as_bytes(), 123_456).err().unwrap();
        assert!(far.field.contains("crosses a sector"));
    }
}
