//! A new refcount table in place of one that is lost, lies outside of the file or over something
//! else, or names blocks that do (as `qemu-img check -r all` makes one).
//!
//! Order guarded: the new table and its blocks lie behind all that the file holds, so nothing that
//! anything points at is written; they are durable before the header, in one sector, names the
//! table. A power cut before leaves the image as it was. It must never be begun unless every
//! reference to every cluster is known: what is not referred to counts as free afterwards. Memory:
//! the window of the check.

use crate::check::Repair;
use crate::format::Ctx;
use crate::meta::Phase;
use crate::types::{Step, Stop};

use super::Qcow2;
use super::check::Checker;
use super::header::{REFTABLE_BYTES_MAX, field};

impl Qcow2 {
    /// Looks at what a check found; if the refcount table is to be made anew, it is, empty, and the
    /// counts of all clusters are to be put into it. The header in the file names the old one yet.
    pub(super) fn begin_rebuild(&mut self, ctx: &mut Ctx, c: &mut Checker) -> bool {
        let known = !c.broken && !c.uncountable;
        let wanted = c.replaces && c.params.repair == Repair::All && c.structure > 0;
        let info = ctx.files.info(self.file);
        if !wanted || !known || !info.can_grow || self.writer.is_none() {
            return false;
        }
        let bits = self.kind.cluster_bits;
        let first = c.limit;
        let Some(clusters) = self.table_clusters(first) else { return false };
        let place = first << bits;
        ctx.meta.forget(self.file, place, clusters << bits);
        (self.header.reftable_offset, self.header.reftable_clusters) = (place, clusters as u32);
        c.limit = first + clusters;
        ctx.files.grow(self.file, c.limit << bits);
        let writer = self.writer_mut();
        writer.space.set_end(c.limit);
        writer.compared.forget();
        self.guard_tables();
        true
    }

    /// Clusters of a table that starts at cluster `first` and can name a block for every cluster
    /// up to its own end and that of its blocks.
    fn table_clusters(&self, first: u64) -> Option<u64> {
        let bits = self.kind.cluster_bits;
        let (mut blocks, mut clusters) = (1, 1);
        // Each round only makes room for the last one's: it settles at once.
        loop {
            let needed = (first + clusters + blocks).div_ceil(1 << self.block_counts_bits());
            let needed = (needed, (needed * 8).div_ceil(1 << bits));
            if needed.1 << bits > REFTABLE_BYTES_MAX {
                return None;
            }
            if needed == (blocks, clusters) {
                return Some(clusters);
            }
            (blocks, clusters) = needed;
        }
    }

    /// The header names the new table, once all counts are durable.
    pub(super) fn switch_tables(&mut self, ctx: &mut Ctx, c: &mut Checker) -> Step<()> {
        if ctx.meta.is_dirty() {
            return Err(Stop::NeedFlush);
        }
        let mut bytes = [0; 12];
        bytes[..8].copy_from_slice(&self.header.reftable_offset.to_be_bytes());
        bytes[8..].copy_from_slice(&self.header.reftable_clusters.to_be_bytes());
        ctx.meta.set(self.file, field::REFTABLE, &bytes, Phase::HEADER)?;
        self.header.lost = None;
        let end = self.writer().space.end() << self.kind.cluster_bits;
        c.report.end_bytes = c.report.end_bytes.max(end);
        c.report.corruptions_fixed += core::mem::take(&mut c.structure);
        Ok(())
    }
}
