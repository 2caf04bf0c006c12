//! Checking a VHD: every BAT entry, whether blocks lie in the file, off the metadata and off
//! each other. Bounded memory: the file is looked at window by window, as many blocks at a time
//! as the budget holds.
//!
//! A place that no entry names is leaked: between blocks, and behind the last one where the file
//! ends with its blocks. A repair (see `repair`) moves blocks into such places and looks again.

use alloc::vec::Vec;

use crate::check::{CheckParams, CheckProgress, CheckReport, Repair};
use crate::fault::ImageFault;
use crate::format::Ctx;
use crate::types::{SECTOR_BYTES, Step};

use super::Vhd;
use super::header::{self, BAT_UNUSED, FOOTER_BYTES, HEADER_BYTES, Header, Kind, LOCATORS};
use super::repair::Mending;

/// BAT entries looked at in one step.
const ENTRIES_PER_STEP: u64 = 4096;

/// Stretches outside blocks: the footer's copy, the header, the BAT, XenServer's batmap and its
/// header, the parent locators.
const FIXED_MAX: usize = 5 + LOCATORS;

pub(super) struct Check {
    pub report: CheckReport,
    /// What is not a block, first sector and one past the last, by place; once it is read.
    fixed: Option<heapless::Vec<(u64, u64), FIXED_MAX>>,
    /// Sectors where the blocks of the window start, and how many may be kept.
    starts: Vec<u32>,
    starts_max: usize,
    /// The window's first and one past its last sector, and the sectors of each.
    window: (u64, u64),
    window_length: u64,
    /// Where the next window begins: the smallest start beyond this one.
    beyond: u64,
    /// The last block of the windows before.
    last: Option<u64>,
    entry: u64,
    first_pass: bool,
    /// Entries looked at in all passes.
    done: u64,
    /// Leaks are to be mended.
    pub mending: Option<Mending>,
}

impl Check {
    /// Everything is to be looked at once more.
    pub fn restart(&mut self) {
        let clusters = self.report.clusters;
        self.report = CheckReport { clusters, ..CheckReport::default() };
        (self.fixed, self.beyond, self.last) = (None, u64::MAX, None);
        (self.window, self.entry, self.first_pass) = ((0, self.window_length), 0, true);
    }

    /// Sectors between `from` and `to` that nothing fixed lies in.
    fn gaps(&self, from: u64, to: u64) -> impl Iterator<Item = (u64, u64)> {
        let fixed = self.fixed.as_ref().expect("it was read before the entries").iter().copied();
        let mut at = from;
        fixed.chain([(to, to)]).filter_map(move |(start, end)| {
            let gap = (at, start.min(to));
            at = at.max(end);
            (gap.0 < gap.1).then_some(gap)
        })
    }
}

impl Vhd {
    pub(super) fn begin_check(&mut self, params: CheckParams) {
        // A repair shares the memory: see `Mending`.
        let mends = params.repair != Repair::Nothing;
        let bytes = if mends { params.budget_bytes / 2 } else { params.budget_bytes };
        let starts_max = (bytes / 4).clamp(64, self.entries.max(64) as usize);
        let window_length = starts_max as u64 * (self.block_bytes() / SECTOR_BYTES);
        let report = CheckReport {
            clusters: self.sectors.div_ceil(self.block_sectors),
            ..CheckReport::default()
        };
        self.check = Some(alloc::boxed::Box::new(Check {
            report,
            fixed: None,
            starts: Vec::with_capacity(starts_max + 1),
            starts_max,
            window: (0, window_length),
            window_length,
            beyond: u64::MAX,
            last: None,
            entry: 0,
            first_pass: true,
            done: 0,
            mending: mends.then(|| Mending::new(bytes, self.entries)),
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
        let step = match check.mending.as_ref().is_some_and(Mending::is_moving) {
            true => self.mend(ctx, &mut check),
            false => self.look(ctx, &mut check),
        };
        if !matches!(step, Ok(CheckProgress::Done(_))) {
            self.check = Some(check);
        }
        step
    }

    /// A part of the look at all entries.
    fn look(&mut self, ctx: &mut Ctx, check: &mut Check) -> Step<CheckProgress> {
        if check.fixed.is_none() {
            let fixed = self.fixed_stretches(ctx)?;
            let end = fixed.iter().map(|&(_, end)| end).max().unwrap_or(0);
            check.report.end_bytes = end * SECTOR_BYTES;
            check.fixed = Some(fixed);
        }
        self.check_entries(ctx, check)?;
        if check.entry < self.entries as u64 || !self.end_pass(check) {
            let total = self.entries as u64;
            return Ok(CheckProgress::More { done: check.done.min(total), total });
        }
        let tail = self.count_tail(ctx, check);
        let Some(mending) = &mut check.mending else {
            return Ok(CheckProgress::Done(core::mem::take(&mut check.report)));
        };
        if mending.goes_on(&check.report, tail) {
            return Ok(CheckProgress::More { done: 0, total: self.entries as u64 });
        }
        Ok(CheckProgress::Done(mending.summary(&check.report)))
    }

    /// What lies in the file and is no block, by place.
    pub(super) fn fixed_stretches(
        &self,
        ctx: &mut Ctx,
    ) -> Step<heapless::Vec<(u64, u64), FIXED_MAX>> {
        let mut bytes = [0; HEADER_BYTES];
        ctx.read(self.file, self.header_offset, &mut bytes)?;
        let header = Header::parse(self.file, self.header_offset, &bytes, self.sectors)?;
        let size = ctx.files.size(self.file);
        let table_end = self.table_offset + header.table_bytes();
        let mut map = [0; 20];
        if table_end + SECTOR_BYTES <= size {
            ctx.read(self.file, table_end, &mut map)?;
        }
        let mut fixed = heapless::Vec::new();
        let mut add = |offset: u64, len: u64| {
            let end = offset.saturating_add(len);
            // What does not lie in the file is no place of anything.
            if len > 0 && end <= size {
                let stretch = (offset / SECTOR_BYTES, end.div_ceil(SECTOR_BYTES));
                fixed.push(stretch).expect("room for each");
            }
        };
        add(0, FOOTER_BYTES as u64);
        add(self.header_offset, HEADER_BYTES as u64);
        add(self.table_offset, header.table_bytes());
        if let Some((offset, len)) = header::batmap(&map) {
            add(table_end, SECTOR_BYTES);
            add(offset, len);
        }
        for locator in &header.locators {
            add(locator.data_offset, locator.bytes());
        }
        fixed.sort_unstable();
        Ok(fixed)
    }

    /// How many blocks would fit between the last block and the footer of a file that can be cut.
    fn count_tail(&self, ctx: &Ctx, check: &mut Check) -> u64 {
        let info = ctx.files.info(self.file);
        let end = info.size_bytes.saturating_sub(FOOTER_BYTES as u64);
        let gap = end.saturating_sub(check.report.end_bytes) / self.block_bytes();
        if !info.can_grow || gap == 0 {
            return 0;
        }
        check.report.leaks += gap - 1;
        let (field, at) = ("VHD space behind the last block", check.report.end_bytes);
        check.report.leak(ImageFault::corrupt(self.file, field, at, gap));
        gap
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
        let mut starts = core::mem::take(&mut check.starts);
        for &start in &starts {
            let start = start as u64;
            if check.last.is_some_and(|last| start < last + block) {
                let field = "VHD block, on another";
                let at = start * SECTOR_BYTES;
                check.report.corrupt(ImageFault::corrupt(self.file, field, at, start));
            }
            let free = check.last.map_or(0, |last| last + block);
            self.count_gaps(check, free, start);
            check.last = Some(start);
        }
        starts.clear();
        check.starts = starts;
        check.window = (check.beyond, check.beyond.saturating_add(check.window_length));
        check.entry = 0;
        check.first_pass = false;
        core::mem::replace(&mut check.beyond, u64::MAX) == u64::MAX
    }

    /// Places of blocks between two sectors that nothing names.
    fn count_gaps(&self, check: &mut Check, from: u64, to: u64) {
        let block = self.block_bytes() / SECTOR_BYTES;
        let gaps: heapless::Vec<_, { FIXED_MAX + 1 }> = check.gaps(from, to).collect();
        for (start, end) in gaps.into_iter().filter(|(start, end)| end - start >= block) {
            let count = (end - start) / block;
            check.report.leaks += count - 1;
            let field = "VHD space between blocks";
            let at = start * SECTOR_BYTES;
            check.report.leak(ImageFault::corrupt(self.file, field, at, count * block));
            if let Some(mending) = &mut check.mending {
                mending.free_places(start, end, block, |from| self.place(from));
            }
        }
    }
}
