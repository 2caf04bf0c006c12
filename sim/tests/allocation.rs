//! The request path allocates nothing: a steady load is served while allocations within the
//! server's turns are counted. Would miss: what only happens in paths that this load does not
//! reach (errors, copy-on-write of chains).

use std::cell::Cell;

use allocation_counter::{measure, opt_out};
use platter_image::Format;
use platter_sim::guest::Habits;
use platter_sim::world::World;

const MS: u64 = 1_000_000;

thread_local! {
    static COUNTED: Cell<u64> = const { Cell::new(0) };
    static TURNS: Cell<u64> = const { Cell::new(0) };
}

fn counted(turn: &mut dyn FnMut()) {
    let info = measure(turn);
    opt_out(|| {
        COUNTED.set(COUNTED.get() + info.count_total);
        TURNS.set(TURNS.get() + 1);
    });
}

#[test]
fn serving_allocates_nothing() {
    let mut world = World::new(11, 8192);
    world.host.platter = true;
    world.host.start(&mut world.xs);
    let habits = Habits {
        depth: 32,
        segments_max: 64,
        requests: u64::MAX,
        think_ns: 20_000,
        flushes: 50,
        barriers: 10,
        discards: 10,
        ring_order: 2,
        queues: 2,
        ..Habits::calm()
    };
    for format in [Format::Raw, Format::Vhd, Format::Vdi, Format::Qed] {
        world.add_guest(format, 2048, habits.clone());
    }
    world.run_until("all guests", 10_000 * MS, |w| w.guests.iter().all(|g| g.is_running()));
    // Counters are shown every two seconds, sizes of raw files looked at: between them is quiet.
    world.run_for(2100 * MS);
    let answered: u64 = world.guests.iter().map(|guest| guest.answered).sum();
    let requests = world.xs.requests;
    let mut quiet = 0;
    for _ in 0..40 {
        let before = world.xs.requests;
        COUNTED.set(0);
        world.around_turn = counted;
        world.run_for(5 * MS);
        world.around_turn = |turn| turn();
        // A window in which nothing was asked of xenstore is one of requests alone.
        if world.xs.requests == before {
            quiet += 1;
            assert_eq!(COUNTED.get(), 0, "allocations while serving");
        }
    }
    let served = world.guests.iter().map(|guest| guest.answered).sum::<u64>() - answered;
    assert!(quiet > 20, "{quiet} quiet windows, {requests} xenstore requests before them");
    assert!(served > 1000 && TURNS.get() > 1000, "{served} requests, {} turns", TURNS.get());
}
