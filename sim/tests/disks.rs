//! Named scenarios of platter's own disks. Would miss: what Linux's blkback, pciback and a real
//! drive do; the rig is for that.

use platter_image::Format;
use platter_sim::disks::{DiskKind, Pace};
use platter_sim::guest::Habits;
use platter_sim::machine::View;
use platter_sim::world::{DiskGuest, S, World};
use platter_xen::{DomId, Hypervisor};

const MS: u64 = 1_000_000;

fn busy() -> Habits {
    Habits {
        depth: 32,
        segments_max: 64,
        requests: 120,
        writes: 700,
        flushes: 60,
        errors_allowed: true,
        patience_ns: 200_000 * MS,
        ..Habits::calm()
    }
}

fn raw(sectors: u64, habits: Habits) -> DiskGuest {
    DiskGuest { format: Format::Raw, sectors, habits, options: String::new() }
}

/// A world with one disk and a guest on each of these.
fn world(seed: u64, kind: DiskKind, block_bytes: u32, guests: Vec<DiskGuest>) -> World {
    let mut world = World::new(seed, 8192);
    world.add_disk(kind, block_bytes, guests);
    world
}

fn running(world: &World) -> bool {
    world.guests.iter().all(|guest| guest.is_running() || guest.is_done())
}

#[test]
fn a_guest_may_start_before_the_controller_was_found() {
    // A disk on an NVMe controller that pciback had not shown yet was refused at once.
    let mut world = world(1, DiskKind::Nvme, 512, vec![raw(512, Habits::calm())]);
    world.disks.pace = Pace { latency_ns: (2 * MS, 9 * MS), ..Pace::CALM };
    world.run_guests(60_000 * MS);
    world.disks.pace = Pace::CALM;
    world.wind_up(false);
}

#[test]
fn a_slow_bus_is_waited_for_asleep() {
    // A function that was looked at, and one that was taken away, kept platter spinning.
    let mut world = world(9, DiskKind::Nvme, 512, vec![]);
    world.disks.pace = Pace { latency_ns: (30 * MS, 40 * MS), ..Pace::CALM };
    world.run_for(2000 * MS);
    assert!(world.turns < 1000, "{} turns in two seconds", world.turns);
    for attach in [false, true] {
        let turns = world.turns;
        world.disks.pci.as_ref().expect("a controller").reconfigure(&mut world.xs, attach);
        world.poke_disks();
        world.run_for(1000 * MS);
        assert!(world.turns - turns < 500, "{} turns in a second", world.turns - turns);
    }
    let detached = world.disks.pci.as_ref().expect("a controller").is_detached(&world.xs);
    assert!(!detached, "it is back");
}

#[test]
fn small_writes_into_large_blocks_keep_their_neighbours_over_a_power_cut() {
    // 512-byte guests on 4096-byte blocks: each write is a read-modify-write, many at once on
    // the same blocks, two guests side by side; then the power goes.
    for seed in 0..12 {
        for kind in [DiskKind::Nvme, DiskKind::Blk] {
            let habits = Habits { span: 48, segments_max: 3, writes: 900, ..busy() };
            let guests = vec![raw(64, habits.clone()), raw(64, habits)];
            let mut world = world(seed, kind, 4096, guests);
            world.run_until("both", 60_000 * MS, running);
            world.run_for((1 + seed * 2) * MS);
            world.cut_power();
            world.verify_images(true);
        }
    }
}

#[test]
fn a_backend_that_dies_mid_write_and_its_successor_get_every_request() {
    // Nobody hears of it but by a flush: requests are sent again.
    for seed in 0..6 {
        let habits = Habits { flushes: 0, ..busy() };
        let habits = Habits { errors_allowed: false, ..habits };
        let guests = vec![raw(2048, habits.clone()), raw(1024, habits)];
        let mut world = world(seed, DiskKind::Blk, 512, guests);
        world.run_until("both", 60_000 * MS, running);
        for _ in 0..3 {
            world.run_for(2 * MS);
            world.kill_backend();
            world.run_for((1 + seed) * 700 * MS);
            world.revive_backend();
            world.run_for(10 * MS);
        }
        world.run_guests(120_000 * MS);
        world.wind_up(true);
    }
}

#[test]
fn a_flush_after_a_lost_cache_fails_for_each_guest() {
    for (seed, kind) in [(1, DiskKind::Blk), (2, DiskKind::Nvme), (3, DiskKind::Blk)] {
        let habits = Habits { flushes: 30, requests: 300, think_ns: 200_000, ..busy() };
        let guests = (0..3).map(|_| raw(1024, habits.clone())).collect();
        let mut world = world(seed, kind, 512, guests);
        world.run_until("all", 60_000 * MS, running);
        world.run_for(9 * MS);
        match kind {
            DiskKind::Blk => {
                world.kill_backend();
                world.revive_backend();
            }
            DiskKind::Nvme => world.cut_controller(),
        }
        world.run_guests(120_000 * MS);
        let told = world.guests.iter().filter(|guest| guest.errors > 0).count();
        assert_eq!(told, 3, "seed {seed}: a guest was not told");
        world.wind_up(true);
    }
}

#[test]
fn an_end_in_order_closes_the_disk_and_shuts_the_drive_down() {
    let mut world = World::new(5, 8192);
    let habits = Habits { errors_allowed: false, ..busy() };
    world.add_disk(DiskKind::Blk, 512, vec![raw(1024, habits.clone())]);
    world.add_disk(DiskKind::Nvme, 4096, vec![raw(1024, habits)]);
    world.run_until("both", 60_000 * MS, running);
    world.run_for(5 * MS);
    world.xs.write(0, "/local/domain/1/control/shutdown", b"poweroff").expect("dom0");
    world.run_until("the shutdown", 15_000 * MS, |world| world.ended.is_some());
    let state = world.xs.text(0, &format!("/local/domain/{S}/device/vbd/51712/state"));
    assert_eq!(state.as_deref(), Some("6"));
    assert!(world.machine.nvme.as_ref().expect("the drive").borrow().was_shut_down());
    world.verify_images(false);
}

#[test]
fn a_controller_that_is_taken_away_and_given_again_is_used_again() {
    let habits = Habits { requests: 300, think_ns: 8 * MS, ..busy() };
    let mut world = world(6, DiskKind::Nvme, 512, vec![raw(1024, habits)]);
    world.run_until("the guest", 60_000 * MS, running);
    world.run_for(20 * MS);
    let before = world.guests[0].errors;
    for attach in [false, true] {
        world.guests[0].oracle.cache_lost();
        world.disks.pci.as_ref().expect("a controller").reconfigure(&mut world.xs, attach);
        world.poke_disks();
        world.run_for(200 * MS);
    }
    assert!(world.guests[0].errors > before, "nothing works without it");
    world.run_for(500 * MS);
    let after = world.guests[0].errors;
    world.run_guests(120_000 * MS);
    assert_eq!(world.guests[0].errors, after, "it is back");
    world.wind_up(true);
}

#[test]
fn another_controller_at_the_old_address_is_left_alone() {
    let habits = Habits { requests: 600, think_ns: 4 * MS, ..busy() };
    let mut world = world(11, DiskKind::Nvme, 512, vec![raw(1024, habits)]);
    world.run_until("the guest", 60_000 * MS, running);
    world.run_for(20 * MS);
    // `pci-detach`, another drive in its slot, `pci-attach`.
    let change = |world: &mut World, serial: u8, media: Vec<u8>| {
        world.guests[0].oracle.cache_lost();
        world.disks.pci.as_ref().expect("a controller").reconfigure(&mut world.xs, false);
        world.poke_disks();
        world.run_for(200 * MS);
        let mut old = Vec::new();
        if let Some(nvme) = &world.machine.nvme {
            let mut model = nvme.borrow_mut();
            model.power_cut(&mut |_| true);
            model.serial = serial;
            old = core::mem::replace(&mut model.media, media);
        }
        world.disks.pci.as_ref().expect("a controller").reconfigure(&mut world.xs, true);
        world.poke_disks();
        world.run_for(600 * MS);
        old
    };
    let serial = world.machine.nvme.as_ref().expect("a controller").borrow().serial;
    let bytes = world.machine.nvme.as_ref().expect("a controller").borrow().media.len();
    let first = change(&mut world, serial + 1, vec![0xEE; bytes]);
    let errors = world.guests[0].errors;
    assert!(errors > 0, "nobody was told");
    world.run_for(200 * MS);
    assert!(world.guests[0].errors > errors, "another drive serves it");
    let other = change(&mut world, serial, first);
    assert!(other == vec![0xEE; bytes], "the other drive was written to");
    let errors = world.guests[0].errors;
    world.run_guests(120_000 * MS);
    assert_eq!(world.guests[0].errors, errors, "it is back");
    world.wind_up(true);
}

#[test]
fn a_disk_taken_away_in_order_fails_and_one_that_comes_back_serves() {
    let habits = Habits { requests: 400, think_ns: 8 * MS, ..busy() };
    let mut world = world(7, DiskKind::Blk, 512, vec![raw(1024, habits)]);
    world.run_until("the guest", 60_000 * MS, running);
    world.run_for(20 * MS);
    world.detach_backend();
    world.run_for(300 * MS);
    assert!(world.guests[0].errors > 0, "it was taken away on purpose");
    world.revive_backend();
    world.run_for(500 * MS);
    let after = world.guests[0].errors;
    world.run_guests(120_000 * MS);
    assert_eq!(world.guests[0].errors, after, "it is back");
    world.wind_up(true);
}

#[test]
fn another_disk_under_the_old_name_is_left_alone() {
    // What the dead backend had not answered was written to whatever came in its place.
    for (seed, params) in [(1, "/dev/vg0/other"), (2, "/dev/vg0/images")] {
        let habits = Habits { requests: 600, think_ns: 2 * MS, ..busy() };
        let guests = vec![raw(1024, habits.clone()), raw(1024, habits)];
        let mut world = world(seed, DiskKind::Blk, 512, guests);
        world.run_until("both", 60_000 * MS, running);
        world.run_for(20 * MS);
        world.kill_backend();
        // By its name alone, or by the number in its partition table alone.
        let swap = |world: &mut World, params, media| {
            let blk = world.disks.blk.as_mut().expect("a disk");
            blk.params = params;
            core::mem::replace(&mut blk.model.media, media)
        };
        let media = &world.disks.blk.as_ref().expect("a disk").model.media;
        let mut other = media.clone();
        other[1 << 20..].fill(0xEE);
        if seed == 2 {
            other[440] ^= 1;
        }
        let first = swap(&mut world, params, other.clone());
        world.revive_backend();
        world.run_for(800 * MS);
        world.kill_backend();
        let after = swap(&mut world, "/dev/vg0/images", first);
        assert!(after == other, "seed {seed}: the other disk was written to");
        assert!(world.guests.iter().all(|guest| guest.errors > 0), "seed {seed}: nobody was told");
        world.revive_backend();
        world.run_for(500 * MS);
        let errors = |world: &World| world.guests.iter().map(|guest| guest.errors).sum::<u64>();
        let before = errors(&world);
        world.run_guests(120_000 * MS);
        assert_eq!(errors(&world), before, "seed {seed}: it is back");
        world.wind_up(true);
    }
}

#[test]
fn a_disk_that_grows_grows_its_guests_disk() {
    let mut world = world(8, DiskKind::Blk, 512, vec![]);
    let line = world.line("/xvda,format=raw");
    world.attach(&line);
    world.run_until("a verdict", 11_000 * MS, |w| w.toolstack.verdict(&line, true).is_some());
    let path = format!("{}/sectors", line.be());
    assert_eq!(world.xs.number(0, &path), Some(128));
    // A guest must be there: nothing is looked at for nobody.
    let fe = |world: &mut World, key: &str, value: &str| {
        let path = format!("{}/{key}", line.fe());
        world.xs.write(line.guest, &path, value.as_bytes()).expect("its own");
    };
    let view = world.machine.view(line.guest);
    let (gref, port) = connect(view);
    fe(&mut world, "ring-ref", &gref);
    fe(&mut world, "event-channel", &port);
    fe(&mut world, "protocol", "x86_64-abi");
    fe(&mut world, "state", "3");
    world.run_for(500 * MS);
    if let Some(blk) = &mut world.disks.blk {
        blk.grow(&mut world.xs, 1 << 20);
    }
    world.poke_disks();
    world.run_until("the growth", 10_000 * MS, |w| w.xs.number(0, &path) == Some(2048));
}

#[test]
fn a_qcow2_takes_the_room_that_its_partition_got_in_use() {
    let habits = Habits { requests: 900, writes: 900, think_ns: 6 * MS, ..busy() };
    let guest = DiskGuest { format: Format::Qcow2, sectors: 2048, habits, options: String::new() };
    let mut world = world(10, DiskKind::Blk, 512, vec![guest]);
    // `sgdisk -d 1 -n 1`: the same beginning, another end.
    let end = |world: &mut World, sectors: usize| {
        let media = &mut world.disks.blk.as_mut().expect("a disk").model.media;
        media[446 + 12..446 + 16].copy_from_slice(&(sectors as u32).to_le_bytes());
    };
    // Its own tables and four clusters of data.
    end(&mut world, 9 * 128);
    world.run_until("the guest", 60_000 * MS, running);
    world.run_for(500 * MS);
    assert!(world.guests[0].errors > 0, "the partition is full");
    let whole = world.images[0].partition.expect("a partition").bytes / 512;
    end(&mut world, whole);
    world.run_for(4000 * MS);
    let errors = world.guests[0].errors;
    // The disk in it grows too, by the toolstack's word.
    let be = world.guests[0].line.be();
    world.xs.write(0, &format!("{be}/resize"), b"2097152").expect("dom0 may");
    let sectors = format!("{be}/sectors");
    world.run_until("the growth", 10_000 * MS, |w| w.xs.number(0, &sectors) == Some(4096));
    world.run_guests(120_000 * MS);
    assert_eq!(world.guests[0].errors, errors, "there is room");
    world.wind_up(true);
}

#[test]
fn a_disk_whose_backend_is_away_leaves_room_for_others() {
    // It held all requests, and the next disk could not even be opened.
    let habits = Habits { depth: 250, ring_order: 4, segments_max: 1, ..busy() };
    let habits = Habits { requests: 100_000, errors_allowed: true, flushes: 0, ..habits };
    let mut world = world(12, DiskKind::Blk, 512, vec![raw(8192, habits)]);
    world.run_until("the guest", 60_000 * MS, running);
    world.run_for(20 * MS);
    world.kill_backend();
    world.run_for(100 * MS);
    let calm = Habits { requests: 60, ..Habits::calm() };
    let other = world.add_guest(Format::Raw, 512, calm);
    world.run_until("the other", 10_000 * MS, |world| world.guests[other].is_done());
}

/// A ring page and a port for platter, as xenstore wants them.
fn connect(mut hv: View<'_>) -> (String, String) {
    let page = hv.frames_alloc(1).expect("guests have memory");
    hv.store_u32(page, 4, 1);
    hv.store_u32(page, 12, 1);
    let gref = hv.grant(DomId(S), page, true).expect("guests have grants");
    let port = hv.alloc_unbound(DomId(S)).expect("guests have ports");
    (gref.0.to_string(), port.0.to_string())
}
