//! What is done with an open file when it may take time; a worker does it.
//!
//! Guards that a short read or write of the file is carried on until it fails or ends.

use std::fs::File;
use std::sync::Arc;

use platter_storage::ninep::message::{AllocateMode, Answer};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::{Errno, IoSlice, IoSliceMut, ReadWriteFlags, preadv2, pwritev2};

use crate::buffer::Buffer;
use crate::usage::Charge;

/// Of one request. A buffer holds the request's data, or takes the answer's.
pub enum Job {
    Read {
        file: Arc<File>,
        offset: u64,
        count: u32,
        buffer: Buffer,
        how: ReadWriteFlags,
    },
    Write {
        file: Arc<File>,
        offset: u64,
        count: u32,
        buffer: Buffer,
        how: ReadWriteFlags,
        /// Past the page cache.
        direct: bool,
        charge: Option<Charge>,
    },
    Sync {
        file: Arc<File>,
        data_only: bool,
    },
    Allocate {
        file: Arc<File>,
        mode: AllocateMode,
        offset: u64,
        len: u64,
        charge: Option<Charge>,
    },
}

/// An answer without its data.
pub type Outcome = Result<Answer<'static>, Errno>;

impl Job {
    /// Memory that it holds until it is answered.
    pub fn bytes(&self) -> usize {
        match self {
            Job::Read { count, .. } | Job::Write { count, .. } => *count as usize,
            Job::Sync { .. } | Job::Allocate { .. } => 0,
        }
    }

    /// Reads, and writes past the page cache, wait for the disk alone: io_uring has no thread
    /// wait for them. Other writes and all else it hands to threads of the kernel, which are
    /// no better than ours.
    pub fn suits_uring(&self) -> bool {
        matches!(self, Job::Read { .. } | Job::Write { direct: true, .. })
    }

    pub fn into_buffer(self) -> Option<Buffer> {
        match self {
            Job::Read { buffer, .. } | Job::Write { buffer, .. } => Some(buffer),
            Job::Sync { .. } | Job::Allocate { .. } => None,
        }
    }

    /// Does the work; gives the buffer back.
    pub fn run(self) -> (Outcome, Option<Buffer>) {
        match self {
            Job::Read { file, offset, count, mut buffer, how } => {
                let into = buffer.slice_mut(count as usize);
                let done = carry_on(into.len(), |at| {
                    let at_file = offset.saturating_add(at as u64);
                    preadv2(&file, &mut [IoSliceMut::new(&mut into[at..])], at_file, how)
                });
                (done.map(|count| Answer::Read { count }), Some(buffer))
            }
            Job::Write { file, offset, count, buffer, how, charge: _charge, .. } => {
                let from = buffer.slice(count as usize);
                let done = carry_on(from.len(), |at| {
                    let at_file = offset.saturating_add(at as u64);
                    pwritev2(&file, &[IoSlice::new(&from[at..])], at_file, how)
                });
                (done.map(|count| Answer::Write { count }), Some(buffer))
            }
            Job::Sync { file, data_only: true } => {
                (rustix::fs::fdatasync(&file).map(|()| Answer::Fsync), None)
            }
            Job::Sync { file, data_only: false } => {
                (rustix::fs::fsync(&file).map(|()| Answer::Fsync), None)
            }
            Job::Allocate { file, mode, offset, len, charge: _charge } => {
                (allocate(&file, mode, offset, len).map(|()| Answer::Allocate), None)
            }
        }
    }
}

/// Repeats a read or write until all is done, nothing more comes, or it fails; a failure after
/// the first bytes is the next request's.
fn carry_on(len: usize, mut step: impl FnMut(usize) -> Result<usize, Errno>) -> Result<u32, Errno> {
    let mut done = 0;
    while done < len {
        match step(done) {
            Ok(0) => break,
            Ok(len) => done += len,
            Err(Errno::INTR) => {}
            Err(_) if done > 0 => break,
            Err(errno) => return Err(errno),
        }
    }
    Ok(done as u32)
}

/// A range cut at the end of the file: what is allocated.
pub fn within_file(file: &File, offset: u64, len: u64) -> Result<u64, Errno> {
    let size = rustix::fs::fstat(file)?.st_size as u64;
    Ok(len.min(size.saturating_sub(offset)))
}

/// None of the modes changes the file's size; a range beyond the end is cut at the end.
fn allocate(file: &File, mode: AllocateMode, offset: u64, len: u64) -> Result<(), Errno> {
    let len = within_file(file, offset, len)?;
    if len == 0 {
        return Ok(());
    }
    let flags = match mode {
        AllocateMode::Allocate => FallocateFlags::empty(),
        AllocateMode::Punch => FallocateFlags::PUNCH_HOLE,
        AllocateMode::Zero => FallocateFlags::ZERO_RANGE,
    };
    fallocate(file, flags | FallocateFlags::KEEP_SIZE, offset, len)
}
