//! Giving leaked places of a VHD back: the last blocks are moved into the places between blocks
//! that nothing names, then the file is cut behind the last one.
//!
//! Order guarded: a block is copied to its new place first, and durable there before its BAT entry
//! names that place; the old place is left as it is until all entries are durable. Then the
//! footer is written behind the last block, and when that is durable the file is cut: a power cut
//! leaves a sound image, at worst with places still leaked. Every target lies below every block
//! that is moved, so that nothing is ever written over. It must never move anything in an image
//! with faults.
//!
//! Bounded: as many moves at a time as the check's memory holds, then everything is looked at
//! again.

use alloc::collections::BinaryHeap;
use alloc::vec::Vec;
use core::cmp::Reverse;

use crate::check::{CheckProgress, CheckReport};
use crate::format::Ctx;
use crate::meta::Phase;
use crate::types::{SECTOR_BYTES, Step, Stop};

use super::Vhd;
use super::check::Check;
use super::header::BAT_UNUSED;

/// BAT entries looked at in one step.
const ENTRIES_PER_STEP: u64 = 4096;
/// Bytes of memory for each block that may move.
const MOVE_BYTES: usize = 12;

enum Stage {
    Look,
    /// The blocks highest up are looked for, from this entry on.
    Search(u64),
    Move,
    /// All moves are made, everything ends at this byte.
    Tail(u64),
    /// The file is being cut to so many bytes.
    Cut(u64),
}

pub(super) struct Mending {
    stage: Stage,
    moves_max: usize,
    /// Places for blocks, in sectors, the first ones of the file.
    free: Vec<u32>,
    /// The highest blocks, highest first: sector and entry.
    high: BinaryHeap<Reverse<(u32, u32)>>,
    moves: Vec<Reverse<(u32, u32)>>,
    /// Of the round: blocks moved, and whether the next one is copied.
    moved: usize,
    is_copied: bool,
    is_cut: bool,
    /// What the first look found.
    first: Option<CheckReport>,
}

impl Mending {
    pub fn new(budget_bytes: usize, entries: u32) -> Mending {
        Mending {
            stage: Stage::Look,
            moves_max: (budget_bytes / MOVE_BYTES).clamp(8, entries.max(8) as usize),
            free: Vec::new(),
            high: BinaryHeap::new(),
            moves: Vec::new(),
            moved: 0,
            is_copied: false,
            is_cut: false,
            first: None,
        }
    }

    pub fn is_moving(&self) -> bool {
        !matches!(self.stage, Stage::Look)
    }

    /// Takes places for blocks of `block` sectors between two sectors, at their usual alignment
    /// while there is room for that.
    pub fn free_places(&mut self, start: u64, end: u64, block: u64, place: impl Fn(u64) -> u64) {
        let mut at = start;
        while at + block <= end && self.free.len() < self.moves_max {
            let aligned = place(at * SECTOR_BYTES) / SECTOR_BYTES;
            let chosen = if aligned + block <= end { aligned } else { at };
            // A place that no entry can name is none.
            let Ok(sector) = u32::try_from(chosen) else { return };
            self.free.push(sector);
            at = chosen + block;
        }
    }

    /// A look is over, with so much behind the last block that could be cut: is there something
    /// to do? Not in an image with faults, and not once more what changed nothing.
    pub fn goes_on(&mut self, report: &CheckReport, tail: u64) -> bool {
        let is_first = self.first.is_none();
        let before = self.first.get_or_insert_with(|| report.clone());
        if before.corruptions > 0 || report.corruptions > 0 {
            return false;
        }
        if !self.free.is_empty() && (is_first || self.moved > 0) {
            (self.stage, self.moved) = (Stage::Search(0), 0);
        } else if tail > 0 && !self.is_cut {
            self.stage = Stage::Tail(report.end_bytes);
        }
        self.is_moving()
    }

    /// The first look's report, with what is gone since.
    pub fn summary(&mut self, now: &CheckReport) -> CheckReport {
        let mut report = self.first.take().expect("there was a first look");
        report.leaks_fixed = report.leaks.saturating_sub(now.leaks);
        report.end_bytes = now.end_bytes;
        report
    }
}

impl Vhd {
    /// The next part of a repair, between two looks.
    pub(super) fn mend(&mut self, ctx: &mut Ctx, check: &mut Check) -> Step<CheckProgress> {
        let mending = check.mending.as_mut().expect("a repair");
        let mut ask = None;
        match mending.stage {
            Stage::Look => unreachable!("a look is no repair"),
            Stage::Search(from) => self.search(ctx, mending, from)?,
            Stage::Move => ask = self.move_block(ctx, mending)?,
            Stage::Tail(end) => ask = Some(self.cut(ctx, mending, end)?),
            Stage::Cut(bytes) => {
                ctx.files.cut(self.file, bytes);
                (mending.stage, mending.is_cut) = (Stage::Look, true);
            }
        }
        let progress = ask.unwrap_or_else(|| self.progress(mending));
        if !mending.is_moving() {
            mending.free.clear();
            check.restart();
        }
        Ok(progress)
    }

    fn progress(&self, mending: &Mending) -> CheckProgress {
        let total = mending.moves.len().min(mending.free.len()) as u64;
        CheckProgress::More { done: mending.moved as u64, total }
    }

    fn search(&mut self, ctx: &mut Ctx, mending: &mut Mending, from: u64) -> Step<()> {
        // Places kept to be used again are among the free ones now.
        self.writer.as_mut().expect("a repair needs a writable image").forget_spares();
        let end = self.entries as u64;
        let mut at = from;
        while at < end.min(from + ENTRIES_PER_STEP) {
            let start = ctx.meta.get_u32_be(self.file, self.entry_offset(at))?;
            if start != BAT_UNUSED {
                mending.high.push(Reverse((start, at as u32)));
                if mending.high.len() > mending.moves_max {
                    mending.high.pop();
                }
            }
            at += 1;
            mending.stage = Stage::Search(at);
        }
        if at == end {
            mending.moves = core::mem::take(&mut mending.high).into_sorted_vec();
            mending.stage = Stage::Move;
        }
        Ok(())
    }

    /// The next move, or its entry once it is copied.
    fn move_block(&self, ctx: &mut Ctx, mending: &mut Mending) -> Step<Option<CheckProgress>> {
        let at = mending.moved;
        let pair = mending.moves.get(at).zip(mending.free.get(at));
        let Some((&Reverse((from, entry)), &to)) = pair.filter(|(from, to)| from.0.0 > **to) else {
            mending.stage = Stage::Look;
            return Ok(None);
        };
        let bytes = self.block_bytes();
        if !mending.is_copied {
            // The bitmap is copied as the file has it.
            if at == 0 && ctx.meta.is_dirty() {
                return Err(Stop::NeedFlush);
            }
            ctx.meta.read_again(self.file, u64::from(to) * SECTOR_BYTES, bytes)?;
            mending.is_copied = true;
            let [from, to] = [from, to].map(|sector| u64::from(sector) * SECTOR_BYTES);
            return Ok(Some(CheckProgress::Copy { file: self.file, from, to, bytes }));
        }
        let entry_offset = self.entry_offset(entry.into());
        ctx.meta.set(self.file, entry_offset, &to.to_be_bytes(), Phase::TABLE)?;
        (mending.moved, mending.is_copied) = (at + 1, false);
        Ok(None)
    }

    /// What is behind the last block goes, once all entries are durable.
    fn cut(&mut self, ctx: &mut Ctx, mending: &mut Mending, end: u64) -> Step<CheckProgress> {
        if ctx.meta.is_dirty() {
            return Err(Stop::NeedFlush);
        }
        let size = ctx.files.size(self.file);
        ctx.meta.read_again(self.file, end, size - end)?;
        let writer = self.writer.as_mut().expect("a repair needs a writable image");
        let bytes = writer.end_at(end);
        mending.stage = Stage::Cut(bytes);
        Ok(CheckProgress::Cut { file: self.file, bytes })
    }
}
