//! The tables of sparse extents: a grain directory of grain tables of grains. Hosted extents
//! may have both twice; the redundant tables are kept equal entry by entry.
//!
//! A directory entry of 0 means that all its grains are absent; writing makes the table first
//! (QEMU instead writes over the header there). It must never follow an entry into the header,
//! the descriptor or the directory.

use super::header::{self, FLAG_MARKERS, FLAG_ZERO_GRAIN, SE_GRAIN_SECTORS, SE_TABLE_SECTORS};
use crate::append::{Added, Entry, Shape, Space, Table, Use};
use crate::fault::ImageFault;
use crate::format::{Codec, Ctx, Packed};
use crate::meta::{BLOCK_BYTES, Phase};
use crate::types::{FileNo, SECTOR_BYTES, Step, Stop};

/// Grain table entry of a zero grain.
const ZERO_GRAIN: u32 = 1;
/// Bytes of the marker before a compressed grain: its sector and the length of what follows.
const MARKER_BYTES: u64 = 12;
/// Bytes of the length alone, which VMware puts there where the markers are left out; QEMU puts
/// nothing.
const LENGTH_BYTES: u64 = 4;
/// Slack of a compressed grain that nothing tells the length of.
const PACKED_SLACK_BYTES: u64 = 4096;

/// Does a zlib stream start like this (RFC 1950, 2.2)?
fn is_zlib(start: [u8; 2]) -> bool {
    start[0] & 0x8f == 8 && u16::from_be_bytes(start).is_multiple_of(31)
}

/// A hosted or ESX extent.
pub(super) struct Tables {
    pub file: FileNo,
    pub header: header::Sparse,
    /// Redundant tables are looked for: only who writes needs them.
    pub is_writable: bool,
}

impl Tables {
    /// A sector number out of a table, as the byte where `bytes` lie.
    fn place(&self, ctx: &Ctx, sector: u32, bytes: u64) -> Option<u64> {
        let header = &self.header;
        let offset = u64::from(sector) * SECTOR_BYTES;
        let end = offset + bytes;
        let size = header.directory_entries() * 4;
        let fixed = [header.descriptor, (header.directory, size), (header.redundant, size)];
        let is_apart = fixed
            .iter()
            .all(|&(start, len)| start == 0 || end <= start || offset >= start.saturating_add(len));
        let is_inside = offset >= header::HEADER_BYTES as u64 && offset < ctx.files.size(self.file);
        (is_apart && is_inside).then_some(offset)
    }

    /// Where the table that entry `at` of a directory names starts, `None` for none.
    fn table(&self, ctx: &mut Ctx, at: u64) -> Step<Option<u64>> {
        match ctx.meta.get_u32_le(self.file, at)? {
            0 => Ok(None),
            sector => match self.place(ctx, sector, self.table_bytes()) {
                Some(offset) => Ok(Some(offset)),
                None => {
                    let field = "a grain directory entry";
                    Err(ImageFault::corrupt(self.file, field, at, sector.into()).into())
                }
            },
        }
    }

    fn directory_step(&self, cluster: u64) -> u64 {
        cluster / self.header.table_entries * 4
    }
}

impl Shape for Tables {
    const ENTRY_BYTES: u64 = 4;

    fn file(&self) -> FileNo {
        self.file
    }

    fn cluster_bytes(&self) -> u64 {
        self.header.grain_bytes()
    }

    fn sectors(&self) -> u64 {
        self.header.sectors
    }

    fn table_clusters(&self) -> u64 {
        self.header.table_entries
    }

    fn locate(&self, ctx: &mut Ctx, cluster: u64) -> Step<Table> {
        let step = self.directory_step(cluster);
        let index = cluster % self.header.table_entries * 4;
        let Some(table) = self.table(ctx, self.header.directory + step)? else {
            return Ok(Table::Missing);
        };
        let copy = if self.is_writable && self.header.redundant != 0 {
            self.table(ctx, self.header.redundant + step)?
        } else {
            None
        };
        let copy = copy.map(|copy| copy + index);
        Ok(Table::At { entry: table + index, copy })
    }

    fn entry(&self, ctx: &mut Ctx, at: u64) -> Step<Entry> {
        let value = ctx.meta.get_u32_le(self.file, at)?;
        let header = &self.header;
        if value == 0 {
            return Ok(Entry::Absent);
        }
        if value == ZERO_GRAIN && header.flags & FLAG_ZERO_GRAIN != 0 {
            return Ok(Entry::Zero);
        }
        let bytes = if header.is_compressed { MARKER_BYTES } else { header.grain_bytes() };
        let Some(offset) = self.place(ctx, value, bytes) else {
            let field = "a grain table entry";
            return Err(ImageFault::corrupt(self.file, field, at, value.into()).into());
        };
        if !header.is_compressed {
            return Ok(Entry::Data(offset));
        }
        Ok(Entry::Packed(Packed {
            file: self.file,
            offset,
            packed_bytes: 0,
            unpacked_bytes: header.grain_bytes() as u32,
            skip: 0,
            codec: Codec::Zlib,
        }))
    }

    /// Without a length it is what a grain can need, up to the end.
    fn packed(&self, ctx: &mut Ctx, packed: Packed) -> Step<Packed> {
        let grain = self.header.grain_bytes();
        if self.header.flags & FLAG_MARKERS == 0 {
            let mut start = [0; 6];
            ctx.meta.get(self.file, packed.offset, &mut start)?;
            let [a, b, c, d, first, second] = start;
            let bytes = u32::from_le_bytes([a, b, c, d]);
            if is_zlib([first, second]) && u64::from(bytes) <= 2 * grain {
                let offset = packed.offset + LENGTH_BYTES;
                return Ok(Packed { offset, packed_bytes: bytes, ..packed });
            }
            let rest = ctx.files.size(self.file) - packed.offset;
            let bytes = rest.min(grain + PACKED_SLACK_BYTES);
            return Ok(Packed { packed_bytes: bytes as u32, ..packed });
        }
        let at = packed.offset + 8;
        let bytes = ctx.meta.get_u32_le(self.file, at)?;
        if bytes == 0 || u64::from(bytes) > 2 * grain {
            let field = "the length of a compressed grain";
            return Err(ImageFault::corrupt(self.file, field, at, bytes.into()).into());
        }
        Ok(Packed { offset: packed.offset + MARKER_BYTES, packed_bytes: bytes, ..packed })
    }

    fn encode(&self, offset: u64) -> [u8; 8] {
        (offset / SECTOR_BYTES).to_le_bytes()
    }

    fn zero_entry(&self) -> Option<[u8; 8]> {
        (self.header.flags & FLAG_ZERO_GRAIN != 0).then(|| u64::from(ZERO_GRAIN).to_le_bytes())
    }

    fn table_bytes(&self) -> u64 {
        self.header.table_entries * 4
    }

    fn fixed(&self) -> [(u64, u64); 4] {
        let header = &self.header;
        let size = header.directory_entries() * 4;
        [
            (0, header::HEADER_BYTES as u64),
            header.descriptor,
            (header.directory, size),
            (header.redundant, if header.redundant == 0 { 0 } else { size }),
        ]
    }

    fn unit_bytes(&self) -> u64 {
        SECTOR_BYTES
    }

    /// Tables are padded to grains and preallocated as their maker likes: not leaks.
    fn counts_leaks(&self) -> bool {
        false
    }

    /// An empty table says what no table says, so it goes in at once, with its copy beside it.
    /// Not during a flush, which may be past the table's phase and would make the directory's
    /// entry durable before it.
    fn add_table(&self, ctx: &mut Ctx, space: &mut Space, cluster: u64) -> Step<Added> {
        if ctx.meta.flushing() {
            return Err(Stop::Busy);
        }
        let step = self.directory_step(cluster);
        let directories = [self.header.directory, self.header.redundant];
        for directory in directories.into_iter().filter(|&directory| directory != 0) {
            ctx.meta.reserve(self.file, directory + step)?;
        }
        let mut taken = space.clone();
        let offset = taken.take(Use::Table, BLOCK_BYTES, BLOCK_BYTES)?;
        ctx.meta.forget(self.file, offset, BLOCK_BYTES);
        ctx.meta.create(self.file, offset, Phase::TABLE)?;
        for (n, directory) in directories.into_iter().enumerate() {
            if directory != 0 {
                let sector = (offset + n as u64 * self.table_bytes()) / SECTOR_BYTES;
                let entry = (sector as u32).to_le_bytes();
                ctx.meta.put(self.file, directory + step, &entry, Phase::DIRECTORY);
            }
        }
        ctx.files.grow(self.file, offset + BLOCK_BYTES);
        *space = taken;
        Ok(Added::Installed)
    }
}

/// An seSparse extent, read only.
pub(super) struct SeTables {
    pub file: FileNo,
    pub header: header::SeSparse,
}

/// The kind of an seSparse entry is its top four bits.
const SE_KIND_SHIFT: u32 = 60;

impl Shape for SeTables {
    const ENTRY_BYTES: u64 = 8;

    fn file(&self) -> FileNo {
        self.file
    }

    fn cluster_bytes(&self) -> u64 {
        SE_GRAIN_SECTORS * SECTOR_BYTES
    }

    fn sectors(&self) -> u64 {
        self.header.sectors
    }

    fn table_clusters(&self) -> u64 {
        SE_TABLE_SECTORS * SECTOR_BYTES / 8
    }

    fn locate(&self, ctx: &mut Ctx, cluster: u64) -> Step<Table> {
        let at = self.header.directory + cluster / self.table_clusters() * 8;
        let value = ctx.meta.get_u64_le(self.file, at)?;
        if value == 0 {
            return Ok(Table::Missing);
        }
        let bytes = SE_TABLE_SECTORS * SECTOR_BYTES;
        // The top half says "allocated", the rest is the table's number.
        let number = value & 0xffff_ffff;
        let table = self.header.tables + number * bytes;
        if value >> 32 != 0x1000_0000 || table >= ctx.files.size(self.file) {
            let field = "an seSparse grain directory entry";
            return Err(ImageFault::corrupt(self.file, field, at, value).into());
        }
        let entry = table + cluster % self.table_clusters() * 8;
        Ok(Table::At { entry, copy: None })
    }

    fn entry(&self, ctx: &mut Ctx, at: u64) -> Step<Entry> {
        let value = ctx.meta.get_u64_le(self.file, at)?;
        let corrupt = || ImageFault::corrupt(self.file, "an seSparse grain table entry", at, value);
        match value >> SE_KIND_SHIFT {
            0 if value == 0 => Ok(Entry::Absent),
            // Unmapped by the guest, and zero: both read as zeros.
            1 | 2 => Ok(Entry::Zero),
            3 => {
                // The grain's number: its low 12 bits stand above its high 48.
                let number = value >> 48 & 0xfff | (value & 0xffff_ffff_ffff) << 12;
                let offset = number
                    .checked_mul(self.cluster_bytes())
                    .and_then(|within| self.header.grains.checked_add(within))
                    .filter(|&offset| offset < ctx.files.size(self.file));
                Ok(Entry::Data(offset.ok_or_else(corrupt)?))
            }
            _ => Err(corrupt().into()),
        }
    }

    fn encode(&self, _offset: u64) -> [u8; 8] {
        unreachable!("an seSparse extent is never written")
    }

    fn zero_entry(&self) -> Option<[u8; 8]> {
        None
    }

    fn table_bytes(&self) -> u64 {
        SE_TABLE_SECTORS * SECTOR_BYTES
    }

    fn fixed(&self) -> [(u64, u64); 4] {
        let header = &self.header;
        [(0, SECTOR_BYTES), (header.directory, header.directory_bytes), (0, 0), (0, 0)]
    }

    fn unit_bytes(&self) -> u64 {
        SECTOR_BYTES
    }

    fn counts_leaks(&self) -> bool {
        false
    }

    fn add_table(&self, _ctx: &mut Ctx, _space: &mut Space, _cluster: u64) -> Step<Added> {
        unreachable!("an seSparse extent is never written")
    }
}
