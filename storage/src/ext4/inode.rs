//! Inodes (ext4 doc, "Index Nodes").

use super::superblock::Superblock;
use crate::bytes::{array_at, crc32c_raw, u16_at, u32_at};
use crate::meta::{MetaFault, ReadBlocks, read_vec, refused};
use crate::{Access, StoreFault};

/// `i_mode`'s file type and its values.
const TYPE_MASK: u16 = 0xF000;
const TYPE_DIR: u16 = 0x4000;
const TYPE_FILE: u16 = 0x8000;
const TYPE_LINK: u16 = 0xA000;

/// `i_flags`.
mod flags {
    pub const COMPRESSED: u32 = 0x4;
    pub const IMMUTABLE: u32 = 0x10;
    pub const APPEND: u32 = 0x20;
    pub const ENCRYPTED: u32 = 0x800;
    pub const INDEXED: u32 = 0x1000;
    pub const EXTENTS: u32 = 0x8_0000;
    pub const VERITY: u32 = 0x10_0000;
    pub const INLINE: u32 = 0x1000_0000;
    pub const CASEFOLD: u32 = 0x4000_0000;
}

/// A proved inode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Inode {
    pub number: u32,
    pub size_bytes: u64,
    /// `i_block`: an extent header with up to four entries, or 15 block numbers.
    pub block: [u8; 60],
    /// What the sums of its directory and extent blocks begin with.
    pub seed: u32,
    /// Another one for each file that the inode becomes.
    pub generation: [u8; 4],
    mode: u16,
    flags: u32,
}

impl Inode {
    /// Reads and proves inode `number`.
    pub fn read(volume: &dyn ReadBlocks, fs: &Superblock, number: u32) -> Result<Inode, MetaFault> {
        let at = fs.inode_at(volume, number)?;
        let bytes = read_vec(volume, at, usize::from(fs.inode_bytes))?;
        match Inode::parse(&bytes, fs, number) {
            Some(inode) => Ok(inode),
            None => refused("an ext4 inode's checksum is wrong"),
        }
    }

    /// Proves a record; `None` when its sum is wrong.
    pub fn parse(bytes: &[u8], fs: &Superblock, number: u32) -> Option<Inode> {
        let generation: [u8; 4] = array_at(bytes, 0x64)?;
        let seed = crc32c_raw(crc32c_raw(fs.seed, &number.to_le_bytes()), &generation);
        if fs.checksums {
            prove_sum(bytes, seed)?;
        }
        Some(Inode {
            number,
            size_bytes: u64::from(u32_at(bytes, 0x6C)?) << 32 | u64::from(u32_at(bytes, 4)?),
            block: array_at(bytes, 0x28)?,
            seed,
            generation,
            mode: u16_at(bytes, 0)?,
            flags: u32_at(bytes, 0x20)?,
        })
    }

    fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    pub fn has_extents(&self) -> bool {
        self.has(flags::EXTENTS)
    }

    pub fn is_indexed(&self) -> bool {
        self.has(flags::INDEXED)
    }

    /// That a name can be looked up in it.
    pub fn prove_dir(&self) -> Result<(), MetaFault> {
        match self.mode & TYPE_MASK {
            TYPE_DIR => {}
            TYPE_LINK => return refused("a symbolic link on ext4 is not followed: name the file"),
            _ => return Err(StoreFault::NotFound.into()),
        }
        if self.has(flags::INLINE | flags::ENCRYPTED | flags::CASEFOLD) {
            return refused("an ext4 directory with inline data, encryption or case folding");
        }
        Ok(())
    }

    /// That it is a file whose data can be served.
    pub fn prove_file(&self, access: Access) -> Result<(), MetaFault> {
        match self.mode & TYPE_MASK {
            TYPE_FILE => {}
            TYPE_LINK => return refused("a symbolic link on ext4 is not followed: name the file"),
            _ => return Err(StoreFault::NotAFile.into()),
        }
        if self.has(flags::INLINE | flags::ENCRYPTED | flags::COMPRESSED) {
            return refused("an ext4 file with inline data, encryption or compression");
        }
        let fixed = flags::IMMUTABLE | flags::APPEND | flags::VERITY;
        if access == Access::ReadWrite && self.has(fixed) {
            return refused("the ext4 file is immutable, append-only or under verity");
        }
        Ok(())
    }
}

/// The CRC-32C over the whole record with its two halves of the sum zeroed.
fn prove_sum(bytes: &[u8], seed: u32) -> Option<()> {
    let mut copy = bytes.to_vec();
    copy.get_mut(0x7C..0x7E)?.fill(0);
    let mut stored = u32::from(u16_at(bytes, 0x7C)?);
    // `i_checksum_hi` exists when `i_extra_isize` covers it.
    let wide = bytes.len() > 128 && u16_at(bytes, 0x80)? >= 4;
    let mut mask = 0xFFFF;
    if wide {
        copy.get_mut(0x82..0x84)?.fill(0);
        stored |= u32::from(u16_at(bytes, 0x82)?) << 16;
        mask = u32::MAX;
    }
    (crc32c_raw(seed, &copy) & mask == stored).then_some(())
}
