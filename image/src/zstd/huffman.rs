//! Huffman codes of literals (RFC 8878, 4.2).
//!
//! Most time of unpacking is spent here. Four streams are decoded side by side, since within one
//! each symbol waits for the length of the one before; each has the next bits of its own in a
//! word that is filled again after five symbols. It must never write but its own literals, nor
//! take a stream that does not end exactly with them.

use alloc::boxed::Box;

use super::LiteralsHead;
use super::bits::{Backward, word};
use super::fse::{self, Table};

/// Longest code (4.2.1).
const BITS_MAX: u32 = 11;
/// Symbols of the longest code that a word has for certain: of its 64 bits the lowest is a mark,
/// and up to seven are those of a byte begun before.
const SYMBOLS_A_WORD: usize = 5;

/// For each eleven bits that may come next: the symbol, and in the low byte the bits of its code.
type Codes = [u16; 1 << BITS_MAX];

pub(super) struct Huffman {
    codes: Box<Codes>,
    pub is_set: bool,
    weights: Table<64>,
}

impl Huffman {
    pub fn new() -> Huffman {
        let codes = Box::new([0; 1 << BITS_MAX]);
        Huffman { codes, is_set: false, weights: Table::new(&fse::WEIGHTS) }
    }

    /// Reads a tree description (4.2.1); gives its bytes.
    fn read(&mut self, input: &[u8]) -> Option<usize> {
        let head = usize::from(*input.first()?);
        let mut weights = [0u8; 256];
        let (count, len) = if head < 128 {
            let packed = input.get(1..1 + head)?;
            (self.read_weights(packed, &mut weights)?, 1 + head)
        } else {
            let count = head - 127;
            let packed = input.get(1..1 + count.div_ceil(2))?;
            for (n, weight) in weights[..count].iter_mut().enumerate() {
                *weight = packed[n / 2] >> (4 * (1 - n % 2)) & 0xf;
            }
            (count, 1 + count.div_ceil(2))
        };
        self.build(&mut weights, count)?;
        Some(len)
    }

    /// Weights packed by two states in turn (4.2.1.2).
    fn read_weights(&mut self, packed: &[u8], weights: &mut [u8; 256]) -> Option<usize> {
        let table = &mut self.weights;
        let start = table.read(packed)?;
        let mut bits = Backward::new(packed.get(start..)?)?;
        let mut states = [bits.take(table.log), bits.take(table.log)];
        let mut count = 0;
        loop {
            bits.refill();
            let turn = count % 2;
            let state = table.state(states[turn]);
            *weights[..255].get_mut(count)? = state.value() as u8;
            count += 1;
            states[turn] = state.next(bits.take(state.bits()));
            if bits.left < 0 {
                *weights[..255].get_mut(count)? = table.state(states[1 - turn]).value() as u8;
                return Some(count + 1);
            }
        }
    }

    /// The last weight follows from the others (4.2.1), and the codes from all.
    fn build(&mut self, weights: &mut [u8; 256], count: usize) -> Option<()> {
        self.is_set = false;
        let mut symbols = [0usize; 1 + BITS_MAX as usize];
        let mut sum = 0u32;
        for &weight in &weights[..count] {
            *symbols.get_mut(usize::from(weight))? += 1;
            sum += (1 << weight) >> 1;
        }
        let bits = sum.checked_ilog2()? + 1;
        let rest = (1 << bits) - sum;
        if bits > BITS_MAX || !rest.is_power_of_two() {
            return None;
        }
        let last = rest.ilog2() as u8 + 1;
        *weights.get_mut(count)? = last;
        symbols[usize::from(last)] += 1;
        // Codes of one weight stand together, the lightest first. A code of `bits` fills one
        // place in a table for that many, and all it leads to in ours.
        let spread = BITS_MAX - bits;
        let mut starts = [0; 1 + BITS_MAX as usize];
        let mut end = 0;
        for weight in 1..starts.len() {
            starts[weight] = end;
            end += symbols[weight] << (weight - 1) << spread;
        }
        if end != self.codes.len() {
            return None;
        }
        for (symbol, &weight) in weights[..=count].iter().enumerate().filter(|(_, w)| **w > 0) {
            let len = 1 << (weight - 1) << spread;
            let start = &mut starts[usize::from(weight)];
            let code = (symbol as u16) << 8 | (bits + 1 - u32::from(weight)) as u16;
            self.codes.get_mut(*start..*start + len)?.fill(code);
            *start += len;
        }
        self.is_set = true;
        Some(())
    }

    /// The literals of a block (3.1.1.3.1) from their bytes, as many as `into` has room for.
    pub fn literals(&mut self, head: &LiteralsHead, from: &[u8], into: &mut [u8]) -> Option<()> {
        let mut streams = from;
        match head.kind {
            0 => {
                into.copy_from_slice(from);
                return Some(());
            }
            1 => {
                into.fill(*from.first()?);
                return Some(());
            }
            2 => streams = &from[self.read(from)?..],
            _ => {}
        }
        if !self.is_set {
            return None;
        }
        if !head.four_streams {
            return self.decode_rest(Backward::new(streams)?, into);
        }
        // The lengths of three of them (3.1.1.3.1.6).
        let len = |n: usize| Some(usize::from(word(streams.get(n * 2..n * 2 + 2)?, 0) as u16));
        let lens = [len(0)?, len(1)?, len(2)?];
        let (a, rest) = streams.get(6..)?.split_at_checked(lens[0])?;
        let (b, rest) = rest.split_at_checked(lens[1])?;
        let (c, d) = rest.split_at_checked(lens[2])?;
        let piece = into.len().div_ceil(4);
        let (into_a, rest) = into.split_at_mut_checked(piece)?;
        let (into_b, rest) = rest.split_at_mut_checked(piece)?;
        let (into_c, into_d) = rest.split_at_mut_checked(piece)?;
        self.decode_four([a, b, c, d], [into_a, into_b, into_c, into_d])
    }

    /// One stream, or what is left of it, to its end exactly.
    fn decode_rest(&self, mut bits: Backward, into: &mut [u8]) -> Option<()> {
        for piece in into.chunks_mut(SYMBOLS_A_WORD) {
            bits.refill();
            for byte in piece {
                let code = self.codes[bits.peek(BITS_MAX) as usize & (self.codes.len() - 1)];
                bits.skip(u32::from(code & 0xff));
                *byte = (code >> 8) as u8;
            }
        }
        (bits.left == 0).then_some(())
    }

    /// Four streams, each to its end exactly.
    fn decode_four(&self, streams: [&[u8]; 4], into: [&mut [u8]; 4]) -> Option<()> {
        let [a, b, c, d] = streams;
        let mut lanes = [Lane::new(a)?, Lane::new(b)?, Lane::new(c)?, Lane::new(d)?];
        let mut into = into;
        loop {
            let words = lanes.iter_mut().map(Lane::begin).min().unwrap_or(0);
            let room = into.iter().map(|into| into.len() / SYMBOLS_A_WORD).min().unwrap_or(0);
            let words = words.min(room);
            if words == 0 {
                break;
            }
            let now = into.each_mut().map(|into| {
                let (now, rest) = core::mem::take(into).split_at_mut(words * SYMBOLS_A_WORD);
                *into = rest;
                now.as_chunks_mut().0
            });
            decode_words(&self.codes, &mut lanes, now)?;
        }
        for (lane, into) in lanes.iter().zip(into) {
            self.decode_rest(Backward::at(lane.stream, lane.left), into)?;
        }
        Some(())
    }
}

/// One of four streams.
struct Lane<'a> {
    stream: &'a [u8],
    /// Bits left when `begin` was called last.
    left: isize,
    /// Where the eight bytes start that the word was filled with.
    at: usize,
    /// The next bits from the highest on, a 1, and as many zeros as bits were taken since.
    word: u64,
}

impl<'a> Lane<'a> {
    fn new(stream: &'a [u8]) -> Option<Lane<'a>> {
        let mark = stream.last()?.checked_ilog2()?;
        let left = (stream.len() as isize - 1) * 8 + mark as isize;
        Some(Lane { stream, left, at: 0, word: 0 })
    }

    /// Words' worth of symbols that can be taken for certain without looking for the end.
    fn begin(&mut self) -> usize {
        if self.word != 0 {
            self.left = self.at as isize * 8 + 64 - self.word.trailing_zeros() as isize;
        }
        let start = usize::try_from(((self.left + 7) >> 3) - 8);
        let Some((at, eight)) = start.ok().and_then(|at| Some((at, self.eight(at)?))) else {
            self.word = 0;
            return 0;
        };
        self.at = at;
        self.word = (eight | 1) << (self.left.wrapping_neg() & 7);
        // Each fill goes back by seven bytes at most: 55 bits, and seven of a byte begun before.
        at / 7
    }

    #[inline(always)]
    fn eight(&self, at: usize) -> Option<u64> {
        self.stream.get(at..)?.first_chunk().map(|eight| u64::from_le_bytes(*eight))
    }

    #[inline(always)]
    fn symbol(&mut self, codes: &Codes) -> u8 {
        let code = codes[(self.word >> (64 - BITS_MAX)) as usize];
        self.word <<= code & 63;
        (code >> 8) as u8
    }

    #[inline(always)]
    fn fill(&mut self) -> Option<()> {
        let taken = self.word.trailing_zeros();
        self.at = self.at.wrapping_sub(taken as usize / 8);
        self.word = (self.eight(self.at)? | 1) << (taken & 7);
        Some(())
    }
}

fn decode_words(
    codes: &Codes,
    lanes: &mut [Lane; 4],
    into: [&mut [[u8; SYMBOLS_A_WORD]]; 4],
) -> Option<()> {
    let [a, b, c, d] = lanes;
    let [into_a, into_b, into_c, into_d] = into;
    for (((to_a, to_b), to_c), to_d) in into_a.iter_mut().zip(into_b).zip(into_c).zip(into_d) {
        for n in 0..SYMBOLS_A_WORD {
            to_a[n] = a.symbol(codes);
            to_b[n] = b.symbol(codes);
            to_c[n] = c.symbol(codes);
            to_d[n] = d.symbol(codes);
        }
        a.fill()?;
        b.fill()?;
        c.fill()?;
        d.fill()?;
    }
    Some(())
}
