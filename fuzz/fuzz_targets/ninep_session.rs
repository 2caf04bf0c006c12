//! A whole session of platter-9pfsd with a frontend that does anything.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| platter_fuzz::ninep::session(bytes));
