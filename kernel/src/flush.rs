//! Making a disk durable: one flush at a time, in the order the image's plan gives.
//!
//! A guest's FLUSH waits for the writes that came before it, then for a flush that began after
//! them. With clean metadata a flush is one sync of each writable file and holds up nothing;
//! otherwise commits wait until it ends. A flush ends only when the reads that began before it
//! are done, because what it frees may be written anew.

use platter_image::{FileNo, FlushStep};
use platter_storage::{Run, Store, StoreFault};
use platter_xen::{Hypervisor, Region};

use crate::config::Cache;
use crate::disk::{Disk, Progress};
use crate::engine::{Engine, Op, OpKind, Stretch, Submitted};
use crate::fault::Fault;
use crate::request::{Request, Stage};
use crate::table::Id;

/// Longest single write of a flush plan, bytes: the scratch region's size.
pub const STEP_BYTES_MAX: usize = 64 * 1024;

/// The last sector of a file that must be longer.
const TAIL_BYTES: usize = 512;

/// How often a flush is run again because the store took only a part of a write: a store that
/// is not full does so rarely.
const TRIES_MAX: u8 = 16;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mode {
    Idle,
    /// Sync the writable files from this one on; nothing is dirty.
    SyncOnly {
        next: u16,
    },
    /// Follow the image's plan.
    Plan,
    /// All steps are done; earlier reads are not.
    Draining,
}

/// A step that found no room.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Pending {
    /// `len` bytes of the scratch region from `from`.
    Write {
        file: FileNo,
        offset: u64,
        from: usize,
        len: usize,
    },
    Sync {
        file: FileNo,
    },
}

/// The flush of one disk.
pub struct FlushRun {
    mode: Mode,
    /// Number of the flush under way or the last one.
    number: u64,
    /// The image asks for a flush (cache pressure, or an order that needs it).
    pub wanted: bool,
    /// A file must be so long before anything says that it is: zeros at its end are the first write
    /// of each flush until one has succeeded. Nobody else writes there meanwhile.
    pub tail: Option<(FileNo, u64)>,
    pending: Option<Pending>,
    /// Operations under way.
    ops: u16,
    failed: Option<Fault>,
    /// A sync was answered with a failure. Systems report what they could not write once, of any
    /// kind, to the sync that comes next: nobody else will hear of it.
    sync_failed: bool,
    /// A write was done in part, and its bytes are gone from the scratch region: run it again.
    short: bool,
    /// How often this flush was run again.
    tries: u8,
    /// A flush that no guest waited for failed, and what was answered before it may be lost with
    /// a cache: the next flush of a guest says so, once.
    owed: Option<Fault>,
    /// When dirty metadata was first seen, for the lazy flush.
    pub dirty_since_ns: Option<u64>,
    /// For bytes that found no room in their store.
    pub scratch: Region,
}

impl FlushRun {
    /// `scratch`: 64 KiB of our own.
    pub fn new(scratch: Region) -> FlushRun {
        FlushRun {
            mode: Mode::Idle,
            number: 0,
            wanted: false,
            tail: None,
            pending: None,
            ops: 0,
            failed: None,
            sync_failed: false,
            short: false,
            tries: 0,
            owed: None,
            dirty_since_ns: None,
            scratch,
        }
    }

    pub fn is_running(&self) -> bool {
        self.mode != Mode::Idle
    }

    /// The last flush that ended did not make everything durable.
    pub fn failed_last(&self) -> bool {
        self.mode == Mode::Idle && self.failed.is_some()
    }

    /// A failure of long ago is no reason not to try: the store may be well again.
    pub fn forget_failure(&mut self) {
        if self.mode == Mode::Idle {
            self.failed = None;
        }
    }
}

impl Disk {
    /// Starts a flush if one is due and carries on the one under way.
    pub fn pump_flush<H: Hypervisor, S: Store<H>>(&mut self, engine: &mut Engine<S>, hv: &mut H) {
        if self.flush.mode == Mode::Idle && !self.begin_flush(engine, hv) {
            return;
        }
        match self.flush.mode {
            Mode::SyncOnly { .. } => self.pump_syncs(engine, hv),
            Mode::Plan => self.pump_plan(engine, hv),
            Mode::Idle | Mode::Draining => {}
        }
        self.end_flush(engine, hv);
    }

    /// A flush write was done in part.
    pub fn flush_write_short(&mut self) {
        self.flush.short = true;
        self.flush_op_done(Ok(()));
    }

    /// A flush operation was answered.
    pub fn flush_op_done(&mut self, result: Result<(), Fault>) {
        self.flush.ops -= 1;
        if let Err(fault) = result {
            self.flush.failed.get_or_insert(fault);
        }
    }

    /// The answer to a sync was a failure.
    pub fn flush_sync_failed(&mut self, fault: Fault) {
        self.flush.sync_failed = true;
        self.flush_op_done(Err(fault));
    }

    /// Is there a reason to flush, and do the writes before it allow it?
    fn begin_flush<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
    ) -> bool {
        if self.flush_waiters == 0 && !self.flush.wanted {
            return false;
        }
        let waiting = self.requests_waiting_for_flush(engine);
        if waiting.is_empty() && !self.flush.wanted {
            return false;
        }
        let number = self.flush.number + 1;
        if self.cache == Cache::Unsafe && !self.flush.wanted {
            waiting.iter().for_each(|&id| self.flushed(engine, hv, id));
            return false;
        }
        for id in waiting {
            match &mut engine.requests.get(id).stage {
                Stage::FlushFirst { by } | Stage::FlushAfter { by } => *by = Some(number),
                Stage::Moving => {}
            }
        }
        let mode = Mode::SyncOnly { next: 0 };
        assert!(self.flush.ops == 0, "a flush begins when the last one has ended");
        let FlushRun { tries, owed, tail, scratch, .. } = self.flush;
        self.flush = FlushRun { number, mode, tries, owed, tail, ..FlushRun::new(scratch) };
        if let Some((file, bytes)) = tail {
            let (from, len) = (0, TAIL_BYTES);
            hv.zero(scratch, from, len);
            let offset = bytes.saturating_sub(len as u64);
            self.flush.pending = Some(Pending::Write { file, offset, from, len });
        }
        if self.image.is_dirty() || tail.is_some() {
            self.flush.mode = Mode::Plan;
            self.parity ^= 1;
            self.image.flush_begin();
        }
        true
    }

    /// Requests that wait for a flush and whose earlier writes are all done.
    fn requests_waiting_for_flush<S>(
        &self,
        engine: &Engine<S>,
    ) -> heapless::Vec<Id, { crate::limits::REQUESTS_MAX }> {
        let of_mine = || engine.requests.iter().filter(|(_, r)| r.disk == self.index);
        let earlier_write = |seq: u64| {
            let writing = |r: &Request| r.changes() && r.seq < seq && !r.is_flushing_after();
            of_mine().any(|(_, r)| writing(r))
        };
        of_mine()
            .filter(|(_, r)| match r.stage {
                Stage::FlushFirst { by: None } => !earlier_write(r.seq),
                Stage::FlushAfter { by: None } => true,
                _ => false,
            })
            .map(|(id, _)| id)
            .collect()
    }

    fn pump_syncs<H: Hypervisor, S: Store<H>>(&mut self, engine: &mut Engine<S>, hv: &mut H) {
        while let Mode::SyncOnly { next } = self.flush.mode {
            let files = self.files.len() as u16;
            if next >= files || self.flush.failed.is_some() {
                self.flush.mode = Mode::Draining;
                return;
            }
            let file = FileNo(next);
            if self.files[next as usize].writable && !self.submit_sync(engine, hv, file) {
                return;
            }
            self.flush.mode = Mode::SyncOnly { next: next + 1 };
        }
    }

    fn pump_plan<H: Hypervisor, S: Store<H>>(&mut self, engine: &mut Engine<S>, hv: &mut H) {
        loop {
            if self.flush.failed.is_some() {
                self.flush.mode = Mode::Draining;
                return;
            }
            let step = match self.flush.pending.take() {
                Some(pending) => Some(pending),
                None => match self.image.flush_step() {
                    FlushStep::Done => {
                        self.flush.mode = Mode::Draining;
                        return;
                    }
                    FlushStep::Sync { file } => Some(Pending::Sync { file }),
                    FlushStep::Write { file, offset, bytes } => {
                        assert!(bytes.len() <= STEP_BYTES_MAX, "a longer step than agreed");
                        hv.write(self.flush.scratch, 0, bytes);
                        Some(Pending::Write { file, offset, from: 0, len: bytes.len() })
                    }
                },
            };
            let done = match step {
                Some(Pending::Write { file, offset, from, len }) => {
                    let max = engine.io_bytes_max(self.handle(file)) as usize;
                    let part = len.min(max);
                    let sent = self.submit_flush_write(engine, hv, file, offset, from, part);
                    if sent && part < len {
                        let (offset, from) = (offset + part as u64, from + part);
                        self.flush.pending =
                            Some(Pending::Write { file, offset, from, len: len - part });
                    }
                    sent
                }
                // What came before a sync is done before it is sent.
                Some(Pending::Sync { file }) if self.flush.ops == 0 => {
                    self.submit_sync(engine, hv, file)
                }
                _ => false,
            };
            if !done {
                self.flush.pending = step;
                return;
            }
            if matches!(step, Some(Pending::Sync { .. })) && self.flush.ops > 0 {
                return;
            }
        }
    }

    fn submit_flush_write<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        file: FileNo,
        offset: u64,
        from: usize,
        len: usize,
    ) -> bool {
        let stretch = Stretch { handle: self.handle(file), offset, len: len as u32 };
        // The scratch region is used again at once: all of it goes now, or the flush fails.
        let from = Run { region: self.flush.scratch, offset: from, len };
        let op = Op::new(self.index, stretch, OpKind::FlushWrite { from });
        let submitted = engine.submit(hv, op);
        self.note_flush_op(submitted)
    }

    fn submit_sync<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        file: FileNo,
    ) -> bool {
        if self.cache == Cache::Unsafe {
            return true;
        }
        let stretch = Stretch { handle: self.handle(file), offset: 0, len: 0 };
        let op = Op::new(self.index, stretch, OpKind::FlushSync);
        let submitted = engine.submit(hv, op);
        self.note_flush_op(submitted)
    }

    fn note_flush_op(&mut self, submitted: Submitted) -> bool {
        match submitted {
            Submitted::Yes => {
                self.flush.ops += 1;
                self.ops += 1;
                true
            }
            Submitted::NoRoom => false,
            Submitted::Failed(fault) => {
                self.flush.failed.get_or_insert(fault);
                true
            }
        }
    }

    fn end_flush<H: Hypervisor, S: Store<H>>(&mut self, engine: &mut Engine<S>, hv: &mut H) {
        let earlier_reads = self.reads[(self.parity ^ 1) as usize];
        let with_plan = self.image.flushing();
        if self.flush.mode != Mode::Draining
            || self.flush.ops > 0
            || (with_plan && earlier_reads > 0)
        {
            return;
        }
        self.flush.mode = Mode::Idle;
        let short = core::mem::take(&mut self.flush.short) && self.flush.failed.is_none();
        if short && self.flush.tries >= TRIES_MAX {
            self.flush.failed = Some(Fault::Store(StoreFault::NoSpace));
        }
        let again = short && self.flush.failed.is_none();
        self.flush.tries = if again { self.flush.tries + 1 } else { 0 };
        if with_plan {
            self.image.flush_end(self.flush.failed.is_none() && !again);
            self.commit_waiting(engine, hv);
        }
        if again {
            self.flush_again(engine);
            return;
        }
        if self.flush.failed.is_none() {
            self.flush.tail = None;
        }
        let number = self.flush.number;
        let covered: heapless::Vec<Id, { crate::limits::REQUESTS_MAX }> = engine
            .requests
            .iter()
            .filter(|(_, r)| r.disk == self.index && r.waits_for(number))
            .map(|(id, _)| id)
            .collect();
        let told = !covered.is_empty();
        let fault = self.flush.failed.or(self.flush.owed.filter(|_| told));
        self.flush.owed = match fault {
            Some(Fault::Store(StoreFault::Io(_))) if !told => fault,
            Some(Fault::Store(_)) if !told && self.flush.sync_failed => fault,
            _ if told => None,
            _ => self.flush.owed,
        };
        for id in covered {
            if let Some(fault) = fault {
                engine.requests.get(id).failed = Some(fault);
                self.finish(engine, hv, id);
            } else {
                self.flushed(engine, hv, id);
            }
        }
        self.kick = true;
    }

    /// Whoever waited for the flush waits for the next one.
    fn flush_again<S>(&mut self, engine: &mut Engine<S>) {
        for request in engine.requests.iter_mut().filter(|r| r.disk == self.index) {
            if let Stage::FlushFirst { by } | Stage::FlushAfter { by } = &mut request.stage {
                *by = None;
            }
        }
        self.flush.wanted = true;
        self.kick = true;
    }

    /// A request's flush is done: it goes on to its write, or is answered.
    fn flushed<H: Hypervisor, S: Store<H>>(&mut self, engine: &mut Engine<S>, hv: &mut H, id: Id) {
        let request = engine.requests.get(id);
        let goes_on = matches!(request.stage, Stage::FlushFirst { .. }) && request.sectors > 0;
        if !goes_on {
            self.finish(engine, hv, id);
            return;
        }
        request.stage = Stage::Moving;
        self.flush_waiters -= 1;
        if self.plan(engine, hv, id) == Progress::Parked {
            self.park(engine, id);
        }
        self.depart(engine, hv);
    }
}
