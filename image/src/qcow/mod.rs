//! qcow version 1 (QEMU block/qcow.c): two levels of tables, clusters taken from the end,
//! compressed clusters read and written over, no counts.
//!
//! Order guarded here: that of [`append`](crate::append). Writing over a compressed cluster
//! leaves its bytes behind for good: nothing says whose they were.

mod create;
mod header;

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec;

use self::header::{HEADER_BYTES, Header, SIZE_AT};
use crate::append::{
    Added, Checker, Entry, FirstWrite, NewTable, Part, Shape, Space, Table, Use, Writer,
};
use crate::check::{CheckParams, CheckProgress};
use crate::fault::{FaultKind, ImageFault};
use crate::files::Access;
use crate::format::{
    AnyLayer, Codec, Ctx, Found, Inspect, Layer, OpenedLayer, Packed, Parent, read_only,
};
use crate::info::Details;
use crate::meta::{BLOCK_BYTES, Phase};
use crate::types::{DiscardPlan, FileNo, ResizePlan, SECTOR_BYTES, SectorRange, Step, WritePlan};
pub(crate) use create::create;

/// L2 entry: the cluster is compressed.
const COMPRESSED: u64 = 1 << 63;

struct Tables {
    file: FileNo,
    header: Header,
}

/// What only a writable layer has.
struct Writing {
    writer: Writer,
    space: Space,
    /// Waits for the flush after an L1 table has moved.
    first: FirstWrite,
    growth: Option<Growth>,
}

/// A longer L1 table that is being made: its place, entries, and bytes written.
#[derive(Clone, Copy)]
struct Growth {
    offset: u64,
    entries: u64,
    written: u64,
}

pub(crate) struct Qcow {
    tables: Tables,
    has_parent: bool,
    writing: Option<Box<Writing>>,
    check: Option<Box<Checker>>,
}

impl Tables {
    fn l1_at(&self, cluster: u64) -> u64 {
        self.header.l1_offset + cluster / self.header.l2_entries() * 8
    }

    /// Is this a place where a table or cluster of `bytes` can be?
    fn is_valid(&self, ctx: &Ctx, offset: u64, bytes: u64) -> bool {
        let header = &self.header;
        offset.is_multiple_of(SECTOR_BYTES)
            && offset >= HEADER_BYTES as u64
            && offset < ctx.files.size(self.file)
            && offset
                .checked_add(bytes)
                .is_some_and(|end| end <= header.l1_offset || offset >= header.l1_end())
    }

    /// A compressed cluster: size and offset share the entry by `cluster_bits`.
    fn packed(&self, ctx: &Ctx, at: u64, value: u64) -> Step<Entry> {
        let shift = 63 - u32::from(self.header.cluster_bits);
        let offset = value & ((1 << shift) - 1);
        let bytes = value >> shift & (self.header.cluster_bytes() - 1);
        if bytes == 0 || offset < HEADER_BYTES as u64 || offset >= ctx.files.size(self.file) {
            return Err(ImageFault::corrupt(self.file, "an L2 entry", at, value).into());
        }
        Ok(Entry::Packed(Packed {
            file: self.file,
            offset,
            packed_bytes: bytes as u32,
            unpacked_bytes: self.header.cluster_bytes() as u32,
            skip: 0,
            codec: Codec::Deflate,
        }))
    }
}

impl Shape for Tables {
    const ENTRY_BYTES: u64 = 8;

    fn file(&self) -> FileNo {
        self.file
    }

    fn cluster_bytes(&self) -> u64 {
        self.header.cluster_bytes()
    }

    fn sectors(&self) -> u64 {
        self.header.disk_bytes / SECTOR_BYTES
    }

    fn table_clusters(&self) -> u64 {
        self.header.l2_entries()
    }

    fn locate(&self, ctx: &mut Ctx, cluster: u64) -> Step<Table> {
        let l1_at = self.l1_at(cluster);
        let table = ctx.meta.get_u64_be(self.file, l1_at)?;
        if table == 0 {
            return Ok(Table::Missing);
        }
        if !self.is_valid(ctx, table, self.table_bytes()) {
            return Err(ImageFault::corrupt(self.file, "an L1 entry", l1_at, table).into());
        }
        let entry = table + cluster % self.header.l2_entries() * 8;
        Ok(Table::At { entry, copy: None })
    }

    fn entry(&self, ctx: &mut Ctx, at: u64) -> Step<Entry> {
        let value = ctx.meta.get_u64_be(self.file, at)?;
        if value == 0 {
            return Ok(Entry::Absent);
        }
        if value & COMPRESSED != 0 {
            return self.packed(ctx, at, value);
        }
        if !self.is_valid(ctx, value, self.header.cluster_bytes()) {
            return Err(ImageFault::corrupt(self.file, "an L2 entry", at, value).into());
        }
        Ok(Entry::Data(value))
    }

    fn encode(&self, offset: u64) -> [u8; 8] {
        offset.to_be_bytes()
    }

    fn zero_entry(&self) -> Option<[u8; 8]> {
        None
    }

    fn table_bytes(&self) -> u64 {
        self.header.l2_entries() * 8
    }

    fn fixed(&self) -> [(u64, u64); 4] {
        let header = &self.header;
        let name = (header.name_offset, header.name_bytes as u64);
        [(0, HEADER_BYTES as u64), name, (header.l1_offset, header.l1_entries() * 8), (0, 0)]
    }

    fn unit_bytes(&self) -> u64 {
        SECTOR_BYTES
    }

    /// A cluster written over a compressed one leaves it behind: that is no fault.
    fn counts_leaks(&self) -> bool {
        false
    }

    fn add_table(&self, ctx: &mut Ctx, space: &mut Space, cluster: u64) -> Step<Added> {
        let directory_at = self.l1_at(cluster);
        ctx.meta.reserve(self.file, directory_at)?;
        // Whole cache blocks, so that a new table shares none with data.
        let align = BLOCK_BYTES.max(self.header.cluster_bytes());
        let bytes = self.table_bytes();
        let space_bytes = bytes.next_multiple_of(BLOCK_BYTES);
        let offset = space.take(Use::Table, space_bytes, align)?;
        let pointer = offset.to_be_bytes();
        Ok(Added::WithPlan(NewTable { offset, bytes, space_bytes, directory_at, pointer }))
    }
}

impl Qcow {
    /// A disk whose size is not a multiple of 512 is served without its last partial sector, as
    /// QEMU does.
    pub fn open(ctx: &mut Ctx, file: FileNo, access: Access) -> Step<OpenedLayer> {
        let mut bytes = [0; HEADER_BYTES];
        ctx.read(file, 0, &mut bytes)?;
        let header = Header::parse(file, &bytes)?;
        let size = ctx.files.size(file);
        if header.l1_end() > size {
            let field = "l1_table_offset, with a table beyond the end of the file,";
            return Err(ImageFault::corrupt(file, field, 40, header.l1_offset).into());
        }
        let parent = if header.name_bytes > 0 {
            let end = header.name_offset.checked_add(header.name_bytes as u64);
            if end.is_none_or(|end| end > size) {
                let field = "backing_file_offset";
                return Err(ImageFault::corrupt(file, field, 8, header.name_offset).into());
            }
            let mut name = vec![0; header.name_bytes];
            ctx.read(file, header.name_offset, &mut name)?;
            let Ok(name) = String::from_utf8(name) else {
                let why = "the name of the backing file is not UTF-8";
                return Err(ImageFault::new(FaultKind::Refused, file, why).into());
            };
            Some(Parent { name, format: None })
        } else {
            None
        };
        // Offsets stay below the sign bit, as all tools keep file sizes.
        let space = (access == Access::ReadWrite)
            .then(|| Space::at_end(file, ctx.files.info(file), i64::MAX as u64))
            .transpose()?;
        let writing = space.map(|space| {
            let first = FirstWrite::new(false);
            Box::new(Writing { writer: Writer::new(), space, first, growth: None })
        });
        let has_parent = parent.is_some();
        let tables = Tables { file, header };
        let layer = AnyLayer::Qcow(Qcow { tables, has_parent, writing, check: None });
        Ok(OpenedLayer { layer, parent })
    }

    fn part(&self) -> Part {
        Part { unit: 0, base_sector: 0, has_parent: self.has_parent }
    }

    fn writing(&mut self, ctx: &mut Ctx) -> Step<(&mut Tables, &mut Writing)> {
        match &mut self.writing {
            Some(writing) => {
                writing.first.pass(ctx, |_| Ok(()))?;
                Ok((&mut self.tables, writing))
            }
            None => Err(read_only(self.tables.file, "the image is open read-only").into()),
        }
    }
}

/// Copies the L1 table to a longer one; gives its offset.
fn move_l1(ctx: &mut Ctx, tables: &Tables, writing: &mut Writing, entries: u64) -> Step<u64> {
    let bytes = (entries * 8).next_multiple_of(BLOCK_BYTES);
    let mut growth = match writing.growth {
        Some(growth) if growth.entries == entries => growth,
        other => {
            if let Some(old) = other {
                // Another size was asked for meanwhile.
                let len = (old.entries * 8).next_multiple_of(BLOCK_BYTES);
                writing.space.give_back(Use::Table, old.offset, len);
            }
            let offset = writing.space.take(Use::Table, bytes, BLOCK_BYTES)?;
            writing.space.used();
            Growth { offset, entries, written: 0 }
        }
    };
    let old_bytes = tables.header.l1_entries() * 8;
    while growth.written < bytes {
        writing.growth = Some(growth);
        let mut block = [0; BLOCK_BYTES as usize];
        let kept = old_bytes.saturating_sub(growth.written).min(BLOCK_BYTES) as usize;
        ctx.read(tables.file, tables.header.l1_offset + growth.written, &mut block[..kept])?;
        let to = growth.offset + growth.written;
        ctx.meta.create(tables.file, to, Phase::BEFORE)?;
        ctx.meta.put(tables.file, to, &block, Phase::BEFORE);
        growth.written += BLOCK_BYTES;
    }
    writing.growth = Some(growth);
    ctx.files.grow(tables.file, growth.offset + bytes);
    Ok(growth.offset)
}

impl Layer for Qcow {
    fn sectors(&self) -> u64 {
        self.tables.sectors()
    }

    fn map(&mut self, ctx: &mut Ctx, range: SectorRange) -> Step<(Found, u64)> {
        self.tables.map(ctx, range)
    }

    fn unpacked_bytes(&self) -> u32 {
        self.tables.header.cluster_bytes() as u32
    }

    fn prepare(&mut self, ctx: &mut Ctx, slot: u16, range: SectorRange) -> Step<WritePlan> {
        let part = self.part();
        let (tables, writing) = self.writing(ctx)?;
        writing.writer.prepare(ctx, (&*tables, &mut writing.space, part), slot, range)
    }

    fn commit(&mut self, ctx: &mut Ctx, slot: u16) {
        let writing = self.writing.as_mut().expect("a plan of a writable layer");
        writing.writer.commit(ctx, &self.tables, slot);
    }

    fn abandon(&mut self, ctx: &mut Ctx, slot: u16) {
        let writing = self.writing.as_mut().expect("a plan of a writable layer");
        writing.writer.abandon(ctx, (&self.tables, &mut writing.space), slot);
    }

    fn discard(&mut self, ctx: &mut Ctx, range: SectorRange, zero: bool) -> Step<DiscardPlan> {
        let part = self.part();
        let (tables, writing) = self.writing(ctx)?;
        writing.writer.discard(ctx, (&*tables, part), range, zero)
    }

    /// A longer L1 table is written whole before the header, in one sector, names it and the new
    /// size; the old one stays behind.
    fn resize(&mut self, ctx: &mut Ctx, sectors: u64) -> Step<ResizePlan> {
        let (tables, writing) = self.writing(ctx)?;
        let file = tables.file;
        let larger = Header { disk_bytes: sectors * SECTOR_BYTES, ..tables.header };
        let (entries, max) = (larger.l1_entries(), header::L1_ENTRIES_MAX);
        if entries > max {
            let field = "entries of the L1 table of a qcow";
            return Err(ImageFault::limit(file, field, entries, max).into());
        }
        let mut l1_offset = larger.l1_offset;
        if entries > tables.header.l1_entries() {
            l1_offset = move_l1(ctx, tables, writing, entries)?;
        }
        ctx.meta.reserve(file, 0)?;
        let moved = l1_offset != tables.header.l1_offset;
        tables.header = Header { l1_offset, ..larger };
        ctx.meta.put(file, SIZE_AT, &larger.disk_bytes.to_be_bytes(), Phase::HEADER);
        if moved {
            ctx.meta.put(file, header::L1_OFFSET_AT, &l1_offset.to_be_bytes(), Phase::HEADER);
            writing.growth = None;
            // Entries of the new table come after the header that names it.
            writing.first.ask();
        }
        Ok(ResizePlan { grow: None })
    }

    fn flushed(&mut self, _ctx: &mut Ctx, ok: bool) {
        if let Some(writing) = &mut self.writing {
            writing.first.flushed(ok);
        }
    }

    fn details(&self) -> Details {
        Details {
            variant: "v1",
            cluster_bytes: self.tables.header.cluster_bytes(),
            figures: vec![("l2_bits", self.tables.header.l2_bits.into())],
            ..Details::default()
        }
    }
}

impl Inspect for Qcow {
    fn check_begin(&mut self, _ctx: &mut Ctx, params: CheckParams) -> Result<(), ImageFault> {
        self.check = Some(Box::new(Checker::new(params)));
        Ok(())
    }

    fn check_step(&mut self, ctx: &mut Ctx) -> Step<CheckProgress> {
        let check = self.check.as_mut().expect("a check was begun");
        if !check.step(ctx, &self.tables)? {
            return Ok(check.progress(self.tables.clusters()));
        }
        let report = core::mem::take(&mut check.report);
        self.check = None;
        Ok(CheckProgress::Done(report))
    }
}
