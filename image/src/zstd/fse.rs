//! Tables of finite state entropy codes (RFC 8878, 4.1), for sequences and for Huffman weights.
//!
//! A state holds all that its symbol means, so that decoding looks nothing else up. A table must
//! never send a state beyond its end: `set` builds only such.

use alloc::boxed::Box;

use super::bits::Forward;

/// Symbols of any table here: match length codes.
const SYMBOLS_MAX: usize = 53;

/// What symbols mean: a base, and how many bits that follow are added to it.
pub(super) type Meanings = [(u32, u8)];

/// Literal length codes, match length codes (3.1.1.3.2.1.1), offset codes, and weights.
pub(super) const LITERALS: [(u32, u8); 36] = meanings(0, &LITERALS_FROM_16);
pub(super) const MATCHES: [(u32, u8); 53] = meanings(3, &MATCHES_FROM_32);
pub(super) const OFFSETS: [(u32, u8); 32] = {
    let mut all = [(0, 0); 32];
    let mut code = 0;
    while code < 32 {
        all[code] = (1 << code, code as u8);
        code += 1;
    }
    all
};
pub(super) const WEIGHTS: [(u32, u8); 12] = meanings(0, &[]);

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

/// Codes that count up from `first`, and the last ones.
const fn meanings<const N: usize>(first: u32, last: &Meanings) -> [(u32, u8); N] {
    let mut all = [(0, 0); N];
    let mut code = 0;
    while code < N {
        let counting = N - last.len();
        all[code] = if code < counting { (first + code as u32, 0) } else { last[code - counting] };
        code += 1;
    }
    all
}

/// Default distributions (3.1.1.3.2.2), and their accuracy logs.
pub(super) type Default = (&'static [i16], u32);
pub(super) const LITERALS_DEFAULT: Default = (
    &[
        4, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 2, 1, 1, 1,
        1, 1, -1, -1, -1, -1,
    ],
    6,
);
pub(super) const OFFSETS_DEFAULT: Default = (
    &[1, 1, 1, 1, 1, 1, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1],
    5,
);
pub(super) const MATCHES_DEFAULT: Default = (
    &[
        1, 4, 3, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
        1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1,
    ],
    6,
);

/// What a state's symbol means, and where the state leads: the bits that are added to the base
/// for the next one. In one word, so that it is fetched at once: value, base, extra, bits.
#[derive(Clone, Copy, Default)]
pub(super) struct State(u64);

impl State {
    fn new((value, extra): (u32, u8), base: u16, bits: u8) -> State {
        let high = u64::from(value) << 32 | u64::from(base) << 16;
        State(high | u64::from(extra) << 8 | u64::from(bits))
    }

    #[inline(always)]
    pub fn value(self) -> u32 {
        (self.0 >> 32) as u32
    }

    #[inline(always)]
    pub fn extra(self) -> u32 {
        (self.0 >> 8) as u32 & 0xff
    }

    #[inline(always)]
    pub fn bits(self) -> u32 {
        self.0 as u32 & 0xff
    }

    /// The next state, from as many bits as this one names.
    #[inline(always)]
    pub fn next(self, bits: u32) -> u32 {
        ((self.0 >> 16) as u32 & 0xffff) + bits
    }
}

/// A decoding table of up to `SIZE` states, a power of two.
pub(super) struct Table<const SIZE: usize> {
    states: Box<[State; SIZE]>,
    pub log: u32,
    meanings: &'static Meanings,
    /// There is a table, so that "repeat" means something.
    is_set: bool,
}

impl<const SIZE: usize> Table<SIZE> {
    pub fn new(meanings: &'static Meanings) -> Table<SIZE> {
        Table { states: Box::new([State::default(); SIZE]), log: 0, meanings, is_set: false }
    }

    pub fn unset(&mut self) {
        self.is_set = false;
    }

    #[inline(always)]
    pub fn state(&self, number: u32) -> State {
        self.states[number as usize & (SIZE - 1)]
    }

    /// The table that a mode names (3.1.1.3.2.1); gives what follows its description.
    pub fn choose<'a>(&mut self, mode: u8, input: &'a [u8], default: Default) -> Option<&'a [u8]> {
        match mode {
            0 => self.set(default.0, default.1).map(|()| input),
            1 => self.set_single(*input.first()?).map(|()| &input[1..]),
            2 => {
                let len = self.read(input)?;
                input.get(len..)
            }
            _ => self.is_set.then_some(input),
        }
    }

    /// One symbol for ever, without bits.
    fn set_single(&mut self, symbol: u8) -> Option<()> {
        self.states[0] = State::new(*self.meanings.get(usize::from(symbol))?, 0, 0);
        (self.log, self.is_set) = (0, true);
        Some(())
    }

    /// The table of a distribution whose probabilities (-1 for less than one) fill `1 << log`.
    fn set(&mut self, probabilities: &[i16], log: u32) -> Option<()> {
        let size = 1usize << log;
        let mut symbols = [0u8; SIZE];
        let mut next = [0u16; SYMBOLS_MAX];
        let mut high = size;
        for (symbol, &probability) in probabilities.iter().enumerate() {
            next[symbol] = probability.unsigned_abs();
            if probability == -1 {
                high = high.checked_sub(1)?;
                symbols[high] = symbol as u8;
            }
        }
        let step = (size >> 1) + (size >> 3) + 3;
        let mut at = 0;
        for (symbol, &probability) in probabilities.iter().enumerate() {
            for _ in 0..probability.max(0) {
                symbols[at] = symbol as u8;
                at = (at + step) & (size - 1);
                while at >= high {
                    at = (at + step) & (size - 1);
                }
            }
        }
        if at != 0 {
            return None;
        }
        for (state, &symbol) in self.states.iter_mut().zip(&symbols[..size]) {
            let number = next[usize::from(symbol)];
            next[usize::from(symbol)] += 1;
            let bits = log - number.checked_ilog2()?;
            let base = ((usize::from(number) << bits) - size) as u16;
            *state = State::new(self.meanings[usize::from(symbol)], base, bits as u8);
        }
        (self.log, self.is_set) = (log, true);
        Some(())
    }

    /// Reads a table's description (4.1.1) from the start of `input`; gives its bytes.
    pub fn read(&mut self, input: &[u8]) -> Option<usize> {
        let mut bits = Forward { bytes: input, at: 0 };
        let log = bits.take(4)? + 5;
        if log > SIZE.ilog2() {
            return None;
        }
        let mut probabilities = [0i16; SYMBOLS_MAX];
        let probabilities = &mut probabilities[..self.meanings.len()];
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
            *probabilities.get_mut(symbol)? = probability as i16;
            symbol += 1;
            // After a zero comes how many more there are, three and on while it says three.
            let mut zeros = if probability == 0 { 3 } else { 0 };
            while zeros == 3 {
                zeros = bits.take(2)?;
                symbol += zeros as usize;
            }
        }
        let probabilities = probabilities.get(..symbol).filter(|_| left == 0)?;
        self.set(probabilities, log)?;
        Some(bits.at.div_ceil(8))
    }
}
