//! What an NVMe controller and pciback answer: anything.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| platter_fuzz::nvme::nvme(bytes));
