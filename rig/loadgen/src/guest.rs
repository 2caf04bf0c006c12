//! What a guest needs of its machine beyond what platter itself needs: time and sleep.

use platter_xen::{Hypervisor, Port};

/// Nanoseconds in a second and in a millisecond.
pub const SECOND_NS: u64 = 1_000_000_000;
pub const MS_NS: u64 = 1_000_000;

/// A machine that one guest has for itself.
pub trait Guest: Hypervisor {
    /// System time in ns.
    fn now_ns(&self) -> u64;
    /// Sleeps until one of `ports` is pending, or until then; may return early.
    fn sleep_until(&mut self, ports: &[Port], until_ns: u64);
}

#[cfg(feature = "bare")]
impl Guest for platter_arch::Machine {
    fn now_ns(&self) -> u64 {
        platter_arch::now_ns()
    }

    fn sleep_until(&mut self, ports: &[Port], until_ns: u64) {
        self.poll(ports, until_ns);
    }
}
