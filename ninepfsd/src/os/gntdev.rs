//! Granted memory by /dev/xen/gntdev (Linux include/uapi/xen/gntdev.h).

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, Ordering, fence};

use platter_xen::{Gref, PAGE_BYTES};

use super::{ioctl, request};

/// Pages of one mapping: a 9pfs ring of order 9.
pub const PAGES_MAX: usize = 512;

const MAP_GRANT_REF: libc::c_ulong = request(b'G', 0, 24);
const UNMAP_GRANT_REF: libc::c_ulong = request(b'G', 1, 16);

#[repr(C)]
#[derive(Clone, Copy)]
struct GrantRef {
    domid: u32,
    gref: u32,
}

/// The kernel's structure has one reference and reads `count` of them.
#[repr(C)]
struct MapGrantRefs {
    count: u32,
    pad: u32,
    index: u64,
    refs: [GrantRef; PAGES_MAX],
}

#[repr(C)]
struct UnmapGrantRef {
    index: u64,
    count: u32,
    pad: u32,
}

/// Pages of another domain, mapped in order. Unmapped when dropped.
pub struct Mapping {
    fd: OwnedFd,
    index: u64,
    pages: usize,
    base: NonNull<u8>,
}

// SAFETY: the mapping belongs to the process and every access is a volatile copy.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Maps pages that `domid` granted, readable and writable. All or nothing.
    pub fn new(domid: u16, grefs: &[Gref]) -> io::Result<Mapping> {
        assert!(!grefs.is_empty() && grefs.len() <= PAGES_MAX, "1 to 512 pages");
        let file = OpenOptions::new().read(true).write(true).open("/dev/xen/gntdev")?;
        let fd = OwnedFd::from(file);
        let empty = GrantRef { domid: domid.into(), gref: 0 };
        let mut map = Box::new(MapGrantRefs {
            count: grefs.len() as u32,
            pad: 0,
            index: 0,
            refs: [empty; PAGES_MAX],
        });
        for (place, gref) in map.refs.iter_mut().zip(grefs) {
            place.gref = gref.0;
        }
        ioctl(&fd, MAP_GRANT_REF, &mut *map)?;
        let pages = grefs.len();
        // SAFETY: a new shared mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                pages * PAGE_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                map.index as libc::off_t,
            )
        };
        let base = match NonNull::new(base.cast::<u8>()) {
            Some(base) if base.as_ptr().cast() != libc::MAP_FAILED => base,
            _ => return Err(io::Error::last_os_error()),
        };
        Ok(Mapping { fd, index: map.index, pages, base })
    }

    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        let end = offset.checked_add(len);
        assert!(end.is_some_and(|end| end <= self.pages * PAGE_BYTES), "beyond the mapping");
        // SAFETY: within the mapping, as just proved.
        unsafe { self.base.as_ptr().add(offset) }
    }

    /// Copies out, each byte read once.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        let from = self.at(offset, into.len());
        // SAFETY: both ranges are valid and apart. What the other domain writes meanwhile makes
        // the copy's content arbitrary, which is what it is taken for.
        unsafe { libc::memcpy(into.as_mut_ptr().cast(), from.cast(), into.len()) };
        fence(Ordering::SeqCst);
    }

    /// Copies in.
    pub fn write(&self, offset: usize, from: &[u8]) {
        let to = self.at(offset, from.len());
        // SAFETY: both ranges are valid and apart.
        unsafe { libc::memcpy(to.cast(), from.as_ptr().cast(), from.len()) };
        fence(Ordering::SeqCst);
    }

    /// One aligned load, ordered before what follows.
    pub fn load(&self, offset: usize) -> u32 {
        self.atomic(offset).load(Ordering::SeqCst)
    }

    /// One aligned store, ordered after what precedes.
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
        // SAFETY: the mapping made in `new`, which nothing else refers to.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.pages * PAGE_BYTES) };
        let mut unmap = UnmapGrantRef { index: self.index, count: self.pages as u32, pad: 0 };
        // A failure leaves it to the descriptor's close, right after.
        let _ = ioctl(&self.fd, UNMAP_GRANT_REF, &mut unmap);
    }
}
