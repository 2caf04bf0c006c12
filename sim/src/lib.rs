//! A deterministic world for platter on the host: machine, xenstore, toolstack, 9p server and
//! guests in software, so that kernel, xen, storage and image run unchanged under one seed.
//!
//! Nothing here uses the real time, a thread, the system's randomness or the order of a hash
//! table: a failure is a seed, and the seed is the failure.
#![forbid(unsafe_code)]

pub mod blkback_model;
pub mod disks;
mod extents;
pub mod files;
pub mod guest;
pub mod hostile;
pub mod images;
pub mod machine;
pub mod ninep;
pub mod nvme_model;
pub mod oracle;
pub mod rng;
pub mod swarm;
pub mod toolstack;
pub mod world;
pub mod xenstore;
