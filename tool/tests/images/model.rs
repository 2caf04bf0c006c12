//! What each sector may read as. Every write stamps its sectors with its own number, so a value
//! read names the operation that wrote it; a sector's state is the set of values it may hold,
//! one bit each.

use crate::cases::Built;
use crate::rng::mix;

pub const SECTOR: usize = 512;
/// Operations of one workload: bits of a set less the three fixed values.
pub const OPS_MAX: usize = 61;

/// Sectors from the start that are read whenever all is read; of what lies behind, some.
pub const LOOKED_AT: u64 = 48 << 10;

/// Zeros.
pub const ZERO: u64 = 1;
/// What the image held at the start.
pub const INITIAL: u64 = 2;
/// What the base holds there.
pub const BACKING: u64 = 4;

/// The set that holds only the value written by operation `op`.
pub fn bit(op: usize) -> u64 {
    assert!(op < OPS_MAX);
    8 << op
}

/// The bytes that operation `op` writes to `sector`.
pub fn stamp(op: usize, sector: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    bytes.chunks_exact_mut(32).for_each(|chunk| chunk.copy_from_slice(&stamp_start(op, sector)));
    bytes
}

/// What a stamp repeats.
fn stamp_start(op: usize, sector: u64) -> [u8; 32] {
    let words = [0x706c_6174_7465_7200 | op as u64, sector, mix(sector << 8 | op as u64), !0];
    let mut bytes = [0; 32];
    bytes
        .chunks_exact_mut(8)
        .zip(words)
        .for_each(|(b, word)| b.copy_from_slice(&word.to_be_bytes()));
    bytes
}

fn is_stamp(op: usize, sector: u64, bytes: &[u8]) -> bool {
    bytes[..32] == stamp_start(op, sector) && bytes[32..] == bytes[..SECTOR - 32]
}

pub fn stamps(op: usize, sector: u64, count: u64) -> Vec<u8> {
    (sector..sector + count).flat_map(|sector| stamp(op, sector)).collect()
}

/// Every value that these bytes of `sector` can be.
pub fn values(built: &Built, sector: u64, bytes: &[u8]) -> u64 {
    let mut set = 0;
    if *bytes == [0; SECTOR] {
        set |= ZERO;
    }
    let at = sector as usize * SECTOR;
    let is = |disk: &[u8]| disk.get(at..at + SECTOR).is_some_and(|old| old == bytes);
    if is(&built.initial) {
        set |= INITIAL;
    }
    if built.backing.as_deref().is_some_and(is) {
        set |= BACKING;
    }
    let op = bytes[7] as usize;
    if op < OPS_MAX && is_stamp(op, sector, bytes) {
        set |= bit(op);
    }
    set
}

/// The first sector of `disk` (from `start` on) that holds no value of its set, as a sentence.
pub fn mismatch(built: &Built, sets: &[u64], start: u64, disk: &[u8]) -> Option<String> {
    let found = disk.chunks_exact(SECTOR).zip(start..).find_map(|(bytes, sector)| {
        let got = values(built, sector, bytes);
        (got & sets[sector as usize] == 0).then_some((sector, got, bytes))
    });
    let (sector, got, bytes) = found?;
    Some(wrong(sector, got, sets[sector as usize], bytes))
}

/// That a sector holds what it must not, as a sentence.
pub fn wrong(sector: u64, got: u64, set: u64, bytes: &[u8]) -> String {
    let (bytes, allowed) = (&bytes[..32], names(set));
    format!("sector {sector} holds {} {bytes:02x?}, allowed: {allowed}", names(got))
}

/// A set in words.
pub fn names(set: u64) -> String {
    if set == 0 {
        return String::from("foreign bytes");
    }
    let mut words = Vec::new();
    let fixed = [(ZERO, "zeros"), (INITIAL, "the first content"), (BACKING, "the base's")];
    words.extend(fixed.iter().filter(|(b, _)| set & b != 0).map(|(_, name)| name.to_string()));
    words.extend((0..OPS_MAX).filter(|&op| set & bit(op) != 0).map(|op| format!("op {op}")));
    words.join(" or ")
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Write,
    Zero,
    Discard,
    Flush,
    /// Close and open again: durable like a flush.
    Reopen,
    /// The disk gets `count` sectors more, from `sector` on: durable like a flush.
    Grow,
}

/// One operation of a workload and when it happened, in numbers of recorded events.
#[derive(Clone, Copy, Debug)]
pub struct Op {
    pub kind: Kind,
    pub sector: u64,
    pub count: u64,
    /// Events recorded when it began.
    pub began: usize,
    /// Events recorded when it was acknowledged.
    pub done: usize,
}

impl Op {
    pub fn durable(&self) -> bool {
        matches!(self.kind, Kind::Flush | Kind::Reopen | Kind::Grow)
    }

    fn range(&self) -> std::ops::Range<usize> {
        self.sector as usize..(self.sector + self.count) as usize
    }

    /// The sets after it is done.
    pub fn apply(&self, number: usize, sets: &mut [u64]) {
        for set in &mut sets[self.range()] {
            match self.kind {
                Kind::Write => *set = bit(number),
                Kind::Zero => *set = ZERO,
                Kind::Discard => *set |= ZERO | BACKING,
                Kind::Grow => *set = ZERO,
                Kind::Flush | Kind::Reopen => {}
            }
        }
    }

    /// The sets while it may be done or not.
    fn blur(&self, number: usize, sets: &mut [u64]) {
        for set in &mut sets[self.range()] {
            match self.kind {
                Kind::Write => *set |= bit(number),
                Kind::Zero => *set |= ZERO,
                Kind::Discard => *set |= ZERO | BACKING,
                Kind::Grow => *set |= ZERO,
                Kind::Flush | Kind::Reopen => {}
            }
        }
    }
}

/// The sizes that a disk of at last `sectors` may have when the power is cut after `cut` events:
/// what the last growth acknowledged by then made it, or one begun since.
pub fn sizes_after_cut(ops: &[Op], sectors: u64, cut: usize) -> Vec<u64> {
    let mut growths = ops.iter().filter(|op| op.kind == Kind::Grow).peekable();
    let mut sizes = vec![growths.peek().map_or(sectors, |first| first.sector)];
    for op in growths.filter(|op| op.began <= cut) {
        if op.done <= cut {
            sizes.clear();
        }
        sizes.push(op.sector + op.count);
    }
    sizes
}

/// What each sector may hold when the power is cut after `cut` events: what the last flush
/// acknowledged by then covered, or anything written since. Sectors of a growth to come are in it.
pub fn after_cut(ops: &[Op], sectors: u64, cut: usize) -> Vec<u64> {
    let mut sets = vec![INITIAL; sectors as usize];
    for op in ops.iter().filter(|op| op.kind == Kind::Grow) {
        sets[op.sector as usize..].fill(ZERO);
    }
    let flush = ops.iter().rev().find(|op| op.durable() && op.done <= cut);
    let covered = flush.map(|flush| flush.began);
    let is_covered = |op: &Op| covered.is_some_and(|began| op.done <= began);
    for (number, op) in ops.iter().enumerate().filter(|(_, op)| is_covered(op)) {
        op.apply(number, &mut sets);
    }
    for (number, op) in ops.iter().enumerate().filter(|(_, op)| !is_covered(op)) {
        if op.began <= cut {
            op.blur(number, &mut sets);
        }
    }
    sets
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(kind: Kind, sector: u64, began: usize, done: usize) -> Op {
        Op { kind, sector, count: 1, began, done }
    }

    #[test]
    fn a_flush_makes_old_values_inadmissible_and_nothing_else_does() {
        let ops = [
            op(Kind::Write, 0, 0, 1),
            op(Kind::Flush, 0, 1, 4),
            op(Kind::Write, 0, 4, 5),
            op(Kind::Zero, 1, 5, 6),
        ];
        assert_eq!(after_cut(&ops, 2, 3), [INITIAL | bit(0), INITIAL]);
        assert_eq!(after_cut(&ops, 2, 4), [bit(0) | bit(2), INITIAL]);
        assert_eq!(after_cut(&ops, 2, 6), [bit(0) | bit(2), INITIAL | ZERO]);
    }

    #[test]
    fn a_growth_is_there_once_it_is_acknowledged_and_may_be_before() {
        let grow = Op { count: 2, ..op(Kind::Grow, 1, 2, 5) };
        let ops = [op(Kind::Write, 0, 0, 1), grow, op(Kind::Write, 2, 5, 6)];
        assert_eq!(sizes_after_cut(&ops, 3, 1), [1]);
        assert_eq!(sizes_after_cut(&ops, 3, 4), [1, 3]);
        assert_eq!(sizes_after_cut(&ops, 3, 5), [3]);
        assert_eq!(after_cut(&ops, 3, 4), [INITIAL | bit(0), ZERO, ZERO]);
        assert_eq!(after_cut(&ops, 3, 5), [bit(0), ZERO, ZERO | bit(2)]);
    }

    #[test]
    fn a_stamp_is_its_own_operation_and_sector_only() {
        let built =
            Built { files: vec![], top: String::new(), initial: vec![0; 1024], backing: None };
        assert_eq!(values(&built, 1, &stamp(5, 1)), bit(5));
        assert_eq!(values(&built, 0, &stamp(5, 1)), 0);
        assert_eq!(values(&built, 0, &[0; 512]), ZERO | INITIAL);
        assert!(mismatch(&built, &[bit(4), bit(5)], 1, &stamp(4, 1)).is_some());
    }
}
