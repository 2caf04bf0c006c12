//! Trains: reads or writes of a disk that follow each other in one file leave as one message.
//!
//! A guest that reads in sequence with small requests would else cost its store a message for
//! each. Operations are coupled while a disk's requests are planned and leave together when that
//! ends; each stays an operation of its own, and the answer is shared out in order. Guards that
//! nobody fails for another's sake: a train that fails is broken up, and each asks for itself.

use platter_storage::{Answer, Store, StoreFault, Tag, Window};
use platter_xen::Hypervisor;

use crate::disk::Disk;
use crate::engine::{Engine, Op, OpKind, Stretch, Submitted};
use crate::fault::Fault;
use crate::limits::TRAIN_BYTES_MAX;
use crate::table::Id;

/// Operations that have not left yet.
#[derive(Clone, Copy)]
pub struct Train {
    head: Id,
    last: Id,
    /// Of all together.
    bytes: u32,
}

impl Op {
    /// Does it go on where `before` ends, in the same direction?
    fn follows(&self, before: &Op) -> bool {
        let writes = |op: &Op| matches!(op.kind, OpKind::GuestWrite { .. });
        let end = before.stretch.offset + u64::from(before.stretch.len);
        writes(self) == writes(before)
            && self.stretch.handle == before.stretch.handle
            && self.stretch.offset == end
    }
}

impl Disk {
    /// Enters a guest's read or write, which leaves with what it follows or is followed by.
    pub fn board<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        op: Op,
    ) -> Option<Id> {
        let Stretch { handle, len, .. } = op.stretch;
        let bytes_max = engine.io_bytes_max(handle).min(TRAIN_BYTES_MAX);
        let fits = |train: Train| train.bytes.saturating_add(len) <= bytes_max;
        if !self.train.is_some_and(|train| fits(train) && op.follows(engine.ops.get(train.last))) {
            self.depart(engine, hv);
        }
        if !engine.has_room(handle) {
            return None;
        }
        let id = engine.ops.insert(op).ok()?;
        let train = self.train.get_or_insert(Train { head: id, last: id, bytes: 0 });
        if train.head != id {
            engine.ops.get(train.last).behind = Some(id);
        }
        train.last = id;
        train.bytes += len;
        Some(id)
    }

    /// What has boarded leaves.
    pub fn depart<H: Hypervisor, S: Store<H>>(&mut self, engine: &mut Engine<S>, hv: &mut H) {
        if let Some(train) = self.train.take() {
            self.continue_op(engine, hv, train.head);
        }
    }

    /// Submits an operation, or the rest of it, and those behind it; without room they wait.
    pub fn continue_op<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        id: Id,
    ) {
        match engine.go_on(hv, id) {
            Submitted::Yes => {}
            Submitted::NoRoom => self.rests = true,
            Submitted::Failed(_) if engine.ops.get(id).behind.is_some() => {
                self.break_up(engine, id);
            }
            Submitted::Failed(fault) => self.op_failed(engine, hv, id, fault),
        }
    }

    /// From here on each operation of a train is alone; all wait for their turn to ask.
    fn break_up<S>(&mut self, engine: &mut Engine<S>, head: Id) {
        let mut next = Some(head);
        while let Some(id) = next {
            let op = engine.ops.get(id);
            next = op.behind.take();
            op.waiting = true;
        }
        self.rests = true;
        self.kick = true;
    }

    /// An answer to a train: each gets its part, in order; whoever gets none asks again, with
    /// those behind.
    pub fn train_answered<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        head: Id,
        result: Result<Answer, StoreFault>,
    ) {
        let mut left = match result {
            Ok(Answer::Read(window)) => Part::Read(window),
            Ok(Answer::Written(bytes)) if bytes > 0 => Part::Written(bytes),
            _ => return self.break_up(engine, head),
        };
        let at_end = left.bytes() == 0;
        let mut next = Some(head);
        while let Some(id) = next {
            if left.bytes() == 0 && !at_end {
                return self.continue_op(engine, hv, id);
            }
            let op = engine.ops.get(id);
            next = op.behind.take();
            let answer = left.split(op.rest().len);
            self.answered(engine, hv, id, Ok(answer));
        }
    }

    /// A write's bytes could not be had from its guest: it is taken back before it leaves, with
    /// those of its train, who ask again.
    pub fn take_back<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        id: Id,
        fault: Fault,
    ) {
        let op = engine.ops.get(id);
        // Another one of its train may have been taken back before it.
        if !op.waiting {
            let store = op.stretch.handle.store as usize;
            let head = engine.head_of(id);
            engine.stores[store].store.void(hv, Tag(head.0 as u32));
            self.break_up(engine, head);
        }
        self.op_failed(engine, hv, id, fault);
    }
}

/// What is left of an answer.
#[derive(Clone, Copy)]
enum Part {
    Read(Window),
    Written(u32),
}

impl Part {
    fn bytes(&self) -> usize {
        match self {
            Part::Read(window) => window.len(),
            Part::Written(bytes) => *bytes as usize,
        }
    }

    /// Takes up to `bytes` from its front.
    fn split(&mut self, bytes: u32) -> Answer {
        match self {
            Part::Read(window) => Answer::Read(window.split(bytes as usize)),
            Part::Written(left) => {
                let taken = bytes.min(*left);
                *left -= taken;
                Answer::Written(taken)
            }
        }
    }
}
