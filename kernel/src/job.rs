//! A write that needs more than its own bytes: new tables cleared or copied first, and what
//! lies around the guest's bytes in a new cluster copied with them.
//!
//! One bounce buffer and one store operation at a time for each job. Order: preludes, then the
//! cluster chunk by chunk, then the commit. Until then the image still shows the old contents,
//! which is where the surroundings are read from.

use platter_image::{
    FileNo, PRELUDES_MAX, Place, Prelude, Prepared, SECTOR_BYTES, SectorRange, WritePlan,
};
use platter_storage::{Run, Store};
use platter_xen::{Direction, Hypervisor};

use crate::disk::Disk;
use crate::engine::{Engine, Op, OpKind, Stretch, Submitted};
use crate::fault::Fault;
use crate::limits::BOUNCE_BYTES;
use crate::table::Id;
use crate::transfer::{Guest, Repeated};

/// What the job does next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// Prelude `index` from byte `done`; for a copy, `loaded` bytes wait in the bounce buffer.
    Prelude {
        index: usize,
        done: u64,
        loaded: u32,
    },
    /// The chunk at byte `chunk` of the whole: gathered up to `have`.
    Gather {
        chunk: u64,
        have: u32,
    },
    /// The chunk is whole and must be written.
    Write {
        chunk: u64,
    },
    Done,
}

pub struct Job {
    pub disk: u16,
    pub request: Id,
    pub prepared: Prepared,
    preludes: heapless::Vec<Prelude, PRELUDES_MAX>,
    /// Bytes from the start of the request to the first guest byte of this job.
    at: u32,
    /// All that is written: head, guest bytes, tail.
    whole: SectorRange,
    /// The guest's part of it.
    guest: SectorRange,
    file: FileNo,
    /// Where the whole begins in the file.
    offset: u64,
    phase: Phase,
    /// An operation is under way.
    busy: bool,
}

/// What one step of a job came to.
enum Step {
    Again,
    Wait,
}

impl Job {
    pub fn new(disk: u16, request: Id, at: u32, start: u64, plan: WritePlan) -> Job {
        let head = plan.head.map_or(0, |range| range.count);
        let tail = plan.tail.map_or(0, |range| range.count);
        let phase = match plan.preludes.is_empty() {
            true => Phase::Gather { chunk: 0, have: 0 },
            false => Phase::Prelude { index: 0, done: 0, loaded: 0 },
        };
        Job {
            disk,
            request,
            prepared: plan.prepared,
            preludes: plan.preludes,
            at,
            whole: SectorRange::new(start - head, head + plan.sectors + tail),
            guest: SectorRange::new(start, plan.sectors),
            file: plan.file,
            offset: plan.offset - head * SECTOR_BYTES,
            phase,
            busy: false,
        }
    }

    /// Bytes of the chunk that begins at byte `chunk` of the whole.
    fn chunk_bytes(&self, chunk: u64) -> u32 {
        (self.whole.bytes() - chunk).min(BOUNCE_BYTES as u64) as u32
    }
}

impl Disk {
    /// Carries a job on until it must wait or is done.
    pub fn pump_job<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        id: Id,
    ) {
        loop {
            let job = engine.jobs.get(id);
            if job.busy {
                return;
            }
            let step = match job.phase {
                Phase::Prelude { .. } => self.job_prelude(engine, hv, id),
                Phase::Gather { chunk, have } => self.job_gather(engine, hv, id, chunk, have),
                Phase::Write { chunk } => self.job_write(engine, hv, id, chunk),
                Phase::Done => {
                    self.end_job(engine, hv, id, Ok(()));
                    return;
                }
            };
            match step {
                Ok(Step::Again) => {}
                Ok(Step::Wait) => return,
                Err(fault) => {
                    self.end_job(engine, hv, id, Err(fault));
                    return;
                }
            }
        }
    }

    /// Carries on every job of this disk that waits for room or for the image.
    pub fn pump_jobs<H: Hypervisor, S: Store<H>>(&mut self, engine: &mut Engine<S>, hv: &mut H) {
        for place in 0..crate::limits::JOBS_MAX as u16 {
            let mine = engine.jobs.find(Id(place)).is_some_and(|job| job.disk == self.index);
            if mine {
                self.pump_job(engine, hv, Id(place));
            }
        }
    }

    /// A job's read is done: `len` bytes lie in the bounce buffer at `at`.
    pub fn job_read_done<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        id: Id,
        at: u32,
        len: u32,
    ) {
        let job = engine.jobs.get(id);
        job.busy = false;
        job.phase = match job.phase {
            Phase::Prelude { index, done, .. } => Phase::Prelude { index, done, loaded: len },
            Phase::Gather { chunk, .. } => Phase::Gather { chunk, have: at + len },
            other => other,
        };
        self.pump_job(engine, hv, id);
    }

    /// A job's write is done, all of it.
    pub fn job_write_done<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        id: Id,
        written: u32,
    ) {
        let job = engine.jobs.get(id);
        job.busy = false;
        job.phase = match job.phase {
            Phase::Prelude { index, done, .. } => {
                Phase::Prelude { index, done: done + written as u64, loaded: 0 }
            }
            Phase::Write { chunk } => match chunk + written as u64 {
                end if end >= job.whole.bytes() => Phase::Done,
                chunk => Phase::Gather { chunk, have: 0 },
            },
            other => other,
        };
        self.pump_job(engine, hv, id);
    }

    pub fn end_job<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        id: Id,
        result: Result<(), Fault>,
    ) {
        let job = engine.jobs.take(id).expect("a job ends once");
        self.ops -= 1;
        self.piece_done(engine, hv, job.request, Some(job.prepared), result);
    }

    fn job_prelude<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        id: Id,
    ) -> Result<Step, Fault> {
        let job = engine.jobs.get(id);
        let Phase::Prelude { index, done, loaded } = job.phase else { return Ok(Step::Again) };
        let Some(prelude) = job.preludes.get(index).copied() else {
            job.phase = Phase::Gather { chunk: 0, have: 0 };
            return Ok(Step::Again);
        };
        let (file, len) = match prelude {
            Prelude::Zero { file, len, .. } | Prelude::Copy { file, len, .. } => (file, len),
        };
        if done >= len {
            job.phase = Phase::Prelude { index: index + 1, done: 0, loaded: 0 };
            return Ok(Step::Again);
        }
        let handle = self.handle(file);
        let max = engine.io_bytes_max(handle).min(BOUNCE_BYTES as u32) as u64;
        let part = (len - done).min(max) as u32;
        match prelude {
            Prelude::Zero { offset, .. } => {
                let from = Run { region: engine.zeros, offset: 0, len: part as usize };
                let stretch = Stretch { handle, offset: offset + done, len: part };
                self.submit_job_write(engine, hv, id, stretch, from)
            }
            Prelude::Copy { from, .. } if loaded == 0 => {
                let stretch = Stretch { handle, offset: from + done, len: part };
                self.submit_job_read(engine, hv, id, 0, stretch)
            }
            Prelude::Copy { to, .. } => {
                let from = engine.bounce(id, 0, loaded as usize);
                let stretch = Stretch { handle, offset: to + done, len: loaded };
                self.submit_job_write(engine, hv, id, stretch, from)
            }
        }
    }

    /// Puts the next bytes of the chunk into the bounce buffer.
    fn job_gather<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        id: Id,
        chunk: u64,
        have: u32,
    ) -> Result<Step, Fault> {
        let job = engine.jobs.get(id);
        let chunk_bytes = job.chunk_bytes(chunk);
        if have == chunk_bytes {
            job.phase = Phase::Write { chunk };
            return Ok(Step::Again);
        }
        let here = job.whole.start + (chunk + have as u64) / SECTOR_BYTES;
        let left = (chunk_bytes - have) as u64 / SECTOR_BYTES;
        let (guest, at, request) = (job.guest, job.at, job.request);
        if here >= guest.start && here < guest.end() {
            let len = left.min(guest.end() - here) * SECTOR_BYTES;
            let at = at as u64 + (here - guest.start) * SECTOR_BYTES;
            let run = engine.bounce(id, have as usize, len as usize);
            let count = engine.requests.get(request).segments;
            let segments = engine.segments.of(request, count);
            let pages = Guest { domid: self.guest, segments };
            let (all, direction) = (Repeated::times(run, run.len), Direction::FromGuest);
            engine.copies.now(hv, &pages, at as usize, &all, direction).map_err(Fault::Grant)?;
            engine.jobs.get(id).phase = Phase::Gather { chunk, have: have + len as u32 };
            return Ok(Step::Again);
        }
        let until_guest = if here < guest.start { guest.start - here } else { left };
        let around = SectorRange::new(here, left.min(until_guest));
        self.gather_around(engine, hv, id, have, around)
    }

    /// Old contents around the guest's bytes.
    fn gather_around<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        id: Id,
        have: u32,
        around: SectorRange,
    ) -> Result<Step, Fault> {
        // A cluster may reach past the end of the disk; nothing lies there.
        let sectors_max = self.image.sectors();
        if around.start >= sectors_max {
            let run = engine.bounce(id, have as usize, around.bytes() as usize);
            hv.zero(run.region, run.offset, run.len);
            return Ok(self.gathered(engine, id, have + run.len as u32));
        }
        let extent = match self.image.map_read(around.prefix(sectors_max - around.start)) {
            Ok(extent) => extent,
            Err(stop) => return self.stopped(engine, hv, stop).map(|()| Step::Wait),
        };
        let len = (extent.sectors * SECTOR_BYTES) as usize;
        let run = engine.bounce(id, have as usize, len);
        match extent.place {
            Place::Zero => hv.zero(run.region, run.offset, run.len),
            Place::Memory { offset } => {
                hv.write(run.region, run.offset, self.image.bytes(offset, len));
            }
            Place::File { file, offset } => {
                let handle = self.handle(file);
                let len = (len as u32).min(engine.io_bytes_max(handle));
                let stretch = Stretch { handle, offset, len };
                return self.submit_job_read(engine, hv, id, have, stretch);
            }
        }
        Ok(self.gathered(engine, id, have + len as u32))
    }

    fn gathered<S>(&self, engine: &mut Engine<S>, id: Id, have: u32) -> Step {
        let job = engine.jobs.get(id);
        if let Phase::Gather { chunk, .. } = job.phase {
            job.phase = Phase::Gather { chunk, have };
        }
        Step::Again
    }

    fn job_write<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        id: Id,
        chunk: u64,
    ) -> Result<Step, Fault> {
        let job = engine.jobs.get(id);
        let (file, offset, len) = (job.file, job.offset + chunk, job.chunk_bytes(chunk));
        let handle = self.handle(file);
        let from = engine.bounce(id, 0, len as usize);
        self.submit_job_write(engine, hv, id, Stretch { handle, offset, len }, from)
    }

    fn submit_job_read<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        id: Id,
        at: u32,
        stretch: Stretch,
    ) -> Result<Step, Fault> {
        let op = Op::new(self.index, stretch, OpKind::JobRead { job: id, at });
        let submitted = engine.submit(hv, op);
        self.note_job_op(engine, id, submitted)
    }

    fn submit_job_write<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        id: Id,
        stretch: Stretch,
        from: Run,
    ) -> Result<Step, Fault> {
        let op = Op::new(self.index, stretch, OpKind::JobWrite { job: id, from });
        let submitted = engine.submit(hv, op);
        self.note_job_op(engine, id, submitted)
    }

    fn note_job_op<S>(
        &mut self,
        engine: &mut Engine<S>,
        id: Id,
        submitted: Submitted,
    ) -> Result<Step, Fault> {
        match submitted {
            Submitted::Yes => {
                self.ops += 1;
                engine.jobs.get(id).busy = true;
                Ok(Step::Wait)
            }
            Submitted::NoRoom => Ok(Step::Wait),
            Submitted::Failed(fault) => Err(fault),
        }
    }
}
