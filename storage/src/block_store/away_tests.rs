//! Disks that are away, come back or come back as others, under the block store: what that does to
//! operations, to openings and to everybody else. Misses: a backend's own words (blkfront's tests).

use super::tests::{Mem, World};
use super::*;
use crate::disk::SECTORS_MAX;
use crate::harness::Harness;
use crate::vectors::expand;

/// The three disks of the LVM vectors, whose group has a volume that is striped over all.
fn striped() -> [Mem; 3] {
    [
        include_bytes!("../../vectors/lvm-pv0.sparse").as_slice(),
        include_bytes!("../../vectors/lvm-pv1.sparse").as_slice(),
        include_bytes!("../../vectors/lvm-pv2.sparse").as_slice(),
    ]
    .map(|sparse| Mem::new(expand(sparse, 64 << 20), 512))
}

#[test]
fn a_flush_that_one_disk_has_and_another_may_not_get_is_answered_once() {
    let [first, mut second, third] = striped();
    second.room = 1;
    let mut world = World::new(&[("xvda", first), ("xvdb", second), ("xvdc", third)]);
    let file = world.open("xvda/vg0/striped", Access::ReadWrite).unwrap().file;
    let (first, second) = (world.disks[0].clone(), world.disks[1].clone());
    // The second has no room for the flush, and the first does not answer its part.
    second.allowed.set(0);
    assert_eq!(world.write(1, file, 16_384, &[1; 512]), 512);
    first.allowed.set(0);
    world.store.flush(&mut world.hv, Tag(2), file).unwrap();
    assert_eq!(world.poll(), None);
    // The second is another one now.
    second.returns.set(1);
    second.identity.set(7);
    for _ in 0..3 {
        assert_eq!(world.poll(), None, "the first has its part yet");
    }
    first.allowed.set(usize::MAX);
    assert_eq!(world.done(), Done { tag: Tag(2), result: Err(StoreFault::Gone) });
    second.allowed.set(usize::MAX);
    assert_eq!(world.done(), Done { tag: Tag(1), result: Ok(Answer::Written(512)) });
    assert_eq!(world.poll(), None);
}

#[test]
fn no_disk_is_longer_than_bytes_can_be_counted() {
    let disk = Mem::new(alloc::vec![0; 1 << 20], 512);
    disk.sectors.set(Some(u64::MAX));
    let mut world = World::one(disk);
    let opened = world.open("xvda", Access::ReadWrite).unwrap();
    assert_eq!(opened.size_bytes, SECTORS_MAX * 512);
    world.store.size(&mut world.hv, Tag(1), opened.file).unwrap();
    assert_eq!(world.done().result, Ok(Answer::Size(SECTORS_MAX * 512)));
}

#[test]
fn an_opening_does_not_wait_for_a_disk_that_is_away_nor_others_for_it() {
    let disk = || Mem::new(alloc::vec![0; 1 << 20], 512);
    let mut world = World::new(&[("xvda", disk()), ("xvdb", disk())]);
    world.partition(1, 64, 1000);
    let file = world.open("xvda/p1", Access::ReadWrite).unwrap().file;
    let first = world.disks[0].clone();
    // It goes away with an opening's read under way, and another opening in line.
    first.allowed.set(0);
    world.store.open(&mut world.hv, Tag(1), "xvda/p1", Access::ReadOnly).unwrap();
    assert_eq!(world.poll(), None);
    world.store.open(&mut world.hv, Tag(2), "xvdb", Access::ReadOnly).unwrap();
    assert_eq!(Store::<crate::fake::Fake>::poll_at_ns(&world.store), None, "no turning in circles");
    first.away.set(true);
    let done = world.done();
    assert_eq!((done.tag, done.result), (Tag(1), Err(StoreFault::Gone)));
    let done = world.done();
    assert!(done.tag == Tag(2) && done.result.is_ok());
    assert_eq!(world.open("xvda/p1", Access::ReadOnly), Err(StoreFault::Gone));
    // The old read's answer is nobody's; what is doubted is looked at when its disk is there.
    first.returns.set(1);
    for _ in 0..200 {
        world.now_ns += 100_000_000;
        assert_eq!(world.poll(), None);
    }
    first.away.set(false);
    first.allowed.set(usize::MAX);
    world.now_ns += 100_000_000;
    world.write_all(file, 0, &[1; 512]);
    assert_eq!(world.store.pool.free_pages(), 255);
}

#[test]
fn a_volume_over_two_disks_is_looked_at_when_both_are_back() {
    let [first, second, third] = striped();
    let mut world = World::new(&[("xvda", first), ("xvdb", second), ("xvdc", third)]);
    let file = world.open("xvda/vg0/striped", Access::ReadWrite).unwrap().file;
    world.disks[0].returns.set(1);
    world.disks[1].away.set(true);
    for _ in 0..200 {
        world.now_ns += 100_000_000;
        assert_eq!(world.poll(), None);
    }
    world.disks[1].away.set(false);
    world.disks[1].returns.set(1);
    world.now_ns += 100_000_000;
    world.write_all(file, 0, &[1; 512]);
    assert_eq!(world.store.growth(0).strange, 0);
}
