//! VHD as whole images: chains, footers, foreign layouts, hostile headers, growing, and what
//! other authors' readers say of what is written here.
//!
//! Would miss: several writes in flight at once, and power cuts in plain use (the tool's image
//! tests cover both); readers that nobody here has.

mod foreign;

use foreign::*;
use platter_image::{Backing, CreateParams, FlushStep, Format};
use platter_tool::engine::Engine;
use platter_tool::medium::{Event, RamFolder, apply};

const MIB: usize = 1 << 20;
const BLOCK: usize = 2 * MIB;

fn dynamic(sectors: u64) -> Vec<u8> {
    made(&params(Format::Vhd, sectors))
}

fn child(sectors: u64, name: &str, format: Format, identity: Option<u128>) -> Vec<u8> {
    let backing = Backing { name, format, identity, sectors };
    made(&CreateParams { backing: Some(backing), seed: 99, ..params(Format::Vhd, sectors) })
}

fn identity(folder: &RamFolder, name: &str) -> Option<u128> {
    open(folder, name, ro(Format::Vhd)).image().identity()
}

fn put32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

fn put64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

/// Computes a checksum again: one's complement of the sum, its own four bytes left out.
fn seal(bytes: &mut [u8], at: usize) {
    bytes[at..at + 4].fill(0);
    let sum = bytes.iter().fold(0u32, |sum, &b| sum.wrapping_add(b as u32));
    put32(bytes, at, !sum);
}

/// Changes a footer in both its places.
fn edit_footer(bytes: &mut [u8], edit: impl Fn(&mut [u8])) {
    let end = bytes.len() - 512;
    for start in [0, end] {
        edit(&mut bytes[start..start + 512]);
        seal(&mut bytes[start..start + 512], 64);
    }
}

fn edit_header(bytes: &mut [u8], edit: impl Fn(&mut [u8])) {
    edit(&mut bytes[512..1536]);
    seal(&mut bytes[512..1536], 36);
}

#[test]
fn what_is_written_reads_the_same_to_qemu_libvhdi_and_dissect() {
    let scratch = Scratch::new("vhd-written");
    for (name, block, subformat) in
        [("a.vhd", 0, "dynamic"), ("b.vhd", 512 << 10, "dynamic"), ("c.vhd", 0, "fixed")]
    {
        let folder = RamFolder::new();
        let options = [("subformat", subformat)];
        let base = params(Format::Vhd, 20_000);
        folder.put(name, made(&CreateParams { cluster_bytes: block, options: &options, ..base }));
        let mut model = vec![0; 20_000 * 512];
        let mut engine = open(&folder, name, rw(Format::Vhd));
        scribble(&mut engine, &mut model, &mut Rng(block), 40, 300);
        engine.close().unwrap();
        assert!(read_all(&mut open(&folder, name, ro(Format::Vhd))) == model);
        scratch.put(name, &folder.bytes(name).unwrap());
        assert!(scratch.by_qemu("vpc", name) == model, "QEMU reads {name}");
        for reader in ["libvhdi", "dissect"] {
            let Some(disk) = scratch.by_reader(reader, &[name]) else { continue };
            assert!(disk == model, "{reader} reads {name}");
        }
    }
}

/// Bitmaps of blocks above 16 MiB take more than one block of the cache.
#[test]
fn blocks_up_to_256_mib_are_written_and_read_the_same_elsewhere() {
    let scratch = Scratch::new("vhd-large");
    let sectors = 200_000;
    for mib in [32, 64, 256] {
        let folder = RamFolder::new();
        let base = CreateParams { cluster_bytes: mib << 20, ..params(Format::Vhd, sectors) };
        folder.put("p.vhd", made(&base));
        let mut model = vec![0; sectors as usize * 512];
        let mut rng = Rng(mib);
        for name in ["p.vhd", "c.vhd"] {
            if name == "c.vhd" {
                let identity = identity(&folder, "p.vhd");
                let backing = Backing { name: "p.vhd", format: Format::Vhd, identity, sectors };
                folder.put(name, made(&CreateParams { backing: Some(backing), seed: 9, ..base }));
            }
            let mut engine = open(&folder, name, rw(Format::Vhd));
            scribble(&mut engine, &mut model, &mut rng, 20, 400);
            // Across the edge of what one cache block of a bitmap tells.
            model[32_700 * 512..32_900 * 512].fill(0x77);
            engine.write(32_700, &[0x77; 200 * 512]).unwrap();
            engine.close().unwrap();
            let mut engine = open(&folder, name, ro(Format::Vhd));
            assert!(read_all(&mut engine) == model, "{name} of {mib} MiB");
            let report = check_all(&mut engine);
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:#?}");
            scratch.put(name, &folder.bytes(name).unwrap());
            if name == "p.vhd" {
                assert!(scratch.by_qemu("vpc", name) == model, "QEMU reads {mib} MiB");
            }
            let chain = if name == "p.vhd" { &["p.vhd"][..] } else { &["c.vhd", "p.vhd"] };
            if let Some(disk) = scratch.by_reader("libvhdi", chain) {
                assert!(disk == model, "libvhdi reads {name} of {mib} MiB");
            }
        }
    }
}

#[test]
fn a_chain_keeps_every_sector_apart() {
    let scratch = Scratch::new("vhd-chain");
    let folder = RamFolder::new();
    let sectors = 3 * 4096 + 77;
    let mut model = vec![0; sectors as usize * 512];
    folder.put("0.vhd", dynamic(sectors));
    for layer in 0..4u64 {
        let name = format!("{layer}.vhd");
        if layer > 0 {
            let below = format!("{}.vhd", layer - 1);
            let of = identity(&folder, &below);
            folder.put(&name, child(sectors, &below, Format::Vhd, of));
        }
        let mut engine = open(&folder, &name, rw(Format::Vhd));
        assert_eq!(engine.depth() as u64, layer + 1);
        assert!(read_all(&mut engine) == model, "an empty layer shows what is below");
        scribble(&mut engine, &mut model, &mut Rng(layer), 25, 60);
        engine.close().unwrap();
        assert!(read_all(&mut open(&folder, &name, ro(Format::Vhd))) == model);
        scratch.put(&name, &folder.bytes(&name).unwrap());
    }
    let chain = ["3.vhd", "2.vhd", "1.vhd", "0.vhd"];
    if let Some(disk) = scratch.by_reader("libvhdi", &chain) {
        assert!(disk == model, "libvhdi reads the chain");
    }
}

#[test]
fn a_single_sector_in_a_child_takes_its_page_and_leaves_the_rest_to_the_parent() {
    let folder = RamFolder::new();
    folder.put("p.vhd", dynamic(8192));
    let mut engine = open(&folder, "p.vhd", rw(Format::Vhd));
    engine.write(0, &vec![1; 8192 * 512]).unwrap();
    engine.close().unwrap();
    folder.put("c.vhd", child(8192, "p.vhd", Format::Vhd, identity(&folder, "p.vhd")));
    let mut engine = open(&folder, "c.vhd", rw(Format::Vhd));
    engine.write(4095, &[2; 1024]).unwrap();
    engine.close().unwrap();
    // One block each side of the edge, one byte of bits in each bitmap: libvhdi reads bytes.
    let bytes = folder.bytes("c.vhd").unwrap();
    let entry = |n: usize| u32::from_be_bytes(bytes[1536 + n * 4..][..4].try_into().unwrap());
    let bitmap = |n: usize| &bytes[entry(n) as usize * 512..][..512];
    assert!(bitmap(0)[..511].iter().all(|&b| b == 0) && bitmap(0)[511] == 0xff);
    assert!(bitmap(1)[0] == 0xff && bitmap(1)[1..].iter().all(|&b| b == 0));
    let disk = read_all(&mut open(&folder, "c.vhd", ro(Format::Vhd)));
    for (sector, want) in [(4094, 1), (4095, 2), (4096, 2), (4097, 1)] {
        assert!(disk[sector * 512..][..512].iter().all(|&b| b == want), "sector {sector}");
    }
}

#[test]
fn another_parent_is_refused_and_a_raw_one_is_named_by_no_identifier() {
    let folder = RamFolder::new();
    folder.put("p.vhd", made(&CreateParams { seed: 1, ..params(Format::Vhd, 4096) }));
    folder.put("c.vhd", child(4096, "p.vhd", Format::Vhd, identity(&folder, "p.vhd")));
    open(&folder, "c.vhd", ro(Format::Vhd));
    folder.put("p.vhd", made(&CreateParams { seed: 2, ..params(Format::Vhd, 4096) }));
    let fault = Engine::open(&folder, "c.vhd", ro(Format::Vhd)).err().unwrap();
    assert!(fault.to_string().contains("the parent is not the image"), "{fault}");
    folder.put("p.raw", vec![5; 4096 * 512]);
    folder.put("r.vhd", child(4096, "p.raw", Format::Raw, None));
    let mut engine = open(&folder, "r.vhd", rw(Format::Vhd));
    engine.write(7, &[6; 512]).unwrap();
    let disk = read_all(&mut engine);
    assert!(disk[..7 * 512].iter().all(|&b| b == 5) && disk[7 * 512] == 6);
}

#[test]
fn the_footer_is_found_at_the_end_short_or_in_its_copy() {
    let folder = RamFolder::new();
    folder.put("a.vhd", dynamic(9000));
    let mut engine = open(&folder, "a.vhd", rw(Format::Vhd));
    engine.write(0, &[3; 4096]).unwrap();
    engine.close().unwrap();
    let good = folder.bytes("a.vhd").unwrap();
    let len = good.len();
    let mut no_copy = good.clone();
    no_copy[0] = 0;
    let mut no_end = good.clone();
    no_end[len - 512] = 0;
    let short = good[..len - 1].to_vec();
    let mut bare = good.clone();
    bare.truncate(len - 512);
    for (bytes, remark) in
        [(no_copy, None), (no_end, Some("copy")), (short, Some("511")), (bare, Some("copy"))]
    {
        folder.put("b.vhd", bytes);
        let mut engine = open(&folder, "b.vhd", rw(Format::Vhd));
        let note = engine.image().notes().next().map(|(_, note)| note);
        assert_eq!(note.is_some(), remark.is_some());
        assert!(note.unwrap_or("").contains(remark.unwrap_or("")));
        // The first write brings a new footer, behind a new block too.
        engine.write(8192, &[4; 512]).unwrap();
        engine.close().unwrap();
        let bytes = folder.bytes("b.vhd").unwrap();
        assert!(&bytes[bytes.len() - 512..][..8] == b"conectix");
        let disk = read_all(&mut open(&folder, "b.vhd", ro(Format::Vhd)));
        assert!(disk[..4096].iter().all(|&b| b == 3) && disk[8192 * 512] == 4);
    }
}

/// After a power cut the end of the file is what a guest wrote: it may look like a footer.
#[test]
fn a_guests_footer_at_the_end_loses_against_the_copy() {
    let folder = RamFolder::new();
    folder.put("a.vhd", dynamic(9000));
    let mut engine = open(&folder, "a.vhd", rw(Format::Vhd));
    engine.write(4095, &[3; 512]).unwrap();
    engine.close().unwrap();
    let mut bytes = folder.bytes("a.vhd").unwrap();
    bytes.truncate(bytes.len() - 512);
    let end = bytes.len() - 512;
    let fake: Vec<u8> = bytes[..512].to_vec();
    bytes[end..].copy_from_slice(&fake);
    put64(&mut bytes[end..], 16, end as u64 - 2048);
    put32(&mut bytes[end..], 60, 4);
    seal(&mut bytes[end..], 64);
    folder.put("a.vhd", bytes);
    let mut engine = open(&folder, "a.vhd", ro(Format::Vhd));
    assert!(engine.image().notes().next().unwrap().1.contains("another disk"));
    assert_eq!(engine.sectors(), 9000);
    // And a fixed disk's byte 0 is its guest's.
    let options = [("subformat", "fixed")];
    folder.put("f.vhd", made(&CreateParams { options: &options, ..params(Format::Vhd, 64) }));
    let mut engine = open(&folder, "f.vhd", rw(Format::Vhd));
    engine.write(0, &fake).unwrap();
    engine.close().unwrap();
    assert_eq!(open(&folder, "f.vhd", ro(Format::Vhd)).sectors(), 64);
}

/// What a guest wrote decides nothing: a dynamic disk's could bring a footer of a fixed one to the
/// end, and a fixed disk's all of a dynamic one to the start.
#[test]
fn a_fixed_disk_with_a_dynamic_one_at_its_start_is_refused() {
    let options = [("subformat", "fixed")];
    let mut bytes = made(&CreateParams { options: &options, ..params(Format::Vhd, 9000) });
    bytes[..1536].copy_from_slice(&dynamic(9000)[..1536]);
    let said = refused(bytes.clone(), "a.vhd", ro(Format::Vhd));
    assert!(said.contains("all of a dynamic one at the start"), "{said}");
    bytes[512] = 0;
    let folder = RamFolder::new();
    folder.put("a.vhd", bytes);
    let info = open(&folder, "a.vhd", ro(Format::Vhd)).image().info();
    assert_eq!(info[0].details.variant, "fixed", "a copy without its header is a guest's bytes");
}

/// A footer that is missing comes with the first write, and not with a flush that began before.
#[test]
fn a_missing_footer_is_written_whatever_flush_is_under_way() {
    let folder = RamFolder::new();
    folder.put("a.vhd", dynamic(9000));
    let mut engine = open(&folder, "a.vhd", rw(Format::Vhd));
    engine.write(0, &[3; 512]).unwrap();
    engine.close().unwrap();
    let mut bytes = folder.bytes("a.vhd").unwrap();
    bytes.truncate(bytes.len() - 512);
    folder.put("a.vhd", bytes);
    let mut engine = open(&folder, "a.vhd", rw(Format::Vhd));
    assert!(engine.image().notes().next().is_some());
    engine.image().flush_begin();
    while !matches!(engine.image().flush_step(), FlushStep::Done) {}
    let plan = prepare(&mut engine, 0, 8);
    engine.image().flush_end(true);
    if let Some(plan) = plan {
        engine.image().commit(plan.prepared);
    } else {
        engine.write(0, &[4; 512]).unwrap();
    }
    engine.close().unwrap();
    assert_eq!(open(&folder, "a.vhd", ro(Format::Vhd)).image().notes().next(), None);
}

/// A file as libvhd lays it out: BAT, batmap, three locators, then blocks.
fn xenserver() -> Vec<u8> {
    let mut bytes = dynamic(5 * 4096);
    bytes.truncate(2048);
    edit_header(&mut bytes, |_| {});
    bytes[0..512][28..32].copy_from_slice(b"tap\0");
    put32(&mut bytes, 32, 0x0001_0003);
    seal(&mut bytes[..512], 64);
    let mut batmap = vec![0; 1024];
    batmap[..8].copy_from_slice(b"tdbatmap");
    put64(&mut batmap, 8, 2560);
    put32(&mut batmap, 16, 1);
    put32(&mut batmap, 20, 0x0001_0002);
    batmap[512] = 0x80;
    put32(&mut batmap, 24, !0x80);
    bytes.extend(batmap);
    // Block 0 is full; block 2 holds sector 9, and rubbish where its bits are clear.
    for (block, bitmap, data) in [(0, [0xff; 512], 1), (2, [0; 512], 2)] {
        let at = (bytes.len() + 512).next_multiple_of(4096) - 512;
        bytes.resize(at, 0);
        bytes.extend(bitmap);
        bytes.extend(vec![data; BLOCK]);
        put32(&mut bytes, 1536 + block * 4, (at / 512) as u32);
    }
    let second = u32::from_be_bytes(bytes[1544..1548].try_into().unwrap()) as usize * 512;
    bytes[second + 1] = 0x40;
    let footer: Vec<u8> = bytes[..512].to_vec();
    bytes.extend(footer);
    bytes
}

#[test]
fn an_image_of_xenserver_keeps_its_batmap_and_its_clear_bits() {
    let folder = RamFolder::new();
    folder.put("x.vhd", xenserver());
    let mut engine = open(&folder, "x.vhd", rw(Format::Vhd));
    let mut model = vec![0; 5 * BLOCK];
    model[..BLOCK].fill(1);
    model[2 * BLOCK + 9 * 512..][..512].fill(2);
    assert!(read_all(&mut engine) == model, "what no bit claims is zeros");
    scribble(&mut engine, &mut model, &mut Rng(3), 60, 100);
    engine.close().unwrap();
    assert!(read_all(&mut open(&folder, "x.vhd", ro(Format::Vhd))) == model);
    let bytes = folder.bytes("x.vhd").unwrap();
    assert!(bytes[2048..3072] == xenserver()[2048..3072], "the batmap is as it was");
    // Growing moves the BAT; libvhd looks for a batmap behind it.
    let mut engine = open(&folder, "x.vhd", rw(Format::Vhd));
    grow(&mut engine, 200 * 4096);
    engine.close().unwrap();
    let bytes = folder.bytes("x.vhd").unwrap();
    let table = u64::from_be_bytes(bytes[528..536].try_into().unwrap()) as usize;
    assert!(&bytes[table + 1024..][..8] == b"tdbatmap");
    let mut engine = open(&folder, "x.vhd", ro(Format::Vhd));
    model.resize(200 * BLOCK, 0);
    assert!(read_all(&mut engine) == model);
}

/// With these the data of a block shares a cache block with the bitmaps of its neighbours. (Others
/// do not read them: QEMU expects no bitmap before the data, libvhdi more of one.)
#[test]
fn blocks_below_4_kib_are_written_and_grow() {
    let sectors = 3001;
    for (block, kind) in [(512, 3), (1024, 3), (2048, 3), (512, 4), (2048, 4)] {
        let folder = RamFolder::new();
        folder.put("p.vhd", dynamic(sectors));
        let of = identity(&folder, "p.vhd");
        let mut bytes = match kind {
            3 => dynamic(sectors),
            _ => child(sectors, "p.vhd", Format::Vhd, of),
        };
        let footer = bytes.split_off(bytes.len() - 512);
        let (table, entries) = (bytes.len(), sectors.div_ceil(block / 512));
        bytes.resize(table + (entries as usize * 4).next_multiple_of(512), 0xff);
        edit_header(&mut bytes, |header| {
            put64(header, 16, table as u64);
            put32(header, 28, entries as u32);
            put32(header, 32, block as u32);
        });
        bytes.extend(footer);
        folder.put("a.vhd", bytes);
        let mut model = vec![0; sectors as usize * 512];
        let mut engine = open(&folder, "a.vhd", rw(Format::Vhd));
        scribble(&mut engine, &mut model, &mut Rng(block), 60, 90);
        engine.resize(sectors + 500).unwrap();
        model.resize(model.len() + 500 * 512, 0);
        scribble(&mut engine, &mut model, &mut Rng(block), 60, 90);
        engine.close().unwrap();
        let mut engine = open(&folder, "a.vhd", ro(Format::Vhd));
        assert!(read_all(&mut engine) == model, "blocks of {block}, type {kind}");
        assert_eq!(check_all(&mut engine).corruptions, 0);
    }
}

/// On a logical volume: the first blocks go behind the batmap and the locators too.
#[test]
fn a_file_that_cannot_grow_keeps_all_that_is_not_a_block() {
    let folder = RamFolder::new();
    folder.put("p.vhd", dynamic(5 * 4096));
    for kind in ["dynamic", "differencing"] {
        let mut bytes = xenserver()[..3072].to_vec();
        bytes[1536..2048].fill(0xff);
        bytes[2560] = 0;
        let mut footer = bytes[..512].to_vec();
        if kind == "differencing" {
            put32(&mut footer, 60, 4);
            let parent = identity(&folder, "p.vhd").unwrap();
            edit_header(&mut bytes, |header| header[40..56].copy_from_slice(&parent.to_be_bytes()));
            for (n, code) in [b"MacX", b"W2ku", b"W2ru"].into_iter().enumerate() {
                let (at, path) = (576 + n * 24, bytes.len());
                let data = match n {
                    0 => b"file://./p.vhd".to_vec(),
                    _ => "./p.vhd".encode_utf16().flat_map(u16::to_le_bytes).collect(),
                };
                edit_header(&mut bytes, |header| {
                    header[at..at + 4].copy_from_slice(code);
                    put32(header, at + 4, 512);
                    put32(header, at + 8, data.len() as u32);
                    put64(header, at + 16, path as u64);
                });
                bytes.extend(&data);
                bytes.resize(path + 512, 0);
            }
        }
        footer[68] ^= 1;
        seal(&mut footer, 64);
        bytes[..512].copy_from_slice(&footer);
        let fixed = bytes.clone();
        bytes.resize(6 * BLOCK, 0x77);
        bytes.extend(footer);
        folder.put("x.vhd", bytes);
        folder.fix(true);
        let mut engine = open(&folder, "x.vhd", rw(Format::Vhd));
        let mut model = vec![0; 5 * BLOCK];
        scribble(&mut engine, &mut model, &mut Rng(5), 20, 100);
        engine.close().unwrap();
        assert!(read_all(&mut open(&folder, "x.vhd", ro(Format::Vhd))) == model);
        let now = folder.bytes("x.vhd").unwrap();
        assert!(now[..1536] == fixed[..1536] && now[2048..fixed.len()] == fixed[2048..], "{kind}");
    }
}

#[test]
fn growing_survives_a_power_cut_at_any_write() {
    for (subformat, from, to) in
        [("dynamic", 3 * 4096, 900 * 4096u64), ("dynamic", 100, 4096), ("fixed", 100, 300)]
    {
        let folder = RamFolder::new();
        let options = [("subformat", subformat)];
        let params = CreateParams { options: &options, ..params(Format::Vhd, from) };
        let file = folder.put("a.vhd", made(&params));
        let mut engine = open(&folder, "a.vhd", rw(Format::Vhd));
        let mut model = vec![0; from as usize * 512];
        scribble(&mut engine, &mut model, &mut Rng(from), 20, 50);
        engine.close().unwrap();
        let before = folder.bytes("a.vhd").unwrap();
        folder.record();
        let mut engine = open(&folder, "a.vhd", rw(Format::Vhd));
        grow(&mut engine, to);
        engine.close().unwrap();
        let events = folder.events();
        let mut files = vec![Vec::new(); file + 1];
        files[file] = before;
        for cut in 0..=events.len() {
            folder.put("b.vhd", files[file].clone());
            let mut engine = open(&folder, "b.vhd", rw(Format::Vhd));
            let sectors = engine.sectors();
            assert!(sectors == from || sectors == to, "cut {cut}: {sectors}");
            let mut disk = vec![0; model.len()];
            engine.read(0, &mut disk).unwrap();
            assert!(disk == model, "cut {cut} of {subformat}");
            if cut == events.len() {
                assert_eq!(sectors, to);
                let mut rest = vec![1; (to - from).min(4096) as usize * 512];
                engine.read(from, &mut rest).unwrap();
                assert!(rest.iter().all(|&b| b == 0), "what was added reads as zeros");
                engine.write(to - 1, &[9; 512]).unwrap();
                engine.close().unwrap();
            } else {
                apply(&mut files, &events[cut]);
            }
        }
        let scratch = Scratch::new("vhd-grown");
        scratch.put("b.vhd", &folder.bytes("b.vhd").unwrap());
        let disk = scratch.by_qemu("vpc", "b.vhd");
        assert_eq!(disk.len() as u64, to * 512);
        assert!(disk[..model.len()] == model && disk[disk.len() - 1] == 9);
        assert!(events.iter().any(|e| matches!(e, Event::Sync { .. })));
    }
}

/// Virtual PC's disks are as long as their geometry says, and may hold more before the footer.
#[test]
fn a_fixed_disk_grows_up_to_its_footer_and_past_it() {
    let options = [("subformat", "fixed")];
    let mut bytes = made(&CreateParams { options: &options, ..params(Format::Vhd, 2100) });
    let footer = &mut bytes[2100 * 512..];
    footer[28..32].copy_from_slice(b"vpc ");
    // Cylinders, heads, and sectors of a track: 2040 sectors.
    footer[56..60].copy_from_slice(&[0, 30, 4, 17]);
    seal(footer, 64);
    let folder = RamFolder::new();
    folder.put("a.vhd", bytes);
    let mut model = vec![0; 2040 * 512];
    for sectors in [2040, 2050, 2100, 2101, 2300] {
        let mut engine = open(&folder, "a.vhd", rw(Format::Vhd));
        engine.resize(sectors).unwrap();
        engine.write(sectors - 1, &[7; 512]).unwrap();
        engine.close().unwrap();
        model.resize(sectors as usize * 512, 0);
        model[(sectors as usize - 1) * 512..].fill(7);
        let bytes = folder.bytes("a.vhd").unwrap();
        assert!(bytes[bytes.len() - 512..].starts_with(b"conectix"), "{sectors}");
        assert_eq!(bytes.len(), (sectors.max(2100) as usize + 1) * 512);
        assert!(read_all(&mut open(&folder, "a.vhd", ro(Format::Vhd))) == model, "{sectors}");
    }
}

#[test]
fn a_disk_above_127_gib_holds_its_last_sector() {
    let folder = RamFolder::new();
    let sectors = 300 << 21;
    folder.put("a.vhd", dynamic(sectors));
    let mut engine = open(&folder, "a.vhd", rw(Format::Vhd));
    engine.write(sectors - 1, &[8; 512]).unwrap();
    engine.close().unwrap();
    let mut engine = open(&folder, "a.vhd", ro(Format::Vhd));
    let mut sector = [0; 512];
    engine.read(sectors - 1, &mut sector).unwrap();
    assert_eq!((engine.sectors(), sector), (sectors, [8; 512]));
}

#[test]
fn hostile_headers_are_refused_in_a_sentence() {
    let header = |edit: fn(&mut [u8])| {
        let mut bytes = dynamic(9000);
        edit_header(&mut bytes, edit);
        refused(bytes, "a.vhd", rw(Format::Vhd))
    };
    let footer = |edit: fn(&mut [u8])| {
        let mut bytes = dynamic(9000);
        edit_footer(&mut bytes, edit);
        refused(bytes, "a.vhd", rw(Format::Vhd))
    };
    for (fault, part) in [
        (header(|h| put32(h, 32, 0)), "VHD block size is 0x0"),
        (header(|h| put32(h, 32, 3 << 20)), "VHD block size is 0x300000"),
        (header(|h| put32(h, 32, 1 << 31)), "VHD block size is 2147483648, the limit"),
        (header(|h| put32(h, 28, 1)), "VHD max table entries is 0x1"),
        (header(|h| put32(h, 28, u32::MAX)), "the BAT ends beyond"),
        (header(|h| put64(h, 16, u64::MAX)), "VHD table offset"),
        (header(|h| put64(h, 16, 1 << 50)), "the BAT ends beyond"),
        (header(|h| put64(h, 16, 1537)), "VHD table offset is 0x601"),
        (header(|h| put32(h, 24, 0x0002_0000)), "version of the VHD dynamic disk header"),
        (header(|h| h[0] = b'C'), "cookie of the VHD dynamic disk header"),
        (footer(|f| put64(f, 48, 1 << 60)), "VHD size in sectors is"),
        (footer(|f| put64(f, 48, 511)), "VHD current size is 0x1ff"),
        (footer(|f| put64(f, 48, 2040 << 30)), "VHD max table entries"),
        (footer(|f| put64(f, 16, u64::MAX)), "VHD data offset"),
        (footer(|f| put64(f, 16, 1 << 40)), "VHD data offset"),
        (footer(|f| put64(f, 16, 0)), "VHD data offset"),
        (footer(|f| put32(f, 60, 5)), "VHD disk type"),
        (footer(|f| put32(f, 60, 2)), "size of the fixed VHD"),
        (footer(|f| put32(f, 12, 0x0002_0000)), "VHD file format version"),
        (footer(|f| put32(f, 60, 4)), "VHD parent"),
        (refused(vec![0; 4096], "a.vhd", rw(Format::Vhd)), "not such an image"),
        (refused(vec![], "a.vhd", rw(Format::Vhd)), "not such an image"),
        (refused(b"conectix".to_vec(), "a.vhd", rw(Format::Vhd)), "not such an image"),
    ] {
        assert!(fault.contains(part), "{fault:?} does not say {part:?}");
    }
    let mut bytes = dynamic(9000);
    bytes[512 + 40] ^= 1;
    assert!(refused(bytes, "a.vhd", rw(Format::Vhd)).contains("checksum"));
}

#[test]
fn hostile_tables_fail_the_request_and_change_nothing() {
    let full = {
        let folder = RamFolder::new();
        folder.put("a.vhd", dynamic(9000));
        let mut engine = open(&folder, "a.vhd", rw(Format::Vhd));
        engine.write(0, &[3; 4096]).unwrap();
        engine.close().unwrap();
        folder.bytes("a.vhd").unwrap()
    };
    for entry in [0, 1, 2, 3, (full.len() / 512) as u32, u32::MAX - 1] {
        let mut bytes = full.clone();
        put32(&mut bytes, 1536 + 4, entry);
        let folder = RamFolder::new();
        folder.put("a.vhd", bytes.clone());
        let mut engine = open(&folder, "a.vhd", rw(Format::Vhd));
        let fault = engine.read(4096, &mut [0; 512]).unwrap_err().to_string();
        assert!(fault.contains("VHD BAT entry") || fault.contains("cut off"), "{fault}");
        if entry < 4 {
            assert!(engine.write(4096, &[7; 512]).is_err());
        }
        engine.flush().unwrap();
        let now = folder.bytes("a.vhd").unwrap();
        assert!(now[..2048] == bytes[..2048], "the metadata is as it was");
    }
}

#[test]
fn names_of_parents_stay_inside_the_folder() {
    let folder = RamFolder::new();
    folder.put("p.vhd", dynamic(4096));
    let of = identity(&folder, "p.vhd");
    for name in ["../p.vhd", "a/../../p.vhd", "a//p.vhd"] {
        folder.put("c.vhd", child(4096, name, Format::Vhd, of));
        let fault = Engine::open(&folder, "c.vhd", ro(Format::Vhd)).err().unwrap();
        assert!(fault.to_string().contains("refused"), "{fault}");
    }
    // An absolute path means the file beside the child.
    let mut bytes = child(4096, "p.vhd", Format::Vhd, of);
    edit_header(&mut bytes, |h| {
        h[576..580].copy_from_slice(b"W2ku");
        h[600..604].copy_from_slice(b"MacX");
    });
    let path: Vec<u8> = "C:\\x\\p.vhd".encode_utf16().flat_map(u16::to_le_bytes).collect();
    bytes[2048..2048 + path.len()].copy_from_slice(&path);
    edit_header(&mut bytes, |h| put32(h, 584, 20));
    folder.put("c.vhd", bytes);
    assert_eq!(open(&folder, "c.vhd", ro(Format::Vhd)).depth(), 2);
    // A file that is its own parent.
    let own = child(4096, "c.vhd", Format::Vhd, Some(1));
    folder.put("c.vhd", own);
    let fault = Engine::open(&folder, "c.vhd", ro(Format::Vhd)).err().unwrap();
    assert!(fault.to_string().contains("twice in the chain"), "{fault}");
}

#[test]
fn check_finds_blocks_on_each_other_and_on_the_metadata() {
    let folder = RamFolder::new();
    folder.put("a.vhd", dynamic(40 * 4096));
    let mut engine = open(&folder, "a.vhd", rw(Format::Vhd));
    for block in [3, 7, 1, 30] {
        engine.write(block * 4096, &[1; 512]).unwrap();
    }
    engine.close().unwrap();
    let good = folder.bytes("a.vhd").unwrap();
    let check = |bytes: &[u8]| {
        folder.put("b.vhd", bytes.to_vec());
        let mut engine = open(&folder, "b.vhd", ro(Format::Vhd));
        check_all(&mut engine)
    };
    let report = check(&good);
    assert_eq!((report.corruptions, report.leaks, report.allocated), (0, 0, 4));
    assert_eq!((report.clusters, report.end_bytes as usize), (40, good.len() - 512));
    let at = |block: usize| 1536 + block * 4;
    let entry = |block| u32::from_be_bytes(good[at(block)..][..4].try_into().unwrap());
    for wrong in [entry(7), entry(7) + 1, entry(7) - 1, 2, (good.len() / 512) as u32] {
        let mut bytes = good.clone();
        put32(&mut bytes, at(30), wrong);
        assert!(check(&bytes).corruptions > 0, "{wrong}");
    }
    let mut bytes = good.clone();
    put32(&mut bytes, at(7), u32::MAX);
    let report = check(&bytes);
    assert_eq!((report.corruptions, report.leaks), (0, 1));
    // The last block's entry is gone, and one more block's room lies before the footer.
    put32(&mut bytes, at(30), u32::MAX);
    let end = bytes.len() - 512;
    bytes.splice(end..end, vec![0; BLOCK + 512]);
    let report = check(&bytes);
    assert_eq!((report.corruptions, report.leaks), (0, 3), "{report:#?}");
}
