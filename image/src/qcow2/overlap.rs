//! What guest data and new tables must not lie on (QEMU's overlap checks of the same names), and
//! the corrupt mark of an image where that was tried or a table was found broken.
//!
//! Guarded: before a place is written, it is compared with the header, the L1 table, the refcount
//! table, the snapshot table and the bitmap directory, exactly; with L2 tables and refcount blocks
//! through a filter of fixed size that never misses one, and exactly where it hits. A break is
//! marked in the header, durably, before anything else is written: then writes are refused until
//! a check has mended the image, and reads go on.

use alloc::boxed::Box;

use crate::fault::{FaultKind, ImageFault};
use crate::format::Ctx;
use crate::meta::Phase;
use crate::types::{Step, Stop};

use super::Qcow2;
use super::entry::OFFSET;
use super::header::{INCOMPATIBLE_CORRUPT, field};
use super::map::L2;
use super::refcount::Run;

/// Entries of the L1 and the refcount table that are known to the filter or compared (ours: the
/// tables of 4 TiB with clusters of 64 KiB; what larger ones name beyond that is not compared).
const ENTRIES_MAX: u64 = 8192;
/// An entry that may be there in a file that was cut short: refused, but no reason for the mark.
pub(super) const BEYOND_FILE: &str = "an L2 entry that names space beyond the file";
/// Words of the filter: 4 KiB, eight bits for each table of 2 TiB in clusters of 64 KiB.
const FILTER_WORDS: usize = 512;

/// Clusters that hold L2 tables and refcount blocks, as a Bloom filter: what it does not hold is
/// none.
pub(super) struct Filter {
    words: Box<[u64; FILTER_WORDS]>,
    /// Entries of both tables taken in at open.
    scanned: u64,
}

impl Filter {
    pub fn new() -> Filter {
        Filter { words: Box::new([0; FILTER_WORDS]), scanned: 0 }
    }

    fn places(cluster: u64) -> [(usize, u64); 2] {
        let hash = cluster.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        [hash >> 49, (hash >> 34) & 0x7fff].map(|bit| ((bit / 64) as usize, 1 << (bit % 64)))
    }

    pub fn insert(&mut self, cluster: u64) {
        for (word, mask) in Filter::places(cluster) {
            self.words[word] |= mask;
        }
    }

    fn may_hold(&self, cluster: u64) -> bool {
        Filter::places(cluster).iter().all(|&(word, mask)| self.words[word] & mask != 0)
    }
}

/// Comparisons of as many requests keep their place between tries.
#[derive(Default)]
pub(super) struct Compared([Option<(Run, u64)>; 8]);

impl Compared {
    /// The place kept for a run, and the entries compared.
    fn place_of(&mut self, run: Run) -> (usize, u64) {
        let kept = self.0.iter().position(|kept| kept.is_some_and(|(of, _)| of == run));
        if let Some(at) = kept {
            return (at, self.0[at].map_or(0, |(_, n)| n));
        }
        // The one that is furthest has most to lose.
        let order = |kept: &Option<(Run, u64)>| kept.map_or(0, |(_, n)| n + 1);
        let least = (0..self.0.len()).min_by_key(|&at| order(&self.0[at]));
        (least.expect("some places"), 0)
    }

    /// Tables have changed.
    pub fn forget(&mut self) {
        *self = Compared::default();
    }
}

impl Qcow2 {
    /// Entries of the L1 table, and of the refcount table below the file's end, to look at.
    fn entries_compared(&self, ctx: &Ctx) -> (u64, u64) {
        let blocks = u64::from(self.header.reftable_clusters) << (self.kind.cluster_bits - 3);
        // Past the file's end the table has no blocks.
        let end = ctx.files.size(self.file) >> self.kind.cluster_bits;
        let used = (end >> self.block_counts_bits()) + 1;
        let entries = u64::from(self.header.l1_entries).min(ENTRIES_MAX);
        (entries, blocks.min(used).min(ENTRIES_MAX))
    }

    /// The cluster that entry `n` of both tables names, L1 entries first; `None` for none.
    fn table_at(&self, ctx: &mut Ctx, n: u64, entries: u64) -> Step<Option<u64>> {
        let at = match n.checked_sub(entries) {
            None => self.header.l1_offset + n * 8,
            Some(block) => self.header.reftable_offset + block * 8,
        };
        let word = ctx.meta.get_u64_be(self.file, at)?;
        Ok((word & OFFSET != 0).then_some((word & OFFSET) >> self.kind.cluster_bits))
    }

    /// Fills the filter, at open; keeps its place between calls.
    pub(super) fn fill_filter(&mut self, ctx: &mut Ctx) -> Step<()> {
        let (entries, blocks) = self.entries_compared(ctx);
        while self.writer().tables.scanned < entries + blocks {
            let n = self.writer().tables.scanned;
            let cluster = self.table_at(ctx, n, entries)?;
            let tables = &mut self.writer_mut().tables;
            cluster.into_iter().for_each(|cluster| tables.insert(cluster));
            tables.scanned += 1;
        }
        Ok(())
    }

    /// Does a live L2 table or refcount block lie in these clusters? `what` says why none may.
    pub(super) fn compare_tables(
        &mut self,
        ctx: &mut Ctx,
        run: Run,
        what: &'static str,
    ) -> Step<()> {
        let (entries, blocks) = self.entries_compared(ctx);
        // More entries than the cache may hold: what was compared is not looked at again.
        let kept = &mut self.writer_mut().compared;
        let (at, mut n) = kept.place_of(run);
        while n < entries + blocks {
            self.writer_mut().compared.0[at] = Some((run, n));
            if let Some(cluster) = self.table_at(ctx, n, entries)?
                && (run.first..run.first + run.count).contains(&cluster)
            {
                let offset = cluster << self.kind.cluster_bits;
                return Err(ImageFault::corrupt(self.file, what, offset, offset).into());
            }
            n += 1;
        }
        self.writer_mut().compared.0[at] = Some((run, n));
        Ok(())
    }

    /// Must a host cluster be compared with the tables?
    pub(super) fn may_be_table(&self, host: u64) -> bool {
        !self.kind.data_file && self.writer().tables.may_hold(host >> self.kind.cluster_bits)
    }

    /// Guest data is about to go to clusters that L2 entries named: so many of them are no table.
    pub(super) fn check_data(&mut self, ctx: &mut Ctx, host: u64, clusters: u64) -> Step<u64> {
        if self.kind.data_file {
            return Ok(clusters);
        }
        let first = host >> self.kind.cluster_bits;
        let tables = &self.writer().tables;
        match (0..clusters).find(|n| tables.may_hold(first + n)) {
            None => Ok(clusters),
            // One comparison at a time, so that its place is kept.
            Some(0) => {
                let what = "an L2 entry that names a table: its place";
                self.compare_tables(ctx, Run::one(first), what).map(|()| 1)
            }
            Some(count) => Ok(count),
        }
    }

    /// May this cluster be written as a table? Not what the header names.
    pub(super) fn check_table(&self, what: &'static str, at: u64, offset: u64) -> Step<()> {
        let Some(writer) = &self.writer else { return Ok(()) };
        if writer.overlaps_guarded(offset, self.cluster_bytes()) {
            return Err(ImageFault::corrupt(self.file, what, at, offset).into());
        }
        Ok(())
    }

    /// An L2 table whose entries are to change.
    pub(super) fn check_l2(&self, guest: u64, l2: Option<L2>) -> Step<()> {
        let Some(l2) = l2 else { return Ok(()) };
        self.check_table("an L1 entry that names metadata", self.l1_entry_offset(guest), l2.offset)
    }

    /// Notes a break of the format that a request met, so that the image is marked by the next
    /// change that is tried, or when it is closed.
    pub(super) fn note_damage<T>(&mut self, result: Step<T>) -> Step<T> {
        if let (Err(Stop::Fault(fault)), Some(writer)) = (&result, &mut self.writer)
            && fault.kind == FaultKind::Corrupt
            && fault.field != BEYOND_FILE
            && self.header.incompatible & INCOMPATIBLE_CORRUPT == 0
        {
            writer.damage.get_or_insert(*fault);
        }
        result
    }

    /// The same for a change, which waits until the mark is durable.
    pub(super) fn changed<T>(&mut self, ctx: &mut Ctx, result: Step<T>) -> Step<T> {
        let result = self.note_damage(result);
        if let (Err(Stop::Fault(_)), Some(_)) = (&result, &self.writer) {
            self.mark_damage(ctx)?;
        }
        result
    }

    /// Marks an image that damage was found in. Its first call afterwards tells of the damage,
    /// once the mark is durable; later ones meet the mark.
    pub(super) fn mark_damage(&mut self, ctx: &mut Ctx) -> Step<()> {
        let Some(fault) = self.writer().damage else { return Ok(()) };
        let marked = self.header.incompatible & INCOMPATIBLE_CORRUPT != 0;
        if !marked {
            // A flush under way may be past the header: only one begun afterwards counts.
            if ctx.meta.flushing() {
                return Err(Stop::Busy);
            }
            let incompatible = self.header.incompatible | INCOMPATIBLE_CORRUPT;
            // Version 2 has no place for the mark: it holds while the image is open.
            if self.kind.v3 {
                let bytes = incompatible.to_be_bytes();
                ctx.meta.set(self.file, field::INCOMPATIBLE, &bytes, Phase::HEADER)?;
                self.writer_mut().awaits_flush = true;
            }
            self.header.incompatible = incompatible;
        }
        if self.writer().awaits_flush {
            return Err(Stop::NeedFlush);
        }
        self.writer_mut().damage = None;
        Err(fault.into())
    }
}

#[cfg(test)]
mod tests {
    //! Would miss: which places are asked for; the hostile images hold that.

    use super::*;

    #[test]
    fn the_filter_misses_no_table_and_seldom_hits_data() {
        let mut filter = Filter::new();
        (0..2000).for_each(|n| filter.insert(n * 8192 + 5));
        assert!((0..2000).all(|n| filter.may_hold(n * 8192 + 5)));
        let hits = (0..100_000).filter(|n| filter.may_hold(n * 3 + 1_000_000_007)).count();
        assert!(hits < 5000, "{hits} of 100000");
    }
}
