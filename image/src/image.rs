//! One disk image: a chain of layers behind one map.
//!
//! The image answers and never acts: each planner call is straight-line code that either
//! answers or stops with the reason ([`Stop`]). The caller does the I/O and calls again.
//! Order guarded: a mapping becomes visible only by [`Image::commit`], durable only by a flush,
//! and while a flush is under way nothing is committed (the caller waits for
//! [`Image::flushing`] to end).

use alloc::string::String;
use alloc::vec::Vec;

use crate::check::{CheckParams, CheckProgress};
use crate::fault::{FaultKind, ImageFault};
use crate::files::{Access, FileInfo, Files};
use crate::format::{AnyLayer, Ctx, Format, Found, Own, Parent};
use crate::info::{LayerInfo, SnapshotInfo};
use crate::memory::{self, LACK};
use crate::merge::TopExtent;
use crate::meta::Meta;
use crate::resolve::{Hit, Resolved};
use crate::types::{
    BlockRef, DiscardPlan, Extent, FileNo, FlushStep, Place, Prepared, ResizePlan, SectorRange,
    Step, Stop, WritePlan,
};
use crate::unpack::{Apart, PackedCluster, Unpacker};

/// Writes prepared and not yet committed, per image.
pub const PLANS_MAX: usize = 64;
/// Longest chain of images (ours; crosvm stops at 10, QEMU nowhere).
pub const DEPTH_MAX: usize = 1001;
/// Chain walks kept between retries: more than requests that miss at once.
const WALKS: usize = 16;

/// How to open an image. All of it comes from the configuration.
#[derive(Clone, Debug)]
pub struct Options {
    pub format: Format,
    pub access: Access,
    /// Other files that the image names may be opened, within the same directory tree.
    pub allow_names: bool,
    /// Memory for cached metadata, bytes, or less where there is less: all that this image will
    /// ever hold, but for as much again for the index of a chain, some hundred bytes for each of
    /// its layers, and, for compressed formats, one or two clusters and a decoder (130 KiB for
    /// zstd). A dirty qcow2 takes up to 1 MiB more while it is opened for writing.
    pub budget_bytes: usize,
    /// Freshness for identifiers that a format wants new (VMDK CID, VHDX GUIDs).
    pub seed: u64,
}

/// What `open_step` asks for next.
#[derive(Debug)]
pub enum OpenStep {
    /// Open this file, relative to the directory of `named_by`, and call
    /// [`Image::file_opened`], or give up on the image.
    File { file: FileNo, named_by: FileNo, name: String, access: Access },
    /// The image can be used.
    Ready,
}

/// A write in flight: the sectors it writes, and those whose place it changes.
#[derive(Clone, Copy)]
struct Plan {
    range: SectorRange,
    moved: SectorRange,
}

/// Where a chain walk got to, so that a retry after a miss goes on from there.
#[derive(Clone, Copy)]
struct Walk {
    range: SectorRange,
    layer: u16,
}

/// How far the index of a chain answers a question.
enum Located {
    Known(Extent),
    /// No layer above this one has anything in this range.
    Search(SectorRange, u16),
}

/// A note on an image with large clusters, of which some may be packed.
const NO_UNPACKING: &str =
    "not enough memory to unpack compressed clusters, which cannot be read: raise memory=";

/// What layers work with, borrowed field by field so that the layers themselves stay free.
macro_rules! ctx {
    ($image:expr) => {
        Ctx {
            meta: &mut $image.meta,
            files: &mut $image.files,
            seed: $image.options.seed,
            for_check: $image.for_check,
        }
    };
}

pub struct Image {
    options: Options,
    files: Files,
    meta: Meta,
    unpacker: Unpacker,
    resolved: Resolved,
    layers: Vec<AnyLayer>,
    /// Of each layer: its file, its format and the file below as it names it.
    origins: Vec<(FileNo, Format, Option<Parent>)>,
    /// Only the top file is opened: what lies below it reads as zeros, nothing is written.
    alone: bool,
    /// The top file is opened to be checked: never to be read by a guest.
    for_check: bool,
    /// The layer to open next: its file and format; `None` when the chain is complete.
    next: Option<(FileNo, Format)>,
    /// Only its suffix says that the next one is raw.
    is_raw_by_suffix: bool,
    plans: [Option<Plan>; PLANS_MAX],
    walks: [Option<Walk>; WALKS],
    walk_clock: usize,
    sync_cursor: Option<u16>,
    /// The layer opened last still has to get ready.
    unready: bool,
    /// In a flush: the layer has nothing more of its own in this phase, and whether it had.
    own_done: bool,
    own_written: bool,
}

impl Image {
    /// Starts opening; drive it with [`Image::open_step`]. `name` is for messages.
    pub fn begin(name: &str, info: FileInfo, options: Options) -> Image {
        // A raw image has no tables. That there is no memory is said by the first step.
        let raw = options.format == Format::Raw;
        let meta = Meta::new(if raw { 0 } else { options.budget_bytes });
        Image {
            files: Files::new(name, options.access, info, options.allow_names),
            meta: meta.unwrap_or_else(|_| Meta::none()),
            unpacker: Unpacker::none(),
            resolved: Resolved::none(),
            layers: Vec::new(),
            origins: Vec::new(),
            alone: false,
            for_check: false,
            next: Some((FileNo(0), options.format)),
            is_raw_by_suffix: false,
            plans: [None; PLANS_MAX],
            walks: [None; WALKS],
            walk_clock: 0,
            sync_cursor: None,
            unready: false,
            own_done: false,
            own_written: false,
            options,
        }
    }

    /// Like [`Image::begin`], but nothing below the top file is opened: what it does not hold
    /// reads as zeros. For looking at an image, never for serving it: access is read-only.
    pub fn begin_alone(name: &str, info: FileInfo, options: Options) -> Image {
        let options = Options { access: Access::ReadOnly, ..options };
        Image { alone: true, ..Image::begin(name, info, options) }
    }

    /// Like [`Image::begin`], for a check and nothing else: what a repair could make anew may be
    /// missing in the top file.
    pub fn begin_check(name: &str, info: FileInfo, options: Options) -> Image {
        Image { for_check: true, ..Image::begin(name, info, options) }
    }

    /// Opens the next part. `Stop` is handled as for any planner; a fault ends the attempt.
    pub fn open_step(&mut self) -> Step<OpenStep> {
        loop {
            if let Some((file, wanted)) = self.files.wanted() {
                return Ok(OpenStep::File {
                    file,
                    named_by: wanted.named_by,
                    name: wanted.name.clone(),
                    access: wanted.access,
                });
            }
            let step = if self.unready { self.get_ready() } else { self.open_next() };
            match step {
                Ok(true) => break,
                Ok(false) => {}
                // It waits for a file to be opened.
                Err(Stop::Busy) if self.files.wanted().is_some() => {}
                Err(stop) => return Err(stop),
            }
        }
        // All that serving will need is taken now.
        let unpacked = self.layers.iter().map(|l| l.get_ref().unpacked_bytes()).max();
        let zstd = self.layers.iter().any(|l| l.get_ref().unpacks_zstd());
        self.unpacker = Unpacker::new(unpacked.unwrap_or(0) as usize, zstd);
        if let Some(lack) = self.unpacker.lack()
            && self.layers.iter().any(|l| l.get_ref().packs_all())
        {
            return Err(lack.into());
        }
        if self.layers.len() > 1 {
            let grains = self.layers.iter().map(|l| l.get_ref().details().cluster_bytes);
            let grain = grains.filter(|&bytes| bytes > 0).min().unwrap_or(u64::MAX);
            let grain_sectors = grain / crate::types::SECTOR_BYTES;
            self.resolved = Resolved::new(self.options.budget_bytes, grain_sectors)?;
        }
        Ok(OpenStep::Ready)
    }

    /// Opens the next layer; true when there is none.
    fn open_next(&mut self) -> Step<bool> {
        if self.meta.capacity_bytes() == 0 || !memory::is_left(memory::SPARE_BYTES / 2) {
            return Err(LACK.into());
        }
        let Some((file, format)) = self.next else { return Ok(true) };
        let access = if self.layers.is_empty() { self.options.access } else { Access::ReadOnly };
        self.files.check_size(file)?;
        if self.is_raw_by_suffix {
            self.check_raw(file)?;
        }
        let mut ctx = ctx!(self);
        ctx.for_check &= self.layers.is_empty();
        let opened = AnyLayer::open(&mut ctx, format, file, access)?;
        self.check_parent(file, &opened.layer)?;
        self.layers.push(opened.layer);
        self.origins.push((file, format, opened.parent));
        self.next = None;
        self.unready = true;
        Ok(false)
    }

    /// Gets the layer opened last ready and finds the file below it.
    fn get_ready(&mut self) -> Step<bool> {
        let layer = self.layers.last_mut().expect("a layer was opened").get();
        layer.ready(&mut ctx!(self))?;
        let (file, _, parent) = self.origins.last_mut().expect("a layer has an origin");
        if parent.is_none() {
            *parent = layer.late_parent();
        }
        if let (Some(parent), false) = (parent, self.alone) {
            let format = parent.format.or_else(|| Format::by_suffix(&parent.name));
            let Some(format) = format else {
                let why = "the format of the backing file is not given and its name has no \
                           known suffix";
                return Err(ImageFault::new(FaultKind::Refused, *file, why).into());
            };
            if self.layers.len() >= DEPTH_MAX {
                let depth = DEPTH_MAX as u64;
                return Err(ImageFault::limit(*file, "chain depth", depth + 1, depth).into());
            }
            let below = self.files.open(*file, &parent.name, Access::ReadOnly)?;
            self.is_raw_by_suffix = parent.format.is_none() && format == Format::Raw;
            self.next = Some((below, format));
        }
        self.unready = false;
        Ok(false)
    }

    /// Tools that give no format for the file below find it out from its content. Here that
    /// decides nothing, but what they would take for another format must not be read as raw.
    fn check_raw(&mut self, file: FileNo) -> Step<()> {
        let mut first = [0; crate::types::SECTOR_BYTES as usize];
        ctx!(self).read(file, 0, &mut first)?;
        if Format::marked(&first).is_none() {
            return Ok(());
        }
        let why = "the format of the backing file is not given, its suffix says raw, and it \
                   starts like an image of another format";
        Err(ImageFault::new(FaultKind::Refused, file, why).into())
    }

    /// Is `below`, just opened, the parent that the last layer was made on?
    fn check_parent(&mut self, file: FileNo, below: &AnyLayer) -> Result<(), ImageFault> {
        let accepted = match self.layers.last_mut() {
            Some(child) => child.get().accepts_parent(below.get_ref().identity()),
            None => true,
        };
        if accepted {
            return Ok(());
        }
        let why = "the parent is not the image, or not in the state, that the child was made on";
        Err(ImageFault::new(FaultKind::Refused, file, why))
    }

    /// What the owner of the files should know: the file's number and the remark.
    pub fn notes(&self) -> impl Iterator<Item = (usize, &'static str)> {
        let lack = self.unpacker.lack().map(|_| (0, NO_UNPACKING));
        let layers = self.layers.iter().enumerate();
        layers.filter_map(|(i, l)| Some((i, l.get_ref().note()?))).chain(lack)
    }

    /// The caller opened the file that `open_step` asked for.
    pub fn file_opened(&mut self, file: FileNo, info: FileInfo) -> Result<(), ImageFault> {
        let twice = self
            .files
            .iter()
            .any(|(_, other)| other.info.is_some_and(|i| i.identity == info.identity));
        if twice {
            let why = "one file stands twice in the chain";
            return Err(ImageFault::new(FaultKind::Refused, file, why));
        }
        self.files.opened(file, info);
        Ok(())
    }

    /// Size of the disk in 512-byte sectors.
    pub fn sectors(&mut self) -> u64 {
        self.top().sectors()
    }

    /// Layers in the chain, 1 for an image without backing.
    pub fn depth(&self) -> usize {
        self.layers.len()
    }

    /// What a child must name to mean this image.
    pub fn identity(&self) -> Option<u128> {
        self.layers.first().and_then(|layer| layer.get_ref().identity())
    }

    /// Each layer, the top first. Allocates: not for the request path.
    pub fn info(&self) -> Vec<LayerInfo> {
        let layers = self.layers.iter().map(AnyLayer::get_ref).zip(&self.origins);
        let info = layers.map(|(layer, (file, format, parent))| LayerInfo {
            file: *file,
            format: *format,
            sectors: layer.sectors(),
            identity: layer.identity(),
            backing: parent.as_ref().map(|p| (p.name.clone(), p.format)),
            note: layer.note(),
            details: layer.details(),
        });
        info.collect()
    }

    /// Internal snapshot number `n` of the top layer, `None` past the last.
    pub fn snapshot(&mut self, n: u32) -> Step<Option<SnapshotInfo>> {
        let mut ctx = ctx!(self);
        self.layers[0].inspect().snapshot(&mut ctx, n)
    }

    /// Makes the disk longer. Then grow the file if the plan says so, and flush. Not during a
    /// flush; from the first call until it answers no read or write may be under way, for tables
    /// and blocks move step by step.
    pub fn resize(&mut self, sectors: u64) -> Step<ResizePlan> {
        self.check_writable()?;
        if self.flushing() || self.plans.iter().any(Option::is_some) {
            return Err(Stop::Busy);
        }
        let now = self.top().sectors();
        if sectors < now {
            let what = "a smaller size (images only grow)";
            return Err(ImageFault::unsupported(FileNo(0), what, sectors).into());
        }
        if self.layers.get(1).is_some_and(|below| below.get_ref().sectors() > now) {
            let what = "growing a disk over a longer backing file, whose end would show";
            return Err(ImageFault::unsupported(FileNo(0), what, sectors).into());
        }
        if sectors > u64::MAX / crate::types::SECTOR_BYTES {
            let limit = u64::MAX / crate::types::SECTOR_BYTES;
            return Err(ImageFault::limit(FileNo(0), "sectors", sectors, limit).into());
        }
        self.resolved.forget_all();
        let mut ctx = ctx!(self);
        self.layers[0].get().resize(&mut ctx, sectors)
    }

    /// Whoever owns a file that we cannot grow (a device) has made it longer: there is room for
    /// [`resize`](Self::resize) now.
    pub fn file_grew(&mut self, file: FileNo, size_bytes: u64) {
        self.files.grow(file, size_bytes.min(crate::files::SIZE_BYTES_MAX));
    }

    /// Starts a check of the top layer, with nothing else in flight; repair needs an image
    /// opened for writing.
    pub fn check_begin(&mut self, params: CheckParams) -> Result<(), ImageFault> {
        if params.repair != crate::check::Repair::Nothing {
            self.check_writable()?;
        }
        assert!(self.plans.iter().all(Option::is_none), "a check with writes in flight");
        let mut ctx = ctx!(self);
        self.layers[0].inspect().check_begin(&mut ctx, params)
    }

    /// The next part of the check; handle stops as for any planner, and do what it asks for.
    /// Flush after the last.
    pub fn check_step(&mut self) -> Step<CheckProgress> {
        let mut ctx = ctx!(self);
        let progress = self.layers[0].inspect().check_step(&mut ctx)?;
        if matches!(progress, CheckProgress::Copy { .. }) {
            // What the index of the chain says of places is over.
            self.resolved.forget_all();
        }
        Ok(progress)
    }

    fn check_writable(&self) -> Result<(), ImageFault> {
        match self.options.access {
            Access::ReadWrite => Ok(()),
            Access::ReadOnly => Err(crate::format::read_only(FileNo(0), "the disk is read-only")),
        }
    }

    /// The first piece of `range`, as the image reads now.
    pub fn map_read(&mut self, range: SectorRange) -> Step<Extent> {
        match self.locate(range)? {
            Located::Known(extent) => Ok(extent),
            Located::Search(range, layer) => self.walk(range, layer),
        }
    }

    /// Like [`Image::map_read`], but compressed clusters are left to the caller, who may unpack
    /// many at once. Nothing may be written to the image until they are read.
    pub fn map_apart(&mut self, range: SectorRange) -> Step<Apart> {
        let (range, layer) = match self.locate(range)? {
            Located::Known(extent) => return Ok(Apart::Extent(extent)),
            Located::Search(range, layer) => (range, layer),
        };
        let (found, sectors, at) = self.search(range, layer)?;
        self.walks[at] = None;
        Ok(match found {
            Found::Packed(packed) => Apart::Packed { sectors, cluster: PackedCluster::new(packed) },
            Found::Data { file, offset } => {
                Apart::Extent(Extent { sectors, place: Place::File { file, offset } })
            }
            Found::Zero | Found::Absent => Apart::Extent(Extent { sectors, place: Place::Zero }),
        })
    }

    /// What the index of the chain knows of the start of `range`.
    fn locate(&mut self, range: SectorRange) -> Step<Located> {
        self.check_range(range)?;
        if self.layers.len() == 1 {
            return Ok(Located::Search(range, 0));
        }
        let mut hit = self.resolved.find(range);
        if hit.is_none() {
            let mut ctx = ctx!(self);
            // If a walk for others is under way, this one goes alone.
            self.resolved.resolve(&mut ctx, &mut self.layers, range.start)?;
            hit = self.resolved.find(range);
        }
        Ok(match hit {
            Some(Hit::Extent(extent)) => Located::Known(extent),
            Some(Hit::Layer(layer, range)) => Located::Search(range, layer),
            None => Located::Search(range, 0),
        })
    }

    /// The first piece of `range`, given that no layer above `from` has anything in it.
    fn walk(&mut self, range: SectorRange, from: u16) -> Step<Extent> {
        let (found, sectors, at) = self.search(range, from)?;
        let place = match found {
            Found::Data { file, offset } => Place::File { file, offset },
            Found::Zero | Found::Absent => Place::Zero,
            Found::Packed(packed) => {
                let start = self.unpacker.get(&packed)?;
                Place::Memory { offset: start + packed.skip as usize }
            }
        };
        self.walks[at] = None;
        Ok(Extent { sectors, place })
    }

    /// What the first layer from `from` on has that has anything, so many sectors of it, and
    /// the walk that is kept until the caller has got its answer.
    fn search(&mut self, range: SectorRange, from: u16) -> Step<(Found, u64, usize)> {
        let (mut walk, at) = self.walk_for(range);
        walk.layer = walk.layer.max(from);
        loop {
            let depth = self.layers.len();
            let layer = self.layers[walk.layer as usize].get();
            let mut ctx = ctx!(self);
            let visible = layer.sectors().saturating_sub(walk.range.start);
            let found = if visible == 0 {
                // A layer shorter than the one above reads as zeros past its end.
                Ok((Found::Zero, walk.range.count))
            } else {
                layer.map(&mut ctx, walk.range.prefix(visible))
            };
            self.walks[at] = Some(walk);
            let (found, sectors) = found?;
            assert!(sectors > 0 && sectors <= walk.range.count);
            if found != Found::Absent || walk.layer as usize + 1 >= depth {
                return Ok((found, sectors, at));
            }
            walk = Walk { range: walk.range.prefix(sectors), layer: walk.layer + 1 };
        }
    }

    /// What the top layer itself holds of the first piece of `range`.
    pub fn map_top(&mut self, range: SectorRange) -> Step<TopExtent> {
        self.check_range(range)?;
        let (found, sectors) = self.layers[0].get().map(&mut ctx!(self), range)?;
        let place = match found {
            Found::Data { file, offset } => Some(Place::File { file, offset }),
            Found::Zero => Some(Place::Zero),
            Found::Absent => None,
            Found::Packed(packed) => {
                let at = self.unpacker.get(&packed)?;
                Some(Place::Memory { offset: at + packed.skip as usize })
            }
        };
        Ok(TopExtent { sectors, place })
    }

    /// Reserves for a write of the first piece of `range`. The plan must be carried out and
    /// committed, or abandoned.
    pub fn prepare_write(&mut self, range: SectorRange) -> Step<WritePlan> {
        self.check_range(range)?;
        self.check_writable()?;
        let overlap = |p: &Plan| p.range.start < range.end() && range.start < p.range.end();
        if self.plans.iter().flatten().any(overlap) {
            return Err(Stop::Busy);
        }
        let Some(slot) = self.plans.iter().position(Option::is_none) else {
            return Err(Stop::Busy);
        };
        let mut ctx = ctx!(self);
        let plan = self.layers[0].get().prepare(&mut ctx, slot as u16, range)?;
        assert!(plan.sectors > 0 && plan.sectors <= range.count);
        // Head and tail move with the written sectors, and with them where they are read.
        let start = plan.head.map_or(range.start, |head| head.start);
        let end = plan.tail.map_or(range.start + plan.sectors, SectorRange::end);
        self.plans[slot] = Some(Plan {
            range: range.prefix(plan.sectors),
            moved: SectorRange::new(start, end - start),
        });
        Ok(plan)
    }

    /// The plan's bytes are written: its mapping becomes visible. Not during a flush.
    pub fn commit(&mut self, prepared: Prepared) {
        assert!(!self.flushing(), "a commit during a flush");
        let plan = self.plans[prepared.slot as usize].take().expect("a plan in flight");
        let mut ctx = ctx!(self);
        self.layers[0].get().commit(&mut ctx, prepared.slot);
        self.forget_walks(plan.moved);
    }

    /// The plan could not be carried out.
    pub fn abandon(&mut self, prepared: Prepared) {
        self.plans[prepared.slot as usize].take().expect("a plan in flight");
        let mut ctx = ctx!(self);
        self.layers[0].get().abandon(&mut ctx, prepared.slot);
    }

    /// Lets go of the first piece of `range` (`zero` false: may read as anything that was
    /// there; true: must read as zeros, and `sectors` 0 in the answer means: write zeros).
    /// Not during a flush, and not while reads or writes of the range are in flight.
    pub fn discard(&mut self, range: SectorRange, zero: bool) -> Step<DiscardPlan> {
        self.check_range(range)?;
        self.check_writable()?;
        let overlap = |p: &Plan| p.range.start < range.end() && range.start < p.range.end();
        if self.flushing() || self.plans.iter().flatten().any(overlap) {
            return Err(Stop::Busy);
        }
        let mut ctx = ctx!(self);
        let plan = self.layers[0].get().discard(&mut ctx, range, zero)?;
        self.forget_walks(range);
        Ok(plan)
    }

    /// Takes in bytes that a `Miss` asked for.
    pub fn fill(&mut self, block: BlockRef, bytes: &[u8]) {
        self.resolved.filled(block);
        self.unpacker.fill(block, bytes);
        self.meta.fill(block, bytes);
    }

    /// The read that a `Miss` asked for failed.
    pub fn fill_failed(&mut self, block: BlockRef) {
        self.resolved.fill_failed(block);
        self.fill_put_off(block);
    }

    /// The read that a `Miss` asked for was not made: it will be asked for again.
    pub fn fill_put_off(&mut self, block: BlockRef) {
        self.unpacker.fill_failed(block);
        self.meta.fill_failed(block);
    }

    /// Bytes of a [`Place::Memory`].
    pub fn bytes(&self, offset: usize, len: usize) -> &[u8] {
        self.unpacker.bytes(offset, len)
    }

    /// Longest stretch that a `Miss` of this open image asks for, bytes.
    pub fn miss_bytes_max(&self) -> u32 {
        self.unpacker.miss_bytes_max().max(crate::meta::BLOCK_BYTES as u32)
    }

    /// Metadata waits to be written.
    pub fn is_dirty(&self) -> bool {
        self.meta.is_dirty() || self.layers.first().is_some_and(|l| l.get_ref().is_dirty())
    }

    /// A flush is under way: no commit, no discard.
    pub fn flushing(&self) -> bool {
        self.meta.flushing()
    }

    /// Starts a flush: data sync, then each phase of metadata with a sync after it.
    pub fn flush_begin(&mut self) {
        self.meta.flush_begin();
        self.sync_cursor = Some(0);
        (self.own_done, self.own_written) = (false, false);
    }

    /// The next step of the flush.
    pub fn flush_step(&mut self) -> FlushStep<'_> {
        loop {
            if let Some(from) = self.sync_cursor {
                let next = self
                    .files
                    .iter()
                    .skip(from as usize)
                    .find(|(_, file)| file.access == Access::ReadWrite && file.info.is_some());
                if let Some((file, _)) = next {
                    self.sync_cursor = Some(file.0 + 1);
                    return FlushStep::Sync { file };
                }
                self.sync_cursor = None;
            }
            if !self.own_done {
                let phase = self.meta.phase();
                let mut ctx = ctx!(self);
                match self.layers[0].get().flush_own(&mut ctx, phase) {
                    Own::Write { file, offset } => {
                        self.own_written = true;
                        let bytes = self.layers[0].get_ref().own_bytes();
                        return FlushStep::Write { file, offset, bytes };
                    }
                    Own::Sync => {
                        self.sync_cursor = Some(0);
                        continue;
                    }
                    Own::Nothing => self.own_done = true,
                }
            }
            if self.meta.phase_dirty() {
                let (file, offset, bytes) = self.meta.flush_next().expect("a dirty unit");
                return FlushStep::Write { file, offset, bytes };
            }
            if self.meta.phase_written() || self.own_written {
                self.sync_cursor = Some(0);
            }
            (self.own_done, self.own_written) = (false, false);
            if !self.meta.flush_next_phase() && self.sync_cursor.is_none() {
                return FlushStep::Done;
            }
        }
    }

    /// The flush is over: all steps done, or one failed.
    pub fn flush_end(&mut self, ok: bool) {
        self.meta.flush_end(ok);
        self.sync_cursor = None;
        let mut ctx = ctx!(self);
        self.layers[0].get().flushed(&mut ctx, ok);
    }

    /// Before closing a writable image: marks it clean; then flush once more.
    pub fn finish(&mut self) -> Step<()> {
        let mut ctx = ctx!(self);
        self.layers[0].get().finish(&mut ctx)
    }

    fn top(&mut self) -> &mut dyn crate::format::Layer {
        self.layers[0].get()
    }

    fn check_range(&mut self, range: SectorRange) -> Result<(), ImageFault> {
        let sectors = self.top().sectors();
        if range.end() > sectors {
            let fault = ImageFault::new(FaultKind::OutOfRange, FileNo(0), "sector");
            return Err(ImageFault { value: range.end(), limit: sectors, ..fault });
        }
        Ok(())
    }

    /// The walk kept for this range from an earlier try, else a new one from the top.
    fn walk_for(&mut self, range: SectorRange) -> (Walk, usize) {
        let kept = self.walks.iter().position(|w| {
            w.is_some_and(|w| w.range.start == range.start && w.range.count <= range.count)
        });
        if let Some(at) = kept {
            return (self.walks[at].expect("just found"), at);
        }
        let at = self.walks.iter().position(Option::is_none).unwrap_or(self.walk_clock);
        self.walk_clock = (at + 1) % WALKS;
        (Walk { range, layer: 0 }, at)
    }

    fn forget_walks(&mut self, range: SectorRange) {
        self.resolved.forget(range);
        for walk in &mut self.walks {
            if walk.is_some_and(|w| w.range.start < range.end() && range.start < w.range.end()) {
                *walk = None;
            }
        }
    }
}
