//! Order and bounds of what is under way, and bytes over the edges of rings.
//! Would miss: races of workers with a frontend's thread; tests are their own workers here.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use platter_storage::ninep::message::{Request, VERSION_PLAIN, VERSION_PLATTER, open};

use super::*;
use crate::frontend::Frontend;
use crate::share::Policy;

struct World {
    directory: PathBuf,
    serving: Serving,
    workers: Workers,
    fronts: Vec<Frontend>,
}

impl World {
    /// Two rings of this order, and fid 1 open on a file of 64 KiB.
    fn new(order: u32) -> World {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("platter-9pfsd-serving-{}-{number}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&directory).expect("a directory");
        std::fs::write(directory.join("file"), [0; 65536]).expect("a file");
        let workers = Workers::absent(4);
        let (fronts, serving) = connect(&directory, &workers, order);
        let mut world = World { directory, serving, workers, fronts };
        world.open();
        world
    }

    /// The frontend comes again; its last connection, which has not ended.
    fn reconnect(&mut self, order: u32) -> Serving {
        let (fronts, serving) = connect(&self.directory, &self.workers, order);
        self.fronts = fronts;
        let last = std::mem::replace(&mut self.serving, serving);
        self.open();
        last
    }

    fn open(&mut self) {
        let world = self;
        world.must(&Request::Version { msize: 1 << 20, version: VERSION_PLATTER });
        let (uname, aname) = ("", "");
        world.must(&Request::Attach { fid: 0, afid: u32::MAX, uname, aname, n_uname: 0 });
        let names = ["file"].into_iter().collect();
        world.must(&Request::Walk { fid: 0, newfid: 1, names });
        world.must(&Request::Lopen { fid: 1, flags: open::READ_WRITE });
    }

    fn must(&mut self, request: &Request) {
        self.fronts[0].ask(0, request, &[]);
        self.turn();
        assert_eq!(self.answers(0), [(request.id() + 1, 0)], "{request:?}");
    }

    fn turn(&mut self) -> bool {
        self.serving.turn().expect("a sound ring")
    }

    /// Numbers and tags of the answers on a ring.
    fn answers(&mut self, ring: usize) -> Vec<(u8, u16)> {
        let front = &mut self.fronts[ring];
        std::iter::from_fn(|| front.take(&mut [])).map(|(head, _)| (head.id, head.tag)).collect()
    }
}

fn connect(directory: &Path, workers: &Workers, order: u32) -> (Vec<Frontend>, Serving) {
    let share = Share::open(directory, Policy::default()).expect("a share");
    let pair = |port| Frontend::pair(order, port).expect("a ring");
    let (fronts, rings) = (0..2).map(pair).unzip();
    let mailbox = Arc::new(Mailbox::new().expect("a mailbox"));
    (fronts, Serving::new(rings, share, workers.clone(), mailbox))
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

const SYNC: Request = Request::Fsync { fid: 1, datasync: 0 };

#[test]
fn a_flush_is_answered_after_what_it_flushes() {
    let mut world = World::new(4);
    world.fronts[0].ask(5, &SYNC, &[]);
    world.fronts[1].ask(6, &Request::Flush { oldtag: 5 }, &[]);
    world.fronts[1].ask(7, &Request::Flush { oldtag: 99 }, &[]);
    world.turn();
    assert!(world.answers(0).is_empty());
    assert_eq!(world.answers(1), [(id::TFLUSH + 1, 7)], "nothing has this tag");
    assert!(world.workers.work_once());
    world.turn();
    assert_eq!(world.answers(0), [(id::TFSYNC + 1, 5)]);
    assert_eq!(world.answers(1), [(id::TFLUSH + 1, 6)]);
}

#[test]
fn a_flush_is_answered_after_what_still_lies_unread_in_another_ring() {
    let mut world = World::new(6);
    for _ in 0..TURN_REQUESTS {
        world.fronts[1].ask(1, &Request::Clunk { fid: 77 }, &[]);
    }
    world.fronts[1].ask(5, &Request::Read { fid: 1, offset: 0, count: 10 }, &[]);
    world.fronts[0].ask(6, &Request::Flush { oldtag: 5 }, &[]);
    world.serving.first = 0;
    world.turn();
    let read = (id::TREAD + 1, 5);
    assert!(!world.answers(1).contains(&read));
    assert!(world.answers(0).is_empty(), "its tag would be used again");
    world.turn();
    assert_eq!((world.answers(1), world.answers(0)), (vec![read], vec![(id::TFLUSH + 1, 6)]));
}

#[test]
fn flushes_do_not_wait_for_each_other() {
    let mut world = World::new(6);
    let version = Request::Version { msize: 8192, version: VERSION_PLAIN };
    for ends_with_version in [false, true] {
        for (ring, tag) in (0..2).flat_map(|ring| (0..100).map(move |tag| (ring, tag))) {
            world.fronts[ring].ask(tag, &Request::Flush { oldtag: 99 - tag }, &[]);
        }
        if ends_with_version {
            // What it waits for lies behind the other.
            (0..2).for_each(|ring| world.fronts[ring].ask(0xffff, &version, &[]));
        }
        while world.turn() {}
        let count = 100 + usize::from(ends_with_version);
        assert_eq!((world.answers(0).len(), world.answers(1).len()), (count, count));
    }
    assert!(world.serving.flushes.is_empty());
}

#[test]
fn who_has_more_flushes_than_can_wait_waits_or_goes() {
    let mut world = World::new(6);
    world.fronts[0].ask(5, &SYNC, &[]);
    for tag in 0..=FLUSHES_MAX as u16 {
        world.fronts[1].ask(100 + tag, &Request::Flush { oldtag: 5 }, &[]);
    }
    while world.turn() {}
    assert_eq!(world.serving.flushes.len(), FLUSHES_MAX);
    while world.workers.work_once() || world.turn() {}
    assert_eq!(world.answers(1).len(), FLUSHES_MAX + 1);
    // Half a request that never becomes whole: nothing will end.
    world.fronts[0].put(&[9, 0]);
    for tag in 0..=FLUSHES_MAX as u16 {
        world.fronts[1].ask(100 + tag, &Request::Flush { oldtag: 5 }, &[]);
    }
    let fault = std::iter::repeat_with(|| world.serving.turn()).find_map(Result::err);
    assert!(matches!(fault, Some(Fault::Flushes)), "{fault:?}");
}

#[test]
fn a_read_waits_for_room_for_its_answer() {
    let mut world = World::new(1);
    let read = Request::Read { fid: 1, offset: 0, count: 2000 };
    // Two answers fill the ring.
    for tag in 1..4 {
        world.fronts[0].ask(tag, &read, &[]);
    }
    world.turn();
    assert!(world.serving.waits_for_room());
    world.fronts[1].ask(9, &Request::Flush { oldtag: 2 }, &[]);
    world.turn();
    assert!(world.answers(1).is_empty(), "what is unread might be another 2");
    assert_eq!(world.answers(0), [(id::TREAD + 1, 1), (id::TREAD + 1, 2)]);
    world.turn();
    assert_eq!(world.answers(0), [(id::TREAD + 1, 3)]);
    assert_eq!(world.answers(1), [(id::TFLUSH + 1, 9)]);
    assert!(!world.serving.waits_for_room());
}

#[test]
fn a_new_session_begins_when_the_old_one_is_done() {
    let mut world = World::new(4);
    world.fronts[0].ask(5, &SYNC, &[]);
    world.fronts[1].ask(0xffff, &Request::Version { msize: 8192, version: VERSION_PLAIN }, &[]);
    world.turn();
    assert!(world.answers(0).is_empty() && world.answers(1).is_empty());
    world.workers.work_once();
    world.turn();
    assert_eq!(world.answers(0), [(id::TFSYNC + 1, 5)]);
    assert_eq!(world.answers(1), [(id::TVERSION + 1, 0xffff)]);
    // Its fids are gone.
    world.fronts[0].ask(1, &SYNC, &[]);
    world.turn();
    assert_eq!(world.answers(0), [(id::RLERROR, 1)]);
}

/// A worker hangs while its frontend connects again.
#[test]
fn a_connection_ends_when_nothing_of_it_can_reach_a_file() {
    let mut world = World::new(4);
    for (tag, byte) in [(1, 1), (2, 2)] {
        world.serving.patience = Patience::exhausted();
        let write = Request::Write { fid: 1, offset: u64::from(tag) * 4096, count: 4096 };
        world.fronts[0].ask(tag, &write, &[byte; 4096]);
        world.turn();
    }
    let hanging = world.workers.begin().expect("a write");
    let last = world.reconnect(4);
    let ending = std::thread::spawn(move || drop(last));
    std::thread::sleep(Duration::from_millis(100));
    assert!(!ending.is_finished(), "a worker has one of its writes");
    hanging();
    ending.join().expect("it ends");
    assert!(!world.workers.work_once(), "what nobody had begun is forgotten");
    let bytes = std::fs::read(world.directory.join("file")).expect("it");
    assert_eq!([4096, 8192].map(|at: usize| bytes[at]), [1, 0]);
    // The next connection has its turn as ever.
    world.fronts[0].ask(5, &SYNC, &[]);
    world.turn();
    assert!(world.workers.work_once());
    world.turn();
    assert_eq!(world.answers(0), [(id::TFSYNC + 1, 5)]);
}

#[test]
fn what_is_under_way_is_bounded() {
    let mut world = World::new(4);
    let bound = PLATTER_IN_FLIGHT as u16;
    for tag in 0..bound + 4 {
        world.fronts[0].ask(tag, &SYNC, &[]);
    }
    // Flushes wait elsewhere.
    for tag in 100..100 + bound + 4 {
        world.fronts[1].ask(tag, &Request::Flush { oldtag: 0 }, &[]);
    }
    while world.turn() {}
    assert_eq!(
        (world.serving.flights.len(), world.serving.flushes.len()),
        (bound.into(), usize::from(bound) + 4)
    );
    while world.workers.work_once() || world.turn() {}
    assert_eq!(world.answers(0).len(), usize::from(bound) + 4);
    assert_eq!(world.answers(1).len(), usize::from(bound) + 4);
}

#[test]
fn the_frontend_is_told_once_for_many_answers() {
    let mut world = World::new(4);
    let bells = |world: &mut World| world.serving.bells().collect::<Vec<_>>();
    bells(&mut world);
    for ring in 0..2 {
        for tag in 0..4 {
            world.fronts[ring].ask(tag, &Request::Clunk { fid: 77 }, &[]);
        }
    }
    world.turn();
    assert_eq!(bells(&mut world), [0], "platter looks at all its rings");
    assert!(bells(&mut world).is_empty());
    world.answers(0);
    world.fronts[0].ask(0, &Request::Version { msize: 8192, version: VERSION_PLAIN }, &[]);
    world.fronts[1].ask(1, &Request::Clunk { fid: 77 }, &[]);
    world.turn();
    assert_eq!(bells(&mut world), [0, 1], "others may not");
}

#[test]
fn the_frontend_is_told_of_many_bytes_before_others_are_moved() {
    let mut world = World::new(8);
    let read = Request::Read { fid: 1, offset: 0, count: 65536 };
    for (ring, tag) in (0..2).flat_map(|ring| (0..7).map(move |tag| (ring, tag))) {
        world.fronts[ring].ask(tag, &read, &[]);
    }
    // Of both rings together, and each is first in its turn.
    for (of_first, of_second) in [(4, 0), (0, 4), (3, 1), (0, 2)] {
        assert!(world.turn());
        assert_eq!(world.serving.bells().count(), 1);
        assert_eq!((world.answers(0).len(), world.answers(1).len()), (of_first, of_second));
    }
    assert!(!world.turn());
}

#[test]
fn a_read_that_ends_with_the_file_needs_no_worker() {
    let mut world = World::new(4);
    for (tag, offset) in [(1, 65530), (2, 65536), (3, 1 << 40)] {
        world.fronts[0].ask(tag, &Request::Read { fid: 1, offset, count: 100 }, &[]);
    }
    world.turn();
    let (mut into, mut counts) = ([0; 4], vec![]);
    while world.fronts[0].take(&mut into).is_some() {
        counts.push(u32::from_le_bytes(into));
    }
    assert_eq!(counts, [6, 0, 0]);
}

/// Reads and writes of all sizes, at once and by workers, against a model of the file.
#[test]
fn bytes_are_the_same_on_both_sides() {
    let mut world = World::new(2);
    let mut model = vec![0u8; 65536];
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % below
    };
    let mut into = vec![0; 8192];
    for round in 0..5000u64 {
        let count = 1 + random(7000) as u32;
        let offset = random(65536 - u64::from(count));
        let ring = random(2) as usize;
        let range = offset as usize..offset as usize + count as usize;
        let is_write = random(2) == 0;
        let data: Vec<u8> = (0..count).map(|at| (u64::from(at) * 7 + round) as u8).collect();
        if is_write {
            model[range.clone()].copy_from_slice(&data);
            world.fronts[ring].ask(1, &Request::Write { fid: 1, offset, count }, &data);
        } else {
            world.fronts[ring].ask(1, &Request::Read { fid: 1, offset, count }, &[]);
        }
        if random(4) == 0 {
            world.serving.patience = Patience::exhausted();
        }
        let (head, len) = loop {
            world.turn();
            world.workers.work_once();
            if let Some(answer) = world.fronts[ring].take(&mut into) {
                break answer;
            }
        };
        assert_eq!(into[..4], count.to_le_bytes(), "round {round}");
        if is_write {
            assert_eq!((head.id, len), (id::TWRITE + 1, 4));
        } else {
            assert_eq!((head.id, len), (id::TREAD + 1, 4 + count as usize));
            assert!(into[4..len] == model[range], "round {round}");
        }
    }
    assert!(std::fs::read(world.directory.join("file")).expect("it") == model);
}
