//! What the commands share: how a file's format is found, how it is opened, how failures are
//! told, and progress.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use platter_image::{Access, FaultKind, Format, Options, SECTOR_BYTES};

use crate::engine::Engine;
use crate::fault::{Cause, Fault};
use crate::medium::DiskFolder;

/// A command's failure: one sentence and an exit code.
#[derive(Debug)]
pub struct Failure {
    pub message: String,
    pub code: u8,
}

/// What a command ends with: an exit code, or a failure.
pub type Outcome = Result<u8, Failure>;

impl Failure {
    pub fn new(message: impl Into<String>) -> Failure {
        Failure { message: message.into(), code: 1 }
    }

    pub fn with_code(self, code: u8) -> Failure {
        Failure { code, ..self }
    }
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Failure {
        Failure::new(match advice(&fault) {
            Some(advice) => format!("{fault} ({advice})"),
            None => fault.to_string(),
        })
    }
}

/// What to do about a fault.
fn advice(fault: &Fault) -> Option<&'static str> {
    let Cause::Image(fault) = &fault.cause else { return None };
    Some(match fault.kind {
        FaultKind::NotThisFormat => "if it has another format, name that with -f",
        FaultKind::Corrupt => "nothing was changed; 'platter check' lists what is wrong",
        FaultKind::Limit => "the image asks for more than is supported",
        FaultKind::Unsupported => "make a copy without that feature where it was made",
        FaultKind::Refused => "give a format by -f or in the image, and keep a chain in a folder",
        _ => return None,
    })
}

/// How results are printed.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    Human,
    Json,
}

#[derive(Args)]
pub struct OutputFlags {
    /// How to print the result
    #[arg(long, value_enum, default_value = "human", value_name = "HOW")]
    output: Output,
    /// Same as --output=json
    #[arg(long)]
    json: bool,
}

impl OutputFlags {
    pub fn json(&self) -> bool {
        self.json || self.output == Output::Json
    }
}

/// Flags of every command that opens an image.
#[derive(Args)]
pub struct OpenFlags {
    /// Memory for cached metadata of each image, in MiB
    #[arg(long, default_value = "8", value_name = "MIB")]
    cache: usize,
    /// Refuse an image that names other files (backing files, extents, data files)
    #[arg(long)]
    no_backing: bool,
    /// Read even what another program is writing to; what is read then may be any mixture
    #[arg(short = 'U', long)]
    force_share: bool,
    /// Past the page cache
    #[arg(skip)]
    pub direct: bool,
}

impl OpenFlags {
    pub fn options(&self, format: Format, access: Access) -> Options {
        Options {
            format,
            access,
            allow_names: !self.no_backing,
            budget_bytes: self.cache.clamp(1, 1 << 20) << 20,
            seed: seed(),
        }
    }
}

/// An image opened by a command.
pub struct Opened {
    pub engine: Engine,
    pub format: Format,
}

/// The format a user named, or the suffix stands for.
pub fn format_of(path: &Path, named: Option<&str>) -> Result<Format, Failure> {
    if let Some(name) = named {
        let format = Format::by_name(name);
        let unknown = || format!("{name:?} is not a format; there are {}", Format::names());
        return format.ok_or_else(|| Failure::new(unknown()));
    }
    Format::by_suffix(&path.to_string_lossy()).ok_or_else(|| {
        Failure::new(format!(
            "{}: its suffix does not say its format: give it with -f ({}); images are \
             never probed, since a guest could write a header of its choice",
            path.display(),
            Format::names()
        ))
    })
}

/// The format of an image that is there. What only its suffix makes raw must not look like
/// something else: cloud images and Vagrant boxes are often qcow2 and called `.img`.
pub fn format_of_image(path: &Path, named: Option<&str>) -> Result<Format, Failure> {
    let format = format_of(path, named)?;
    let mut first = [0; SECTOR_BYTES as usize];
    let read = |first: &mut [u8]| File::open(path).and_then(|file| file.read_at(first, 0));
    // What cannot be read is told when it is opened.
    if named.is_some() || format != Format::Raw || read(&mut first).is_err() {
        return Ok(format);
    }
    Format::marked(&first).map_or(Ok(format), |marked| {
        let (path, marked) = (path.display(), marked.name());
        let why = format!("{path}: its suffix says raw, but it starts like {marked}");
        Err(Failure::new(format!("{why}: give its format with -f")))
    })
}

/// Opens a chain.
pub fn open(
    path: &Path,
    named: Option<&str>,
    access: Access,
    flags: &OpenFlags,
) -> Result<Opened, Failure> {
    open_by(path, named, access, flags, Engine::open)
}

/// Opens a chain to check its top.
pub fn open_to_check(
    path: &Path,
    named: Option<&str>,
    access: Access,
    flags: &OpenFlags,
) -> Result<Opened, Failure> {
    open_by(path, named, access, flags, Engine::open_to_check)
}

/// Opens the top of a chain alone, read-only.
pub fn open_alone(path: &Path, format: Format, flags: &OpenFlags) -> Result<Engine, Failure> {
    let opened = open_by(path, Some(format.name()), Access::ReadOnly, flags, Engine::open_alone)?;
    Ok(opened.engine)
}

fn open_by(
    path: &Path,
    named: Option<&str>,
    access: Access,
    flags: &OpenFlags,
    by: fn(&dyn crate::medium::Folder, &str, Options) -> Result<Engine, Fault>,
) -> Result<Opened, Failure> {
    let format = format_of_image(path, named)?;
    let told = |e| Fault::io(&path.to_string_lossy(), "open", e);
    let (mut folder, name) = DiskFolder::of(path).map_err(told)?;
    if flags.force_share && access == Access::ReadWrite {
        let path = path.display();
        return Err(Failure::new(format!("{path}: -U is for reading, and this would write")));
    }
    if flags.force_share {
        folder = folder.shared();
    }
    if flags.direct {
        folder = folder.direct();
    }
    let engine = by(&folder, &name, flags.options(format, access));
    let engine = engine.map_err(|fault| in_folder(path, fault))?;
    Ok(Opened { engine, format })
}

/// Names the file of a fault as the user would: with the folder of the image.
pub fn in_folder(image: &Path, fault: Fault) -> Failure {
    let file = image.with_file_name(&fault.file).to_string_lossy().into_owned();
    Failure::from(Fault { file, ..fault })
}

/// The path of a file that an image names.
pub fn beside(image: &Path, name: &str) -> PathBuf {
    image.with_file_name(name)
}

/// The files that are open for an image at `image`.
pub fn files_of(image: &Path, engine: &Engine) -> Vec<PathBuf> {
    engine.paths().iter().map(|path| beside(image, path)).collect()
}

/// Bytes of a disk.
pub fn disk_bytes(engine: &mut Engine) -> u64 {
    engine.sectors() * SECTOR_BYTES
}

/// Freshness for identifiers.
pub fn seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let nanos = now.map_or(0, |now| now.as_nanos() as u64);
    nanos ^ (u64::from(std::process::id()) << 40)
}

/// Seconds since 1970.
pub fn unix_seconds() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}

/// A bar on a terminal, nothing elsewhere.
pub fn progress(total: u64, what: &'static str, quiet: bool) -> ProgressBar {
    if quiet {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(total);
    let style = "{msg} {bar:40} {percent}% {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    bar.set_style(ProgressStyle::with_template(style).expect("a template of ours"));
    bar.set_message(what);
    bar
}

/// Says what was made of an image: a sentence, or as JSON.
pub fn say_done(output: &OutputFlags, quiet: bool, text: &str, path: &Path, bytes: u64) {
    if output.json() {
        let filename = path.to_string_lossy();
        print_json(&serde_json::json!({ "filename": filename, "virtual-size": bytes }));
    } else if !quiet && !text.is_empty() {
        println!("{text}");
    }
}

/// Prints a JSON value as qemu-img does: indented, with a newline.
pub fn print_json(value: &serde_json::Value) {
    println!("{value:#}");
}
