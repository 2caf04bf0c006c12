//! What QED, VDI, qcow and sparse VMDK have in common: guest clusters found through tables of
//! entries, new clusters taken from the end of the file, and no counts of who uses what.
//!
//! Orders guarded here (data-then-map): a cluster's data and its head and tail are written
//! before the plan is committed; the entry is put at [`Phase::TABLE`], the pointer to a new
//! table at [`Phase::DIRECTORY`], so a cut at any write leaves space that nothing names, never
//! a name for space that is not written. It must never reuse space within a session but that of
//! abandoned plans, and never trust an entry that a [`Shape`] has not checked.

mod check;
mod write;

use crate::fault::{FaultKind, ImageFault};
use crate::files::FileInfo;
use crate::format::{Ctx, Found, Packed, read_only};
use crate::meta::BLOCK_BYTES;
#[cfg(doc)]
use crate::meta::Phase;
use crate::types::{FileNo, SECTOR_BYTES, SectorRange, Step, Stop};

pub(crate) use check::Checker;
pub(crate) use write::{Part, Writer};

/// What the entry of a cluster says, already checked against the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Entry {
    Absent,
    Zero,
    /// The cluster lies at this byte.
    Data(u64),
    Packed(Packed),
}

/// Where the entry of a cluster lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Table {
    /// At this byte, and its second copy at that one.
    At { entry: u64, copy: Option<u64> },
    /// There is no table for it: all clusters of the table are absent.
    Missing,
}

/// A table to be made with the plan that needs it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct NewTable {
    pub offset: u64,
    pub bytes: u64,
    /// Bytes taken for it.
    pub space_bytes: u64,
    /// Where the pointer to it goes, and its bytes.
    pub directory_at: u64,
    pub pointer: [u8; 8],
}

/// How `add_table` went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Added {
    /// The empty table is in place: locate the entry again.
    Installed,
    /// It is to be written and pointed to with the plan.
    WithPlan(NewTable),
}

/// The tables of a format. Offsets are bytes of `file`, clusters are numbered from the start of
/// the map.
pub(crate) trait Shape {
    /// Bytes of an entry, 4 or 8; entries are aligned to it.
    const ENTRY_BYTES: u64;

    fn file(&self) -> FileNo;
    fn cluster_bytes(&self) -> u64;
    /// Guest sectors mapped.
    fn sectors(&self) -> u64;
    /// Clusters that one table maps.
    fn table_clusters(&self) -> u64;
    fn locate(&self, ctx: &mut Ctx, cluster: u64) -> Step<Table>;
    /// Reads and checks the entry at a byte; offsets lie within the file and past the header.
    /// It reads nothing else: neighbours are looked at without stopping.
    fn entry(&self, ctx: &mut Ctx, at: u64) -> Step<Entry>;
    /// Completes what the entry says of a compressed cluster.
    fn packed(&self, _ctx: &mut Ctx, packed: Packed) -> Step<Packed> {
        Ok(packed)
    }
    /// The entry for a cluster at `offset`, its first `ENTRY_BYTES` bytes.
    fn encode(&self, offset: u64) -> [u8; 8];
    /// The entry for a cluster that reads as zeros, if there is one.
    fn zero_entry(&self) -> Option<[u8; 8]>;
    /// Makes the table for a cluster whose table is missing. Takes space from `space` only if
    /// it succeeds.
    fn add_table(&self, ctx: &mut Ctx, space: &mut Space, cluster: u64) -> Step<Added>;

    /// Bytes of one table, 0 where the table is among what is fixed.
    fn table_bytes(&self) -> u64;

    /// Stretches in use that no entry names: offset and length, 0 for none.
    fn fixed(&self) -> [(u64, u64); 4];

    /// Bytes that references are counted in by a check: what tables and clusters are aligned to.
    fn unit_bytes(&self) -> u64;

    /// Where units are counted from.
    fn origin(&self) -> u64 {
        0
    }

    /// Does everything in the file stand in tables or in what is fixed?
    fn counts_leaks(&self) -> bool {
        true
    }

    /// Clusters, the last one perhaps in part.
    fn clusters(&self) -> u64 {
        self.sectors().div_ceil(self.cluster_bytes() / SECTOR_BYTES)
    }

    /// Clusters from `cluster` on whose entries share its table and, in each copy, its cache
    /// block: so many can be looked at or changed without another read.
    fn block_clusters(&self, cluster: u64, entry: u64, copy: Option<u64>) -> u64 {
        let in_block = |at: u64| (BLOCK_BYTES - at % BLOCK_BYTES) / Self::ENTRY_BYTES;
        let in_table = self.table_clusters() - cluster % self.table_clusters();
        let count = in_block(entry).min(copy.map_or(u64::MAX, in_block)).min(in_table);
        count.min(self.clusters() - cluster)
    }

    /// What `cluster` is and how many clusters from it on, at most `max`, continue it.
    fn run(&self, ctx: &mut Ctx, cluster: u64, max: u64) -> Step<(Entry, u64)> {
        let (at, copy) = match self.locate(ctx, cluster)? {
            Table::At { entry, copy } => (entry, copy),
            Table::Missing => {
                let rest = self.table_clusters() - cluster % self.table_clusters();
                return Ok((Entry::Absent, rest.min(max)));
            }
        };
        let first = self.entry(ctx, at)?;
        let max = max.min(self.block_clusters(cluster, at, copy));
        let mut count = 1;
        while count < max {
            let continues = match first {
                Entry::Packed(_) => false,
                // The offset of an entry was checked to lie in the file: no overflow.
                Entry::Data(offset) => {
                    let next = offset.saturating_add(count * self.cluster_bytes());
                    self.entry(ctx, at + count * Self::ENTRY_BYTES) == Ok(Entry::Data(next))
                }
                other => self.entry(ctx, at + count * Self::ENTRY_BYTES) == Ok(other),
            };
            if !continues {
                break;
            }
            count += 1;
        }
        Ok((first, count))
    }

    /// [`Layer::map`](crate::format::Layer::map) for a range of this map.
    fn map(&self, ctx: &mut Ctx, range: SectorRange) -> Step<(Found, u64)> {
        let cluster_sectors = self.cluster_bytes() / SECTOR_BYTES;
        let cluster = range.start / cluster_sectors;
        let within = range.start % cluster_sectors;
        let needed = (within + range.count).div_ceil(cluster_sectors);
        let (entry, count) = self.run(ctx, cluster, needed)?;
        let sectors = range.count.min(count * cluster_sectors - within);
        let found = match entry {
            Entry::Absent => Found::Absent,
            Entry::Zero => Found::Zero,
            Entry::Data(offset) => {
                Found::Data { file: self.file(), offset: offset + within * SECTOR_BYTES }
            }
            Entry::Packed(packed) => {
                let skip = (within * SECTOR_BYTES) as u32;
                Found::Packed(Packed { skip, ..self.packed(ctx, packed)? })
            }
        };
        Ok((found, sectors))
    }
}

/// What space is taken for: what was given up is used again for the same only, so that each
/// table given up leaves room for the next one, whatever its size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Use {
    Clusters,
    Table,
}

/// Space that an abandoned plan gave up, before the end of what was handed out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Hole {
    start: u64,
    end: u64,
    use_: Use,
}

/// Holes kept: of the plans in flight every other one may be given up, some with tables. More
/// come only of requests that fail for good; their space is lost until the image is converted.
const HOLES_MAX: usize = crate::image::PLANS_MAX / 4 * 3;

/// Free space: at the end of a file, and what abandoned plans left before it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Space {
    file: FileNo,
    /// Clusters lie at multiples of their size from here.
    origin: u64,
    /// Where the next allocation may start.
    next: u64,
    /// From here on nothing was ever written or handed out.
    fresh_from: u64,
    /// Allocations end here at most: the format's reach, or the end of a fixed-size store.
    limit: u64,
    can_grow: bool,
    holes: heapless::Vec<Hole, HOLES_MAX>,
}

/// Where the next allocation lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Spot {
    Hole(usize),
    End,
}

impl Space {
    /// All beyond the end of the file, up to the `reach` of the format's offsets. A store that
    /// cannot grow has nothing there, and that is said when the image is opened, not by a guest's
    /// failed write: where the used part ends no header of these formats says.
    pub fn at_end(file: FileNo, info: FileInfo, reach: u64) -> Result<Space, ImageFault> {
        if !info.can_grow {
            let why = "an image of this format grows at its file's end, which a partition, a \
                       volume or an ext4 file of the storage domain has not: give it a file on a \
                       share, convert it to qcow2, vhd, vhdx or vdi, or open it read-only";
            return Err(read_only(file, why));
        }
        Ok(Space::from(file, info, (0, info.size_bytes), reach))
    }

    /// All from `next` on, which the caller knows to be free; clusters lie at multiples of
    /// their size from `origin`.
    pub fn from(file: FileNo, info: FileInfo, (origin, next): (u64, u64), reach: u64) -> Space {
        assert!(origin <= next, "free space before the first cluster");
        let limit = if info.can_grow { reach } else { reach.min(info.size_bytes) };
        let fresh_from = info.size_bytes.max(next);
        let (can_grow, holes) = (info.can_grow, heapless::Vec::new());
        Space { file, origin, next, fresh_from, limit, can_grow, holes }
    }

    fn aligned(&self, start: u64, align: u64) -> Option<u64> {
        (start - self.origin).checked_next_multiple_of(align)?.checked_add(self.origin)
    }

    /// The format's offsets reach further now.
    pub fn reach(&mut self, info: FileInfo, reach: u64) {
        self.limit = if info.can_grow { reach } else { reach.min(info.size_bytes) };
    }

    /// What lies before `start`, some clusters behind the origin, is no space any more.
    pub fn start_at(&mut self, start: u64) {
        self.holes.retain(|hole| hole.start >= start);
        self.next = self.next.max(start);
    }

    /// Clusters are counted from another place, as far from the old one as some clusters.
    pub fn rebase(&mut self, origin: u64) {
        assert!(self.next >= origin, "free space before the first cluster");
        self.origin = origin;
    }

    /// The first byte not handed out.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Where `len` bytes at a multiple of `align` would be taken: a hole comes first.
    fn spot(&self, use_: Use, len: u64, align: u64) -> (Spot, Option<u64>) {
        let fits = |hole: &Hole| {
            let start = self.aligned(hole.start, align).filter(|_| hole.use_ == use_)?;
            (start.checked_add(len)? <= hole.end).then_some(start)
        };
        let mut holes = self.holes.iter().enumerate();
        let found = holes.find_map(|(n, hole)| Some((Spot::Hole(n), Some(fits(hole)?))));
        found.unwrap_or((Spot::End, self.aligned(self.next, align)))
    }

    /// Takes `len` bytes at a multiple of `align`.
    pub fn take(&mut self, use_: Use, len: u64, align: u64) -> Result<u64, ImageFault> {
        let (spot, offset) = self.spot(use_, len, align);
        let end = offset.and_then(|offset| offset.checked_add(len));
        let (Some(offset), Some(end)) = (offset, end.filter(|&end| end <= self.limit)) else {
            let fault = ImageFault::new(FaultKind::Full, self.file, "a new cluster");
            let value = end.unwrap_or(u64::MAX);
            return Err(ImageFault { value, limit: self.limit, ..fault });
        };
        match spot {
            Spot::End => self.next = end,
            Spot::Hole(n) => {
                let hole = self.holes.swap_remove(n);
                self.keep(Hole { end: offset, ..hole });
                self.keep(Hole { start: end, ..hole });
            }
        }
        Ok(offset)
    }

    /// Takes `len` bytes that read as zeros and were never handed out; a store that cannot grow
    /// has none.
    pub fn take_fresh(&mut self, len: u64, align: u64) -> Result<u64, ImageFault> {
        let start = self.next;
        if !self.can_grow {
            let fault = ImageFault::new(FaultKind::Full, self.file, "tables at the file's end");
            return Err(ImageFault { value: len, limit: 0, ..fault });
        }
        self.next = self.fresh_from.max(start);
        let from = self.aligned(self.next, align).filter(|&from| from < self.limit);
        let end = from.and_then(|from| from.checked_add(len)).filter(|&end| end <= self.limit);
        let (Some(from), Some(end)) = (from, end) else {
            self.next = start;
            let fault = ImageFault::new(FaultKind::Full, self.file, "tables at the file's end");
            return Err(ImageFault { value: len, limit: self.limit, ..fault });
        };
        self.next = end;
        self.give_back(Use::Clusters, start, from - start);
        self.used();
        Ok(from)
    }

    /// Allocations of `unit` bytes at multiples of it that fit in a row now, an upper bound.
    fn room(&self, unit: u64) -> u64 {
        let (spot, start) = self.spot(Use::Clusters, unit, unit);
        let end = match spot {
            Spot::Hole(n) => self.holes[n].end,
            Spot::End => self.limit,
        };
        end.saturating_sub(start.unwrap_or(u64::MAX)) / unit
    }

    /// Does all from `offset` on read as zeros, never handed out before?
    fn is_fresh(&self, offset: u64) -> bool {
        self.can_grow && offset >= self.fresh_from
    }

    /// What was taken up to now is in use.
    pub fn used(&mut self) {
        self.fresh_from = self.fresh_from.max(self.next);
    }

    fn keep(&mut self, hole: Hole) {
        if hole.start < hole.end {
            // Without a place it is lost, as said at `HOLES_MAX`.
            let _ = self.holes.push(hole);
        }
    }

    /// Takes a gap that nothing names before the end, unless what plans may give up would find no
    /// place then: false.
    pub fn take_gap(&mut self, start: u64, len: u64) -> bool {
        let fits = self.holes.len() < HOLES_MAX / 2;
        if fits {
            self.give_back(Use::Clusters, start, len);
        }
        fits
    }

    /// Takes back what was handed out.
    pub fn give_back(&mut self, use_: Use, start: u64, len: u64) {
        let mut back = Hole { start, end: start + len, use_ };
        let joins = |a: &Hole, b: &Hole| a.use_ == b.use_ && (a.end == b.start || b.end == a.start);
        while let Some(n) = self.holes.iter().position(|hole| joins(hole, &back)) {
            let hole = self.holes.swap_remove(n);
            back = Hole { start: back.start.min(hole.start), end: back.end.max(hole.end), use_ };
        }
        self.keep(back);
        while let Some(n) = self.holes.iter().position(|hole| hole.end == self.next) {
            self.next = self.holes.swap_remove(n).start;
        }
    }
}

/// A change of the header that must be durable before the first write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum FirstWrite {
    Todo,
    /// The change is made; the flush that must carry it is asked for.
    Asked,
    Done,
}

impl FirstWrite {
    /// `needed` false: there is nothing to change.
    pub fn new(needed: bool) -> FirstWrite {
        if needed { FirstWrite::Todo } else { FirstWrite::Done }
    }

    /// Something was changed that a flush must carry before the next write.
    pub fn ask(&mut self) {
        *self = FirstWrite::Asked;
    }

    /// Lets a write pass once the change is durable. `change` makes it, all or nothing.
    pub fn pass(&mut self, ctx: &mut Ctx, change: impl FnOnce(&mut Ctx) -> Step<()>) -> Step<()> {
        if *self == FirstWrite::Done {
            return Ok(());
        }
        // A flush under way may be past the header: only one begun afterwards counts.
        if ctx.meta.flushing() {
            return Err(Stop::Busy);
        }
        if *self == FirstWrite::Todo {
            change(ctx)?;
            *self = FirstWrite::Asked;
        }
        Err(Stop::NeedFlush)
    }

    /// A flush is over.
    pub fn flushed(&mut self, ok: bool) {
        if *self == FirstWrite::Asked && ok {
            *self = FirstWrite::Done;
        }
    }
}

#[cfg(test)]
mod tests {
    //! Would miss: which plans give space back; the tests of the formats abandon plans.

    use super::*;

    #[test]
    fn a_store_that_cannot_grow_is_refused_in_a_sentence() {
        let info = FileInfo { size_bytes: 100, can_grow: false, identity: 1 };
        let fault = Space::at_end(FileNo(0), info, 1 << 40).unwrap_err();
        assert!(fault.kind == FaultKind::ReadOnly && fault.field.contains("give it a file"));
    }

    #[test]
    fn what_was_given_up_is_taken_first_and_for_the_same_use() {
        let info = FileInfo { size_bytes: 100, can_grow: true, identity: 1 };
        let mut space = Space::at_end(FileNo(0), info, 1 << 40).unwrap();
        let mut take = |use_, len| space.take(use_, len, 100).unwrap();
        let table = take(Use::Table, 400);
        let runs = [take(Use::Clusters, 200), take(Use::Clusters, 100), take(Use::Clusters, 100)];
        assert_eq!((table, runs), (100, [500, 700, 800]));
        space.give_back(Use::Table, 100, 400);
        space.give_back(Use::Clusters, 500, 200);
        space.give_back(Use::Clusters, 700, 100);
        // The last run is in use: all three are holes, the clusters in one.
        assert_eq!((space.next(), space.holes.len(), space.room(100)), (900, 2, 3));
        assert_eq!(space.take(Use::Clusters, 100, 100), Ok(500));
        assert_eq!(space.take(Use::Clusters, 300, 100), Ok(900), "no hole is so long");
        assert_eq!(space.take(Use::Table, 400, 100), Ok(100));
        space.give_back(Use::Clusters, 900, 300);
        assert_eq!(space.next(), 900);
        space.give_back(Use::Clusters, 800, 100);
        assert_eq!((space.next(), space.holes.len()), (600, 0), "what was last is the end again");
    }
}
