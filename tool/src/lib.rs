//! The image engine on ordinary files: the synchronous driver that runs the planners, and what
//! the `platter` command is made of. It holds no parser of its own.
#![forbid(unsafe_code)]

pub mod buffer;
pub mod cli;
pub mod create;
pub mod engine;
mod fault;
pub mod flight;
pub mod flow;
mod lock;
mod made;
pub mod medium;
mod pool;
mod writeback;

pub use fault::{Cause, Fault};
