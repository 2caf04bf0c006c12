//! What went wrong, in one sentence that begins with the file it went wrong in.

use std::fmt;
use std::io;

use platter_image::ImageFault;

/// Why an operation on an image failed.
#[derive(Debug)]
pub enum Cause {
    /// The image, or what it asked for, was refused.
    Image(Box<ImageFault>),
    /// The system refused to read, write or open.
    Io { doing: &'static str, error: io::Error },
}

/// A failure and the file it belongs to.
#[derive(Debug)]
pub struct Fault {
    pub file: String,
    pub cause: Cause,
}

impl Fault {
    pub fn io(file: &str, doing: &'static str, error: io::Error) -> Fault {
        Fault { file: String::from(file), cause: Cause::Io { doing, error } }
    }

    /// The image's own fault, when it is one.
    pub fn image(&self) -> Option<ImageFault> {
        match self.cause {
            Cause::Image(ref fault) => Some(**fault),
            Cause::Io { .. } => None,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.cause {
            Cause::Image(fault) => write!(f, "{}: {fault}", self.file),
            Cause::Io { doing, error } => write!(f, "{}: cannot {doing}: {error}", self.file),
        }
    }
}

impl std::error::Error for Fault {}
