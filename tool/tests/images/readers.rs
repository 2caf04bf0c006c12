//! A second opinion on what was written, from readers of other authors. Each is asked only for
//! what it is known to read right; what it gets wrong is told where it is left out.

use std::path::Path;

use crate::cases::{Case, Scratch};

#[path = "../../../image/tests/foreign/python.rs"]
mod python;

/// Readers for an image of this case.
fn for_case(case: &Case, over: bool) -> Vec<&'static str> {
    let has = |word: &str| case.options.contains(word);
    match case.format {
        // dissect fails on subclusters and brings no zstd; libqcow knows neither, nor data files
        // nor zero clusters, and takes zeros for some that zlib packed.
        "qcow2" if has("extended_l2") || has("zstd") => vec![],
        // dissect takes a version 2 image's backing format for the feature bits of version 3.
        "qcow2" if has("compat=0.10") && over => vec![],
        "qcow2" if has("compat=0.10") => vec!["libqcow", "dissect"],
        "qcow2" => vec!["dissect"],
        "qcow" if !over && !case.name.contains("packed") => vec!["libqcow"],
        "vhd" => vec!["libvhdi", "dissect"],
        "vhdx" => vec!["libvhdi", "dissect"],
        // libvmdk takes zero grains for absent ones.
        "vmdk" if over || has("zeroed_grain") => vec!["dissect"],
        "vmdk" => vec!["libvmdk", "dissect"],
        "vdi" => vec!["dissect"],
        _ => vec![],
    }
}

/// Every reader there is for the case reads these bytes.
pub fn hold(case: &Case, scratch: &Scratch, top: &str, over: bool, bytes: &[u8], who: &str) {
    let Some(python) = python::python() else { return };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../image/tests/foreign/read.py");
    for reader in for_case(case, over) {
        let args = [script.to_str().expect("UTF-8"), reader, top];
        let output = scratch.run(python.to_str().expect("UTF-8"), &args);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{who}: {reader}: {error}");
        let read = &output.stdout;
        // libvhdi takes a VHD's first size for its size.
        let grown = case.format == "vhd" && reader == "libvhdi";
        let len = if grown { read.len().min(bytes.len()) } else { bytes.len() };
        let same = len > 0 && read.get(..len) == Some(&bytes[..len]);
        let at = read.iter().zip(bytes).position(|(a, b)| a != b);
        assert!(same, "{who}: {reader} reads {} bytes, differs at {at:?}", read.len());
    }
}
