//! Hostile qcow2 images: each class of published fault of image parsers, as an image that must be
//! refused in one sentence without a change, or served without harm.
//!
//! Would miss: what nobody thought of (the fuzz targets are for that).

mod foreign;

use std::time::Instant;

use foreign::*;
use platter_image::{Access, Backing, CreateParams, FileNo, Format, Options};
use platter_image::{CheckParams, Repair, SectorRange};
use platter_tool::engine::{Engine, options};
use platter_tool::medium::{Event, RamFolder};

const Q: Format = Format::Qcow2;

fn new(options: &[(&str, &str)], sectors: u64) -> Vec<u8> {
    made(&CreateParams { options, ..params(Q, sectors) })
}

fn put32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

fn put64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

fn get64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// A good image with one edit, and what its refusal says.
fn refuse(edit: impl Fn(&mut Vec<u8>), says: &str) {
    let mut bytes = new(&[], 20480);
    edit(&mut bytes);
    for options in [ro(Q), rw(Q)] {
        let why = refused(bytes.clone(), "a.qcow2", options);
        assert!(why.contains(says), "{why:?} should say {says:?}");
    }
}

/// Header fields out of their limits (CVE-2014-0142 to 0148: shifts, overflows, unbounded
/// tables; CVE-2014-0222, 0223: table bits and sizes).
#[test]
fn header_fields_are_checked_before_they_are_used() {
    refuse(|b| b[3] = 0, "not such an image");
    refuse(|b| put32(b, 4, 1), "qcow2 version");
    refuse(|b| put32(b, 4, 4), "qcow2 version");
    refuse(|b| put32(b, 20, 0), "cluster_bits");
    refuse(|b| put32(b, 20, 8), "cluster_bits");
    refuse(|b| put32(b, 20, 22), "cluster_bits");
    refuse(|b| put32(b, 20, u32::MAX), "cluster_bits");
    refuse(|b| put64(b, 24, 0), "size");
    refuse(|b| put64(b, 24, u64::MAX), "size");
    refuse(|b| put64(b, 24, 1 << 62), "l1_size");
    refuse(|b| put32(b, 32, 1), "AES");
    refuse(|b| put32(b, 32, 2), "LUKS");
    refuse(|b| put32(b, 32, 3), "crypt_method");
    refuse(|b| put32(b, 36, 0), "l1_size");
    refuse(|b| put32(b, 36, u32::MAX), "the L1 table");
    refuse(|b| put64(b, 40, 0), "the L1 table");
    refuse(|b| put64(b, 40, 0x30200), "the L1 table");
    refuse(|b| put64(b, 40, 1 << 62), "the L1 table");
    refuse(|b| put64(b, 40, u64::MAX << 16), "the L1 table");
    refuse(|b| put64(b, 48, 0x10001), "the refcount table");
    refuse(|b| put64(b, 48, u64::MAX << 16), "the refcount table");
    refuse(|b| put32(b, 56, 0), "refcount_table_clusters");
    refuse(|b| put32(b, 56, u32::MAX), "the refcount table");
    refuse(|b| put32(b, 60, 65_537), "nb_snapshots");
    refuse(|b| put32(b, 60, 1), "the snapshot table");
    refuse(|b| put64(b, 72, 1 << 5), "incompatible feature");
    refuse(|b| put64(b, 72, 1 << 63), "incompatible feature");
    refuse(|b| put64(b, 72, 1 << 2), "data file without a name");
    refuse(|b| put64(b, 72, 1 << 3), "compression_type");
    refuse(|b| b[104] = 1, "compression_type");
    refuse(|b| put64(b, 88, 1 << 1), "raw data file bit");
    refuse(|b| put32(b, 96, 7), "refcount_order");
    refuse(|b| put32(b, 100, 96), "header_length");
    refuse(|b| put32(b, 100, 105), "header_length");
    refuse(|b| put32(b, 100, u32::MAX - 7), "header_length");
}

/// A feature that is not known is refused with the name that its image gives it.
#[test]
fn an_unknown_feature_is_refused_by_its_name() {
    let named = |bits: u64, entries: Vec<(u8, u8, Vec<u8>)>| {
        let mut bytes = new(&[], 20480);
        put64(&mut bytes, 72, bits);
        put32(&mut bytes, 112, 0x6803_f857);
        put32(&mut bytes, 116, entries.len() as u32 * 48);
        for (n, (kind, bit, name)) in entries.into_iter().enumerate() {
            let at = 120 + n * 48;
            (bytes[at], bytes[at + 1]) = (kind, bit);
            bytes[at + 2..at + 2 + name.len()].copy_from_slice(&name);
        }
        refused(bytes, "a.qcow2", rw(Q))
    };
    let entry = |kind, bit, name: &str| (kind, bit, name.as_bytes().to_vec());
    let entries = vec![entry(0, 0, "dirty bit"), entry(1, 7, "lazy"), entry(0, 7, "warp drive")];
    let why = named(1 << 7, entries.clone());
    assert!(why.contains("incompatible feature") && why.contains("(0x80)"), "{why}");
    assert!(why.ends_with("which it names 'warp drive'"), "{why}");
    let more = [&entries[..], &[entry(0, 63, "time travel")]].concat();
    assert!(named(1 << 7 | 1 << 63, more).ends_with("'warp drive, time travel'"));
    // Names are what a stranger wrote: plain text of bounded length comes out.
    let ugly = [&[0x1b, b'[', b'm'][..], &[b'x'; 43]].concat();
    let why = named(3 << 8, vec![(0, 8, ugly.clone()), (0, 9, ugly), (0, 99, vec![b'z'])]);
    assert!(why.contains("'?[mxxx") && !why.contains('\x1b') && !why.contains('z'), "{why}");
    assert!(named(1 << 20, vec![]).ends_with("(0x100000)"));
}

/// Encrypted images are refused in words that say what to do.
#[test]
fn encryption_is_refused_by_name() {
    refuse(|b| put32(b, 32, 1), "AES encryption of qcow2");
    refuse(|b| put32(b, 32, 2), "LUKS encryption of qcow2 (crypt_method): no passphrase");
    let header = |b: &mut Vec<u8>| {
        put32(b, 112, 0x0537_be77);
        put32(b, 116, 16);
    };
    refuse(header, "a LUKS encryption header (extension 0x0537be77)");
    // As QEMU makes one.
    let scratch = Scratch::new("qcow2-luks");
    let secret = ["--object", "secret,id=s,data=hunter2"];
    let luks = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let create = ["create", "-q", "-f", "qcow2", "-o", luks, "a.qcow2", "8M"];
    scratch.ok("qemu-img", &[&create[..1], &secret[..], &create[1..]].concat());
    let why = refused(scratch.get("a.qcow2"), "a.qcow2", rw(Q));
    assert!(why.contains("LUKS encryption of qcow2") && why.contains("decrypt it"), "{why}");
}

#[test]
fn extensions_and_names_stay_within_the_first_cluster() {
    let extension = |kind: u32, len: u32, data: Vec<u8>| {
        move |b: &mut Vec<u8>| {
            put32(b, 112, kind);
            put32(b, 116, len);
            b[120..120 + data.len()].copy_from_slice(&data);
        }
    };
    refuse(extension(0x1234, u32::MAX, vec![]), "header extension length");
    refuse(extension(0x1234, 65_500, vec![]), "header extension length");
    refuse(extension(0x2385_2875, 8, vec![0; 8]), "bitmaps extension length");
    let mut directory = vec![0; 24];
    put32(&mut directory, 0, 1);
    put64(&mut directory, 8, 1 << 40);
    put64(&mut directory, 16, 1 << 16);
    refuse(extension(0x2385_2875, 24, directory.clone()), "bitmap_directory_size");
    put64(&mut directory, 8, 64);
    put64(&mut directory, 16, 513);
    refuse(extension(0x2385_2875, 24, directory.clone()), "bitmap_directory_offset");
    // It would end beyond all offsets; a dirty image is gone through at once.
    put64(&mut directory, 8, 1 << 17);
    for (offset, marks) in [(u64::MAX << 16, 0), (u64::MAX << 16, 1), (i64::MAX as u64, 1)] {
        put64(&mut directory, 16, offset & !0xffff);
        let directory = extension(0x2385_2875, 24, directory.clone());
        let edit = |b: &mut Vec<u8>| {
            directory(b);
            b[79] = marks;
        };
        refuse(edit, "bitmap_directory_offset");
    }
    let backing = |offset: u64, len: u32| {
        move |b: &mut Vec<u8>| {
            put64(b, 8, offset);
            put32(b, 16, len);
        }
    };
    refuse(backing(200, 1024), "backing_file_size");
    refuse(backing(65_530, 100), "backing_file_offset");
    refuse(backing(u64::MAX - 3, 100), "backing_file_offset");
    refuse(backing(8, 100), "backing_file_offset");
}

/// CVE-2015-5163, CVE-2024-4467, CVE-2024-32498 and their kin: a name in an image opens nothing
/// but a file of the same store, and not even that when the configuration says no.
#[test]
fn names_in_an_image_open_only_what_they_may() {
    let overlay = |name: &str| {
        let backing = Backing { name, format: Format::Raw, identity: None, sectors: 2048 };
        made(&CreateParams { backing: Some(backing), ..params(Q, 2048) })
    };
    let names = [
        "/etc/shadow",
        "../up.raw",
        "a/../../up.raw",
        "json:{\"driver\":\"file\",\"filename\":\"/etc/shadow\"}",
        "nbd://host/x",
        "file:x",
        "a\\b",
        "a//b",
    ];
    for name in names {
        for opts in [ro(Q), rw(Q)] {
            let why = refused(overlay(name), "a.qcow2", opts);
            assert!(why.contains("refused"), "{name}: {why}");
        }
        let options = [("data_file", name)];
        let params = CreateParams { options: &options, ..params(Q, 2048) };
        let why = refused(first_file(&params), "a.qcow2", rw(Q));
        assert!(why.contains("refused"), "data file {name}: {why}");
    }
    let denied = Options { allow_names: false, ..rw(Q) };
    assert!(refused(overlay("b.raw"), "a.qcow2", denied).contains("denies"));
}

fn first_file(params: &CreateParams) -> Vec<u8> {
    let mut plan = platter_image::Create::new(params).unwrap();
    let mut bytes = vec![0; plan.files()[0].bytes as usize];
    while let Some(write) = plan.next_write() {
        bytes[write.offset as usize..][..write.bytes.len()].copy_from_slice(write.bytes);
    }
    bytes
}

/// CVE-2008-2004: the guest of a raw disk writes a qcow2 header into it; nothing looks.
#[test]
fn a_raw_disk_stays_raw_whatever_stands_in_it() {
    let folder = RamFolder::new();
    let mut bytes = new(&[], 2048);
    bytes.resize(1 << 20, 0);
    folder.put("a.img", bytes.clone());
    let mut engine = open(&folder, "a.img", ro(Format::Raw));
    assert!(read_all(&mut engine) == bytes);
    // And a chain whose lower format is not given is not probed either.
    let backing = Backing { name: "a.bin", format: Format::Raw, identity: None, sectors: 2048 };
    let mut overlay = made(&CreateParams { backing: Some(backing), ..params(Q, 2048) });
    put32(&mut overlay, 112, 0x1234);
    folder.put("a.bin", bytes);
    folder.put("b.qcow2", overlay);
    let fault = Engine::open(&folder, "b.qcow2", ro(Q)).err().unwrap().to_string();
    assert!(fault.contains("format of the backing file is not given"), "{fault}");
}

#[test]
fn a_chain_that_bites_its_tail_is_refused() {
    let overlay = |name: &str| {
        let backing = Backing { name, format: Q, identity: None, sectors: 2048 };
        made(&CreateParams { backing: Some(backing), ..params(Q, 2048) })
    };
    let folder = RamFolder::new();
    folder.put("a.qcow2", overlay("b.qcow2"));
    folder.put("b.qcow2", overlay("a.qcow2"));
    folder.put("c.qcow2", overlay("c.qcow2"));
    for name in ["a.qcow2", "c.qcow2"] {
        let fault = Engine::open(&folder, name, ro(Q)).err().unwrap().to_string();
        assert!(fault.contains("twice in the chain"), "{fault}");
    }
}

/// CVE-2015-5162, CVE-2018-10908: a tiny file that claims petabytes costs no time and no memory.
#[test]
fn a_tiny_file_claiming_petabytes_is_cheap() {
    let mut bytes = new(&[("cluster_size", "2097152")], 20480);
    // 2 MiB clusters: an L1 table of 32 MiB claims 2 EiB; the file has 8 MiB.
    put64(&mut bytes, 24, 1 << 61);
    put32(&mut bytes, 36, (32 << 20) / 8);
    let folder = RamFolder::new();
    folder.put("a.qcow2", bytes);
    let began = Instant::now();
    let mut engine = open(&folder, "a.qcow2", Options { budget_bytes: 256 << 10, ..rw(Q) });
    assert_eq!(engine.sectors(), 1 << 52);
    let mut sector = [1; 512];
    engine.read((1 << 52) - 1, &mut sector).unwrap();
    assert_eq!(sector, [0; 512]);
    let fault = engine.read(1 << 52, &mut sector).unwrap_err().to_string();
    assert!(fault.contains("beyond the end of the disk"), "{fault}");
    let params = CheckParams { repair: Repair::Nothing, budget_bytes: 64 << 10 };
    engine.check(params, |_, _| {}).unwrap();
    assert!(began.elapsed().as_secs() < 20);
}

/// An image with one allocated cluster, and where its tables are.
struct Known {
    bytes: Vec<u8>,
    l1: usize,
    l2: usize,
    block: usize,
}

fn known() -> Known {
    let folder = RamFolder::new();
    folder.put("a.qcow2", new(&[], 20480));
    let mut engine = open(&folder, "a.qcow2", rw(Q));
    engine.write(0, &[7; 65536]).unwrap();
    engine.close().unwrap();
    let bytes = folder.bytes("a.qcow2").unwrap();
    let l1 = get64(&bytes, 40) as usize;
    let l2 = (get64(&bytes, l1) & 0xff_ffff_ffff_fe00) as usize;
    let block = get64(&bytes, get64(&bytes, 48) as usize) as usize;
    Known { bytes, l1, l2, block }
}

fn served(bytes: Vec<u8>) -> (RamFolder, Engine) {
    let folder = RamFolder::new();
    folder.put("a.qcow2", bytes);
    let engine = open(&folder, "a.qcow2", rw(Q));
    folder.record();
    (folder, engine)
}

fn writes(folder: &RamFolder) -> usize {
    folder.events().iter().filter(|e| matches!(e, Event::Write { .. })).count()
}

/// Nothing was written but the corrupt bit in the header, durable at once.
fn marked(folder: &RamFolder, before: &[u8]) {
    let mut header = before[..512].to_vec();
    header[79] |= 2;
    let events = folder.events();
    let good = |e: &Event| matches!(e, Event::Write { offset: 0, bytes, .. } if *bytes == header);
    let written = events.iter().position(|e| matches!(e, Event::Write { .. })).expect("a mark");
    assert!(good(&events[written]) && writes(folder) == 1, "{events:?}");
    assert!(matches!(events[written + 1..], [Event::Sync { .. }, ..]));
}

/// CVE-2008-0928 and overlapping metadata: entries that name the header, tables, or space far
/// beyond the file. Reads give an error or zeros; writes and discards change nothing, but that
/// the image is marked corrupt.
#[test]
fn entries_that_name_metadata_or_nowhere_do_no_harm() {
    let image = known();
    let copied = 1 << 63;
    let reftable = get64(&image.bytes, 48);
    for target in [copied, copied | reftable, copied | image.l1 as u64, copied | 1 << 55] {
        let mut bytes = image.bytes.clone();
        // Offset 0 with the flag means nothing without a data file: the next entry then.
        put64(&mut bytes, image.l2, if target == copied { target | 0x1 } else { target });
        let (folder, mut engine) = served(bytes.clone());
        let mut sector = [0; 512];
        engine.read(0, &mut sector).unwrap();
        if target != copied {
            let fault = engine.write(0, &[9; 512]).unwrap_err().to_string();
            assert!(engine.discard(0, 128).is_err());
            if target == copied | 1 << 55 {
                // The file may have been cut short: that is no reason for the mark.
                assert!(fault.contains("names space beyond the file"), "{fault}");
                assert_eq!(writes(&folder), 0);
                continue;
            }
            assert!(fault.contains("an L2 entry that names metadata"), "{fault}");
            marked(&folder, &bytes);
            engine.read(0, &mut sector).unwrap();
        }
    }
    for word in [copied | 0x50200, 1 << 62, copied | 1 << 54] {
        let mut bytes = image.bytes.clone();
        put64(&mut bytes, image.l1, word);
        let (folder, mut engine) = served(bytes.clone());
        let fault = engine.read(0, &mut [0; 512]);
        // An entry whose offset bits are 0 is an absent table.
        assert_eq!(fault.is_err(), word != 1 << 62);
        if word != 1 << 62 {
            assert!(engine.write(0, &[1; 512]).is_err());
            marked(&folder, &bytes);
        }
    }
}

#[test]
fn free_counts_of_used_tables_do_not_hand_them_out() {
    let image = known();
    let mut bytes = image.bytes.clone();
    // Every count is 0: header, tables and data look free.
    bytes[image.block..image.block + 64].fill(0);
    refused_to_write(bytes.clone(), &image);
    // Only the L2 table looks free, then only the refcount block.
    for cluster in [image.l2 >> 16, image.block >> 16] {
        let mut bytes = image.bytes.clone();
        bytes[image.block + cluster * 2..][..2].fill(0);
        refused_to_write(bytes, &image);
    }
}

fn refused_to_write(bytes: Vec<u8>, image: &Known) {
    let l1 = image.l1;
    let (folder, mut engine) = served(bytes);
    let fault = (128..20480).step_by(128).find_map(|at| engine.write(at, &[3; 512]).err());
    let fault = fault.expect("it is seen before the table is written over").to_string();
    assert!(fault.contains("the refcount of a cluster that holds"), "{fault}");
    let _ = engine.flush();
    let after = folder.bytes("a.qcow2").unwrap();
    let reftable = get64(&image.bytes, 48) as usize;
    for table in [0..79, 80..65536, l1..l1 + 8, reftable..reftable + 8] {
        assert!(after[table.clone()] == image.bytes[table]);
    }
    assert_eq!(after[79], image.bytes[79] | 2, "and it is marked corrupt");
    // The entry of the data written before is still in its place.
    assert_eq!(get64(&after, image.l2), get64(&image.bytes, image.l2));
}

#[test]
fn refcount_tables_that_lie_are_refused_when_they_are_used() {
    let image = known();
    let reftable = get64(&image.bytes, 48) as usize;
    for word in [1u64 << 60, 513, image.bytes.len() as u64 + (1 << 30)] {
        let mut bytes = image.bytes.clone();
        put64(&mut bytes, reftable, word);
        let (folder, mut engine) = served(bytes);
        // In place it needs no count; a new cluster does.
        engine.write(0, &[8; 512]).unwrap();
        let fault = engine.write(1024, &[9; 512]).unwrap_err().to_string();
        assert!(fault.contains("a refcount table entry"), "{fault}");
        let tables = |e: &Event| matches!(e, Event::Write { offset: 512..0x40000, .. });
        assert!(!folder.events().iter().any(tables));
        assert_eq!(folder.bytes("a.qcow2").unwrap()[79], 2, "marked corrupt");
    }
}

/// The region that holds the tables has no refcount block, on a store that cannot grow: what lies
/// there counts as free. Neither a write nor a repair makes a block over it.
#[test]
fn no_refcount_block_is_made_over_what_is_in_use() {
    // Counts of 256 clusters in a block: data lies in regions without one too.
    let folder = RamFolder::new();
    folder.put("a.qcow2", new(&[("cluster_size", "512")], 20480));
    let mut engine = open(&folder, "a.qcow2", rw(Q));
    engine.write(0, &vec![7; 600 * 512]).unwrap();
    engine.close().unwrap();
    let good = folder.bytes("a.qcow2").unwrap();
    folder.fix(true);
    let reftable = get64(&good, 48) as usize;
    for region in 0..3 {
        let mut bytes = good.clone();
        put64(&mut bytes, reftable + region * 8, 0);
        let size = bytes.len();
        bytes.resize(2 * size, 0);
        for repair in [false, true] {
            folder.put("a.qcow2", bytes.clone());
            let mut engine = open(&folder, "a.qcow2", rw(Q));
            let all = CheckParams { repair: Repair::All, budget_bytes: 1 << 20 };
            let told = match repair {
                true => engine.check(all, |_, _| {}).err(),
                false => engine.write(2000, &[9; 512]).err(),
            };
            let told = told.map(|fault| fault.to_string());
            let says = match repair {
                true => "a missing refcount block, on a store that cannot grow",
                false => "the refcount of a cluster that holds",
            };
            // A guest cannot know that what counts as free is not.
            if repair || region == 0 {
                assert!(told.as_ref().is_some_and(|told| told.contains(says)), "{told:?}");
                engine.close().unwrap();
                let after = folder.bytes("a.qcow2").unwrap();
                assert_eq!(after[..79], bytes[..79]);
                assert!(after[80..] == bytes[80..], "region {region}, repair {repair}");
            }
        }
    }
}

/// QEMU's overlap checks: a table that another one names, or an entry for guest data that names a
/// table, is seen before it is written; the image is marked corrupt, as QEMU does, and says so
/// to QEMU too.
#[test]
fn tables_are_not_written_over_by_data_or_each_other() {
    let image = known();
    let reftable = get64(&image.bytes, 48);
    let copied = 1 << 63;
    let (l2, block) = (image.l2 as u64, image.block as u64);
    let data = get64(&image.bytes, image.l2) & !copied;
    // (where, what is put there, the write that meets it, what it says)
    let cases = [
        (image.l2, copied | l2, 3, "names a table"),
        (image.l2, copied | block, 3, "names a table"),
        (image.l2 + 8, copied | l2, 130, "names a table"),
        (image.l1, copied | reftable, 3, "an L1 entry that names metadata"),
        (image.l1, copied | image.l1 as u64, 3, "an L1 entry that names metadata"),
        (reftable as usize, reftable, 1024, "a refcount table entry that names metadata"),
        (reftable as usize, image.l1 as u64, 1024, "a refcount table entry that names metadata"),
    ];
    for (at, word, sector, says) in cases {
        let mut bytes = image.bytes.clone();
        put64(&mut bytes, at, word);
        let (folder, mut engine) = served(bytes.clone());
        let fault = engine.write(sector, &[9; 512]).unwrap_err().to_string();
        assert!(fault.contains(says), "{at:#x} {word:#x}: {fault}");
        marked(&folder, &bytes);
        let fault = engine.write(sector, &[9; 512]).unwrap_err().to_string();
        assert!(fault.contains("marked corrupt"), "{fault}");
        engine.close().unwrap();
        marked(&folder, &bytes);
        assert!(open(&folder, "a.qcow2", ro(Q)).image().info()[0].details.corrupt);
    }
    // A write of many clusters stops before the bad one.
    let mut bytes = image.bytes.clone();
    bytes.resize(data as usize + 3 * 65536, 0);
    put64(&mut bytes, image.l2 + 8, copied | (data + 65536));
    put64(&mut bytes, image.l2 + 16, copied | block);
    let (folder, mut engine) = served(bytes);
    assert!(engine.write(0, &[9; 3 * 65536]).is_err());
    let after = folder.bytes("a.qcow2").unwrap();
    assert!(after[data as usize..][..2 * 65536].iter().all(|&b| b == 9));
    assert!(after[image.block..][..65536] == image.bytes[image.block..][..65536]);
    let scratch = Scratch::new("qcow2-marked");
    scratch.put("a.qcow2", &after);
    assert!(scratch.ok("qemu-img", &["info", "a.qcow2"]).contains("corrupt: true"));
    // Version 2 has no such bit: the refusal holds while it is open, and no field is touched.
    let folder = RamFolder::new();
    folder.put("a.qcow2", new(&[("compat", "0.10")], 20480));
    let mut engine = open(&folder, "a.qcow2", rw(Q));
    engine.write(0, &[7; 65536]).unwrap();
    engine.close().unwrap();
    let mut bytes = folder.bytes("a.qcow2").unwrap();
    let l1 = get64(&bytes, 40) as usize;
    put64(&mut bytes, l1, copied | reftable);
    let (folder, mut engine) = served(bytes);
    assert!(engine.write(0, &[9; 512]).unwrap_err().to_string().contains("names metadata"));
    assert!(engine.write(0, &[9; 512]).unwrap_err().to_string().contains("marked corrupt"));
    engine.close().unwrap();
    assert_eq!(writes(&folder), 0);
}

/// A read that meets damage goes on refusing; the image is marked by the time it is closed.
#[test]
fn damage_that_a_read_met_is_marked_at_the_end() {
    let image = known();
    let mut bytes = image.bytes.clone();
    put64(&mut bytes, image.l2, 1 << 63 | 0x50200);
    let (folder, mut engine) = served(bytes.clone());
    assert!(engine.read(0, &mut [0; 512]).is_err());
    assert_eq!(writes(&folder), 0);
    engine.read(1024, &mut [0; 512]).unwrap();
    engine.close().unwrap();
    marked(&folder, &bytes);
}

/// All L1 entries share one L2 table, and that table one cluster: work stays bounded by the
/// file, not by the claims.
#[test]
fn shared_tables_do_not_multiply_the_work_of_a_check() {
    let image = known();
    let mut bytes = image.bytes.clone();
    put64(&mut bytes, 24, 1 << 50);
    put32(&mut bytes, 36, 1 << 21);
    let l1 = bytes.len().next_multiple_of(65536);
    bytes.resize(l1 + (16 << 20), 0);
    put64(&mut bytes, 40, l1 as u64);
    let word = get64(&bytes, image.l1);
    let entry = get64(&bytes, image.l2);
    for n in 0..1 << 21 {
        put64(&mut bytes, l1 + n * 8, word);
    }
    for n in 0..8192 {
        put64(&mut bytes, image.l2 + n * 8, entry);
    }
    let folder = RamFolder::new();
    folder.put("a.qcow2", bytes);
    let mut engine = open(&folder, "a.qcow2", ro(Q));
    let began = Instant::now();
    let params = CheckParams { repair: Repair::Nothing, budget_bytes: 1 << 20 };
    let report = engine.check(params, |_, _| {}).unwrap();
    assert!(report.corruptions > 0);
    assert!(began.elapsed().as_secs() < 60);
}

/// Bombs and broken streams (CVE-2014-0144 ff., "instar"'s compression bombs).
#[test]
fn compressed_clusters_stay_within_one_cluster() {
    let image = known();
    let bomb = miniz_oxide::deflate::compress_to_vec(&vec![0; 32 << 20], 9);
    let broken = vec![0xff; 4000];
    let short = miniz_oxide::deflate::compress_to_vec(&[5; 1000], 9);
    for (stream, good) in [(bomb, true), (broken, false), (short, false)] {
        let mut bytes = image.bytes.clone();
        let at = bytes.len();
        let sectors = (stream.len() as u64).div_ceil(512).min(255);
        bytes.extend(stream);
        bytes.resize(bytes.len().next_multiple_of(65536), 0);
        put64(&mut bytes, image.l2, 1 << 62 | sectors << 54 | at as u64);
        let (_, mut engine) = served(bytes);
        let mut cluster = vec![1; 65536];
        let result = engine.read(0, &mut cluster);
        assert_eq!(result.is_ok(), good, "{result:?}");
        if good {
            assert!(cluster.iter().all(|&b| b == 0));
        } else {
            assert!(result.unwrap_err().to_string().contains("compressed cluster"));
        }
        // The other clusters are served all the same.
        engine.write(1024, &[4; 512]).unwrap();
        engine.read(1024, &mut cluster[..512]).unwrap();
        assert!(cluster[..512].iter().all(|&b| b == 4));
    }
    // A stream that lies beyond the file, or whose offset cannot be.
    for word in [1u64 << 62 | 1 << 40, 1 << 62, 1 << 62 | 0x3fff_ffff_ffff_ffff] {
        let mut bytes = image.bytes.clone();
        put64(&mut bytes, image.l2, word);
        let (_, mut engine) = served(bytes);
        assert!(engine.read(0, &mut [0; 512]).is_err(), "{word:#x}");
    }
}

#[test]
fn a_corrupt_mark_refuses_writes_and_serves_reads() {
    let image = known();
    let mut bytes = image.bytes.clone();
    put64(&mut bytes, 72, 1 << 1);
    let (folder, mut engine) = served(bytes);
    let mut sector = [0; 512];
    engine.read(3, &mut sector).unwrap();
    assert_eq!(sector, [7; 512]);
    let fault = engine.write(0, &sector).unwrap_err().to_string();
    assert!(fault.contains("marked corrupt"), "{fault}");
    assert!(engine.discard(0, 128).is_err());
    assert_eq!(writes(&folder), 0);
}

#[test]
fn snapshot_tables_that_lie_are_refused_before_a_write() {
    let image = known();
    let table = image.bytes.len().next_multiple_of(65536);
    let build = |l1: u64, entries: u32, extra: u32| {
        let mut bytes = image.bytes.clone();
        bytes.resize(table + 65536, 0);
        put32(&mut bytes, 60, 1);
        put64(&mut bytes, 64, table as u64);
        put64(&mut bytes, table, l1);
        put32(&mut bytes, table + 8, entries);
        put32(&mut bytes, table + 36, extra);
        bytes
    };
    let good = build(image.l1 as u64, 1, 16);
    served(good);
    for (bytes, says) in [
        (build(513, 1, 16), "L1 table offset"),
        (build(1 << 50, 1, 16), "L1 table offset"),
        (build(image.l1 as u64, u32::MAX, 16), "l1_size"),
        (build(image.l1 as u64, 1, u32::MAX), "extra data"),
    ] {
        let why = refused(bytes, "a.qcow2", rw(Q));
        assert!(why.contains(says), "{why}");
    }
}

/// Every single byte of the metadata changed: no panic, no write outside what a guest owns.
#[test]
fn any_changed_byte_of_the_metadata_is_survived() {
    let image = known();
    let mut rng = Rng(5);
    let places: Vec<usize> = (0..120)
        .chain((0..8).map(|n| image.l1 + n))
        .chain((0..16).map(|n| image.l2 + n))
        .chain((0..16).map(|n| image.block + n))
        .chain((0..8).map(|n| get64(&image.bytes, 48) as usize + n))
        .collect();
    for place in places {
        for _ in 0..4 {
            let mut bytes = image.bytes.clone();
            bytes[place] ^= 1 << rng.below(8);
            let folder = RamFolder::new();
            folder.put("a.qcow2", bytes);
            let small = Options { budget_bytes: 64 << 10, ..options(Q, Access::ReadWrite) };
            let Ok(mut engine) = Engine::open(&folder, "a.qcow2", small) else { continue };
            // A size that is a lie would make a RAM file huge.
            let sectors = engine.sectors().min(20480);
            for sector in [0, 5, 127, 1000, 20000] {
                if sector < sectors {
                    let _ = engine.read(sector, &mut [0; 512]);
                    let _ = engine.write(sector, &[1; 512]);
                }
            }
            let _ = engine.discard(0, sectors.min(256));
            let _ = engine.drive(|image| image.map_read(SectorRange::new(0, sectors)));
            let params = CheckParams { repair: Repair::All, budget_bytes: 64 << 10 };
            let _ = engine.check(params, |_, _| {});
            assert!(engine.paths().len() == 1 && engine.image().depth() == 1);
            let _ = engine.medium(FileNo(0));
            let _ = engine.close();
        }
    }
}
