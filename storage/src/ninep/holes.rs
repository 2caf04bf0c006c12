//! What is known of one file's holes, so that reading what nobody wrote costs no message.
//!
//! A server of platter's dialect says which ranges have space (Textents). It is asked once a file
//! with holes is read in sequence, and its answer is believed for a second. Guards that a hole is
//! never believed in that may have been written: only a file that we alone may write is asked
//! for (the kernel gives a file to one writer; the server says no when another client of its has
//! it open), never while a write is under way, and a write takes its range out before it is
//! sent, or voids an answer that is still to come. Must never: allocate, keep more than a few.

use heapless::Vec;
use platter_xen::Hypervisor;

use super::client::{Client, Kind, REQUEST_BYTES_MAX, fid_of, op, window};
use super::message::{ANSWER_BYTES_MAX, Answer, Extent, Request};
use crate::store::{Answer as Reply, Done, FileId, StoreFault, Tag};

/// Holes known of a file: those that are found first.
const HOLES_MAX: usize = 4;
/// Shorter ones are not worth a place.
const HOLE_BYTES_MIN: u64 = 64 << 10;
/// How long an answer is believed.
const KNOWN_NS: u64 = 1_000_000_000;
/// Reads between two questions, at least.
const READS_MIN: u32 = 16;
/// Reads, in any order, until a file is asked for that is not read in sequence.
const READS_ANY: u32 = 64;

/// A question that is under way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Question {
    from: u64,
    /// Something was written meanwhile: the answer may be older.
    void: bool,
}

/// One file's.
#[derive(Debug, Default)]
pub struct Holes {
    /// Nothing is asked for: no holes, not ours alone, or no such dialect.
    pub off: bool,
    known: Vec<Extent, HOLES_MAX>,
    until_ns: u64,
    /// The answer reached from where to where.
    reach: (u64, u64),
    question: Option<Question>,
    /// Messages for reads since the last question, and where the last read ended.
    reads: u32,
    next: u64,
    /// Changes of the file under way.
    changes: u32,
}

impl Holes {
    fn within(&self, offset: u64, len: u64) -> bool {
        let end = offset.saturating_add(len);
        self.known.iter().any(|hole| hole.offset <= offset && end <= hole.offset + hole.len)
    }

    /// All of a range is known to read as zeros. `read` says so: the next may follow it.
    pub fn has(&mut self, offset: u64, len: u32, now_ns: u64) -> bool {
        let has = now_ns < self.until_ns && self.within(offset, len.into());
        if has {
            self.next = offset + u64::from(len);
        }
        has
    }

    /// A read was sent. Is it time to ask what lies from there on?
    fn asks_after(&mut self, offset: u64, len: u32, now_ns: u64) -> bool {
        let follows =
            core::mem::replace(&mut self.next, offset.saturating_add(len.into())) == offset;
        self.reads = self.reads.saturating_add(1);
        let wanted = follows || self.within(offset, 1) || self.reads >= READS_ANY;
        let (from, to) = self.reach;
        let known = now_ns < self.until_ns && (from..to).contains(&offset);
        let soon = self.until_ns > 0 && now_ns < self.until_ns && self.reads < READS_MIN;
        !self.off && self.question.is_none() && self.changes == 0 && wanted && !known && !soon
    }

    /// A range is about to be changed.
    pub fn change(&mut self, offset: u64, len: u64) {
        self.changes += 1;
        if let Some(question) = &mut self.question {
            question.void = true;
        }
        let end = offset.saturating_add(len);
        for hole in &mut self.known {
            let hole_end = hole.offset + hole.len;
            if hole.offset < end && offset < hole_end {
                // The longer rest stays.
                let (before, after) =
                    (offset.saturating_sub(hole.offset), hole_end.saturating_sub(end));
                let start = if after > before { end } else { hole.offset };
                *hole = Extent { offset: start, len: before.max(after) };
            }
        }
        self.known.retain(|hole| hole.len >= HOLE_BYTES_MIN);
    }

    /// A change is over.
    pub fn changed(&mut self) {
        self.changes -= 1;
    }

    /// Nothing is known; changes under way stay so.
    pub fn forget(&mut self) {
        *self = Holes { changes: self.changes, off: self.off, ..Holes::default() };
    }

    /// `Err` when the server may not answer so.
    fn learn(&mut self, end: u64, extents: &[Extent], now_ns: u64) -> Result<(), StoreFault> {
        let Some(Question { from, void }) = self.question.take() else {
            return Err(StoreFault::Protocol);
        };
        self.known.clear();
        let mut at = from;
        let last = Extent { offset: end, len: 0 };
        for extent in extents.iter().chain([&last]) {
            let next = extent.offset.checked_add(extent.len).ok_or(StoreFault::Protocol)?;
            let len = extent.offset.checked_sub(at).ok_or(StoreFault::Protocol)?;
            if len >= HOLE_BYTES_MIN && self.known.push(Extent { offset: at, len }).is_err() {
                break;
            }
            at = next;
        }
        if void {
            self.known.clear();
        }
        (self.reach, self.until_ns, self.reads) = ((from, at), now_ns + KNOWN_NS, 0);
        Ok(())
    }

    fn refused(&mut self, ecode: u32, now_ns: u64) {
        self.forget();
        // EOPNOTSUPP and ENOSYS: it never will. EBUSY and whatever else: not now.
        self.off |= matches!(ecode, 95 | 38);
        (self.reach, self.until_ns) = ((0, u64::MAX), now_ns + KNOWN_NS);
    }
}

impl Client {
    /// A read of nothing but a known hole is answered with the next poll.
    pub(super) fn answers_at_home(
        &mut self,
        tag: Tag,
        file: FileId,
        offset: u64,
        len: u32,
    ) -> Result<bool, StoreFault> {
        self.file_is_ready(file)?;
        let slot = self.files[usize::from(file.0)].as_mut().expect("it is ready");
        if self.home.is_full() || !slot.holes.has(offset, len, self.now_ns) {
            return Ok(false);
        }
        slot.outstanding += 1;
        let nothing = window(self.lanes[0].ring.in_spans(0, 0));
        let done = Done { tag, result: Ok(Reply::Read(nothing)) };
        let pushed = self.home.push_back((file.0, done));
        assert!(pushed.is_ok(), "just seen to have room");
        Ok(true)
    }

    /// A read went out: asks for the holes from there on if that may save the next ones.
    pub(super) fn ask_for_holes<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        index: u16,
        (offset, len): (u64, u32),
    ) {
        let now_ns = self.now_ns;
        let Some(Some(file)) = self.files.get_mut(usize::from(index)) else { return };
        let rest = file.size_bytes.saturating_sub(offset);
        if !file.holes.asks_after(offset, len, now_ns) || rest == 0 {
            return;
        }
        let request = Request::Extents { fid: fid_of(usize::from(index)), offset, len: rest };
        let mut op = op(Kind::Extents, index, 0, Tag(0));
        op.answer_bytes = ANSWER_BYTES_MAX as u32;
        // Without room it is asked after another read.
        if self.send(hv, &request, op, &mut [0; REQUEST_BYTES_MAX]) == Ok(true)
            && let Some(Some(file)) = self.files.get_mut(usize::from(index))
        {
            file.holes.question = Some(Question { from: offset, void: false });
            file.outstanding += 1;
        }
    }

    /// `Err` when the server may not answer so.
    pub(super) fn holes_answered(
        &mut self,
        index: u16,
        answer: &Answer<'_>,
    ) -> Result<(), StoreFault> {
        let now_ns = self.now_ns;
        let slot = self.files.get_mut(usize::from(index)).and_then(Option::as_mut);
        let holes = &mut slot.ok_or(StoreFault::Protocol)?.holes;
        match answer {
            // As for every other message on a fid of ours.
            Answer::Lerror { ecode: 9 } => Err(StoreFault::Protocol),
            Answer::Lerror { ecode } => {
                holes.refused(*ecode, now_ns);
                Ok(())
            }
            Answer::Extents { end, extents } => holes.learn(*end, extents, now_ns),
            _ => Err(StoreFault::Protocol),
        }
    }
}

/// Would miss: what other programs write to a file in dom0, which nobody may do.
#[cfg(test)]
mod tests {
    use super::*;

    const K: u64 = 1024;

    fn asked(from: u64) -> Holes {
        Holes { question: Some(Question { from, void: false }), ..Holes::default() }
    }

    fn extent(offset: u64, len: u64) -> Extent {
        Extent { offset: offset * K, len: len * K }
    }

    #[test]
    fn holes_lie_between_extents_and_are_believed_for_a_second() {
        let mut holes = asked(0);
        holes.learn(2048 * K, &[extent(256, 64), extent(340, 4)], 7).unwrap();
        assert!(holes.has(0, 256 << 10, 8));
        assert!(!holes.has(K, 256 << 10, 8), "data follows");
        assert!(!holes.has(320 * K, 4096, 8), "too short to be kept");
        assert!(holes.has(2044 * K, 4096, 8));
        assert!(!holes.has(2044 * K, 8192, 8), "beyond the answer's reach");
        assert!(!holes.has(0, 4096, 7 + KNOWN_NS));
    }

    #[test]
    fn a_change_takes_its_range_out_and_voids_an_answer_to_come() {
        let mut holes = asked(0);
        holes.learn(1024 * K, &[], 0).unwrap();
        holes.change(300 * K, 4 * K);
        assert!(!holes.has(300 * K, 512, 1) && !holes.has(0, 4096, 1));
        assert!(holes.has(304 * K, 720 << 10, 1), "the longer rest");
        holes.change(400 * K, u64::MAX);
        assert!(holes.has(304 * K, 96 << 10, 1));
        holes.change(0, 360 * K);
        assert!(holes.known.is_empty(), "what is left is short");

        let mut holes = asked(0);
        holes.change(0, 1);
        holes.learn(1024 * K, &[], 0).unwrap();
        assert!(!holes.has(512 * K, 512, 1));
    }

    #[test]
    fn a_question_waits_for_a_sequence_and_for_changes() {
        let mut holes = Holes { next: 1, ..Holes::default() };
        assert!(!holes.asks_after(0, 4096, 1), "the first read");
        assert!(!holes.asks_after(64 * K, 4096, 1), "another place");
        holes.change(0, 1);
        assert!(!holes.asks_after(68 * K, 4096, 1), "a write is under way");
        holes.changed();
        assert!(holes.asks_after(72 * K, 4096, 1));
        holes.question = Some(Question { from: 72 * K, void: false });
        assert!(!holes.asks_after(76 * K, 4096, 1), "asked already");
        holes.learn(1024 * K, &[extent(72, 952)], 1).unwrap();
        assert!(!holes.asks_after(80 * K, 4096, 2), "it is data");
        assert!(!holes.asks_after(1024 * K, 4096, 2), "too soon");
        assert!(holes.asks_after(1028 * K, 4096, 1 + KNOWN_NS), "an old answer");
    }

    #[test]
    fn answers_out_of_order_or_unasked_are_refused() {
        let fault = Err(StoreFault::Protocol);
        assert_eq!(Holes::default().learn(0, &[], 0), fault);
        assert_eq!(asked(8).learn(4, &[], 0), fault);
        assert_eq!(asked(0).learn(1024 * K, &[extent(8, 8), extent(4, 8)], 0), fault);
        let endless = Extent { offset: 8, len: u64::MAX };
        assert_eq!(asked(0).learn(u64::MAX, &[endless], 0), fault);
    }

    #[test]
    fn a_server_that_cannot_is_asked_once() {
        let mut holes = asked(0);
        holes.refused(16, 0);
        assert!(!holes.asks_after(0, 1, KNOWN_NS - 1) && holes.asks_after(1, 1, KNOWN_NS), "EBUSY");
        let mut holes = asked(0);
        holes.refused(95, 0);
        holes.asks_after(0, 1, KNOWN_NS);
        assert!(!holes.asks_after(1, 1, 9 * KNOWN_NS), "EOPNOTSUPP");
    }
}
