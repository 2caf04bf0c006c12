//! Checking a map: every entry lies in the file, no two name one place, and what lies in the
//! file and is named by nothing is counted as leaked. These formats keep no counts that could be
//! mended, and their leaks end with the file: repair only makes redundant copies equal.
//!
//! References are counted in one bitmap of the caller's budget; a file larger than it covers is
//! gone through once for each window.

use alloc::vec;
use alloc::vec::Vec;

use super::{Entry, Shape, Table};
use crate::check::{CheckParams, CheckProgress, CheckReport, Repair};
use crate::fault::ImageFault;
use crate::format::Ctx;
use crate::meta::Phase;
use crate::types::{FileNo, Step, Stop};

/// Words of the bitmap at least: 8 KiB.
const WORDS_MIN: usize = 1024;

/// A check under way.
pub(crate) struct Checker {
    used: Vec<u64>,
    /// First unit of the window.
    window: u64,
    /// What stands outside tables is marked in this window.
    started: bool,
    /// The next cluster whose entry is looked at.
    cluster: u64,
    /// Units that nothing names, so far, and where the first one lies.
    leaked: u64,
    leaked_at: Option<u64>,
    /// Guest clusters of earlier maps of the same check.
    done_before: u64,
    /// Mending is asked for (what can be mended is the format's own).
    pub repairs: bool,
    pub report: CheckReport,
}

impl Checker {
    pub fn new(params: CheckParams) -> Checker {
        Checker {
            used: vec![0; (params.budget_bytes / 8).max(WORDS_MIN)],
            window: 0,
            started: false,
            cluster: 0,
            leaked: 0,
            leaked_at: None,
            done_before: 0,
            repairs: params.repair != Repair::Nothing,
            report: CheckReport::default(),
        }
    }

    /// Goes on with `shape`; `Ok(true)` when all of it is done and the next map may follow.
    pub fn step<S: Shape>(&mut self, ctx: &mut Ctx, shape: &S) -> Step<bool> {
        let first_pass = self.window == 0;
        if !self.started {
            self.used.fill(0);
            for (offset, bytes) in shape.fixed() {
                self.mark(shape, (offset, bytes), None);
            }
            self.started = true;
        }
        if self.cluster < shape.clusters() {
            self.block(ctx, shape, first_pass)?;
            return Ok(false);
        }
        let file_bytes = ctx.files.size(shape.file());
        self.count_leaks(shape, file_bytes);
        let units = self.used.len() as u64 * 64;
        (self.started, self.cluster) = (false, 0);
        self.window += units;
        if self.window.saturating_mul(shape.unit_bytes()) < file_bytes {
            return Ok(false);
        }
        if self.report.compressed == 0 && shape.counts_leaks() {
            let leaks = (self.leaked * shape.unit_bytes()).div_ceil(shape.cluster_bytes());
            if let Some(offset) = self.leaked_at {
                let field = "space that nothing names, clusters from here on,";
                let problem = ImageFault::corrupt(shape.file(), field, offset, leaks);
                self.report.leak(problem);
                self.report.leaks += leaks - 1;
            }
        }
        self.report.clusters += shape.clusters();
        self.done_before += shape.clusters();
        (self.window, self.leaked, self.leaked_at) = (0, 0, None);
        Ok(true)
    }

    /// How far the check is, for maps of `total` clusters in all.
    pub fn progress(&self, total: u64) -> CheckProgress {
        CheckProgress::More { done: (self.done_before + self.cluster).min(total), total }
    }

    /// The entries of one cache block.
    fn block<S: Shape>(&mut self, ctx: &mut Ctx, shape: &S, first_pass: bool) -> Step<()> {
        let (file, cluster) = (shape.file(), self.cluster);
        let within = cluster % shape.table_clusters();
        let table_rest = (shape.table_clusters() - within).min(shape.clusters() - cluster);
        let (at, copy) = match shape.locate(ctx, cluster) {
            Ok(Table::At { entry, copy }) => (entry, copy),
            Ok(Table::Missing) => {
                self.cluster += table_rest;
                return Ok(());
            }
            Err(Stop::Fault(fault)) => {
                self.bad(first_pass, fault);
                self.cluster += table_rest;
                return Ok(());
            }
            Err(stop) => return Err(stop),
        };
        match shape.entry(ctx, at) {
            Ok(_) | Err(Stop::Fault(_)) => {}
            Err(stop) => return Err(stop),
        }
        if let Some(copy) = copy {
            ctx.meta.reserve(file, copy)?;
        }
        // From here on nothing stops: what is marked is marked once.
        if within == 0 && shape.table_bytes() > 0 {
            for table in [Some(at), copy].into_iter().flatten() {
                self.mark(shape, (table, shape.table_bytes()), Some(at));
            }
        }
        let count = shape.block_clusters(cluster, at, copy);
        for index in 0..count {
            let at = at + index * S::ENTRY_BYTES;
            if let (true, Some(copy)) = (first_pass, copy) {
                self.compare::<S>(ctx, file, (at, copy + index * S::ENTRY_BYTES));
            }
            match shape.entry(ctx, at) {
                Ok(Entry::Data(offset)) => {
                    let bytes = shape.cluster_bytes();
                    self.mark(shape, (offset, bytes), Some(at));
                    self.report.allocated += u64::from(first_pass);
                }
                Ok(Entry::Packed(packed)) => {
                    let end = packed.offset.saturating_add(packed.packed_bytes.into());
                    self.report.end_bytes = self.report.end_bytes.max(end);
                    self.report.allocated += u64::from(first_pass);
                    self.report.compressed += u64::from(first_pass);
                }
                Ok(Entry::Absent | Entry::Zero) => {}
                Err(Stop::Fault(fault)) => self.bad(first_pass, fault),
                Err(_) => self.bad(first_pass, ImageFault::corrupt(file, "an entry", at, 0)),
            }
        }
        self.cluster += count;
        Ok(())
    }

    /// Compares the copies of an entry, both resident. They may differ after a cut between
    /// their writes: no fault, for the first copy alone counts; repair makes them equal.
    fn compare<S: Shape>(&mut self, ctx: &mut Ctx, file: FileNo, (at, copy): (u64, u64)) {
        let mut entries = [[0; 8]; 2];
        let width = S::ENTRY_BYTES as usize;
        for (entry, at) in entries.iter_mut().zip([at, copy]) {
            if ctx.meta.get(file, at, &mut entry[..width]).is_err() {
                return;
            }
        }
        if entries[0] == entries[1] {
            return;
        }
        let field = "a redundant entry, other than the first copy,";
        self.report.note(ImageFault::corrupt(file, field, copy, u64::from_le_bytes(entries[1])));
        if self.repairs {
            ctx.meta.put(file, copy, &entries[0][..width], Phase::TABLE);
            self.report.corruptions += 1;
            self.report.corruptions_fixed += 1;
        }
    }

    fn bad(&mut self, first_pass: bool, fault: ImageFault) {
        if first_pass {
            self.report.corrupt(fault);
        }
    }

    /// Marks a stretch as used. `named` is where it is named, `None` for what is fixed.
    fn mark<S: Shape>(&mut self, shape: &S, (offset, bytes): (u64, u64), named: Option<u64>) {
        let (unit, origin) = (shape.unit_bytes(), shape.origin());
        let end = offset.saturating_add(bytes);
        self.report.end_bytes = self.report.end_bytes.max(end);
        let (Some(offset), Some(end)) = (offset.checked_sub(origin), end.checked_sub(origin))
        else {
            return;
        };
        let window = self.window..self.window + self.used.len() as u64 * 64;
        let units = (offset / unit).max(window.start)..end.div_ceil(unit).min(window.end);
        let mut twice = false;
        for unit in units {
            let bit = unit - window.start;
            let (word, mask) = (&mut self.used[(bit / 64) as usize], 1 << (bit % 64));
            twice |= *word & mask != 0;
            *word |= mask;
        }
        if let (true, Some(at)) = (twice, named) {
            let field = "an entry, naming a place that another one names,";
            self.report.corrupt(ImageFault::corrupt(shape.file(), field, at, offset + origin));
        }
    }

    fn count_leaks<S: Shape>(&mut self, shape: &S, file_bytes: u64) {
        let unit = shape.unit_bytes();
        // The last unit may be short: a file may end within its last cluster.
        let units = file_bytes.saturating_sub(shape.origin()).div_ceil(unit);
        let window_end = self.window + self.used.len() as u64 * 64;
        for index in self.window..units.min(window_end) {
            let bit = index - self.window;
            if self.used[(bit / 64) as usize] & (1 << (bit % 64)) == 0 {
                self.leaked += 1;
                self.leaked_at.get_or_insert(shape.origin() + index * unit);
            }
        }
    }
}
