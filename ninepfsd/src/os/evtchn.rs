//! Event channels by /dev/xen/evtchn (Linux include/uapi/xen/evtchn.h).
//!
//! Guards that a channel stays masked while its ring is being looked at anyway: the kernel masks
//! it when it rings, and [`Evtchn::unmask`] is called only before going to sleep.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::{ioctl, request};

const BIND_INTERDOMAIN: libc::c_ulong = request(b'E', 1, 8);
const UNBIND: libc::c_ulong = request(b'E', 3, 4);
const NOTIFY: libc::c_ulong = request(b'E', 4, 4);

pub(super) const REQUESTS: [libc::c_ulong; 3] = [BIND_INTERDOMAIN, UNBIND, NOTIFY];

/// Ports of one frontend: no more can ring at once.
const PORTS_MAX: usize = platter_xen::ninepfs::RINGS_MAX;

#[repr(C)]
struct BindInterdomain {
    remote_domain: u32,
    remote_port: u32,
}

#[repr(C)]
struct Port {
    port: u32,
}

/// An open event channel device, for one frontend at a time.
pub struct Evtchn {
    fd: OwnedFd,
    bound: Vec<u32>,
    /// Ports that rang and are masked, as the kernel told them.
    masked: [u8; 4 * PORTS_MAX],
    masked_len: usize,
}

impl Evtchn {
    pub fn open() -> io::Result<Evtchn> {
        let file = OpenOptions::new().read(true).write(true).open("/dev/xen/evtchn")?;
        let (bound, masked) = (Vec::with_capacity(PORTS_MAX), [0; 4 * PORTS_MAX]);
        Ok(Evtchn { fd: file.into(), bound, masked, masked_len: 0 })
    }

    /// Binds to a port that `domid` allocated for us; the local port.
    pub fn bind(&mut self, domid: u16, port: u32) -> io::Result<u32> {
        let mut bind = BindInterdomain { remote_domain: domid.into(), remote_port: port };
        let port = ioctl(&self.fd, BIND_INTERDOMAIN, &mut bind)? as u32;
        self.bound.push(port);
        Ok(port)
    }

    /// Gives all ports back; the device can serve another frontend.
    pub fn unbind(&mut self) {
        for port in self.bound.drain(..) {
            // It can only fail for a port that is not ours.
            let _ = ioctl(&self.fd, UNBIND, &mut Port { port });
        }
        self.masked_len = 0;
    }

    pub fn notify(&self, port: u32) -> io::Result<()> {
        ioctl(&self.fd, NOTIFY, &mut Port { port }).map(|_| ())
    }

    /// Takes the events that are there; their ports stay masked.
    pub fn take(&mut self) -> io::Result<()> {
        let room = &mut self.masked[self.masked_len..];
        if !room.is_empty() {
            self.masked_len += rustix::io::read(&self.fd, room)?;
        }
        Ok(())
    }

    /// Lets events come again. True when some port was masked: look once more before sleeping.
    pub fn unmask(&mut self) -> io::Result<bool> {
        let masked = std::mem::take(&mut self.masked_len);
        if masked > 0 {
            // Writing a port back unmasks it.
            rustix::io::write(&self.fd, &self.masked[..masked])?;
        }
        Ok(masked > 0)
    }
}

impl AsFd for Evtchn {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
