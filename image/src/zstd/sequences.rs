//! Sequences (RFC 8878, 3.1.1.3.2): so many literals, then so many bytes again that came out
//! before.
//!
//! Short copies are made sixteen bytes at a time where there is room to write beyond their end;
//! what is written too much there comes out again later, or lies past the end of what came out.
//! It must never write beyond the output, nor repeat what did not come out of this frame.

use super::bits::Backward;
use super::fse::{self, Table};

/// Bytes of one step of a copy.
const STEP: usize = 16;
/// Bits that are there after a refill (see `Backward`), and bits that the next states take at
/// most.
const BITS_A_REFILL: u32 = 57;
const STATE_BITS_MAX: u32 = 9 + 9 + 8;

/// What is being written to.
pub(super) struct Output<'a> {
    bytes: &'a mut [u8],
    len: usize,
}

impl<'a> Output<'a> {
    pub fn new(bytes: &'a mut [u8]) -> Output<'a> {
        Output { bytes, len: 0 }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn room(&self) -> usize {
        self.bytes.len() - self.len
    }

    /// So many bytes that the caller fills.
    pub fn take(&mut self, count: usize) -> &mut [u8] {
        let start = self.len;
        self.len += count;
        &mut self.bytes[start..self.len]
    }

    /// As much as there is room for.
    pub fn push(&mut self, from: &[u8]) {
        let count = from.len().min(self.room());
        self.take(count).copy_from_slice(&from[..count]);
    }

    pub fn fill(&mut self, byte: u8, count: usize) {
        let count = count.min(self.room());
        self.take(count).fill(byte);
    }

    /// Repeats what came out `offset` bytes ago.
    fn repeat(&mut self, offset: usize, count: usize) -> Option<()> {
        let mut from = self.len.checked_sub(offset).filter(|_| offset > 0)?;
        let mut left = count.min(self.room());
        while left > 0 {
            let piece = left.min(self.len - from);
            self.bytes.copy_within(from..from + piece, self.len);
            (from, self.len, left) = (from + piece, self.len + piece, left - piece);
        }
        Some(())
    }

    /// `push` of bytes `at` on and `repeat` in steps; false if there is no room for that.
    #[inline(always)]
    fn push_and_repeat(
        &mut self,
        literals: &[u8],
        (at, count): (usize, usize),
        (offset, again): (usize, usize),
    ) -> bool {
        let len = self.len;
        let middle = len + count;
        let end = middle + again;
        let inside = at + count + STEP <= literals.len() && end + STEP <= self.bytes.len();
        if !inside || offset < STEP || offset > middle {
            return false;
        }
        let mut done = 0;
        loop {
            let step: &[u8; STEP] = literals[at + done..].first_chunk().expect("there is room");
            *self.bytes[len + done..].first_chunk_mut().expect("there is room") = *step;
            done += STEP;
            if done >= count {
                break;
            }
        }
        let from = middle - offset;
        let mut done = 0;
        loop {
            let step: [u8; STEP] = *self.bytes[from + done..].first_chunk().expect("before it");
            *self.bytes[middle + done..].first_chunk_mut().expect("there is room") = step;
            done += STEP;
            if done >= again {
                break;
            }
        }
        self.len = end;
        true
    }
}

/// The tables of sequences, and the last three offsets.
pub(super) struct Sequences {
    lengths: Table<512>,
    matches: Table<512>,
    offsets: Table<256>,
    recent: [usize; 3],
}

impl Sequences {
    pub fn new() -> Sequences {
        Sequences {
            lengths: Table::new(&fse::LITERALS),
            matches: Table::new(&fse::MATCHES),
            offsets: Table::new(&fse::OFFSETS),
            recent: [1, 4, 8],
        }
    }

    /// A frame begins: nothing is left of the one before.
    pub fn begin(&mut self) {
        self.lengths.unset();
        self.matches.unset();
        self.offsets.unset();
        self.recent = [1, 4, 8];
    }

    /// A block's sequences from their head on (3.1.1.3.2.1), of which there are some.
    pub fn run(&mut self, section: &[u8], literals: &[u8], output: &mut Output) -> Option<()> {
        let (count, at) = match *section.first()? {
            short @ ..128 => (usize::from(short), 1),
            255 => {
                let more = usize::from(*section.get(1)?) + (usize::from(*section.get(2)?) << 8);
                (more + 0x7f00, 3)
            }
            long => (((usize::from(long) - 128) << 8) + usize::from(*section.get(1)?), 2),
        };
        let modes = *section.get(at)?;
        let mut rest = &section[at + 1..];
        if modes & 3 != 0 {
            return None;
        }
        rest = self.lengths.choose(modes >> 6, rest, fse::LITERALS_DEFAULT)?;
        rest = self.offsets.choose(modes >> 4 & 3, rest, fse::OFFSETS_DEFAULT)?;
        rest = self.matches.choose(modes >> 2 & 3, rest, fse::MATCHES_DEFAULT)?;
        self.decode(count, rest, literals, output)
    }

    /// Decodes and carries out the sequences; ends early at a full output.
    fn decode(
        &mut self,
        count: usize,
        stream: &[u8],
        literals: &[u8],
        output: &mut Output,
    ) -> Option<()> {
        let mut bits = Backward::new(stream)?;
        let mut length = bits.take(self.lengths.log);
        let mut offset = bits.take(self.offsets.log);
        let mut matched = bits.take(self.matches.log);
        let mut used = 0;
        for n in 0..count {
            let l = self.lengths.state(length);
            let o = self.offsets.state(offset);
            let m = self.matches.state(matched);
            bits.refill();
            let value = o.value as usize + bits.take(o.extra.into()) as usize;
            let again = (m.value + bits.take(m.extra.into())) as usize;
            let taken = u32::from(o.extra) + u32::from(m.extra) + u32::from(l.extra);
            if taken > BITS_A_REFILL - STATE_BITS_MAX {
                bits.refill();
            }
            let now = (l.value + bits.take(l.extra.into())) as usize;
            let distance = self.offset(value, now == 0)?;
            if !output.push_and_repeat(literals, (used, now), (distance, again)) {
                output.push(literals.get(used..used + now)?);
                output.repeat(distance, again)?;
                if output.room() == 0 {
                    return Some(());
                }
            }
            used += now;
            if n + 1 < count {
                length = l.next(bits.take(l.bits.into()));
                matched = m.next(bits.take(m.bits.into()));
                offset = o.next(bits.take(o.bits.into()));
            }
            if bits.left < 0 {
                return None;
            }
        }
        output.push(&literals[used..]);
        (bits.left == 0).then_some(())
    }

    /// What an offset value means (3.1.1.5).
    #[inline(always)]
    fn offset(&mut self, value: usize, no_literals: bool) -> Option<usize> {
        let [a, b, c] = self.recent;
        let (offset, recent) = match (value, no_literals) {
            (4.., _) => (value - 3, [value - 3, a, b]),
            (1, false) => (a, [a, b, c]),
            (1, true) | (2, false) => (b, [b, a, c]),
            (2, true) | (3, false) => (c, [c, a, b]),
            _ => (a.checked_sub(1)?, [a.checked_sub(1)?, a, b]),
        };
        self.recent = recent;
        Some(offset)
    }
}
