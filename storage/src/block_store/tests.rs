//! The block store over disks in memory that answer in any order, late, or with faults.
//! Misses: real devices (their own tests), many seeds of whole systems (`make sim`).

use alloc::vec::Vec;
use core::cell::{Cell, RefCell};
use std::rc::Rc;

use super::*;
use crate::Opened;
use crate::disk::{DiskDone, DiskIo, DiskOp, DiskSubmit, DiskTag};
use crate::fake::Fake;
use crate::harness::Harness;
use crate::vectors::expand;

/// A disk in memory. Operations lie in a queue until the test lets them happen.
#[derive(Clone)]
pub(super) struct Mem {
    pub bytes: Rc<RefCell<Vec<u8>>>,
    block_bytes: u32,
    queue: Rc<RefCell<Vec<(DiskTag, DiskIo)>>>,
    pub room: usize,
    /// Operations that may still happen, and from which end of the queue.
    pub allowed: Rc<Cell<usize>>,
    newest_first: Rc<Cell<bool>>,
    pub fail: Rc<Cell<Option<StoreFault>>>,
    flushes: Rc<Cell<usize>>,
    losses: Rc<Cell<u32>>,
    pub returns: Rc<Cell<u32>>,
    pub identity: Rc<Cell<u64>>,
    pub away: Rc<Cell<bool>>,
    io_bytes_max: Rc<Cell<u32>>,
    /// What it says that it has.
    pub sectors: Rc<Cell<Option<u64>>>,
}

impl Mem {
    pub fn new(bytes: Vec<u8>, block_bytes: u32) -> Mem {
        Mem {
            bytes: Rc::new(RefCell::new(bytes)),
            block_bytes,
            queue: Rc::default(),
            room: 64,
            allowed: Rc::new(Cell::new(usize::MAX)),
            newest_first: Rc::default(),
            fail: Rc::default(),
            flushes: Rc::default(),
            losses: Rc::default(),
            returns: Rc::default(),
            identity: Rc::default(),
            away: Rc::default(),
            sectors: Rc::default(),
            io_bytes_max: Rc::new(Cell::new(64 * 1024)),
        }
    }

    fn act(&self, hv: &mut Fake, pool: &Pool, io: DiskIo) {
        let at = io.sector as usize * 512;
        let len = io.sectors as usize * 512;
        let mut bytes = self.bytes.borrow_mut();
        match io.op {
            DiskOp::Read => {
                let run = pool.run(io.page, 0, len);
                hv.write(run.region, run.offset, &bytes[at..at + len]);
            }
            DiskOp::Write => {
                let run = pool.run(io.page, 0, len);
                hv.read(run.region, run.offset, &mut bytes[at..at + len]);
            }
            DiskOp::Flush => self.flushes.set(self.flushes.get() + 1),
            DiskOp::Discard => {
                assert!(io.sector % 16 == 8 && io.sectors.is_multiple_of(16), "whole units");
                bytes[at..at + len].fill(0xDD);
            }
            DiskOp::Zeroes => bytes[at..at + len].fill(0),
        }
    }
}

impl Device<Fake> for Mem {
    fn units(&self) -> usize {
        1
    }
    fn unit_number(&self, _: usize) -> Option<u32> {
        None
    }
    fn geometry(&self, _: usize) -> Option<Geometry> {
        Some(Geometry {
            sectors: self.sectors.get().unwrap_or(self.bytes.borrow().len() as u64 / 512),
            block_bytes: self.block_bytes,
            io_bytes_max: self.io_bytes_max.get(),
            read_only: false,
            discard_sectors_max: 64,
            discard_unit: 16,
            discard_first: 8,
            zeroes_sectors_max: 256,
        })
    }
    fn losses(&self) -> u32 {
        self.losses.get()
    }
    fn is_away(&self) -> bool {
        self.away.get()
    }
    fn returns(&self) -> u32 {
        self.returns.get()
    }
    fn identity(&self) -> u64 {
        self.identity.get()
    }
    fn submit(
        &mut self,
        _: &mut Fake,
        _: &Pool,
        unit: usize,
        tag: DiskTag,
        io: DiskIo,
    ) -> DiskSubmit {
        assert_eq!(unit, 0);
        let block = u64::from(self.block_bytes / 512);
        assert!(
            io.sector.is_multiple_of(block) && u64::from(io.sectors).is_multiple_of(block),
            "unaligned"
        );
        assert!(io.sector + u64::from(io.sectors) <= self.bytes.borrow().len() as u64 / 512);
        let moves = matches!(io.op, DiskOp::Read | DiskOp::Write);
        let len = io.sectors * 512;
        assert!(!moves || len <= self.io_bytes_max.get(), "longer than the device takes");
        let mut queue = self.queue.borrow_mut();
        if queue.len() == self.room || self.away.get() {
            return DiskSubmit::NoRoom;
        }
        queue.push((tag, io));
        DiskSubmit::Taken
    }
    fn poll(&mut self, hv: &mut Fake, pool: &Pool, _: u64) -> Option<DiskDone> {
        if self.away.get() || self.allowed.get() == 0 || self.queue.borrow().is_empty() {
            return None;
        }
        self.allowed.set(self.allowed.get() - 1);
        let at = if self.newest_first.get() { self.queue.borrow().len() - 1 } else { 0 };
        let (tag, io) = self.queue.borrow_mut().remove(at);
        let result = self.fail.take().map_or(Ok(()), Err);
        if result.is_ok() {
            self.act(hv, pool, io);
        }
        Some(DiskDone { tag, result, held: Held::Nobody })
    }
    fn poll_at_ns(&self) -> Option<u64> {
        None
    }
}

pub(super) struct World {
    pub hv: Fake,
    pub store: BlockStore<Mem>,
    pub disks: Vec<Mem>,
    pub now_ns: u64,
}

impl Harness for World {
    type Device = Mem;

    fn parts(&mut self) -> (&mut BlockStore<Mem>, &mut Fake) {
        (&mut self.store, &mut self.hv)
    }

    fn done(&mut self) -> Done {
        (0..10_000).find_map(|_| self.poll()).expect("an answer")
    }
}

impl World {
    pub fn new(disks: &[(&str, Mem)]) -> World {
        let mut hv = Fake::new(4096);
        let mut store = BlockStore::new(&mut hv, 256, 32).unwrap();
        for (name, disk) in disks {
            store.attach(name, disk.clone());
        }
        let disks = disks.iter().map(|(_, disk)| disk.clone()).collect();
        World { hv, store, disks, now_ns: 0 }
    }

    pub fn one(disk: Mem) -> World {
        World::new(&[("xvda", disk)])
    }

    pub fn poll(&mut self) -> Option<Done> {
        self.store.release(&mut self.hv);
        self.store.poll(&mut self.hv, self.now_ns)
    }

    pub fn open(&mut self, path: &str, access: Access) -> Result<Opened, StoreFault> {
        self.store.open(&mut self.hv, Tag(99), path, access)?;
        let done = self.done();
        assert_eq!(done.tag, Tag(99));
        done.result.map(|answer| match answer {
            Answer::Opened(opened) => opened,
            other => panic!("{other:?}"),
        })
    }

    pub fn read_all(&mut self, file: FileId, mut offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < len {
            let want = (len - bytes.len()) as u32;
            self.store.read(&mut self.hv, Tag(8), file, offset, want).unwrap();
            let Ok(Answer::Read(window)) = self.done().result else { panic!("not read") };
            let run = window.runs[0];
            if run.len == 0 {
                break;
            }
            bytes.extend(self.hv.bytes(run.region, run.offset, run.len));
            offset += run.len as u64;
        }
        bytes
    }
}

pub(super) fn pattern(len: usize, salt: usize) -> Vec<u8> {
    (0..len).map(|at| (at / 512 * 31 + at + salt) as u8).collect()
}

#[test]
fn a_whole_disk_reads_and_writes_any_bytes() {
    for block in [512, 4096] {
        let mut expected = pattern(1 << 20, 1);
        let mut world = World::one(Mem::new(expected.clone(), block));
        assert!(world.poll().is_none());
        let opened = world.open("xvda", Access::ReadWrite).unwrap();
        assert_eq!((opened.size_bytes, opened.block_bytes), (1 << 20, block));
        for (offset, len) in [(0, 512), (4096, 70_000), (5000, 300), (3584, 1024), (1, 9000)] {
            let bytes = pattern(len, offset + 77);
            world.write_all(opened.file, offset as u64, &bytes);
            expected[offset..offset + len].copy_from_slice(&bytes);
        }
        assert!(*world.disks[0].bytes.borrow() == expected);
        assert!(world.read_all(opened.file, 0, 2 << 20) == expected);
        assert!(world.read_all(opened.file, 777, 5000) == expected[777..5777]);
        assert!(world.store.pool.free_pages() < 256);
        world.poll();
        assert_eq!(world.store.pool.free_pages(), 256);
    }
}

#[test]
fn writes_to_one_large_block_are_merged_whatever_the_order_of_answers() {
    for newest_first in [false, true] {
        let mut world = World::one(Mem::new(alloc::vec![0; 64 << 10], 4096));
        let file = world.open("xvda", Access::ReadWrite).unwrap().file;
        let disk = world.disks[0].clone();
        disk.newest_first.set(newest_first);
        disk.allowed.set(0);
        // Eight sectors of one block, then all of the block, then a sector again.
        for sector in 0..8u64 {
            assert_eq!(world.write(sector as u32, file, sector * 512, &[1; 512]), 512);
        }
        assert_eq!(world.write(8, file, 0, &[2; 4096]), 4096);
        assert_eq!(world.write(9, file, 512, &[3; 512]), 512);
        disk.allowed.set(usize::MAX);
        for _ in 0..10 {
            assert!(matches!(world.done().result, Ok(Answer::Written(_))));
        }
        let mut expected = alloc::vec![2; 4096];
        expected[512..1024].fill(3);
        assert!(disk.bytes.borrow()[..4096] == expected);
    }
}

#[test]
fn random_small_writes_in_flight_lose_nothing() {
    let mut state = 12345u32;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as usize % below
    };
    let mut expected = alloc::vec![0u8; 64 << 10];
    let mut world = World::one(Mem::new(expected.clone(), 4096));
    let file = world.open("xvda", Access::ReadWrite).unwrap().file;
    let disk = world.disks[0].clone();
    let mut flying = 0;
    let mut busy = alloc::vec![false; 128];
    let mut tags: Vec<(usize, usize)> = Vec::new();
    for round in 0..3000u32 {
        disk.newest_first.set(random(2) == 0);
        disk.allowed.set(random(3));
        let (start, count) = (random(120), 1 + random(8));
        let range = start..start + count;
        // A guest does not write a sector twice at once: its order would be open.
        if !busy[range.clone()].contains(&true) {
            let bytes = alloc::vec![round as u8; count * 512];
            let taken = world.write(tags.len() as u32, file, start as u64 * 512, &bytes);
            let sectors = taken as usize / 512;
            if taken > 0 {
                expected[start * 512..start * 512 + taken as usize].fill(round as u8);
                busy[start..start + sectors].fill(true);
                tags.push((start, sectors));
                flying += 1;
            }
        }
        while let Some(done) = world.poll() {
            let (start, sectors) = tags[done.tag.0 as usize];
            assert_eq!(done.result, Ok(Answer::Written(sectors as u32 * 512)));
            busy[start..start + sectors].fill(false);
            flying -= 1;
        }
    }
    disk.allowed.set(usize::MAX);
    while flying > 0 {
        world.done();
        flying -= 1;
    }
    assert!(*disk.bytes.borrow() == expected);
}

#[test]
fn a_full_device_lets_operations_wait_and_a_full_table_says_no_room() {
    let mut disk = Mem::new(alloc::vec![0; 1 << 20], 512);
    disk.room = 2;
    let mut world = World::one(disk);
    let file = world.open("xvda", Access::ReadWrite).unwrap().file;
    world.poll();
    let disk = world.disks[0].clone();
    disk.allowed.set(0);
    let mut taken = 0;
    while world.write(taken, file, u64::from(taken) * 512, &[9; 512]) > 0 {
        taken += 1;
    }
    assert_eq!(taken, 32);
    assert_eq!(disk.queue.borrow().len(), 2);
    disk.allowed.set(usize::MAX);
    for tag in 0..32 {
        assert_eq!(world.done(), Done { tag: Tag(tag), result: Ok(Answer::Written(512)) });
    }
}

#[test]
fn a_flush_is_sent_and_a_fault_is_answered() {
    let mut world = World::one(Mem::new(alloc::vec![0; 1 << 20], 512));
    let file = world.open("xvda", Access::ReadWrite).unwrap().file;
    let disk = world.disks[0].clone();
    world.store.flush(&mut world.hv, Tag(1), file).unwrap();
    assert_eq!(world.done().result, Ok(Answer::Flushed));
    assert_eq!(disk.flushes.get(), 1);
    disk.fail.set(Some(StoreFault::Io(5)));
    world.store.flush(&mut world.hv, Tag(2), file).unwrap();
    assert_eq!(world.done().result, Err(StoreFault::Io(5)));
    assert_eq!(disk.flushes.get(), 1);
    disk.fail.set(Some(StoreFault::Io(6)));
    world.write(3, file, 0, &[1; 512]);
    assert_eq!(world.done().result, Err(StoreFault::Io(6)));
}

#[test]
fn punching_zeroes_whole_blocks_and_refuses_parts() {
    let mut world = World::one(Mem::new(alloc::vec![7; 1 << 20], 4096));
    let file = world.open("xvda", Access::ReadWrite).unwrap().file;
    let hv = &mut world.hv;
    let punch = |store: &mut BlockStore<Mem>, hv: &mut Fake, offset, len| {
        store.punch(hv, Tag(1), file, offset, len)
    };
    assert_eq!(punch(&mut world.store, hv, 4096, 300_000), Ok(Submit::Taken(256 * 512)));
    assert_eq!(punch(&mut world.store, hv, 512, 4096), Err(StoreFault::Unsupported));
    assert_eq!(punch(&mut world.store, hv, 4096, 1 << 20), Err(StoreFault::BeyondEnd));
    assert_eq!(world.done().result, Ok(Answer::Punched));
    let disk = world.disks[0].bytes.borrow();
    assert!(disk[4096..4096 + 256 * 512].iter().all(|&byte| byte == 0));
    assert_eq!((disk[4095], disk[4096 + 256 * 512]), (7, 7));
}

fn gpt_with_ext4() -> Mem {
    let mut disk = expand(include_bytes!("../../vectors/gpt.sparse"), 64 << 20);
    let fs = expand(include_bytes!("../../vectors/ext4-default.sparse"), 8 << 20);
    disk[8192 * 512..][..fs.len()].copy_from_slice(&fs);
    Mem::new(disk, 512)
}

fn letters(blocks: usize) -> Vec<u8> {
    (0..blocks * 4096).map(|at| b'A' + (at / 4096 % 26) as u8).collect()
}

#[test]
fn files_on_ext4_on_a_partition_are_read_and_written_in_place() {
    let mut world = World::one(gpt_with_ext4());
    let label = world.open("xvda/images/images/fragments.raw", Access::ReadWrite).unwrap();
    let number = world.open("xvda/p2/images/fragments.raw", Access::ReadOnly).unwrap();
    assert_eq!(label.identity, number.identity);
    assert_eq!((label.size_bytes, label.can_grow, label.can_punch), (40 * 4096, false, true));
    assert!(world.read_all(number.file, 0, 1 << 20) == letters(40));
    world.write_all(label.file, 10_000, &[b'!'; 20_000]);
    let mut expected = letters(40);
    expected[10_000..30_000].fill(b'!');
    assert!(world.read_all(number.file, 0, 1 << 20) == expected);
    // Not one byte outside the file changed.
    let plain = world.open("xvda/p2/images/plain.raw", Access::ReadOnly).unwrap();
    assert!(world.read_all(plain.file, 0, 1 << 20) == letters(5));
    let before = gpt_with_ext4();
    let fs = 8192 * 512..8192 * 512 + (8 << 20);
    let (now, then) = (world.disks[0].bytes.borrow(), before.bytes.borrow());
    let pairs = now[fs.clone()].iter().zip(&then[fs]);
    let changed = pairs.filter(|(now, then)| now != then).count();
    assert_eq!(changed, 20_000);
}

#[test]
fn holes_read_as_zeros() {
    let mut world = World::one(gpt_with_ext4());
    let opened = world.open("xvda/p2/images/holes.raw", Access::ReadOnly).unwrap();
    let mut expected = letters(9);
    expected[3 * 4096..6 * 4096].fill(0);
    assert!(world.read_all(opened.file, 0, 1 << 20) == expected);
    assert!(matches!(
        world.open("xvda/p2/images/holes.raw", Access::ReadWrite),
        Err(StoreFault::Refused(why)) if why.contains("holes")
    ));
}

#[test]
fn what_is_open_for_writing_is_not_served_under_another_name() {
    let mut world = World::one(gpt_with_ext4());
    let file = world.open("xvda/p2/images/plain.raw", Access::ReadWrite).unwrap().file;
    for path in ["xvda", "xvda/p2"] {
        assert!(matches!(world.open(path, Access::ReadOnly), Err(StoreFault::Refused(_))));
    }
    assert!(world.open("xvda/p1", Access::ReadWrite).is_ok());
    assert!(world.open("xvda/p2/images/fragments.raw", Access::ReadWrite).is_ok());
    world.store.close(&mut world.hv, file);
    assert!(world.open("xvda", Access::ReadOnly).is_err());
}

#[test]
fn lvm_over_three_disks_is_one_volume() {
    let disk = |sparse: &[u8]| Mem::new(expand(sparse, 64 << 20), 512);
    let mut world = World::new(&[
        ("xvda", disk(include_bytes!("../../vectors/lvm-pv0.sparse"))),
        ("xvdb", disk(include_bytes!("../../vectors/lvm-pv1.sparse"))),
        ("xvdc", disk(include_bytes!("../../vectors/lvm-pv2.sparse"))),
    ]);
    let striped = world.open("xvdb/vg0/striped", Access::ReadWrite).unwrap();
    assert_eq!(striped.size_bytes, 12 << 20);
    let bytes = pattern(300_000, 5);
    world.write_all(striped.file, 1 << 20, &bytes);
    assert!(world.read_all(striped.file, 1 << 20, bytes.len()) == bytes);
    // The 65th chunk of 16 KiB is the second disk's: extent 10, chunk 21 there.
    let at = (2048 + 10 * 2048) * 512 + 21 * 16_384;
    assert!(world.disks[1].bytes.borrow()[at..at + 16_384] == bytes[..16_384]);
    world.store.flush(&mut world.hv, Tag(1), striped.file).unwrap();
    assert_eq!(world.done().result, Ok(Answer::Flushed));
    assert!(world.disks.iter().all(|disk| disk.flushes.get() == 1));
    assert!(world.open("xvda/vg0/images", Access::ReadWrite).is_ok());
    assert_eq!(world.open("xvda/vg0/none", Access::ReadOnly), Err(StoreFault::NotFound));
    assert_eq!(world.open("xvda/vg1/images", Access::ReadOnly), Err(StoreFault::NotFound));
    assert_eq!(world.open("xvda/vg0", Access::ReadOnly), Err(StoreFault::NotAFile));
    assert_eq!(world.open("xvdz", Access::ReadOnly), Err(StoreFault::NotFound));
}

/// Changes the text of an LVM vector's only metadata area, keeping its length, and both CRCs.
pub(super) fn retext(disk: &mut [u8], from: &str, to: &str) {
    use crate::bytes::{crc32_raw, u64_at};
    assert_eq!(from.len(), to.len());
    let header = 4096;
    let text = header + u64_at(disk, header + 40).unwrap() as usize;
    let len = u64_at(disk, header + 48).unwrap() as usize;
    let bytes = &mut disk[text..text + len];
    let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    let crc = crc32_raw(0xF597_A6CF, bytes);
    disk[header + 56..header + 60].copy_from_slice(&crc.to_le_bytes());
    let crc = crc32_raw(0xF597_A6CF, &disk[header + 4..header + 512]);
    disk[header..header + 4].copy_from_slice(&crc.to_le_bytes());
}

#[test]
fn of_several_texts_the_newest_counts_wherever_it_is() {
    let vectors = [
        include_bytes!("../../vectors/lvm-pv0.sparse").as_slice(),
        include_bytes!("../../vectors/lvm-pv1.sparse").as_slice(),
        include_bytes!("../../vectors/lvm-pv2.sparse").as_slice(),
    ];
    for newest in 0..3 {
        let disk = |index: usize| {
            let mut bytes = expand(vectors[index], 64 << 20);
            if index == newest {
                retext(&mut bytes, "seqno = 6", "seqno = 7");
                retext(&mut bytes, "other-1 {", "other-2 {");
            }
            Mem::new(bytes, 512)
        };
        let disks = [("xvda", disk(0)), ("xvdb", disk(1)), ("xvdc", disk(2))];
        let mut world = World::new(&disks);
        assert!(world.open("xvda/vg0/other-2", Access::ReadOnly).is_ok(), "newest on {newest}");
        let old = world.open("xvda/vg0/other-1", Access::ReadOnly);
        assert_eq!(old, Err(StoreFault::NotFound));
    }
}

/// `pvcreate --metadatacopies 2`: a second area in the last MiB, with the text of the first.
fn second_area(disk: &mut [u8]) {
    use crate::bytes::{crc32_raw, u64_at};
    let sum = |bytes: &[u8]| crc32_raw(0xF597_A6CF, bytes).to_le_bytes();
    let start = disk.len() - (1 << 20);
    let bytes = u64_at(disk, 4096 + 32).unwrap() as usize;
    disk.copy_within(4096..4096 + bytes.min(1 << 20), start);
    disk[start + 24..start + 32].copy_from_slice(&(start as u64).to_le_bytes());
    disk[start + 32..start + 40].copy_from_slice(&(1u64 << 20).to_le_bytes());
    let crc = sum(&disk[start + 4..start + 512]);
    disk[start..start + 4].copy_from_slice(&crc);
    // The label's list of areas: behind the data area and its end, and the first.
    let list = 512 + 32 + 40 + 32;
    assert_eq!(u64_at(disk, list), Some(4096));
    disk[list + 16..list + 24].copy_from_slice(&(start as u64).to_le_bytes());
    disk[list + 24..list + 32].copy_from_slice(&(1u64 << 20).to_le_bytes());
    disk[list + 32..list + 48].fill(0);
    let crc = sum(&disk[512 + 20..1024]);
    disk[512 + 16..512 + 20].copy_from_slice(&crc);
}

/// A group whose first disk has two areas, each changed by `change`, and no other disk a text.
fn two_areas(change: impl Fn(usize, &mut [u8])) -> World {
    let mut disk = expand(include_bytes!("../../vectors/lvm-pv0.sparse"), 64 << 20);
    second_area(&mut disk);
    // As if each were the only one: the helpers know the first area.
    let start = disk.len() - (1 << 20);
    change(0, &mut disk);
    let mut first = disk[4096..4096 + (1 << 20) - 4096].to_vec();
    disk.copy_within(start..start + first.len(), 4096);
    change(1, &mut disk);
    let second = disk[4096..4096 + first.len()].to_vec();
    disk[start..start + first.len()].copy_from_slice(&second);
    disk[4096..4096 + first.len()].swap_with_slice(&mut first);
    World::one(Mem::new(disk, 512))
}

#[test]
fn of_two_metadata_areas_the_newest_that_is_whole_counts() {
    let newer = |disk: &mut [u8]| {
        retext(disk, "seqno = 6", "seqno = 7");
        retext(disk, "other-1 {", "other-2 {");
    };
    let open = |world: &mut World, name: &str| {
        let path = alloc::format!("xvda/vg0/{name}");
        world.open(&path, Access::ReadWrite).map(|opened| opened.size_bytes)
    };
    // A flipped bit in the text, or in the area's header.
    let tear = |disk: &mut [u8], header: bool| {
        let text = 4096 + crate::bytes::u64_at(disk, 4096 + 40).unwrap() as usize;
        disk[if header { 4096 + 45 } else { text + 100 }] ^= 1;
    };
    for area in 0..2 {
        let mut world = two_areas(|at, disk| {
            if at == area {
                newer(disk)
            }
        });
        assert_eq!(open(&mut world, "other-2"), Ok(5 << 20), "newer in {area}");
        assert_eq!(open(&mut world, "other-1"), Err(StoreFault::NotFound));
        for header in [false, true] {
            let mut world = two_areas(|at, disk| {
                if at == area {
                    newer(disk);
                    tear(disk, header);
                }
            });
            assert_eq!(open(&mut world, "other-1"), Ok(5 << 20), "header {header} torn in {area}");
        }
        // One number, two texts: only what they agree on is served.
        let mut world = two_areas(|at, disk| {
            if at == area {
                retext(disk, "\"pv0\", 8\n", "\"pv0\", 9\n");
            }
        });
        assert_eq!(open(&mut world, "images"), Ok(8 << 20));
        assert!(matches!(open(&mut world, "other-1"), Err(StoreFault::Refused(_))));
    }
    let mut world = two_areas(|_, disk| tear(disk, false));
    assert_eq!(open(&mut world, "images"), Err(StoreFault::NotFound));
}

#[test]
fn a_partition_over_another_one_is_read_and_not_written() {
    let mut world = World::one(Mem::new(alloc::vec![0; 4 << 20], 512));
    world.partition(1, 64, 1000);
    world.partition(2, 1063, 1000);
    for path in ["xvda/p1", "xvda/p2"] {
        let file = world.open(path, Access::ReadOnly).unwrap().file;
        world.store.close(&mut world.hv, file);
        assert!(matches!(world.open(path, Access::ReadWrite), Err(StoreFault::Refused(_))));
    }
    world.partition(2, 1064, 1000);
    assert!(world.open("xvda/p1", Access::ReadWrite).is_ok());
}

#[test]
fn texts_of_strangers_spoil_no_group() {
    let vector = include_bytes!("../../vectors/lvm-pv0.sparse").as_slice();
    let disk = || expand(vector, 64 << 20);
    type Change = dyn Fn(&mut [u8]);
    let changes: [&Change; 4] = [
        // Not to be parsed; of the same name with another identity; newer, with volumes elsewhere.
        &|disk| retext(disk, "seqno = 6", "seqno } 6"),
        &|disk| retext(disk, "extent_size", "extent_bulk"),
        &|disk| {
            retext(disk, "seqno = 6", "seqno = 9");
            retext(disk, "\"pv0\", 0\n", "\"pv0\", 8\n");
        },
        &|disk| {
            let at = disk.windows(5).position(|word| word == b"id = ").unwrap() + 6;
            let end = disk[at..].iter().position(|byte| *byte == b'"').unwrap();
            let id = alloc::string::String::from_utf8(disk[at..at + end].to_vec()).unwrap();
            retext(disk, &id, &id.chars().rev().collect::<alloc::string::String>());
        },
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let mut strange = disk();
        change(&mut strange);
        // Another physical volume by its label, which the text does not name.
        strange[512 + 32..512 + 64].rotate_left(1);
        let crc = crate::bytes::crc32_raw(0xF597_A6CF, &strange[512 + 20..1024]);
        strange[512 + 16..512 + 20].copy_from_slice(&crc.to_le_bytes());
        let disks = [("xvda", Mem::new(disk(), 512)), ("xvdb", Mem::new(strange, 512))];
        let mut world = World::new(&disks);
        let opened = world.open("xvda/vg0/images", Access::ReadWrite);
        let file = opened.unwrap_or_else(|fault| panic!("{number}: {fault:?}")).file;
        world.write_all(file, 0, &[3; 512]);
        assert_eq!(world.disks[0].bytes.borrow()[1 << 20], 3);
    }
}

#[test]
fn a_fault_while_opening_is_the_answer_of_the_opening() {
    let mut world = World::one(gpt_with_ext4());
    world.disks[0].fail.set(Some(StoreFault::Io(5)));
    assert_eq!(world.open("xvda/p2", Access::ReadOnly), Err(StoreFault::Io(5)));
    assert!(world.open("xvda/p2", Access::ReadOnly).is_ok());
}

#[test]
fn a_disk_that_grew_has_its_new_size() {
    let mut world = World::one(Mem::new(alloc::vec![0; 1 << 20], 512));
    let file = world.open("xvda", Access::ReadWrite).unwrap().file;
    world.disks[0].bytes.borrow_mut().resize(2 << 20, 0);
    world.store.size(&mut world.hv, Tag(4), file).unwrap();
    assert_eq!(world.done().result, Ok(Answer::Size(2 << 20)));
    world.write_all(file, (2 << 20) - 512, &[1; 512]);
}

#[test]
fn whole_writes_do_not_wait_for_one_another() {
    let mut world = World::one(Mem::new(alloc::vec![0; 64 << 10], 4096));
    let file = world.open("xvda", Access::ReadWrite).unwrap().file;
    let disk = world.disks[0].clone();
    disk.allowed.set(0);
    // A small write elsewhere is under way; two of the same whole block are at the disk at once.
    world.write(0, file, 32_768, &[1; 512]);
    world.write(1, file, 0, &[1; 4096]);
    world.write(2, file, 0, &[2; 4096]);
    assert_eq!(disk.queue.borrow().len(), 3);
    // A small write to that block waits for both.
    world.write(3, file, 0, &[3; 512]);
    assert_eq!(disk.queue.borrow().len(), 3);
}

#[test]
fn a_disk_that_shrank_refuses_what_is_gone() {
    let mut world = World::one(gpt_with_ext4());
    let file = world.open("xvda/p7", Access::ReadWrite).unwrap().file;
    world.disks[0].bytes.borrow_mut().truncate(40 << 20);
    let gone = world.store.read(&mut world.hv, Tag(1), file, 16 << 20, 512);
    assert_eq!(gone, Err(StoreFault::BeyondEnd));
    assert_eq!(world.read_all(file, 0, 512).len(), 512);
}

#[test]
fn a_flush_waits_for_the_disk_that_has_no_room() {
    let disk = |sparse: &[u8]| Mem::new(expand(sparse, 64 << 20), 512);
    let mut second = disk(include_bytes!("../../vectors/lvm-pv1.sparse"));
    second.room = 1;
    let mut world = World::new(&[
        ("xvda", disk(include_bytes!("../../vectors/lvm-pv0.sparse"))),
        ("xvdb", second),
        ("xvdc", disk(include_bytes!("../../vectors/lvm-pv2.sparse"))),
    ]);
    let striped = world.open("xvda/vg0/striped", Access::ReadWrite).unwrap().file;
    let second = world.disks[1].clone();
    second.allowed.set(0);
    assert_eq!(world.write(1, striped, 16_384, &[1; 512]), 512);
    world.store.flush(&mut world.hv, Tag(2), striped).unwrap();
    for _ in 0..10 {
        assert_eq!(world.poll(), None, "one disk has not had the flush");
    }
    second.allowed.set(usize::MAX);
    assert_eq!(world.done().result, Ok(Answer::Written(512)));
    assert_eq!(world.done().result, Ok(Answer::Flushed));
    assert!(world.disks.iter().all(|disk| disk.flushes.get() == 1));
}

#[test]
fn an_opening_with_a_small_cache_ends_by_progress_or_by_refusal() {
    let mut world = World::one(gpt_with_ext4());
    let path = "xvda/p2/images/fragments.raw";
    let mut limits = 0;
    for blocks_max in (1..160).step_by(3) {
        world.store.meta_blocks_max = blocks_max;
        match world.open(path, Access::ReadOnly) {
            Ok(opened) => {
                assert!(world.read_all(opened.file, 0, 1 << 20) == letters(40));
                world.store.close(&mut world.hv, opened.file);
            }
            Err(fault) => {
                assert!(matches!(fault, StoreFault::Limit(_)));
                limits += 1;
            }
        }
    }
    assert!((1..50).contains(&limits), "{limits} of 53");
}

#[test]
fn every_file_hears_once_that_a_disk_lost_its_cache() {
    // The first flush of any file took the news from all others.
    let mut disk = alloc::vec![0; 1 << 20];
    for entry in 0..3u8 {
        // A used entry of 64 sectors (UEFI 2.10, table 5.1).
        let at = 446 + usize::from(entry) * 16;
        (disk[at + 4], disk[at + 8], disk[at + 12]) = (0x83, 64 + entry * 64, 64);
    }
    disk[510..512].copy_from_slice(&[0x55, 0xAA]);
    let mut world = World::one(Mem::new(disk, 512));
    let files = ["xvda/p1", "xvda/p2", "xvda/p3"]
        .map(|path| world.open(path, Access::ReadWrite).unwrap().file);
    let flush = |world: &mut World, file| {
        world.store.flush(&mut world.hv, Tag(9), file).unwrap();
        world.done().result
    };
    for file in files {
        world.write_all(file, 0, &[1; 512]);
    }
    assert_eq!(flush(&mut world, files[2]), Ok(Answer::Flushed));
    world.disks[0].losses.set(1);
    world.poll();
    for _ in 0..2 {
        world.write_all(files[2], 0, &[1; 512]);
    }
    for (file, first) in files.into_iter().zip([false, false, true]) {
        let lost = Err(StoreFault::Io(5));
        assert_eq!(flush(&mut world, file), if first { Ok(Answer::Flushed) } else { lost });
        assert_eq!(flush(&mut world, file), Ok(Answer::Flushed));
    }
}

#[test]
fn a_discard_covers_whole_units_and_says_how_much_it_did() {
    let mut world = World::one(Mem::new(alloc::vec![1; 1 << 20], 512));
    let file = world.open("xvda", Access::ReadWrite).unwrap().file;
    let mut discard = |from: u64, sectors: u64| {
        let taken = world.store.discard(&mut world.hv, Tag(1), file, from * 512, sectors * 512);
        assert_eq!(world.done().result, Ok(Answer::Punched));
        let Ok(Submit::Taken(taken)) = taken else { panic!("{taken:?}") };
        let gone = world.disks[0].bytes.borrow().iter().filter(|byte| **byte == 0xDD).count();
        (taken / 512, gone / 512)
    };
    // Units of 16 sectors from sector 8 on, 64 sectors at once.
    assert_eq!(discard(8, 16), (16, 16));
    assert_eq!(discard(30, 12), (12, 16));
    assert_eq!(discard(20, 200), (68, 16 + 64));
}

#[test]
fn what_an_opening_reads_ahead_keeps_to_the_transfer_limit() {
    // It always read 32 KiB, which a controller with a small MDTS refuses.
    let disk = Mem::new(alloc::vec![0; 1 << 20], 512);
    disk.io_bytes_max.set(8192);
    let mut world = World::one(disk);
    assert_eq!(world.open("xvda/p1", Access::ReadOnly).map(|_| ()), Err(StoreFault::NotFound));
}
