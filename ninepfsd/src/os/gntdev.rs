//! Granted memory by /dev/xen/gntdev (Linux include/uapi/xen/gntdev.h).

use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use platter_xen::Gref;

use super::memory::Mapping;
use super::{ioctl, request};

/// Pages of one mapping: a 9pfs ring of order 9.
pub const PAGES_MAX: usize = 512;

const MAP_GRANT_REF: libc::c_ulong = request(b'G', 0, 24);
const UNMAP_GRANT_REF: libc::c_ulong = request(b'G', 1, 16);

pub(super) const REQUESTS: [libc::c_ulong; 2] = [MAP_GRANT_REF, UNMAP_GRANT_REF];

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

/// The open device; one serves all frontends.
#[derive(Clone)]
pub struct Gntdev {
    fd: Arc<OwnedFd>,
}

/// References that the device holds for a mapping; given back when dropped.
pub struct Grants {
    device: Gntdev,
    index: u64,
    count: u32,
}

impl Gntdev {
    pub fn open() -> io::Result<Gntdev> {
        let file = OpenOptions::new().read(true).write(true).open("/dev/xen/gntdev")?;
        Ok(Gntdev { fd: Arc::new(file.into()) })
    }

    /// Maps pages that `domid` granted, readable and writable. All or nothing.
    pub fn map(&self, domid: u16, grefs: &[Gref]) -> io::Result<Mapping> {
        assert!(!grefs.is_empty() && grefs.len() <= PAGES_MAX, "1 to 512 pages");
        let empty = GrantRef { domid: domid.into(), gref: 0 };
        let count = grefs.len() as u32;
        let mut map = Box::new(MapGrantRefs { count, pad: 0, index: 0, refs: [empty; PAGES_MAX] });
        for (place, gref) in map.refs.iter_mut().zip(grefs) {
            place.gref = gref.0;
        }
        ioctl(&self.fd, MAP_GRANT_REF, &mut *map)?;
        let grants = Grants { device: self.clone(), index: map.index, count };
        Mapping::of(&self.fd, map.index, grefs.len(), Some(grants))
    }
}

impl Drop for Grants {
    fn drop(&mut self) {
        let mut unmap = UnmapGrantRef { index: self.index, count: self.count, pad: 0 };
        // It can only fail for references that are not the device's.
        let _ = ioctl(&self.device.fd, UNMAP_GRANT_REF, &mut unmap);
    }
}
