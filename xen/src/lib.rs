//! Xen's PV protocols as platter speaks them: rings, blkif, xenstore, xenbus, 9pfs.
//!
//! Nothing here issues a hypercall or keeps a reference into shared memory: everything goes
//! through [`Hypervisor`], seam 1 of the design.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate self as platter_xen;
#[cfg(test)]
extern crate std;

pub mod blkfront;
pub mod blkif;
pub mod bus;
#[cfg(test)]
#[allow(dead_code, reason = "other crates' tests call more of it")]
mod fake;
pub mod hypervisor;
pub mod ninepfs;
pub mod pciif;
pub mod ring;
pub mod vbd;
pub mod xenbus;
pub mod xenstore;

pub use bus::{Bus, Mmio};
pub use hypervisor::{
    Direction, DomId, GrantCopy, Gref, Hypervisor, PAGE_BYTES, Port, Refusal, Region,
};
