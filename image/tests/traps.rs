//! Traps of the formats that no other test here steps on: bits that must be ignored and kept,
//! sizes that are no whole sectors, zero clusters over a base, two entries for one place.
//!
//! Would miss: what QEMU's images hold (the tool's differential tests); TESTING.md has the list.

mod foreign;

use foreign::*;
use platter_image::{
    Backing, CreateParams, FaultKind, FileInfo, FileNo, Format, Image, OpenStep, SectorRange, Stop,
};
use platter_tool::engine::Engine;
use platter_tool::medium::RamFolder;

fn le32(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
}

fn le64(bytes: &[u8], at: usize) -> usize {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize
}

fn be64(bytes: &[u8], at: usize) -> usize {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize
}

#[test]
fn unknown_compatible_features_of_qcow2_are_ignored_and_kept() {
    let folder = RamFolder::new();
    let mut bytes = made(&params(Format::Qcow2, 20_480));
    let unknown = (1u64 << 63 | 1 << 17).to_be_bytes();
    bytes[80..88].copy_from_slice(&unknown);
    folder.put("a.qcow2", bytes);
    let mut engine = open(&folder, "a.qcow2", rw(Format::Qcow2));
    engine.write(7, &[3; 512]).unwrap();
    engine.resize(40_960).unwrap();
    engine.close().unwrap();
    assert_eq!(folder.bytes("a.qcow2").unwrap()[80..88], unknown);
}

/// The last partial sector is not served, and the owner is told where the format has a size.
#[test]
fn a_size_that_is_no_whole_sectors_is_rounded_down() {
    let folder = RamFolder::new();
    for format in [Format::Qcow2, Format::Qcow] {
        let mut bytes = made(&params(format, 1000));
        bytes[24..32].copy_from_slice(&(1000u64 * 512 + 300).to_be_bytes());
        folder.put("a.img", bytes);
        let mut engine = open(&folder, "a.img", rw(format));
        assert_eq!(engine.sectors(), 1000, "{}", format.name());
        assert!(engine.write(999, &[1; 1024]).is_err());
        engine.write(999, &[1; 512]).unwrap();
        assert_eq!(engine.image().notes().count(), usize::from(format == Format::Qcow2));
        engine.close().unwrap();
    }
}

/// A raw file is data to its end, a download or an archive as well as a disk: nothing of it may
/// be left out of a copy or under an overlay.
#[test]
fn the_last_sector_of_an_odd_raw_file_is_filled_up_with_zeros() {
    let whole = [vec![7; 1000 * 512 + 300], vec![0; 212]].concat();
    let folder = RamFolder::new();
    folder.put("a.raw", whole[..1000 * 512 + 300].to_vec());
    let backing = Backing { name: "a.raw", format: Format::Raw, identity: None, sectors: 1001 };
    let over = CreateParams { backing: Some(backing), ..params(Format::Qcow2, 1001) };
    folder.put("over.qcow2", made(&over));
    for (name, format) in [("a.raw", Format::Raw), ("over.qcow2", Format::Qcow2)] {
        let mut engine = open(&folder, name, ro(format));
        assert!(read_all(&mut engine) == whole, "{name}");
        assert_eq!(engine.image().notes().count(), 1);
    }
    let mut engine = open(&folder, "a.raw", rw(Format::Raw));
    engine.write(1000, &[8; 512]).unwrap();
    engine.close().unwrap();
    assert!(folder.bytes("a.raw").unwrap()[1000 * 512..] == [8; 512]);
}

/// QEMU would find out what such a backing file is; here its name says raw, and that is wrong.
#[test]
fn a_backing_file_that_is_raw_only_by_its_name_is_not_read_as_raw() {
    let folder = RamFolder::new();
    let base = |format| match format {
        Format::Vmdk => b"# Disk DescriptorFile\nCID=1\nRW 8 ZERO\n".repeat(20),
        _ => made(&params(format, 4096)),
    };
    let mut over = made(&params(Format::Qcow2, 4096));
    let name = b"base.img";
    over[8..16].copy_from_slice(&0x200u64.to_be_bytes());
    over[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
    over[0x200..][..name.len()].copy_from_slice(name);
    folder.put("over.qcow2", over);
    for format in Format::ALL {
        folder.put("base.img", base(format));
        match Engine::open(&folder, "over.qcow2", ro(Format::Qcow2)) {
            Ok(_) => assert!(format == Format::Raw, "{}", format.name()),
            Err(fault) => assert!(fault.to_string().contains("suffix says raw"), "{fault}"),
        }
        let notes = open(&folder, "base.img", ro(Format::Raw)).image().notes().count();
        assert_eq!(notes, usize::from(format != Format::Raw), "{}", format.name());
    }
}

/// Names with a colon are no protocols behind a slash: external snapshots are called by the time.
#[test]
fn a_colon_in_a_path_is_a_letter() {
    let folder = RamFolder::new();
    folder.put("./vm-10:00.raw", vec![9; 4096 * 512]);
    for (name, works) in [("./vm-10:00.raw", true), ("vm-10:00.raw", false)] {
        let backing = Backing { name, format: Format::Raw, identity: None, sectors: 4096 };
        let over = CreateParams { backing: Some(backing), ..params(Format::Qcow2, 4096) };
        folder.put("over.qcow2", made(&over));
        let opened = Engine::open(&folder, "over.qcow2", ro(Format::Qcow2));
        assert_eq!(opened.is_ok(), works, "{name}");
    }
}

/// Entry 1 of a QED table: zeros, whatever the base holds; a write in it fills up with zeros.
#[test]
fn a_zero_cluster_of_qed_hides_the_base() {
    let folder = RamFolder::new();
    folder.put("base.raw", vec![9; 4096 * 512]);
    let backing = Backing { name: "base.raw", format: Format::Raw, identity: None, sectors: 4096 };
    let base = CreateParams { cluster_bytes: 4096, ..params(Format::Qed, 4096) };
    folder.put("a.qed", made(&CreateParams { backing: Some(backing), ..base }));
    let mut engine = open(&folder, "a.qed", rw(Format::Qed));
    engine.write(0, &[5; 4096]).unwrap();
    engine.close().unwrap();
    let mut bytes = folder.bytes("a.qed").unwrap();
    let l2 = le64(&bytes, le64(&bytes, 40));
    bytes[l2 + 8..l2 + 16].copy_from_slice(&1u64.to_le_bytes());
    folder.put("a.qed", bytes.clone());
    let scratch = Scratch::new("qed-zero");
    scratch.put("base.raw", &vec![9; 4096 * 512]);
    scratch.put("a.qed", &bytes);
    let mut engine = open(&folder, "a.qed", rw(Format::Qed));
    let disk = read_all(&mut engine);
    assert!(disk[4096..8192].iter().all(|&b| b == 0) && disk[8192] == 9);
    assert!(scratch.by_qemu("qed", "a.qed") == disk);
    engine.write(10, &[6; 512]).unwrap();
    engine.close().unwrap();
    let disk = read_all(&mut open(&folder, "a.qed", ro(Format::Qed)));
    let around = disk[4096..5120].iter().chain(&disk[5632..8192]);
    assert!(around.into_iter().all(|&b| b == 0) && disk[5120..5632] == [6; 512]);
}

#[test]
fn two_entries_for_one_place_are_found_in_every_format() {
    type Entries = fn(&[u8]) -> (usize, usize);
    // Where the entries of the first clusters stand, and their width.
    let cases: [(Format, u64, Entries); 5] = [
        (Format::Qed, 128, |b| (le64(b, le64(b, 40)), 8)),
        (Format::Qcow, 8, |b| (be64(b, be64(b, 40)), 8)),
        (Format::Vdi, 2048, |b| (le32(b, 340), 4)),
        (Format::Vmdk, 128, |b| (le32(b, le64(b, 56) * 512) * 512, 4)),
        (Format::Qcow2, 128, |b| (be64(b, be64(b, 40)) & 0xff_ffff_ffff_fe00, 8)),
    ];
    for (format, cluster, entries) in cases {
        let folder = RamFolder::new();
        folder.put("a.img", made(&params(format, 20_480)));
        let mut engine = open(&folder, "a.img", rw(format));
        engine.write(0, &vec![1; 3 * cluster as usize * 512]).unwrap();
        engine.close().unwrap();
        let mut bytes = folder.bytes("a.img").unwrap();
        let sound = check_all(&mut open(&folder, "a.img", ro(format)));
        assert_eq!((sound.corruptions, sound.allocated), (0, 3), "{}", format.name());
        let (at, width) = entries(&bytes);
        bytes.copy_within(at..at + width, at + 2 * width);
        folder.put("a.img", bytes);
        let report = check_all(&mut open(&folder, "a.img", ro(format)));
        assert!(report.corruptions > 0, "{}: {report:#?}", format.name());
    }
}

/// A raw file of 2^64 - 1 bytes had 2^55 sectors, and no range may end at the last.
#[test]
fn a_file_longer_than_any_is_refused_whatever_its_format() {
    for size_bytes in [u64::MAX, 1 << 63] {
        for format in [Format::Raw, Format::Qcow2, Format::Vhd, Format::Vmdk] {
            let info = FileInfo { size_bytes, can_grow: true, identity: 1 };
            let step = Image::begin("a.img", info, rw(format)).open_step();
            let Err(Stop::Fault(fault)) = step else { panic!("{step:?}") };
            assert_eq!((fault.kind, fault.value), (FaultKind::Limit, size_bytes));
        }
    }
    let info = FileInfo { size_bytes: i64::MAX as u64, can_grow: true, identity: 1 };
    let mut image = Image::begin("a.img", info, rw(Format::Raw));
    let Err(Stop::Miss(block)) = image.open_step() else { panic!("no miss") };
    image.fill(block, &vec![0; block.len as usize]);
    assert!(matches!(image.open_step(), Ok(OpenStep::Ready)));
    let last = SectorRange::new(image.sectors() - 1, 1);
    image.map_read(last).unwrap();
    image.file_grew(FileNo(0), u64::MAX);
}
