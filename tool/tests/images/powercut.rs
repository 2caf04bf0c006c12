//! The power switch: a workload is recorded, then the power is cut after each of its writes, with
//! the writes since the last sync kept, lost, torn at 512 bytes, or any mixture (which is also
//! any order); the image must open, hold what was flushed, hold old or new elsewhere, and be
//! found sound by our check and by QEMU's.
//!
//! Would miss: lies of a disk about its sync, and writes that a failing disk refuses.

use std::panic::{AssertUnwindSafe, catch_unwind};

use platter_image::{Access, CheckParams, Repair};
use platter_tool::engine::Engine;
use platter_tool::medium::{Event, RamFolder, apply};

use crate::cases::{Built, Case, Check, Scratch, chosen};
use crate::model::{self, Op, SECTOR};
use crate::rng::Rng;
use crate::{juggle, run};

/// How the writes since the last sync fare.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Kept,
    Lost,
    /// All kept but the last, which is torn.
    LastTorn,
    /// All lost but the last.
    LastKept,
    /// Each kept with this chance in a hundred, some of them torn.
    Mixed(u64),
}

const FATES: [Fate; 7] = [
    Fate::Kept,
    Fate::Lost,
    Fate::LastTorn,
    Fate::LastKept,
    Fate::Mixed(15),
    Fate::Mixed(50),
    Fate::Mixed(85),
];

/// The files as the syncs so far guarantee them, and what is not guaranteed.
struct Disk {
    durable: Vec<Vec<u8>>,
    pending: Vec<Event>,
}

impl Disk {
    fn new(built: &Built) -> Disk {
        let durable = built.files.iter().map(|(_, bytes)| bytes.clone()).collect();
        Disk { durable, pending: Vec::new() }
    }

    fn advance(&mut self, event: &Event) {
        let Event::Sync { file } = event else {
            return self.pending.push(event.clone());
        };
        let of_file = |event: &Event| match event {
            Event::Write { file: f, .. } | Event::SetLen { file: f, .. } => f == file,
            Event::Sync { .. } => false,
        };
        for event in self.pending.iter().filter(|event| of_file(event)) {
            apply(&mut self.durable, event);
        }
        self.pending.retain(|event| !of_file(event));
    }

    fn cut(&self, fate: Fate, rng: &mut Rng) -> Vec<Vec<u8>> {
        let mut files = self.durable.clone();
        let last = self.pending.len().saturating_sub(1);
        for (at, event) in self.pending.iter().enumerate() {
            match fate {
                Fate::Kept => apply(&mut files, event),
                Fate::Lost => {}
                Fate::LastTorn if at == last => tear(&mut files, event, rng),
                Fate::LastTorn => apply(&mut files, event),
                Fate::LastKept if at == last => apply(&mut files, event),
                Fate::LastKept => {}
                Fate::Mixed(_) if rng.chance(20) => tear(&mut files, event, rng),
                Fate::Mixed(percent) if rng.chance(percent) => apply(&mut files, event),
                Fate::Mixed(_) => {}
            }
        }
        files
    }
}

/// Keeps some of a write's 512-byte sectors.
fn tear(files: &mut [Vec<u8>], event: &Event, rng: &mut Rng) {
    let Event::Write { file, offset, bytes } = event else {
        return apply(files, event);
    };
    let mut at = 0;
    while at < bytes.len() {
        let here = offset + at as u64;
        let end = bytes.len().min(at + SECTOR - here as usize % SECTOR);
        if rng.chance(50) {
            let piece = bytes[at..end].to_vec();
            apply(files, &Event::Write { file: *file, offset: here, bytes: piece });
        }
        at = end;
    }
}

/// Cuts tried for each seed.
fn cuts_max(default: usize) -> usize {
    std::env::var("PLATTER_CUTS").ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// What was done, and the sectors of the disk at the end.
struct Recorded {
    ops: Vec<Op>,
    sectors: u64,
}

/// What may be found after a cut.
struct After<'a> {
    sets: &'a [u64],
    sizes: &'a [u64],
}

/// One seed of one case; with `syncs` false the disk forgets that it was told to sync.
fn try_seed(case: &Case, seed: u64, syncs: bool) {
    let built = case.build();
    let folder = run::ram(&built);
    folder.record();
    let mut rng = Rng::new(seed ^ 0x6375_7473);
    let count = 12 + rng.below(30) as usize;
    // Every second seed has several requests in flight.
    let run = match seed % 2 {
        0 => juggle::workload(case, &built, &folder, seed, count),
        _ => run::workload(case, &built, &folder, seed, count),
    };
    let run = Recorded { sectors: run.sets.len() as u64, ops: run.ops };
    let events = folder.events();
    let every = (events.len() + 1).div_ceil(cuts_max(120)).max(1);
    let mut disk = Disk::new(&built);
    for cut in 0..=events.len() {
        if rng.below(every as u64) == 0 {
            try_cut(case, &built, &disk, &run, seed, cut);
        }
        match events.get(cut) {
            Some(Event::Sync { .. }) if !syncs => {}
            Some(event) => disk.advance(event),
            None => {}
        }
    }
}

fn try_cut(case: &Case, built: &Built, disk: &Disk, run: &Recorded, seed: u64, cut: usize) {
    let mut rng = Rng::new(seed.wrapping_mul(1_000_003) ^ cut as u64);
    let Recorded { ops, sectors } = run;
    let after = After {
        sets: &model::after_cut(ops, *sectors, cut),
        sizes: &model::sizes_after_cut(ops, *sectors, cut),
    };
    // Two of the fates here, the others at other cuts.
    for _ in 0..2 {
        let fate = rng.pick(&FATES);
        let files = disk.cut(fate, &mut rng);
        let judge = AssertUnwindSafe(|| judge(case, built, &files, &after, seed, &mut rng));
        if let Err(panic) = catch_unwind(judge) {
            keep(built, &files);
            let done = ops.iter().filter(|op| op.done <= cut).count();
            eprintln!("cut after {cut} events ({done} operations), fate {fate:?}, then:");
            eprintln!("{:#?}", &ops[done.saturating_sub(2)..(done + 1).min(ops.len())]);
            std::panic::resume_unwind(panic);
        }
    }
}

/// Leaves the files of a failure where `PLATTER_KEEP` says.
fn keep(built: &Built, files: &[Vec<u8>]) {
    if let Ok(path) = std::env::var("PLATTER_KEEP") {
        for ((name, _), bytes) in built.files.iter().zip(files) {
            let _ = std::fs::write(std::path::Path::new(&path).join(name), bytes);
        }
    }
}

/// Opens what a cut left and holds it against the model and the checks.
fn judge(case: &Case, built: &Built, files: &[Vec<u8>], after: &After, seed: u64, rng: &mut Rng) {
    if rng.chance(4) {
        judge_by_qemu(case, built, files, after);
    }
    let folder = RamFolder::new();
    for ((name, _), bytes) in built.files.iter().zip(files) {
        folder.put(name, bytes.clone());
    }
    let options = run::seed_options(case, seed, Access::ReadWrite);
    let engine = Engine::open(&folder, &built.top, options.clone());
    let mut engine = engine.unwrap_or_else(|fault| panic!("does not open: {fault}"));
    let sectors = engine.sectors();
    assert!(after.sizes.contains(&sectors), "the disk's size: {sectors} of {:?}", after.sizes);
    let sets = &after.sets[..sectors as usize];
    read_all(built, &mut engine, sets, "after the cut");
    run::check(&mut engine, true, "after the cut");
    if rng.chance(10) {
        let params = CheckParams { repair: Repair::All, budget_bytes: 64 << 10 };
        let report = engine.check(params, |_, _| {});
        let report = report.unwrap_or_else(|fault| panic!("repairing after the cut: {fault}"));
        let mends = ["qcow2", "vhd", "vhdx"].contains(&case.format);
        assert!(!mends || report.leaks == report.leaks_fixed, "repair after the cut: {report:#?}");
        read_all(built, &mut engine, sets, "after the cut and a repair");
        run::check(&mut engine, !mends, "after the cut and a repair");
    }
    if rng.chance(25) {
        // Life goes on: a write, a clean close, and all is as the model says.
        let op = model::OPS_MAX - 1;
        let (sector, count) = run::pick_range(rng, case.unit, sets.len() as u64);
        let mut sets = sets.to_vec();
        let written = engine.write(sector, &model::stamps(op, sector, count));
        written.unwrap_or_else(|fault| panic!("a write after the cut: {fault}"));
        sets[sector as usize..(sector + count) as usize].fill(model::bit(op));
        engine.close().unwrap_or_else(|fault| panic!("closing after the cut: {fault}"));
        let mut engine = Engine::open(&folder, &built.top, options)
            .unwrap_or_else(|fault| panic!("does not open again: {fault}"));
        read_all(built, &mut engine, &sets, "after the cut, a write and a close");
        run::check(&mut engine, true, "after the cut, a write and a close");
    }
}

/// All of a disk but the middle of a long one.
fn read_all(built: &Built, engine: &mut Engine, sets: &[u64], when: &str) {
    const PIECE: u64 = 2048;
    let sectors = sets.len() as u64;
    for (n, start) in (0..sectors).step_by(PIECE as usize).enumerate() {
        let count = PIECE.min(sectors - start);
        let is_last = sectors - start <= 2 * PIECE;
        if start >= model::LOOKED_AT && !is_last && n % 16 > 0 {
            continue;
        }
        let mut bytes = vec![0xee; count as usize * SECTOR];
        engine.read(start, &mut bytes).unwrap_or_else(|fault| panic!("reading {when}: {fault}"));
        if let Some(wrong) = model::mismatch(built, sets, start, &bytes) {
            panic!("{when}: {wrong}");
        }
    }
}

fn judge_by_qemu(case: &Case, built: &Built, files: &[Vec<u8>], after: &After) {
    let scratch = Scratch::new("cut");
    let named = built.files.iter().zip(files);
    let named: Vec<_> = named.map(|((name, _), bytes)| (name.clone(), bytes.clone())).collect();
    scratch.write(&named);
    if case.check != Check::No {
        let repair = case.check == Check::Repair;
        let (code, text) = scratch.qemu_check(case.qemu, &built.top, repair);
        let good = code == 0 || code == 3 || (case.format == "vdi" && only_counts_too_many(&text));
        assert!(good, "qemu-img check says {code}: {text}");
    }
    let disk = scratch.read_by_qemu(case.qemu, &built.top);
    // QEMU rounds some sizes up.
    let sectors = (disk.len() / SECTOR) as u64;
    let sectors = after.sizes.iter().filter(|&&size| size <= sectors).max();
    let sectors = *sectors.expect("QEMU finds the disk shorter than it may be") as usize;
    let (sets, disk) = (&after.sets[..sectors], &disk[..sectors * SECTOR]);
    if let Some(wrong) = model::mismatch(built, sets, 0, disk) {
        panic!("as QEMU reads it after the cut: {wrong}");
    }
}

/// VDI counts its blocks in the header, durably before the map names them. A cut in between
/// leaves a count that is too high: unused blocks, which qemu-img calls an error.
fn only_counts_too_many(text: &str) -> bool {
    let numbers = text.lines().find_map(|line| {
        let (is, should) = line
            .strip_prefix("ERROR: allocated blocks mismatch, is ")?
            .split_once(", should be ")?;
        Some((is.parse::<u64>().ok()?, should.trim().parse::<u64>().ok()?))
    });
    text.matches("ERROR").count() == 1 && numbers.is_some_and(|(is, should)| is < should)
}

/// All chosen seeds of all chosen cases of a format; a failure says how to see it again.
fn all(format: &str) {
    for case in chosen(format) {
        for seed in run::seeds(2) {
            if let Err(panic) = catch_unwind(|| try_seed(case, seed, true)) {
                let name = case.name;
                eprintln!("reproduce: PLATTER_CASE={name} PLATTER_SEED={seed} ... {format}_cut");
                std::panic::resume_unwind(panic);
            }
        }
    }
}

/// The harness itself: syncs that do nothing must be noticed.
#[test]
fn a_disk_without_syncs_is_caught() {
    let case = chosen("raw").into_iter().next();
    let Some(case) = case else { return };
    let caught = (1..20).any(|seed| catch_unwind(|| try_seed(case, seed, false)).is_err());
    assert!(caught, "no seed noticed that nothing was ever durable");
}

macro_rules! formats {
    ($($test:ident $format:literal)*) => {
        $(#[test]
        fn $test() {
            all($format);
        })*
    };
}

formats! {
    raw_cut "raw"
    qcow2_cut "qcow2"
    qcow_cut "qcow"
    qed_cut "qed"
    vhd_cut "vhd"
    vhdx_cut "vhdx"
    vmdk_cut "vmdk"
    vdi_cut "vdi"
}
