//! Files of a 9p store and the steps that open and close them.
//!
//! A file is opened by Twalk (several when the path is deep), Tgetattr, Tlopen, in this order:
//! only what Tgetattr has shown to be a regular file is opened, because opening a FIFO or a
//! device would make the server wait or act. Must never: send a path element that is empty,
//! `.`, `..` or holds a NUL.

use alloc::string::String;

use super::holes::Holes;
use super::message::{
    Answer, GETATTR_BASIC, MODE_KIND_MASK, MODE_REGULAR, QID_DIR, QID_SYMLINK, Qid, Request,
    WALK_MAX, open,
};
use crate::store::{Access, StoreFault, Tag};

/// Longest path: ours.
pub const PATH_BYTES_MAX: usize = 1024;
/// Longest path element: Linux's `NAME_MAX`.
const NAME_BYTES_MAX: usize = 255;
/// Deepest path: ours.
const DEPTH_MAX: usize = 64;
/// So much of a file must have no space for its holes to be of interest.
const SPARSE_BYTES: u64 = 1 << 20;
/// The longest file there is on Linux (`loff_t`), and what is said of one that is longer.
pub const SIZE_BYTES_MAX: u64 = i64::MAX as u64;
pub const OVERSIZE: StoreFault =
    StoreFault::Refused("the server says that it is beyond 2^63 bytes");
/// The share's root directory.
pub const ROOT_FID: u32 = 0;

/// Where a file stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// This many elements of the path have been walked.
    Walk(usize),
    Getattr,
    Lopen,
    Ready,
    /// On its way out; nobody waits for it.
    Clunk,
    /// Opened in an earlier session; opened again, by path, when the store is back.
    Lost,
    /// Was open and could not be opened again.
    Refused(StoreFault),
    /// Was never open; the answer is due, then the slot is free.
    Failed(StoreFault),
}

/// One open file.
#[derive(Debug)]
pub struct File {
    path: String,
    access: Access,
    pub step: Step,
    /// The step's message is still to be sent.
    pub due: bool,
    /// Who waits for this file to open.
    pub opener: Option<Tag>,
    pub size_bytes: u64,
    /// The qid path seen at the first open; a later file of that path must be the same.
    identity: Option<u64>,
    /// Operations of the caller in flight or not yet reported.
    pub outstanding: u32,
    /// Close was asked for while something was outstanding.
    pub closing: bool,
    /// The server holds a fid for this file although it is not open: to be clunked at close.
    pub fid_exists: bool,
    pub holes: Holes,
}

/// What an answer means for a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Progress {
    /// The next step is due.
    Continue,
    /// Open now, for the first time or again.
    Opened,
    /// Not to be had. Whether the server knows the fid, so that it must be clunked.
    Refused { fault: StoreFault, fid_exists: bool },
}

impl File {
    /// Refuses bad paths before anything is sent.
    pub fn new(path: &str, access: Access, opener: Tag) -> Result<File, StoreFault> {
        if path.len() > PATH_BYTES_MAX
            || path.split('/').count() > DEPTH_MAX
            || !path.split('/').all(element_is_sane)
        {
            return Err(StoreFault::BadPath);
        }
        Ok(File {
            path: String::from(path),
            access,
            step: Step::Walk(0),
            due: true,
            opener: Some(opener),
            size_bytes: 0,
            identity: None,
            outstanding: 0,
            closing: false,
            fid_exists: false,
            holes: Holes::default(),
        })
    }

    /// A number for the file that is the same at every open.
    pub fn identity(&self) -> u64 {
        self.identity.unwrap_or(0)
    }

    /// The session is gone. Returns true when the file's slot is free now.
    pub fn lose(&mut self) -> bool {
        self.due = false;
        self.fid_exists = false;
        self.holes.forget();
        match self.step {
            Step::Clunk => return true,
            Step::Failed(_) => {}
            _ if self.opener.is_some() => self.step = Step::Failed(StoreFault::Gone),
            _ => self.step = Step::Lost,
        }
        self.closing && self.outstanding == 0
    }

    /// The store is back: open again what was open.
    pub fn reopen(&mut self) {
        if self.step == Step::Lost {
            self.step = Step::Walk(0);
            self.due = true;
        }
    }

    /// The message of the current step.
    pub fn request(&self, fid: u32) -> Request<'_> {
        match self.step {
            Step::Walk(done) => Request::Walk {
                fid: if done == 0 { ROOT_FID } else { fid },
                newfid: fid,
                names: self.path.split('/').skip(done).take(WALK_MAX).collect(),
            },
            Step::Getattr => Request::Getattr { fid, mask: GETATTR_BASIC },
            Step::Lopen => {
                let flags = match self.access {
                    Access::ReadOnly => open::READ_ONLY,
                    Access::ReadWrite => open::READ_WRITE,
                };
                Request::Lopen { fid, flags }
            }
            Step::Clunk => Request::Clunk { fid },
            Step::Ready | Step::Lost | Step::Refused(_) | Step::Failed(_) => {
                unreachable!("no message is due in this step")
            }
        }
    }

    /// Takes the answer to the current step's message; `Err` when the server may not answer so.
    pub fn answer(&mut self, answer: &Answer<'_>) -> Result<Progress, StoreFault> {
        match (self.step, answer) {
            (Step::Walk(done), Answer::Lerror { ecode }) => {
                Ok(Progress::Refused { fault: fault_of(*ecode), fid_exists: done > 0 })
            }
            (_, Answer::Lerror { ecode }) => {
                Ok(Progress::Refused { fault: fault_of(*ecode), fid_exists: true })
            }
            (Step::Walk(done), Answer::Walk { qids }) => self.walked(done, qids),
            (Step::Getattr, Answer::Getattr { qid, mode, size, blocks, .. }) => {
                let unused = size.saturating_sub(blocks.saturating_mul(512));
                self.holes.off = self.access != Access::ReadWrite || unused < SPARSE_BYTES;
                Ok(self.attributes(*qid, *mode, *size))
            }
            (Step::Lopen, Answer::Lopen { .. }) => {
                self.step = Step::Ready;
                Ok(Progress::Opened)
            }
            _ => Err(StoreFault::Protocol),
        }
    }

    fn walked(&mut self, done: usize, qids: &[Qid]) -> Result<Progress, StoreFault> {
        let depth = self.path.split('/').count();
        let asked = (depth - done).min(WALK_MAX);
        if qids.len() > asked || qids.is_empty() {
            return Err(StoreFault::Protocol);
        }
        if qids.len() < asked {
            // The server makes no new fid then; one from an earlier part stays.
            let fault = StoreFault::NotFound;
            return Ok(Progress::Refused { fault, fid_exists: done > 0 });
        }
        if qids.iter().any(|qid| qid.kind & QID_SYMLINK != 0) {
            return Ok(Progress::Refused { fault: StoreFault::NotAFile, fid_exists: true });
        }
        self.step = if done + asked < depth { Step::Walk(done + asked) } else { Step::Getattr };
        self.due = true;
        Ok(Progress::Continue)
    }

    fn attributes(&mut self, qid: Qid, mode: u32, size: u64) -> Progress {
        let refused = |fault| Progress::Refused { fault, fid_exists: true };
        if qid.kind & QID_DIR != 0 || mode & MODE_KIND_MASK != MODE_REGULAR {
            return refused(StoreFault::NotAFile);
        }
        if self.identity.is_some_and(|identity| identity != qid.path) {
            return refused(StoreFault::Refused("another file stands at the path now"));
        }
        if size > SIZE_BYTES_MAX {
            return refused(OVERSIZE);
        }
        self.identity = Some(qid.path);
        self.size_bytes = size;
        self.step = Step::Lopen;
        self.due = true;
        Progress::Continue
    }
}

fn element_is_sane(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && name.len() <= NAME_BYTES_MAX && !name.contains('\0')
}

/// A Linux errno (asm-generic/errno.h) as the caller sees it. The one place.
pub fn fault_of(ecode: u32) -> StoreFault {
    match ecode {
        2 => StoreFault::NotFound,
        1 | 13 => StoreFault::Permission,
        30 => StoreFault::ReadOnly,
        28 | 122 => StoreFault::NoSpace,
        20 | 21 | 40 => StoreFault::NotAFile,
        38 | 95 => StoreFault::Unsupported,
        other => StoreFault::Io(other),
    }
}
