//! The store against a server in memory, honest, slow, dying and lying. Would miss: a real
//! server's timing, and what QEMU does differently from its documentation (the rig finds it).

use std::string::String;
use std::vec;
use std::vec::Vec;

use super::*;
use crate::fake::Fake;
use crate::ninep::stall::STALL_NS;
use crate::ninep::testing::{MODE_DIR, MODE_SYMLINK, Server, World};

const A_BYTES: usize = 1 << 17;

fn world(platter: bool) -> World {
    let mut server = Server::new(platter);
    server.file("a.raw", A_BYTES);
    server.file("b.raw", 4096);
    server.add("dir", MODE_DIR, 0);
    server.file("dir/c.qcow2", 100);
    server.add("link", MODE_SYMLINK, 0);
    server.file("link/d.raw", 100);
    server.add("pipe", 0o010_600, 0);
    World::new(server)
}

fn open(world: &mut World, path: &str) -> Result<Opened, StoreFault> {
    world.client.open(&mut world.hv, Tag(1), path, Access::ReadWrite)?;
    let done = world.poll_all();
    assert_eq!((done.len(), done[0].tag), (1, Tag(1)));
    match done[0].result? {
        Reply::Opened(opened) => Ok(opened),
        other => panic!("{other:?}"),
    }
}

fn read(world: &mut World, tag: u32, file: FileId, offset: u64, len: u32) -> Submit {
    world.client.read(&mut world.hv, Tag(tag), file, offset, len).unwrap()
}

/// Bytes of the next answer, which is a read's.
fn window_bytes(world: &mut World) -> (Tag, Vec<u8>) {
    let done = world.poll().unwrap();
    let Ok(Reply::Read(window)) = done.result else { panic!("{done:?}") };
    let mut bytes = vec![];
    for run in window.runs {
        let start = bytes.len();
        bytes.resize(start + run.len, 0);
        world.hv.read(run.region, run.offset, &mut bytes[start..]);
    }
    (done.tag, bytes)
}

fn write(world: &mut World, tag: u32, file: FileId, offset: u64, bytes: &[u8]) -> Submit {
    let mut fill = |hv: &mut Fake, window: Window| {
        let mut rest = &bytes[..window.len()];
        for run in window.runs {
            let (now, later) = rest.split_at(run.len);
            hv.write(run.region, run.offset, now);
            rest = later;
        }
        true
    };
    let len = bytes.len() as u32;
    world.client.write(&mut world.hv, Tag(tag), file, offset, len, &mut fill).unwrap()
}

fn results(done: Vec<Done>) -> Vec<(u32, Result<Reply, StoreFault>)> {
    let mut results: Vec<_> = done.into_iter().map(|done| (done.tag.0, done.result)).collect();
    results.sort_by_key(|(tag, _)| *tag);
    results
}

#[test]
fn opens_regular_files_only() {
    let mut world = world(false);
    let opened = open(&mut world, "a.raw").unwrap();
    assert_eq!(
        (opened.size_bytes, opened.can_punch, opened.can_grow),
        (A_BYTES as u64, false, true)
    );
    let again = open(&mut world, "a.raw").unwrap();
    assert_eq!(again.identity, opened.identity, "two opens are one file");
    let other = open(&mut world, "dir/c.qcow2").unwrap();
    assert_ne!(other.identity, opened.identity);
    let refusals = [
        ("absent", StoreFault::NotFound),
        ("dir/absent", StoreFault::NotFound),
        ("dir", StoreFault::NotAFile),
        ("link", StoreFault::NotAFile),
        ("link/d.raw", StoreFault::NotAFile),
        ("pipe", StoreFault::NotAFile),
        ("", StoreFault::BadPath),
        ("/a.raw", StoreFault::BadPath),
        ("dir/../a.raw", StoreFault::BadPath),
        ("./a.raw", StoreFault::BadPath),
        ("dir//c.qcow2", StoreFault::BadPath),
        ("a.raw\0", StoreFault::BadPath),
    ];
    for (path, fault) in refusals {
        assert_eq!(open(&mut world, path), Err(fault), "{path}");
    }
    let lopens = world.server.served[&id::TLOPEN];
    assert_eq!(lopens, 3, "what is no file is never opened");
}

#[test]
fn refused_opens_leak_neither_fids_nor_slots() {
    let mut world = world(false);
    for _ in 0..100 {
        for path in ["absent", "dir", "pipe", "dir/absent"] {
            assert!(open(&mut world, path).is_err());
        }
        let opened = open(&mut world, "b.raw").unwrap();
        world.client.close(&mut world.hv, opened.file);
        assert_eq!(world.poll_all(), []);
    }
    assert!(world.client.files.len() <= 2);
    assert!(world.client.files.iter().all(Option::is_none));
}

#[test]
fn paths_deeper_than_one_walk() {
    for depth in [16, 17, 33, 64] {
        let mut server = Server::new(false);
        let mut path = String::new();
        for level in 1..depth {
            path.push('d');
            server.add(&path, MODE_DIR, 0);
            path.push('/');
            if level == depth - 1 {
                path.push('f');
                server.file(&path, 7);
            }
        }
        let mut world = World::new(server);
        assert_eq!(open(&mut world, &path).unwrap().size_bytes, 7, "{depth}");
        path.push('x');
        assert_eq!(open(&mut world, &path), Err(StoreFault::NotFound));
    }
    let mut world = world(false);
    let deep = ["d"; 65].join("/");
    assert_eq!(open(&mut world, &deep), Err(StoreFault::BadPath));
}

#[test]
fn bytes_written_are_bytes_read_wherever_the_ring_wraps() {
    for platter in [false, true] {
        let mut world = world(platter);
        let file = open(&mut world, "a.raw").unwrap().file;
        for lap in 0..200u64 {
            let bytes: Vec<u8> = (0..3584).map(|i| (i as u64 * 31 + lap) as u8).collect();
            assert_eq!(write(&mut world, 5, file, lap * 512, &bytes), Submit::Taken(3584));
            assert_eq!(results(world.poll_all()), [(5, Ok(Reply::Written(3584)))]);
            assert_eq!(read(&mut world, 6, file, lap * 512, 3584), Submit::Taken(3584));
            world.serve();
            assert_eq!(window_bytes(&mut world), (Tag(6), bytes));
            assert_eq!(world.poll(), None);
        }
    }
}

#[test]
fn a_plain_server_gets_one_request_on_every_ring() {
    let mut world = world(false);
    let file = open(&mut world, "a.raw").unwrap().file;
    for tag in 0..8 {
        assert_eq!(read(&mut world, tag, file, 0, 4096), Submit::Taken(4096));
    }
    assert_eq!(read(&mut world, 8, file, 0, 4096), Submit::NoRoom);
    assert_eq!(world.client.flush(&mut world.hv, Tag(9), file), Ok(Submit::NoRoom));
    assert_eq!(world.poll_all().len(), 8);
    assert_eq!(world.server.rings_used, [true; 8]);
    assert!(matches!(read(&mut world, 8, file, 0, 4096), Submit::Taken(_)));
}

#[test]
fn platters_server_gets_many_and_the_answers_always_fit() {
    let mut world = world(true);
    let file = open(&mut world, "a.raw").unwrap().file;
    assert!(file.0 == 0 && world.client.extended);
    for lap in 0..20 {
        let mut taken = 0;
        while read(&mut world, taken, file, u64::from(taken) * 512, 3000) != Submit::NoRoom {
            taken += 1;
            assert!(taken <= 128);
        }
        // 16 KiB hold five answers of 3 KiB on each ring.
        assert_eq!(taken, 40, "lap {lap}");
        let answers = results(world.poll_all());
        assert_eq!(answers.len(), 40);
        assert!((0..40).eq(answers.iter().map(|(tag, _)| *tag)));
    }
}

#[test]
fn small_requests_reach_the_depth_of_platters_server() {
    let mut world = world(true);
    let file = open(&mut world, "a.raw").unwrap().file;
    let mut taken = 0;
    while read(&mut world, taken, file, 0, 512) != Submit::NoRoom {
        taken += 1;
    }
    assert_eq!(taken, 128);
    assert_eq!(world.poll_all().len(), 128);
}

#[test]
fn long_requests_are_cut_and_short_answers_reported() {
    let mut world = world(false);
    let io_max = Store::<Fake>::io_bytes_max(&world.client);
    assert_eq!(io_max, 12288, "16 KiB less a Twrite's head, in whole pages");
    let file = open(&mut world, "a.raw").unwrap().file;
    assert_eq!(read(&mut world, 1, file, 0, 1 << 20), Submit::Taken(io_max));
    world.poll_all();
    assert_eq!(write(&mut world, 2, file, 0, &[1; 1 << 16]), Submit::Taken(io_max));
    assert_eq!(results(world.poll_all()), [(2, Ok(Reply::Written(io_max)))]);
    world.server.faults.io_max = Some(700);
    write(&mut world, 3, file, 0, &[1; 4096]);
    assert_eq!(results(world.poll_all()), [(3, Ok(Reply::Written(700)))]);
    read(&mut world, 4, file, 0, 4096);
    world.serve();
    assert_eq!(window_bytes(&mut world).1.len(), 700);
    read(&mut world, 5, file, 2 << 20, 4096);
    world.serve();
    assert_eq!(window_bytes(&mut world).1, [], "beyond the end");
}

#[test]
fn a_fill_that_declines_sends_nothing() {
    let mut world = world(false);
    let file = open(&mut world, "a.raw").unwrap().file;
    let submit = world.client.write(&mut world.hv, Tag(1), file, 0, 512, &mut |_, _| false);
    assert_eq!(submit, Ok(Submit::Taken(0)));
    assert_eq!(world.poll_all(), []);
    assert!(!world.server.served.contains_key(&id::TWRITE));
    assert_eq!(write(&mut world, 2, file, 0, &[9; 512]), Submit::Taken(512));
    assert_eq!(results(world.poll_all()), [(2, Ok(Reply::Written(512)))]);
}

#[test]
fn flush_size_and_punch() {
    let mut world = world(true);
    let file = open(&mut world, "a.raw").unwrap().file;
    world.client.flush(&mut world.hv, Tag(1), file).unwrap();
    world.client.size(&mut world.hv, Tag(2), file).unwrap();
    world.client.punch(&mut world.hv, Tag(3), file, 512, 1024).unwrap();
    let wanted =
        [(1, Ok(Reply::Flushed)), (2, Ok(Reply::Size(A_BYTES as u64))), (3, Ok(Reply::Punched))];
    assert_eq!(results(world.poll_all()), wanted);
    assert_eq!(world.server.nodes["a.raw"].bytes[512..1536], [0; 1024]);
    let mut plain = self::world(false);
    let file = open(&mut plain, "a.raw").unwrap().file;
    let punch = plain.client.punch(&mut plain.hv, Tag(1), file, 0, 512);
    assert_eq!(punch, Err(StoreFault::Unsupported));
}

#[test]
fn a_size_that_no_file_has_is_refused() {
    // The image engine counted 2^55 sectors in it, one more than a range may end at.
    let mut world = world(false);
    world.server.faults.size = Some(u64::MAX);
    assert_eq!(open(&mut world, "a.raw"), Err(OVERSIZE));
    world.server.faults.size = Some(i64::MAX as u64);
    let opened = open(&mut world, "a.raw").unwrap();
    assert_eq!(opened.size_bytes, i64::MAX as u64);
    world.server.faults.size = Some(1 << 63);
    world.client.size(&mut world.hv, Tag(2), opened.file).unwrap();
    assert_eq!(results(world.poll_all()), [(2, Err(OVERSIZE))]);
}

#[test]
fn errors_are_the_operations_own() {
    let mut world = world(false);
    let file = open(&mut world, "a.raw").unwrap().file;
    let errors = [
        (28, StoreFault::NoSpace),
        (5, StoreFault::Io(5)),
        (30, StoreFault::ReadOnly),
        (13, StoreFault::Permission),
    ];
    for (ecode, fault) in errors {
        world.server.faults.io_error = Some(ecode);
        write(&mut world, 1, file, 0, &[1; 512]);
        world.client.flush(&mut world.hv, Tag(2), file).unwrap();
        assert_eq!(results(world.poll_all()), [(1, Err(fault)), (2, Err(fault))]);
    }
    assert_eq!(world.client.session(), Session::Up);
}

#[test]
fn a_close_waits_for_what_is_outstanding() {
    let mut world = world(false);
    let file = open(&mut world, "a.raw").unwrap().file;
    read(&mut world, 1, file, 0, 512);
    world.client.close(&mut world.hv, file);
    assert!(!world.server.served.contains_key(&id::TCLUNK));
    assert_eq!(world.poll_all().len(), 1);
    assert_eq!(world.server.served[&id::TCLUNK], 1);
    assert!(world.client.files.iter().all(Option::is_none));
}

#[test]
fn room_that_no_answer_tells_of_is_told_of_once() {
    let mut world = world(false);
    let (a, b) = (open(&mut world, "a.raw").unwrap().file, open(&mut world, "b.raw").unwrap().file);
    let made_room = |world: &mut World| Store::<Fake>::made_room(&mut world.client);
    made_room(&mut world);
    assert_eq!(read(&mut world, 1, a, 0, 4096), Submit::Taken(4096));
    world.poll_all();
    assert!(!made_room(&mut world), "the answer told");
    world.client.close(&mut world.hv, b);
    assert!(!made_room(&mut world), "nothing has ended yet");
    assert_eq!(world.poll_all(), []);
    assert!(made_room(&mut world));
    assert!(!made_room(&mut world));
    world.server.die();
    world.step();
    assert!(made_room(&mut world), "operations are refused now, for which there was no room");
}

#[test]
fn death_answers_everything_once_and_files_come_back() {
    for platter in [false, true] {
        let mut world = world(platter);
        let a = open(&mut world, "a.raw").unwrap().file;
        let b = open(&mut world, "b.raw").unwrap().file;
        let closed = open(&mut world, "dir/c.qcow2").unwrap().file;
        for tag in 0..3 {
            read(&mut world, tag, a, 0, 512);
        }
        write(&mut world, 3, b, 0, &[1; 512]);
        let opening = world.client.open(&mut world.hv, Tag(4), "a.raw", Access::ReadOnly);
        opening.unwrap();
        world.server.die();
        world.step();
        assert_eq!(world.client.session(), Session::Down);
        let wanted: Vec<_> = (0..5).map(|tag| (tag, Err(StoreFault::Gone))).collect();
        assert_eq!(results(world.poll_all()), wanted);
        let refused = world.client.read(&mut world.hv, Tag(9), a, 0, 512);
        assert_eq!(refused, Err(StoreFault::Gone));
        world.client.close(&mut world.hv, closed);
        let frames = world.hv.frames_left();
        world.server.return_();
        world.handshake();
        assert_eq!(world.poll_all(), []);
        assert_eq!(world.client.session(), Session::Up);
        assert_eq!(world.hv.frames_left(), frames, "the same rings");
        world.server.nodes.get_mut("a.raw").unwrap().bytes[0] = 77;
        read(&mut world, 1, a, 0, 1);
        read(&mut world, 2, b, 0, 512);
        assert_eq!(world.poll_all().len(), 2);
        read(&mut world, 1, a, 0, 1);
        world.serve();
        assert_eq!(window_bytes(&mut world).1, [77]);
    }
}

#[test]
fn a_file_replaced_while_the_server_was_away_is_refused() {
    let mut world = world(false);
    let a = open(&mut world, "a.raw").unwrap().file;
    let b = open(&mut world, "b.raw").unwrap().file;
    world.server.die();
    world.step();
    world.poll_all();
    world.server.nodes.get_mut("a.raw").unwrap().qid_path = 999;
    world.server.nodes.remove("b.raw");
    world.server.return_();
    world.handshake();
    assert_eq!(world.poll_all(), []);
    let refused = world.client.read(&mut world.hv, Tag(1), a, 0, 512);
    assert!(matches!(refused, Err(StoreFault::Refused(_))));
    let refused = world.client.read(&mut world.hv, Tag(1), b, 0, 512);
    assert_eq!(refused, Err(StoreFault::NotFound));
    // Closing them gives the fids back, so that the slots serve others.
    world.client.close(&mut world.hv, a);
    world.client.close(&mut world.hv, b);
    assert_eq!(world.poll_all(), []);
    world.server.file("d.raw", 5);
    assert_eq!(open(&mut world, "d.raw").unwrap().size_bytes, 5);
    assert_eq!(open(&mut world, "a.raw").unwrap().size_bytes, A_BYTES as u64);
}

#[test]
fn an_answer_that_does_not_end_is_given_up_though_others_come() {
    let mut world = world(true);
    let file = open(&mut world, "a.raw").unwrap().file;
    world.server.faults.withheld = 4;
    world.client.lane_next = 0;
    read(&mut world, 1, file, 0, 512);
    world.client.push(&mut world.hv);
    world.serve();
    world.server.faults.withheld = 0;
    for second in 0..=30 {
        assert_eq!(world.poll(), None, "{second}");
        world.client.lane_next = 1;
        read(&mut world, 2, file, 0, 512);
        world.client.push(&mut world.hv);
        world.serve();
        assert_eq!(world.poll().map(|done| (done.tag, done.result.is_ok())), Some((Tag(2), true)));
        world.now_ns += STALL_NS / 30;
    }
    let gone = Done { tag: Tag(1), result: Err(StoreFault::Gone) };
    assert_eq!(world.poll(), Some(gone));
}

#[test]
fn an_answer_longer_than_it_may_be_is_not_waited_for() {
    let mut world = world(true);
    let file = open(&mut world, "a.raw").unwrap().file;
    world.server.faults.promised = 16;
    read(&mut world, 1, file, 0, 512);
    world.client.push(&mut world.hv);
    world.serve();
    let gone = Done { tag: Tag(1), result: Err(StoreFault::Gone) };
    assert_eq!(world.poll(), Some(gone));
}

#[test]
fn a_silent_server_is_declared_dead_and_tried_again() {
    let mut world = world(false);
    let file = open(&mut world, "a.raw").unwrap().file;
    world.server.faults.deaf = true;
    world.now_ns += 100 * STALL_NS;
    read(&mut world, 1, file, 0, 512);
    assert_eq!(world.poll(), None, "silence while nothing is asked is no death");
    world.serve();
    world.now_ns += STALL_NS;
    assert_eq!(world.poll(), None);
    world.now_ns += 1;
    let gone = Done { tag: Tag(1), result: Err(StoreFault::Gone) };
    assert_eq!(world.poll(), Some(gone));
    assert_eq!(world.poll(), None);
    assert!(matches!(world.client.session(), Session::Broken(_)));
    world.server.faults.deaf = false;
    world.handshake();
    assert_eq!(world.poll_all(), []);
    assert!(matches!(read(&mut world, 2, file, 0, 512), Submit::Taken(_)));
    assert_eq!(world.poll_all().len(), 1);
}

#[test]
fn a_server_that_forgot_our_fids_is_another_server() {
    let mut world = world(false);
    let file = open(&mut world, "a.raw").unwrap().file;
    world.server.faults.io_error = Some(9);
    read(&mut world, 1, file, 0, 512);
    assert_eq!(results(world.poll_all()), [(1, Err(StoreFault::Gone))]);
    world.server.faults.io_error = None;
    world.handshake();
    assert_eq!(world.poll_all(), []);
    read(&mut world, 2, file, 0, 512);
    assert_eq!(world.poll_all().len(), 1);
}

#[test]
fn answers_that_no_server_may_give_end_the_session() {
    for fault in 0..2 {
        let mut world = world(false);
        let file = open(&mut world, "a.raw").unwrap().file;
        match fault {
            0 => world.server.faults.read_extra = 1,
            _ => world.server.faults.wrong_ring = true,
        }
        read(&mut world, 1, file, 0, 512);
        assert_eq!(results(world.poll_all()), [(1, Err(StoreFault::Gone))]);
        assert!(matches!(world.client.session(), Session::Broken(_)));
    }
}

#[test]
fn a_reads_bytes_stay_on_the_ring_until_the_next_poll() {
    let mut world = world(false);
    let file = open(&mut world, "a.raw").unwrap().file;
    read(&mut world, 1, file, 0, 512);
    world.serve();
    window_bytes(&mut world);
    assert_eq!(world.answers_held(), 11 + 512);
    assert_eq!(world.poll(), None);
    assert_eq!(world.answers_held(), 0);
}

#[test]
fn a_deleted_file_disturbs_no_other() {
    let mut world = world(false);
    let file = open(&mut world, "a.raw").unwrap().file;
    world.server.faults.getattr_error = Some(2);
    world.client.size(&mut world.hv, Tag(1), file).unwrap();
    assert_eq!(results(world.poll_all()), [(1, Err(StoreFault::NotFound))]);
    assert_eq!(world.client.session(), Session::Up);
}

#[test]
fn versions_that_do_not_do() {
    let mut server = Server::new(false);
    server.msize_max = 4000;
    let mut world = World::unmounted(server, 72);
    world.handshake();
    world.poll_all();
    assert!(matches!(world.client.session(), Session::Broken(_)));
    let refused = world.client.open(&mut world.hv, Tag(1), "a", Access::ReadOnly);
    assert_eq!(refused, Err(StoreFault::Gone));
}

/// Drives reads, writes, flushes, opens and closes while answers are garbled.
fn garbled_run(seed: u32) {
    let mut world = world(seed.is_multiple_of(2));
    let mut file = open(&mut world, "a.raw").ok();
    world.server.faults.garble = Some(seed | 1);
    let mut open_tags = vec![];
    for tag in 0..60 {
        if let Some(opened) = file.filter(|_| world.client.session() == Session::Up) {
            let (hv, client) = (&mut world.hv, &mut world.client);
            let submit = match tag % 4 {
                0 => client.read(hv, Tag(tag), opened.file, 0, 4096),
                1 => client.flush(hv, Tag(tag), opened.file),
                2 => client.size(hv, Tag(tag), opened.file),
                _ => client.write(hv, Tag(tag), opened.file, 0, 512, &mut |_, _| true),
            };
            if matches!(submit, Ok(Submit::Taken(_))) {
                open_tags.push(tag);
            }
        } else if file.is_none()
            && world.client.open(&mut world.hv, Tag(tag), "b.raw", Access::ReadOnly).is_ok()
        {
            open_tags.push(tag);
        }
        for done in world.poll_all() {
            let at = open_tags.iter().position(|tag| *tag == done.tag.0);
            open_tags.remove(at.expect("answered once"));
            if let Ok(Reply::Opened(opened)) = done.result {
                file = Some(opened);
            }
        }
        world.handshake();
    }
    world.server.faults.garble = None;
    world.now_ns += 2 * STALL_NS;
    let done = world.poll_all().len() + {
        world.now_ns += 2 * STALL_NS;
        world.poll_all().len()
    };
    assert_eq!(done, open_tags.len(), "every operation is answered");
}

#[test]
fn garbled_answers_never_panic_nor_lose_an_operation() {
    for seed in 1..200 {
        garbled_run(seed * 7919);
    }
}

const SPARSE_BYTES: u64 = 8 << 20;

/// A file with data in one place, 64 KiB at 1 MiB.
fn sparse_world(platter: bool) -> (World, FileId) {
    let mut server = Server::new(platter);
    server.file("sparse.raw", 0);
    let bytes = &mut server.nodes.get_mut("sparse.raw").unwrap().bytes;
    bytes.resize(SPARSE_BYTES as usize, 0);
    bytes[1 << 20..(1 << 20) + (64 << 10)].fill(7);
    let mut world = World::new(server);
    let file = open(&mut world, "sparse.raw").unwrap().file;
    (world, file)
}

/// Reads 4 KiB; an answer without bytes stands for zeros.
fn read_page(world: &mut World, file: FileId, offset: u64) -> Vec<u8> {
    assert_eq!(read(world, 9, file, offset, 4096), Submit::Taken(4096));
    world.serve();
    loop {
        let Some(done) = world.poll() else {
            world.serve();
            continue;
        };
        let Ok(Reply::Read(window)) = done.result else { panic!("{done:?}") };
        let mut bytes = vec![0; 4096];
        let mut rest = &mut bytes[..];
        for run in window.runs {
            let (now, later) = rest.split_at_mut(run.len);
            world.hv.read(run.region, run.offset, now);
            rest = later;
        }
        return bytes;
    }
}

/// Reads all of the file in sequence; messages that it took.
fn read_through(world: &mut World, file: FileId) -> u32 {
    let messages = |world: &World| {
        let served = |id| world.server.served.get(id).copied().unwrap_or(0);
        served(&id::TREAD) + served(&id::TEXTENTS)
    };
    let before = messages(world);
    for offset in (0..SPARSE_BYTES).step_by(4096) {
        let expected = world.server.nodes["sparse.raw"].bytes[offset as usize];
        assert!(read_page(world, file, offset) == vec![expected; 4096], "{offset}");
    }
    messages(world) - before
}

#[test]
fn what_nobody_wrote_costs_no_message() {
    let (mut world, file) = sparse_world(true);
    let count = read_through(&mut world, file);
    assert!(count < 16 + 4, "{count} messages for 16 pages of data");
    // What is written in a hole is read back, whatever was known.
    let page = vec![3; 4096];
    assert_eq!(write(&mut world, 5, file, 4 << 20, &page), Submit::Taken(4096));
    let before = world.server.served[&id::TREAD];
    assert_eq!(read(&mut world, 6, file, 6 << 20, 4096), Submit::Taken(4096));
    assert_eq!(world.client.poll(&mut world.hv, 0).map(|done| done.tag), Some(Tag(6)), "at once");
    assert_eq!(results(world.poll_all()), [(5, Ok(Reply::Written(4096)))]);
    assert!(read_page(&mut world, file, 4 << 20) == page);
    assert_eq!(world.server.served[&id::TREAD], before + 1);
    // A new server ends what was known.
    world.server.die();
    world.handshake();
    world.server.return_();
    world.handshake();
    world.poll_all();
    let before = world.server.served[&id::TREAD];
    read_page(&mut world, file, 6 << 20);
    assert_eq!(world.server.served[&id::TREAD], before + 1);
}

#[test]
fn holes_are_asked_for_only_where_we_alone_write() {
    // A plain server does not know; another answers that somebody else writes the file.
    let (mut world, file) = sparse_world(false);
    assert_eq!(read_through(&mut world, file), 2048);
    let (mut world, file) = sparse_world(true);
    world.server.faults.extents_error = Some(16);
    assert_eq!(read_through(&mut world, file), 2048 + 1);
    // A file that is opened to be read may be written by anyone.
    let (mut world, _) = sparse_world(true);
    world.client.open(&mut world.hv, Tag(1), "sparse.raw", Access::ReadOnly).unwrap();
    let Ok(Reply::Opened(opened)) = world.poll_all()[0].result else { panic!("not opened") };
    assert_eq!(read_through(&mut world, opened.file), 2048);
}
