//! One disk under load: which block is next, what is under way, what has come back.

use alloc::vec;
use alloc::vec::Vec;

use platter_xen::blkif::{Response, Status, emit_discard, emit_indirect, emit_transfer, op};
use platter_xen::ring::FrontRing;
use platter_xen::{Gref, Port};

use crate::front::Link;
use crate::guest::{Guest, SECOND_NS};
use crate::load::Pass;
use crate::options::Options;
use crate::pool::Pool;
use crate::random::Random;
use crate::report::Report;
use crate::stamp::{Model, SECTOR_BYTES, STAMP_BYTES, STAMPS_AT, Stamp};

/// Tries to find a random block that is not under way.
const TRIES: usize = 64;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Work {
    Read,
    Write,
    Barrier,
    Flush,
    Discard,
}

/// A block under way.
#[derive(Clone, Copy, Debug)]
struct Flight {
    work: Work,
    block: u64,
    generation: u32,
    since_ns: u64,
    /// Requests without an answer.
    left: usize,
    okay: bool,
}

/// What one slot's requests go out with.
struct Ready {
    slot: usize,
    work: Work,
    block: u64,
}

/// One disk under load.
pub struct Lane<'a> {
    link: &'a mut Link,
    pool: &'a Pool,
    model: Option<&'a mut Model>,
    options: &'a Options,
    pass: Pass,
    blocks: u64,
    block_sectors: u64,
    flights: Vec<Option<Flight>>,
    /// Slots without a flight.
    idle: Vec<usize>,
    busy: Vec<bool>,
    next_block: u64,
    issued: u64,
    random: Random,
    start_ns: u64,
    end_ns: u64,
    stopping: bool,
    report: Report,
}

impl<'a> Lane<'a> {
    /// Ready to start.
    pub fn new(
        link: &'a mut Link,
        pool: &'a Pool,
        model: Option<&'a mut Model>,
        options: &'a Options,
        pass: Pass,
        now_ns: u64,
    ) -> Lane<'a> {
        let block_sectors = options.block_bytes / SECTOR_BYTES as u64;
        let sectors = link.nodes.sectors.min(options.range_bytes / SECTOR_BYTES as u64);
        let blocks = (sectors / block_sectors).max(1);
        let slots = pool.buffers.len();
        Lane {
            link,
            pool,
            model,
            options,
            pass,
            blocks,
            block_sectors,
            flights: vec![None; slots],
            idle: (0..slots).rev().collect(),
            busy: vec![false; blocks as usize],
            next_block: 0,
            issued: 0,
            random: Random::new(options.seed),
            start_ns: now_ns,
            end_ns: now_ns + options.seconds * SECOND_NS,
            stopping: false,
            report: Report::default(),
        }
    }

    /// Its event channels.
    pub fn ports(&self) -> Vec<Port> {
        self.link.wires.ports.clone()
    }

    /// Nothing is under way and nothing more will be.
    pub fn is_done(&self) -> bool {
        self.stopping && self.idle.len() == self.flights.len()
    }

    /// What is under way will never come back.
    pub fn give_up(&mut self) {
        self.stopping = true;
        self.report.errors += self.flights.iter().flatten().count() as u64;
    }

    /// Takes answers, puts requests. True when there was any.
    pub fn turn<G: Guest>(&mut self, guest: &mut G) -> bool {
        let mut went_on = false;
        for queue in 0..self.link.wires.rings.len() {
            loop {
                match self.link.wires.rings[queue].take(guest) {
                    Ok(Some(response)) => self.answered(guest, response),
                    Ok(None) => break,
                    Err(_) => {
                        self.report.strays += 1;
                        self.give_up();
                        break;
                    }
                }
                went_on = true;
            }
        }
        let now_ns = guest.now_ns();
        self.stopping |= !self.pass.once && now_ns >= self.end_ns;
        went_on |= self.put_all(guest, now_ns);
        let wires = &mut self.link.wires;
        for (ring, port) in wires.rings.iter_mut().zip(&wires.ports) {
            if ring.publish(guest) {
                guest.notify(*port);
            }
        }
        went_on
    }

    /// Asks for events. True when an answer is there after all.
    pub fn look_again<G: Guest>(&mut self, guest: &mut G) -> bool {
        let rings = self.link.wires.rings.iter_mut();
        rings.fold(false, |any, ring| ring.final_check(guest).unwrap_or(false) | any)
    }

    /// The outcome.
    pub fn finish<G: Guest>(mut self, guest: &mut G) -> Report {
        self.report.elapsed_ns = guest.now_ns() - self.start_ns;
        self.report
    }

    fn put_all<G: Guest>(&mut self, guest: &mut G, now_ns: u64) -> bool {
        let mut any = false;
        let mut waiting = Vec::new();
        while !self.stopping {
            let Some(slot) = self.idle.pop() else { break };
            let queue = slot % self.link.wires.rings.len();
            if (self.link.wires.rings[queue].room() as usize) < self.pool.shape.parts() {
                waiting.push(slot);
                continue;
            }
            match self.choose(slot) {
                Some(ready) => {
                    self.put(guest, &ready, now_ns);
                    any = true;
                }
                None => {
                    waiting.push(slot);
                    break;
                }
            }
        }
        self.idle.append(&mut waiting);
        any
    }

    /// What the slot does next; `None` when everything has been done, or is under way.
    fn choose(&mut self, slot: usize) -> Option<Ready> {
        let options = self.options;
        let ended = self.pass.once && self.next_block >= self.blocks
            || !self.pass.once && options.count > 0 && self.issued >= options.count;
        if ended {
            self.stopping = true;
            return None;
        }
        let turn = self.issued + 1;
        let is_due = |every: u64| self.pass.commands && turn.checked_rem(every) == Some(0);
        let nodes = &self.link.nodes;
        if nodes.flush && is_due(options.flush_every) {
            self.issued += 1;
            return Some(Ready { slot, work: Work::Flush, block: 0 });
        }
        let discard = is_due(options.discard_every) && nodes.discard_granularity_bytes.is_some();
        let barrier = nodes.flush && is_due(options.barrier_every) && self.is_small();
        let block = self.next_block()?;
        let work = match () {
            () if discard => Work::Discard,
            () if barrier => Work::Barrier,
            () if self.random.below(100) < self.pass.read_percent => Work::Read,
            () => Work::Write,
        };
        self.issued += 1;
        self.busy[block as usize] = true;
        Some(Ready { slot, work, block })
    }

    /// Barriers have no indirect form.
    fn is_small(&self) -> bool {
        self.options.block_bytes <= 11 * 4096
    }

    fn next_block(&mut self) -> Option<u64> {
        if !self.pass.random {
            let block = self.next_block % self.blocks;
            if self.busy[block as usize] {
                return None;
            }
            self.next_block += 1;
            return Some(block);
        }
        let mut drawn = (0..TRIES).map(|_| self.random.below(self.blocks));
        drawn.find(|block| !self.busy[*block as usize])
    }

    fn put<G: Guest>(&mut self, guest: &mut G, ready: &Ready, now_ns: u64) {
        let Ready { slot, work, block } = *ready;
        let sector = block * self.block_sectors;
        let mut generation = 0;
        if let (Work::Write | Work::Barrier, Some(model)) = (work, &mut self.model) {
            generation = model.next_generation();
            let data = self.pool.buffers[slot].data;
            for at in 0..self.block_sectors {
                let stamp = Stamp { sector: sector + at, generation }.emit();
                for offset in STAMPS_AT {
                    guest.write(data, at as usize * SECTOR_BYTES + offset, &stamp);
                }
            }
        }
        let queue = slot % self.link.wires.rings.len();
        let ring = &mut self.link.wires.rings[queue];
        let left = match work {
            Work::Read => put_parts(guest, ring, self.pool, slot, op::READ, sector),
            Work::Write => put_parts(guest, ring, self.pool, slot, op::WRITE, sector),
            Work::Barrier => put_direct(guest, ring, self.pool, slot, op::WRITE_BARRIER, sector),
            Work::Flush => {
                let operation = op::FLUSH_DISKCACHE;
                let raw = emit_transfer(ring.abi(), operation, slot as u64, 0, 0, &[]);
                usize::from(ring.put(guest, &raw))
            }
            Work::Discard => {
                let sectors = self.block_sectors;
                let raw = emit_discard(ring.abi(), slot as u64, sector, sectors, false);
                usize::from(ring.put(guest, &raw))
            }
        };
        self.report.requests += left as u64;
        let flight = Flight { work, block, generation, since_ns: now_ns, left, okay: true };
        self.flights[slot] = Some(flight);
    }

    fn answered<G: Guest>(&mut self, guest: &mut G, response: Response) {
        let slot = (response.id & 0xffff) as usize;
        let Some(flight) = self.flights.get_mut(slot).and_then(Option::as_mut) else {
            self.report.strays += 1;
            return;
        };
        if response.status != Status::Okay.wire() {
            flight.okay = false;
            let unsupported = response.status == Status::Unsupported.wire();
            let count =
                if unsupported { &mut self.report.unsupported } else { &mut self.report.errors };
            *count += 1;
        }
        flight.left -= 1;
        if flight.left == 0 {
            let flight = *flight;
            self.flights[slot] = None;
            self.idle.push(slot);
            self.landed(guest, slot, &flight);
        }
    }

    fn landed<G: Guest>(&mut self, guest: &mut G, slot: usize, flight: &Flight) {
        self.report.latencies.note(guest.now_ns().saturating_sub(flight.since_ns));
        let sector = flight.block * self.block_sectors;
        match flight.work {
            Work::Flush => {
                self.report.flushes += 1;
                return;
            }
            Work::Read => {
                self.report.reads += 1;
                if flight.okay {
                    self.verify(guest, slot, sector);
                }
            }
            Work::Write | Work::Barrier => {
                self.report.writes += 1;
                if let Some(model) = &mut self.model {
                    model.written(sector, self.block_sectors, flight.generation, flight.okay);
                }
            }
            Work::Discard => {
                self.report.discards += 1;
                if let Some(model) = &mut self.model {
                    model.discarded(sector, self.block_sectors);
                }
            }
        }
        if flight.work != Work::Discard {
            self.report.bytes += self.options.block_bytes;
        }
        self.busy[flight.block as usize] = false;
    }

    fn verify<G: Guest>(&mut self, guest: &mut G, slot: usize, sector: u64) {
        let Some(model) = &self.model else { return };
        let data = self.pool.buffers[slot].data;
        for at in 0..self.block_sectors {
            let mut stamps = [[0; STAMP_BYTES]; 2];
            for (stamp, offset) in stamps.iter_mut().zip(STAMPS_AT) {
                guest.read(data, at as usize * SECTOR_BYTES + offset, stamp);
            }
            self.report.verified += 1;
            if !model.allows(sector + at, &stamps, self.pass.strict) {
                if self.report.mismatches < 4 {
                    let seen = stamps.map(|stamp| Stamp::parse(&stamp));
                    log::error!("sector {} holds {seen:?}", sector + at);
                }
                self.report.mismatches += 1;
            }
        }
    }
}

/// Puts all requests of a block; how many.
fn put_parts<G: Guest>(
    guest: &mut G,
    ring: &mut FrontRing,
    pool: &Pool,
    slot: usize,
    operation: u8,
    sector: u64,
) -> usize {
    if !pool.shape.is_indirect() {
        return put_direct(guest, ring, pool, slot, operation, sector);
    }
    let buffer = &pool.buffers[slot];
    let max = pool.shape.segments_max;
    let mut put = 0;
    for part in 0..pool.shape.parts() {
        let count = (buffer.grefs.len() - part * max).min(max) as u16;
        let at = sector + (part * max * 8) as u64;
        let gref: Gref = buffer.indirect[part];
        let id = slot as u64 | (part as u64) << 16;
        let raw = emit_indirect(ring.abi(), operation, id, 0, at, count, &[gref]);
        put += usize::from(ring.put(guest, &raw));
    }
    put
}

fn put_direct<G: Guest>(
    guest: &mut G,
    ring: &mut FrontRing,
    pool: &Pool,
    slot: usize,
    operation: u8,
    sector: u64,
) -> usize {
    let mut put = 0;
    for part in 0..pool.shape.parts() {
        let segments = pool.segments_of(&pool.buffers[slot].grefs, part);
        let at = sector + (part * pool.shape.segments_max * 8) as u64;
        let id = slot as u64 | (part as u64) << 16;
        let raw = emit_transfer(ring.abi(), operation, id, 0, at, &segments);
        put += usize::from(ring.put(guest, &raw));
    }
    put
}
