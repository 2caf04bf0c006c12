//! ext4 (and ext2, ext3) in place: finds a file by its path and the blocks that hold it
//! (Linux `Documentation/filesystems/ext4/`, cited as "ext4 doc").
//!
//! Guards: nothing is ever written to metadata. Data is written only into blocks that the file
//! owns, that are nobody else's as far as can be told, and that hold written data, so the
//! filesystem stays clean without our knowing its journal; where that is impossible (a hole, an
//! unwritten extent, a journal to recover, a feature we do not know) opening is refused with what
//! to do. Checksums are verified where the filesystem has them.

mod dir;
mod inode;
mod map;
mod own;
mod superblock;

pub use inode::Inode;
pub use map::Mapper;
pub use superblock::Superblock;

use crate::bytes::Mark;
use crate::meta::{MetaFault, ReadBlocks, refused};
use crate::{Access, StoreFault};

/// Components of one path (ours).
const DEPTH_MAX: usize = 32;

/// A file that may be opened; its blocks are in the [`Mapper`] that was given.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Found {
    pub inode: u32,
    pub size_bytes: u64,
    /// Of the filesystem, the inode and its generation.
    pub mark: Mark,
}

/// Whether there is an ext filesystem at all.
pub fn is_ext4(volume: &dyn ReadBlocks) -> Result<bool, MetaFault> {
    superblock::has_magic(volume)
}

/// Finds `path` (`/`-separated, no leading slash) and collects its extents into `mapper`, which
/// keeps what it has between two calls of the same opening.
pub fn open(
    volume: &dyn ReadBlocks,
    path: &str,
    access: Access,
    mapper: &mut Mapper,
) -> Result<Found, MetaFault> {
    let fs = Superblock::read(volume)?;
    if access == Access::ReadWrite {
        fs.prove_writable()?;
    }
    let mut inode = Inode::read(volume, &fs, superblock::ROOT_INODE)?;
    if path.split('/').count() > DEPTH_MAX {
        return Err(StoreFault::BadPath.into());
    }
    for name in path.split('/') {
        if name.is_empty() || name == "." || name == ".." || name.len() > 255 {
            return Err(StoreFault::BadPath.into());
        }
        let number = dir::find(volume, &fs, &inode, name)?;
        inode = Inode::read(volume, &fs, number)?;
    }
    inode.prove_file(access)?;
    mapper.collect(volume, &fs, &inode)?;
    if access == Access::ReadWrite && mapper.has_gaps(inode.size_bytes) {
        return refused(
            "the file has holes or unwritten extents, which cannot be written in place: replace \
             it by a full copy, `cp --sparse=never FILE COPY` (fallocate alone is not enough)",
        );
    }
    if access == Access::ReadWrite {
        own::prove(volume, &fs, mapper)?;
    }
    let number = inode.number.to_le_bytes();
    let mark = Mark::NONE.with(&fs.uuid).with(&number).with(&inode.generation);
    Ok(Found { inode: inode.number, size_bytes: inode.size_bytes, mark })
}

#[cfg(test)]
mod tests;
