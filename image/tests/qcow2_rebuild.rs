//! A qcow2 whose refcount table or blocks are lost: repaired, it holds what it held, its snapshots
//! too, and is sound to QEMU; so is what QEMU repaired to us. After a power cut in a repair the
//! next one ends well. Where not all references are known, nothing is changed.
//!
//! Would miss: stores that cannot grow (they are refused).

mod foreign;

use foreign::*;
use platter_image::{CheckParams, CheckReport, Format, Options, Repair};
use platter_tool::engine::Engine;
use platter_tool::medium::{Event, RamFolder, apply};

const Q: Format = Format::Qcow2;
const NO_BLOCK: &str = "no block";
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Options of qemu-img, commands of qemu-io, whether a snapshot is taken and written over, and
/// whether there is a bitmap.
const KINDS: &[(&str, &[&str], bool, bool)] = &[
    ("cluster_size=64k", &["write -P 1 0 300k", "write -z 1M 128k"], true, true),
    ("cluster_size=512,refcount_bits=1", &["write -P 1 0 300k"], false, false),
    ("cluster_size=512,refcount_bits=64", &["write -P 1 0 1500k"], true, false),
    ("cluster_size=512,refcount_bits=8", &["write -P 1 0 2900k"], true, true),
    ("cluster_size=4k,compat=0.10", &["write -P 1 0 300k", "write -c -P 2 400k 4k"], true, false),
    ("cluster_size=4k", &["write -P 1 0 300k", "write -c -P 2 400k 4k"], true, true),
    ("cluster_size=16k,extended_l2=on", &["write -P 1 3k 90k", "write -z 200k 20k"], true, false),
    ("compression_type=zstd", &["write -c -P 1 0 256k", "write -P 2 1M 70k"], true, false),
    ("cluster_size=2M,refcount_bits=32", &["write -P 7 3M 512"], true, false),
];

fn build(scratch: &Scratch, kind: (&str, &[&str], bool, bool)) -> Vec<u8> {
    let (option, commands, snapshot, bitmap) = kind;
    scratch.qcow2(option, commands, snapshot, bitmap)
}

fn get64(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..][..8].try_into().unwrap())
}

fn put64(bytes: &mut [u8], at: u64, value: u64) {
    bytes[at as usize..][..8].copy_from_slice(&value.to_be_bytes());
}

/// The image, damaged in every way that loses its refcounts.
fn damaged(good: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let (l1, table) = (get64(good, 40), get64(good, 48));
    let block = get64(good, table);
    let l2 = (0..).map(|n| get64(good, l1 + n * 8) & OFFSET).find(|&l2| l2 != 0).unwrap();
    let data = (0..).map(|n| get64(good, l2 + n * 8)).find(|&e| e >> 62 == 2 && e & OFFSET != 0);
    let data = data.map_or(l2, |entry| entry & OFFSET);
    let mut all = Vec::new();
    let mut with = |what, damage: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.to_vec();
        damage(&mut bytes);
        all.push((what, bytes));
    };
    with("the table beyond the file", &|b| put64(b, 48, 1 << 40));
    with("the table at no cluster", &|b| put64(b, 48, table + 8));
    with("the table at 0", &|b| put64(b, 48, 0));
    with("a table without a length", &|b| b[56..60].fill(0));
    with("a table too long", &|b| b[56..60].fill(0xff));
    with("the table on the L1 table", &|b| put64(b, 48, l1));
    with("the table on an L2 table", &|b| put64(b, 48, l2));
    with("the table on data", &|b| put64(b, 48, data));
    with("a block beyond the file", &|b| put64(b, table, 1 << 26));
    with("a block at no cluster", &|b| put64(b, table, block + 512 - 8));
    with("a block on the table", &|b| put64(b, table, table));
    with("a block on an L2 table", &|b| put64(b, table, l2));
    with("a block on data", &|b| put64(b, table, data));
    with("a block twice", &|b| put64(b, table + 8, block));
    // The table is sound then: what is missing is added to it.
    with(NO_BLOCK, &|b| put64(b, table, 0));
    all
}

fn check(folder: &RamFolder, repair: Repair, budget_bytes: usize) -> CheckReport {
    let options = if repair == Repair::Nothing { ro(Q) } else { rw(Q) };
    let mut engine = Engine::open_to_check(folder, "a.qcow2", options).unwrap();
    let report = engine.check(CheckParams { repair, budget_bytes }, |_, _| {}).unwrap();
    engine.close().unwrap();
    report
}

/// The disk, and its snapshot if it has one.
fn contents(scratch: &Scratch, name: &str, snapshot: bool) -> (Vec<u8>, Vec<u8>) {
    let disk = scratch.by_qemu("qcow2", name);
    if !snapshot {
        return (disk, Vec::new());
    }
    scratch.ok("qemu-img", &["convert", "-l", "one", "-O", "raw", name, "one.raw"]);
    (disk, scratch.get("one.raw"))
}

#[test]
fn lost_refcounts_are_made_anew_and_the_disk_holds_what_it_held() {
    let scratch = Scratch::new("qcow2-rebuild");
    let mut qemu_repairs = 0;
    for (k, kind) in KINDS.iter().enumerate() {
        let good = build(&scratch, *kind);
        let held = contents(&scratch, "a.qcow2", kind.2);
        for (n, (what, bad)) in damaged(&good).into_iter().enumerate() {
            let folder = RamFolder::new();
            folder.put("a.qcow2", bad.clone());
            let found = check(&folder, Repair::Nothing, 1 << 20);
            assert!(!found.is_sound(), "{kind:?}, {what}");
            check(&folder, Repair::Leaks, 1 << 20);
            assert!(folder.bytes("a.qcow2").unwrap() == bad, "{kind:?}, {what}: nothing to free");
            let report = check(&folder, Repair::All, [0, 1 << 20][n % 2]);
            assert!(report.is_sound(), "{kind:?}, {what}: {report:#?}");
            let again = check(&folder, Repair::Nothing, 1 << 20);
            assert!(again.is_sound() && again.leaks == 0, "{kind:?}, {what}: {again:#?}");
            let repaired = folder.bytes("a.qcow2").unwrap();
            // It is written again, and its counts with it.
            let mut engine = open(&folder, "a.qcow2", rw(Q));
            let mut disk = vec![0; held.0.len()];
            engine.read(0, &mut disk).unwrap();
            assert!(disk == held.0, "{kind:?}, {what}");
            engine.write(7, &[9; 200 * 512]).unwrap();
            engine.close().unwrap();
            let again = check(&folder, Repair::Nothing, 1 << 20);
            assert!(again.is_sound() && again.leaks == 0, "{kind:?}, {what}: {again:#?}");
            // QEMU takes its time: it is asked of each damage in a third of the kinds.
            if (n + k) % 3 != 0 {
                continue;
            }
            scratch.put("a.qcow2", &repaired);
            scratch.ok("qemu-img", &["check", "-q", "-f", "qcow2", "a.qcow2"]);
            assert!(contents(&scratch, "a.qcow2", kind.2) == held, "{kind:?}, {what}");
            // What QEMU makes of it, where it does; small clusters it syncs one by one.
            if kind.0.contains("=512") {
                continue;
            }
            scratch.put("a.qcow2", &bad);
            let repaired = scratch.run("qemu-img", &["check", "-q", "-r", "all", "a.qcow2"]);
            if repaired.status.success() {
                qemu_repairs += 1;
                folder.put("a.qcow2", scratch.get("a.qcow2"));
                let theirs = check(&folder, Repair::Nothing, 1 << 20);
                assert!(theirs.is_sound() && theirs.leaks == 0, "{kind:?}, {what}: {theirs:#?}");
                // Its repair opens the image as usual first and loses snapshots of some.
                let disk = contents(&scratch, "a.qcow2", false).0;
                assert!(disk == held.0, "{kind:?}, {what}");
            }
        }
    }
    assert!(qemu_repairs > KINDS.len(), "QEMU repaired {qemu_repairs}");
}

#[test]
fn a_power_cut_in_a_repair_leaves_what_the_next_one_mends() {
    let scratch = Scratch::new("qcow2-rebuild-cuts");
    for kind in [KINDS[2], KINDS[5]] {
        let good = build(&scratch, kind);
        let held = contents(&scratch, "a.qcow2", kind.2);
        for (what, bad) in damaged(&good) {
            let folder = RamFolder::new();
            folder.put("a.qcow2", bad.clone());
            folder.record();
            check(&folder, Repair::All, 0);
            let mut rng = Rng(held.0.len() as u64);
            let (mut durable, mut pending) = (vec![bad], Vec::new());
            for event in folder.events() {
                match event {
                    Event::Sync { .. } => {
                        pending.drain(..).for_each(|event| apply(&mut durable, &event));
                    }
                    event => pending.push(event),
                }
                let mut left = durable.clone();
                for event in pending.iter().filter(|_| rng.below(2) == 0) {
                    apply(&mut left, event);
                }
                let after = RamFolder::new();
                after.put("a.qcow2", left.remove(0));
                let report = check(&after, Repair::All, 1 << 20);
                assert!(report.is_sound(), "{kind:?}, {what}: {report:#?}");
                let mut disk = vec![0; held.0.len()];
                open(&after, "a.qcow2", ro(Q)).read(0, &mut disk).unwrap();
                assert!(disk == held.0, "{kind:?}, {what}");
            }
        }
    }
}

#[test]
fn what_is_not_known_whole_is_not_touched() {
    let scratch = Scratch::new("qcow2-rebuild-refused");
    let good = build(&scratch, KINDS[5]);
    let l1 = get64(&good, 40);
    let l2 = get64(&good, l1) & OFFSET;
    let is_rebuild = |(what, _): &(&str, Vec<u8>)| *what != NO_BLOCK;
    for (what, mut bad) in damaged(&good).into_iter().filter(is_rebuild) {
        // One entry that cannot be understood: where its data lies, if anywhere, is unknown.
        put64(&mut bad, l2 + 16, get64(&good, l2 + 16) | 1 << 58 | 2);
        let folder = RamFolder::new();
        folder.put("a.qcow2", bad.clone());
        for budget in [0, 1 << 20] {
            let report = check(&folder, Repair::All, budget);
            assert!(!report.is_sound(), "{what}");
            assert!(folder.bytes("a.qcow2").unwrap() == bad, "{what}");
        }
    }
    // More references than the counts can hold.
    let good = build(&scratch, KINDS[1]);
    let l2 = get64(&good, get64(&good, 40)) & OFFSET;
    for (what, mut bad) in damaged(&good).into_iter().filter(is_rebuild) {
        put64(&mut bad, l2 + 8, get64(&good, l2));
        let folder = RamFolder::new();
        folder.put("a.qcow2", bad.clone());
        let report = check(&folder, Repair::All, 1 << 20);
        assert!(!report.is_sound(), "{what}");
        assert!(folder.bytes("a.qcow2").unwrap() == bad, "{what}");
    }
    // A guest's disk is not served without refcounts.
    let mut bad = good.clone();
    put64(&mut bad, 48, 1 << 40);
    let options = Options { budget_bytes: 64 << 10, ..rw(Q) };
    assert!(refused(bad, "a.qcow2", options).contains("the refcount table"));
}
