//! QED: QEMU is the only other implementation. Would miss: what QEMU gets wrong too.

use super::*;
use platter_image::{Backing, Repair};

const SECTORS: u64 = 20_001;

fn qed(name: &'static str) -> CreateParams<'static> {
    CreateParams { name, ..params(Format::Qed, SECTORS) }
}

#[test]
fn what_is_created_and_written_reads_the_same_to_qemu() {
    let scratch = Scratch::new("qed-written");
    let tables = [("table_size", "16")];
    for (name, cluster_bytes, options) in
        [("a.qed", 0, &[][..]), ("b.qed", 4096, &tables[..]), ("c.qed", 1 << 20, &[])]
    {
        let folder = RamFolder::new();
        create(&folder, &CreateParams { cluster_bytes, options, ..qed(name) });
        let mut model = vec![0; SECTORS as usize * 512];
        scribble_on(&folder, name, Format::Qed, &mut model, cluster_bytes);
        copy_out(&folder, &scratch);
        assert!(scratch.by_qemu("qed", name) == model, "QEMU reads {name}");
        qemu_check(&scratch, "qed", name);
    }
}

#[test]
fn a_child_shows_its_base_and_a_base_without_a_format_goes_by_its_suffix() {
    let scratch = Scratch::new("qed-child");
    let folder = RamFolder::new();
    let mut model = vec![0; SECTORS as usize * 512];
    model[..9_000_000].fill(0x5a);
    folder.put("base.raw", model[..9_000_448].to_vec());
    model[9_000_000..9_000_448].fill(0);
    let backing =
        Backing { name: "base.raw", format: Format::Raw, identity: None, sectors: 17_579 };
    create(&folder, &CreateParams { backing: Some(backing), ..qed("1.qed") });
    scribble_on(&folder, "1.qed", Format::Qed, &mut model, 3);
    let backing = Backing { name: "1.qed", format: Format::Qed, ..backing };
    create(&folder, &CreateParams { backing: Some(backing), ..qed("2.qed") });
    scribble_on(&folder, "2.qed", Format::Qed, &mut model, 4);
    assert_eq!(open(&folder, "2.qed", ro(Format::Qed)).depth(), 3);
    copy_out(&folder, &scratch);
    assert!(scratch.by_qemu("qed", "2.qed") == model, "QEMU reads the chain");
}

/// An image of 8 clusters with data in three of them, and where its first L2 entry is.
fn written() -> (Vec<u8>, usize) {
    let folder = RamFolder::new();
    create(&folder, &CreateParams { sectors: 1024, ..qed("a.qed") });
    let mut engine = open(&folder, "a.qed", rw(Format::Qed));
    engine.write(0, &[7; 3 * 65536]).unwrap();
    engine.close().unwrap();
    let bytes = folder.bytes("a.qed").unwrap();
    let l1 = u64_le(&bytes, 40) as usize;
    let l2 = u64_le(&bytes, l1) as usize;
    (bytes, l2)
}

#[test]
fn the_need_check_bit_brings_a_scan_before_the_first_write() {
    let scratch = Scratch::new("qed-scan");
    let (mut bytes, l2) = written();
    bytes[16] = 2;
    let l1 = u64_le(&bytes, 40) as usize;
    // Beyond the end, unaligned, and a table beyond the end.
    put(&mut bytes, l2 + 5 * 8, &(1u64 << 40).to_le_bytes());
    put(&mut bytes, l2 + 6 * 8, &0x30001u64.to_le_bytes());
    put(&mut bytes, l1 + 9 * 8, &(1u64 << 40).to_le_bytes());
    let folder = RamFolder::new();
    folder.put("a.qed", bytes.clone());
    let mut engine = open(&folder, "a.qed", rw(Format::Qed));
    let mut sector = [0; 512];
    engine.read(2, &mut sector).unwrap();
    assert!(folder.bytes("a.qed").unwrap() == bytes, "reading changes nothing");
    engine.write(7 * 128, &[9; 512]).unwrap();
    engine.close().unwrap();
    let after = folder.bytes("a.qed").unwrap();
    assert_eq!((after[16], u64_le(&after, l2 + 40), u64_le(&after, l2 + 48)), (0, 0, 0));
    assert_eq!(u64_le(&after, l1 + 72), 0);
    copy_out(&folder, &scratch);
    qemu_check(&scratch, "qed", "a.qed");
    let disk = read_all(&mut open(&folder, "a.qed", ro(Format::Qed)));
    assert!(disk[..3 * 65536].iter().all(|&b| b == 7) && disk[7 * 65536] == 9);
}

#[test]
fn two_entries_for_one_cluster_are_found_and_writes_refused() {
    let (mut bytes, l2) = written();
    bytes[16] = 2;
    let first = bytes[l2..l2 + 8].to_vec();
    put(&mut bytes, l2 + 4 * 8, &first);
    let folder = RamFolder::new();
    folder.put("a.qed", bytes.clone());
    let mut engine = open(&folder, "a.qed", rw(Format::Qed));
    for _ in 0..2 {
        let fault = engine.write(0, &[9; 512]).unwrap_err().to_string();
        assert!(fault.contains("another one names"), "{fault}");
    }
    assert!(folder.bytes("a.qed").unwrap() == bytes);
    let report = check_all(&mut open(&folder, "a.qed", ro(Format::Qed)));
    assert_eq!((report.corruptions, report.allocated), (1, 4));
}

#[test]
fn unknown_autoclear_bits_are_gone_before_the_first_write_and_kept_without_one() {
    let (mut bytes, _) = written();
    bytes[33] = 0x40;
    let folder = RamFolder::new();
    folder.put("a.qed", bytes.clone());
    open(&folder, "a.qed", rw(Format::Qed)).close().unwrap();
    assert!(folder.bytes("a.qed").unwrap() == bytes);
    let mut engine = open(&folder, "a.qed", rw(Format::Qed));
    engine.write(0, &[9; 512]).unwrap();
    drop(engine);
    assert_eq!(folder.bytes("a.qed").unwrap()[33], 0);
}

#[test]
fn hostile_images_are_refused_at_open_or_where_they_are_touched() {
    let (good, l2) = written();
    let l1 = u64_le(&good, 40) as usize;
    let mut petabytes = good[..65536].to_vec();
    put(&mut petabytes, 48, &(1u64 << 50).to_le_bytes());
    for bytes in [vec![], vec![0; 64], petabytes, good[..l1 + 100].to_vec()] {
        refused(bytes, "a.qed", rw(Format::Qed));
    }
    // Entries into the header, the L1 table, beyond the end.
    for entry in [512, l1 as u64, 1 << 62, u64::MAX] {
        for at in [l1, l2] {
            let mut bytes = good.clone();
            put(&mut bytes, at, &entry.to_le_bytes());
            let folder = RamFolder::new();
            folder.put("a.qed", bytes.clone());
            let mut engine = open(&folder, "a.qed", rw(Format::Qed));
            let fault = engine.read(0, &mut [0; 512]).unwrap_err().to_string();
            assert!(fault.contains("entry is"), "{fault}");
            engine.write(0, &[1; 512]).unwrap_err();
            assert!(!check_all(&mut engine).is_sound());
            assert!(folder.bytes("a.qed").unwrap() == bytes);
        }
    }
}

#[test]
fn a_grown_disk_reads_zeros_behind_its_old_end() {
    let scratch = Scratch::new("qed-grown");
    let folder = RamFolder::new();
    create(&folder, &qed("a.qed"));
    let mut model = vec![0; SECTORS as usize * 512];
    scribble_on(&folder, "a.qed", Format::Qed, &mut model, 5);
    let mut engine = open(&folder, "a.qed", rw(Format::Qed));
    grow(&mut engine, 70_000);
    model.resize(70_000 * 512, 0);
    assert!(read_all(&mut engine) == model);
    engine.write(69_999, &[3; 512]).unwrap();
    model[69_999 * 512..].fill(3);
    engine.close().unwrap();
    copy_out(&folder, &scratch);
    assert!(scratch.by_qemu("qed", "a.qed") == model);
    qemu_check(&scratch, "qed", "a.qed");
    let mut engine = open(&folder, "a.qed", rw(Format::Qed));
    let fault = engine.drive(|image| image.resize(1 << 50)).unwrap_err().to_string();
    assert!(fault.contains("the limit is"), "{fault}");
}

#[test]
fn creating_what_the_format_cannot_hold_is_refused() {
    let huge = CreateParams { sectors: 1 << 40, cluster_bytes: 4096, ..qed("a.qed") };
    assert!(create_fault(&huge).contains("does not fit"));
    let small = CreateParams { cluster_bytes: 2048, ..qed("a.qed") };
    assert!(create_fault(&small).contains("4 KiB to 64 MiB"));
    let option = [("table_size", "1")];
    assert!(create_fault(&CreateParams { options: &option, ..qed("a.qed") }).contains("2, 4, 8"));
}

#[test]
fn a_check_with_repair_clears_what_the_scan_clears() {
    let (mut bytes, l2) = written();
    bytes[16] = 2;
    put(&mut bytes, l2 + 5 * 8, &(1u64 << 40).to_le_bytes());
    let folder = RamFolder::new();
    folder.put("a.qed", bytes);
    let mut engine = open(&folder, "a.qed", rw(Format::Qed));
    let params = platter_image::CheckParams { repair: Repair::All, budget_bytes: 1 << 16 };
    let report = engine.check(params, |_, _| {}).unwrap();
    assert!(report.is_sound(), "{report:#?}");
    engine.close().unwrap();
    let after = folder.bytes("a.qed").unwrap();
    assert_eq!((after[16], u64_le(&after, l2 + 40)), (0, 0));
}
