//! What a disk may read as: each sector's history of writes, and which of them can still show.
//!
//! A write can be seen from its submission on, for ever, unless another write that was
//! submitted after its answer has itself been answered OK (before the read began). After a
//! power cut the same holds with "answered OK" replaced by "made durable by an answered flush".
//! Writes that were answered with an error may show or not, in any bytes.
//!
//! Contents are made from disk, sector and version, so that a byte of another disk, an old
//! version or a misplaced sector is told from any other.

use crate::rng::mix;

pub const SECTOR: usize = 512;
/// Marks our contents: looked for in the memory of guests that should not have them.
const MAGIC: u64 = 0x5ec7_02d1_5c0f_0001;

/// The bytes of version `version` of a sector; version 0 is zeros.
pub fn content(disk: u32, sector: u64, version: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    if version == 0 {
        return bytes;
    }
    let mut word = mix(u64::from(disk) << 40 ^ sector << 20 ^ version);
    for chunk in bytes.chunks_exact_mut(8) {
        chunk.copy_from_slice(&word.to_le_bytes());
        word = word.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23) ^ 0x51;
    }
    bytes[..8].copy_from_slice(&version.to_le_bytes());
    bytes[8..16].copy_from_slice(&(MAGIC ^ u64::from(disk) << 16).to_le_bytes());
    bytes[16..24].copy_from_slice(&sector.to_le_bytes());
    bytes
}

/// Whose contents these bytes are, if they are anybody's.
pub fn owner(bytes: &[u8]) -> Option<u32> {
    let word = u64::from_le_bytes(bytes.get(8..16)?.try_into().ok()?);
    let disk = word ^ MAGIC;
    (disk & 0xffff == 0 && disk >> 16 < 1 << 16).then_some((disk >> 16) as u32)
}

#[derive(Clone, Copy, Debug)]
struct Write {
    version: u64,
    /// Moments of the oracle's own clock; `done` is `MAX` until it is answered.
    submitted: u64,
    done: u64,
    ok: bool,
    /// Covered by an answered flush.
    durable: bool,
    /// A discard: the sector may read as zeros from now on, or as before.
    advice: bool,
    /// The store lost its cache with this write in it, or a part of it: the sector may hold
    /// anything of this disk's. A flush that succeeds without an error before it says otherwise.
    lost: bool,
}

/// One disk's history.
pub struct Oracle {
    pub disk: u32,
    sectors: Vec<Vec<Write>>,
    clock: u64,
    version: u64,
    /// The store may stop in the middle of a sector: what is under way shows in any bytes.
    pub ragged: bool,
    /// What was discarded may read as anything but another disk's bytes.
    pub discards_are_wild: bool,
    /// Moments at which reads and flushes under way began.
    reads: Vec<u64>,
    /// When the store last lost its cache, and whether the guest was told since.
    lost_at: u64,
    told: bool,
}

/// A write (or discard) under way.
#[derive(Clone, Copy, Debug)]
pub struct Ticket {
    pub version: u64,
    pub sector: u64,
    pub sectors: u64,
}

impl Oracle {
    /// A disk of zeros.
    pub fn new(disk: u32, sectors: u64) -> Oracle {
        let base = Write {
            version: 0,
            submitted: 0,
            done: 0,
            ok: true,
            durable: true,
            advice: false,
            lost: false,
        };
        let sectors = vec![vec![base]; sectors as usize];
        Oracle {
            disk,
            sectors,
            clock: 1,
            version: 0,
            ragged: false,
            discards_are_wild: false,
            reads: vec![],
            lost_at: 0,
            told: true,
        }
    }

    /// The disk is full of contents of its own instead of zeros: their bytes.
    pub fn start_full(&mut self) -> Vec<u8> {
        self.version = 1;
        let mut bytes = vec![];
        for (sector, history) in self.sectors.iter_mut().enumerate() {
            history[0].version = 1;
            bytes.extend_from_slice(&content(self.disk, sector as u64, 1));
        }
        bytes
    }

    pub fn sectors(&self) -> u64 {
        self.sectors.len() as u64
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// A write of new contents is submitted; `content` of the ticket's version is to be written.
    pub fn write(&mut self, sector: u64, sectors: u64) -> Ticket {
        self.version += 1;
        self.enter(sector, sectors, self.version, false)
    }

    pub fn discard(&mut self, sector: u64, sectors: u64) -> Ticket {
        self.version += 1;
        self.enter(sector, sectors, self.version, true)
    }

    fn enter(&mut self, sector: u64, sectors: u64, version: u64, advice: bool) -> Ticket {
        let submitted = self.tick();
        let entry = Write {
            version,
            submitted,
            done: u64::MAX,
            ok: false,
            durable: false,
            advice,
            lost: false,
        };
        let oldest_read = self.reads.iter().min().copied().unwrap_or(u64::MAX);
        for history in &mut self.sectors[sector as usize..(sector + sectors) as usize] {
            prune(history, oldest_read);
            history.push(entry);
        }
        Ticket { version, sector, sectors }
    }

    pub fn written(&mut self, ticket: Ticket, ok: bool) {
        let now = self.tick();
        let range = ticket.sector as usize..(ticket.sector + ticket.sectors) as usize;
        for history in &mut self.sectors[range] {
            let entry = history.iter_mut().find(|write| write.version == ticket.version);
            let entry = entry.expect("a write under way");
            (entry.done, entry.ok) = (now, ok);
        }
    }

    /// A read or a flush begins; give the number back to [`Oracle::check`] or
    /// [`Oracle::flushed`].
    pub fn begin(&mut self) -> u64 {
        let now = self.tick();
        self.reads.push(now);
        now
    }

    /// It ended, whatever came of it.
    pub fn end(&mut self, begun: u64) {
        let at = self.reads.iter().position(|read| *read == begun).expect("begun once");
        self.reads.swap_remove(at);
    }

    /// What was answered before the flush began is durable.
    pub fn flushed(&mut self, begun: u64) {
        let untold = !self.told && begun > self.lost_at;
        for write in self.sectors.iter_mut().flatten() {
            write.lost &= !(untold && write.done < begun);
            write.durable |= write.ok && !write.lost && write.done < begun;
        }
    }

    /// A flush, or a write with one before it, failed: the guest knows that what it wrote since
    /// the last good flush may be lost.
    pub fn flush_failed(&mut self) {
        self.told = true;
    }

    /// The store lost its cache: what was not flushed may be there or not.
    pub fn cache_lost(&mut self) {
        (self.lost_at, self.told) = (self.tick(), false);
        for write in self.sectors.iter_mut().flatten() {
            write.lost |= !write.durable;
        }
    }

    /// May a read that began at `begun` and ends now have got these bytes?
    pub fn check(&self, sector: u64, bytes: &[u8], begun: u64) -> Result<(), String> {
        let covers = |y: &Write| y.ok && !y.advice && !y.lost && y.done <= begun;
        self.judge(sector, bytes, covers, "read")
    }

    /// May the sector be this after a power cut?
    pub fn check_after_cut(&self, sector: u64, bytes: &[u8]) -> Result<(), String> {
        let covers = |y: &Write| y.ok && !y.advice && y.durable;
        self.judge(sector, bytes, covers, "after the cut")
    }

    fn judge(
        &self,
        sector: u64,
        bytes: &[u8],
        covers: impl Fn(&Write) -> bool,
        what: &str,
    ) -> Result<(), String> {
        let history = &self.sectors[sector as usize];
        let may_show = |x: &&Write| !history.iter().any(|y| covers(y) && x.done < y.submitted);
        let shown: Vec<&Write> = history.iter().filter(may_show).collect();
        let of = |write: &Write| match write.advice {
            true => [0; SECTOR],
            false => content(self.disk, sector, write.version),
        };
        // A discard lets zeros show whatever was below it.
        if shown.iter().any(|write| of(write) == *bytes) {
            return Ok(());
        }
        let wild = |write: &&Write| write.lost || write.advice && self.discards_are_wild;
        if shown.iter().copied().any(|write| wild(&write))
            && owner(bytes).is_none_or(|it| it == self.disk)
        {
            return Ok(());
        }
        // A failed or unanswered write may have left a part of its bytes.
        if self.ragged || shown.iter().any(|write| !write.ok) {
            let all: Vec<[u8; SECTOR]> = shown.iter().map(|write| of(write)).collect();
            if (0..SECTOR).all(|at| all.iter().any(|one| one[at] == bytes[at])) {
                return Ok(());
            }
        }
        let seen = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
        Err(format!(
            "disk {} sector {sector} {what}: version {seen} of disk {:?}, expected one of {:?}; \
             history {history:?}",
            self.disk,
            owner(bytes),
            shown.iter().map(|write| write.version).collect::<Vec<_>>()
        ))
    }
}

/// Forgets what can never show again: covered by something durable, for every read under way.
fn prune(history: &mut Vec<Write>, oldest_read: u64) {
    if history.len() < 12 {
        return;
    }
    let old = history.clone();
    history.retain(|x| {
        let covered = |y: &Write| {
            y.ok && y.durable && !y.advice && x.done < y.submitted && y.done < oldest_read
        };
        !old.iter().any(covered)
    });
}

#[cfg(test)]
mod tests {
    //! The judge judged. Would miss: a rule that is too kind in a way not listed here.

    use super::*;

    #[test]
    fn what_was_acknowledged_is_read_and_nothing_else() {
        let mut oracle = Oracle::new(3, 4);
        let a = oracle.write(1, 1);
        let bytes = |version| content(3, 1, version);
        let begun = oracle.begin();
        assert!(
            oracle.check(1, &bytes(0), begun).is_ok() && oracle.check(1, &bytes(1), begun).is_ok()
        );
        oracle.written(a, true);
        assert!(oracle.check(1, &bytes(0), begun).is_ok(), "the read began before the answer");
        let begun = oracle.begin();
        assert!(oracle.check(1, &bytes(0), begun).is_err());
        assert!(oracle.check(1, &bytes(1), begun).is_ok());
        assert!(oracle.check(1, &content(3, 2, 1), begun).is_err(), "another sector's bytes");
        assert!(oracle.check(1, &content(4, 1, 1), begun).is_err(), "another disk's bytes");
    }

    #[test]
    fn concurrent_writes_may_be_either() {
        let mut oracle = Oracle::new(1, 1);
        let (a, b) = (oracle.write(0, 1), oracle.write(0, 1));
        oracle.written(b, true);
        oracle.written(a, true);
        let begun = oracle.begin();
        for (version, fine) in [(0, false), (1, true), (2, true)] {
            assert_eq!(oracle.check(0, &content(1, 0, version), begun).is_ok(), fine);
        }
    }

    #[test]
    fn a_cut_keeps_what_was_flushed() {
        let mut oracle = Oracle::new(1, 1);
        let a = oracle.write(0, 1);
        oracle.written(a, true);
        let begun = oracle.begin();
        let b = oracle.write(0, 1);
        oracle.written(b, true);
        oracle.flushed(begun);
        for (version, fine) in [(0, false), (1, true), (2, true)] {
            assert_eq!(oracle.check_after_cut(0, &content(1, 0, version)).is_ok(), fine);
        }
    }

    #[test]
    fn a_failed_write_may_leave_parts_and_a_discard_zeros() {
        let mut oracle = Oracle::new(1, 1);
        let a = oracle.write(0, 1);
        oracle.written(a, false);
        let mut torn = content(1, 0, 1);
        torn[100..].fill(0);
        let begun = oracle.begin();
        assert!(oracle.check(0, &torn, begun).is_ok());
        let b = oracle.write(0, 1);
        oracle.written(b, true);
        let begun = oracle.begin();
        assert!(oracle.check(0, &torn, begun).is_err());
        let c = oracle.discard(0, 1);
        oracle.written(c, true);
        assert!(oracle.check(0, &[0; SECTOR], begun).is_ok());
        assert!(oracle.check(0, &content(1, 0, 2), begun).is_ok());
    }
}
