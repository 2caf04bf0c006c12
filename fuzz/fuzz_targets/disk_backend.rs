//! What a blkfront's backend writes in xenstore and on the ring: anything.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| platter_fuzz::disks::backend(bytes));
