//! Private memory for data on its way between a ring and a file, used again and again.
//!
//! Guards that serving allocates nothing once it is warm, and that what is kept is bounded.
//! Starts at a page's edge, as O_DIRECT wants it.

use platter_xen::PAGE_BYTES;

/// Bytes that a pool keeps for later.
pub const POOL_BYTES_MAX: usize = 4 << 20;
/// Buffers that a pool keeps for later.
const POOL_BUFFERS_MAX: usize = 64;

/// Page-aligned bytes.
pub struct Buffer {
    bytes: Vec<u8>,
    start: usize,
}

impl Buffer {
    fn new(len: usize) -> Buffer {
        let bytes = vec![0; len.next_multiple_of(PAGE_BYTES) + PAGE_BYTES];
        let start = bytes.as_ptr().align_offset(PAGE_BYTES);
        Buffer { bytes, start }
    }

    fn capacity(&self) -> usize {
        self.bytes.len() - PAGE_BYTES
    }

    pub fn slice(&self, len: usize) -> &[u8] {
        &self.bytes[self.start..self.start + len]
    }

    pub fn slice_mut(&mut self, len: usize) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + len]
    }
}

/// Buffers that wait for use.
#[derive(Default)]
pub struct Pool {
    buffers: Vec<Buffer>,
    bytes: usize,
}

impl Pool {
    /// A buffer of at least `len` bytes, with whatever was in it before.
    pub fn take(&mut self, len: usize) -> Buffer {
        // The one given back last is the one that the processor's cache still has.
        match self.buffers.iter().rposition(|buffer| buffer.capacity() >= len) {
            Some(index) => {
                let buffer = self.buffers.remove(index);
                self.bytes -= buffer.capacity();
                buffer
            }
            None => Buffer::new(len),
        }
    }

    pub fn give(&mut self, buffer: Buffer) {
        let bytes = self.bytes + buffer.capacity();
        if bytes <= POOL_BYTES_MAX && self.buffers.len() < POOL_BUFFERS_MAX {
            self.bytes = bytes;
            self.buffers.push(buffer);
        }
    }
}

/// Would miss: how often a pool is of use; the bench shows that.
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_used_again_and_bounded() {
        let mut pool = Pool::default();
        let mut buffer = pool.take(5000);
        assert_eq!(buffer.slice(5000).as_ptr() as usize % PAGE_BYTES, 0);
        buffer.slice_mut(5000)[4999] = 7;
        pool.give(buffer);
        assert_eq!(pool.take(8192).slice(5000)[4999], 7, "the same memory");
        for _ in 0..100 {
            pool.give(Buffer::new(1 << 20));
        }
        assert_eq!((pool.buffers.len(), pool.bytes), (4, 4 << 20));
    }
}
