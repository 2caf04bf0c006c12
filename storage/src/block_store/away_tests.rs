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
