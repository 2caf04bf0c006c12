//! VHDX as whole images: chains, sectors of 4096 bytes, the log, hostile structures, growing, and
//! what other authors' readers say of what is written here.
//!
//! Would miss: several writes in flight at once (the tool's image tests), power cuts in
//! differencing disks (tests/vhd_cuts.rs), readers that nobody here has.

mod foreign;

use foreign::*;
use platter_image::{Backing, CreateParams, Format};
use platter_tool::engine::Engine;
use platter_tool::medium::{Event, RamFolder, apply};

const MIB: usize = 1 << 20;
const HEADERS: [usize; 2] = [64 << 10, 128 << 10];
const REGIONS: [usize; 2] = [192 << 10, 256 << 10];
/// Where new images have their metadata items and BAT.
const METADATA: usize = 2 * MIB;
const BAT: usize = 3 * MIB;

fn new(sectors: u64, block: u64, options: &[(&str, &str)]) -> Vec<u8> {
    made(&CreateParams { cluster_bytes: block, options, ..params(Format::Vhdx, sectors) })
}

fn child(folder: &RamFolder, parent: &str, options: &[(&str, &str)], seed: u64) -> Vec<u8> {
    let mut below = open(folder, parent, ro(Format::Vhdx));
    let (identity, sectors) = (below.image().identity(), below.sectors());
    let backing = Backing { name: parent, format: Format::Vhdx, identity, sectors };
    let base = params(Format::Vhdx, sectors);
    made(&CreateParams { backing: Some(backing), options, seed, ..base })
}

fn get64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// CRC-32C, bit by bit, over bytes whose sum at `at` is taken as zeros; stored there.
fn seal(bytes: &mut [u8], at: usize) {
    bytes[at..at + 4].fill(0);
    let mut crc = u32::MAX;
    for &byte in bytes.iter() {
        crc ^= byte as u32;
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
        }
    }
    put(bytes, at, &(!crc).to_le_bytes());
}

fn current(bytes: &[u8]) -> usize {
    let sequence = HEADERS.map(|at| get64(bytes, at + 8));
    HEADERS[(sequence[1] > sequence[0]) as usize]
}

#[test]
fn what_is_written_reads_the_same_to_qemu_libvhdi_and_dissect() {
    let scratch = Scratch::new("vhdx-written");
    let large: &[(&str, &str)] = &[("logical_sector_size", "4096")];
    for (name, block, options) in [
        ("a.vhdx", 1 << 20, &[][..]),
        ("b.vhdx", 0, &[][..]),
        ("c.vhdx", 1 << 20, &[("subformat", "fixed")][..]),
        ("d.vhdx", 2 << 20, large),
        ("e.vhdx", 1 << 20, &[("subformat", "fixed"), ("logical_sector_size", "4096")][..]),
    ] {
        let folder = RamFolder::new();
        folder.put(name, new(20_000, block, options));
        let mut model = vec![0; 20_000 * 512];
        let mut engine = open(&folder, name, rw(Format::Vhdx));
        scribble(&mut engine, &mut model, &mut Rng(block), 40, 300);
        engine.write_zeroes(4096, 4096).unwrap();
        model[4096 * 512..8192 * 512].fill(0);
        engine.close().unwrap();
        assert!(read_all(&mut open(&folder, name, ro(Format::Vhdx))) == model);
        scratch.put(name, &folder.bytes(name).unwrap());
        // QEMU refuses logical sectors of 4096 bytes.
        if !options.contains(&large[0]) {
            scratch.ok("qemu-img", &["check", "-f", "vhdx", name]);
            assert!(scratch.by_qemu("vhdx", name) == model, "QEMU reads {name}");
        }
        for reader in ["libvhdi", "dissect"] {
            let Some(disk) = scratch.by_reader(reader, &[name]) else { continue };
            assert!(disk == model, "{reader} reads {name}");
        }
    }
}

#[test]
fn a_chain_keeps_every_sector_apart() {
    for (kind, logical) in [("a", "512"), ("b", "4096")] {
        let scratch = Scratch::new(&format!("vhdx-chain-{kind}"));
        let folder = RamFolder::new();
        let options = [("logical_sector_size", logical)];
        let sectors = 3 * 4096 + 80;
        let mut model = vec![0; sectors as usize * 512];
        folder.put("0.vhdx", new(sectors, 1 << 20, &options));
        for layer in 0..4u64 {
            let name = format!("{layer}.vhdx");
            if layer > 0 {
                let below = format!("{}.vhdx", layer - 1);
                folder.put(&name, child(&folder, &below, &options, layer));
            }
            let mut engine = open(&folder, &name, rw(Format::Vhdx));
            assert_eq!(engine.depth() as u64, layer + 1);
            assert!(read_all(&mut engine) == model, "an empty layer shows what is below");
            scribble(&mut engine, &mut model, &mut Rng(layer), 25, 60);
            if layer == 2 {
                engine.write_zeroes(4096, 4096).unwrap();
                model[4096 * 512..8192 * 512].fill(0);
            }
            engine.close().unwrap();
            let mut engine = open(&folder, &name, ro(Format::Vhdx));
            assert!(read_all(&mut engine) == model);
            assert_eq!(check_all(&mut engine).corruptions, 0);
            scratch.put(&name, &folder.bytes(&name).unwrap());
        }
        let chain = ["3.vhdx", "2.vhdx", "1.vhdx", "0.vhdx"];
        if let Some(disk) = scratch.by_reader("libvhdi", &chain) {
            assert!(disk == model, "libvhdi reads the chain of {logical}");
        }
        if let Some(disk) = scratch.by_reader("dissect", &chain[..1]) {
            assert!(disk == model, "dissect reads the chain of {logical}");
        }
    }
}

#[test]
fn a_chunks_bitmap_block_serves_all_its_blocks_and_large_blocks_too() {
    // A block of 256 MiB has 64 KiB of bits; chunks of 4 GiB, so two bitmap blocks.
    let folder = RamFolder::new();
    let sectors = 5 << 21;
    folder.put("p.vhdx", new(sectors, 0, &[]));
    let mut engine = open(&folder, "p.vhdx", rw(Format::Vhdx));
    engine.write(1000, &[1; 4096]).unwrap();
    engine.write(sectors - 8, &[1; 4096]).unwrap();
    engine.close().unwrap();
    for block in [1 << 20, 32 << 20] {
        let mut below = open(&folder, "p.vhdx", ro(Format::Vhdx));
        let identity = below.image().identity();
        let backing = Backing { name: "p.vhdx", format: Format::Vhdx, identity, sectors };
        let base = params(Format::Vhdx, sectors);
        let base = CreateParams { cluster_bytes: block, backing: Some(backing), ..base };
        folder.put("c.vhdx", made(&base));
        let mut engine = open(&folder, "c.vhdx", rw(Format::Vhdx));
        let places = [1001, 70_000, 3 << 20, (4 << 21) - 1, 4 << 21, sectors - 1];
        for place in places {
            engine.write(place, &[2; 512]).unwrap();
        }
        engine.close().unwrap();
        let mut engine = open(&folder, "c.vhdx", ro(Format::Vhdx));
        assert_eq!(check_all(&mut engine).corruptions, 0);
        let mut read = |sector| {
            let mut bytes = [9; 512];
            engine.read(sector, &mut bytes).unwrap();
            bytes[0]
        };
        assert!(places.iter().all(|&place| read(place) == 2));
        assert_eq!((read(1000), read(1002), read(sectors - 2)), (1, 1, 1));
        assert_eq!((read(69_999), read(4 << 20)), (0, 0));
    }
}

#[test]
fn space_that_was_let_go_is_used_again_after_a_reopen() {
    let folder = RamFolder::new();
    folder.put("a.vhdx", new(10 * 2048, 1 << 20, &[]));
    for round in 1..6u8 {
        let mut engine = open(&folder, "a.vhdx", rw(Format::Vhdx));
        engine.write(2048, &vec![round; 3 * MIB]).unwrap();
        let mut rest = vec![1; 5 * MIB];
        engine.read(4 * 2048, &mut rest).unwrap();
        assert!(rest.iter().all(|&b| b == 0));
        engine.flush().unwrap();
        engine.discard(2048, 3 * 2048).unwrap();
        engine.close().unwrap();
        let mut engine = open(&folder, "a.vhdx", rw(Format::Vhdx));
        // A sector alone: what was in its new place before must not show.
        engine.write(5000, &[round; 512]).unwrap();
        let disk = read_all(&mut engine);
        assert!(
            disk.iter().enumerate().all(|(n, &b)| b == if n / 512 == 5000 { round } else { 0 })
        );
        engine.discard(0, 10 * 2048).unwrap();
        engine.close().unwrap();
    }
    assert_eq!(folder.bytes("a.vhdx").unwrap().len(), 7 * MIB);
}

#[test]
fn a_parent_that_was_written_is_refused() {
    let folder = RamFolder::new();
    folder.put("p.vhdx", new(4096, 0, &[]));
    folder.put("c.vhdx", child(&folder, "p.vhdx", &[], 5));
    // Opening it for writing without a write changes nothing.
    open(&folder, "p.vhdx", rw(Format::Vhdx)).close().unwrap();
    open(&folder, "c.vhdx", ro(Format::Vhdx));
    let mut engine = open(&folder, "p.vhdx", rw(Format::Vhdx));
    engine.write(0, &[1; 512]).unwrap();
    engine.close().unwrap();
    let fault = Engine::open(&folder, "c.vhdx", ro(Format::Vhdx)).err().unwrap();
    assert!(fault.to_string().contains("the parent is not the image"), "{fault}");
}

#[test]
fn the_first_write_changes_both_guids_before_anything_else() {
    let folder = RamFolder::new();
    let file = folder.put("a.vhdx", new(4096, 1 << 20, &[]));
    let before = folder.bytes("a.vhdx").unwrap();
    let mut engine = open(&folder, "a.vhdx", rw(Format::Vhdx));
    engine.flush().unwrap();
    assert!(folder.bytes("a.vhdx").unwrap() == before, "an idle disk is left alone");
    folder.record();
    engine.write(9, &[1; 512]).unwrap();
    engine.close().unwrap();
    let mut files = vec![Vec::new(); file + 1];
    files[file] = before.clone();
    let mut other = None;
    for event in folder.events() {
        if let Event::Write { offset, .. } = event
            && other.is_none()
            && !HEADERS.contains(&(offset as usize))
        {
            let header = &files[file][current(&files[file])..];
            let old = &before[current(&before)..];
            assert!(header[16..32] != old[16..32] && header[32..48] != old[32..48]);
            other = Some(offset);
        }
        apply(&mut files, &event);
    }
    assert!(other.is_some());
    // Closed: the log is empty, and both headers say so.
    for at in HEADERS {
        assert!(files[file][at + 48..at + 64].iter().all(|&b| b == 0));
    }
    assert_eq!(
        get64(&files[file], HEADERS[0] + 8).abs_diff(get64(&files[file], HEADERS[1] + 8)),
        1
    );
}

/// An image whose last flush was cut off between the log and the tables; what it must read as.
fn dirty() -> (Vec<u8>, Vec<u8>) {
    let folder = RamFolder::new();
    let file = folder.put("a.vhdx", new(8192, 1 << 20, &[]));
    let mut model = vec![0; 8192 * 512];
    let mut engine = open(&folder, "a.vhdx", rw(Format::Vhdx));
    engine.write(10, &[1; 1024]).unwrap();
    model[10 * 512..12 * 512].fill(1);
    engine.flush().unwrap();
    let before = folder.bytes("a.vhdx").unwrap();
    folder.record();
    engine.write(4096, &[2; 1024]).unwrap();
    model[4096 * 512..4098 * 512].fill(2);
    engine.flush().unwrap();
    let mut files = vec![Vec::new(); file + 1];
    files[file] = before;
    let in_place = |event: &Event| match event {
        Event::Write { offset, .. } => (BAT..BAT + MIB).contains(&(*offset as usize)),
        _ => false,
    };
    let events = folder.events();
    assert!(events.iter().any(in_place));
    events.iter().take_while(|event| !in_place(event)).for_each(|event| apply(&mut files, event));
    (files[file].clone(), model)
}

#[test]
fn a_dirty_log_is_replayed_into_the_file_or_over_it() {
    let (bytes, model) = dirty();
    let folder = RamFolder::new();
    folder.put("a.vhdx", bytes.clone());
    let mut engine = open(&folder, "a.vhdx", ro(Format::Vhdx));
    assert!(read_all(&mut engine) == model, "read-only, the log lies over the file");
    assert!(engine.image().notes().next().unwrap().1.contains("in memory"));
    assert_eq!(check_all(&mut engine).corruptions, 0);
    assert!(folder.bytes("a.vhdx").unwrap() == bytes, "read-only changes nothing");
    let scratch = Scratch::new("vhdx-dirty");
    scratch.put("a.vhdx", &bytes);
    scratch.ok("qemu-img", &["check", "-r", "all", "-f", "vhdx", "a.vhdx"]);
    assert!(scratch.by_qemu("vhdx", "a.vhdx") == model, "QEMU replays it to the same");
    let mut engine = open(&folder, "a.vhdx", rw(Format::Vhdx));
    assert!(read_all(&mut engine) == model);
    drop(engine);
    let now = folder.bytes("a.vhdx").unwrap();
    assert!(now[current(&now) + 48..][..16].iter().all(|&b| b == 0), "the log is empty");
    assert!(now[current(&now) + 16..][..16] != bytes[current(&bytes) + 16..][..16]);
    assert!(now[current(&now) + 32..][..16] == bytes[current(&bytes) + 32..][..16]);
    scratch.put("a.vhdx", &now);
    assert!(scratch.by_qemu("vhdx", "a.vhdx") == model, "QEMU reads what was replayed");
}

#[test]
fn a_dirty_log_of_qemu_is_replayed() {
    // QEMU leaves its log in the file when it is killed after a write.
    let scratch = Scratch::new("vhdx-qemu-log");
    scratch.ok("qemu-img", &["create", "-q", "-f", "vhdx", "-o", "block_size=1M", "a.vhdx", "9M"]);
    let script = "write -P 1 0 3M\nwrite -P 2 5M 64k\nabort\n";
    let shell = format!("printf '{script}' | qemu-io -f vhdx a.vhdx; true");
    scratch.run("sh", &["-c", &shell]);
    let bytes = scratch.get("a.vhdx");
    let dirty = bytes[current(&bytes) + 48..][..16].iter().any(|&b| b != 0);
    let folder = RamFolder::new();
    folder.put("a.vhdx", bytes);
    let mut model = vec![0; 9 * MIB];
    model[..3 * MIB].fill(1);
    model[5 * MIB..5 * MIB + (64 << 10)].fill(2);
    assert!(read_all(&mut open(&folder, "a.vhdx", ro(Format::Vhdx))) == model, "{dirty}");
    assert!(read_all(&mut open(&folder, "a.vhdx", rw(Format::Vhdx))) == model, "{dirty}");
}

/// A log entry: (is data, file offset, length of zeros or byte of data).
fn entry(
    guid: &[u8],
    sequence: u64,
    tail: u32,
    flushed: u64,
    changes: &[(bool, u64, u64)],
) -> Vec<u8> {
    let heads = (changes.len() + 2).div_ceil(128);
    let data = changes.iter().filter(|change| change.0).count();
    let mut b = vec![0; (heads + data) * 4096];
    let length = b.len() as u32;
    put(&mut b, 0, b"loge");
    put(&mut b, 8, &length.to_le_bytes());
    put(&mut b, 12, &tail.to_le_bytes());
    put(&mut b, 16, &sequence.to_le_bytes());
    put(&mut b, 24, &(changes.len() as u32).to_le_bytes());
    put(&mut b, 32, guid);
    put(&mut b, 48, &flushed.to_le_bytes());
    put(&mut b, 56, &flushed.to_le_bytes());
    let mut sector = heads;
    for (n, &(is_data, offset, value)) in changes.iter().enumerate() {
        let at = 64 + n * 32;
        put(&mut b, at, if is_data { b"desc" } else { b"zero" });
        put(&mut b, at + 16, &offset.to_le_bytes());
        put(&mut b, at + 24, &sequence.to_le_bytes());
        if !is_data {
            put(&mut b, at + 8, &value.to_le_bytes());
            continue;
        }
        put(&mut b, at + 4, &[value as u8; 4]);
        put(&mut b, at + 8, &[value as u8; 8]);
        let at = sector * 4096;
        b[at..at + 4096].fill(value as u8);
        put(&mut b, at, b"data");
        put(&mut b, at + 4, &((sequence >> 32) as u32).to_le_bytes());
        put(&mut b, at + 4092, &(sequence as u32).to_le_bytes());
        sector += 1;
    }
    seal(&mut b, 4);
    b
}

/// An image with these entries at these sectors of its log.
fn logged(entries: &[(usize, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = new(8192, 1 << 20, &[("subformat", "fixed")]);
    for (sector, entry) in entries {
        for (n, piece) in entry.chunks(4096).enumerate() {
            put(&mut bytes, MIB + (sector + n) % 256 * 4096, piece);
        }
    }
    let at = current(&bytes);
    put(&mut bytes, at + 48, &[7; 16]);
    seal(&mut bytes[at..at + 4096], 4);
    bytes
}

#[test]
fn the_active_sequence_is_the_valid_one_with_the_highest_number() {
    let guid = [7; 16];
    let at = (BAT + 4096) as u64;
    let size = new(8192, 1 << 20, &[("subformat", "fixed")]).len() as u64;
    let e = |sequence, tail: u32, value| {
        entry(&guid, sequence, tail * 4096, size, &[(true, at, value)])
    };
    let mut torn = e(9, 30, 99);
    torn[4096 + 100] ^= 1;
    let foreign = entry(&[8; 16], 50, 40 * 4096, size, &[(true, at, 98)]);
    for (entries, want) in [
        (vec![(0, e(5, 0, 1))], 1),
        // Two entries of one sequence, applied in order.
        (vec![(0, e(5, 0, 1)), (2, e(6, 0, 2))], 2),
        // An older sequence elsewhere.
        (vec![(0, e(5, 0, 1)), (10, e(9, 10, 3))], 3),
        (vec![(0, e(9, 0, 4)), (10, e(5, 10, 3))], 4),
        // A head whose tail is not in the run makes no sequence.
        (vec![(0, e(5, 0, 1)), (10, e(9, 77, 3))], 1),
        // Torn, and of another GUID.
        (vec![(0, e(5, 0, 1)), (30, torn)], 1),
        (vec![(0, e(5, 0, 1)), (40, foreign)], 1),
        // Around the end of the log.
        (vec![(254, e(5, 254, 1)), (0, e(6, 254, 6))], 6),
        (vec![(255, e(5, 255, 7))], 7),
    ] {
        let folder = RamFolder::new();
        folder.put("a.vhdx", logged(&entries));
        drop(open(&folder, "a.vhdx", rw(Format::Vhdx)));
        let bytes = folder.bytes("a.vhdx").unwrap();
        assert!(bytes[at as usize..][..4096].iter().all(|&b| b == want), "{want}");
    }
}

#[test]
fn zero_descriptors_and_a_longer_file_are_replayed() {
    let guid = [7; 16];
    let long = 40 * MIB as u64;
    let size = new(8192, 1 << 20, &[("subformat", "fixed")]).len() as u64;
    let at = (BAT + 8192) as u64;
    let mut both = entry(&guid, 1, 0, size, &[(true, at, 5), (false, at + 4096, 8192)]);
    put(&mut both, 56, &long.to_le_bytes());
    seal(&mut both, 4);
    let mut bytes = logged(&[(0, both)]);
    bytes[at as usize..][..5 * 4096].fill(9);
    let folder = RamFolder::new();
    folder.put("a.vhdx", bytes);
    drop(open(&folder, "a.vhdx", ro(Format::Vhdx)));
    drop(open(&folder, "a.vhdx", rw(Format::Vhdx)));
    let bytes = folder.bytes("a.vhdx").unwrap();
    let block = |n: usize| bytes[at as usize + n * 4096];
    assert_eq!((block(0), block(1), block(2), block(3)), (5, 0, 0, 9));
    assert_eq!(bytes.len() as u64, long);
}

#[test]
fn hostile_logs_are_refused_and_change_nothing() {
    let guid = [7; 16];
    let size = new(8192, 1 << 20, &[("subformat", "fixed")]).len() as u64;
    let one = |offset, flushed| vec![(0, entry(&guid, 1, 0, flushed, &[(true, offset, 5)]))];
    let many: Vec<_> = (0..255)
        .map(|n| {
            (n, {
                let mut b = entry(&guid, 1, 0, 0, &[]);
                put(&mut b, 8, &(256u32 * 4096).to_le_bytes());
                b
            })
        })
        .collect();
    let mut long = entry(&guid, 1, 0, size, &[(true, BAT as u64, 5)]);
    put(&mut long, 56, &u64::MAX.to_le_bytes());
    seal(&mut long, 4);
    for (entries, part) in [
        (vec![(0, long)], "VHDX log: the file's length"),
        (vec![], "no valid sequence"),
        (one(BAT as u64, size + 1), "cut off"),
        (one(65536, size), "log descriptor"),
        (one(MIB as u64 + 4096, size), "log descriptor"),
        (one(size, size), "log descriptor"),
        (one(u64::MAX - 4095, size), "log descriptor"),
        (vec![(0, entry(&guid, 1, 0, size, &[(false, BAT as u64, 1 << 62)]))], "log descriptor"),
        (many, "no valid sequence"),
    ] {
        for options in [ro(Format::Vhdx), rw(Format::Vhdx)] {
            let folder = RamFolder::new();
            let bytes = logged(&entries);
            folder.put("a.vhdx", bytes.clone());
            let fault = Engine::open(&folder, "a.vhdx", options).err().unwrap().to_string();
            assert!(fault.contains(part), "{fault:?} does not say {part:?}");
            // Only the header's GUID may have changed, before the replay began.
            let now = folder.bytes("a.vhdx").unwrap();
            assert!(now[..HEADERS[0]] == bytes[..HEADERS[0]]);
            assert!(now[REGIONS[0]..] == bytes[REGIONS[0]..]);
        }
    }
}

#[test]
fn hostile_structures_are_refused_in_a_sentence() {
    let header = |edit: fn(&mut [u8])| {
        let mut bytes = new(9000, 0, &[]);
        for at in HEADERS {
            edit(&mut bytes[at..at + 4096]);
            seal(&mut bytes[at..at + 4096], 4);
        }
        refused(bytes, "a.vhdx", rw(Format::Vhdx))
    };
    let region = |edit: fn(&mut [u8])| {
        let mut bytes = new(9000, 0, &[]);
        for at in REGIONS {
            edit(&mut bytes[at..at + 65536]);
            seal(&mut bytes[at..at + 65536], 4);
        }
        refused(bytes, "a.vhdx", rw(Format::Vhdx))
    };
    let meta = |edit: fn(&mut [u8])| {
        let mut bytes = new(9000, 0, &[]);
        edit(&mut bytes[METADATA..METADATA + MIB]);
        refused(bytes, "a.vhdx", rw(Format::Vhdx))
    };
    const ITEMS: usize = 64 << 10;
    for (fault, part) in [
        (header(|h| h[66] = 2), "VHDX version"),
        (header(|h| h[64] = 1), "VHDX log version"),
        (header(|h| put(h, 68, &4096u32.to_le_bytes())), "VHDX log length"),
        (header(|h| put(h, 68, &(1u32 << 30).to_le_bytes())), "VHDX log length"),
        (header(|h| put(h, 72, &1u64.to_le_bytes())), "VHDX log offset"),
        (header(|h| put(h, 72, &(1u64 << 40).to_le_bytes())), "beyond the end"),
        (header(|h| h[0] = 0), "neither holds"),
        (header(|h| put(h, 8, &u64::MAX.to_le_bytes())), "VHDX header's sequence number"),
        (region(|r| put(r, 8, &3000u32.to_le_bytes())), "region tables, neither holds"),
        (region(|r| r[16] ^= 1), "unknown VHDX region"),
        (region(|r| put(r, 32, &(7u64 << 20).to_le_bytes())), "region, not in the file"),
        (region(|r| put(r, 32, &u64::MAX.to_le_bytes())), "region, not in the file"),
        (region(|r| put(r, 32, &(1u64 << 20).to_le_bytes())), "on each other"),
        (region(|r| put(r, 40, &0u32.to_le_bytes())), "region, not in the file"),
        (region(|r| r.copy_within(16..48, 48)), "twice"),
        (region(|r| put(r, 8, &1u32.to_le_bytes())), "missing"),
        (meta(|m| m[0] = 0), "metadata table"),
        (meta(|m| put(m, 10, &3000u16.to_le_bytes())), "metadata table"),
        (meta(|m| m[32] ^= 1), "unknown VHDX metadata item"),
        (meta(|m| put(m, 48, &u32::MAX.to_le_bytes())), "metadata item's offset"),
        (meta(|m| put(m, 48, &64u32.to_le_bytes())), "metadata item's offset"),
        (meta(|m| put(m, 52, &4u32.to_le_bytes())), "missing or short"),
        (meta(|m| m.copy_within(32..64, 64)), "twice"),
        (meta(|m| put(m, ITEMS, &0u32.to_le_bytes())), "VHDX block size"),
        (meta(|m| put(m, ITEMS, &(3u32 << 20).to_le_bytes())), "VHDX block size"),
        (meta(|m| put(m, ITEMS, &(1u32 << 31).to_le_bytes())), "VHDX block size"),
        (meta(|m| put(m, ITEMS + 4, &8u32.to_le_bytes())), "VHDX file parameters"),
        (meta(|m| put(m, ITEMS + 4, &2u32.to_le_bytes())), "missing or short"),
        (meta(|m| put(m, ITEMS + 8, &0u64.to_le_bytes())), "VHDX virtual disk size"),
        (meta(|m| put(m, ITEMS + 8, &(1u64 << 60).to_le_bytes())), "VHDX virtual disk size"),
        (meta(|m| put(m, ITEMS + 8, &(63u64 << 40).to_le_bytes())), "BAT, too short"),
        (meta(|m| put(m, ITEMS + 8, &513u64.to_le_bytes())), "VHDX virtual disk size"),
        (meta(|m| put(m, ITEMS + 32, &1024u32.to_le_bytes())), "VHDX logical sector size"),
        (meta(|m| put(m, ITEMS + 36, &0u32.to_le_bytes())), "VHDX physical sector size"),
        (refused(vec![0; 4096], "a.vhdx", rw(Format::Vhdx)), "not such an image"),
        (refused(b"vhdxfile".to_vec(), "a.vhdx", rw(Format::Vhdx)), "neither holds"),
    ] {
        assert!(fault.contains(part), "{fault:?} does not say {part:?}");
    }
}

/// [MS-VHDX] 2.6.1.2: an item may be empty.
#[test]
fn an_empty_metadata_item_is_none() {
    let mut bytes = new(9000, 0, &[]);
    let entry = METADATA + 32 + 5 * 32;
    // The parent locator's GUID, with neither offset nor length, not required.
    let locator = [
        0x2d, 0x5f, 0xd3, 0xa8, 0x0b, 0xb3, 0x4d, 0x45, 0xab, 0xf7, 0xd3, 0xd8, 0x48, 0x34, 0xab,
        0x0c,
    ];
    put(&mut bytes, METADATA + 10, &6u16.to_le_bytes());
    put(&mut bytes, entry, &locator);
    let folder = RamFolder::new();
    folder.put("a.vhdx", bytes);
    assert_eq!(open(&folder, "a.vhdx", rw(Format::Vhdx)).sectors(), 9000);
}

/// A region that is not known and not required belongs to somebody: no block goes there.
#[test]
fn regions_of_others_are_kept() {
    let image = |count: usize, offset: u64| {
        let mut bytes = new(20_000, 1 << 20, &[]);
        bytes.resize(10 * MIB, 0);
        for at in REGIONS {
            let table = &mut bytes[at..at + 65536];
            put(table, 8, &(2 + count as u32).to_le_bytes());
            for n in 0..count {
                let entry = 16 + (2 + n) * 32;
                table[entry..entry + 16].fill(0xee);
                put(table, entry + 16, &offset.to_le_bytes());
                put(table, entry + 24, &(2 * MIB as u32).to_le_bytes());
            }
            seal(table, 4);
        }
        bytes[5 * MIB..7 * MIB].fill(0x77);
        bytes
    };
    for fixed in [false, true] {
        let folder = RamFolder::new();
        let mut bytes = image(1, 5 * MIB as u64);
        bytes.resize(if fixed { 40 * MIB } else { 10 * MIB }, 0);
        folder.put("a.vhdx", bytes);
        folder.fix(fixed);
        let mut engine = open(&folder, "a.vhdx", rw(Format::Vhdx));
        let mut model = vec![0; 20_000 * 512];
        scribble(&mut engine, &mut model, &mut Rng(5), 40, 300);
        engine.close().unwrap();
        assert!(read_all(&mut open(&folder, "a.vhdx", ro(Format::Vhdx))) == model);
        let now = folder.bytes("a.vhdx").unwrap();
        assert!(now[5 * MIB..7 * MIB].iter().all(|&b| b == 0x77), "{fixed}");
    }
    let folder = RamFolder::new();
    folder.put("a.vhdx", image(1, !0));
    open(&folder, "a.vhdx", rw(Format::Vhdx)).write(0, &[1; 512]).unwrap();
    let many = refused(image(9, 5 * MIB as u64), "a.vhdx", rw(Format::Vhdx));
    assert!(many.contains("VHDX regions of others is 9, the limit is 8"), "{many}");
}

/// A log may zero some of a BAT, not a file of any length.
#[test]
fn a_log_zeroes_no_more_than_tables_can_need() {
    let folder = RamFolder::new();
    for (count, is_taken) in [(1024, true), (1025, false)] {
        let zeros = vec![(false, BAT as u64 + MIB as u64, 4 * MIB as u64); count];
        folder.put("a.vhdx", logged(&[(0, entry(&[7; 16], 1, 0, 0, &zeros))]));
        match Engine::open(&folder, "a.vhdx", ro(Format::Vhdx)) {
            Ok(_) => assert!(is_taken),
            Err(fault) => assert!(!is_taken && fault.to_string().contains("bytes to zero")),
        }
    }
}

#[test]
fn two_headers_with_one_number_must_be_the_same() {
    let mut bytes = new(9000, 0, &[]);
    for at in HEADERS {
        put(&mut bytes, at + 8, &5u64.to_le_bytes());
        seal(&mut bytes[at..at + 4096], 4);
    }
    let folder = RamFolder::new();
    folder.put("a.vhdx", bytes.clone());
    assert_eq!(open(&folder, "a.vhdx", rw(Format::Vhdx)).sectors(), 9000);
    bytes[HEADERS[1] + 16] ^= 1;
    seal(&mut bytes[HEADERS[1]..HEADERS[1] + 4096], 4);
    assert!(refused(bytes, "a.vhdx", rw(Format::Vhdx)).contains("one sequence number"));
}

#[test]
fn hostile_tables_fail_the_request_and_change_nothing() {
    let full = new(9000, 1 << 20, &[("subformat", "fixed")]);
    let mib = MIB as u64;
    for entry in
        [6, mib | 6, (2 * mib) | 6, (3 * mib) | 6, 4, 7, (5 * mib) | 7, !7 | 6, (1 << 50) | 6]
    {
        let mut bytes = full.clone();
        put(&mut bytes, BAT + 8, &entry.to_le_bytes());
        let folder = RamFolder::new();
        folder.put("a.vhdx", bytes.clone());
        let mut engine = open(&folder, "a.vhdx", rw(Format::Vhdx));
        let fault = engine.read(2048, &mut [0; 512]).unwrap_err().to_string();
        assert!(fault.contains("VHDX"), "{fault}");
        assert!(engine.write(2048, &[7; 512]).is_err());
        assert!(check_all(&mut engine).corruptions > 0, "{entry:x}");
        engine.close().unwrap();
        let now = folder.bytes("a.vhdx").unwrap();
        assert!(now[REGIONS[0]..] == bytes[REGIONS[0]..], "all but the headers is as it was");
    }
    let mut bytes = full.clone();
    bytes.copy_within(BAT..BAT + 8, BAT + 8);
    let folder = RamFolder::new();
    folder.put("a.vhdx", bytes);
    assert_eq!(check_all(&mut open(&folder, "a.vhdx", ro(Format::Vhdx))).corruptions, 1);
}

#[test]
fn growing_survives_a_power_cut_at_any_write() {
    for (options, from, to) in [
        (&[][..], 3 * 4096, 300 * 4096u64),
        // More blocks than the BAT's MiB has room for: it moves.
        (&[][..], 4096, 200 << 21),
        (&[("logical_sector_size", "4096")][..], 4096, 12_000),
        (&[("subformat", "fixed")][..], 4096, 12_000),
    ] {
        let folder = RamFolder::new();
        let file = folder.put("a.vhdx", new(from, 1 << 20, options));
        let mut engine = open(&folder, "a.vhdx", rw(Format::Vhdx));
        let mut model = vec![0; from as usize * 512];
        scribble(&mut engine, &mut model, &mut Rng(from), 20, 50);
        engine.close().unwrap();
        let before = folder.bytes("a.vhdx").unwrap();
        folder.record();
        let mut engine = open(&folder, "a.vhdx", rw(Format::Vhdx));
        grow(&mut engine, to);
        engine.close().unwrap();
        let events = folder.events();
        let mut files = vec![Vec::new(); file + 1];
        files[file] = before;
        for cut in 0..=events.len() {
            folder.put("b.vhdx", files[file].clone());
            let mut engine = open(&folder, "b.vhdx", rw(Format::Vhdx));
            let sectors = engine.sectors();
            assert!(sectors == from || sectors == to, "cut {cut}: {sectors}");
            let mut disk = vec![0; model.len()];
            engine.read(0, &mut disk).unwrap();
            assert!(disk == model, "cut {cut}");
            if cut == events.len() {
                assert_eq!(sectors, to);
                let mut rest = vec![1; (to - from).min(300 * 4096) as usize * 512];
                engine.read(from, &mut rest).unwrap();
                assert!(rest.iter().all(|&b| b == 0), "what was added reads as zeros");
                engine.write(to - 1, &[9; 512]).unwrap();
                engine.close().unwrap();
            } else {
                apply(&mut files, &events[cut]);
            }
        }
        if options.contains(&("logical_sector_size", "4096")) {
            continue;
        }
        let scratch = Scratch::new("vhdx-grown");
        scratch.put("b.vhdx", &folder.bytes("b.vhdx").unwrap());
        if to > 1 << 21 {
            let sector =
                [&["-r", "-f", "vhdx", "-c"], &["read -P 9 214748364288 512"][..]].concat();
            let said = scratch.ok("qemu-io", &[&sector[..], &["b.vhdx"]].concat());
            assert!(said.contains("read 512/512") && !said.contains("failed"), "{said}");
            continue;
        }
        let disk = scratch.by_qemu("vhdx", "b.vhdx");
        assert_eq!(disk.len() as u64, to * 512);
        assert!(disk[..model.len()] == model && disk[disk.len() - 1] == 9);
    }
}

/// What a workload of several flushes writes, event by event, with the file as it was before.
fn recorded(options: &[(&str, &str)]) -> (Vec<u8>, Vec<Event>, Vec<u8>) {
    let folder = RamFolder::new();
    folder.put("a.vhdx", new(12 * 4096, 1 << 20, options));
    let before = folder.bytes("a.vhdx").unwrap();
    folder.record();
    let mut engine = open(&folder, "a.vhdx", rw(Format::Vhdx));
    let mut model = vec![0; 12 * 4096 * 512];
    for block in [3u64, 0, 7, 9] {
        let at = block * 2048;
        model[at as usize * 512..][..8192].fill(block as u8 + 1);
        engine.write(at, &[block as u8 + 1; 8192]).unwrap();
        engine.flush().unwrap();
    }
    engine.close().unwrap();
    (before, folder.events(), model)
}

/// Nothing relies on a log entry that is not durable: neither the header that opens the log, nor
/// a table that is changed in place. Other readers refuse a file whose header names a log without
/// an entry.
#[test]
fn a_log_entry_is_durable_before_the_header_or_a_table_relies_on_it() {
    let (_, events, _) = recorded(&[]);
    let (mut entry_open, mut entries, mut in_place, mut opened) = (false, 0, 0, 0);
    let log = MIB..METADATA;
    for event in &events {
        match event {
            Event::Sync { .. } => entry_open = false,
            Event::Write { offset, .. } if log.contains(&(*offset as usize)) => {
                entries += u64::from(!entry_open);
                entry_open = true;
            }
            Event::Write { offset, bytes, .. } => {
                let at = *offset as usize;
                let names_log = HEADERS.contains(&at) && bytes[48..64] != [0; 16];
                let table = (BAT..BAT + MIB).contains(&at);
                assert!(!(entry_open && (names_log || table)), "{at:#x} before a sync");
                assert!(!table || entries > 0, "a table in place without a log entry");
                in_place += u64::from(table);
                opened += u64::from(names_log);
            }
            Event::SetLen { .. } => {}
        }
    }
    assert!(entries == 4 && in_place >= 4 && opened >= 2, "{entries} {in_place} {opened}");
}

/// The header that is not written is good and enough: each write of one may be torn into anything.
#[test]
fn a_torn_header_update_leaves_the_other_header() {
    let (before, events, model) = recorded(&[]);
    let (mut durable, mut pending) = (vec![before], Vec::<Event>::new());
    let mut headers = 0;
    for event in &events {
        if let Event::Sync { .. } = event {
            pending.drain(..).for_each(|event| apply(&mut durable, &event));
            continue;
        }
        if let Event::Write { offset, bytes, .. } = event
            && HEADERS.contains(&(*offset as usize))
        {
            headers += 1;
            let is_header = |event: &Event| match event {
                Event::Write { offset, .. } => HEADERS.contains(&(*offset as usize)),
                _ => false,
            };
            assert!(!pending.iter().any(is_header), "one header at a time");
            let mut files = durable.clone();
            pending.iter().for_each(|event| apply(&mut files, event));
            assert_ne!(current(&files[0]), *offset as usize, "the older header is written");
            let torn = [&bytes[..100], &vec![0xff; bytes.len() - 100]].concat();
            apply(&mut files, &Event::Write { file: 0, offset: *offset, bytes: torn });
            let folder = RamFolder::new();
            folder.put("a.vhdx", files.remove(0));
            let mut engine = open(&folder, "a.vhdx", rw(Format::Vhdx));
            let disk = read_all(&mut engine);
            let whole = |(a, b): (&[u8], &[u8])| a == b || a.iter().all(|&byte| byte == 0);
            assert!(disk.chunks(512).zip(model.chunks(512)).all(whole), "header {headers}");
            assert_eq!(check_all(&mut engine).corruptions, 0);
            engine.close().unwrap();
        }
        pending.push(event.clone());
    }
    assert!(headers >= 6, "GUIDs, the log opened, the log empty, each in both: {headers}");
}
