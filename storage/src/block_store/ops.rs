//! The table of operations in flight, and which of them must wait for which.
//!
//! Guards the order on one block: a read-modify-write holds its block from its read to the end
//! of its write. An operation that changes a block waits for every earlier one that changes the
//! same block, if either of the two is a read-modify-write; whole-block writes of one another
//! need no order (a guest that wants one waits for the answer). Earlier means taken earlier, so
//! no two wait for each other.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::disk::Held;
use crate::store::{FileId, StoreFault, Tag};

/// What an operation is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Read,
    /// Whole blocks.
    Write,
    /// Part of one block: read, merged, written.
    Modify,
    Flush,
    Zeroes,
    Discard,
    /// A read for the opening that runs.
    Meta,
}

/// Where it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    Free,
    /// Not (or not wholly) at its device: a conflict, or no room there.
    Waiting,
    Issued,
    /// Finished, its answer not yet given.
    Ready,
    /// Its answer was given; the window still lives.
    Lent,
}

/// One operation.
#[derive(Clone, Copy, Debug)]
pub struct Op {
    pub kind: Kind,
    pub state: State,
    pub tag: Tag,
    pub file: FileId,
    /// Of a flush: the file's writes that were answered before it. Of a read for an opening: its
    /// number.
    pub mark: u64,
    pub disk: u8,
    /// The range on the disk, whole blocks, in 512-byte sectors.
    pub sector: u64,
    pub sectors: u32,
    /// First page of the buffer, and how many pages; 0 pages: none.
    pub page: u16,
    pub pages: u8,
    /// Where the block is read to by a read-modify-write.
    pub scratch: u16,
    pub scratch_pages: u8,
    /// The caller's bytes in the buffer: offset and length.
    pub within: u32,
    pub len: u32,
    /// The old block of a read-modify-write is merged: the write is next.
    pub merged: bool,
    /// Disks that a flush has yet to be sent to.
    pub flush_left: u32,
    /// Operations at devices that have not answered.
    pub parts: u8,
    pub result: Result<(), StoreFault>,
    pub held: Held,
    /// Order of taking; given by [`Ops::take`].
    pub seq: u64,
}

impl Op {
    pub const NEW: Op = Op {
        kind: Kind::Read,
        state: State::Free,
        tag: Tag(0),
        file: FileId(u16::MAX),
        mark: 0,
        disk: 0,
        sector: 0,
        sectors: 0,
        page: 0,
        pages: 0,
        scratch: 0,
        scratch_pages: 0,
        within: 0,
        len: 0,
        merged: false,
        flush_left: 0,
        parts: 0,
        result: Ok(()),
        held: Held::Nobody,
        seq: 0,
    };

    /// Changes blocks and is not finished.
    fn is_changing(&self) -> bool {
        let changes = !matches!(self.kind, Kind::Read | Kind::Flush | Kind::Meta);
        changes && matches!(self.state, State::Waiting | State::Issued)
    }

    fn overlaps(&self, other: &Op) -> bool {
        self.disk == other.disk
            && self.sector < other.sector.saturating_add(u64::from(other.sectors))
            && other.sector < self.sector.saturating_add(u64::from(self.sectors))
    }
}

/// The table.
pub struct Ops {
    table: Vec<Op>,
    free: Vec<u16>,
    waiting: VecDeque<u16>,
    ready: VecDeque<u16>,
    seq: u64,
    /// Read-modify-writes not finished: without one, nothing conflicts.
    modifies: usize,
}

impl Ops {
    pub fn new(ops_max: usize) -> Ops {
        assert!((1..=4096).contains(&ops_max), "size of the table of operations");
        Ops {
            table: alloc::vec![Op::NEW; ops_max],
            free: (0..ops_max as u16).rev().collect(),
            waiting: VecDeque::with_capacity(ops_max),
            ready: VecDeque::with_capacity(ops_max),
            seq: 0,
            modifies: 0,
        }
    }

    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Nothing is under way.
    pub fn is_empty(&self) -> bool {
        self.free.len() == self.table.len()
    }

    pub fn get(&self, index: u16) -> &Op {
        &self.table[usize::from(index)]
    }

    pub fn get_mut(&mut self, index: u16) -> &mut Op {
        &mut self.table[usize::from(index)]
    }

    /// Enters an operation, issued; the caller starts it or lets it wait.
    pub fn take(&mut self, op: Op) -> Option<u16> {
        let index = self.free.pop()?;
        self.seq += 1;
        self.modifies += usize::from(op.kind == Kind::Modify);
        self.table[usize::from(index)] = Op { state: State::Issued, seq: self.seq, ..op };
        Some(index)
    }

    /// Whether an earlier unfinished operation must end before this one starts.
    pub fn must_wait(&self, index: u16) -> bool {
        let op = self.get(index);
        if self.modifies == 0 || !op.is_changing() {
            return false;
        }
        self.table.iter().any(|other| {
            other.is_changing()
                && other.seq < op.seq
                && (op.kind == Kind::Modify || other.kind == Kind::Modify)
                && other.overlaps(op)
        })
    }

    pub fn wait(&mut self, index: u16) {
        self.get_mut(index).state = State::Waiting;
        self.waiting.push_back(index);
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// The next one in line, issued again until it waits again.
    pub fn next_waiting(&mut self) -> Option<u16> {
        let index = self.waiting.pop_front()?;
        self.get_mut(index).state = State::Issued;
        Some(index)
    }

    pub fn finish(&mut self, index: u16) {
        let op = self.get_mut(index);
        assert!(op.state == State::Issued && op.parts == 0, "finished once, after all its parts");
        op.state = State::Ready;
        let modify = op.kind == Kind::Modify;
        self.modifies -= usize::from(modify);
        self.ready.push_back(index);
    }

    pub fn nothing_ready(&self) -> bool {
        self.ready.is_empty()
    }

    pub fn next_ready(&mut self) -> Option<u16> {
        let index = self.ready.pop_front()?;
        self.get_mut(index).state = State::Lent;
        Some(index)
    }

    /// Frees the place of an operation whose answer was given, or that was never sent.
    pub fn release(&mut self, index: u16) -> Op {
        let op = self.get_mut(index);
        assert!(op.state == State::Lent, "released after its answer");
        op.state = State::Free;
        let op = *op;
        self.free.push(index);
        op
    }

    /// Takes back an operation that was entered and not started.
    pub fn cancel(&mut self, index: u16) -> Op {
        let op = self.get_mut(index);
        assert!(op.state == State::Issued && op.parts == 0, "cancelled before it was sent");
        op.state = State::Free;
        let op = *op;
        self.modifies -= usize::from(op.kind == Kind::Modify);
        self.free.push(index);
        op
    }
}
