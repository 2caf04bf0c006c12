//! Carries out the plan of a new image: makes its files, writes them, and syncs them once.
//!
//! It must never touch a file that was there before, and leaves nothing behind when it fails.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use platter_image::{Access, Create, CreateFile, CreateWrite, Reserve};
use rustix::fs::FallocateFlags;

use crate::fault::Fault;
use crate::lock::lock;

/// Makes the files of `plan` at `path` and beside it. With `replace`, files of these names may
/// be there already and are lost.
pub fn carry_out(plan: &mut Create, path: &Path, replace: bool) -> Result<(), Fault> {
    let paths: Vec<PathBuf> = plan
        .files()
        .iter()
        .map(|file| match &file.name {
            None => path.to_path_buf(),
            Some(name) => path.with_file_name(name),
        })
        .collect();
    let mut made = Vec::new();
    let result = write_all(plan, &paths, replace, &mut made);
    if result.is_err() {
        for path in &made {
            let _ = fs::remove_file(path);
        }
    }
    result
}

/// Opens a file to be made anew, with its lock; with `replace` it may be there already. What is
/// in use is not touched, so emptying it is left to the caller.
pub(crate) fn claim(path: &Path, replace: bool) -> Result<File, Fault> {
    let fault = |doing, error| Fault::io(&path.to_string_lossy(), doing, error);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).create_new(!replace);
    let file = options.open(path).map_err(|error| fault("create", explain(error)))?;
    lock(&file, Access::ReadWrite).map_err(|error| fault("replace", error))?;
    Ok(file)
}

fn write_all(
    plan: &mut Create,
    paths: &[PathBuf],
    replace: bool,
    made: &mut Vec<PathBuf>,
) -> Result<(), Fault> {
    let fault = |path: &Path, doing, error| Fault::io(&path.to_string_lossy(), doing, error);
    let mut files = Vec::new();
    for (path, wanted) in paths.iter().zip(plan.files()) {
        let file = claim(path, replace)?;
        made.push(path.clone());
        file.set_len(0).map_err(|error| fault(path, "empty", error))?;
        file.set_len(wanted.bytes).map_err(|error| fault(path, "set the length", error))?;
        reserve(&file, wanted).map_err(|error| fault(path, "take room for it", error))?;
        files.push(file);
    }
    while let Some(CreateWrite { file, offset, bytes }) = plan.next_write() {
        let written = files[file].write_all_at(bytes, offset);
        written.map_err(|error| fault(&paths[file], "write", error))?;
    }
    for (path, file) in paths.iter().zip(&files) {
        file.sync_all().map_err(|error| fault(path, "sync", error))?;
    }
    Ok(())
}

/// Takes the room of a new file, as its plan wants it.
fn reserve(file: &File, wanted: &CreateFile) -> io::Result<()> {
    match wanted.reserve {
        Reserve::Room if wanted.bytes > 0 => {
            Ok(rustix::fs::fallocate(file, FallocateFlags::empty(), 0, wanted.bytes)?)
        }
        Reserve::Zeros => {
            let zeros = vec![0; 1 << 20];
            let mut done = 0;
            while done < wanted.bytes {
                let count = (wanted.bytes - done).min(zeros.len() as u64);
                file.write_all_at(&zeros[..count as usize], done)?;
                done += count;
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

fn explain(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::AlreadyExists => {
            io::Error::other("it is there already (--force replaces it)")
        }
        _ => error,
    }
}
