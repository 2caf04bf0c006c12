//! Discards of whole disks, which a guest may ask for at any time and in any number. Would miss:
//! what they do to an image; the image crate's tests are for that.

use platter_image::{CreateParams, Format};
use platter_sim::guest::Habits;
use platter_sim::images;
use platter_sim::oracle::Oracle;
use platter_sim::toolstack::Carrier;
use platter_sim::world::World;

const MS: u64 = 1_000_000;
/// Sectors that the guest uses; its discards are of all behind them.
const USED: u64 = 512;

fn world(sectors: u64, cluster_bytes: u64, habits: Habits, options: &str) -> World {
    let mut world = World::new(3, 8192);
    let params = CreateParams { cluster_bytes, ..images::plain(Format::Qcow2, sectors) };
    images::create_as(&mut world.host.files, "a.qcow2", &params);
    let oracle = Oracle::new(world.new_disk(), USED);
    let habits = Habits { wide: true, ..habits };
    world.add_guest_on("a.qcow2", Format::Qcow2, habits, oracle, options, Carrier::Vbd);
    world
}

#[test]
fn more_can_be_asked_for_than_bytes_can_be_counted() {
    // Eight of 2 EiB: their sum had 65 bits, and the domain died of it.
    let habits = Habits { depth: 16, discards: 970, requests: 16, ..Habits::calm() };
    let habits = Habits { patience_ns: 100_000 * MS, ..habits };
    let mut world = world(1 << 52, 2 << 20, habits, "");
    world.run_until("some answers", 100_000 * MS, |w| w.guests[0].answered > 2);
}

#[test]
fn a_discard_moves_no_bytes_that_a_limit_would_count() {
    // One of 64 MiB had to be paid for with a minute's bytes.
    let habits = Habits { depth: 2, discards: 500, writes: 0, requests: 40, ..Habits::calm() };
    let mut world = world(131_072, 0, habits, ",bps=1M");
    world.run_until("the work", 10_000 * MS, |w| w.guests[0].is_done());
}

#[test]
fn a_long_discard_lets_others_have_their_turn() {
    // A step for each of 2048 tables, all in one turn.
    let habits = Habits { depth: 1, discards: 970, requests: 20, ..Habits::calm() };
    let mut world = world(131_072, 512, habits, "");
    world.run_until("the connection", 10_000 * MS, |w| w.guests[0].is_running());
    let turns = world.turns;
    world.run_guests(60_000 * MS);
    let turns = world.turns - turns;
    assert!(turns > 400, "{turns} turns");
    world.wind_up(false);
}
