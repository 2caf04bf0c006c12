//! A 9p share as a store: 9P2000.L over Xen's 9pfs transport.
//!
//! [`message`] is the wire format, both directions; [`client`] the [`crate::Store`];
//! [`mount`] the xenstore handshake that brings a share up, notices that its server died, and
//! takes it up again.

pub mod client;
mod file;
mod holes;
pub mod message;
pub mod mount;
mod session;
mod stall;
#[cfg(test)]
mod testing;

pub use client::Client;
pub use mount::{BackNodes, Mount, MountFault, MountStep};
pub use session::Session;
