//! qcow2 as whole images: what is created, what a crash of another writer left, checks and
//! repairs, growing, snapshots, hostile headers and tables.
//!
//! Would miss: several writes in flight at once, random workloads against QEMU and power cuts in
//! plain use (the tool's image tests cover them).

mod foreign;

use foreign::*;
use platter_image::{
    Access, Backing, CheckParams, CheckReport, Create, CreateParams, FileInfo, FlushStep, Format,
    Image, Options, Repair, Stop,
};
use platter_tool::engine::{Engine, options};
use platter_tool::medium::{DiskFolder, RamFolder};

const Q: Format = Format::Qcow2;

fn new(options: &[(&str, &str)], sectors: u64) -> Vec<u8> {
    made(&CreateParams { options, ..params(Q, sectors) })
}

fn put64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

fn get64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn checked(folder: &RamFolder, name: &str, repair: Repair) -> CheckReport {
    let access = if repair == Repair::Nothing { Access::ReadOnly } else { Access::ReadWrite };
    let mut engine = open(folder, name, options(Q, access));
    let params = CheckParams { repair, budget_bytes: 0 };
    let report = engine.check(params, |_, _| {}).unwrap_or_else(|fault| panic!("{fault}"));
    engine.close().unwrap();
    report
}

/// Shared: a lock of ours outlives the close for as long as another test forks.
fn qemu_check(scratch: &Scratch, name: &str) -> i32 {
    scratch.run("qemu-img", &["check", "-q", "-U", "-f", "qcow2", name]).status.code().unwrap()
}

#[test]
fn what_is_created_is_sound_to_qemu_and_holds_what_is_written() {
    let cases: &[(&[(&str, &str)], u64)] = &[
        (&[], 20480),
        (&[("compat", "0.10")], 20480),
        (&[("cluster_size", "512"), ("refcount_bits", "1")], 3001),
        (&[("cluster_size", "512"), ("refcount_bits", "64")], 9001),
        (&[("cluster_size", "2097152"), ("refcount_bits", "2")], 20480),
        (&[("cluster_size", "4096"), ("refcount_bits", "8")], 20483),
        (&[("extended_l2", "on"), ("lazy_refcounts", "on")], 20480),
        (&[("compression_type", "zstd"), ("preallocation", "metadata")], 20477),
        (&[("extended_l2", "on"), ("preallocation", "metadata"), ("refcount_bits", "32")], 9999),
    ];
    let scratch = Scratch::new("qcow2-create");
    for &(options, sectors) in cases {
        scratch.put("a.qcow2", &new(options, sectors));
        assert_eq!(qemu_check(&scratch, "a.qcow2"), 0, "{options:?}");
        let text = scratch.ok("qemu-img", &["info", "a.qcow2"]);
        assert!(text.contains(&format!("({} bytes)", sectors * 512)), "{text}");
        let folder = DiskFolder::new(&scratch.0);
        let mut engine = Engine::open(&folder, "a.qcow2", rw(Q)).unwrap();
        engine.write(0, &[1; 5 * 512]).unwrap();
        engine.write(sectors - 3, &[2; 3 * 512]).unwrap();
        engine.close().unwrap();
        assert_eq!(qemu_check(&scratch, "a.qcow2"), 0, "{options:?}");
        let disk = scratch.by_qemu("qcow2", "a.qcow2");
        let end = (sectors as usize - 3) * 512;
        assert!(disk.len() == sectors as usize * 512);
        assert!(disk[..2560].iter().all(|&b| b == 1) && disk[end..].iter().all(|&b| b == 2));
        assert!(disk[2560..end].iter().all(|&b| b == 0));
    }
}

#[test]
fn an_overlay_names_its_backing_file_and_qemu_follows_it() {
    let scratch = Scratch::new("qcow2-overlay");
    scratch.ok("qemu-img", &["create", "-q", "-f", "vpc", "-o", "force_size=on", "b.vhd", "8M"]);
    scratch.ok("qemu-io", &["-f", "vpc", "-c", "write -P 5 0 1M", "b.vhd"]);
    let backing = Backing { name: "b.vhd", format: Format::Vhd, identity: None, sectors: 16384 };
    let params = CreateParams { backing: Some(backing), ..params(Q, 16384) };
    scratch.put("a.qcow2", &made(&params));
    let folder = DiskFolder::new(&scratch.0);
    let mut engine = Engine::open(&folder, "a.qcow2", rw(Q)).unwrap();
    assert_eq!(engine.depth(), 2);
    engine.write(1, &[6; 512]).unwrap();
    engine.write_zeroes(128, 128).unwrap();
    let ours = read_all(&mut engine);
    engine.close().unwrap();
    assert!(ours[..512].iter().all(|&b| b == 5) && ours[512..1024].iter().all(|&b| b == 6));
    assert!(ours[65536..131072].iter().all(|&b| b == 0) && ours[131072] == 5);
    assert!(scratch.by_qemu("qcow2", "a.qcow2") == ours);
    assert_eq!(qemu_check(&scratch, "a.qcow2"), 0);
}

#[test]
fn options_that_contradict_each_other_are_refused_by_name() {
    let refused = |options: &[(&str, &str)]| {
        let params = CreateParams { options, ..params(Q, 2048) };
        Create::new(&params).unwrap_err().0
    };
    assert!(refused(&[("compat", "0.10"), ("extended_l2", "on")]).contains("compat=0.10"));
    assert!(refused(&[("cluster_size", "256")]).contains("512 bytes to 2 MiB"));
    assert!(refused(&[("refcount_bits", "3")]).contains("refcount_bits"));
    assert!(refused(&[("encryption", "on")]).contains("unknown option encryption"));
    assert!(refused(&[("data_file_raw", "on")]).contains("data_file"));
    let huge = CreateParams { options: &[("cluster_size", "512")], ..params(Q, 1 << 40) };
    assert!(Create::new(&huge).unwrap_err().0.contains("at most 137438953472 bytes"));
}

/// A writer with lazy refcounts dies: refcounts are wrong and the dirty bit is set.
#[test]
fn a_dirty_image_is_rebuilt_before_it_is_written() {
    let scratch = Scratch::new("qcow2-dirty");
    for cluster in ["512", "4096", "65536"] {
        let size = format!("lazy_refcounts=on,cluster_size={cluster}");
        scratch.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &size, "a.qcow2", "2M"]);
        let script = ["-f", "qcow2", "-c", "write -P 1 0 300k", "-c", "write -P 2 900k 64k"];
        let killed = [&script[..], &["-c", "flush", "-c", "abort", "a.qcow2"]].concat();
        scratch.run("qemu-io", &killed);
        let bytes = scratch.get("a.qcow2");
        assert_eq!(bytes[79] & 1, 1, "the image is dirty");
        assert_ne!(qemu_check(&scratch, "a.qcow2"), 0);
        let folder = DiskFolder::new(&scratch.0);
        // Reading alone changes nothing.
        let mut engine = Engine::open(&folder, "a.qcow2", ro(Q)).unwrap();
        let before = read_all(&mut engine);
        drop(engine);
        assert!(scratch.get("a.qcow2") == bytes);
        let mut engine = Engine::open(&folder, "a.qcow2", rw(Q)).unwrap();
        engine.write(2000, &[3; 1024]).unwrap();
        engine.close().unwrap();
        assert_eq!(scratch.get("a.qcow2")[79] & 1, 0, "and clean now");
        assert_eq!(qemu_check(&scratch, "a.qcow2"), 0, "cluster {cluster}");
        let disk = scratch.by_qemu("qcow2", "a.qcow2");
        assert!(disk[..1_024_000] == before[..1_024_000] && disk[1_024_000] == 3);
    }
}

/// A dirty image in a file of 128 GiB, in clusters of 512 bytes, and one that is in use from end to
/// end: neither keeps its caller while all its clusters are looked at, and what nothing counts is
/// passed over.
#[test]
fn the_rebuild_of_a_dirty_image_stops_now_and_then() {
    let folder = RamFolder::new();
    folder.put("a.qcow2", new(&[("cluster_size", "512")], 20480));
    let mut engine = open(&folder, "a.qcow2", rw(Q));
    engine.write(0, &vec![1; 20480 * 512]).unwrap();
    engine.close().unwrap();
    let full = folder.bytes("a.qcow2").unwrap();
    let empty = new(&[("cluster_size", "512")], 20480);
    for (mut bytes, size_bytes) in [(empty, 1 << 37), (full.clone(), full.len() as u64)] {
        bytes[79] |= 1;
        let options = Options { budget_bytes: 4 << 20, ..rw(Q) };
        let info = FileInfo { size_bytes, can_grow: true, identity: 1 };
        let mut image = Image::begin("a.qcow2", info, options);
        let began = std::time::Instant::now();
        let mut stops = 0;
        loop {
            match image.open_step() {
                Ok(_) => break,
                Err(Stop::Miss(block)) => {
                    let from = bytes.len().min(block.offset as usize);
                    let to = bytes.len().min(from + block.len as usize);
                    image.fill(block, &bytes[from..to]);
                }
                Err(Stop::NeedFlush) => {
                    stops += usize::from(!image.is_dirty());
                    image.flush_begin();
                    while !matches!(image.flush_step(), FlushStep::Done) {}
                    image.flush_end(true);
                }
                Err(stop) => panic!("{stop:?}"),
            }
        }
        assert!(stops > 4, "{stops} stops with nothing to write");
        assert!(began.elapsed().as_secs() < 60);
        assert!(!image.info()[0].details.dirty);
    }
}

#[test]
fn a_check_counts_what_qemu_counts_and_repairs_it() {
    let scratch = Scratch::new("qcow2-check");
    scratch.ok("qemu-img", &["create", "-q", "-f", "qcow2", "a.qcow2", "64M"]);
    scratch.ok("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 1M", "a.qcow2"]);
    let good = scratch.get("a.qcow2");
    let block = get64(&good, get64(&good, 48) as usize) as usize;
    let l2 = (get64(&good, get64(&good, 40) as usize) & 0xff_ffff_ffff_fe00) as usize;
    let data = ((get64(&good, l2) & 0xff_ffff_ffff_fe00) >> 16) as usize;

    // A leak: a count of 1 where nothing points.
    let mut bytes = good.clone();
    bytes.resize(good.len() + 65536, 0);
    bytes[block + (good.len() >> 16) * 2 + 1] = 1;
    let folder = RamFolder::new();
    folder.put("a.qcow2", bytes);
    let report = checked(&folder, "a.qcow2", Repair::Nothing);
    assert_eq!((report.corruptions, report.leaks, report.leaks_fixed), (0, 1, 0));
    assert_eq!((report.allocated, report.clusters), (16, 1024));
    let report = checked(&folder, "a.qcow2", Repair::Leaks);
    assert_eq!((report.leaks, report.leaks_fixed), (1, 1));
    scratch.put("b.qcow2", &folder.bytes("a.qcow2").unwrap());
    assert_eq!(qemu_check(&scratch, "b.qcow2"), 0);

    // A count that is too low: the flag says 1, the count 0. And a cluster used twice.
    let mut bytes = good.clone();
    bytes[block + data * 2 + 1] = 0;
    let twice = get64(&good, l2 + 8);
    put64(&mut bytes, l2 + 16, twice);
    folder.put("a.qcow2", bytes);
    let report = checked(&folder, "a.qcow2", Repair::Nothing);
    assert!(report.corruptions >= 2 && report.leaks == 1, "{report:#?}");
    let report = checked(&folder, "a.qcow2", Repair::All);
    assert!(report.is_sound(), "{report:#?}");
    let report = checked(&folder, "a.qcow2", Repair::Nothing);
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:#?}");
    scratch.put("b.qcow2", &folder.bytes("a.qcow2").unwrap());
    assert_eq!(qemu_check(&scratch, "b.qcow2"), 0);
}

/// QEMU's check says so too; what is mended must be sound to both.
#[test]
fn a_check_tells_and_never_stops_at_tables_that_cannot_be_used() {
    let scratch = Scratch::new("qcow2-unusable");
    let folder = RamFolder::new();
    let mut good = new(&[("cluster_size", "4096")], 20480);
    let (l1, reftable) = (get64(&good, 40) as usize, get64(&good, 48) as usize);
    let block = get64(&good, reftable);
    // Where, what, and whether it can be mended.
    let damages = [
        ("a block beyond the end", reftable, 1 << 40, true),
        ("a block by a reserved bit", reftable, block | 1 << 63, true),
        ("a block that lies anywhere", reftable, block + 512, true),
        ("a block on the header", reftable, 4096, true),
        ("a block twice", reftable + 8, block, true),
        ("a block that is an L2 table", l1 + 8, block | 1 << 63, false),
        ("a flag without a table", l1 + 8, 1 << 63, true),
    ];
    folder.put("a.qcow2", good);
    let mut engine = open(&folder, "a.qcow2", rw(Q));
    engine.write(0, &[1; 16384]).unwrap();
    engine.close().unwrap();
    good = folder.bytes("a.qcow2").unwrap();
    for (what, at, word, mends) in damages {
        let mut bad = good.clone();
        put64(&mut bad, at, word);
        folder.put("a.qcow2", bad.clone());
        for repair in [Repair::Nothing, Repair::Leaks] {
            let report = checked(&folder, "a.qcow2", repair);
            assert!(report.corruptions > report.corruptions_fixed, "{what}: {report:?}");
        }
        folder.put("a.qcow2", bad);
        let report = checked(&folder, "a.qcow2", Repair::All);
        assert_eq!(report.is_sound(), mends, "{what}: {report:?}");
        let report = checked(&folder, "a.qcow2", Repair::Nothing);
        assert_eq!(report.is_sound(), mends, "{what}, again: {report:?}");
        scratch.put("b.qcow2", &folder.bytes("a.qcow2").unwrap());
        assert_eq!(qemu_check(&scratch, "b.qcow2") == 0, mends, "{what}");
    }
}

#[test]
fn memory_of_a_check_is_bounded_and_windows_agree() {
    let scratch = Scratch::new("qcow2-windows");
    let options = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "a.qcow2", "3M"];
    scratch.ok("qemu-img", &options);
    scratch.ok("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 2900k", "a.qcow2"]);
    scratch.ok("qemu-img", &["snapshot", "-c", "one", "a.qcow2"]);
    scratch.ok("qemu-io", &["-f", "qcow2", "-c", "write -P 2 100k 900k", "a.qcow2"]);
    let folder = RamFolder::new();
    folder.put("a.qcow2", scratch.get("a.qcow2"));
    // 4096 clusters of 2 MiB a window: the file takes several.
    let report = checked(&folder, "a.qcow2", Repair::Nothing);
    assert_eq!((report.corruptions, report.leaks, report.allocated), (0, 0, 5800), "{report:#?}");
    let mut engine = open(&folder, "a.qcow2", ro(Q));
    let snapshot = engine.drive(|image| image.snapshot(0)).unwrap().unwrap();
    assert_eq!((snapshot.name.as_str(), snapshot.sectors), ("one", 6144));
    assert!(engine.drive(|image| image.snapshot(1)).unwrap().is_none());
}

#[test]
fn a_disk_grows_and_its_new_end_reads_zeros() {
    let scratch = Scratch::new("qcow2-grow");
    for (cluster, from, to) in [("65536", 2047, 4_300_000), ("512", 1001, 99_001)] {
        let image = new(&[("cluster_size", cluster)], from);
        scratch.put("a.qcow2", &image);
        let folder = DiskFolder::new(&scratch.0);
        let mut engine = Engine::open(&folder, "a.qcow2", rw(Q)).unwrap();
        engine.write(from - 1, &[1; 512]).unwrap();
        engine.resize(to).unwrap();
        assert!(engine.resize(to - 1).is_err());
        engine.write(to - 1, &[2; 512]).unwrap();
        engine.close().unwrap();
        assert_eq!(qemu_check(&scratch, "a.qcow2"), 0, "cluster {cluster}");
        let disk = scratch.by_qemu("qcow2", "a.qcow2");
        assert_eq!(disk.len() as u64, to * 512);
        let (old, last) = (from as usize * 512, disk.len() - 512);
        assert!(disk[old - 512..old].iter().all(|&b| b == 1));
        assert!(disk[old..last].iter().all(|&b| b == 0));
        assert!(disk[last..].iter().all(|&b| b == 2));
    }
}

/// `a.qcow2` of so many sectors with 16 MiB of data in clusters of 4 KiB, every second one of the
/// first `until` sectors free again.
fn in_shreds(sectors: u64, until: u64) -> RamFolder {
    let folder = RamFolder::new();
    folder.put("a.qcow2", new(&[("cluster_size", "4096")], sectors));
    let mut engine = open(&folder, "a.qcow2", rw(Q));
    engine.write(0, &vec![1; 16 << 20]).unwrap();
    for sector in (0..until).step_by(16) {
        engine.discard(sector, 8).unwrap();
    }
    engine.close().unwrap();
    folder
}

/// On a store of fixed size whose free space is single clusters, more of them than can be given
/// back at once, a longer L1 table has no place; where there is one, it is found behind them.
#[test]
fn a_disk_grows_on_a_store_in_shreds() {
    let folder = in_shreds(32768, 32768);
    let shreds = folder.bytes("a.qcow2").unwrap();
    folder.fix(true);
    for (more, grows) in [(0, false), (16384, true)] {
        let mut bytes = shreds.clone();
        bytes.resize(shreds.len() + more, 0);
        folder.put("a.qcow2", bytes);
        let mut engine = open(&folder, "a.qcow2", rw(Q));
        let told = engine.resize(2 << 21).err().map(|fault| fault.to_string());
        assert_eq!(told.is_none(), grows, "{told:?}");
        assert!(told.is_none_or(|told| told.contains("no room")));
        assert_eq!(engine.sectors(), if grows { 2 << 21 } else { 32768 });
        // A cluster that was too short for the table will do for this.
        engine.write(0, &[3; 4096]).unwrap();
        engine.close().unwrap();
        let report = checked(&folder, "a.qcow2", Repair::Nothing);
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:#?}");
    }
}

/// Free clusters that are not two in a row are room for a new L2 table and its data all the same.
#[test]
fn a_store_in_shreds_is_written_until_it_is_full() {
    let folder = in_shreds(131_072, 160);
    folder.fix(true);
    let mut engine = open(&folder, "a.qcow2", rw(Q));
    // Ten clusters: five tables with one cluster each.
    for n in 0..5u8 {
        engine.write(40_000 + u64::from(n) * 4096, &[n; 4096]).unwrap();
    }
    for n in 0..5u8 {
        let mut bytes = vec![9; 4096];
        engine.read(40_000 + u64::from(n) * 4096, &mut bytes).unwrap();
        assert!(bytes.iter().all(|&b| b == n));
    }
    engine.discard(40_000, 8).unwrap();
    // Room for a table and not for its data is left to who needs one cluster.
    let told = engine.write(80_000, &[5; 4096]).unwrap_err().to_string();
    assert!(told.contains("no room"), "{told}");
    engine.write(40_008, &[6; 4096]).unwrap();
    engine.close().unwrap();
    let report = checked(&folder, "a.qcow2", Repair::Nothing);
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:#?}");
}

/// What a growth took that did not end is given back when the image is closed.
#[test]
fn a_growth_that_is_given_up_leaks_nothing() {
    for (refcount_bits, to) in [("16", 99_001), ("64", 300_000)] {
        let image = new(&[("cluster_size", "512"), ("refcount_bits", refcount_bits)], 1001);
        for steps in 0..40 {
            let folder = RamFolder::new();
            folder.put("a.qcow2", image.clone());
            let mut engine = open(&folder, "a.qcow2", small(32 << 10));
            for _ in 0..steps {
                match engine.image().resize(to) {
                    Ok(_) => break,
                    Err(Stop::Miss(block)) => {
                        let mut bytes = vec![0; block.len as usize];
                        engine.medium(block.file).read_at(block.offset, &mut bytes).unwrap();
                        engine.image().fill(block, &bytes);
                    }
                    Err(Stop::NeedFlush) => engine.flush().unwrap(),
                    Err(stop) => panic!("{stop:?}"),
                }
            }
            engine.close().unwrap();
            let report = checked(&folder, "a.qcow2", Repair::Nothing);
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{steps} steps: {report:#?}");
        }
    }
}

/// QEMU saves a machine's state behind the disk (`savevm`); old ones left it there.
#[test]
fn a_disk_does_not_grow_over_saved_machine_state() {
    let scratch = Scratch::new("qcow2-vmstate");
    let options = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "a.qcow2", "20k"];
    scratch.ok("qemu-img", &options);
    scratch.ok("qemu-io", &["-f", "qcow2", "-c", "write -b -P 7 0 4k", "a.qcow2"]);
    let folder = DiskFolder::new(&scratch.0);
    let mut engine = Engine::open(&folder, "a.qcow2", rw(Q)).unwrap();
    engine.resize(64).unwrap();
    let fault = engine.resize(2000).unwrap_err().to_string();
    assert!(fault.contains("machine state"), "{fault}");
    assert_eq!(engine.sectors(), 64);
    engine.close().unwrap();
    assert_eq!(qemu_check(&scratch, "a.qcow2"), 0);
}

#[test]
fn unknown_autoclear_bits_and_bitmaps_are_given_up_before_the_first_write() {
    let scratch = Scratch::new("qcow2-bitmaps");
    scratch.ok("qemu-img", &["create", "-q", "-f", "qcow2", "a.qcow2", "8M"]);
    scratch.ok("qemu-img", &["bitmap", "--add", "a.qcow2", "b0"]);
    let mut bytes = scratch.get("a.qcow2");
    assert_eq!(get64(&bytes, 88), 1);
    put64(&mut bytes, 88, 1 | 1 << 40);
    let folder = RamFolder::new();
    folder.put("a.qcow2", bytes);
    let report = checked(&folder, "a.qcow2", Repair::Nothing);
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:#?}");
    let mut engine = open(&folder, "a.qcow2", rw(Q));
    folder.record();
    engine.write(0, &[1; 512]).unwrap();
    // The bits are gone, durably, before anything else is written.
    let events = folder.events();
    let first = events.iter().position(|e| matches!(e, platter_tool::medium::Event::Write { .. }));
    let platter_tool::medium::Event::Write { offset, bytes, .. } = &events[first.unwrap()] else {
        panic!("a write")
    };
    assert_eq!((*offset, get64(bytes, 88)), (0, 0));
    let second = &events[first.unwrap() + 1];
    assert!(matches!(second, platter_tool::medium::Event::Sync { .. }));
    engine.close().unwrap();
    scratch.put("a.qcow2", &folder.bytes("a.qcow2").unwrap());
    // To QEMU the clusters of a bitmap that is not valid any more are leaked.
    assert_eq!(qemu_check(&scratch, "a.qcow2"), 3);
}

fn small(budget_bytes: usize) -> Options {
    Options { budget_bytes, ..rw(Q) }
}

#[test]
fn a_full_store_says_so_and_holes_are_used_again() {
    // Clusters of 512 bytes and 64-bit counts: the refcount table grows again and again.
    let folder = RamFolder::new();
    folder.put("a.qcow2", new(&[("cluster_size", "512"), ("refcount_bits", "64")], 60_000));
    let mut engine = open(&folder, "a.qcow2", small(64 << 10));
    for sector in (0..60_000).step_by(100) {
        engine.write(sector, &vec![sector as u8 + 1; 100 * 512]).unwrap();
    }
    engine.discard(10_000, 20_000).unwrap();
    engine.flush().unwrap();
    let full = folder.bytes("a.qcow2").unwrap().len();
    for sector in (10_000..30_000).step_by(100) {
        engine.write(sector, &vec![sector as u8 + 2; 100 * 512]).unwrap();
    }
    engine.close().unwrap();
    let grown = folder.bytes("a.qcow2").unwrap().len() - full;
    assert!(grown < 10_000 * 512, "holes are used again: {grown} more bytes");
    let report = checked(&folder, "a.qcow2", Repair::Nothing);
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:#?}");
    let scratch = Scratch::new("qcow2-holes");
    scratch.put("a.qcow2", &folder.bytes("a.qcow2").unwrap());
    assert_eq!(qemu_check(&scratch, "a.qcow2"), 0);
}

/// Clusters of 512 bytes share a block of the cache: giving one back must not make the tables
/// beside it be read again, or two writes that are given up in turn wait for ever.
#[test]
fn a_plan_given_up_reads_nothing_when_it_is_tried_again() {
    let folder = RamFolder::new();
    folder.put("a.qcow2", new(&[("cluster_size", "512")], 4096));
    let mut engine = open(&folder, "a.qcow2", small(64 << 10));
    let range = platter_image::SectorRange::new(5, 1);
    let plan = engine.drive(|image| image.prepare_write(range)).unwrap();
    engine.image().abandon(plan.prepared);
    for _ in 0..5 {
        match engine.image().prepare_write(range) {
            Ok(plan) => engine.image().abandon(plan.prepared),
            Err(stop) => panic!("all it needs was read already: {stop:?}"),
        }
    }
    engine.close().unwrap();
    let report = checked(&folder, "a.qcow2", Repair::Nothing);
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:#?}");
}
