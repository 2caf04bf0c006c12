//! The linker arguments of the kernel binary.

include!("../linker/bare.rs");

fn main() {
    bare_kernel("platter");
}
