//! One seeded workload on one image in RAM, every answer held against the model at once; and the
//! seeds of all cases, on all processors.

use std::panic::catch_unwind;
use std::sync::Mutex;

use platter_image::{Access, CheckParams, CheckReport, Options, Repair};
use platter_tool::engine::{Engine, options};
use platter_tool::medium::RamFolder;

use crate::cases::{Built, Case, chosen};
use crate::model::{self, Kind, OPS_MAX, Op, SECTOR};
use crate::rng::Rng;

/// Sectors up to which a disk may grow by many at once: with clusters of 512 bytes and counts of
/// 64 bits an L1 table fits in what one refcount block counts up to 258,048.
const SECTORS_MAX: u64 = 600_000;

/// Seeds to run: one, some (`5..90`), or a count from 1 on.
fn seeds(default: u64) -> Vec<u64> {
    let text = |name| std::env::var(name).ok();
    let number =
        |text: &str| text.parse().unwrap_or_else(|_| panic!("no number of a seed: {text}"));
    match text("PLATTER_SEED").as_deref().map(|text| text.split_once("..").ok_or(text)) {
        Some(Err(seed)) => vec![number(seed)],
        Some(Ok((first, end))) => (number(first)..number(end)).collect(),
        None => (1..=text("PLATTER_SEEDS").map_or(default, |text| number(&text))).collect(),
    }
}

/// All chosen seeds of all chosen cases of a format, on all processors. A failure says how to see
/// it again, and is the last of its case.
pub fn all(format: &str, default: u64, test: &str, try_seed: impl Fn(&Case, u64) + Sync) {
    let cases = chosen(format);
    let seeds = seeds(default);
    let turns = seeds.iter().flat_map(|&seed| cases.iter().map(move |&case| (case, seed)));
    let (turns, failed) = (Mutex::new(turns), Mutex::new(Vec::new()));
    let work = || {
        loop {
            let turn = turns.lock().expect("nothing can fail while it is held").next();
            let Some((case, seed)) = turn else { return };
            if failed.lock().expect("nor here").contains(&case.name) {
                continue;
            }
            if catch_unwind(std::panic::AssertUnwindSafe(|| try_seed(case, seed))).is_err() {
                let name = case.name;
                eprintln!("reproduce: PLATTER_CASE={name} PLATTER_SEED={seed} ... {format}_{test}");
                failed.lock().expect("nor here").push(name);
            }
        }
    };
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        (0..processors).for_each(|_| drop(scope.spawn(work)));
    });
    let failed = failed.into_inner().expect("all are done");
    assert!(failed.is_empty(), "failed: {failed:?}");
}

/// A case's files in RAM.
pub fn ram(built: &Built) -> RamFolder {
    let folder = RamFolder::new();
    for (name, bytes) in &built.files {
        folder.put(name, bytes.clone());
    }
    folder
}

/// Options of a seed: memory from the least that a format must live with to plenty.
pub fn seed_options(case: &Case, seed: u64, access: Access) -> Options {
    let mut rng = Rng::new(seed ^ 0x6f70_7473);
    let budget_bytes = rng.pick(&[128 << 10, 256 << 10, 1 << 20]);
    let format = case.format().expect("a case is run only if its format is known");
    Options { budget_bytes, seed, ..options(format, access) }
}

/// Our check of an open image: no corruption, and no leak either if `leaks` are not allowed.
pub fn check(engine: &mut Engine, leaks: bool, when: &str) -> CheckReport {
    let params = CheckParams { repair: Repair::Nothing, budget_bytes: 1 << 20 };
    let report = engine.check(params, |_, _| {});
    let report = report.unwrap_or_else(|fault| panic!("checking {when}: {fault}"));
    let good = report.is_sound() && (leaks || report.leaks == report.leaks_fixed);
    assert!(good, "platter's check {when}: {report:#?}");
    report
}

/// A range that likes the edges of allocation units.
pub fn pick_range(rng: &mut Rng, unit: u64, sectors: u64) -> (u64, u64) {
    let unit = (unit / SECTOR as u64).max(1);
    // Few places, so that operations meet.
    let base = rng.below(sectors.div_ceil(unit).min(6)) * unit;
    let base = if rng.chance(15) { sectors - sectors.min(unit / 2 + 1) } else { base };
    let start = match rng.below(4) {
        0 => base,
        1 => base + unit / 2,
        2 => (base + unit).saturating_sub(1 + rng.below(4)),
        _ => base + rng.below(unit),
    };
    let start = start.min(sectors - 1);
    let most = 2048.min(sectors - start);
    let count = match rng.below(5) {
        0 => 1,
        1 => 1 + rng.below(16),
        2 => unit.min(most),
        3 => (unit * (1 + rng.below(4)) + rng.below(3)).min(most),
        _ => 1 + rng.below(most.min(200)),
    };
    (start, count.clamp(1, most))
}

fn pick_kind(rng: &mut Rng, weights: [u64; 6]) -> Kind {
    let mut at = rng.below(weights.iter().sum());
    let kinds = [Kind::Write, Kind::Zero, Kind::Discard, Kind::Flush, Kind::Reopen, Kind::Grow];
    for (kind, weight) in kinds.into_iter().zip(weights) {
        if at < weight {
            return kind;
        }
        at -= weight;
    }
    Kind::Write
}

/// Sectors more: mostly some, now and then so many that tables move.
pub fn pick_growth(rng: &mut Rng, sectors: u64) -> u64 {
    let room = SECTORS_MAX.saturating_sub(sectors + 60_000);
    match room > 0 && rng.chance(10) {
        true => 60_000 + rng.below(room),
        false => 1 + rng.below(3000),
    }
}

/// Runs `count` operations, then drops the engine as a power cut does.
pub fn workload(case: &Case, built: &Built, folder: &RamFolder, seed: u64, count: usize) -> Run {
    assert!(count <= OPS_MAX);
    let mut rng = Rng::new(seed);
    let options = seed_options(case, seed, Access::ReadWrite);
    let mut engine = Engine::open(folder, &built.top, options.clone())
        .unwrap_or_else(|fault| panic!("opening: {fault}"));
    let mut sectors = engine.sectors();
    let mut sets = vec![model::INITIAL; sectors as usize];
    let mut ops: Vec<Op> = Vec::new();
    // Some seeds have no discards, some hardly a flush.
    let grows = if case.grows() { rng.below(2) } else { 0 };
    let weights = [10, rng.below(5), rng.below(5), 1 + rng.below(4), rng.below(2), grows];
    for number in 0..count {
        let kind = pick_kind(&mut rng, weights);
        let (sector, count) = pick_range(&mut rng, case.unit, sectors);
        let (sector, count) = match kind {
            Kind::Flush | Kind::Reopen => (sector, 0),
            Kind::Grow => (sectors, pick_growth(&mut rng, sectors)),
            _ => (sector, count),
        };
        let began = folder.events_len();
        let result = match kind {
            Kind::Write => engine.write(sector, &model::stamps(number, sector, count)),
            Kind::Zero => engine.write_zeroes(sector, count),
            Kind::Discard => engine.discard(sector, count),
            Kind::Flush => engine.flush(),
            Kind::Reopen => engine.finish().and_then(|()| {
                engine = Engine::open(folder, &built.top, options.clone())?;
                Ok(())
            }),
            Kind::Grow => engine.resize(sectors + count),
        };
        result.unwrap_or_else(|fault| panic!("op {number} {kind:?} {sector}+{count}: {fault}"));
        let op = Op { kind, sector, count, began, done: folder.events_len() };
        if kind == Kind::Grow {
            sectors += count;
            sets.resize(sectors as usize, model::ZERO);
        }
        op.apply(number, &mut sets);
        ops.push(op);
        if std::env::var("PLATTER_SEED").is_ok_and(|seed| !seed.contains("..")) {
            eprintln!("op {number}: {kind:?} {sector}+{count}");
        }
        verify(built, &mut engine, &sets, &op, &mut rng);
    }
    Run { ops, sets }
}

pub struct Run {
    pub ops: Vec<Op>,
    pub sets: Vec<u64>,
}

/// Reads around what an operation touched, and now and then all.
fn verify(built: &Built, engine: &mut Engine, sets: &[u64], op: &Op, rng: &mut Rng) {
    let sectors = sets.len() as u64;
    let (start, end) = match rng.chance(8) {
        true => (0, sectors.min(model::LOOKED_AT)),
        false => (op.sector.saturating_sub(9), (op.sector + op.count + 9).min(sectors)),
    };
    let mut bytes = vec![0xee; (end - start) as usize * SECTOR];
    engine.read(start, &mut bytes).unwrap_or_else(|fault| panic!("reading: {fault}"));
    if let Some(wrong) = model::mismatch(built, sets, start, &bytes) {
        panic!("after {op:?}: {wrong}");
    }
}
