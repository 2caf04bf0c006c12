//! Partitions of a disk: GPT (UEFI 2.10, section 5.3) and MBR with extended partitions.
//!
//! Guards: every partition it names lies inside the disk and starts after its own table's first
//! block. Must never: write a table, repair one, or take a disk for unpartitioned because its
//! GPT is broken.

mod gpt;
mod mbr;

use alloc::string::String;
use alloc::vec::Vec;

use crate::bytes::array_at;
use crate::meta::{MetaFault, ReadBlocks, read_vec};

/// Partitions of one disk (ours; GPT's usual table has 128 entries).
pub const PARTITIONS_MAX: usize = 256;

/// One partition.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Partition {
    /// As Linux numbers it: the index in the table from 1; logical ones of an MBR from 5.
    pub number: u32,
    /// First 512-byte sector of the disk.
    pub sector: u64,
    /// Length in 512-byte sectors, at least 1.
    pub sectors: u64,
    /// GPT's PartitionName; empty on MBR.
    pub name: String,
    /// GPT's UniquePartitionGUID as it stands on the disk (mixed endian); zero on MBR.
    pub guid: [u8; 16],
}

/// Which kind of table was found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scheme {
    None,
    Mbr,
    Gpt,
    /// The first GPT is broken; the backup at the end of the disk was used.
    GptBackup,
}

/// The partitions of a disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Table {
    pub scheme: Scheme,
    /// GPT's DiskGUID; an MBR's signature, then zeros; zero without a table.
    pub id: [u8; 16],
    pub partitions: Vec<Partition>,
    /// Where the tables themselves lie: first sector and sectors.
    pub reserved: Vec<(u64, u64)>,
}

impl Table {
    /// Whether a partition of this table shares a sector with another one, or with the table.
    pub fn trespasses(&self, partition: &Partition) -> bool {
        let hits = |(start, count): (u64, u64)| {
            let end = start.saturating_add(count);
            start < partition.sector + partition.sectors && partition.sector < end
        };
        let others = self.partitions.iter().filter(|other| other.number != partition.number);
        let mut taken =
            others.map(|other| (other.sector, other.sectors)).chain(self.reserved.iter().copied());
        taken.any(hits)
    }

    /// By `pN`, then GPT name, then GUID in its text form (hexadecimal, either case). `None`
    /// when there is none; the second value is true when a name fits several.
    pub fn find(&self, word: &str) -> (Option<&Partition>, bool) {
        if let Some(number) = partition_number(word) {
            return (self.partitions.iter().find(|part| part.number == number), false);
        }
        let mut named = self.partitions.iter().filter(|part| part.name == word);
        if let Some(first) = named.next() {
            return (Some(first), named.next().is_some());
        }
        let guid = parse_guid(word);
        let found = guid.and_then(|guid| self.partitions.iter().find(|part| part.guid == guid));
        (found, false)
    }
}

/// `p` and a decimal number without a leading zero.
fn partition_number(word: &str) -> Option<u32> {
    let digits = word.strip_prefix('p')?;
    let plain = digits.bytes().all(|byte| byte.is_ascii_digit()) && !digits.starts_with('0');
    if plain { digits.parse().ok() } else { None }
}

/// The on-disk bytes of a GUID's text form (UEFI 2.10, appendix A: the first three fields are
/// little-endian).
fn parse_guid(word: &str) -> Option<[u8; 16]> {
    const ORDER: [usize; 16] = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];
    const DASHES: [usize; 4] = [8, 13, 18, 23];
    let text = word.as_bytes();
    if text.len() != 36 || DASHES.iter().any(|&at| text[at] != b'-') {
        return None;
    }
    let mut digits = text.iter().enumerate().filter(|(at, _)| !DASHES.contains(at));
    let mut guid = [0; 16];
    for place in ORDER {
        let high = char::from(*digits.next()?.1).to_digit(16)?;
        let low = char::from(*digits.next()?.1).to_digit(16)?;
        guid[place] = (high << 4 | low) as u8;
    }
    (guid != [0; 16]).then_some(guid)
}

/// Reads the table of a disk with blocks of `block_bytes` (512 to 4096).
pub fn read_table(disk: &dyn ReadBlocks, block_bytes: u32) -> Result<Table, MetaFault> {
    let block = read_vec(disk, 0, block_bytes as usize)?;
    let Some(entries) = mbr::parse(&block) else {
        let (partitions, reserved) = (Vec::new(), Vec::new());
        return Ok(Table { scheme: Scheme::None, id: [0; 16], partitions, reserved });
    };
    if entries.iter().any(|entry| entry.kind == mbr::KIND_PROTECTIVE) {
        return gpt::read(disk, block_bytes);
    }
    let (partitions, reserved) = mbr::read(disk, block_bytes, &entries)?;
    let mut id = [0; 16];
    id[..4].copy_from_slice(&field::<4>(&block, mbr::SIGNATURE_AT)?);
    Ok(Table { scheme: Scheme::Mbr, id, partitions, reserved })
}

/// A partition of blocks `first..first + count` if that lies inside the disk.
fn proved(
    disk: &dyn ReadBlocks,
    block_bytes: u32,
    number: u32,
    first: u64,
    count: u64,
) -> Option<Partition> {
    let unit = u64::from(block_bytes / 512);
    let sector = first.checked_mul(unit)?;
    let sectors = count.checked_mul(unit)?;
    let end = sector.checked_add(sectors)?;
    let inside = first > 0 && count > 0 && end <= disk.len_bytes() / 512;
    inside.then(|| Partition { number, sector, sectors, name: String::new(), guid: [0; 16] })
}

/// A fixed field, for the parsers below.
fn field<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], MetaFault> {
    array_at(bytes, at).ok_or(MetaFault::Refused(crate::StoreFault::BeyondEnd))
}

#[cfg(test)]
mod tests;
