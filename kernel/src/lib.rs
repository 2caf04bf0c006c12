//! The server: from a guest's ring to an image on a store, and back.
//!
//! Runs anywhere: the machine is a [`platter_xen::Hypervisor`], time an argument. It never reads
//! a byte of a ring page, an image or a 9p message itself, never waits, and allocates nothing
//! on the request path.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

mod answer;
pub mod config;
mod control;
mod device;
mod disk;
mod engine;
mod fault;
mod flush;
mod fronts;
mod job;
pub mod limits;
mod opening;
mod plan;
mod request;
mod server;
mod stats;
mod stores;
mod table;
mod throttle;
mod train;
mod transfer;
mod xs;

pub use control::Ending;
pub use server::{Census, Server, Setup, Turn};
