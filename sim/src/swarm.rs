//! Runs made from a seed: a world of random shape, guests of random habits, random faults, one
//! of several ends. Each panics when an oracle objects.

mod disks;

use platter_image::Format;
use platter_xen::blkif::Abi;

use crate::guest::{Habits, MANNERS, Manner};
use crate::hostile::Hostile;
use crate::ninep::Faults;
use crate::oracle::Oracle;
use crate::rng::Rng;
use crate::toolstack::Carrier;
use crate::world::World;

const MS: u64 = 1_000_000;

/// Formats that can be made and written.
/// How a run ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    /// All work done, all disks detached.
    WindUp,
    /// The power is cut in the middle.
    Cut,
    /// `xl shutdown` of the storage domain in the middle.
    Shutdown,
}

/// What a seed decided.
#[derive(Debug)]
struct Plan {
    end: End,
    faults: Faults,
    /// The host's server dies this often, and comes back.
    deaths: u64,
    noisy_death: bool,
    destroys: u64,
    hostiles: u64,
    /// Bytes by which the host's files may grow before its disk is full.
    room_bytes: Option<u64>,
    trouble: Option<Trouble>,
}

impl Plan {
    fn draw(rng: &mut Rng) -> Plan {
        let end =
            *rng.pick(&[End::WindUp, End::WindUp, End::WindUp, End::Cut, End::Cut, End::Shutdown]);
        let mut faults = Faults::default();
        if rng.chance(500) {
            faults.short = *rng.pick(&[5, 50]);
            faults.ragged = *rng.pick(&[0, 300]);
        }
        if rng.chance(200) {
            faults.error = *rng.pick(&[2, 20]);
        }
        if end == End::WindUp && rng.chance(100) {
            faults.garbage = *rng.pick(&[1, 10]);
        }
        if end == End::Cut {
            // A sector of a real disk is whole or not there.
            faults.ragged = 0;
        }
        let deaths = if rng.chance(150) { rng.between(1, 3) } else { 0 };
        let noisy_death = rng.chance(700);
        let destroys = if rng.chance(300) { 1 } else { 0 };
        let hostiles = if rng.chance(500) { rng.between(1, 2) } else { 0 };
        let room_bytes = rng.chance(100).then(|| rng.below(1 << 20));
        let trouble = Trouble::draw(rng);
        Plan { end, faults, deaths, noisy_death, destroys, hostiles, room_bytes, trouble }
    }

    fn is_clean(&self) -> bool {
        let faults = self.faults.error + self.faults.garbage + self.deaths;
        faults == 0 && self.room_bytes.is_none()
    }
}

/// xenstored refuses some of what it is asked for a while, or all of it.
#[derive(Clone, Copy, Debug)]
struct Trouble {
    per_mille: u64,
    after_ns: u64,
    ns: u64,
    /// Another time when disks are detached.
    at_end: bool,
}

impl Trouble {
    fn draw(rng: &mut Rng) -> Option<Trouble> {
        let trouble = Trouble {
            per_mille: *rng.pick(&[30, 300, 1000]),
            after_ns: *rng.pick(&[0, 0, 5 * MS, 250 * MS, 600 * MS]),
            ns: rng.between(1, 1800) * MS,
            at_end: rng.chance(500),
        };
        rng.chance(200).then_some(trouble)
    }

    fn begin(trouble: &Option<Trouble>, world: &mut World) {
        let Some(Trouble { per_mille, after_ns, ns, .. }) = *trouble else { return };
        world.run_for(after_ns);
        world.trouble(per_mille, ns);
    }

    fn end(trouble: &Option<Trouble>, world: &mut World) {
        let Some(Trouble { per_mille, ns, .. }) = trouble.filter(|trouble| trouble.at_end) else {
            return;
        };
        world.trouble(per_mille, ns);
    }
}

/// Runs one seed to its end: every third has its images on platter's own disks.
pub fn run(seed: u64) {
    if seed.is_multiple_of(3) {
        return disks::run(seed);
    }
    let mut rng = Rng::new(seed ^ 0x5eed);
    let plan = Plan::draw(&mut rng);
    log::info!("seed {seed}: {plan:?}");
    let mut world = World::new(seed, *rng.pick(&[4096, 6144, 8192]));
    shape_host(&mut world, &mut rng, &plan);
    let guests = rng.between(1, 4);
    for _ in 0..guests {
        add_guest(&mut world, &mut rng, &plan);
    }
    for _ in 0..plan.hostiles {
        Hostile::join(&mut world, &mut rng);
    }
    if let Some(room_bytes) = plan.room_bytes {
        world.host.files.space_bytes = world.host.files.used_bytes() + room_bytes;
    }
    Trouble::begin(&plan.trouble, &mut world);
    for _ in 0..plan.deaths {
        world.run_for(rng.between(1, 200) * MS);
        let noisy = plan.noisy_death;
        let (machine, xs) = (&mut world.machine, &mut world.xs);
        world.host.die(machine, xs, noisy);
        world.poke_host();
        world.run_for(rng.between(1, 800) * MS);
        world.host.start(&mut world.xs);
        world.poke_host();
    }
    for _ in 0..plan.destroys {
        world.run_for(rng.between(1, 30) * MS);
        let victim = rng.below(guests) as usize;
        world.destroy_guest(victim);
    }
    match plan.end {
        End::WindUp => {
            world.run_guests(300_000 * MS);
            Trouble::end(&plan.trouble, &mut world);
            wind_up(&mut world, &plan, seed);
        }
        End::Cut => cut(&mut world, &mut rng),
        End::Shutdown => {
            shut_down(&mut world, &mut rng);
            world.verify_images(!plan.is_clean());
        }
    }
    tell(&world);
}

/// The power fails at some time.
fn cut(world: &mut World, rng: &mut Rng) {
    world.run_for(rng.between(1, 1200) * MS);
    world.cut_power();
    world.verify_images(true);
}

/// `xl shutdown` at some time, until platter has ended.
fn shut_down(world: &mut World, rng: &mut Rng) {
    world.run_for(rng.between(1, 600) * MS);
    world.xs.write(0, "/local/domain/1/control/shutdown", b"poweroff").expect("dom0");
    world.run_until("the shutdown", 15_000 * MS, |world| world.ended.is_some());
}

/// What a run did, for those who wonder whether it did anything.
fn tell(world: &World) {
    let answered: u64 = world.guests.iter().map(|guest| guest.answered).sum();
    let errors: u64 = world.guests.iter().map(|guest| guest.errors).sum();
    let asked: u64 = world.hostiles.iter().map(|hostile| hostile.asked).sum();
    log::info!(
        "{} ms, {} turns, {answered} answers, {errors} errors, {asked} hostile requests, {} copies \
         refused, {} xenstore events",
        world.now_ns / MS,
        world.turns,
        world.machine.copies_refused,
        world.xs.events
    );
}

fn wind_up(world: &mut World, plan: &Plan, seed: u64) {
    // A flush may have failed for good: then only what was flushed before is sure.
    world.wind_up(!plan.is_clean());
    if seed.is_multiple_of(64) && plan.is_clean() {
        let alone = |image: &&crate::world::Image| {
            let base = image.path.replace("disk", "base");
            let base = base.rsplit_once('.').map_or("", |(name, _)| name).to_string() + ".raw";
            world.host.files.get(&base).is_none()
        };
        for image in world.images.iter().filter(alone) {
            crate::images::qemu_check(&world.host.files, &image.path, image.format, seed);
        }
    }
}

fn shape_host(world: &mut World, rng: &mut Rng, plan: &Plan) {
    world.spurious = *rng.pick(&[0, 0, 5, 50]);
    let host = &mut world.host;
    host.platter = rng.chance(500);
    host.rings_max = rng.between(1, 8) as u32;
    host.order_max = rng.between(2, 7) as u32;
    host.latency_ns = *rng.pick(&[(1000, 20_000), (20_000, 80_000), (100_000, 3_000_000)]);
    host.faults = plan.faults;
    // What it offers is read once it is up: again, with the shape of this run.
    host.start(&mut world.xs);
    world.poke_host();
}

/// Habits of a guest on a store that keeps no one waiting for longer than `patience_ns`.
fn habits(rng: &mut Rng, errors_allowed: bool, patience_ns: u64) -> Habits {
    let cycles = rng.between(1, 4);
    let manners: Vec<Manner> = (0..cycles).map(|_| *rng.pick(&MANNERS)).collect();
    let mut habits = Habits {
        manners,
        abi: if rng.chance(500) { Abi::X86_64 } else { Abi::X86_32 },
        queues: rng.between(1, 4) as u32,
        ring_order: rng.between(0, 4) as u32,
        depth: *rng.pick(&[1, 4, 16, 64, 200]),
        segments_max: *rng.pick(&[1, 11, 32, 256]),
        uniform: false,
        requests: rng.between(5, 120),
        sequential: *rng.pick(&[0, 300, 970]),
        writes: *rng.pick(&[100, 500, 900]),
        flushes: *rng.pick(&[0, 20, 100]),
        barriers: *rng.pick(&[0, 0, 20]),
        discards: *rng.pick(&[0, 0, 30]),
        wide: false,
        think_ns: *rng.pick(&[0, 0, 100_000, 2_000_000]),
        span: *rng.pick(&[u64::MAX, 64, 512]),
        errors_allowed,
        patience_ns,
    };
    if habits.segments_max > 32 {
        habits.requests = habits.requests.min(40);
    }
    habits
}

fn add_guest(world: &mut World, rng: &mut Rng, plan: &Plan) {
    // A size that promises more than will come shows after the 30 s of a stall.
    let silent = plan.deaths > 0 || plan.faults.garbage > 0;
    let patience_ns = if silent { 60_000 * MS } else { 30_000 * MS };
    let habits = habits(rng, !plan.is_clean(), patience_ns);
    let format = *rng.pick(&Format::ALL);
    let sectors = rng.between(9, 4096) / 8 * 8;
    let mut options = String::new();
    if rng.chance(150) {
        options.push_str(",cache=writethrough");
    }
    if rng.chance(100) {
        options.push_str(",sector=4096");
    }
    if rng.chance(100) {
        options.push_str(",iops=2000/50");
    }
    let disk = world.new_disk();
    let path = format!("disk{disk}.{}", format.name());
    let mut oracle = Oracle::new(disk, sectors);
    let overlay = matches!(format, Format::Qcow2 | Format::Qed) && rng.chance(500);
    let base = format!("base{disk}.raw");
    if overlay {
        world.host.files.put(&base, oracle.start_full());
    }
    let cluster_bytes = match format {
        Format::Qcow2 => *rng.pick(&[0, 512, 4096]),
        Format::Qed => *rng.pick(&[0, 4096]),
        _ => 0,
    };
    let backing = overlay.then_some(base.as_str());
    let files = &mut world.host.files;
    crate::images::create(files, &path, format, sectors, cluster_bytes, backing);
    let carrier = if rng.chance(800) { Carrier::Vbd } else { Carrier::Qdisk };
    oracle.ragged = plan.faults.ragged > 0;
    world.add_guest_on(&path, format, habits, oracle, &options, carrier);
}
