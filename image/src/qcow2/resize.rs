//! Growing the disk.
//!
//! Order guarded: a longer L1 table is written whole (`BEFORE`) before the header, in one sector,
//! names it together with the new size (`HEADER`); the old one is freed after that is durable.

use crate::fault::{FaultKind, ImageFault};
use crate::format::Ctx;
use crate::meta::{BLOCK_BYTES, Phase};
use crate::types::{ResizePlan, SECTOR_BYTES, Step, Stop};

use super::Qcow2;
use super::header::{L1_BYTES_MAX, field};

/// A longer L1 table that is being made: its clusters, which count as used, and how many bytes are
/// written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Growth {
    first: u64,
    clusters: u64,
    written: u64,
    /// Changes of the L1 table when the copying began.
    changes: u64,
}

impl Growth {
    /// Its first cluster and how many there are.
    pub fn place(&self) -> (u64, u64) {
        (self.first, self.clusters)
    }
}

impl Qcow2 {
    pub(super) fn grow(&mut self, ctx: &mut Ctx, sectors: u64) -> Step<ResizePlan> {
        self.before_change(ctx)?;
        if !self.kind.v3 && self.header.snapshots > 0 {
            let what = "growing a version 2 image with snapshots (they do not say their size)";
            return Err(ImageFault::unsupported(self.file, what, 2).into());
        }
        let bytes = sectors.checked_mul(SECTOR_BYTES).filter(|&bytes| bytes >> 63 == 0);
        let Some(bytes) = bytes else {
            let max = i64::MAX as u64 / SECTOR_BYTES;
            return Err(ImageFault::limit(self.file, "sectors", sectors, max).into());
        };
        let entries = bytes.div_ceil(1 << self.l2_reach_bits());
        if entries * 8 > L1_BYTES_MAX {
            let what = "the L1 table, bytes";
            return Err(ImageFault::limit(self.file, what, entries * 8, L1_BYTES_MAX).into());
        }
        self.check_beyond(ctx, entries)?;
        if self.kind.data_file {
            let info = ctx.files.info(self.data);
            if !info.can_grow && bytes > info.size_bytes {
                let fault = ImageFault::new(FaultKind::Full, self.data, "the data file");
                return Err(ImageFault { value: bytes, limit: info.size_bytes, ..fault }.into());
            }
        }
        let table = match entries > u64::from(self.header.l1_entries) {
            true => match self.make_l1(ctx, entries) {
                Err(Stop::Fault(fault)) => {
                    self.give_up_growth();
                    return Err(fault.into());
                }
                made => Some(made?),
            },
            false => None,
        };
        ctx.meta.reserve(self.file, field::SIZE)?;
        ctx.meta.put(self.file, field::SIZE, &bytes.to_be_bytes(), Phase::HEADER);
        self.header.size_bytes = bytes;
        if let Some(offset) = table {
            let mut fields = [0; 12];
            fields[..4].copy_from_slice(&(entries as u32).to_be_bytes());
            fields[4..].copy_from_slice(&offset.to_be_bytes());
            ctx.meta.put(self.file, field::L1, &fields, Phase::HEADER);
            let old = self.header.l1_offset >> self.kind.cluster_bits;
            let len = u64::from(self.header.l1_entries) * 8;
            let len = len.div_ceil(self.cluster_bytes());
            (self.header.l1_offset, self.header.l1_entries) = (offset, entries as u32);
            let writer = self.writer_mut();
            writer.growth = None;
            writer.space.frees.push(old, len, false);
            // Entries of the new table must not be written before the header names it.
            writer.awaits_flush = true;
            self.guard_tables();
        }
        let grow = self.kind.data_file.then_some((self.data, bytes));
        if let Some((file, bytes)) = grow {
            ctx.files.grow(file, bytes);
        }
        Ok(ResizePlan { grow })
    }

    /// Saved machine state lies beyond the end of the disk, behind entries of the same L1 table:
    /// in a longer disk it would show (as it does when QEMU grows it).
    fn check_beyond(&mut self, ctx: &mut Ctx, entries: u64) -> Step<()> {
        let end = entries.min(self.header.l1_entries.into());
        let first = self.header.size_bytes.div_ceil(1 << self.l2_reach_bits());
        for entry in first.max(self.writer().empty_to)..end {
            let at = self.header.l1_offset + entry * 8;
            let word = ctx.meta.get_u64_be(self.file, at)?;
            if word != 0 {
                let what = "growing a disk over the machine state saved behind its end: convert it";
                let fault = ImageFault::unsupported(self.file, what, word);
                return Err(ImageFault { offset: at, ..fault }.into());
            }
            self.writer_mut().empty_to = entry + 1;
        }
        Ok(())
    }

    /// Writes an L1 table of `entries` entries with the old ones in it; gives its offset.
    fn make_l1(&mut self, ctx: &mut Ctx, entries: u64) -> Step<u64> {
        if !self.writer().space.frees.room(2) {
            return Err(Stop::NeedFlush);
        }
        // It may be what takes a row for the table.
        self.run_job(ctx)?;
        let clusters = (entries * 8).div_ceil(self.cluster_bytes());
        if self.writer().growth.is_some_and(|growth| growth.clusters != clusters) {
            // Another size was asked for meanwhile.
            self.give_up_growth();
        }
        if self.writer().growth.is_none() {
            self.take_l1(ctx, clusters)?;
        }
        let mut growth = self.writer().growth.expect("its clusters are taken");
        let changes = self.writer().l1_changes;
        if growth.changes != changes {
            (growth.written, growth.changes) = (0, changes);
        }
        let offset = growth.first << self.kind.cluster_bits;
        let piece = self.cluster_bytes().min(BLOCK_BYTES);
        let old_bytes = u64::from(self.header.l1_entries) * 8;
        while growth.written < clusters << self.kind.cluster_bits {
            let mut bytes = [0; BLOCK_BYTES as usize];
            let bytes = &mut bytes[..piece as usize];
            let from = growth.written;
            if from < old_bytes {
                let len = (old_bytes - from).min(piece) as usize;
                ctx.meta.get(self.file, self.header.l1_offset + from, &mut bytes[..len])?;
            }
            growth.written += self.put_piece(ctx, offset + from, bytes)?;
            self.writer_mut().growth = Some(growth);
        }
        Ok(offset)
    }

    /// Takes the clusters for a longer L1 table, in a row. Shorter stretches are passed over: on a
    /// store in shreds there may be more of them than can be given back at once.
    fn take_l1(&mut self, ctx: &mut Ctx, clusters: u64) -> Step<()> {
        // A region starts with the refcount block that counts it: the rest is not enough. Nor is
        // more looked at at once than the counts in a block of the cache.
        if clusters >= 1 << self.block_counts_bits() || clusters > self.cached_counts() {
            self.start_row(ctx, clusters)?;
            return self.run_job(ctx);
        }
        let run = self.find_end(ctx, clusters)?;
        ctx.meta.reserve(self.file, self.run_place(run))?;
        self.take_run(ctx, run);
        self.grow_into(run.first, clusters);
        Ok(())
    }

    /// The clusters for a longer L1 table are taken.
    pub(super) fn grow_into(&mut self, first: u64, clusters: u64) {
        let writer = self.writer_mut();
        let changes = writer.l1_changes;
        writer.growth = Some(Growth { first, clusters, written: 0, changes });
    }
}
