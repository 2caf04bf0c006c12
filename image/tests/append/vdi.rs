//! VDI: QEMU (blocks of 1 MiB, no parents) and dissect (parents too) are the other readers.
//! Would miss: VirtualBox itself.

use super::*;
use platter_image::Backing;
use platter_tool::medium::DiskFolder;
use std::io::Read;

const MIB: usize = 1 << 20;
const SECTORS: u64 = 20_001;

fn vdi(name: &'static str) -> CreateParams<'static> {
    CreateParams { name, ..params(Format::Vdi, SECTORS) }
}

fn identity(folder: &RamFolder, name: &str) -> Option<u128> {
    open(folder, name, ro(Format::Vdi)).image().identity()
}

fn child_of(folder: &RamFolder, name: &'static str, below: &'static str, seed: u64) {
    let identity = identity(folder, below);
    let backing = Backing { name: below, format: Format::Vdi, identity, sectors: SECTORS };
    create(folder, &CreateParams { backing: Some(backing), seed, ..vdi(name) });
}

#[test]
fn what_is_created_and_written_reads_the_same_to_qemu_and_dissect() {
    let scratch = Scratch::new("vdi-written");
    let fixed = [("static", "on")];
    for (name, options, block) in
        [("a.vdi", &[][..], 0), ("b.vdi", &fixed[..], 0), ("c.vdi", &[][..], 64 << 10)]
    {
        let folder = RamFolder::new();
        create(&folder, &CreateParams { options, cluster_bytes: block, ..vdi(name) });
        let mut model = vec![0; SECTORS as usize * 512];
        scribble_on(&folder, name, Format::Vdi, &mut model, 8);
        copy_out(&folder, &scratch);
        if block == 0 {
            assert!(scratch.by_qemu("vdi", name) == model, "QEMU reads {name}");
            qemu_check(&scratch, "vdi", name);
            // dissect, too, reads no more than one block of 1 MiB right.
            if let Some(disk) = scratch.by_reader("dissect", &[name]) {
                assert!(disk == model, "dissect reads {name}");
            }
        }
    }
}

/// VirtualBox makes blocks of 1 MiB and takes any power of two of whole sectors.
#[test]
fn blocks_of_any_power_of_two_are_written_and_grow() {
    for shift in [9, 10, 11, 12, 15, 17, 21, 25, 28] {
        let folder = RamFolder::new();
        create(&folder, &vdi("a.vdi"));
        let mut bytes = folder.bytes("a.vdi").unwrap();
        let blocks = (SECTORS * 512).div_ceil(1 << shift) as u32;
        // Map and data lie close together, in no whole cache blocks.
        let data = (1024 + blocks as usize * 4).next_multiple_of(512);
        bytes.truncate(512);
        bytes.resize(data, 0);
        bytes[1024..1024 + blocks as usize * 4].fill(0xff);
        for (at, value) in [(0x154, 1024), (0x158, data as u32), (0x178, 1 << shift)] {
            put(&mut bytes, at, &value.to_le_bytes());
        }
        put(&mut bytes, 0x180, &blocks.to_le_bytes());
        folder.put("a.vdi", bytes);
        let mut model = vec![0; SECTORS as usize * 512];
        scribble_on(&folder, "a.vdi", Format::Vdi, &mut model, shift);
        let mut engine = open(&folder, "a.vdi", rw(Format::Vdi));
        engine.resize(SECTORS + 70_000).unwrap();
        engine.write(SECTORS + 69_999, &[9; 512]).unwrap();
        engine.close().unwrap();
        model.resize(model.len() + 70_000 * 512, 0);
        model[(SECTORS as usize + 69_999) * 512..].fill(9);
        let mut engine = open(&folder, "a.vdi", ro(Format::Vdi));
        assert!(read_all(&mut engine) == model, "blocks of 2^{shift}");
        let report = check_all(&mut engine);
        assert!(report.is_sound() && report.leaks == 0, "2^{shift}: {report:#?}");
    }
}

#[test]
fn a_chain_goes_by_uuid() {
    let scratch = Scratch::new("vdi-chain");
    let folder = RamFolder::new();
    create(&folder, &vdi("0.vdi"));
    let mut model = vec![0; SECTORS as usize * 512];
    scribble_on(&folder, "0.vdi", Format::Vdi, &mut model, 1);
    child_of(&folder, "1.vdi", "0.vdi", 21);
    scribble_on(&folder, "1.vdi", Format::Vdi, &mut model, 2);
    child_of(&folder, "2.vdi", "1.vdi", 22);
    // Zeros over data of the parent: whole blocks become zero blocks, no data is written.
    let mut engine = open(&folder, "2.vdi", rw(Format::Vdi));
    engine.write_zeroes(2048, 4096).unwrap();
    model[MIB..3 * MIB].fill(0);
    engine.close().unwrap();
    let bytes = folder.bytes("2.vdi").unwrap();
    assert_eq!((u32_le(&bytes, 512 + 4), u32_le(&bytes, 512 + 8)), (!1, !1));
    scribble_on(&folder, "2.vdi", Format::Vdi, &mut model, 3);
    assert_eq!(open(&folder, "2.vdi", ro(Format::Vdi)).depth(), 3);
    copy_out(&folder, &scratch);
    if let Some(disk) = scratch.by_reader("dissect", &["2.vdi", "1.vdi", "0.vdi"]) {
        assert!(disk == model, "dissect reads the chain");
    }
    // Another image under the parent's name.
    create(&folder, &CreateParams { seed: 99, ..vdi("1.vdi") });
    let fault = open_fault(&folder, "2.vdi", Format::Vdi);
    assert!(fault.contains("the parent is not the image"), "{fault}");
}

#[test]
fn without_a_name_the_parent_is_the_file_that_virtualbox_names_by_uuid() {
    let folder = RamFolder::new();
    create(&folder, &vdi("0.vdi"));
    let mut base = folder.bytes("0.vdi").unwrap();
    // {01234567-89ab-cdef-0123-456789abcdef} as VirtualBox stores it: little-endian fields.
    let uuid = [0x67, 0x45, 0x23, 1, 0xab, 0x89, 0xef, 0xcd, 1, 0x23, 0x45, 0x67, 0x89, 0xab];
    put(&mut base, 0x188, &uuid);
    put(&mut base, 0x188 + 14, &[0xcd, 0xef]);
    folder.put("0.vdi", base.clone());
    child_of(&folder, "1.vdi", "0.vdi", 5);
    let mut child = folder.bytes("1.vdi").unwrap();
    child[0x54..0x154].fill(0);
    folder.put("1.vdi", child);
    let fault = open_fault(&folder, "1.vdi", Format::Vdi);
    assert!(fault.contains("{01234567-89ab-cdef-0123-456789abcdef}.vdi"), "{fault}");
    folder.put("{01234567-89ab-cdef-0123-456789abcdef}.vdi", base);
    assert_eq!(open(&folder, "1.vdi", ro(Format::Vdi)).depth(), 2);
}

#[test]
fn the_modification_uuid_changes_with_the_first_write_only() {
    let folder = RamFolder::new();
    create(&folder, &vdi("a.vdi"));
    let before = folder.bytes("a.vdi").unwrap();
    open(&folder, "a.vdi", rw(Format::Vdi)).close().unwrap();
    assert!(folder.bytes("a.vdi").unwrap() == before);
    let mut engine = open(&folder, "a.vdi", rw(Format::Vdi));
    engine.write(0, &[1; 512]).unwrap();
    engine.close().unwrap();
    let after = folder.bytes("a.vdi").unwrap();
    assert!(after[0x188..0x198] == before[0x188..0x198]);
    assert!(after[0x198..0x1a8] != before[0x198..0x1a8]);
}

#[test]
fn a_count_left_too_high_by_a_cut_is_mended_by_the_next_writer() {
    let scratch = Scratch::new("vdi-count");
    let folder = RamFolder::new();
    create(&folder, &vdi("a.vdi"));
    let mut engine = open(&folder, "a.vdi", rw(Format::Vdi));
    engine.write(0, &[1; 512]).unwrap();
    engine.close().unwrap();
    let mut bytes = folder.bytes("a.vdi").unwrap();
    bytes[0x184] = 5;
    bytes.resize(bytes.len() + 4 * MIB, 0xaa);
    folder.put("a.vdi", bytes);
    let mut engine = open(&folder, "a.vdi", rw(Format::Vdi));
    engine.write(4 * 2048, &[2; 512]).unwrap();
    engine.close().unwrap();
    assert_eq!(folder.bytes("a.vdi").unwrap()[0x184], 2);
    let disk = read_all(&mut open(&folder, "a.vdi", ro(Format::Vdi)));
    assert!(disk[4 * MIB..4 * MIB + 512].iter().all(|&b| b == 2));
    assert!(disk[4 * MIB + 512..].iter().all(|&b| b == 0), "no byte of the leak shows");
    copy_out(&folder, &scratch);
    qemu_check(&scratch, "vdi", "a.vdi");
}

/// As cuts leave them: blocks that were taken, before others, and that no entry names.
#[test]
fn gaps_before_the_last_block_in_use_are_written_again() {
    const BLOCKS: usize = 10;
    let scratch = Scratch::new("vdi-gaps");
    let folder = RamFolder::new();
    create(&folder, &vdi("a.vdi"));
    let mut engine = open(&folder, "a.vdi", rw(Format::Vdi));
    engine.write(0, &[7; BLOCKS * MIB - MIB]).unwrap();
    engine.close().unwrap();
    let mut bytes = folder.bytes("a.vdi").unwrap();
    for block in [0, 3, 4] {
        put(&mut bytes, 512 + 4 * block, &[0xff; 4]);
    }
    folder.put("a.vdi", bytes);
    let mut engine = open(&folder, "a.vdi", rw(Format::Vdi));
    for block in [0, 3, 4, 9] {
        engine.write(block * 2048 + 8, &[9; 512]).unwrap();
    }
    engine.close().unwrap();
    let mut model = vec![7; SECTORS as usize * 512];
    model[9 * MIB..].fill(0);
    for block in [0, 3, 4, 9] {
        let end = model.len().min((block + 1) * MIB);
        model[block * MIB..end].fill(0);
        model[block * MIB + 8 * 512..][..512].fill(9);
    }
    copy_out(&folder, &scratch);
    assert!(read_all(&mut open(&folder, "a.vdi", ro(Format::Vdi))) == model);
    assert!(scratch.by_qemu("vdi", "a.vdi") == model);
    qemu_check(&scratch, "vdi", "a.vdi");
}

#[test]
fn hostile_images_are_refused_at_open_or_where_they_are_touched() {
    let folder = RamFolder::new();
    create(&folder, &vdi("a.vdi"));
    let mut engine = open(&folder, "a.vdi", rw(Format::Vdi));
    engine.write(0, &[7; 3 * MIB]).unwrap();
    engine.close().unwrap();
    let good = folder.bytes("a.vdi").unwrap();
    let mut huge = good.clone();
    // A map of 4 GiB in a file of 4 MiB.
    put(&mut huge, 0x158, &[0, 0, 0, 0xff]);
    put(&mut huge, 0x180, &[0xff, 0xff, 0xff, 0x3f]);
    for bytes in [vec![], vec![0; 512], good[..512].to_vec(), huge] {
        refused(bytes, "a.vdi", rw(Format::Vdi));
    }
    for entry in [10u32, 9, 0x7fff_ffff, 0xffff_fffd] {
        let mut bytes = good.clone();
        put(&mut bytes, 512, &entry.to_le_bytes());
        folder.put("a.vdi", bytes);
        let mut engine = open(&folder, "a.vdi", rw(Format::Vdi));
        let fault = engine.read(0, &mut [0; 512]).unwrap_err().to_string();
        assert!(fault.contains("block map entry"), "{fault}");
        engine.write(0, &[1; 512]).unwrap_err();
        assert!(!check_all(&mut engine).is_sound());
    }
    let mut twice = good.clone();
    put(&mut twice, 516, &good[512..516]);
    folder.put("a.vdi", twice);
    assert_eq!(check_all(&mut open(&folder, "a.vdi", ro(Format::Vdi))).corruptions, 1);
}

#[test]
fn a_grown_disk_reads_zeros_behind_its_old_end_and_the_map_has_its_limit() {
    let scratch = Scratch::new("vdi-grown");
    let folder = RamFolder::new();
    create(&folder, &vdi("a.vdi"));
    let mut model = vec![0; SECTORS as usize * 512];
    scribble_on(&folder, "a.vdi", Format::Vdi, &mut model, 5);
    let mut engine = open(&folder, "a.vdi", rw(Format::Vdi));
    grow(&mut engine, 70_000);
    model.resize(70_000 * 512, 0);
    assert!(read_all(&mut engine) == model);
    engine.write(69_999, &[3; 512]).unwrap();
    model[69_999 * 512..].fill(3);
    engine.close().unwrap();
    copy_out(&folder, &scratch);
    assert!(scratch.by_qemu("vdi", "a.vdi") == model);
    qemu_check(&scratch, "vdi", "a.vdi");
    let mut engine = open(&folder, "a.vdi", rw(Format::Vdi));
    let fault = engine.drive(|image| image.resize(1 << 42)).unwrap_err().to_string();
    assert!(fault.contains("blocks of a VDI"), "{fault}");
}

#[test]
fn creating_what_the_format_cannot_hold_is_refused() {
    let huge = CreateParams { sectors: 1 << 45, ..vdi("a.vdi") };
    assert!(create_fault(&huge).contains("0x3fffffff"));
    let backing = Backing { name: "b", format: Format::Raw, identity: None, sectors: 1 };
    let over_raw = CreateParams { backing: Some(backing), ..vdi("a.vdi") };
    assert!(create_fault(&over_raw).contains("over a VDI"));
}

/// Gaps far apart: each is found, and only stretches with some are looked at once more.
#[test]
fn gaps_of_a_long_map_are_found_wherever_they_are() {
    const BLOCKS: usize = 3 << 16;
    let scratch = Scratch::new("vdi-long");
    let sectors = (BLOCKS as u64 + 8) * 8;
    let base = CreateParams { cluster_bytes: 4096, name: "a.vdi", ..params(Format::Vdi, sectors) };
    let folder = RamFolder::new();
    create(&folder, &base);
    let mut bytes = folder.bytes("a.vdi").unwrap();
    let (map, data) = (u32_le(&bytes, 0x154) as usize, u32_le(&bytes, 0x158) as usize);
    // Backwards, with nothing in 5, 70,000 and 190,000.
    let gaps = [5, 70_000, 190_000];
    for block in (0..BLOCKS).filter(|block| !gaps.contains(block)) {
        put(&mut bytes, map + (BLOCKS - 1 - block) * 4, &(block as u32).to_le_bytes());
    }
    put(&mut bytes, 0x184, &(BLOCKS as u32).to_le_bytes());
    scratch.put("a.vdi", &bytes);
    let path = scratch.0.join("a.vdi");
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len((data + BLOCKS * 4096) as u64).unwrap();
    let disk = DiskFolder::new(&scratch.0);
    let mut engine = Engine::open(&disk, "a.vdi", rw(Format::Vdi)).unwrap();
    for gap in gaps {
        engine.write((BLOCKS - 1 - gap) as u64 * 8, &[9; 512]).unwrap();
    }
    engine.write(BLOCKS as u64 * 8, &[9; 512]).unwrap();
    engine.close().unwrap();
    let mut now = vec![0; data];
    std::fs::File::open(&path).unwrap().read_exact(&mut now).unwrap();
    let mut places = gaps.map(|gap| u32_le(&now, map + (BLOCKS - 1 - gap) * 4) as usize);
    places.sort_unstable();
    assert_eq!(places, gaps);
    assert_eq!(u32_le(&now, map + BLOCKS * 4) as usize, BLOCKS);
}
