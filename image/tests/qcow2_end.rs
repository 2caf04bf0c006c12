//! The end of a qcow2 file: its last cluster is there as a whole once the image was closed.
//!
//! Would miss: the power cut in it (the random cuts of the tool's tests reopen images all along).

mod foreign;

use foreign::*;
use platter_image::{CreateParams, Format};
use platter_tool::medium::{Event, RamFolder};

const Q: Format = Format::Qcow2;

#[test]
fn the_last_cluster_is_completed_by_what_it_holds() {
    let scratch = Scratch::new("qcow2-end");
    for (cluster, options) in [
        (512, &[][..]),
        (1024, &[("refcount_bits", "64")]),
        (2048, &[]),
        (4096, &[]),
        (65536, &[]),
        (65536, &[("extended_l2", "on")]),
        (2 << 20, &[]),
    ] {
        let params = CreateParams { cluster_bytes: cluster, options, ..params(Q, 9000) };
        let folder = RamFolder::new();
        folder.put("a.qcow2", made(&params));
        let mut model = vec![0; 9000 * 512];
        let mut rng = Rng(cluster);
        let mut engine = open(&folder, "a.qcow2", rw(Q));
        let (mut within, mut completed) = (0, 0);
        for round in 0..30 {
            // The engine goes on after a close in most rounds, and what it has cached with it.
            if round % 7 == 6 {
                engine = open(&folder, "a.qcow2", rw(Q));
            }
            scribble(&mut engine, &mut model, &mut rng, 1 + round % 4, 9);
            engine.flush().unwrap();
            let before = folder.bytes("a.qcow2").unwrap().len() as u64;
            engine.finish().unwrap();
            let file = folder.bytes("a.qcow2").unwrap();
            assert!((file.len() as u64).is_multiple_of(cluster), "{cluster} {options:?}");
            within += u64::from(!before.is_multiple_of(cluster));
            completed += u64::from(before < file.len() as u64);
            let mut disk = vec![0; model.len()];
            engine.read(0, &mut disk).unwrap();
            assert!(disk == model, "{cluster} {options:?} round {round}");
            folder.record();
            engine.finish().unwrap();
            let writes = folder.events();
            assert!(writes.iter().all(|event| matches!(event, Event::Sync { .. })), "{writes:?}");
        }
        assert!(within == completed && (within > 0 || cluster == 512), "{cluster}: {within}");
        scratch.put("a.qcow2", &folder.bytes("a.qcow2").unwrap());
        scratch.ok("qemu-img", &["check", "-q", "-f", "qcow2", "a.qcow2"]);
        assert!(scratch.by_qemu("qcow2", "a.qcow2") == model, "{cluster} {options:?}");
    }
}

#[test]
fn what_was_only_looked_at_is_left_as_it_is() {
    let scratch = Scratch::new("qcow2-end-left");
    scratch.ok("qemu-img", &["create", "-q", "-f", "qcow2", "a.qcow2", "4M"]);
    let folder = RamFolder::new();
    let image = scratch.get("a.qcow2");
    assert!(!image.len().is_multiple_of(65536), "QEMU leaves the end of the L1 table out");
    folder.put("a.qcow2", image.clone());
    let mut engine = open(&folder, "a.qcow2", rw(Q));
    engine.finish().unwrap();
    assert!(folder.bytes("a.qcow2").unwrap() == image);
    // A write that adds no cluster, but makes the file longer.
    scratch.ok("qemu-io", &["-f", "qcow2", "-c", "write -P 5 0 64k", "a.qcow2"]);
    let file = std::fs::File::options().write(true).open(scratch.0.join("a.qcow2")).unwrap();
    let len = file.metadata().unwrap().len();
    file.set_len(len - 4096).unwrap();
    folder.put("a.qcow2", scratch.get("a.qcow2"));
    let mut engine = open(&folder, "a.qcow2", rw(Q));
    engine.write(120, &[6; 512]).unwrap();
    engine.close().unwrap();
    assert_eq!(folder.bytes("a.qcow2").unwrap().len() as u64, len);
    let mut disk = [0; 65536];
    open(&folder, "a.qcow2", ro(Q)).read(0, &mut disk).unwrap();
    let expected = |at: usize| match at / 512 {
        120 => 6,
        ..120 => 5,
        _ => 0,
    };
    assert!(disk.iter().enumerate().all(|(at, &byte)| byte == expected(at)));
}
