//! The kinds of device that a storage domain can have, behind one name. virtio-blk and AHCI
//! would be further ones.

use alloc::boxed::Box;

use platter_xen::{Bus, Hypervisor};

use crate::blkfront::Blkfront;
use crate::disk::{Device, DiskDone, DiskIo, DiskSubmit, DiskTag, Geometry};
use crate::nvme::Nvme;
use crate::pool::Pool;

/// A disk from another domain, or a controller of our own.
pub enum AnyDevice {
    Blkfront(Box<Blkfront>),
    Nvme(Box<Nvme>),
}

/// Calls the method of whichever device it is.
macro_rules! each {
    ($self:ident, $device:ident => $call:expr) => {
        match $self {
            AnyDevice::Blkfront($device) => $call,
            AnyDevice::Nvme($device) => $call,
        }
    };
}

impl<H: Hypervisor + Bus> Device<H> for AnyDevice {
    fn units(&self) -> usize {
        each!(self, device => Device::<H>::units(&**device))
    }

    fn unit_number(&self, unit: usize) -> Option<u32> {
        each!(self, device => Device::<H>::unit_number(&**device, unit))
    }

    fn geometry(&self, unit: usize) -> Option<Geometry> {
        each!(self, device => Device::<H>::geometry(&**device, unit))
    }

    fn is_away(&self) -> bool {
        each!(self, device => Device::<H>::is_away(&**device))
    }

    fn losses(&self) -> u32 {
        each!(self, device => Device::<H>::losses(&**device))
    }

    fn returns(&self) -> u32 {
        each!(self, device => Device::<H>::returns(&**device))
    }

    fn identity(&self) -> u64 {
        each!(self, device => Device::<H>::identity(&**device))
    }

    fn settle(&mut self, verdict: &dyn Fn(DiskTag) -> Option<bool>) {
        each!(self, device => Device::<H>::settle(&mut **device, verdict))
    }

    fn is_left(&mut self, hv: &mut H) -> bool {
        each!(self, device => device.is_left(hv))
    }

    fn submit(
        &mut self,
        hv: &mut H,
        pool: &Pool,
        unit: usize,
        tag: DiskTag,
        io: DiskIo,
    ) -> DiskSubmit {
        each!(self, device => device.submit(hv, pool, unit, tag, io))
    }

    fn poll(&mut self, hv: &mut H, pool: &Pool, now_ns: u64) -> Option<DiskDone> {
        each!(self, device => device.poll(hv, pool, now_ns))
    }

    fn poll_at_ns(&self) -> Option<u64> {
        each!(self, device => Device::<H>::poll_at_ns(&**device))
    }
}
