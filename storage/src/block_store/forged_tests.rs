//! LVM labels and texts that guests made up on their own disks, where every opening of a logical
//! volume looks: they cost nobody else anything. Misses: a heap that is nearly full.

use alloc::vec::Vec;

use super::tests::{Mem, World};
use super::*;
use crate::bytes::{crc32_raw, u64_at};
use crate::harness::Harness;
use crate::vectors::expand;

const AREA_BYTES: usize = 3 << 20;
const TEXT_BYTES: usize = 1 << 20;

fn honest() -> Vec<u8> {
    expand(include_bytes!("../../vectors/lvm-pv0.sparse"), 64 << 20)
}

fn sum(bytes: &[u8]) -> [u8; 4] {
    crc32_raw(0xF597_A6CF, bytes).to_le_bytes()
}

/// Gives the label in a sector another identity, if it is to have one, and its areas.
fn relabel(sector: &mut [u8], stranger: bool, areas: &[(u64, u64)]) {
    if stranger {
        sector[32..64].rotate_left(1);
    }
    // Behind the data area and its end.
    let list = 32 + 40 + 32;
    sector[list..list + 64 + 16].fill(0);
    for (place, (start, bytes)) in sector[list..].chunks_exact_mut(16).zip(areas) {
        place[..8].copy_from_slice(&start.to_le_bytes());
        place[8..].copy_from_slice(&bytes.to_le_bytes());
    }
    let crc = sum(&sector[20..512]);
    sector[16..20].copy_from_slice(&crc);
}

/// A physical volume that has four texts of a MiB each, which begin as the honest one does.
fn with_long_texts() -> Vec<u8> {
    let mut disk = honest();
    let text_at = 4096 + u64_at(&disk, 4096 + 40).unwrap() as usize;
    let head = disk[text_at..text_at + 512].to_vec();
    let header = disk[4096..4096 + 512].to_vec();
    let starts = [4, 8, 12, 16].map(|mib| mib << 20);
    for start in starts {
        let text = &mut disk[start + 512..start + 512 + TEXT_BYTES];
        text.fill(b' ');
        text[..512].copy_from_slice(&head);
        let crc = sum(text);
        let area = &mut disk[start..start + 512];
        area.copy_from_slice(&header);
        area[24..32].copy_from_slice(&(start as u64).to_le_bytes());
        area[32..40].copy_from_slice(&(AREA_BYTES as u64).to_le_bytes());
        area[40..48].copy_from_slice(&512u64.to_le_bytes());
        area[48..56].copy_from_slice(&(TEXT_BYTES as u64).to_le_bytes());
        area[56..60].copy_from_slice(&crc);
        let crc = sum(&area[4..]);
        area[..4].copy_from_slice(&crc);
    }
    let areas = starts.map(|start| (start as u64, AREA_BYTES as u64));
    relabel(&mut disk[512..1024], true, &areas);
    disk
}

/// A hundred logical partitions of an MBR, each with a label.
fn with_many_labels() -> Vec<u8> {
    const COUNT: usize = 100;
    const FIRST: u32 = 64;
    let mut label = honest()[512..1024].to_vec();
    relabel(&mut label, true, &[]);
    let mut disk = alloc::vec![0; 1 << 20];
    let mut entry = |table: u32, number: usize, kind: u8, first: u32, sectors: u32| {
        let table = &mut disk[table as usize * 512..][..512];
        table[510..].copy_from_slice(&[0x55, 0xAA]);
        let entry = &mut table[446 + number * 16..][..16];
        entry[4] = kind;
        entry[8..12].copy_from_slice(&first.to_le_bytes());
        entry[12..].copy_from_slice(&sectors.to_le_bytes());
    };
    entry(0, 0, 5, FIRST, COUNT as u32 * 16);
    for number in 0..COUNT as u32 {
        let table = FIRST + number * 16;
        entry(table, 0, 0x8E, 8, 8);
        if number + 1 < COUNT as u32 {
            entry(table, 1, 5, (number + 1) * 16, 16);
        }
    }
    for number in 0..COUNT {
        disk[(FIRST as usize + number * 16 + 9) * 512..][..512].copy_from_slice(&label);
    }
    disk
}

#[test]
fn long_texts_and_many_labels_of_strangers_deny_nobody_their_volumes() {
    let strangers = [&with_long_texts, &with_many_labels as &dyn Fn() -> Vec<u8>];
    for stranger in strangers {
        let mut disks = Vec::from([("xvda", Mem::new(honest(), 512))]);
        for name in ["xvdb", "xvdc", "xvdd"] {
            disks.push((name, Mem::new(stranger(), 512)));
        }
        let mut world = World::new(&disks);
        let file = world.open("xvda/vg0/images", Access::ReadWrite).unwrap().file;
        // Nor when the disk comes back and the volume is looked at.
        world.disks[0].returns.set(1);
        world.write_all(file, 0, &[3; 512]);
        assert_eq!(world.store.growth(0).strange, 0);
    }
}

#[test]
fn what_a_guest_writes_on_its_own_disk_is_no_physical_volume() {
    // A copy of the honest label on all of a disk, and on a partition.
    let whole = honest();
    let mut parted = alloc::vec![0; 64 << 20];
    parted[64 * 512..][..62 << 20].copy_from_slice(&whole[..62 << 20]);
    let sectors = (62u32 << 20) / 512;
    parted[446 + 4] = 0x8E;
    parted[446 + 8] = 64;
    parted[446 + 12..446 + 16].copy_from_slice(&sectors.to_le_bytes());
    parted[510..512].copy_from_slice(&[0x55, 0xAA]);
    for (path, copy) in [("xvdb", whole), ("xvdb/p1", parted)] {
        let disks = [("xvda", Mem::new(honest(), 512)), ("xvdb", Mem::new(copy, 512))];
        let mut world = World::new(&disks);
        let two = Err(StoreFault::Refused("two disks carry the same LVM physical volume"));
        assert_eq!(world.open("xvda/vg0/images", Access::ReadWrite), two);
        let guest = world.open(path, Access::ReadWrite).unwrap().file;
        let file = world.open("xvda/vg0/images", Access::ReadWrite).unwrap().file;
        world.disks[0].returns.set(1);
        world.write_all(file, 0, &[3; 512]);
        world.write_all(guest, 0, &[4; 512]);
        assert_eq!(world.disks[0].bytes.borrow()[1 << 20], 3);
    }
}
