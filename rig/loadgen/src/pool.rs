//! The pages that requests move: allocated and granted once for a kind of load, and kept.

use alloc::vec::Vec;

use platter_xen::blkif::{SECTOR_BYTES, SEGMENTS_DIRECT_MAX, Segment, emit_descriptors};
use platter_xen::{DomId, Gref, PAGE_BYTES, Region};

use crate::front::{free_granted, grant_all};
use crate::guest::Guest;
use alloc::string::String;

/// What a pool is made for; another shape needs another pool.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PoolShape {
    pub to: DomId,
    pub slots: usize,
    pub block_bytes: u64,
    /// Most segments in a request.
    pub segments_max: usize,
    /// Whether requests of few segments too lie in a page of their own.
    pub indirect: bool,
}

impl PoolShape {
    fn pages(&self) -> usize {
        (self.block_bytes as usize).div_ceil(PAGE_BYTES)
    }

    /// Requests that a block takes.
    pub fn parts(&self) -> usize {
        self.pages().div_ceil(self.segments_max)
    }

    /// Whether requests name their segments in a page of their own.
    pub fn is_indirect(&self) -> bool {
        self.indirect || self.segments_max > SEGMENTS_DIRECT_MAX && self.pages() > 11
    }
}

/// The pages of one block under way.
#[derive(Debug)]
pub struct Buffer {
    /// The block's bytes, contiguous.
    pub data: Region,
    pub grefs: Vec<Gref>,
    /// A page of descriptors for each part, when they are indirect.
    pub indirect: Vec<Gref>,
    descriptors: Option<Region>,
}

/// All buffers of one disk.
#[derive(Debug)]
pub struct Pool {
    pub shape: PoolShape,
    pub buffers: Vec<Buffer>,
}

impl Pool {
    /// Allocates, grants, and writes the descriptors, which never change.
    ///
    /// # Errors
    /// When the domain has too little memory or too few grants.
    pub fn make<G: Guest>(guest: &mut G, shape: PoolShape) -> Result<Pool, String> {
        let mut pool = Pool { shape, buffers: Vec::new() };
        for _ in 0..shape.slots {
            let data = guest.frames_alloc(shape.pages()).ok_or("no memory for this load")?;
            let grefs = grant_all(guest, shape.to, data, true)?;
            let mut buffer = Buffer { data, grefs, indirect: Vec::new(), descriptors: None };
            if shape.is_indirect() {
                let pages = guest.frames_alloc(shape.parts()).ok_or("no memory for this load")?;
                for part in 0..shape.parts() {
                    let segments = pool.segments_of(&buffer.grefs, part);
                    let mut bytes = [0; PAGE_BYTES];
                    let len = emit_descriptors(&segments, &mut bytes);
                    guest.write(pages.page(part), 0, &bytes[..len]);
                }
                buffer.indirect = grant_all(guest, shape.to, pages, false)?;
                buffer.descriptors = Some(pages);
            }
            pool.buffers.push(buffer);
        }
        Ok(pool)
    }

    /// The segments of a part of a block whose pages these are.
    pub fn segments_of(&self, grefs: &[Gref], part: usize) -> heapless::Vec<Segment, 256> {
        let max = self.shape.segments_max;
        let start = part * max;
        let end = (start + max).min(grefs.len());
        let bytes_last = self.shape.block_bytes as usize - (grefs.len() - 1) * PAGE_BYTES;
        let segment = |(index, gref): (usize, &Gref)| {
            let is_last = start + index + 1 == grefs.len();
            let bytes = if is_last { bytes_last } else { PAGE_BYTES };
            let last_sect = (bytes / SECTOR_BYTES as usize - 1) as u8;
            Segment { gref: *gref, first_sect: 0, last_sect }
        };
        grefs[start..end].iter().enumerate().map(segment).collect()
    }

    /// Gives everything back; false when the backend keeps a page.
    pub fn free<G: Guest>(self, guest: &mut G) -> bool {
        let mut all = true;
        for buffer in self.buffers {
            all &= free_granted(guest, buffer.data, &buffer.grefs);
            if let Some(descriptors) = buffer.descriptors {
                all &= free_granted(guest, descriptors, &buffer.indirect);
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    //! Would miss: a grant that names another page than it should.
    use super::*;

    fn pool(block_bytes: u64, segments_max: usize, indirect: bool) -> Pool {
        let shape = PoolShape { to: DomId(1), slots: 1, block_bytes, segments_max, indirect };
        Pool { shape, buffers: Vec::new() }
    }

    fn sectors(pool: &Pool, grefs: &[Gref], part: usize) -> u32 {
        pool.segments_of(grefs, part).iter().map(|segment| segment.sectors()).sum()
    }

    #[test]
    fn parts_cover_the_block_and_no_more() {
        let grefs: Vec<Gref> = (100..116).map(Gref).collect();
        let direct = pool(64 << 10, 11, false);
        assert_eq!((direct.shape.parts(), direct.shape.is_indirect()), (2, false));
        assert_eq!((sectors(&direct, &grefs, 0), sectors(&direct, &grefs, 1)), (88, 40));
        assert_eq!(direct.segments_of(&grefs, 1)[0].gref, Gref(111));
        let indirect = pool(64 << 10, 256, false);
        assert_eq!((indirect.shape.parts(), indirect.shape.is_indirect()), (1, true));
        assert_eq!(sectors(&indirect, &grefs, 0), 128);
        let small = pool(512, 11, false);
        assert_eq!(sectors(&small, &grefs[..1], 0), 1);
        assert!(pool(512, 256, true).shape.is_indirect());
    }
}
