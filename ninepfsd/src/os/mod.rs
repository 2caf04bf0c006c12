//! The kernel's Xen devices: event channels, granted memory; and io_uring. All of the server's
//! unsafe lines.
//!
//! Guards that memory which a frontend can write is never seen as a Rust reference: it is
//! copied, each byte once, by us or by the kernel. Must never: hand out a pointer.

pub mod evtchn;
pub mod gntdev;
pub mod memory;
pub mod uring;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// Runs an ioctl whose argument is one structure in and out.
fn ioctl<T>(fd: &OwnedFd, request: libc::c_ulong, argument: &mut T) -> io::Result<i32> {
    // SAFETY: the descriptor is open, and the argument is the structure that the request takes.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// How often the calling thread has gone to sleep by itself: waited for something, as against
/// having been made to wait.
pub fn times_slept() -> i64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the kernel fills the structure that it is given; zeros are a value of it too.
    unsafe {
        libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr());
        usage.assume_init().ru_nvcsw
    }
}

/// `_IOC(_IOC_NONE, group, number, size)`, which Xen's devices use for all their requests.
const fn request(group: u8, number: u8, size: usize) -> libc::c_ulong {
    ((size as libc::c_ulong) << 16) | ((group as libc::c_ulong) << 8) | number as libc::c_ulong
}

/// Every request that is made of Xen's devices, for the list of what is allowed.
pub fn requests() -> [u64; 5] {
    let [bind, unbind, notify] = evtchn::REQUESTS;
    let [map, unmap] = gntdev::REQUESTS;
    [bind, unbind, notify, map, unmap]
}
