//! Chains: depth, mixed formats, layers shorter than the top, the merged index kept right by
//! writes, and what a deep chain costs once warm.
//!
//! Would miss: reads in flight while others write; crashes (both in the tool's image tests).

mod foreign;

use std::time::Instant;

use foreign::*;
use platter_image::{
    Backing, CreateParams, Extent, FileNo, Format, Merge, MergeStep, Options, Place, SectorRange,
    Stop,
};
use platter_tool::engine::Engine;
use platter_tool::medium::RamFolder;

const Q: Format = Format::Qcow2;

fn name(n: usize) -> String {
    format!("{n}.qcow2")
}

/// A chain of `depth` qcow2 layers over a raw base, each written here and there; the model of
/// the disk, and how much an open top writes.
fn chain(folder: &RamFolder, depth: usize, sectors: u64, cluster: u64) -> Vec<u8> {
    let mut model: Vec<u8> = (0..sectors * 512).map(|i| (i / 512 % 251) as u8).collect();
    folder.put("base.raw", model.clone());
    let mut rng = Rng(depth as u64);
    for n in 1..depth {
        let below = if n == 1 { "base.raw".into() } else { name(n - 1) };
        let format = if n == 1 { Format::Raw } else { Q };
        let backing = Backing { name: &below, format, identity: None, sectors };
        let params =
            CreateParams { backing: Some(backing), cluster_bytes: cluster, ..params(Q, sectors) };
        folder.put(&name(n), made(&params));
        // Written alone: a file of the chain is not read for whole clusters.
        let writes = if n % 7 == 0 { 3 } else { 1 };
        if n % 50 == 0 || depth < 60 {
            let mut engine = open(folder, &name(n), rw(Q));
            scribble(&mut engine, &mut model, &mut rng, writes, 200);
            engine.close().unwrap();
        }
    }
    model
}

#[test]
fn every_layer_shows_where_those_above_have_nothing() {
    for (cluster, sectors) in [(4096, 20_001), (65536, 40_000)] {
        let folder = RamFolder::new();
        let model = chain(&folder, 40, sectors, cluster);
        let small = Options { budget_bytes: 128 << 10, ..ro(Q) };
        let mut engine = open(&folder, &name(39), small);
        assert_eq!(engine.depth(), 40);
        assert!(read_all(&mut engine) == model);
        assert!(read_all(&mut engine) == model);
    }
}

/// One bad entry of a table below, or a block of it that cannot be read, fails whoever needs it and
/// nobody else, and the rest is in the index all the same.
#[test]
fn damage_below_fails_no_read_of_what_lies_beside_it() {
    let folder = RamFolder::new();
    folder.put("a.qcow2", made(&CreateParams { cluster_bytes: 4096, ..params(Q, 512) }));
    let mut engine = open(&folder, "a.qcow2", rw(Q));
    engine.write(0, &[1; 512 * 512]).unwrap();
    engine.close().unwrap();
    let backing = Backing { name: "a.qcow2", format: Q, identity: None, sectors: 512 };
    let overlay = CreateParams { backing: Some(backing), cluster_bytes: 4096, ..params(Q, 512) };
    folder.put("b.qcow2", made(&overlay));
    let mut engine = open(&folder, "b.qcow2", rw(Q));
    engine.write(0, &[2; 512 * 64]).unwrap();
    engine.close().unwrap();
    let mut bytes = folder.bytes("a.qcow2").unwrap();
    let get64 = |at: u64| u64::from_be_bytes(bytes[at as usize..][..8].try_into().unwrap());
    let l2 = get64(get64(40)) & !(1 << 63);
    let map = |bad: Option<u64>| {
        let mut engine = open(&folder, "b.qcow2", ro(Q));
        (0..64u64).map(|cluster| ask(&mut engine, cluster * 8, bad)).collect::<Vec<bool>>()
    };
    assert!(map(None).iter().all(|&good| good));
    // What the overlay does not hold is behind that block.
    assert_eq!(map(Some(l2)), (0..64).map(|cluster| cluster < 8).collect::<Vec<_>>());
    bytes[l2 as usize + 30 * 8 + 6] |= 2;
    folder.put("a.qcow2", bytes);
    assert_eq!(map(None), (0..64).map(|cluster| cluster != 30).collect::<Vec<_>>());
}

/// Asks for one cluster; the block of file 1 at `bad` cannot be read: who asks for it twice fails.
fn ask(engine: &mut Engine, sector: u64, bad: Option<u64>) -> bool {
    let mut failed = false;
    loop {
        match engine.image().map_read(SectorRange::new(sector, 8)) {
            Ok(_) => return true,
            Err(Stop::Miss(block)) if block.file == FileNo(1) && Some(block.offset) == bad => {
                engine.image().fill_failed(block);
                if std::mem::replace(&mut failed, true) {
                    return false;
                }
            }
            Err(Stop::Miss(block)) => {
                let mut bytes = vec![0; block.len as usize];
                engine.medium(block.file).read_at(block.offset, &mut bytes).unwrap();
                engine.image().fill(block, &bytes);
            }
            Err(_) => return false,
        }
    }
}

#[test]
fn the_index_follows_writes_zeroes_and_discards() {
    let folder = RamFolder::new();
    let sectors = 30_000;
    let mut model = chain(&folder, 12, sectors, 16384);
    let small = Options { budget_bytes: 128 << 10, ..rw(Q) };
    let mut engine = open(&folder, &name(11), small);
    let mut rng = Rng(9);
    for round in 0..60 {
        let mut bytes = vec![0; 512 * 600];
        let start = rng.below(sectors - 600);
        engine.read(start, &mut bytes).unwrap();
        assert!(bytes == model[start as usize * 512..][..bytes.len()], "round {round}");
        scribble(&mut engine, &mut model, &mut rng, 3, 300);
        let (start, count) = (rng.below(sectors - 300), 1 + rng.below(299));
        engine.write_zeroes(start, count).unwrap();
        model[start as usize * 512..(start + count) as usize * 512].fill(0);
        if round % 8 == 0 {
            engine.flush().unwrap();
        }
    }
    assert!(read_all(&mut engine) == model);
    engine.close().unwrap();
    let mut engine = open(&folder, &name(11), ro(Q));
    assert!(read_all(&mut engine) == model);
}

#[test]
fn a_shorter_layer_reads_as_zeros_past_its_end_whatever_lies_below() {
    let folder = RamFolder::new();
    folder.put("base.raw", vec![7; 1000 * 512]);
    let layer = |name: &str, format, sectors, over| {
        let backing = Backing { name, format, identity: None, sectors: over };
        made(&CreateParams { backing: Some(backing), ..params(Q, sectors) })
    };
    folder.put("1.qcow2", layer("base.raw", Format::Raw, 300, 1000));
    folder.put("2.qcow2", layer("1.qcow2", Q, 900, 300));
    let mut engine = open(&folder, "2.qcow2", ro(Q));
    let bytes = read_all(&mut engine);
    assert!(bytes[..300 * 512].iter().all(|&b| b == 7));
    assert!(bytes[300 * 512..].iter().all(|&b| b == 0));
    // And growing over a longer file would show its end.
    let mut engine = open(&folder, "1.qcow2", rw(Q));
    assert!(engine.resize(500).unwrap_err().to_string().contains("longer backing file"));
}

#[test]
fn pieces_in_a_row_are_one_extent() {
    let folder = RamFolder::new();
    let model = chain(&folder, 2, 8192, 65536);
    let mut engine = open(&folder, "1.qcow2", rw(Q));
    engine.write(0, &model[..4 << 20]).unwrap();
    let extent = engine.map(SectorRange::new(3, 2048)).unwrap();
    assert!(matches!(extent, Extent { sectors: 2048, place: Place::File { .. } }), "{extent:?}");
    let extent = engine.map(SectorRange::new(3, 2048)).unwrap();
    assert!(matches!(extent, Extent { sectors: 2048, place: Place::File { .. } }), "{extent:?}");
}

/// Carries out a commit of `over` into `below`, as the tool and the kernel do.
fn merge(folder: &RamFolder, over: &str, below: &str, format: Format) {
    let mut overlay = Engine::open_alone(folder, over, ro(Q)).unwrap();
    let mut base = open(folder, below, rw(format));
    if base.sectors() < overlay.sectors() {
        base.resize(overlay.sectors()).unwrap();
    }
    let mut merge = Merge::new();
    loop {
        match overlay.drive(|image| merge.step(image)).unwrap() {
            MergeStep::Copy { range, .. } => {
                let mut bytes = vec![0; range.bytes() as usize];
                overlay.read(range.start, &mut bytes).unwrap();
                base.write(range.start, &bytes).unwrap();
            }
            MergeStep::Zero { range } => base.write_zeroes(range.start, range.count).unwrap(),
            MergeStep::Done => break,
        }
    }
    assert_eq!(merge.done_sectors(), overlay.sectors());
    base.close().unwrap();
}

#[test]
fn an_overlay_is_committed_into_the_image_below_it() {
    let folder = RamFolder::new();
    let sectors = 20_000;
    let mut model = chain(&folder, 4, sectors, 16384);
    let mut engine = open(&folder, "3.qcow2", rw(Q));
    let mut rng = Rng(4);
    scribble(&mut engine, &mut model, &mut rng, 20, 500);
    engine.write_zeroes(5000, 3000).unwrap();
    model[5000 * 512..8000 * 512].fill(0);
    engine.close().unwrap();
    for (over, below, format) in
        [("3.qcow2", "2.qcow2", Q), ("2.qcow2", "1.qcow2", Q), ("1.qcow2", "base.raw", Format::Raw)]
    {
        merge(&folder, over, below, format);
        let mut engine = open(&folder, below, ro(format));
        assert!(read_all(&mut engine) == model, "{over} into {below}");
    }
}

/// Nanoseconds of one mapping of a random 4 KiB, warm.
fn warm_ns(engine: &mut Engine, sectors: u64) -> f64 {
    let mut best = f64::MAX;
    let places: Vec<u64> = {
        let mut rng = Rng(3);
        (0..20_000).map(|_| rng.below(sectors / 8) * 8).collect()
    };
    for _ in 0..6 {
        let began = Instant::now();
        for &place in &places {
            engine.map(SectorRange::new(place, 8)).unwrap();
        }
        best = best.min(began.elapsed().as_secs_f64() / places.len() as f64 * 1e9);
    }
    best
}

#[test]
fn a_warm_chain_of_500_costs_what_one_image_costs() {
    let folder = RamFolder::new();
    let sectors = 200_000;
    chain(&folder, 500, sectors, 65536);
    let alone = RamFolder::new();
    alone.put("a.qcow2", made(&params(Q, sectors)));
    let mut engine = open(&alone, "a.qcow2", rw(Q));
    engine.write(0, &vec![1; sectors as usize * 512]).unwrap();
    engine.close().unwrap();
    let mut one = open(&alone, "a.qcow2", ro(Q));
    let mut deep = open(&folder, &name(499), ro(Q));
    assert_eq!(deep.depth(), 500);
    let (one, deep) = (warm_ns(&mut one, sectors), warm_ns(&mut deep, sectors));
    eprintln!("one image {one:.0} ns, a chain of 500 {deep:.0} ns a mapping");
    assert!(deep < one * 1.1 + 20.0, "one image {one} ns, a chain of 500 {deep} ns");
}

#[test]
fn a_chain_of_1000_opens_and_one_more_is_refused() {
    let folder = RamFolder::new();
    let model = chain(&folder, 1001, 2048, 65536);
    let mut engine = open(&folder, &name(1000), Options { budget_bytes: 256 << 10, ..ro(Q) });
    assert_eq!(engine.depth(), 1001);
    assert!(read_all(&mut engine) == model);
    let backing = Backing { name: "1000.qcow2", format: Q, identity: None, sectors: 2048 };
    let top = made(&CreateParams { backing: Some(backing), ..params(Q, 2048) });
    folder.put("1001.qcow2", top);
    let fault = Engine::open(&folder, "1001.qcow2", ro(Q)).err().unwrap().to_string();
    assert!(fault.contains("chain depth"), "{fault}");
}
