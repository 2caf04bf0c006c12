//! The machine under platter: a Xen PV guest with one virtual processor. The only crate with
//! unsafe code, and every unsafe line of the project is here.
//!
//! It offers [`Machine`], which implements the [`Hypervisor`](platter_xen::Hypervisor) and
//! [`Bus`](platter_xen::Bus) seams, a heap with counters, a console behind the `log` crate, and
//! an end with a report for every panic and exception. It knows no blkif, no image and no 9p,
//! and never hands out a reference into a page that another domain can write.
//!
//! # A kernel on it
//! ```ignore
//! #![no_std]
//! #![no_main]
//! #![forbid(unsafe_code)]
//! platter_arch::entry!(main);
//! fn main(mut machine: Machine, boot: BootInfo) -> ! { ... }
//! ```
//! Its package needs on the `[[bin]]` `test = false` and `required-features = ["bare"]`, with
//! `bare = ["dep:platter-arch"]`, and a build script of two lines that gives the linker arguments
//! (see `linker/bare.rs`); the Makefile's `bare_kernel` builds it. The feature is only a gate:
//! built together with host programs, which cargo does for a whole workspace, shared crates get
//! their `std` features, and a kernel cannot link those. No RUSTFLAGS are needed; the Makefile
//! adds frame pointers, so that crash reports have a trace.
//!
//! # Processor features
//! SSE2 as the target has it. AVX stays off: a PV guest starts with CR4.OSXSAVE = 0 while CPUID
//! reports it, so code that probes for AVX (XGETBV) dies of an invalid opcode; take no crate
//! that does.
#![cfg_attr(not(test), no_std)]
// Under test the entry is left out: the test program has its own. Then much has no caller.
#![cfg_attr(test, allow(dead_code))]

extern crate alloc;

mod console;
mod copy;
#[cfg(not(test))]
mod crash;
mod events;
mod grants;
mod heap;
mod hypercall;
mod layout;
mod machine;
mod mmio;
mod paging;
mod runs;
mod shared;
#[cfg(not(test))]
mod start;
#[cfg(not(test))]
mod trap;

#[cfg(not(test))]
#[doc(hidden)]
pub use crash::panic;
pub use heap::{HeapStats, heap_stats};
pub use machine::{BootInfo, Machine, Shutdown};
pub use shared::now_ns;

/// Names the main function of a kernel, `fn(Machine, BootInfo) -> !`, and makes its panic handler,
/// which ends in a crash report. Console lines begin with the name of the binary.
#[macro_export]
macro_rules! entry {
    ($main:path) => {
        #[unsafe(no_mangle)]
        static PLATTER_NAME: &str = env!("CARGO_BIN_NAME");

        #[unsafe(no_mangle)]
        fn platter_main(machine: $crate::Machine, boot: $crate::BootInfo) -> ! {
            let main: fn($crate::Machine, $crate::BootInfo) -> ! = $main;
            main(machine, boot)
        }

        #[panic_handler]
        fn platter_panic(info: &core::panic::PanicInfo) -> ! {
            $crate::panic(info)
        }
    };
}
