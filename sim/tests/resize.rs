//! Disks that grow while they are served, with a file that must be made longer first. Would miss:
//! what growing does to tables; the image crate's tests are for that.

use std::cell::Cell;

use platter_image::{Access, CreateParams, Format};
use platter_sim::guest::{Habits, Manner};
use platter_sim::images;
use platter_sim::oracle::Oracle;
use platter_sim::toolstack::Carrier;
use platter_sim::world::World;
use platter_tool::engine::{Engine, options};
use platter_tool::medium::RamFolder;

const MS: u64 = 1_000_000;
const OLD_SECTORS: u64 = 2048;
const NEW_SECTORS: u64 = 16384;

type Options = &'static [(&'static str, &'static str)];

struct Kind {
    format: Format,
    options: Options,
    /// The file that becomes longer.
    file: &'static str,
}

const KINDS: [Kind; 4] = [
    Kind { format: Format::Vhdx, options: &[("subformat", "fixed")], file: "a.vhdx" },
    Kind { format: Format::Vmdk, options: &[("subformat", "monolithicFlat")], file: "a-flat.vmdk" },
    Kind { format: Format::Vmdk, options: &[], file: "a.vmdk" },
    Kind { format: Format::Qcow2, options: &[("data_file", "a.data")], file: "a.data" },
];

/// A guest at work on such an image, whose toolstack asks for a longer disk.
fn growing(kind: &Kind, seed: u64, habits: Habits) -> World {
    let mut world = World::new(seed, 8192);
    let path = format!("a.{}", kind.format.name());
    let cluster_bytes = match kind.format {
        Format::Vhdx => 1 << 20,
        // A grain table then has 2 MiB.
        Format::Vmdk if kind.options.is_empty() => 4096,
        _ => 0,
    };
    let params = CreateParams {
        cluster_bytes,
        options: kind.options,
        ..images::plain(kind.format, OLD_SECTORS)
    };
    images::create_as(&mut world.host.files, &path, &params);
    let oracle = Oracle::new(world.new_disk(), OLD_SECTORS);
    let guest = world.add_guest_on(&path, kind.format, habits, oracle, "", Carrier::Vbd);
    world.run_until("the connection", 10_000 * MS, |w| w.guests[guest].is_running());
    resize(&mut world, NEW_SECTORS);
    world
}

fn resize(world: &mut World, sectors: u64) {
    let path = format!("{}/resize", world.guests[0].line.be());
    world.xs.write(0, &path, (sectors * 512).to_string().as_bytes()).expect("dom0 may");
}

/// The size that the guest is told.
fn shown(world: &World) -> Option<u64> {
    world.xs.number(0, &format!("{}/sectors", world.guests[0].line.be()))
}

/// What another reader finds: the disk's size, and whether its last file is long enough.
fn found(world: &World, kind: &Kind) -> (u64, bool) {
    let folder = RamFolder::new();
    for path in world.host.files.paths() {
        folder.put(path, world.host.files.get(path).expect("listed").live.clone());
    }
    let path = format!("a.{}", kind.format.name());
    let engine = Engine::open(&folder, &path, options(kind.format, Access::ReadOnly));
    let sectors = engine.expect("it opens").sectors();
    let bytes = world.host.files.get(kind.file).expect("a file").live.len() as u64;
    // A grain table alone grows.
    (sectors, bytes >= sectors * 512 || kind.options.is_empty())
}

fn habits() -> Habits {
    Habits { requests: 400, think_ns: MS, ..Habits::calm() }
}

#[test]
fn a_file_that_must_be_longer_grows_before_its_disk() {
    // The write that made it so was forgotten by the flush after it, and its answer was one too
    // many: the domain died.
    for kind in &KINDS {
        for seed in 0..4 {
            let mut world = growing(kind, seed, habits());
            world.run_until("the growth", 10_000 * MS, |w| shown(w) == Some(NEW_SECTORS));
            assert_eq!(found(&world, kind), (NEW_SECTORS, true), "{:?}", kind.options);
            world.run_guests(60_000 * MS);
            world.wind_up(false);
        }
    }
}

#[test]
fn a_store_that_fails_meanwhile_keeps_the_old_size_until_the_file_is_longer() {
    // The image said that it was larger, whatever had become of its file.
    for kind in &KINDS {
        for seed in 0..4 {
            let forgiving = Habits { errors_allowed: true, patience_ns: 60_000 * MS, ..habits() };
            let mut world = growing(kind, seed, forgiving);
            world.guests[0].oracle.ragged = true;
            world.host.faults.error = 1000;
            world.host.faults.short = 1000;
            world.host.faults.ragged = 500;
            world.run_for(1000 * MS);
            assert_eq!(shown(&world), Some(OLD_SECTORS));
            world.host.faults.error = 0;
            world.run_for(1000 * MS);
            world.host.faults = Default::default();
            world.run_until("the growth", 30_000 * MS, |w| shown(w) == Some(NEW_SECTORS));
            assert_eq!(found(&world, kind), (NEW_SECTORS, true), "{:?}", kind.options);
            world.run_guests(60_000 * MS);
            world.wind_up(true);
        }
    }
}

thread_local! {
    static REFUSALS: Cell<usize> = const { Cell::new(0) };
}

struct Console;

impl log::Log for Console {
    fn enabled(&self, _: &log::Metadata) -> bool {
        true
    }

    fn log(&self, record: &log::Record) {
        if record.args().to_string().contains("cannot grow") {
            REFUSALS.set(REFUSALS.get() + 1);
        }
    }

    fn flush(&self) {}
}

#[test]
fn a_size_that_cannot_be_is_refused_once() {
    // Each look at the disk asked for it again, and a guest can have it looked at all the time.
    log::set_logger(&Console).expect("the only one of this program");
    log::set_max_level(log::LevelFilter::Warn);
    let manners = vec![Manner::Linux; 5];
    let mut world = growing(&KINDS[2], 1, Habits { manners, requests: 20, ..Habits::calm() });
    resize(&mut world, 1 << 40);
    world.run_guests(60_000 * MS);
    assert_eq!((REFUSALS.get(), shown(&world)), (1, Some(OLD_SECTORS)));
    resize(&mut world, 1 << 41);
    world.run_for(1000 * MS);
    assert_eq!(REFUSALS.get(), 2, "another size");
    resize(&mut world, NEW_SECTORS);
    world.run_until("the growth", 10_000 * MS, |w| shown(w) == Some(NEW_SECTORS));
    world.wind_up(false);
}
