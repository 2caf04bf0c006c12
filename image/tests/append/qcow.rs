//! qcow version 1: QEMU and libqcow are the other readers (libqcow returns zeros for some
//! compressed clusters and is asked only about plain ones).

use super::*;
use platter_image::Backing;

const SECTORS: u64 = 20_001;

fn qcow(name: &'static str) -> CreateParams<'static> {
    CreateParams { name, ..params(Format::Qcow, SECTORS) }
}

#[test]
fn what_is_created_and_written_reads_the_same_to_qemu_and_libqcow() {
    let scratch = Scratch::new("qcow-written");
    for (name, cluster_bytes) in [("a.qcow", 0), ("b.qcow", 512), ("c.qcow", 65536)] {
        let folder = RamFolder::new();
        create(&folder, &CreateParams { cluster_bytes, ..qcow(name) });
        let mut model = vec![0; SECTORS as usize * 512];
        scribble_on(&folder, name, Format::Qcow, &mut model, cluster_bytes);
        copy_out(&folder, &scratch);
        assert!(scratch.by_qemu("qcow", name) == model, "QEMU reads {name}");
        if let Some(disk) = scratch.by_reader("libqcow", &[name]) {
            assert!(disk == model, "libqcow reads {name}");
        }
    }
}

#[test]
fn a_child_shows_its_base() {
    let scratch = Scratch::new("qcow-child");
    let folder = RamFolder::new();
    let mut model = vec![0x5a; SECTORS as usize * 512];
    folder.put("base.raw", model.clone());
    let backing =
        Backing { name: "base.raw", format: Format::Raw, identity: None, sectors: SECTORS };
    create(&folder, &CreateParams { backing: Some(backing), ..qcow("1.qcow") });
    scribble_on(&folder, "1.qcow", Format::Qcow, &mut model, 3);
    let backing = Backing { name: "1.qcow", format: Format::Qcow, ..backing };
    create(&folder, &CreateParams { backing: Some(backing), ..qcow("2.qcow") });
    scribble_on(&folder, "2.qcow", Format::Qcow, &mut model, 4);
    copy_out(&folder, &scratch);
    // QEMU must be told what it would have to guess.
    let base = "driver=qcow,file.filename=2.qcow,backing.driver=qcow,\
                backing.file.filename=1.qcow,backing.backing.driver=raw,\
                backing.backing.file.filename=base.raw";
    let out = ["convert", "--image-opts", base, "-O", "raw", "out.raw"];
    scratch.ok("qemu-img", &out);
    assert!(scratch.get("out.raw") == model, "QEMU reads the chain");
}

#[test]
fn compressed_clusters_are_read_and_written_over() {
    let scratch = Scratch::new("qcow-packed");
    let mut model: Vec<u8> = (0..733 * 4096u32).map(|n| (n / 700 * 31) as u8).collect();
    model[1_000_000..2_000_000].fill(0);
    scratch.put("in.raw", &model);
    let args = ["convert", "-c", "-f", "raw", "-O", "qcow", "in.raw", "a.qcow"];
    // It fails at the very end, having written all.
    scratch.run("qemu-img", &args);
    assert!(scratch.by_qemu("qcow", "a.qcow") == model);
    let folder = RamFolder::new();
    folder.put("a.qcow", scratch.get("a.qcow"));
    let mut engine = open(&folder, "a.qcow", rw(Format::Qcow));
    assert!(read_all(&mut engine) == model);
    let report = check_all(&mut engine);
    assert!(report.is_sound() && report.compressed > 100, "{report:#?}");
    scribble(&mut engine, &mut model, &mut Rng(6), 60, 30);
    engine.close().unwrap();
    assert!(read_all(&mut open(&folder, "a.qcow", ro(Format::Qcow))) == model);
    copy_out(&folder, &scratch);
    assert!(scratch.by_qemu("qcow", "a.qcow") == model);
}

#[test]
fn hostile_images_are_refused_at_open_or_where_they_are_touched() {
    let folder = RamFolder::new();
    create(&folder, &qcow("a.qcow"));
    let mut engine = open(&folder, "a.qcow", rw(Format::Qcow));
    engine.write(0, &[7; 65536]).unwrap();
    engine.close().unwrap();
    let good = folder.bytes("a.qcow").unwrap();
    let l1 = u64::from_be_bytes(good[40..48].try_into().unwrap()) as usize;
    let l2 = u64::from_be_bytes(good[l1..l1 + 8].try_into().unwrap()) as usize;
    let mut petabytes = good.clone();
    put(&mut petabytes, 24, &(1u64 << 48).to_be_bytes());
    let mut encrypted = good.clone();
    encrypted[39] = 1;
    for bytes in [vec![], vec![0; 48], petabytes, encrypted, good[..50].to_vec()] {
        refused(bytes, "a.qcow", rw(Format::Qcow));
    }
    // The header, the L1 table, unaligned, beyond the end; compressed of no length, and beyond.
    let packed = |offset: u64, len: u64| 1 << 63 | len << 51 | offset;
    let plain = [16, l1 as u64, l2 as u64 + 3, 1 << 40];
    let entries = plain.into_iter().chain([packed(4096, 0), packed(1 << 40, 9), packed(0, 9)]);
    for entry in entries {
        let mut bytes = good.clone();
        put(&mut bytes, l2, &entry.to_be_bytes());
        folder.put("a.qcow", bytes.clone());
        let mut engine = open(&folder, "a.qcow", rw(Format::Qcow));
        engine.read(0, &mut [0; 512]).unwrap_err();
        engine.write(0, &[1; 512]).unwrap_err();
        assert!(!check_all(&mut engine).is_sound(), "{entry:#x}");
        assert!(folder.bytes("a.qcow").unwrap() == bytes);
    }
    // A stream that is none.
    let mut bytes = good.clone();
    put(&mut bytes, l2, &packed(l2 as u64 + 4096, 600).to_be_bytes());
    folder.put("a.qcow", bytes);
    let mut engine = open(&folder, "a.qcow", rw(Format::Qcow));
    engine.read(0, &mut [0; 512]).unwrap_err();
    // Written over as a whole it is gone.
    engine.write(0, &[1; 4096]).unwrap();
    engine.read(0, &mut [0; 4096]).unwrap();
}

#[test]
fn a_disk_grows_as_far_as_its_l1_table_reaches() {
    let scratch = Scratch::new("qcow-grown");
    let folder = RamFolder::new();
    create(&folder, &CreateParams { sectors: 1000, ..qcow("a.qcow") });
    let mut model = vec![0; 1000 * 512];
    scribble_on(&folder, "a.qcow", Format::Qcow, &mut model, 5);
    let mut engine = open(&folder, "a.qcow", rw(Format::Qcow));
    grow(&mut engine, 4096);
    model.resize(4096 * 512, 0);
    assert!(read_all(&mut engine) == model);
    let fault = engine.drive(|image| image.resize(1 << 50)).unwrap_err().to_string();
    assert!(fault.contains("entries of the L1 table"), "{fault}");
    engine.close().unwrap();
    copy_out(&folder, &scratch);
    assert!(scratch.by_qemu("qcow", "a.qcow") == model);
}

#[test]
fn creating_what_the_format_cannot_hold_is_refused() {
    let big = CreateParams { cluster_bytes: 1 << 20, ..qcow("a.qcow") };
    assert!(create_fault(&big).contains("cluster_bits"));
    let huge = CreateParams { sectors: 1 << 50, ..qcow("a.qcow") };
    assert!(create_fault(&huge).contains("not possible"));
}
