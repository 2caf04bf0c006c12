//! Memory that another party can write at any time: mapped, copied, and read or written by the
//! kernel for us. Never a reference to it.
//!
//! Guards that no access leaves the mapping. What the other party writes meanwhile makes the
//! content of a copy arbitrary, and that is what every copy is taken for.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, Ordering};

use platter_xen::PAGE_BYTES;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;

use super::gntdev::Grants;

/// A run of bytes in a mapping: offset and length; two of them, since rings wrap.
pub type Spans = [(usize, usize); 2];

/// `RWF_DONTCACHE` (Linux 6.14): the page cache lets go of the bytes at once.
pub const RWF_DONTCACHE: libc::c_int = 0x80;

/// preadv2 and pwritev2 (preadv2(2)), which differ in nothing but the direction.
type Vectored = unsafe extern "C" fn(
    libc::c_int,
    *const libc::iovec,
    libc::c_int,
    libc::off_t,
    libc::c_int,
) -> libc::ssize_t;

/// How a file is read or written.
#[derive(Clone, Copy, Default, Debug)]
pub struct How {
    /// Fail with EAGAIN instead of waiting.
    pub now: bool,
    /// Leave nothing behind in the page cache.
    pub dontcache: bool,
}

impl How {
    fn flags(self) -> libc::c_int {
        let now = if self.now { libc::RWF_NOWAIT } else { 0 };
        now | if self.dontcache { RWF_DONTCACHE } else { 0 }
    }
}

/// Shared pages, mapped in order. Unmapped when dropped.
pub struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
    /// Given back after the pages are unmapped.
    grants: Option<Grants>,
}

// SAFETY: the mapping belongs to the process, and every access is a copy or atomic.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Maps `pages` of `file` from `offset`, readable and writable.
    pub(super) fn of(
        file: &impl AsFd,
        offset: u64,
        pages: usize,
        grants: Option<Grants>,
    ) -> io::Result<Mapping> {
        let bytes = pages * PAGE_BYTES;
        // SAFETY: a new shared mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_fd().as_raw_fd(),
                offset as libc::off_t,
            )
        };
        match NonNull::new(base.cast::<u8>()) {
            Some(base) if base.as_ptr().cast() != libc::MAP_FAILED => {
                Ok(Mapping { base, bytes, grants })
            }
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The same ordinary memory twice, as the two ends of a ring see it: for benches, fuzzing
    /// and tests, where no Xen is.
    pub fn pair(pages: usize) -> io::Result<(Mapping, Mapping)> {
        let memory = memfd_create("ring", MemfdFlags::CLOEXEC)?;
        ftruncate(&memory, (pages * PAGE_BYTES) as u64)?;
        Ok((Mapping::of(&memory, 0, pages, None)?, Mapping::of(&memory, 0, pages, None)?))
    }

    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        let end = offset.checked_add(len);
        assert!(end.is_some_and(|end| end <= self.bytes), "beyond the mapping");
        // SAFETY: within the mapping, as just proved.
        unsafe { self.base.as_ptr().add(offset) }
    }

    /// Copies out, each byte read once.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        let from = self.at(offset, into.len());
        // SAFETY: both ranges are valid and apart.
        unsafe { libc::memcpy(into.as_mut_ptr().cast(), from.cast(), into.len()) };
    }

    /// Copies in.
    pub fn write(&self, offset: usize, from: &[u8]) {
        let to = self.at(offset, from.len());
        // SAFETY: both ranges are valid and apart.
        unsafe { libc::memcpy(to.cast(), from.as_ptr().cast(), from.len()) };
    }

    /// Reads `file` from `offset` straight into `spans`: how many bytes came.
    pub fn read_file(
        &self,
        spans: Spans,
        file: &File,
        offset: u64,
        how: How,
    ) -> Result<usize, Errno> {
        self.transfer(libc::preadv2, spans, file, offset, how)
    }

    /// Writes `spans` straight into `file` at `offset`: how many bytes went.
    pub fn write_file(
        &self,
        spans: Spans,
        file: &File,
        offset: u64,
        how: How,
    ) -> Result<usize, Errno> {
        self.transfer(libc::pwritev2, spans, file, offset, how)
    }

    fn transfer(
        &self,
        call: Vectored,
        spans: Spans,
        file: &File,
        offset: u64,
        how: How,
    ) -> Result<usize, Errno> {
        let (vectors, count) = self.vectors(spans);
        let (fd, at) = (file.as_raw_fd(), offset_of(offset)?);
        // SAFETY: `call` is preadv2 or pwritev2; the vectors lie within the mapping, which outlives
        // the call; the kernel reads or writes there, whatever the other party writes meanwhile,
        // and nobody holds a reference into it.
        done(unsafe { call(fd, vectors.as_ptr(), count, at, how.flags()) })
    }

    fn vectors(&self, spans: Spans) -> ([libc::iovec; 2], libc::c_int) {
        let vectors =
            spans.map(|(at, len)| libc::iovec { iov_base: self.at(at, len).cast(), iov_len: len });
        // An empty second vector costs the kernel a fault-in of nothing.
        (vectors, if spans[1].1 == 0 { 1 } else { 2 })
    }

    /// One aligned load, ordered before what follows.
    pub fn load(&self, offset: usize) -> u32 {
        self.atomic(offset).load(Ordering::SeqCst)
    }

    /// One aligned store, ordered after what precedes and before what follows.
    pub fn store(&self, offset: usize, value: u32) {
        self.atomic(offset).store(value, Ordering::SeqCst);
    }

    fn atomic(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4), "an index is aligned");
        let at = self.at(offset, 4);
        // SAFETY: aligned, within the mapping, and only ever accessed as an atomic here.
        unsafe { AtomicU32::from_ptr(at.cast()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `of`, which nothing else refers to.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
        drop(self.grants.take());
    }
}

fn done(result: isize) -> Result<usize, Errno> {
    usize::try_from(result)
        .map_err(|_| Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
}

fn offset_of(offset: u64) -> Result<libc::off_t, Errno> {
    libc::off_t::try_from(offset).map_err(|_| Errno::INVAL)
}

/// Would miss: pages of another domain, which only a Xen machine has.
#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_file_goes_in_and_out_over_the_edge() {
        let (one, other) = Mapping::pair(2).expect("memory");
        let file = File::from(memfd_create("file", MemfdFlags::CLOEXEC).expect("a file"));
        file.write_all_at(b"0123456789", 0).expect("its content");
        let how = How::default();
        assert_eq!(one.read_file([(8188, 4), (0, 3)], &file, 1, how), Ok(7));
        let (mut end, mut start) = ([0; 4], [0; 3]);
        other.read(8188, &mut end);
        other.read(0, &mut start);
        assert_eq!((&end, &start), (b"1234", b"567"));
        other.write(8190, b"xy");
        assert_eq!(one.write_file([(8190, 2), (0, 1)], &file, 0, how), Ok(3));
        let mut content = [0; 10];
        file.read_exact_at(&mut content, 0).expect("its content");
        assert_eq!(&content, b"xy53456789");
        // Beyond the end there is nothing, and offsets are signed in the kernel.
        assert_eq!(one.read_file([(0, 4), (0, 0)], &file, 10, how), Ok(0));
        assert_eq!(one.read_file([(0, 4), (0, 0)], &file, u64::MAX, how), Err(Errno::INVAL));
    }

    #[test]
    #[should_panic(expected = "beyond the mapping")]
    fn nothing_beyond_the_mapping_is_touched() {
        let (one, _other) = Mapping::pair(1).expect("memory");
        one.read(4095, &mut [0; 2]);
    }
}
