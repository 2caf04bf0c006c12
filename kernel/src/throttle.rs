//! Limits of a disk in requests and bytes a second: two token buckets.
//!
//! A bucket may go into debt by one request, so that one larger than the burst still passes;
//! the debt is paid before the next.

use crate::config::Rate;

const NS_PER_S: u128 = 1_000_000_000;

#[derive(Clone, Copy, Debug)]
struct Bucket {
    rate: Rate,
    /// Tokens left; negative after a request larger than what was there.
    tokens: i128,
    filled_ns: u64,
    /// Nanosecond-tokens that did not make a whole token yet.
    rest: u128,
}

impl Bucket {
    fn new(rate: Rate) -> Bucket {
        Bucket { rate, tokens: rate.burst as i128, filled_ns: 0, rest: 0 }
    }

    fn fill(&mut self, now_ns: u64) {
        let passed = now_ns.saturating_sub(self.filled_ns) as u128;
        self.filled_ns = self.filled_ns.max(now_ns);
        let earned = passed * self.rate.per_second as u128 + self.rest;
        self.rest = earned % NS_PER_S;
        let full = self.rate.burst as i128;
        self.tokens = (self.tokens + (earned / NS_PER_S) as i128).min(full);
    }

    /// Nanoseconds until a request may pass, 0 for now.
    fn wait_ns(&self) -> u64 {
        if self.tokens > 0 {
            return 0;
        }
        let missing = (1 - self.tokens) as u128;
        (missing * NS_PER_S).div_ceil(self.rate.per_second as u128).min(u64::MAX as u128) as u64
    }
}

/// The limits of one disk.
#[derive(Clone, Copy, Debug)]
pub struct Throttle {
    iops: Option<Bucket>,
    bps: Option<Bucket>,
}

impl Throttle {
    pub fn unlimited() -> Throttle {
        Throttle { iops: None, bps: None }
    }

    pub fn new(iops: Option<Rate>, bps: Option<Rate>) -> Throttle {
        Throttle { iops: iops.map(Bucket::new), bps: bps.map(Bucket::new) }
    }

    pub fn is_limited(&self) -> bool {
        self.iops.is_some() || self.bps.is_some()
    }

    /// May one more request be taken?
    pub fn ready(&mut self, now_ns: u64) -> bool {
        self.buckets().for_each(|bucket| bucket.fill(now_ns));
        self.wait_ns() == 0
    }

    /// A request of so many bytes was taken.
    pub fn spend(&mut self, now_ns: u64, bytes: u64) {
        self.buckets().for_each(|bucket| bucket.fill(now_ns));
        if let Some(bucket) = &mut self.iops {
            bucket.tokens -= 1;
        }
        if let Some(bucket) = &mut self.bps {
            bucket.tokens -= bytes as i128;
        }
    }

    /// Nanoseconds until the next request may be taken, as of the last call above.
    pub fn wait_ns(&self) -> u64 {
        let wait = |bucket: &Option<Bucket>| bucket.as_ref().map_or(0, Bucket::wait_ns);
        wait(&self.iops).max(wait(&self.bps))
    }

    fn buckets(&mut self) -> impl Iterator<Item = &mut Bucket> {
        self.iops.iter_mut().chain(self.bps.iter_mut())
    }
}

/// Would miss: that the server honours the wait; the simulator measures rates.
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sustained_rate_holds_after_the_burst() {
        let mut throttle = Throttle::new(Some(Rate { per_second: 100, burst: 10 }), None);
        let mut taken = 0;
        let mut now = 0;
        while now < 10_000_000_000 {
            while throttle.ready(now) {
                throttle.spend(now, 4096);
                taken += 1;
            }
            assert!(throttle.wait_ns() > 0);
            now += throttle.wait_ns();
        }
        assert!((1000..=1012).contains(&taken), "{taken} requests in 10 s at 100/s");
    }

    #[test]
    fn one_request_larger_than_the_burst_passes_and_is_paid_for() {
        let mut throttle = Throttle::new(None, Some(Rate { per_second: 1000, burst: 1000 }));
        assert!(throttle.ready(0));
        throttle.spend(0, 5000);
        assert!(!throttle.ready(3_900_000_000));
        assert!(throttle.ready(4_100_000_000));
    }
}
