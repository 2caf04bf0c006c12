//! Where image bytes live: files on a 9p share, disks, partitions, volumes, files on ext4.
//!
//! Knows nothing of guests, formats or clusters; [`store::Store`] is the whole of what the
//! kernel sees.
#![no_std]
#![forbid(unsafe_code)]

pub mod store;

pub use store::{
    Access, Answer, Done, FileId, Opened, Run, Store, StoreFault, Submit, Tag, Window,
};
