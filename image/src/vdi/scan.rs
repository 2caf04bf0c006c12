//! The look at the whole map before the first write: where the used part ends, and which blocks
//! before that end no entry names.
//!
//! A power cut may leave blocks that were taken and are not named. Behind the last one in use they
//! are taken again anyway; before it they are gaps, which a nearly full disk needs, since its file
//! has no more blocks than the disk. The memory is fixed: the first reading of the map counts the
//! named blocks of each stretch, and it is read again only for those of which some are not named,
//! while there are places for what is found.

use super::{BlockMap, ZERO};
use crate::append::Space;
use crate::fault::ImageFault;
use crate::format::Ctx;
use crate::types::Step;

/// Blocks that one pass over the map tells apart.
const STRETCH: u64 = 1 << 16;
/// Stretches that are counted: 64 TiB in blocks of 1 MiB. Gaps behind them are lost until the image
/// is converted.
const STRETCHES: usize = 1 << 10;

pub(super) struct Scan {
    /// The next entry of this pass.
    entry: u64,
    /// Known after the first pass: one more than the highest block in use, and how many entries
    /// name one of each stretch.
    end: u64,
    named: [u32; STRETCHES],
    is_counted: bool,
    /// The blocks that this pass tells apart begin here; a bit for each that is named.
    first: u64,
    seen: [u64; (STRETCH / 64) as usize],
    /// Made after the first pass.
    space: Option<Space>,
}

impl Scan {
    pub fn new() -> Scan {
        let (seen, named) = ([0; (STRETCH / 64) as usize], [0; STRETCHES]);
        Scan { entry: 0, end: 0, named, is_counted: false, first: 0, seen, space: None }
    }

    /// Goes on; `Ok` with the free space when all is known.
    pub fn step(&mut self, ctx: &mut Ctx, map: &BlockMap) -> Step<Space> {
        loop {
            self.pass(ctx, map)?;
            let mut space = self.space.take().unwrap_or_else(|| self.space_behind(ctx, map));
            let has_places = self.take_gaps(&mut space, map);
            let Some(next) = self.next_stretch().filter(|_| has_places) else {
                return Ok(space);
            };
            (self.space, self.entry, self.is_counted) = (Some(space), 0, true);
            self.first = next;
            self.seen.fill(0);
        }
    }

    /// The first block of the next stretch that has gaps.
    fn next_stretch(&self) -> Option<u64> {
        let stretches = (0..self.end).step_by(STRETCH as usize).zip(&self.named);
        let mut later = stretches.filter(|(first, _)| *first > self.first);
        let (next, _) = later.find(|&(first, &named)| {
            let blocks = STRETCH.min(self.end - first);
            u64::from(named) < blocks
        })?;
        Some(next)
    }

    fn pass(&mut self, ctx: &mut Ctx, map: &BlockMap) -> Step<()> {
        while self.entry < map.header.blocks.into() {
            let at = map.entry_at(self.entry);
            let value = ctx.meta.get_u32_le(map.file, at)?;
            if value < ZERO {
                if value >= map.blocks_end() {
                    let field = "a block map entry";
                    return Err(ImageFault::corrupt(map.file, field, at, value.into()).into());
                }
                self.note(value.into());
            }
            self.entry += 1;
        }
        Ok(())
    }

    fn note(&mut self, block: u64) {
        if !self.is_counted {
            self.end = self.end.max(block + 1);
            if let Some(named) = self.named.get_mut((block / STRETCH) as usize) {
                *named += 1;
            }
        }
        if let Some(bit) = block.checked_sub(self.first).filter(|bit| *bit < STRETCH) {
            self.seen[(bit / 64) as usize] |= 1 << (bit % 64);
        }
    }

    fn is_seen(&self, block: u64) -> bool {
        let bit = block - self.first;
        self.seen[(bit / 64) as usize] >> (bit % 64) & 1 != 0
    }

    /// All behind the last block in use.
    fn space_behind(&self, ctx: &Ctx, map: &BlockMap) -> Space {
        let header = &map.header;
        let next = header.data_offset + self.end * header.block_bytes;
        let reach = header.data_offset + u64::from(header.blocks) * header.block_bytes;
        let info = ctx.files.info(map.file);
        Space::from(map.file, info, (header.data_offset, next), reach)
    }

    /// The gaps of this stretch; false when there is no place for more.
    fn take_gaps(&mut self, space: &mut Space, map: &BlockMap) -> bool {
        let header = &map.header;
        let (mut block, until) = (self.first, self.end.min(self.first + STRETCH));
        while block < until {
            let is_gap = |block: &u64| !self.is_seen(*block);
            let len = (block..until).take_while(is_gap).count() as u64;
            let start = header.data_offset + block * header.block_bytes;
            if len > 0 && !space.take_gap(start, len * header.block_bytes) {
                return false;
            }
            // The one behind a gap is named.
            block += len + 1;
        }
        true
    }
}
