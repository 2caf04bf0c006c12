//! Reading metadata (partition tables, LVM, ext4) by straight-line parsers that never wait.
//!
//! A parser asks for bytes; what is not in the [`MetaCache`] stops it with a [`Miss`] through
//! `?`. The caller reads those sectors, fills the cache and runs the parser again from its
//! start. The cache lives for one opening, keeps every block it was given, and is bounded: an
//! opening that needs more is refused, so a parser led in circles by a hostile disk ends.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use crate::StoreFault;
use crate::volume::Volume;

/// Bytes of a cache block: at least the largest block of a disk.
pub const META_BLOCK_BYTES: usize = 4096;
/// Blocks of one opening: 4 MiB while it lasts, ours. A directory of 30,000 names, a file of
/// 100,000 extents and a megabyte of LVM text each need less.
pub const META_BLOCKS_MAX: usize = 1024;
/// Left in the heap, in one piece, by all that is read here (ours): others' small allocations
/// cannot fail without ending the domain.
const SPARE_BYTES: usize = 512 << 10;
/// Sectors of one cache block.
const META_SECTORS: u64 = META_BLOCK_BYTES as u64 / 512;

/// Room for so many items, if the heap has it and something to spare.
pub fn reserve<T>(items: usize) -> Result<Vec<T>, StoreFault> {
    let lack = StoreFault::Limit(u32::try_from(items).unwrap_or(u32::MAX));
    let (mut room, mut spare) = (Vec::new(), Vec::<u8>::new());
    room.try_reserve_exact(items).map_err(|_| lack)?;
    spare.try_reserve_exact(SPARE_BYTES).map_err(|_| lack)?;
    // An allocation that nobody uses may be left out, and with it its failure.
    core::hint::black_box(&spare);
    Ok(room)
}

/// Sectors that must be read before the parser can go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Miss {
    /// Number of the disk.
    pub disk: u8,
    /// Number of the 4096-byte block.
    pub block: u64,
}

/// Why a parser stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MetaFault {
    Miss(Miss),
    Refused(StoreFault),
}

/// A refusal with a sentence for people.
pub fn refused<T>(sentence: &'static str) -> Result<T, MetaFault> {
    Err(MetaFault::Refused(StoreFault::Refused(sentence)))
}

impl From<StoreFault> for MetaFault {
    fn from(fault: StoreFault) -> MetaFault {
        MetaFault::Refused(fault)
    }
}

/// Random access to the bytes of a disk, partition or volume.
pub trait ReadBlocks {
    /// Size in bytes.
    fn len_bytes(&self) -> u64;
    /// Fills `into` from byte `offset`. Beyond the end: [`StoreFault::BeyondEnd`].
    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), MetaFault>;
}

impl ReadBlocks for &[u8] {
    fn len_bytes(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), MetaFault> {
        let from = usize::try_from(offset).ok();
        let bytes = from.and_then(|from| self.get(from..from.checked_add(into.len())?));
        into.copy_from_slice(bytes.ok_or(StoreFault::BeyondEnd)?);
        Ok(())
    }
}

/// The disks that an opening may look at.
pub trait Disks {
    /// How many; disks are numbered from 0.
    fn count(&self) -> u8;
    /// The name in paths: `xvda`, `nvme0n1`.
    fn name(&self, disk: u8) -> &str;
    /// Capacity in 512-byte sectors; 0 when it is not there.
    fn sectors(&self, disk: u8) -> u64;
    /// 512 to 4096.
    fn block_bytes(&self, disk: u8) -> u32;
    /// Fills `into` from byte `offset` of a disk; the range is inside its capacity.
    fn read(&self, disk: u8, offset: u64, into: &mut [u8]) -> Result<(), MetaFault>;
    /// Whether an image that is open may be written on one of these sectors: what stands there is
    /// its guest's word.
    fn is_written(&self, disk: u8, sector: u64, sectors: u64) -> bool;
}

/// The blocks read so far.
pub struct MetaCache {
    blocks_max: usize,
    blocks: BTreeMap<(u8, u64), Box<[u8]>>,
}

impl MetaCache {
    /// An empty one that takes so many blocks.
    pub const fn new(blocks_max: usize) -> MetaCache {
        MetaCache { blocks_max, blocks: BTreeMap::new() }
    }

    /// Room for another block.
    pub fn has_room(&self) -> bool {
        self.blocks.len() < self.blocks_max
    }

    /// Enters a block; the last block of a disk may be short. False when the heap has no room.
    pub fn fill(&mut self, miss: Miss, bytes: &[u8]) -> bool {
        assert!(bytes.len() <= META_BLOCK_BYTES, "length of a cache block");
        let Ok(mut block) = reserve(bytes.len()) else { return false };
        block.extend_from_slice(bytes);
        self.blocks.insert((miss.disk, miss.block), block.into_boxed_slice());
        true
    }

    pub fn has(&self, disk: u8, block: u64) -> bool {
        self.blocks.contains_key(&(disk, block))
    }

    /// Forgets everything: at the end of an opening.
    pub fn clear(&mut self) {
        self.blocks.clear();
    }

    /// Copies bytes of a disk out of the cache, or says which block is missing.
    pub fn read(&self, disk: u8, offset: u64, into: &mut [u8]) -> Result<(), MetaFault> {
        let mut done = 0;
        while done < into.len() {
            let at = offset.checked_add(done as u64).ok_or(StoreFault::BeyondEnd)?;
            let block = at / META_BLOCK_BYTES as u64;
            let within = (at % META_BLOCK_BYTES as u64) as usize;
            let bytes =
                self.blocks.get(&(disk, block)).ok_or(MetaFault::Miss(Miss { disk, block }))?;
            let take = (META_BLOCK_BYTES - within).min(into.len() - done);
            let from = bytes.get(within..within + take).ok_or(StoreFault::BeyondEnd)?;
            into[done..done + take].copy_from_slice(from);
            done += take;
        }
        Ok(())
    }
}

/// The sectors of one cache block on a disk of `capacity` sectors: (first, count).
pub fn block_sectors(miss: Miss, capacity: u64) -> Option<(u64, u32)> {
    let first = miss.block.checked_mul(META_SECTORS)?;
    let count = capacity.checked_sub(first)?.min(META_SECTORS);
    (count > 0).then_some((first, count as u32))
}

/// A volume as the parsers above it see it.
pub struct VolumeReader<'a> {
    pub disks: &'a dyn Disks,
    pub volume: &'a Volume,
}

impl ReadBlocks for VolumeReader<'_> {
    fn len_bytes(&self) -> u64 {
        self.volume.sectors().saturating_mul(512)
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), MetaFault> {
        let mut done = 0;
        while done < into.len() {
            let at = offset.checked_add(done as u64).ok_or(StoreFault::BeyondEnd)?;
            let place = self.volume.place(at / 512).ok_or(StoreFault::BeyondEnd)?;
            let within = at % 512;
            let left = place.sectors.saturating_mul(512) - within;
            let take = left.min((into.len() - done) as u64) as usize;
            let on_disk = place.sector.saturating_mul(512).saturating_add(within);
            self.disks.read(place.disk, on_disk, &mut into[done..done + take])?;
            done += take;
        }
        Ok(())
    }
}

/// Reads `len` bytes into a vector; `len` has been bounded by the caller.
pub fn read_vec(reader: &dyn ReadBlocks, offset: u64, len: usize) -> Result<Vec<u8>, MetaFault> {
    let mut bytes = alloc::vec![0; len];
    reader.read_at(offset, &mut bytes)?;
    Ok(bytes)
}
