//! QED, VDI, qcow and VMDK as whole images: what is created and written here as QEMU and readers
//! of other authors see it, chains, foreign images, hostile ones, growing.
//!
//! Would miss: several writes in flight at once, and power cuts in plain use (the tool's image
//! tests cover both); readers that nobody here has.

#[path = "../foreign/mod.rs"]
mod foreign;

mod flight;
mod mutate;
mod qcow;
mod qed;
mod vdi;
mod vmdk;
mod vmdk_foreign;

use foreign::*;
use platter_image::{Create, CreateParams, Format};
use platter_tool::engine::Engine;
use platter_tool::medium::RamFolder;

/// Copies a RAM folder's files to disk.
fn copy_out(folder: &RamFolder, scratch: &Scratch) {
    for name in folder.names() {
        scratch.put(&name, &folder.bytes(&name).unwrap());
    }
}

/// Scribbles on an image and closes it; the model follows.
fn scribble_on(folder: &RamFolder, name: &str, format: Format, model: &mut [u8], seed: u64) {
    let mut engine = open(folder, name, rw(format));
    assert!(read_all(&mut engine) == model, "{name} before the writes");
    scribble(&mut engine, model, &mut Rng(seed), 40, 300);
    engine.close().unwrap();
    let mut engine = open(folder, name, ro(format));
    assert!(read_all(&mut engine) == model, "{name} after the writes");
    let report = check_all(&mut engine);
    assert!(report.is_sound() && report.leaks == 0, "{report:#?}");
}

fn create_fault(params: &CreateParams) -> String {
    Create::new(params).expect_err("created").to_string()
}

fn open_fault(folder: &RamFolder, name: &str, format: Format) -> String {
    Engine::open(folder, name, rw(format)).err().expect("opened").to_string()
}

fn u32_le(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_le(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// `qemu-img check` finds nothing, not even a leak.
fn qemu_check(scratch: &Scratch, format: &str, name: &str) {
    scratch.ok("qemu-img", &["check", "-f", format, name]);
}
