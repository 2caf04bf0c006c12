//! A guest that means harm.

use crate::machine::Machine;
use crate::toolstack::DiskLine;
use crate::xenstore::Xenstore;

pub struct Hostile {
    pub domain: u16,
    pub line: DiskLine,
    pub stopping: bool,
}

impl Hostile {
    pub fn join(_: &mut crate::world::World, _: &mut crate::rng::Rng) {}

    pub fn run(&mut self, _: &mut Machine, _: &mut Xenstore, _now_ns: u64) -> Option<u64> {
        None
    }

    pub fn check_memory(&self, _: &Machine) {}
}
