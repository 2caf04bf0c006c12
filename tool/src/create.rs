//! Carries out the plan of a new image: makes its files, writes them, and syncs them once.
//!
//! A file that was there before is touched only if the user wants it replaced, it is an ordinary
//! one, and nothing that is read from lies in it. It must leave nothing behind when it fails.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use platter_image::{Access, Create, CreateFile, CreateWrite, Reserve};
use rustix::fs::FallocateFlags;

use crate::fault::Fault;
use crate::lock::lock;
use crate::made::Made;

/// May files of the names wanted be there already? They are lost then.
#[derive(Default)]
pub struct Replace {
    pub allowed: bool,
    /// Files that are read from, by whatever name: device and inode.
    sources: Vec<(u64, u64)>,
}

impl Replace {
    pub fn when(allowed: bool) -> Replace {
        Replace { allowed, sources: Vec::new() }
    }

    /// Keeps files that the new image is made from or lies over.
    pub fn but(mut self, sources: &[PathBuf]) -> Replace {
        let known = sources.iter().filter_map(|path| fs::metadata(path).ok());
        self.sources.extend(known.map(|meta| (meta.dev(), meta.ino())));
        self
    }

    /// Why this file, which is there, is not replaced.
    fn refuses(&self, file: &File) -> io::Result<()> {
        let meta = file.metadata()?;
        if !meta.is_file() {
            let why = "it is no ordinary file; only those are replaced";
            return Err(io::Error::other(why));
        }
        if self.sources.contains(&(meta.dev(), meta.ino())) {
            let why = "the new image would be made from it, or lie over it: they are one file";
            return Err(io::Error::other(why));
        }
        Ok(())
    }
}

/// Makes the files of `plan` at `path` and beside it. They go again unless the caller keeps them.
pub fn carry_out(plan: &mut Create, path: &Path, replace: &Replace) -> Result<Made, Fault> {
    let paths: Vec<PathBuf> = plan
        .files()
        .iter()
        .map(|file| match &file.name {
            None => path.to_path_buf(),
            Some(name) => path.with_file_name(name),
        })
        .collect();
    let mut made = Made::default();
    write_all(plan, &paths, replace, &mut made)?;
    Ok(made)
}

/// Opens a file to be made anew, with its lock. One that was there before is left as it is, for
/// others may be in the way yet; `empty` does the rest.
pub(crate) fn claim(path: &Path, replace: &Replace, made: &mut Made) -> Result<File, Fault> {
    let fault = |doing, error| Fault::io(&path.to_string_lossy(), doing, error);
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    let file = match made.begin(path, || options.clone().create_new(true).open(path)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && replace.allowed => {
            let file = options.open(path).map_err(|error| fault("replace", error))?;
            replace.refuses(&file).map_err(|error| fault("replace", error))?;
            file
        }
        Err(error) => return Err(fault("create", explain(error))),
    };
    lock(&file, Access::ReadWrite).map_err(|error| fault("replace", error))?;
    Ok(file)
}

/// Empties a file that was claimed: from then on it is of this run.
pub(crate) fn empty(path: &Path, file: &File, made: &mut Made) -> Result<(), Fault> {
    let emptied = made.begin(path, || file.set_len(0));
    emptied.map_err(|error| Fault::io(&path.to_string_lossy(), "empty", error))
}

fn write_all(
    plan: &mut Create,
    paths: &[PathBuf],
    replace: &Replace,
    made: &mut Made,
) -> Result<(), Fault> {
    let fault = |path: &Path, doing, error| Fault::io(&path.to_string_lossy(), doing, error);
    let claimed = paths.iter().map(|path| claim(path, replace, made));
    let files = claimed.collect::<Result<Vec<File>, Fault>>()?;
    for ((path, file), wanted) in paths.iter().zip(&files).zip(plan.files()) {
        empty(path, file, made)?;
        file.set_len(wanted.bytes).map_err(|error| fault(path, "set the length", error))?;
        reserve(file, wanted).map_err(|error| fault(path, "take room for it", error))?;
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
