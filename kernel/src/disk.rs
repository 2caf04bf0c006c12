//! One disk being served: its image, its rings, and the requests it has under way.
//!
//! Guards the write path's order: bytes are in the store before [`Image::commit`] makes their
//! mapping visible, commits wait while a flush is under way, and an answer is given only after
//! that. Every stop of a planner is turned into work (a read, a flush) or a reason to wait.

use platter_image::{BlockRef, FileNo, Image, ImageFault, PLANS_MAX, Prepared, Stop};
use platter_storage::Store;
use platter_xen::blkif::{Limits, Request as Wire, Segment, Transfer};
use platter_xen::ring::{BackRing, Permit};
use platter_xen::{DomId, GrantCopy, Gref, Hypervisor, PAGE_BYTES, Port, Region};

use crate::config::Cache;
use crate::engine::{Engine, Handle, Op, OpKind, Stretch, Submitted};
use crate::fault::{Fault, Party};
use crate::flush::FlushRun;
use crate::limits::{
    QUANTUM_REQUESTS, QUANTUM_SECTORS, QUEUES_MAX, REQUESTS_MAX, REQUESTS_PER_DISK_MIN,
};
use crate::request::{Kind, Request, Stage};
use crate::stats::Stats;
use crate::table::Id;
use crate::throttle::Throttle;

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
    /// Of these, those that others must keep an order with: barriers and discards.
    pub ordered: usize,
    /// Of these, those that wait for a flush.
    pub flush_waiters: usize,
    /// How many requests it may have in the table now.
    pub share: usize,
    /// Store operations it may have under way before it plans more.
    pub ops_max: usize,
    /// When it last took a request.
    pub taken_ns: u64,
    /// Store operations and jobs of this disk.
    pub ops: usize,
    /// Guest reads and discards under way, by the parity of the flush they began under.
    pub reads: [usize; 2],
    pub parity: u8,
    seq: u64,
    /// Something happened that may let waiting requests go on.
    pub kick: bool,
    /// A metadata block that could not be read, until the one who needs it has been told.
    bad_block: Option<(BlockRef, Fault)>,
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
            ordered: 0,
            flush_waiters: 0,
            share: REQUESTS_PER_DISK_MIN,
            ops_max: usize::MAX,
            taken_ns: 0,
            ops: 0,
            reads: [0; 2],
            parity: 0,
            seq: 0,
            kick: false,
            bad_block: None,
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

    /// There is something to take, to plan or to write.
    pub fn has_work(&self) -> bool {
        !self.waiting.is_empty() || self.queues.iter().any(|queue| queue.active)
    }

    /// Could a request be taken now, throttle apart?
    pub fn may_take<S>(&self, engine: &Engine<S>) -> bool {
        !engine.requests.is_full() && self.requests < self.share
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
        let (mut taken, mut sectors) = (0, 0);
        for index in 0..self.queues.len() {
            while self.queues[index].active && taken < QUANTUM_REQUESTS && sectors < QUANTUM_SECTORS
            {
                if !self.may_take(engine) || !self.throttle.ready(now_ns) {
                    return taken > 0;
                }
                match self.queues[index].ring.take(hv) {
                    Ok(Some((raw, permit))) => {
                        taken += 1;
                        self.taken_ns = now_ns;
                        let abi = self.queues[index].ring.abi();
                        match Wire::parse(&raw, abi, &self.limits) {
                            Ok(wire) => {
                                sectors +=
                                    self.admit(engine, hv, index as u8, permit, wire, now_ns);
                            }
                            Err(bad) => {
                                self.answer(hv, index as u8, permit, Err(Fault::Request(bad)))
                            }
                        }
                    }
                    Ok(None) => self.queues[index].active = false,
                    Err(_) => {
                        self.stats.ring_broken();
                        self.queues[index].active = false;
                    }
                }
            }
        }
        taken > 0
    }

    /// A request in the guest's words becomes one of ours, and is planned as far as it goes.
    /// Sectors that it moves.
    fn admit<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        queue: u8,
        permit: Permit,
        wire: Wire,
        now_ns: u64,
    ) -> u64 {
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
        if let Err(fault) = self.describe(engine, hv, &mut request, &mut segments, wire) {
            let Request { permit, .. } = request;
            self.answer(hv, queue, permit, Err(fault));
            return 0;
        }
        if let (true, Some(fault)) = (request.changes(), self.frozen) {
            let Request { permit, .. } = request;
            self.answer(hv, queue, permit, Err(fault));
            return 0;
        }
        let sectors = if request.kind == Kind::Discard { 0 } else { request.sectors };
        self.throttle.spend(now_ns, request.sectors * 512);
        self.requests += 1;
        self.ordered += request.is_ordered() as usize;
        self.flush_waiters += (request.stage != Stage::Moving) as usize;
        request.segments = segments.len() as u16;
        let Ok(id) = engine.requests.insert(request) else {
            unreachable!("the table has room: take_requests looked")
        };
        engine.segments.set(id, &segments);
        if self.plan(engine, hv, id) == Progress::Parked {
            self.park(engine, id);
        }
        sectors
    }

    /// Fills in what the wire request asks for.
    fn describe<H: Hypervisor, S>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        request: &mut Request,
        segments: &mut Incoming,
        wire: Wire,
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
                let mut copy = [0; crate::limits::SEGMENTS_MAX * 8];
                let bytes = indirect.descriptor_bytes();
                self.copy_indirect(engine, hv, &indirect.grefs, &mut copy[..bytes])?;
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

    /// Copies the indirect pages to private memory, once (CVE-2015-8550). By way of the staging
    /// buffer: in the flush's scratch region bytes may wait for room in the store.
    fn copy_indirect<H: Hypervisor, S>(
        &self,
        engine: &Engine<S>,
        hv: &mut H,
        grefs: &[Gref],
        into: &mut [u8],
    ) -> Result<(), Fault> {
        let page = engine.staging.page(0);
        for (gref, part) in grefs.iter().zip(into.chunks_mut(PAGE_BYTES)) {
            let mut copy = [GrantCopy {
                domid: self.guest,
                gref: *gref,
                gref_offset: 0,
                page,
                page_offset: 0,
                len: part.len() as u16,
                direction: platter_xen::Direction::FromGuest,
                status: 0,
            }];
            hv.copy(&mut copy);
            if copy[0].status != 0 {
                return Err(Fault::Grant(copy[0].status));
            }
            hv.read(page, 0, part);
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
                if !matches!(asked, Ok(true)) {
                    self.image.fill_failed(block);
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
        match engine.submit_read(hv, op) {
            Submitted::Yes(_) => {
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

/// Segments of a request on its way into the table.
type Incoming = heapless::Vec<Segment, { crate::limits::SEGMENTS_MAX }>;

fn set_transfer(request: &mut Request, segments: &mut Incoming, transfer: &Transfer) {
    request.start = transfer.sector;
    request.sectors = transfer.sectors as u64;
    segments.extend_from_slice(&transfer.segments).expect("11 segments fit");
}
