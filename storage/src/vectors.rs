//! Test images made by foreign tools, kept without their zero sectors (`vectors/sparse.py`).

use alloc::vec::Vec;

/// The image of `bytes` length: entries of a sector number and 512 bytes, or one that fills.
pub fn expand(sparse: &[u8], bytes: usize) -> Vec<u8> {
    let mut image = alloc::vec![0; bytes];
    let mut rest = sparse;
    while let Some((number, after)) = rest.split_at_checked(8) {
        let number = u64::from_le_bytes(number.try_into().unwrap());
        let sector = &mut image[(number << 1 >> 1) as usize * 512..][..512];
        let taken = if number >> 63 == 1 {
            sector.fill(after[0]);
            1
        } else {
            sector.copy_from_slice(&after[..512]);
            512
        };
        rest = &after[taken..];
    }
    image
}
