//! Files that a command is making: what is half made looks like an image, so they go again unless
//! the command says that they are complete.
//!
//! A signal that ends the program removes them too. It must never remove a file that was there
//! before and was not emptied by this run.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use nix::sys::signal::{SigSet, Signal, raise};

/// What all commands of this process have not completed yet.
static UNDER_WAY: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

fn under_way() -> MutexGuard<'static, Vec<PathBuf>> {
    UNDER_WAY.lock().expect("no thread dies holding the list")
}

/// Files of one new image, removed when this is dropped.
#[must_use]
#[derive(Default)]
pub struct Made {
    paths: Vec<PathBuf>,
}

impl Made {
    /// Makes or empties a file, which is among them if that succeeds. A signal waits until it is.
    pub fn begin<T>(&mut self, path: &Path, act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let mut all = under_way();
        let done = act()?;
        if !self.paths.iter().any(|known| known == path) {
            self.paths.push(path.to_path_buf());
            all.push(path.to_path_buf());
        }
        Ok(done)
    }

    /// They are complete.
    pub fn keep(mut self) {
        self.forget();
        self.paths.clear();
    }

    fn forget(&self) {
        under_way().retain(|path| !self.paths.contains(path));
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for path in &self.paths {
            let _ = fs::remove_file(path);
        }
        self.forget();
    }
}

/// Has a signal that ends the program remove what is under way. Before any other thread is there.
pub fn watch_signals() {
    // What is ignored, as in the background of a script or under nohup, ends nothing.
    let ignored = ignored_signals().unwrap_or(u64::MAX);
    let ends = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]
        .into_iter()
        .filter(|&signal| ignored & (1 << (signal as u32 - 1)) == 0);
    let ends = SigSet::from_iter(ends);
    if ends.iter().next().is_none() || ends.thread_block().is_err() {
        return;
    }
    std::thread::spawn(move || {
        let Ok(signal) = ends.wait() else { return };
        // Whoever completes something now waits for the list, and ends with this program.
        let paths = under_way();
        for path in paths.iter() {
            let _ = fs::remove_file(path);
        }
        // It ends the program as it would have, so that the caller sees that.
        let _ = ends.thread_unblock();
        let _ = raise(signal);
    });
}

/// By the kernel's word, for asking by a system call takes unsafe code.
fn ignored_signals() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"))?;
    u64::from_str_radix(mask.trim(), 16).ok()
}
