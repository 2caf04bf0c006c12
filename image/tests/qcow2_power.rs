//! The power cut at each write of what needs an order of its own in qcow2: a new refcount block, a
//! larger refcount table, a copied L2 table and cluster under a snapshot, a longer L1 table, the
//! rebuild of a dirty image, a discarded cluster used again, a store of fixed size.
//!
//! After each cut, with the writes since the last sync lost, kept, torn or each drawn: the image
//! opens, holds what was flushed, and neither our check nor QEMU's finds corruption.
//!
//! Would miss: random workloads (the tool's tests), and several writes in flight.

mod foreign;

use std::sync::Arc;

use foreign::*;
use platter_image::{Access, CheckParams, CreateParams, FileInfo, Format, Options, Repair};
use platter_tool::engine::Engine;
use platter_tool::medium::{Event, Folder, Medium, RamFolder, apply};

const Q: Format = Format::Qcow2;

fn new(options: &[(&str, &str)], sectors: u64) -> Vec<u8> {
    made(&CreateParams { options, ..params(Q, sectors) })
}

fn small() -> Options {
    Options { budget_bytes: 128 << 10, ..rw(Q) }
}

/// What was written and whether a flush made it last: sectors and their byte, in order.
#[derive(Default)]
struct Log {
    /// First sector, count, byte, number of events when it was flushed.
    writes: Vec<(u64, u64, u8, Option<usize>)>,
}

impl Log {
    fn write(&mut self, engine: &mut Engine, sector: u64, count: u64, byte: u8) {
        engine.write(sector, &vec![byte; count as usize * 512]).unwrap();
        self.writes.push((sector, count, byte, None));
    }

    fn flush(&mut self, engine: &mut Engine, folder: &RamFolder) {
        engine.flush().unwrap();
        let events = folder.events_len();
        self.writes.iter_mut().for_each(|write| write.3 = write.3.or(Some(events)));
    }
}

/// Of the pending writes the last one alone reaches the disk.
const LAST: u64 = 101;

/// Some of the pending writes reach the disk, some of those only in part.
fn cut(durable: &[Vec<u8>], pending: &[Event], rng: &mut Rng, kept: u64) -> Vec<Vec<u8>> {
    let mut files = durable.to_vec();
    if kept == LAST {
        pending.last().into_iter().for_each(|event| apply(&mut files, event));
        return files;
    }
    for event in pending {
        match event {
            Event::Write { file, offset, bytes } if rng.below(4) == 0 => {
                for (n, piece) in bytes.chunks(512).enumerate() {
                    if rng.below(2) == 0 {
                        let (offset, bytes) = (offset + n as u64 * 512, piece.to_vec());
                        apply(&mut files, &Event::Write { file: *file, offset, bytes });
                    }
                }
            }
            event if rng.below(100) < kept => apply(&mut files, event),
            _ => {}
        }
    }
    files
}

/// Cuts the power after each event and judges what is left. `initial`: the disk before.
fn judge(name: &str, image: &[u8], initial: &[u8], folder: &RamFolder, log: &Log, every: usize) {
    let scratch = Scratch::new(&format!("judge-{name}"));
    let mut rng = Rng(7);
    let events = folder.events();
    let mut durable = vec![image.to_vec()];
    let mut pending: Vec<Event> = Vec::new();
    for at in 0..=events.len() {
        // Always after a write of the header.
        let header = |event: &Event| matches!(event, Event::Write { offset: 0, .. });
        if at % every == 0 || at == events.len() || pending.last().is_some_and(header) {
            for kept in [0, 100, 50, LAST] {
                let files = cut(&durable, &pending, &mut rng, kept);
                let left = RamFolder::new();
                left.put("a.qcow2", files[0].clone());
                let when = format!("{name}: cut after event {at} of {}, kept {kept}", events.len());
                hold(&left, initial, log, at, &when);
                if at % (every * 8) == 0 {
                    scratch.put("a.qcow2", &files[0]);
                    let check = scratch.run("qemu-img", &["check", "-q", "-f", "qcow2", "a.qcow2"]);
                    let code = check.status.code().unwrap();
                    // Sound, or leaks alone; a dirty image may be anything until rebuilt.
                    assert!(code == 0 || code == 3 || files[0][79] & 1 == 1, "{when}: {code}");
                }
            }
        }
        match events.get(at) {
            Some(Event::Sync { .. }) => {
                pending.drain(..).for_each(|event| apply(&mut durable, &event));
            }
            Some(event) => pending.push(event.clone()),
            None => {}
        }
    }
}

/// Opens what a cut left: each sector is what was flushed, or of a write after that.
fn hold(left: &RamFolder, initial: &[u8], log: &Log, at: usize, when: &str) {
    let dirty = left.bytes("a.qcow2").unwrap()[79] & 1 == 1;
    let options = if dirty { small() } else { ro(Q) };
    let opened = Engine::open(left, "a.qcow2", options);
    let mut engine = opened.unwrap_or_else(|fault| panic!("{when}: {fault}"));
    let mut disk = vec![0; engine.sectors() as usize * 512];
    engine.read(0, &mut disk).unwrap_or_else(|fault| panic!("{when}: {fault}"));
    for sector in 0..engine.sectors() {
        let mut allowed = vec![initial.get(sector as usize * 512).copied().unwrap_or(0)];
        for &(start, count, byte, flushed) in &log.writes {
            if sector < start || sector >= start + count {
                continue;
            }
            if flushed.is_some_and(|flushed| flushed <= at) {
                allowed.clear();
            }
            allowed.push(byte);
        }
        let bytes = &disk[sector as usize * 512..][..512];
        let one = bytes.iter().all(|b| b == &bytes[0]) && allowed.contains(&bytes[0]);
        assert!(one, "{when}: sector {sector} is {:?}, allowed {allowed:?}", &bytes[..4]);
    }
    let params = CheckParams { repair: Repair::Nothing, budget_bytes: 1 << 20 };
    let report = engine.check(params, |_, _| {}).unwrap_or_else(|f| panic!("{when}: {f}"));
    assert!(report.is_sound(), "{when}: {report:#?}");
}

#[test]
fn refcount_blocks_and_a_larger_refcount_table() {
    // 64-bit counts in 512-byte clusters: a block counts 32 KiB, the first table 2 MiB.
    let image = new(&[("cluster_size", "512"), ("refcount_bits", "64")], 5000);
    let folder = RamFolder::new();
    folder.put("a.qcow2", image.clone());
    let mut engine = open(&folder, "a.qcow2", small());
    folder.record();
    let mut log = Log::default();
    for n in 0..40 {
        log.write(&mut engine, n * 120, 119, n as u8 + 1);
        if n % 9 == 8 {
            log.flush(&mut engine, &folder);
        }
    }
    let table = |image: &[u8]| image[56..60].to_vec();
    assert_ne!(table(&folder.bytes("a.qcow2").unwrap()), table(&image), "the table grew");
    judge("reftable", &image, &vec![0; 5000 * 512], &folder, &log, 23);
}

#[test]
fn tables_and_clusters_that_a_snapshot_shares() {
    for cluster in ["512", "4096", "65536"] {
        let scratch = Scratch::new(&format!("power-snap-{cluster}"));
        let option = format!("cluster_size={cluster}");
        scratch.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &option, "a.qcow2", "1M"]);
        scratch.ok("qemu-io", &["-f", "qcow2", "-c", "write -P 77 0 700k", "a.qcow2"]);
        scratch.ok("qemu-img", &["snapshot", "-c", "one", "a.qcow2"]);
        let initial = scratch.by_qemu("qcow2", "a.qcow2");
        let image = scratch.get("a.qcow2");
        let folder = RamFolder::new();
        folder.put("a.qcow2", image.clone());
        let mut engine = open(&folder, "a.qcow2", small());
        folder.record();
        let mut log = Log::default();
        for n in 0..24 {
            log.write(&mut engine, n * 53 % 2000, 1 + n % 40, n as u8 + 1);
            if n % 7 == 6 {
                log.flush(&mut engine, &folder);
            }
        }
        engine.finish().unwrap();
        judge(&format!("snap-{cluster}"), &image, &initial, &folder, &log, 3);
        // The snapshot still reads what it held.
        scratch.put("a.qcow2", &folder.bytes("a.qcow2").unwrap());
        let check = scratch.run("qemu-img", &["check", "-q", "-f", "qcow2", "a.qcow2"]);
        assert_eq!(check.status.code(), Some(0), "cluster {cluster}");
        scratch.ok("qemu-img", &["snapshot", "-a", "one", "a.qcow2"]);
        assert!(scratch.by_qemu("qcow2", "a.qcow2") == initial);
    }
}

#[test]
fn a_longer_l1_table() {
    let image = new(&[("cluster_size", "512")], 1000);
    let folder = RamFolder::new();
    folder.put("a.qcow2", image.clone());
    let mut engine = open(&folder, "a.qcow2", small());
    folder.record();
    let mut log = Log::default();
    log.write(&mut engine, 990, 10, 1);
    log.flush(&mut engine, &folder);
    engine.resize(60_000).unwrap();
    log.write(&mut engine, 5000, 3, 2);
    log.flush(&mut engine, &folder);
    judge("l1", &image, &vec![0; 1000 * 512], &folder, &log, 1);
}

/// 64-bit counts in 512-byte clusters: a block counts 64 of them, 4032 entries of an L1 table.
#[test]
fn an_l1_table_that_no_single_refcount_block_counts() {
    let image = new(&[("cluster_size", "512"), ("refcount_bits", "64")], 1000);
    // A few clusters more than a block counts, with cuts; then many.
    let few = &[258_048, 258_049][..];
    for sizes in [few, &[258_048 * 5, 16 << 20]] {
        let folder = RamFolder::new();
        folder.put("a.qcow2", image.clone());
        let mut engine = open(&folder, "a.qcow2", small());
        folder.record();
        let mut log = Log::default();
        log.write(&mut engine, 900, 100, 1);
        log.flush(&mut engine, &folder);
        for (n, &sectors) in sizes.iter().enumerate() {
            engine.resize(sectors).unwrap();
            log.write(&mut engine, 900 + n as u64 * 200_000, 20, n as u8 + 2);
            log.flush(&mut engine, &folder);
        }
        if sizes == few {
            judge("row", &image, &vec![0; 1000 * 512], &folder, &log, 23);
        }
        engine.close().unwrap();
        let scratch = Scratch::new("power-row");
        scratch.put("a.qcow2", &folder.bytes("a.qcow2").unwrap());
        scratch.ok("qemu-img", &["check", "-q", "-f", "qcow2", "a.qcow2"]);
    }
}

#[test]
fn the_rebuild_of_a_dirty_image() {
    let scratch = Scratch::new("power-dirty");
    let options = "lazy_refcounts=on,cluster_size=512";
    scratch.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", "512k"]);
    let script = ["-c", "write -P 9 0 300k", "-c", "flush", "-c", "abort"];
    scratch.run("qemu-io", &[&["-f", "qcow2"][..], &script, &["a.qcow2"]].concat());
    let image = scratch.get("a.qcow2");
    assert_eq!(image[79] & 1, 1);
    let mut initial = vec![0; 512 << 10];
    initial[..300 << 10].fill(9);
    let folder = RamFolder::new();
    folder.put("a.qcow2", image.clone());
    folder.record();
    let mut engine = open(&folder, "a.qcow2", small());
    let mut log = Log::default();
    log.write(&mut engine, 700, 100, 3);
    log.flush(&mut engine, &folder);
    judge("dirty", &image, &initial, &folder, &log, 5);
}

#[test]
fn a_discarded_cluster_is_used_again_only_when_it_is_free_for_good() {
    for options in [&[("cluster_size", "4096")][..], &[("extended_l2", "on")]] {
        let image = new(options, 4096);
        let folder = RamFolder::new();
        folder.put("a.qcow2", image.clone());
        let mut engine = open(&folder, "a.qcow2", small());
        folder.record();
        let mut log = Log::default();
        for round in 0..12u8 {
            let start = u64::from(round) * 257 % 3000;
            log.write(&mut engine, start, 700, 2 * round + 1);
            if round % 3 == 1 {
                log.flush(&mut engine, &folder);
            }
            // Zeroes are writes of zeros to the log.
            engine.write_zeroes(start, 512).unwrap();
            log.writes.push((start, 512, 0, None));
        }
        log.flush(&mut engine, &folder);
        judge("discard", &image, &vec![0; 4096 * 512], &folder, &log, 5);
    }
}

/// A folder whose files cannot grow.
struct Fixed(RamFolder);

impl Folder for Fixed {
    fn open(&self, path: &str, access: Access) -> std::io::Result<(Arc<dyn Medium>, FileInfo)> {
        let (medium, info) = self.0.open(path, access)?;
        Ok((medium, FileInfo { can_grow: false, ..info }))
    }

    fn open_named(
        &self,
        path: &str,
        access: Access,
    ) -> std::io::Result<(Arc<dyn Medium>, FileInfo)> {
        self.open(path, access)
    }
}

#[test]
fn a_store_of_fixed_size_holds_garbage_and_fills_up() {
    for (cluster, mib) in [(4096, 1), (65536, 2)] {
        fill_up(cluster, mib);
    }
}

fn fill_up(cluster: u64, mib: u64) {
    let sectors = mib * 4096;
    let mut image = made(&CreateParams { cluster_bytes: cluster, ..params(Q, sectors) });
    // What was on the volume before must never show.
    image.resize((mib << 20) as usize, 0xee);
    let folder = RamFolder::new();
    folder.put("a.qcow2", image.clone());
    let mut engine = Engine::open(&Fixed(folder.clone()), "a.qcow2", small()).unwrap();
    folder.record();
    let mut log = Log::default();
    for n in 0..20u64 {
        log.write(&mut engine, n * 24 + 3, 2, n as u8 + 1);
        if n % 4 == 3 {
            log.flush(&mut engine, &folder);
        }
    }
    let mut full = None;
    for sector in (0..sectors).step_by(8) {
        match engine.write(sector, &[101; 8 * 512]) {
            Ok(()) => log.writes.push((sector, 8, 101, None)),
            Err(fault) => {
                full = Some(fault.to_string());
                break;
            }
        }
    }
    log.flush(&mut engine, &folder);
    let full = full.expect("more than the store holds was written");
    assert!(full.contains("no room"), "{full}");
    assert_eq!(folder.bytes("a.qcow2").unwrap().len() as u64, mib << 20);
    judge("fixed", &image, &vec![0; sectors as usize * 512], &folder, &log, 7);
    // Room that is given back is used.
    engine.discard(0, 1024).unwrap();
    engine.write(4000, &[102; 50 * 512]).unwrap();
    engine.close().unwrap();
    let mut engine = open(&folder, "a.qcow2", ro(Q));
    let mut bytes = vec![0; 50 * 512];
    engine.read(4000, &mut bytes).unwrap();
    assert!(bytes.iter().all(|&b| b == 102));
}

#[test]
fn a_long_l1_table_on_a_store_of_fixed_size() {
    let mut image = new(&[("cluster_size", "512"), ("refcount_bits", "64")], 9000);
    image.resize(8 << 20, 0xee);
    let folder = RamFolder::new();
    folder.put("a.qcow2", image.clone());
    let mut engine = Engine::open(&Fixed(folder.clone()), "a.qcow2", small()).unwrap();
    folder.record();
    let mut log = Log::default();
    for n in 0..80 {
        log.write(&mut engine, n * 100, 90, n as u8 + 1);
    }
    log.flush(&mut engine, &folder);
    engine.resize(300_000).unwrap();
    log.write(&mut engine, 290_000, 9, 99);
    log.flush(&mut engine, &folder);
    judge("row-fixed", &image, &vec![0; 9000 * 512], &folder, &log, 500);
    // So many entries have no room.
    let told = engine.resize(64 << 20).unwrap_err().to_string();
    assert!(told.contains("no room") && told.contains("the L1 table"), "{told}");
    let params = CheckParams { repair: Repair::Nothing, budget_bytes: 1 << 20 };
    engine.finish().unwrap();
    let report = engine.check(params, |_, _| {}).unwrap();
    assert!(report.is_sound() && report.leaks == 0, "{report:#?}");
    assert_eq!(engine.sectors(), 300_000);
}
