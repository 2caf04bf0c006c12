//! Seeds whose images lie on platter's own disks: partitions of a disk that a backend domain
//! serves, of an NVMe controller, or of both.

use platter_image::Format;

use super::{End, MS, Trouble, cut, habits, shut_down, tell};
use crate::disks::{DiskKind, Pace};
use crate::hostile::Hostile;
use crate::rng::Rng;
use crate::world::{DiskGuest, S, World};

/// Formats that find room in a partition; the others only append to a file.
const FORMATS: [Format; 5] = [Format::Raw, Format::Qcow2, Format::Vdi, Format::Vhd, Format::Vhdx];

/// What happens to the disks while guests work.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Blow {
    /// blkback closes in order and comes back.
    BackendRestarts,
    /// The backend domain dies; another comes.
    BackendDies,
    /// The controller vanishes from the bus, and is put back later.
    Removal,
    /// `pci-detach` and `pci-attach`.
    Detach,
}

#[derive(Debug)]
struct Plan {
    end: End,
    kinds: Vec<DiskKind>,
    blows: Vec<Blow>,
    pace: Pace,
    destroy: bool,
    hostile: bool,
    trouble: Option<Trouble>,
}

impl Plan {
    fn draw(rng: &mut Rng) -> Plan {
        let end =
            *rng.pick(&[End::WindUp, End::WindUp, End::WindUp, End::Cut, End::Cut, End::Shutdown]);
        let (blk, nvme) = (DiskKind::Blk, DiskKind::Nvme);
        let kinds = rng.pick(&[vec![blk], vec![nvme], vec![blk, nvme]]).clone();
        let mut pace = Pace {
            latency_ns: *rng.pick(&[(1000, 10_000), (10_000, 90_000), (100_000, 3_000_000)]),
            most: *rng.pick(&[1, 4, 32]),
            ..Pace::CALM
        };
        if rng.chance(300) {
            let mut some = |most| if rng.chance(400) { rng.between(1, most) } else { 0 };
            (pace.fail, pace.swallow, pace.fatal) = (some(20), some(4), some(3));
            (pace.cut, pace.wrong_cid) = (some(3), some(3));
        }
        let mut blows = vec![];
        for _ in 0..if rng.chance(400) { rng.between(1, 3) } else { 0 } {
            blows.push(match *rng.pick(&kinds) {
                DiskKind::Blk => *rng.pick(&[Blow::BackendRestarts, Blow::BackendDies]),
                DiskKind::Nvme => *rng.pick(&[Blow::Removal, Blow::Detach]),
            });
        }
        let (destroy, hostile) = (rng.chance(200), rng.chance(200));
        Plan { end, kinds, blows, pace, destroy, hostile, trouble: Trouble::draw(rng) }
    }

    /// Nothing happens that a guest may notice.
    fn is_clean(&self) -> bool {
        let pace = &self.pace;
        let quiet = pace.fail + pace.swallow + pace.fatal + pace.cut + pace.wrong_cid == 0;
        quiet && self.blows.iter().all(|blow| *blow == Blow::BackendRestarts)
    }
}

/// Runs one seed to its end.
pub fn run(seed: u64) {
    let mut rng = Rng::new(seed ^ 0xd15c);
    let plan = Plan::draw(&mut rng);
    log::info!("seed {seed}: {plan:?}");
    let mut world = World::new(seed, *rng.pick(&[4096, 6144, 8192]));
    world.spurious = *rng.pick(&[0, 0, 5, 50]);
    for &kind in &plan.kinds {
        add_disk(&mut world, &mut rng, &plan, kind);
    }
    world.disks.pace = plan.pace;
    if plan.hostile {
        Hostile::join(&mut world, &mut rng);
    }
    Trouble::begin(&plan.trouble, &mut world);
    for &blow in &plan.blows {
        world.run_for(rng.between(1, 400) * MS);
        strike(&mut world, &mut rng, blow);
    }
    if plan.destroy {
        world.run_for(rng.between(1, 30) * MS);
        world.destroy_guest(0);
    }
    match plan.end {
        End::WindUp => {
            world.run_guests(900_000 * MS);
            world.disks.pace = Pace { latency_ns: plan.pace.latency_ns, ..Pace::CALM };
            Trouble::end(&plan.trouble, &mut world);
            world.wind_up(!plan.is_clean());
        }
        End::Cut => cut(&mut world, &mut rng),
        End::Shutdown => {
            shut_down(&mut world, &mut rng);
            if plan.is_clean() {
                check_left(&world);
            }
            world.verify_images(!plan.is_clean());
        }
    }
    tell(&world);
}

fn add_disk(world: &mut World, rng: &mut Rng, plan: &Plan, kind: DiskKind) {
    let block_bytes = *rng.pick(&[512, 512, 4096]);
    let mut guests = vec![];
    for _ in 0..rng.between(1, 3) {
        let habits = habits(rng, !plan.is_clean(), 200_000 * MS);
        let mut options = String::new();
        if rng.chance(150) {
            options.push_str(",cache=writethrough");
        }
        if rng.chance(100) {
            options.push_str(",sector=4096");
        }
        let sectors = rng.between(9, 4096) / 8 * 8;
        guests.push(DiskGuest { format: *rng.pick(&FORMATS), sectors, habits, options });
    }
    world.add_disk(kind, block_bytes, guests);
    let segments = *rng.pick(&[0, 32, 256]);
    let (order, queues) = (rng.between(0, 4) as u32, rng.between(1, 8) as u32);
    let flushes = *rng.pick(&[(true, true), (true, true), (false, true), (false, false)]);
    let discards = rng.chance(700);
    let (mdts, pairs) = (rng.between(0, 5) as u8, rng.between(1, 4) as u16);
    if kind == DiskKind::Blk
        && let Some(blk) = &mut world.disks.blk
    {
        blk.offer(&mut world.xs, |nodes| {
            (nodes.indirect_segments_max, nodes.ring_page_order_max) = (segments, order);
            nodes.queues_max = queues;
            (nodes.flush, nodes.barrier) = flushes;
            nodes.discard_granularity_bytes = discards.then_some(16_384);
            nodes.discard_alignment_bytes = 4096;
        });
    }
    if kind == DiskKind::Nvme
        && let Some(nvme) = &world.machine.nvme
    {
        let mut model = nvme.borrow_mut();
        (model.mdts, model.pairs) = (mdts, pairs);
    }
}

fn strike(world: &mut World, rng: &mut Rng, blow: Blow) {
    let away_ns = rng.between(1, 3000) * MS;
    match blow {
        Blow::BackendRestarts => {
            let (queues, order) = (rng.between(1, 8) as u32, rng.between(0, 4) as u32);
            if let Some(blk) = &mut world.disks.blk {
                blk.restart(queues, order);
            }
            world.poke_disks();
        }
        Blow::BackendDies => {
            world.kill_backend();
            world.run_for(away_ns);
            world.revive_backend();
        }
        Blow::Removal => {
            if let Some(nvme) = &world.machine.nvme {
                nvme.borrow_mut().faults.gone = true;
            }
            world.run_for(away_ns);
            detach_and_attach(world, away_ns);
        }
        Blow::Detach => detach_and_attach(world, away_ns),
    }
}

fn detach_and_attach(world: &mut World, away_ns: u64) {
    // The drive loses its cache when it is taken out in the middle of something.
    world.guests.iter_mut().for_each(|guest| guest.oracle.cache_lost());
    for attach in [false, true] {
        if let Some(pci) = &world.disks.pci {
            pci.reconfigure(&mut world.xs, attach);
        }
        world.poke_disks();
        world.run_for(away_ns.max(100 * MS));
    }
}

/// After an orderly end every disk was left in good order.
fn check_left(world: &World) {
    let state = world.xs.text(0, &format!("/local/domain/{S}/device/vbd/51712/state"));
    if world.disks.blk.is_some() {
        // Refused by xenstored for long enough, it was never connected.
        let closed = matches!(state.as_deref(), Some("6" | "1"));
        assert!(closed, "seed {}: the disk was not closed, {state:?}", world.seed);
    }
    if let Some(nvme) = &world.machine.nvme {
        let rests = nvme.borrow().was_shut_down() || nvme.borrow().is_off();
        assert!(rests, "seed {}: no shutdown of the drive", world.seed);
    }
}
