//! Tables made by sgdisk and sfdisk (`vectors/make-partitions.sh`), whole and damaged.

use alloc::string::ToString;

use super::*;
use crate::StoreFault;
use crate::vectors::expand;

const BYTES: usize = 64 << 20;

fn gpt_disk() -> Vec<u8> {
    expand(include_bytes!("../../vectors/gpt.sparse"), BYTES)
}

fn mbr_disk() -> Vec<u8> {
    expand(include_bytes!("../../vectors/mbr.sparse"), BYTES)
}

fn read(disk: &[u8]) -> Result<Table, MetaFault> {
    read_table(&disk, 512)
}

#[test]
fn sgdisk_partitions_are_found_by_number_name_and_guid() {
    let table = read(&gpt_disk()).unwrap();
    assert_eq!(table.scheme, Scheme::Gpt);
    let at = |word: &str| table.find(word).0.map(|part| (part.number, part.sector, part.sectors));
    assert_eq!(at("p1"), Some((1, 2048, 2048)));
    assert_eq!(at("p2"), Some((2, 8192, 32768)));
    assert_eq!(at("images"), Some((2, 8192, 32768)));
    assert_eq!(at("Grüße"), Some((7, 65536, 131038 - 65536 + 1)));
    assert_eq!(at("DEADBEEF-0123-4567-89AB-CDEF01234567"), Some((2, 8192, 32768)));
    assert_eq!(at("deadbeef-0123-4567-89ab-cdef01234567"), Some((2, 8192, 32768)));
    for word in ["p3", "p02", "p", "image", "00000000-0000-0000-0000-000000000000", ""] {
        assert_eq!(at(word), None, "{word}");
    }
}

#[test]
fn the_backup_serves_when_the_first_copy_is_broken_anywhere() {
    // In the header, in its reserved rest covered by no CRC, in the entries.
    for (at, scheme) in [(512 + 40, Scheme::GptBackup), (1024, Scheme::GptBackup)] {
        let mut disk = gpt_disk();
        disk[at] ^= 1;
        let table = read(&disk).unwrap();
        assert_eq!(table.scheme, scheme);
        assert_eq!(table.partitions.len(), 3);
    }
}

#[test]
fn a_header_of_another_place_is_not_used() {
    let mut disk = gpt_disk();
    // The backup's header, right by its CRC, where the first one belongs.
    disk.copy_within(BYTES - 512.., 512);
    assert_eq!(read(&disk).unwrap().scheme, Scheme::GptBackup);
}

#[test]
fn beside_the_protective_entry_an_mbr_may_have_others() {
    // A hybrid MBR: its other entries repeat what the GPT says, for other systems.
    let mut disk = gpt_disk();
    let entries = &mut disk[446..510];
    entries.copy_within(..16, 16);
    (entries[4], entries[8]) = (0x83, 200);
    let table = read(&disk).unwrap();
    assert_eq!((table.scheme, table.partitions.len()), (Scheme::Gpt, 3));
}

#[test]
fn entries_may_be_larger_than_128_bytes() {
    use crate::bytes::crc32;
    for entry_bytes in [256usize, 512, 1024, 192, 64] {
        let mut disk = gpt_disk();
        let old = disk[1024..1024 + 8 * 128].to_vec();
        let array = &mut disk[1024..1024 + 8 * entry_bytes];
        array.fill(0);
        for (new, old) in array.chunks_exact_mut(entry_bytes).zip(old.chunks_exact(128)) {
            let len = old.len().min(new.len());
            new[..len].copy_from_slice(&old[..len]);
        }
        let sum = crc32(array);
        let header = &mut disk[512..1024];
        header[80..84].copy_from_slice(&8u32.to_le_bytes());
        header[84..88].copy_from_slice(&(entry_bytes as u32).to_le_bytes());
        header[88..92].copy_from_slice(&sum.to_le_bytes());
        header[16..20].fill(0);
        let sum = crc32(&header[..92]);
        header[16..20].copy_from_slice(&sum.to_le_bytes());
        let table = read(&disk).unwrap();
        // 192 is no power of two, 64 too little: that copy is not used.
        let right = entry_bytes >= 256;
        assert_eq!(table.scheme, if right { Scheme::Gpt } else { Scheme::GptBackup });
        assert_eq!(table.find("images").0.map(|part| part.sector), Some(8192));
    }
}

#[test]
fn two_broken_copies_are_refused_and_not_taken_for_an_empty_disk() {
    let mut disk = gpt_disk();
    disk[512] ^= 1;
    let last = BYTES - 512;
    disk[last] ^= 1;
    assert!(matches!(read(&disk), Err(MetaFault::Refused(StoreFault::Refused(_)))));
}

#[test]
fn sfdisk_primaries_and_logicals_have_linux_numbers() {
    let table = read(&mbr_disk()).unwrap();
    assert_eq!(table.scheme, Scheme::Mbr);
    let all: Vec<_> = table.partitions.iter().map(|p| (p.number, p.sector, p.sectors)).collect();
    let expected =
        [(1, 2048, 2048), (3, 32768, 4096), (5, 5120, 1024), (6, 8192, 2048), (7, 12288, 8192)];
    assert_eq!(all, expected);
}

#[test]
fn a_chain_that_points_at_itself_ends() {
    let mut disk = mbr_disk();
    // The second entry of the first extended record: next record at the container's start.
    let record = 4096 * 512;
    disk[record + 446 + 16 + 8..][..4].fill(0);
    assert!(read(&disk).is_err());
}

#[test]
fn a_partition_beyond_the_end_is_refused() {
    let mut disk = mbr_disk();
    disk.truncate(33000 * 512);
    assert!(read(&disk).is_err());
}

#[test]
fn a_partition_over_another_one_or_the_table_is_known() {
    let table = read(&gpt_disk()).unwrap();
    assert!(!table.partitions.iter().any(|part| table.trespasses(part)));
    let mut part = table.partitions[1].clone();
    // p2 is 8192 to 40960, p1 ends at 4096, p7 begins at 65536; 34 and 131038 are the usable ends.
    let blocks = (BYTES / 512) as u64;
    for (sector, sectors, taken) in [
        (4096, 61_440, false),
        (4095, 2, true),
        (65_535, 2, true),
        (34, 2014, false),
        (33, 10, true),
        (1, 1, true),
        (2, 1, true),
        (blocks - 33, 1, true),
        (blocks - 1, 1, true),
    ] {
        (part.sector, part.sectors) = (sector, sectors);
        assert_eq!(table.trespasses(&part), taken, "{sector}");
    }
    let table = read(&mbr_disk()).unwrap();
    assert!(!table.partitions.iter().any(|part| table.trespasses(part)));
    // p5 is the first logical one; its boot record, the container's first sector, is at 4096.
    let mut part = table.partitions[2].clone();
    for (sector, taken) in [(4097, false), (4096, true), (0, true), (32_768, true)] {
        (part.sector, part.sectors) = (sector, 1);
        assert_eq!(table.trespasses(&part), taken, "{sector}");
    }
}

#[test]
fn a_disk_without_a_table_has_none() {
    let disk = alloc::vec![0u8; 1 << 20];
    assert_eq!(read(&disk).unwrap().scheme, Scheme::None);
    let tiny = [0u8; 100];
    assert!(read(&tiny).is_err());
}

#[test]
fn sgdisk_partitions_of_a_disk_with_blocks_of_4096_bytes() {
    let mut disk = expand(include_bytes!("../../vectors/gpt-4kn.sparse"), BYTES);
    let find = |disk: &[u8]| {
        let table = read_table(&disk, 4096).unwrap();
        let part = table.find("images").0.map(|part| (part.number, part.sector, part.sectors));
        (table.scheme, part)
    };
    assert_eq!(find(&disk), (Scheme::Gpt, Some((2, 8192, 65536))));
    disk[4096 + 40] ^= 1;
    assert_eq!(find(&disk), (Scheme::GptBackup, Some((2, 8192, 65536))));
    // Read as if it had small blocks, neither copy is where it should be.
    assert!(read(&disk).is_err());
}

#[test]
fn blocks_of_4096_scale_the_numbers() {
    let mut disk = alloc::vec![0u8; 8 << 20];
    disk[510..512].copy_from_slice(&[0x55, 0xAA]);
    disk[446 + 4] = 0x83;
    disk[446 + 8] = 16;
    disk[446 + 12] = 32;
    let table = read_table(&disk.as_slice(), 4096).unwrap();
    assert_eq!((table.partitions[0].sector, table.partitions[0].sectors), (128, 256));
    assert_eq!(table.partitions[0].name, "".to_string());
}

#[test]
fn one_byte_changed_never_panics() {
    let mut disk = gpt_disk();
    for at in (440..1024).chain(1024..1024 + 256) {
        disk[at] ^= 0x81;
        let _ = read(&disk);
        disk[at] ^= 0x81;
    }
}
