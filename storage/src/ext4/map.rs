//! From a file's blocks to the filesystem's: extent trees and the old block maps (ext4 doc,
//! "The Contents of inode.i_block").
//!
//! Guards: depth, order and place of every node and extent are proved; the tree is walked in
//! order of file blocks, and what was collected stays, so that a later call goes on from there.

use alloc::collections::BTreeSet;
use alloc::vec::Vec;

use super::inode::Inode;
use super::superblock::Superblock;
use crate::StoreFault;
use crate::bytes::{crc32c_raw, u16_at, u32_at};
use crate::meta::{META_BLOCK_BYTES, META_BLOCKS_MAX, MetaFault, ReadBlocks, read_vec, refused};
use crate::volume::{EXTENTS_MAX, Extent};

const EXTENT_MAGIC: u16 = 0xF30A;
/// Bytes of a header, an index entry and a leaf entry alike.
const ENTRY_BYTES: usize = 12;
/// Depth of a tree (ext4 doc: at most 5 is needed for the largest file).
const DEPTH_MAX: u16 = 5;
/// `ee_len` above this means an unwritten extent.
const WRITTEN_MAX: u32 = 32_768;
/// Nodes of 1 KiB, the smallest, in the blocks of an opening's cache.
const NODES_MAX: usize = META_BLOCKS_MAX * META_BLOCK_BYTES / 1024;
/// Block numbers in an inode: direct ones, then single, double and triple indirect.
const DIRECT: u64 = 12;

/// The extents of one file, collected in order.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Mapper {
    /// Sorted; in 512-byte sectors; unwritten extents and holes are left out.
    extents: Vec<Extent>,
    /// File blocks before this one are done.
    next: u64,
    /// Blocks of its tree.
    nodes: BTreeSet<u64>,
    /// Nodes that this call has read.
    reads: usize,
    /// Groups whose own blocks it does not lie in.
    pub(super) groups_proved: u64,
}

impl Mapper {
    pub const fn new() -> Mapper {
        let nodes = BTreeSet::new();
        Mapper { extents: Vec::new(), next: 0, nodes, reads: 0, groups_proved: 0 }
    }

    /// What is done so far: grows from call to call, or the opening makes no progress.
    pub fn progress(&self) -> u64 {
        self.next.saturating_add(self.groups_proved)
    }

    /// Blocks of the file's tree.
    pub fn nodes(&self) -> impl Iterator<Item = u64> {
        self.nodes.iter().copied()
    }

    /// Reads a node. What one call reads without a miss lies in the opening's cache: more nodes
    /// than there is room for are the same ones again and again.
    fn read_node(
        &mut self,
        volume: &dyn ReadBlocks,
        fs: &Superblock,
        block: u64,
    ) -> Result<Vec<u8>, MetaFault> {
        fs.prove_block(block)?;
        self.reads += 1;
        if self.reads > NODES_MAX {
            return refused("an ext4 file's tree leads in circles");
        }
        let bytes = read_vec(volume, block * fs.block_bytes, fs.block_bytes as usize)?;
        self.nodes.insert(block);
        Ok(bytes)
    }

    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    pub fn into_extents(self) -> Vec<Extent> {
        self.extents
    }

    /// Whether some sector before `size_bytes` has no place.
    pub fn has_gaps(&self, size_bytes: u64) -> bool {
        let mut end = 0;
        for extent in &self.extents {
            if extent.start != end {
                return true;
            }
            end = extent.start + extent.sectors;
        }
        end < size_bytes.div_ceil(512)
    }

    /// Collects all extents of the file's size.
    pub fn collect(
        &mut self,
        volume: &dyn ReadBlocks,
        fs: &Superblock,
        inode: &Inode,
    ) -> Result<(), MetaFault> {
        self.reads = 0;
        let blocks = inode.size_bytes.div_ceil(fs.block_bytes);
        if inode.has_extents() {
            return self.node(volume, fs, inode, &inode.block, None, blocks);
        }
        if blocks > u64::from(u32::MAX) {
            return refused("an ext4 file with a block map is too large");
        }
        self.block_map(volume, fs, inode, blocks)
    }

    /// Enters a run; joins it to the last one where both sides continue.
    fn push(
        &mut self,
        fs: &Superblock,
        file_block: u64,
        count: u64,
        block: u64,
    ) -> Result<(), MetaFault> {
        fs.prove_block(block)?;
        fs.prove_block(block.saturating_add(count - 1))?;
        let unit = fs.block_bytes / 512;
        // Below 2^48 blocks of at most 128 sectors: cannot overflow.
        let (start, sectors, sector) = (file_block * unit, count * unit, block * unit);
        self.next = file_block + count;
        if let Some(last) = self.extents.last_mut()
            && last.start + last.sectors == start
            && last.sector + last.sectors == sector
        {
            last.sectors += sectors;
            return Ok(());
        }
        if self.extents.len() == EXTENTS_MAX {
            return Err(StoreFault::Limit(EXTENTS_MAX as u32).into());
        }
        self.extents.push(Extent { start, sectors, sector });
        Ok(())
    }

    /// One node of an extent tree: the inode's own (`parent_depth` `None`) or a block.
    fn node(
        &mut self,
        volume: &dyn ReadBlocks,
        fs: &Superblock,
        inode: &Inode,
        bytes: &[u8],
        parent_depth: Option<u16>,
        end: u64,
    ) -> Result<(), MetaFault> {
        let Some(depth) = prove_header(bytes, parent_depth) else {
            return refused("an ext4 extent tree has a broken node");
        };
        let count = usize::from(u16_at(bytes, 2).unwrap_or(0));
        let entries = || bytes.chunks_exact(ENTRY_BYTES).skip(1).take(count);
        if depth == 0 {
            return entries().try_for_each(|entry| self.leaf(fs, entry, end));
        }
        let starts = |entry: &[u8]| u64::from(u32_at(entry, 0).unwrap_or(0));
        let mut following = entries().skip(1).map(starts).chain(core::iter::once(end));
        for entry in entries() {
            let until = following.next().unwrap_or(end);
            if starts(entry) >= until && until != end {
                return refused("an ext4 extent tree is not in order");
            }
            if until <= self.next || starts(entry) >= end {
                continue;
            }
            let low = u64::from(u32_at(entry, 4).unwrap_or(0));
            let high = u64::from(u16_at(entry, 8).unwrap_or(0));
            let block = high << 32 | low;
            let child = self.read_node(volume, fs, block)?;
            prove_tail(fs, inode, &child)?;
            self.node(volume, fs, inode, &child, Some(depth), until)?;
            self.next = self.next.max(until.min(end));
        }
        Ok(())
    }

    fn leaf(&mut self, fs: &Superblock, entry: &[u8], end: u64) -> Result<(), MetaFault> {
        let file_block = u64::from(u32_at(entry, 0).unwrap_or(0));
        let length = u32::from(u16_at(entry, 4).unwrap_or(0));
        let high = u64::from(u16_at(entry, 6).unwrap_or(0));
        let block = high << 32 | u64::from(u32_at(entry, 8).unwrap_or(0));
        let unwritten = length > WRITTEN_MAX;
        let length = u64::from(if unwritten { length - WRITTEN_MAX } else { length });
        if file_block >= end {
            // Beyond the file's size: preallocated with `--keep-size`.
            return Ok(());
        }
        if length == 0 || file_block < self.next {
            return refused("an ext4 extent tree is not in order");
        }
        if unwritten {
            self.next = file_block + length;
            return Ok(());
        }
        self.push(fs, file_block, length, block)
    }

    /// The 15 block numbers of an inode without extents.
    fn block_map(
        &mut self,
        volume: &dyn ReadBlocks,
        fs: &Superblock,
        inode: &Inode,
        blocks: u64,
    ) -> Result<(), MetaFault> {
        let per_block = fs.block_bytes / 4;
        let mut start = 0;
        for slot in 0..15 {
            let level = u32::try_from(slot).unwrap_or(0).saturating_sub(DIRECT as u32 - 1);
            let covers = per_block.saturating_pow(level);
            if start >= blocks {
                break;
            }
            let block = u32_at(&inode.block, slot * 4).unwrap_or(0);
            self.map_entry(volume, fs, block, level, start, blocks)?;
            start = start.saturating_add(covers);
        }
        Ok(())
    }

    /// One entry that covers file blocks from `start`, `level` indirections deep.
    fn map_entry(
        &mut self,
        volume: &dyn ReadBlocks,
        fs: &Superblock,
        block: u32,
        level: u32,
        start: u64,
        blocks: u64,
    ) -> Result<(), MetaFault> {
        let per_block = fs.block_bytes / 4;
        let covers = per_block.saturating_pow(level);
        let end = start.saturating_add(covers).min(blocks);
        if end <= self.next || start >= blocks {
            return Ok(());
        }
        if block == 0 {
            self.next = end;
            return Ok(());
        }
        if level == 0 {
            return self.push(fs, start, 1, u64::from(block));
        }
        let bytes = self.read_node(volume, fs, u64::from(block))?;
        let each = per_block.saturating_pow(level - 1);
        for (index, entry) in (0u64..).zip(bytes.chunks_exact(4)) {
            let block = u32_at(entry, 0).unwrap_or(0);
            self.map_entry(volume, fs, block, level - 1, start + index * each, blocks)?;
        }
        Ok(())
    }
}

/// The depth of a node whose header is right.
fn prove_header(bytes: &[u8], parent_depth: Option<u16>) -> Option<u16> {
    let (entries, most) = (u16_at(bytes, 2)?, u16_at(bytes, 4)?);
    let depth = u16_at(bytes, 6)?;
    let room = bytes.len() / ENTRY_BYTES - 1;
    let deep = match parent_depth {
        Some(parent) => parent.checked_sub(1) == Some(depth),
        None => depth <= DEPTH_MAX,
    };
    let sane = u16_at(bytes, 0)? == EXTENT_MAGIC && entries <= most && usize::from(most) <= room;
    (sane && deep).then_some(depth)
}

/// The sum after the last entry that an extent block has room for.
fn prove_tail(fs: &Superblock, inode: &Inode, block: &[u8]) -> Result<(), MetaFault> {
    if !fs.checksums {
        return Ok(());
    }
    let most = usize::from(u16_at(block, 4).unwrap_or(0));
    let at = ENTRY_BYTES * (most + 1);
    let stored = u32_at(block, at);
    let sum = block.get(..at).map(|covered| crc32c_raw(inode.seed, covered));
    if stored.is_some() && stored == sum {
        return Ok(());
    }
    refused("an ext4 extent block's checksum is wrong")
}
