//! A run's outcome as one line of `key=value` words.

use core::fmt;

use crate::guest::SECOND_NS;
use crate::latency::Latencies;

/// What one disk did in one run.
#[derive(Clone, Debug, Default)]
pub struct Report {
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub discards: u64,
    /// Requests on the ring: a block may take several.
    pub requests: u64,
    pub bytes: u64,
    pub elapsed_ns: u64,
    /// Answers ERROR, and what never came back.
    pub errors: u64,
    /// Answers EOPNOTSUPP.
    pub unsupported: u64,
    /// Answers to what was not asked.
    pub strays: u64,
    /// Sectors that held something else.
    pub mismatches: u64,
    /// Sectors that were looked at.
    pub verified: u64,
    pub latencies: Latencies,
}

impl Report {
    /// Nothing went wrong.
    pub fn is_good(&self) -> bool {
        self.errors == 0 && self.unsupported == 0 && self.strays == 0 && self.mismatches == 0
    }

    /// Blocks and commands that were answered.
    pub fn ios(&self) -> u64 {
        self.reads + self.writes + self.flushes + self.discards
    }

    /// What went wrong in another pass counts here too; its speed does not.
    pub fn blame(&mut self, other: &Report) {
        self.errors += other.errors;
        self.unsupported += other.unsupported;
        self.strays += other.strays;
        self.mismatches += other.mismatches;
        self.verified += other.verified;
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let elapsed_ns = u128::from(self.elapsed_ns.max(1));
        let per_second = |n: u64| u128::from(n) * u128::from(SECOND_NS) / elapsed_ns;
        let mbps_tenths = per_second(self.bytes) / 100_000;
        let us = |percent| self.latencies.percentile_ns(percent) / 1000;
        write!(f, "ms={} ios={} ", elapsed_ns / 1_000_000, self.ios())?;
        write!(
            f,
            "iops={} mbps={}.{} ",
            per_second(self.ios()),
            mbps_tenths / 10,
            mbps_tenths % 10
        )?;
        write!(f, "p50_us={} p95_us={} p99_us={} ", us(50), us(95), us(99))?;
        write!(f, "max_us={} ", self.latencies.max_ns() / 1000)?;
        write!(f, "reads={} writes={} ", self.reads, self.writes)?;
        write!(f, "flushes={} discards={} ", self.flushes, self.discards)?;
        write!(f, "requests={} errors={} ", self.requests, self.errors)?;
        write!(f, "unsupported={} strays={} ", self.unsupported, self.strays)?;
        write!(f, "verified={} mismatches={}", self.verified, self.mismatches)
    }
}

#[cfg(test)]
mod tests {
    //! Would miss: a count that nobody raises.
    use super::*;
    use alloc::string::ToString;

    #[test]
    fn a_line_has_rates_and_every_fault() {
        let mut report = Report { reads: 5000, bytes: 5000 * 4096, ..Report::default() };
        report.elapsed_ns = 2 * SECOND_NS;
        (1..=100).for_each(|us| report.latencies.note(us * 1000));
        let line = report.to_string();
        assert!(line.contains(" iops=2500 mbps=10.2 ") && line.contains(" max_us=100 "), "{line}");
        assert!(report.is_good());
        report.blame(&Report { mismatches: 3, ..Report::default() });
        assert!(!report.is_good() && report.to_string().ends_with("mismatches=3"));
    }
}
