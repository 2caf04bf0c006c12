//! Reference counts of host clusters, and who gets free ones (docs/interop/qcow2, "Host cluster
//! management").
//!
//! Order guarded: a count rises (phase `BEFORE`) before anything points at the cluster is
//! written, a new refcount block is written before the refcount table points at it (`REACH`), a
//! new refcount table before the header does (`HEADER`). A count falls only after the removal of
//! the pointer was flushed: [`Frees`] keeps it until then. After a crash a count may be too high
//! (a leak), never too low.

use crate::fault::{FaultKind, ImageFault};
use crate::format::Ctx;
use crate::meta::{BLOCK_BYTES, Phase};
use crate::types::{Step, Stop};

use super::Qcow2;
use super::header::{REFTABLE_BYTES_MAX, field};

/// Stretches of clusters waiting to be freed, per image.
pub(super) const FREES_MAX: usize = 512;
/// Counts lowered in one step, and entries looked through for a hole in one step.
const FREES_AT_ONCE: usize = 32;
const SCAN_AT_ONCE: u64 = 2048;
/// Clusters that lose a reference.
#[derive(Clone, Copy, Debug, Default)]
struct Free {
    first: u64,
    count: u64,
    /// Nothing durable points there any more.
    ready: bool,
}

/// References to give back, in order of their removal.
pub(super) struct Frees {
    list: heapless::Vec<Free, FREES_MAX>,
    /// Places promised to plans in flight.
    reserved: usize,
}

impl Frees {
    pub fn new() -> Frees {
        Frees { list: heapless::Vec::new(), reserved: 0 }
    }

    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    pub fn any_ready(&self) -> bool {
        self.list.iter().any(|free| free.ready)
    }

    /// Is there room for `count` more? Then a `push` of as many cannot fail.
    pub fn room(&self, count: usize) -> bool {
        self.list.len() + self.reserved + count <= FREES_MAX
    }

    pub fn reserve(&mut self, count: usize) {
        assert!(self.room(count), "room was checked");
        self.reserved += count;
    }

    pub fn unreserve(&mut self, count: usize) {
        self.reserved -= count;
    }

    pub fn push(&mut self, first: u64, count: u64, ready: bool) {
        if let Some(last) = self.list.last_mut()
            && last.ready == ready
            && last.first + last.count == first
        {
            last.count += count;
            return;
        }
        self.list.push(Free { first, count, ready }).expect("room was reserved");
    }

    /// All pointers removed so far are durably gone.
    pub fn flushed(&mut self) {
        self.list.iter_mut().for_each(|free| free.ready = true);
    }
}

/// Building that takes more than one step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Job {
    None,
    /// A refcount block at this cluster for the region it lies in; its first bytes are zeroed.
    Block {
        cluster: u64,
        zeroed: u64,
    },
    /// A larger refcount table: from this cluster on `blocks` refcount blocks and then the table,
    /// which are `written` bytes far.
    Table {
        first: u64,
        blocks: u64,
        clusters: u64,
        written: u64,
    },
    /// From this cluster on `blocks` refcount blocks and then `clusters` that they count.
    Row {
        first: u64,
        blocks: u64,
        clusters: u64,
        written: u64,
    },
}

/// Where the next clusters are looked for.
pub(super) struct Space {
    pub frees: Frees,
    pub job: Job,
    /// First cluster after all that is known to be used.
    end: u64,
    /// First cluster after the file as it was opened: from there on all is ours.
    old_end: u64,
    /// Next cluster to look at for a hole, below `end`.
    hole: u64,
    /// The store is full up to its end: every hole must be tried, from here on; and the longest
    /// run that was asked for on the way.
    scan: Option<(u64, u64)>,
}

/// Free clusters, not yet counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Run {
    pub first: u64,
    pub count: u64,
    /// The refcount block that counts all of them.
    block: u64,
}

/// How many clusters in a row are wanted, and how many will do.
#[derive(Clone, Copy, Debug)]
struct Lengths {
    want: u64,
    least: u64,
}

impl Run {
    /// Clusters to be compared, whatever counts them.
    pub fn uncounted(first: u64, count: u64) -> Run {
        Run { first, count, block: 0 }
    }

    /// A cluster to be compared.
    pub fn one(cluster: u64) -> Run {
        Run::uncounted(cluster, 1)
    }

    /// The first `count` clusters.
    pub fn prefix(self, count: u64) -> Run {
        assert!(count <= self.count, "a part of a run");
        Run { count, ..self }
    }
}

impl Space {
    /// `end`: first cluster after the file's end. On a store of fixed size nothing tells where
    /// use ends, so it is looked for from the start.
    pub fn new(end: u64, can_grow: bool) -> Space {
        let (end, old_end) = if can_grow { (end, end) } else { (1, u64::MAX) };
        Space { frees: Frees::new(), job: Job::None, end, old_end, hole: 1, scan: None }
    }

    /// First cluster after all that is known to be used.
    pub fn end(&self) -> u64 {
        self.end
    }

    pub fn set_end(&mut self, end: u64) {
        self.end = end;
    }

    /// Cluster `k` became free.
    pub fn freed(&mut self, k: u64) {
        self.hole = self.hole.min(k);
    }
}

/// Count number `index` of some refcount block bytes that start at a multiple of 8 counts.
pub(super) fn count_in(bytes: &[u8], order: u32, index: u64) -> u64 {
    let width = 1 << order;
    if order < 3 {
        let bit = index << order;
        let byte = bytes[(bit / 8) as usize];
        return u64::from(byte >> (bit % 8)) & ((1 << width) - 1);
    }
    let len = width / 8;
    let at = index as usize * len;
    bytes[at..at + len].iter().fold(0, |value, &b| value << 8 | u64::from(b))
}

/// Sets a count; it fits the width.
pub(super) fn set_count_in(bytes: &mut [u8], order: u32, index: u64, value: u64) {
    let width = 1u32 << order;
    if order < 3 {
        let bit = index << order;
        let mask = (((1u32 << width) - 1) << (bit % 8)) as u8;
        let byte = &mut bytes[(bit / 8) as usize];
        *byte = *byte & !mask | (value << (bit % 8)) as u8;
        return;
    }
    let len = width as usize / 8;
    let at = index as usize * len;
    bytes[at..at + len].copy_from_slice(&value.to_be_bytes()[8 - len..]);
}

impl Qcow2 {
    /// Counts in one refcount block, as a power of two.
    pub(super) fn block_counts_bits(&self) -> u32 {
        self.kind.cluster_bits + 3 - self.header.refcount_order
    }

    /// Counts in one block of the cache: a run has all of its counts in one.
    pub(super) fn cached_counts(&self) -> u64 {
        (BLOCK_BYTES * 8) >> self.header.refcount_order
    }

    /// Clusters that the refcount table can count.
    pub(super) fn covered_clusters(&self) -> u64 {
        let entries = u64::from(self.header.reftable_clusters) << (self.kind.cluster_bits - 3);
        entries << self.block_counts_bits()
    }

    pub(super) fn count_max(&self) -> u64 {
        u64::MAX >> (64 - (1u32 << self.header.refcount_order))
    }

    pub(super) fn reftable_entry_offset(&self, cluster: u64) -> u64 {
        self.header.reftable_offset + (cluster >> self.block_counts_bits()) * 8
    }

    /// The refcount block for `cluster`, `None` where all counts are 0.
    pub(super) fn refcount_block(&self, ctx: &mut Ctx, cluster: u64) -> Step<Option<u64>> {
        if cluster >= self.covered_clusters() {
            return Ok(None);
        }
        let at = self.reftable_entry_offset(cluster);
        let word = ctx.meta.get_u64_be(self.file, at)?;
        if word == 0 {
            return Ok(None);
        }
        let good = word.is_multiple_of(self.cluster_bytes()) && word < ctx.files.size(self.file);
        if !good {
            return Err(ImageFault::corrupt(self.file, "a refcount table entry", at, word).into());
        }
        self.check_table("a refcount table entry that names metadata", at, word)?;
        Ok(Some(word))
    }

    /// Where the count of `cluster` stands in `block`: offset of its byte, and counts from
    /// that byte on.
    fn count_place(&self, block: u64, cluster: u64) -> (u64, u64) {
        let order = self.header.refcount_order;
        let index = cluster & ((1 << self.block_counts_bits()) - 1);
        let bit = index << order;
        (block + bit / 8, (bit % 8) >> order)
    }

    fn count_bytes(&self) -> usize {
        ((1usize << self.header.refcount_order) / 8).max(1)
    }

    /// The count of a cluster.
    pub(super) fn refcount(&self, ctx: &mut Ctx, cluster: u64) -> Step<u64> {
        let Some(block) = self.refcount_block(ctx, cluster)? else { return Ok(0) };
        let (at, index) = self.count_place(block, cluster);
        let bytes = ctx.meta.slice(self.file, at, self.count_bytes())?;
        Ok(count_in(bytes, self.header.refcount_order, index))
    }

    /// Changes a count whose cache block is reserved or pinned.
    fn put_count(&self, ctx: &mut Ctx, block: u64, cluster: u64, value: u64) {
        let (at, index) = self.count_place(block, cluster);
        let mut bytes = [0; 8];
        let bytes = &mut bytes[..self.count_bytes()];
        ctx.meta.get(self.file, at, bytes).expect("a reserved block is resident");
        set_count_in(bytes, self.header.refcount_order, index, value);
        ctx.meta.put(self.file, at, bytes, Phase::BEFORE);
    }

    /// Sets the count of a cluster that has a refcount block.
    pub(super) fn set_refcount(&self, ctx: &mut Ctx, cluster: u64, value: u64) -> Step<()> {
        let Some(block) = self.refcount_block(ctx, cluster)? else {
            let what = "a cluster without a refcount block";
            return Err(ImageFault::corrupt(self.file, what, cluster, value).into());
        };
        let (at, _) = self.count_place(block, cluster);
        ctx.meta.reserve(self.file, at)?;
        self.put_count(ctx, block, cluster, value);
        Ok(())
    }

    /// Gives up to `FREES_AT_ONCE` references back.
    pub(super) fn drain_frees(&mut self, ctx: &mut Ctx) -> Step<()> {
        for _ in 0..FREES_AT_ONCE {
            let frees = &self.writer().space.frees.list;
            let Some(at) = frees.iter().position(|free| free.ready) else { return Ok(()) };
            let cluster = frees[at].first;
            let count = self.refcount(ctx, cluster)?;
            // 0 says that the image lied about this cluster; there is nothing to give back.
            if count > 0 {
                self.set_refcount(ctx, cluster, count - 1)?;
            }
            let space = &mut self.writer_mut().space;
            if count == 1 {
                space.freed(cluster);
                let (offset, len) = (cluster << self.kind.cluster_bits, self.cluster_bytes());
                ctx.meta.forget(self.file, offset, len);
            }
            let space = &mut self.writer_mut().space;
            let free = &mut space.frees.list[at];
            (free.first, free.count) = (free.first + 1, free.count - 1);
            if free.count == 0 {
                space.frees.list.remove(at);
            }
        }
        Ok(())
    }

    /// Gives back all references, before the image is closed.
    pub(super) fn finish_frees(&mut self, ctx: &mut Ctx) -> Step<()> {
        while self.writer.as_ref().is_some_and(|writer| !writer.space.frees.is_empty()) {
            if !self.writer().space.frees.any_ready() {
                return Err(Stop::NeedFlush);
            }
            self.drain_frees(ctx)?;
        }
        Ok(())
    }

    /// Up to `want` free clusters in a row, at least `least`, whose counts stand in one cache
    /// block. Nothing is reserved yet: count them with [`Qcow2::take_run`] in the same step.
    pub(super) fn find_run(&mut self, ctx: &mut Ctx, want: u64, least: u64) -> Step<Run> {
        let run = self.find_any(ctx, Lengths { want, least })?;
        self.check_free(ctx, run)?;
        Ok(run)
    }

    /// Clusters that count as free, or that nothing counts, are about to be used: no table may lie
    /// in them.
    pub(super) fn check_free(&mut self, ctx: &mut Ctx, run: Run) -> Step<()> {
        self.check_run(run)?;
        if run.first < self.writer().space.old_end {
            let what = "the refcount of a cluster that holds a table: its place";
            self.compare_tables(ctx, run, what)?;
        }
        Ok(())
    }

    fn find_any(&mut self, ctx: &mut Ctx, want: Lengths) -> Step<Run> {
        assert!(0 < want.least && want.least <= want.want);
        self.run_job(ctx)?;
        if let Some(run) = self.find_hole(ctx, want)? {
            return Ok(run);
        }
        loop {
            let at = self.writer().space.end;
            let limit = self.clusters_max(ctx);
            if at >= limit {
                return self.find_in_full_store(ctx, want, limit);
            }
            if at >= self.covered_clusters() {
                self.start_table(ctx)?;
                self.run_job(ctx)?;
                continue;
            }
            if self.refcount_block(ctx, at)?.is_none() {
                self.start_block(ctx, at)?;
                self.run_job(ctx)?;
                continue;
            }
            let (skipped, run) = self.scan(ctx, at, want, limit)?;
            self.writer_mut().space.end = at + skipped;
            if let Some(run) = run {
                return Ok(run);
            }
        }
    }

    /// So many free clusters in a row, after all that is known to be used: for a repair, which
    /// cannot trust holes (of a store that cannot grow it gets no such place), and for an L1 table.
    pub(super) fn find_end(&mut self, ctx: &mut Ctx, want: u64) -> Step<Run> {
        let hole = core::mem::replace(&mut self.writer_mut().space.hole, u64::MAX);
        let found = self.find_any(ctx, Lengths { want, least: want });
        self.writer_mut().space.hole = hole;
        let run = found?;
        self.check_free(ctx, run)?;
        Ok(run)
    }

    /// Plans a refcount block at `cluster`, for the region it lies in.
    pub(super) fn start_block(&mut self, ctx: &mut Ctx, cluster: u64) -> Step<()> {
        self.check_free(ctx, Run::one(cluster))?;
        self.writer_mut().space.job = Job::Block { cluster, zeroed: 0 };
        Ok(())
    }

    /// On a store that cannot grow a repair cannot tell what is free: no block is made there.
    pub(super) fn missing_block(&self, cluster: u64) -> Stop {
        let what = "a missing refcount block, on a store that cannot grow";
        ImageFault::unsupported(self.file, what, cluster).into()
    }

    /// Makes the cluster of `run` the refcount block for the region of `cluster`.
    pub(super) fn block_for(&mut self, ctx: &mut Ctx, run: Run, cluster: u64) -> Step<()> {
        let offset = run.first << self.kind.cluster_bits;
        if !self.is_beyond_file(ctx, run.first) {
            return Err(self.missing_block(cluster));
        }
        let entry_at = self.reftable_entry_offset(cluster);
        // Its bytes are never written: beyond the file's end they are zeros.
        ctx.meta.forget(self.file, offset, self.cluster_bytes());
        ctx.meta.reserve(self.file, self.run_place(run))?;
        ctx.meta.reserve(self.file, entry_at)?;
        ctx.meta.reserve(self.file, self.run_place(run))?;
        self.take_run(ctx, run);
        self.writer_mut().tables.insert(run.first);
        ctx.meta.put(self.file, entry_at, &offset.to_be_bytes(), Phase::REACH);
        Ok(())
    }

    /// Looks for a hole left by what was freed, a little at a time.
    fn find_hole(&mut self, ctx: &mut Ctx, want: Lengths) -> Step<Option<Run>> {
        let space = &self.writer().space;
        let (hole, end) = (space.hole, space.end);
        if hole >= end {
            return Ok(None);
        }
        if self.refcount_block(ctx, hole)?.is_none() {
            let next = ((hole >> self.block_counts_bits()) + 1) << self.block_counts_bits();
            self.writer_mut().space.hole = next;
            return Ok(None);
        }
        let (skipped, run) = self.scan(ctx, hole, want, end)?;
        self.writer_mut().space.hole = hole + skipped;
        Ok(run)
    }

    /// The store has no room after its last used cluster: tries every hole once.
    fn find_in_full_store(&mut self, ctx: &mut Ctx, want: Lengths, limit: u64) -> Step<Run> {
        if !self.writer().space.frees.is_empty() {
            return Err(Stop::NeedFlush);
        }
        loop {
            let (at, longest) = self.writer().space.scan.unwrap_or((1, 0));
            let longest = longest.max(want.least);
            if at >= limit.min(self.covered_clusters()) {
                self.writer_mut().space.scan = None;
                if longest > want.least {
                    // What was too short for another may do.
                    continue;
                }
                let fault = ImageFault::new(FaultKind::Full, self.file, "a new cluster");
                let bytes = limit << self.kind.cluster_bits;
                let value = bytes.saturating_add(self.cluster_bytes());
                return Err(ImageFault { value, limit: bytes, ..fault }.into());
            }
            if self.refcount_block(ctx, at)?.is_none() {
                self.start_block(ctx, at)?;
                self.run_job(ctx)?;
                continue;
            }
            let (skipped, run) = self.scan(ctx, at, want, limit)?;
            self.writer_mut().space.scan = Some((at + skipped, longest));
            if let Some(run) = run {
                return Ok(run);
            }
        }
    }

    /// Looks for a free run from `at` on and below `limit`, in the cache block that counts `at`:
    /// clusters passed over, and the run.
    fn scan(&self, ctx: &mut Ctx, at: u64, want: Lengths, limit: u64) -> Step<(u64, Option<Run>)> {
        let block = self.refcount_block(ctx, at)?.expect("the caller saw the block");
        let order = self.header.refcount_order;
        let (place, index) = self.count_place(block, at);
        let in_block = 1 << self.block_counts_bits();
        let in_block = in_block - at % in_block;
        let to_edge = (((BLOCK_BYTES - place % BLOCK_BYTES) * 8) >> order) - index;
        let here = in_block.min(to_edge).min(limit - at);
        let bytes = (((index + here) << order).div_ceil(8)) as usize;
        let bytes = ctx.meta.slice(self.file, place, bytes)?;
        let free = |n: u64| count_in(bytes, order, index + n) == 0;
        let most = here.min(SCAN_AT_ONCE);
        let mut start = 0;
        while start < most {
            let rest = (start..here).take_while(|&n| n - start < want.want && free(n));
            let count = rest.count() as u64;
            if count >= want.least {
                return Ok((start, Some(Run { first: at + start, count, block })));
            }
            start += count + 1;
        }
        Ok((start.min(here), None))
    }

    /// Where the counts of a run stand, to pin before [`Qcow2::take_run`].
    pub(super) fn run_place(&self, run: Run) -> u64 {
        self.count_place(run.block, run.first).0
    }

    /// Counts a run as used. Its place is pinned or reserved in this step.
    pub(super) fn take_run(&mut self, ctx: &mut Ctx, run: Run) {
        self.writer_mut().compared.forget();
        for cluster in run.first..run.first + run.count {
            self.put_count(ctx, run.block, cluster, 1);
        }
        let bits = self.kind.cluster_bits;
        let end = run.first + run.count;
        ctx.files.grow(self.file, end << bits);
        let space = &mut self.writer_mut().space;
        if run.first <= space.end && space.end < end {
            space.end = end;
        }
        if run.first <= space.hole && space.hole < end {
            space.hole = end;
        }
    }

    /// Clusters that the store can hold, and that offsets in tables can name.
    pub(super) fn clusters_max(&self, ctx: &Ctx) -> u64 {
        let nameable = 1u64 << (56 - self.kind.cluster_bits);
        let info = ctx.files.info(self.file);
        if info.can_grow {
            return nameable;
        }
        (info.size_bytes >> self.kind.cluster_bits).min(nameable)
    }

    /// Has this cluster never been written, so that it reads as zeros?
    pub(super) fn is_beyond_file(&self, ctx: &Ctx, cluster: u64) -> bool {
        let info = ctx.files.info(self.file);
        info.can_grow && cluster << self.kind.cluster_bits >= info.size_bytes
    }

    /// Goes on with what takes several steps.
    pub(super) fn run_job(&mut self, ctx: &mut Ctx) -> Step<()> {
        match self.writer().space.job {
            Job::None => Ok(()),
            Job::Block { cluster, zeroed } => self.run_block(ctx, cluster, zeroed),
            Job::Table { first, blocks, clusters, written } => {
                self.run_table(ctx, first, blocks, clusters, written)
            }
            Job::Row { first, blocks, clusters, written } => {
                self.run_row(ctx, (first, blocks, clusters), written)
            }
        }
    }

    /// Makes a refcount block at `cluster`, which counts itself.
    fn run_block(&mut self, ctx: &mut Ctx, cluster: u64, mut zeroed: u64) -> Step<()> {
        let offset = cluster << self.kind.cluster_bits;
        let entry_at = self.reftable_entry_offset(cluster);
        ctx.meta.reserve(self.file, entry_at)?;
        let (count_at, _) = self.count_place(offset, cluster);
        if self.is_beyond_file(ctx, cluster) {
            zeroed = self.cluster_bytes();
            // Only the part that counts the block itself needs to be written.
            if self.cluster_bytes() >= BLOCK_BYTES {
                ctx.meta.forget(self.file, offset, self.cluster_bytes());
                ctx.meta.create(self.file, count_at / BLOCK_BYTES * BLOCK_BYTES, Phase::BEFORE)?;
            } else {
                self.zero_piece(ctx, offset)?;
            }
        }
        while zeroed < self.cluster_bytes() {
            zeroed += self.zero_piece(ctx, offset + zeroed)?;
            self.writer_mut().space.job = Job::Block { cluster, zeroed };
        }
        ctx.meta.reserve(self.file, entry_at)?;
        ctx.meta.reserve(self.file, count_at)?;
        self.put_count(ctx, offset, cluster, 1);
        ctx.meta.put(self.file, entry_at, &offset.to_be_bytes(), Phase::REACH);
        ctx.files.grow(self.file, offset + self.cluster_bytes());
        self.writer_mut().tables.insert(cluster);
        self.writer_mut().space.job = Job::None;
        Ok(())
    }

    /// Zeroes a cache block's worth of a new table, or the cluster if that is smaller.
    fn zero_piece(&self, ctx: &mut Ctx, offset: u64) -> Step<u64> {
        let zeros = [0; BLOCK_BYTES as usize];
        let len = self.cluster_bytes().min(BLOCK_BYTES);
        self.put_piece(ctx, offset, &zeros[..len as usize])
    }

    /// Plans a refcount table twice as large, in the first clusters that the old one cannot
    /// count, together with the refcount blocks that count it.
    pub(super) fn start_table(&mut self, ctx: &mut Ctx) -> Step<()> {
        let bits = self.kind.cluster_bits;
        let old = u64::from(self.header.reftable_clusters);
        let max = REFTABLE_BYTES_MAX >> bits;
        let clusters = (old * 2).min(max);
        if clusters <= old {
            let fault = ImageFault::new(FaultKind::Full, self.file, "the refcount table");
            return Err(ImageFault { value: old + 1, limit: max, ..fault }.into());
        }
        let per_block = 1 << self.block_counts_bits();
        let blocks = clusters.div_ceil(per_block - 1);
        let first = self.covered_clusters();
        let limit = self.clusters_max(ctx);
        if first + blocks + clusters > limit {
            let fault = ImageFault::new(FaultKind::Full, self.file, "the refcount table");
            return Err(ImageFault { value: first + blocks + clusters, limit, ..fault }.into());
        }
        self.check_free(ctx, Run::uncounted(first, blocks + clusters))?;
        self.writer_mut().space.job = Job::Table { first, blocks, clusters, written: 0 };
        Ok(())
    }

    fn run_table(
        &mut self,
        ctx: &mut Ctx,
        first: u64,
        blocks: u64,
        clusters: u64,
        mut written: u64,
    ) -> Step<()> {
        let bits = self.kind.cluster_bits;
        let base = first << bits;
        let end = (blocks + clusters) << bits;
        while written < end {
            written += self.table_piece(ctx, first, blocks, clusters, written)?;
            self.writer_mut().space.job = Job::Table { first, blocks, clusters, written };
        }
        if !self.writer().space.frees.room(1) {
            return Err(Stop::NeedFlush);
        }
        let (table, len) = (base + (blocks << bits), clusters as u32);
        let mut bytes = [0; 12];
        bytes[..8].copy_from_slice(&table.to_be_bytes());
        bytes[8..].copy_from_slice(&len.to_be_bytes());
        ctx.meta.set(self.file, field::REFTABLE, &bytes, Phase::HEADER)?;
        let old = self.header.reftable_offset >> bits;
        let old_len = u64::from(self.header.reftable_clusters);
        (self.header.reftable_offset, self.header.reftable_clusters) = (table, len);
        ctx.files.grow(self.file, base + end);
        let writer = self.writer_mut();
        (first..first + blocks).for_each(|cluster| writer.tables.insert(cluster));
        writer.space.frees.push(old, old_len, false);
        writer.space.job = Job::None;
        writer.space.end = first + blocks + clusters;
        // Clusters that only the new table counts wait until the header names it.
        writer.awaits_flush = true;
        self.guard_tables();
        Err(Stop::NeedFlush)
    }

    /// One piece of the new blocks and table: the counts of themselves, or entries.
    fn table_piece(
        &mut self,
        ctx: &mut Ctx,
        first: u64,
        blocks: u64,
        clusters: u64,
        at: u64,
    ) -> Step<u64> {
        let bits = self.kind.cluster_bits;
        let Some(within) = at.checked_sub(blocks << bits) else {
            return self.counts_piece(ctx, first, first + blocks + clusters, at);
        };
        let piece = self.cluster_bytes().min(BLOCK_BYTES);
        let mut bytes = [0; BLOCK_BYTES as usize];
        let bytes = &mut bytes[..piece as usize];
        let old_bytes = u64::from(self.header.reftable_clusters) << bits;
        if within < old_bytes {
            ctx.meta.get(self.file, self.header.reftable_offset + within, bytes)?;
        } else {
            let entries = bytes.chunks_exact_mut(8);
            for (block, entry) in ((within - old_bytes) / 8..blocks).zip(entries) {
                let offset = (first + block) << bits;
                entry.copy_from_slice(&offset.to_be_bytes());
            }
        }
        self.put_piece(ctx, (first << bits) + at, bytes)
    }

    /// One piece, at byte `at`, of refcount blocks that stand together from cluster `first` on
    /// and count all from there up to `end`.
    pub(super) fn counts_piece(&self, ctx: &mut Ctx, first: u64, end: u64, at: u64) -> Step<u64> {
        let piece = self.cluster_bytes().min(BLOCK_BYTES);
        let mut bytes = [0; BLOCK_BYTES as usize];
        let order = self.header.refcount_order;
        let start = first + ((at * 8) >> order);
        for index in 0..((piece * 8) >> order) {
            set_count_in(&mut bytes, order, index, (start + index < end).into());
        }
        self.put_piece(ctx, (first << self.kind.cluster_bits) + at, &bytes[..piece as usize])
    }

    /// Writes a cache block's worth of a new table, or a cluster if that is smaller.
    pub(super) fn put_piece(&self, ctx: &mut Ctx, to: u64, bytes: &[u8]) -> Step<u64> {
        if bytes.len() as u64 == BLOCK_BYTES {
            ctx.meta.create(self.file, to, Phase::BEFORE)?;
            ctx.meta.put(self.file, to, bytes, Phase::BEFORE);
        } else {
            ctx.meta.set(self.file, to, bytes, Phase::BEFORE)?;
        }
        Ok(bytes.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    //! Would miss: the order of writes; the power-cut tests of the tool hold that.

    use super::*;

    #[test]
    fn counts_of_every_width_stand_where_the_specification_says() {
        for order in 0..=6 {
            let mut bytes = [0; 64];
            let max = u64::MAX >> (64 - (1u32 << order));
            for index in 0..8 {
                set_count_in(&mut bytes, order, index, (index * 37 + 1) & max);
            }
            for index in 0..8 {
                assert_eq!(count_in(&bytes, order, index), (index * 37 + 1) & max);
            }
        }
        // Sub-byte counts start at the least significant bit, whole ones are big-endian.
        let mut bytes = [0; 8];
        set_count_in(&mut bytes, 1, 1, 3);
        assert_eq!(bytes[0], 0b1100);
        set_count_in(&mut bytes, 4, 1, 0x102);
        assert_eq!(bytes[..4], [0b1100, 0, 1, 2]);
    }

    #[test]
    fn what_is_freed_in_a_row_takes_one_place() {
        let mut frees = Frees::new();
        for cluster in 5..9 {
            frees.push(cluster, 1, false);
        }
        frees.push(20, 2, false);
        assert_eq!(frees.list.len(), 2);
        assert!(frees.room(FREES_MAX - 2) && !frees.room(FREES_MAX - 1));
        frees.flushed();
        assert!(frees.list.iter().all(|free| free.ready));
    }
}
