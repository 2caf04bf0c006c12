//! Images in a process that has little memory: as many are opened as there is memory for, the
//! next one is refused, and nothing dies. Would miss: what an allocator of other habits leaves
//! between its blocks.

mod foreign;

use std::process::Command;

use foreign::*;
use platter_image::{Backing, CreateParams, FaultKind, Format, Options};
use platter_tool::engine::Engine;
use platter_tool::medium::RamFolder;

/// What the process may have, and what each image asks for.
const PROCESS_KIB: u64 = 300 << 10;
const BUDGET_BYTES: usize = 64 << 20;
/// Set in the process that has little.
const LIMITED: &str = "PLATTER_TEST_MEMORY";

/// Runs the test once more in a process of its own, or says that this is it.
fn is_limited(test: &str) -> bool {
    if std::env::var_os(LIMITED).is_some() {
        return true;
    }
    let shell = format!("ulimit -v {PROCESS_KIB} && exec \"$0\" --exact {test} --nocapture");
    let itself = std::env::current_exe().unwrap();
    let run = Command::new("sh").arg("-c").arg(shell).arg(itself).env(LIMITED, "1").output();
    let run = run.unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    false
}

/// Opens it again and again, until there is no memory for one more.
fn fill(folder: &RamFolder, name: &str, format: Format) -> Vec<Engine> {
    let options = Options { budget_bytes: BUDGET_BYTES, ..ro(format) };
    let mut engines = Vec::new();
    loop {
        match Engine::open(folder, name, options.clone()) {
            Ok(mut engine) => {
                engine.read(100, &mut [0; 512]).unwrap();
                engines.push(engine);
            }
            Err(fault) => {
                assert_eq!(fault.image().expect("no memory").kind, FaultKind::Memory);
                return engines;
            }
        }
    }
}

#[test]
fn images_share_what_memory_there_is_and_the_next_is_refused() {
    // Each took its whole budget or the process with it.
    if !is_limited("images_share_what_memory_there_is_and_the_next_is_refused") {
        return;
    }
    let folder = RamFolder::new();
    create(&folder, &params(Format::Qcow2, 20_000));
    let mut engines = fill(&folder, "image", Format::Qcow2);
    assert!(engines.len() > 8, "{} images", engines.len());
    // Those that are open serve, and one that goes makes room for another.
    engines.iter_mut().for_each(|engine| engine.read(9000, &mut [0; 512]).unwrap());
    engines.truncate(1);
    assert!(fill(&folder, "image", Format::Qcow2).len() > 4);
}

#[test]
fn chains_share_what_memory_there_is_and_the_next_is_refused() {
    if !is_limited("chains_share_what_memory_there_is_and_the_next_is_refused") {
        return;
    }
    let folder = RamFolder::new();
    folder.put("base.raw", vec![7; 20_000 * 512]);
    let backing =
        Backing { name: "base.raw", format: Format::Raw, identity: None, sectors: 20_000 };
    let params = CreateParams { backing: Some(backing), ..params(Format::Qcow2, 20_000) };
    create(&folder, &params);
    let engines = fill(&folder, "image", Format::Qcow2);
    assert!(engines.len() > 4, "{} images", engines.len());
}
