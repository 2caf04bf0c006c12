//! What is wrong with an image, in one sentence: which file, field, offset, value and limit.

use core::fmt;

use crate::types::FileNo;

/// What kind of wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FaultKind {
    /// Not an image of the format that the configuration named.
    NotThisFormat,
    /// A field breaks its specification; nothing was changed.
    Corrupt,
    /// Within the specification, but beyond a limit of ours or of the budget.
    Limit,
    /// A feature that is refused by name.
    Unsupported,
    /// Writes are refused: read-only by configuration, by the image, or after a fault.
    ReadOnly,
    /// The request lies beyond the end of the disk.
    OutOfRange,
    /// The file cannot hold more (a fixed-size store, or the format's own maximum).
    Full,
    /// A file that the image names may not or cannot be opened.
    Refused,
    /// The store failed while reading or writing for the engine.
    Store,
    /// Ours: there is no memory for it.
    Memory,
}

/// Longest name kept with a fault, bytes (ours; qcow2's feature names have up to 46).
const NAME_BYTES_MAX: usize = 46;

/// What an image itself calls the thing that is refused: its words, never more than printed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct FaultName {
    bytes: [u8; NAME_BYTES_MAX],
    len: u8,
}

impl FaultName {
    pub const NONE: FaultName = FaultName { bytes: [0; NAME_BYTES_MAX], len: 0 };

    /// Adds a name, as far as there is room; bytes that are no plain text become question marks.
    pub fn add(&mut self, name: &[u8]) {
        let separator: &[u8] = if self.len > 0 { b", " } else { b"" };
        for &byte in separator.iter().chain(name) {
            let Some(place) = self.bytes.get_mut(self.len as usize) else { return };
            let plain = byte.is_ascii_graphic() || byte == b' ';
            *place = if plain { byte } else { b'?' };
            self.len += 1;
        }
    }

    pub fn as_str(&self) -> &str {
        core::str::from_utf8(&self.bytes[..self.len as usize]).expect("only plain text is kept")
    }
}

impl fmt::Debug for FaultName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

/// A fault of an image. `value` and `limit` mean what `field` says; 0 when there is none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ImageFault {
    pub kind: FaultKind,
    pub file: FileNo,
    /// The field in its specification's words, or what was being done.
    pub field: &'static str,
    /// Byte offset in the file.
    pub offset: u64,
    pub value: u64,
    pub limit: u64,
    /// The image's own name for it, mostly none.
    pub name: FaultName,
}

impl ImageFault {
    pub fn new(kind: FaultKind, file: FileNo, field: &'static str) -> ImageFault {
        ImageFault { kind, file, field, offset: 0, value: 0, limit: 0, name: FaultName::NONE }
    }

    pub fn corrupt(file: FileNo, field: &'static str, offset: u64, value: u64) -> ImageFault {
        ImageFault { offset, value, ..ImageFault::new(FaultKind::Corrupt, file, field) }
    }

    pub fn limit(file: FileNo, field: &'static str, value: u64, limit: u64) -> ImageFault {
        ImageFault { value, limit, ..ImageFault::new(FaultKind::Limit, file, field) }
    }

    pub fn unsupported(file: FileNo, field: &'static str, value: u64) -> ImageFault {
        ImageFault { value, ..ImageFault::new(FaultKind::Unsupported, file, field) }
    }
}

impl fmt::Display for ImageFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ImageFault { kind, file: FileNo(file), field, offset, value, limit, name } = *self;
        match kind {
            FaultKind::NotThisFormat => write!(f, "not such an image: {field} is {value:#x}")?,
            FaultKind::Corrupt => write!(f, "corrupt: {field} is {value:#x} at byte {offset}")?,
            FaultKind::Limit => write!(f, "{field} is {value}, the limit is {limit}")?,
            FaultKind::Unsupported => write!(f, "not supported: {field} ({value:#x})")?,
            FaultKind::ReadOnly => write!(f, "writes are refused: {field}")?,
            FaultKind::OutOfRange => {
                write!(f, "sector {value} is beyond the end of the disk, {limit} sectors")?
            }
            FaultKind::Full => write!(f, "no room: {field} would need {value}, limit {limit}")?,
            FaultKind::Refused => write!(f, "refused: {field}")?,
            FaultKind::Store => write!(f, "the store failed: {field} at byte {offset}")?,
            FaultKind::Memory => write!(f, "there is no {field}")?,
        }
        if name != FaultName::NONE {
            write!(f, ", which it names '{}'", name.as_str())?;
        }
        if file > 0 { write!(f, " (file {file} of the chain)") } else { Ok(()) }
    }
}
