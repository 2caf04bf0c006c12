//! A guest that means harm: everything it may write, it writes.
//!
//! Ring indexes and slots, grants of every kind, pages rewritten while they are read, states and
//! keys in xenstore, events. It reaches the request path again and again because most of its
//! requests are right but for one field. Must never: reach anything that a real guest could not.

use platter_xen::blkif::{
    Abi, REQUEST_BYTES_MAX, RawRequest, Segment, emit_descriptors, emit_discard, emit_indirect,
    emit_transfer, op,
};
use platter_xen::{Gref, Hypervisor, PAGE_BYTES, Port, Region};

use crate::guest::S;
use crate::machine::Machine;
use crate::oracle::{SECTOR, owner};
use crate::rng::Rng;
use crate::toolstack::DiskLine;
use crate::world::World;
use crate::xenstore::Xenstore;

const REQ_PROD: usize = 0;
const RSP_PROD: usize = 8;
const RSP_EVENT: usize = 12;
const SLOTS: u32 = 32;
const SLOTS_AT: usize = 64;
const PAGES: usize = 24;

/// Which kinds of harm it does, in cases of 1000.
#[derive(Clone, Copy, Debug)]
pub struct Malice {
    /// Producer indexes that no honest guest writes.
    pub index: u64,
    /// Requests with a field made up.
    pub field: u64,
    /// Grants ended in the middle of everything.
    pub revoke: u64,
    /// States and keys out of turn.
    pub states: u64,
    /// Nonsense below its directory.
    pub storm: u64,
    /// Events without a reason.
    pub events: u64,
    /// Reads of its pages by others that see something else.
    pub noise: u64,
    /// Mean time between two turns.
    pub pause_ns: u64,
}

impl Malice {
    pub fn draw(rng: &mut Rng) -> Malice {
        let mut some = |most: u64| if rng.chance(600) { rng.between(1, most) } else { 0 };
        Malice {
            index: some(4),
            field: some(600),
            revoke: some(50),
            states: some(8),
            storm: some(100),
            events: some(500),
            noise: some(300),
            pause_ns: *rng.pick(&[5_000, 50_000, 500_000]),
        }
    }
}

pub struct Hostile {
    pub domain: u16,
    pub line: DiskLine,
    pub disk: u32,
    pub stopping: bool,
    malice: Malice,
    rng: Rng,
    abi: Abi,
    ring: Option<(Region, Vec<Gref>, Port)>,
    /// Rings of earlier connections, still granted.
    old: Vec<(Region, Vec<Gref>)>,
    data: Option<(Region, Vec<Gref>)>,
    req_prod: u32,
    /// Where its last transfer ended.
    next_sector: u64,
    shown: u64,
    storm_ns: u64,
    /// Requests that it published.
    pub asked: u64,
}

impl Hostile {
    /// Joins a world with a disk of its own.
    pub fn join(world: &mut World, rng: &mut Rng) {
        let malice = Malice::draw(rng);
        Hostile::join_with(world, malice);
    }

    pub fn join_with(world: &mut World, malice: Malice) -> usize {
        let disk = world.new_disk();
        let path = format!("hostile{disk}.raw");
        world.host.files.put(&path, vec![0; 256 * SECTOR]);
        let line = world.line(&format!("/images/{path}"));
        world.attach(&line);
        let rng = world.rng.fork();
        world.machine.noise_per_mille = world.machine.noise_per_mille.max(malice.noise);
        world.add_hostile(Hostile {
            domain: line.guest,
            line,
            disk,
            stopping: false,
            malice,
            abi: Abi::X86_64,
            rng,
            ring: None,
            old: vec![],
            data: None,
            req_prod: 0,
            next_sector: 0,
            shown: 1,
            storm_ns: 0,
            asked: 0,
        })
    }

    pub fn run(&mut self, machine: &mut Machine, xs: &mut Xenstore, now_ns: u64) -> Option<u64> {
        if self.stopping {
            return None;
        }
        let malice = self.malice;
        self.behave(machine, xs);
        if self.rng.chance(malice.states) {
            self.flap(machine, xs);
        }
        // xenstored takes some ten thousand requests a second of one guest.
        if now_ns >= self.storm_ns && self.rng.chance(malice.storm) {
            self.storm(xs);
            self.storm_ns = now_ns + 2_000_000;
        }
        if self.rng.chance(malice.revoke) {
            self.revoke_some(machine);
        }
        if let Some((_, _, port)) = self.ring {
            for _ in 0..if self.rng.chance(malice.events) { 20 } else { 0 } {
                machine.view(self.domain).notify(port);
            }
        }
        Some(now_ns + 1 + self.rng.below(2 * malice.pause_ns))
    }

    fn set(&mut self, xs: &mut Xenstore, state: u64) {
        self.shown = state;
        let path = format!("{}/state", self.line.fe());
        if xs.exists(&path) {
            let _ = xs.write(self.domain, &path, state.to_string().as_bytes());
        }
    }

    /// What an honest guest would do next, so that it gets to where it can do harm.
    fn behave(&mut self, machine: &mut Machine, xs: &mut Xenstore) {
        let back = xs.number(self.domain, &format!("{}/state", self.line.be()));
        match (self.shown, back) {
            (1, Some(2 | 4)) => self.publish(machine, xs),
            (3, Some(4)) => self.set(xs, 4),
            (3 | 4, Some(5 | 6)) => self.set(xs, 6),
            (3 | 4, Some(2)) if self.rng.chance(20) => self.set(xs, 1),
            (6, Some(6 | 2)) => {
                self.drop_ring(machine);
                self.set(xs, 1);
            }
            (4, Some(4)) => self.ask(machine),
            (0..=4, _) => {}
            _ if self.rng.chance(100) => self.set(xs, 1),
            _ => {}
        }
        self.drop_old(machine);
    }

    fn publish(&mut self, machine: &mut Machine, xs: &mut Xenstore) {
        self.drop_ring(machine);
        self.abi = if self.rng.chance(500) { Abi::X86_64 } else { Abi::X86_32 };
        let mut hv = machine.view(self.domain);
        let Some(region) = hv.frames_alloc(1) else { return };
        let Ok(gref) = hv.grant(S, region, true) else { return hv.frames_free(region) };
        hv.store_u32(region, 4, 1);
        hv.store_u32(region, RSP_EVENT, 1);
        let Ok(port) = hv.alloc_unbound(S) else { return };
        self.req_prod = 0;
        if self.rng.chance(100) {
            self.req_prod = self.rng.word() as u32;
            hv.store_u32(region, REQ_PROD, self.req_prod);
            hv.store_u32(region, RSP_PROD, self.req_prod);
        }
        if self.data.is_none() {
            let pages = hv.frames_alloc(PAGES).expect("guests have memory");
            let mut grefs = vec![];
            for page in 0..PAGES {
                let granted = hv.grant(S, pages.page(page), page % 5 != 0);
                grefs.push(granted.expect("guests have grants"));
            }
            self.data = Some((pages, grefs));
        }
        let (data, _) = self.data.as_ref().expect("just made");
        let noisy = self.malice.noise > 0;
        machine.set_hostile(self.domain, *data, noisy);
        machine.set_hostile(self.domain, region, noisy);
        self.ring = Some((region, vec![gref], port));
        let fe = self.line.fe();
        for (key, value) in [
            ("ring-ref", gref.0.to_string()),
            ("event-channel", port.0.to_string()),
            ("protocol", self.abi.protocol().to_string()),
        ] {
            if xs.exists(&fe) {
                let value =
                    if self.rng.chance(self.malice.states) { self.nonsense() } else { value };
                let _ = xs.write(self.domain, &format!("{fe}/{key}"), value.as_bytes());
            }
        }
        self.set(xs, 3);
    }

    fn drop_ring(&mut self, machine: &mut Machine) {
        if let Some((region, grefs, port)) = self.ring.take() {
            machine.view(self.domain).close_port(port);
            self.old.push((region, grefs));
        }
    }

    fn drop_old(&mut self, machine: &mut Machine) {
        let mut hv = machine.view(self.domain);
        self.old.retain_mut(|(region, grefs)| {
            grefs.retain(|gref| !hv.revoke(*gref));
            if grefs.is_empty() {
                hv.frames_free(*region);
            }
            !grefs.is_empty()
        });
    }

    fn nonsense(&mut self) -> String {
        let choices = [
            "",
            "0",
            "-1",
            "4294967295",
            "4294967296",
            "99999999999999999999",
            "1e3",
            " 1",
            "x86",
            "native",
            "\u{fffd}",
            "1",
            "7",
        ];
        self.rng.pick(&choices).to_string()
    }

    fn flap(&mut self, machine: &mut Machine, xs: &mut Xenstore) {
        let fe = self.line.fe();
        if !xs.exists(&fe) {
            return;
        }
        match self.rng.below(6) {
            0 => {
                let state = self.rng.below(10);
                self.set(xs, state);
            }
            1 => {
                let word = self.nonsense();
                let _ = xs.write(self.domain, &format!("{fe}/state"), word.as_bytes());
            }
            2 => {
                let _ = xs.remove(self.domain, &format!("{fe}/state"));
                let _ = xs.write(self.domain, &format!("{fe}/state"), b"1");
            }
            3 => {
                let keys = [
                    "ring-ref",
                    "ring-ref0",
                    "event-channel",
                    "protocol",
                    "ring-page-order",
                    "multi-queue-num-queues",
                    "num-ring-pages",
                    "queue-0/ring-ref",
                ];
                let path = format!("{fe}/{}", *self.rng.pick(&keys));
                let word = self.nonsense();
                let _ = xs.write(self.domain, &path, word.as_bytes());
            }
            4 => {
                for state in [6, 1, 3, 4, 6, 1] {
                    self.set(xs, state);
                }
            }
            // It starts anew without a word.
            _ => {
                self.drop_ring(machine);
                self.set(xs, 1);
            }
        }
    }

    fn storm(&mut self, xs: &mut Xenstore) {
        let fe = self.line.fe();
        if !xs.exists(&fe) {
            return;
        }
        for _ in 0..self.rng.between(1, 40) {
            let path = format!("{fe}/state/{}", self.rng.below(20));
            let value = vec![b'x'; self.rng.below(2000) as usize];
            let _ = xs.write(self.domain, &path, &value);
        }
    }

    fn revoke_some(&mut self, machine: &mut Machine) {
        let Some((region, grefs)) = &mut self.data else { return };
        let index = self.rng.below(PAGES as u64) as usize;
        let mut hv = machine.view(self.domain);
        if hv.revoke(grefs[index]) {
            // Requests under way name the old number, which may come to mean another page.
            grefs[index] = hv.grant(S, region.page(index), true).expect("just one freed");
        }
    }

    /// Puts requests on its ring, right but for what its malice changes.
    fn ask(&mut self, machine: &mut Machine) {
        let Some((region, ..)) = self.ring else { return };
        let rsp_prod = machine.view(self.domain).load_u32(region, RSP_PROD);
        let room = SLOTS.saturating_sub(self.req_prod.wrapping_sub(rsp_prod));
        let count = self.rng.below(u64::from(room) + 1);
        for _ in 0..count {
            let raw = self.request(machine);
            let bytes = self.abi.request_bytes();
            let at = SLOTS_AT + (self.req_prod % SLOTS) as usize * bytes;
            machine.view(self.domain).write(region, at, &raw[..bytes]);
            self.req_prod = self.req_prod.wrapping_add(1);
            self.asked += 1;
        }
        let mut shown = self.req_prod;
        if self.rng.chance(self.malice.index) {
            shown = match self.rng.below(4) {
                0 => self.rng.word() as u32,
                1 => shown.wrapping_add(SLOTS + 1),
                2 => shown.wrapping_sub(1),
                _ => u32::MAX,
            };
        }
        let Some((region, _, port)) = self.ring else { return };
        let mut hv = machine.view(self.domain);
        hv.store_u32(region, REQ_PROD, shown);
        hv.store_u32(region, RSP_EVENT, rsp_prod.wrapping_add(1));
        hv.notify(port);
    }

    fn gref(&mut self) -> Gref {
        let (_, grefs) = self.data.as_ref().expect("published");
        let index = self.rng.below(PAGES as u64) as usize;
        let good = grefs[index];
        if !self.rng.chance(self.malice.field) {
            return good;
        }
        match self.rng.below(4) {
            0 => Gref(self.rng.word() as u32),
            1 => Gref(0),
            // Its own ring: answers written over requests.
            2 => self.ring.as_ref().map_or(good, |(_, grefs, _)| grefs[0]),
            _ => Gref(self.rng.below(64) as u32),
        }
    }

    fn segments(&mut self, most: u64) -> Vec<Segment> {
        (0..self.rng.between(1, most))
            .map(|_| {
                let first = self.rng.below(8) as u8;
                let last = self.rng.between(u64::from(first), 7) as u8;
                Segment { gref: self.gref(), first_sect: first, last_sect: last }
            })
            .collect()
    }

    fn request(&mut self, machine: &mut Machine) -> RawRequest {
        // Numbers used twice are its own trouble.
        let id = self.rng.below(8);
        // What follows each other leaves platter as one message: one bad page among good ones.
        let follows = self.next_sector < 200 && self.rng.chance(500);
        let sector = if follows { self.next_sector } else { self.rng.below(200) };
        let abi = self.abi;
        let mut raw = match self.rng.below(10) {
            kind @ 0..=6 => {
                let operation = if kind < 4 { op::READ } else { op::WRITE };
                let segments = self.segments(6);
                let sectors = segments.iter().map(|segment| u64::from(segment.sectors()));
                self.next_sector = sector + sectors.sum::<u64>();
                emit_transfer(abi, operation, id, 0, sector, &segments)
            }
            7 => emit_transfer(abi, op::FLUSH_DISKCACHE, id, 0, 0, &[]),
            8 => emit_discard(abi, id, sector, self.rng.below(60), self.rng.chance(500)),
            _ => {
                let segments = self.segments(20);
                let (region, grefs) = self.data.as_ref().expect("published");
                let (page, gref) = (region.page(1), grefs[1]);
                let mut bytes = [0; PAGE_BYTES];
                let len = emit_descriptors(&segments, &mut bytes);
                machine.view(self.domain).write(page, 0, &bytes[..len]);
                let operation = if self.rng.chance(500) { op::READ } else { op::WRITE };
                emit_indirect(abi, operation, id, 0, sector, segments.len() as u16, &[gref])
            }
        };
        if self.rng.chance(self.malice.field) {
            let extreme = [0, 1, 0x7f, 0x80, 0xff, self.rng.word() as u8];
            for _ in 0..self.rng.between(1, 3) {
                let at = self.rng.below(REQUEST_BYTES_MAX as u64 / 2) as usize;
                raw[at] = *self.rng.pick(&extreme);
            }
        }
        raw
    }

    /// Nothing in its memory may be of another's disk.
    pub fn check_memory(&self, machine: &Machine) {
        for page in machine.owned_pages(self.domain) {
            for bytes in page.chunks_exact(SECTOR) {
                if let Some(disk) = owner(bytes) {
                    panic!("hostile guest {} has bytes of disk {disk}", self.domain);
                }
            }
        }
    }
}
