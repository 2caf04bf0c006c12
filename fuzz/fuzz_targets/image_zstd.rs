//! The zstd decoder of qcow2, on any stream.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| platter_fuzz::zstd::zstd(bytes));
