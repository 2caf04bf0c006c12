//! The Python that has the readers of other authors: libvhdi-python, libvmdk-python,
//! libqcow-python and dissect.hypervisor, in a virtual environment under build/ that
//! `make readers` makes. Where it is missing the comparison is skipped and says so.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The Python of the readers' environment.
pub fn python() -> Option<PathBuf> {
    static FOUND: OnceLock<Option<PathBuf>> = OnceLock::new();
    FOUND.get_or_init(find_python).clone()
}

fn find_python() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../build/venv-images");
    let root = std::env::var_os("PLATTER_READERS_ENV").map_or(root, PathBuf::from);
    let python = root.join("bin/python");
    let holds = |python: &Path| {
        let args = ["-c", "import pyvhdi, pyvmdk, pyqcow, dissect.hypervisor"];
        let run = Command::new(python).args(args).output();
        run.is_ok_and(|output| output.status.success())
    };
    if holds(&python) {
        return Some(python);
    }
    eprintln!("skipped: readers of other authors ('make readers' installs them)");
    None
}
