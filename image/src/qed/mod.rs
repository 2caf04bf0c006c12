//! QED (QEMU docs/interop/qed_spec): two levels of tables, clusters taken from the end.
//!
//! Order guarded here: that of [`append`](crate::append). With it a cut leaves no entry for
//! space that is not written, so the need-check bit is never set by us; where another writer
//! left it set, all tables are scanned before the first write and what points beyond the file
//! is cleared, as QEMU does. Unknown autoclear bits are cleared, durably, before the first
//! write. An image must never be written while two of its entries name one cluster.

mod create;
mod header;
mod scan;

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec;

use self::header::{FEATURE_BACKING_RAW, FEATURE_NEED_CHECK, HEADER_BYTES, Header, at};
use self::scan::Scan;
use crate::append::{
    Added, Checker, Entry, FirstWrite, NewTable, Part, Shape, Space, Table, Use, Writer,
};
use crate::check::{CheckParams, CheckProgress};
use crate::fault::{FaultKind, ImageFault};
use crate::files::Access;
use crate::format::{AnyLayer, Ctx, Format, Found, Inspect, Layer, OpenedLayer, Parent, read_only};
use crate::info::Details;
use crate::meta::Phase;
use crate::types::{DiscardPlan, FileNo, ResizePlan, SECTOR_BYTES, SectorRange, Step, WritePlan};
pub(crate) use create::create;

/// L2 entry of a cluster that reads as zeros.
const ZERO_CLUSTER: u64 = 1;

/// The tables of an image.
struct Tables {
    file: FileNo,
    header: Header,
}

/// What only a writable layer has.
struct Writing {
    writer: Writer,
    space: Space,
    first: FirstWrite,
    scan: Option<Scan>,
}

pub(crate) struct Qed {
    tables: Tables,
    has_parent: bool,
    writing: Option<Box<Writing>>,
    check: Option<Box<Checker>>,
}

impl Tables {
    /// Is this a place where a table or cluster of `bytes` can be?
    fn is_valid(&self, ctx: &Ctx, offset: u64, bytes: u64) -> bool {
        let header = &self.header;
        let l1_end = header.l1_offset + header.table_bytes;
        offset.is_multiple_of(header.cluster_bytes)
            && offset >= header.header_bytes
            && offset < ctx.files.size(self.file)
            && offset
                .checked_add(bytes)
                .is_some_and(|end| end <= header.l1_offset || offset >= l1_end)
    }

    fn l1_at(&self, cluster: u64) -> u64 {
        self.header.l1_offset + cluster / self.header.table_entries() * 8
    }
}

impl Shape for Tables {
    const ENTRY_BYTES: u64 = 8;

    fn file(&self) -> FileNo {
        self.file
    }

    fn cluster_bytes(&self) -> u64 {
        self.header.cluster_bytes
    }

    fn sectors(&self) -> u64 {
        self.header.image_bytes / SECTOR_BYTES
    }

    fn table_clusters(&self) -> u64 {
        self.header.table_entries()
    }

    fn locate(&self, ctx: &mut Ctx, cluster: u64) -> Step<Table> {
        let l1_at = self.l1_at(cluster);
        let table = ctx.meta.get_u64_le(self.file, l1_at)?;
        if table == 0 {
            return Ok(Table::Missing);
        }
        if !self.is_valid(ctx, table, self.header.table_bytes) {
            return Err(ImageFault::corrupt(self.file, "an L1 entry", l1_at, table).into());
        }
        let entry = table + cluster % self.header.table_entries() * 8;
        Ok(Table::At { entry, copy: None })
    }

    fn entry(&self, ctx: &mut Ctx, at: u64) -> Step<Entry> {
        let value = ctx.meta.get_u64_le(self.file, at)?;
        match value {
            0 => Ok(Entry::Absent),
            ZERO_CLUSTER => Ok(Entry::Zero),
            _ if self.is_valid(ctx, value, self.header.cluster_bytes) => Ok(Entry::Data(value)),
            _ => Err(ImageFault::corrupt(self.file, "an L2 entry", at, value).into()),
        }
    }

    fn encode(&self, offset: u64) -> [u8; 8] {
        offset.to_le_bytes()
    }

    fn zero_entry(&self) -> Option<[u8; 8]> {
        // Never written, only read: QEMU fills a zero cluster that it writes in part with the
        // backing file's bytes, and without a backing file an absent cluster is zero anyway.
        None
    }

    fn table_bytes(&self) -> u64 {
        self.header.table_bytes
    }

    fn fixed(&self) -> [(u64, u64); 4] {
        let header = &self.header;
        [(0, header.header_bytes), (header.l1_offset, header.table_bytes), (0, 0), (0, 0)]
    }

    fn unit_bytes(&self) -> u64 {
        self.header.cluster_bytes
    }

    fn add_table(&self, ctx: &mut Ctx, space: &mut Space, cluster: u64) -> Step<Added> {
        let directory_at = self.l1_at(cluster);
        ctx.meta.reserve(self.file, directory_at)?;
        let bytes = self.header.table_bytes;
        let offset = space.take(Use::Table, bytes, self.header.cluster_bytes)?;
        let pointer = offset.to_le_bytes();
        Ok(Added::WithPlan(NewTable { offset, bytes, space_bytes: bytes, directory_at, pointer }))
    }
}

impl Qed {
    pub fn open(ctx: &mut Ctx, file: FileNo, access: Access) -> Step<OpenedLayer> {
        let mut bytes = [0; HEADER_BYTES];
        ctx.read(file, 0, &mut bytes)?;
        let header = Header::parse(file, &bytes)?;
        let size = ctx.files.size(file);
        let l1_end = header.l1_offset.checked_add(header.table_bytes);
        if l1_end.is_none_or(|end| end > size) {
            let field = "l1_table_offset, beyond the end of the file,";
            let fault = ImageFault::corrupt(file, field, at::L1_OFFSET, header.l1_offset);
            return Err(fault.into());
        }
        let parent = if header.name_bytes > 0 {
            let mut name = vec![0; header.name_bytes];
            ctx.read(file, header.name_offset, &mut name)?;
            let Ok(name) = String::from_utf8(name) else {
                let why = "the name of the backing file is not UTF-8";
                return Err(ImageFault::new(FaultKind::Refused, file, why).into());
            };
            let raw = header.features & FEATURE_BACKING_RAW != 0;
            Some(Parent { name, format: raw.then_some(Format::Raw) })
        } else {
            None
        };
        // Offsets stay below the sign bit, as all tools keep file sizes.
        let space = (access == Access::ReadWrite)
            .then(|| Space::at_end(file, ctx.files.info(file), i64::MAX as u64))
            .transpose()?;
        let writing = space.map(|space| {
            let need_check = header.features & FEATURE_NEED_CHECK != 0;
            let first = FirstWrite::new(header.autoclear != 0 || need_check);
            let scan = need_check.then(Scan::new);
            Box::new(Writing { writer: Writer::new(), space, first, scan })
        });
        let tables = Tables { file, header };
        let layer =
            AnyLayer::Qed(Qed { tables, has_parent: parent.is_some(), writing, check: None });
        Ok(OpenedLayer { layer, parent })
    }

    fn part(&self) -> Part {
        Part { unit: 0, base_sector: 0, has_parent: self.has_parent }
    }

    /// The writable side, once all that must come before a first write is durable.
    fn first_write(&mut self, ctx: &mut Ctx) -> Step<(&Tables, &mut Writing)> {
        let (tables, file) = (&self.tables, self.tables.file);
        let Some(writing) = &mut self.writing else {
            return Err(read_only(file, "the image is open read-only").into());
        };
        if let Some(scan) = &mut writing.scan {
            scan.step(ctx, tables)?;
            writing.scan = None;
        }
        writing.first.pass(ctx, |ctx| {
            ctx.meta.reserve(file, 0)?;
            let features = tables.header.features & !FEATURE_NEED_CHECK;
            ctx.meta.put(file, at::FEATURES, &features.to_le_bytes(), Phase::HEADER);
            ctx.meta.put(file, at::AUTOCLEAR, &[0; 8], Phase::HEADER);
            Ok(())
        })?;
        Ok((tables, writing))
    }
}

impl Layer for Qed {
    fn sectors(&self) -> u64 {
        self.tables.sectors()
    }

    fn map(&mut self, ctx: &mut Ctx, range: SectorRange) -> Step<(Found, u64)> {
        self.tables.map(ctx, range)
    }

    fn prepare(&mut self, ctx: &mut Ctx, slot: u16, range: SectorRange) -> Step<WritePlan> {
        let part = self.part();
        let (tables, writing) = self.first_write(ctx)?;
        writing.writer.prepare(ctx, (tables, &mut writing.space, part), slot, range)
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
        let (tables, writing) = self.first_write(ctx)?;
        writing.writer.discard(ctx, (tables, part), range, zero)
    }

    fn flushed(&mut self, _ctx: &mut Ctx, ok: bool) {
        if let Some(writing) = &mut self.writing {
            writing.first.flushed(ok);
        }
    }

    fn note(&self) -> Option<&'static str> {
        (self.tables.header.features & FEATURE_NEED_CHECK != 0)
            .then_some("it was not closed cleanly: its tables are scanned before the first write")
    }

    fn resize(&mut self, ctx: &mut Ctx, sectors: u64) -> Step<ResizePlan> {
        let (tables, _) = self.first_write(ctx)?;
        let max = (tables.header.image_bytes_max() / u128::from(SECTOR_BYTES)) as u64;
        if sectors > max {
            let field = "sectors of an image with tables of this size";
            return Err(ImageFault::limit(tables.file, field, sectors, max).into());
        }
        let bytes = sectors * SECTOR_BYTES;
        ctx.meta.set(tables.file, at::IMAGE_SIZE, &bytes.to_le_bytes(), Phase::HEADER)?;
        self.tables.header.image_bytes = bytes;
        Ok(ResizePlan { grow: None })
    }

    fn details(&self) -> Details {
        let header = &self.tables.header;
        let dirty = self
            .writing
            .as_ref()
            .map_or(header.features & FEATURE_NEED_CHECK != 0, |w| w.scan.is_some());
        Details {
            cluster_bytes: header.cluster_bytes,
            figures: vec![("table_size", header.table_bytes / header.cluster_bytes)],
            dirty,
            ..Details::default()
        }
    }
}

impl Inspect for Qed {
    fn check_begin(&mut self, _ctx: &mut Ctx, params: CheckParams) -> Result<(), ImageFault> {
        self.check = Some(Box::new(Checker::new(params)));
        Ok(())
    }

    fn check_step(&mut self, ctx: &mut Ctx) -> Step<CheckProgress> {
        if self.check.as_ref().is_some_and(|check| check.repairs) {
            self.first_write(ctx)?;
        }
        let check = self.check.as_mut().expect("a check was begun");
        if !check.step(ctx, &self.tables)? {
            return Ok(check.progress(self.tables.clusters()));
        }
        let report = core::mem::take(&mut check.report);
        self.check = None;
        Ok(CheckProgress::Done(report))
    }
}
