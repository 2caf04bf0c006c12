//! An honest guest with one disk: the frontend's handshake in the manner of each frontend that
//! is out there, and requests whose every answer is judged.
//!
//! The manners are those of Linux blkfront, pvgrub2, mini-os, OVMF, the Windows PV driver and a
//! kernel that was replaced without closing (kexec). Must never: break the protocol, use a page
//! again before its grant ended.

mod io;

use std::collections::BTreeMap;

use platter_xen::blkif::Abi;
use platter_xen::ring::FrontRing;
use platter_xen::vbd::{BACK_KEYS, Connect, DiskNodes, Queue as QueueNodes, front_nodes};
use platter_xen::{DomId, Gref, Hypervisor, Port, Region};

use crate::machine::Machine;
use crate::oracle::Oracle;
use crate::rng::Rng;
use crate::toolstack::DiskLine;
use crate::xenstore::Xenstore;

/// The platter domain.
pub const S: DomId = DomId(1);

/// Whose habits the frontend has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Manner {
    Linux,
    Pvgrub,
    MiniOs,
    Ovmf,
    Windows,
    /// Linux that is replaced by another kernel without a close.
    Kexec,
}

pub const MANNERS: [Manner; 6] =
    [Manner::Linux, Manner::Pvgrub, Manner::MiniOs, Manner::Ovmf, Manner::Windows, Manner::Kexec];

/// What the guest does with its disk.
#[derive(Clone, Debug)]
pub struct Habits {
    /// Each cycle of connect, requests and close takes the next one.
    pub manners: Vec<Manner>,
    pub abi: Abi,
    pub queues: u32,
    pub ring_order: u32,
    /// Requests under way at once.
    pub depth: usize,
    /// Longest request in segments; above 11 some are indirect.
    pub segments_max: usize,
    /// Every transfer has that many segments, each a whole page.
    pub uniform: bool,
    /// Requests of each cycle.
    pub requests: u64,
    /// Of 1000 requests, those that begin where the one before ended.
    pub sequential: u64,
    /// Of 1000 requests.
    pub writes: u64,
    pub flushes: u64,
    pub barriers: u64,
    pub discards: u64,
    /// They are of all that lies behind what it uses.
    pub wide: bool,
    /// Mean pause between two submissions; 0: as fast as the ring allows.
    pub think_ns: u64,
    /// Sectors that are used, from the start: fewer means more that overlaps.
    pub span: u64,
    /// Errors are no failure: the store is made to fail.
    pub errors_allowed: bool,
    /// Longest wait for any answer.
    pub patience_ns: u64,
}

impl Habits {
    pub fn calm() -> Habits {
        Habits {
            manners: vec![Manner::Linux],
            abi: Abi::X86_64,
            queues: 1,
            ring_order: 0,
            depth: 8,
            segments_max: 11,
            uniform: false,
            requests: 200,
            sequential: 0,
            writes: 500,
            flushes: 30,
            barriers: 0,
            discards: 0,
            wide: false,
            think_ns: 0,
            span: u64::MAX,
            errors_allowed: false,
            patience_ns: 8_000_000_000,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Not started.
    Off,
    /// Windows closes before it connects.
    FirstClose(u8),
    WaitInitWait,
    WaitConnected,
    Running,
    /// Nothing new is asked; answers are waited for.
    Draining,
    Closing(u8),
    /// The cycle is over.
    Closed,
    /// All cycles are over, or the device is gone.
    Done,
}

struct Queue {
    ring: FrontRing,
    region: Region,
    grefs: Vec<Gref>,
    port: Port,
}

/// Pages to be given back when the other side has let go of them.
struct Remains {
    region: Region,
    grefs: Vec<Gref>,
}

pub struct Guest {
    pub domain: u16,
    pub line: DiskLine,
    pub habits: Habits,
    pub oracle: Oracle,
    pub phase: Phase,
    since_ns: u64,
    cycle: usize,
    rng: Rng,
    nodes: Option<DiskNodes>,
    queues: Vec<Queue>,
    pending: BTreeMap<u64, io::Pending>,
    left: u64,
    next_ns: u64,
    /// Where the last request ended.
    next_sector: u64,
    remains: Vec<Remains>,
    /// Close and do not come back.
    pub stopping: bool,
    /// Nanoseconds from submission to answer of each request.
    pub latencies_ns: Vec<u64>,
    pub answered: u64,
    pub errors: u64,
    /// Sectors of the largest request that was answered OK.
    pub largest: u64,
}

impl Guest {
    pub fn new(line: DiskLine, habits: Habits, oracle: Oracle, rng: Rng) -> Guest {
        Guest {
            domain: line.guest,
            line,
            habits,
            oracle,
            phase: Phase::Off,
            since_ns: 0,
            cycle: 0,
            rng,
            nodes: None,
            queues: vec![],
            pending: BTreeMap::new(),
            left: 0,
            next_ns: 0,
            next_sector: 0,
            remains: vec![],
            stopping: false,
            latencies_ns: vec![],
            answered: 0,
            errors: 0,
            largest: 0,
        }
    }

    pub fn start(&mut self, xs: &mut Xenstore, now_ns: u64) {
        xs.watch(self.domain, &self.line.be());
        self.begin_cycle(xs, now_ns);
    }

    fn manner(&self) -> Manner {
        self.habits.manners[self.cycle.min(self.habits.manners.len() - 1)]
    }

    pub fn is_done(&self) -> bool {
        self.phase == Phase::Done
    }

    pub fn is_running(&self) -> bool {
        self.phase == Phase::Running
    }

    /// Requests that have no answer yet.
    pub fn outstanding(&self) -> usize {
        self.pending.len()
    }

    fn enter(&mut self, phase: Phase, now_ns: u64) {
        (self.phase, self.since_ns) = (phase, now_ns);
    }

    fn begin_cycle(&mut self, xs: &mut Xenstore, now_ns: u64) {
        self.left = self.habits.requests;
        self.next_ns = now_ns;
        match self.manner() {
            Manner::Windows => self.enter(Phase::FirstClose(0), now_ns),
            _ => self.enter(Phase::WaitInitWait, now_ns),
        }
        let _ = xs;
    }

    fn back(&self, xs: &Xenstore) -> Option<u64> {
        xs.number(self.domain, &format!("{}/state", self.line.be()))
    }

    fn set(&self, xs: &mut Xenstore, state: u64) {
        let path = format!("{}/state", self.line.fe());
        // The toolstack may have deleted the directory under us.
        if xs.exists(&path) {
            xs.write(self.domain, &path, state.to_string().as_bytes()).expect("it is ours");
        }
    }

    /// The guest's turn. When it wants to run again without an event.
    pub fn run(&mut self, machine: &mut Machine, xs: &mut Xenstore, now_ns: u64) -> Option<u64> {
        if matches!(self.phase, Phase::Off | Phase::Done) {
            return None;
        }
        self.release_remains(machine);
        let waited = now_ns - self.since_ns;
        let waits = !matches!(self.phase, Phase::Running | Phase::Closed);
        assert!(
            !waits || waited < self.habits.patience_ns,
            "guest {} ({:?}) is stuck in {:?} for {} ms; the backend shows {:?}, {} outstanding",
            self.domain,
            self.manner(),
            self.phase,
            waited / 1_000_000,
            self.back(xs),
            self.pending.len()
        );
        self.handshake(machine, xs, now_ns);
        let soon = match self.phase {
            Phase::Running | Phase::Draining => self.serve(machine, now_ns),
            _ => None,
        };
        if self.phase == Phase::Draining && self.pending.is_empty() {
            self.enter(Phase::Closing(0), now_ns);
            self.handshake(machine, xs, now_ns);
        }
        // Looked at now and then, so that a lost answer shows as a failure.
        Some(soon.unwrap_or(now_ns + 250_000_000))
    }

    fn handshake(&mut self, machine: &mut Machine, xs: &mut Xenstore, now_ns: u64) {
        for _ in 0..8 {
            let before = self.phase;
            self.step(machine, xs, now_ns);
            if self.phase == before {
                return;
            }
        }
    }

    fn step(&mut self, machine: &mut Machine, xs: &mut Xenstore, now_ns: u64) {
        let back = self.back(xs);
        match self.phase {
            Phase::FirstClose(step) => self.first_close(xs, step, back, now_ns),
            Phase::WaitInitWait if back == Some(2) => self.publish(machine, xs, now_ns),
            Phase::WaitInitWait if self.stopping || back.is_none() => {
                self.enter(Phase::Closing(0), now_ns);
            }
            // Refused by a carrier for which the toolstack does not wait.
            Phase::WaitInitWait
                if self.cycle == 0 && back == Some(6) && self.habits.errors_allowed =>
            {
                self.enter(Phase::Done, now_ns);
            }
            Phase::WaitConnected => self.connected(xs, back, now_ns),
            Phase::Running => {
                let asked_away = matches!(back, None | Some(5 | 6));
                if self.manner() == Manner::Kexec && self.left == 0 && !asked_away {
                    self.replace_kernel(machine, xs, now_ns);
                } else if asked_away || self.stopping || self.left == 0 {
                    self.enter(Phase::Draining, now_ns);
                }
            }
            Phase::Closing(step) => self.close(machine, xs, step, back, now_ns),
            Phase::Closed => self.next_cycle(xs, back, now_ns),
            _ => {}
        }
    }

    fn first_close(&mut self, xs: &mut Xenstore, step: u8, back: Option<u64>, now_ns: u64) {
        match (step, back) {
            (0, Some(back)) if back != 1 => {
                self.set(xs, 5);
                self.enter(Phase::FirstClose(1), now_ns);
            }
            (1, Some(5 | 6)) => {
                self.set(xs, 6);
                self.enter(Phase::FirstClose(2), now_ns);
            }
            (2, Some(6)) => {
                self.set(xs, 1);
                self.enter(Phase::WaitInitWait, now_ns);
            }
            (_, None) => self.enter(Phase::Closed, now_ns),
            _ => {}
        }
    }

    /// Sets up rings, writes the keys, shows 3 or 4 as its manner is.
    fn publish(&mut self, machine: &mut Machine, xs: &mut Xenstore, now_ns: u64) {
        let manner = self.manner();
        let simple = matches!(manner, Manner::Pvgrub | Manner::MiniOs | Manner::Ovmf);
        let nodes = self.read_nodes(xs);
        let queues = if simple { 1 } else { self.habits.queues.min(nodes.queues_max) };
        let order = if simple { 0 } else { self.habits.ring_order.min(nodes.ring_page_order_max) };
        let abi = if simple { Abi::X86_64 } else { self.habits.abi };
        let mut connect = Connect { abi, queues: heapless::Vec::new() };
        let mut hv = machine.view(self.domain);
        for _ in 0..queues {
            let region = hv.frames_alloc(1 << order).expect("guests have memory");
            let grefs: Vec<Gref> = (0..region.pages as usize)
                .map(|page| hv.grant(S, region.page(page), true).expect("guests have grants"))
                .collect();
            let ring = FrontRing::init(&mut hv, region, abi);
            let port = hv.alloc_unbound(S).expect("guests have ports");
            let shown = QueueNodes { grefs: grefs.iter().copied().collect(), port };
            connect.queues.push(shown).expect("at most 8 queues");
            self.queues.push(Queue { ring, region, grefs, port });
        }
        let fe = self.line.fe();
        for (key, value) in front_nodes(&connect) {
            // A frontend of its own mind may leave the keys of another in place.
            let _ = xs.write(self.domain, &format!("{fe}/{key}"), value.as_bytes());
        }
        if queues == 1 {
            let _ = xs.remove(self.domain, &format!("{fe}/multi-queue-num-queues"));
        }
        if order == 0 {
            let _ = xs.remove(self.domain, &format!("{fe}/ring-page-order"));
        }
        let state = if matches!(manner, Manner::MiniOs | Manner::Ovmf) { 4 } else { 3 };
        self.set(xs, state);
        self.enter(Phase::WaitConnected, now_ns);
    }

    fn read_nodes(&self, xs: &Xenstore) -> DiskNodes {
        let be = self.line.be();
        let values = BACK_KEYS.map(|key| xs.text(self.domain, &format!("{be}/{key}")));
        DiskNodes::parse(&values).expect("the backend describes its disk")
    }

    fn connected(&mut self, xs: &mut Xenstore, back: Option<u64>, now_ns: u64) {
        match back {
            Some(4) => {
                let nodes = self.read_nodes(xs);
                let same = self.habits.wide || nodes.sectors == self.oracle.sectors();
                assert!(same, "the disk has another size");
                assert!((nodes.info & 4 != 0) != self.line.writable, "info and mode differ");
                self.nodes = Some(nodes);
                self.set(xs, 4);
                self.enter(Phase::Running, now_ns);
            }
            Some(2 | 3) => {}
            Some(state) if state > 4 && self.manner() == Manner::Ovmf && !self.stopping => {
                panic!("OVMF gives up: the backend shows {state} while it connects")
            }
            Some(1) => {}
            _ => self.enter(Phase::Closing(0), now_ns),
        }
    }

    fn close(
        &mut self,
        machine: &mut Machine,
        xs: &mut Xenstore,
        step: u8,
        back: Option<u64>,
        now_ns: u64,
    ) {
        let gone = back.is_none();
        match (step, self.manner()) {
            (0, Manner::Pvgrub) => {
                self.set(xs, 6);
                self.enter(Phase::Closing(2), now_ns);
            }
            (0, _) => {
                self.set(xs, 5);
                self.enter(Phase::Closing(1), now_ns);
            }
            (1, manner) if gone || matches!(back, Some(5 | 6)) => {
                let skipped = manner == Manner::Ovmf && back == Some(6) && !self.stopping;
                assert!(!skipped, "OVMF waits for 5 and sees 6");
                self.set(xs, 6);
                self.enter(Phase::Closing(2), now_ns);
            }
            (2, _) if gone || back == Some(6) => {
                self.forget_rings(machine);
                self.release_remains(machine);
                assert!(
                    self.remains.is_empty() || gone,
                    "guest {}: the backend shows 6 and still maps its pages",
                    self.domain
                );
                self.clear_keys(xs);
                self.enter(Phase::Closed, now_ns);
            }
            _ => {}
        }
    }

    fn clear_keys(&self, xs: &mut Xenstore) {
        if matches!(self.manner(), Manner::Pvgrub | Manner::MiniOs) {
            for key in ["ring-ref", "event-channel"] {
                let _ = xs.remove(self.domain, &format!("{}/{key}", self.line.fe()));
            }
        }
    }

    fn next_cycle(&mut self, xs: &mut Xenstore, back: Option<u64>, now_ns: u64) {
        let online = xs.text(self.domain, &format!("{}/online", self.line.be()));
        let removed = back.is_none() || online.as_deref() != Some("1");
        if self.stopping || removed || self.cycle + 1 >= self.habits.manners.len() {
            if !self.stopping && !removed && self.manner() != Manner::Linux {
                self.set(xs, 1);
            }
            return self.enter(Phase::Done, now_ns);
        }
        self.cycle += 1;
        self.set(xs, 1);
        self.begin_cycle(xs, now_ns);
    }

    /// Another kernel starts: the old one's pages stay granted, its requests are forgotten.
    fn replace_kernel(&mut self, machine: &mut Machine, xs: &mut Xenstore, now_ns: u64) {
        self.abandon(machine);
        if self.cycle + 1 >= self.habits.manners.len() {
            self.habits.manners.push(Manner::Linux);
        }
        self.cycle += 1;
        self.set(xs, 1);
        self.begin_cycle(xs, now_ns);
        // It sees the old backend's 4 for a while; only a 2 is for it.
        self.enter(Phase::WaitInitWait, now_ns);
    }

    fn abandon(&mut self, machine: &mut Machine) {
        let pending = core::mem::take(&mut self.pending);
        for (_, request) in pending {
            if let Some(begun) = request.begun {
                self.oracle.end(begun);
            }
            self.remains.extend(request.pages.map(|(region, grefs)| Remains { region, grefs }));
        }
        self.forget_rings(machine);
    }

    fn forget_rings(&mut self, machine: &mut Machine) {
        for queue in self.queues.drain(..) {
            machine.view(self.domain).close_port(queue.port);
            self.remains.push(Remains { region: queue.region, grefs: queue.grefs });
        }
    }

    fn release_remains(&mut self, machine: &mut Machine) {
        let mut hv = machine.view(self.domain);
        self.remains.retain_mut(|remains| {
            while let Some(gref) = remains.grefs.last() {
                if !hv.revoke(*gref) {
                    return true;
                }
                remains.grefs.pop();
            }
            hv.frames_free(remains.region);
            false
        });
    }

    /// The guest stops to exist in the middle of everything.
    pub fn vanish(&mut self) {
        for request in core::mem::take(&mut self.pending).into_values() {
            if let Some(begun) = request.begun {
                self.oracle.end(begun);
            }
        }
        self.queues.clear();
        self.remains.clear();
        self.phase = Phase::Done;
    }
}
