//! qcow2, versions 2 and 3 (docs/interop/qcow2 of QEMU).
//!
//! Order guarded (data-then-map), by the phases of the metadata cache: refcounts of new clusters
//! (`BEFORE`), refcount table entries of new refcount blocks (`REACH`), L2 entries (`TABLE`), L1
//! entries (`DIRECTORY`), the header (`HEADER`). Freeing goes the other way: a refcount falls only
//! once the pointer's removal is durable. It must never write where the header, the L1 table, the
//! refcount table or a directory lies, whatever the tables say.

mod check;
mod create;
mod dirty;
mod discard;
mod end;
mod entry;
mod header;
mod map;
mod overlap;
mod rebuild;
mod refcount;
mod resize;
mod row;
mod snapshot;
mod spare;
mod stream;
mod write;

use alloc::boxed::Box;
use alloc::vec;

use crate::check::{CheckParams, CheckProgress};
use crate::fault::{FaultKind, ImageFault};
use crate::files::Access;
use crate::format::{AnyLayer, Ctx, Found, Inspect, Layer, OpenedLayer, Parent};
use crate::info::{Details, SnapshotInfo};
use crate::types::{
    DiscardPlan, FileNo, ResizePlan, SECTOR_BYTES, SectorRange, Step, Stop, WritePlan,
};

use check::Checker;
pub(crate) use create::create;
use end::End;
use entry::Kind;
use header::{HEADER_BYTES_MAX, Header, Stretch};
use refcount::Space;
pub use stream::Qcow2Stream;
use write::Writer;

/// An open qcow2 file.
pub(crate) struct Qcow2 {
    file: FileNo,
    /// Where guest data lies: `file`, or the external data file.
    data: FileNo,
    kind: Kind,
    header: Header,
    bitmaps: u32,
    access: Access,
    /// Bytes of the snapshot table, known once the image is ready for writing.
    snapshot_table_bytes: u64,
    snapshots_measured: u32,
    bitmap_directory: Stretch,
    checker: Option<Box<Checker>>,
    /// A dirty image was gone through, with whatever result.
    rebuilt: bool,
    /// Made at open, for a writable image alone: a chain of read-only layers stays small.
    writer: Option<Box<Writer>>,
}

impl Qcow2 {
    pub fn open(ctx: &mut Ctx, file: FileNo, access: Access) -> Step<OpenedLayer> {
        let mut bytes = [0; HEADER_BYTES_MAX];
        ctx.read(file, 0, &mut bytes)?;
        let header = Header::parse(file, &bytes, ctx.files.size(file))?;
        if let (Some(lost), false) = (header.lost, ctx.for_check) {
            return Err(lost.into());
        }
        let extensions = header.extensions(file, &bytes)?;
        let data = match (&extensions.data_file, header.data_file()) {
            (_, false) => file,
            (Some(name), true) => ctx.files.open(file, name, access)?,
            (None, true) => {
                let what = "an external data file without a name";
                return Err(ImageFault::unsupported(file, what, 0).into());
            }
        };
        let parent = match header.backing {
            None => None,
            Some(stretch) => {
                let mut name = vec![0; stretch.bytes as usize];
                ctx.read(file, stretch.offset, &mut name)?;
                let name = alloc::string::String::from_utf8(name).map_err(|_| {
                    ImageFault::corrupt(file, "the backing file's name, not UTF-8", 8, 0)
                })?;
                let format = match extensions.backing_format {
                    None => None,
                    Some(Some(format)) => Some(format),
                    Some(None) => {
                        let what = "the backing file's format is not one that can be opened";
                        return Err(ImageFault::new(FaultKind::Refused, file, what).into());
                    }
                };
                Some(Parent { name, format })
            }
        };
        let kind = Kind {
            cluster_bits: header.cluster_bits,
            v3: header.version == 3,
            extended: header.extended_l2(),
            data_file: header.data_file(),
        };
        let writer = (access == Access::ReadWrite).then(|| {
            let info = ctx.files.info(file);
            let end = info.size_bytes.div_ceil(header.cluster_bytes());
            let space = Space::new(end, info.can_grow);
            Box::new(Writer::new(space, End::new(info.size_bytes)))
        });
        let mut layer = Qcow2 {
            file,
            data,
            kind,
            bitmaps: extensions.bitmaps,
            access,
            header,
            snapshot_table_bytes: 0,
            snapshots_measured: 0,
            bitmap_directory: extensions.bitmap_directory.unwrap_or_default(),
            checker: None,
            rebuilt: false,
            writer,
        };
        if layer.writer.is_some() {
            layer.guard_tables();
        }
        Ok(OpenedLayer { layer: AnyLayer::Qcow2(layer), parent })
    }

    fn has_backing(&self) -> bool {
        self.header.backing.is_some()
    }

    fn cluster_bytes(&self) -> u64 {
        1 << self.kind.cluster_bits
    }
}

impl Layer for Qcow2 {
    fn sectors(&self) -> u64 {
        self.header.size_bytes / SECTOR_BYTES
    }

    fn map(&mut self, ctx: &mut Ctx, range: SectorRange) -> Step<(Found, u64)> {
        let found = self.map_range(ctx, range);
        self.note_damage(found)
    }

    fn prepare(&mut self, ctx: &mut Ctx, slot: u16, range: SectorRange) -> Step<WritePlan> {
        let plan = self.prepare_range(ctx, slot, range);
        self.changed(ctx, plan)
    }

    fn commit(&mut self, ctx: &mut Ctx, slot: u16) {
        self.commit_plan(ctx, slot);
    }

    fn abandon(&mut self, ctx: &mut Ctx, slot: u16) {
        self.abandon_plan(ctx, slot);
    }

    fn discard(&mut self, ctx: &mut Ctx, range: SectorRange, zero: bool) -> Step<DiscardPlan> {
        let plan = self.discard_range(ctx, range, zero);
        self.changed(ctx, plan)
    }

    fn ready(&mut self, ctx: &mut Ctx) -> Step<()> {
        if self.writer.is_some() {
            self.measure_snapshots(ctx)?;
            self.guard_tables();
            self.rebuild(ctx)?;
            self.fill_filter(ctx)?;
        }
        Ok(())
    }

    fn resize(&mut self, ctx: &mut Ctx, sectors: u64) -> Step<ResizePlan> {
        self.grow(ctx, sectors)
    }

    fn flushed(&mut self, _ctx: &mut Ctx, ok: bool) {
        if let Some(writer) = self.writer.as_mut().filter(|_| ok) {
            writer.space.frees.flushed();
            writer.awaits_flush = false;
        }
    }

    fn finish(&mut self, ctx: &mut Ctx) -> Step<()> {
        match self.writer.as_ref().is_some_and(|writer| writer.damage.is_some()) {
            // It was told to whoever met it.
            true => match self.mark_damage(ctx) {
                Err(Stop::Fault(_)) => Ok(()),
                other => other,
            },
            false => {
                self.finish_unused(ctx)?;
                self.complete_end(ctx)
            }
        }
    }

    fn unpacked_bytes(&self) -> u32 {
        if self.kind.data_file { 0 } else { self.cluster_bytes() as u32 }
    }

    fn unpacks_zstd(&self) -> bool {
        self.header.zstd
    }

    fn note(&self) -> Option<&'static str> {
        if self.header.size_bytes.is_multiple_of(SECTOR_BYTES) {
            return None;
        }
        Some("the size is not a multiple of 512 bytes: the last partial sector is not served")
    }

    fn details(&self) -> Details {
        let header = &self.header;
        let mut features = vec![];
        let mut name = |on: bool, name| {
            if on {
                features.push(name);
            }
        };
        name(header.compatible & header::COMPATIBLE_LAZY_REFCOUNTS != 0, "lazy refcounts");
        name(header.zstd, "zstd compression");
        name(header.extended_l2(), "extended L2 entries");
        name(header.data_file(), "external data file");
        name(header.autoclear & header::AUTOCLEAR_DATA_FILE_RAW != 0, "raw external data");
        name(self.bitmaps > 0, "bitmaps");
        Details {
            variant: if self.kind.v3 { "v3" } else { "v2" },
            cluster_bytes: self.cluster_bytes(),
            features,
            figures: vec![
                ("refcount_bits", 1 << header.refcount_order),
                ("bitmaps", self.bitmaps.into()),
            ],
            names: vec![],
            dirty: header.incompatible & header::INCOMPATIBLE_DIRTY != 0,
            corrupt: header.incompatible & header::INCOMPATIBLE_CORRUPT != 0,
            snapshots: header.snapshots,
        }
    }
}

impl Inspect for Qcow2 {
    fn check_begin(&mut self, ctx: &mut Ctx, params: CheckParams) -> Result<(), ImageFault> {
        self.begin_check(ctx, params, true)
    }

    fn check_step(&mut self, ctx: &mut Ctx) -> Step<CheckProgress> {
        self.step_check(ctx)
    }

    fn snapshot(&mut self, ctx: &mut Ctx, n: u32) -> Step<Option<SnapshotInfo>> {
        self.snapshot_info(ctx, n)
    }
}
