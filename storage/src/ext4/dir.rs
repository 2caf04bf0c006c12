//! Directories, read block by block (ext4 doc, "Directory Entries"). The hash tree is not used:
//! its inner blocks look like one unused entry, and every leaf is a plain directory block.

use super::inode::Inode;
use super::map::Mapper;
use super::superblock::Superblock;
use crate::StoreFault;
use crate::bytes::{crc32c_raw, u16_at, u32_at};
use crate::meta::{MetaFault, ReadBlocks, read_vec, refused};

/// Bytes of the tail that carries a block's sum, and its fake file type.
const TAIL_BYTES: usize = 12;
const TAIL_TYPE: u8 = 0xDE;
/// Bytes of a directory (ours): more than this does not fit an opening's cache.
const DIR_BYTES_MAX: u64 = 3 << 20;

/// The inode of `name` in a directory.
pub fn find(
    volume: &dyn ReadBlocks,
    fs: &Superblock,
    dir: &Inode,
    name: &str,
) -> Result<u32, MetaFault> {
    dir.prove_dir()?;
    if dir.size_bytes > DIR_BYTES_MAX {
        return refused("the ext4 directory is too large: put images in one with fewer names");
    }
    let mut mapper = Mapper::new();
    mapper.collect(volume, fs, dir)?;
    for extent in mapper.extents() {
        let unit = fs.block_bytes / 512;
        for index in 0..extent.sectors / unit {
            let at = (extent.sector + index * unit) * 512;
            let block = read_vec(volume, at, fs.block_bytes as usize)?;
            prove_tail(fs, dir, &block)?;
            if let Some(inode) = find_in(&block, name)? {
                return Ok(inode);
            }
        }
    }
    Err(StoreFault::NotFound.into())
}

/// Looks through one block.
pub fn find_in(block: &[u8], name: &str) -> Result<Option<u32>, MetaFault> {
    let mut at = 0;
    while at + 8 <= block.len() {
        let fields = (u32_at(block, at), u16_at(block, at + 4), block.get(at + 6));
        let (Some(inode), Some(length), Some(&name_bytes)) = fields else { break };
        // 64 KiB does not fit 16 bits: written as 0 or 65535 (ext4 doc, "rec_len").
        let whole = block.len() == 65_536 && (length == 0 || length == 65_535);
        let length = if whole { 65_536 } else { usize::from(length) };
        if length < 8 || length % 4 != 0 || at + length > block.len() {
            return refused("an ext4 directory has a broken entry");
        }
        let from = at + 8;
        let entry = block.get(from..from + usize::from(name_bytes));
        if inode != 0 && usize::from(name_bytes) + 8 <= length && entry == Some(name.as_bytes()) {
            return Ok(Some(inode));
        }
        at += length;
    }
    Ok(None)
}

/// The sum of a leaf block. Inner blocks of a hash tree hold no names and have a sum of another
/// shape, which is not needed.
fn prove_tail(fs: &Superblock, dir: &Inode, block: &[u8]) -> Result<(), MetaFault> {
    if !fs.checksums {
        return Ok(());
    }
    let tail = block.len() - TAIL_BYTES;
    let is_tail = u32_at(block, tail) == Some(0)
        && u16_at(block, tail + 4) == Some(TAIL_BYTES as u16)
        && block.get(tail + 6) == Some(&0)
        && block.get(tail + 7) == Some(&TAIL_TYPE);
    if !is_tail {
        if dir.is_indexed() && is_inner(block) {
            return Ok(());
        }
        return refused("an ext4 directory block has no checksum");
    }
    let covered = block.get(..tail).unwrap_or(&[]);
    if u32_at(block, tail + 8) == Some(crc32c_raw(dir.seed, covered)) {
        return Ok(());
    }
    refused("an ext4 directory block's checksum is wrong")
}

/// The root of a hash tree (`.` and `..` up to the block's end) or a node (one unused entry).
fn is_inner(block: &[u8]) -> bool {
    let length = |at: usize| u16_at(block, at + 4).map(usize::from);
    let node = u32_at(block, 0) == Some(0) && length(0) == Some(block.len());
    let root = length(0) == Some(12) && length(12) == Some(block.len() - 12);
    node || root
}
