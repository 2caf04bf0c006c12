//! The linker arguments of the probe kernel.

include!("../linker/bare.rs");

fn main() {
    bare_kernel("probe");
}
