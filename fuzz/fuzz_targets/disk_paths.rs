//! Partition tables, LVM2 and ext4 on disks of any bytes, by every kind of path.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| platter_fuzz::disks::paths(bytes));
