//! The GUID partition table (UEFI 2.10, section 5.3): two copies, each with two CRCs.
//!
//! Guards: the first copy is used only when both its CRCs and its own address are right, else
//! the backup in the disk's last block; when neither is, the disk is refused.

use alloc::string::String;
use alloc::vec::Vec;

use super::{PARTITIONS_MAX, Partition, Scheme, Table, field, proved};
use crate::bytes::{crc32, u16_at, u32_at, u64_at};
use crate::meta::{MetaFault, ReadBlocks, read_vec, refused};

const SIGNATURE: &[u8; 8] = b"EFI PART";
/// Bytes of the header before its reserved rest (UEFI 2.10, table 5.5).
const HEADER_BYTES_MIN: usize = 92;
/// Least bytes of an entry; always 128 times a power of two (UEFI 2.10, table 5.5).
const ENTRY_BYTES_MIN: usize = 128;
/// Most bytes of the array that we read (ours): 1024 entries of the usual size.
const ARRAY_BYTES_MAX: usize = 128 * 1024;
/// UTF-16 units of PartitionName (UEFI 2.10, table 5.6).
const NAME_UNITS: usize = 36;

/// A header whose CRC and address are right.
struct Header {
    entries_lba: u64,
    entries: usize,
    entry_bytes: usize,
    array_crc: u32,
    /// The other copy's header.
    other_lba: u64,
    /// First and last block that partitions may use.
    usable: (u64, u64),
}

impl Header {
    /// Sectors of the tables and of what the header keeps free for them.
    fn reserved(&self, lba: u64, block_bytes: u32) -> Vec<(u64, u64)> {
        let array = (self.entries * self.entry_bytes).div_ceil(block_bytes as usize) as u64;
        let behind = self.usable.1.saturating_add(1);
        let blocks = [
            (0, self.usable.0.max(1)),
            (lba, 1),
            (self.entries_lba, array),
            (self.other_lba, 1),
            (behind, u64::MAX - behind),
        ];
        let unit = u64::from(block_bytes / 512);
        let sectors =
            |(at, count): (u64, u64)| (at.saturating_mul(unit), count.saturating_mul(unit));
        blocks.map(sectors).to_vec()
    }
}

/// Reads the table of a disk that has a protective MBR.
pub fn read(disk: &dyn ReadBlocks, block_bytes: u32) -> Result<Table, MetaFault> {
    if let Some(table) = read_copy(disk, block_bytes, 1)? {
        return Ok(table);
    }
    let blocks = disk.len_bytes() / u64::from(block_bytes);
    if let Some(last) = blocks.checked_sub(1)
        && let Some(table) = read_copy(disk, block_bytes, last)?
    {
        return Ok(Table { scheme: Scheme::GptBackup, ..table });
    }
    refused("both copies of the GUID partition table are broken")
}

/// The copy whose header is at `lba`; `None` when that copy is broken.
fn read_copy(
    disk: &dyn ReadBlocks,
    block_bytes: u32,
    lba: u64,
) -> Result<Option<Table>, MetaFault> {
    let at = lba.saturating_mul(u64::from(block_bytes));
    let block = match read_vec(disk, at, block_bytes as usize) {
        Ok(block) => block,
        Err(MetaFault::Miss(miss)) => return Err(MetaFault::Miss(miss)),
        Err(MetaFault::Refused(_)) => return Ok(None),
    };
    let Some(header) = parse_header(&block, lba) else { return Ok(None) };
    let array_at = header.entries_lba.saturating_mul(u64::from(block_bytes));
    let array = match read_vec(disk, array_at, header.entries * header.entry_bytes) {
        Ok(array) => array,
        Err(MetaFault::Miss(miss)) => return Err(MetaFault::Miss(miss)),
        Err(MetaFault::Refused(_)) => return Ok(None),
    };
    if crc32(&array) != header.array_crc {
        return Ok(None);
    }
    let mut partitions = Vec::new();
    for (number, entry) in (1..).zip(array.chunks_exact(header.entry_bytes)) {
        if field::<16>(entry, 0)? == [0; 16] {
            continue;
        }
        if partitions.len() == PARTITIONS_MAX {
            return refused("more than 256 partitions on one disk");
        }
        partitions.push(parse_entry(disk, block_bytes, number, entry)?);
    }
    let reserved = header.reserved(lba, block_bytes);
    Ok(Some(Table { scheme: Scheme::Gpt, id: field(&block, 56)?, partitions, reserved }))
}

fn parse_header(block: &[u8], lba: u64) -> Option<Header> {
    if block.get(..8)? != SIGNATURE {
        return None;
    }
    let header_bytes = u32_at(block, 12)? as usize;
    if header_bytes < HEADER_BYTES_MIN {
        return None;
    }
    let mut header = Vec::from(block.get(..header_bytes)?);
    let crc = u32_at(&header, 16)?;
    header.get_mut(16..20)?.fill(0);
    // Without the address check a stale copy of another disk's header would pass.
    if crc32(&header) != crc || u64_at(block, 24)? != lba {
        return None;
    }
    let entries = u32_at(block, 80)? as usize;
    let entry_bytes = u32_at(block, 84)? as usize;
    let sane = entry_bytes >= ENTRY_BYTES_MIN && entry_bytes.is_power_of_two();
    if !sane || entries.checked_mul(entry_bytes)? > ARRAY_BYTES_MAX {
        return None;
    }
    let (entries_lba, array_crc) = (u64_at(block, 72)?, u32_at(block, 88)?);
    let (other_lba, usable) = (u64_at(block, 32)?, (u64_at(block, 40)?, u64_at(block, 48)?));
    Some(Header { entries_lba, entries, entry_bytes, array_crc, other_lba, usable })
}

fn parse_entry(
    disk: &dyn ReadBlocks,
    block_bytes: u32,
    number: u32,
    entry: &[u8],
) -> Result<Partition, MetaFault> {
    let first = u64::from_le_bytes(field(entry, 32)?);
    let last = u64::from_le_bytes(field(entry, 40)?);
    let count = last.checked_sub(first).and_then(|blocks| blocks.checked_add(1));
    let partition = count.and_then(|count| proved(disk, block_bytes, number, first, count));
    let Some(mut partition) = partition else {
        return refused("a GPT partition reaches beyond the end of the disk");
    };
    partition.guid = field(entry, 16)?;
    partition.name = parse_name(entry);
    Ok(partition)
}

/// PartitionName: UTF-16LE up to a NUL; what is not UTF-16 becomes U+FFFD and matches nothing
/// that a person would write.
fn parse_name(entry: &[u8]) -> String {
    let units = (0..NAME_UNITS).map_while(|unit| u16_at(entry, 56 + unit * 2));
    char::decode_utf16(units.take_while(|&unit| unit != 0))
        .map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER))
        .collect()
}
