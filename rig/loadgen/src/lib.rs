//! What bare PV guests with disks are made of: options, xenstore by question and answer, the
//! frontend's side of a disk step by step, and load with content that proves itself.
//!
//! The load generator is these parts in the order that a well-behaved frontend has; the hostile
//! guest takes them in any order. Everything a backend says is checked, but a refusal is a result
//! here and not a fault: these guests exist to see what a backend does.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod front;
pub mod guest;
mod lane;
pub mod latency;
pub mod load;
pub mod options;
pub mod play;
pub mod pool;
pub mod random;
pub mod report;
pub mod stamp;
pub mod xs;

pub use guest::Guest;
