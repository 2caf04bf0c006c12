//! A guest's request on its way: what was asked, how far it is planned, what is in flight.

use alloc::vec::Vec;

use platter_xen::blkif::Segment;
use platter_xen::ring::Permit;

use crate::fault::Fault;
use crate::limits::{REQUESTS_MAX, SEGMENTS_MAX};
use crate::table::Id;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Read,
    Write,
    /// A flush, with or without a write after it.
    Flush,
    Discard,
}

/// Where a request stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// Waits for a flush that covers the writes before it; `by` is the flush that will.
    FlushFirst { by: Option<u64> },
    /// Its sectors are being planned and moved.
    Moving,
    /// Its own writes wait to be made durable.
    FlushAfter { by: Option<u64> },
}

/// The segments of all requests in the table, by their places: kept apart, so that a request
/// itself stays small.
pub struct Segments(Vec<Segment>);

impl Segments {
    pub fn new() -> Segments {
        Segments(alloc::vec![Segment::EMPTY; REQUESTS_MAX * SEGMENTS_MAX])
    }

    pub fn set(&mut self, id: Id, segments: &[Segment]) {
        let at = id.0 as usize * SEGMENTS_MAX;
        self.0[at..at + segments.len()].copy_from_slice(segments);
    }

    pub fn of(&self, id: Id, count: u16) -> &[Segment] {
        let at = id.0 as usize * SEGMENTS_MAX;
        &self.0[at..at + count as usize]
    }
}

/// One request, from the ring to its answer.
pub struct Request {
    /// The disk's place in the server.
    pub disk: u16,
    pub queue: u8,
    /// The obligation to answer.
    pub permit: Permit,
    pub kind: Kind,
    pub stage: Stage,
    /// Order of admission on its disk.
    pub seq: u64,
    /// Later requests of the disk wait until this one is answered (WRITE_BARRIER).
    pub barrier: bool,
    /// Durable before it is answered (barrier, writethrough).
    pub flush_after: bool,
    pub start: u64,
    /// Sectors to move (or to discard).
    pub sectors: u64,
    /// Sectors planned so far, from the start.
    pub planned: u64,
    /// Store operations and jobs under way for it.
    pub in_flight: u16,
    /// It stands among its disk's waiting requests: whoever ends it must take it out there.
    pub parked: bool,
    pub failed: Option<Fault>,
    /// How many segments it has in [`Segments`].
    pub segments: u16,
}

impl Request {
    /// Writes and discards change the disk.
    pub fn changes(&self) -> bool {
        matches!(self.kind, Kind::Write | Kind::Discard)
            || (self.kind == Kind::Flush && self.sectors > 0)
    }

    /// Sectors whose bytes move. A discard may name the whole disk, and several of them more
    /// than can be counted.
    pub fn moves(&self) -> u64 {
        if self.kind == Kind::Discard { 0 } else { self.sectors }
    }

    /// Other requests must keep an order with it.
    pub fn is_ordered(&self) -> bool {
        self.barrier || self.kind == Kind::Discard
    }

    /// Nothing is left to plan and nothing under way.
    pub fn is_moved(&self) -> bool {
        self.in_flight == 0 && (self.planned == self.sectors || self.failed.is_some())
    }

    /// Has begun to touch the image and is not done.
    pub fn is_moving(&self) -> bool {
        self.stage == Stage::Moving && (self.planned > 0 || self.in_flight > 0)
    }

    /// Its bytes are in the store and its mapping is visible; only durability is missing.
    pub fn is_flushing_after(&self) -> bool {
        matches!(self.stage, Stage::FlushAfter { .. })
    }

    /// The flush of this number is the one it waits for.
    pub fn waits_for(&self, number: u64) -> bool {
        match self.stage {
            Stage::FlushFirst { by } | Stage::FlushAfter { by } => by == Some(number),
            Stage::Moving => false,
        }
    }
}
