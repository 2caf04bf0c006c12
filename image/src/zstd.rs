//! Zstandard frames (RFC 8878), unpacked straight into a cluster.
//!
//! Bounds: all memory is taken when the decoder is made and does not depend on the stream; what
//! comes out ends at the cluster's end, whatever a block claims; every loop ends with the input or
//! the output. It must never index by what the stream says without a check: a broken stream is
//! `None`. Dictionaries are refused; checksums are not compared, as for the other codecs.

use alloc::boxed::Box;
use alloc::vec;

/// Longest block (RFC 8878, 3.1.1.2.4), and so longest literals of one.
const BLOCK_BYTES_MAX: usize = 128 << 10;
/// Longest Huffman code (4.2.1).
const HUFFMAN_BITS_MAX: u32 = 11;
/// Largest tables: accuracy logs of literal lengths, match lengths, offsets, weights (3.1.1.3.2.1).
const LENGTH_LOG_MAX: u32 = 9;
const OFFSET_LOG_MAX: u32 = 8;
const WEIGHT_LOG_MAX: u32 = 6;
/// Symbols of any FSE table here: match length codes.
const SYMBOLS_MAX: usize = 53;

/// Base and extra bits of each literal length code from 16 on, and match length code from 32 on.
const LITERALS_FROM_16: [(u32, u8); 20] = [
    (16, 1),
    (18, 1),
    (20, 1),
    (22, 1),
    (24, 2),
    (28, 2),
    (32, 3),
    (40, 3),
    (48, 4),
    (64, 6),
    (128, 7),
    (256, 8),
    (512, 9),
    (1024, 10),
    (2048, 11),
    (4096, 12),
    (8192, 13),
    (16384, 14),
    (32768, 15),
    (65536, 16),
];
const MATCHES_FROM_32: [(u32, u8); 21] = [
    (35, 1),
    (37, 1),
    (39, 1),
    (41, 1),
    (43, 2),
    (47, 2),
    (51, 3),
    (59, 3),
    (67, 4),
    (83, 4),
    (99, 5),
    (131, 7),
    (259, 8),
    (515, 9),
    (1027, 10),
    (2051, 11),
    (4099, 12),
    (8195, 13),
    (16387, 14),
    (32771, 15),
    (65539, 16),
];

/// Default distributions (3.1.1.3.2.2), and their accuracy logs.
const LITERALS_DEFAULT: (&[i16], u32) = (
    &[
        4, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 2, 1, 1, 1,
        1, 1, -1, -1, -1, -1,
    ],
    6,
);
const OFFSETS_DEFAULT: (&[i16], u32) = (
    &[1, 1, 1, 1, 1, 1, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1],
    5,
);
const MATCHES_DEFAULT: (&[i16], u32) = (
    &[
        1, 4, 3, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
        1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1,
    ],
    6,
);

/// Where a state leads: its symbol, and the bits that are added to the base for the next state.
#[derive(Clone, Copy, Default)]
struct State {
    symbol: u8,
    bits: u8,
    base: u16,
}

/// A decoding table of finite state entropy codes (4.1).
struct Table {
    states: Box<[State]>,
    log: u32,
    symbols_max: usize,
    log_max: u32,
    /// There is a table, so that "repeat" means something.
    is_set: bool,
}

impl Table {
    fn new(log_max: u32, symbols_max: usize) -> Table {
        let states = vec![State::default(); 1 << log_max].into_boxed_slice();
        Table { states, log: 0, symbols_max, log_max, is_set: false }
    }

    /// One symbol for ever, without bits.
    fn set_single(&mut self, symbol: u8) -> Option<()> {
        if usize::from(symbol) >= self.symbols_max {
            return None;
        }
        self.states[0] = State { symbol, bits: 0, base: 0 };
        (self.log, self.is_set) = (0, true);
        Some(())
    }

    /// The table of a distribution whose probabilities (-1 for less than one) fill `1 << log`.
    fn set(&mut self, probabilities: &[i16], log: u32) -> Option<()> {
        let size = 1usize << log;
        let mut next = [0u16; SYMBOLS_MAX];
        let mut high = size;
        for (symbol, &probability) in probabilities.iter().enumerate() {
            next[symbol] = probability.unsigned_abs();
            if probability == -1 {
                high = high.checked_sub(1)?;
                self.states[high].symbol = symbol as u8;
            }
        }
        let step = (size >> 1) + (size >> 3) + 3;
        let mut at = 0;
        for (symbol, &probability) in probabilities.iter().enumerate() {
            for _ in 0..probability.max(0) {
                self.states[at].symbol = symbol as u8;
                at = (at + step) & (size - 1);
                while at >= high {
                    at = (at + step) & (size - 1);
                }
            }
        }
        if at != 0 {
            return None;
        }
        for state in &mut self.states[..size] {
            let number = next[usize::from(state.symbol)];
            next[usize::from(state.symbol)] += 1;
            let bits = log - number.checked_ilog2()?;
            state.bits = bits as u8;
            state.base = ((usize::from(number) << bits) - size) as u16;
        }
        (self.log, self.is_set) = (log, true);
        Some(())
    }

    /// Reads a table's description (4.1.1) from the start of `input`; gives its bytes.
    fn read(&mut self, input: &[u8]) -> Option<usize> {
        let mut bits = Forward { bytes: input, at: 0 };
        let log = bits.take(4)? + 5;
        if log > self.log_max {
            return None;
        }
        let mut probabilities = [0i16; SYMBOLS_MAX];
        let (mut left, mut symbol) = (1i32 << log, 0);
        while left > 0 {
            let width = ((left + 1) as u32).ilog2() + 1;
            let value = bits.take(width)?;
            let lower = (1 << (width - 1)) - 1;
            let threshold = (1 << width) - 1 - (left as u32 + 1);
            let value = if value & lower < threshold {
                bits.at -= 1;
                value & lower
            } else if value > lower {
                value - threshold
            } else {
                value
            };
            let probability = value as i32 - 1;
            left -= probability.abs();
            *probabilities[..self.symbols_max].get_mut(symbol)? = probability as i16;
            symbol += 1;
            // After a zero comes how many more there are, three and on while it says three.
            let mut zeros = if probability == 0 { 3 } else { 0 };
            while zeros == 3 {
                zeros = bits.take(2)?;
                symbol += zeros as usize;
            }
        }
        if left != 0 || symbol > self.symbols_max {
            return None;
        }
        self.set(&probabilities[..symbol], log)?;
        Some(bits.at.div_ceil(8))
    }
}

/// Bits from the least significant one of the first byte on.
struct Forward<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Forward<'_> {
    /// At most 16 bits.
    fn take(&mut self, count: u32) -> Option<u32> {
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
struct Backward<'a> {
    bytes: &'a [u8],
    /// Bits left; below 0 when more were taken than there were.
    left: isize,
}

impl<'a> Backward<'a> {
    fn new(bytes: &'a [u8]) -> Option<Backward<'a>> {
        let mark = bytes.last()?.checked_ilog2()?;
        Some(Backward { bytes, left: (bytes.len() as isize - 1) * 8 + mark as isize })
    }

    /// At most 32 bits; zeros where there are none left.
    fn peek(&self, count: u32) -> u32 {
        let from = self.left - count as isize;
        let value = if from >= 0 {
            word(self.bytes, from as usize / 8) >> (from % 8)
        } else if self.left > 0 {
            word(self.bytes, 0) << -from
        } else {
            0
        };
        (value & ((1 << count) - 1)) as u32
    }

    fn take(&mut self, count: u32) -> u32 {
        let value = self.peek(count);
        self.left -= count as isize;
        value
    }
}

/// Eight bytes from `at` on, zeros past the end.
fn word(bytes: &[u8], at: usize) -> u64 {
    if let Some(eight) = bytes.get(at..at + 8) {
        return u64::from_le_bytes(eight.try_into().expect("eight bytes"));
    }
    let rest = bytes.get(at..).unwrap_or(&[]);
    rest.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte))
}

/// The codes of literals.
struct Huffman {
    /// For each `bits` bits that may come next: the symbol and the bits of its code.
    codes: Box<[(u8, u8)]>,
    /// 0 for no table.
    bits: u32,
    weights: Table,
}

impl Huffman {
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
            let turn = count % 2;
            let state = table.states[states[turn] as usize];
            *weights[..255].get_mut(count)? = state.symbol;
            count += 1;
            states[turn] = u32::from(state.base) + bits.take(state.bits.into());
            if bits.left < 0 {
                *weights[..255].get_mut(count)? = table.states[states[1 - turn] as usize].symbol;
                return Some(count + 1);
            }
        }
    }

    /// The last weight follows from the others (4.2.1), and the codes from all.
    fn build(&mut self, weights: &mut [u8; 256], count: usize) -> Option<()> {
        self.bits = 0;
        if weights[..count].iter().any(|&weight| u32::from(weight) > HUFFMAN_BITS_MAX) {
            return None;
        }
        let sum: u32 = weights[..count].iter().map(|&weight| (1 << weight) >> 1).sum();
        let bits = sum.checked_ilog2()? + 1;
        let rest = (1 << bits) - sum;
        if bits > HUFFMAN_BITS_MAX || !rest.is_power_of_two() {
            return None;
        }
        *weights.get_mut(count)? = rest.ilog2() as u8 + 1;
        let mut at = 0;
        for weight in 1..=bits {
            for (symbol, _) in
                weights[..=count].iter().enumerate().filter(|(_, w)| u32::from(**w) == weight)
            {
                let run = self.codes.get_mut(at..at + (1 << (weight - 1)))?;
                run.fill((symbol as u8, (bits + 1 - weight) as u8));
                at += run.len();
            }
        }
        self.bits = bits;
        (at == 1 << bits).then_some(())
    }

    /// One stream, to its end exactly.
    fn decode(&self, stream: &[u8], into: &mut [u8]) -> Option<()> {
        let mut bits = Backward::new(stream)?;
        for byte in into {
            let (symbol, len) = self.codes[bits.peek(self.bits) as usize];
            *byte = symbol;
            bits.left -= isize::from(len);
        }
        (bits.left == 0).then_some(())
    }
}

/// What is being written to.
struct Output<'a> {
    bytes: &'a mut [u8],
    len: usize,
}

impl Output<'_> {
    fn room(&self) -> usize {
        self.bytes.len() - self.len
    }

    /// As much as there is room for.
    fn push(&mut self, from: &[u8]) {
        let count = from.len().min(self.room());
        self.bytes[self.len..self.len + count].copy_from_slice(&from[..count]);
        self.len += count;
    }

    fn fill(&mut self, byte: u8, count: usize) {
        let count = count.min(self.room());
        self.bytes[self.len..self.len + count].fill(byte);
        self.len += count;
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

/// A decoder with all the memory it will ever need.
pub(crate) struct Zstd {
    literals: Box<[u8]>,
    huffman: Huffman,
    lengths: Table,
    matches: Table,
    offsets: Table,
    /// The last three offsets.
    recent: [usize; 3],
}

impl Zstd {
    pub fn new() -> Zstd {
        let codes = vec![(0, 0); 1 << HUFFMAN_BITS_MAX].into_boxed_slice();
        Zstd {
            literals: vec![0; BLOCK_BYTES_MAX].into_boxed_slice(),
            huffman: Huffman { codes, bits: 0, weights: Table::new(WEIGHT_LOG_MAX, 12) },
            lengths: Table::new(LENGTH_LOG_MAX, 36),
            matches: Table::new(LENGTH_LOG_MAX, 53),
            offsets: Table::new(OFFSET_LOG_MAX, 32),
            recent: [1, 4, 8],
        }
    }

    /// Unpacks one frame: bytes that came out, at most all of `output`.
    pub fn unpack(&mut self, input: &[u8], output: &mut [u8]) -> Option<usize> {
        let mut input = input.get(frame_header_bytes(input)?..)?;
        self.huffman.bits = 0;
        for table in [&mut self.lengths, &mut self.matches, &mut self.offsets] {
            table.is_set = false;
        }
        self.recent = [1, 4, 8];
        let mut output = Output { bytes: output, len: 0 };
        loop {
            let head = input.get(..3)?;
            let head = u32::from_le_bytes([head[0], head[1], head[2], 0]);
            let (is_last, kind, size) = (head & 1 != 0, head >> 1 & 3, (head >> 3) as usize);
            input = &input[3..];
            let taken = if kind == 1 { 1 } else { size };
            let block = input.get(..taken)?;
            match kind {
                0 => output.push(block),
                1 => output.fill(block[0], size),
                2 => self.block(block, &mut output)?,
                _ => return None,
            }
            if is_last || output.room() == 0 {
                return Some(output.len);
            }
            input = &input[taken..];
        }
    }

    /// A compressed block (3.1.1.3).
    fn block(&mut self, block: &[u8], output: &mut Output) -> Option<()> {
        let (literals, at) = self.read_literals(block)?;
        let block = &block[at..];
        let (count, at) = match *block.first()? {
            0 => {
                output.push(&self.literals[..literals]);
                return Some(());
            }
            short @ ..128 => (usize::from(short), 1),
            255 => (usize::from(*block.get(1)?) + (usize::from(*block.get(2)?) << 8) + 0x7f00, 3),
            long => (((usize::from(long) - 128) << 8) + usize::from(*block.get(1)?), 2),
        };
        let modes = *block.get(at)?;
        let mut rest = &block[at + 1..];
        if modes & 3 != 0 {
            return None;
        }
        rest = choose(&mut self.lengths, modes >> 6, rest, LITERALS_DEFAULT)?;
        rest = choose(&mut self.offsets, modes >> 4 & 3, rest, OFFSETS_DEFAULT)?;
        rest = choose(&mut self.matches, modes >> 2 & 3, rest, MATCHES_DEFAULT)?;
        self.sequences(count, rest, literals, output)
    }

    /// Unpacks the literals of a block (3.1.1.3.1): how many, and where the sequences start.
    fn read_literals(&mut self, block: &[u8]) -> Option<(usize, usize)> {
        let kind = *block.first()? & 3;
        let format = *block.first()? >> 2 & 3;
        let head = word(block, 0) >> 4;
        if kind < 2 {
            let (size, at) = match format {
                0 | 2 => (usize::from(block[0] >> 3), 1),
                1 => (head as usize & 0xfff, 2),
                _ => (head as usize & 0xf_ffff, 3),
            };
            let into = self.literals.get_mut(..size)?;
            if kind == 0 {
                into.copy_from_slice(block.get(at..at + size)?);
                return Some((size, at + size));
            }
            into.fill(*block.get(at)?);
            return Some((size, at + 1));
        }
        let (width, mut at) = [(10, 3), (10, 3), (14, 4), (18, 5)][usize::from(format)];
        let mask = (1usize << width) - 1;
        let (size, packed) = (head as usize & mask, (head >> width) as usize & mask);
        let end = at + packed;
        if kind == 2 {
            at += self.huffman.read(block.get(at..end)?)?;
        }
        if self.huffman.bits == 0 {
            return None;
        }
        let streams = block.get(at..end)?;
        let into = self.literals.get_mut(..size)?;
        if format == 0 {
            self.huffman.decode(streams, into)?;
            return Some((size, end));
        }
        let mut streams = (streams.get(..6)?, streams.get(6..)?);
        let piece = size.div_ceil(4);
        let mut into = into;
        for n in 0..4 {
            let len = match streams.0.get(n * 2..n * 2 + 2) {
                Some(len) => usize::from(u16::from_le_bytes([len[0], len[1]])),
                None => streams.1.len(),
            };
            let stream = streams.1.get(..len)?;
            streams.1 = &streams.1[len..];
            let count = if n < 3 { piece } else { into.len() };
            let (now, rest) = into.split_at_mut_checked(count)?;
            self.huffman.decode(stream, now)?;
            into = rest;
        }
        Some((size, end))
    }

    /// Decodes and carries out the sequences (3.1.1.3.2, 3.1.1.4); ends early at a full output.
    fn sequences(
        &mut self,
        count: usize,
        stream: &[u8],
        literals: usize,
        output: &mut Output,
    ) -> Option<()> {
        let mut bits = Backward::new(stream)?;
        let mut length = bits.take(self.lengths.log);
        let mut offset = bits.take(self.offsets.log);
        let mut matched = bits.take(self.matches.log);
        let mut used = 0;
        for n in 0..count {
            let l = self.lengths.states[length as usize];
            let o = self.offsets.states[offset as usize];
            let m = self.matches.states[matched as usize];
            let value = (1usize << o.symbol) + bits.take(o.symbol.into()) as usize;
            let m_len = match usize::from(m.symbol).checked_sub(32) {
                None => usize::from(m.symbol) + 3,
                Some(code) => extended(&mut bits, MATCHES_FROM_32[code]),
            };
            let l_len = match usize::from(l.symbol).checked_sub(16) {
                None => usize::from(l.symbol),
                Some(code) => extended(&mut bits, LITERALS_FROM_16[code]),
            };
            let end = used + l_len;
            output.push(self.literals[..literals].get(used..end)?);
            used = end;
            let distance = self.offset(value, l_len == 0)?;
            output.repeat(distance, m_len)?;
            if output.room() == 0 {
                return Some(());
            }
            if n + 1 < count {
                length = u32::from(l.base) + bits.take(l.bits.into());
                matched = u32::from(m.base) + bits.take(m.bits.into());
                offset = u32::from(o.base) + bits.take(o.bits.into());
            }
            if bits.left < 0 {
                return None;
            }
        }
        output.push(&self.literals[used..literals]);
        (bits.left == 0).then_some(())
    }

    /// What an offset value means (3.1.1.5).
    fn offset(&mut self, value: usize, no_literals: bool) -> Option<usize> {
        let [a, b, c] = self.recent;
        let (offset, recent) = match (value, no_literals) {
            (1, false) => (a, [a, b, c]),
            (1, true) | (2, false) => (b, [b, a, c]),
            (2, true) | (3, false) => (c, [c, a, b]),
            (3, true) => (a.checked_sub(1)?, [a.checked_sub(1)?, a, b]),
            _ => (value - 3, [value - 3, a, b]),
        };
        self.recent = recent;
        Some(offset)
    }
}

fn extended(bits: &mut Backward, (base, extra): (u32, u8)) -> usize {
    (base + bits.take(extra.into())) as usize
}

/// The table that a mode names; gives what follows its description.
fn choose<'a>(
    table: &mut Table,
    mode: u8,
    input: &'a [u8],
    (default, log): (&[i16], u32),
) -> Option<&'a [u8]> {
    match mode {
        0 => table.set(default, log).map(|()| input),
        1 => table.set_single(*input.first()?).map(|()| &input[1..]),
        2 => {
            let len = table.read(input)?;
            input.get(len..)
        }
        _ => table.is_set.then_some(input),
    }
}

/// Length of a frame's header (3.1.1.1); `None` for anything else and for one with a dictionary.
fn frame_header_bytes(input: &[u8]) -> Option<usize> {
    if input.get(..4)? != [0x28, 0xb5, 0x2f, 0xfd] {
        return None;
    }
    let descriptor = *input.get(4)?;
    let single_segment = descriptor & 0x20 != 0;
    let dictionary = [0, 1, 2, 4][usize::from(descriptor & 3)];
    let size = match descriptor >> 6 {
        0 => usize::from(single_segment),
        order => 1 << order,
    };
    let at = 5 + usize::from(!single_segment);
    let id = input.get(at..at + dictionary)?;
    let is_plain = descriptor & 8 == 0 && id.iter().all(|&byte| byte == 0);
    is_plain.then_some(at + dictionary + size)
}

#[cfg(test)]
mod tests {
    //! The oracles are ruzstd, which compresses too, and the zstd program where it is installed.
    //! Would miss: streams that neither of them makes (the fuzz targets of compressed images).

    extern crate std;

    use alloc::vec::Vec;
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;
    use crate::create::random;

    /// Contents of many kinds.
    fn contents(len: usize) -> Vec<Vec<u8>> {
        let noise: Vec<u8> = (0..len as u64).map(|n| random(5, n) as u8).collect();
        let letters = |n: u64| b"etaoin shrdlucmfwypvbgkjqxz,.\n"[(random(7, n) % 30) as usize];
        let skewed = |n: u64| letters(n & random(9, n));
        let text: Vec<u8> = (0..len as u64).map(skewed).collect();
        let mut mixed = text.clone();
        for start in (0..len).step_by(5000) {
            let (from, count) = (random(3, start as u64) as usize % (start + 1), 900);
            let piece = mixed[from..(from + count).min(len)].to_vec();
            let end = (start + piece.len()).min(len);
            mixed[start..end].copy_from_slice(&piece[..end - start]);
        }
        let counting = (0..len).map(|n| (n / 300) as u8).collect();
        let few = noise.iter().map(|byte| byte & 3).collect();
        vec![vec![0; len], noise, text, mixed, counting, few]
    }

    fn by_program(level: &str, data: &[u8]) -> Option<Vec<u8>> {
        let mut zstd = Command::new("zstd");
        let zstd = zstd.args(["-q", "-c", "--ultra", level]).stderr(Stdio::null());
        let mut child = zstd.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().ok()?;
        let mut input = child.stdin.take()?;
        let data = data.to_vec();
        let feeder = std::thread::spawn(move || input.write_all(&data));
        let output = child.wait_with_output().ok()?;
        feeder.join().ok()?.ok()?;
        output.status.success().then_some(output.stdout)
    }

    fn by_ruzstd(data: &[u8]) -> Vec<u8> {
        let level = ruzstd::encoding::CompressionLevel::Fastest;
        ruzstd::encoding::compress_to_vec(data, level)
    }

    #[test]
    fn what_others_pack_comes_out_whole() {
        let mut zstd = Zstd::new();
        let (mut packed, mut programs) = (0, 0);
        for len in [1, 5, 600, 4096, 65536, 300_000, 2 << 20] {
            for data in contents(len) {
                let mut streams = vec![by_ruzstd(&data)];
                let levels: &[&str] = if len > 65536 { &["-3"] } else { &["-1", "-3", "-19"] };
                let streams_of_program = levels.iter().filter_map(|level| by_program(level, &data));
                streams.extend(streams_of_program);
                packed += 1;
                programs += streams.len() - 1;
                for stream in streams {
                    let mut output = vec![0xee; len];
                    assert_eq!(zstd.unpack(&stream, &mut output), Some(len), "{len}");
                    assert!(output == data, "{len}");
                    // What does not fit is left out: never more than the output.
                    let mut short = vec![0; len / 2];
                    assert_eq!(zstd.unpack(&stream, &mut short), Some(len / 2));
                    assert!(short == data[..len / 2]);
                    // More than the stream holds: what it holds.
                    let mut long = vec![0; len + 9];
                    assert_eq!(zstd.unpack(&stream, &mut long), Some(len));
                }
            }
        }
        assert!(packed == 42 && (programs == 0 || programs > 80), "{packed} {programs}");
    }

    #[test]
    fn broken_streams_are_none_or_bounded() {
        let mut zstd = Zstd::new();
        let mut output = vec![0; 65536];
        for data in contents(65536) {
            let stream = by_program("-5", &data).unwrap_or_else(|| by_ruzstd(&data));
            for cut in (0..stream.len()).step_by(stream.len() / 50 + 1) {
                let whole = zstd.unpack(&stream[..cut], &mut output);
                assert!(whole.is_none_or(|len| len <= output.len()));
            }
            for n in 0..400 {
                let mut bad = stream.clone();
                for flip in 0..1 + random(n, 0) % 4 {
                    let at = random(n, flip * 2 + 1) as usize % bad.len().min(400);
                    bad[at] ^= 1 << (random(n, flip * 2 + 2) % 8);
                }
                let _ = zstd.unpack(&bad, &mut output);
            }
            // The decoder is as good as new after them.
            assert_eq!(zstd.unpack(&stream, &mut output), Some(65536));
            assert!(output == data);
        }
        // A dictionary, a skippable frame, a window of 2 GiB, which costs nothing.
        assert_eq!(zstd.unpack(&[0x28, 0xb5, 0x2f, 0xfd, 0x21, 9, 1], &mut output), None);
        assert_eq!(zstd.unpack(&[0x50, 0x2a, 0x4d, 0x18, 0, 0, 0, 0], &mut output), None);
        let huge = [0x28, 0xb5, 0x2f, 0xfd, 0, 0xa8, 0x0b, 0, 0, 7];
        assert_eq!(zstd.unpack(&huge, &mut output), Some(1));
        assert_eq!(output[0], 7);
    }

    /// A block of a few hundred bytes that claims gigabytes: sequences of the longest match, each
    /// for two bytes of input. It must end at the output.
    #[test]
    fn a_bomb_in_one_block_ends_with_the_output() {
        let count = 1000usize;
        // 1000 times one literal; always the codes for literal length 1, the last offset, and
        // match length 65539 and 16 bits.
        let mut block = vec![0x85, 0x3e, b'x'];
        block.extend([128 + (count >> 8) as u8, count as u8, 0x54, 1, 0, 52]);
        block.extend(vec![0xff; count * 2 + 1]);
        let mut stream = vec![0x28, 0xb5, 0x2f, 0xfd, 0, 0x58];
        let head = (block.len() << 3 | 2 << 1 | 1) as u32;
        stream.extend(&head.to_le_bytes()[..3]);
        stream.extend(block);
        let mut output = vec![0; 2 << 20];
        let unpacked = Zstd::new().unpack(&stream, &mut output);
        assert_eq!(unpacked, Some(2 << 20), "of 131 million bytes");
        assert!(output.iter().all(|&byte| byte == b'x'));
    }
}
