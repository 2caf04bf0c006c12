//! One frontend's rings and session: requests taken, files moved, answers sent.
//!
//! Knows no Xen device and never sleeps: whoever owns it calls [`Serving::turn`], tells the
//! frontend what [`Serving::bells`] says, and sleeps when a turn found nothing. Guards that each
//! request is answered once, that Tflush and Tversion come after what was asked before them, on
//! whichever ring, and that requests and bytes in flight are bounded; beyond that the frontend's
//! ring waits. Must never: end with a request under way, since the next connection may write
//! where it does.

use std::sync::Arc;

use platter_storage::ninep::message::{Answer, PLATTER_IN_FLIGHT, RREAD_BYTES, id};
use platter_xen::ninepfs::RINGS_MAX;
use rustix::io::Errno;

use crate::buffer::{POOL_BYTES_MAX, Pool};
use crate::job::{self, Job};
use crate::locks::LOCKS_BYTES_MAX;
use crate::open::{Move, Patience, Transfer};
use crate::os::uring::{End, Moved, Uring};
use crate::ring::{BODY_BYTES_MAX, Fault, Ring};
use crate::session::{
    ANSWER_BYTES, FID_BYTES, FIDS_MAX, MSIZE_MAX, Outcome, PATHS_BYTES_MAX, Session, emit, error,
};
use crate::share::Share;
use crate::usage::COUNT_BYTES_MAX;
use crate::workers::{Done, Mailbox, Task, Workers};

/// Bytes of requests that one frontend may have under way.
const IN_FLIGHT_BYTES_MAX: usize = 8 << 20;
/// Memory that one frontend can make the server take: one request more than that, what is kept
/// for later ones, the fids and their names, locks, Tflushes, the count of a share whose space is
/// limited, and what is of one size.
pub const FRONTEND_BYTES_MAX: usize = IN_FLIGHT_BYTES_MAX
    + MSIZE_MAX as usize
    + POOL_BYTES_MAX
    + PATHS_BYTES_MAX
    + FIDS_MAX * FID_BYTES
    + LOCKS_BYTES_MAX
    + FLUSHES_MAX * (size_of::<Flush>() + RINGS_MAX * size_of::<u64>())
    + COUNT_BYTES_MAX
    + (128 << 10);
/// Tflushes that wait; more of them wait in their ring, for what is under way.
const FLUSHES_MAX: usize = 512;
/// Requests of one ring in one turn: then the frontend is told, and the others are looked at.
const TURN_REQUESTS: u32 = 64;
/// Bytes moved in one turn, over all rings: then the frontend is told, so that it takes these while
/// the next ones are moved.
const TURN_BYTES: u32 = 256 << 10;

/// A request that a worker or the kernel has.
struct Flight {
    ring: usize,
    tag: u16,
    bytes: usize,
}

/// A Tflush that waits for the request with `oldtag`.
struct Flush {
    ring: usize,
    tag: u16,
    oldtag: u16,
    /// How far each ring was filled when it came: that request may be among what was unread.
    /// Linux chooses rings by tags, so that the two seldom lie in the same one.
    filled: Box<[u64]>,
}

pub struct Serving {
    rings: Vec<Ring>,
    session: Session,
    /// Where there is one it goes before the workers.
    uring: Option<Uring>,
    workers: Workers,
    mailbox: Arc<Mailbox>,
    flights: Vec<Flight>,
    flushes: Vec<Flush>,
    pool: Pool,
    patience: Patience,
    /// A Tversion waits at the front of a ring until nothing is under way.
    closing: bool,
    /// A request or an answer waits for room in a ring towards the frontend.
    blocked: bool,
    body: Box<[u8; BODY_BYTES_MAX]>,
    answer: Box<[u8; ANSWER_BYTES]>,
    /// The ring whose turn is next.
    first: usize,
}

/// What became of the request at the front of a ring.
enum Step {
    /// So many bytes were moved.
    Served(u32),
    /// There is none, or none that can be served now.
    Nothing,
}

impl Serving {
    /// `rings` is not empty.
    pub fn new(rings: Vec<Ring>, share: Share, workers: Workers, mailbox: Arc<Mailbox>) -> Serving {
        let half = rings.iter().map(Ring::half_bytes).min().expect("a frontend has a ring");
        Serving {
            rings,
            session: Session::new(share, half),
            uring: None,
            workers,
            mailbox,
            flights: Vec::new(),
            flushes: Vec::new(),
            pool: Pool::default(),
            patience: Patience::default(),
            closing: false,
            blocked: false,
            body: Box::new([0; BODY_BYTES_MAX]),
            answer: Box::new([0; ANSWER_BYTES]),
            first: 0,
        }
    }

    /// Lends it an io_uring.
    pub fn set_uring(&mut self, uring: Option<Uring>) {
        self.uring = uring;
    }

    /// Gives it back, with nothing under way: the end.
    pub fn take_uring(&mut self) -> Option<Uring> {
        let mut uring = self.uring.take()?;
        uring.drain();
        Some(uring)
    }

    /// To be slept on.
    pub fn uring(&self) -> Option<&Uring> {
        self.uring.as_ref()
    }

    /// Sends what is done and serves what is asked, for a while. False when there was nothing.
    pub fn turn(&mut self) -> Result<bool, Fault> {
        let mut worked = false;
        while let Some(end) = self.uring.as_mut().and_then(Uring::take) {
            let End { job, tag, ring, moved } = end;
            match moved {
                Moved::Part => self.give_to_worker(job, tag, ring),
                Moved::All => self.finish(moved_by_kernel(job, tag, ring, Ok(())))?,
                Moved::Failed(errno) => self.finish(moved_by_kernel(job, tag, ring, Err(errno)))?,
            }
            worked = true;
        }
        while let Some(done) = self.mailbox.take() {
            self.finish(done)?;
            worked = true;
        }
        for ring in &mut self.rings {
            worked |= ring.send()?;
        }
        self.answer_flushes()?;
        self.closing = false;
        self.blocked = self.rings.iter().any(Ring::is_full);
        let mut bytes = 0;
        for _ in 0..self.rings.len() {
            worked |= self.serve(self.first, &mut bytes)?;
            self.first = (self.first + 1) % self.rings.len();
            if bytes >= TURN_BYTES {
                break;
            }
        }
        self.answer_flushes()?;
        // What the kernel has no room for now is tried again before long.
        self.blocked |= !self.uring.as_mut().is_none_or(Uring::submit);
        self.patience.judge();
        Ok(worked)
    }

    /// The ports of rings that have news for the frontend, each told once. A frontend that
    /// speaks platter's dialect looks at all its rings whenever one rings.
    pub fn bells(&mut self) -> impl Iterator<Item = u32> {
        let one_is_enough = self.session.is_platter;
        let mut rung = false;
        self.rings.iter_mut().filter_map(move |ring| {
            let news = std::mem::take(&mut ring.notify) && !(rung && one_is_enough);
            rung |= news;
            news.then_some(ring.port)
        })
    }

    /// Something waits for a frontend that might not say that it made room.
    pub fn waits_for_room(&self) -> bool {
        self.blocked
    }

    /// A ring's turn; adds the bytes it moved to `bytes`.
    fn serve(&mut self, index: usize, bytes: &mut u32) -> Result<bool, Fault> {
        for served in 0..TURN_REQUESTS {
            if *bytes >= TURN_BYTES {
                return Ok(true);
            }
            match self.step(index)? {
                Step::Served(more) => *bytes += more,
                Step::Nothing => return Ok(served > 0),
            }
        }
        Ok(true)
    }

    /// Serves the request at the front of a ring.
    fn step(&mut self, index: usize) -> Result<Step, Fault> {
        let under_way = self.flights.iter().filter(|flight| flight.ring == index).count();
        let bytes = self.flights.iter().map(|flight| flight.bytes).sum::<usize>()
            + self.rings.iter().map(Ring::waiting_bytes).sum::<usize>();
        let is_busy = under_way >= PLATTER_IN_FLIGHT as usize || bytes >= IN_FLIGHT_BYTES_MAX;
        let ring = &mut self.rings[index];
        if self.closing || is_busy {
            return Ok(Step::Nothing);
        }
        if ring.room()? < ANSWER_BYTES as u32 {
            self.blocked = true;
            return Ok(Step::Nothing);
        }
        let Some(head) = ring.peek(self.session.msize)? else { return Ok(Step::Nothing) };
        match head.id {
            id::TVERSION if !self.flights.is_empty() => {
                self.closing = true;
                return Ok(Step::Nothing);
            }
            // They may wait for what lies behind it, which is of another session.
            id::TVERSION => self.end_flushes(|_, _| true)?,
            id::TFLUSH if self.flushes.len() >= FLUSHES_MAX => {
                // Rings that are full of them would wait for each other.
                let is_stuck = self.flights.is_empty();
                return if is_stuck { Err(Fault::Flushes) } else { Ok(Step::Nothing) };
            }
            _ => {}
        }
        let ring = &mut self.rings[index];
        let body = ring.fields(head, &mut self.body)?;
        let tag = head.tag;
        let mut moved = 0;
        let job = match self.session.handle(head, body, &mut self.answer[..]) {
            Outcome::Answer(len) => {
                ring.publish(&self.answer[..len], 0);
                None
            }
            Outcome::Listing(len, data) => {
                ring.answer(tag, &self.answer[..len], &data)?;
                None
            }
            Outcome::Flush { oldtag } => {
                self.take_flush(index, tag, oldtag)?;
                None
            }
            Outcome::Work(job) => Some(job),
            Outcome::Move(order) => {
                if !order.is_write && ring.room()? < RREAD_BYTES + order.count {
                    self.blocked = true;
                    return Ok(Step::Nothing);
                }
                moved = order.count;
                match at_once(ring, &mut self.patience, order) {
                    Ok(done) => {
                        let placed = read_count(&done);
                        let len = emit_outcome(tag, &done, &mut self.answer[..]);
                        ring.publish(&self.answer[..len], placed);
                        None
                    }
                    Err(order) => Some(for_a_worker(ring, &mut self.pool, order)),
                }
            }
        };
        self.rings[index].consume(head.size);
        if let Some(job) = job {
            self.start(job, tag, index);
        }
        Ok(Step::Served(moved))
    }

    fn take_flush(&mut self, ring: usize, tag: u16, oldtag: u16) -> Result<(), Fault> {
        let mut filled: Box<[_]> = self.rings.iter().map(Ring::filled).collect::<Result<_, _>>()?;
        // What lies behind it in its own ring was asked later.
        filled[ring] = 0;
        self.flushes.push(Flush { ring, tag, oldtag, filled });
        Ok(())
    }

    fn start(&mut self, job: Job, tag: u16, ring: usize) {
        self.flights.push(Flight { ring, tag, bytes: job.bytes() });
        let left = match &mut self.uring {
            Some(uring) => uring.start(job, tag, ring).err(),
            None => Some(job),
        };
        if let Some(job) = left {
            self.give_to_worker(job, tag, ring);
        }
    }

    fn give_to_worker(&self, job: Job, tag: u16, ring: usize) {
        self.workers.run(Task { job, tag, ring, to: Arc::clone(&self.mailbox) });
    }

    /// A worker's answer, or the kernel's.
    fn finish(&mut self, done: Done) -> Result<(), Fault> {
        let Done { outcome, buffer, tag, ring } = done;
        let flight =
            self.flights.iter().position(|flight| (flight.ring, flight.tag) == (ring, tag));
        self.flights.swap_remove(flight.expect("a worker answers what it was given, once"));
        let len = emit_outcome(tag, &outcome, &mut self.answer[..]);
        let data = buffer.as_ref().map_or(&[][..], |b| b.slice(read_count(&outcome) as usize));
        self.rings[ring].answer(tag, &self.answer[..len], data)?;
        if let Some(buffer) = buffer {
            self.pool.give(buffer);
        }
        Ok(())
    }

    /// Answers each Tflush whose request is answered, its answer in the ring (9P flush(5)).
    fn answer_flushes(&mut self) -> Result<(), Fault> {
        self.end_flushes(|serving, flush| {
            let is_unread = |(ring, filled): (&Ring, &u64)| ring.consumed < *filled;
            !serving.rings.iter().zip(&flush.filled).any(is_unread)
                && !serving.flights.iter().any(|flight| flight.tag == flush.oldtag)
                && !serving.rings.iter().any(|ring| ring.owes(flush.oldtag))
        })
    }

    /// Answers each Tflush that `may` be answered.
    fn end_flushes(&mut self, may: impl Fn(&Serving, &Flush) -> bool) -> Result<(), Fault> {
        let mut index = 0;
        while let Some(flush) = self.flushes.get(index) {
            if !may(self, flush) {
                index += 1;
                continue;
            }
            let Flush { ring, tag, .. } = self.flushes.swap_remove(index);
            let len = emit(tag, &Answer::Flush, &mut self.answer[..]);
            self.rings[ring].answer(tag, &self.answer[..len], &[])?;
        }
        Ok(())
    }
}

/// What nobody has begun is forgotten, as when a machine loses its power; the rest is waited for.
impl Drop for Serving {
    fn drop(&mut self) {
        self.workers.drain(&self.mailbox);
        drop(self.take_uring());
    }
}

/// Moves an order's data, unless that has to wait.
fn at_once<'a>(
    ring: &Ring,
    patience: &mut Patience,
    order: Move<'a>,
) -> Result<job::Outcome, Move<'a>> {
    if order.must_wait() {
        return Err(order);
    }
    let Move { ref open, offset, count, is_write, .. } = order;
    let transfer = Transfer { file: &open.file, offset, count, dontcache: open.dontcache };
    let mut foretells = if is_write { open.foretells.write } else { open.foretells.read };
    let is_whole = |len| len == count as usize || !is_write && transfer.ends_after(len);
    let done = patience.at_once(&mut foretells, is_whole, |now| {
        if is_write { ring.write_file(&transfer, now) } else { ring.read_file(&transfer, now) }
    });
    let field = &mut order.open.foretells;
    *if is_write { &mut field.write } else { &mut field.read } = foretells;
    let answer = |len: usize| match (is_write, len as u32) {
        (true, count) => Answer::Write { count },
        (false, count) => Answer::Read { count },
    };
    done.map(|done| done.map(answer)).ok_or(order)
}

/// The same, with a buffer of its own, for which a write's data is copied.
fn for_a_worker(ring: &Ring, pool: &mut Pool, order: Move) -> Job {
    let direct = order.direct().map(Arc::clone);
    let Move { open, offset, count, is_write, charge } = order;
    let (is_direct, file) = (direct.is_some(), direct.unwrap_or_else(|| Arc::clone(&open.file)));
    let mut buffer = pool.take(count as usize);
    if !is_write {
        return Job::Read { file, offset, count, buffer, how: open.worker_flags() };
    }
    ring.copy_data(buffer.slice_mut(count as usize));
    let how = open.worker_flags();
    Job::Write { file, offset, count, buffer, how, direct: is_direct, charge }
}

/// A read or write that ended as a whole, as if a worker had done it.
fn moved_by_kernel(job: Job, tag: u16, ring: usize, result: Result<(), Errno>) -> Done {
    let count = job.bytes() as u32;
    let is_read = matches!(job, Job::Read { .. });
    let answer = if is_read { Answer::Read { count } } else { Answer::Write { count } };
    Done { outcome: result.map(|()| answer), buffer: job.into_buffer(), tag, ring }
}

/// Bytes of data that follow an answer.
fn read_count(outcome: &job::Outcome) -> u32 {
    match outcome {
        Ok(Answer::Read { count }) => *count,
        _ => 0,
    }
}

fn emit_outcome(tag: u16, outcome: &job::Outcome, out: &mut [u8]) -> usize {
    match outcome {
        Ok(answer) => emit(tag, answer, out),
        Err(errno) => error(tag, *errno, out),
    }
}

#[cfg(test)]
#[path = "serving_tests.rs"]
mod tests;
