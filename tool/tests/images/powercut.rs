//! The power switch: a workload is recorded, then the power is cut after each of its writes, with
//! the writes since the last sync kept, lost, torn at 512 bytes, or any mixture (which is also
//! any order); the image must open, hold what was flushed, hold old or new elsewhere, and be
//! found sound by our check and by QEMU's.
//!
//! Would miss: lies of a disk about its sync, and writes that a failing disk refuses.

use std::panic::{AssertUnwindSafe, catch_unwind};

use platter_image::{Access, CheckParams, Place, Repair, SectorRange};
use platter_tool::engine::Engine;
use platter_tool::medium::Event;

use crate::cases::{Built, Case, Check, Scratch, chosen};
use crate::model::{self, Op, SECTOR};
use crate::pages::{Pages, PagesFolder, apply, tear};
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
    durable: Vec<Pages>,
    pending: Vec<Event>,
}

impl Disk {
    fn new(built: &Built) -> Disk {
        let durable = built.files.iter().map(|(_, bytes)| Pages::new(bytes)).collect();
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

    fn cut(&self, fate: Fate, rng: &mut Rng) -> Vec<Pages> {
        let mut files = self.durable.clone();
        let last = self.pending.len().saturating_sub(1);
        for (at, event) in self.pending.iter().enumerate() {
            match fate {
                Fate::Kept => apply(&mut files, event),
                Fate::Lost => {}
                Fate::LastTorn if at == last => tear(&mut files, event, || rng.chance(50)),
                Fate::LastTorn => apply(&mut files, event),
                Fate::LastKept if at == last => apply(&mut files, event),
                Fate::LastKept => {}
                Fate::Mixed(_) if rng.chance(20) => tear(&mut files, event, || rng.chance(50)),
                Fate::Mixed(percent) if rng.chance(percent) => apply(&mut files, event),
                Fate::Mixed(_) => {}
            }
        }
        files
    }
}

/// Cuts tried for each seed.
fn cuts_max(default: usize) -> usize {
    std::env::var("PLATTER_CUTS").ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// What was done, and what all cuts of it are judged by.
struct Recorded<'a> {
    case: &'a Case,
    built: &'a Built,
    seed: u64,
    ops: Vec<Op>,
    /// Of the disk at the end.
    sectors: u64,
    names: Vec<String>,
}

/// What may be found after a cut.
struct After<'a> {
    sets: &'a [u64],
    sizes: &'a [u64],
}

/// One seed of one case; with `syncs` false the disk forgets that it was told to sync.
fn try_seed(case: &Case, seed: u64, syncs: bool) {
    let built = &*case.build();
    let folder = run::ram(built);
    folder.record();
    let mut rng = Rng::new(seed ^ 0x6375_7473);
    let count = 12 + rng.below(30) as usize;
    // Every second seed has several requests in flight.
    let run = match seed % 2 {
        0 => juggle::workload(case, built, &folder, seed, count),
        _ => run::workload(case, built, &folder, seed, count),
    };
    let (sectors, names) = (run.sets.len() as u64, folder.names());
    let run = Recorded { case, built, seed, ops: run.ops, sectors, names };
    let events = folder.events();
    let every = (events.len() + 1).div_ceil(cuts_max(120)).max(1);
    let mut disk = Disk::new(built);
    let mut looked = Looked::default();
    for cut in 0..=events.len() {
        if rng.below(every as u64) == 0 {
            try_cut(&run, &disk, &mut looked, cut);
        }
        match events.get(cut) {
            Some(Event::Sync { .. }) if !syncs => {}
            Some(event) => disk.advance(event),
            None => {}
        }
    }
}

fn try_cut(run: &Recorded, disk: &Disk, looked: &mut Looked, cut: usize) {
    let mut rng = Rng::new(run.seed.wrapping_mul(1_000_003) ^ cut as u64);
    let Recorded { ops, sectors, .. } = run;
    let after = After {
        sets: &model::after_cut(ops, *sectors, cut),
        sizes: &model::sizes_after_cut(ops, *sectors, cut),
    };
    // Two of the fates here, the others at other cuts.
    for _ in 0..2 {
        let fate = rng.pick(&FATES);
        let files = disk.cut(fate, &mut rng);
        let judge = AssertUnwindSafe(|| judge(run, &files, &after, looked, &mut rng));
        if let Err(panic) = catch_unwind(judge) {
            keep(run, &files);
            let done = ops.iter().filter(|op| op.done <= cut).count();
            eprintln!("cut after {cut} events ({done} operations), fate {fate:?}, then:");
            eprintln!("{:#?}", &ops[done.saturating_sub(2)..(done + 1).min(ops.len())]);
            std::panic::resume_unwind(panic);
        }
    }
}

/// Leaves the files of a failure where `PLATTER_KEEP` says.
fn keep(run: &Recorded, files: &[Pages]) {
    if let Ok(path) = std::env::var("PLATTER_KEEP") {
        for (name, file) in run.names.iter().zip(files) {
            let _ = std::fs::write(std::path::Path::new(&path).join(name), file.bytes());
        }
    }
}

/// Opens what a cut left and holds it against the model and the checks.
fn judge(run: &Recorded, files: &[Pages], after: &After, looked: &mut Looked, rng: &mut Rng) {
    let &Recorded { case, built, seed, .. } = run;
    if !case.qemu.is_empty() && rng.below(1000) < qemu_per_mille() {
        judge_by_qemu(run, files, after);
    }
    let folder = PagesFolder::new(&run.names, files.to_vec());
    let options = run::seed_options(case, seed, Access::ReadWrite);
    let engine = Engine::open(&folder, &built.top, options.clone());
    let mut engine = engine.unwrap_or_else(|fault| panic!("does not open: {fault}"));
    let sectors = engine.sectors();
    assert!(after.sizes.contains(&sectors), "the disk's size: {sectors} of {:?}", after.sizes);
    let sets = &after.sets[..sectors as usize];
    looked.hold(built, &folder, &mut engine, sets, "after the cut");
    run::check(&mut engine, true, "after the cut");
    if rng.chance(10) {
        let params = CheckParams { repair: Repair::All, budget_bytes: 64 << 10 };
        let report = engine.check(params, |_, _| {});
        let report = report.unwrap_or_else(|fault| panic!("repairing after the cut: {fault}"));
        let mends = ["qcow2", "vhd", "vhdx"].contains(&case.format);
        assert!(!mends || report.leaks == report.leaks_fixed, "repair after the cut: {report:#?}");
        looked.hold(built, &folder, &mut engine, sets, "after the cut and a repair");
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
        looked.hold(built, &folder, &mut engine, &sets, "after the cut, a write and a close");
        run::check(&mut engine, true, "after the cut, a write and a close");
    }
}

/// What sectors were found to hold, at this cut and those before: most is the same each time, and
/// looked at once.
#[derive(Default)]
struct Looked {
    /// By sector: the number of the bytes last found there, and the set of what they are.
    seen: Vec<(u64, u64)>,
    /// By sector: the set of what zeros are there.
    zeros: Vec<u64>,
}

impl Looked {
    /// Holds all of a disk against the model, but for the middle of a long one.
    fn hold(
        &mut self,
        built: &Built,
        folder: &PagesFolder,
        engine: &mut Engine,
        sets: &[u64],
        when: &str,
    ) {
        const PIECE: u64 = 2048;
        let sectors = sets.len() as u64;
        let know = |sector| model::values(built, sector as u64, &[0; SECTOR]);
        self.zeros.extend((self.zeros.len()..sets.len()).map(know));
        self.seen.resize(self.zeros.len(), (0, 0));
        for (n, start) in (0..sectors).step_by(PIECE as usize).enumerate() {
            let end = sectors.min(start + PIECE);
            let is_last = sectors - start <= 2 * PIECE;
            if start >= model::LOOKED_AT && !is_last && n % 16 > 0 {
                continue;
            }
            let mut at = start;
            while at < end {
                let range = SectorRange::new(at, end - at);
                let held = self.hold_first(built, folder, engine, sets, range);
                at += held.unwrap_or_else(|wrong| panic!("{when}: {wrong}"));
            }
        }
    }

    /// Holds the first piece of a range against the model, and says how many sectors it has.
    fn hold_first(
        &mut self,
        built: &Built,
        folder: &PagesFolder,
        engine: &mut Engine,
        sets: &[u64],
        range: SectorRange,
    ) -> Result<u64, String> {
        let told = |fault| format!("reading: {fault}");
        let extent = engine.map(range).map_err(told)?;
        let sectors = range.start..range.start + extent.sectors;
        match extent.place {
            Place::Zero => {
                for sector in sectors {
                    self.hold_sector(built, sets, sector, None)?;
                }
            }
            Place::File { file, offset } => {
                let number = folder.number(engine.path(file));
                let file = &folder.files()[number];
                for (sector, at) in sectors.zip((offset as usize..).step_by(SECTOR)) {
                    self.hold_sector(built, sets, sector, file.sector(at))?;
                }
            }
            Place::Memory { offset } => {
                let len = extent.sectors as usize * SECTOR;
                let bytes = engine.image().bytes(offset, len);
                if let Some(wrong) = model::mismatch(built, sets, range.start, bytes) {
                    return Err(wrong);
                }
            }
        }
        Ok(extent.sectors)
    }

    fn hold_sector(
        &mut self,
        built: &Built,
        sets: &[u64],
        sector: u64,
        found: Option<(u64, &[u8])>,
    ) -> Result<(), String> {
        let at = sector as usize;
        let (values, bytes) = match found {
            None => (self.zeros[at], &[0; SECTOR][..]),
            Some((number, bytes)) => {
                if self.seen[at].0 != number {
                    self.seen[at] = (number, model::values(built, sector, bytes));
                }
                (self.seen[at].1, bytes)
            }
        };
        if values & sets[at] == 0 {
            return Err(model::wrong(sector, values, sets[at], bytes));
        }
        Ok(())
    }
}

/// Of a thousand cuts, how many QEMU is asked about: its two processes take as long as a hundred
/// of our own looks.
fn qemu_per_mille() -> u64 {
    let text = std::env::var("PLATTER_QEMU");
    text.ok().and_then(|text| text.parse().ok()).unwrap_or(10)
}

fn judge_by_qemu(run: &Recorded, files: &[Pages], after: &After) {
    let &Recorded { case, built, .. } = run;
    let scratch = Scratch::new("cut");
    let named = run.names.iter().zip(files);
    let named: Vec<_> = named.map(|(name, file)| (name.clone(), file.bytes())).collect();
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
    run::all(format, 6, "cut", |case, seed| try_seed(case, seed, true));
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
