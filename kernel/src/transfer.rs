//! Bytes between a guest's granted pages and ours, by grant copy: the one copy of the data path.
//!
//! A grant copy is a hypercall whatever its length, so the copies of a turn are gathered and run
//! together; each belongs to an owner, who is told what came of his. Must never: allocate, let a
//! turn end with copies that have not run.

use alloc::vec::Vec;

use platter_storage::{Run, Window};
use platter_xen::blkif::Segment;
use platter_xen::{Direction, DomId, GrantCopy, Hypervisor, PAGE_BYTES};

use crate::limits::{COPIES_MAX, OPS_MAX, PIECES_MAX};
use crate::table::Id;

/// The guest's side of a request: its segments in order.
pub struct Guest<'a> {
    pub domid: DomId,
    pub segments: &'a [Segment],
}

/// Whose bytes are copied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Owner {
    /// A store operation's.
    Op(Id),
    /// A part of a request that needs no store.
    Piece { disk: u16, request: Id },
}

/// The copies of a turn, and whose they are.
pub struct Copies {
    ops: Vec<GrantCopy>,
    /// For each of them its place in `owners`; [`NOBODY`] for one that is waited for.
    whose: Vec<u16>,
    /// Each with the first GNTST status that was not okay.
    owners: Vec<(Owner, i16)>,
    /// The same for what is waited for.
    status: i16,
}

const NOBODY: u16 = u16::MAX;
/// An operation has one entry at most.
const OWNERS_MAX: usize = OPS_MAX + PIECES_MAX;

impl Copies {
    pub fn new() -> Copies {
        Copies {
            ops: Vec::with_capacity(COPIES_MAX),
            whose: Vec::with_capacity(COPIES_MAX),
            owners: Vec::with_capacity(OWNERS_MAX),
            status: 0,
        }
    }

    /// Can a piece be queued? There is always room for operations.
    pub fn takes_pieces(&self) -> bool {
        self.owners.len() < PIECES_MAX
    }

    /// Queues copies of all that `from` says, from or to the guest's bytes starting at `at`
    /// (bytes from the start of the request).
    pub fn queue<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        owner: Owner,
        guest: &Guest,
        at: usize,
        from: &Repeated,
        direction: Direction,
    ) {
        assert!(self.owners.len() < OWNERS_MAX, "more owners than operations and pieces");
        self.owners.push((owner, 0));
        let whose = self.owners.len() as u16 - 1;
        self.add(hv, whose, guest, at, from, direction);
    }

    /// As [`queue`](Self::queue), at once and with everything queued before it. The first grant
    /// that fails is the result, by its GNTST status.
    pub fn now<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        guest: &Guest,
        at: usize,
        from: &Repeated,
        direction: Direction,
    ) -> Result<(), i16> {
        self.status = 0;
        self.add(hv, NOBODY, guest, at, from, direction);
        self.run(hv);
        if self.status == 0 { Ok(()) } else { Err(self.status) }
    }

    fn push<H: Hypervisor>(&mut self, hv: &mut H, whose: u16, copy: GrantCopy) {
        if self.ops.len() == COPIES_MAX {
            self.run(hv);
        }
        self.ops.push(copy);
        self.whose.push(whose);
    }

    fn add<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        whose: u16,
        guest: &Guest,
        at: usize,
        from: &Repeated,
        direction: Direction,
    ) {
        let mut cursor = Cursor::new(guest, at);
        let mut left = from.len;
        while left > 0 {
            for run in &from.window.runs {
                let mut done = 0;
                while done < run.len.min(left) {
                    let (gref, gref_offset, guest_left) = cursor.place();
                    let ours = run.offset + done;
                    let page_left = PAGE_BYTES - ours % PAGE_BYTES;
                    let len = guest_left.min(page_left).min(run.len.min(left) - done);
                    let copy = GrantCopy {
                        domid: guest.domid,
                        gref,
                        gref_offset,
                        page: run.region.page(ours / PAGE_BYTES),
                        page_offset: (ours % PAGE_BYTES) as u16,
                        len: len as u16,
                        direction,
                        status: 0,
                    };
                    self.push(hv, whose, copy);
                    cursor.advance(len);
                    done += len;
                }
                left -= done;
            }
        }
    }

    /// Runs what is queued: one hypercall.
    pub fn run<H: Hypervisor>(&mut self, hv: &mut H) {
        if self.ops.is_empty() {
            return;
        }
        hv.copy(&mut self.ops);
        for (copy, &whose) in self.ops.iter().zip(&self.whose) {
            let status = match whose {
                NOBODY => &mut self.status,
                owner => &mut self.owners[owner as usize].1,
            };
            if *status == 0 {
                *status = copy.status;
            }
        }
        self.ops.clear();
        self.whose.clear();
    }

    /// Whose copies have run, by number, and their status; `None` beyond the last. Call after
    /// [`run`](Self::run), then [`forget`](Self::forget) so many.
    pub fn outcome(&self, index: usize) -> Option<(Owner, i16)> {
        self.owners.get(index).copied()
    }

    /// So many owners, the oldest, have been told. Others may have queued meanwhile: not ours
    /// to run here, for their places have moved.
    pub fn forget(&mut self, count: usize) {
        assert!(self.owners.len() == count && self.ops.is_empty(), "queued while being settled");
        self.owners.clear();
    }
}

/// A window, and how many bytes are copied of it: once, or over and over (zeros).
pub struct Repeated {
    pub window: Window,
    pub len: usize,
}

impl Repeated {
    /// All of a window, once.
    pub fn once(window: Window) -> Repeated {
        Repeated { window, len: window.len() }
    }

    /// `len` bytes, each stretch of them the same.
    pub fn times(run: Run, len: usize) -> Repeated {
        Repeated { window: one_run(run), len }
    }
}

/// A window of one run.
pub fn one_run(run: Run) -> Window {
    Window { runs: [run, Run { len: 0, ..run }] }
}

/// A position in the guest's segments.
struct Cursor<'a> {
    segments: &'a [Segment],
    index: usize,
    /// Bytes into the segment.
    within: usize,
}

impl<'a> Cursor<'a> {
    fn new(guest: &Guest<'a>, at: usize) -> Cursor<'a> {
        let mut cursor = Cursor { segments: guest.segments, index: 0, within: 0 };
        cursor.advance(at);
        cursor
    }

    /// Grant, byte offset in the page, and bytes left in the segment.
    fn place(&self) -> (platter_xen::Gref, u16, usize) {
        let segment = &self.segments[self.index];
        let left = segment.len_bytes() as usize - self.within;
        (segment.gref, segment.offset_bytes() + self.within as u16, left)
    }

    fn advance(&mut self, mut bytes: usize) {
        while bytes > 0 {
            let left = self.segments[self.index].len_bytes() as usize - self.within;
            if bytes < left {
                self.within += bytes;
                return;
            }
            bytes -= left;
            self.index += 1;
            self.within = 0;
        }
    }
}
