// Linker arguments of a bare kernel, for the build script of its package:
//
//     include!("../linker/bare.rs");
//     fn main() { bare_kernel("platter") }
//
// They go to that binary alone, so the package's library, its tests and every other crate of the
// workspace link as usual, and no RUSTFLAGS are needed.

/// Links binary `name` of this package as a PV kernel, by platter.ld beside this file.
fn bare_kernel(name: &str) {
    // Packages lie in the root or one folder below it.
    let script = [
        concat!(env!("CARGO_MANIFEST_DIR"), "/../linker/platter.ld"),
        concat!(env!("CARGO_MANIFEST_DIR"), "/../../linker/platter.ld"),
    ]
    .into_iter()
    .find(|script| std::path::Path::new(script).exists())
    .expect("linker/platter.ld lies in the root of the checkout");
    // No C start files, no dynamic loader, no relocations left to do at run time.
    for arg in ["-nostartfiles", "-nostdlib", "-static", "-no-pie", &format!("-T{script}")] {
        println!("cargo::rustc-link-arg-bin={name}={arg}");
    }
    println!("cargo::rerun-if-changed={script}");
}
