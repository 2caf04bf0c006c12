//! The scan of an image whose need-check bit is set, before its first write.
//!
//! It clears what points outside the file (QEMU's repair) and refuses the image when two
//! entries name one cluster. Memory is one bitmap whatever the image's size: a large file is
//! gone through once for each window of it. It keeps its place between calls and must never
//! pass over an entry it has not looked at.

use alloc::boxed::Box;

use super::{Tables, ZERO_CLUSTER};
use crate::append::Shape;
use crate::fault::ImageFault;
use crate::format::Ctx;
use crate::meta::Phase;
use crate::types::{Step, Stop};

/// Clusters that one pass looks at: 64 KiB of bits, 32 GiB of file in clusters of 64 KiB.
const WINDOW_CLUSTERS: u64 = 64 * WORDS as u64;
const WORDS: usize = 8192;

pub(super) struct Scan {
    used: Box<[u64; WORDS]>,
    /// First cluster of the window.
    window: u64,
    /// The L1 table's own clusters are marked.
    started: bool,
    l1_index: u64,
    /// The next entry of that L2 table; `None` before the table itself is marked.
    l2_index: Option<u64>,
}

impl Scan {
    pub fn new() -> Scan {
        Scan { used: Box::new([0; WORDS]), window: 0, started: false, l1_index: 0, l2_index: None }
    }

    /// Goes on; `Ok` when all windows are done. It stops after each, so that others are served.
    pub fn step(&mut self, ctx: &mut Ctx, tables: &Tables) -> Step<()> {
        let clusters = ctx.files.size(tables.file).div_ceil(tables.header.cluster_bytes);
        self.pass(ctx, tables)?;
        if clusters - self.window.min(clusters) <= WINDOW_CLUSTERS {
            return Ok(());
        }
        self.used.fill(0);
        self.window += WINDOW_CLUSTERS;
        (self.started, self.l1_index) = (false, 0);
        Err(Stop::NeedFlush)
    }

    fn pass(&mut self, ctx: &mut Ctx, tables: &Tables) -> Step<()> {
        let (file, header) = (tables.file, &tables.header);
        if !self.started {
            self.mark(tables, header.l1_offset, header.table_bytes, header.l1_offset)?;
            self.started = true;
        }
        while self.l1_index < header.table_entries() {
            let l1_at = header.l1_offset + self.l1_index * 8;
            let table = ctx.meta.get_u64_le(file, l1_at)?;
            if table != 0 && !tables.is_valid(ctx, table, header.table_bytes) {
                ctx.meta.set(file, l1_at, &[0; 8], Phase::DIRECTORY)?;
            } else if table != 0 {
                self.table(ctx, tables, (l1_at, table))?;
            }
            self.l1_index += 1;
            self.l2_index = None;
        }
        Ok(())
    }

    fn table(&mut self, ctx: &mut Ctx, tables: &Tables, (l1_at, table): (u64, u64)) -> Step<()> {
        let (file, header) = (tables.file, &tables.header);
        let mut index = match self.l2_index {
            Some(index) => index,
            None => {
                self.mark(tables, table, header.table_bytes, l1_at)?;
                0
            }
        };
        self.l2_index = Some(index);
        while index < header.table_entries() {
            let at = table + index * 8;
            let value = ctx.meta.get_u64_le(file, at)?;
            if value > ZERO_CLUSTER {
                if tables.is_valid(ctx, value, tables.cluster_bytes()) {
                    self.mark(tables, value, header.cluster_bytes, at)?;
                } else {
                    ctx.meta.set(file, at, &[0; 8], Phase::TABLE)?;
                }
            }
            index += 1;
            self.l2_index = Some(index);
        }
        Ok(())
    }

    /// Marks `bytes` at `offset`, which the entry at `named_at` names.
    fn mark(
        &mut self,
        tables: &Tables,
        offset: u64,
        bytes: u64,
        named_at: u64,
    ) -> Result<(), ImageFault> {
        let first = offset / tables.header.cluster_bytes;
        let bits = (first..first + bytes / tables.header.cluster_bytes)
            .filter_map(|cluster| cluster.checked_sub(self.window))
            .filter(|&bit| bit < WINDOW_CLUSTERS);
        for bit in bits.clone() {
            if self.used[(bit / 64) as usize] & (1 << (bit % 64)) != 0 {
                let field = "an entry, naming a cluster that another one names,";
                return Err(ImageFault::corrupt(tables.file, field, named_at, offset));
            }
        }
        for bit in bits {
            self.used[(bit / 64) as usize] |= 1 << (bit % 64);
        }
        Ok(())
    }
}
