//! The images that tests start from: made by qemu-img and qemu-io with the options of each case,
//! so that every test also reads what a foreign tool wrote.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex, OnceLock};

use platter_image::{Access, Format};
use platter_tool::engine::{Engine, options};
use platter_tool::medium::DiskFolder;

/// How qemu-img check can judge an image of a case after a power cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Check {
    /// The format has no check.
    No,
    /// As the cut left it.
    Plain,
    /// Only after `-r all`: a log must be replayed, or refcounts are lazy by permission.
    Repair,
}

pub struct Case {
    pub name: &'static str,
    /// Our name of the format.
    pub format: &'static str,
    /// QEMU's, empty where it knows no such image: platter makes it, and QEMU is not asked.
    pub qemu: &'static str,
    /// What follows `-o`, or nothing.
    pub options: &'static str,
    pub size_kib: u64,
    /// Format (ours, QEMU's) and size of a base image.
    pub base: Option<(&'static str, &'static str, u64)>,
    /// qemu-io commands that fill the image before the test.
    pub prepare: &'static [&'static str],
    /// An internal snapshot is taken after that.
    pub snapshot: bool,
    pub check: Check,
    /// Bytes after which allocation differs: cluster, block, grain.
    pub unit: u64,
}

const PLAIN: Case = Case {
    name: "",
    format: "",
    qemu: "",
    options: "",
    size_kib: 4096,
    base: None,
    prepare: &[],
    snapshot: false,
    check: Check::Plain,
    unit: 65536,
};

const QCOW2: Case = Case { format: "qcow2", qemu: "qcow2", ..PLAIN };
const QCOW: Case = Case { format: "qcow", qemu: "qcow", check: Check::No, unit: 4096, ..PLAIN };
const QED: Case = Case { format: "qed", qemu: "qed", check: Check::Repair, ..PLAIN };
const VHD: Case =
    Case { format: "vhd", qemu: "vpc", check: Check::No, size_kib: 8704, unit: 2 << 20, ..PLAIN };
const VHDX: Case =
    Case { format: "vhdx", qemu: "vhdx", check: Check::Repair, unit: 1 << 20, ..PLAIN };
const VMDK: Case = Case { format: "vmdk", qemu: "vmdk", ..PLAIN };
const VDI: Case = Case { format: "vdi", qemu: "vdi", unit: 1 << 20, ..PLAIN };

/// Differencing images over one of the same format, which QEMU does not know.
const OURS: Case = Case { check: Check::No, unit: 1 << 20, ..PLAIN };

/// Some clusters, half a cluster, a zeroed stretch.
const FILL: &[&str] = &["write -P 1 0 200k", "write -P 2 1000k 33k", "write -z 400k 256k"];
const FILL_SMALL: &[&str] = &["write -P 1 0 20k", "write -P 2 100k 3k", "write -z 40k 26k"];
/// Compressed clusters among plain ones.
const PACKED: &[&str] = &["write -P 1 0 200k", "write -c -P 5 256k 64k", "write -c -P 6 512k 128k"];
const PACKED_4K: &[&str] = &["write -P 1 0 90k", "write -c -P 5 96k 4k", "write -c -P 6 128k 4k"];

pub const CASES: &[Case] = &[
    Case { name: "raw", format: "raw", qemu: "raw", check: Check::No, ..PLAIN },
    Case { name: "qcow2", ..QCOW2 },
    Case { name: "qcow2-filled", prepare: FILL, ..QCOW2 },
    Case {
        name: "qcow2-512",
        options: "cluster_size=512",
        size_kib: 300,
        unit: 512,
        prepare: FILL_SMALL,
        ..QCOW2
    },
    Case { name: "qcow2-4k", options: "cluster_size=4k", unit: 4096, prepare: FILL, ..QCOW2 },
    Case {
        name: "qcow2-2m",
        options: "cluster_size=2M",
        unit: 2 << 20,
        size_kib: 9 << 10,
        prepare: FILL,
        ..QCOW2
    },
    Case { name: "qcow2-v2", options: "compat=0.10", prepare: FILL_SMALL, ..QCOW2 },
    Case {
        name: "qcow2-refcount1",
        options: "refcount_bits=1,cluster_size=4k",
        unit: 4096,
        ..QCOW2
    },
    Case {
        name: "qcow2-refcount64",
        options: "refcount_bits=64,cluster_size=512",
        unit: 512,
        size_kib: 300,
        ..QCOW2
    },
    Case {
        name: "qcow2-1k",
        options: "refcount_bits=2,cluster_size=1k",
        unit: 1024,
        size_kib: 1500,
        ..QCOW2
    },
    Case {
        name: "qcow2-2k",
        options: "refcount_bits=4,cluster_size=2k",
        unit: 2048,
        prepare: FILL_SMALL,
        ..QCOW2
    },
    Case {
        name: "qcow2-8k",
        options: "refcount_bits=8,cluster_size=8k",
        unit: 8192,
        snapshot: true,
        ..QCOW2
    },
    Case {
        name: "qcow2-32k",
        options: "refcount_bits=32,cluster_size=32k",
        unit: 32768,
        prepare: FILL,
        snapshot: true,
        ..QCOW2
    },
    Case {
        name: "qcow2-l2-128k",
        options: "extended_l2=on,cluster_size=128k",
        unit: 4096,
        prepare: FILL,
        ..QCOW2
    },
    Case { name: "qcow2-256k", options: "cluster_size=256k", unit: 256 << 10, ..QCOW2 },
    Case {
        name: "qcow2-l2-512k",
        options: "extended_l2=on,cluster_size=512k",
        unit: 16384,
        prepare: FILL,
        snapshot: true,
        ..QCOW2
    },
    Case {
        name: "qcow2-1m",
        options: "cluster_size=1M",
        unit: 1 << 20,
        base: Some(("qcow2", "qcow2", 4096)),
        ..QCOW2
    },
    Case { name: "qcow2-l2", options: "extended_l2=on", prepare: FILL, unit: 2048, ..QCOW2 },
    Case {
        name: "qcow2-l2-base",
        options: "extended_l2=on,cluster_size=16k",
        base: Some(("raw", "raw", 3001)),
        prepare: FILL,
        unit: 512,
        ..QCOW2
    },
    Case {
        name: "qcow2-lazy",
        options: "lazy_refcounts=on",
        prepare: FILL,
        check: Check::Repair,
        ..QCOW2
    },
    Case { name: "qcow2-zlib", prepare: PACKED, ..QCOW2 },
    Case { name: "qcow2-zstd", options: "compression_type=zstd", prepare: PACKED, ..QCOW2 },
    Case {
        name: "qcow2-zlib-4k",
        options: "cluster_size=4k",
        prepare: PACKED_4K,
        unit: 4096,
        ..QCOW2
    },
    Case { name: "qcow2-prealloc", options: "preallocation=metadata", ..QCOW2 },
    Case {
        name: "qcow2-data-file",
        options: "data_file=data.raw,data_file_raw=on",
        prepare: FILL,
        ..QCOW2
    },
    Case { name: "qcow2-data", options: "data_file=data.raw", prepare: FILL, ..QCOW2 },
    Case { name: "qcow2-snapshot", prepare: FILL, snapshot: true, ..QCOW2 },
    Case {
        name: "qcow2-snapshot-4k",
        options: "cluster_size=4k",
        prepare: PACKED_4K,
        snapshot: true,
        unit: 4096,
        ..QCOW2
    },
    Case { name: "qcow2-base", base: Some(("qcow2", "qcow2", 4096)), prepare: FILL, ..QCOW2 },
    Case {
        name: "qcow2-base-4k-short",
        options: "cluster_size=4k",
        base: Some(("raw", "raw", 2047)),
        unit: 4096,
        ..QCOW2
    },
    Case {
        name: "qcow2-v2-base",
        options: "compat=0.10",
        base: Some(("qcow2", "qcow2", 4096)),
        ..QCOW2
    },
    Case { name: "qcow", prepare: FILL, ..QCOW },
    Case { name: "qcow-packed", prepare: PACKED_4K, ..QCOW },
    Case { name: "qcow-base", base: Some(("qcow2", "qcow2", 4096)), unit: 512, ..QCOW },
    Case { name: "qed", prepare: FILL, ..QED },
    Case {
        name: "qed-4k",
        options: "cluster_size=4k,table_size=2",
        unit: 4096,
        prepare: FILL_SMALL,
        ..QED
    },
    Case { name: "qed-base", base: Some(("raw", "raw", 3000)), prepare: FILL_SMALL, ..QED },
    Case { name: "vhd", prepare: FILL, ..VHD },
    Case { name: "vhd-force", options: "force_size=on", prepare: FILL, ..VHD },
    Case { name: "vhd-fixed", options: "subformat=fixed", prepare: FILL, ..VHD },
    Case { name: "vhdx", options: "block_size=1M", prepare: FILL, ..VHDX },
    Case { name: "vhdx-8m", prepare: FILL, unit: 8 << 20, size_kib: 17 << 10, ..VHDX },
    Case {
        name: "vhdx-undefined",
        options: "block_size=1M,block_state_zero=off",
        prepare: FILL,
        ..VHDX
    },
    Case { name: "vhdx-fixed", options: "subformat=fixed", prepare: FILL, ..VHDX },
    Case { name: "vmdk", prepare: FILL, ..VMDK },
    Case { name: "vmdk-zero", options: "zeroed_grain=on", prepare: FILL, ..VMDK },
    Case { name: "vmdk-flat", options: "subformat=monolithicFlat", prepare: FILL, ..VMDK },
    Case { name: "vmdk-2g", options: "subformat=twoGbMaxExtentSparse", prepare: FILL, ..VMDK },
    Case { name: "vmdk-2g-flat", options: "subformat=twoGbMaxExtentFlat", prepare: FILL, ..VMDK },
    Case { name: "vmdk-base", base: Some(("vmdk", "vmdk", 4096)), prepare: FILL_SMALL, ..VMDK },
    Case { name: "vdi", prepare: FILL, ..VDI },
    Case { name: "vdi-static", options: "static=on", prepare: FILL, ..VDI },
    Case { name: "vhd-child", format: "vhd", options: "block_size=512k", ..OURS },
    Case { name: "vhd-child-4k", format: "vhd", options: "block_size=4k", unit: 4096, ..OURS },
    Case { name: "vhdx-child", format: "vhdx", options: "block_size=1M", ..OURS },
    Case {
        name: "vhdx-child-4kn",
        format: "vhdx",
        options: "block_size=1M,logical_sector_size=4096",
        ..OURS
    },
    Case { name: "vdi-child", format: "vdi", options: "block_size=64k", unit: 65536, ..OURS },
];

/// A case's files, and what its disk reads as.
pub struct Built {
    pub files: Vec<(String, Vec<u8>)>,
    pub top: String,
    pub initial: Vec<u8>,
    /// What the base reads as, cut or filled with zeros to the same size.
    pub backing: Option<Vec<u8>>,
}

impl Case {
    pub fn format(&self) -> Option<Format> {
        Format::by_name(self.format)
    }

    /// Whether the disk can get any larger size and is zeros from its old end on, whatever happens:
    /// not if its size is its geometry or whole sectors of 4096 bytes, all its space is laid out
    /// for good, or ends in a footer.
    pub fn grows(&self) -> bool {
        let others = ["vdi-static", "vhdx-fixed", "vhd", "vhd-fixed", "vhdx-child-4kn"];
        !others.contains(&self.name)
    }

    /// The case's image, made once in this process.
    pub fn build(&self) -> Arc<Built> {
        type Slot = Arc<OnceLock<Arc<Built>>>;
        static CACHE: OnceLock<Mutex<HashMap<&str, Slot>>> = OnceLock::new();
        let cache = CACHE.get_or_init(Mutex::default);
        let slot = {
            let mut cache = cache.lock().expect("nothing can fail while it is held");
            Arc::clone(cache.entry(self.name).or_default())
        };
        let make = || if self.qemu.is_empty() { self.make_ours() } else { self.make() };
        Arc::clone(slot.get_or_init(|| Arc::new(make())))
    }

    /// An image and its base, both by platter.
    fn make_ours(&self) -> Built {
        let scratch = Scratch::new(self.name);
        let (top, base) = (format!("top.{}", self.format), format!("base.{}", self.format));
        let size = format!("{}k", self.size_kib);
        let create = ["create", "-q", "-f", self.format, "-o", self.options];
        scratch.platter(&[&create[..], &[&base, &size]].concat());
        let folder = DiskFolder::new(&scratch.path);
        let format = self.format().expect("a format of ours");
        let fill = |name: &str, stretches: [(u8, u64, usize); 2]| {
            let access = Access::ReadWrite;
            let mut engine = Engine::open(&folder, name, options(format, access)).expect("new");
            for (byte, sector, kib) in stretches {
                engine.write(sector, &vec![byte; kib << 10]).expect("a write");
            }
            let mut bytes = vec![0; engine.sectors() as usize * 512];
            engine.read(0, &mut bytes).expect("a read");
            engine.close().expect("a flush");
            bytes
        };
        let backing = fill(&base, [(33, 0, 900), (34, 3000, 400)]);
        let over = ["-b", &base, "-F", self.format, &top];
        scratch.platter(&[&create[..], &over].concat());
        let initial = fill(&top, [(1, 0, 20), (2, 201, 3)]);
        Built { files: scratch.files(), top, initial, backing: Some(backing) }
    }

    fn make(&self) -> Built {
        let folder = Scratch::new(self.name);
        let top = format!("top.{}", self.format);
        let mut create = vec!["create", "-q", "-f", self.qemu];
        let base_name = self.base.map(|(format, ..)| format!("base.{format}"));
        if let (Some((_, qemu, kib)), Some(name)) = (self.base, base_name.as_deref()) {
            folder.qemu_img(&["create", "-q", "-f", qemu, name, &format!("{kib}k")]);
            folder.qemu_io(qemu, name, &["write -P 33 0 900k", "write -P 34 1500k 400k"]);
            create.extend(["-b", name, "-F", qemu]);
        }
        if !self.options.is_empty() {
            create.extend(["-o", self.options]);
        }
        let size = format!("{}k", self.size_kib);
        create.extend([top.as_str(), &size]);
        folder.qemu_img(&create);
        folder.qemu_io(self.qemu, &top, self.prepare);
        if self.snapshot {
            folder.qemu_img(&["snapshot", "-c", "one", &top]);
            folder.qemu_io(self.qemu, &top, &["write -P 9 60k 30k"]);
        }
        let initial = folder.read_by_qemu(self.qemu, &top);
        let backing = self.base.zip(base_name).map(|((_, qemu, _), name)| {
            let mut bytes = folder.read_by_qemu(qemu, &name);
            bytes.resize(initial.len(), 0);
            bytes
        });
        Built { files: folder.files(), top, initial, backing }
    }
}

/// The cases of a format that `PLATTER_CASE` leaves.
pub fn chosen(format: &str) -> Vec<&'static Case> {
    let wanted = std::env::var("PLATTER_CASE").unwrap_or_default();
    let mut of_format = CASES.iter().filter(|case| case.format == format).peekable();
    assert!(of_format.peek().is_some(), "there is no case of {format}");
    of_format.filter(|case| case.name.contains(&wanted)).collect()
}

/// A directory of its own, removed at the end.
pub struct Scratch {
    pub path: PathBuf,
}

impl Scratch {
    pub fn new(name: &str) -> Scratch {
        use std::sync::atomic::{AtomicU32, Ordering};
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("platter-{}-{count}-{name}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).expect("a scratch directory");
        Scratch { path }
    }

    pub fn platter(&self, args: &[&str]) {
        let output = self.run(env!("CARGO_BIN_EXE_platter"), args);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "platter {args:?}: {error}");
    }

    pub fn qemu_img(&self, args: &[&str]) {
        let output = self.run("qemu-img", args);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "qemu-img {args:?}: {error}");
    }

    pub fn qemu_io(&self, format: &str, name: &str, commands: &[&str]) {
        if commands.is_empty() {
            return;
        }
        let mut args = vec!["-f", format];
        commands.iter().for_each(|command| args.extend(["-c", command]));
        args.push(name);
        let output = self.run("qemu-io", &args);
        let text = String::from_utf8_lossy(&output.stdout);
        let bad = text.contains("failed") || !output.status.success();
        assert!(!bad, "qemu-io {args:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    }

    /// The disk's bytes as QEMU reads them.
    pub fn read_by_qemu(&self, format: &str, name: &str) -> Vec<u8> {
        self.qemu_img(&["convert", "-f", format, "-O", "raw", name, "out.tmp"]);
        let bytes = fs::read(self.path.join("out.tmp")).expect("qemu-img wrote it");
        fs::remove_file(self.path.join("out.tmp")).expect("it is ours");
        bytes
    }

    /// Exit code and output of qemu-img check: 0 clean, 2 corrupt, 3 leaks.
    pub fn qemu_check(&self, format: &str, name: &str, repair: bool) -> (i32, String) {
        let mut args = vec!["check", "-f", format];
        if repair {
            args.extend(["-r", "all"]);
        }
        args.push(name);
        let output = self.run("qemu-img", &args);
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.push_str(&String::from_utf8_lossy(&output.stderr));
        (output.status.code().unwrap_or(-1), text)
    }

    pub fn run(&self, program: &str, args: &[&str]) -> Output {
        let output = Command::new(program).args(args).current_dir(&self.path).output();
        output.unwrap_or_else(|error| panic!("{program} must be installed: {error}"))
    }

    pub fn write(&self, files: &[(String, Vec<u8>)]) {
        for (name, bytes) in files {
            fs::write(self.path.join(name), bytes).expect("room for a test file");
        }
    }

    /// All files in it, by name.
    pub fn files(&self) -> Vec<(String, Vec<u8>)> {
        let entries = fs::read_dir(&self.path).expect("our directory");
        let mut files: Vec<_> = entries.map(|entry| read_entry(&entry.unwrap().path())).collect();
        files.sort();
        files
    }
}

fn read_entry(path: &Path) -> (String, Vec<u8>) {
    let name = path.file_name().and_then(|name| name.to_str()).expect("our name");
    (String::from(name), fs::read(path).expect("our file"))
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}
