//! Where image bytes live: files on a 9p share, disks, partitions, volumes, files on ext4.
//!
//! Knows nothing of guests, formats or clusters; [`store::Store`] is the whole of what the
//! kernel sees.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
// What the tests share with the simulator names this crate from outside.
#[cfg(test)]
extern crate self as platter_storage;
#[cfg(test)]
extern crate std;

pub mod any;
#[cfg(test)]
#[path = "../../sim/src/blkback_model.rs"]
#[allow(dead_code, reason = "the simulator calls more of it")]
mod blkback_model;
pub mod blkfront;
pub mod block_store;
pub mod bytes;
pub mod disk;
pub mod ext4;
#[cfg(test)]
#[path = "../../sim/src/extents.rs"]
mod extents;
#[cfg(test)]
#[path = "../../xen/src/fake.rs"]
mod fake;
#[cfg(test)]
mod harness;
pub mod lvm;
pub mod meta;
pub mod ninep;
pub mod nvme;
#[cfg(test)]
#[path = "../../sim/src/nvme_model.rs"]
#[allow(dead_code, reason = "the simulator calls more of it")]
mod nvme_model;
pub mod partition;
pub mod pcifront;
pub mod pool;
pub mod resolve;
mod scan;
pub mod store;
#[cfg(test)]
mod vectors;
pub mod volume;

pub use store::{
    Access, Answer, Done, FileId, Opened, Run, Store, StoreFault, Submit, Tag, Window,
};
