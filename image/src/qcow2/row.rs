//! Clusters in a row, more than one refcount block counts: for a long L1 table in small clusters.
//!
//! Elsewhere each region of clusters starts with the refcount block that counts it. Here the blocks
//! of all regions stand together before the row, in regions that nothing was counted in. Order
//! guarded as for any block: counts (`BEFORE`) before the refcount table's entries (`REACH`); the
//! row itself belongs to nobody until the header names what is in it.

use crate::fault::{FaultKind, ImageFault};
use crate::format::Ctx;
use crate::meta::Phase;
use crate::types::Step;

use super::Qcow2;
use super::refcount::{Job, Run};

impl Qcow2 {
    /// Finds the place for `clusters` in a row and starts to take them; the growth of the L1 table
    /// has them when the job is done.
    pub(super) fn start_row(&mut self, ctx: &mut Ctx, clusters: u64) -> Step<()> {
        // Each block counts one cluster of the blocks and so many of the row.
        let blocks = clusters.div_ceil((1 << self.block_counts_bits()) - 1);
        loop {
            let first = self.empty_regions(ctx, blocks)?;
            let (end, limit) = (first + blocks + clusters, self.clusters_max(ctx));
            if end > limit {
                let fault = ImageFault::new(FaultKind::Full, self.file, "the L1 table");
                return Err(ImageFault { value: end, limit, ..fault }.into());
            }
            if end <= self.covered_clusters() {
                self.check_free(ctx, Run::uncounted(first, blocks + clusters))?;
                self.writer_mut().space.job = Job::Row { first, blocks, clusters, written: 0 };
                return Ok(());
            }
            self.start_table(ctx)?;
            self.run_job(ctx)?;
        }
    }

    /// The first cluster of so many regions without a refcount block, after all that is used.
    fn empty_regions(&mut self, ctx: &mut Ctx, count: u64) -> Step<u64> {
        let bits = self.block_counts_bits();
        let mut first = self.writer().space.end().div_ceil(1 << bits);
        let mut region = first;
        while region < first + count {
            region += 1;
            if self.refcount_block(ctx, (region - 1) << bits)?.is_some() {
                // A step that stops goes on behind it. Free clusters before it are holes.
                self.writer_mut().space.set_end(region << bits);
                first = region;
            }
        }
        Ok(first << bits)
    }

    /// Writes the blocks, then the entries that name them.
    pub(super) fn run_row(
        &mut self,
        ctx: &mut Ctx,
        (first, blocks, clusters): (u64, u64, u64),
        mut written: u64,
    ) -> Step<()> {
        let bits = self.kind.cluster_bits;
        let len = blocks << bits;
        while written < len + blocks {
            written += match written.checked_sub(len) {
                None => self.counts_piece(ctx, first, first + blocks + clusters, written)?,
                Some(block) => {
                    let at =
                        self.reftable_entry_offset(first + (block << self.block_counts_bits()));
                    let offset = (first + block) << bits;
                    ctx.meta.set(self.file, at, &offset.to_be_bytes(), Phase::REACH)?;
                    self.writer_mut().tables.insert(first + block);
                    1
                }
            };
            self.writer_mut().space.job = Job::Row { first, blocks, clusters, written };
            // Entries name clusters of the file.
            ctx.files.grow(self.file, (first + blocks + clusters) << bits);
        }
        self.writer_mut().space.job = Job::None;
        self.grow_into(first + blocks, clusters);
        Ok(())
    }
}
