//! VMDK: QEMU, libvmdk and dissect are the other readers (libvmdk mishandles zero grains and is
//! not asked about them; seSparse and ESX extents have no writer here and are put together by
//! hand, then read by all who can).

use super::*;
use platter_image::{Backing, VmdkStream};

/// Ends within a grain; a multiple of 8 KiB, or dissect fails.
const SECTORS: u64 = 200_000;

fn vmdk(name: &'static str) -> CreateParams<'static> {
    CreateParams { name, ..params(Format::Vmdk, SECTORS) }
}

fn model(sectors: u64) -> Vec<u8> {
    vec![0; sectors as usize * 512]
}

fn identity(folder: &RamFolder, name: &str) -> Option<u128> {
    open(folder, name, ro(Format::Vmdk)).image().identity()
}

/// The redundant tables of a sparse extent say the same as the others.
fn assert_redundant(bytes: &[u8]) {
    let (rgd, gd) = (u64_le(bytes, 48) as usize * 512, u64_le(bytes, 56) as usize * 512);
    let span = u32_le(bytes, 44) as u64 * u64_le(bytes, 20);
    for entry in 0..u64_le(bytes, 12).div_ceil(span) as usize {
        let table = |directory: usize| {
            let at = u32_le(bytes, directory + entry * 4) as usize * 512;
            &bytes[at..at + u32_le(bytes, 44) as usize * 4]
        };
        assert!(table(rgd) == table(gd), "tables of entry {entry}");
    }
}

#[test]
fn what_is_created_and_written_reads_the_same_to_all_readers() {
    let scratch = Scratch::new("vmdk-written");
    let kinds = ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse"];
    for (name, kind) in ["a.vmdk", "b.vmdk", "c.vmdk"].into_iter().zip(kinds) {
        let folder = RamFolder::new();
        let options = [("subformat", kind), ("adapter_type", "lsilogic")];
        create(&folder, &CreateParams { options: &options, ..vmdk(name) });
        let mut model = model(SECTORS);
        scribble_on(&folder, name, Format::Vmdk, &mut model, 11);
        copy_out(&folder, &scratch);
        if kind == "monolithicSparse" {
            assert_redundant(&folder.bytes(name).unwrap());
        }
        assert!(scratch.by_qemu("vmdk", name) == model, "QEMU reads {name}");
        qemu_check(&scratch, "vmdk", name);
        for reader in ["libvmdk", "dissect"] {
            if let Some(disk) = scratch.by_reader(reader, &[name]) {
                assert!(disk == model, "{reader} reads {name}");
            }
        }
    }
}

#[test]
fn a_disk_of_several_extents_is_one_disk() {
    let scratch = Scratch::new("vmdk-split");
    let folder = RamFolder::new();
    let options = [("subformat", "twoGbMaxExtentSparse")];
    // 2 GiB and a little: writes over the edge end up in both files.
    let sectors = 4_194_304 + 5_000;
    create(&folder, &CreateParams { options: &options, sectors, ..vmdk("d.vmdk") });
    assert_eq!(folder.names(), ["d.vmdk", "d-s001.vmdk", "d-s002.vmdk"]);
    let mut engine = open(&folder, "d.vmdk", rw(Format::Vmdk));
    assert_eq!(engine.sectors(), sectors);
    engine.write(4_194_304 - 100, &[6; 200 * 512]).unwrap();
    engine.close().unwrap();
    copy_out(&folder, &scratch);
    let commands = ["-f", "vmdk", "-c", "read -P 6 2147432448 102400", "d.vmdk"];
    let output = scratch.ok("qemu-io", &commands);
    assert!(!output.contains("failed"), "{output}");
    let args = ["-f", "vmdk", "-c", "write -P 7 2147483136 1024", "d.vmdk"];
    scratch.ok("qemu-io", &args);
    for name in folder.names() {
        folder.put(&name, scratch.get(&name));
    }
    let mut disk = [0; 1024];
    open(&folder, "d.vmdk", ro(Format::Vmdk)).read(4_194_303, &mut disk).unwrap();
    assert!(disk == [7; 1024]);
}

#[test]
fn an_extent_ends_where_its_line_says() {
    let folder = RamFolder::new();
    let options = [("subformat", "twoGbMaxExtentSparse")];
    create(&folder, &CreateParams { options: &options, sectors: 5000, ..vmdk("d.vmdk") });
    folder.put("e.vmdk", folder.bytes("d-s001.vmdk").unwrap());
    let text = "# x\nCID=00000001\nRW 1000 SPARSE \"d-s001.vmdk\"\nRW 77 ZERO\n\
                RW 40 SPARSE \"e.vmdk\"\n";
    folder.put("d.vmdk", text.as_bytes().to_vec());
    let mut engine = open(&folder, "d.vmdk", rw(Format::Vmdk));
    assert_eq!(engine.sectors(), 1117);
    let mut want = vec![0; 1117 * 512];
    for (sector, byte) in [(999, 1), (1077, 2), (1116, 3), (900, 4)] {
        engine.write(sector, &[byte; 512]).unwrap();
        want[sector as usize * 512..][..512].fill(byte);
    }
    assert!(engine.write(1000, &[1; 512]).unwrap_err().to_string().contains("ZERO extent"));
    engine.write_zeroes(1000, 77).unwrap();
    engine.close().unwrap();
    assert!(read_all(&mut open(&folder, "d.vmdk", ro(Format::Vmdk))) == want);
}

/// VirtualBox rounds the capacity in the header up to whole grains.
#[test]
fn a_disk_ends_where_its_descriptor_says() {
    let folder = RamFolder::new();
    create(&folder, &vmdk("a.vmdk"));
    let mut bytes = folder.bytes("a.vmdk").unwrap();
    put(&mut bytes, 12, &SECTORS.next_multiple_of(128).to_le_bytes());
    folder.put("a.vmdk", bytes.clone());
    let mut disk = model(SECTORS);
    scribble_on(&folder, "a.vmdk", Format::Vmdk, &mut disk, 3);
    let mut engine = open(&folder, "a.vmdk", rw(Format::Vmdk));
    assert_eq!(engine.sectors(), SECTORS);
    assert!(engine.write(SECTORS, &[1; 512]).is_err());
    engine.resize(SECTORS + 3).unwrap();
    engine.close().unwrap();
    disk.resize(disk.len() + 3 * 512, 0);
    assert!(read_all(&mut open(&folder, "a.vmdk", ro(Format::Vmdk))) == disk);
    // More than rounding: the header counts, for all readers.
    put(&mut bytes, 12, &(SECTORS + 500).to_le_bytes());
    folder.put("a.vmdk", bytes);
    assert_eq!(open(&folder, "a.vmdk", ro(Format::Vmdk)).sectors(), SECTORS + 500);
}

#[test]
fn a_chain_goes_by_cid_and_a_changed_parent_is_refused() {
    let scratch = Scratch::new("vmdk-chain");
    let folder = RamFolder::new();
    create(&folder, &vmdk("0.vmdk"));
    let mut model = model(SECTORS);
    scribble_on(&folder, "0.vmdk", Format::Vmdk, &mut model, 1);
    for (name, below) in [("1.vmdk", "0.vmdk"), ("2.vmdk", "1.vmdk")] {
        let identity = identity(&folder, below);
        let backing = Backing { name: below, format: Format::Vmdk, identity, sectors: SECTORS };
        create(&folder, &CreateParams { backing: Some(backing), seed: 77, ..vmdk(name) });
        scribble_on(&folder, name, Format::Vmdk, &mut model, 2);
    }
    assert_eq!(open(&folder, "2.vmdk", ro(Format::Vmdk)).depth(), 3);
    copy_out(&folder, &scratch);
    assert!(scratch.by_qemu("vmdk", "2.vmdk") == model, "QEMU reads the chain");
    for (reader, names) in
        [("libvmdk", &["2.vmdk", "1.vmdk", "0.vmdk"][..]), ("dissect", &["2.vmdk"])]
    {
        if let Some(disk) = scratch.by_reader(reader, names) {
            assert!(disk == model, "{reader} reads the chain");
        }
    }
    let before = identity(&folder, "1.vmdk");
    let mut engine = open(&folder, "1.vmdk", rw(Format::Vmdk));
    engine.write(0, &[1; 512]).unwrap();
    engine.close().unwrap();
    assert!(identity(&folder, "1.vmdk") != before, "the first write changes the CID");
    let fault = open_fault(&folder, "2.vmdk", Format::Vmdk);
    assert!(fault.contains("the parent is not the image"), "{fault}");
}

/// The CID is durable before the write is even made, and only its digits change.
#[test]
fn the_cid_changes_in_place_before_the_first_write() {
    for options in [&[][..], &[("subformat", "monolithicFlat")]] {
        let folder = RamFolder::new();
        create(&folder, &CreateParams { options, ..vmdk("a.vmdk") });
        let before = folder.bytes("a.vmdk").unwrap();
        open(&folder, "a.vmdk", rw(Format::Vmdk)).close().unwrap();
        assert!(folder.bytes("a.vmdk").unwrap() == before, "opening changes nothing");
        let mut engine = open(&folder, "a.vmdk", rw(Format::Vmdk));
        engine.write(0, &[1; 512]).unwrap();
        drop(engine);
        let after = folder.bytes("a.vmdk").unwrap();
        let at = before.windows(5).position(|window| window == b"\nCID=").unwrap() + 5;
        assert!(after[at..at + 8] != before[at..at + 8]);
        let end = if options.is_empty() { 21 * 512 } else { before.len() };
        assert!(after[..at] == before[..at] && after[at + 8..end] == before[at + 8..end]);
    }
}

#[test]
fn stream_optimized_images_of_qemu_are_read_and_not_written() {
    let scratch = Scratch::new("vmdk-stream");
    let mut want: Vec<u8> = (0..9_000_448u32).map(|n| (n / 300 * 17) as u8).collect();
    want[1_000_000..4_000_000].fill(0);
    scratch.put("in.raw", &want);
    let option = "subformat=streamOptimized";
    let args = ["convert", "-f", "raw", "-O", "vmdk", "-o", option, "in.raw", "s.vmdk"];
    scratch.ok("qemu-img", &args);
    let folder = RamFolder::new();
    let bytes = scratch.get("s.vmdk");
    folder.put("s.vmdk", bytes.clone());
    let mut engine = open(&folder, "s.vmdk", rw(Format::Vmdk));
    assert!(read_all(&mut engine)[..want.len()] == want);
    let report = check_all(&mut engine);
    assert!(report.is_sound() && report.compressed > 50, "{report:#?}");
    let fault = engine.write(0, &[1; 512]).unwrap_err().to_string();
    assert!(fault.contains("streamOptimized"), "{fault}");
    // As VMware writes it: the header says "see the footer" before the end-of-stream marker.
    let mut footed = bytes.clone();
    footed.resize(bytes.len().next_multiple_of(512), 0);
    let mut marker = [0; 512];
    put(&mut marker, 0, &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3]);
    footed.extend(marker);
    footed.extend(&bytes[..512]);
    footed.extend([0; 512]);
    put(&mut footed, 56, &[0xff; 8]);
    folder.put("f.vmdk", footed.clone());
    let mut engine = open(&folder, "f.vmdk", ro(Format::Vmdk));
    assert!(read_all(&mut engine)[..want.len()] == want);
    scratch.put("f.vmdk", &footed);
    assert!(scratch.by_qemu("vmdk", "f.vmdk")[..want.len()] == want, "QEMU reads the footer");
    // A grain that claims a length of 4 GiB, and one that is no zlib stream.
    let gd = u64_le(&bytes, 56) as usize * 512;
    let table = u32_le(&bytes, gd) as usize * 512;
    let grain = u32_le(&bytes, table) as usize * 512;
    for edit in [(grain + 8, [0xff; 4]), (grain + 12, [0xff; 4])] {
        let mut bad = bytes.clone();
        put(&mut bad, edit.0, &edit.1);
        folder.put("b.vmdk", bad);
        open(&folder, "b.vmdk", ro(Format::Vmdk)).read(0, &mut [0; 512]).unwrap_err();
    }
}

#[test]
fn a_stream_written_from_front_to_end_reads_the_same_to_all_readers() {
    let scratch = Scratch::new("vmdk-out");
    let mut want: Vec<u8> = (0..SECTORS as u32 * 512).map(|n| (n / 90 * 7) as u8).collect();
    want[3_000_000..90_000_000].fill(0);
    let mut stream = VmdkStream::new(&vmdk("o.vmdk")).unwrap();
    let mut file = stream.start().to_vec();
    for (n, grain) in want.chunks(stream.grain_bytes()).enumerate() {
        if grain.iter().any(|&b| b != 0) {
            let mut whole = grain.to_vec();
            whole.resize(stream.grain_bytes(), 0);
            let packed = miniz_oxide::deflate::compress_to_vec_zlib(&whole, 6);
            file.extend(stream.grain(n as u64, &packed).unwrap());
        }
    }
    file.extend(stream.finish());
    let folder = RamFolder::new();
    folder.put("o.vmdk", file);
    let mut engine = open(&folder, "o.vmdk", ro(Format::Vmdk));
    assert!(read_all(&mut engine) == want);
    assert!(check_all(&mut engine).is_sound());
    copy_out(&folder, &scratch);
    assert!(scratch.by_qemu("vmdk", "o.vmdk") == want, "QEMU reads it");
    qemu_check(&scratch, "vmdk", "o.vmdk");
    for reader in ["libvmdk", "dissect"] {
        if let Some(disk) = scratch.by_reader(reader, &["o.vmdk"]) {
            assert!(disk == want, "{reader} reads it");
        }
    }
}

#[test]
fn a_directory_entry_of_zero_gets_its_tables_before_it_is_written_through() {
    let scratch = Scratch::new("vmdk-gd");
    let folder = RamFolder::new();
    create(&folder, &vmdk("a.vmdk"));
    let mut bytes = folder.bytes("a.vmdk").unwrap();
    for directory in [48, 56] {
        let at = u64_le(&bytes, directory) as usize * 512;
        put(&mut bytes, at + 4, &[0; 8]);
    }
    folder.put("a.vmdk", bytes.clone());
    let mut model = model(SECTORS);
    scribble_on(&folder, "a.vmdk", Format::Vmdk, &mut model, 4);
    let after = folder.bytes("a.vmdk").unwrap();
    assert!(after[..512] == bytes[..512], "the header stays");
    assert_redundant(&after);
    copy_out(&folder, &scratch);
    assert!(scratch.by_qemu("vmdk", "a.vmdk") == model);
    qemu_check(&scratch, "vmdk", "a.vmdk");
    if let Some(disk) = scratch.by_reader("libvmdk", &["a.vmdk"]) {
        assert!(disk == model, "libvmdk reads the new tables");
    }
}

#[test]
fn a_redundant_table_that_differs_is_made_equal_by_repair() {
    let folder = RamFolder::new();
    create(&folder, &vmdk("a.vmdk"));
    scribble_on(&folder, "a.vmdk", Format::Vmdk, &mut model(SECTORS), 4);
    let good = folder.bytes("a.vmdk").unwrap();
    let mut bytes = good.clone();
    let rgd = u64_le(&bytes, 48) as usize * 512;
    let table = u32_le(&bytes, rgd + 4) as usize * 512;
    put(&mut bytes, table, &[0; 2048]);
    folder.put("a.vmdk", bytes);
    let mut engine = open(&folder, "a.vmdk", rw(Format::Vmdk));
    let report = check_all(&mut engine);
    assert!(report.is_sound() && !report.problems.is_empty(), "{report:#?}");
    let repair = platter_image::Repair::All;
    let params = platter_image::CheckParams { repair, budget_bytes: 0 };
    assert!(engine.check(params, |_, _| {}).unwrap().corruptions_fixed > 0);
    engine.close().unwrap();
    assert!(folder.bytes("a.vmdk").unwrap() == good);
}

#[test]
fn zero_grains_hide_the_parent_and_are_filled_with_zeros_when_written() {
    let scratch = Scratch::new("vmdk-zero");
    let folder = RamFolder::new();
    create(&folder, &vmdk("0.vmdk"));
    let mut engine = open(&folder, "0.vmdk", rw(Format::Vmdk));
    engine.write(0, &[5; 1 << 20]).unwrap();
    engine.close().unwrap();
    let mut model = model(SECTORS);
    model[..1 << 20].fill(5);
    let identity = identity(&folder, "0.vmdk");
    let backing = Backing { name: "0.vmdk", format: Format::Vmdk, identity, sectors: SECTORS };
    let options = [("zeroed_grain", "on")];
    create(&folder, &CreateParams { backing: Some(backing), options: &options, ..vmdk("1.vmdk") });
    let mut engine = open(&folder, "1.vmdk", rw(Format::Vmdk));
    engine.write_zeroes(256, 512).unwrap();
    engine.write(300, &[6; 512]).unwrap();
    engine.close().unwrap();
    model[256 * 512..768 * 512].fill(0);
    model[300 * 512..301 * 512].fill(6);
    assert!(read_all(&mut open(&folder, "1.vmdk", ro(Format::Vmdk))) == model);
    assert_redundant(&folder.bytes("1.vmdk").unwrap());
    copy_out(&folder, &scratch);
    assert!(scratch.by_qemu("vmdk", "1.vmdk") == model);
    if let Some(disk) = scratch.by_reader("dissect", &["1.vmdk"]) {
        assert!(disk == model, "dissect reads zero grains");
    }
}

/// ESX's sparse extent: grains of one sector, tables of 4096 entries.
pub fn cowd(want: &[u8], written: &[usize]) -> Vec<u8> {
    let mut bytes = vec![0; 2048 + 512 + 16384];
    put(&mut bytes, 0, b"COWD");
    let words = [1u32, 3, (want.len() / 512) as u32, 1, 4, 1, 0];
    for (n, word) in words.into_iter().enumerate() {
        put(&mut bytes, 4 + n * 4, &word.to_le_bytes());
    }
    put(&mut bytes, 2048, &5u32.to_le_bytes());
    for &sector in written {
        let at = (bytes.len() / 512) as u32;
        put(&mut bytes, 2560 + sector * 4, &at.to_le_bytes());
        bytes.extend(&want[sector * 512..][..512]);
    }
    bytes
}

#[test]
fn esx_sparse_extents_are_read() {
    let scratch = Scratch::new("vmdk-cowd");
    let folder = RamFolder::new();
    let mut want = vec![0; 3000 * 512];
    let written = [0, 1, 2, 77, 76, 2999];
    written.iter().for_each(|&sector| want[sector * 512..][..512].fill(sector as u8 + 1));
    folder.put("x-delta.vmdk", cowd(&want, &written));
    let text = "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n\
                createType=\"vmfsSparse\"\nRW 3000 VMFSSPARSE \"x-delta.vmdk\"\n";
    folder.put("x.vmdk", text.as_bytes().to_vec());
    let mut engine = open(&folder, "x.vmdk", rw(Format::Vmdk));
    assert!(read_all(&mut engine) == want);
    let report = check_all(&mut engine);
    assert!(report.is_sound() && report.allocated == 6, "{report:#?}");
    let fault = engine.write(0, &[1; 512]).unwrap_err().to_string();
    assert!(fault.contains("ESX"), "{fault}");
    copy_out(&folder, &scratch);
    assert!(scratch.by_qemu("vmdk", "x.vmdk") == want, "QEMU reads it");
}

/// An seSparse extent of one table: the kinds of entries, and grains in no order.
pub fn se_sparse(sectors: u64, entries: &[(usize, u64)], grains: u64) -> Vec<u8> {
    let mut bytes = vec![0; 512 * (8 + 64) + (grains * 4096) as usize];
    let words = [
        (0, 0xcafe_babe),
        (8, 0x2_0000_0001),
        (16, sectors),
        (24, 8),
        (32, 64),
        (80, 1),
        (88, 1),
        (128, 2),
        (136, 1),
        (144, 8),
        (152, 64),
        (192, 72),
        (200, grains * 8),
        (512, 0xcafe_cafe),
        (1024, 0x1000_0000_0000_0000),
    ];
    for (at, word) in words {
        put(&mut bytes, at, &word.to_le_bytes());
    }
    for &(index, entry) in entries {
        put(&mut bytes, 4096 + index * 8, &entry.to_le_bytes());
    }
    for grain in 0..grains as usize {
        bytes[72 * 512 + grain * 4096..][..4096].fill(grain as u8 + 1);
    }
    bytes
}

#[test]
fn se_sparse_extents_are_read() {
    let scratch = Scratch::new("vmdk-se");
    let folder = RamFolder::new();
    // A grain's number: its low 12 bits stand at bit 48.
    let data = |number: u64| 3 << 60 | (number & 0xfff) << 48 | number >> 12;
    let entries = [(0, data(2)), (1, data(0)), (2, 2 << 60), (3, 1 << 60), (100, data(1))];
    folder.put("x-sesparse.vmdk", se_sparse(8000, &entries, 3));
    let text = "# Disk DescriptorFile\nversion=3\nCID=12345678\nparentCID=ffffffff\n\
                createType=\"seSparse\"\nRW 8000 SESPARSE \"x-sesparse.vmdk\"\n";
    folder.put("x.vmdk", text.as_bytes().to_vec());
    let mut want = vec![0; 8000 * 512];
    want[..4096].fill(3);
    want[4096..8192].fill(1);
    want[100 * 4096..101 * 4096].fill(2);
    let mut engine = open(&folder, "x.vmdk", rw(Format::Vmdk));
    assert!(read_all(&mut engine) == want);
    assert_eq!(check_all(&mut engine).allocated, 3);
    let fault = engine.write(0, &[1; 512]).unwrap_err().to_string();
    assert!(fault.contains("seSparse"), "{fault}");
    copy_out(&folder, &scratch);
    assert!(scratch.by_qemu("vmdk", "x.vmdk") == want, "QEMU reads it");
    if let Some(disk) = scratch.by_reader("dissect", &["x.vmdk"]) {
        assert!(disk == want, "dissect reads it");
    }
    // A journal to replay; entries of no kind, and beyond the end.
    let mut dirty = se_sparse(8000, &entries, 3);
    dirty[512 + 24] = 1;
    folder.put("x-sesparse.vmdk", dirty);
    assert!(open_fault(&folder, "x.vmdk", Format::Vmdk).contains("journal"));
    for entry in [4 << 60, data(1 << 40), data(3), 7] {
        folder.put("x-sesparse.vmdk", se_sparse(8000, &[(0, entry)], 3));
        let mut engine = open(&folder, "x.vmdk", ro(Format::Vmdk));
        engine.read(0, &mut [0; 512]).unwrap_err();
        assert!(!check_all(&mut engine).is_sound(), "{entry:#x}");
    }
}

#[test]
fn hostile_descriptors_open_nothing() {
    let open_text = |lines: &str| {
        let folder = RamFolder::new();
        folder.put("secret", vec![7; 4096]);
        folder.put("empty.vmdk", vec![]);
        let text = format!("# Disk DescriptorFile\nCID=1\n{lines}\n");
        folder.put("x.vmdk", text.into_bytes());
        open_fault(&folder, "x.vmdk", Format::Vmdk)
    };
    for name in ["/etc/passwd", "../secret", "a/../secret", "a/b"] {
        let fault = open_text(&format!("RW 8 FLAT \"{name}\" 0"));
        assert!(fault.contains("plain name"), "{fault}");
    }
    for name in ["json:{}", "nbd://h", "\\\\.\\PhysicalDrive0", ""] {
        let fault = open_text(&format!("RW 8 FLAT \"{name}\" 0"));
        assert!(fault.contains("refused"), "{fault}");
    }
    for (lines, says) in [
        ("", "without extents"),
        ("RW 8 FLAT \"x.vmdk\" 0", "stands twice"),
        ("RW 8 FLAT \"secret\" 1", "sectors of a flat extent is 9, the limit is 8"),
        ("RW 8 FLAT \"secret\" 18446744073709551615", "sectors of a flat extent"),
        ("RW 8 SPARSE \"secret\"", "magic of a sparse VMDK extent"),
        ("RW 8 SPARSE \"empty.vmdk\"", "magic of a sparse VMDK extent"),
        ("RW 8 SESPARSE \"secret\"", "magic of seSparse"),
        ("RW 8 FLAT \"secret\" 0\nparentCID=2\nparentFileNameHint=\"../p\"", "'..'"),
    ] {
        let fault = open_text(lines);
        assert!(fault.contains(says), "{lines}: {fault}");
    }
    // No file at all is opened when names are denied.
    let folder = RamFolder::new();
    folder.put("secret", vec![7; 4096]);
    folder.put("x.vmdk", b"# Disk DescriptorFile\nCID=1\nRW 8 FLAT \"secret\" 0\n".to_vec());
    open(&folder, "x.vmdk", ro(Format::Vmdk));
    let mut denied = ro(Format::Vmdk);
    denied.allow_names = false;
    let fault = Engine::open(&folder, "x.vmdk", denied).err().unwrap().to_string();
    assert!(fault.contains("denies"), "{fault}");
}

#[test]
fn hostile_sparse_extents_are_refused_at_open_or_where_they_are_touched() {
    let folder = RamFolder::new();
    create(&folder, &vmdk("a.vmdk"));
    let mut engine = open(&folder, "a.vmdk", rw(Format::Vmdk));
    engine.write(0, &[7; 65536]).unwrap();
    engine.close().unwrap();
    let good = folder.bytes("a.vmdk").unwrap();
    let mut petabytes = good.clone();
    put(&mut petabytes, 12, &(1u64 << 40).to_le_bytes());
    let mut text = good.clone();
    text[75] = b'\n';
    let mut footer = good.clone();
    put(&mut footer, 56, &[0xff; 8]);
    let mut long = good.clone();
    put(&mut long, 36, &(1u64 << 30).to_le_bytes());
    for bytes in [vec![], good[..79].to_vec(), petabytes, text, footer, long] {
        refused(bytes, "a.vmdk", rw(Format::Vmdk));
    }
    let gd = u64_le(&good, 56) as usize * 512;
    let table = u32_le(&good, gd) as usize * 512;
    // The header, the descriptor, the directory, beyond the end.
    for entry in [1, 5, (gd / 512) as u32, 0x7fff_ffff] {
        for at in [gd, table] {
            let mut bytes = good.clone();
            put(&mut bytes, at, &entry.to_le_bytes());
            folder.put("a.vmdk", bytes);
            let mut engine = open(&folder, "a.vmdk", rw(Format::Vmdk));
            let fault = engine.read(0, &mut [0; 512]).unwrap_err().to_string();
            assert!(fault.contains("entry is"), "{fault}");
            engine.write(0, &[1; 512]).unwrap_err();
            assert!(!check_all(&mut engine).is_sound());
        }
    }
    let mut twice = good.clone();
    put(&mut twice, table + 4, &good[table..table + 4]);
    folder.put("a.vmdk", twice);
    assert_eq!(check_all(&mut open(&folder, "a.vmdk", ro(Format::Vmdk))).corruptions, 1);
    let mut version3 = good.clone();
    version3[4] = 3;
    folder.put("a.vmdk", version3);
    let mut engine = open(&folder, "a.vmdk", rw(Format::Vmdk));
    assert!(engine.write(0, &[1; 512]).unwrap_err().to_string().contains("version 3"));
}

#[test]
fn creating_what_the_format_cannot_hold_is_refused() {
    let huge = CreateParams { sectors: 1 << 32, ..vmdk("a.vmdk") };
    assert!(create_fault(&huge).contains("2 TiB"));
    let option = [("subformat", "streamOptimized")];
    assert!(create_fault(&CreateParams { options: &option, ..vmdk("a") }).contains("subformat"));
    let quoted = CreateParams { name: "a\"\nRW 1 FLAT \"b", ..params(Format::Vmdk, 8) };
    assert!(create_fault(&quoted).contains("name"));
}
