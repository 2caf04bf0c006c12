//! What a store's answer means: each operation is handed to whoever asked and taken out of the
//! table once; what was done only in part goes on in its place, or waits there for room.

use platter_storage::{Answer, Run, Store, StoreFault, Window};
use platter_xen::{Direction, Hypervisor};

use crate::disk::Disk;
use crate::engine::{Engine, Op, OpKind, Stretch};
use crate::fault::Fault;
use crate::limits::BOUNCE_BYTES;
use crate::table::Id;
use crate::transfer::{Guest, Owner, Repeated};

impl Disk {
    /// Handles the answer to an operation of this disk.
    pub fn answered<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        id: Id,
        result: Result<Answer, StoreFault>,
    ) {
        self.kick = true;
        let Op { kind, behind, .. } = *engine.ops.get(id);
        if behind.is_some() {
            return self.train_answered(engine, hv, id, result);
        }
        match (kind, result) {
            (OpKind::Open | OpKind::Size, _) => unreachable!("the device handles its own"),
            // The mapping is gone already: a punch that fails loses space and nothing else.
            (OpKind::Punch { request, end }, result) => {
                let op = engine.ops.get(id);
                let next = op.stretch.offset.saturating_add(u64::from(op.stretch.len));
                if result.is_ok() && op.stretch.len > 0 && next < end {
                    // The store let only a part go: the rest follows.
                    op.stretch = Stretch { offset: next, len: 0, ..op.stretch };
                    return self.continue_op(engine, hv, id);
                }
                self.end_op(engine, id);
                self.piece_done(engine, hv, request, None, Ok(()));
            }
            (_, Err(fault)) => self.op_failed(engine, hv, id, fault.into()),
            (OpKind::GuestRead { request, at }, Ok(Answer::Read(window))) => {
                self.guest_read_answered(engine, hv, id, request, at, window);
            }
            (OpKind::MetaRead { .. }, Ok(Answer::Read(window))) => {
                self.meta_read_answered(engine, hv, id, window);
            }
            (OpKind::JobRead { job, at }, Ok(Answer::Read(window))) => {
                self.job_read_answered(engine, hv, id, job, at, window);
            }
            (_, Ok(Answer::Written(0))) => {
                self.op_failed(engine, hv, id, Fault::Store(StoreFault::NoSpace));
            }
            (OpKind::FlushWrite { .. }, Ok(Answer::Written(bytes))) => {
                let op = self.end_op(engine, id);
                match bytes >= op.stretch.len {
                    true => self.flush_op_done(Ok(())),
                    false => self.flush_write_short(),
                }
            }
            (OpKind::GuestWrite { .. } | OpKind::JobWrite { .. }, Ok(Answer::Written(bytes))) => {
                self.went_on(engine, hv, id, bytes);
            }
            (OpKind::FlushSync, Ok(Answer::Flushed)) => {
                self.end_op(engine, id);
                self.flush_op_done(Ok(()));
            }
            (_, Ok(_)) => self.op_failed(engine, hv, id, Fault::Store(StoreFault::Protocol)),
        }
    }

    /// So many bytes more of a read or write are done: it ends, or its rest goes after it.
    fn went_on<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        id: Id,
        bytes: u32,
    ) {
        let op = engine.ops.get(id);
        op.done = op.done.saturating_add(bytes).min(op.stretch.len);
        if op.done < op.stretch.len {
            return self.continue_op(engine, hv, id);
        }
        let op = self.end_op(engine, id);
        match op.kind {
            OpKind::GuestRead { request, .. } | OpKind::GuestWrite { request, .. } => {
                self.piece_done(engine, hv, request, op.prepared, Ok(()));
            }
            OpKind::JobRead { job, at } => self.job_read_done(engine, hv, job, at, op.stretch.len),
            OpKind::JobWrite { job, .. } => self.job_write_done(engine, hv, job, op.stretch.len),
            _ => unreachable!("only reads and writes go on"),
        }
    }

    /// Tries the rests that found no room, before anything new.
    pub fn retry_rests<H: Hypervisor, S: Store<H>>(&mut self, engine: &mut Engine<S>, hv: &mut H) {
        while core::mem::take(&mut self.rests)
            && let Some(id) = engine.waiting_op(self.index)
        {
            self.continue_op(engine, hv, id);
            if core::mem::replace(&mut self.rests, true) {
                return;
            }
        }
    }

    /// An operation is over: it leaves the table and the counters.
    fn end_op<S>(&mut self, engine: &mut Engine<S>, id: Id) -> Op {
        let op = engine.ops.take(id).expect("an operation ends once");
        self.ops -= 1;
        if matches!(op.kind, OpKind::GuestRead { .. } | OpKind::GuestWrite { .. }) {
            self.bytes -= op.stretch.len as u64;
        }
        if matches!(op.kind, OpKind::GuestRead { .. } | OpKind::Punch { .. }) {
            self.reads[op.parity as usize] -= 1;
        }
        op
    }

    /// An operation is over, and not done.
    pub fn op_failed<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        id: Id,
        fault: Fault,
    ) {
        let op = self.end_op(engine, id);
        match op.kind {
            OpKind::GuestRead { request, .. } | OpKind::GuestWrite { request, .. } => {
                self.piece_done(engine, hv, request, op.prepared, Err(fault));
            }
            OpKind::MetaRead { block, buffer } => {
                engine.gather.give_back(buffer);
                self.meta_failed(block, fault);
            }
            OpKind::JobRead { job, .. } | OpKind::JobWrite { job, .. } => {
                self.end_job(engine, hv, job, Err(fault));
            }
            OpKind::FlushWrite { .. } => self.flush_op_done(Err(fault)),
            OpKind::FlushSync => self.flush_sync_failed(fault),
            OpKind::Punch { request, .. } => self.piece_done(engine, hv, request, None, Ok(())),
            OpKind::Open | OpKind::Size => unreachable!("the device handles its own"),
        }
    }

    /// A read's bytes, or zeros for what lies beyond the end of the file (a raw file that
    /// shrank, a cluster not filled yet), are queued for the guest.
    fn guest_read_answered<H: Hypervisor, S>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        id: Id,
        request: Id,
        at: u32,
        window: Window,
    ) {
        let op = engine.ops.get(id);
        let place = (at + op.done) as usize;
        let bytes = match window.is_empty() {
            true => {
                let zeros = Run { region: engine.zeros, offset: 0, len: BOUNCE_BYTES };
                Repeated::times(zeros, op.rest().len as usize)
            }
            false => Repeated::once(window),
        };
        op.moving = bytes.len as u32;
        let segments = engine.segments.of(request, engine.requests.get(request).segments);
        let guest = Guest { domid: self.guest, segments };
        engine.copies.queue(hv, Owner::Op(id), &guest, place, &bytes, Direction::ToGuest);
    }

    /// Copies that were queued have run.
    pub fn copied<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        owner: Owner,
        result: Result<(), Fault>,
    ) {
        let id = match owner {
            Owner::Piece { request, .. } => {
                return self.piece_done(engine, hv, request, None, result);
            }
            Owner::Op(id) => id,
        };
        let op = engine.ops.get(id);
        match (op.kind, result) {
            (OpKind::GuestRead { .. }, Ok(())) => {
                let moved = core::mem::take(&mut op.moving);
                self.went_on(engine, hv, id, moved);
            }
            // Its bytes lie in the store's window; it leaves at the end of the turn.
            (OpKind::GuestWrite { .. }, Ok(())) => {}
            (OpKind::GuestWrite { .. }, Err(fault)) => self.take_back(engine, hv, id, fault),
            (_, Err(fault)) => self.op_failed(engine, hv, id, fault),
            (_, Ok(())) => unreachable!("only guests' bytes are queued"),
        }
    }

    /// A part of a metadata block came: the whole goes to the image.
    fn meta_read_answered<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        id: Id,
        window: Window,
    ) {
        let op = engine.ops.get(id);
        let OpKind::MetaRead { block, buffer } = op.kind else { return };
        let bytes = &mut engine.gather.bytes(buffer)[..block.len as usize];
        let mut at = op.done as usize;
        for run in &window.runs {
            hv.read(run.region, run.offset, &mut bytes[at..at + run.len]);
            at += run.len;
        }
        if window.is_empty() {
            bytes[at..].fill(0);
            at = bytes.len();
        }
        if at < bytes.len() {
            op.done = at as u32;
            return self.continue_op(engine, hv, id);
        }
        self.image.fill(block, bytes);
        engine.gather.give_back(buffer);
        self.end_op(engine, id);
    }

    /// A job's bytes go to its bounce buffer at `at`.
    fn job_read_answered<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        id: Id,
        job: Id,
        at: u32,
        window: Window,
    ) {
        let op = engine.ops.get(id);
        let (done, left) = (op.done, op.rest().len as usize);
        let run = engine.bounce(job, (at + done) as usize, left);
        let bytes = match window.is_empty() {
            // The end of the file: the rest is zeros.
            true => {
                hv.zero(run.region, run.offset, run.len);
                left
            }
            false => {
                crate::engine::move_window(hv, &window, run, true);
                window.len()
            }
        };
        self.went_on(engine, hv, id, bytes as u32);
    }
}
