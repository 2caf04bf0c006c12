//! The check of a qcow2 image: counts every reference and compares with the refcounts, window by
//! window of host clusters so that memory stays within the budget; then the COPIED flags.
//!
//! Order guarded by the metadata cache as for writes: a repaired count is durable before a
//! repaired flag. Counts are lowered only if all tables could be read: what a broken table
//! refers to is unknown. Counts are changed where they stand only if the refcount table and its
//! blocks are sound: what they name otherwise may be anything, a guest's data too. Then they are
//! made anew elsewhere (`rebuild`) or left alone.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ops::Range;

use crate::check::{CheckParams, CheckProgress, CheckReport, Repair};
use crate::fault::ImageFault;
use crate::format::Ctx;
use crate::memory::{SPARE_BYTES, as_much_as_fits, filled, is_left};
use crate::meta::{BLOCK_BYTES, Phase};
use crate::types::{Step, Stop};

use super::Qcow2;
use super::entry::{COMPRESSED, COPIED, Cluster, L1_RESERVED, L2_RESERVED, L2Entry, OFFSET};
use super::header::{INCOMPATIBLE_CORRUPT, INCOMPATIBLE_DIRTY, field};

/// Clusters compared in one step.
const COMPARE_AT_ONCE: u64 = 4096;
/// Clusters in a window at least (ours): with fewer, the tables are gone through too often.
const WINDOW_MIN: usize = 4096;
/// L1 entries looked at in one step.
const L1_AT_ONCE: u64 = 512;
/// Bits of a bitmap's table entry that are 0 (docs/interop/qcow2.rst, "Bitmap table").
const BITMAP_RESERVED: u64 = 0xff00_0000_0000_01fe;
/// A count that is no longer exact.
const SATURATED: u16 = u16::MAX;
/// The refcount table, and what it names.
const REFTABLE: &str = "the refcount table";
const REFTABLE_ENTRY: &str = "a refcount table entry";

/// An L1 table being walked.
#[derive(Clone, Copy, Debug)]
struct Walk {
    l1_offset: u64,
    l1_entries: u64,
    /// The active table, whose flags must be right.
    active: bool,
    at: u64,
    /// Bytes done of the L2 table of entry `at`, with its offset.
    inside: Option<(u64, u64)>,
}

/// What the windows are gone through for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Pass {
    /// All at once: nothing is to be mended, or there is only one window.
    Whole,
    /// Before anything is mended: are the refcount table and its blocks sound?
    Look,
    /// Counts are compared and mended, after a look.
    Mend,
    /// Counts are put into a new refcount table.
    Rebuild,
}

#[derive(Clone, Copy, Debug)]
enum Stage {
    /// The header and the tables that it names.
    Start,
    /// The refcount table from this entry on.
    Tables(u64),
    Walk(Walk),
    /// The snapshot to be walked next and its place.
    Snapshot(u32, u64),
    /// The bitmap to be walked next and its place in the directory.
    Bitmap(u32, u64),
    /// A bitmap's table: offset, entries, entry; and what comes after it.
    BitmapTable {
        table: (u64, u64),
        at: u64,
        next: (u32, u64),
    },
    /// The refcount table once more, from this entry on: each block has one user.
    Blocks(u64),
    /// The next cluster to compare.
    Compare(u64),
    /// The header is to name the new refcount table; it does, and that is to be durable.
    Switch,
    Switched,
    /// The flags of the active tables.
    Flags(Walk),
    /// The marks in the header.
    Marks,
}

/// A check under way.
pub(super) struct Checker {
    pub params: CheckParams,
    pub report: CheckReport,
    stage: Stage,
    pub pass: Pass,
    /// First cluster of the window, and references to each cluster of it.
    pub window: u64,
    counts: Vec<u16>,
    /// Clusters that the file holds.
    pub limit: u64,
    /// L2 tables and blocks met in this window: more than clusters is a loop of claims.
    tables: u64,
    /// A table could not be understood.
    pub broken: bool,
    /// Breaks of the refcount table and its blocks.
    pub structure: u64,
    /// A cluster has more references than could be counted.
    pub uncountable: bool,
    /// The refcount table may be replaced.
    pub replaces: bool,
    /// A snapshot being walked, and its successor.
    after: Option<(u32, u64)>,
}

impl Checker {
    /// Each window of each pass meets the same tables: what is found in them is told once.
    fn first_time(&self) -> bool {
        self.window == 0 && matches!(self.pass, Pass::Whole | Pass::Look)
    }

    /// A break of the format, told once.
    fn corrupt(&mut self, problem: ImageFault) {
        self.broken = true;
        if self.first_time() {
            self.report.corrupt(problem);
        }
    }

    /// A break of the refcount table or of its blocks.
    fn corrupt_structure(&mut self, problem: ImageFault) {
        self.structure += 1;
        self.report.corrupt(problem);
    }

    /// First cluster after the window.
    fn window_end(&self) -> u64 {
        (self.window + self.counts.len() as u64).min(self.limit)
    }

    fn progress(&self) -> CheckProgress {
        let windows = self.limit.div_ceil(self.counts.len() as u64).max(1);
        let done = self.window / self.counts.len() as u64;
        match self.pass {
            Pass::Whole => CheckProgress::More { done, total: windows + 1 },
            Pass::Look => CheckProgress::More { done, total: 2 * windows + 1 },
            _ => CheckProgress::More { done: windows + done, total: 2 * windows + 1 },
        }
    }
}

impl Qcow2 {
    /// `replaces`: the refcount table may be made anew if it is broken.
    pub(super) fn begin_check(
        &mut self,
        ctx: &mut Ctx,
        params: CheckParams,
        replaces: bool,
    ) -> Result<(), ImageFault> {
        let limit = ctx.files.size(self.file).div_ceil(self.cluster_bytes());
        let room = (params.budget_bytes / 2).max(WINDOW_MIN) as u64;
        let most = room.min(limit.max(1)) as usize;
        let counts = as_much_as_fits(most, |count| {
            let enough = count >= most.min(WINDOW_MIN);
            enough.then(|| filled(0, count)).flatten().filter(|_| is_left(SPARE_BYTES))
        })?;
        let clusters = self.header.size_bytes.div_ceil(self.cluster_bytes());
        let mends = params.repair != Repair::Nothing;
        let mut report = CheckReport { clusters, ..CheckReport::default() };
        self.header.lost.into_iter().for_each(|lost| report.corrupt(lost));
        self.checker = Some(Box::new(Checker {
            params,
            report,
            stage: Stage::Start,
            pass: if mends && (counts.len() as u64) < limit { Pass::Look } else { Pass::Whole },
            window: 0,
            counts,
            limit,
            tables: 0,
            broken: false,
            structure: self.header.lost.is_some().into(),
            uncountable: false,
            replaces,
            after: None,
        }));
        Ok(())
    }

    /// One bounded part of the check.
    pub(super) fn step_check(&mut self, ctx: &mut Ctx) -> Step<CheckProgress> {
        // What is to be given back is no leak.
        self.finish_frees(ctx)?;
        if self.writer.is_some() {
            self.run_job(ctx)?;
        }
        let mut checker = self.checker.take().expect("a check was begun");
        let result = self.step_stage(ctx, &mut checker);
        match result {
            Ok(Some(stage)) => {
                checker.stage = stage;
                let progress = checker.progress();
                self.checker = Some(checker);
                Ok(progress)
            }
            Ok(None) => Ok(CheckProgress::Done(checker.report)),
            Err(stop) => {
                self.checker = Some(checker);
                Err(stop)
            }
        }
    }

    fn step_stage(&mut self, ctx: &mut Ctx, c: &mut Checker) -> Step<Option<Stage>> {
        match c.stage {
            Stage::Start => self.start_window(ctx, c).map(Some),
            Stage::Tables(at) => self.count_tables(ctx, c, at).map(Some),
            Stage::Walk(walk) => self.walk(ctx, c, walk).map(Some),
            Stage::Snapshot(n, offset) => self.count_snapshot(ctx, c, n, offset).map(Some),
            Stage::Bitmap(n, offset) => self.count_bitmap(ctx, c, n, offset).map(Some),
            Stage::BitmapTable { table, at, next } => {
                self.count_bitmap_table(ctx, c, table, at, next).map(Some)
            }
            Stage::Blocks(at) => self.check_blocks(ctx, c, at).map(Some),
            Stage::Compare(cluster) => self.compare(ctx, c, cluster).map(Some),
            Stage::Switch => self.switch_tables(ctx, c).map(|()| Some(Stage::Switched)),
            Stage::Switched if ctx.meta.is_dirty() => Err(Stop::NeedFlush),
            Stage::Switched => Ok(Some(Stage::Flags(self.active()))),
            Stage::Flags(walk) => self.check_flags(ctx, c, walk).map(Some),
            Stage::Marks => self.clear_marks(ctx, c).map(|()| None),
        }
    }

    /// Counts one reference to each cluster of a stretch.
    fn refer(&self, c: &mut Checker, field: &'static str, at: u64, offset: u64, bytes: u64) {
        if !self.count(c, offset, bytes) {
            c.corrupt(ImageFault::corrupt(self.file, field, at, offset));
        }
    }

    /// The same, and does it lie in the file?
    fn count(&self, c: &mut Checker, offset: u64, bytes: u64) -> bool {
        if bytes == 0 {
            return true;
        }
        let bits = self.kind.cluster_bits;
        let (first, last) = (offset >> bits, offset.saturating_add(bytes - 1) >> bits);
        c.report.end_bytes = c.report.end_bytes.max((last.min(c.limit) + 1) << bits);
        let end = c.window + c.counts.len() as u64;
        for cluster in first.max(c.window)..(last + 1).min(end) {
            let count = &mut c.counts[(cluster - c.window) as usize];
            *count = count.saturating_add(1);
        }
        last < c.limit
    }

    fn active(&self) -> Walk {
        Walk {
            l1_offset: self.header.l1_offset,
            l1_entries: self.header.l1_entries.into(),
            active: true,
            at: 0,
            inside: None,
        }
    }

    fn start_window(&mut self, ctx: &mut Ctx, c: &mut Checker) -> Step<Stage> {
        self.measure_snapshots(ctx)?;
        c.counts.fill(0);
        c.tables = 0;
        let header = &self.header;
        let tables = [
            ("the header", 0, self.cluster_bytes()),
            ("the L1 table", header.l1_offset, u64::from(header.l1_entries) * 8),
            ("the snapshot table", header.snapshots_offset, self.snapshot_table_bytes),
            ("the bitmap directory", self.bitmap_directory.offset, self.bitmap_directory.bytes),
        ];
        for (field, offset, bytes) in tables {
            self.refer(c, field, 0, offset, bytes);
        }
        Ok(Stage::Walk(self.active()))
    }

    /// All that refers to clusters is counted but the refcount table and its blocks.
    fn after_references(&self, c: &mut Checker) -> Stage {
        let max = self.count_max().min(u64::from(SATURATED) - 1);
        c.uncountable |= c.counts.iter().any(|&count| u64::from(count) > max);
        let (offset, bits) = (self.header.reftable_offset, self.kind.cluster_bits);
        let bytes = u64::from(self.header.reftable_clusters) << bits;
        if !self.count(c, offset, bytes) && c.first_time() {
            c.corrupt_structure(ImageFault::corrupt(self.file, REFTABLE, 48, offset));
        }
        // The blocks of a new table count themselves.
        if c.pass == Pass::Rebuild { Stage::Compare(c.window) } else { Stage::Tables(0) }
    }

    fn count_tables(&mut self, ctx: &mut Ctx, c: &mut Checker, mut at: u64) -> Step<Stage> {
        let bits = self.kind.cluster_bits;
        let entries = u64::from(self.header.reftable_clusters) << (bits - 3);
        let end = (at + BLOCK_BYTES / 8).min(entries);
        while at < end {
            let place = self.header.reftable_offset + at * 8;
            let word = ctx.meta.get_u64_be(self.file, place)?;
            at += 1;
            if word == 0 {
                continue;
            }
            c.tables += 1;
            let good = word.is_multiple_of(self.cluster_bytes()) && c.tables <= c.limit;
            if !(good && self.count(c, word, self.cluster_bytes())) && c.first_time() {
                c.corrupt_structure(ImageFault::corrupt(self.file, REFTABLE_ENTRY, place, word));
            }
            // A step may stop at the next entry's block: what is counted stays counted.
            c.stage = Stage::Tables(at);
        }
        if at < entries {
            return Ok(Stage::Tables(at));
        }
        c.tables = 0;
        Ok(match c.pass {
            Pass::Whole | Pass::Look => self.check_table_users(c),
            Pass::Mend | Pass::Rebuild => Stage::Compare(c.window),
        })
    }

    /// Has the refcount table its clusters for itself, and a place for all counts?
    fn check_table_users(&self, c: &mut Checker) -> Stage {
        let first = self.header.reftable_offset >> self.kind.cluster_bits;
        let own = first..first + u64::from(self.header.reftable_clusters);
        let in_window = own.start.max(c.window)..own.end.min(c.window_end());
        let mut users = in_window.map(|cluster| c.counts[(cluster - c.window) as usize]);
        if users.any(|count| count > 1) {
            let what = "a refcount table with another user";
            let offset = self.header.reftable_offset;
            c.corrupt_structure(ImageFault::corrupt(self.file, what, 48, offset));
        }
        let covered = self.covered_clusters().clamp(c.window, c.window_end());
        let beyond = &c.counts[(covered - c.window) as usize..(c.window_end() - c.window) as usize];
        if let (Some(at), None) = (beyond.iter().position(|&count| count > 0), self.header.lost) {
            let what = "a refcount table too small for the file";
            let offset = (covered + at as u64) << self.kind.cluster_bits;
            c.corrupt_structure(ImageFault::corrupt(self.file, what, 56, offset));
        }
        Stage::Blocks(0)
    }

    fn walk(&mut self, ctx: &mut Ctx, c: &mut Checker, mut walk: Walk) -> Step<Stage> {
        if let Some((table, done)) = walk.inside {
            let next = self.walk_l2(ctx, c, walk, table, done)?;
            let more = next < self.cluster_bytes();
            walk.inside = more.then_some((table, next));
            walk.at += u64::from(!more);
            return Ok(Stage::Walk(walk));
        }
        for _ in 0..L1_AT_ONCE {
            if walk.at >= walk.l1_entries {
                return Ok(self.after_walk(c));
            }
            let place = walk.l1_offset + walk.at * 8;
            let word = ctx.meta.get_u64_be(self.file, place)?;
            let offset = word & OFFSET;
            if word & L1_RESERVED != 0 {
                c.corrupt(ImageFault::corrupt(self.file, "an L1 entry", place, word));
            }
            c.tables += u64::from(offset != 0);
            let aligned = offset.is_multiple_of(self.cluster_bytes());
            let inside = offset < ctx.files.size(self.file) && c.tables <= c.limit;
            if offset != 0 && !(aligned && inside) {
                c.corrupt(ImageFault::corrupt(self.file, "an L1 entry", place, word));
            } else if offset != 0 {
                self.refer(c, "an L1 entry", place, offset, self.cluster_bytes());
                walk.inside = Some((offset, 0));
                return Ok(Stage::Walk(walk));
            } else if word & COPIED != 0 && c.first_time() {
                // No table is not a table: QEMU's check goes to one at byte 0 then.
                let fix = c.params.repair == Repair::All;
                if fix {
                    let cleared = (word ^ COPIED).to_be_bytes();
                    ctx.meta.set(self.file, place, &cleared, Phase::DIRECTORY)?;
                }
                c.report.corrupt(ImageFault::corrupt(self.file, "a COPIED flag", place, word));
                c.report.corruptions_fixed += u64::from(fix);
            }
            walk.at += 1;
            c.stage = Stage::Walk(walk);
        }
        Ok(Stage::Walk(walk))
    }

    fn after_walk(&self, c: &mut Checker) -> Stage {
        c.tables = 0;
        match c.after.take() {
            // The active table comes first, then the snapshots.
            None => Stage::Snapshot(0, self.header.snapshots_offset),
            Some((n, offset)) => Stage::Snapshot(n, offset),
        }
    }

    /// Counts what the entries of one cache block of an L2 table refer to; gives the bytes of
    /// the table done.
    fn walk_l2(
        &mut self,
        ctx: &mut Ctx,
        c: &mut Checker,
        walk: Walk,
        table: u64,
        done: u64,
    ) -> Step<u64> {
        let step = self.kind.entry_bytes() as usize;
        let end = self.cluster_bytes().min(done + BLOCK_BYTES);
        let block = ctx.meta.slice(self.file, table + done, (end - done) as usize)?;
        for (within, bytes) in (done..end).step_by(step).zip(block.chunks_exact(step)) {
            let entry = L2Entry::parse(bytes);
            if entry.word == 0 && entry.bitmap == 0 {
                continue;
            }
            let guest = (walk.at << self.l2_reach_bits())
                + ((within / step as u64) << self.kind.cluster_bits);
            self.count_entry(c, walk.active, table + within, entry, guest);
        }
        Ok(end)
    }

    fn count_entry(&self, c: &mut Checker, active: bool, at: u64, entry: L2Entry, guest: u64) {
        let word = entry.word;
        let reserved = word & COMPRESSED == 0 && word & L2_RESERVED != 0;
        let copied_packed = word & COMPRESSED != 0 && word & COPIED != 0;
        if reserved || copied_packed {
            c.corrupt(ImageFault::corrupt(self.file, "an L2 entry's flags", at, word));
        }
        if word & COMPRESSED != 0 && entry.bitmap != 0 {
            let what = "a compressed cluster's subclusters";
            c.corrupt(ImageFault::corrupt(self.file, what, at, entry.bitmap));
        }
        let first = c.first_time() && active;
        match self.kind.cluster(entry, guest) {
            Err(bad) => c.corrupt(ImageFault::corrupt(self.file, bad.0, at, word)),
            Ok(Cluster::Absent | Cluster::Zero { host: None, .. }) => {}
            Ok(Cluster::Compressed { offset, bytes }) => {
                self.refer(c, "a compressed cluster", at, offset, bytes.into());
                c.report.allocated += u64::from(first);
                c.report.compressed += u64::from(first);
            }
            Ok(Cluster::Data { host, .. } | Cluster::Zero { host: Some(host), .. }) => {
                if !self.kind.data_file {
                    self.refer(c, "an L2 entry", at, host, self.cluster_bytes());
                }
                c.report.allocated += u64::from(first);
            }
        }
    }

    fn count_snapshot(
        &mut self,
        ctx: &mut Ctx,
        c: &mut Checker,
        n: u32,
        offset: u64,
    ) -> Step<Stage> {
        if n >= self.header.snapshots {
            return Ok(Stage::Bitmap(0, self.bitmap_directory.offset));
        }
        let snapshot = self.snapshot_at(ctx, offset)?;
        let bytes = snapshot.l1_entries * 8;
        self.refer(c, "a snapshot's L1 table", offset, snapshot.l1_offset, bytes);
        c.after = Some((n + 1, offset + snapshot.bytes()));
        Ok(Stage::Walk(Walk {
            l1_offset: snapshot.l1_offset,
            l1_entries: snapshot.l1_entries,
            active: false,
            at: 0,
            inside: None,
        }))
    }

    fn count_bitmap(&mut self, ctx: &mut Ctx, c: &mut Checker, n: u32, offset: u64) -> Step<Stage> {
        let end = self.bitmap_directory.offset + self.bitmap_directory.bytes;
        if n >= self.bitmaps && offset == end {
            return Ok(self.after_references(c));
        }
        let mut b = [0; 24];
        let inside = n < self.bitmaps && offset + 24 <= end;
        if inside {
            ctx.read(self.file, offset, &mut b)?;
        }
        let Some((bytes, table, entries)) = self.bitmap_entry(&b) else {
            // Where the next one would stand is unknown then. QEMU does not open such an image.
            c.corrupt(ImageFault::corrupt(self.file, "the bitmap directory", offset, n.into()));
            return Ok(self.after_references(c));
        };
        let next = (n + 1, offset + bytes);
        let size = ctx.files.size(self.file);
        let inside = table.checked_add(entries * 8).is_some_and(|end| end <= size);
        if !table.is_multiple_of(self.cluster_bytes()) || !inside {
            c.corrupt(ImageFault::corrupt(self.file, "a bitmap's table", offset, table));
            return Ok(Stage::Bitmap(next.0, next.1));
        }
        self.refer(c, "a bitmap's table", offset, table, entries * 8);
        Ok(Stage::BitmapTable { table: (table, entries), at: 0, next })
    }

    /// An entry of the bitmap directory: its own bytes, and its table's offset and entries. The
    /// limits are QEMU's (block/qcow2-bitmap.c).
    fn bitmap_entry(&self, b: &[u8; 24]) -> Option<(u64, u64, u64)> {
        const TABLE_ENTRIES_MAX: u64 = 0x800_0000;
        const BITMAP_BYTES_MAX: u64 = 0x2000_0000;
        const RESERVED_FLAGS: u32 = !3;
        const IN_USE: u32 = 1;
        const DIRTY_TRACKING: u8 = 1;
        let u32_at = |at: usize| u32::from_be_bytes(b[at..at + 4].try_into().expect("four bytes"));
        let table = u64::from_be_bytes(b[..8].try_into().expect("eight bytes"));
        let (entries, flags) = (u64::from(u32_at(8)), u32_at(12));
        let (kind, granularity_bits, extra) = (b[16], b[17], u32_at(20));
        let name = u64::from(u16::from_be_bytes([b[18], b[19]]));
        let bitmap_bytes = entries << self.kind.cluster_bits;
        let sound = table != 0
            && (1..=TABLE_ENTRIES_MAX).contains(&entries)
            && bitmap_bytes <= BITMAP_BYTES_MAX
            && flags & RESERVED_FLAGS == 0
            && kind == DIRTY_TRACKING
            && (9..=31).contains(&granularity_bits)
            && (1..=1023).contains(&name)
            && extra == 0
            && (flags & IN_USE != 0
                || self.header.size_bytes <= (bitmap_bytes * 8) << granularity_bits);
        sound.then_some(((24 + name).next_multiple_of(8), table, entries))
    }

    fn count_bitmap_table(
        &mut self,
        ctx: &mut Ctx,
        c: &mut Checker,
        (table, entries): (u64, u64),
        at: u64,
        next: (u32, u64),
    ) -> Step<Stage> {
        let end = (at + BLOCK_BYTES / 8).min(entries);
        for n in at..end {
            let place = table + n * 8;
            let word = ctx.meta.get_u64_be(self.file, place)?;
            let aligned = (word & OFFSET).is_multiple_of(self.cluster_bytes());
            if word & BITMAP_RESERVED != 0 || !aligned || (word & OFFSET != 0 && word & 1 != 0) {
                c.corrupt(ImageFault::corrupt(self.file, "a bitmap's table entry", place, word));
            } else if word & OFFSET != 0 {
                self.refer(c, "a bitmap", place, word & OFFSET, self.cluster_bytes());
            }
            c.stage = Stage::BitmapTable { table: (table, entries), at: n + 1, next };
        }
        if end < entries {
            return Ok(Stage::BitmapTable { table: (table, entries), at: end, next });
        }
        Ok(Stage::Bitmap(next.0, next.1))
    }

    /// A refcount block that something else uses too cannot be right, whatever its count says:
    /// counts and the other's bytes write over each other.
    fn check_blocks(&mut self, ctx: &mut Ctx, c: &mut Checker, at: u64) -> Step<Stage> {
        let entries = u64::from(self.header.reftable_clusters) << (self.kind.cluster_bits - 3);
        let end = (at + BLOCK_BYTES / 8).min(entries);
        for at in at..end {
            let place = self.header.reftable_offset + at * 8;
            let word = ctx.meta.get_u64_be(self.file, place)?;
            let within = (word >> self.kind.cluster_bits).checked_sub(c.window);
            let count = within.and_then(|within| c.counts.get(within as usize));
            if word != 0
                && word.is_multiple_of(self.cluster_bytes())
                && count.is_some_and(|&n| n > 1)
            {
                let what = "a refcount block with another user";
                c.corrupt_structure(ImageFault::corrupt(self.file, what, place, word));
            }
            // A step may stop at the next entry: what is told stays told.
            c.stage = Stage::Blocks(at + 1);
        }
        Ok(if end < entries { Stage::Blocks(end) } else { self.after_look(ctx, c) })
    }

    /// The refcount table and its blocks were looked at, in this window.
    fn after_look(&mut self, ctx: &mut Ctx, c: &mut Checker) -> Stage {
        if c.pass == Pass::Look && c.window_end() < c.limit {
            c.window = c.window_end();
            return Stage::Start;
        }
        if self.begin_rebuild(ctx, c) {
            (c.pass, c.window) = (Pass::Rebuild, 0);
        } else if c.pass == Pass::Look {
            (c.pass, c.window) = (Pass::Mend, 0);
        } else {
            return Stage::Compare(c.window);
        }
        Stage::Start
    }

    fn compare(&mut self, ctx: &mut Ctx, c: &mut Checker, mut cluster: u64) -> Step<Stage> {
        let end = c.window_end();
        for _ in 0..COMPARE_AT_ONCE {
            cluster += self.uncounted(ctx, c, cluster..end)?;
            if cluster >= end {
                break;
            }
            self.compare_one(ctx, c, cluster)?;
            cluster += 1;
            c.stage = Stage::Compare(cluster);
        }
        if cluster < end {
            return Ok(Stage::Compare(cluster));
        }
        if end < c.limit {
            c.window = end;
            return Ok(Stage::Start);
        }
        Ok(if c.pass == Pass::Rebuild { Stage::Switch } else { Stage::Flags(self.active()) })
    }

    /// Clusters at the start of `part` that no block counts and nothing refers to.
    fn uncounted(&self, ctx: &mut Ctx, c: &Checker, part: Range<u64>) -> Step<u64> {
        let bits = self.block_counts_bits();
        let end = part.end.min(((part.start >> bits) + 1) << bits);
        let counts = &c.counts[(part.start - c.window) as usize..(end - c.window) as usize];
        if counts.first() != Some(&0) {
            return Ok(0);
        }
        match self.refcount_block(ctx, part.start) {
            Ok(Some(_)) | Err(Stop::Fault(_)) => Ok(0),
            Ok(None) => Ok(counts.iter().take_while(|&&count| count == 0).count() as u64),
            Err(stop) => Err(stop),
        }
    }

    fn compare_one(&mut self, ctx: &mut Ctx, c: &mut Checker, cluster: u64) -> Step<()> {
        let wanted = c.counts[(cluster - c.window) as usize];
        let (stored, has_place) = match self.refcount(ctx, cluster) {
            // Told when the refcount table was gone through.
            Err(Stop::Fault(_)) => (0, false),
            stored => (stored?, true),
        };
        if wanted == SATURATED || stored == u64::from(wanted) {
            return Ok(());
        }
        let wanted = u64::from(wanted);
        let offset = cluster << self.kind.cluster_bits;
        let file = self.file;
        let problem = |what| ImageFault::corrupt(file, what, offset, stored);
        if c.pass == Pass::Rebuild {
            self.make_countable(ctx, cluster)?;
            return self.set_refcount(ctx, cluster, wanted);
        }
        if stored < wanted {
            let fits = wanted <= self.count_max() && has_place && c.structure == 0;
            let fix = c.params.repair == Repair::All && fits;
            if fix {
                self.make_countable(ctx, cluster)?;
                self.set_refcount(ctx, cluster, wanted)?;
            }
            c.report.corrupt(problem("a refcount that is too low"));
            c.report.corruptions_fixed += u64::from(fix);
            return Ok(());
        }
        let fix = c.params.repair != Repair::Nothing && !c.broken && c.structure == 0;
        if fix {
            self.set_refcount(ctx, cluster, wanted)?;
            if wanted == 0 {
                let len = self.cluster_bytes();
                ctx.meta.forget(self.file, offset, len);
                self.writer_mut().space.freed(cluster);
            }
        }
        c.report.leak(problem("a refcount that is too high"));
        c.report.leaks_fixed += u64::from(fix);
        Ok(())
    }

    /// Gives the region of a cluster a refcount block, after the end of all that is used.
    fn make_countable(&mut self, ctx: &mut Ctx, cluster: u64) -> Step<()> {
        if self.refcount_block(ctx, cluster)?.is_some() {
            return Ok(());
        }
        if !ctx.files.info(self.file).can_grow {
            return Err(self.missing_block(cluster));
        }
        assert!(cluster < self.covered_clusters(), "the table was looked at");
        let end = self.writer().space.end();
        if end < self.covered_clusters() && self.refcount_block(ctx, end)?.is_none() {
            // The new block counts itself; it is the one wanted, or the next try finds it.
            self.start_block(ctx, end)?;
            self.run_job(ctx)?;
            self.writer_mut().space.set_end(end + 1);
            return self.make_countable(ctx, cluster);
        }
        let run = self.find_end(ctx, 1)?;
        self.block_for(ctx, run, cluster)
    }

    /// The flags of the active tables must say whether the counts are 1.
    fn check_flags(&mut self, ctx: &mut Ctx, c: &mut Checker, mut walk: Walk) -> Step<Stage> {
        if let Some((table, done)) = walk.inside {
            let end = self.cluster_bytes().min((done + 1).next_multiple_of(BLOCK_BYTES));
            let mut at = done;
            while let Some((within, word)) = self.next_plain(ctx, table, at..end)? {
                self.check_flag(ctx, c, table + within, word, Phase::TABLE)?;
                // The next entry may stop: this one is done.
                at = within + self.kind.entry_bytes();
                walk.inside = Some((table, at));
                c.stage = Stage::Flags(walk);
            }
            let more = end < self.cluster_bytes();
            walk.inside = more.then_some((table, end));
            walk.at += u64::from(!more);
            return Ok(Stage::Flags(walk));
        }
        for _ in 0..L1_AT_ONCE {
            if walk.at >= walk.l1_entries {
                return Ok(Stage::Marks);
            }
            let place = walk.l1_offset + walk.at * 8;
            let word = ctx.meta.get_u64_be(self.file, place)?;
            let offset = word & OFFSET;
            let good = offset.is_multiple_of(self.cluster_bytes())
                && offset < ctx.files.size(self.file)
                && c.tables < c.limit;
            if offset != 0 && good {
                self.check_flag(ctx, c, place, word, Phase::DIRECTORY)?;
                c.tables += 1;
                walk.inside = Some((offset, 0));
                return Ok(Stage::Flags(walk));
            }
            walk.at += 1;
            c.stage = Stage::Flags(walk);
        }
        Ok(Stage::Flags(walk))
    }

    /// The first entry in a part of an L2 table, within one cache block, that names a cluster of
    /// this file: its place in the table and its word.
    fn next_plain(&self, ctx: &mut Ctx, table: u64, part: Range<u64>) -> Step<Option<(u64, u64)>> {
        if self.kind.data_file || part.is_empty() {
            return Ok(None);
        }
        let (len, step) = (part.end - part.start, self.kind.entry_bytes());
        let block = ctx.meta.slice(self.file, table + part.start, len as usize)?;
        let words = block.chunks_exact(step as usize).map(|bytes| L2Entry::parse(bytes).word);
        let mut placed = part.step_by(step as usize).zip(words);
        Ok(placed.find(|(_, word)| word & COMPRESSED == 0 && word & OFFSET != 0))
    }

    fn check_flag(
        &self,
        ctx: &mut Ctx,
        c: &mut Checker,
        at: u64,
        word: u64,
        phase: Phase,
    ) -> Step<()> {
        let count = match self.refcount(ctx, (word & OFFSET) >> self.kind.cluster_bits) {
            // Told when the counts were compared.
            Err(Stop::Fault(_)) => return Ok(()),
            count => count?,
        };
        if (count == 1) == (word & COPIED != 0) {
            return Ok(());
        }
        // With counts that cannot be trusted neither can be what follows from them.
        let fix = c.params.repair == Repair::All && c.structure == 0;
        if fix {
            ctx.meta.set(self.file, at, &(word ^ COPIED).to_be_bytes(), phase)?;
        }
        c.report.corrupt(ImageFault::corrupt(self.file, "a COPIED flag", at, word));
        c.report.corruptions_fixed += u64::from(fix);
        Ok(())
    }

    /// A sound image is neither dirty nor corrupt.
    fn clear_marks(&mut self, ctx: &mut Ctx, c: &mut Checker) -> Step<()> {
        let marks = INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT;
        let marked = self.header.incompatible & marks != 0;
        if c.params.repair == Repair::All && c.report.is_sound() && marked {
            let cleared = self.header.incompatible & !marks;
            let bytes = cleared.to_be_bytes();
            if self.kind.v3 {
                ctx.meta.set(self.file, field::INCOMPATIBLE, &bytes, Phase::HEADER)?;
            }
            self.header.incompatible = cleared;
        }
        Ok(())
    }
}
