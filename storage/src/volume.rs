//! Where the sectors of a partition, volume or file lie: segments over disks, extents over
//! segments.
//!
//! Guards: every place it names was proved to lie inside its disk when the volume was built;
//! [`Volume::new`] is that one constructor. All numbers count 512-byte sectors.

use alloc::vec::Vec;

use crate::StoreFault;

/// Segments of one volume (ours; 32 bytes each). pvmove and repeated lvextend make tens.
pub const SEGMENTS_MAX: usize = 1024;
/// Stripes of one segment (ours; lvm2 allows 128).
pub const STRIPES_MAX: usize = 16;
/// Extents of one file (ours; 24 bytes each, 1.5 MiB at worst while it is open).
pub const EXTENTS_MAX: usize = 65_536;

/// A start on a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Area {
    pub disk: u8,
    pub sector: u64,
}

/// A stretch of a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Segment {
    /// First sector of the volume that this segment holds.
    pub start: u64,
    pub sectors: u64,
    /// One area: linear. Several: striped, in turn.
    pub areas: Vec<Area>,
    /// Sectors of one stripe chunk; not used when linear.
    pub stripe_sectors: u32,
}

/// A run of sectors on one disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    pub disk: u8,
    pub sector: u64,
    /// How far the run goes, at least 1.
    pub sectors: u64,
}

/// Proved segments, gapless from sector 0.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Volume {
    segments: Vec<Segment>,
    sectors: u64,
}

impl Volume {
    /// A whole disk or a partition.
    pub fn linear(disk: u8, sector: u64, sectors: u64) -> Volume {
        let areas = alloc::vec![Area { disk, sector }];
        let segment = Segment { start: 0, sectors, areas, stripe_sectors: 0 };
        Volume { segments: alloc::vec![segment], sectors }
    }

    /// Proves segments: in order, without gaps, each area inside its disk, whose capacities are
    /// `capacity(disk)` in sectors.
    pub fn new(segments: Vec<Segment>, capacity: &dyn Fn(u8) -> u64) -> Result<Volume, StoreFault> {
        if segments.is_empty() || segments.len() > SEGMENTS_MAX {
            return Err(StoreFault::Limit(SEGMENTS_MAX as u32));
        }
        let mut end = 0u64;
        for segment in &segments {
            if segment.start != end || segment.sectors == 0 {
                return Err(StoreFault::Refused("the volume's segments leave a gap or overlap"));
            }
            end = end.checked_add(segment.sectors).ok_or(StoreFault::BeyondEnd)?;
            segment.prove(capacity)?;
        }
        Ok(Volume { segments, sectors: end })
    }

    /// Size in sectors.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Where `sector` lies and how far the run goes on there. `None` beyond the end.
    pub fn place(&self, sector: u64) -> Option<Place> {
        let segment = self.segment(sector)?;
        Some(segment.place(sector - segment.start))
    }

    /// All runs in order, striped ones as whole areas: what the volume covers.
    pub fn areas(&self) -> impl Iterator<Item = Place> + '_ {
        self.segments.iter().flat_map(|segment| {
            let share = segment.sectors / segment.areas.len() as u64;
            segment.areas.iter().map(move |area| Place {
                disk: area.disk,
                sector: area.sector,
                sectors: share,
            })
        })
    }

    /// One bit for each disk that it lies on.
    pub fn disks(&self) -> u32 {
        self.areas().fold(0, |mask, place| mask | 1 << place.disk)
    }

    /// Whether every sector of `old` is at the same place here. Striped segments count as the
    /// same only where they begin together: lvm2 lengthens the last one, or adds others.
    pub fn begins_with(&self, old: &Volume) -> bool {
        let mut at = 0;
        while at < old.sectors {
            let (Some(here), Some(there)) = (self.segment(at), old.segment(at)) else {
                return false;
            };
            if !here.continues(there, at) {
                return false;
            }
            at = (here.start + here.sectors).min(there.start + there.sectors);
        }
        true
    }

    /// The segment that holds a sector.
    fn segment(&self, sector: u64) -> Option<&Segment> {
        let index = self.segments.partition_point(|segment| segment.start <= sector);
        let segment = self.segments.get(index.checked_sub(1)?)?;
        (sector - segment.start < segment.sectors).then_some(segment)
    }

    /// Follows a whole disk that grew or shrank.
    pub fn resize_linear(&mut self, sectors: u64) {
        assert!(self.segments.len() == 1, "only a whole disk is resized in place");
        self.segments[0].sectors = sectors;
        self.sectors = sectors;
    }
}

impl Segment {
    fn prove(&self, capacity: &dyn Fn(u8) -> u64) -> Result<(), StoreFault> {
        let count = self.areas.len();
        if count == 0 || count > STRIPES_MAX {
            return Err(StoreFault::Limit(STRIPES_MAX as u32));
        }
        if count > 1 {
            let round = u64::from(self.stripe_sectors) * count as u64;
            if self.stripe_sectors == 0 || !self.sectors.is_multiple_of(round) {
                return Err(StoreFault::Refused("a striped segment is not whole stripes"));
            }
        }
        let share = self.sectors / count as u64;
        for area in &self.areas {
            let end = area.sector.checked_add(share).ok_or(StoreFault::BeyondEnd)?;
            if area.disk >= 32 || end > capacity(area.disk) {
                return Err(StoreFault::Refused("the volume reaches beyond the end of its disk"));
            }
        }
        Ok(())
    }

    /// Whether it holds volume sector `at`, and those after it, where `old` does.
    fn continues(&self, old: &Segment, at: u64) -> bool {
        match (&self.areas[..], &old.areas[..]) {
            ([here], [there]) => {
                let sector = |area: &Area, start: u64| area.sector + (at - start);
                here.disk == there.disk && sector(here, self.start) == sector(there, old.start)
            }
            _ => {
                self.areas == old.areas
                    && self.stripe_sectors == old.stripe_sectors
                    && self.start == old.start
            }
        }
    }

    fn place(&self, within: u64) -> Place {
        let count = self.areas.len() as u64;
        if count == 1 {
            let area = self.areas[0];
            let sectors = self.sectors - within;
            return Place { disk: area.disk, sector: area.sector + within, sectors };
        }
        let stripe = u64::from(self.stripe_sectors);
        let (chunk, offset) = (within / stripe, within % stripe);
        let area = self.areas[(chunk % count) as usize];
        let sector = area.sector + chunk / count * stripe + offset;
        Place { disk: area.disk, sector, sectors: stripe - offset }
    }
}

/// A run of a file on a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// First sector of the file that it holds.
    pub start: u64,
    pub sectors: u64,
    /// First sector on the volume.
    pub sector: u64,
}

/// Where a sector of an open file is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Spot {
    Disk(Place),
    /// A hole or an unwritten extent: reads as zeros for this many sectors, cannot be written.
    Zeros(u64),
}

/// An open file: a whole volume, or extents over one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Layout {
    pub volume: Volume,
    /// `None`: the volume itself. Sorted, not overlapping, inside the volume.
    pub extents: Option<Vec<Extent>>,
    pub size_bytes: u64,
}

impl Layout {
    /// The whole of a volume.
    pub fn whole(volume: Volume) -> Layout {
        let size_bytes = volume.sectors().saturating_mul(512);
        Layout { volume, extents: None, size_bytes }
    }

    /// Where `sector` of the file is; `None` beyond the end.
    pub fn spot(&self, sector: u64) -> Option<Spot> {
        let Some(extents) = &self.extents else { return self.volume.place(sector).map(Spot::Disk) };
        let file_sectors = self.size_bytes.div_ceil(512);
        if sector >= file_sectors {
            return None;
        }
        let index = extents.partition_point(|extent| extent.start <= sector);
        if let Some(extent) = index.checked_sub(1).and_then(|index| extents.get(index)) {
            let within = sector - extent.start;
            if within < extent.sectors {
                let mut place = self.volume.place(extent.sector + within)?;
                place.sectors = place.sectors.min(extent.sectors - within);
                return Some(Spot::Disk(place));
            }
        }
        let next = extents.get(index).map_or(file_sectors, |extent| extent.start);
        Some(Spot::Zeros(next.min(file_sectors) - sector))
    }
}

#[cfg(test)]
mod tests {
    //! Arithmetic of linear and striped segments. Misses: what real tools write (lvm tests).
    use super::*;

    fn striped() -> Volume {
        let areas = alloc::vec![Area { disk: 0, sector: 100 }, Area { disk: 1, sector: 200 }];
        let first = Segment { start: 0, sectors: 64, areas, stripe_sectors: 8 };
        let areas = alloc::vec![Area { disk: 1, sector: 1000 }];
        let second = Segment { start: 64, sectors: 10, areas, stripe_sectors: 0 };
        Volume::new(alloc::vec![first, second], &|_| 2000).unwrap()
    }

    #[test]
    fn a_striped_segment_alternates_and_a_linear_one_follows() {
        let volume = striped();
        let at = |sector| volume.place(sector).map(|p| (p.disk, p.sector, p.sectors));
        assert_eq!(at(0), Some((0, 100, 8)));
        assert_eq!(at(7), Some((0, 107, 1)));
        assert_eq!(at(8), Some((1, 200, 8)));
        assert_eq!(at(17), Some((0, 109, 7)));
        assert_eq!(at(63), Some((1, 231, 1)));
        assert_eq!(at(64), Some((1, 1000, 10)));
        assert_eq!(at(74), None);
        assert_eq!(volume.disks(), 0b11);
    }

    #[test]
    fn a_segment_beyond_its_disk_or_with_a_gap_is_refused() {
        let segment = |start, sectors| Segment {
            start,
            sectors,
            areas: alloc::vec![Area { disk: 0, sector: 90 }],
            stripe_sectors: 0,
        };
        assert!(Volume::new(alloc::vec![segment(0, 10)], &|_| 100).is_ok());
        assert!(Volume::new(alloc::vec![segment(0, 11)], &|_| 100).is_err());
        assert!(Volume::new(alloc::vec![segment(1, 5)], &|_| 100).is_err());
        assert!(Volume::new(alloc::vec![segment(0, u64::MAX)], &|_| u64::MAX).is_err());
    }

    #[test]
    fn holes_read_as_zeros_up_to_the_next_extent() {
        let extents = alloc::vec![
            Extent { start: 8, sectors: 8, sector: 40 },
            Extent { start: 24, sectors: 8, sector: 0 },
        ];
        let volume = Volume::linear(3, 1000, 100);
        let layout = Layout { volume, extents: Some(extents), size_bytes: 40 * 512 - 100 };
        assert_eq!(layout.spot(0), Some(Spot::Zeros(8)));
        let place = Place { disk: 3, sector: 1041, sectors: 7 };
        assert_eq!(layout.spot(9), Some(Spot::Disk(place)));
        assert_eq!(layout.spot(16), Some(Spot::Zeros(8)));
        assert_eq!(layout.spot(32), Some(Spot::Zeros(8)));
        assert_eq!(layout.spot(40), None);
    }

    #[test]
    fn a_volume_begins_with_another_only_where_no_sector_moved() {
        let area = |disk, sector| Area { disk, sector };
        let linear = |start, sectors, sector| Segment {
            start,
            sectors,
            areas: alloc::vec![area(0, sector)],
            stripe_sectors: 0,
        };
        let volume = |segments: &[Segment]| Volume::new(segments.to_vec(), &|_| 9999).unwrap();
        let old = volume(&[linear(0, 10, 100), linear(10, 10, 300)]);
        let longer = [linear(0, 10, 100), linear(10, 15, 300), linear(25, 5, 700)];
        assert!(volume(&longer).begins_with(&old) && old.begins_with(&old));
        assert!(!old.begins_with(&volume(&longer)), "it was cut");
        // The same sectors in other pieces.
        let pieces = [linear(0, 4, 100), linear(4, 6, 104), linear(10, 12, 300)];
        assert!(volume(&pieces).begins_with(&old));
        assert!(!volume(&[linear(0, 30, 100)]).begins_with(&old));
        assert!(!volume(&[linear(0, 10, 100), linear(10, 20, 301)]).begins_with(&old));
        let striped = |sectors, stripe_sectors, second| Segment {
            start: 0,
            sectors,
            areas: alloc::vec![area(0, 100), area(1, second)],
            stripe_sectors,
        };
        let old = volume(&[striped(64, 8, 100)]);
        assert!(volume(&[striped(128, 8, 100)]).begins_with(&old));
        assert!(volume(&[striped(64, 8, 100), linear(64, 9, 500)]).begins_with(&old));
        assert!(!volume(&[striped(128, 16, 100)]).begins_with(&old));
        assert!(!volume(&[striped(128, 8, 101)]).begins_with(&old));
        assert!(!volume(&[linear(0, 128, 100)]).begins_with(&old));
    }
}
