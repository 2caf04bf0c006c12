//! One disk being served: its image, its rings, and the requests it has under way.
//!
//! Guards the write path's order: bytes are in the store before [`Image::commit`] makes their
//! mapping visible, commits wait while a flush is under way, and an answer is given only after
//! that. Every stop of a planner is turned into work (a read, a flush) or a reason to wait.

use platter_image::{
    BlockRef, FileNo, Image, ImageFault, PLANS_MAX, Prepared, SECTOR_BYTES, SectorRange, Stop,
};
use platter_storage::Store;
use platter_xen::blkif::{Limits, Request as Wire, Segment, Transfer};
use platter_xen::ring::{BackRing, Permit};
use platter_xen::{DomId, GrantCopy, Hypervisor, PAGE_BYTES, Port, Region};

use crate::config::Cache;
use crate::engine::{Engine, Handle, Op, OpKind, Stretch, Submitted};
use crate::fault::{Fault, Party};
use crate::flush::FlushRun;
use crate::limits::{
    BYTES_CONTENDED_MAX, OPS_CONTENDED_MAX, QUANTUM_CONTENDED_REQUESTS, QUANTUM_CONTENDED_SECTORS,
    QUANTUM_REQUESTS, QUANTUM_SECTORS, QUEUES_MAX, REQUESTS_MAX, REQUESTS_PER_DISK_MIN,
};
use crate::request::{Kind, Request, Stage};
use crate::stats::Stats;
use crate::table::Id;
use crate::throttle::Throttle;
use crate::train::Train;

/// One ring of a disk and its event channel.
pub struct Queue {
    pub ring: BackRing,
    pub region: Region,
    pub port: Port,
    /// Requests may be waiting in it.
    pub active: bool,
}

/// A file of the image: where it is and what its store allows.
#[derive(Clone, Copy, Debug)]
pub struct DiskFile {
    pub handle: Handle,
    pub writable: bool,
    pub can_grow: bool,
}

/// What one try at planning came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Progress {
    /// Everything is planned, or the request failed.
    Planned,
    /// Something must happen first.
    Parked,
}

pub struct Disk {
    /// Its place in the server.
    pub index: u16,
    pub guest: DomId,
    pub image: Image,
    pub files: alloc::vec::Vec<DiskFile>,
    pub limits: Limits,
    pub cache: Cache,
    pub queues: heapless::Vec<Queue, QUEUES_MAX>,
    /// Requests that have more to plan, in order of admission.
    pub waiting: heapless::Deque<Id, REQUESTS_MAX>,
    /// Mappings whose bytes are written, waiting for the end of a flush.
    pub commits: heapless::Vec<(Prepared, Id), PLANS_MAX>,
    pub flush: FlushRun,
    pub throttle: Throttle,
    pub stats: Stats,
    /// Requests of this disk in the server's table.
    pub requests: usize,
    /// Sectors that they move.
    pub sectors: u64,
    /// Of these, those that others must keep an order with: barriers and discards.
    pub ordered: usize,
    /// Of these, those that wait for a flush.
    pub flush_waiters: usize,
    /// How many requests it may have in the table now.
    pub share: usize,
    /// How many store operations its requests may have under way now.
    pub ops_share: usize,
    /// Another disk, that asks for little, wants the store too.
    pub contended: bool,
    /// When it last took a request.
    pub taken_ns: u64,
    /// Store operations and jobs of this disk.
    pub ops: usize,
    /// The guest's bytes in store operations under way.
    pub bytes: u64,
    /// Those that have not left yet.
    pub train: Option<Train>,
    /// Some of them wait for room with their rest.
    pub rests: bool,
    /// Guest reads and discards under way, by the parity of the flush they began under.
    pub reads: [usize; 2],
    pub parity: u8,
    seq: u64,
    /// Something happened that may let waiting requests go on.
    pub kick: bool,
    /// A metadata block that could not be read, until the one who needs it has been told.
    bad_block: Option<(BlockRef, Fault)>,
    /// It is about to grow: no request is taken, so that none is under way meanwhile.
    pub growing: bool,
    /// Its frontend has gone or begun anew: no answer will be read, and what has not begun to
    /// touch the image never does.
    pub unheard: bool,
    /// Writes are refused since the image or its store failed in a way that more would worsen.
    pub frozen: Option<Fault>,
}

impl Disk {
    pub fn new(index: u16, guest: DomId, image: Image, limits: Limits, scratch: Region) -> Disk {
        Disk {
            index,
            guest,
            image,
            files: alloc::vec::Vec::new(),
            limits,
            cache: Cache::Writeback,
            queues: heapless::Vec::new(),
            waiting: heapless::Deque::new(),
            commits: heapless::Vec::new(),
            flush: FlushRun::new(scratch),
            throttle: Throttle::unlimited(),
            stats: Stats::default(),
            requests: 0,
            sectors: 0,
            ordered: 0,
            flush_waiters: 0,
            share: REQUESTS_PER_DISK_MIN,
            ops_share: OPS_CONTENDED_MAX,
            contended: false,
            taken_ns: 0,
            ops: 0,
            bytes: 0,
            train: None,
            rests: false,
            reads: [0; 2],
            parity: 0,
            seq: 0,
            kick: false,
            bad_block: None,
            growing: false,
            unheard: false,
            frozen: None,
        }
    }

    /// Nothing of this disk is under way.
    pub fn is_idle(&self) -> bool {
        self.requests == 0 && self.ops == 0 && !self.flush.is_running()
    }

    /// Nothing under way and nothing that wants to be.
    pub fn is_quiet(&self) -> bool {
        self.is_idle() && !self.flush.wanted && !self.image.is_dirty()
    }

    /// It has as much in the store as it may have now.
    pub fn has_its_share(&self) -> bool {
        self.ops >= self.ops_share
            || self.contended
                && (self.ops >= OPS_CONTENDED_MAX || self.bytes >= BYTES_CONTENDED_MAX)
    }

    /// Its guest asks for so little that others should not make it wait.
    pub fn is_light(&self) -> bool {
        self.sectors * SECTOR_BYTES <= BYTES_CONTENDED_MAX
    }

    /// How much of a range may be one operation now, with a store that takes so many bytes.
    pub fn piece(&self, range: SectorRange, store_max: u32) -> SectorRange {
        let range = range.prefix(store_max as u64 / SECTOR_BYTES);
        match self.contended {
            true => range.prefix(CUT_SECTORS - range.start % CUT_SECTORS),
            false => range,
        }
    }

    /// There is something to take, to plan or to write.
    pub fn has_work(&self) -> bool {
        !self.waiting.is_empty() || self.queues.iter().any(|queue| queue.active)
    }

    /// Could a request be taken now after so many others, throttle apart?
    pub fn may_take<S>(&self, engine: &Engine<S>, others: usize) -> bool {
        !self.growing && engine.requests.left() > others && self.requests + others < self.share
    }

    /// Metadata that has been dirty for long is flushed without being asked.
    pub fn lazy_flush(&mut self, now_ns: u64, after_ns: u64) {
        if !self.image.is_dirty() || self.flush.is_running() {
            self.flush.dirty_since_ns = None;
            return;
        }
        let since_ns = *self.flush.dirty_since_ns.get_or_insert(now_ns);
        self.flush.wanted |= now_ns.saturating_sub(since_ns) >= after_ns;
    }

    /// Takes up to a quantum of requests from the rings. True when it took any.
    pub fn take_requests<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        now_ns: u64,
    ) -> bool {
        let mut taken = heapless::Vec::new();
        self.take_from_rings(engine, hv, now_ns, &mut taken);
        let any = !taken.is_empty();
        self.copy_indirect(engine, hv, &mut taken);
        for arrived in taken {
            let Arrived { queue, permit, wire } = arrived;
            match wire {
                Ok((wire, place)) => self.admit(engine, hv, queue, permit, wire, place, now_ns),
                Err(fault) => self.answer(hv, queue, permit, Err(fault)),
            }
        }
        self.depart(engine, hv);
        any
    }

    fn take_from_rings<H: Hypervisor, S>(
        &mut self,
        engine: &Engine<S>,
        hv: &mut H,
        now_ns: u64,
        taken: &mut Taken,
    ) {
        let (mut most, sectors_most) = match self.contended {
            true => (QUANTUM_CONTENDED_REQUESTS, QUANTUM_CONTENDED_SECTORS),
            false => (QUANTUM_REQUESTS, QUANTUM_SECTORS),
        };
        if self.throttle.is_limited() {
            // What it costs is known only when it is admitted.
            most = 1;
        }
        let mut sectors = 0;
        for index in 0..self.queues.len() {
            while self.queues[index].active && taken.len() < most && sectors < sectors_most {
                if !self.may_take(engine, taken.len()) || !self.throttle.ready(now_ns) {
                    return;
                }
                let queue = &mut self.queues[index];
                match queue.ring.take(hv) {
                    Ok(Some((raw, permit))) => {
                        self.taken_ns = now_ns;
                        let wire = Wire::parse(&raw, queue.ring.abi(), &self.limits);
                        sectors += wire.as_ref().map_or(0, sectors_at_most);
                        let wire = wire.map(|wire| (wire, 0)).map_err(Fault::Request);
                        let arrived = Arrived { queue: index as u8, permit, wire };
                        let room = taken.push(arrived);
                        assert!(room.is_ok(), "no more than a quantum is taken");
                    }
                    Ok(None) => queue.active = false,
                    // Its end is seen, and counted, where the device looks at its rings.
                    Err(_) => queue.active = false,
                }
            }
        }
    }

    /// Copies the segment lists of indirect requests to private memory, each once
    /// (CVE-2015-8550), all by one hypercall.
    fn copy_indirect<H: Hypervisor, S>(&self, engine: &Engine<S>, hv: &mut H, taken: &mut Taken) {
        let mut copies = heapless::Vec::<GrantCopy, QUANTUM_REQUESTS>::new();
        for arrived in taken.iter_mut() {
            let Ok((Wire::Indirect(indirect), place)) = &mut arrived.wire else { continue };
            *place = copies.len();
            let at = *place * DESCRIPTORS_BYTES;
            let copy = GrantCopy {
                domid: self.guest,
                gref: indirect.grefs[0],
                gref_offset: 0,
                page: engine.descriptors.page(at / PAGE_BYTES),
                page_offset: (at % PAGE_BYTES) as u16,
                len: indirect.descriptor_bytes() as u16,
                direction: platter_xen::Direction::FromGuest,
                status: 0,
            };
            copies.push(copy).expect("no more than requests");
        }
        if copies.is_empty() {
            return;
        }
        hv.copy(&mut copies);
        for arrived in taken.iter_mut() {
            let Ok((Wire::Indirect(_), place)) = &arrived.wire else { continue };
            let status = copies[*place].status;
            if status != 0 {
                arrived.wire = Err(Fault::Grant(status));
            }
        }
    }

    /// A request in the guest's words becomes one of ours, and is planned as far as it goes. The
    /// segments of an indirect one are the list at `place`.
    #[expect(clippy::too_many_arguments, reason = "a request, where it came from, and the world")]
    fn admit<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        queue: u8,
        permit: Permit,
        wire: Wire,
        place: usize,
        now_ns: u64,
    ) {
        let mut request = Request {
            disk: self.index,
            queue,
            permit,
            kind: Kind::Read,
            stage: Stage::Moving,
            seq: self.seq,
            barrier: false,
            flush_after: false,
            start: 0,
            sectors: 0,
            planned: 0,
            in_flight: 0,
            parked: false,
            failed: None,
            segments: 0,
        };
        self.seq += 1;
        let mut segments = heapless::Vec::new();
        let described = self.describe(engine, hv, &mut request, &mut segments, wire, place);
        let frozen = self.frozen.filter(|_| request.changes()).map_or(Ok(()), Err);
        if let Err(fault) = described.and(frozen) {
            let Request { permit, .. } = request;
            return self.answer(hv, queue, permit, Err(fault));
        }
        self.throttle.spend(now_ns, request.moves() * SECTOR_BYTES);
        self.requests += 1;
        self.sectors += request.moves();
        self.ordered += request.is_ordered() as usize;
        self.flush_waiters += (request.stage != Stage::Moving) as usize;
        request.segments = segments.len() as u16;
        let Ok(id) = engine.requests.insert(request) else {
            unreachable!("the table has room: take_from_rings looked")
        };
        engine.segments.set(id, &segments);
        if self.plan(engine, hv, id) == Progress::Parked {
            self.park(engine, id);
        }
    }

    /// Fills in what the wire request asks for.
    fn describe<H: Hypervisor, S>(
        &mut self,
        engine: &Engine<S>,
        hv: &H,
        request: &mut Request,
        segments: &mut Incoming,
        wire: Wire,
        place: usize,
    ) -> Result<(), Fault> {
        let writethrough = self.cache == Cache::Writethrough;
        match wire {
            Wire::Read(transfer) => set_transfer(request, segments, &transfer),
            Wire::Write(transfer) => {
                set_transfer(request, segments, &transfer);
                request.kind = Kind::Write;
                request.flush_after = writethrough;
            }
            Wire::WriteBarrier(transfer) => {
                set_transfer(request, segments, &transfer);
                request.kind = Kind::Flush;
                request.stage = Stage::FlushFirst { by: None };
                request.barrier = true;
                request.flush_after = request.sectors > 0;
            }
            Wire::Flush(transfer) => {
                set_transfer(request, segments, &transfer);
                request.kind = Kind::Flush;
                request.stage = Stage::FlushFirst { by: None };
                request.flush_after = writethrough && request.sectors > 0;
            }
            Wire::Discard { sector, sectors, secure: _ } => {
                request.kind = Kind::Discard;
                (request.start, request.sectors) = (sector, sectors);
            }
            Wire::Indirect(indirect) => {
                let mut copy = [0; DESCRIPTORS_BYTES];
                let bytes = indirect.descriptor_bytes();
                hv.read(engine.descriptors, place * DESCRIPTORS_BYTES, &mut copy[..bytes]);
                let count = indirect.nr_segments as usize;
                segments.resize(count, Segment::EMPTY).expect("bounded by the parser");
                let sectors = indirect
                    .parse_segments(&copy[..bytes], &self.limits, segments)
                    .map_err(Fault::Request)?;
                (request.start, request.sectors) = (indirect.sector, sectors as u64);
                if indirect.operation == platter_xen::blkif::IndirectOp::Write {
                    request.kind = Kind::Write;
                    request.flush_after = writethrough;
                }
            }
        }
        Ok(())
    }

    /// Tries every waiting request once more, in order, as far as the store has room: with a full
    /// one, each answer would otherwise plan all that wait for it. True if any went on.
    pub fn retry<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
    ) -> bool {
        self.kick = false;
        self.retry_rests(engine, hv);
        let went_on = self.retry_waiting(engine, hv);
        self.depart(engine, hv);
        went_on
    }

    fn retry_waiting<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
    ) -> bool {
        let mut went_on = false;
        let mut parked = 0;
        for _ in 0..self.waiting.len() {
            if !engine.has_room(self.handle(FileNo(0))) {
                // Those that were tried stay in front of the others.
                (0..parked).for_each(|_| {
                    let id = self.waiting.pop_back().expect("counted");
                    self.waiting.push_front(id).expect("just taken out");
                });
                return went_on;
            }
            let id = self.waiting.pop_front().expect("counted");
            let request = engine.requests.get(id);
            request.parked = false;
            let before = request.planned;
            if self.unheard && !request.is_moving() {
                request.failed.get_or_insert(Fault::Unheard);
            }
            if self.plan(engine, hv, id) == Progress::Parked {
                went_on |= engine.requests.find(id).is_some_and(|r| r.planned != before);
                self.park(engine, id);
                parked += 1;
            } else {
                went_on = true;
            }
        }
        went_on
    }

    /// Puts a request that has more to plan among the waiting.
    pub fn park<S>(&mut self, engine: &mut Engine<S>, id: Id) {
        engine.requests.get(id).parked = true;
        self.waiting.push_back(id).expect("as many places as requests");
    }

    /// A planner stopped: do what it needs, or say why the request fails. `Ok` means: wait.
    pub fn stopped<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        stop: Stop,
    ) -> Result<(), Fault> {
        match stop {
            Stop::Fault(fault) => Err(fault.into()),
            Stop::NeedFlush => {
                self.flush.wanted = true;
                Ok(())
            }
            Stop::Busy if self.ops == 0 && self.commits.is_empty() && !self.flush.is_running() => {
                Err(Fault::Stuck)
            }
            Stop::Busy => Ok(()),
            Stop::Miss(block) if self.bad_block.is_some_and(|(bad, _)| bad == block) => {
                self.image.fill_failed(block);
                Err(self.bad_block.take().expect("just seen").1)
            }
            Stop::Miss(block) => {
                let asked = self.read_block(engine, hv, block);
                match asked {
                    Ok(true) => {}
                    Ok(false) => self.image.fill_put_off(block),
                    Err(_) => self.image.fill_failed(block),
                }
                asked.map(|_| ())
            }
        }
    }

    /// Submits the read of a metadata block; false when there is no room for it now.
    fn read_block<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        block: platter_image::BlockRef,
    ) -> Result<bool, Fault> {
        let handle = self.handle(block.file);
        if !engine.has_room(handle) {
            return Ok(false);
        }
        let Some(buffer) = engine.gather_buffer(block) else { return Ok(false) };
        let stretch = Stretch { handle, offset: block.offset, len: block.len };
        let op = Op::new(self.index, stretch, OpKind::MetaRead { block, buffer });
        match engine.submit(hv, op) {
            Submitted::Yes => {
                self.ops += 1;
                return Ok(true);
            }
            Submitted::NoRoom => engine.gather.give_back(buffer),
            Submitted::Failed(fault) => {
                engine.gather.give_back(buffer);
                return Err(fault);
            }
        }
        Ok(false)
    }

    /// The read of a metadata block failed: whoever asks for it next fails.
    pub fn meta_failed(&mut self, block: BlockRef, fault: Fault) {
        self.image.fill_failed(block);
        self.bad_block = Some((block, fault));
    }

    /// Where a file of the image is.
    pub fn handle(&self, file: FileNo) -> Handle {
        self.files[file.0 as usize].handle
    }

    /// A part of a request is done (or failed): its mapping becomes visible, unless a flush is
    /// under way, which it must wait for.
    pub fn piece_done<H: Hypervisor, S>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        id: Id,
        prepared: Option<Prepared>,
        result: Result<(), Fault>,
    ) {
        if let Err(fault) = result {
            engine.requests.get(id).failed.get_or_insert(fault);
            self.note_fault(&fault);
        }
        match prepared {
            Some(prepared) if result.is_err() => self.image.abandon(prepared),
            Some(prepared) if self.image.flushing() => {
                self.commits.push((prepared, id)).expect("as many places as plans");
                return;
            }
            Some(prepared) => self.image.commit(prepared),
            None => {}
        }
        engine.requests.get(id).in_flight -= 1;
        self.kick = true;
        self.settle(engine, hv, id);
    }

    /// A flush has ended: what waited for that becomes visible.
    pub fn commit_waiting<H: Hypervisor, S>(&mut self, engine: &mut Engine<S>, hv: &mut H) {
        while let Some((prepared, id)) = self.commits.pop() {
            self.image.commit(prepared);
            engine.requests.get(id).in_flight -= 1;
            self.settle(engine, hv, id);
        }
        self.kick = true;
    }

    /// Answers a request whose every part is done, or sends it to wait for its flush.
    pub fn settle<H: Hypervisor, S>(&mut self, engine: &mut Engine<S>, hv: &mut H, id: Id) {
        let request = engine.requests.get(id);
        // A parked one is ended by the retry that takes it out of the queue.
        if request.parked || request.stage != Stage::Moving || !request.is_moved() {
            return;
        }
        if request.flush_after && request.failed.is_none() {
            request.stage = Stage::FlushAfter { by: None };
            self.flush_waiters += 1;
            return;
        }
        self.finish(engine, hv, id);
    }

    /// Takes a request out of the table and answers it.
    pub fn finish<H: Hypervisor, S>(&mut self, engine: &mut Engine<S>, hv: &mut H, id: Id) {
        let request = engine.requests.take(id).expect("a request is finished once");
        self.requests -= 1;
        self.sectors -= request.moves();
        self.ordered -= request.is_ordered() as usize;
        self.flush_waiters -= (request.stage != Stage::Moving) as usize;
        self.kick = true;
        self.count(&request);
        let outcome = request.failed.map_or(Ok(()), Err);
        self.answer(hv, request.queue, request.permit, outcome);
    }

    fn count(&mut self, request: &Request) {
        match request.kind {
            _ if request.failed.is_some() => {}
            Kind::Read => {
                self.stats.reads += 1;
                self.stats.read_sectors += request.sectors;
            }
            Kind::Write => {
                self.stats.writes += 1;
                self.stats.write_sectors += request.sectors;
            }
            Kind::Flush => {
                self.stats.flushes += 1;
                self.stats.write_sectors += request.sectors;
            }
            Kind::Discard => self.stats.discards += 1,
        }
    }

    /// Writes the response; [`Disk::publish`] makes it visible.
    fn answer<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        queue: u8,
        permit: Permit,
        outcome: Result<(), Fault>,
    ) {
        let status = match &outcome {
            Ok(()) => platter_xen::blkif::Status::Okay,
            Err(fault) => {
                self.stats.refuse(fault);
                fault.status()
            }
        };
        match self.queues.get_mut(queue as usize) {
            Some(queue) => queue.ring.complete(permit, hv, status),
            None => permit.abandon(),
        }
    }

    /// Makes this turn's answers visible and tells the guest where it asked to be told.
    pub fn publish<H: Hypervisor>(&mut self, hv: &mut H) {
        for queue in &mut self.queues {
            if queue.ring.publish(hv) {
                hv.notify(queue.port);
            }
        }
    }

    /// Before sleeping: asks for events. True when a ring has something after all.
    pub fn final_check<H: Hypervisor>(&mut self, hv: &mut H) -> bool {
        let mut any = false;
        for queue in &mut self.queues {
            if !queue.active && !queue.ring.is_broken() {
                queue.active = queue.ring.final_check(hv).unwrap_or(false);
            }
            any |= queue.active;
        }
        any
    }

    /// What a fault means for the disk beyond the request that met it.
    fn note_fault(&mut self, fault: &Fault) {
        let Fault::Image(ImageFault { kind, .. }) = fault else { return };
        if fault.party() == Party::Image && *kind == platter_image::FaultKind::Corrupt {
            self.frozen.get_or_insert(*fault);
        }
    }
}

/// A request taken from a ring, and where the segment list of an indirect one lies.
struct Arrived {
    queue: u8,
    permit: Permit,
    wire: Result<(Wire, usize), Fault>,
}

/// Where large requests are cut while the disk is contended.
const CUT_SECTORS: u64 = BYTES_CONTENDED_MAX / SECTOR_BYTES;

type Taken = heapless::Vec<Arrived, QUANTUM_REQUESTS>;

/// A list of as many segments as a request may have; two fill a page.
pub const DESCRIPTORS_BYTES: usize = crate::limits::SEGMENTS_MAX * 8;

/// Sectors that a request moves, or more.
fn sectors_at_most(wire: &Wire) -> u64 {
    match wire {
        Wire::Read(transfer)
        | Wire::Write(transfer)
        | Wire::WriteBarrier(transfer)
        | Wire::Flush(transfer) => transfer.sectors as u64,
        Wire::Indirect(indirect) => indirect.nr_segments as u64 * 8,
        Wire::Discard { .. } => 0,
    }
}

/// Segments of a request on its way into the table.
type Incoming = heapless::Vec<Segment, { crate::limits::SEGMENTS_MAX }>;

fn set_transfer(request: &mut Request, segments: &mut Incoming, transfer: &Transfer) {
    request.start = transfer.sector;
    request.sectors = transfer.sectors as u64;
    segments.extend_from_slice(&transfer.segments).expect("11 segments fit");
}
