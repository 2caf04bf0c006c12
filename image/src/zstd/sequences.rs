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

/// Sequences decoded before they are carried out: each of the two loops has the processor's
/// registers to itself then, a tenth of the time (so they are not inlined into one either).
const BATCH: usize = 64;

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

    /// Decodes and carries out the sequences, a batch after the other; ends early at a full
    /// output.
    fn decode(
        &mut self,
        count: usize,
        stream: &[u8],
        mut literals: &[u8],
        output: &mut Output,
    ) -> Option<()> {
        let mut bits = Backward::new(stream)?;
        let mut states =
            [bits.take(self.lengths.log), bits.take(self.offsets.log), bits.take(self.matches.log)];
        let mut batch = [Sequence::default(); BATCH];
        let mut left = count;
        while left > 0 {
            let now = left.min(BATCH);
            left -= now;
            self.batch(&mut bits, &mut states, &mut batch[..now], left == 0)?;
            literals = carry_out(&batch[..now], &mut self.recent, literals, output)?;
            if output.room() == 0 {
                return Some(());
            }
        }
        output.push(literals);
        (bits.left == 0).then_some(())
    }

    #[inline(never)]
    fn batch(
        &self,
        bits: &mut Backward,
        states: &mut [u32; 3],
        batch: &mut [Sequence],
        is_last: bool,
    ) -> Option<()> {
        let (lengths, offsets, matches) = (&self.lengths, &self.offsets, &self.matches);
        let [mut length, mut offset, mut matched] = *states;
        let mut last = 0;
        for sequence in batch {
            let l = lengths.state(length);
            let o = offsets.state(offset);
            let m = matches.state(matched);
            bits.refill();
            sequence.offset = o.value().wrapping_add(bits.read(o.extra()));
            sequence.matched = m.value().wrapping_add(bits.read(m.extra()));
            let extra = o.extra() + m.extra() + l.extra();
            last = l.bits() + m.bits() + o.bits();
            if extra > BITS_A_REFILL - STATE_BITS_MAX {
                bits.count(o.extra() + m.extra());
                bits.refill();
                sequence.literals = l.value().wrapping_add(bits.read(l.extra()));
                bits.count(l.extra() + last);
            } else {
                sequence.literals = l.value().wrapping_add(bits.read(l.extra()));
                bits.count(extra + last);
            }
            length = l.next(bits.read(l.bits()));
            matched = m.next(bits.read(m.bits()));
            offset = o.next(bits.read(o.bits()));
        }
        *states = [length, offset, matched];
        if is_last {
            // No state follows the last sequence.
            bits.left += last as isize;
        }
        (bits.left >= 0).then_some(())
    }
}

#[derive(Clone, Copy, Default)]
struct Sequence {
    literals: u32,
    matched: u32,
    /// Not yet what it means (3.1.1.5).
    offset: u32,
}

/// Gives the literals that are left.
#[inline(never)]
fn carry_out<'a>(
    batch: &[Sequence],
    recent: &mut [usize; 3],
    literals: &'a [u8],
    output: &mut Output,
) -> Option<&'a [u8]> {
    let mut offsets = *recent;
    let mut used = 0;
    for sequence in batch {
        let (count, again) = (sequence.literals as usize, sequence.matched as usize);
        let offset = distance(&mut offsets, sequence.offset as usize, count == 0)?;
        let start = used;
        used += count;
        let len = output.len;
        let middle = len + count;
        let end = middle + again;
        if let Some(source) = literals.get(start..used + STEP)
            && let Some(bytes) = output.bytes.get_mut(..end + 2 * STEP)
            && (1..=middle).contains(&offset)
        {
            bytes[len..len + STEP].copy_from_slice(&source[..STEP]);
            if count > STEP {
                bytes[len + STEP..middle].copy_from_slice(&source[STEP..count]);
            }
            let mut from = middle - offset;
            bytes.copy_within(from..from + STEP, middle);
            let mut at = middle + STEP;
            if offset < STEP {
                // Twice as much of what repeats at once, until that makes a step.
                let mut back = 2 * offset;
                while back < STEP {
                    bytes.copy_within(from..from + STEP, from + back);
                    back *= 2;
                }
                at = from + back;
            } else {
                from += STEP;
            }
            while at < end {
                bytes.copy_within(from..from + STEP, at);
                (from, at) = (from + STEP, at + STEP);
            }
            output.len = end;
        } else {
            output.push(literals.get(start..used)?);
            output.repeat(offset, again)?;
            if output.room() == 0 {
                return Some(&[]);
            }
        }
    }
    *recent = offsets;
    literals.get(used..)
}

/// What an offset value means (3.1.1.5), and the last three offsets after it.
#[inline(always)]
fn distance(recent: &mut [usize; 3], value: usize, no_literals: bool) -> Option<usize> {
    let [a, b, c] = *recent;
    let distance;
    (distance, *recent) = match (value, no_literals) {
        (4.., _) => (value - 3, [value - 3, a, b]),
        (1, false) => (a, [a, b, c]),
        (1, true) | (2, false) => (b, [b, a, c]),
        (2, true) | (3, false) => (c, [c, a, b]),
        _ => (a.checked_sub(1)?, [a.checked_sub(1)?, a, b]),
    };
    Some(distance)
}
