//! Content that proves itself: each sector names itself and its generation, at both ends.
//!
//! A sector that lies in the wrong place, is stale, torn or foreign shows. What stood there before
//! the run is unknown and is believed; a write that failed leaves a sector in doubt, a discard
//! leaves it either old or zero.

use alloc::vec;
use alloc::vec::Vec;

/// Bytes of a stamp; one at the start of a sector and one at its end.
pub const STAMP_BYTES: usize = 16;
/// The unit of the wire (blkif.h).
pub const SECTOR_BYTES: usize = 512;
/// Where the two stamps lie in a sector.
pub const STAMPS_AT: [usize; 2] = [0, SECTOR_BYTES - STAMP_BYTES];

/// Sets stamps apart from other content of the same length.
const MARK: u32 = 0x706c_7472;
/// Generation of what was never written in this run.
const UNKNOWN: u32 = 0;
/// Generation of a sector whose last write failed.
const DOUBT: u32 = u32::MAX;
/// Set on the generation of a sector that was discarded.
const DISCARDED: u32 = 1 << 31;

/// A sector's words about itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stamp {
    pub sector: u64,
    pub generation: u32,
}

impl Stamp {
    /// As bytes.
    pub fn emit(self) -> [u8; STAMP_BYTES] {
        let mut bytes = [0; STAMP_BYTES];
        bytes[..8].copy_from_slice(&self.sector.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.generation.to_le_bytes());
        bytes[12..].copy_from_slice(&MARK.to_le_bytes());
        bytes
    }

    /// `None` when the bytes are no stamp.
    pub fn parse(bytes: &[u8; STAMP_BYTES]) -> Option<Stamp> {
        let (sector, rest) = bytes.split_at(8);
        let (generation, mark) = rest.split_at(4);
        let u32_of = |part: &[u8]| Some(u32::from_le_bytes(part.try_into().ok()?));
        (u32_of(mark)? == MARK).then_some(Stamp {
            sector: u64::from_le_bytes(sector.try_into().ok()?),
            generation: u32_of(generation)?,
        })
    }
}

/// What the sectors of a disk's first part must hold.
#[derive(Clone, Debug)]
pub struct Model {
    generations: Vec<u32>,
    last: u32,
}

impl Model {
    /// Of `sectors` sectors, all unknown.
    pub fn new(sectors: usize) -> Model {
        Model { generations: vec![UNKNOWN; sectors], last: 0 }
    }

    /// The generation of the next write.
    pub fn next_generation(&mut self) -> u32 {
        self.last = (self.last + 1) & (DISCARDED - 1);
        self.last = self.last.max(1);
        self.last
    }

    /// A write of `sectors` sectors from `sector` on was acknowledged, or failed.
    pub fn written(&mut self, sector: u64, sectors: u64, generation: u32, okay: bool) {
        let value = if okay { generation } else { DOUBT };
        self.part(sector, sectors).iter_mut().for_each(|slot| *slot = value);
    }

    /// A discard was acknowledged, or failed: either way old and zero are both right.
    pub fn discarded(&mut self, sector: u64, sectors: u64) {
        for slot in self.part(sector, sectors) {
            if *slot != UNKNOWN && *slot != DOUBT {
                *slot |= DISCARDED;
            }
        }
    }

    fn part(&mut self, sector: u64, sectors: u64) -> &mut [u32] {
        let start = (sector as usize).min(self.generations.len());
        let end = (start + sectors as usize).min(self.generations.len());
        &mut self.generations[start..end]
    }

    /// Whether a sector may read as these two stamps. `strict`: even what is unknown has to name
    /// its own sector, or be zero.
    pub fn allows(&self, sector: u64, stamps: &[[u8; STAMP_BYTES]; 2], strict: bool) -> bool {
        let expected = self.generations.get(sector as usize).copied().unwrap_or(UNKNOWN);
        let zero = stamps.iter().all(|stamp| stamp == &[0; STAMP_BYTES]);
        let whole = stamps[0] == stamps[1];
        let own = Stamp::parse(&stamps[0]).filter(|stamp| whole && stamp.sector == sector);
        match expected {
            UNKNOWN => !strict || zero || own.is_some(),
            DOUBT => true,
            value if value & DISCARDED != 0 => {
                zero || own.is_some_and(|stamp| stamp.generation == value & !DISCARDED)
            }
            value => own.is_some_and(|stamp| stamp.generation == value),
        }
    }
}

#[cfg(test)]
mod tests {
    //! Would miss: damage between the two stamps of a sector.
    use super::*;

    fn both(sector: u64, generation: u32) -> [[u8; STAMP_BYTES]; 2] {
        [Stamp { sector, generation }.emit(); 2]
    }

    #[test]
    fn only_the_last_write_is_right() {
        let mut model = Model::new(100);
        assert!(model.allows(5, &[[9; STAMP_BYTES]; 2], false), "unknown is believed");
        assert!(!model.allows(5, &[[9; STAMP_BYTES]; 2], true));
        assert!(model.allows(5, &both(5, 77), true) && !model.allows(5, &both(6, 77), true));
        let (first, second) = (model.next_generation(), model.next_generation());
        model.written(4, 8, first, true);
        model.written(4, 8, second, true);
        assert!(model.allows(11, &both(11, second), false));
        assert!(!model.allows(11, &both(11, first), false), "stale");
        assert!(!model.allows(11, &both(10, second), false), "another sector's");
        let torn = [both(11, second)[0], both(11, first)[0]];
        assert!(!model.allows(11, &torn, false), "torn");
        assert!(!model.allows(11, &[[0; STAMP_BYTES]; 2], false), "lost");
        model.discarded(11, 1);
        assert!(model.allows(11, &[[0; STAMP_BYTES]; 2], false));
        assert!(model.allows(11, &both(11, second), false));
        assert!(!model.allows(11, &both(11, first), false));
        model.written(11, 1, 9, false);
        assert!(model.allows(11, &both(11, first), false), "in doubt after a failed write");
    }
}
