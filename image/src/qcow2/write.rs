//! Writes: which host bytes a guest write goes to, and what its commit changes.
//!
//! Order guarded: counts of new clusters are raised by `prepare`, tables are changed by `commit`
//! alone, old clusters are given to [`Frees`](super::refcount::Frees), which waits for a flush. A
//! new L2 table is zeroed or copied by a prelude of the plan, so that no entry of it is ever
//! foreign. It must never answer a place within the header or a table that the header names.

use crate::fault::ImageFault;
use crate::files::Access;
use crate::format::{Ctx, read_only};
use crate::image::PLANS_MAX;
use crate::meta::{BLOCK_BYTES, Phase};
use crate::types::{
    PRELUDES_MAX, Prelude, Prepared, SECTOR_BYTES, SectorRange, Step, Stop, WritePlan,
};

use super::Qcow2;
use super::end::End;
use super::entry::{COMPRESSED, COPIED, Cluster, L2Entry};
use super::header::{
    AUTOCLEAR_DATA_FILE_RAW, INCOMPATIBLE_CORRUPT, INCOMPATIBLE_DIRTY, Stretch, field,
};
use super::map::{L2, Subcluster};
use super::overlap::{BEYOND_FILE, Compared, Filter};
use super::refcount::{Run, Space};
use super::resize::Growth;
use super::spare::Spare;

/// Clusters of one plan at most (ours): bounds the work of a commit.
pub(super) const PLAN_CLUSTERS_MAX: u64 = 256;
/// Stretches that no guest write may touch: header, L1 table, refcount table, snapshot table,
/// bitmap directory.
const GUARDED: usize = 5;

/// What only a writable image needs, in one place made at open.
pub(super) struct Writer {
    plans: [Plan; PLANS_MAX],
    pub space: Space,
    pub end: End,
    guarded: [Stretch; GUARDED],
    /// Something that must be durable before anything else is written is not yet.
    pub awaits_flush: bool,
    /// Changes of the active L1 table so far, and a longer one that is being made.
    pub l1_changes: u64,
    pub growth: Option<Growth>,
    pub spare: Spare,
    /// L1 entries beyond the disk's end that are known to be empty, up to this one.
    pub empty_to: u64,
    /// Clusters that hold L2 tables and refcount blocks.
    pub tables: Filter,
    pub compared: Compared,
    /// A break of the format that was met and is not marked yet.
    pub damage: Option<ImageFault>,
}

/// What the commit of a plan will do.
#[derive(Clone, Copy, Debug, Default)]
struct Plan {
    state: PlanState,
    /// First guest byte and count of the clusters whose entries change.
    guest: u64,
    clusters: u64,
    /// Their first host byte.
    host: u64,
    /// The clusters are new: given back if the plan is abandoned.
    fresh: bool,
    /// Guest bytes that will be valid in the host clusters, for subclusters.
    valid_from: u64,
    valid_to: u64,
    /// Offset of the first entry to change; its block is pinned.
    entry_at: u64,
    /// A new L2 table to be hung into the L1 table (whose block is pinned), and the one it
    /// replaces; 0 for none.
    new_l2: u64,
    old_l2: u64,
    /// Places reserved among the frees.
    frees: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum PlanState {
    #[default]
    Free,
    /// Data goes where it already lies: nothing to commit.
    InPlace,
    Mapping,
}

/// What a write of (part of) one cluster needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Need {
    /// Nothing but the data, at this host cluster.
    InPlace(u64),
    /// This host cluster is used, and the entry changes.
    Keep(u64),
    /// A new host cluster.
    Fresh,
}

/// One cluster of a write.
#[derive(Clone, Copy, Debug)]
struct Piece {
    need: Need,
    /// Guest bytes to copy before and after what is written of this cluster.
    head: u64,
    tail: u64,
    /// What is copied reads as zeros now.
    zeros: bool,
    /// A cluster (or two, compressed) loses a reference.
    frees: bool,
}

impl Writer {
    pub fn new(space: Space, end: End) -> Writer {
        Writer {
            plans: [Plan::default(); PLANS_MAX],
            space,
            end,
            guarded: [Stretch::default(); GUARDED],
            awaits_flush: false,
            empty_to: 0,
            l1_changes: 0,
            growth: None,
            spare: Spare::None,
            tables: Filter::new(),
            compared: Compared::default(),
            damage: None,
        }
    }

    /// Do these bytes touch a table that the header names?
    pub fn overlaps_guarded(&self, offset: u64, bytes: u64) -> bool {
        let end = offset.saturating_add(bytes);
        let hit = |s: &Stretch| offset < s.offset.saturating_add(s.bytes) && s.offset < end;
        self.guarded.iter().any(hit)
    }

    /// Is a write prepared and not yet committed?
    pub fn in_flight(&self) -> bool {
        self.plans.iter().any(|plan| plan.state != PlanState::Free)
    }

    fn mapping_plans(&self) -> impl Iterator<Item = &Plan> {
        self.plans.iter().filter(|plan| plan.state == PlanState::Mapping)
    }
}

impl Qcow2 {
    pub(super) fn writer(&self) -> &Writer {
        self.writer.as_deref().expect("only a writable image gets here")
    }

    pub(super) fn writer_mut(&mut self) -> &mut Writer {
        self.writer.as_deref_mut().expect("only a writable image gets here")
    }

    /// Notes anew where the tables of the header lie.
    pub(super) fn guard_tables(&mut self) {
        let header = &self.header;
        let stretch = |offset, bytes: u64| Stretch { offset, bytes };
        let snapshots = if header.snapshots > 0 { self.snapshot_table_bytes.max(1) } else { 0 };
        let guarded = [
            stretch(0, header.cluster_bytes()),
            stretch(header.l1_offset, u64::from(header.l1_entries) * 8),
            stretch(
                header.reftable_offset,
                u64::from(header.reftable_clusters) << header.cluster_bits,
            ),
            stretch(header.snapshots_offset, snapshots),
            self.bitmap_directory,
        ];
        self.writer_mut().guarded = guarded;
    }

    /// May guest data go to `len` bytes at `offset` of the image file?
    pub(super) fn check_host(&self, ctx: &Ctx, at: u64, offset: u64, len: u64) -> Step<()> {
        if self.kind.data_file {
            return Ok(());
        }
        let end = offset.saturating_add(len);
        let size = ctx.files.size(self.file).next_multiple_of(self.cluster_bytes());
        if end > size {
            return Err(ImageFault::corrupt(self.file, BEYOND_FILE, at, offset).into());
        }
        if self.writer().overlaps_guarded(offset, len) {
            let what = "an L2 entry that names metadata";
            return Err(ImageFault::corrupt(self.file, what, at, offset).into());
        }
        Ok(())
    }

    /// Does a run of clusters that count as free hold a table of the header?
    pub(super) fn check_run(&self, run: Run) -> Step<()> {
        let bits = self.kind.cluster_bits;
        let start = run.first << bits;
        if self.writer().overlaps_guarded(start, run.count << bits) {
            let what = "the refcount of a cluster that holds metadata";
            return Err(ImageFault::corrupt(self.file, what, start, 0).into());
        }
        Ok(())
    }

    fn check_writable(&self) -> Step<()> {
        if self.access == Access::ReadOnly {
            return Err(read_only(self.file, "the file is open read-only").into());
        }
        if self.header.incompatible & INCOMPATIBLE_CORRUPT != 0 {
            return Err(read_only(self.file, "the image is marked corrupt; check it").into());
        }
        if self.header.incompatible & INCOMPATIBLE_DIRTY != 0 {
            return Err(read_only(self.file, "the image is marked dirty; repair it").into());
        }
        if let Some(lost) = self.header.lost {
            return Err(lost.into());
        }
        Ok(())
    }

    /// What must be in the file before the first change: no autoclear bit for what is not kept
    /// up to date here (bitmaps among them).
    pub(super) fn before_change(&mut self, ctx: &mut Ctx) -> Step<()> {
        if self.writer.is_some() {
            self.mark_damage(ctx)?;
        }
        self.check_writable()?;
        self.writer_mut().end.changing();
        let kept = self.header.autoclear & AUTOCLEAR_DATA_FILE_RAW;
        if self.header.autoclear != kept {
            // A flush under way may be past the header: only one begun afterwards counts.
            if ctx.meta.flushing() {
                return Err(Stop::Busy);
            }
            let bytes = kept.to_be_bytes();
            ctx.meta.set(self.file, field::AUTOCLEAR, &bytes, Phase::HEADER)?;
            self.header.autoclear = kept;
            self.writer_mut().awaits_flush = true;
        }
        if self.writer().awaits_flush {
            return Err(Stop::NeedFlush);
        }
        if ctx.meta.flushing() { Ok(()) } else { self.drain_frees(ctx) }
    }

    pub(super) fn prepare_range(
        &mut self,
        ctx: &mut Ctx,
        slot: u16,
        range: SectorRange,
    ) -> Step<WritePlan> {
        self.before_change(ctx)?;
        let start = range.start_bytes();
        let l2_end = ((start >> self.l2_reach_bits()) + 1) << self.l2_reach_bits();
        let end = (start + range.bytes()).min(l2_end);
        let l2 = self.l2(ctx, start)?;
        self.wait_for_l2(start, l2)?;
        self.check_l2(start, l2)?;
        let first = self.write_piece(ctx, l2, start, end)?;
        let (mut pieces, mut last, frees) = self.join(ctx, l2, first, start, end)?;
        if let Need::InPlace(host) | Need::Keep(host) = first.need {
            let good = self.check_data(ctx, host, pieces)?;
            if good < pieces {
                // All of the last cluster is written now, unless it is the first one too.
                last = if good == 1 { first } else { Piece { tail: 0, ..last } };
                pieces = good;
            }
        }
        let cluster = start & !(self.cluster_bytes() - 1);
        let end = end.min(cluster + pieces * self.cluster_bytes());
        match first.need {
            Need::InPlace(host) => {
                // The file may end within the cluster: what is written beyond must be seen.
                ctx.files.grow(self.data, host + start % self.cluster_bytes() + (end - start));
                let plan = Plan { state: PlanState::InPlace, ..Plan::default() };
                self.writer_mut().plans[slot as usize] = plan;
                Ok(self.plan(slot, start, end, host, (0, 0), heapless::Vec::new()))
            }
            Need::Keep(host) => {
                let at = self.entry_offset(l2.expect("an entry was read"), start);
                ctx.meta.pin(self.file, at)?;
                ctx.files.grow(self.data, host + start % self.cluster_bytes() + (end - start));
                self.writer_mut().plans[slot as usize] = Plan {
                    state: PlanState::Mapping,
                    guest: cluster,
                    clusters: pieces,
                    host,
                    valid_from: start - first.head,
                    valid_to: end + last.tail,
                    entry_at: at,
                    ..Plan::default()
                };
                let copy = (first.head, last.tail);
                let preludes = self.zero_past_end(host, pieces, cluster, end + last.tail);
                Ok(self.plan(slot, start, end, host, copy, preludes))
            }
            Need::Fresh => {
                let want = Want {
                    slot,
                    start,
                    end,
                    l2,
                    first,
                    last,
                    clusters: pieces,
                    frees,
                    spare: None,
                };
                self.prepare_fresh(ctx, want)
            }
        }
    }

    /// Another plan is making or replacing the L2 table.
    pub(super) fn wait_for_l2(&self, guest: u64, l2: Option<L2>) -> Step<()> {
        if l2.is_some_and(|l2| l2.copied) {
            return Ok(());
        }
        let reach = self.l2_reach_bits();
        let same = |plan: &Plan| plan.new_l2 != 0 && plan.guest >> reach == guest >> reach;
        if self.writer().mapping_plans().any(same) { Err(Stop::Busy) } else { Ok(()) }
    }

    /// Is the entry of this cluster about to change?
    pub(super) fn is_held(&self, cluster: u64) -> bool {
        let held = |plan: &Plan| {
            cluster >= plan.guest && cluster - plan.guest < plan.clusters << self.kind.cluster_bits
        };
        self.writer().mapping_plans().any(held)
    }

    /// How many clusters from the first on can go into one plan, the last of them, and how many
    /// lose their old cluster.
    fn join(
        &self,
        ctx: &mut Ctx,
        l2: Option<L2>,
        first: Piece,
        start: u64,
        end: u64,
    ) -> Step<(u64, Piece, usize)> {
        let cluster = start & !(self.cluster_bytes() - 1);
        let mapping = !matches!(first.need, Need::InPlace(_));
        if mapping && self.is_held(cluster) {
            return Err(Stop::Busy);
        }
        let (mut count, mut last, mut frees) = (1, first, usize::from(first.frees));
        let block = |guest| l2.map(|l2| self.entry_offset(l2, guest) / BLOCK_BYTES);
        while count < PLAN_CLUSTERS_MAX {
            let next = cluster + count * self.cluster_bytes();
            // What is copied after the last piece cannot be followed by another.
            if next >= end || last.tail > 0 || block(next) != block(cluster) {
                break;
            }
            if mapping && self.is_held(next) {
                break;
            }
            let Ok(piece) = self.write_piece(ctx, l2, next, end) else { break };
            let distance = count * self.cluster_bytes();
            let joins = match (first.need, piece.need) {
                (Need::InPlace(a), Need::InPlace(b)) => a.checked_add(distance) == Some(b),
                (Need::Keep(a), Need::Keep(b)) => a.checked_add(distance) == Some(b),
                (Need::Fresh, Need::Fresh) => true,
                _ => false,
            };
            if !joins || piece.head > 0 || !self.writer().space.frees.room(frees + 4) {
                break;
            }
            (count, last, frees) = (count + 1, piece, frees + usize::from(piece.frees));
        }
        Ok((count, last, frees))
    }

    /// What a write of guest bytes `start` to at most `end` needs in the cluster of `start`.
    fn write_piece(&self, ctx: &mut Ctx, l2: Option<L2>, start: u64, end: u64) -> Step<Piece> {
        let size = self.cluster_bytes();
        let cluster = start & !(size - 1);
        let disk_end = self.header.size_bytes & !(SECTOR_BYTES - 1);
        let stop = end.min(cluster + size);
        let to_edges = |unit: u64| {
            let head = start % unit;
            let tail = (stop.next_multiple_of(unit)).min(disk_end).saturating_sub(stop);
            (head, tail)
        };
        let (at, entry) = match l2 {
            Some(l2) => {
                let at = self.entry_offset(l2, start);
                (at, self.entry(ctx, at)?)
            }
            None => (0, L2Entry { word: 0, bitmap: 0 }),
        };
        let owned = l2.is_some_and(|l2| l2.copied);
        let found = self.cluster(at, entry, start)?;
        let unit = if self.kind.extended { self.subcluster_bytes() } else { size };
        let (head, tail) = to_edges(size);
        let whole = Piece { need: Need::Fresh, head, tail, zeros: false, frees: true };
        match found {
            Cluster::Data { host, copied: true } if owned => {
                self.check_host(ctx, at, host, size)?;
                if self.kind.extended {
                    return Ok(self.subcluster_piece(
                        entry.bitmap,
                        host,
                        start,
                        stop,
                        to_edges(unit),
                    ));
                }
                Ok(Piece { need: Need::InPlace(host), head: 0, tail: 0, ..whole })
            }
            Cluster::Zero { host: Some(host), copied: true } if owned => {
                self.check_host(ctx, at, host, size)?;
                Ok(Piece { need: Need::Keep(host), frees: false, ..whole })
            }
            Cluster::Data { .. } | Cluster::Compressed { .. } => Ok(whole),
            Cluster::Zero { host: Some(_), .. } => Ok(Piece { zeros: true, ..whole }),
            Cluster::Zero { host: None, .. } | Cluster::Absent => {
                let (head, tail) = to_edges(unit);
                let zero = matches!(found, Cluster::Zero { .. }) && !self.kind.extended;
                let zeros = zero || !self.has_backing();
                Ok(Piece { need: Need::Fresh, head, tail, zeros, frees: false })
            }
        }
    }

    /// The same for a cluster with subclusters that is ours alone.
    fn subcluster_piece(
        &self,
        bitmap: u64,
        host: u64,
        start: u64,
        stop: u64,
        (head, tail): (u64, u64),
    ) -> Piece {
        let size = self.subcluster_bytes();
        let index = |guest: u64| ((guest % self.cluster_bytes()) / size) as u32;
        let (first, last) = (index(start), index(stop - 1));
        let allocated = |n| Subcluster::of(bitmap, n) == Subcluster::Allocated;
        let all = (first..=last).all(allocated);
        Piece {
            need: if all { Need::InPlace(host) } else { Need::Keep(host) },
            head: if allocated(first) { 0 } else { head },
            tail: if allocated(last) { 0 } else { tail },
            zeros: false,
            frees: false,
        }
    }

    /// Bytes of the last cluster that lie past the end of the disk are zeroed with it, so that
    /// a disk that grows later reads zeros there.
    fn zero_past_end(&self, host: u64, clusters: u64, guest: u64, valid_to: u64) -> Preludes {
        let mut preludes = Preludes::new();
        let end = guest + clusters * self.cluster_bytes();
        if valid_to < end && valid_to == self.header.size_bytes & !(SECTOR_BYTES - 1) {
            let (offset, len) = (host + (valid_to - guest), end - valid_to);
            let zero = Prelude::Zero { file: self.data, offset, len };
            preludes.push(zero).expect("room for one");
        }
        preludes
    }

    fn plan(
        &self,
        slot: u16,
        start: u64,
        end: u64,
        host: u64,
        (head, tail): (u64, u64),
        preludes: Preludes,
    ) -> WritePlan {
        let range = |from: u64, bytes: u64| {
            (bytes > 0).then(|| SectorRange::new(from / SECTOR_BYTES, bytes / SECTOR_BYTES))
        };
        WritePlan {
            prepared: Prepared { slot },
            sectors: (end - start) / SECTOR_BYTES,
            file: self.data,
            offset: host + start % self.cluster_bytes(),
            head: range(start.saturating_sub(head), head),
            tail: range(end, tail),
            preludes,
        }
    }
}

type Preludes = heapless::Vec<Prelude, PRELUDES_MAX>;

/// A write that needs new clusters.
#[derive(Clone, Copy, Debug)]
struct Want {
    slot: u16,
    start: u64,
    end: u64,
    l2: Option<L2>,
    first: Piece,
    last: Piece,
    clusters: u64,
    frees: usize,
    /// The cluster of a new L2 table, if it is not the first of the run.
    spare: Option<u64>,
}

impl Want {
    /// Places among the frees: for each old cluster and the old L2 table when committed, for the
    /// new clusters and the new L2 table when abandoned.
    fn places(&self) -> usize {
        (self.frees + 1).max(2)
    }
}

/// What is pinned so far, to be let go if the rest cannot be had.
struct Pins<const N: usize>(heapless::Vec<u64, N>);

impl Qcow2 {
    fn prepare_fresh(&mut self, ctx: &mut Ctx, mut want: Want) -> Step<WritePlan> {
        // Counts are raised here: in a flush that could come too late for its phase.
        if ctx.meta.flushing() {
            return Err(Stop::Busy);
        }
        if !self.writer().space.frees.room(want.places()) {
            return Err(Stop::NeedFlush);
        }
        let owned = want.l2.is_some_and(|l2| l2.copied);
        let data_here = !self.kind.data_file;
        let data = if data_here { want.clusters } else { 0 };
        let mut run = None;
        if !owned || data > 0 {
            let found = self.find_for_plan(ctx, !owned, data)?;
            run = Some(found);
            want.spare = self.writer().spare.cluster().filter(|_| !owned);
            if data_here {
                let got = found.count - u64::from(!owned && want.spare.is_none());
                if got < want.clusters {
                    want = self.shorten(ctx, want, got)?;
                }
            }
        }
        self.reserve_fresh(ctx, want, run)
    }

    /// The same write for its first `clusters` clusters.
    fn shorten(&self, ctx: &mut Ctx, want: Want, clusters: u64) -> Step<Want> {
        let cluster = want.start & !(self.cluster_bytes() - 1);
        let end = cluster + clusters * self.cluster_bytes();
        let last = (end - self.cluster_bytes()).max(want.start);
        let last = self.write_piece(ctx, want.l2, last, end)?;
        let first = if clusters == 1 { last } else { want.first };
        Ok(Want { end, last, first, clusters, ..want })
    }

    fn reserve_fresh(&mut self, ctx: &mut Ctx, want: Want, run: Option<Run>) -> Step<WritePlan> {
        let mut pins = Pins(heapless::Vec::new());
        let reserved = self.pin_fresh(ctx, want, run, &mut pins);
        if reserved.is_err() {
            pins.0.iter().for_each(|&at| ctx.meta.unpin(self.file, at));
        }
        let entry_at = reserved?;
        if let Some(run) = run {
            ctx.meta.unpin(self.file, self.run_place(run));
        }
        Ok(self.take_fresh(ctx, want, run, entry_at))
    }

    /// Pins the blocks of the counts (first), the L1 entry and the L2 entries; makes the block
    /// of a new L2 table last, as that cannot be undone.
    fn pin_fresh(
        &mut self,
        ctx: &mut Ctx,
        want: Want,
        run: Option<Run>,
        pins: &mut Pins<3>,
    ) -> Step<u64> {
        let mut pin = |ctx: &mut Ctx, at: u64| {
            ctx.meta.pin(self.file, at)?;
            pins.0.push(at).expect("room for each kind");
            Ok::<(), Stop>(())
        };
        if let Some(run) = run {
            pin(ctx, self.run_place(run))?;
        }
        let old = match want.l2 {
            Some(l2) if l2.copied => {
                let at = self.entry_offset(l2, want.start);
                pin(ctx, at)?;
                return Ok(at);
            }
            old => old,
        };
        pin(ctx, self.l1_entry_offset(want.start))?;
        let table = want.spare.or(run.map(|run| run.first));
        let table = table.expect("a new L2 table needs a cluster") << self.kind.cluster_bits;
        let entry_at = self.entry_offset(L2 { offset: table, copied: true }, want.start);
        // The block, or the table where that is smaller, as it stands in the old table.
        let len = self.cluster_bytes().min(BLOCK_BYTES);
        let within = (entry_at - table) / len * len;
        let mut bytes = [0; BLOCK_BYTES as usize];
        let bytes = &mut bytes[..len as usize];
        if let Some(old) = old {
            ctx.meta.get(self.file, old.offset + within, bytes)?;
        }
        if len == BLOCK_BYTES {
            ctx.meta.forget(self.file, table, self.cluster_bytes());
            ctx.meta.create_pinned(self.file, table + within, Phase::TABLE)?;
        } else {
            ctx.meta.pin(self.file, table + within)?;
        }
        ctx.meta.put(self.file, table + within, bytes, Phase::TABLE);
        Ok(entry_at)
    }

    /// Nothing can fail from here on.
    fn take_fresh(
        &mut self,
        ctx: &mut Ctx,
        want: Want,
        run: Option<Run>,
        entry_at: u64,
    ) -> WritePlan {
        let Want { slot, start, end, l2, first, last, clusters, .. } = want;
        let bits = self.kind.cluster_bits;
        let guest = start & !(self.cluster_bytes() - 1);
        let new_l2 = match l2.is_some_and(|l2| l2.copied) {
            true => 0,
            false => want.spare.unwrap_or_else(|| run.expect("found").first) << bits,
        };
        let table = u64::from(new_l2 != 0 && want.spare.is_none());
        let mut host = guest;
        let mut untouched = false;
        if let Some(run) = run.filter(|_| !self.kind.data_file) {
            let first = run.first + table;
            host = first << bits;
            untouched = self.is_beyond_file(ctx, first);
        }
        let mut preludes = heapless::Vec::new();
        let table_untouched = new_l2 != 0 && self.is_beyond_file(ctx, new_l2 >> bits);
        if new_l2 != 0 && self.cluster_bytes() > BLOCK_BYTES {
            let (file, len) = (self.file, self.cluster_bytes());
            let prelude = match l2 {
                Some(old) => Some(Prelude::Copy { file, from: old.offset, to: new_l2, len }),
                None if table_untouched => None,
                None => Some(Prelude::Zero { file, offset: new_l2, len }),
            };
            preludes.extend(prelude);
        }
        // Copying zeros over zeros is left out.
        let copy = |piece: Piece, bytes| if piece.zeros && untouched { 0 } else { bytes };
        let (head, tail) = (copy(first, first.head), copy(last, last.tail));
        if !untouched {
            preludes.extend(self.zero_past_end(host, clusters, guest, end + last.tail));
        }
        let needed = table + if self.kind.data_file { 0 } else { clusters };
        if let Some(run) = run {
            self.take_run(ctx, run.prefix(needed));
        }
        if self.kind.data_file {
            ctx.files.grow(self.data, host + clusters * self.cluster_bytes());
        }
        let old_l2 = if new_l2 != 0 { l2.map_or(0, |old| old.offset) } else { 0 };
        let writer = self.writer_mut();
        if new_l2 != 0 {
            writer.tables.insert(new_l2 >> bits);
        }
        if want.spare.is_some() {
            writer.spare = Spare::None;
        }
        writer.space.frees.reserve(want.places());
        writer.plans[slot as usize] = Plan {
            state: PlanState::Mapping,
            guest,
            clusters,
            host,
            fresh: true,
            valid_from: start - first.head,
            valid_to: end + last.tail,
            entry_at,
            new_l2,
            old_l2,
            frees: want.places(),
        };
        self.plan(slot, start, end, host, (head, tail), preludes)
    }

    pub(super) fn commit_plan(&mut self, ctx: &mut Ctx, slot: u16) {
        let plan = core::mem::take(&mut self.writer_mut().plans[slot as usize]);
        if plan.state == PlanState::InPlace {
            return;
        }
        assert!(plan.state == PlanState::Mapping, "a commit without a plan");
        let step = self.kind.entry_bytes();
        self.writer_mut().space.frees.unreserve(plan.frees);
        for n in 0..plan.clusters {
            let at = plan.entry_at + n * step;
            let guest = plan.guest + n * self.cluster_bytes();
            let old = self.entry(ctx, at).expect("the block is pinned");
            let new = self.new_entry(plan, old, guest, plan.host + n * self.cluster_bytes());
            if plan.fresh {
                self.release(ctx, at, old, guest);
            }
            self.put_entry(ctx, at, new);
        }
        ctx.meta.unpin(self.file, plan.entry_at);
        if plan.new_l2 != 0 {
            let at = self.l1_entry_offset(plan.guest);
            let word = plan.new_l2 | COPIED;
            ctx.meta.put(self.file, at, &word.to_be_bytes(), Phase::DIRECTORY);
            self.writer_mut().l1_changes += 1;
            ctx.meta.unpin(self.file, at);
            if plan.old_l2 != 0 {
                let old = plan.old_l2 >> self.kind.cluster_bits;
                self.writer_mut().space.frees.push(old, 1, false);
            }
        }
    }

    fn new_entry(&self, plan: Plan, old: L2Entry, guest: u64, host: u64) -> L2Entry {
        let word = host | COPIED;
        if !self.kind.extended {
            return L2Entry { word, bitmap: 0 };
        }
        let size = self.subcluster_bytes();
        let from = plan.valid_from.saturating_sub(guest).min(self.cluster_bytes()) / size;
        let to = plan.valid_to.saturating_sub(guest).min(self.cluster_bytes()).div_ceil(size);
        let valid = ((1u64 << to) - 1) & !((1u64 << from) - 1);
        let bitmap = if old.word & COMPRESSED != 0 { 0 } else { old.bitmap };
        L2Entry { word, bitmap: bitmap & !(valid << 32) | valid }
    }

    pub(super) fn put_entry(&self, ctx: &mut Ctx, at: u64, entry: L2Entry) {
        let word = entry.word.to_be_bytes();
        if !self.kind.extended {
            return ctx.meta.put(self.file, at, &word, Phase::TABLE);
        }
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&word);
        bytes[8..].copy_from_slice(&entry.bitmap.to_be_bytes());
        ctx.meta.put(self.file, at, &bytes, Phase::TABLE);
    }

    /// The reference that an entry held will be given back once its removal is durable.
    pub(super) fn release(&mut self, ctx: &Ctx, at: u64, entry: L2Entry, guest: u64) {
        let bits = self.kind.cluster_bits;
        if self.kind.data_file {
            return;
        }
        let (first, count) = match self.cluster(at, entry, guest) {
            Ok(Cluster::Data { host, .. } | Cluster::Zero { host: Some(host), .. }) => {
                (host >> bits, 1)
            }
            Ok(Cluster::Compressed { offset, bytes }) => {
                let last = (offset + u64::from(bytes) - 1) >> bits;
                (offset >> bits, last - (offset >> bits) + 1)
            }
            _ => return,
        };
        // An entry that names metadata is a lie: nothing of it is given back.
        if self.check_host(ctx, at, first << bits, count << bits).is_ok() {
            self.writer_mut().space.frees.push(first, count, false);
        }
    }

    pub(super) fn abandon_plan(&mut self, ctx: &mut Ctx, slot: u16) {
        let plan = core::mem::take(&mut self.writer_mut().plans[slot as usize]);
        if plan.state == PlanState::InPlace {
            return;
        }
        assert!(plan.state == PlanState::Mapping, "an abandon without a plan");
        let bits = self.kind.cluster_bits;
        ctx.meta.unpin(self.file, plan.entry_at);
        if plan.new_l2 != 0 {
            ctx.meta.unpin(self.file, self.l1_entry_offset(plan.guest));
            ctx.meta.forget(self.file, plan.new_l2, self.cluster_bytes());
        }
        let data_file = self.kind.data_file;
        let frees = &mut self.writer_mut().space.frees;
        frees.unreserve(plan.frees);
        if plan.new_l2 != 0 {
            frees.push(plan.new_l2 >> bits, 1, true);
        }
        if plan.fresh && !data_file {
            frees.push(plan.host >> bits, plan.clusters, true);
        }
    }
}
