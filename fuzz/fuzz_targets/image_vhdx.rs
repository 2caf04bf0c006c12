//! vhdx: open, read, write, flush, check, on any fields behind checksums that hold.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| platter_fuzz::vhdx::vhdx(bytes));
