//! Named scenarios: each would have failed before the fix that its name tells of. Would miss:
//! whatever needs a schedule that nobody has thought of; the swarm is for that.

use platter_image::Format;
use platter_sim::guest::{Habits, MANNERS, Manner};
use platter_sim::oracle::Oracle;
use platter_sim::toolstack::{Carrier, DiskLine, Outcome};
use platter_sim::world::World;
use platter_storage::ninep::message::id;
use platter_xen::blkif::Abi;

const MS: u64 = 1_000_000;
const XENSTORED_LATE_MS: [u64; 10] = [0, 1, 2, 3, 5, 8, 203, 206, 230, 400];
const S_HOME: &str = "/local/domain/1";

/// A world whose share has this shape.
fn world(seed: u64, platter: bool, rings: u32) -> World {
    let mut world = World::new(seed, 8192);
    world.host.platter = platter;
    world.host.rings_max = rings;
    world.host.start(&mut world.xs);
    world.poke_host();
    world
}

fn heavy() -> Habits {
    Habits { depth: 32, segments_max: 64, requests: 80, writes: 700, ..Habits::calm() }
}

#[test]
fn one_guest_reads_what_it_wrote_and_idle_is_silent() {
    // Pending bits of xenstore and the store were never cleared: no sleep lasted.
    let mut world = world(1, false, 8);
    world.add_guest(Format::Raw, 2048, Habits::calm());
    world.run_guests(60_000 * MS);
    world.wind_up(false);
}

#[test]
fn a_disk_is_connected_as_soon_as_it_may_be() {
    // What a device's turn asked of xenstore was sent half a second later, at the next tick.
    let mut world = world(1, true, 2);
    let began_ns = world.now_ns;
    let guest = world.add_guest(Format::Raw, 2048, Habits::calm());
    world.run_until("the connection", 60_000 * MS, |w| w.guests[guest].is_running());
    let took_ms = (world.now_ns - began_ns) / MS;
    // InitWait stands for 200 ms, a store that is not there yet is asked for every 50 ms.
    assert!(took_ms < 290, "{took_ms} ms");
}

#[test]
fn every_frontend_connects_closes_and_comes_back() {
    for (index, manner) in MANNERS.into_iter().enumerate() {
        for carrier in [Carrier::Vbd, Carrier::Qdisk] {
            let mut world = world(index as u64, true, 2);
            let manners = vec![manner, manner, Manner::Linux, manner];
            let abi = if index % 2 == 0 { Abi::X86_32 } else { Abi::X86_64 };
            let habits = Habits { manners, abi, requests: 20, ..Habits::calm() };
            let oracle = Oracle::new(9, 512);
            world.host.files.put("a.raw", vec![0; 512 * 512]);
            world.add_guest_on("a.raw", Format::Raw, habits, oracle, "", carrier);
            world.run_guests(60_000 * MS);
            world.wind_up(false);
        }
    }
}

#[test]
fn a_store_that_fails_does_not_end_requests_that_still_wait() {
    // A parked request was ended by the failure of its first part and planned again from the
    // queue; one that failed at once was ended while it was being planned.
    for seed in 0..12 {
        let mut world = world(seed, seed % 2 == 0, 2);
        for format in [Format::Raw, Format::Vdi, Format::Vhd] {
            let habits = Habits { errors_allowed: true, patience_ns: 60_000 * MS, ..heavy() };
            world.add_guest(format, 2048, habits);
        }
        world.run_for(230 * MS + seed * 3 * MS);
        let (machine, xs) = (&mut world.machine, &mut world.xs);
        world.host.die(machine, xs, true);
        world.poke_host();
        world.run_for(5 * MS);
        world.host.start(&mut world.xs);
        world.poke_host();
        world.run_guests(120_000 * MS);
        world.wind_up(true);
    }
}

#[test]
fn a_disk_taken_away_while_its_file_is_being_opened() {
    // The answer went to the next disk in the same place.
    for seed in 0..8 {
        let mut world = world(seed, false, 1);
        world.host.latency_ns = (2 * MS, 6 * MS);
        world.host.files.put("a.raw", vec![1; 4096]);
        let mut line = world.line("/images/a.raw");
        line.carrier = Carrier::Qdisk;
        world.attach(&line);
        world.run_for(4 * MS + seed * MS);
        let be = line.be();
        world.xs.remove(0, &be).expect("dom0 may");
        let guest = world.add_guest(Format::Raw, 64, Habits { requests: 30, ..Habits::calm() });
        world.run_guests(60_000 * MS);
        assert!(world.guests[guest].answered >= 30);
        world.wind_up(false);
    }
}

#[test]
fn a_store_busy_with_its_own_messages_is_asked_again() {
    // One ring, one request in it: while a file is being closed there is no room, and no answer
    // tells when there is.
    for seed in 0..6 {
        let mut world = world(seed, false, 1);
        let habits = Habits { depth: 1, requests: 60, think_ns: 300_000, ..Habits::calm() };
        world.add_guest(Format::Raw, 512, habits);
        for _ in 0..3 {
            let brief = Habits { requests: 2, ..Habits::calm() };
            let guest = world.add_guest(Format::Raw, 64, brief);
            world.run_until("a brief guest", 30_000 * MS, |w| w.guests[guest].is_done());
            let line = world.guests[guest].line.clone();
            world.detach(&line, false);
        }
        world.run_guests(60_000 * MS);
        world.wind_up(false);
    }
}

#[test]
fn a_server_that_stalls_while_a_file_is_closed_is_waited_for_asleep() {
    // The only request of the only ring is the store's own: its answer is what makes room, and
    // until then turns are taken for the guests' events alone.
    for seed in 0..4 {
        let mut world = world(seed, false, 1);
        let habits = Habits { depth: 4, requests: 200, patience_ns: 30_000 * MS, ..Habits::calm() };
        world.add_guest(Format::Raw, 512, Habits { think_ns: 300_000, ..habits });
        let brief = world.add_guest(Format::Raw, 64, Habits { requests: 2, ..Habits::calm() });
        world.run_until("a brief guest", 30_000 * MS, |w| w.guests[brief].is_done());
        let line = world.guests[brief].line.clone();
        world.detach(&line, false);
        let clunked = |world: &World| world.host.served.get(&id::TCLUNK).is_some_and(|n| *n > 0);
        world.run_until("the close", 10_000 * MS, clunked);
        world.host.stalled = true;
        let turns = world.turns;
        world.run_for(5000 * MS);
        assert!(world.turns - turns < 100, "{} turns", world.turns - turns);
        world.host.stalled = false;
        world.poke_host();
        world.run_guests(60_000 * MS);
        world.wind_up(false);
    }
}

#[test]
fn indirect_requests_do_not_touch_metadata_that_waits_for_room() {
    // Descriptors were copied over table blocks in the flush's scratch region.
    for seed in 0..6 {
        let mut world = world(seed, false, 1);
        for format in [Format::Qed, Format::Vdi] {
            let habits = Habits { flushes: 150, ..heavy() };
            world.add_guest(format, 4096, habits);
        }
        world.run_guests(120_000 * MS);
        world.wind_up(false);
    }
}

#[test]
fn short_reads_and_writes_are_continued_byte_by_byte() {
    // A copy job took a read that ended within a sector for whole sectors; a flush write done in
    // part failed the guest's flush.
    for seed in 0..6 {
        let mut world = world(seed, true, 2);
        world.host.faults.short = 100;
        world.host.faults.ragged = 500;
        for format in [Format::Vhd, Format::Vdi] {
            let guest = world.add_guest(format, 2048, Habits { span: 300, ..heavy() });
            world.guests[guest].oracle.ragged = true;
        }
        world.run_guests(120_000 * MS);
        world.wind_up(false);
    }
}

#[test]
fn the_rest_of_a_short_operation_waits_for_room() {
    // Others had taken the room meanwhile, and the guest was told of an error of the store.
    for seed in 0..6 {
        let mut world = world(seed, seed % 2 == 0, 1);
        world.host.order_max = 2;
        world.host.faults.short = 100;
        world.host.start(&mut world.xs);
        world.poke_host();
        for format in [Format::Raw, Format::Vdi, Format::Qed] {
            world.add_guest(format, 2048, Habits { requests: 60, ..heavy() });
        }
        world.run_guests(120_000 * MS);
        world.wind_up(false);
    }
}

#[test]
fn no_request_waits_for_a_timer() {
    // What is in a ring is seen by an event or by the turn that is under way: the first timer of
    // an idle server is half a second away.
    for seed in 0..12 {
        let mut world = world(seed, seed % 2 == 0, 1 + seed as u32 % 3);
        let think_ns = [0, 30_000, 400_000][seed as usize % 3];
        for (format, depth) in [(Format::Raw, 1), (Format::Raw, 8), (Format::Vdi, 4)] {
            let habits = Habits { depth, think_ns, requests: 300, ..Habits::calm() };
            world.add_guest(format, 2048, habits);
        }
        world.run_guests(120_000 * MS);
        let slowest = world.guests.iter().flat_map(|guest| &guest.latencies_ns).max();
        assert!(slowest.is_some_and(|ns| *ns < 100 * MS), "seed {seed}: {slowest:?} ns");
    }
}

#[test]
fn refused_disks_say_why_and_leave_few_nodes() {
    // Each refusal left three nodes for ever, each attached disk one: the quota is 1000.
    let mut world = world(3, false, 8);
    world.run_for(20 * MS);
    let before = world.xs.nodes_of(1);
    for _ in 0..60 {
        let line = world.line("/images/nothing-here.raw");
        world.attach(&line);
        world.run_until("a verdict", 11_000 * MS, |w| w.toolstack.verdict(&line, true).is_some());
        let verdict = world.toolstack.verdict(&line, true).expect("just waited for").clone();
        assert_eq!(verdict.outcome, Outcome::Removed);
        assert!(verdict.took_ns < 1000 * MS, "a refusal takes {} ms", verdict.took_ns / MS);
        let error = format!("{S_HOME}/error/backend/vbd/{}/51712/error", line.guest);
        let reason = world.xs.text(0, &error).expect("the reason stands there");
        assert!(reason.contains("nothing-here.raw"), "{reason}");
        world.detach(&line, true);
        world.run_until("the removal", 30_000 * MS, |w| !w.toolstack.is_busy());
    }
    world.run_for(1000 * MS);
    let more = world.xs.nodes_of(1) - before;
    assert!(more <= 16 * 3 + 4, "{more} nodes stay behind");
    world.wind_up(false);
}

#[test]
fn a_guest_that_shut_down_is_removed_without_an_error() {
    // The Closed of long ago was deleted before the toolstack had read it.
    let mut world = world(4, false, 8);
    let guest = world.add_guest(Format::Raw, 64, Habits { requests: 5, ..Habits::calm() });
    world.run_guests(10_000 * MS);
    world.run_for(5000 * MS);
    let line = world.guests[guest].line.clone();
    world.detach(&line, true);
    world.run_until("the removal", 30_000 * MS, |w| !w.toolstack.is_busy());
    let verdict = world.toolstack.verdict(&line, false).expect("it was detached");
    assert_eq!(verdict.outcome, Outcome::Done, "{verdict:?}");
}

#[test]
fn a_server_that_falls_silent_is_given_up_and_taken_up_again() {
    let mut world = world(6, true, 4);
    let habits = Habits {
        errors_allowed: true,
        patience_ns: 60_000 * MS,
        requests: 100,
        think_ns: 3 * MS,
        ..Habits::calm()
    };
    world.add_guest(Format::Raw, 1024, habits);
    world.run_for(300 * MS);
    let (machine, xs) = (&mut world.machine, &mut world.xs);
    world.host.die(machine, xs, false);
    world.run_for(40_000 * MS);
    world.host.start(&mut world.xs);
    world.poke_host();
    world.run_guests(60_000 * MS);
    world.wind_up(true);
}

#[test]
fn what_xenstore_refuses_for_a_while_is_asked_and_said_again() {
    // A refused read was taken for a missing node, a refused write for a written one: disks were
    // forgotten in use, shares and watches lost, and a directory of a removed disk stayed.
    for (seed, after_ms) in [0, 1, 3, 203, 206, 230].into_iter().enumerate() {
        for per_mille in [300, 1000] {
            let mut world = world(seed as u64, true, 2);
            world.add_guest(Format::Qcow2, 2048, Habits { requests: 30, ..Habits::calm() });
            world.run_for(after_ms * MS);
            world.trouble(per_mille, 900 * MS);
            world.run_for(100 * MS);
            world.add_guest(Format::Raw, 512, Habits { requests: 30, ..Habits::calm() });
            world.run_guests(60_000 * MS);
            world.trouble(per_mille, 900 * MS);
            world.wind_up(false);
        }
    }
}

#[test]
fn what_a_destroyed_guest_had_asked_for_is_not_begun_any_more() {
    // Each of its writes had a block of 32 MiB zeroed before its grant was found to be gone.
    let mut world = World::new(0, 8192);
    (world.host.rings_max, world.host.order_max) = (1, 3);
    world.host.start(&mut world.xs);
    world.poke_host();
    let habits = Habits {
        depth: 8,
        writes: 1000,
        flushes: 0,
        errors_allowed: true,
        patience_ns: 60_000 * MS,
        ..heavy()
    };
    let guest = world.add_guest(Format::Vhdx, 4096, habits);
    world.run_until("the connection", 60_000 * MS, |w| w.guests[guest].is_running());
    // What was begun then is in doubt: the block behind is no longer known to be zero.
    let (machine, xs) = (&mut world.machine, &mut world.xs);
    world.host.die(machine, xs, true);
    world.poke_host();
    world.run_for(20 * MS);
    world.destroy_guest(guest);
    world.run_for(20 * MS);
    world.host.start(&mut world.xs);
    world.poke_host();
    let line = world.guests[guest].line.clone();
    world.run_until("the removal", 60_000 * MS, |w| !w.toolstack.is_busy());
    let verdict = world.toolstack.verdict(&line, false).expect("it was detached");
    assert_eq!(verdict.outcome, Outcome::Done, "{verdict:?}");
    // It took 1.8 s; a Closed stands for 0.3 s.
    assert!(verdict.took_ns < 1000 * MS, "{verdict:?}");
}

/// A guest that writes into a qcow2 and never flushes, until a flush of our own has failed for
/// want of space: that is told once, to whoever syncs.
fn after_a_flush_that_found_no_space(seed: u64) -> World {
    let mut world = world(seed, true, 2);
    let habits = Habits {
        writes: 1000,
        flushes: 0,
        requests: 60,
        think_ns: 400 * MS,
        errors_allowed: true,
        ..Habits::calm()
    };
    world.add_guest(Format::Qcow2, 2048, habits);
    world.run_until("the connection", 10_000 * MS, |w| w.guests[0].is_running());
    world.host.faults.full = 1000;
    let synced = |world: &World| world.host.served.get(&id::TFSYNC).is_some_and(|n| *n > 0);
    world.run_until("our own flush", 20_000 * MS, synced);
    world.run_for(MS);
    world.host.faults.full = 0;
    assert_eq!(world.guests[0].errors, 0, "no request has failed");
    world
}

#[test]
fn a_guest_hears_of_a_sync_that_found_no_space_before_it_asked() {
    // It was told that all was durable by a sync that came after the one that said what was not.
    for seed in 0..4 {
        let mut world = after_a_flush_that_found_no_space(seed);
        world.guests[0].habits.flushes = 1000;
        world.run_guests(60_000 * MS);
        assert_eq!(world.guests[0].errors, 1, "seed {seed}: told once");
        world.wind_up(true);
    }
}

#[test]
fn a_flush_that_failed_long_ago_does_not_keep_an_image_from_being_closed() {
    // The rings were let go, and the image left as it was: what it had been told was lost.
    for seed in 0..4 {
        let mut world = after_a_flush_that_found_no_space(seed);
        world.guests[0].stopping = true;
        world.poke_guest(0);
        world.run_guests(10_000 * MS);
        world.wind_up(false);
    }
}

#[test]
fn a_connection_to_xenstore_that_begins_anew_leaves_no_disk_waiting() {
    // Whoever had asked for something waited for the answer for ever, and no watch stood.
    for (seed, after_ms) in XENSTORED_LATE_MS.into_iter().enumerate() {
        let mut world = world(seed as u64, true, 2);
        world.add_guest(Format::Qcow2, 2048, Habits { requests: 30, ..Habits::calm() });
        world.run_for(after_ms * MS);
        world.xs.lose_connection(&mut world.machine);
        world.run_for(after_ms * MS);
        world.add_guest(Format::Raw, 512, Habits { requests: 30, ..Habits::calm() });
        world.run_for(after_ms * MS);
        world.xs.lose_connection(&mut world.machine);
        world.run_guests(60_000 * MS);
        world.wind_up(false);
    }
}

#[test]
fn another_disk_at_the_same_path_is_not_served_from_the_old_image() {
    // Its directory was taken for our own with a state that somebody had overwritten.
    for seed in 0..6 {
        let mut world = world(seed, true, 2);
        world.host.files.put("a.raw", vec![1; 64 * 512]);
        world.host.files.put("b.raw", vec![2; 128 * 512]);
        let line = world.line("/images/a.raw");
        world.attach(&line);
        world.run_until("a verdict", 11_000 * MS, |w| w.toolstack.verdict(&line, true).is_some());
        world.run_for(seed * 100 * MS);
        world.xs.remove(0, &line.be()).expect("dom0 may");
        let other = DiskLine { params: "/images/b.raw".into(), ..line.clone() };
        world.attach(&other);
        let sectors = format!("{}/sectors", line.be());
        world.run_until("the other", 11_000 * MS, |w| w.xs.number(0, &sectors) == Some(128));
        world.detach(&other, true);
        world.run_until("the removal", 30_000 * MS, |w| !w.toolstack.is_busy());
        world.wind_up(false);
    }
}
