//! LVM2 texts, ext4 structures and NVMe pages of any bytes, without their checksums.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| platter_fuzz::disks::structures(bytes));
