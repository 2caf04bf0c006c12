//! Event channels by /dev/xen/evtchn (Linux include/uapi/xen/evtchn.h).

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::{ioctl, request};

const BIND_INTERDOMAIN: libc::c_ulong = request(b'E', 1, 8);
const NOTIFY: libc::c_ulong = request(b'E', 4, 4);

#[repr(C)]
struct BindInterdomain {
    remote_domain: u32,
    remote_port: u32,
}

#[repr(C)]
struct Notify {
    port: u32,
}

/// An open event channel device: closing it unbinds its ports.
pub struct Evtchn {
    fd: OwnedFd,
}

impl Evtchn {
    pub fn open() -> io::Result<Evtchn> {
        let file = OpenOptions::new().read(true).write(true).open("/dev/xen/evtchn")?;
        Ok(Evtchn { fd: file.into() })
    }

    /// Binds to a port that `domid` allocated for us; the local port.
    pub fn bind(&self, domid: u16, port: u32) -> io::Result<u32> {
        let mut bind = BindInterdomain { remote_domain: domid.into(), remote_port: port };
        ioctl(&self.fd, BIND_INTERDOMAIN, &mut bind).map(|port| port as u32)
    }

    pub fn notify(&self, port: u32) -> io::Result<()> {
        ioctl(&self.fd, NOTIFY, &mut Notify { port }).map(|_| ())
    }

    /// Waits for events and lets further ones come; how many there were.
    pub fn take(&self) -> io::Result<usize> {
        let mut file = File::from(self.fd.try_clone()?);
        let mut ports = [0u8; 4 * 64];
        let len = file.read(&mut ports)?;
        // Writing a port back unmasks it.
        file.write_all(&ports[..len])?;
        Ok(len / 4)
    }
}

impl AsFd for Evtchn {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
