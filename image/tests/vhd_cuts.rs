//! Power cuts in differencing VHD, VHDX and VDI, which QEMU cannot make and so the tool's image
//! tests do not cover: a workload, with growth of the disk in it, is recorded, the power is cut
//! after any of its writes, the writes since the last sync kept, lost, or any mixture, torn at 512
//! bytes; the image must open, hold what was flushed, and elsewhere hold what was there or what
//! was written.
//!
//! Would miss: several writes in flight at once.

mod foreign;

use std::collections::BTreeSet;

use foreign::*;
use platter_image::{Backing, CheckParams, CreateParams, Format, Options, Repair};
use platter_tool::engine::Engine;
use platter_tool::medium::{Event, RamFolder, apply};

/// Values that each sector may have, and the sizes of the disk: what the last flush made durable,
/// and all since.
#[derive(Clone)]
struct Model {
    sectors: Vec<BTreeSet<u8>>,
    sizes: BTreeSet<u64>,
}

struct Op {
    /// Events recorded when it was done.
    done: usize,
    change: Change,
}

#[derive(Clone, Copy)]
enum Change {
    Write { start: u64, count: u64, byte: u8 },
    Zero { start: u64, count: u64 },
    Grow { sectors: u64 },
    Flush,
}

impl Change {
    /// Is all before it durable once it is done?
    fn syncs(self) -> bool {
        matches!(self, Change::Flush | Change::Grow { .. })
    }
}

impl Model {
    fn apply(&mut self, change: Change, done: bool) {
        let (start, count, byte) = match change {
            Change::Write { start, count, byte } => (start, count, byte),
            Change::Zero { start, count } => (start, count, 0),
            Change::Grow { sectors } => {
                if done {
                    self.sizes.clear();
                }
                self.sizes.insert(sectors);
                return;
            }
            Change::Flush => return,
        };
        for set in &mut self.sectors[start as usize..(start + count) as usize] {
            if done {
                set.clear();
            }
            set.insert(byte);
        }
    }
}

/// Values allowed after a cut behind event `cut`.
fn allowed(start: &[u8], ops: &[Op], cut: usize) -> Model {
    let size = ops.iter().map(|op| match op.change {
        Change::Grow { sectors } => sectors as usize,
        _ => start.len(),
    });
    let mut sectors: Vec<_> = start.iter().map(|&b| BTreeSet::from([b])).collect();
    sectors.resize(size.max().unwrap_or(0), BTreeSet::from([0]));
    let mut model = Model { sectors, sizes: BTreeSet::from([start.len() as u64]) };
    let finished = ops.iter().filter(|op| op.done <= cut).count();
    let last_flush = ops[..finished].iter().rposition(|op| op.change.syncs());
    let durable = last_flush.map_or(0, |at| at + 1);
    ops[..durable].iter().for_each(|op| model.apply(op.change, true));
    // The operation that the cut interrupts may show too.
    let end = (finished + 1).min(ops.len());
    ops[durable..end].iter().for_each(|op| model.apply(op.change, false));
    model
}

fn workload(engine: &mut Engine, folder: &RamFolder, rng: &mut Rng, unit: u64) -> Vec<Op> {
    let mut sectors = engine.sectors();
    let mut ops = Vec::new();
    for n in 0..40 {
        let start = match rng.below(3) {
            0 => rng.below(sectors),
            1 => rng.below(sectors / unit) * unit,
            _ => (rng.below(sectors / unit) * unit + unit).saturating_sub(3).min(sectors - 1),
        };
        let most = sectors - start;
        let count = [1, 7, 8, 64, 300, unit][rng.below(6) as usize].min(most);
        let change = match rng.below(24) {
            0..14 => Change::Write { start, count, byte: n as u8 + 10 },
            14..18 => Change::Zero { start, count },
            18 => Change::Grow { sectors: sectors + 8 * (1 + rng.below(700)) },
            _ => Change::Flush,
        };
        match change {
            Change::Write { byte, .. } => {
                engine.write(start, &vec![byte; count as usize * 512]).unwrap()
            }
            Change::Zero { .. } => engine.write_zeroes(start, count).unwrap(),
            Change::Grow { sectors: more } => {
                engine.resize(more).unwrap();
                sectors = more;
            }
            Change::Flush => engine.flush().unwrap(),
        }
        ops.push(Op { done: folder.events_len(), change });
    }
    ops
}

fn cut(durable: &[Vec<u8>], pending: &[Event], rng: &mut Rng) -> Vec<Vec<u8>> {
    let mut files = durable.to_vec();
    let keep = [0, 30, 70, 100][rng.below(4) as usize];
    for event in pending {
        let Event::Write { file, offset, bytes } = event else {
            apply(&mut files, event);
            continue;
        };
        if rng.below(100) >= keep {
            continue;
        }
        let torn = keep < 100 && rng.below(4) == 0;
        for (n, piece) in bytes.chunks(512).enumerate() {
            if !torn || rng.below(2) == 0 {
                let offset = offset + n as u64 * 512;
                apply(&mut files, &Event::Write { file: *file, offset, bytes: piece.to_vec() });
            }
        }
    }
    files
}

fn try_seed(format: Format, logical: &str, seed: u64) {
    let cluster_bytes = match format {
        Format::Vhdx => 1 << 20,
        Format::Vdi => 64 << 10,
        _ => 512 << 10,
    };
    try_blocks(format, logical, cluster_bytes, seed);
}

fn try_blocks(format: Format, logical: &str, cluster_bytes: u64, seed: u64) {
    let suffix = format.name();
    let (parent, top) = (format!("p.{suffix}"), format!("c.{suffix}"));
    let options = [("logical_sector_size", logical)];
    let options = if format == Format::Vhdx { &options[..] } else { &[] };
    let sectors = 5 * 4096 + 40;
    let folder = RamFolder::new();
    let base = CreateParams { cluster_bytes, options, name: &top, ..params(format, sectors) };
    folder.put(&parent, made(&CreateParams { name: &parent, ..base }));
    let mut rng = Rng(seed);
    let mut start = vec![0; sectors as usize];
    let mut engine = open(&folder, &parent, rw(format));
    for n in 0..6 {
        let at = rng.below(sectors - 400);
        engine.write(at, &vec![n + 1; 400 * 512]).unwrap();
        start[at as usize..at as usize + 400].fill(n + 1);
    }
    engine.close().unwrap();
    let identity = open(&folder, &parent, ro(format)).image().identity();
    let backing = Backing { name: &parent, format, identity, sectors };
    let file = folder.put(&top, made(&CreateParams { backing: Some(backing), seed: 2, ..base }));
    let budget_bytes = [128 << 10, 1 << 20][(seed % 2) as usize];
    let options = Options { budget_bytes, seed, ..rw(format) };
    let mut durable: Vec<_> = folder.names().iter().map(|n| folder.bytes(n).unwrap()).collect();
    folder.record();
    let mut engine = open(&folder, &top, options.clone());
    let unit = (cluster_bytes / 512).min(sectors / 4);
    let ops = workload(&mut engine, &folder, &mut rng, unit);
    drop(engine);
    let events = folder.events();
    let mut pending = Vec::new();
    for at in 0..=events.len() {
        if rng.below(events.len() as u64 / 40 + 1) == 0 {
            let files = cut(&durable, &pending, &mut rng);
            let world = RamFolder::new();
            for (name, bytes) in folder.names().iter().zip(&files) {
                world.put(name, bytes.clone());
            }
            let model = allowed(&start, &ops, at);
            let when = format!("{suffix} of {logical}, seed {seed}, cut {at}");
            judge(&world, &top, &options, &model, &when);
        }
        match events.get(at) {
            Some(Event::Sync { file: synced }) => {
                assert_eq!(*synced, file, "only the top is written");
                pending.iter().for_each(|event| apply(&mut durable, event));
                pending.clear();
            }
            Some(event) => pending.push(event.clone()),
            None => {}
        }
    }
}

fn judge(world: &RamFolder, top: &str, options: &Options, model: &Model, when: &str) {
    let mut engine = Engine::open(world, top, options.clone())
        .unwrap_or_else(|fault| panic!("{when}: does not open: {fault}"));
    for _ in 0..2 {
        let disk = read_all(&mut engine);
        assert!(model.sizes.contains(&engine.sectors()), "{when}: of {} sectors", engine.sectors());
        for (n, (sector, set)) in disk.chunks(512).zip(&model.sectors).enumerate() {
            let alike = sector.iter().all(|&b| b == sector[0]);
            assert!(alike && set.contains(&sector[0]), "{when}: sector {n} is {}", sector[0]);
        }
        let report = check_all(&mut engine);
        assert_eq!(report.corruptions, 0, "{when}: {:?}", report.problems);
        engine.close().unwrap();
        engine = open(world, top, options.clone());
    }
}

/// An image of seven blocks, the named ones of which nothing names any more, and what it reads as.
fn leaky(lost: &[u32], kind: &str) -> (RamFolder, Vec<u8>) {
    let (block_bytes, sectors) = (512 << 10, 7 * 1024 - 9);
    let folder = RamFolder::new();
    let base = CreateParams { cluster_bytes: block_bytes, ..params(Format::Vhd, sectors) };
    folder.put("p.vhd", made(&base));
    if kind == "differencing" {
        let identity = open(&folder, "p.vhd", ro(Format::Vhd)).image().identity();
        let backing = Backing { name: "p.vhd", format: Format::Vhd, identity, sectors };
        folder.put("c.vhd", made(&CreateParams { backing: Some(backing), seed: 2, ..base }));
    } else {
        folder.put("c.vhd", made(&base));
    }
    let mut engine = open(&folder, "c.vhd", rw(Format::Vhd));
    for n in [3, 0, 6, 1, 5, 2, 4] {
        engine.write(n * 1024 + 30, &vec![n as u8 + 1; 900 * 512]).unwrap();
    }
    engine.close().unwrap();
    let mut bytes = folder.bytes("c.vhd").unwrap();
    let table = u64::from_be_bytes(bytes[528..536].try_into().unwrap()) as usize;
    for entry in lost {
        bytes[table + *entry as usize * 4..][..4].fill(0xff);
    }
    folder.put("c.vhd", bytes);
    let disk = read_all(&mut open(&folder, "c.vhd", ro(Format::Vhd)));
    (folder, disk)
}

#[test]
fn leaked_blocks_of_a_vhd_are_given_back() {
    let scratch = Scratch::new("vhd-repair");
    for (kind, lost) in [("dynamic", &[0, 3][..]), ("differencing", &[2, 6]), ("dynamic", &[4])] {
        for budget_bytes in [0, 1 << 20] {
            let (folder, disk) = leaky(lost, kind);
            let mut engine = open(&folder, "c.vhd", rw(Format::Vhd));
            let check = |engine: &mut Engine, repair| {
                engine.check(CheckParams { repair, budget_bytes }, |_, _| {}).unwrap()
            };
            let found = check(&mut engine, Repair::Nothing);
            assert_eq!(found.leaks, lost.len() as u64, "{lost:?}: {found:#?}");
            let len = folder.bytes("c.vhd").unwrap().len();
            let fixed = check(&mut engine, Repair::Leaks);
            assert_eq!((fixed.leaks, fixed.leaks_fixed), (found.leaks, found.leaks), "{fixed:#?}");
            let cut = len - folder.bytes("c.vhd").unwrap().len();
            assert!(cut >= lost.len() * (512 << 10), "only {cut} bytes are given back");
            assert!(read_all(&mut engine) == disk, "{kind} {lost:?}");
            // Life goes on in the same session.
            engine.write(lost[0] as u64 * 1024 + 7, &[0x77; 4096]).unwrap();
            engine.close().unwrap();
            let mut disk = disk;
            disk[(lost[0] as usize * 1024 + 7) * 512..][..4096].fill(0x77);
            let mut engine = open(&folder, "c.vhd", ro(Format::Vhd));
            assert!(read_all(&mut engine) == disk, "{kind} {lost:?}, a write later");
            let after = check(&mut engine, Repair::Nothing);
            assert_eq!((after.corruptions, after.leaks), (0, 0), "{after:#?}");
            assert!(engine.image().notes().next().is_none(), "the footer is where it belongs");
            if kind == "dynamic" {
                scratch.put("c.vhd", &folder.bytes("c.vhd").unwrap());
                assert!(scratch.by_qemu("vpc", "c.vhd") == disk, "QEMU reads it");
            }
        }
    }
}

/// A BAT that was moved, with what follows it, is no gap, whatever its length.
#[test]
fn nothing_is_moved_onto_a_table_between_blocks() {
    let folder = RamFolder::new();
    let base = CreateParams { cluster_bytes: 4096, ..params(Format::Vhd, 64) };
    folder.put("a.vhd", made(&base));
    let mut engine = open(&folder, "a.vhd", rw(Format::Vhd));
    engine.write(0, &[1; 512]).unwrap();
    engine.resize(40_000).unwrap();
    engine.write(39_000, &[2; 512]).unwrap();
    let disk = read_all(&mut engine);
    engine.close().unwrap();
    let mut engine = open(&folder, "a.vhd", rw(Format::Vhd));
    for repair in [Repair::Nothing, Repair::Leaks] {
        let report = engine.check(CheckParams { repair, budget_bytes: 0 }, |_, _| {}).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:#?}");
    }
    assert!(read_all(&mut engine) == disk);
}

#[test]
fn a_power_cut_while_a_vhd_is_repaired_loses_nothing() {
    for (seed, lost) in [(1, &[0, 3][..]), (2, &[3, 0, 6, 1]), (3, &[6])] {
        let kind = if seed == 2 { "differencing" } else { "dynamic" };
        let (folder, disk) = leaky(lost, kind);
        let mut rng = Rng(seed);
        let names = folder.names();
        let mut durable: Vec<_> = names.iter().map(|n| folder.bytes(n).unwrap()).collect();
        folder.record();
        let mut engine = open(&folder, "c.vhd", rw(Format::Vhd));
        let repair = CheckParams { repair: Repair::All, budget_bytes: 0 };
        assert_eq!(engine.check(repair, |_, _| {}).unwrap().leaks_fixed, lost.len() as u64);
        engine.write(20, &[9; 512]).unwrap();
        engine.close().unwrap();
        let mut pending = Vec::new();
        let events = folder.events();
        assert!(events.iter().any(|event| matches!(event, Event::SetLen { .. })));
        for at in 0..=events.len() {
            for _ in 0..12 {
                let world = RamFolder::new();
                for (name, bytes) in names.iter().zip(cut(&durable, &pending, &mut rng)) {
                    world.put(name, bytes);
                }
                let when = format!("seed {seed}, cut {at} of {}", events.len());
                let engine = Engine::open(&world, "c.vhd", rw(Format::Vhd));
                let mut engine = engine.unwrap_or_else(|fault| panic!("{when}: {fault}"));
                let mut read = read_all(&mut engine);
                let written = &mut read[20 * 512..21 * 512];
                if written == [9; 512] {
                    written.copy_from_slice(&disk[20 * 512..21 * 512]);
                }
                assert!(read == disk, "{when}");
                let report = engine.check(repair, |_, _| {}).unwrap();
                assert_eq!((report.corruptions, report.leaks), (0, report.leaks_fixed), "{when}");
                let again = read_all(&mut engine);
                assert!(again[21 * 512..] == disk[21 * 512..], "{when}: repaired again");
                engine.close().unwrap();
                let report = check_all(&mut open(&world, "c.vhd", ro(Format::Vhd)));
                assert_eq!((report.corruptions, report.leaks), (0, 0), "{when}: {report:#?}");
            }
            match events.get(at) {
                Some(Event::Sync { .. }) => {
                    pending.iter().for_each(|event| apply(&mut durable, event));
                    pending.clear();
                }
                Some(event) => pending.push(event.clone()),
                None => {}
            }
        }
    }
}

fn seeds() -> std::ops::Range<u64> {
    let count = std::env::var("PLATTER_SEEDS").ok().and_then(|text| text.parse().ok());
    0..count.unwrap_or(3)
}

#[test]
fn a_differencing_vhd_survives() {
    seeds().for_each(|seed| try_seed(Format::Vhd, "512", seed));
}

#[test]
fn a_differencing_vhd_of_large_blocks_survives() {
    seeds().for_each(|seed| try_blocks(Format::Vhd, "512", 32 << 20, seed));
}

#[test]
fn a_differencing_vhdx_survives() {
    seeds().for_each(|seed| try_seed(Format::Vhdx, "512", seed));
}

#[test]
fn a_differencing_vdi_survives() {
    seeds().for_each(|seed| try_seed(Format::Vdi, "512", seed));
}

#[test]
fn a_differencing_vhdx_of_large_sectors_survives() {
    seeds().for_each(|seed| try_seed(Format::Vhdx, "4096", seed));
}
