//! The MBR's four entries (UEFI 2.10, table 5.1) and the chain of extended boot records.
//!
//! Guards: the chain is bounded in length, so one that points at itself ends.

use alloc::vec::Vec;

use super::{Partition, proved};
use crate::bytes::{u16_at, u32_at};
use crate::meta::{MetaFault, ReadBlocks, read_vec, refused};

/// Type of the entry that protects a GPT (UEFI 2.10, 5.2.3).
pub const KIND_PROTECTIVE: u8 = 0xEE;
/// Types of an extended partition: CHS, LBA and Linux's own.
const KINDS_EXTENDED: [u8; 3] = [0x05, 0x0F, 0x85];
/// Logical partitions of one disk (ours).
const LOGICALS_MAX: u32 = 128;
/// Where the entries begin, and the length of one.
const ENTRIES_AT: usize = 446;
const ENTRY_BYTES: usize = 16;
/// Where the disk's own number stands (UEFI 2.10, table 5.1: UniqueMBRDiskSignature).
pub const SIGNATURE_AT: usize = 440;
/// Where the mark 55 AA stands.
const MARK_AT: usize = 510;

/// One entry, as it stands there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    pub kind: u8,
    /// In blocks; relative to something in an extended boot record.
    pub first: u32,
    pub count: u32,
}

impl Entry {
    fn is_used(self) -> bool {
        self.kind != 0 && self.count != 0
    }

    fn is_extended(self) -> bool {
        KINDS_EXTENDED.contains(&self.kind)
    }
}

/// The four entries of a boot record; `None` when this is not one. A filesystem's boot sector
/// carries the same signature, so the boot flags must be 0x00 or 0x80 and one entry be used.
pub fn parse(block: &[u8]) -> Option<[Entry; 4]> {
    if u16_at(block, MARK_AT)? != 0xAA55 {
        return None;
    }
    let mut entries = [Entry { kind: 0, first: 0, count: 0 }; 4];
    for (index, entry) in entries.iter_mut().enumerate() {
        let at = ENTRIES_AT + index * ENTRY_BYTES;
        if *block.get(at)? & 0x7F != 0 {
            return None;
        }
        *entry = Entry {
            kind: *block.get(at + 4)?,
            first: u32_at(block, at + 8)?,
            count: u32_at(block, at + 12)?,
        };
    }
    entries.iter().any(|entry| entry.is_used()).then_some(entries)
}

/// What is on a disk: its partitions, and the sectors of its boot records.
type Found = (Vec<Partition>, Vec<(u64, u64)>);

/// All partitions of a disk with these primary entries.
pub fn read(
    disk: &dyn ReadBlocks,
    block_bytes: u32,
    entries: &[Entry; 4],
) -> Result<Found, MetaFault> {
    let unit = u64::from(block_bytes / 512);
    let mut reserved = alloc::vec![(0, unit)];
    let mut partitions = Vec::new();
    let mut extended = None;
    for (number, entry) in (1..).zip(entries) {
        if !entry.is_used() {
            continue;
        }
        if entry.is_extended() {
            extended = extended.or(Some(*entry));
            continue;
        }
        let (first, count) = (u64::from(entry.first), u64::from(entry.count));
        let Some(partition) = proved(disk, block_bytes, number, first, count) else {
            return refused("an MBR partition reaches beyond the end of the disk");
        };
        partitions.push(partition);
    }
    if let Some(container) = extended {
        read_logicals(disk, block_bytes, container, (&mut partitions, &mut reserved))?;
    }
    Ok((partitions, reserved))
}

/// Follows the chain: each record holds one logical partition relative to itself, and the next
/// record relative to the container.
fn read_logicals(
    disk: &dyn ReadBlocks,
    block_bytes: u32,
    container: Entry,
    (partitions, reserved): (&mut Vec<Partition>, &mut Vec<(u64, u64)>),
) -> Result<(), MetaFault> {
    let unit = u64::from(block_bytes / 512);
    let base = u64::from(container.first);
    let mut record = base;
    for number in 5..5 + LOGICALS_MAX {
        // At most 2^33 blocks of at most 4096 bytes: cannot overflow.
        let at = record * u64::from(block_bytes);
        let block = read_vec(disk, at, block_bytes as usize)?;
        reserved.push((record * unit, unit));
        let Some(entries) = parse(&block) else {
            // An empty container holds a record without entries.
            return Ok(());
        };
        if let Some(entry) = entries.iter().find(|entry| entry.is_used() && !entry.is_extended()) {
            let first = record + u64::from(entry.first);
            let count = u64::from(entry.count);
            let Some(partition) = proved(disk, block_bytes, number, first, count) else {
                return refused("a logical partition reaches beyond the end of the disk");
            };
            partitions.push(partition);
        }
        match entries.iter().find(|entry| entry.is_used() && entry.is_extended()) {
            Some(next) => record = base + u64::from(next.first),
            None => return Ok(()),
        }
    }
    refused("the chain of logical partitions is longer than 128 or points at itself")
}
