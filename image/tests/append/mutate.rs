//! Damaged images: bytes changed at random where metadata is, then opened, read, written,
//! flushed, checked, grown. Whatever is answered, nothing panics and nothing hangs.
//!
//! Would miss: what takes more than a few changed bytes; the fuzz targets look for that.

use super::*;
use std::panic::{AssertUnwindSafe, catch_unwind};

const SECTORS: u64 = 9000;

/// A written image of each format, and the files beside it.
fn seeds() -> Vec<(Format, RamFolder)> {
    let split = [("subformat", "twoGbMaxExtentSparse")];
    let zero = [("zeroed_grain", "on")];
    let kinds: [(Format, &[(&str, &str)]); 5] = [
        (Format::Qed, &[]),
        (Format::Vdi, &[]),
        (Format::Qcow, &[]),
        (Format::Vmdk, &zero),
        (Format::Vmdk, &split),
    ];
    let make = |(format, options): (Format, &[(&str, &str)])| {
        let folder = RamFolder::new();
        create(&folder, &CreateParams { options, ..params(format, SECTORS) });
        let mut engine = open(&folder, "image", rw(format));
        scribble(&mut engine, &mut vec![0; SECTORS as usize * 512], &mut Rng(1), 12, 200);
        engine.close().unwrap();
        (format, folder)
    };
    let mut seeds: Vec<_> = kinds.into_iter().map(make).collect();
    let data = |number: u64| 3 << 60 | number << 48;
    let tables = [(0, data(2)), (1, data(0)), (2, 2 << 60), (100, data(1))];
    for (line, bytes) in [
        ("RW 3000 VMFSSPARSE", vmdk::cowd(&vec![7; 3000 * 512], &[0, 1, 2, 77, 2999])),
        ("RW 8000 SESPARSE", vmdk::se_sparse(8000, &tables, 3)),
    ] {
        let folder = RamFolder::new();
        folder.put("image", format!("# x\nCID=1\n{line} \"extent\"\n").into_bytes());
        folder.put("extent", bytes);
        seeds.push((Format::Vmdk, folder));
    }
    seeds
}

/// Uses an image as far as it lets itself be used; says if it opened.
fn exercise(folder: &RamFolder, format: Format, rng: &mut Rng) -> bool {
    let Ok(mut engine) = Engine::open(folder, "image", rw(format)) else { return false };
    let sectors = engine.sectors();
    let mut bytes = vec![0; 64 * 512];
    for _ in 0..12 {
        let sector = rng.below(sectors.clamp(1, SECTORS));
        let _ = engine.read(sector, &mut bytes[..512 * (1 + rng.below(64) as usize)]);
        let sector = rng.below(sectors.clamp(1, SECTORS));
        let _ = match rng.below(4) {
            0 => engine.write_zeroes(sector, 1 + rng.below(500)),
            1 => engine.discard(sector, 1 + rng.below(500)),
            2 => engine.flush(),
            _ => engine.write(sector, &bytes[..512 * (1 + rng.below(64) as usize)]),
        };
    }
    if sectors < 1 << 24 {
        let params =
            platter_image::CheckParams { repair: platter_image::Repair::All, budget_bytes: 0 };
        let _ = engine.check(params, |_, _| {});
    }
    let _ = engine.drive(|image| image.resize(sectors.saturating_add(5000)));
    let _ = engine.close();
    true
}

#[test]
fn changed_bytes_are_refused_or_served_but_never_a_panic() {
    let rounds = std::env::var("PLATTER_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(150);
    for (format, pristine) in seeds() {
        let mut opened = 0;
        for seed in 0..rounds {
            let mut rng = Rng(seed);
            let folder = RamFolder::new();
            let names = pristine.names();
            let victim = rng.below(names.len() as u64) as usize;
            for (index, name) in names.into_iter().enumerate() {
                let mut bytes = pristine.bytes(&name).unwrap();
                // Headers, descriptors, directories and the first tables are all in front.
                let front = bytes.len().min(if rng.below(2) == 0 { 512 } else { 600_000 }) as u64;
                let changes = if index == victim { 1 + rng.below(4) } else { 0 };
                for _ in 0..changes {
                    let at = rng.below(front) as usize;
                    let used = (at..bytes.len().min(at + 5000)).find(|&at| bytes[at] != 0);
                    let at = used.unwrap_or(at);
                    bytes[at] = [0, 1, 0x7f, 0x80, 0xff, rng.next() as u8][rng.below(6) as usize];
                }
                folder.put(&name, bytes);
            }
            let run = AssertUnwindSafe(|| exercise(&folder, format, &mut rng));
            match catch_unwind(run) {
                Ok(did_open) => opened += u64::from(did_open),
                Err(_) => panic!("{format:?} seed {seed} panics"),
            }
        }
        assert!(opened > rounds / 5, "{format:?}: only {opened} of {rounds} opened at all");
    }
}
