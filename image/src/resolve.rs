//! The merged index of a chain: for chunks of the guest's disk, which file and byte answers, or
//! at which layer a walk must start. Random reads of a warm chain of 500 then cost what they
//! cost on one image, and memory depends on the budget alone.
//!
//! A cold chunk is resolved together with its neighbours in one walk down the chain, so that each
//! table block of each layer is looked at once for all of them. Guarded: what is kept is dropped
//! by each commit and discard that touches its chunk, before anyone can ask for it.

use alloc::vec::Vec;

use crate::fault::ImageFault;
use crate::format::{AnyLayer, Ctx, Found};
use crate::memory::{SPARE_BYTES, as_much_as_fits, filled, is_left};
use crate::types::{BlockRef, Extent, FileNo, Place, SECTOR_BYTES, SectorRange, Step, Stop};

/// Chunks resolved in one walk.
const GROUP: u64 = 64;
const WAYS: usize = 4;
/// Chunk sizes, sectors (ours): a mapping is kept for whole chunks alone.
const CHUNK_SECTORS_MIN: u64 = 8;
const CHUNK_SECTORS_MAX: u64 = 128;
/// Chunks joined into one answer at most.
const JOIN_MAX: u64 = 64;

/// What is known of a chunk, in one word: the upper 48 bits an offset in sectors or a layer, the
/// 14 below them a file, the last two which.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Known(u64);

const ZERO: Known = Known(0);

impl Known {
    fn data(file: FileNo, offset: u64) -> Option<Known> {
        let sector = offset / SECTOR_BYTES;
        let fits = offset.is_multiple_of(SECTOR_BYTES) && sector >> 48 == 0 && file.0 < 1 << 14;
        fits.then_some(Known((sector << 16) | (u64::from(file.0) << 2) | 1))
    }

    fn layer(layer: usize) -> Known {
        Known(((layer as u64) << 16) | 2)
    }
}

/// What is known for the start of a range.
pub(crate) enum Hit {
    Extent(Extent),
    /// No layer above this one has anything in this part of the range.
    Layer(u16, SectorRange),
}

#[derive(Clone, Copy)]
struct Entry {
    /// Chunk number plus one; 0 is empty.
    tag: u64,
    known: Known,
}

/// A walk down the chain for a group of chunks.
struct Walk {
    first: u64,
    layer: usize,
    /// Chunk of the group to look at next.
    at: u64,
    /// Chunks that no layer so far had anything for.
    pending: u64,
    known: [Known; GROUP as usize],
}

pub(crate) struct Resolved {
    entries: Vec<Entry>,
    sets: u64,
    /// Next way to replace, anywhere.
    clock: usize,
    chunk_sectors: u64,
    walk: Option<Walk>,
    /// The block that the walk waits for, and the last one of those that could not be read.
    awaited: Option<BlockRef>,
    failed: Option<BlockRef>,
}

impl Resolved {
    /// An index of about `budget_bytes`, or less if that leaves none. `grain_sectors` is the
    /// smallest cluster of the layers.
    pub fn new(budget_bytes: usize, grain_sectors: u64) -> Result<Resolved, ImageFault> {
        let grain = grain_sectors.clamp(CHUNK_SECTORS_MIN, CHUNK_SECTORS_MAX);
        let entries = as_much_as_fits(budget_bytes / (size_of::<Entry>() * WAYS), |sets| {
            let entries = filled(Entry { tag: 0, known: ZERO }, sets * WAYS)?;
            is_left(SPARE_BYTES).then_some(entries)
        })?;
        let sets = (entries.len() / WAYS) as u64;
        let chunk_sectors = 1 << grain.ilog2();
        Ok(Resolved { entries, sets, chunk_sectors, ..Resolved::none() })
    }

    /// For an image of one layer, which needs none.
    pub fn none() -> Resolved {
        Resolved {
            entries: Vec::new(),
            sets: 1,
            clock: 0,
            chunk_sectors: CHUNK_SECTORS_MAX,
            walk: None,
            awaited: None,
            failed: None,
        }
    }

    fn slot(&self, chunk: u64) -> Option<usize> {
        let set = (chunk % self.sets) as usize * WAYS;
        let ways = self.entries.get(set..set + WAYS)?;
        ways.iter().position(|entry| entry.tag == chunk + 1).map(|way| set + way)
    }

    fn keep(&mut self, chunk: u64, known: Known) {
        let set = (chunk % self.sets) as usize * WAYS;
        let index = self.slot(chunk).unwrap_or_else(|| {
            let ways = &self.entries[set..set + WAYS];
            let empty = ways.iter().position(|entry| entry.tag == 0);
            self.clock = (self.clock + 1) % WAYS;
            set + empty.unwrap_or(self.clock)
        });
        self.entries[index] = Entry { tag: chunk + 1, known };
    }

    fn known(&self, chunk: u64) -> Option<Known> {
        self.slot(chunk).map(|index| self.entries[index].known)
    }

    /// What is known of the start of `range`.
    pub fn find(&self, range: SectorRange) -> Option<Hit> {
        let mut chunk = range.start / self.chunk_sectors;
        let known = self.known(chunk)?;
        let mut end = ((chunk + 1) * self.chunk_sectors).min(range.end());
        if known.0 & 3 == 2 {
            let layer = (known.0 >> 16) as u16;
            return Some(Hit::Layer(layer, range.prefix(end - range.start)));
        }
        for _ in 0..JOIN_MAX {
            if end >= range.end() {
                break;
            }
            let next = match known {
                ZERO => ZERO,
                Known(word) => {
                    let chunks = chunk + 1 - range.start / self.chunk_sectors;
                    // A place further on than any can be is none.
                    let Some(next) = word.checked_add((chunks * self.chunk_sectors) << 16) else {
                        break;
                    };
                    Known(next)
                }
            };
            if self.known(chunk + 1) != Some(next) {
                break;
            }
            chunk += 1;
            end = ((chunk + 1) * self.chunk_sectors).min(range.end());
        }
        let place = match known {
            ZERO => Place::Zero,
            Known(word) => Place::File {
                file: FileNo((word >> 2) as u16 & 0x3fff),
                offset: ((word >> 16) + range.start % self.chunk_sectors) * SECTOR_BYTES,
            },
        };
        Some(Hit::Extent(Extent { sectors: end - range.start, place }))
    }

    /// Drops what is known of a range.
    pub fn forget(&mut self, range: SectorRange) {
        let chunks = range.start / self.chunk_sectors..range.end().div_ceil(self.chunk_sectors);
        let touched = |walk: &Walk| walk.first < chunks.end && chunks.start < walk.first + GROUP;
        self.walk = self.walk.take().filter(|walk| !touched(walk));
        if chunks.end - chunks.start > self.entries.len() as u64 {
            return self.forget_all();
        }
        for chunk in chunks {
            if let Some(index) = self.slot(chunk) {
                self.entries[index].tag = 0;
            }
        }
    }

    /// Drops everything.
    pub fn forget_all(&mut self) {
        self.walk = None;
        self.entries.iter_mut().for_each(|entry| entry.tag = 0);
    }

    /// A block was read.
    pub fn filled(&mut self, block: BlockRef) {
        self.failed = self.failed.filter(|&failed| failed != block);
    }

    /// A block could not be read: a walk that waits for it passes over the chunks that need it.
    pub fn fill_failed(&mut self, block: BlockRef) {
        if self.awaited == Some(block) {
            self.failed = Some(block);
        }
    }

    /// Resolves the chunk of `sector` and its neighbours; false when a walk for others is under
    /// way. Called again after each stop, it goes on where it was.
    pub fn resolve(&mut self, ctx: &mut Ctx, layers: &mut [AnyLayer], sector: u64) -> Step<bool> {
        let first = sector / self.chunk_sectors / GROUP * GROUP;
        if self.walk.as_ref().is_some_and(|walk| walk.first != first) {
            return Ok(false);
        }
        let size = self.chunk_sectors;
        let disk = layers[0].get_ref().sectors();
        let walk = self.walk.get_or_insert_with(|| {
            let count = (disk.div_ceil(size) - first).min(GROUP);
            let pending = u64::MAX >> (GROUP - count);
            Walk { first, layer: 0, at: 0, pending, known: [ZERO; GROUP as usize] }
        });
        while walk.layer < layers.len() && walk.pending != 0 {
            match walk.step(ctx, layers[walk.layer].get(), size, disk) {
                // Who asks for this chunk will be told, and nobody else.
                Err(Stop::Fault(_)) => walk.pass_over(),
                Err(Stop::Miss(block)) if self.failed == Some(block) => {
                    ctx.meta.fill_failed(block);
                    walk.pass_over();
                }
                Err(Stop::Miss(block)) => {
                    self.awaited = Some(block);
                    return Err(Stop::Miss(block));
                }
                other => other?,
            }
            if walk.at >= GROUP {
                (walk.layer, walk.at) = (walk.layer + 1, 0);
            }
        }
        let walk = self.walk.take().expect("it was just used");
        let count = (disk.div_ceil(size) - first).min(GROUP);
        for n in 0..count {
            self.keep(first + n, walk.known[n as usize]);
        }
        Ok(true)
    }
}

impl Walk {
    /// The next chunk cannot be looked at in this layer: whoever asks for it starts here.
    fn pass_over(&mut self) {
        self.known[self.at as usize] = Known::layer(self.layer);
        self.pending &= !(1 << self.at);
        self.at += 1;
    }

    /// Looks at the next pending chunks of one layer.
    fn step(
        &mut self,
        ctx: &mut Ctx,
        layer: &mut dyn crate::format::Layer,
        size: u64,
        disk: u64,
    ) -> Step<()> {
        let rest = self.pending & u64::MAX.checked_shl(self.at as u32).unwrap_or(0);
        if rest == 0 {
            self.at = GROUP;
            return Ok(());
        }
        self.at = rest.trailing_zeros().into();
        // To the end of the pending chunks in a row.
        let row = (!(self.pending >> self.at)).trailing_zeros().min(GROUP as u32) as u64;
        let start = (self.first + self.at) * size;
        let end = (start + row * size).min(disk);
        let visible = layer.sectors().min(end).saturating_sub(start);
        let (found, sectors) = if visible == 0 {
            (Found::Zero, end - start)
        } else {
            layer.map(ctx, SectorRange::new(start, visible))?
        };
        // Whole chunks covered; the last one of the disk may be short.
        let whole = if start + sectors == disk { sectors.div_ceil(size) } else { sectors / size };
        for n in 0..whole.max(1) {
            let index = (self.at + n) as usize;
            let known = match found {
                Found::Absent if whole > 0 => continue,
                Found::Zero if whole > 0 => Some(ZERO),
                Found::Data { file, offset } if whole > 0 => {
                    Known::data(file, offset + n * size * SECTOR_BYTES)
                }
                _ => None,
            };
            self.known[index] = known.unwrap_or(Known::layer(self.layer));
            self.pending &= !(1 << index);
        }
        self.at += whole.max(1);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    //! Would miss: whether what layers answer is kept right; the chain tests read whole disks.

    use super::*;

    #[test]
    fn chunks_in_a_row_are_one_answer_and_forgotten_ones_are_not_known() {
        let mut index = Resolved::new(1 << 16, 128).unwrap();
        for chunk in 0..4 {
            index.keep(chunk, Known::data(FileNo(3), 0x50000 + chunk * 65536).unwrap());
        }
        index.keep(4, ZERO);
        let range = SectorRange::new(100, 1000);
        let Some(Hit::Extent(extent)) = index.find(range) else { panic!("known") };
        let place = Place::File { file: FileNo(3), offset: 0x50000 + 100 * 512 };
        assert_eq!(extent, Extent { sectors: 412, place });
        index.forget(SectorRange::new(256, 1));
        let Some(Hit::Extent(extent)) = index.find(range) else { panic!("known") };
        assert_eq!(extent.sectors, 156);
        assert!(index.find(SectorRange::new(300, 1)).is_none());
        index.forget(SectorRange::new(0, 1 << 50));
        assert!(index.find(SectorRange::new(512, 1)).is_none());
    }

    #[test]
    fn chunks_at_the_end_of_all_places_are_no_row() {
        let mut index = Resolved::new(1 << 16, 128).unwrap();
        let last = (1u64 << 57) - 65536;
        index.keep(0, Known::data(FileNo(0), last).unwrap());
        let Some(Hit::Extent(extent)) = index.find(SectorRange::new(0, 1000)) else {
            panic!("known")
        };
        assert_eq!(
            extent,
            Extent { sectors: 128, place: Place::File { file: FileNo(0), offset: last } }
        );
    }

    #[test]
    fn a_place_that_does_not_fit_is_not_kept() {
        assert!(Known::data(FileNo(0), 511).is_none());
        assert!(Known::data(FileNo(0), 1 << 60).is_none());
        assert!(Known::data(FileNo(1 << 14), 512).is_none());
        assert!(Known::data(FileNo(4095), 1 << 55).is_some());
    }
}
