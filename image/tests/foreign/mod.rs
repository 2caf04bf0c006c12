//! What image tests share: scratch files, making images, and readers by other authors.
//!
//! The readers are those of python.rs.

#![allow(dead_code)]

mod python;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use platter_image::{
    Access, CheckParams, CheckProgress, CheckReport, Create, CreateParams, Format, Options, Repair,
    SectorRange, Stop, WritePlan,
};
use platter_tool::engine::{Engine, options};
use platter_tool::medium::RamFolder;

/// A directory of its own, removed at the end.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Scratch {
        // Tests that run at the same time may give the same name.
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("platter-{}-{count}-{name}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }

    pub fn run(&self, program: &str, args: &[&str]) -> Output {
        let output = Command::new(program).args(args).current_dir(&self.0).output();
        output.unwrap_or_else(|error| panic!("{program} must be installed: {error}"))
    }

    pub fn ok(&self, program: &str, args: &[&str]) -> String {
        let output = self.run(program, args);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {args:?}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// The disk as QEMU reads it.
    pub fn by_qemu(&self, format: &str, name: &str) -> Vec<u8> {
        self.ok("qemu-img", &["convert", "-f", format, "-O", "raw", name, "out.raw"]);
        std::fs::read(self.0.join("out.raw")).unwrap()
    }

    /// A qcow2 of 4 MiB by QEMU: options of qemu-img, commands of qemu-io, whether a snapshot is
    /// taken and written over, and whether there is a bitmap.
    pub fn qcow2(&self, option: &str, commands: &[&str], snapshot: bool, bitmap: bool) -> Vec<u8> {
        self.ok("qemu-img", &["create", "-q", "-f", "qcow2", "-o", option, "a.qcow2", "4M"]);
        let run = |commands: &[&str]| {
            let mut args = vec!["-f", "qcow2"];
            commands.iter().for_each(|command| args.extend(["-c", command]));
            args.push("a.qcow2");
            self.ok("qemu-io", &args);
        };
        run(commands);
        if snapshot {
            self.ok("qemu-img", &["snapshot", "-c", "one", "a.qcow2"]);
            run(&["write -P 3 50k 60k"]);
        }
        if bitmap {
            self.ok("qemu-img", &["bitmap", "--add", "a.qcow2", "b"]);
        }
        self.get("a.qcow2")
    }

    pub fn put(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.0.join(name), bytes).unwrap();
    }

    pub fn get(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.0.join(name)).unwrap()
    }

    /// The disk as a reader of another author reads it, `None` where it is not installed.
    pub fn by_reader(&self, reader: &str, names: &[&str]) -> Option<Vec<u8>> {
        let python = python::python()?;
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/foreign/read.py");
        let mut args = vec![script.to_str().unwrap(), reader];
        args.extend(names);
        let output = self.run(python.to_str().unwrap(), &args);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{reader} {names:?}: {error}");
        Some(output.stdout)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A new image's bytes.
pub fn made(params: &CreateParams) -> Vec<u8> {
    let mut plan = Create::new(params).unwrap_or_else(|fault| panic!("create: {fault}"));
    assert_eq!(plan.files().len(), 1);
    let mut bytes = vec![0; plan.files()[0].bytes as usize];
    while let Some(write) = plan.next_write() {
        bytes[write.offset as usize..][..write.bytes.len()].copy_from_slice(write.bytes);
    }
    bytes
}

/// Puts a new image and the files it brings into a folder.
pub fn create(folder: &RamFolder, params: &CreateParams) {
    let mut plan = Create::new(params).unwrap_or_else(|fault| panic!("create: {fault}"));
    let names: Vec<_> = plan.files().iter().map(|file| file.name.clone()).collect();
    let mut files: Vec<_> = plan.files().iter().map(|file| vec![0; file.bytes as usize]).collect();
    while let Some(write) = plan.next_write() {
        files[write.file][write.offset as usize..][..write.bytes.len()]
            .copy_from_slice(write.bytes);
    }
    for (name, bytes) in names.into_iter().zip(files) {
        folder.put(name.as_deref().unwrap_or(params.name), bytes);
    }
}

pub fn params(format: Format, sectors: u64) -> CreateParams<'static> {
    CreateParams {
        format,
        name: "image",
        sectors,
        cluster_bytes: 0,
        options: &[],
        backing: None,
        seed: 7,
        unix_seconds: 1_700_000_000,
    }
}

pub fn rw(format: Format) -> Options {
    options(format, Access::ReadWrite)
}

pub fn ro(format: Format) -> Options {
    options(format, Access::ReadOnly)
}

/// The whole disk as this engine reads it.
pub fn read_all(engine: &mut Engine) -> Vec<u8> {
    let mut bytes = vec![0xee; engine.sectors() as usize * 512];
    engine.read(0, &mut bytes).unwrap_or_else(|fault| panic!("read: {fault}"));
    bytes
}

pub fn open(folder: &RamFolder, name: &str, options: Options) -> Engine {
    Engine::open(folder, name, options).unwrap_or_else(|fault| panic!("open: {fault}"))
}

/// The sentence with which opening an image is refused.
pub fn refused(bytes: Vec<u8>, name: &str, options: Options) -> String {
    let folder = RamFolder::new();
    folder.put(name, bytes.clone());
    let fault = match Engine::open(&folder, name, options) {
        Ok(_) => panic!("opened"),
        Err(fault) => fault.to_string(),
    };
    assert!(folder.bytes(name).unwrap() == bytes, "a refused image is not changed");
    fault
}

/// A write prepared, if nothing makes it wait.
pub fn prepare(engine: &mut Engine, start: u64, count: u64) -> Option<WritePlan> {
    let answer = engine.drive(|image| match image.prepare_write(SectorRange::new(start, count)) {
        Err(Stop::Busy) => Ok(None),
        answer => answer.map(Some),
    });
    answer.unwrap_or_else(|fault| panic!("prepare: {fault}"))
}

/// Makes the disk longer, durably.
pub fn grow(engine: &mut Engine, sectors: u64) {
    let plan = engine.drive(|image| image.resize(sectors));
    let plan = plan.unwrap_or_else(|fault| panic!("resize: {fault}"));
    if let Some((file, len)) = plan.grow {
        engine.medium(file).set_len(len).unwrap();
    }
    engine.flush().unwrap();
}

/// Checks the top layer with as little memory as can be.
pub fn check_all(engine: &mut Engine) -> CheckReport {
    let params = CheckParams { repair: Repair::Nothing, budget_bytes: 0 };
    engine.image().check_begin(params).unwrap();
    loop {
        let step = engine.drive(|image| image.check_step());
        let progress = step.unwrap_or_else(|fault| panic!("check: {fault}"));
        if let CheckProgress::Done(report) = progress {
            return report;
        }
    }
}

/// A stream of numbers (splitmix64).
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// Random writes of up to `sectors_max`, on the engine and on the model alike.
pub fn scribble(engine: &mut Engine, model: &mut [u8], rng: &mut Rng, count: u64, max: u64) {
    let sectors = engine.sectors();
    for n in 0..count {
        let start = rng.below(sectors);
        let len = (1 + rng.below(max)).min(sectors - start);
        let byte = (rng.next() % 255) as u8 + 1;
        let range = start as usize * 512..(start + len) as usize * 512;
        model[range.clone()].fill(byte);
        engine.write(start, &model[range]).unwrap_or_else(|fault| panic!("write: {fault}"));
        if n % 5 == 4 {
            engine.flush().unwrap();
        }
    }
}
