//! Opening a VHDX, step by step: headers, log, region table, metadata ([MS-VHDX] 2.2, 2.6).
//!
//! Order guarded: nothing but the headers is read before the log is replayed, since the log may
//! change all the rest; and before the replay writes, the header gets a new FileWriteGuid. It
//! keeps its place between calls, so that the smallest cache will do.

use alloc::boxed::Box;
use alloc::string::String;

use crate::fault::{FaultKind, ImageFault};
use crate::format::{Ctx, Format, Parent};
use crate::meta::BLOCK_BYTES;
use crate::path::{beside, last, leads_out, utf16};
use crate::types::{FileNo, Step, Stop};

use super::Vhdx;
use super::crc::Crc;
use super::header::{
    BAT_REGION, ENTRIES_MAX, ENTRY_BYTES, FILE_SIGNATURE, Guid, HEADER_BYTES, HEADER_OFFSETS,
    Header, ITEMS, METADATA_HEAD_BYTES, METADATA_REGION, MIB, Metadata, NO_GUID, REGION_HEAD_BYTES,
    REGION_OFFSETS, TABLE_BYTES, VHDX_LOCATOR, guid_at, u16_at, u32_at, u64_at,
};
use super::replay::Replay;

/// Keys looked at in a parent locator (ours; [MS-VHDX] names five).
const KEYS_MAX: u16 = 64;
/// Longest path taken, bytes of UTF-16.
const PATH_BYTES_MAX: u16 = 2046;

/// Regions of others that are kept (ours; no writer is known that has any).
pub(super) const OTHERS_MAX: usize = 8;

/// A stretch of the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Region {
    pub offset: u64,
    pub length: u64,
}

impl Region {
    pub fn touches(self, offset: u64, length: u64) -> bool {
        offset < self.offset.saturating_add(self.length)
            && self.offset < offset.saturating_add(length)
    }
}

/// The identity of the parent and its path.
#[derive(Default)]
pub(super) struct Locator {
    pub linkage: u128,
    pub linkage2: u128,
    path: Option<String>,
}

enum Stage {
    Replay,
    /// The log is applied and being made durable.
    Replayed,
    /// Which region table, block of it, and its checksum so far.
    RegionSum {
        table: usize,
        at: u64,
        crc: Crc,
    },
    /// Entries looked at, of how many.
    Regions {
        table: usize,
        next: u32,
        count: u32,
    },
    Items {
        next: u32,
        count: u32,
    },
    Ready,
}

/// What is known while a VHDX is being opened.
pub(super) struct Load {
    stage: Stage,
    replay: Option<Replay>,
    bat: Region,
    metadata: Region,
    /// Offset and length of the known items in the metadata region.
    items: [Option<(u32, u32)>; ITEMS.len()],
    pub parent: Option<Parent>,
}

/// The current header, and which of the two it is ([MS-VHDX] 2.2.2).
pub(super) fn current_header(ctx: &mut Ctx, file: FileNo) -> Step<(Header, usize)> {
    let mut signature = [0; 8];
    ctx.read(file, 0, &mut signature)?;
    if &signature != FILE_SIGNATURE {
        let found = u64::from_be_bytes(signature);
        let fault = ImageFault::new(FaultKind::NotThisFormat, file, "the VHDX signature");
        return Err(ImageFault { value: found, ..fault }.into());
    }
    let mut bytes = [0; HEADER_BYTES];
    let mut headers = [None; 2];
    for (n, offset) in HEADER_OFFSETS.into_iter().enumerate() {
        ctx.read(file, offset, &mut bytes)?;
        headers[n] = Header::parse(&bytes);
    }
    let (header, n) = match headers {
        [Some(first), Some(second)] if first.sequence < second.sequence => (second, 1),
        // Disk2vhd writes the same header twice.
        [Some(first), Some(second)] if first.sequence == second.sequence && first != second => {
            let field = "VHDX headers, two with one sequence number";
            return Err(ImageFault::corrupt(file, field, HEADER_OFFSETS[0], first.sequence).into());
        }
        [Some(first), _] => (first, 0),
        [None, Some(second)] => (second, 1),
        [None, None] => {
            let field = "VHDX headers, neither holds";
            return Err(ImageFault::corrupt(file, field, HEADER_OFFSETS[0], 0).into());
        }
    };
    header.check(file, HEADER_OFFSETS[n])?;
    Ok((header, n))
}

impl Load {
    pub fn new(file: FileNo, header: &Header, writable: bool) -> Load {
        let dirty = header.log_guid != NO_GUID;
        Load {
            stage: if dirty { Stage::Replay } else { first_table() },
            replay: dirty.then(|| Replay::new(file, header, writable)),
            bat: Region::default(),
            metadata: Region::default(),
            items: [None; ITEMS.len()],
            parent: None,
        }
    }
}

fn first_table() -> Stage {
    Stage::RegionSum { table: 0, at: 0, crc: Crc::new() }
}

impl Vhdx {
    /// Goes on with opening; done when the stage is `Ready`.
    pub(super) fn load(&mut self, ctx: &mut Ctx) -> Step<()> {
        let Some(mut load) = self.load.take() else { return Ok(()) };
        let result = loop {
            if let Stage::Ready = load.stage {
                break self.find_end(ctx);
            }
            if let Err(stop) = self.load_step(ctx, &mut load) {
                break Err(stop);
            }
        };
        self.load = Some(load);
        result
    }

    fn load_step(&mut self, ctx: &mut Ctx, load: &mut Box<Load>) -> Step<()> {
        load.stage = match load.stage {
            Stage::Replay => self.replay(ctx, load)?,
            Stage::Replayed => self.replayed(ctx)?,
            Stage::RegionSum { table, at, crc } => self.region_sum(ctx, table, at, crc)?,
            Stage::Regions { table, next, count } if next < count => {
                self.region(ctx, load, REGION_OFFSETS[table], next)?;
                Stage::Regions { table, next: next + 1, count }
            }
            Stage::Regions { table, .. } => self.regions(ctx, load, REGION_OFFSETS[table])?,
            Stage::Items { next, count } if next < count => {
                self.item(ctx, load, next)?;
                Stage::Items { next: next + 1, count }
            }
            Stage::Items { .. } | Stage::Ready => {
                self.metadata(ctx, load)?;
                Stage::Ready
            }
        };
        Ok(())
    }

    fn replay(&mut self, ctx: &mut Ctx, load: &mut Load) -> Step<Stage> {
        let replay = load.replay.as_mut().expect("a replay");
        replay.find(ctx)?;
        if let Some(writer) = &mut self.writer
            && !writer.file_guid_changed()
        {
            // Before the first change of the file, the replay's included ([MS-VHDX] 2.2.2).
            writer.want_file_guid();
            return Err(Stop::NeedFlush);
        }
        replay.apply(ctx)?;
        let replay = load.replay.take().expect("a replay");
        if self.writer.is_some() {
            return Ok(Stage::Replayed);
        }
        self.overlay = replay.into_overlay().map(Box::new);
        self.note = Some("the log is not empty: it is replayed in memory");
        Ok(first_table())
    }

    fn replayed(&mut self, ctx: &mut Ctx) -> Step<Stage> {
        let writer = self.writer.as_mut().expect("replayed into the file");
        if ctx.meta.is_dirty() {
            return Err(Stop::NeedFlush);
        }
        if writer.log_guid_set() {
            writer.want_empty_log();
            return Err(Stop::NeedFlush);
        }
        writer.replay_done();
        self.note = Some("the log was not empty: it has been replayed");
        Ok(first_table())
    }

    /// A block more of a region table's checksum, then its head ([MS-VHDX] 2.2.3.1).
    fn region_sum(&self, ctx: &mut Ctx, table: usize, at: u64, crc: Crc) -> Step<Stage> {
        let offset = REGION_OFFSETS[table];
        let mut block = [0; BLOCK_BYTES as usize];
        if at < TABLE_BYTES {
            self.get(ctx, offset + at, &mut block)?;
            let crc = if at == 0 { crc.with_hole(&block, 4) } else { crc.with(&block) };
            return Ok(Stage::RegionSum { table, at: at + BLOCK_BYTES, crc });
        }
        self.get(ctx, offset, &mut block[..16])?;
        let count = u32_at(&block, 8);
        if &block[..4] == b"regi" && u32_at(&block, 4) == crc.value() && count <= ENTRIES_MAX {
            return Ok(Stage::Regions { table, next: 0, count });
        }
        if table == 0 {
            return Ok(Stage::RegionSum { table: 1, at: 0, crc: Crc::new() });
        }
        Err(ImageFault::corrupt(self.file, "VHDX region tables, neither holds", offset, 0).into())
    }

    fn region(&mut self, ctx: &mut Ctx, load: &mut Load, table: u64, n: u32) -> Step<()> {
        let at = table + REGION_HEAD_BYTES + n as u64 * ENTRY_BYTES;
        let mut b = [0; ENTRY_BYTES as usize];
        self.get_across(ctx, at, &mut b)?;
        let region = Region { offset: u64_at(&b, 16), length: u32_at(&b, 24) as u64 };
        let known = match guid_at(&b, 0) {
            BAT_REGION => &mut load.bat,
            METADATA_REGION => &mut load.metadata,
            other if u32_at(&b, 28) & 1 != 0 => return Err(self.unknown("region", other)),
            _ => {
                // What does not lie in the file is no place of anything.
                let end = region.offset.saturating_add(region.length);
                if end > ctx.files.size(self.file) {
                    return Ok(());
                }
                let (field, max) = ("VHDX regions of others", OTHERS_MAX as u64);
                let many = |_| ImageFault::limit(self.file, field, max + 1, max);
                return Ok(self.others.push(region).map_err(many)?);
            }
        };
        let aligned = region.offset.is_multiple_of(MIB) && region.length.is_multiple_of(MIB);
        let end = region.offset.checked_add(region.length);
        let inside = end.is_some_and(|end| end <= ctx.files.size(self.file));
        if !aligned || !inside || region.offset < MIB || region.length == 0 {
            let field = "VHDX region, not in the file or not at a MiB";
            return Err(ImageFault::corrupt(self.file, field, at, region.offset).into());
        }
        if *known != Region::default() {
            let field = "VHDX region, there twice";
            return Err(ImageFault::corrupt(self.file, field, at, region.offset).into());
        }
        *known = region;
        Ok(())
    }

    fn unknown(&self, what: &str, guid: Guid) -> Stop {
        let field = match what {
            "region" => "an unknown VHDX region that is required",
            _ => "an unknown VHDX metadata item that is required",
        };
        let first = (super::header::guid_number(guid) >> 64) as u64;
        ImageFault::unsupported(self.file, field, first).into()
    }

    /// All region entries are seen: on to the metadata table ([MS-VHDX] 2.6.1.1).
    fn regions(&mut self, ctx: &mut Ctx, load: &mut Load, table: u64) -> Step<Stage> {
        let (bat, metadata) = (load.bat, load.metadata);
        let missing = bat.length == 0 || metadata.length < TABLE_BYTES;
        let log = self.log;
        if missing
            || bat.touches(metadata.offset, metadata.length)
            || log.touches(bat.offset, bat.length)
            || log.touches(metadata.offset, metadata.length)
        {
            let field = "VHDX regions, missing or on each other";
            return Err(ImageFault::corrupt(self.file, field, table, bat.offset).into());
        }
        let mut b = [0; METADATA_HEAD_BYTES as usize];
        self.get(ctx, metadata.offset, &mut b)?;
        let count = u16_at(&b, 10) as u32;
        if &b[..8] != b"metadata" || count > ENTRIES_MAX {
            let field = "VHDX metadata table";
            return Err(ImageFault::corrupt(self.file, field, metadata.offset, count as u64).into());
        }
        (self.bat, self.metadata) = (bat, metadata);
        Ok(Stage::Items { next: 0, count })
    }

    /// One entry of the metadata table ([MS-VHDX] 2.6.1.2).
    fn item(&self, ctx: &mut Ctx, load: &mut Load, n: u32) -> Step<()> {
        let at = self.metadata.offset + METADATA_HEAD_BYTES + n as u64 * ENTRY_BYTES;
        let mut b = [0; ENTRY_BYTES as usize];
        self.get_across(ctx, at, &mut b)?;
        let (offset, length, flags) = (u32_at(&b, 16), u32_at(&b, 20), u32_at(&b, 24));
        let guid = guid_at(&b, 0);
        // Users' items have names of their own.
        let known = ITEMS.iter().position(|item| *item == guid).filter(|_| flags & 1 == 0);
        let Some(known) = known else {
            return if flags & 4 != 0 { Err(self.unknown("item", guid)) } else { Ok(()) };
        };
        if (offset, length) == (0, 0) {
            // An item that is empty ([MS-VHDX] 2.6.1.2).
            return Ok(());
        }
        let end = offset as u64 + length as u64;
        if (offset as u64) < TABLE_BYTES || end > self.metadata.length || length as u64 > MIB {
            let field = "VHDX metadata item's offset";
            return Err(ImageFault::corrupt(self.file, field, at, offset as u64).into());
        }
        if load.items[known].replace((offset, length)).is_some() {
            let field = "VHDX metadata item, there twice";
            return Err(ImageFault::corrupt(self.file, field, at, offset as u64).into());
        }
        Ok(())
    }

    /// The first bytes of a known item, which may be longer.
    fn item_bytes<const N: usize>(&self, ctx: &mut Ctx, load: &Load, n: usize) -> Step<[u8; N]> {
        let mut bytes = [0; N];
        match load.items[n] {
            Some((offset, length)) if length as usize >= N => {
                self.get_across(ctx, self.metadata.offset + offset as u64, &mut bytes)?;
                Ok(bytes)
            }
            _ => {
                let field = "VHDX metadata, an item is missing or short";
                let at = self.metadata.offset;
                Err(ImageFault::corrupt(self.file, field, at, n as u64).into())
            }
        }
    }

    fn metadata(&mut self, ctx: &mut Ctx, load: &mut Load) -> Step<()> {
        let parameters = self.item_bytes::<8>(ctx, load, 0)?;
        let size = u64::from_le_bytes(self.item_bytes(ctx, load, 1)?);
        let logical = u32::from_le_bytes(self.item_bytes(ctx, load, 3)?);
        let physical = u32::from_le_bytes(self.item_bytes(ctx, load, 4)?);
        let at = self.metadata.offset;
        let known = Metadata::parse(self.file, at, parameters, size, logical, physical)?;
        if known.bat_entries().saturating_mul(8) > self.bat.length {
            let field = "VHDX BAT, too short for the disk";
            return Err(
                ImageFault::corrupt(self.file, field, self.bat.offset, self.bat.length).into()
            );
        }
        if known.has_parent {
            let locator = self.locator(ctx, load)?;
            let Some(name) = locator.path.clone() else {
                let field = "VHDX parent locator, no path in it";
                return Err(ImageFault::corrupt(self.file, field, at, 0).into());
            };
            load.parent = Some(Parent { name, format: Some(Format::Vhdx) });
            self.linkage = [locator.linkage, locator.linkage2];
        }
        let (size_offset, _) = load.items[1].expect("the item was just read");
        self.size_at = at + size_offset as u64;
        self.set_geometry(&known);
        Ok(())
    }

    /// The parent locator ([MS-VHDX] 2.6.2.6).
    fn locator(&self, ctx: &mut Ctx, load: &Load) -> Step<Locator> {
        let head = self.item_bytes::<20>(ctx, load, 5)?;
        let (offset, length) = load.items[5].expect("its head was just read");
        if guid_at(&head, 0) != VHDX_LOCATOR {
            let kind = (super::header::guid_number(guid_at(&head, 0)) >> 64) as u64;
            let field = "the type of a VHDX parent locator";
            return Err(ImageFault::unsupported(self.file, field, kind).into());
        }
        let start = self.metadata.offset + offset as u64;
        let mut locator = Locator::default();
        let mut best = u8::MAX;
        for n in 0..u16_at(&head, 18).min(KEYS_MAX) as u64 {
            let mut e = [0; 12];
            if 20 + (n + 1) * 12 > length as u64 {
                break;
            }
            self.get_across(ctx, start + 20 + n * 12, &mut e)?;
            let key = self.text(ctx, start, length, u32_at(&e, 0), u16_at(&e, 8))?;
            let value = self.text(ctx, start, length, u32_at(&e, 4), u16_at(&e, 10))?;
            let (Some(key), Some(value)) = (key, value) else { continue };
            // The order in which paths are to be tried; of an absolute one only the name counts,
            // and a relative one that leaves the folder will be refused.
            let rank = match key.as_str() {
                "parent_linkage" => {
                    locator.linkage = guid_of_text(&value);
                    continue;
                }
                "parent_linkage2" => {
                    locator.linkage2 = guid_of_text(&value);
                    continue;
                }
                "relative_path" => 0,
                "volume_path" => 1,
                "absolute_win32_path" => 2,
                _ => continue,
            };
            let path = if rank == 0 { beside(&value) } else { last(&value) };
            let Some(path) = path else { continue };
            let rank = if leads_out(&path) { u8::MAX - 1 } else { rank };
            if rank < best {
                (locator.path, best) = (Some(path), rank);
            }
        }
        Ok(locator)
    }

    /// A key or value: UTF-16, without an end mark.
    fn text(
        &self,
        ctx: &mut Ctx,
        start: u64,
        length: u32,
        offset: u32,
        bytes: u16,
    ) -> Step<Option<String>> {
        if bytes > PATH_BYTES_MAX || offset as u64 + bytes as u64 > length as u64 {
            return Ok(None);
        }
        let mut data = alloc::vec![0; bytes as usize];
        self.get_across(ctx, start + offset as u64, &mut data)?;
        Ok(utf16(&data, u16::from_le_bytes))
    }
}

/// `{83ed0ec3-24c8-49a6-a959-5e4bf1288bfb}`; 0, which no file has, if it is no GUID.
fn guid_of_text(text: &str) -> u128 {
    let inner = text.strip_prefix('{').and_then(|t| t.strip_suffix('}')).unwrap_or(text);
    let digits: String = inner.chars().filter(|c| *c != '-').collect();
    if digits.len() != 32 {
        return 0;
    }
    u128::from_str_radix(&digits, 16).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    //! Would miss: everything about files; tests/vhdx.rs opens some.

    use super::*;

    #[test]
    fn the_text_of_a_guid_is_its_number() {
        let number = 0x83ed0ec3_24c8_49a6_a959_5e4bf1288bfb;
        assert_eq!(guid_of_text("{83ED0EC3-24c8-49a6-a959-5e4bf1288bfb}"), number);
        assert_eq!(guid_of_text("{83ed0ec3}"), 0);
        assert_eq!(guid_of_text("+3ed0ec324c849a6a9595e4bf1288bfbx"), 0);
    }
}
