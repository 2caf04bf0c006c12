//! Counters of one disk: what was done, and every refusal by its name.

use core::fmt;

use platter_xen::blkif::BadRequest;

use crate::fault::Fault;

/// Names of the refusals that are not of the protocol; theirs come from [`BadRequest`].
const OTHERS: [&str; 13] = [
    "bad-grant",
    "unheard",
    "image-full",
    "image-read-only",
    "image-limit",
    "image-fault",
    "store-gone",
    "store-no-space",
    "store-error",
    "stuck",
    "no-memory",
    "ring-broken",
    "connect-refused",
];
const NAMES: usize = BadRequest::ALL.len() + OTHERS.len();

/// All counters wrap never in practice (64 bits).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    pub reads: u64,
    pub read_sectors: u64,
    pub writes: u64,
    pub write_sectors: u64,
    pub flushes: u64,
    pub discards: u64,
    refused: [u64; NAMES],
}

impl Stats {
    /// Counts a refusal by name.
    pub fn refuse(&mut self, fault: &Fault) {
        self.count(fault.name());
    }

    /// Counts a broken ring.
    pub fn ring_broken(&mut self) {
        self.count("ring-broken");
    }

    /// Counts a frontend whose keys could not be used.
    pub fn connect_refused(&mut self) {
        self.count("connect-refused");
    }

    /// Refusals in all.
    pub fn refused_total(&self) -> u64 {
        self.refused.iter().sum()
    }

    fn count(&mut self, name: &str) {
        let index = Self::names().position(|n| n == name).expect("every fault has a counter");
        self.refused[index] += 1;
    }

    fn names() -> impl Iterator<Item = &'static str> {
        BadRequest::ALL.iter().map(|bad| bad.name()).chain(OTHERS)
    }
}

/// `rd=N rd_sect=N …` and then each refusal that happened: fits a xenstore node.
impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rd={} rd_sect={} ", self.reads, self.read_sectors)?;
        write!(f, "wr={} wr_sect={} ", self.writes, self.write_sectors)?;
        write!(f, "fl={} ds={} refused={}", self.flushes, self.discards, self.refused_total())?;
        for (name, count) in Self::names().zip(self.refused) {
            if count > 0 {
                write!(f, " {name}={count}")?;
            }
        }
        Ok(())
    }
}

/// Would miss: a fault that is never counted at all; the hostile guest's scenarios check that.
#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;
    use platter_image::{FaultKind, FileNo, ImageFault};
    use platter_storage::StoreFault;

    #[test]
    fn every_fault_has_a_counter_and_shows() {
        let mut stats = Stats::default();
        let image = |kind| Fault::Image(ImageFault::new(kind, FileNo(0), "x"));
        for bad in BadRequest::ALL {
            stats.refuse(&Fault::Request(bad));
        }
        for kind in [FaultKind::Full, FaultKind::ReadOnly, FaultKind::Limit, FaultKind::Corrupt] {
            stats.refuse(&image(kind));
        }
        for store in [StoreFault::Gone, StoreFault::NoSpace, StoreFault::Io(5)] {
            stats.refuse(&Fault::Store(store));
        }
        stats.refuse(&Fault::Grant(-3));
        stats.refuse(&Fault::Unheard);
        stats.refuse(&Fault::Stuck);
        stats.refuse(&Fault::Memory);
        stats.ring_broken();
        stats.connect_refused();
        assert_eq!(stats.refused_total(), NAMES as u64);
        let text = stats.to_string();
        assert!(Stats::names().all(|name| text.contains(name)), "{text}");
        assert!(text.len() < 2048, "a xenstore node holds 2048 bytes");
    }
}
