//! The linker arguments of the load generator.

include!("../../linker/bare.rs");

fn main() {
    bare_kernel("loadgen");
}
