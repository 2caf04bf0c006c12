//! A backend that was away and comes back: as the same disk, with less than it had, or as another
//! disk under the same name. Misses: what a toolstack really writes (the rig).

use alloc::vec::Vec;

use super::tests::World;
use super::*;
use crate::fake::Fake;
use crate::harness::{Harness, pattern};
use crate::vectors::expand;
use crate::{Answer, FileId, Store, Tag};

const BYTES: usize = 1 << 20;

impl World {
    /// A disk with these bytes, connected.
    fn with(media: &[u8]) -> World {
        let mut world = World::new(media.len(), 512);
        world.back.media.copy_from_slice(media);
        world.params = Some(b"/dev/vg0/images");
        world.settle();
        world.poll();
        world
    }

    /// The backend dies, and what was sent to it with it.
    fn die(&mut self) {
        self.step();
        self.back.disconnect(&mut self.hv);
        self.back.cache.clear();
        self.back.faults.stalled = false;
        self.state = None;
        self.settle();
    }

    /// Another one is there.
    fn come(&mut self) {
        self.state = Some(6);
        self.settle();
        assert!(self.front().is_connected());
    }

    fn come_with(&mut self, media: &[u8]) {
        self.back.media = media.to_vec();
        self.back.nodes.sectors = media.len() as u64 / 512;
        self.come();
    }

    /// Nothing of `file` is served.
    fn refuses(&mut self, file: FileId) {
        self.store.read(&mut self.hv, Tag(1), file, 0, 512).unwrap();
        assert_eq!(self.done().result, Err(StoreFault::Gone));
        assert!(self.write(1, file, 0, &[9; 512]) > 0);
        assert_eq!(self.done().result, Err(StoreFault::Gone));
        assert_eq!(self.flush(file), Err(StoreFault::Gone));
        assert!(self.back.cache.is_empty());
    }
}

/// One primary partition; `number` is the disk's own.
fn partitioned(number: u8, first: u8, bytes: usize) -> Vec<u8> {
    let mut media = alloc::vec![number; bytes];
    media[..512].fill(0);
    media[440..444].fill(number);
    media[446 + 4] = 0x83;
    media[446 + 8] = first;
    media[446 + 12..][..2].copy_from_slice(&1000u16.to_le_bytes());
    media[510..512].copy_from_slice(&[0x55, 0xAA]);
    media
}

#[test]
fn another_disk_under_the_name_gets_nothing_of_what_was_meant_for_the_first() {
    let mut world = World::with(&[1; BYTES]);
    let file = world.open_path("xvda");
    world.back.faults.stalled = true;
    world.write(1, file, 0, &[5; 4096]);
    world.write(2, file, 4096, &[6; 100]);
    world.die();
    world.write(3, file, 65_536, &[7; 4096]);
    world.params = Some(b"/dev/vg0/other");
    world.come_with(&[2; BYTES]);
    for _ in 0..3 {
        assert_eq!(world.done().result, Err(StoreFault::Gone));
    }
    world.refuses(file);
    assert_eq!(world.store.growth(0).strange, 1);
    // It can be opened as what it is.
    world.store.close(&mut world.hv, file);
    let other = world.open_path("xvda");
    assert_eq!(world.read(other, 0, 512), [2; 512]);
    world.write_all(other, 0, &[3; 512]);
    // And the first is served again when it is back, though not to the other's file.
    let first = file;
    world.die();
    world.params = Some(b"/dev/vg0/images");
    world.come_with(&[1; BYTES]);
    world.refuses(first);
    world.store.close(&mut world.hv, other);
    let again = world.open_path("xvda");
    assert_eq!(world.read(again, 0, 512), [1; 512]);
}

#[test]
fn a_disk_that_comes_back_after_another_is_served_again() {
    let mut world = World::with(&[1; BYTES]);
    let file = world.open_path("xvda");
    world.die();
    world.params = None;
    world.come_with(&[2; BYTES]);
    world.refuses(file);
    world.die();
    world.params = Some(b"/dev/vg0/images");
    world.come_with(&[1; BYTES]);
    world.poll();
    world.write_all(file, 0, &[8; 512]);
    assert_eq!(world.read(file, 0, 512), [8; 512]);
}

#[test]
fn a_partition_is_known_by_the_table_s_own_number_and_its_place() {
    let first = partitioned(1, 64, BYTES);
    let cases = [
        (partitioned(1, 64, BYTES), true),
        (partitioned(1, 64, 2 * BYTES), true),
        (partitioned(2, 64, BYTES), false),
        (partitioned(1, 65, BYTES), false),
        (partitioned(1, 64, BYTES / 2), false),
        (alloc::vec![0; BYTES], false),
    ];
    for (media, same) in cases {
        let mut world = World::with(&first);
        let file = world.open_path("xvda/p1");
        world.back.faults.stalled = true;
        world.write(1, file, 0, &[5; 4096]);
        world.die();
        world.write(2, file, 4096, &[6; 4096]);
        world.come_with(&media);
        for _ in 0..2 {
            assert_eq!(world.done().result.is_ok(), same);
        }
        if same {
            assert_eq!(world.read(file, 4096, 512), [6; 512]);
        } else {
            world.refuses(file);
        }
        assert_eq!(world.store.growth(0).strange, u64::from(!same));
    }
}

#[test]
fn a_file_on_ext4_is_known_by_its_filesystem_and_inode() {
    let mut disk = expand(include_bytes!("../../vectors/gpt.sparse"), 64 << 20);
    let fs = expand(include_bytes!("../../vectors/ext4-default.sparse"), 8 << 20);
    disk[8192 * 512..][..fs.len()].copy_from_slice(&fs);
    let mut world = World::with(&disk);
    let file = world.open_path("xvda/p2/images/plain.raw");
    let bytes = world.read(file, 0, 4096);
    world.die();
    world.come_with(&disk);
    assert_eq!(world.read(file, 0, 4096), bytes);
    // A table with the same identity and place, and a filesystem without that file.
    world.die();
    disk[8192 * 512..][..fs.len()].fill(0);
    world.come_with(&disk);
    world.refuses(file);
}

#[test]
fn a_disk_that_comes_back_smaller_or_with_other_sectors_is_another_one() {
    for (bytes, sector, same) in
        [(BYTES, 512, true), (2 * BYTES, 512, true), (BYTES / 2, 512, false), (BYTES, 4096, false)]
    {
        let mut world = World::with(&[1; BYTES]);
        let file = world.open_path("xvda");
        world.back.faults.stalled = true;
        world.write(1, file, 512, &[5; 512]);
        world.die();
        world.back.nodes.sector_bytes = sector;
        world.back.nodes.discard_granularity_bytes = Some(sector);
        world.come_with(&alloc::vec![1; bytes]);
        assert_eq!(world.done().result.is_ok(), same, "{bytes} bytes, sectors of {sector}");
        if !same {
            world.refuses(file);
        }
    }
}

#[test]
fn a_disk_that_comes_back_read_only_is_read() {
    let mut world = World::with(&[1; BYTES]);
    let file = world.open_path("xvda");
    world.back.faults.stalled = true;
    world.write(1, file, 0, &[5; 512]);
    world.die();
    world.back.nodes.info = platter_xen::blkif::info::READONLY;
    world.come();
    assert_eq!(world.done().result, Err(StoreFault::ReadOnly));
    assert_eq!(world.read(file, 0, 512), [1; 512]);
    let mut put = |_: &mut Fake, _| true;
    let write = world.store.write(&mut world.hv, Tag(1), file, 0, 512, &mut put);
    assert_eq!(write, Err(StoreFault::ReadOnly));
    let discard = world.store.discard(&mut world.hv, Tag(1), file, 0, 4096);
    assert_eq!(discard, Err(StoreFault::ReadOnly));
    world.die();
    world.back.nodes.info = 0;
    world.come();
    world.write_all(file, 0, &[6; 512]);
}

#[test]
fn a_backend_that_lost_all_its_features_serves_what_the_first_was_asked() {
    let mut world = World::with(&alloc::vec![1; BYTES]);
    let file = world.open_path("xvda");
    world.back.faults.stalled = true;
    let bytes = pattern(131_072);
    assert_eq!(world.write(1, file, 0, &bytes), 131_072);
    for tag in 0..30 {
        assert_eq!(world.write(2, file, 131_072 + tag * 4096, &[7; 4096]), 4096);
    }
    world.store.discard(&mut world.hv, Tag(3), file, 1 << 19, 4096).unwrap();
    world.store.flush(&mut world.hv, Tag(4), file).unwrap();
    world.die();
    let nodes = &mut world.back.nodes;
    (nodes.flush, nodes.barrier, nodes.discard_granularity_bytes) = (false, false, None);
    (nodes.indirect_segments_max, nodes.queues_max, nodes.ring_page_order_max) = (0, 1, 0);
    world.come();
    let mut answers = Vec::new();
    for _ in 0..33 {
        let done = world.done();
        answers.push((done.tag, done.result));
    }
    let of = |tag| answers.iter().filter(move |(at, _)| *at == Tag(tag)).map(|(_, result)| result);
    assert!(of(1).all(|result| *result == Ok(Answer::Written(131_072))));
    assert!(of(2).all(|result| *result == Ok(Answer::Written(4096))));
    assert!(of(3).all(|result| *result == Err(StoreFault::Unsupported)));
    assert_eq!((of(2).count(), of(4).count()), (30, 1));
    assert!(world.read(file, 0, 32_768) == bytes[..32_768]);
    assert_eq!(world.read(file, 131_072 + 29 * 4096, 512), [7; 512]);
    // The lost cache is told of once, then nothing needs a flush.
    assert_eq!((world.flush(file).is_ok(), world.back.executed[2]), (true, 0));
}

#[test]
fn a_return_in_the_middle_of_an_opening_begins_it_anew() {
    for steps in 0..6 {
        let mut world = World::with(&partitioned(1, 64, BYTES));
        world.store.open(&mut world.hv, Tag(5), "xvda/p1", crate::Access::ReadWrite).unwrap();
        for _ in 0..steps {
            assert!(world.poll().is_none());
        }
        world.die();
        world.come_with(&partitioned(2, 70, BYTES));
        let Ok(Answer::Opened(opened)) = world.done().result else { panic!("not opened") };
        world.write_all(opened.file, 0, &[9; 512]);
        assert_eq!(world.flush(opened.file), Ok(Answer::Flushed));
        assert_eq!(world.back.media[70 * 512..][..512], [9; 512], "where the second has it");
    }
}
