//! What a request costs in calls to the hypervisor: on any machine the larger part of platter's
//! own time, and here the same in every run. `--nocapture` prints the table. Would miss: what
//! the calls themselves cost, and what is computed between them.

use platter_image::Format;
use platter_sim::guest::Habits;
use platter_sim::oracle::Oracle;
use platter_sim::toolstack::Carrier;
use platter_sim::world::{S, World};

/// Message numbers of 9P2000.
const TREAD: u8 = 116;
const TWRITE: u8 = 118;

const MS: u64 = 1_000_000;
const REQUESTS: u64 = 1000;
const SECTORS: u64 = 8192;

/// What a load does to a raw image. Reads of an empty one are reads of holes, of which the server
/// has told: they cost no message to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Work {
    Holes,
    Reads,
    Writes,
}

/// A load over platter-9pfsd's dialect, and the bounds on what 100 requests of it cost.
struct Row {
    work: Work,
    pages: usize,
    depth: usize,
    /// Grant copy hypercalls.
    copies: u64,
    notifies: u64,
    sleeps: u64,
    turns: u64,
}

const fn row(work: Work, pages: usize, depth: usize, bounds: [u64; 4]) -> Row {
    let [copies, notifies, sleeps, turns] = bounds;
    Row { work, pages, depth, copies, notifies, sleeps, turns }
}

/// Before copies and events were gathered by turns a request of 4 KiB cost one copy call and one
/// event, one of 64 KiB two and one and a half, at any depth; at depth 1 each wake took two turns.
const ROWS: [Row; 18] = [
    row(Work::Holes, 1, 1, [100, 200, 250, 250]),
    row(Work::Holes, 1, 32, [10, 15, 10, 20]),
    row(Work::Holes, 1, 128, [5, 8, 2, 10]),
    row(Work::Holes, 16, 1, [200, 200, 250, 250]),
    row(Work::Holes, 16, 32, [35, 32, 10, 20]),
    row(Work::Holes, 16, 128, [35, 32, 2, 20]),
    row(Work::Reads, 1, 1, [100, 200, 250, 250]),
    row(Work::Reads, 1, 32, [10, 15, 10, 20]),
    row(Work::Reads, 1, 128, [5, 8, 2, 10]),
    row(Work::Reads, 16, 1, [200, 200, 250, 250]),
    row(Work::Reads, 16, 32, [35, 32, 10, 20]),
    row(Work::Reads, 16, 128, [35, 32, 2, 20]),
    row(Work::Writes, 1, 1, [100, 200, 250, 250]),
    row(Work::Writes, 1, 32, [10, 15, 10, 20]),
    row(Work::Writes, 1, 128, [5, 8, 2, 10]),
    row(Work::Writes, 16, 1, [200, 200, 250, 250]),
    row(Work::Writes, 16, 32, [35, 32, 10, 20]),
    row(Work::Writes, 16, 128, [35, 32, 2, 20]),
];

#[test]
fn a_request_costs_few_hypercalls() {
    println!("per 100 requests: copy calls (copies in them), notifies, sleeps; turns, accesses");
    for row in &ROWS {
        measure(row);
    }
}

fn measure(row: &Row) {
    let mut world = World::new(7, 16384);
    world.host.platter = true;
    world.host.order_max = 7;
    world.host.latency_ns = (5_000, 10_000);
    world.host.start(&mut world.xs);
    world.poke_host();
    let habits = Habits {
        ring_order: 2,
        depth: row.depth,
        segments_max: row.pages,
        uniform: true,
        requests: u64::MAX,
        writes: if row.work == Work::Writes { 1000 } else { 0 },
        flushes: 0,
        ..Habits::calm()
    };
    let mut oracle = Oracle::new(world.new_disk(), SECTORS);
    let image = match row.work {
        Work::Reads => oracle.start_full(),
        Work::Holes | Work::Writes => vec![0; SECTORS as usize * 512],
    };
    world.host.files.put("a.raw", image);
    let guest = world.add_guest_on("a.raw", Format::Raw, habits, oracle, "", Carrier::Vbd);
    world.run_until("the start", 10_000 * MS, |w| w.guests[guest].answered > 300);
    let (before, turns, sleeps) = (world.machine.calls(S), world.turns, world.sleeps);
    let answered = world.guests[guest].answered;
    let enough = answered + REQUESTS;
    world.run_until("the load", 10_000 * MS, |w| w.guests[guest].answered >= enough);
    let after = world.machine.calls(S);
    let count = world.guests[guest].answered - answered;
    let per = |now: u64, then: u64| (now - then) * 100 / count;
    let copies = per(after.copies, before.copies);
    let notifies = per(after.notifies, before.notifies);
    let sleeps = per(world.sleeps, sleeps);
    let turns = per(world.turns, turns);
    let what = format!(
        "{} of {:2} KiB at depth {:3}: {copies:3} ({:4}), {notifies:3}, {sleeps:3}; {:3}, {:4}",
        format!("{:?}", row.work).to_lowercase(),
        row.pages * 4,
        row.depth,
        per(after.copy_ops, before.copy_ops),
        turns,
        per(after.accesses, before.accesses),
    );
    println!("{what}");
    let calls = copies <= row.copies && notifies <= row.notifies;
    let fine = calls && sleeps <= row.sleeps && turns <= row.turns;
    let Row { copies, notifies, sleeps, turns, .. } = row;
    assert!(fine, "{what}; the bounds are {copies}, {notifies}, {sleeps}; {turns}");
}

/// Requests of 4 KiB that follow each other leave as messages of up to 128 KiB: at depth 32, where
/// several turns may share what a guest has asked for, ten of them or more at a time.
#[test]
fn what_follows_each_other_is_one_message() {
    for (writes, kind) in [(0, TREAD), (1000, TWRITE)] {
        let mut world = World::new(7, 16384);
        // Else it would tell that all of it is a hole.
        world.host.platter = kind == TWRITE;
        world.host.order_max = 7;
        world.host.start(&mut world.xs);
        world.poke_host();
        let habits = Habits {
            depth: 32,
            segments_max: 1,
            uniform: true,
            requests: 1600,
            sequential: 1000,
            writes,
            flushes: 0,
            ..Habits::calm()
        };
        let guest = world.add_guest(Format::Raw, 65536, habits);
        world.run_until("the load", 10_000 * MS, |w| w.guests[guest].is_done());
        let messages = world.host.served[&kind];
        println!("kind {kind}: {messages} messages for 1600 requests");
        assert!(messages <= 160, "{messages} messages of kind {kind} for 1600 requests");
    }
}

/// A disk whose guest is not there yet was told again and again that its store had room.
#[test]
fn a_disk_that_waits_for_its_guest_keeps_nobody_awake() {
    let mut world = World::new(7, 16384);
    world.host.start(&mut world.xs);
    world.poke_host();
    world.host.files.put("waits.raw", vec![0; 4096]);
    let line = world.line("/images/waits.raw");
    world.attach(&line);
    world.run_for(100 * MS);
    let habits = Habits { requests: 30, ..Habits::calm() };
    let guest = world.add_guest(Format::Raw, 64, habits);
    world.run_until("the load", 10_000 * MS, |w| w.guests[guest].is_done());
    world.run_for(100 * MS);
    let before = world.turns;
    world.run_for(1000 * MS);
    let turns = world.turns - before;
    assert!(turns < 50, "{turns} turns in a second in which nobody asks for anything");
}
