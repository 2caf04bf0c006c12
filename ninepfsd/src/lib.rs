//! The parts of `platter-9pfsd`, a 9p server for Xen's 9pfs: a library so that its bench and the
//! fuzzer can play the frontend.
//!
//! A request's way: [`device`] is woken by Xen, [`serving`] takes it from a [`ring`], [`session`]
//! says what it means, and the file is read or written at once ([`open`]) or by [`workers`].
//! [`backends`] decides which frontends there are, by [`xenstore`].

pub mod attach;
pub mod backends;
mod bell;
mod buffer;
pub mod device;
pub mod frontend;
mod job;
mod locks;
pub mod log;
pub mod more;
mod open;
pub mod os;
pub mod ring;
pub mod sandbox;
pub mod serving;
pub mod session;
pub mod share;
mod usage;
pub mod workers;
pub mod xenstore;
