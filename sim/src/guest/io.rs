//! The honest guest's requests: made, submitted, and judged when they are answered.

use platter_xen::blkif::{
    Response, SEGMENTS_DIRECT_MAX, Segment, emit_descriptors, emit_discard, emit_indirect,
    emit_transfer, op,
};
use platter_xen::{Gref, Hypervisor, PAGE_BYTES, Region};

use super::{Guest, Phase, S};
use crate::machine::{Machine, View};
use crate::oracle::{SECTOR, Ticket, content};

/// Fills what no request may touch.
const POISON: u8 = 0xa5;

/// A request without an answer.
pub struct Pending {
    queue: usize,
    /// What the answer must repeat.
    operation: u8,
    sector: u64,
    segments: Vec<Segment>,
    /// Data pages, then indirect pages, with their grants.
    pub pages: Option<(Region, Vec<Gref>)>,
    ticket: Option<Ticket>,
    pub begun: Option<u64>,
    submitted_ns: u64,
    flush: bool,
}

impl Guest {
    /// Takes answers, makes requests. When it wants to run again without an event.
    pub(super) fn serve(&mut self, machine: &mut Machine, now_ns: u64) -> Option<u64> {
        let mut more = false;
        for index in 0..self.queues.len() {
            let port = self.queues[index].port;
            machine.view(self.domain).take_pending(port);
            self.take_answers(machine, index, now_ns);
        }
        if self.phase == Phase::Running {
            more = self.submit(machine, now_ns);
        }
        let mut hv = machine.view(self.domain);
        for queue in &mut self.queues {
            if queue.ring.publish(&mut hv) {
                hv.notify(queue.port);
            }
            let missed = queue.ring.final_check(&mut hv).expect("the backend keeps its indexes");
            if missed {
                return Some(now_ns + 1000);
            }
        }
        let oldest = self.pending.values().map(|request| request.submitted_ns).min();
        let waited = oldest.map_or(0, |since| now_ns - since);
        assert!(
            waited < self.habits.patience_ns,
            "guest {}: a request has no answer for {} ms",
            self.domain,
            waited / 1_000_000
        );
        more.then_some(self.next_ns.max(now_ns + 1000))
    }

    fn take_answers(&mut self, machine: &mut Machine, index: usize, now_ns: u64) {
        loop {
            let hv = machine.view(self.domain);
            let taken = self.queues[index].ring.take(&hv);
            match taken.expect("the backend keeps its indexes") {
                Some(response) => self.answered(machine, index, response, now_ns),
                None => return,
            }
        }
    }

    fn answered(&mut self, machine: &mut Machine, queue: usize, response: Response, now_ns: u64) {
        let request = self.pending.remove(&response.id);
        let request = request.unwrap_or_else(|| {
            panic!("guest {}: an answer to {:#x}, never asked or twice", self.domain, response.id)
        });
        assert!(request.queue == queue, "the answer came on another queue");
        assert!(request.operation == response.operation, "the answer is to another operation");
        assert!((-2..=0).contains(&response.status), "no such status: {}", response.status);
        let ok = response.status == 0;
        self.answered += 1;
        self.errors += u64::from(!ok);
        assert!(
            ok || self.habits.errors_allowed,
            "guest {}: status {} to operation {} at sector {} ({} segments)",
            self.domain,
            response.status,
            request.operation,
            request.sector,
            request.segments.len()
        );
        self.latencies_ns.push(now_ns - request.submitted_ns);
        if let Some(ticket) = request.ticket {
            self.oracle.written(ticket, ok);
        }
        if let Some(begun) = request.begun {
            if ok && request.flush {
                self.oracle.flushed(begun);
            } else if ok {
                self.judge(machine, &request, begun);
            }
            self.oracle.end(begun);
        }
        if !ok && (request.flush || request.operation == op::WRITE_BARRIER) {
            self.oracle.flush_failed();
        }
        if ok {
            let sectors = request.segments.iter().map(|s| u64::from(s.sectors())).sum();
            self.largest = self.largest.max(sectors);
        }
        if let Some((region, grefs)) = request.pages {
            let mut hv = machine.view(self.domain);
            for gref in grefs {
                assert!(hv.revoke(gref), "a data page is still mapped after the answer");
            }
            hv.frames_free(region);
        }
    }

    /// A read's pages: each sector against the oracle, everything around it untouched.
    fn judge(&self, machine: &mut Machine, request: &Pending, begun: u64) {
        let Some((region, _)) = &request.pages else { return };
        let hv = machine.view(self.domain);
        let mut sector = request.sector;
        for (index, segment) in request.segments.iter().enumerate() {
            let mut page = [0; PAGE_BYTES];
            hv.read(region.page(index), 0, &mut page);
            for (number, bytes) in page.chunks_exact(SECTOR).enumerate() {
                let inside = (segment.first_sect..=segment.last_sect).contains(&(number as u8));
                if inside {
                    if let Err(why) = self.oracle.check(sector, bytes, begun) {
                        panic!("guest {}: {why}", self.domain);
                    }
                    sector += 1;
                } else {
                    let untouched = bytes.iter().all(|byte| *byte == POISON);
                    assert!(untouched, "guest {}: bytes beside a segment changed", self.domain);
                }
            }
        }
    }

    /// Puts requests on the rings as the habits say. True when it wants to go on.
    fn submit(&mut self, machine: &mut Machine, now_ns: u64) -> bool {
        while self.left > 0 && self.pending.len() < self.habits.depth && self.next_ns <= now_ns {
            let queue = self.rng.below(self.queues.len() as u64) as usize;
            if self.queues[queue].ring.room() == 0 {
                return false;
            }
            self.make(machine, queue, now_ns);
            self.left -= 1;
            if self.habits.think_ns > 0 {
                self.next_ns = now_ns + self.rng.below(2 * self.habits.think_ns);
            }
        }
        self.pending.len() < self.habits.depth
    }

    fn make(&mut self, machine: &mut Machine, queue: usize, now_ns: u64) {
        let nodes = self.nodes.expect("connected");
        let draw = self.rng.below(1000);
        let h = &self.habits;
        let writable = self.line.writable;
        let (flushes, barriers) = (h.flushes, h.flushes + h.barriers);
        let discards = barriers + h.discards;
        let writes = discards + h.writes;
        match draw {
            _ if draw < flushes && nodes.flush => self.make_flush(machine, queue, now_ns),
            _ if draw < barriers && nodes.flush && writable => {
                self.make_transfer(machine, queue, now_ns, op::WRITE_BARRIER)
            }
            _ if draw < discards && nodes.discard_granularity_bytes.is_some() => {
                self.make_discard(machine, queue, now_ns)
            }
            _ if draw < writes && writable => self.make_transfer(machine, queue, now_ns, op::WRITE),
            _ => self.make_transfer(machine, queue, now_ns, op::READ),
        }
    }

    fn place(&mut self, sectors: u64) -> u64 {
        let unit = u64::from(self.nodes.expect("connected").sector_bytes) / SECTOR as u64;
        let end = self.oracle.sectors().min(self.habits.span.max(sectors));
        let follows = self.rng.chance(self.habits.sequential) && self.next_sector + sectors <= end;
        let sector = match follows {
            true => self.next_sector,
            false => self.rng.below((end - sectors) / unit + 1) * unit,
        };
        self.next_sector = sector + sectors;
        sector
    }

    fn new_id(&mut self) -> u64 {
        loop {
            let id = self.rng.word();
            if !self.pending.contains_key(&id) {
                return id;
            }
        }
    }

    fn make_flush(&mut self, machine: &mut Machine, queue: usize, now_ns: u64) {
        let id = self.new_id();
        let abi = self.queues[queue].ring.abi();
        let raw = emit_transfer(abi, op::FLUSH_DISKCACHE, id, 0, 0, &[]);
        let pending = Pending {
            queue,
            operation: op::FLUSH_DISKCACHE,
            sector: 0,
            segments: vec![],
            pages: None,
            ticket: None,
            begun: Some(self.oracle.begin()),
            submitted_ns: now_ns,
            flush: true,
        };
        self.put(machine, id, pending, &raw);
    }

    fn make_discard(&mut self, machine: &mut Machine, queue: usize, now_ns: u64) {
        let id = self.new_id();
        let unit = u64::from(self.nodes.expect("connected").sector_bytes) / SECTOR as u64;
        let known = self.oracle.sectors();
        let (sector, sectors) = match self.habits.wide {
            true => (known, self.nodes.expect("connected").sectors - known),
            false => {
                let sectors = (self.rng.between(1, 256 / unit) * unit).min(known);
                (self.place(sectors), sectors)
            }
        };
        let ticket = self.oracle.discard(sector, if self.habits.wide { 0 } else { sectors });
        let abi = self.queues[queue].ring.abi();
        let raw = emit_discard(abi, id, sector, sectors, self.rng.chance(100));
        let pending = Pending {
            queue,
            operation: op::DISCARD,
            sector,
            segments: vec![],
            pages: None,
            ticket: Some(ticket),
            begun: None,
            submitted_ns: now_ns,
            flush: false,
        };
        self.put(machine, id, pending, &raw);
    }

    /// Segments of random shape, in units of the disk's sector size.
    fn shape(&mut self, max: usize) -> Vec<Segment> {
        if self.habits.uniform {
            return vec![Segment { gref: Gref(0), first_sect: 0, last_sect: 7 }; max];
        }
        let unit = (self.nodes.expect("connected").sector_bytes / SECTOR as u32) as u8;
        let count = self.rng.between(1, max as u64);
        let ragged = self.rng.chance(300);
        (0..count)
            .map(|_| {
                let (mut first, mut last) = (0, 7);
                if ragged && unit < 8 {
                    let units = u64::from(8 / unit);
                    first = self.rng.below(units) as u8 * unit;
                    let room = u64::from((8 - first) / unit);
                    last = first + self.rng.between(1, room) as u8 * unit - 1;
                }
                Segment { gref: Gref(0), first_sect: first, last_sect: last }
            })
            .collect()
    }

    fn make_transfer(&mut self, machine: &mut Machine, queue: usize, now_ns: u64, operation: u8) {
        let nodes = self.nodes.expect("connected");
        let large = usize::from(nodes.indirect_segments_max).min(self.habits.segments_max);
        let indirect = operation != op::WRITE_BARRIER
            && large > SEGMENTS_DIRECT_MAX
            && (self.habits.uniform || self.rng.chance(400));
        let max = if indirect { large } else { self.habits.segments_max.min(SEGMENTS_DIRECT_MAX) };
        let mut segments = self.shape(max);
        let mut sectors = 0;
        segments.retain(|segment| {
            let fits = sectors + u64::from(segment.sectors()) <= self.oracle.sectors();
            sectors += if fits { u64::from(segment.sectors()) } else { 0 };
            fits
        });
        let sector = self.place(sectors);
        let writes = operation != op::READ;
        let ticket = writes.then(|| self.oracle.write(sector, sectors));
        let begun = (!writes).then(|| self.oracle.begin());
        let descriptors = if indirect { segments.len().div_ceil(512) } else { 0 };
        let mut hv = machine.view(self.domain);
        let region = hv.frames_alloc(segments.len() + descriptors).expect("guests have memory");
        fill(&mut hv, region, &segments, self.oracle.disk, sector, ticket);
        let grefs: Vec<Gref> = (0..region.pages as usize)
            .map(|page| {
                let writable = !writes && page < segments.len();
                hv.grant(S, region.page(page), writable).expect("guests have grants")
            })
            .collect();
        segments.iter_mut().zip(&grefs).for_each(|(segment, gref)| segment.gref = *gref);
        let id = self.new_id();
        let abi = self.queues[queue].ring.abi();
        let raw = if indirect {
            let mut hv = machine.view(self.domain);
            let mut page = [0; PAGE_BYTES];
            for (index, part) in segments.chunks(512).enumerate() {
                let len = emit_descriptors(part, &mut page);
                hv.write(region.page(segments.len() + index), 0, &page[..len]);
            }
            let count = segments.len() as u16;
            emit_indirect(abi, operation, id, 0, sector, count, &grefs[segments.len()..])
        } else {
            emit_transfer(abi, operation, id, 0, sector, &segments)
        };
        let pending = Pending {
            queue,
            operation,
            sector,
            segments,
            pages: Some((region, grefs)),
            ticket,
            begun,
            submitted_ns: now_ns,
            flush: false,
        };
        self.put(machine, id, pending, &raw);
    }

    fn put(
        &mut self,
        machine: &mut Machine,
        id: u64,
        pending: Pending,
        raw: &platter_xen::blkif::RawRequest,
    ) {
        let mut hv = machine.view(self.domain);
        let put = self.queues[pending.queue].ring.put(&mut hv, raw);
        assert!(put, "there was room");
        self.pending.insert(id, pending);
    }
}

/// A write's bytes where its segments are, poison everywhere else.
fn fill(
    hv: &mut View<'_>,
    region: Region,
    segments: &[Segment],
    disk: u32,
    sector: u64,
    ticket: Option<Ticket>,
) {
    let mut sector = sector;
    for (index, segment) in segments.iter().enumerate() {
        let mut page = [POISON; PAGE_BYTES];
        if let Some(ticket) = ticket {
            for number in segment.first_sect..=segment.last_sect {
                let at = usize::from(number) * SECTOR;
                page[at..at + SECTOR].copy_from_slice(&content(disk, sector, ticket.version));
                sector += 1;
            }
        }
        hv.write(region.page(index), 0, &page);
    }
}
