//! The load generator: a bare PV kernel that does to its disks what its command line says.
//!
//! `extra="op=randread bs=4k depth=32 secs=10"` is one run, after which the domain switches
//! itself off; a run that went wrong ends in a crash instead, so that the toolstack sees it.
//! `extra="serve"` takes runs from `data/job` ("NUMBER WORDS..."), one after another, until one
//! says `quit`. Each run prints a `result` line for each disk and a `done` line.
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

extern crate alloc;

use alloc::format;
use alloc::string::String;

use log::{error, info};
use platter_arch::{BootInfo, Machine, Shutdown};
use platter_loadgen::guest::SECOND_NS;
use platter_loadgen::load::Session;
use platter_loadgen::options::Options;
use platter_loadgen::play::{NAMES, Stage};
use platter_loadgen::xs::XenStore;

platter_arch::entry!(main);

/// Where jobs are written, below our own directory.
const JOB: &str = "data/job";

fn main(mut machine: Machine, boot: BootInfo) -> ! {
    let mut xs = XenStore::new(&machine, boot.xenstore_page, boot.xenstore_port);
    let mut session = Session::new(&mut machine, &mut xs);
    info!("domain {}, {} disks", boot.domid.0, session.units.len());
    let good = if boot.cmdline.trim() == "serve" {
        serve(&mut machine, &mut xs, &mut session)
    } else {
        work(&mut machine, &mut xs, &mut session, "0", boot.cmdline)
    };
    if let Err(why) = session.close(&mut machine, &mut xs) {
        panic!("cannot close: {why}");
    }
    assert!(good, "a run went wrong");
    machine.shutdown(Shutdown::Poweroff)
}

fn serve(machine: &mut Machine, xs: &mut XenStore, session: &mut Session) -> bool {
    xs.watch(machine, JOB);
    info!("waiting for jobs");
    let mut last = String::new();
    let mut good = true;
    loop {
        let job = xs.read(machine, JOB).unwrap_or_default();
        if job == last {
            let nap_ns = machine.now_ns() + SECOND_NS;
            xs.wait_change(machine, nap_ns);
            continue;
        }
        last.clone_from(&job);
        match job.split_once(' ') {
            Some((_, "quit")) => return good,
            Some((number, words)) => good &= work(machine, xs, session, number, words),
            None => {}
        }
    }
}

/// One run; whether all went well.
fn work(
    machine: &mut Machine,
    xs: &mut XenStore,
    session: &mut Session,
    number: &str,
    words: &str,
) -> bool {
    let outcome = match Options::parse(words) {
        Ok(options) if options.play.is_some() => play(machine, xs, session, &options),
        Ok(options) => load(machine, xs, session, number, &options),
        Err(why) => Err(why),
    };
    match &outcome {
        Ok(true) => info!("done job={number} status=ok"),
        Ok(false) => error!("done job={number} status=wrong"),
        Err(why) => error!("done job={number} status=failed {why}"),
    }
    outcome == Ok(true)
}

fn load(
    machine: &mut Machine,
    xs: &mut XenStore,
    session: &mut Session,
    number: &str,
    options: &Options,
) -> Result<bool, String> {
    let shape = options.shape;
    let mut good = true;
    for (vdev, report) in session.run(machine, xs, options)? {
        good &= report.is_good();
        info!(
            "result job={number} disk={vdev} op={} bs={} depth={} abi={} queues={} order={} \
             {report}",
            options.op,
            options.block_bytes,
            options.depth,
            shape.abi.protocol(),
            shape.queues,
            shape.order,
        );
    }
    Ok(good)
}

fn play(
    machine: &mut Machine,
    xs: &mut XenStore,
    session: &mut Session,
    options: &Options,
) -> Result<bool, String> {
    session.close(machine, xs)?;
    let wanted = options.play.as_deref().unwrap_or("all");
    let unit = session
        .units
        .iter()
        .find(|unit| options.disks.is_empty() || options.disks.contains(&unit.disk.vdev))
        .ok_or("no such disk")?;
    let generation = 0;
    let mut stage = Stage { guest: machine, xs, disk: &unit.disk, generation };
    let mut good = true;
    for cycle in 1..=options.cycles {
        for name in NAMES.iter().filter(|name| wanted == "all" || wanted == **name) {
            let start_ns = stage.guest.now_ns();
            let outcome = stage.play(name);
            let ms = (stage.guest.now_ns() - start_ns) / 1_000_000;
            match &outcome {
                Ok(()) => info!("play {name} cycle={cycle} ms={ms} ok"),
                Err(why) => error!("play {name} cycle={cycle} ms={ms} failed: {why}"),
            }
            good &= outcome.is_ok();
            if outcome.is_err() {
                stage.is_alive().map_err(|why| format!("after {name}: {why}"))?;
            }
        }
    }
    if !(wanted == "all" || NAMES.contains(&wanted)) {
        return Err(format!("nobody is called {wanted}"));
    }
    Ok(good)
}
