//! Random numbers from a seed, so that a run can be had again: xorshift64* (Vigna 2016).

/// The generator. Not for secrets.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// From any seed; equal seeds give equal numbers.
    pub fn new(seed: u64) -> Random {
        // Zero would stay zero for ever.
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `end`, which is at least 1.
    pub fn below(&mut self, end: u64) -> u64 {
        (self.bits() >> 11) % end
    }
}

#[cfg(test)]
mod tests {
    //! Would miss: a bad distribution beyond the eye's reach.
    use super::*;

    #[test]
    fn numbers_repeat_by_seed_and_reach_everywhere() {
        let (mut one, mut same) = (Random::new(7), Random::new(7));
        assert!((0..100).all(|_| one.bits() == same.bits()));
        let mut seen = [0u32; 10];
        (0..1000).for_each(|_| seen[one.below(10) as usize] += 1);
        assert!(seen.iter().all(|count| (50..200).contains(count)), "{seen:?}");
        assert_ne!(Random::new(1).bits(), Random::new(2).bits());
    }
}
