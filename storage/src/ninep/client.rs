//! The 9p store: [`Store`] over the rings of one mounted share.
//!
//! Guards answer-exactly-once towards the kernel: every accepted operation is in the table until
//! its one [`Done`] has been yielded, also when the server dies. Guards the transport's rules: a
//! request goes out on ring `tag % rings` because QEMU answers there; a plain server has one
//! request per ring; the answers asked for always fit the ring, so that no server waits for
//! room. Must never: look at a data byte, allocate outside `open`, believe an answer that was
//! not asked for.

use alloc::vec::Vec;

use heapless::Deque;
use platter_xen::ninepfs::{
    Broken, FrontRing, HEAD_BYTES, MessageHead, RINGS_MAX, Reservation, Span,
};
use platter_xen::{Hypervisor, Port};

use super::file::{File, OVERSIZE, PATH_BYTES_MAX, Progress, SIZE_BYTES_MAX, Step, fault_of};
use super::message::{
    ANSWER_BYTES_MAX, AllocateMode, Answer, GETATTR_BASIC, Malformed, NOFID, PLATTER_IN_FLIGHT,
    RREAD_BYTES, Request, TWRITE_BYTES, id,
};
use super::session::Session;
use crate::store::{
    Access, Answer as Reply, Done, FileId, Opened, Run, Store, StoreFault, Submit, Tag, Window,
};

/// Operations in flight over all rings.
const OPS_MAX: usize = RINGS_MAX * PLATTER_IN_FLIGHT as usize;
/// Files open at once: ours; 150 bytes each, plus the path.
pub const FILES_MAX: usize = 2048;
/// Data of one operation is a multiple of this, so that pages stay whole.
const IO_UNIT_BYTES: u32 = 4096;
/// Bytes of the longest Twalk: head, fids and count, a path of 1024 bytes, 16 lengths.
const STEP_BYTES_MAX: usize = 17 + PATH_BYTES_MAX + 2 * 16;
/// Bytes of every other request of ours, data apart: Tsetattr's 67 are the most.
pub(super) const REQUEST_BYTES_MAX: usize = 72;
/// Answers that no server is asked for, at once.
const HOME_MAX: usize = 64;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// A file's current [`Step`].
    Step,
    Read,
    Write,
    Fsync,
    Allocate,
    Size,
    /// Asks for a file's holes; nobody waits for it.
    Extents,
    /// A write taken back: it went out as one to no file.
    Void,
}

/// One message in flight, or answered by the session's end and not yet reported.
#[derive(Clone, Copy, Debug)]
pub(super) struct Op {
    kind: Kind,
    file: u16,
    /// Bytes asked for, of a read or write.
    len: u32,
    /// The caller's; meaningless for a step.
    tag: Tag,
    /// What its answer may take of the ring.
    pub answer_bytes: u32,
    /// Where its message lies, for the one that may be taken back.
    place: Option<Reservation>,
    lost: bool,
}

/// One ring pair and its share of the load.
#[derive(Debug)]
pub(super) struct Lane {
    pub ring: FrontRing,
    pub in_flight: u32,
    /// Room promised to answers in flight, or taken and not given back.
    answer_bytes: u32,
    /// Of these, the taken ones'.
    taken_bytes: u32,
    /// Where an answer begins of which only a part has come, and since when.
    pub partial: Option<(u32, u64)>,
}

impl Lane {
    pub fn new(ring: FrontRing) -> Lane {
        Lane { ring, in_flight: 0, answer_bytes: 0, taken_bytes: 0, partial: None }
    }
}

/// A share as a store. Bring it up with [`super::mount::Mount`].
pub struct Client {
    pub(super) lanes: Vec<Lane>,
    pub(super) session: Session,
    /// In the table's terms: index = wire tag.
    ops: [Option<Op>; OPS_MAX],
    pub(super) files: Vec<Option<File>>,
    /// Reads of holes, with their file: answered here.
    pub(super) home: Deque<(u16, Done), HOME_MAX>,
    /// Largest message, as agreed.
    pub(super) msize: u32,
    /// Requests per ring.
    pub(super) depth: u32,
    /// The server speaks the platter dialect.
    pub(super) extended: bool,
    /// This session, or the last one, got as far as Up.
    pub(super) was_up: bool,
    /// Some rings are given back already: none of them is to be used again.
    pub(super) releasing: bool,
    /// Where the search for room, and for answers, starts: round-robin.
    lane_next: usize,
    answer_next: usize,
    /// Some answers are due that no server will send.
    sweep: bool,
    /// Files with a step to send, or more: never fewer.
    steps_due: bool,
    /// Room appeared that no answer tells of.
    made_room: bool,
    /// Of the last poll.
    pub(super) now_ns: u64,
    /// When the last answer came, or when we first saw that we wait for one.
    pub(super) alive_ns: u64,
    /// At the last poll something was asked and not answered.
    pub(super) waited: bool,
}

impl Default for Client {
    fn default() -> Client {
        Client::new()
    }
}

impl Client {
    /// A store without a server: every operation is refused as [`StoreFault::Gone`].
    pub fn new() -> Client {
        Client {
            lanes: Vec::new(),
            session: Session::Down,
            ops: [None; OPS_MAX],
            files: Vec::new(),
            home: Deque::new(),
            msize: 0,
            depth: 1,
            extended: false,
            was_up: false,
            releasing: false,
            lane_next: 0,
            answer_next: 0,
            sweep: false,
            steps_due: false,
            made_room: false,
            now_ns: 0,
            alive_ns: 0,
            waited: false,
        }
    }

    /// The session's state, for people and for the mount.
    pub fn session(&self) -> Session {
        self.session
    }

    /// The event channels of all rings, to be waited on.
    pub fn ports(&self) -> impl Iterator<Item = Port> + '_ {
        self.lanes.iter().map(|lane| lane.ring.port())
    }

    /// Ends the session: everything outstanding is answered [`StoreFault::Gone`], open files
    /// wait to be opened again. The rings stay as they are.
    pub(super) fn lose(&mut self, session: Session) {
        self.session = session;
        (self.sweep, self.made_room) = (true, true);
        for lane in &mut self.lanes {
            (lane.in_flight, lane.answer_bytes, lane.taken_bytes) = (0, 0, 0);
        }
        for op in &mut self.ops {
            match op {
                Some(Op { kind: Kind::Step, .. }) => *op = None,
                Some(op) => op.lost = true,
                None => {}
            }
        }
        for slot in &mut self.files {
            if slot.as_mut().is_some_and(File::lose) {
                *slot = None;
            }
        }
    }

    /// The session is up: open again what was open.
    pub(super) fn reopen_files(&mut self) {
        self.files.iter_mut().flatten().for_each(File::reopen);
        self.steps_due = true;
    }

    /// The next answer that no server will send, after a session's end.
    fn next_swept(&mut self) -> Option<Done> {
        for index in 0..OPS_MAX {
            if let Some(op) = self.ops[index].filter(|op| op.lost) {
                self.ops[index] = None;
                self.settle(op);
                if matches!(op.kind, Kind::Void | Kind::Extents) {
                    continue;
                }
                return Some(Done { tag: op.tag, result: Err(StoreFault::Gone) });
            }
        }
        for slot in &mut self.files {
            let Some(file) = slot else { continue };
            if let (Step::Failed(fault), Some(tag)) = (file.step, file.opener) {
                *slot = None;
                return Some(Done { tag, result: Err(fault) });
            }
        }
        self.sweep = false;
        None
    }

    /// An operation is over and reported.
    fn settle(&mut self, op: Op) {
        if matches!(op.kind, Kind::Write | Kind::Void) {
            let slot = &mut self.files[usize::from(op.file)];
            slot.as_mut().expect("a file outlives its operations").holes.changed();
        }
        self.count_down(op.file);
    }

    /// One operation of `file` less: a close that waited for it can go on.
    fn count_down(&mut self, file: u16) {
        let slot = &mut self.files[usize::from(file)];
        let open = slot.as_mut().expect("a file outlives its operations");
        open.outstanding -= 1;
        if open.closing && open.outstanding == 0 {
            self.clunk(usize::from(file));
        }
    }

    fn clunk(&mut self, index: usize) {
        let slot = &mut self.files[index];
        let Some(file) = slot else { return };
        match file.step {
            // The server does not know this fid.
            Step::Lost => *slot = None,
            Step::Refused(_) if !file.fid_exists => *slot = None,
            Step::Ready | Step::Refused(_) => {
                (file.step, file.due) = (Step::Clunk, true);
                self.steps_due = true;
            }
            // Being opened again: the answer in flight decides, see `step_answered`.
            _ => {}
        }
    }

    pub(super) fn file_is_ready(&self, file: FileId) -> Result<(), StoreFault> {
        match self.files.get(usize::from(file.0)) {
            Some(Some(file)) => {
                assert!(!file.closing, "operation on a closed file");
                match file.step {
                    Step::Ready => Ok(()),
                    Step::Refused(fault) => Err(fault),
                    _ => Err(StoreFault::Gone),
                }
            }
            _ => panic!("operation on a file that was never opened"),
        }
    }

    /// Finds a ring with room for a request of `out` bytes and its answer of `answer` bytes.
    /// `Ok(None)`: not now. A turn's requests go on one ring while it has room, which is less to
    /// look at; a plain server's rings take one request each.
    fn reserve<H: Hypervisor>(
        &mut self,
        hv: &H,
        out: u32,
        answer: u32,
    ) -> Result<Option<(usize, Reservation)>, Broken> {
        let rings = self.lanes.len();
        for step in 0..rings {
            let index = (self.lane_next + step) % rings;
            let lane = &self.lanes[index];
            if lane.in_flight >= self.depth || lane.answer_bytes + answer > lane.ring.half_bytes() {
                continue;
            }
            if let Some(reservation) = lane.ring.reserve(hv, out)? {
                self.lane_next = index;
                let tag = self.free_tag(index);
                return Ok(Some((tag, reservation)));
            }
        }
        Ok(None)
    }

    /// A free wire tag of ring `lane`: `lane + k * rings`.
    fn free_tag(&self, lane: usize) -> usize {
        (lane..OPS_MAX)
            .step_by(self.lanes.len())
            .find(|tag| self.ops[*tag].is_none())
            .expect("lost operations are swept before a session is up; depth bounds the rest")
    }

    /// Fills in a reserved message, apart from its data; it leaves with the next push.
    fn launch<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        tag: usize,
        reservation: Reservation,
        bytes: &mut [u8],
        op: Op,
    ) {
        bytes[5..7].copy_from_slice(&(tag as u16).to_le_bytes());
        let rings = self.lanes.len();
        let lane = &mut self.lanes[tag % rings];
        lane.ring.put(hv, &reservation, 0, bytes);
        lane.ring.seal(reservation);
        lane.in_flight += 1;
        lane.answer_bytes += op.answer_bytes;
        self.ops[tag] = Some(op);
    }

    /// Sends a message without data, by way of `scratch`. `Ok(false)`: no room now.
    pub(super) fn send<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        request: &Request<'_>,
        op: Op,
        scratch: &mut [u8],
    ) -> Result<bool, StoreFault> {
        let len = request.emit(0, scratch).expect("scratch is sized for our requests");
        match self.reserve(hv, len as u32, op.answer_bytes) {
            Ok(Some((tag, reservation))) => {
                self.launch(hv, tag, reservation, &mut scratch[..len], op);
                Ok(true)
            }
            Ok(None) => Ok(false),
            Err(_) => Err(self.break_session()),
        }
    }

    fn break_session(&mut self) -> StoreFault {
        self.lose(Session::Broken("the 9p server broke its ring"));
        StoreFault::Gone
    }

    /// An operation of the caller without data of its own.
    fn submit<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        request: &Request<'_>,
        mut op: Op,
    ) -> Result<Submit, StoreFault> {
        self.file_is_ready(FileId(op.file))?;
        op.answer_bytes = op.answer_bytes.max(ANSWER_BYTES_MAX as u32);
        if !self.send(hv, request, op, &mut [0; REQUEST_BYTES_MAX])? {
            return Ok(Submit::NoRoom);
        }
        self.count_up(op.file);
        Ok(Submit::Taken(op.len))
    }

    fn count_up(&mut self, file: u16) {
        let slot = &mut self.files[usize::from(file)];
        slot.as_mut().expect("checked before").outstanding += 1;
    }

    /// Sends the steps that are due, as far as there is room.
    fn send_steps<H: Hypervisor>(&mut self, hv: &mut H) {
        if !self.steps_due || self.session != Session::Up {
            return;
        }
        for index in 0..self.files.len() {
            // Out of the table while the message borrows its path.
            let Some(mut file) = self.files[index].take_if(|file| file.due) else { continue };
            let op = op(Kind::Step, index as u16, 0, Tag(0));
            let op = Op { answer_bytes: ANSWER_BYTES_MAX as u32, ..op };
            let mut scratch = [0; STEP_BYTES_MAX];
            let sent = self.send(hv, &file.request(fid_of(index)), op, &mut scratch);
            if sent.is_err() && file.lose() {
                return;
            }
            file.due &= sent != Ok(true);
            self.files[index] = Some(file);
            if sent != Ok(true) {
                return;
            }
        }
        self.steps_due = false;
    }

    /// Takes the next answer of ring `lane`. `Ok(None)`: there is none.
    /// `Ok(Some(None))`: one was taken that the caller does not hear of.
    fn take<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        lane: usize,
    ) -> Result<Option<Option<Done>>, StoreFault> {
        let msize = self.msize;
        let ring = &mut self.lanes[lane].ring;
        let Some(head) = ring.peek(hv, msize).map_err(|_| StoreFault::Protocol)? else {
            return match self.lanes[lane].ring.begun() {
                // What it belongs to says how long it may be: there is no more to wait for.
                Some((head, _)) if self.session == Session::Up => {
                    self.owner(head, lane).map(|_| None)
                }
                _ => Ok(None),
            };
        };
        let mut bytes = [0; ANSWER_BYTES_MAX];
        let rest = head.size - HEAD_BYTES;
        let prefix = if head.id == id::TREAD + 1 { rest.min(4) } else { rest };
        let body = bytes.get_mut(..prefix as usize).ok_or(StoreFault::Protocol)?;
        ring.get(hv, HEAD_BYTES, body);
        let answer = Answer::parse(head, body).map_err(|_: Malformed| StoreFault::Protocol)?;
        if self.session != Session::Up {
            self.session_answered(head, &answer)?;
            self.lanes[lane].ring.consume();
            return Ok(Some(None));
        }
        let op = self.claim(head, lane)?;
        let done = match op.kind {
            Kind::Step => self.step_answered(op.file, &answer)?,
            // Nobody waits for it, whatever the server says of a fid that never was.
            Kind::Void => {
                self.settle(op);
                None
            }
            Kind::Extents => {
                let learnt = self.holes_answered(op.file, &answer);
                self.settle(op);
                learnt?;
                None
            }
            _ => {
                let result = self.result_of(op, &answer, lane).inspect_err(|_| {
                    // Still owed an answer: the session's end gives it.
                    self.ops[usize::from(head.tag)] = Some(op);
                })?;
                self.settle(op);
                Some(Done { tag: op.tag, result })
            }
        };
        self.lanes[lane].ring.consume();
        Ok(Some(done))
    }

    /// The operation that an answer on ring `lane` belongs to.
    fn owner(&self, head: MessageHead, lane: usize) -> Result<Op, StoreFault> {
        let tag = usize::from(head.tag);
        let op = self.ops.get(tag).copied().flatten().ok_or(StoreFault::Protocol)?;
        if tag % self.lanes.len() != lane || op.lost || head.size > op.answer_bytes {
            return Err(StoreFault::Protocol);
        }
        Ok(op)
    }

    /// Takes it off the table.
    fn claim(&mut self, head: MessageHead, lane: usize) -> Result<Op, StoreFault> {
        let op = self.owner(head, lane)?;
        self.ops[usize::from(head.tag)] = None;
        let lane = &mut self.lanes[lane];
        lane.in_flight -= 1;
        lane.taken_bytes += op.answer_bytes;
        Ok(op)
    }

    /// What an answer means to the caller; `Err` when the server may not answer so.
    fn result_of(
        &self,
        op: Op,
        answer: &Answer<'_>,
        lane: usize,
    ) -> Result<Result<Reply, StoreFault>, StoreFault> {
        let reply = match (op.kind, answer) {
            // A fid of ours is unknown: this is another server than the one it was opened at.
            // An attribute may be missing for another reason: the file was deleted.
            (Kind::Read | Kind::Write | Kind::Fsync, Answer::Lerror { ecode: 2 })
            | (_, Answer::Lerror { ecode: 9 }) => return Err(StoreFault::Protocol),
            (_, Answer::Lerror { ecode }) => return Ok(Err(fault_of(*ecode))),
            (Kind::Read, Answer::Read { count }) if *count <= op.len => {
                Reply::Read(window(self.lanes[lane].ring.in_spans(RREAD_BYTES, *count)))
            }
            (Kind::Write, Answer::Write { count: 0 }) => return Ok(Err(StoreFault::Io(5))),
            (Kind::Write, Answer::Write { count }) if *count <= op.len => Reply::Written(*count),
            (Kind::Fsync, Answer::Fsync) => Reply::Flushed,
            (Kind::Allocate, Answer::Allocate) => Reply::Punched,
            (Kind::Size, Answer::Getattr { size, .. }) if *size > SIZE_BYTES_MAX => {
                return Ok(Err(OVERSIZE));
            }
            (Kind::Size, Answer::Getattr { size, .. }) => Reply::Size(*size),
            _ => return Err(StoreFault::Protocol),
        };
        Ok(Ok(reply))
    }

    /// A file's step was answered. Yields the opener's answer when there is one.
    fn step_answered(
        &mut self,
        index: u16,
        answer: &Answer<'_>,
    ) -> Result<Option<Done>, StoreFault> {
        let slot = &mut self.files[usize::from(index)];
        let file = slot.as_mut().ok_or(StoreFault::Protocol)?;
        if file.step == Step::Clunk {
            // Whatever the answer says, the fid is gone (9P clunk(5)).
            *slot = None;
            return Ok(None);
        }
        let opener = file.opener;
        let done = match file.answer(answer)? {
            Progress::Continue => None,
            Progress::Opened => {
                file.opener = None;
                let opened = Opened {
                    file: FileId(index),
                    size_bytes: file.size_bytes,
                    block_bytes: 512,
                    can_grow: true,
                    can_punch: self.extended,
                    identity: file.identity(),
                };
                opener.map(|tag| Done { tag, result: Ok(Reply::Opened(opened)) })
            }
            Progress::Refused { fault, fid_exists } => {
                if opener.is_none() && !file.closing {
                    // A reopened file keeps its slot: the caller still knows it.
                    file.step = Step::Refused(fault);
                    file.fid_exists = fid_exists;
                } else if fid_exists {
                    (file.step, file.due) = (Step::Clunk, true);
                } else {
                    *slot = None;
                }
                opener.map(|tag| Done { tag, result: Err(fault) })
            }
        };
        if let Some(file) = &self.files[usize::from(index)]
            && file.closing
            && file.outstanding == 0
        {
            self.clunk(usize::from(index));
        }
        self.steps_due = true;
        Ok(done)
    }

    /// The next answer from any ring; those that the caller does not hear of are passed over.
    fn next_answer<H: Hypervisor>(&mut self, hv: &mut H, now_ns: u64) -> Option<Done> {
        let mut silent = 0;
        while silent < self.lanes.len() && self.session.is_connected() {
            let lane = self.answer_next % self.lanes.len();
            match self.take(hv, lane) {
                Ok(Some(done)) => {
                    self.alive_ns = now_ns;
                    if done.is_some() {
                        self.answer_next = lane + 1;
                        return done;
                    }
                    self.made_room = true;
                    self.session_send(hv);
                    self.send_steps(hv);
                    // A step's answer may come on a ring already passed.
                    silent = 0;
                }
                Ok(None) => {
                    self.answer_next = lane + 1;
                    silent += 1;
                }
                Err(_) => self.lose(Session::Broken("the 9p server broke the protocol")),
            }
        }
        None
    }
}

pub(super) fn op(kind: Kind, file: u16, len: u32, tag: Tag) -> Op {
    Op { kind, file, len, tag, answer_bytes: 0, place: None, lost: false }
}

/// Fid 0 is the root.
pub(super) fn fid_of(index: usize) -> u32 {
    index as u32 + 1
}

fn fid(file: FileId) -> u32 {
    fid_of(usize::from(file.0))
}

pub(super) fn window(spans: [Span; 2]) -> Window {
    Window {
        runs: spans.map(|span| Run { region: span.region, offset: span.offset, len: span.len }),
    }
}

impl<H: Hypervisor> Store<H> for Client {
    fn io_bytes_max(&self) -> u32 {
        let data = self.msize.saturating_sub(TWRITE_BYTES);
        (data - data % IO_UNIT_BYTES).max(IO_UNIT_BYTES)
    }

    fn open(&mut self, hv: &mut H, tag: Tag, path: &str, access: Access) -> Result<(), StoreFault> {
        if self.session != Session::Up {
            return Err(StoreFault::Gone);
        }
        let file = File::new(path, access, tag)?;
        match self.files.iter().position(Option::is_none) {
            Some(free) => self.files[free] = Some(file),
            None if self.files.len() < FILES_MAX => self.files.push(Some(file)),
            None => return Err(StoreFault::Limit(FILES_MAX as u32)),
        }
        self.steps_due = true;
        self.send_steps(hv);
        Ok(())
    }

    fn close(&mut self, hv: &mut H, file: FileId) {
        let index = usize::from(file.0);
        let open = self.files.get_mut(index).and_then(Option::as_mut);
        let open = open.expect("close of a file that was never opened");
        open.closing = true;
        if open.outstanding == 0 {
            self.clunk(index);
            self.send_steps(hv);
        }
    }

    fn size(&mut self, hv: &mut H, tag: Tag, file: FileId) -> Result<Submit, StoreFault> {
        let request = Request::Getattr { fid: fid(file), mask: GETATTR_BASIC };
        self.submit(hv, &request, op(Kind::Size, file.0, 0, tag))
    }

    fn read(
        &mut self,
        hv: &mut H,
        tag: Tag,
        file: FileId,
        offset: u64,
        len: u32,
    ) -> Result<Submit, StoreFault> {
        if self.answers_at_home(tag, file, offset, len)? {
            return Ok(Submit::Taken(len));
        }
        let count = len.min(Store::<H>::io_bytes_max(self));
        let request = Request::Read { fid: fid(file), offset, count };
        let op = op(Kind::Read, file.0, count, tag);
        let submit = self.submit(hv, &request, Op { answer_bytes: RREAD_BYTES + count, ..op })?;
        if self.extended && submit != Submit::NoRoom {
            self.ask_for_holes(hv, file.0, (offset, count));
        }
        Ok(submit)
    }

    fn write(
        &mut self,
        hv: &mut H,
        tag: Tag,
        file: FileId,
        offset: u64,
        len: u32,
        fill: &mut dyn FnMut(&mut H, Window) -> bool,
    ) -> Result<Submit, StoreFault> {
        self.file_is_ready(file)?;
        let count = len.min(Store::<H>::io_bytes_max(self));
        let answer_bytes = ANSWER_BYTES_MAX as u32;
        let (wire_tag, reservation) = match self.reserve(hv, TWRITE_BYTES + count, answer_bytes) {
            Ok(Some(found)) => found,
            Ok(None) => return Ok(Submit::NoRoom),
            Err(_) => return Err(self.break_session()),
        };
        let lane = &self.lanes[wire_tag % self.lanes.len()];
        let spans = lane.ring.out_spans(&reservation, TWRITE_BYTES, count);
        if !fill(hv, window(spans)) {
            return Ok(Submit::Taken(0));
        }
        let mut bytes = [0; TWRITE_BYTES as usize];
        let request = Request::Write { fid: fid(file), offset, count };
        request.emit(0, &mut bytes).expect("the size is that of Twrite");
        let place = Some(reservation);
        let op = Op { answer_bytes, place, ..op(Kind::Write, file.0, count, tag) };
        self.launch(hv, wire_tag, reservation, &mut bytes, op);
        let slot = self.files[usize::from(file.0)].as_mut().expect("it is ready");
        slot.outstanding += 1;
        slot.holes.change(offset, count.into());
        Ok(Submit::Taken(count))
    }

    fn flush(&mut self, hv: &mut H, tag: Tag, file: FileId) -> Result<Submit, StoreFault> {
        // fdatasync: the data and what is needed to read it back, the size included.
        let request = Request::Fsync { fid: fid(file), datasync: 1 };
        self.submit(hv, &request, op(Kind::Fsync, file.0, 0, tag))
    }

    fn punch(
        &mut self,
        hv: &mut H,
        tag: Tag,
        file: FileId,
        offset: u64,
        len: u64,
    ) -> Result<Submit, StoreFault> {
        if !self.extended {
            return Err(StoreFault::Unsupported);
        }
        let mode = AllocateMode::Punch;
        let request = Request::Allocate { fid: fid(file), mode, offset, len };
        self.submit(hv, &request, op(Kind::Allocate, file.0, 0, tag))
    }

    fn is_deferring(&self) -> bool {
        true
    }

    fn push(&mut self, hv: &mut H) {
        let mut told = false;
        for lane in &mut self.lanes {
            if lane.ring.push(hv) && !(told && self.extended) {
                // A server of the dialect looks at all rings at the first event.
                lane.ring.tell(hv);
                told = true;
            }
        }
        // The next turn's requests go on the next ring: no ring is served at another's expense.
        self.lane_next = (self.lane_next + 1) % self.lanes.len().max(1);
    }

    fn void(&mut self, hv: &mut H, tag: Tag) {
        let is_it = |op: &Option<Op>| op.is_some_and(|op| op.kind == Kind::Write && op.tag == tag);
        let index = self.ops.iter().position(is_it).expect("a write of this turn");
        let op = self.ops[index].as_mut().expect("just found");
        op.kind = Kind::Void;
        if op.lost {
            // The session has ended meanwhile: the message goes nowhere.
            return;
        }
        let place = op.place.expect("writes remember their place");
        let request = Request::Write { fid: NOFID, offset: 0, count: op.len };
        let mut bytes = [0; TWRITE_BYTES as usize];
        request.emit(index as u16, &mut bytes).expect("the size is that of Twrite");
        self.lanes[index % self.lanes.len()].ring.put(hv, &place, 0, &bytes);
    }

    fn poll_at_ns(&self) -> Option<u64> {
        (!self.home.is_empty()).then_some(0)
    }

    fn poll(&mut self, hv: &mut H, now_ns: u64) -> Option<Done> {
        self.now_ns = now_ns;
        self.watch_the_clock(now_ns);
        if let Some((file, done)) = self.home.pop_front() {
            self.count_down(file);
            return Some(done);
        }
        if self.sweep
            && let Some(done) = self.next_swept()
        {
            return Some(done);
        }
        self.session_send(hv);
        self.send_steps(hv);
        let done = self.next_answer(hv, now_ns);
        if done.is_none() && self.sweep { self.next_swept() } else { done }
    }

    fn release(&mut self, hv: &mut H) {
        for lane in &mut self.lanes {
            lane.answer_bytes -= core::mem::take(&mut lane.taken_bytes);
            lane.ring.release(hv);
        }
    }

    fn made_room(&mut self) -> bool {
        core::mem::take(&mut self.made_room)
    }
}

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;
