//! Bits as Zstandard lays them out: forward for descriptions of tables, backward for everything
//! else.
//!
//! Past the end there are zeros and a count that shows it: whoever takes bits looks at that count
//! before it believes what they led to. It must never panic, whatever is asked of a stream.

/// Bits from the least significant one of the first byte on.
pub(super) struct Forward<'a> {
    pub bytes: &'a [u8],
    /// Bits taken.
    pub at: usize,
}

impl Forward<'_> {
    /// At most 16 bits.
    pub fn take(&mut self, count: u32) -> Option<u32> {
        let end = self.at + count as usize;
        if end > self.bytes.len() * 8 {
            return None;
        }
        let value = word(self.bytes, self.at / 8) >> (self.at % 8);
        self.at = end;
        Some(value as u32 & ((1 << count) - 1))
    }
}

/// Bits from the end of a stream back: its last byte ends in a 1 that is no part of it.
pub(super) struct Backward<'a> {
    bytes: &'a [u8],
    /// The next bits, from the highest on; [`Backward::refill`] makes it 57 or more, or all.
    word: u64,
    /// Bits left; below 0 when more were taken than there were.
    pub left: isize,
}

impl<'a> Backward<'a> {
    pub fn new(bytes: &'a [u8]) -> Option<Backward<'a>> {
        let mark = bytes.last()?.checked_ilog2()?;
        let left = (bytes.len() as isize - 1) * 8 + mark as isize;
        Some(Backward::at(bytes, left))
    }

    /// Where `left` bits of the stream are left.
    pub fn at(bytes: &'a [u8], left: isize) -> Backward<'a> {
        let mut bits = Backward { bytes, word: 0, left };
        bits.refill();
        bits
    }

    #[inline(always)]
    pub fn refill(&mut self) {
        // The eight bytes that end with the byte of the next bit.
        let start = ((self.left + 7) >> 3) - 8;
        let eight = usize::try_from(start).ok().and_then(|at| self.bytes.get(at..)?.first_chunk());
        self.word = match eight {
            Some(eight) => u64::from_le_bytes(*eight) << (self.left.wrapping_neg() & 7),
            None if self.left > 0 => word(self.bytes, 0) << (64 - self.left as u64),
            None => 0,
        };
    }

    /// Looks at up to 32 bits; zeros where there are none left.
    #[inline(always)]
    pub fn peek(&self, count: u32) -> u32 {
        // Two shifts, for none at all is a count too.
        ((self.word >> 1) >> (!count & 63)) as u32
    }

    #[inline(always)]
    pub fn skip(&mut self, count: u32) {
        self.word <<= count & 63;
        self.count(count);
    }

    /// Up to 32 bits, and up to 57 since the last refill.
    #[inline(always)]
    pub fn take(&mut self, count: u32) -> u32 {
        let value = self.read(count);
        self.count(count);
        value
    }

    /// `take` in two halves, for those who take several: bits that are yet to be counted ...
    #[inline(always)]
    pub fn read(&mut self, count: u32) -> u32 {
        let value = self.peek(count);
        self.word <<= count & 63;
        value
    }

    /// ... and their count.
    #[inline(always)]
    pub fn count(&mut self, count: u32) {
        self.left -= count as isize;
    }
}

/// Eight bytes from `at` on, zeros past the end.
pub(super) fn word(bytes: &[u8], at: usize) -> u64 {
    let rest = bytes.get(at..).unwrap_or(&[]);
    if let Some(eight) = rest.first_chunk() {
        return u64::from_le_bytes(*eight);
    }
    rest.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte))
}
