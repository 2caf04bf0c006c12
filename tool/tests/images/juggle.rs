//! Several requests in flight at once, each advanced by one step at a time in a drawn order:
//! reads of metadata answered late, data written late, commits late, plans abandoned and tried
//! again, flushes among them. It is how the kernel uses the planners, without a kernel.
//!
//! The rules of the caller that it keeps: requests in flight do not overlap, nothing is
//! committed or discarded during a flush.

use std::collections::VecDeque;

use platter_image::{
    Access, BlockRef, FlushStep, Image, Place, Prelude, SectorRange, Step, Stop, WritePlan,
};
use platter_tool::engine::Engine;
use platter_tool::medium::RamFolder;

use crate::cases::{Built, Case};
use crate::model::{self, INITIAL, Kind, OPS_MAX, Op, SECTOR};
use crate::rng::Rng;
use crate::run::{Run, pick_growth, pick_range, seed_options};

/// Requests in flight.
const DEPTH: usize = 6;
/// Turns in which nothing moved after which nothing ever will.
const IDLE_MAX: usize = 2000;

enum State {
    /// Asks the planner for what is left.
    Ask,
    /// Its plan is under way.
    Plan(Box<Carry>),
    /// Data to be read later: from a file, so many sectors.
    Fetch { place: Place, sectors: u64 },
}

/// A plan being carried out, part by part.
struct Carry {
    plan: WritePlan,
    todo: VecDeque<Part>,
}

enum Part {
    Prelude(Prelude),
    /// Guest sectors to be copied to this byte of the plan's file.
    Copy(SectorRange, u64),
    Data,
}

/// `number` is the operation's; reads have none.
struct Task {
    number: Option<usize>,
    kind: Kind,
    sector: u64,
    count: u64,
    done: u64,
    state: State,
    fill: Option<BlockRef>,
}

impl Task {
    fn rest(&self) -> SectorRange {
        SectorRange::new(self.sector + self.done, self.count - self.done)
    }

    fn overlaps(&self, sector: u64, count: u64) -> bool {
        self.sector < sector + count && sector < self.sector + self.count
    }
}

struct Juggler<'a> {
    built: &'a Built,
    folder: &'a RamFolder,
    engine: Engine,
    rng: Rng,
    tasks: Vec<Task>,
    ops: Vec<Op>,
    sets: Vec<u64>,
    /// A flush under way: the operation that asked for it, if one did.
    flushing: Option<Option<usize>>,
    wants_flush: bool,
    /// Nothing begins until all has ended and the disk has grown.
    wants_growth: bool,
}

/// Runs `count` operations, then drops the engine as a power cut does.
pub fn workload(case: &Case, built: &Built, folder: &RamFolder, seed: u64, count: usize) -> Run {
    assert!(count <= OPS_MAX);
    let options = seed_options(case, seed, Access::ReadWrite);
    let engine = Engine::open(folder, &built.top, options);
    let mut engine = engine.unwrap_or_else(|fault| panic!("opening: {fault}"));
    let sets = vec![INITIAL; engine.sectors() as usize];
    let rng = Rng::new(seed ^ 0x6a75_6767);
    let (tasks, ops) = (Vec::new(), Vec::new());
    let mut juggler = Juggler {
        built,
        folder,
        engine,
        rng,
        tasks,
        ops,
        sets,
        flushing: None,
        wants_flush: false,
        wants_growth: false,
    };
    let mut idle = 0;
    while juggler.ops.len() < count || !juggler.tasks.is_empty() || juggler.flushing.is_some() {
        if juggler.ops.len() < count && juggler.tasks.len() < DEPTH && juggler.rng.chance(40) {
            juggler.begin(case);
        }
        idle = if juggler.turn() { 0 } else { idle + 1 };
        assert!(idle < IDLE_MAX, "{} requests wait for ever", juggler.tasks.len());
    }
    let Juggler { ops, sets, .. } = juggler;
    Run { ops, sets }
}

impl Juggler<'_> {
    /// Starts a request, if the one drawn may start now.
    fn begin(&mut self, case: &Case) {
        self.wants_growth |= case.grows() && self.rng.chance(2);
        if self.wants_growth {
            if self.tasks.is_empty() && self.flushing.is_none() {
                self.grow();
            }
            return;
        }
        let sectors = self.sets.len() as u64;
        let (sector, count) = pick_range(&mut self.rng, case.unit, sectors);
        let kinds = [Kind::Write, Kind::Write, Kind::Write, Kind::Zero, Kind::Discard, Kind::Flush];
        let kind = self.rng.pick(&kinds);
        let reads = self.rng.chance(25);
        let count = if kind == Kind::Flush && !reads { 0 } else { count };
        if count > 0 && self.tasks.iter().any(|task| task.overlaps(sector, count)) {
            return;
        }
        let number = (!reads).then_some(self.ops.len());
        if !reads {
            let now = self.folder.events_len();
            self.ops.push(Op { kind, sector, count, began: now, done: usize::MAX });
        }
        let (done, state) = (0, State::Ask);
        self.tasks.push(Task { number, kind, sector, count, done, state, fill: None });
    }

    /// Advances something by one step; false if nothing could.
    fn turn(&mut self) -> bool {
        if self.flushing.is_some() && (self.tasks.is_empty() || self.rng.chance(40)) {
            self.flush_step();
            return true;
        }
        if self.tasks.is_empty() {
            return true;
        }
        let at = self.rng.below(self.tasks.len() as u64) as usize;
        let mut task = self.tasks.swap_remove(at);
        let moved = self.advance(&mut task);
        if task.done < task.count || (task.kind == Kind::Flush && task.number.is_some()) {
            self.tasks.push(task);
        } else if let Some(number) = task.number {
            self.finish(number);
        }
        if self.wants_flush && self.flushing.is_none() {
            self.start_flush(None);
            return true;
        }
        moved
    }

    fn grow(&mut self) {
        self.wants_growth = false;
        let (number, sector) = (self.ops.len(), self.sets.len() as u64);
        let (count, began) = (pick_growth(&mut self.rng, sector), self.folder.events_len());
        let grown = self.engine.resize(sector + count);
        grown.unwrap_or_else(|fault| panic!("growing by {count}: {fault}"));
        self.sets.resize((sector + count) as usize, model::ZERO);
        self.ops.push(Op { kind: Kind::Grow, sector, count, began, done: usize::MAX });
        self.finish(number);
    }

    fn finish(&mut self, number: usize) {
        let mut op = self.ops[number];
        op.done = self.folder.events_len();
        op.apply(number, &mut self.sets);
        self.ops[number] = op;
    }

    fn start_flush(&mut self, number: Option<usize>) {
        self.wants_flush = false;
        self.flushing = Some(number);
        if let Some(number) = number {
            self.ops[number].began = self.folder.events_len();
        }
        self.engine.image().flush_begin();
    }

    fn flush_step(&mut self) {
        match self.engine.image().flush_step() {
            FlushStep::Write { file, offset, bytes } => {
                let bytes = bytes.to_vec();
                self.engine.medium(file).write_at(offset, &bytes).expect("RAM");
            }
            FlushStep::Sync { file } => self.engine.medium(file).sync().expect("RAM"),
            FlushStep::Done => {
                self.engine.image().flush_end(true);
                if let Some(number) = self.flushing.take().expect("a flush is under way") {
                    self.finish(number);
                }
            }
        }
    }

    /// A planner's answer, or what must happen first.
    fn ask<T>(&mut self, task: &mut Task, call: impl Fn(&mut Image) -> Step<T>) -> Option<T> {
        match call(self.engine.image()) {
            Ok(answer) => return Some(answer),
            Err(Stop::Miss(block)) => task.fill = Some(block),
            Err(Stop::Busy) => {}
            Err(Stop::NeedFlush) => self.wants_flush = true,
            Err(Stop::Fault(fault)) => panic!("{:?} at {}: {fault}", task.kind, task.sector),
        }
        None
    }

    fn advance(&mut self, task: &mut Task) -> bool {
        if let Some(block) = task.fill.take() {
            let mut bytes = vec![0; block.len as usize];
            self.engine.medium(block.file).read_at(block.offset, &mut bytes).expect("RAM");
            if self.rng.chance(5) {
                self.engine.image().fill_failed(block);
            } else {
                self.engine.image().fill(block, &bytes);
            }
            return true;
        }
        match std::mem::replace(&mut task.state, State::Ask) {
            State::Plan(carry) => self.carry(task, carry),
            State::Fetch { place, sectors } => self.fetch(task, place, sectors),
            State::Ask if task.number.is_none() => {
                let range = task.rest();
                let Some(extent) = self.ask(task, |image| image.map_read(range)) else {
                    return task.fill.is_some();
                };
                match extent.place {
                    place @ Place::File { .. } => {
                        task.state = State::Fetch { place, sectors: extent.sectors };
                        true
                    }
                    place => self.fetch(task, place, extent.sectors),
                }
            }
            State::Ask => self.ask_change(task),
        }
    }

    fn ask_change(&mut self, task: &mut Task) -> bool {
        match task.kind {
            Kind::Flush | Kind::Reopen | Kind::Grow => {
                // A flush covers what was done before it, so it can start at any time.
                if self.flushing.is_some() {
                    return false;
                }
                self.start_flush(task.number);
                // The flush itself answers it: the task is over.
                (task.kind, task.number) = (Kind::Write, None);
                true
            }
            Kind::Write => {
                let range = task.rest();
                let Some(plan) = self.ask(task, |image| image.prepare_write(range)) else {
                    return task.fill.is_some();
                };
                let mut todo: VecDeque<Part> =
                    plan.preludes.iter().map(|prelude| Part::Prelude(*prelude)).collect();
                if let Some(head) = plan.head {
                    todo.push_back(Part::Copy(head, plan.offset - head.bytes()));
                }
                todo.push_back(Part::Data);
                if let Some(tail) = plan.tail {
                    let bytes = plan.sectors * SECTOR as u64;
                    todo.push_back(Part::Copy(tail, plan.offset + bytes));
                }
                task.state = State::Plan(Box::new(Carry { plan, todo }));
                true
            }
            Kind::Zero | Kind::Discard => {
                if self.flushing.is_some() {
                    return false;
                }
                let (range, zero) = (task.rest(), task.kind == Kind::Zero);
                let Some(plan) = self.ask(task, |image| image.discard(range, zero)) else {
                    return task.fill.is_some();
                };
                if let Some((file, offset, len)) = plan.punch {
                    self.engine.medium(file).punch(offset, len).expect("RAM");
                }
                if plan.sectors > 0 {
                    task.done += plan.sectors;
                } else {
                    // Zeros must be written: for simplicity all that is left.
                    task.kind = Kind::Write;
                }
                true
            }
        }
    }

    /// Bytes of the guest for the sectors of a plan.
    fn bytes(&self, task: &Task, sector: u64, count: u64) -> Vec<u8> {
        let number = task.number.expect("a change has a number");
        match self.ops[number].kind {
            Kind::Write => model::stamps(number, sector, count),
            _ => vec![0; count as usize * SECTOR],
        }
    }

    fn carry(&mut self, task: &mut Task, mut carry: Box<Carry>) -> bool {
        if self.rng.chance(3) {
            self.engine.image().abandon(carry.plan.prepared);
            return true;
        }
        let file = carry.plan.file;
        let Some(part) = carry.todo.pop_front() else {
            if self.flushing.is_some() {
                task.state = State::Plan(carry);
                return false;
            }
            task.done += carry.plan.sectors;
            self.engine.image().commit(carry.plan.prepared);
            return true;
        };
        match part {
            Part::Prelude(Prelude::Zero { file, offset, len }) => {
                self.engine.medium(file).zero(offset, len).expect("RAM");
            }
            Part::Prelude(Prelude::Copy { file, from, to, len }) => {
                let mut bytes = vec![0; len as usize];
                self.engine.medium(file).read_at(from, &mut bytes).expect("RAM");
                self.engine.medium(file).write_at(to, &bytes).expect("RAM");
            }
            Part::Data => {
                let start = task.rest().start;
                let bytes = self.bytes(task, start, carry.plan.sectors);
                self.engine.medium(file).write_at(carry.plan.offset, &bytes).expect("RAM");
            }
            Part::Copy(range, to) => {
                let Some(extent) = self.ask(task, |image| image.map_read(range)) else {
                    carry.todo.push_front(Part::Copy(range, to));
                    task.state = State::Plan(carry);
                    return task.fill.is_some();
                };
                let bytes = self.read_place(extent.place, extent.sectors);
                self.engine.medium(file).write_at(to, &bytes).expect("RAM");
                if extent.sectors < range.count {
                    let rest = SectorRange::new(
                        range.start + extent.sectors,
                        range.count - extent.sectors,
                    );
                    carry.todo.push_front(Part::Copy(rest, to + bytes.len() as u64));
                }
            }
        }
        task.state = State::Plan(carry);
        true
    }

    fn read_place(&mut self, place: Place, sectors: u64) -> Vec<u8> {
        let mut bytes = vec![0; sectors as usize * SECTOR];
        match place {
            Place::File { file, offset } => {
                self.engine.medium(file).read_at(offset, &mut bytes).expect("RAM");
            }
            Place::Zero => {}
            Place::Memory { offset } => {
                let len = bytes.len();
                bytes.copy_from_slice(self.engine.image().bytes(offset, len));
            }
        }
        bytes
    }

    fn fetch(&mut self, task: &mut Task, place: Place, sectors: u64) -> bool {
        let bytes = self.read_place(place, sectors);
        let start = task.rest().start;
        if let Some(wrong) = model::mismatch(self.built, &self.sets, start, &bytes) {
            panic!("a read among others: {wrong}, from {place:?}");
        }
        task.done += sectors;
        true
    }
}
