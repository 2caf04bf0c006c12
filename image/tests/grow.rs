//! Growing a disk in every format that can: what was there stays, what is new reads zeros and
//! takes writes, QEMU agrees, and a power cut after any write leaves the old size or the new one,
//! with all that was flushed.
//!
//! Would miss: growing with guests at work (the simulator and the rig do that).

mod foreign;

use foreign::*;
use platter_image::{CreateParams, Format, Options};
use platter_tool::engine::Engine;
use platter_tool::medium::{Event, RamFolder, apply};

struct Case {
    format: Format,
    options: &'static [(&'static str, &'static str)],
    cluster_bytes: u64,
    /// Sectors before and after: tables move, or grow where they are.
    sizes: (u64, u64),
}

const fn case(
    format: Format,
    options: &'static [(&'static str, &'static str)],
    cluster_bytes: u64,
    sizes: (u64, u64),
) -> Case {
    Case { format, options, cluster_bytes, sizes }
}

const CASES: &[Case] = &[
    case(Format::Raw, &[], 0, (3001, 9000)),
    case(Format::Qcow2, &[], 512, (3001, 99_001)),
    case(Format::Qcow2, &[("extended_l2", "on")], 0, (3001, 2_000_000)),
    case(Format::Qcow, &[], 0, (3001, 4096)),
    case(Format::Qcow, &[], 0, (3001, 99_001)),
    case(Format::Qcow, &[], 0, (3001, 6_000_000)),
    case(Format::Qed, &[("table_size", "2")], 4096, (3001, 99_001)),
    case(Format::Vdi, &[], 0, (3001, 99_001)),
    // QEMU leaves room for 128 blocks in the map.
    case(Format::Vdi, BY_QEMU, 0, (3001, 270_001)),
    case(Format::Vhd, &[], 512 << 10, (3001, 99_001)),
    case(Format::Vhd, &[("subformat", "fixed")], 0, (3001, 9000)),
    case(Format::Vhdx, &[], 1 << 20, (4000, 99_000)),
    case(Format::Vmdk, &[], 0, (3001, 60_000)),
    case(Format::Vmdk, &[], 4096, (3001, 40_001)),
    case(Format::Vmdk, &[], 0, (3001, 100_000_001)),
    case(Format::Vmdk, &[("subformat", "monolithicFlat")], 0, (3001, 12_345)),
    case(Format::Vmdk, &[("subformat", "twoGbMaxExtentSparse")], 0, (3001, 123_456)),
    case(Format::Vmdk, &[("subformat", "twoGbMaxExtentFlat")], 0, (3001, 12_345)),
    case(Format::Vmdk, BY_QEMU, 0, (3001, 123_456)),
];

/// Made by qemu-img, which leaves less room.
const BY_QEMU: &[(&str, &str)] = &[("qemu", "")];

/// A VDI whose map has room for its 128 blocks and no more, all of them in use: by qemu-img but for
/// the size of the blocks, which QEMU cannot open.
const FULL: &[(&str, &str)] = &[("full", "")];
const FULL_VDI: Case = case(Format::Vdi, FULL, 4096, (1024, 9000));

/// An image with data all over, its folder and the disk.
fn written(case: &Case, name: &str) -> (RamFolder, Vec<u8>) {
    let folder = RamFolder::new();
    let (options, cluster_bytes) = (case.options, case.cluster_bytes);
    let base = params(case.format, case.sizes.0);
    if options == BY_QEMU {
        let scratch = Scratch::new("grow-create");
        let size = (case.sizes.0 * 512).to_string();
        scratch.ok("qemu-img", &["create", "-q", "-f", case.format.name(), name, &size]);
        folder.put(name, scratch.get(name));
    } else if options == FULL {
        let scratch = Scratch::new("grow-full");
        scratch.ok("qemu-img", &["create", "-q", "-f", "vdi", name, "128M"]);
        let mut image = scratch.get(name);
        image[0x170..0x178].copy_from_slice(&(case.sizes.0 * 512).to_le_bytes());
        image[0x178..0x17c].copy_from_slice(&4096u32.to_le_bytes());
        folder.put(name, image);
        let mut engine = open(&folder, name, rw(case.format));
        engine.write(0, &vec![1; case.sizes.0 as usize * 512]).unwrap();
        engine.write(0, &vec![0; case.sizes.0 as usize * 512]).unwrap();
        engine.close().unwrap();
    } else {
        create(&folder, &CreateParams { name, options, cluster_bytes, ..base });
    }
    let mut model = vec![0; case.sizes.0 as usize * 512];
    let mut engine = open(&folder, name, rw(case.format));
    scribble(&mut engine, &mut model, &mut Rng(9), 25, 60);
    let end = model.len() - 512;
    model[end..].fill(0x33);
    engine.write(case.sizes.0 - 1, &[0x33; 512]).unwrap();
    engine.close().unwrap();
    (folder, model)
}

/// The map of small blocks is as long as a thousand of them, which all go.
#[test]
fn a_vdi_grows_beyond_the_room_of_its_map() {
    let case = case(Format::Vdi, &[], 4096, (9000, 2_200_001));
    let (folder, mut model) = written(&case, "a.vdi");
    let (old, new) = case.sizes;
    let mut engine = open(&folder, "a.vdi", Options { budget_bytes: 64 << 10, ..rw(Format::Vdi) });
    engine.resize(new).unwrap();
    model.resize((old as usize + 24) * 512, 0);
    assert!(looked_at(&mut engine, old) == model);
    engine.write(new - 1, &[7; 512]).unwrap();
    engine.write(1, &[8; 512]).unwrap();
    model[512..1024].fill(8);
    engine.resize(2 * new).unwrap();
    engine.close().unwrap();
    let mut engine = open(&folder, "a.vdi", ro(Format::Vdi));
    assert!(looked_at(&mut engine, old) == model);
    let mut bytes = [0; 512];
    engine.read(new - 1, &mut bytes).unwrap();
    assert_eq!(bytes, [7; 512]);
    let report = check_all(&mut engine);
    assert_eq!(report.corruptions, 0, "{report:#?}");
}

/// libvmdk is strict with the text that says how long a VMDK is; grains of 4 KiB it refuses.
fn hold_by_libvmdk(case: &Case, scratch: &Scratch, name: &str, disk: &[u8], when: &str) {
    if case.format != Format::Vmdk || case.cluster_bytes == 4096 || case.sizes.1 > 300_000 {
        return;
    }
    if let Some(read) = scratch.by_reader("libvmdk", &[name]) {
        let is_same = read.len() >= disk.len() && read[..disk.len()] == *disk;
        assert!(is_same, "{when}: libvmdk reads {} bytes of another disk", read.len());
    }
}

#[test]
fn a_split_vmdk_grows_in_its_last_extent_up_to_2_gib() {
    const SPLIT: u64 = 4_194_304;
    let scratch = Scratch::new("grow-split");
    let folder = RamFolder::new();
    let options = &[("subformat", "twoGbMaxExtentSparse")];
    let (name, sectors) = ("a.vmdk", SPLIT + 3001);
    create(&folder, &CreateParams { name, options, ..params(Format::Vmdk, sectors) });
    let mut engine = open(&folder, name, rw(Format::Vmdk));
    engine.write(SPLIT - 1, &[5; 1024]).unwrap();
    engine.write(sectors - 1, &[6; 512]).unwrap();
    engine.resize(SPLIT + 99_999).unwrap();
    engine.resize(2 * SPLIT).unwrap();
    let fault = engine.resize(2 * SPLIT + 1).unwrap_err().to_string();
    assert!(fault.contains("last extent") && fault.contains("convert it"), "{fault}");
    engine.write(2 * SPLIT - 1, &[7; 512]).unwrap();
    engine.close().unwrap();
    let mut engine = open(&folder, name, ro(Format::Vmdk));
    assert_eq!(engine.sectors(), 2 * SPLIT);
    assert_eq!(check_all(&mut engine).corruptions, 0);
    folder.names().iter().for_each(|name| scratch.put(name, &folder.bytes(name).unwrap()));
    scratch.ok("qemu-img", &["check", "-q", "-f", "vmdk", name]);
    for (fill, sector, count) in
        [(5, SPLIT - 1, 2), (6, sectors - 1, 1), (0, sectors, 99), (7, 2 * SPLIT - 1, 1)]
    {
        let mut bytes = vec![0xee; count * 512];
        engine.read(sector, &mut bytes).unwrap();
        assert!(bytes.iter().all(|&byte| byte == fill), "sector {sector}");
        let read = format!("read -P {fill} {} {}", sector * 512, count * 512);
        let said = scratch.ok("qemu-io", &["-r", "-f", "vmdk", "-c", &read, name]);
        assert!(!said.contains("failed"), "{said}");
    }
}

/// Sectors that the tests look at: all of the old disk, some of the new end.
fn looked_at(engine: &mut Engine, old: u64) -> Vec<u8> {
    let sectors = engine.sectors();
    let mut bytes = vec![0xee; old as usize * 512];
    engine.read(0, &mut bytes).unwrap_or_else(|fault| panic!("read: {fault}"));
    for start in [old, (old + sectors) / 2, sectors - 9] {
        let mut tail = vec![0xee; 8 * 512];
        let start = start.min(sectors - 8);
        engine.read(start, &mut tail).unwrap_or_else(|fault| panic!("read: {fault}"));
        bytes.extend(tail);
    }
    bytes
}

/// As `platter resize` does it: nothing is written once it is grown.
#[test]
fn a_disk_that_only_grows_needs_no_mending() {
    for case in CASES.iter().chain([&case(Format::Vhd, &[], 0, (3001, 3 << 21))]) {
        let what = format!("{} {:?} to {}", case.format.name(), case.options, case.sizes.1);
        let (folder, _) = written(case, "a.img");
        let mut engine = open(&folder, "a.img", rw(case.format));
        engine.resize(case.sizes.1).unwrap_or_else(|fault| panic!("{what}: {fault}"));
        engine.close().unwrap();
        let mut engine = open(&folder, "a.img", ro(case.format));
        assert_eq!(engine.sectors(), case.sizes.1, "{what}");
        assert_eq!(engine.image().notes().next(), None, "{what}");
    }
}

#[test]
fn a_grown_disk_keeps_what_it_held_and_reads_zeros_behind() {
    let scratch = Scratch::new("grow");
    for case in CASES {
        let what = format!("{} {:?} to {}", case.format.name(), case.options, case.sizes.1);
        let name = "a.img";
        let (folder, mut model) = written(case, name);
        let (old, new) = case.sizes;
        let mut engine = open(&folder, name, rw(case.format));
        engine.resize(new).unwrap_or_else(|fault| panic!("{what}: {fault}"));
        assert_eq!(engine.sectors(), new, "{what}");
        model.resize((old as usize + 24) * 512, 0);
        assert!(looked_at(&mut engine, old) == model, "{what}, grown");
        engine.write(new - 1, &[7; 512]).unwrap();
        engine.write(old - 1, &[8; 1024]).unwrap();
        engine.close().unwrap();
        let mut engine = open(&folder, name, rw(case.format));
        // Once more, by so little that tables may stay.
        engine.resize(new + 8).unwrap_or_else(|fault| panic!("{what}: {fault}"));
        engine.close().unwrap();
        let mut engine = open(&folder, name, ro(case.format));
        assert_eq!(engine.sectors(), new + 8, "{what}");
        let mut bytes = [0; 1024];
        engine.read(new - 1, &mut bytes).unwrap();
        assert!(bytes[..512] == [7; 512] && bytes[512..] == [0; 512], "{what}");
        engine.read(old - 1, &mut bytes).unwrap();
        assert!(bytes == [8; 1024], "{what}");
        let report = check_all(&mut engine);
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{what}: {report:#?}");
        for name in folder.names() {
            scratch.put(&name, &folder.bytes(&name).unwrap());
        }
        let format = if case.format == Format::Vhd { "vpc" } else { case.format.name() };
        let info = scratch.ok("qemu-img", &["info", "-f", format, name]);
        assert!(info.contains(&format!("({} bytes)", (new + 8) * 512)), "{what}: {info}");
        if ["qcow2", "qed", "vdi", "vhdx", "vmdk"].contains(&format) {
            scratch.ok("qemu-img", &["check", "-q", "-f", format, name]);
        }
        let at = (new - 1) * 512;
        let read = [format!("read -P 7 {at} 512"), format!("read -P 8 {} 1024", (old - 1) * 512)];
        for read in read {
            let said = scratch.ok("qemu-io", &["-r", "-f", format, "-c", &read, name]);
            assert!(!said.contains("failed"), "{what}: {said}");
        }
        if case.format == Format::Vmdk && new <= 300_000 {
            let disk = scratch.by_qemu(format, name);
            hold_by_libvmdk(case, &scratch, name, &disk, &what);
        }
        // QEMU writes where a table may be missing, and we read it.
        let write = format!("write -P 9 {} 4096", ((old + new) / 2) / 8 * 4096);
        scratch.ok("qemu-io", &["-f", format, "-c", &write, name]);
        for name in folder.names() {
            folder.put(&name, scratch.get(&name));
        }
        let mut engine = open(&folder, name, ro(case.format));
        let mut bytes = [0; 512];
        engine.read((old + new) / 2 / 8 * 8, &mut bytes).unwrap();
        assert!(bytes == [9; 512], "{what}");
        assert_eq!(check_all(&mut engine).corruptions, 0, "{what}, after QEMU's write");
    }
}

fn cut(durable: &[Vec<u8>], pending: &[Event], rng: &mut Rng) -> Vec<Vec<u8>> {
    let mut files = durable.to_vec();
    let keep = [0, 30, 70, 100][rng.below(4) as usize];
    for event in pending {
        if rng.below(100) >= keep {
            continue;
        }
        let Event::Write { file, offset, bytes } = event else {
            apply(&mut files, event);
            continue;
        };
        for (n, piece) in bytes.chunks(512).enumerate() {
            if keep == 100 || rng.below(4) > 0 {
                let offset = offset + n as u64 * 512;
                apply(&mut files, &Event::Write { file: *file, offset, bytes: piece.to_vec() });
            }
        }
    }
    files
}

/// The size and the count of blocks stand in one sector, and come at different times.
#[test]
fn a_vdi_that_grows_counts_a_block_before_its_entry_names_it() {
    let folder = RamFolder::new();
    create(&folder, &CreateParams { name: "a.vdi", ..params(Format::Vdi, 9000) });
    let mut durable = vec![folder.bytes("a.vdi").unwrap()];
    folder.record();
    let mut engine = open(&folder, "a.vdi", rw(Format::Vdi));
    engine.write(0, &[1; 512]).unwrap();
    engine.resize(10_000).unwrap();
    drop(engine);
    let mut pending = Vec::new();
    for event in folder.events() {
        if matches!(event, Event::Sync { .. }) {
            pending.drain(..).for_each(|event| apply(&mut durable, &event));
            continue;
        }
        pending.push(event);
        // Nothing since the sync is kept but the last.
        let mut files = durable.clone();
        apply(&mut files, pending.last().expect("just pushed"));
        let world = RamFolder::new();
        world.put("a.vdi", files.remove(0));
        let report = check_all(&mut open(&world, "a.vdi", ro(Format::Vdi)));
        assert_eq!(report.corruptions, 0, "{:?}", report.problems);
    }
}

/// QEMU finds the old disk in what a cut left, and nothing wrong with it.
fn judge_by_qemu(case: &Case, names: &[String], files: &[Vec<u8>], model: &[u8], at: usize) {
    let scratch = Scratch::new("grow-cut");
    names.iter().zip(files).for_each(|(name, bytes)| scratch.put(name, bytes));
    let format = if case.format == Format::Vhd { "vpc" } else { case.format.name() };
    let when = format!("{format} {:?}, cut {at}", case.options);
    if ["qcow2", "qed", "vdi", "vhdx", "vmdk"].contains(&format) {
        // A log is replayed, a dirty image repaired.
        let repair = ["-r", "all"].as_slice();
        let repair = if ["qed", "vhdx"].contains(&format) { repair } else { &[] };
        let args = [&["check", "-f", format], repair, &[names[0].as_str()]].concat();
        let output = scratch.run("qemu-img", &args);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &text;
        // Blocks of a VDI are counted before they are named: QEMU reads it and calls it an error.
        let mut errors = text.lines().filter(|line| line.starts_with("ERROR"));
        let is_known = errors.all(|line| line.contains("allocated blocks mismatch"));
        let good = matches!(output.status.code(), Some(0 | 3)) || (format == "vdi" && is_known);
        assert!(good, "{when}: {text}");
    }
    let first = scratch.by_qemu(format, &names[0]);
    assert!(first.len() >= model.len() && first[..model.len()] == *model, "{when}: read by QEMU");
    hold_by_libvmdk(case, &scratch, &names[0], model, &when);
    if case.format == Format::Vdi {
        hold_grown_again(case, names, files, model, &when);
    }
}

/// Growing once more ends what the cut interrupted, and QEMU's check has nothing to say.
fn hold_grown_again(case: &Case, names: &[String], files: &[Vec<u8>], model: &[u8], when: &str) {
    let folder = RamFolder::new();
    names.iter().zip(files).for_each(|(name, bytes)| _ = folder.put(name, bytes.clone()));
    let mut engine = open(&folder, &names[0], rw(case.format));
    grow(&mut engine, case.sizes.1 + 8);
    assert!(looked_at(&mut engine, case.sizes.0)[..model.len()] == *model, "{when}, grown");
    engine.close().unwrap();
    let scratch = Scratch::new("grow-again");
    scratch.put(&names[0], &folder.bytes(&names[0]).unwrap());
    let output = scratch.run("qemu-img", &["check", "-f", case.format.name(), &names[0]]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(!text.contains("too large"), "{when}, grown: {text}");
}

#[test]
fn a_power_cut_while_it_grows_leaves_one_size_or_the_other() {
    let small = CASES.iter().filter(|case| case.sizes.1 <= 300_000).chain([&FULL_VDI]);
    for (n, case) in small.enumerate() {
        let (folder, model) = written(case, "a.img");
        let (old, new) = case.sizes;
        let mut rng = Rng(n as u64);
        let mut durable: Vec<_> =
            folder.names().iter().map(|name| folder.bytes(name).unwrap()).collect();
        folder.record();
        let options = Options { budget_bytes: 64 << 10, ..rw(case.format) };
        let mut engine = open(&folder, "a.img", options.clone());
        engine.resize(new).unwrap();
        let grown = folder.events_len();
        engine.write(new - 1, &[7; 512]).unwrap();
        engine.write((old + new) / 2, &[7; 512]).unwrap();
        engine.flush().unwrap();
        engine.close().unwrap();
        let events = folder.events();
        let mut pending = Vec::new();
        for at in 0..=events.len() {
            for _ in 0..20 {
                let files = cut(&durable, &pending, &mut rng);
                let world = RamFolder::new();
                for (name, bytes) in folder.names().iter().zip(files) {
                    world.put(name, bytes);
                }
                let when = format!("{} {:?}, cut {at}", case.format.name(), case.options);
                let opened = Engine::open(&world, "a.img", options.clone());
                let mut engine = opened.unwrap_or_else(|fault| panic!("{when}: {fault}"));
                let sectors = engine.sectors();
                assert!(sectors == new || (sectors == old && at <= grown), "{when}: {sectors}");
                assert!(looked_at(&mut engine, old)[..model.len()] == model, "{when}");
                engine.write(sectors - 3, &[5; 512]).unwrap_or_else(|f| panic!("{when}: {f}"));
                let report = check_all(&mut engine);
                assert_eq!(report.corruptions, 0, "{when}: {:?}", report.problems);
                engine.close().unwrap();
            }
            if at % 4 == 0 && case.options != FULL {
                let files = cut(&durable, &pending, &mut rng);
                judge_by_qemu(case, &folder.names(), &files, &model, at);
            }
            match events.get(at) {
                Some(Event::Sync { file: synced }) => {
                    let (done, kept): (Vec<_>, Vec<_>) = pending.drain(..).partition(|event| {
                        let (Event::Write { file, .. }
                        | Event::SetLen { file, .. }
                        | Event::Sync { file }) = event;
                        file == synced
                    });
                    done.iter().for_each(|event| apply(&mut durable, event));
                    pending = kept;
                }
                Some(event) => pending.push(event.clone()),
                None => {}
            }
        }
    }
}
