//! Committing an overlay into the image below it, and telling what one layer holds of its own.
//!
//! The caller opens the overlay alone ([`Image::begin_alone`](crate::Image::begin_alone)) and the
//! image below it for writing, grows the latter if it is shorter, and carries out each step on
//! it as any guest's write or zeroing. Nothing is lost if it stops in between: until the overlay
//! is dropped it hides what was committed, with the same contents. (Where a child knows its
//! parent's state, VHDX and VMDK, the chain opens no more: the commit must be gone through
//! again.) Only after the last step and a flush of the image below may the overlay be emptied or
//! removed.

use crate::image::Image;
use crate::types::{Place, SectorRange, Step};

/// Sectors of one step at most (ours: what a caller copies at once).
const STEP_SECTORS_MAX: u64 = 2048;

/// A stretch of the top layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TopExtent {
    /// Guest sectors covered; at least 1.
    pub sectors: u64,
    /// `None`: the layer has nothing here, the one below decides.
    pub place: Option<Place>,
}

/// What to do next with the image below.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MergeStep {
    /// Write these sectors, as the overlay holds them at this place.
    Copy {
        range: SectorRange,
        from: Place,
    },
    /// Make them read as zeros.
    Zero {
        range: SectorRange,
    },
    Done,
}

/// A commit of an overlay under way.
#[derive(Debug, Default)]
pub struct Merge {
    /// Sectors gone through.
    at: u64,
}

impl Merge {
    pub fn new() -> Merge {
        Merge::default()
    }

    /// Sectors of the overlay gone through, for progress.
    pub fn done_sectors(&self) -> u64 {
        self.at
    }

    /// The next step; a stop is answered by the caller as for any planner of `overlay`.
    pub fn step(&mut self, overlay: &mut Image) -> Step<MergeStep> {
        let end = overlay.sectors();
        while self.at < end {
            let rest = SectorRange::new(self.at, end - self.at);
            let top = overlay.map_top(rest)?;
            let range = match top.place {
                Some(Place::File { .. } | Place::Memory { .. }) => {
                    rest.prefix(top.sectors.min(STEP_SECTORS_MAX))
                }
                _ => rest.prefix(top.sectors),
            };
            self.at = range.end();
            match top.place {
                None => {}
                Some(Place::Zero) => return Ok(MergeStep::Zero { range }),
                Some(from) => return Ok(MergeStep::Copy { range, from }),
            }
        }
        Ok(MergeStep::Done)
    }
}
