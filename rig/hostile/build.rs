//! The linker arguments of the hostile guest.

include!("../../linker/bare.rs");

fn main() {
    bare_kernel("hostile");
}
