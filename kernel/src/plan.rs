//! From a request to store operations: asks the image where bytes lie, and submits.
//!
//! Each call goes as far as it can and leaves the request parked where it cannot; it is called
//! again whenever something of the disk has moved.

use platter_image::{Extent, Place, SECTOR_BYTES, SectorRange, WritePlan};
use platter_storage::{Run, Store};
use platter_xen::{Direction, Hypervisor};

use crate::disk::{Disk, Progress};
use crate::engine::{Engine, Op, OpKind, Stretch, Submitted};
use crate::fault::Fault;
use crate::job::Job;
use crate::limits::{BOUNCE_BYTES, STEPS_MAX};
use crate::request::{Kind, Request, Stage};
use crate::table::Id;
use crate::transfer::{Guest, Owner, Repeated};

/// One step of planning.
enum Step {
    /// So many sectors more are planned or done.
    Sectors(u64),
    Park,
}

impl Disk {
    /// Plans what is left of a request.
    pub fn plan<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        id: Id,
    ) -> Progress {
        if engine.requests.get(id).stage != Stage::Moving {
            // The flush runner moves it on and puts it back among the waiting.
            return Progress::Planned;
        }
        if self.must_wait(engine, id) {
            return Progress::Parked;
        }
        for _ in 0..STEPS_MAX {
            let request = engine.requests.get(id);
            if request.failed.is_some() || request.planned == request.sectors {
                self.settle(engine, hv, id);
                return Progress::Planned;
            }
            if self.has_its_share() {
                return Progress::Parked;
            }
            let range = SectorRange::new(
                request.start + request.planned,
                request.sectors - request.planned,
            );
            // Held meanwhile: a part that fails at once must not end the request under us.
            request.in_flight += 1;
            let step = match request.kind {
                Kind::Read => self.plan_read(engine, hv, id, range),
                Kind::Write | Kind::Flush => self.plan_write(engine, hv, id, range),
                Kind::Discard => self.plan_discard(engine, hv, id, range),
            };
            engine.requests.get(id).in_flight -= 1;
            match step {
                Ok(Step::Sectors(sectors)) => engine.requests.get(id).planned += sectors,
                Ok(Step::Park) => return Progress::Parked,
                Err(fault) => {
                    let request = engine.requests.get(id);
                    request.in_flight += 1;
                    self.piece_done(engine, hv, id, None, Err(fault));
                    return Progress::Planned;
                }
            }
        }
        // Others have their turn first.
        self.kick = true;
        Progress::Parked
    }

    /// A barrier holds back all that came after it; a discard and other requests never touch
    /// the same sectors at once.
    fn must_wait<S>(&self, engine: &mut Engine<S>, id: Id) -> bool {
        let request = engine.requests.get(id);
        if request.is_moving() || self.ordered == 0 {
            return false;
        }
        let (seq, discard) = (request.seq, request.kind == Kind::Discard);
        let (mine, start, end) = (self.index, request.start, request.start + request.sectors);
        engine.requests.iter().any(|(other_id, other): (Id, &Request)| {
            if other.disk != mine || other_id == id {
                return false;
            }
            let overlap = other.start < end && start < other.start + other.sectors;
            (other.barrier && other.seq < seq)
                || (overlap && other.is_moving() && (discard || other.kind == Kind::Discard))
        })
    }

    fn plan_read<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        id: Id,
        range: SectorRange,
    ) -> Result<Step, Fault> {
        if engine.ops.is_full() {
            return Ok(Step::Park);
        }
        let Extent { sectors, place } = match self.image.map_read(range) {
            Ok(extent) => extent,
            Err(stop) => return self.stopped(engine, hv, stop).map(|()| Step::Park),
        };
        let at = (range.start - engine.requests.get(id).start) * SECTOR_BYTES;
        let bytes = (sectors * SECTOR_BYTES) as usize;
        match place {
            Place::Zero => self.read_zeros(engine, hv, id, at as usize, bytes)?,
            Place::Memory { offset } => {
                self.read_memory(engine, hv, id, at as usize, offset, bytes)?;
            }
            Place::File { file, offset } => {
                let handle = self.handle(file);
                let piece = self.piece(range.prefix(sectors), engine.io_bytes_max(handle));
                let sectors = piece.count;
                let len = (sectors * SECTOR_BYTES) as u32;
                let kind = OpKind::GuestRead { request: id, at: at as u32 };
                let mut op = Op::new(self.index, Stretch { handle, offset, len }, kind);
                op.parity = self.parity;
                if self.board(engine, hv, op).is_none() {
                    return Ok(Step::Park);
                }
                self.ops += 1;
                self.bytes += len as u64;
                self.reads[self.parity as usize] += 1;
                engine.requests.get(id).in_flight += 1;
                return Ok(Step::Sectors(sectors));
            }
        }
        Ok(Step::Sectors(sectors))
    }

    fn read_zeros<H: Hypervisor, S>(
        &self,
        engine: &mut Engine<S>,
        hv: &mut H,
        id: Id,
        at: usize,
        bytes: usize,
    ) -> Result<(), Fault> {
        let zeros = Run { region: engine.zeros, offset: 0, len: BOUNCE_BYTES };
        let all = Repeated::times(zeros, bytes);
        let request = engine.requests.get(id);
        let guest = Guest { domid: self.guest, segments: engine.segments.of(id, request.segments) };
        let direction = Direction::ToGuest;
        if !engine.copies.takes_pieces() {
            return engine.copies.now(hv, &guest, at, &all, direction).map_err(Fault::Grant);
        }
        request.in_flight += 1;
        let owner = Owner::Piece { disk: self.index, request: id };
        engine.copies.queue(hv, owner, &guest, at, &all, direction);
        Ok(())
    }

    /// Bytes that the image holds itself (a decompressed cluster), through the staging buffer.
    fn read_memory<H: Hypervisor, S>(
        &self,
        engine: &mut Engine<S>,
        hv: &mut H,
        id: Id,
        at: usize,
        offset: usize,
        bytes: usize,
    ) -> Result<(), Fault> {
        let mut done = 0;
        while done < bytes {
            let len = (bytes - done).min(BOUNCE_BYTES);
            hv.write(engine.staging, 0, self.image.bytes(offset + done, len));
            let run = Run { region: engine.staging, offset: 0, len };
            let count = engine.requests.get(id).segments;
            let guest = Guest { domid: self.guest, segments: engine.segments.of(id, count) };
            let all = Repeated::times(run, len);
            let direction = Direction::ToGuest;
            engine.copies.now(hv, &guest, at + done, &all, direction).map_err(Fault::Grant)?;
            done += len;
        }
        Ok(())
    }

    fn plan_write<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        id: Id,
        range: SectorRange,
    ) -> Result<Step, Fault> {
        if let Some(fault) = self.frozen {
            return Err(fault);
        }
        let top = self.files[0].handle;
        if !engine.has_room(top) {
            return Ok(Step::Park);
        }
        let piece = self.piece(range, engine.io_bytes_max(top));
        let plan = match self.image.prepare_write(piece) {
            Ok(plan) => plan,
            Err(stop) => return self.stopped(engine, hv, stop).map(|()| Step::Park),
        };
        let at = (range.start - engine.requests.get(id).start) * SECTOR_BYTES;
        if plan.head.is_some() || plan.tail.is_some() || !plan.preludes.is_empty() {
            return Ok(self.start_job(engine, hv, id, at as u32, range.start, plan));
        }
        Ok(self.write_straight(engine, hv, id, at as u32, plan))
    }

    /// The common write: guest pages straight to where the store needs them.
    fn write_straight<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        id: Id,
        at: u32,
        plan: WritePlan,
    ) -> Step {
        let handle = self.handle(plan.file);
        let len = (plan.sectors * SECTOR_BYTES) as u32;
        let stretch = Stretch { handle, offset: plan.offset, len };
        let kind = OpKind::GuestWrite { request: id, at, from: self.guest };
        let Some(op) = self.board(engine, hv, Op::new(self.index, stretch, kind)) else {
            self.image.abandon(plan.prepared);
            return Step::Park;
        };
        engine.ops.get(op).prepared = Some(plan.prepared);
        self.ops += 1;
        self.bytes += len as u64;
        engine.requests.get(id).in_flight += 1;
        Step::Sectors(plan.sectors)
    }

    /// A write that must first copy or clear something around it.
    fn start_job<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        id: Id,
        at: u32,
        start: u64,
        plan: WritePlan,
    ) -> Step {
        let sectors = plan.sectors;
        match engine.jobs.insert(Job::new(self.index, id, at, start, plan)) {
            Ok(job) => {
                self.ops += 1;
                engine.requests.get(id).in_flight += 1;
                self.pump_job(engine, hv, job);
                Step::Sectors(sectors)
            }
            Err(job) => {
                self.image.abandon(job.prepared);
                Step::Park
            }
        }
    }

    fn plan_discard<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        id: Id,
        range: SectorRange,
    ) -> Result<Step, Fault> {
        if engine.ops.is_full() {
            return Ok(Step::Park);
        }
        let plan = match self.image.discard(range, false) {
            Ok(plan) => plan,
            Err(stop) => return self.stopped(engine, hv, stop).map(|()| Step::Park),
        };
        // A discard is advice: what cannot be let go is left as it is.
        let sectors = if plan.sectors == 0 { range.count } else { plan.sectors };
        let Some((file, offset, len)) = plan.punch else { return Ok(Step::Sectors(sectors)) };
        let stretch = Stretch { handle: self.handle(file), offset, len: 0 };
        let end = offset.saturating_add(len);
        let mut op = Op::new(self.index, stretch, OpKind::Punch { request: id, end });
        // A flush waits for it as for a read: space that is let go may be written anew after it.
        op.parity = self.parity;
        match engine.submit(hv, op) {
            Submitted::Yes => {
                self.ops += 1;
                self.reads[self.parity as usize] += 1;
                engine.requests.get(id).in_flight += 1;
            }
            // The mapping is gone already; the space is only given back later or never.
            Submitted::NoRoom | Submitted::Failed(_) => {}
        }
        Ok(Step::Sectors(sectors))
    }
}
