//! qcow2: open, read, write, flush, check, on any bytes.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| platter_fuzz::image("qcow2", bytes));
