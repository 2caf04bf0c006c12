//! Checking a VHD: every BAT entry, whether blocks lie in the file, off the metadata and off
//! each other. Bounded memory: the file is looked at window by window, as many blocks at a time
//! as the budget holds.
//!
//! A place that no entry names cannot be given back inside a VHD, so leaks are only counted:
//! between blocks, and behind the last one where the file ends with its blocks.

use alloc::vec::Vec;

use crate::check::{CheckParams, CheckProgress, CheckReport};
use crate::fault::ImageFault;
use crate::format::Ctx;
use crate::types::{SECTOR_BYTES, Step};

use super::Vhd;
use super::header::{BAT_UNUSED, FOOTER_BYTES, Kind};

/// BAT entries looked at in one step.
const ENTRIES_PER_STEP: u64 = 4096;

pub(super) struct Check {
    report: CheckReport,
    /// Sectors where the blocks of the window start, and how many may be kept.
    starts: Vec<u32>,
    starts_max: usize,
    /// The window's first and one past its last sector.
    window: (u64, u64),
    /// Where the next window begins: the smallest start beyond this one.
    beyond: u64,
    /// The last block of the windows before.
    last: Option<u64>,
    entry: u64,
    first_pass: bool,
    /// Entries looked at in all passes.
    done: u64,
}

impl Vhd {
    pub(super) fn begin_check(&mut self, params: CheckParams) {
        let starts_max = (params.budget_bytes / 4).clamp(64, self.entries.max(64) as usize);
        let window = starts_max as u64 * (self.block_bytes() / SECTOR_BYTES);
        let report = CheckReport {
            clusters: self.sectors.div_ceil(self.block_sectors),
            end_bytes: self.metadata_end(),
            ..CheckReport::default()
        };
        self.check = Some(alloc::boxed::Box::new(Check {
            report,
            starts: Vec::with_capacity(starts_max + 1),
            starts_max,
            window: (0, window),
            beyond: u64::MAX,
            last: None,
            entry: 0,
            first_pass: true,
            done: 0,
        }));
    }

    pub(super) fn check_part(&mut self, ctx: &mut Ctx) -> Step<CheckProgress> {
        if self.kind == Kind::Fixed {
            let (clusters, end_bytes) = (self.sectors, self.sectors * SECTOR_BYTES);
            let report =
                CheckReport { clusters, allocated: clusters, end_bytes, ..Default::default() };
            return Ok(CheckProgress::Done(report));
        }
        let mut check = self.check.take().expect("a check was begun");
        let result = self.check_entries(ctx, &mut check);
        let done =
            result.is_ok() && check.entry == self.entries as u64 && self.end_pass(&mut check);
        if done {
            self.count_tail(ctx, &mut check);
            return Ok(CheckProgress::Done(check.report));
        }
        let progress = CheckProgress::More { done: check.done, total: self.entries as u64 };
        self.check = Some(check);
        result.map(|()| progress)
    }

    /// Blocks' room between the last block and the footer.
    fn count_tail(&self, ctx: &Ctx, check: &mut Check) {
        let info = ctx.files.info(self.file);
        let end = info.size_bytes.saturating_sub(FOOTER_BYTES as u64);
        let gap = end.saturating_sub(check.report.end_bytes) / self.block_bytes();
        if info.can_grow && gap > 0 {
            check.report.leaks += gap - 1;
            let (field, at) = ("VHD space behind the last block", check.report.end_bytes);
            check.report.leak(ImageFault::corrupt(self.file, field, at, gap));
        }
    }

    fn check_entries(&self, ctx: &mut Ctx, check: &mut Check) -> Step<()> {
        let stop = (check.entry + ENTRIES_PER_STEP).min(self.entries as u64);
        while check.entry < stop {
            let at = self.entry_offset(check.entry);
            let start = ctx.meta.get_u32_be(self.file, at)?;
            if start != BAT_UNUSED {
                self.check_entry(ctx, check, at, start);
            }
            check.entry += 1;
            check.done += 1;
        }
        Ok(())
    }

    fn check_entry(&self, ctx: &Ctx, check: &mut Check, at: u64, start: u32) {
        let offset = start as u64 * SECTOR_BYTES;
        let end = offset + self.block_bytes();
        if check.first_pass {
            check.report.allocated += 1;
            check.report.end_bytes = check.report.end_bytes.max(end);
            let field = if self.overlaps_metadata(offset) {
                Some("VHD BAT entry, into the metadata")
            } else if end > ctx.files.size(self.file) {
                Some("VHD BAT entry, beyond the end of the file")
            } else if check.entry >= check.report.clusters {
                Some("VHD BAT entry, beyond the end of the disk")
            } else {
                None
            };
            if let Some(field) = field {
                check.report.corrupt(ImageFault::corrupt(self.file, field, at, start as u64));
            }
        }
        let start = start as u64;
        if start >= check.window.1 {
            check.beyond = check.beyond.min(start);
        } else if start >= check.window.0 {
            if check.starts.len() > check.starts_max {
                // More starts than blocks fit into the window: some must overlap.
                let field = "VHD BAT entry, a block on another";
                check.report.corrupt(ImageFault::corrupt(self.file, field, at, start));
            } else {
                check.starts.push(start as u32);
            }
        }
    }

    /// Compares neighbours of the window; true when there is nothing beyond it.
    fn end_pass(&self, check: &mut Check) -> bool {
        check.starts.sort_unstable();
        let block = self.block_bytes() / SECTOR_BYTES;
        for &start in &check.starts {
            let start = start as u64;
            if check.last.is_some_and(|last| start < last + block) {
                let field = "VHD block, on another";
                let at = start * SECTOR_BYTES;
                check.report.corrupt(ImageFault::corrupt(self.file, field, at, start));
            }
            let free = check.last.map_or(self.metadata_end() / SECTOR_BYTES, |last| last + block);
            let gap = start.saturating_sub(free) / block;
            if gap > 0 {
                check.report.leaks += gap - 1;
                let field = "VHD space between blocks";
                let at = free * SECTOR_BYTES;
                check.report.leak(ImageFault::corrupt(self.file, field, at, gap * block));
            }
            check.last = Some(start);
        }
        check.starts.clear();
        let length = check.window.1 - check.window.0;
        check.window = (check.beyond, check.beyond.saturating_add(length));
        check.entry = 0;
        check.first_pass = false;
        core::mem::replace(&mut check.beyond, u64::MAX) == u64::MAX
    }
}
