//! The driver against a model of a controller (`sim/src/nvme_model.rs`), alone and under the
//! block store, with every fault the model has. Misses: real controllers' habits (the rig has
//! QEMU's), concurrent access by a second domain.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::cell::RefCell;
use std::rc::Rc;

use super::*;
use crate::block_store::BlockStore;
use crate::fake::{Fake, Registers};
use crate::harness::{Harness, pattern};
use crate::nvme_model::{Dma, NvmeModel};
use crate::{Answer, FileId, Store, Tag};

type Model = Rc<RefCell<NvmeModel>>;

struct Port(Model);

impl Registers for Port {
    fn read_u32(&mut self, offset: usize) -> u32 {
        self.0.borrow().read_u32(offset)
    }
    fn write_u32(&mut self, offset: usize, value: u32) {
        self.0.borrow_mut().write_u32(offset, value);
    }
}

struct Memory<'a>(&'a mut Fake);

impl Dma for Memory<'_> {
    fn read(&self, address: u64, into: &mut [u8]) {
        let at = Fake::dma(address);
        into.copy_from_slice(&self.0.pages[at..at + into.len()]);
    }
    fn write(&mut self, address: u64, from: &[u8]) {
        let at = Fake::dma(address);
        self.0.pages[at..at + from.len()].copy_from_slice(from);
    }
}

const MS: u64 = 1_000_000;
const SECOND: u64 = 1000 * MS;

struct World {
    hv: Fake,
    model: Model,
    store: BlockStore<Nvme>,
    now_ns: u64,
    /// The model executes the newest command first.
    newest_first: bool,
}

impl World {
    fn new(bytes: usize, block_bytes: u32) -> World {
        World::over(NvmeModel::new(alloc::vec![0; bytes], block_bytes))
    }

    fn over(model: NvmeModel) -> World {
        let model: Model = Rc::new(RefCell::new(model));
        let mut hv = Fake::new(4096);
        hv.registers = Some(RefCell::new(Box::new(Port(model.clone()))));
        let mmio = hv.map_mmio(0xFEB0_0000, MMIO_PAGES).unwrap();
        let nvme = Nvme::new(&mut hv, mmio).unwrap();
        let mut store = BlockStore::new(&mut hv, 512, 128).unwrap();
        store.attach("nvme0", nvme);
        World { hv, model, store, now_ns: 0, newest_first: false }
    }

    /// Some milliseconds pass; the controller works.
    fn step(&mut self, ms: u64) {
        self.now_ns += ms * MS;
        let newest = self.newest_first;
        let mut pick = |count: usize| if newest { count - 1 } else { 0 };
        let mut model = self.model.borrow_mut();
        model.step(&mut Memory(&mut self.hv), 16, &mut pick);
    }

    fn poll(&mut self) -> Option<crate::Done> {
        self.store.release(&mut self.hv);
        self.store.poll(&mut self.hv, self.now_ns)
    }

    /// The next answer, within so many seconds.
    fn done_within(&mut self, seconds: u64) -> Option<crate::Done> {
        for _ in 0..seconds * 10 {
            if let Some(done) = self.poll() {
                return Some(done);
            }
            self.step(100);
        }
        None
    }

    fn open(&mut self) -> FileId {
        for _ in 0..50 {
            self.poll();
            self.step(1);
        }
        self.open_path("nvme0n1")
    }

    fn nvme(&self) -> &Nvme {
        self.store.device(0)
    }
}

impl Harness for World {
    type Device = Nvme;

    fn parts(&mut self) -> (&mut BlockStore<Nvme>, &mut Fake) {
        (&mut self.store, &mut self.hv)
    }

    fn done(&mut self) -> crate::Done {
        self.done_within(60).expect("an answer within a minute")
    }
}

#[test]
fn bring_up_write_flush_read() {
    for block in [512, 4096] {
        let mut world = World::new(1 << 20, block);
        let file = world.open();
        assert!(world.store.has_disk("nvme0n1"));
        assert_eq!(&world.nvme().info().unwrap().serial[..7], b"model-1");
        let bytes = pattern(128 << 10);
        // One page, two pages, a list, the longest list.
        for (len, offset) in [(4096, 0), (8192, 8192), (20_480, 32_768), (128 << 10, 1 << 19)] {
            assert_eq!(world.write(3, file, offset, &bytes[..len]), len as u32);
            assert_eq!(world.done().result, Ok(Answer::Written(len as u32)));
            assert!(world.read(file, offset, len as u32) == bytes[..len]);
        }
        assert!(world.model.borrow().media.iter().all(|&byte| byte == 0), "still in the cache");
        world.store.flush(&mut world.hv, Tag(4), file).unwrap();
        assert_eq!(world.done().result, Ok(Answer::Flushed));
        assert!(world.model.borrow().media[1 << 19..][..128 << 10] == bytes);
        assert_eq!(world.model.borrow().resets, 0);
    }
}

#[test]
fn transfers_keep_to_mdts() {
    let mut world = World::new(1 << 20, 512);
    world.model.borrow_mut().mdts = 2;
    let file = world.open();
    assert_eq!(world.write(3, file, 0, &pattern(100_000)), 16_384);
    assert_eq!(world.done().result, Ok(Answer::Written(16_384)));
}

#[test]
fn many_operations_over_all_queues_in_any_order() {
    let mut world = World::new(1 << 20, 512);
    let file = world.open();
    world.newest_first = true;
    let bytes = pattern(1 << 20);
    let (mut sent, mut answered) = (0, 0);
    while answered < 2048 {
        while sent < 2048 {
            let at = sent * 512;
            if world.write(sent as u32, file, at as u64, &bytes[at..at + 512]) == 0 {
                break;
            }
            sent += 1;
        }
        assert!(Store::<Fake>::poll_at_ns(&world.store).is_some(), "no interrupt will come");
        world.step(1);
        while let Some(done) = world.poll() {
            assert_eq!(done.result, Ok(Answer::Written(512)));
            answered += 1;
        }
    }
    world.store.flush(&mut world.hv, Tag(1), file).unwrap();
    world.done();
    assert!(world.model.borrow().media == bytes);
}

#[test]
fn zeroes_and_deallocation_are_commands_of_their_own() {
    let mut world = World::new(1 << 20, 4096);
    let file = world.open();
    world.write(3, file, 0, &[7; 16_384]);
    world.done();
    world.store.punch(&mut world.hv, Tag(4), file, 4096, 8192).unwrap();
    assert_eq!(world.done().result, Ok(Answer::Punched));
    let mut expected = [7; 16_384];
    expected[4096..12_288].fill(0);
    assert!(world.read(file, 0, 16_384) == expected);
    world.store.discard(&mut world.hv, Tag(5), file, 0, 16_384).unwrap();
    assert_eq!(world.done().result, Ok(Answer::Punched));
    assert_eq!(world.model.borrow().executed[&0x09], 1);
}

#[test]
fn a_swallowed_command_is_aborted_and_sent_again() {
    let mut world = World::new(1 << 20, 512);
    let file = world.open();
    world.model.borrow_mut().faults.swallow = 1;
    world.write(3, file, 0, &[5; 512]);
    assert_eq!(world.done_within(7), None);
    assert_eq!(world.done().result, Ok(Answer::Written(512)));
    assert!(world.read(file, 0, 512) == [5; 512]);
    let counters = world.nvme().counters();
    assert_eq!((counters.aborts, counters.resets), (1, 0));
}

#[test]
fn when_an_abort_does_not_help_the_controller_is_reset_and_everything_sent_again() {
    let mut world = World::new(1 << 20, 512);
    let file = world.open();
    world.model.borrow_mut().faults.swallow = 3;
    world.model.borrow_mut().faults.abort_refused = true;
    for tag in 0..5 {
        assert_eq!(world.write(tag, file, u64::from(tag) * 512, &[tag as u8 + 1; 512]), 512);
    }
    world.store.flush(&mut world.hv, Tag(5), file).unwrap();
    for _ in 0..6 {
        assert!(world.done().result.is_ok());
    }
    for tag in 0..5u8 {
        assert!(world.read(file, u64::from(tag) * 512, 512) == [tag + 1; 512]);
    }
    assert_eq!(world.nvme().counters().resets, 1);
    assert_eq!(world.model.borrow().resets, 1);
}

#[test]
fn a_fatal_status_resets() {
    let mut world = World::new(1 << 20, 512);
    let file = world.open();
    world.write(3, file, 0, &[5; 512]);
    world.model.borrow_mut().faults.fatal = true;
    assert_eq!(world.done_within(5).unwrap().result, Ok(Answer::Written(512)));
    assert_eq!(world.nvme().counters().resets, 1);
}

#[test]
fn a_controller_that_lost_its_cache_fails_the_next_flush() {
    let mut world = World::new(1 << 20, 512);
    let file = world.open();
    let flush = |world: &mut World| {
        world.store.flush(&mut world.hv, Tag(9), file).unwrap();
        world.done().result
    };
    assert_eq!(flush(&mut world), Ok(Answer::Flushed));
    world.write(3, file, 0, &[5; 512]);
    world.done();
    world.model.borrow_mut().power_cut(&mut |_| false);
    assert_eq!(flush(&mut world), Err(StoreFault::Io(5)));
    assert_eq!(flush(&mut world), Ok(Answer::Flushed));
    // With nothing at stake nobody is told.
    world.model.borrow_mut().power_cut(&mut |_| false);
    assert_eq!(flush(&mut world), Ok(Answer::Flushed));
}

#[test]
fn a_completion_for_no_command_resets() {
    let mut world = World::new(1 << 20, 512);
    let file = world.open();
    world.model.borrow_mut().faults.wrong_cid = true;
    world.write(3, file, 0, &[5; 512]);
    assert_eq!(world.done().result, Ok(Answer::Written(512)));
    assert_eq!(world.nvme().counters().resets, 1);
}

#[test]
fn transient_errors_are_retried_and_final_ones_are_answered() {
    let mut world = World::new(1 << 20, 512);
    let file = world.open();
    let mut fail = |count, status| {
        let mut model = world.model.borrow_mut();
        (model.faults.fail, model.faults.fail_status) = (count, status);
        drop(model);
        world.write(3, file, 0, &[5; 512]);
        world.done().result
    };
    assert_eq!(fail(3, 0x06), Ok(Answer::Written(512)));
    assert_eq!(fail(4, 0x06), Err(StoreFault::Io(0x06)));
    assert_eq!(fail(1, 0x4006), Err(StoreFault::Io(0x06)));
    assert_eq!(fail(1, 0x280), Err(StoreFault::Io(0x280)));
    assert_eq!(fail(1, 0x81), Err(StoreFault::NoSpace));
    assert_eq!(fail(1, 0x182), Err(StoreFault::ReadOnly));
    assert_eq!(world.nvme().counters().last_status, 0x182);
    assert_eq!(world.nvme().counters().retries, 6);
}

#[test]
fn removal_fails_everything_at_once_and_gives_the_pages_back() {
    let mut world = World::new(1 << 20, 512);
    let file = world.open();
    world.poll();
    let before = world.hv.frames_left();
    for tag in 0..4 {
        world.write(tag, file, 0, &[5; 512]);
    }
    world.model.borrow_mut().faults.gone = true;
    for _ in 0..4 {
        assert_eq!(world.done_within(2).unwrap().result, Err(StoreFault::Gone));
    }
    assert_eq!(world.poll(), None);
    assert_eq!(world.hv.frames_left(), before);
    assert!(world.nvme().is_dead());
    assert_eq!(world.nvme().counters().resets, 0);
    assert_eq!(world.store.device_mut(0).1.free_pages(), 512);
    assert_eq!(world.store.read(&mut world.hv, Tag(1), file, 0, 512), Err(StoreFault::Gone));
}

#[test]
fn a_controller_that_cannot_be_stopped_keeps_its_pages() {
    let mut world = World::new(1 << 20, 512);
    let file = world.open();
    world.poll();
    let mut model = world.model.borrow_mut();
    (model.faults.swallow, model.faults.stuck, model.faults.abort_refused) = (1, true, true);
    drop(model);
    world.write(1, file, 0, &[5; 8192]);
    assert_eq!(world.done().result, Err(StoreFault::Gone));
    world.poll();
    assert_eq!(world.store.device_mut(0).1.free_pages(), 510);
}

#[test]
fn resets_in_vain_end() {
    let mut world = World::new(1 << 20, 512);
    let file = world.open();
    world.model.borrow_mut().faults.swallow = u32::MAX;
    world.model.borrow_mut().faults.abort_refused = true;
    world.write(1, file, 0, &[5; 512]);
    let done = world.done_within(300).expect("given up");
    assert_eq!(done.result, Err(StoreFault::Gone));
}

#[test]
fn a_controller_that_never_becomes_ready_is_given_up() {
    let mut world = World::new(1 << 20, 512);
    world.model.borrow_mut().faults.stuck = true;
    for _ in 0..300 {
        assert_eq!(world.poll(), None);
        world.step(100);
    }
    assert!(world.nvme().is_dead());
    assert_eq!(world.nvme().counters().resets, 5);
}

#[test]
fn a_fatal_status_while_it_comes_up_is_seen_at_once() {
    // Only commands that took too long were noticed, after ten seconds of looking each millisecond.
    for steps in 1..12 {
        let mut world = World::new(1 << 20, 512);
        for _ in 0..steps {
            world.poll();
            world.step(1);
        }
        world.model.borrow_mut().faults.fatal = true;
        for _ in 0..600 {
            world.poll();
            world.step(1);
        }
        assert!(world.nvme().is_ready(), "after {steps} steps");
        assert_eq!(world.nvme().counters().resets, 1);
    }
}

#[test]
fn a_cache_lost_while_namespaces_are_listed_anew_fails_the_next_flush() {
    // It was taken for a reset of ours, which loses nothing.
    let mut world = World::new(1 << 20, 512);
    let file = world.open();
    for _ in 0..10 {
        world.poll();
        world.step(100);
    }
    world.write_all(file, 0, &[5; 512]);
    let model = world.model.clone();
    model.borrow_mut().notice_namespaces(&mut Memory(&mut world.hv));
    for _ in 0..600 {
        world.poll();
        if !world.nvme().is_ready() {
            break;
        }
        world.now_ns += MS;
    }
    assert!(!world.nvme().is_ready(), "the list is asked for");
    model.borrow_mut().power_cut(&mut |_| false);
    for _ in 0..100 {
        world.poll();
        world.step(1);
    }
    assert_eq!(world.flush(file), Err(StoreFault::Io(5)));
    assert_eq!(world.flush(file), Ok(Answer::Flushed));
}

#[test]
fn a_shutdown_is_waited_for_and_one_that_never_ends_keeps_its_pages() {
    for stuck in [false, true] {
        let mut hv = Fake::new(64);
        let mut nvme = {
            let model: Model = Rc::new(RefCell::new(NvmeModel::new(alloc::vec![0; 4096], 512)));
            hv.registers = Some(RefCell::new(Box::new(Port(model.clone()))));
            let mmio = hv.map_mmio(0xFEB0_0000, MMIO_PAGES).unwrap();
            let mut nvme = Nvme::new(&mut hv, mmio).unwrap();
            let pool = Pool::new(&mut hv, 32).unwrap();
            for ms in 0..50 {
                nvme.poll(&mut hv, &pool, ms * MS);
                model.borrow_mut().step(&mut Memory(&mut hv), 16, &mut |_| 0);
            }
            assert!(nvme.is_ready());
            model.borrow_mut().faults.stuck = stuck;
            nvme
        };
        assert_eq!(nvme.shut_down(&mut hv, SECOND), !stuck);
        assert_eq!(nvme.shut_down(&mut hv, 5 * SECOND), !stuck);
        assert!(nvme.shut_down(&mut hv, 6 * SECOND));
        let taken = hv.taken;
        nvme.free(&mut hv);
        assert_eq!(hv.taken < taken, !stuck);
    }
}

#[test]
fn health_and_notices_of_changed_namespaces_are_taken_beside_operations() {
    let mut world = World::new(1 << 20, 512);
    let file = world.open();
    for _ in 0..10 {
        world.poll();
        world.step(100);
    }
    let health = world.nvme().health().unwrap();
    assert_eq!((health.temperature_kelvin, health.media_errors), (310, 7));
    world.model.borrow_mut().media.resize(2 << 20, 0);
    let model = world.model.clone();
    model.borrow_mut().notice_namespaces(&mut Memory(&mut world.hv));
    for _ in 0..20 {
        world.poll();
        world.step(100);
    }
    world.store.size(&mut world.hv, Tag(3), file).unwrap();
    assert_eq!(world.done().result, Ok(Answer::Size(2 << 20)));
}

#[test]
fn a_namespace_formatted_to_another_block_size_is_gone() {
    // What waited in blocks of 512 bytes was sent as no block of 4096: the length underflowed.
    let mut world = World::new(1 << 20, 512);
    let file = world.open();
    world.model.borrow_mut().faults.swallow = 1;
    world.write(1, file, 512, &[5; 512]);
    world.step(1);
    world.model.borrow_mut().block_bytes = 4096;
    let model = world.model.clone();
    model.borrow_mut().notice_namespaces(&mut Memory(&mut world.hv));
    assert_eq!(world.done().result, Err(StoreFault::Gone));
    assert_eq!(world.store.read(&mut world.hv, Tag(1), file, 0, 512), Err(StoreFault::Gone));
}

/// The function goes away and one comes back: whether the file works then.
fn comes_back(world: &mut World, file: FileId) -> bool {
    let (hv, store) = (&mut world.hv, &mut world.store);
    while !store.device_mut(0).0.shut_down(hv, world.now_ns) {
        world.now_ns += MS;
    }
    world.model.borrow_mut().plug_in();
    let mmio = hv.map_mmio(0xFEB0_0000, MMIO_PAGES).unwrap();
    let mut nvme = Nvme::new(hv, mmio).unwrap();
    nvme.succeed(store.device(0));
    let taken = hv.taken;
    store.replace(0, nvme).free(hv);
    assert!(hv.taken < taken, "stopped, so its frames are free");
    for _ in 0..50 {
        world.poll();
        world.step(1);
    }
    world.store.read(&mut world.hv, Tag(1), file, 0, 512).is_ok() && {
        world.done().result.expect("a read");
        true
    }
}

#[test]
fn another_controller_or_namespace_does_not_take_the_place_of_one_in_use() {
    let mut world = World::new(1 << 20, 512);
    let file = world.open();
    assert!(comes_back(&mut world, file));
    world.model.borrow_mut().serial = b'n';
    assert!(!comes_back(&mut world, file));
    assert!(world.nvme().is_another() && world.nvme().is_dead());
    // A third one in its place is compared with the first.
    assert!(!comes_back(&mut world, file));
    world.model.borrow_mut().serial = b'm';
    assert!(comes_back(&mut world, file));
    world.model.borrow_mut().nguid = 2;
    assert!(!comes_back(&mut world, file));
    world.model.borrow_mut().nguid = 1;
    assert!(comes_back(&mut world, file));
}

#[test]
fn queues_of_two_entries_are_enough() {
    // The limit was taken for the admin queue's too, where an event request is always out.
    let mut model = NvmeModel::new(alloc::vec![0; 1 << 20], 512);
    model.entries_max = 2;
    let mut world = World::over(model);
    let file = world.open();
    let bytes = pattern(64 << 10);
    world.write_all(file, 0, &bytes);
    assert!(world.read(file, 0, 64 << 10) == bytes);
    for _ in 0..10 {
        world.poll();
        world.step(100);
    }
    assert_eq!(world.nvme().health().unwrap().media_errors, 7);
}

#[test]
fn an_admin_command_that_fails_means_one_reset_and_no_lost_cache() {
    for steps in 1..6 {
        let mut world = World::new(1 << 20, 512);
        for _ in 0..steps {
            world.poll();
            world.step(1);
        }
        world.model.borrow_mut().faults.fail_admin = 1;
        let file = world.open();
        let counters = world.nvme().counters();
        let losses = Device::<Fake>::losses(world.nvme());
        assert!(counters.resets <= 1 && losses == 0, "{counters:?}");
        assert_eq!(world.flush(file), Ok(Answer::Flushed));
    }
}

#[test]
fn how_soon_to_look_again_follows_what_commands_take() {
    let mut world = World::new(1 << 20, 512);
    let file = world.open();
    let wait_us =
        |world: &World| (Store::<Fake>::poll_at_ns(&world.store).unwrap() - world.now_ns) / 1000;
    let answer_after_us = |world: &mut World, us: u64| {
        world.write(1, file, 0, &[1; 512]);
        world.poll();
        let wait = wait_us(world);
        world.now_ns += us * 1000;
        world.step(0);
        assert!(world.poll().is_some());
        wait
    };
    for _ in 0..50 {
        answer_after_us(&mut world, 80);
    }
    assert!((15..=20).contains(&answer_after_us(&mut world, 80)));
    for _ in 0..50 {
        answer_after_us(&mut world, 10_000);
    }
    assert_eq!(answer_after_us(&mut world, 1), 250);
    for _ in 0..100 {
        answer_after_us(&mut world, 1);
    }
    assert_eq!(answer_after_us(&mut world, 1), 10);
    // After a rest as soon as ever; a command that was swallowed is looked for ever more seldom.
    world.now_ns += SECOND / 10;
    world.model.borrow_mut().faults.swallow = 1;
    assert_eq!(world.write(1, file, 0, &[1; 512]), 512);
    world.poll();
    assert_eq!(wait_us(&world), 10);
    let began_ns = world.now_ns;
    let mut looks = 0;
    while world.nvme().counters().aborts == 0 {
        world.poll();
        world.now_ns = Store::<Fake>::poll_at_ns(&world.store).unwrap();
        world.step(0);
        looks += 1;
    }
    let took_ms = (world.now_ns - began_ns) / MS;
    assert!(looks < 300 && (8000..9000).contains(&took_ms), "{looks} looks in {took_ms} ms");
}

#[test]
fn an_unanswered_minute_does_not_pass_without_a_wake_up() {
    let mut world = World::new(1 << 20, 512);
    world.open();
    assert!(Store::<Fake>::poll_at_ns(&world.store).unwrap() <= world.now_ns + SECOND);
}

/// A configuration space behind pciback's page.
fn probe(space: &mut [u8; 256]) -> Result<Function, PciRefusal> {
    use platter_xen::pciif::{Device, Pciif};
    let mut hv = Fake::new(8);
    let page = hv.frames_alloc(1).unwrap();
    let port = hv.alloc_unbound(platter_xen::DomId(0)).unwrap();
    let mut pciif = Pciif::new(&mut hv, page, port);
    let mut probe = Probe::new(Device { domain: 0, bus: 0, devfn: 0x80 });
    for _ in 0..100 {
        if let Some(result) = probe.poll(&mut hv, &mut pciif, 0) {
            return result;
        }
        let field = |at| hv.load_u32(page, at);
        let (cmd, at, size, value) = (field(4), field(24) as usize, field(28) as usize, field(32));
        let bytes = &mut space[at..at + size];
        if cmd == 1 {
            bytes.copy_from_slice(&value.to_le_bytes()[..size]);
        }
        let mut word = [0; 4];
        word[..size].copy_from_slice(bytes);
        hv.store_u32(page, 32, u32::from_le_bytes(word));
        hv.store_u32(page, 0, 0);
    }
    panic!("no end");
}

/// A 64-bit BAR0 at 0xFE80004000 and an MSI-X capability at 0x40 with its table at `msix`.
fn space(msix: u32) -> [u8; 256] {
    let mut space = [0; 256];
    let mut put = |at: usize, value: u32| space[at..at + 4].copy_from_slice(&value.to_le_bytes());
    put(0x08, 0x0108_0202);
    put(0x10, 0x8000_4004);
    put(0x14, 0xFE);
    put(0x34, 0x50);
    put(0x50, 0x4001);
    put(0x40, 0x0011);
    put(0x44, msix);
    put(0x48, msix + 0x1000);
    space
}

#[test]
fn a_function_behind_pciback_is_found_and_enabled() {
    let mut nvme = space(0x2000);
    let function = probe(&mut nvme).unwrap();
    assert_eq!(function.registers, 0xFE_8000_4000);
    assert_eq!(nvme[4..6], [0x06, 0x04]);
    let mut shared = space(0x1800);
    assert_eq!(probe(&mut shared), Err(PciRefusal::MsixSharesPage));
    assert_eq!(shared[4..6], [0, 0], "nothing was enabled");
    let mut network = space(0x2000);
    network[0x0B] = 2;
    assert_eq!(probe(&mut network), Err(PciRefusal::NotNvme));
    let mut ports = space(0x2000);
    ports[0x10] = 1;
    assert_eq!(probe(&mut ports), Err(PciRefusal::NoRegisters));
    // A list of capabilities that goes round.
    let mut round = space(0x2000);
    round[0x51] = 0x50;
    assert!(probe(&mut round).is_ok());
}

#[test]
fn identify_answers_of_noise_never_panic() {
    let mut noise = 7u32;
    for _ in 0..2000 {
        let bytes: Vec<u8> = (0..4096)
            .map(|_| {
                noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (noise >> 24) as u8 & (noise >> 16) as u8
            })
            .collect();
        let _ = ControllerInfo::parse(&bytes);
        let _ = NamespaceInfo::parse(&bytes);
        let _ = parse_namespace_list(&bytes);
        let _ = ControllerInfo::parse(&bytes[..100]);
        let _ = Health::parse(&bytes[..7]);
    }
    // The largest MDTS: 4096 shifted so far was zero, a limit of no bytes.
    for mdts in 0..=u8::MAX {
        let mut bytes = alloc::vec![0; 4096];
        (bytes[77], bytes[512], bytes[513]) = (mdts, 0x66, 0x44);
        let limit = ControllerInfo::parse(&bytes).unwrap().transfer_bytes_max;
        assert!(limit.is_none_or(|bytes| bytes >= 8192), "{mdts}");
    }
}

#[test]
fn a_controller_for_which_there_are_no_frames_takes_none() {
    let mut world = World::new(1 << 20, 512);
    let mmio = world.hv.map_mmio(0xFEB0_0000, MMIO_PAGES).unwrap();
    let taken = world.hv.taken;
    for left in 0..12 {
        world.hv.frames_max = taken + left;
        assert_eq!(Nvme::new(&mut world.hv, mmio).err(), Some(Unfit::Memory));
        assert_eq!(world.hv.taken, taken, "{left} frames left");
    }
}

#[test]
fn a_controller_that_nobody_uses_is_not_given_up_for_falling_now_and_then() {
    let mut world = World::new(1 << 20, 512);
    world.open();
    for _ in 0..8 {
        world.model.borrow_mut().faults.fatal = true;
        for _ in 0..50 {
            assert_eq!(world.poll(), None);
            world.step(100);
        }
    }
    assert_eq!((world.nvme().is_dead(), world.nvme().counters().resets), (false, 8));
}
