//! What a store's answer means: each operation is taken out of the table once and handed to
//! whoever asked; what was done only in part is submitted again.

use platter_storage::{Answer, Done, Store, StoreFault, Tag, Window};
use platter_xen::{Direction, Hypervisor};

use crate::disk::Disk;
use crate::engine::{Engine, Op, OpKind, Stretch, Submitted};
use crate::fault::Fault;
use crate::job::submit_job_write;
use crate::plan::submit_guest_write;
use crate::table::Id;
use crate::transfer::{self, Guest};

/// Takes the operation of an answer out of the table. `None` for a tag that is not ours: the
/// store made it up.
pub fn take_op<S>(engine: &mut Engine<S>, tag: Tag) -> Option<Op> {
    let place = u16::try_from(tag.0).ok()?;
    engine.ops.take(Id(place))
}

impl Disk {
    /// Handles the answer to an operation of this disk.
    pub fn answered<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        op: Op,
        done: Done,
    ) {
        self.ops -= 1;
        self.kick = true;
        let fault = done.result.err().map(Fault::Store);
        match (op.kind, done.result) {
            (OpKind::GuestRead { request, at }, result) => {
                let window = read_answer(result);
                self.guest_read_done(engine, hv, op, request, at, window);
            }
            (OpKind::MetaRead { .. }, result) => {
                self.meta_read_done(engine, hv, op, read_answer(result));
            }
            (OpKind::JobRead { job, at }, result) => {
                self.job_read_done(engine, hv, op, job, at, read_answer(result));
            }
            (OpKind::GuestWrite { .. } | OpKind::JobWrite { .. } | OpKind::FlushWrite, result) => {
                let written = match result {
                    Ok(Answer::Written(bytes)) if bytes > 0 => Ok(bytes),
                    Ok(_) => Err(Fault::Store(StoreFault::NoSpace)),
                    Err(why) => Err(Fault::Store(why)),
                };
                self.write_done(engine, hv, op, written);
            }
            (OpKind::FlushSync, Ok(Answer::Flushed)) => self.flush_op_done(Ok(())),
            (OpKind::FlushSync, _) => {
                self.flush_op_done(Err(fault.unwrap_or(Fault::Store(StoreFault::Protocol))));
            }
            // The mapping is gone already: a punch that fails loses space and nothing else.
            (OpKind::Punch { request, end }, result) => {
                if result.is_err() || !self.punch_rest(engine, hv, &op, end) {
                    self.reads[op.parity as usize] -= 1;
                    self.piece_done(engine, hv, request, None, Ok(()));
                }
            }
            (OpKind::Open | OpKind::Size, _) => unreachable!("the device handles its own"),
        }
    }

    fn guest_read_done<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        mut op: Op,
        id: Id,
        at: u32,
        window: Result<Window, Fault>,
    ) {
        self.reads[op.parity as usize] -= 1;
        let window = match window {
            Ok(window) => window,
            Err(fault) => return self.piece_done(engine, hv, id, None, Err(fault)),
        };
        let place = (at + op.done) as usize;
        if window.is_empty() {
            // Beyond the end of the file: a raw file that shrank, or a cluster not filled yet.
            let zeros = platter_storage::Run {
                region: engine.zeros,
                offset: 0,
                len: crate::limits::BOUNCE_BYTES,
            };
            let count = engine.requests.get(id).segments;
            let guest = Guest { domid: self.guest, segments: engine.segments.of(id, count) };
            let rest = op.rest().len as usize;
            let copied = transfer::copy_repeated(hv, &mut engine.batch, &guest, place, zeros, rest);
            return self.piece_done(engine, hv, id, None, copied.map_err(Fault::Grant));
        }
        let count = engine.requests.get(id).segments;
        let guest = Guest { domid: self.guest, segments: engine.segments.of(id, count) };
        let direction = Direction::ToGuest;
        let copied = transfer::copy(hv, &mut engine.batch, &guest, place, &window, direction);
        if let Err(status) = copied {
            return self.piece_done(engine, hv, id, None, Err(Fault::Grant(status)));
        }
        op.done += window.len() as u32;
        if op.done >= op.stretch.len {
            return self.piece_done(engine, hv, id, None, Ok(()));
        }
        let parity = op.parity as usize;
        match engine.submit_read(hv, op) {
            Submitted::Yes(_) => {
                self.ops += 1;
                self.reads[parity] += 1;
            }
            refused => self.piece_done(engine, hv, id, None, Err(rest_refused(refused))),
        }
    }

    /// The store let only a part go: the rest follows. False when there is none, or no room.
    fn punch_rest<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        op: &Op,
        end: u64,
    ) -> bool {
        let offset = op.stretch.offset.saturating_add(u64::from(op.stretch.len));
        if op.stretch.len == 0 || offset >= end {
            return false;
        }
        let stretch = Stretch { offset, len: 0, ..op.stretch };
        let rest = Op { parity: op.parity, ..Op::new(op.disk, stretch, op.kind) };
        let sent = matches!(engine.submit_discard(hv, rest, end - offset), Submitted::Yes(_));
        self.ops += usize::from(sent);
        sent
    }

    /// A part of a metadata block came: the whole goes to the image.
    fn meta_read_done<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        mut op: Op,
        window: Result<Window, Fault>,
    ) {
        let OpKind::MetaRead { block, buffer } = op.kind else { return };
        let window = match window {
            Ok(window) => window,
            Err(fault) => {
                engine.gather.give_back(buffer);
                return self.meta_failed(block, fault);
            }
        };
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
        if at == bytes.len() {
            self.image.fill(block, bytes);
            engine.gather.give_back(buffer);
            return;
        }
        op.done = at as u32;
        match engine.submit_read(hv, op) {
            Submitted::Yes(_) => self.ops += 1,
            refused => {
                engine.gather.give_back(buffer);
                self.meta_failed(block, rest_refused(refused));
            }
        }
    }

    fn write_done<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        mut op: Op,
        written: Result<u32, Fault>,
    ) {
        let result = match written {
            Err(fault) => Err(fault),
            Ok(bytes) => {
                op.done = op.done.saturating_add(bytes).min(op.stretch.len);
                if op.done < op.stretch.len && op.kind != OpKind::FlushWrite {
                    return self.write_rest(engine, hv, op);
                }
                if op.done < op.stretch.len {
                    return self.flush_write_short();
                }
                Ok(())
            }
        };
        match op.kind {
            OpKind::GuestWrite { request, .. } => {
                self.piece_done(engine, hv, request, op.prepared, result);
            }
            OpKind::JobWrite { job, .. } => {
                self.job_write_done(engine, hv, job, op.stretch.len, result);
            }
            _ => self.flush_op_done(result),
        }
    }

    /// The store took only a part: the rest goes after it.
    fn write_rest<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        mut op: Op,
    ) {
        let (kind, len) = (op.kind, op.stretch.len);
        let prepared = op.prepared.take();
        let submitted = match kind {
            OpKind::GuestWrite { request, at } => {
                submit_guest_write(engine, hv, self.guest, op, request, at)
            }
            OpKind::JobWrite { from, .. } => submit_job_write(engine, hv, op, from),
            _ => unreachable!("only guests' and jobs' writes go on"),
        };
        let refused = match submitted {
            Submitted::Yes(id) => {
                engine.ops.get(id).prepared = prepared;
                self.ops += 1;
                return;
            }
            refused => rest_refused(refused),
        };
        match kind {
            OpKind::GuestWrite { request, .. } => {
                self.piece_done(engine, hv, request, prepared, Err(refused));
            }
            OpKind::JobWrite { job, .. } => {
                self.job_write_done(engine, hv, job, len, Err(refused));
            }
            _ => unreachable!("only guests' and jobs' writes go on"),
        }
    }
}

/// The rest of an operation was refused. A store that just answered has room for one more
/// unless it broke.
pub fn rest_refused(submitted: Submitted) -> Fault {
    match submitted {
        Submitted::Failed(fault) => fault,
        _ => Fault::Store(StoreFault::Io(5)),
    }
}

fn read_answer(result: Result<Answer, StoreFault>) -> Result<Window, Fault> {
    match result {
        Ok(Answer::Read(window)) => Ok(window),
        Ok(_) => Err(Fault::Store(StoreFault::Protocol)),
        Err(fault) => Err(Fault::Store(fault)),
    }
}
