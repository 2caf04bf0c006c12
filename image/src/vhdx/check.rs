//! Checking a VHDX: the state and place of every block and sector bitmap, off the metadata and
//! off each other. Memory is bounded: one bit stands for a MiB of the file, and a large file is
//! looked at in several passes.
//!
//! Nothing in a VHDX marks space as used but its use, so there are no leaks: a MiB that nothing
//! names is free, and is found at the next open (but for huge files).

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use crate::check::{CheckParams, CheckProgress, CheckReport};
use crate::fault::ImageFault;
use crate::format::Ctx;
use crate::types::{SECTOR_BYTES, Step, Stop};

use super::Vhdx;
use super::header::MIB;
use super::map::State;

/// Blocks looked at in one step.
const BLOCKS_PER_STEP: u64 = 2048;

pub(super) struct Check {
    report: CheckReport,
    /// One bit a MiB of the window: used.
    used: Vec<u64>,
    /// First MiB of the window.
    window: u64,
    block: u64,
    done: u64,
}

impl Check {
    fn bits(&self) -> u64 {
        self.used.len() as u64 * 64
    }

    /// Marks a stretch; false if some of it in the window was marked before.
    fn mark(&mut self, offset: u64, len: u64) -> bool {
        let first = (offset / MIB).max(self.window);
        let end = (offset + len).div_ceil(MIB).min(self.window + self.bits());
        let mut free = true;
        for mib in first..end.max(first) {
            let at = mib - self.window;
            let (word, bit) = ((at / 64) as usize, 1u64 << (at % 64));
            free &= self.used[word] & bit == 0;
            self.used[word] |= bit;
        }
        free
    }
}

impl Vhdx {
    pub(super) fn begin_check(&mut self, params: CheckParams) {
        let words = (params.budget_bytes / 8).clamp(64, 1 << 20);
        let report = CheckReport { clusters: self.blocks(), ..CheckReport::default() };
        let check = Check { report, used: vec![0; words], window: 0, block: 0, done: 0 };
        self.check = Some(Box::new(check));
    }

    pub(super) fn check_part(&mut self, ctx: &mut Ctx) -> Step<CheckProgress> {
        let mut check = self.check.take().expect("a check was begun");
        let result = self.check_blocks(ctx, &mut check);
        if result.is_ok() && check.block == self.blocks() && self.end_pass(ctx, &mut check) {
            return Ok(CheckProgress::Done(check.report));
        }
        let progress = CheckProgress::More { done: check.done, total: self.blocks() };
        self.check = Some(check);
        result.map(|()| progress)
    }

    fn check_blocks(&self, ctx: &mut Ctx, check: &mut Check) -> Step<()> {
        let stop = (check.block + BLOCKS_PER_STEP).min(self.blocks());
        while check.block < stop {
            self.check_block(ctx, check)?;
            check.block += 1;
            check.done += 1;
        }
        Ok(())
    }

    fn check_block(&self, ctx: &mut Ctx, check: &mut Check) -> Step<()> {
        let block = check.block;
        let len = self.geometry.block_sectors * SECTOR_BYTES;
        // Both entries are read before anything is counted: the step may stop in between.
        let state = settled(self.state(ctx, block))?;
        let first_of_chunk = block.is_multiple_of(self.geometry.chunk_ratio);
        let partial = matches!(state, Ok(State::Partial(_)));
        let bitmap = match self.geometry.has_parent && (first_of_chunk || partial) {
            true => settled(self.bitmap_block(ctx, block))?,
            false => Ok(None),
        };
        let first_pass = check.window == 0;
        match state {
            Ok(State::Full(offset) | State::Partial(offset)) => {
                check.report.allocated += first_pass as u64;
                self.check_place_of(ctx, check, self.entry_at(block), offset, len);
            }
            Ok(_) => {}
            Err(fault) if first_pass => check.report.corrupt(fault),
            Err(_) => {}
        }
        match bitmap {
            Ok(Some(offset)) if first_of_chunk => {
                self.check_place_of(ctx, check, self.bitmap_entry_at(block), offset, MIB);
            }
            Ok(None) if partial && first_pass => {
                let field = "VHDX block, partially present without a sector bitmap";
                let at = self.entry_at(block);
                check.report.corrupt(ImageFault::corrupt(self.file, field, at, block));
            }
            Err(fault) if first_pass && first_of_chunk => check.report.corrupt(fault),
            _ => {}
        }
        Ok(())
    }

    fn check_place_of(&self, ctx: &Ctx, check: &mut Check, at: u64, offset: u64, len: u64) {
        let first_pass = check.window == 0;
        check.report.end_bytes = check.report.end_bytes.max(offset + len);
        if first_pass && offset + len > ctx.files.size(self.file) {
            let field = "VHDX BAT entry, beyond the end of the file";
            check.report.corrupt(ImageFault::corrupt(self.file, field, at, offset));
        }
        if !check.mark(offset, len) {
            let field = "VHDX BAT entry, a block on another";
            check.report.corrupt(ImageFault::corrupt(self.file, field, at, offset));
        }
    }

    /// Marks the metadata too; true when the file ends in this window.
    fn end_pass(&self, ctx: &Ctx, check: &mut Check) -> bool {
        for region in [self.log, self.bat, self.metadata] {
            check.report.end_bytes = check.report.end_bytes.max(region.offset + region.length);
        }
        let end = ctx.files.size(self.file) / MIB;
        check.window += check.bits();
        check.used.fill(0);
        check.block = 0;
        check.window >= end
    }
}

/// A fault is a finding; any other stop stops the check too.
fn settled<T>(step: Step<T>) -> Step<Result<T, ImageFault>> {
    match step {
        Ok(value) => Ok(Ok(value)),
        Err(Stop::Fault(fault)) => Ok(Err(fault)),
        Err(stop) => Err(stop),
    }
}
