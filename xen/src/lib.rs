//! Xen's PV protocols as platter speaks them: rings, blkif, xenstore, xenbus, 9pfs.
//!
//! Nothing here issues a hypercall or keeps a reference into shared memory: everything goes
//! through [`Hypervisor`], seam 1 of the design.
#![no_std]
#![forbid(unsafe_code)]

pub mod bus;
pub mod hypervisor;

pub use bus::{Bus, Mmio};
pub use hypervisor::{
    Direction, DomId, GrantCopy, Gref, Hypervisor, PAGE_BYTES, Port, Refusal, Region,
};
