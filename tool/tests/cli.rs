//! The command line as a user meets it: every format there and back, exit codes, and images made
//! to harm, each of which must get one clear sentence and stay as it is.
//!
//! Would miss: what the engine's own tests find; it looks at words, codes and files.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

const FORMATS: [&str; 7] = ["qcow2", "qcow", "qed", "vhd", "vhdx", "vmdk", "vdi"];

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("platter-cli-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).expect("a scratch directory");
        Folder(path)
    }

    fn run(&self, args: &[&str]) -> Output {
        let program = env!("CARGO_BIN_EXE_platter");
        Command::new(program).args(args).current_dir(&self.0).output().expect("it was built")
    }

    /// Runs a command that must succeed.
    fn good(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {error}");
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    /// Runs a command that must be refused in one sentence that names `file`.
    fn refused(&self, args: &[&str], file: &str) -> String {
        let output = self.run(args);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code().is_some_and(|code| code > 0), "{args:?}: {output:?}");
        let one = error.lines().count() == 1 && error.starts_with("platter: ");
        assert!(one && error.contains(file), "{args:?} says: {error}");
        error
    }

    fn qemu_img(&self, args: &[&str]) {
        let output = Command::new("qemu-img").args(args).current_dir(&self.0).output();
        let output = output.expect("qemu-img is installed");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// 9 MiB with data, zeros written out, and a hole.
fn sample(path: &Path) {
    let mut bytes: Vec<u8> = (0..3 << 20).map(|i: u32| (i / 700) as u8 ^ (i >> 9) as u8).collect();
    bytes.resize(9 << 20, 0);
    bytes[5_000_000] = 7;
    fs::write(path, bytes).expect("room for a sample");
}

/// A qcow2 image called .img, as cloud images are: never silently taken for raw.
#[test]
fn what_only_its_suffix_makes_raw_must_not_look_like_another_format() {
    let folder = Folder::new("marked");
    folder.good(&["create", "-q", "-f", "qcow2", "box.img", "4M"]);
    for args in [&["info"][..], &["check"], &["map"], &["snapshot", "-l"], &["bench", "-c", "1"]] {
        let error = folder.refused(&[args, &["box.img"]].concat(), "box.img");
        assert!(error.contains("starts like qcow2"), "{error}");
        folder.good(&[args, &["-f", "qcow2", "box.img"]].concat());
    }
    folder.refused(&["convert", "box.img", "copy.qcow2"], "box.img");
    folder.refused(&["create", "-f", "qcow2", "-b", "box.img", "over.qcow2"], "box.img");
    assert!(!folder.path("copy.qcow2").exists() && !folder.path("over.qcow2").exists());
    folder.good(&["convert", "-q", "-f", "qcow2", "box.img", "copy.qcow2"]);
    let text = folder.good(&["info", "-f", "raw", "box.img"]);
    assert!(text.contains("starts like"), "{text}");
}

#[test]
fn every_format_there_and_back_is_the_same_disk() {
    let folder = Folder::new("formats");
    sample(&folder.path("a.raw"));
    for format in FORMATS {
        let image = format!("a.{format}");
        folder.good(&["convert", "-q", "a.raw", &image]);
        let said = folder.good(&["compare", "a.raw", &image]);
        assert!(said.contains("identical"), "{format}: {said}");
        folder.good(&["check", "-q", &image]);
        let info = folder.good(&["info", "--json", &image]);
        assert!(info.contains(&format!("\"format\": \"{format}\"")), "{info}");
        let qemu = if format == "vhd" { "vpc" } else { format };
        let compared = ["compare", "-q", "-f", "raw", "-F", qemu, "a.raw", image.as_str()];
        folder.qemu_img(&compared);
        let back = format!("{format}.raw");
        folder.good(&["convert", "-q", &image, &back]);
        let same = fs::read(folder.path(&back)).unwrap() == fs::read(folder.path("a.raw")).unwrap();
        assert!(same, "{format}: the raw file that comes back differs");
    }
}

/// Packed clusters, some that gain nothing by it, zeros left out, and a disk that ends within a
/// cluster; in clusters of which one or many lie in one of the file.
#[test]
fn a_compressed_qcow2_is_the_same_disk_for_qemu() {
    let folder = Folder::new("compressed");
    sample(&folder.path("a.raw"));
    let mut bytes = fs::read(folder.path("a.raw")).unwrap();
    let mut state = 1u64;
    for byte in &mut bytes[6_000_000..6_700_000] {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        *byte = (state >> 56) as u8;
    }
    bytes.truncate(8_500_224);
    fs::write(folder.path("a.raw"), bytes).unwrap();
    let sizes = ["512", "4096", "65536", "2097152"];
    let kinds = sizes.into_iter().flat_map(|size| [(size, "zlib"), (size, "zstd")]);
    for (size, codec) in kinds {
        let option = format!("cluster_size={size},compression_type={codec}");
        folder.good(&["convert", "-q", "--force", "-c", "-o", &option, "a.raw", "c.qcow2"]);
        folder.qemu_img(&["check", "-q", "c.qcow2"]);
        folder.qemu_img(&["compare", "-q", "-f", "raw", "-F", "qcow2", "a.raw", "c.qcow2"]);
        folder.good(&["check", "-q", "c.qcow2"]);
        folder.good(&["compare", "-q", "a.raw", "c.qcow2"]);
        // Five clusters are tables.
        let len = fs::metadata(folder.path("c.qcow2")).unwrap().len();
        assert!(len < (3 << 20) + 5 * size.parse::<u64>().unwrap(), "{size}, {codec}: {len}");
        let info = folder.good(&["info", "c.qcow2"]);
        assert_eq!(info.contains("zstd"), codec == "zstd", "{info}");
        // It is as good as any to write to.
        folder.good(&["bench", "-w", "-c", "20", "--random", "3", "-s", "8k", "c.qcow2"]);
        folder.qemu_img(&["check", "-q", "c.qcow2"]);
    }
    for refused in [&["-o", "extended_l2=on", "a.raw", "z.qcow2"][..], &["a.raw", "z.vdi"]] {
        let args = [&["convert", "-q", "-c"], refused].concat();
        assert_eq!(folder.run(&args).status.code(), Some(1));
        assert!(!folder.path("z.qcow2").exists() && !folder.path("z.vdi").exists());
    }
}

#[test]
fn each_cache_mode_writes_the_same() {
    let folder = Folder::new("cache");
    for mode in ["none", "writeback", "writethrough", "directsync", "unsafe"] {
        folder.good(&["create", "a.qcow2", "4M"]);
        for (size, pattern) in [("4k", "9"), ("1536", "7")] {
            let args = ["bench", "-w", "-t", mode, "-d", "4", "-c", "40", "-s", size, "-S", "64k"];
            folder.good(&[&args[..], &["--pattern", pattern, "a.qcow2"]].concat());
        }
        folder.good(&["bench", "-t", mode, "-d", "4", "-c", "40", "a.qcow2"]);
        folder.good(&["check", "a.qcow2"]);
        folder.good(&["convert", "--force", "a.qcow2", "a.raw"]);
        let bytes = fs::read(folder.path("a.raw")).unwrap();
        for at in (0..40 * 65536).step_by(65536) {
            let mut wanted = [0; 65536];
            wanted[..4096].fill(9);
            wanted[..1536].fill(7);
            assert!(bytes[at..at + 65536] == wanted, "-t {mode} at {at}");
        }
        fs::remove_file(folder.path("a.qcow2")).unwrap();
    }
}

#[test]
fn an_overlay_hides_its_base_until_it_is_committed() {
    let folder = Folder::new("overlay");
    sample(&folder.path("a.raw"));
    for format in FORMATS {
        let (base, over) = (format!("b.{format}"), format!("o.{format}"));
        folder.good(&["convert", "-q", "a.raw", &base]);
        folder.good(&["snapshot", "--overlay", &over, &base]);
        let bench = ["bench", "-w", "-c", "40", "--random", "5", "--pattern", "9", over.as_str()];
        folder.good(&bench);
        folder.good(&["compare", "-q", "a.raw", &base]);
        assert_eq!(folder.run(&["compare", "-q", &base, &over]).status.code(), Some(1));
        folder.good(&["convert", "-q", "--force", &over, "over.raw"]);
        let said = folder.good(&["commit", &over]);
        folder.good(&["compare", "-q", &base, "over.raw"]);
        folder.good(&["check", "-q", &base]);
        // A child of these knows its parent by what it held.
        let useless = matches!(format, "vhdx" | "vmdk");
        assert_eq!(said.contains("delete it"), useless, "{format}: {said}");
        if !useless {
            folder.good(&["compare", "-q", &base, &over]);
            continue;
        }
        // As after a commit that was stopped: the base has changed where the overlay has data.
        folder.good(&["bench", "-w", "-c", "40", "--random", "5", "--pattern", "3", &base]);
        let output = folder.run(&["commit", &over]);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains("--again"), "{error}");
        folder.good(&["commit", "--again", &over]);
        folder.good(&["compare", "-q", &base, "over.raw"]);
        folder.good(&["check", "-q", &base]);
    }
}

/// `preallocation` as qemu-img names it: the room is there, or written, and QEMU reads zeros.
#[test]
fn a_preallocated_image_has_its_room() {
    let folder = Folder::new("preallocation");
    for (format, subformat) in [
        ("raw", ""),
        ("qcow2", ""),
        ("vdi", "static=on,"),
        ("vhd", "subformat=fixed,"),
        ("vhdx", "subformat=fixed,"),
        ("vmdk", "subformat=monolithicFlat,"),
    ] {
        for (mode, least) in [("off", 0), ("falloc", 8 << 20), ("full", 8 << 20)] {
            let name = format!("{mode}.{format}");
            let options = format!("{subformat}preallocation={mode}");
            folder.good(&["create", "-q", "-f", format, "-o", &options, &name, "8M"]);
            let data = if format == "vmdk" { format!("{mode}-flat.vmdk") } else { name.clone() };
            let taken = std::fs::metadata(folder.path(&data)).unwrap().blocks() * 512;
            assert!(taken >= least && (least > 0 || taken < 4 << 20), "{name}: {taken}");
            let format = if format == "vhd" { "vpc" } else { format };
            folder.qemu_img(&["compare", "-q", "-f", format, "-F", "raw", &name, "off.raw"]);
        }
    }
    folder.good(&["create", "-q", "-f", "vdi", "-o", "preallocation=metadata", "m.vdi", "8M"]);
    for options in ["preallocation=much", "preallocation=falloc,subformat=dynamic"] {
        let why = folder.refused(&["create", "-f", "vhd", "-o", options, "x.vhd", "8M"], "x.vhd");
        assert!(why.contains("preallocation"), "{why}");
    }
}

#[test]
fn codes_and_words_are_those_that_scripts_expect() {
    let folder = Folder::new("codes");
    sample(&folder.path("a.raw"));
    folder.good(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "b.qcow2", "9M"]);
    assert_eq!(folder.run(&["compare", "-q", "a.raw", "b.qcow2"]).status.code(), Some(1));
    assert_eq!(folder.run(&["compare", "-q", "a.raw", "c.raw"]).status.code(), Some(2));
    folder.good(&["resize", "-q", "b.qcow2", "+1M"]);
    let info = folder.good(&["info", "b.qcow2"]);
    assert!(info.contains("virtual size: 10 MiB (10485760 bytes)"), "{info}");
    let map = folder.good(&["map", "--output=json", "b.qcow2"]);
    assert!(map.contains("\"length\":10485760") && map.contains("\"zero\":true"), "{map}");
    assert_eq!(folder.run(&["check", "a.raw"]).status.code(), Some(63));
    folder.refused(&["resize", "b.qcow2", "1M"], "b.qcow2");
    folder.good(&["create", "--json", "-o", "cluster_size=4k", "j.qcow2", "9M"]);
    for args in [
        &["create", "--json", "-o", "size=9M", "k.vdi"][..],
        &["resize", "--json", "j.qcow2", "9M"],
        &["convert", "--json", "--force", "a.raw", "j.vhdx"],
        &["snapshot", "--json", "--overlay", "o.qcow2", "j.qcow2"],
        &["commit", "--json", "o.qcow2"],
        &["bench", "--json", "-c", "1", "j.qcow2"],
        &["compare", "--json", "a.raw", "j.vhdx"],
        &["check", "--json", "j.qcow2"],
        &["info", "--json", "j.qcow2"],
        &["map", "--json", "j.qcow2"],
    ] {
        let said = folder.good(args);
        let value: Result<serde_json::Value, _> = serde_json::from_str(&said);
        assert!(value.is_ok(), "{args:?} says: {said}");
    }
    folder.refused(&["create", "-f", "qcow2", "a.raw", "1M"], "a.raw");
    folder.refused(&["create", "-f", "qcow2", "-o", "colour=red", "c.qcow2", "1M"], "c.qcow2");
    folder.refused(&["convert", "a.raw", "a.raw"], "a.raw");
    fs::write(folder.path("disk.bin"), [0; 4096]).unwrap();
    let said = folder.refused(&["info", "disk.bin"], "disk.bin");
    assert!(said.contains("-f") && said.contains("never probed"), "{said}");
}

#[test]
fn what_another_program_writes_to_is_left_alone() {
    let folder = Folder::new("locks");
    folder.good(&["create", "-q", "a.qcow2", "64M"]);
    let spawn = |program: &str, args: &[&str]| {
        let mut command = Command::new(program);
        command.args(args).current_dir(&folder.0).stdout(Stdio::null());
        command.stdin(Stdio::piped()).spawn().expect("it is installed")
    };
    // Whoever looks may be in the way of the program that is to open it, which then ends.
    let until = |program: &mut Child, again: &dyn Fn() -> Child, done: &dyn Fn() -> bool| {
        (0..600).any(|_| {
            std::thread::sleep(Duration::from_millis(50));
            if program.try_wait().unwrap().is_some() {
                *program = again();
            }
            done()
        })
    };
    // QEMU holds the image until its input ends.
    let start = || spawn("qemu-io", &["-f", "qcow2", "a.qcow2"]);
    let mut qemu = start();
    let is_held = || !folder.run(&["info", "a.qcow2"]).status.success();
    assert!(until(&mut qemu, &start, &is_held), "QEMU opens it");
    let said = folder.refused(&["info", "a.qcow2"], "a.qcow2");
    assert!(said.contains("another program is writing to it"), "{said}");
    folder.good(&["info", "-U", "a.qcow2"]);
    folder.refused(&["resize", "a.qcow2", "+1M"], "a.qcow2");
    folder.refused(&["resize", "-U", "a.qcow2", "+1M"], "a.qcow2");
    let held = fs::read(folder.path("a.qcow2")).unwrap();
    folder.refused(&["create", "--force", "a.qcow2", "1M"], "a.qcow2");
    assert!(fs::read(folder.path("a.qcow2")).unwrap() == held, "it was emptied");
    drop(qemu.stdin.take());
    qemu.wait().unwrap();
    folder.good(&["resize", "-q", "a.qcow2", "+1M"]);
    // And the other way round.
    let program = env!("CARGO_BIN_EXE_platter");
    let start = || spawn(program, &["bench", "-w", "-c", "1000000000", "a.qcow2"]);
    let mut ours = start();
    let by_qemu = |args: &[&str]| {
        let run = Command::new("qemu-img").args(args).current_dir(&folder.0).output();
        run.expect("qemu-img is installed").status.success()
    };
    let refused = until(&mut ours, &start, &|| !by_qemu(&["info", "-f", "qcow2", "a.qcow2"]));
    let resized = by_qemu(&["resize", "-f", "qcow2", "a.qcow2", "+1M"]);
    ours.kill().unwrap();
    ours.wait().unwrap();
    assert!(refused && !resized, "QEMU does not see our locks");
}

#[test]
fn what_a_new_image_comes_from_or_lies_over_is_never_replaced() {
    let folder = Folder::new("sources");
    sample(&folder.path("a.raw"));
    folder.good(&["convert", "-q", "a.raw", "base.qcow2"]);
    folder.good(&["create", "-q", "-b", "base.qcow2", "-F", "qcow2", "mid.qcow2"]);
    fs::hard_link(folder.path("base.qcow2"), folder.path("link.qcow2")).unwrap();
    let held = fs::read(folder.path("base.qcow2")).unwrap();
    let over = ["create", "--force", "-F", "qcow2", "-b"];
    let convert = ["convert", "--force"];
    for args in [
        &[&over[..], &["base.qcow2", "base.qcow2"]].concat()[..],
        &[&over[..], &["mid.qcow2", "base.qcow2"]].concat(),
        &[&over[..], &["mid.qcow2", "-U", "link.qcow2"]].concat(),
        &[&convert[..], &["base.qcow2", "base.qcow2"]].concat(),
        &[&convert[..], &["-B", "mid.qcow2", "-F", "qcow2", "a.raw", "base.qcow2"]].concat(),
        &[&convert[..], &["-U", "mid.qcow2", "base.qcow2"]].concat(),
        &[&convert[..], &["-U", "mid.qcow2", "link.qcow2"]].concat(),
        &[&convert[..], &["-U", "-c", "mid.qcow2", "link.qcow2"]].concat(),
    ] {
        let said = folder.refused(args, args[args.len() - 1]);
        assert!(said.contains("they are one file"), "{args:?}: {said}");
        assert!(fs::read(folder.path("base.qcow2")).unwrap() == held, "{args:?}");
    }
    folder.good(&["convert", "-q", "--force", "mid.qcow2", "a.raw"]);
}

#[test]
fn only_an_ordinary_file_is_replaced() {
    let folder = Folder::new("ordinary");
    sample(&folder.path("a.raw"));
    Command::new("mkfifo").arg(folder.path("pipe.raw")).status().unwrap();
    Command::new("mkfifo").arg(folder.path("pipe.vmdk")).status().unwrap();
    let stream = ["convert", "--force", "-o", "subformat=streamOptimized", "a.raw", "pipe.vmdk"];
    for (args, name) in [
        (&["create", "--force", "pipe.raw", "1M"][..], "pipe.raw"),
        (&["convert", "--force", "a.raw", "pipe.raw"], "pipe.raw"),
        (&stream, "pipe.vmdk"),
    ] {
        let said = folder.refused(args, name);
        assert!(said.contains("no ordinary file"), "{args:?}: {said}");
        let kind = fs::symlink_metadata(folder.path(name)).unwrap().file_type();
        assert!(kind.is_fifo(), "{args:?}");
    }
}

/// A half made image looks like one that is complete.
#[test]
fn a_convert_that_fails_or_is_ended_leaves_nothing_behind() {
    let folder = Folder::new("failed");
    sample(&folder.path("a.raw"));
    folder.good(&["create", "-q", "base.qcow2", "9M"]);
    let names = || {
        let names = fs::read_dir(&folder.0).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    };
    let before = names();
    let program = env!("CARGO_BIN_EXE_platter");
    for rest in [
        "a.raw b.qcow2",
        "-B base.qcow2 -F qcow2 a.raw b.qcow2",
        "-o subformat=twoGbMaxExtentSparse a.raw b.vmdk",
        "-c a.raw b.qcow2",
    ] {
        // No file may be longer than 32 KiB.
        let shell = format!("trap '' XFSZ; ulimit -f 64; exec {program} convert -q {rest}");
        let output = Command::new("sh").args(["-c", &shell]).current_dir(&folder.0).output();
        let output = output.unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && error.contains("cannot"), "{rest}: {error}");
        assert_eq!(names(), before, "{rest}");
    }
    fs::write(folder.path("large.raw"), vec![1; 256 << 20]).unwrap();
    let args = ["convert", "-q", "-c", "large.raw", "b.qcow2"];
    let mut convert = Command::new(program);
    let mut convert = convert.args(args).current_dir(&folder.0).spawn().unwrap();
    while !folder.path("b.qcow2").exists() {
        assert!(convert.try_wait().unwrap().is_none(), "it ended");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(Command::new("kill").arg(convert.id().to_string()).status().unwrap().success());
    let status = convert.wait().unwrap();
    assert_eq!(status.signal(), Some(15), "{status}");
    // If the signal came late it is complete.
    if folder.path("b.qcow2").exists() {
        folder.good(&["compare", "-q", "large.raw", "b.qcow2"]);
    }
}

/// An image made by qemu-img and then changed by hand.
struct Hostile {
    name: &'static str,
    format: &'static str,
    /// Byte offset and what is put there.
    patches: &'static [(usize, &'static [u8])],
}

const MAX8: &[u8] = &[0xff; 8];
const MAX4: &[u8] = &[0xff; 4];
const ZERO4: &[u8] = &[0; 4];
const ZERO8: &[u8] = &[0; 8];

/// Fields by the formats' specifications; sizes and offsets are what CVEs were made of.
const HOSTILE: &[Hostile] = &[
    Hostile { name: "another magic", format: "qcow2", patches: &[(0, b"LUKS")] },
    Hostile { name: "version 9", format: "qcow2", patches: &[(4, &[0, 0, 0, 9])] },
    Hostile { name: "petabytes", format: "qcow2", patches: &[(24, &[0, 64, 0, 0, 0, 0, 0, 0])] },
    Hostile { name: "all sectors", format: "qcow2", patches: &[(24, MAX8)] },
    Hostile { name: "cluster_bits 0", format: "qcow2", patches: &[(20, ZERO4)] },
    Hostile { name: "cluster_bits 63", format: "qcow2", patches: &[(20, &[0, 0, 0, 63])] },
    Hostile { name: "old encryption", format: "qcow2", patches: &[(32, &[0, 0, 0, 1])] },
    Hostile { name: "l1_size", format: "qcow2", patches: &[(36, MAX4)] },
    Hostile { name: "l1_size 0", format: "qcow2", patches: &[(36, ZERO4)] },
    Hostile { name: "l1 unaligned", format: "qcow2", patches: &[(40, &[0, 0, 0, 0, 0, 3, 0, 1])] },
    Hostile { name: "l1 beyond", format: "qcow2", patches: &[(40, &[127, 255, 0, 0, 0, 0, 0, 0])] },
    Hostile { name: "refcounts beyond", format: "qcow2", patches: &[(48, MAX8)] },
    Hostile { name: "refcount table", format: "qcow2", patches: &[(56, MAX4)] },
    Hostile { name: "snapshots", format: "qcow2", patches: &[(60, MAX4)] },
    Hostile { name: "unknown feature", format: "qcow2", patches: &[(72, &[128])] },
    Hostile { name: "refcount_order", format: "qcow2", patches: &[(96, MAX4)] },
    Hostile { name: "header_length", format: "qcow2", patches: &[(100, MAX4)] },
    Hostile { name: "backing name", format: "qcow2", patches: &[(8, MAX8), (16, MAX4)] },
    Hostile { name: "cluster_bits 200", format: "qcow", patches: &[(32, &[200])] },
    Hostile { name: "l2_bits 0", format: "qcow", patches: &[(33, &[0])] },
    Hostile { name: "all sectors", format: "qcow", patches: &[(24, MAX8)] },
    Hostile { name: "encryption", format: "qcow", patches: &[(36, &[0, 0, 0, 1])] },
    Hostile { name: "l1 beyond", format: "qcow", patches: &[(40, MAX8)] },
    Hostile { name: "cluster_size 0", format: "qed", patches: &[(4, ZERO4)] },
    Hostile { name: "cluster_size 3", format: "qed", patches: &[(4, &[3, 0, 0, 0])] },
    Hostile { name: "table_size", format: "qed", patches: &[(8, MAX4)] },
    Hostile { name: "header_size", format: "qed", patches: &[(12, MAX4)] },
    Hostile { name: "unknown feature", format: "qed", patches: &[(16, &[0, 0, 0, 128])] },
    Hostile { name: "l1 beyond", format: "qed", patches: &[(40, MAX8)] },
    Hostile { name: "all sectors", format: "qed", patches: &[(48, MAX8)] },
    Hostile { name: "block_size 0", format: "vdi", patches: &[(376, ZERO4)] },
    Hostile { name: "block_size", format: "vdi", patches: &[(376, MAX4)] },
    Hostile { name: "blocks", format: "vdi", patches: &[(384, MAX4)] },
    Hostile { name: "all sectors", format: "vdi", patches: &[(368, MAX8)] },
    Hostile { name: "map beyond", format: "vdi", patches: &[(340, MAX4)] },
    Hostile { name: "unknown type", format: "vdi", patches: &[(76, MAX4)] },
    Hostile { name: "grain 0", format: "vmdk", patches: &[(20, ZERO8)] },
    Hostile { name: "grain", format: "vmdk", patches: &[(20, MAX8)] },
    Hostile { name: "capacity", format: "vmdk", patches: &[(12, MAX8)] },
    Hostile { name: "gtes 0", format: "vmdk", patches: &[(44, ZERO4)] },
    Hostile { name: "gtes", format: "vmdk", patches: &[(44, MAX4)] },
    Hostile { name: "directory beyond", format: "vmdk", patches: &[(48, MAX8), (56, MAX8)] },
    Hostile { name: "block_size 0", format: "vhd", patches: &[(512 + 32, ZERO4)] },
    Hostile { name: "block_size", format: "vhd", patches: &[(512 + 32, MAX4)] },
    Hostile { name: "entries", format: "vhd", patches: &[(512 + 28, MAX4)] },
    Hostile { name: "table beyond", format: "vhd", patches: &[(512 + 16, MAX8)] },
    Hostile { name: "no signature", format: "vhdx", patches: &[(0, ZERO8)] },
    Hostile { name: "no header", format: "vhdx", patches: &[(65536, ZERO4), (131072, ZERO4)] },
    Hostile { name: "no regions", format: "vhdx", patches: &[(196608, ZERO4), (262144, ZERO4)] },
];

/// The checksum of a dynamic VHD's header, so that the field itself is what is refused.
fn sum_vhd(bytes: &mut [u8]) {
    let header = &mut bytes[512..1536];
    header[36..40].fill(0);
    let sum = header.iter().fold(0u32, |sum, &b| sum + u32::from(b));
    header[36..40].copy_from_slice(&(!sum).to_be_bytes());
}

/// Of them, what a repair makes anew.
const REBUILT: [&str; 2] = ["refcounts beyond", "refcount table"];

#[test]
fn hostile_headers_get_one_sentence_and_stay_as_they_are() {
    let folder = Folder::new("hostile");
    for Hostile { name, format, patches } in HOSTILE {
        let image = format!("bad.{format}");
        let qemu = if *format == "vhd" { "vpc" } else { format };
        folder.qemu_img(&["create", "-q", "-f", qemu, &image, "8M"]);
        let mut bytes = fs::read(folder.path(&image)).unwrap();
        for (at, patch) in *patches {
            bytes[*at..at + patch.len()].copy_from_slice(patch);
        }
        if *format == "vhd" {
            sum_vhd(&mut bytes);
        }
        fs::write(folder.path(&image), &bytes).unwrap();
        println!("{format}, {name}:");
        for args in [
            vec!["convert", "-q", &image, "out.raw"],
            vec!["check", &image],
            vec!["check", "--repair=leaks", &image],
            vec!["bench", "-w", "-c", "1", &image],
            vec!["resize", &image, "+1M"],
        ] {
            // Refcounts can be made anew: a check says what is wrong, and exits as for that.
            if args[0] == "check" && REBUILT.contains(name) {
                assert_eq!(folder.run(&args).status.code(), Some(2), "{name}");
                continue;
            }
            print!("  {}", folder.refused(&args, &image));
        }
        let same = fs::read(folder.path(&image)).unwrap() == bytes;
        assert!(same, "{format}, {name}: the file changed");
        assert!(!folder.path("out.raw").exists(), "{format}, {name}: a target was left behind");
    }
}

#[test]
fn a_cut_file_is_refused_or_read_but_never_changed() {
    let folder = Folder::new("short");
    sample(&folder.path("a.raw"));
    for format in FORMATS {
        let image = format!("a.{format}");
        folder.good(&["convert", "-q", "a.raw", &image]);
        let bytes = fs::read(folder.path(&image)).unwrap();
        for len in [0, 1, 511, 512, 1024, 4096, bytes.len() / 3, bytes.len() - 700_000] {
            fs::write(folder.path(&image), &bytes[..len]).unwrap();
            let output = folder.run(&["convert", "-q", "--force", &image, "out.raw"]);
            let error = String::from_utf8_lossy(&output.stderr);
            let told = output.status.success() || error.lines().count() == 1;
            assert!(told && !error.contains("panicked"), "{format} of {len} bytes: {error}");
            folder.run(&["check", &image]);
            assert!(fs::read(folder.path(&image)).unwrap() == bytes[..len], "{format}: {len}");
        }
    }
}

#[test]
fn names_in_images_lead_nowhere_else() {
    let folder = Folder::new("names");
    fs::create_dir_all(folder.path("in")).unwrap();
    sample(&folder.path("secret.raw"));
    let names = ["../secret.raw", "/etc/hostname", "nbd://localhost/x", "json:{}", "a//b"];
    for name in names {
        folder.qemu_img(&[
            "create",
            "-q",
            "-u",
            "-f",
            "qcow2",
            "-b",
            name,
            "-F",
            "raw",
            "in/a.qcow2",
            "8M",
        ]);
        let said = folder.refused(&["convert", "-q", "in/a.qcow2", "out.raw"], "in/a.qcow2");
        assert!(said.contains("refused"), "{name}: {said}");
    }
    // Chains that come back to themselves.
    let create = ["create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b"];
    for (image, base) in [("in/a.qcow2", "b.qcow2"), ("in/b.qcow2", "a.qcow2")] {
        let mut args = create.to_vec();
        args.extend([base, image, "8M"]);
        folder.qemu_img(&args);
    }
    let said = folder.refused(&["convert", "-q", "in/a.qcow2", "out.raw"], "in/");
    assert!(said.contains("twice"), "{said}");
}
