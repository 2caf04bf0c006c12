//! The files of an image: which are open, how long they are, and which names may be opened.
//!
//! A name inside an image is an allegation: it is opened only through the caller, only inside
//! the directory of the file that names it, and only if the configuration allows it.

use alloc::string::String;
use alloc::vec::Vec;

use crate::fault::{FaultKind, ImageFault};
use crate::types::{FileNo, Step, Stop};

/// Longest name taken from an image, bytes (qcow2: QEMU's limit, 1023).
pub const NAME_BYTES_MAX: usize = 1023;
/// Longest file (Linux: `loff_t`).
pub(crate) const SIZE_BYTES_MAX: u64 = i64::MAX as u64;
/// Files of one image: chain depth 1000 and some extents each of ours (ours; QEMU has none).
pub const FILES_MAX: usize = 4096;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    ReadOnly,
    ReadWrite,
}

/// What the caller knows of a file it opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileInfo {
    pub size_bytes: u64,
    /// Writes beyond the end grow the file (false on a partition).
    pub can_grow: bool,
    /// Equal for two opens of the same file, whatever its path; loops are found by it.
    pub identity: u64,
}

pub(crate) struct OpenFile {
    pub name: String,
    /// The file whose content names this one, itself for the top.
    pub named_by: FileNo,
    pub access: Access,
    pub info: Option<FileInfo>,
}

pub(crate) struct Files {
    files: Vec<OpenFile>,
    /// A file that the caller must open next.
    wanted: Option<FileNo>,
    allow_names: bool,
}

impl Files {
    pub fn new(name: &str, access: Access, info: FileInfo, allow_names: bool) -> Files {
        let top =
            OpenFile { name: String::from(name), named_by: FileNo(0), access, info: Some(info) };
        Files { files: alloc::vec![top], wanted: None, allow_names }
    }

    /// Refuses a file that is longer than any on Linux: what is counted on from its end fits.
    pub fn check_size(&self, file: FileNo) -> Result<(), ImageFault> {
        match self.size(file) {
            0..=SIZE_BYTES_MAX => Ok(()),
            size => Err(ImageFault::limit(file, "the file's length", size, SIZE_BYTES_MAX)),
        }
    }

    /// Bytes in the file now.
    pub fn size(&self, file: FileNo) -> u64 {
        self.info(file).size_bytes
    }

    pub fn info(&self, file: FileNo) -> FileInfo {
        self.files[file.0 as usize].info.expect("a file is used only once it is open")
    }

    /// Records that the file was or will be written up to `end_bytes`.
    pub fn grow(&mut self, file: FileNo, end_bytes: u64) {
        let info = self.files[file.0 as usize].info.as_mut().expect("an open file");
        info.size_bytes = info.size_bytes.max(end_bytes);
    }

    /// The caller made the file shorter.
    pub fn cut(&mut self, file: FileNo, end_bytes: u64) {
        let info = self.files[file.0 as usize].info.as_mut().expect("an open file");
        info.size_bytes = info.size_bytes.min(end_bytes);
    }

    /// The file that `named_by` calls `name`: opened already, or to be opened by the caller
    /// (the step stops with `Busy` and the next `open_step` says which).
    pub fn open(&mut self, named_by: FileNo, name: &str, access: Access) -> Step<FileNo> {
        let known = self
            .files
            .iter()
            .position(|f| f.named_by == named_by && f.name == name && f.access == access);
        // The top file's own entry names itself: position 0 is never an answer here.
        if let Some(index) = known.filter(|&i| i > 0) {
            return match self.files[index].info {
                Some(_) => {
                    let file = FileNo(index as u16);
                    self.check_size(file)?;
                    Ok(file)
                }
                None => Err(Stop::Busy),
            };
        }
        self.check_name(named_by, name)?;
        if self.files.len() >= FILES_MAX {
            let value = self.files.len() as u64;
            return Err(ImageFault::limit(named_by, "files of one image", value, value).into());
        }
        let file = FileNo(self.files.len() as u16);
        self.files.push(OpenFile { name: String::from(name), named_by, access, info: None });
        self.wanted = Some(file);
        Err(Stop::Busy)
    }

    pub fn wanted(&self) -> Option<(FileNo, &OpenFile)> {
        self.wanted.map(|file| (file, &self.files[file.0 as usize]))
    }

    /// The caller opened the wanted file.
    pub fn opened(&mut self, file: FileNo, info: FileInfo) {
        assert!(self.wanted == Some(file), "only the wanted file can be opened");
        self.files[file.0 as usize].info = Some(info);
        self.wanted = None;
    }

    /// Name, access and info of each file so far.
    pub fn iter(&self) -> impl Iterator<Item = (FileNo, &OpenFile)> {
        self.files.iter().enumerate().map(|(i, f)| (FileNo(i as u16), f))
    }

    fn check_name(&self, named_by: FileNo, name: &str) -> Result<(), ImageFault> {
        let refuse = |why| Err(ImageFault::new(FaultKind::Refused, named_by, why));
        if !self.allow_names {
            return refuse("the image names another file, and the configuration denies that");
        }
        if name.is_empty() || name.len() > NAME_BYTES_MAX || name.contains('\0') {
            return refuse("the name of a backing file is empty, too long or holds a zero byte");
        }
        // A colon before the first slash ends a protocol or a drive, as everywhere (QEMU's rule).
        let has_protocol = name.split('/').next().is_some_and(|first| first.contains(':'));
        if name.starts_with('/') || has_protocol || name.contains('\\') {
            return refuse("a backing file must be named by a relative path in the same store");
        }
        if name.split('/').any(|part| part == ".." || part.is_empty()) {
            return refuse("the path of a backing file holds '..' or an empty part");
        }
        Ok(())
    }
}
