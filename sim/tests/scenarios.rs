//! Named scenarios.

use platter_image::Format;
use platter_sim::guest::Habits;
use platter_sim::world::World;

const MS: u64 = 1_000_000;

#[test]
fn one_guest_reads_what_it_wrote() {
    let mut world = World::new(1, 8192);
    world.add_guest(Format::Raw, 2048, Habits::calm());
    world.run_guests(60_000 * MS);
    world.wind_up(false);
}
