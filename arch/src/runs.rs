//! A map of which units are taken, and runs of neighbouring units out of it.
//!
//! Three things are handed out by it: page frames of the pool, pages of the grant window and of
//! the device window, and grant references. It knows none of them: units are numbers from 0. It
//! must never hand a unit out twice: giving back what is not taken is our own mistake and panics.

use alloc::vec;
use alloc::vec::Vec;

const WORD_BITS: usize = u64::BITS as usize;

/// One bit for each unit: set while it is taken.
pub(crate) struct Runs {
    words: Vec<u64>,
    /// Units in all; bits beyond the last one are set for good.
    len: usize,
    left: usize,
    /// No word before this one has a clear bit.
    first_word: usize,
}

impl Runs {
    /// A map of `len` free units.
    pub(crate) fn new(len: usize) -> Runs {
        let mut words = vec![0u64; len.div_ceil(WORD_BITS)];
        let used_bits = len % WORD_BITS;
        if let (Some(last), true) = (words.last_mut(), used_bits != 0) {
            *last = !0 << used_bits;
        }
        Runs { words, len, left: len, first_word: 0 }
    }

    /// Units that are free.
    pub(crate) fn left(&self) -> usize {
        self.left
    }

    /// Takes the lowest run of `count` free neighbours and returns its first unit.
    pub(crate) fn take(&mut self, count: usize) -> Option<usize> {
        assert!(count > 0, "a run of nothing");
        if count > self.left {
            return None;
        }
        let mut start = self.next_free(self.first_word * WORD_BITS)?;
        self.first_word = start / WORD_BITS;
        while start + count <= self.len {
            match self.next_taken(start, start + count) {
                None => {
                    self.set(start, count, true);
                    self.left -= count;
                    return Some(start);
                }
                Some(taken) => start = self.next_free(taken)?,
            }
        }
        None
    }

    /// Gives back a run, or a part of one. Panics when any of it is free.
    pub(crate) fn give(&mut self, first: usize, count: usize) {
        assert!(self.all_taken(first, count), "gave back what was not taken");
        self.set(first, count, false);
        self.left += count;
        self.first_word = self.first_word.min(first / WORD_BITS);
    }

    /// Whether every unit of the run exists and is taken.
    pub(crate) fn all_taken(&self, first: usize, count: usize) -> bool {
        match first.checked_add(count) {
            Some(end) if end <= self.len => (first..end).all(|unit| self.is_taken(unit)),
            _ => false,
        }
    }

    fn is_taken(&self, unit: usize) -> bool {
        self.words[unit / WORD_BITS] >> (unit % WORD_BITS) & 1 == 1
    }

    /// The first free unit from `from` on, skipping full words at once.
    fn next_free(&self, from: usize) -> Option<usize> {
        let mut word = from / WORD_BITS;
        let mut mask = !0u64 << (from % WORD_BITS);
        while word < self.words.len() {
            let free = !self.words[word] & mask;
            if free != 0 {
                return Some(word * WORD_BITS + free.trailing_zeros() as usize);
            }
            word += 1;
            mask = !0;
        }
        None
    }

    fn next_taken(&self, from: usize, end: usize) -> Option<usize> {
        (from..end).find(|&unit| self.is_taken(unit))
    }

    fn set(&mut self, first: usize, count: usize, taken: bool) {
        for unit in first..first + count {
            let bit = 1 << (unit % WORD_BITS);
            match taken {
                true => self.words[unit / WORD_BITS] |= bit,
                false => self.words[unit / WORD_BITS] &= !bit,
            }
        }
    }
}

/// What they would miss: the cost of a search in a large, fragmented map.
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hands_out_each_unit_once_lowest_first() {
        let mut runs = Runs::new(130);
        for unit in 0..130 {
            assert_eq!(runs.take(1), Some(unit));
        }
        assert_eq!((runs.take(1), runs.left()), (None, 0));
        runs.give(64, 1);
        runs.give(3, 1);
        assert_eq!((runs.take(1), runs.take(1), runs.take(1)), (Some(3), Some(64), None));
    }

    #[test]
    fn a_run_never_crosses_what_is_taken_or_the_end() {
        let mut runs = Runs::new(100);
        assert_eq!(runs.take(60), Some(0));
        assert_eq!(runs.take(41), None, "only 40 are left");
        runs.give(10, 20);
        assert_eq!(runs.left(), 60);
        assert_eq!(runs.take(41), None, "no 41 neighbours");
        assert_eq!(runs.take(40), Some(60), "crosses a word");
        assert_eq!(runs.take(20), Some(10));
        assert_eq!(runs.left(), 0);
    }

    #[test]
    #[should_panic(expected = "not taken")]
    fn giving_twice_is_our_mistake() {
        let mut runs = Runs::new(8);
        let unit = runs.take(2).unwrap();
        runs.give(unit, 2);
        runs.give(unit, 1);
    }

    #[test]
    fn taken_says_no_beyond_the_end() {
        let mut runs = Runs::new(70);
        assert_eq!(runs.take(70), Some(0));
        assert!(runs.all_taken(0, 70));
        assert!(!runs.all_taken(69, 2));
        assert!(!runs.all_taken(usize::MAX, 2));
    }

    /// Against a plain array of bools, by a fixed sequence.
    #[test]
    fn agrees_with_a_naive_map() {
        let (mut runs, mut naive) = (Runs::new(300), [false; 300]);
        let mut held: Vec<(usize, usize)> = Vec::new();
        let mut seed = 0x1234_5678_9abc_def1u64;
        for _ in 0..5000 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            let count = (seed % 20) as usize + 1;
            if seed & 0x100 == 0 && !held.is_empty() {
                let (first, count) = held.swap_remove((seed >> 20) as usize % held.len());
                runs.give(first, count);
                naive[first..first + count].fill(false);
                continue;
            }
            let want = (0..=300 - count).find(|&at| naive[at..at + count].iter().all(|&t| !t));
            assert_eq!(runs.take(count), want);
            if let Some(first) = want {
                naive[first..first + count].fill(true);
                held.push((first, count));
            }
            assert_eq!(runs.left(), naive.iter().filter(|&&taken| !taken).count());
        }
    }
}
