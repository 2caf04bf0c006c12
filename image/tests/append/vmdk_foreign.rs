//! VMDKs as other writers lay them out, put together here: streams with markers and footers in
//! odd places, descriptors in odd spellings, ESX deltas over flat bases, files named twice.
//!
//! QEMU, libvmdk and dissect are asked wherever they take such a file; where they do not, a
//! comment says so.

use super::vmdk::{cowd, se_sparse};
use super::*;

const GRAIN: usize = 64 << 10;

/// How a stream is laid out.
#[derive(Clone, Copy)]
struct Layout {
    /// Bits of `flags` beyond newlines and compression.
    markers: bool,
    /// Without markers: VMware puts the length of a grain before it, QEMU nothing.
    lengths: bool,
    /// The header sends to the footer; else it has the directory's place.
    footer: bool,
    /// Progress markers, and stretches of zeros that nothing speaks of.
    odd: bool,
    /// Bytes behind the end marker.
    padding: usize,
}

const USUAL: Layout =
    Layout { markers: true, lengths: false, footer: true, odd: false, padding: 0 };

fn pad(file: &mut Vec<u8>) {
    file.resize(file.len().next_multiple_of(512), 0);
}

fn marker(file: &mut Vec<u8>, sectors: u64, kind: u32) {
    pad(file);
    let at = file.len();
    file.resize(at + 512, 0);
    put(file, at, &sectors.to_le_bytes());
    put(file, at + 12, &kind.to_le_bytes());
}

/// Header and overhead; where the directory is comes later.
fn front(sectors: u64, layout: Layout) -> Vec<u8> {
    let mut file = vec![0; 128 * 512];
    put(&mut file, 0, b"KDMV");
    let flags = 0x1_0001 | u32::from(layout.markers) << 17;
    put(&mut file, 4, &3u32.to_le_bytes());
    put(&mut file, 8, &flags.to_le_bytes());
    for (at, value) in [(12, sectors), (20, 128), (28, 1), (36, 20), (64, 128)] {
        put(&mut file, at, &value.to_le_bytes());
    }
    put(&mut file, 44, &512u32.to_le_bytes());
    put(&mut file, 73, b"\n \r\n\x01");
    file
}

/// A stream of a disk that ends within a grain, whose last grain holds only what the disk has.
fn stream(want: &[u8], text: &str, layout: Layout) -> Vec<u8> {
    let mut file = front((want.len() / 512) as u64, layout);
    put(&mut file, 512, text.as_bytes());
    let (mut tables, mut directory) = (Vec::new(), Vec::new());
    for (n, grains) in want.chunks(512 * GRAIN).enumerate() {
        let mut table = vec![0; 2048];
        for (m, grain) in grains.chunks(GRAIN).enumerate() {
            if grain.iter().all(|&b| b == 0) {
                continue;
            }
            pad(&mut file);
            if layout.odd && m % 3 == 0 {
                marker(&mut file, 0, 4);
                file.resize(file.len() + 1536, 0);
            }
            put(&mut table, m * 4, &((file.len() / 512) as u32).to_le_bytes());
            let packed = miniz_oxide::deflate::compress_to_vec_zlib(grain, 6);
            if layout.markers {
                file.extend(((n * 512 + m) as u64 * 128).to_le_bytes());
            }
            if layout.markers || layout.lengths {
                file.extend((packed.len() as u32).to_le_bytes());
            }
            file.extend(packed);
        }
        tables.push(table);
    }
    // Odd: the directory comes before its tables, all tables at the end.
    let mut at = file.len().div_ceil(512) + if layout.odd { 2 } else { 0 };
    for _ in &tables {
        directory.extend((at as u32 + 1).to_le_bytes());
        at += 5;
    }
    if layout.odd {
        marker(&mut file, 1, 2);
        at = file.len() / 512;
        file.extend(&directory);
        pad(&mut file);
    }
    for table in &tables {
        marker(&mut file, 4, 1);
        file.extend(table);
    }
    if !layout.odd {
        marker(&mut file, 1, 2);
        at = file.len() / 512;
        file.extend(&directory);
    }
    let mut header = file[..512].to_vec();
    put(&mut header, 56, &(at as u64).to_le_bytes());
    if layout.footer {
        marker(&mut file, 1, 3);
        file.extend(&header);
        put(&mut file, 56, &[0xff; 8]);
    } else {
        put(&mut file, 0, &header);
    }
    marker(&mut file, 0, 0);
    file.resize(file.len() + layout.padding, 0);
    file
}

fn text(sectors: u64) -> String {
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=a37d8450\nparentCID=ffffffff\n\
         createType=\"streamOptimized\"\n\n# Extent description\nRW {sectors} SPARSE \"s.vmdk\"\n\n\
         # The Disk Data Base\n#DDB\n\nddb.adapterType = \"lsilogic\"\n"
    )
}

fn pattern(sectors: usize) -> Vec<u8> {
    let mut want: Vec<u8> = (0..sectors as u32 * 512).map(|n| (n / 77 * 13) as u8).collect();
    want[3 * GRAIN..9 * GRAIN].fill(0);
    want
}

#[test]
fn streams_are_read_wherever_their_markers_and_footer_stand() {
    let scratch = Scratch::new("vmdk-streams");
    let want = pattern(70_008);
    let text = text(70_008);
    let bare = Layout { markers: false, ..USUAL };
    for (layout, qemu, others) in [
        (USUAL, true, &["libvmdk", "dissect"][..]),
        (Layout { footer: false, ..USUAL }, true, &["libvmdk", "dissect"]),
        (Layout { odd: true, ..USUAL }, true, &["libvmdk", "dissect"]),
        (Layout { odd: true, footer: false, ..USUAL }, true, &["libvmdk", "dissect"]),
        // The others look for the footer at one place only.
        (Layout { padding: 512, ..USUAL }, false, &[]),
        (Layout { padding: 9728, ..USUAL }, false, &[]),
        (Layout { padding: GRAIN + 100, ..USUAL }, false, &[]),
        (bare, true, &[]),
        (Layout { lengths: true, ..bare }, false, &["dissect"]),
        (Layout { lengths: true, footer: false, ..bare }, false, &["dissect"]),
    ] {
        let folder = RamFolder::new();
        folder.put("s.vmdk", stream(&want, &text, layout));
        let mut engine = open(&folder, "s.vmdk", ro(Format::Vmdk));
        assert_eq!(engine.sectors(), 70_008);
        assert!(read_all(&mut engine) == want);
        assert!(check_all(&mut engine).is_sound());
        copy_out(&folder, &scratch);
        if qemu {
            assert!(scratch.by_qemu("vmdk", "s.vmdk") == want, "QEMU reads it");
        }
        for reader in others {
            let Some(disk) = scratch.by_reader(reader, &["s.vmdk"]) else { continue };
            assert!(disk == want, "{reader} reads it");
        }
    }
    // A footer nowhere, and one that is cut.
    let good = stream(&want, &text, USUAL);
    let mut nowhere = good.clone();
    let end = good.len();
    nowhere[end - 1536..end - 512].fill(0);
    for bytes in [nowhere, good[..end - 1600].to_vec(), good[..20_000].to_vec()] {
        // With the smallest cache too.
        for budget_bytes in [0, 128 << 10, 1 << 20] {
            let options = platter_image::Options { budget_bytes, ..ro(Format::Vmdk) };
            let fault = refused(bytes.clone(), "s.vmdk", options);
            assert!(fault.contains("not such an image"), "{fault}");
        }
    }
    let far = stream(&want, &text, Layout { padding: 256 << 10, ..USUAL });
    refused(far, "s.vmdk", ro(Format::Vmdk));
}

#[test]
fn a_stream_whose_size_only_the_footer_knows_is_read() {
    let want = pattern(70_000);
    let mut bytes = stream(&want, &text(70_000), USUAL);
    put(&mut bytes, 12, &[0; 8]);
    let folder = RamFolder::new();
    folder.put("s.vmdk", bytes);
    assert!(read_all(&mut open(&folder, "s.vmdk", ro(Format::Vmdk))) == want);
}

#[test]
fn what_a_header_or_descriptor_requires_and_nobody_knows_is_refused() {
    let mut bytes = stream(&pattern(70_000), &text(70_000), USUAL);
    let end = bytes.len();
    bytes[end - 1024 + 10] |= 4;
    let fault = refused(bytes, "s.vmdk", ro(Format::Vmdk));
    assert!(fault.contains("flags of a VMDK unknown here"), "{fault}");
    let keys = "encryptionKeys = \"vmware:key/list/(pair/(fqid/<VMWARE-NULL>/kms/1,x))\"";
    let text = format!("# Disk DescriptorFile\nCID=1\n{keys}\nRW 8 VMFS \"a-flat.vmdk\"\n");
    let folder = RamFolder::new();
    folder.put("a-flat.vmdk", vec![7; 4096]);
    folder.put("a.vmdk", text.into_bytes());
    let fault = open_fault(&folder, "a.vmdk", Format::Vmdk);
    assert!(fault.contains("an encrypted VMDK"), "{fault}");
}

#[test]
fn descriptors_are_read_in_odd_spellings() {
    let lines = [
        "CID=12345678\nrw 8 flat \"a.vmdk\" 0\n",
        "version=1\r\nCID=12345678\r\nRW  8   FLAT   \"a.vmdk\"   0   \r\n",
        "\u{feff}# Disk DescriptorFile\nCID=12345678\nRW 8 VMFS \"a.vmdk\"\n",
        "\u{feff}CID=12345678\nRW 8 VMFS \"a.vmdk\" 0\n",
        "encoding=\"UTF-8\"\n  cid\t=\t12345678  \n\tRW\t8\tFLAT\t\"a.vmdk\"\t0\n",
        "\n\n  # Disk DescriptorFile\nCID = 12345678\nRDONLY 8 Vmfs \"a.vmdk\" 0 part 7\n\0\0rest",
        "RW 8 FLAT \"a.vmdk\" 0\nCID=12345678",
        "#Disk DescriptorFile\nRW 4 SPARSE \"s.vmdk\" 0\nRW 4 FLAT \"a.vmdk\" 4\nCID=12345678\n",
        "# x\nRW 4 FLAT \"a.vmdk\" 0\nCID=12345678\nRW 4 FLAT \"a.vmdk\" 4\n",
    ];
    for text in lines {
        let folder = RamFolder::new();
        folder.put("a.vmdk", vec![7; 4096]);
        create(&folder, &CreateParams { name: "s.vmdk", ..params(Format::Vmdk, 4) });
        folder.put("x.vmdk", text.as_bytes().to_vec());
        let mut engine = open(&folder, "x.vmdk", ro(Format::Vmdk));
        assert_eq!((engine.sectors(), engine.image().identity()), (8, Some(0x1234_5678)));
        let disk = read_all(&mut engine);
        let sparse = if text.contains("SPARSE") { 2048 } else { 0 };
        assert!(disk[..sparse].iter().all(|&b| b == 0) && disk[sparse..].iter().all(|&b| b == 7));
        if text.contains("RDONLY") {
            continue;
        }
        // The CID's digits are found, and changed alone.
        let mut engine = open(&folder, "x.vmdk", rw(Format::Vmdk));
        engine.write(7, &[8; 512]).unwrap();
        engine.close().unwrap();
        let now = folder.bytes("x.vmdk").unwrap();
        let at = text.find("12345678").unwrap();
        assert!(now[..at] == text.as_bytes()[..at] && now[at + 8..] == text.as_bytes()[at + 8..]);
        assert!(now[at..at + 8] != text.as_bytes()[at..at + 8]);
        let mut last = [0; 512];
        open(&folder, "x.vmdk", ro(Format::Vmdk)).read(7, &mut last).unwrap();
        assert!(last == [8; 512]);
    }
    for text in ["hello=", "hello world\nCID=1\n", "=1", "\u{fe}CID=1\n", "KDM"] {
        let fault = refused(text.as_bytes().to_vec(), "x.vmdk", ro(Format::Vmdk));
        assert!(!fault.contains("refused"), "{fault}");
    }
}

/// VMware on a Windows of western Europe writes names in its code page.
#[test]
fn a_name_in_the_code_page_that_the_descriptor_tells_is_read() {
    let folder = RamFolder::new();
    folder.put("Müll.vmdk", vec![7; 4096]);
    let text = b"# Disk DescriptorFile\r\nversion=1\r\nencoding=\"windows-1252\"\r\nCID=1\r\n\
        RW 8 FLAT \"M\xfcll.vmdk\" 0\r\n";
    folder.put("x.vmdk", text.to_vec());
    assert!(read_all(&mut open(&folder, "x.vmdk", ro(Format::Vmdk))) == [7; 4096]);
    let euro = text.iter().map(|&b| if b == 0xfc { 0x80 } else { b }).collect();
    folder.put("x.vmdk", euro);
    assert!(open_fault(&folder, "x.vmdk", Format::Vmdk).contains("UTF-8"));
}

/// Two extents in one sparse file would take the same space for their new grains.
#[test]
fn a_file_is_no_two_extents_unless_their_flat_data_lies_apart() {
    let open_lines = |lines: &str| {
        let folder = RamFolder::new();
        folder.put("f.vmdk", vec![7; 8192]);
        create(&folder, &CreateParams { name: "s.vmdk", ..params(Format::Vmdk, 64) });
        folder.put("x.vmdk", format!("# x\nCID=00000001\n{lines}\n").into_bytes());
        Engine::open(&folder, "x.vmdk", rw(Format::Vmdk)).map(|_| ()).map_err(|f| f.to_string())
    };
    for lines in [
        "RW 64 SPARSE \"s.vmdk\"\nRW 64 SPARSE \"s.vmdk\"",
        "RW 8 FLAT \"s.vmdk\" 0\nRW 64 SPARSE \"s.vmdk\"",
        "RW 64 SPARSE \"s.vmdk\"\nRW 8 ZERO\nRW 8 FLAT \"s.vmdk\" 0",
        "RW 8 FLAT \"f.vmdk\" 0\nRW 8 FLAT \"f.vmdk\" 7",
        "RW 8 FLAT \"f.vmdk\" 8\nRW 9 FLAT \"f.vmdk\" 0",
        "RW 8 FLAT \"f.vmdk\" 0\nRDONLY 8 FLAT \"f.vmdk\" 8",
    ] {
        let fault = open_lines(lines).unwrap_err();
        assert!(fault.contains("stands twice"), "{lines}: {fault}");
    }
    open_lines("RW 8 FLAT \"f.vmdk\" 8\nRW 4 ZERO\nRW 8 FLAT \"f.vmdk\" 0\nRW 8 ZERO").unwrap();
}

/// ESX's snapshots: a delta of either kind over a flat base, and a delta over that.
#[test]
fn esx_snapshots_lie_over_a_flat_base() {
    let base: Vec<u8> = (0..4000 * 512u32).map(|n| (n / 4096 * 3) as u8 | 1).collect();
    let scratch = Scratch::new("vmdk-esx");
    let folder = RamFolder::new();
    folder.put("b-flat.vmdk", base.clone());
    let text = |cid: u32, parent: (u32, &str), kind: &str, line: &str| {
        let hint = match parent.1 {
            "" => String::new(),
            name => format!("parentFileNameHint=\"{name}\"\n"),
        };
        format!(
            "# Disk DescriptorFile\nversion=1\nencoding=\"UTF-8\"\nCID={cid:08x}\n\
             parentCID={:08x}\nisNativeSnapshot=\"no\"\ncreateType=\"{kind}\"\n{hint}\
             # Extent description\nRW 4000 {line}\n",
            parent.0
        )
        .into_bytes()
    };
    folder.put("b.vmdk", text(1, (u32::MAX, ""), "vmfs", "VMFS \"b-flat.vmdk\""));
    let mut want = base;
    let written = [0, 5, 6, 3100, 3999];
    written.iter().for_each(|&sector| want[sector * 512..][..512].fill(0x50 + sector as u8));
    folder.put("b-000001-delta.vmdk", cowd(&want, &written));
    let line = "VMFSSPARSE \"b-000001-delta.vmdk\"";
    let path = "/vmfs/volumes/5f1c/vm/b.vmdk";
    folder.put("b-000001.vmdk", text(2, (1, path), "vmfsSparse", line));
    // Grain 3 unmapped, grain 4 zeros, two written.
    let data = |number: u64| 3 << 60 | (number & 0xfff) << 48 | number >> 12;
    let entries = [(3, 1 << 60), (4, 2 << 60), (499, data(1)), (498, data(0))];
    folder.put("b-000002-sesparse.vmdk", se_sparse(4000, &entries, 2));
    let line = "SESPARSE \"b-000002-sesparse.vmdk\"";
    folder.put("b-000002.vmdk", text(3, (2, "b-000001.vmdk"), "seSparse", line));
    copy_out(&folder, &scratch);
    let mut engine = open(&folder, "b-000001.vmdk", ro(Format::Vmdk));
    assert!(read_all(&mut engine) == want);
    // QEMU goes to the absolute path.
    want[3 * 4096..5 * 4096].fill(0);
    want[498 * 4096..499 * 4096].fill(1);
    want[499 * 4096..].fill(2);
    let mut engine = open(&folder, "b-000002.vmdk", rw(Format::Vmdk));
    assert_eq!(engine.depth(), 3);
    assert!(read_all(&mut engine) == want);
    let fault = engine.write(0, &[1; 512]).unwrap_err().to_string();
    assert!(fault.contains("seSparse"), "{fault}");
    folder.put(
        "b-000001.vmdk",
        text(2, (1, "b.vmdk"), "vmfsSparse", "VMFSSPARSE \"b-000001-delta.vmdk\""),
    );
    copy_out(&folder, &scratch);
    assert!(scratch.by_qemu("vmdk", "b-000002.vmdk") == want, "QEMU reads the chain");
    // dissect shows the parent through a grain that was unmapped.
    if let Some(disk) = scratch.by_reader("dissect", &["b-000002.vmdk"]) {
        assert!(disk[..3 * 4096] == want[..3 * 4096] && disk[4 * 4096..] == want[4 * 4096..]);
    }
    // An overlay of the hosted kind takes the writes.
    let identity = engine.image().identity();
    let backing = platter_image::Backing {
        name: "b-000002.vmdk",
        format: Format::Vmdk,
        identity,
        sectors: 4000,
    };
    let top = CreateParams { name: "t.vmdk", backing: Some(backing), ..params(Format::Vmdk, 4000) };
    create(&folder, &top);
    let mut engine = open(&folder, "t.vmdk", rw(Format::Vmdk));
    engine.write(25, &[9; 512]).unwrap();
    engine.close().unwrap();
    want[25 * 512..26 * 512].fill(9);
    assert!(read_all(&mut open(&folder, "t.vmdk", ro(Format::Vmdk))) == want);
}

/// Tables of 128 and 256 entries, which nobody is known to make: written, grown, with tables that
/// are still to be made.
#[test]
fn shorter_grain_tables_are_written_and_grow() {
    let scratch = Scratch::new("vmdk-short");
    for entries in [128u32, 256] {
        let folder = RamFolder::new();
        let sectors = 40_000;
        create(&folder, &CreateParams { name: "a.vmdk", ..params(Format::Vmdk, sectors) });
        let mut bytes = folder.bytes("a.vmdk").unwrap();
        put(&mut bytes, 44, &entries.to_le_bytes());
        // Both directories empty: what the old ones named is nobody's.
        for at in [48, 56] {
            let directory = u64_le(&bytes, at) as usize * 512;
            bytes[directory..directory + 512].fill(0);
        }
        folder.put("a.vmdk", bytes);
        let mut model = vec![0; sectors as usize * 512];
        scribble_on(&folder, "a.vmdk", Format::Vmdk, &mut model, 3);
        let mut engine = open(&folder, "a.vmdk", rw(Format::Vmdk));
        engine.resize(100_000).unwrap();
        for sector in [40_000, 66_000, 70_000, 99_999] {
            engine.write(sector, &[7; 512]).unwrap();
        }
        engine.close().unwrap();
        model.resize(100_000 * 512, 0);
        for sector in [40_000, 66_000, 70_000, 99_999] {
            model[sector * 512..][..512].fill(7);
        }
        let mut engine = open(&folder, "a.vmdk", ro(Format::Vmdk));
        assert!(read_all(&mut engine) == model);
        assert!(check_all(&mut engine).is_sound());
        copy_out(&folder, &scratch);
        assert!(scratch.by_qemu("vmdk", "a.vmdk") == model, "QEMU reads {entries}");
    }
}

/// Some leave much room for an embedded descriptor; what it says ends at the first NUL.
#[test]
fn much_room_for_a_descriptor_is_no_long_descriptor() {
    let folder = RamFolder::new();
    create(&folder, &CreateParams { name: "a.vmdk", ..params(Format::Vmdk, 5000) });
    let text = folder.bytes("a.vmdk").unwrap()[512..21 * 512].to_vec();
    let mut engine = open(&folder, "a.vmdk", rw(Format::Vmdk));
    engine.write(4000, &[5; 512]).unwrap();
    engine.close().unwrap();
    let mut bytes = folder.bytes("a.vmdk").unwrap();
    let at = bytes.len();
    bytes.extend(text);
    bytes.resize(at + (1 << 20), 0);
    put(&mut bytes, 28, &(at as u64 / 512).to_le_bytes());
    put(&mut bytes, 36, &2048u64.to_le_bytes());
    folder.put("a.vmdk", bytes.clone());
    let mut engine = open(&folder, "a.vmdk", rw(Format::Vmdk));
    let mut sector = [0; 512];
    engine.read(4000, &mut sector).unwrap();
    assert!(sector == [5; 512]);
    engine.resize(5001).unwrap();
    engine.close().unwrap();
    assert_eq!(open(&folder, "a.vmdk", ro(Format::Vmdk)).sectors(), 5001);
    bytes[at..].fill(b'#');
    assert!(
        refused(bytes.clone(), "a.vmdk", ro(Format::Vmdk)).contains("bytes of a VMDK descriptor")
    );
    bytes.truncate(at + 512);
    assert!(refused(bytes, "a.vmdk", ro(Format::Vmdk)).contains("beyond the end of the file"));
}

#[test]
fn what_could_not_be_opened_again_is_not_created() {
    let options = [("subformat", "twoGbMaxExtentFlat")];
    let sectors = 2u64 << 31;
    let long = "x".repeat(60) + ".vmdk";
    let params = CreateParams { name: &long, options: &options, ..params(Format::Vmdk, sectors) };
    assert!(create_fault(&params).contains("too long for a descriptor"));
}
