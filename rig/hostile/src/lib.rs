//! Attacks of a guest on the backend of its disks, each by name, bounded in time.
//!
//! What is attacked: ring indexes, requests and the pages they name, and what xenstore says of
//! the frontend. An attack may end in refusals, in a closed disk, or in nothing at all; it must
//! never end in a backend that does not serve its disk afterwards, that keeps pages of ours, or
//! that did what no frontend may ask for. The last of these is counted as `served`.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod fields;
mod grants;
mod ground;
mod nodes;
mod races;
mod rings;
pub mod share;

pub use ground::{Ground, Tally};

use alloc::string::{String, ToString};

use platter_loadgen::Guest;

/// All attacks, in the order in which they are made.
pub const ATTACKS: [&str; 18] = [
    "indexes",
    "early-index",
    "fields",
    "read-only",
    "bogus-grefs",
    "foreign-grefs",
    "revoked-grefs",
    "own-ring",
    "race-slots",
    "race-indirect",
    "race-indexes",
    "event-flood",
    "nonsense-nodes",
    "node-storm",
    "hidden-nodes",
    "state-flap",
    "churn",
    "close-in-flight",
];

/// Makes one attack.
///
/// # Errors
/// What the backend did that no guest may make it do, or the attack's unknown name.
pub fn attack<G: Guest>(ground: &mut Ground<'_, G>, name: &str) -> Result<Tally, String> {
    match name {
        "indexes" => rings::indexes(ground),
        "early-index" => rings::early_index(ground),
        "fields" => fields::fields(ground),
        "read-only" => fields::read_only(ground),
        "bogus-grefs" => grants::bogus(ground),
        "foreign-grefs" => grants::foreign(ground),
        "revoked-grefs" => grants::revoked(ground),
        "own-ring" => grants::own_ring(ground),
        "race-slots" => races::slots(ground),
        "race-indirect" => races::indirect(ground),
        "race-indexes" => races::indexes(ground),
        "event-flood" => rings::event_flood(ground),
        "nonsense-nodes" => nodes::nonsense(ground),
        "node-storm" => nodes::storm(ground),
        "hidden-nodes" => nodes::hidden(ground),
        "state-flap" => nodes::flap(ground),
        "churn" => nodes::churn(ground),
        "close-in-flight" => rings::close_in_flight(ground),
        _ => Err("no attack of this name".to_string()),
    }
}
