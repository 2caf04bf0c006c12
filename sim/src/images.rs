//! Images on the share: made by the image crate's own planner, read and checked afterwards by
//! the tool's engine, and, sampled, by qemu-img.

use std::process::Command;

use platter_image::{
    Access, Backing, CheckParams, Create, CreateParams, CreateWrite, Format, Repair,
};
use platter_tool::engine::{Engine, options};
use platter_tool::medium::RamFolder;

use crate::files::Files;
use crate::oracle::{Oracle, SECTOR};

/// Puts a new image of `sectors` zeros on the share.
pub fn create(
    files: &mut Files,
    path: &str,
    format: Format,
    sectors: u64,
    cluster_bytes: u64,
    backing: Option<&str>,
) {
    let backing =
        backing.map(|name| Backing { name, format: Format::Raw, identity: None, sectors });
    create_as(files, path, &CreateParams { cluster_bytes, backing, ..plain(format, sectors) });
}

/// A format's own choice of everything.
pub fn plain(format: Format, sectors: u64) -> CreateParams<'static> {
    CreateParams {
        format,
        name: "",
        sectors,
        cluster_bytes: 0,
        options: &[],
        backing: None,
        seed: 7,
        unix_seconds: 1_700_000_000,
    }
}

/// Puts a new image made by these words on the share, but for its name.
pub fn create_as(files: &mut Files, path: &str, params: &CreateParams) {
    let name = path.rsplit('/').next().unwrap_or(path);
    let params = CreateParams { name, ..*params };
    let mut plan = Create::new(&params).expect("a format that can be created");
    let mut made: Vec<(String, Vec<u8>)> = plan
        .files()
        .iter()
        .map(|file| {
            let name = match &file.name {
                None => path.to_string(),
                Some(name) => beside(path, name),
            };
            (name, vec![0; file.bytes as usize])
        })
        .collect();
    while let Some(CreateWrite { file, offset, bytes }) = plan.next_write() {
        let at = offset as usize;
        let into = &mut made[file].1;
        if into.len() < at + bytes.len() {
            into.resize(at + bytes.len(), 0);
        }
        into[at..at + bytes.len()].copy_from_slice(bytes);
    }
    made.into_iter().for_each(|(name, bytes)| files.put(&name, bytes));
}

fn beside(path: &str, name: &str) -> String {
    match path.rsplit_once('/') {
        Some((folder, _)) => format!("{folder}/{name}"),
        None => name.to_string(),
    }
}

/// Reads every sector of an image through the tool's engine and judges it; checks the image.
/// `after_cut`: only what was flushed must be there, and leaks are no fault.
pub fn verify(files: &Files, path: &str, format: Format, oracle: &Oracle, after_cut: bool) {
    let folder = RamFolder::new();
    folder.fix(files.fixed);
    for path in files.paths() {
        folder.put(path, files.get(path).expect("listed").live.clone());
    }
    let opened = Engine::open(&folder, path, options(format, Access::ReadWrite));
    let mut engine = opened.unwrap_or_else(|why| panic!("{path} does not open: {why}"));
    if format != Format::Raw {
        let params = CheckParams { repair: Repair::Nothing, budget_bytes: 1 << 20 };
        let report = engine.check(params, |_, _| {}).expect("a check ends");
        assert!(report.corruptions == 0, "{path} is corrupt: {report:?}");
        // Nothing says what a partition's spare space is for.
        let may_leak = after_cut || files.fixed;
        assert!(report.leaks == 0 || may_leak, "{path} has leaks: {report:?}");
    }
    let mut bytes = [0; SECTOR];
    // Nothing is under way: a read that begins now.
    for sector in 0..oracle.sectors() {
        engine.read(sector, &mut bytes).unwrap_or_else(|why| panic!("{path}: {why}"));
        let judged = match after_cut {
            true => oracle.check_after_cut(sector, &bytes),
            false => oracle.check(sector, &bytes, u64::MAX),
        };
        if let Err(why) = judged {
            panic!("{path}: {why}");
        }
    }
}

/// `qemu-img check`, where there is one and it knows the format.
pub fn qemu_check(files: &Files, path: &str, format: Format, seed: u64) {
    if !["qcow2", "vdi", "vhdx", "qed"].contains(&format.name()) {
        return;
    }
    let folder = std::env::temp_dir().join(format!("platter-sim-{}-{seed}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder for a moment");
    let place = folder.join("image");
    std::fs::write(&place, &files.get(path).expect("the image").live).expect("space");
    let run = Command::new("qemu-img").args(["check", "-f", format.name()]).arg(&place).output();
    std::fs::remove_dir_all(&folder).expect("ours");
    if let Ok(output) = run {
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "qemu-img check of {path}: {text}{errors}");
    }
}
