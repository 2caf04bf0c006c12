//! Checking an image, step by step with bounded memory: what the report counts, and how a
//! format takes part (`check_begin` and `check_step` of the trait `Inspect`).
//!
//! A check never changes an image unless repair was asked for; repair goes through the metadata
//! cache, so it becomes durable by the flush that the caller runs after it, in the usual order.

use crate::fault::ImageFault;
use crate::types::FileNo;

/// Problems kept with their place; the rest is only counted.
pub const PROBLEMS_MAX: usize = 16;

/// What a check may change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Repair {
    Nothing,
    /// Space that nothing uses is freed.
    Leaks,
    /// Leaks, and what can be mended without losing data (counts too low, wrong flags).
    All,
}

/// What a check is given.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CheckParams {
    pub repair: Repair,
    /// Memory for counting references, bytes; a large image is checked in several passes.
    pub budget_bytes: usize,
}

/// What was found. Units are the format's clusters (blocks, grains).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CheckReport {
    /// Breaks of the format that can lose or mix data.
    pub corruptions: u64,
    pub corruptions_fixed: u64,
    /// Clusters that are marked used and are not.
    pub leaks: u64,
    pub leaks_fixed: u64,
    /// Guest clusters with data of their own in this layer.
    pub allocated: u64,
    /// Of them compressed.
    pub compressed: u64,
    /// Guest clusters in all.
    pub clusters: u64,
    /// First byte after everything that is used.
    pub end_bytes: u64,
    /// The first problems, leaks included.
    pub problems: heapless::Vec<ImageFault, PROBLEMS_MAX>,
}

impl CheckReport {
    /// Counts a break of the format.
    pub(crate) fn corrupt(&mut self, problem: ImageFault) {
        self.corruptions += 1;
        self.note(problem);
    }

    /// Counts a cluster that is leaked.
    pub(crate) fn leak(&mut self, problem: ImageFault) {
        self.leaks += 1;
        self.note(problem);
    }

    /// Keeps a problem if there is room.
    pub(crate) fn note(&mut self, problem: ImageFault) {
        // The first ones matter: what comes later often follows from them.
        let _ = self.problems.push(problem);
    }

    /// Nothing wrong is left, leaks apart.
    pub fn is_sound(&self) -> bool {
        self.corruptions == self.corruptions_fixed
    }
}

/// How far a check is.
// Made once a step and never stored: a box for the report would only cost.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CheckProgress {
    /// Call again. `done` of `total` in units that only mean progress.
    More {
        done: u64,
        total: u64,
    },
    /// A repair moves something: copy these bytes (they do not overlap), then call again.
    Copy {
        file: FileNo,
        from: u64,
        to: u64,
        bytes: u64,
    },
    /// Flush, make the file so many bytes long, sync it, then call again.
    Cut {
        file: FileNo,
        bytes: u64,
    },
    Done(CheckReport),
}
