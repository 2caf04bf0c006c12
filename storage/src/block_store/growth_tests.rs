//! Tables and LVM texts that change under open files. Misses: what lvm2 and sfdisk do meanwhile
//! (the rig).

use super::tests::{Mem, World, pattern, retext};
use super::*;
use crate::harness::Harness;
use crate::vectors::expand;

const SECOND: u64 = 1_000_000_000;

impl World {
    /// Asks for the size, lets the look take place, and asks again.
    fn size_soon(&mut self, file: FileId) -> u64 {
        let mut size = 0;
        for _ in 0..2 {
            self.store.size(&mut self.hv, Tag(4), file).unwrap();
            let Ok(Answer::Size(bytes)) = self.done().result else { panic!("no size") };
            size = bytes;
            self.now_ns += SECOND;
            for _ in 0..100 {
                assert_eq!(self.poll(), None);
            }
        }
        size
    }

    /// Primary partition `number` becomes these sectors.
    pub(super) fn partition(&mut self, number: usize, first: u32, count: u32) {
        let mut bytes = self.disks[0].bytes.borrow_mut();
        bytes[510..512].copy_from_slice(&[0x55, 0xAA]);
        let entry = &mut bytes[446 + (number - 1) * 16..][..16];
        entry[4] = 0x83;
        entry[8..12].copy_from_slice(&first.to_le_bytes());
        entry[12..].copy_from_slice(&count.to_le_bytes());
    }

    fn refused(&self) -> u64 {
        self.store.growth(0).refused
    }
}

fn two_partitions() -> World {
    let mut world = World::one(Mem::new(alloc::vec![0; 4 << 20], 512));
    world.partition(1, 64, 1000);
    world.partition(2, 4000, 1000);
    world
}

#[test]
fn a_partition_that_grew_is_served_to_its_new_end() {
    let mut world = two_partitions();
    let file = world.open("xvda/p1", Access::ReadWrite).unwrap().file;
    assert_eq!(world.size_soon(file), 1000 * 512);
    world.partition(1, 64, 3000);
    assert_eq!(world.size_soon(file), 3000 * 512);
    let bytes = pattern(4096, 1);
    world.write_all(file, 3000 * 512 - 4096, &bytes);
    assert!(world.disks[0].bytes.borrow()[3064 * 512 - 4096..][..4096] == bytes);
    // With the disk itself.
    world.disks[0].bytes.borrow_mut().resize(8 << 20, 0);
    world.partition(2, 10_000, 10);
    world.partition(1, 64, 9000);
    assert_eq!(world.size_soon(file), 9000 * 512);
    let growth = world.store.growth(0);
    assert_eq!((growth.grown, growth.refused), (2, 0));
}

#[test]
fn a_partition_that_was_cut_moved_or_removed_stays_as_it_was() {
    for (first, count) in [(64, 500), (65, 2000), (0, 0)] {
        let mut world = two_partitions();
        let file = world.open("xvda/p1", Access::ReadWrite).unwrap().file;
        world.partition(1, first, count);
        for _ in 0..3 {
            assert_eq!(world.size_soon(file), 1000 * 512);
        }
        assert_eq!(world.refused(), 1, "counted once");
        world.write_all(file, 0, &[7; 512]);
        assert_eq!(world.disks[0].bytes.borrow()[64 * 512], 7);
        // It is right again, and then grows; and it is wrong again.
        world.partition(1, 64, 1000);
        assert_eq!(world.size_soon(file), 1000 * 512);
        world.partition(1, 64, 1001);
        assert_eq!(world.size_soon(file), 1001 * 512);
        world.partition(1, first, count);
        assert_eq!(world.size_soon(file), 1001 * 512);
        assert_eq!(world.refused(), 2);
    }
}

#[test]
fn a_partition_does_not_grow_over_another_image() {
    let mut world = two_partitions();
    let one = world.open("xvda/p1", Access::ReadWrite).unwrap().file;
    let two = world.open("xvda/p2", Access::ReadOnly).unwrap().file;
    world.partition(1, 64, 4000);
    world.partition(2, 5000, 100);
    assert_eq!(world.size_soon(one), 1000 * 512);
    assert_eq!(world.refused(), 1);
    world.store.close(&mut world.hv, two);
    assert_eq!(world.size_soon(one), 4000 * 512);
}

#[test]
fn a_look_that_ends_after_its_file_was_closed_changes_no_other_file() {
    let mut world = two_partitions();
    let one = world.open("xvda/p1", Access::ReadWrite).unwrap().file;
    world.store.size(&mut world.hv, Tag(4), one).unwrap();
    world.done();
    world.disks[0].allowed.set(0);
    world.now_ns += SECOND;
    world.poll();
    world.store.close(&mut world.hv, one);
    world.disks[0].allowed.set(usize::MAX);
    let two = world.open("xvda/p2", Access::ReadWrite).unwrap().file;
    assert_eq!(one, two, "the number is used again");
    assert_eq!(world.size_soon(two), 1000 * 512);
    assert_eq!(world.store.growth(0), Growth::default());
}

#[test]
fn files_take_turns_and_a_disk_that_fails_changes_nothing() {
    let mut world = two_partitions();
    let one = world.open("xvda/p1", Access::ReadWrite).unwrap().file;
    let two = world.open("xvda/p2", Access::ReadWrite).unwrap().file;
    world.partition(1, 64, 1001);
    world.partition(2, 4000, 1001);
    world.disks[0].fail.set(Some(StoreFault::Io(5)));
    for round in 0..4 {
        for file in [one, two] {
            world.store.size(&mut world.hv, Tag(4), file).unwrap();
            world.done();
        }
        world.now_ns += SECOND;
        for _ in 0..100 {
            assert_eq!(world.poll(), None);
        }
        // The first look met the fault.
        assert_eq!(world.store.growth(0).grown, [1, 2, 2, 2][round]);
    }
    assert_eq!(world.refused(), 0);
}

#[test]
fn a_logical_volume_grows_by_its_last_segment_and_never_moves() {
    let vectors = [
        include_bytes!("../../vectors/lvm-pv0.sparse").as_slice(),
        include_bytes!("../../vectors/lvm-pv1.sparse").as_slice(),
        include_bytes!("../../vectors/lvm-pv2.sparse").as_slice(),
    ];
    let disk = |index: usize| Mem::new(expand(vectors[index], 64 << 20), 512);
    let mut world = World::new(&[("xvda", disk(0)), ("xvdb", disk(1)), ("xvdc", disk(2))]);
    let file = world.open("xvda/vg0/striped", Access::ReadWrite).unwrap().file;
    let change = |world: &World, seqno: u8, from: &str, to: &str| {
        let mut bytes = world.disks[0].bytes.borrow_mut();
        let old = alloc::format!("seqno = {}", seqno - 1);
        retext(&mut bytes, &old, &alloc::format!("seqno = {seqno}"));
        retext(&mut bytes, from, to);
    };
    assert_eq!(world.size_soon(file), 12 << 20);
    change(&world, 7, "extent_count = 12", "extent_count = 15");
    assert_eq!(world.size_soon(file), 15 << 20);
    let bytes = pattern(96 << 10, 5);
    world.write_all(file, (15 << 20) - (96 << 10), &bytes);
    assert!(world.read_all(file, (15 << 20) - (96 << 10), 96 << 10) == bytes);
    assert_eq!(world.refused(), 0);
    // Another stripe size would move everything but the first chunk.
    change(&world, 8, "stripe_size = 32", "stripe_size = 64");
    assert_eq!(world.size_soon(file), 15 << 20);
    assert_eq!(world.refused(), 1);
    assert!(world.read_all(file, (15 << 20) - (96 << 10), 96 << 10) == bytes);
}
