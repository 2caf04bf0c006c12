//! Latencies, counted in buckets of at most 1/32 relative width: no allocation while it counts.

use alloc::vec;
use alloc::vec::Vec;

const SUB_BITS: u32 = 5;
const SUBS: usize = 1 << SUB_BITS;

/// Counts of latencies in ns.
#[derive(Clone, Debug)]
pub struct Latencies {
    buckets: Vec<u32>,
    count: u64,
    max_ns: u64,
}

impl Default for Latencies {
    fn default() -> Latencies {
        let buckets = vec![0; (64 - SUB_BITS as usize + 1) * SUBS];
        Latencies { buckets, count: 0, max_ns: 0 }
    }
}

impl Latencies {
    /// Adds one.
    pub fn note(&mut self, ns: u64) {
        let bucket = &mut self.buckets[bucket_of(ns)];
        *bucket = bucket.saturating_add(1);
        self.count += 1;
        self.max_ns = self.max_ns.max(ns);
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The greatest, exactly.
    pub fn max_ns(&self) -> u64 {
        self.max_ns
    }

    /// The least value that `percent` of all do not exceed, rounded up to its bucket's end; 0
    /// when there are none.
    pub fn percentile_ns(&self, percent: u64) -> u64 {
        let wanted = (self.count * percent).div_ceil(100).max(1);
        let mut seen = 0;
        for (index, bucket) in self.buckets.iter().enumerate() {
            seen += u64::from(*bucket);
            if seen >= wanted {
                return end_of(index).min(self.max_ns);
            }
        }
        self.max_ns
    }
}

fn bucket_of(ns: u64) -> usize {
    let bits = u64::BITS - ns.leading_zeros();
    let shift = bits.saturating_sub(SUB_BITS + 1);
    shift as usize * SUBS + (ns >> shift) as usize
}

/// The greatest value of a bucket.
fn end_of(index: usize) -> u64 {
    let shift = (index / SUBS).saturating_sub(1) as u32;
    let first = (index - shift as usize * SUBS) as u64;
    (first << shift) + ((1 << shift) - 1)
}

#[cfg(test)]
mod tests {
    //! Would miss: a wrong clock.
    use super::*;

    #[test]
    fn buckets_are_narrow_and_meet_without_gaps() {
        for ns in (0..5000).chain([1 << 20, (1 << 40) + 12345, u64::MAX]) {
            let end = end_of(bucket_of(ns));
            assert!(end >= ns && end - ns <= ns / 32, "{ns}: {end}");
        }
        (0..5000u64).for_each(|ns| assert!(bucket_of(ns + 1) - bucket_of(ns) <= 1));
    }

    #[test]
    fn percentiles_of_a_known_set() {
        let mut latencies = Latencies::default();
        assert_eq!(latencies.percentile_ns(99), 0);
        (1..=1000u64).for_each(|us| latencies.note(us * 1000));
        let near = |got: u64, want: u64| assert!(got >= want && got <= want + want / 31, "{got}");
        near(latencies.percentile_ns(50), 500_000);
        near(latencies.percentile_ns(95), 950_000);
        near(latencies.percentile_ns(99), 990_000);
        assert_eq!((latencies.max_ns(), latencies.count()), (1_000_000, 1000));
    }
}
