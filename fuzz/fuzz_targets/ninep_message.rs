//! 9p messages of both directions, an interface page and a frontend's nodes, of any bytes.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| platter_fuzz::ninep::message(bytes));
