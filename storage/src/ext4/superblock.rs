//! The superblock and the group descriptors (ext4 doc, "Super Block", "Block Group
//! Descriptors").

use alloc::vec::Vec;

use crate::StoreFault;
use crate::bytes::{array_at, crc32c_raw, u16_at, u32_at};
use crate::meta::{MetaFault, ReadBlocks, read_vec, refused};

/// Where the superblock is and how long.
const AT: u64 = 1024;
const BYTES: usize = 1024;
const MAGIC: u16 = 0xEF53;
/// Inode of the root directory.
pub const ROOT_INODE: u32 = 2;

/// `s_feature_incompat`.
mod incompat {
    pub const RECOVER: u32 = 0x4;
    pub const META_BG: u32 = 0x10;
    pub const EXTENTS: u32 = 0x40;
    pub const BIT64: u32 = 0x80;
    pub const MMP: u32 = 0x100;
    pub const CSUM_SEED: u32 = 0x2000;
    /// FILETYPE, META_BG, EXTENTS, 64BIT, FLEX_BG, EA_INODE, CSUM_SEED, LARGEDIR, INLINE_DATA,
    /// ENCRYPT, CASEFOLD: the last three are refused on the inode that uses them.
    pub const KNOWN: u32 =
        0x2 | META_BG | EXTENTS | BIT64 | 0x200 | 0x400 | CSUM_SEED | 0x4000 | 0x8000 | 0x3_0000;
}

/// `s_feature_ro_compat`.
mod ro_compat {
    pub const SPARSE_SUPER: u32 = 0x1;
    pub const GDT_CSUM: u32 = 0x10;
    pub const METADATA_CSUM: u32 = 0x400;
    /// What does not concern writing data into allocated blocks: sparse superblocks, sizes,
    /// htree, checksums, quota, bigalloc, project, verity (refused per inode), orphans.
    /// Not among them: SHARED_BLOCKS (0x4000), READONLY (0x1000), SNAPSHOT, REPLICA.
    pub const KNOWN: u32 = 0x7F | 0x100 | 0x200 | METADATA_CSUM | 0x2000 | 0x8000 | 0x1_0000;
}

/// `s_feature_compat`.
mod compat {
    pub const HAS_JOURNAL: u32 = 0x4;
    pub const RESIZE_INODE: u32 = 0x10;
    pub const SPARSE_SUPER2: u32 = 0x200;
}

/// `s_state`: cleanly unmounted; errors seen.
const STATE_VALID: u16 = 1;
const STATE_ERRORS: u16 = 2;

/// A proved superblock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Superblock {
    pub block_bytes: u64,
    pub blocks: u64,
    /// True when directory entries and inodes carry CRC-32C sums.
    pub checksums: bool,
    /// What the sums begin with.
    pub seed: u32,
    pub inode_bytes: u16,
    inodes: u32,
    inodes_per_group: u32,
    blocks_per_group: u32,
    first_data_block: u32,
    desc_bytes: u64,
    first_meta_bg: u32,
    incompat: u32,
    ro_compat: u32,
    compat: u32,
    state: u16,
    reserved_gdt_blocks: u16,
    pub uuid: [u8; 16],
    /// The journal's inode, where there is one.
    pub journal: Option<u32>,
}

/// Whether the magic is there.
pub fn has_magic(volume: &dyn ReadBlocks) -> Result<bool, MetaFault> {
    if volume.len_bytes() < AT + BYTES as u64 {
        return Ok(false);
    }
    let bytes = read_vec(volume, AT, BYTES)?;
    Ok(u16_at(&bytes, 0x38) == Some(MAGIC))
}

impl Superblock {
    /// Reads and proves it.
    pub fn read(volume: &dyn ReadBlocks) -> Result<Superblock, MetaFault> {
        let bytes = read_vec(volume, AT, BYTES)?;
        let fs = Superblock::parse(&bytes)?;
        if fs.blocks.checked_mul(fs.block_bytes).is_none_or(|end| end > volume.len_bytes()) {
            return refused("the ext4 filesystem is larger than the volume that it lies on");
        }
        Ok(fs)
    }

    /// Proves the 1024 bytes of a superblock.
    pub fn parse(bytes: &[u8]) -> Result<Superblock, StoreFault> {
        const SHORT: StoreFault = StoreFault::BeyondEnd;
        let word = |at| u32_at(bytes, at).ok_or(SHORT);
        if u16_at(bytes, 0x38) != Some(MAGIC) {
            return Err(StoreFault::Refused("there is no ext4 filesystem"));
        }
        let (compat, incompat, ro_compat) = (word(0x5C)?, word(0x60)?, word(0x64)?);
        prove_features(compat, incompat)?;
        let checksums = ro_compat & ro_compat::METADATA_CSUM != 0;
        let covered = bytes.get(..0x3FC).ok_or(SHORT)?;
        if checksums && crc32c_raw(!0, covered) != word(0x3FC)? {
            return Err(StoreFault::Refused("the ext4 superblock has a wrong checksum"));
        }
        let uuid: [u8; 16] = array_at(bytes, 0x68).ok_or(SHORT)?;
        let seeded = incompat & incompat::CSUM_SEED != 0;
        let seed = if seeded { word(0x270)? } else { crc32c_raw(!0, &uuid) };
        let wide = incompat & incompat::BIT64 != 0;
        let blocks_high = if wide { word(0x150)? } else { 0 };
        let desc_bytes = if wide { u16_at(bytes, 0xFE).ok_or(SHORT)? } else { 32 };
        let log_block = word(0x18)?;
        let old = word(0x4C)? == 0;
        let inode_bytes = if old { 128 } else { u16_at(bytes, 0x58).ok_or(SHORT)? };
        let fs = Superblock {
            block_bytes: 1024u64.checked_shl(log_block).unwrap_or(0),
            blocks: u64::from(blocks_high) << 32 | u64::from(word(0x4)?),
            checksums,
            seed,
            inode_bytes,
            inodes: word(0)?,
            inodes_per_group: word(0x28)?,
            blocks_per_group: word(0x20)?,
            first_data_block: word(0x14)?,
            desc_bytes: u64::from(desc_bytes),
            first_meta_bg: word(0x104)?,
            incompat,
            ro_compat,
            compat,
            state: u16_at(bytes, 0x3A).ok_or(SHORT)?,
            reserved_gdt_blocks: u16_at(bytes, 0xCE).ok_or(SHORT)?,
            uuid,
            journal: (compat & compat::HAS_JOURNAL != 0).then_some(word(0xE0)?),
        };
        fs.prove_sizes(log_block)?;
        Ok(fs)
    }

    fn prove_sizes(&self, log_block: u32) -> Result<(), StoreFault> {
        // Blocks of 1 KiB to 64 KiB; an inode and a descriptor divide a block.
        let fits = |bytes: u64, least: u64| {
            bytes >= least && bytes.is_power_of_two() && bytes <= self.block_bytes
        };
        let sane = log_block <= 6
            && fits(u64::from(self.inode_bytes), 128)
            && fits(self.desc_bytes, 32)
            && self.inodes_per_group > 0
            && self.blocks_per_group > 0
            && self.blocks < 1 << 48;
        if sane { Ok(()) } else { Err(StoreFault::Refused("the ext4 superblock has wrong sizes")) }
    }

    /// Whether data may be written in place.
    pub fn prove_writable(&self) -> Result<(), StoreFault> {
        if self.state & STATE_ERRORS != 0 {
            return Err(StoreFault::Refused("the ext4 filesystem has errors: run e2fsck"));
        }
        // A filesystem without a journal that is mounted has this bit clear, too.
        if self.state & STATE_VALID == 0 {
            return Err(StoreFault::Refused(
                "the ext4 filesystem is mounted elsewhere or was not unmounted: run e2fsck",
            ));
        }
        if self.ro_compat & !ro_compat::KNOWN != 0 {
            return Err(StoreFault::Refused(
                "the ext4 filesystem has a feature that forbids writing in place",
            ));
        }
        Ok(())
    }

    /// The byte of inode `number`'s record.
    pub fn inode_at(&self, volume: &dyn ReadBlocks, number: u32) -> Result<u64, MetaFault> {
        if number == 0 || number > self.inodes {
            return refused("the ext4 filesystem names an inode that does not exist");
        }
        let (group, index) =
            ((number - 1) / self.inodes_per_group, (number - 1) % self.inodes_per_group);
        let table = self.inode_table(volume, group)?;
        let at = u64::from(index) * u64::from(self.inode_bytes);
        let end = at / self.block_bytes;
        self.prove_block(table.saturating_add(end))?;
        Ok(table * self.block_bytes + at)
    }

    /// That a block number lies inside the filesystem.
    pub fn prove_block(&self, block: u64) -> Result<(), MetaFault> {
        if block == 0 || block >= self.blocks {
            return refused("the ext4 filesystem names a block beyond its end");
        }
        Ok(())
    }

    /// A group's descriptor, and the block that it stands in.
    fn descriptor(&self, volume: &dyn ReadBlocks, group: u32) -> Result<(u64, Vec<u8>), MetaFault> {
        let per_block = self.block_bytes / self.desc_bytes;
        let (index, within) = (u64::from(group) / per_block, u64::from(group) % per_block);
        let block = self.desc_block(index, per_block);
        self.prove_block(block)?;
        let at = block * self.block_bytes + within * self.desc_bytes;
        let desc = read_vec(volume, at, self.desc_bytes as usize)?;
        self.prove_desc(group, &desc)?;
        Ok((block, desc))
    }

    /// The block where the inode table of a group begins.
    fn inode_table(&self, volume: &dyn ReadBlocks, group: u32) -> Result<u64, MetaFault> {
        let (_, desc) = self.descriptor(volume, group)?;
        let word = |at| u32_at(&desc, at).map(u64::from).unwrap_or(0);
        let high = if self.desc_bytes >= 64 { word(0x28) } else { 0 };
        let table = high << 32 | word(0x8);
        self.prove_block(table)?;
        Ok(table)
    }

    /// Groups of blocks.
    pub fn groups(&self) -> u64 {
        let blocks = self.blocks.saturating_sub(u64::from(self.first_data_block));
        blocks.div_ceil(u64::from(self.blocks_per_group))
    }

    /// Runs of blocks that a group's descriptor and place make the filesystem's own: first block
    /// and count. Those of a group that has no copy of the superblock begin with a run of none.
    pub fn own_blocks(
        &self,
        volume: &dyn ReadBlocks,
        group: u32,
    ) -> Result<[(u64, u64); 5], MetaFault> {
        let (index, desc) = self.descriptor(volume, group)?;
        let word = |at| u32_at(&desc, at).map(u64::from).unwrap_or(0);
        let wide = self.desc_bytes >= 64;
        let block = |low: usize, high| word(low) | if wide { word(high) << 32 } else { 0 };
        let table_bytes = u64::from(self.inodes_per_group) * u64::from(self.inode_bytes);
        let start = u64::from(self.first_data_block)
            .saturating_add(u64::from(group).saturating_mul(u64::from(self.blocks_per_group)));
        Ok([
            (start, self.copies_in(u64::from(group))),
            (index, 1),
            (block(0x0, 0x20), 1),
            (block(0x4, 0x24), 1),
            (block(0x8, 0x28), table_bytes.div_ceil(self.block_bytes)),
        ])
    }

    /// Blocks at a group's beginning that hold copies: the superblock, and, where they are not
    /// spread, all descriptors with the room that they may grow into.
    fn copies_in(&self, group: u64) -> u64 {
        // With two copies only, their groups are named in the superblock: not looked for.
        let sparser = self.compat & compat::SPARSE_SUPER2 != 0;
        if !self.has_super(group) || sparser && group > 0 {
            return 0;
        }
        if self.incompat & incompat::META_BG != 0 {
            return 1;
        }
        let grows = self.compat & compat::RESIZE_INODE != 0;
        let reserved = if grows { u64::from(self.reserved_gdt_blocks) } else { 0 };
        1 + self.groups().div_ceil(self.block_bytes / self.desc_bytes) + reserved
    }

    /// The block that holds descriptor block `index`: all after the superblock, or with META_BG
    /// each in the first group it describes.
    fn desc_block(&self, index: u64, per_block: u64) -> u64 {
        let first = u64::from(self.first_data_block);
        // With bigalloc the first data block is 0 even where the superblock is in block 1.
        let super_block = AT / self.block_bytes;
        let spread = self.incompat & incompat::META_BG != 0;
        if !spread || index < u64::from(self.first_meta_bg) {
            return super_block + 1 + index;
        }
        let group = index * per_block;
        let start = first.saturating_add(group.saturating_mul(u64::from(self.blocks_per_group)));
        let late = u64::from(index == 0 && super_block > first);
        start.saturating_add(u64::from(self.has_super(group)) + late)
    }

    /// Whether a group holds a copy of the superblock.
    fn has_super(&self, group: u64) -> bool {
        let power_of = |base: u64| {
            let mut power = base;
            while power < group {
                power = power.saturating_mul(base);
            }
            power == group
        };
        let sparse = self.ro_compat & ro_compat::SPARSE_SUPER != 0;
        !sparse || group <= 1 || power_of(3) || power_of(5) || power_of(7)
    }

    fn prove_desc(&self, group: u32, desc: &[u8]) -> Result<(), MetaFault> {
        let mut copy = desc.to_vec();
        let Some(field) = copy.get_mut(0x1E..0x20) else { return refused("short descriptor") };
        field.fill(0);
        let stored = u16_at(desc, 0x1E);
        let number = group.to_le_bytes();
        let sum = if self.checksums {
            Some(crc32c_raw(crc32c_raw(self.seed, &number), &copy) as u16)
        } else if self.ro_compat & ro_compat::GDT_CSUM != 0 {
            // The sum leaves its own field out instead of zeroing it.
            let crc = crc16(crc16(!0, &self.uuid), &number);
            let crc = crc16(crc, desc.get(..0x1E).unwrap_or(&[]));
            Some(crc16(crc, desc.get(0x20..).unwrap_or(&[])))
        } else {
            stored
        };
        if sum == stored { Ok(()) } else { refused("an ext4 group descriptor's checksum is wrong") }
    }
}

fn prove_features(compat: u32, incompat: u32) -> Result<(), StoreFault> {
    let why = if incompat & incompat::RECOVER != 0 {
        "the ext4 journal needs recovery: unmount the filesystem, or mount and unmount it once"
    } else if incompat & incompat::MMP != 0 {
        "the ext4 filesystem has multiple mount protection: `tune2fs -O ^mmp`"
    } else if incompat & !incompat::KNOWN != 0 {
        "the ext4 filesystem has an incompatible feature that is not known"
    } else if incompat & incompat::META_BG != 0 && compat & compat::SPARSE_SUPER2 != 0 {
        "the ext4 filesystem has both meta_bg and sparse_super2"
    } else {
        return Ok(());
    };
    Err(StoreFault::Refused(why))
}

/// CRC-16 with polynomial 0x8005 reflected (Linux `lib/crc16.c`).
fn crc16(mut crc: u16, bytes: &[u8]) -> u16 {
    for &byte in bytes {
        crc ^= u16::from(byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0xA001 } else { crc >> 1 };
        }
    }
    crc
}
