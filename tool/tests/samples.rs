//! Images that neither platter nor QEMU made (samples/README names their makers): each reads as
//! QEMU reads it, survives a write, and the fuzzer's is refused.
//!
//! Would miss: makers of whom there is no image.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

struct Folder(PathBuf);

impl Folder {
    /// A directory of its own with a sample in it, holes where it is zeros.
    fn of(sample: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("platter-{}-{sample}", std::process::id()));
        fs::create_dir_all(&path).expect("a scratch directory");
        let script = "import bz2, sys\n\
                      data = bz2.open(sys.argv[1]).read()\n\
                      with open(sys.argv[2], 'wb') as out:\n\
                      \x20   out.truncate(len(data))\n\
                      \x20   for at in range(0, len(data), 65536):\n\
                      \x20       piece = data[at:at + 65536]\n\
                      \x20       if any(piece):\n\
                      \x20           out.seek(at)\n\
                      \x20           out.write(piece)\n";
        let packed = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/samples");
        let packed = packed.join(format!("{sample}.bz2"));
        let folder = Folder(path);
        let packed = packed.to_string_lossy();
        assert_eq!(folder.run("python3", &["-c", script, &packed, sample]).0, 0);
        folder
    }

    /// Exit code and all output.
    fn run(&self, program: &str, args: &[&str]) -> (i32, String) {
        let output = Command::new(program).args(args).current_dir(&self.0).output();
        let output = output.unwrap_or_else(|error| panic!("{program} is needed: {error}"));
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.push_str(&String::from_utf8_lossy(&output.stderr));
        (output.status.code().unwrap_or(-1), text)
    }

    fn platter(&self, args: &[&str]) {
        let (code, text) = self.run(env!("CARGO_BIN_EXE_platter"), args);
        assert!(code == 0, "platter {args:?}: {text}");
    }

    fn qemu_img(&self, args: &[&str]) {
        let (code, text) = self.run("qemu-img", args);
        assert!(code == 0, "qemu-img {args:?}: {text}");
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Reads as QEMU reads it, also after a write and a check. QEMU replays a log only into the
/// file: `repair` lets it, into a copy.
fn reads_as_qemu_reads(sample: &str, qemu: &str, repair: bool, writable: bool) {
    let folder = Folder::of(sample);
    let before = fs::read(folder.0.join(sample)).unwrap();
    folder.platter(&["check", "-q", sample]);
    folder.platter(&["convert", "-q", sample, "ours.qcow2"]);
    assert!(fs::read(folder.0.join(sample)).unwrap() == before, "reading changed the file");
    fs::copy(folder.0.join(sample), folder.0.join("theirs")).unwrap();
    if repair {
        folder.qemu_img(&["check", "-q", "-f", qemu, "-r", "all", "theirs"]);
    }
    folder.qemu_img(&["compare", "-q", "-f", qemu, "-F", "qcow2", "theirs", "ours.qcow2"]);
    if !writable {
        return;
    }
    let bench = ["bench", "-w", "-c", "30", "-s", "64k", "--random", "3", "--pattern", "7"];
    for image in [sample, "ours.qcow2"] {
        folder.platter(&[&bench[..], &[image]].concat());
        folder.platter(&["check", "-q", image]);
    }
    folder.platter(&["compare", "-q", sample, "ours.qcow2"]);
    folder.qemu_img(&["compare", "-q", "-f", qemu, "-F", "qcow2", sample, "ours.qcow2"]);
}

#[test]
fn hyper_v() {
    reads_as_qemu_reads("hyperv2012r2-dynamic.vhd", "vpc", false, true);
    reads_as_qemu_reads("iotest-dynamic-1G.vhdx", "vhdx", false, true);
    reads_as_qemu_reads("iotest-dirtylog-10G-4M.vhdx", "vhdx", true, true);
}

#[test]
fn disk2vhd() {
    reads_as_qemu_reads("d2v-zerofilled.vhd", "vpc", false, true);
    reads_as_qemu_reads("test-disk2vhd.vhdx", "vhdx", false, true);
}

#[test]
fn virtual_pc() {
    reads_as_qemu_reads("virtualpc-dynamic.vhd", "vpc", false, true);
}

#[test]
fn vmware() {
    reads_as_qemu_reads("iotest-version3.vmdk", "vmdk", false, false);
    reads_as_qemu_reads("open-vmdk.vmdk", "vmdk", false, false);
}

#[test]
fn image_factory() {
    reads_as_qemu_reads("vmdkstream.vmdk", "vmdk", false, false);
    reads_as_qemu_reads("pyvhd.vhd", "vpc", false, true);
}

#[test]
fn the_fuzzers_image_is_refused() {
    let folder = Folder::of("afl9.vmdk");
    let (code, text) = folder.run(env!("CARGO_BIN_EXE_platter"), &["info", "afl9.vmdk"]);
    assert!(code == 1 && text.starts_with("platter: afl9.vmdk: corrupt: "), "{text}");
}
