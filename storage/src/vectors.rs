//! Test images made by foreign tools, kept without their zero sectors (`vectors/sparse.py`).

use alloc::vec::Vec;

/// The image of `bytes` length: entries of a sector number and 512 bytes.
pub fn expand(sparse: &[u8], bytes: usize) -> Vec<u8> {
    let mut image = alloc::vec![0; bytes];
    for entry in sparse.chunks_exact(520) {
        let number = u64::from_le_bytes(entry[..8].try_into().unwrap()) as usize;
        image[number * 512..][..512].copy_from_slice(&entry[8..]);
    }
    image
}
