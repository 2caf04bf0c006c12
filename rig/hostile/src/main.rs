//! The hostile guest: a bare PV kernel that attacks the backend of its first disk.
//!
//! `extra="attack=all secs=2"`: all attacks in turn, or those named, each that could go on for
//! ever for so many seconds; `rounds=N` begins again, `linger=N` stays idle for so many seconds so
//! that others can look at what is left, `slowness=N` has it wait N times as long for a share's
//! server, `die=1` ends with requests under way and no goodbye. One
//! line for each attack, and a `done` line; a backend that did not stand it makes the domain end
//! in a crash. A disk that may only be read can be given as a second one. A guest that has a 9p
//! share attacks its server instead.
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

extern crate alloc;

use alloc::string::String;
use alloc::vec::Vec;

use log::{error, info};
use platter_arch::{BootInfo, Machine, Shutdown};
use platter_hostile::share::{self, ShareGround};
use platter_hostile::{ATTACKS, Ground, attack};
use platter_loadgen::front::{Disk, Shape, connect, grant_all};
use platter_loadgen::guest::SECOND_NS;
use platter_loadgen::random::Random;
use platter_loadgen::xs::XenStore;
use platter_xen::Hypervisor;
use platter_xen::blkif::{Abi, Segment, emit_transfer, op};

platter_arch::entry!(main);

/// What the command line says.
struct Options {
    attacks: Vec<&'static str>,
    seconds: u64,
    rounds: u64,
    seed: u64,
    linger: u64,
    die: bool,
    slowness: u64,
}

fn main(mut machine: Machine, boot: BootInfo) -> ! {
    let options = match parse(boot.cmdline) {
        Ok(options) => options,
        Err(word) => panic!("`{word}` is not understood"),
    };
    let mut xs = XenStore::new(&machine, boot.xenstore_page, boot.xenstore_port);
    if let Some(share) = share::find(&mut machine, &mut xs) {
        attack_share(machine, xs, share, &options);
    }
    let disks = Disk::all(&mut machine, &mut xs);
    info!("domain {}, {} disks", boot.domid.0, disks.len());
    let mut ground = Ground {
        guest: &mut machine,
        xs: &mut xs,
        own: boot.domid,
        disk: disks.first().expect("a disk to attack"),
        read_only: disks.get(1),
        random: Random::new(options.seed),
        attack_ns: options.seconds * SECOND_NS,
    };
    let mut bad = 0u64;
    let mut made = 0u64;
    for round in 1..=options.rounds {
        for name in &options.attacks {
            bad += u64::from(!stand(&mut ground, name, round));
            made += 1;
        }
    }
    linger(ground.guest, options.linger);
    tell(made, bad);
    if options.die {
        leave_in_flight(&mut machine, &mut xs, &disks[0]);
    }
    machine.shutdown(Shutdown::Poweroff)
}

/// All attacks on a share; ends the domain, with requests under way where it is to die.
fn attack_share(mut machine: Machine, mut xs: XenStore, share: Disk, options: &Options) -> ! {
    let mut ground = ShareGround {
        guest: &mut machine,
        xs: &mut xs,
        share,
        random: Random::new(options.seed),
        attack_ns: options.seconds * SECOND_NS,
        slowness: options.slowness,
    };
    let (mut made, mut bad) = (0, 0);
    for name in share::ATTACKS {
        let start_ns = platter_arch::now_ns();
        let outcome = ground.attack(name);
        let ms = (platter_arch::now_ns() - start_ns) / 1_000_000;
        match &outcome {
            Ok(tally) => info!("attack {name} ms={ms} {tally}"),
            Err(why) => error!("attack {name} ms={ms}: {why}"),
        }
        let served = ground.is_served();
        if let Err(why) = &served {
            error!("after {name}: the share is not served: {why}");
        }
        made += 1;
        bad += u64::from(!(outcome.is_ok_and(|tally| tally.served == 0) && served.is_ok()));
    }
    linger(ground.guest, options.linger);
    tell(made, bad);
    if options.die {
        ground.leave_in_flight();
    }
    machine.shutdown(Shutdown::Poweroff)
}

/// Does nothing for so many seconds, while others look at what is left.
fn linger(machine: &mut Machine, seconds: u64) {
    info!("attacks made, idle for {seconds} s");
    let until_ns = platter_arch::now_ns() + seconds * SECOND_NS;
    while platter_arch::now_ns() < until_ns {
        machine.poll(&[], until_ns);
    }
}

fn tell(made: u64, bad: u64) {
    let status = if bad == 0 { "ok" } else { "wrong" };
    info!("done job=0 attacks={made} bad={bad} status={status}");
    assert!(bad == 0, "the backend did not stand {bad} attacks");
}

fn parse(text: &'static str) -> Result<Options, &'static str> {
    let mut options = Options {
        attacks: ATTACKS.to_vec(),
        seconds: 2,
        rounds: 1,
        seed: 1,
        linger: 0,
        die: false,
        slowness: 1,
    };
    for word in text.split_whitespace() {
        let (key, value) = word.split_once('=').ok_or(word)?;
        let number = value.parse::<u64>();
        match key {
            "attack" if value == "all" => {}
            "attack" => options.attacks = value.split(',').collect(),
            "secs" => options.seconds = number.map_err(|_| word)?,
            "rounds" => options.rounds = number.map_err(|_| word)?,
            "seed" => options.seed = number.map_err(|_| word)?,
            "linger" => options.linger = number.map_err(|_| word)?,
            "slowness" => options.slowness = number.map_err(|_| word)?,
            "die" => options.die = value == "1",
            _ => return Err(word),
        }
    }
    Ok(options)
}

/// One attack, and whether the backend stood it: it did nothing forbidden and serves on.
fn stand(ground: &mut Ground<'_, Machine>, name: &str, round: u64) -> bool {
    let start_ns = platter_arch::now_ns();
    let outcome = attack(ground, name);
    let ms = (platter_arch::now_ns() - start_ns) / 1_000_000;
    let good = match &outcome {
        Ok(tally) if tally.served == 0 => {
            info!("attack {name} round={round} ms={ms} {tally}");
            true
        }
        Ok(tally) => {
            error!("attack {name} round={round} ms={ms} {tally}: it must refuse");
            false
        }
        Err(why) => {
            error!("attack {name} round={round} ms={ms}: {why}");
            false
        }
    };
    let served: Result<(), String> = ground.is_served();
    if let Err(why) = &served {
        error!("after {name}: the disk is not served: {why}");
    }
    good && served.is_ok()
}

/// Fills a ring with reads and writes, for whoever ends the domain at once.
fn leave_in_flight(machine: &mut Machine, xs: &mut XenStore, disk: &Disk) {
    let shape = Shape { abi: Abi::X86_64, queues: 2, order: 4 };
    let Ok(mut link) = connect(machine, xs, disk, shape) else { return };
    let Some(page) = machine.frames_alloc(1) else { return };
    let Ok(grefs) = grant_all(machine, disk.back_id, page, true) else { return };
    let segment = Segment { gref: grefs[0], first_sect: 0, last_sect: 7 };
    for (ring, port) in link.wires.rings.iter_mut().zip(&link.wires.ports) {
        for id in 0..512 {
            let operation = if id % 2 == 0 { op::READ } else { op::WRITE };
            ring.put(machine, &emit_transfer(shape.abi, operation, id, 0, id * 8, &[segment]));
        }
        ring.publish(machine);
        machine.notify(*port);
    }
}
