//! The world: who runs when. One queue of wake-ups in simulated time; ties are broken by the
//! order of entry, delays are drawn from the seed.
//!
//! Guards one-seed-one-run: no thread, no real clock, no iteration over a hash table. Platter
//! sleeps as SCHEDOP_poll does: only a pending port that it listed, or its time, wakes it.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use platter_image::Format;
use platter_kernel::{Ending, Server, Setup, Turn};
use platter_xen::{DomId, Hypervisor, Port, Region};

use crate::disks::blk::Blk;
use crate::disks::pci::Pci;
use crate::disks::{BACKENDS, DiskKind, Disks, PCIBACK, Partition, lose_cache, partitioned};
use crate::files::Files;
use crate::guest::{Guest, Habits};
use crate::hostile::Hostile;
use crate::images;
use crate::machine::{Holdings, Machine};
use crate::ninep;
use crate::oracle::Oracle;
use crate::rng::Rng;
use crate::toolstack::{Carrier, DiskLine, Outcome, TOOLSTACK, Toolstack};
use crate::xenstore::{XENSTORED, Xenstore};

/// The platter domain.
pub const S: u16 = 1;
const MS: u64 = 1_000_000;
/// What a turn of the server costs beside its hypercalls: ours, near what was measured.
const TURN_NS: u64 = 1500;
const GUEST_FRAMES: usize = 1 << 20;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Agent {
    Platter,
    Xenstored,
    Host,
    Toolstack,
    Disks,
    Guest(usize),
    Hostile(usize),
}

/// A disk image on the share, or in a partition, and what is known of it.
pub struct Image {
    pub path: String,
    pub format: Format,
    /// Not on the share.
    pub partition: Option<Partition>,
}

pub struct World {
    pub seed: u64,
    pub now_ns: u64,
    pub machine: Machine,
    pub xs: Xenstore,
    pub server: Option<Server>,
    pub host: ninep::Server,
    pub toolstack: Toolstack,
    /// Platter's own.
    pub disks: Disks,
    pub guests: Vec<Guest>,
    pub hostiles: Vec<Hostile>,
    /// Image of each guest's disk.
    pub images: Vec<Image>,
    pub rng: Rng,
    /// Turns that the server took.
    pub turns: u64,
    /// How often it slept after one.
    pub sleeps: u64,
    pub ended: Option<Ending>,
    /// Of 1000 wake-ups, so many come with an event at a port chosen by chance.
    pub spurious: u64,
    /// Until when xenstored refuses some of what platter asks.
    trouble_until_ns: u64,
    queue: BinaryHeap<Reverse<(u64, u64, Agent)>>,
    due: BTreeMap<Agent, u64>,
    entries: u64,
    asleep: bool,
    setup: Setup,
    next_domain: u16,
    next_disk: u32,
    /// Guests that start when their disk is attached.
    starting: Vec<usize>,
    /// Called around each turn of the server.
    pub around_turn: fn(&mut dyn FnMut()),
}

impl World {
    /// A platter domain with `frames` frames and one share, `images`, whose server is up.
    pub fn new(seed: u64, frames: usize) -> World {
        let mut rng = Rng::new(seed);
        let mut machine = Machine::new(rng.word());
        machine.add_domain(0, 1 << 20);
        machine.add_domain(S, frames);
        machine.add_domain(XENSTORED, 0);
        let page = machine.view(S).frames_alloc(1).expect("a page");
        let (port, theirs) = machine.join(S, XENSTORED);
        let mut xs = Xenstore::new(S, page, theirs);
        xs.seed(seed ^ 0xe5);
        plant(&mut xs);
        let mut host = ninep::Server::new(&mut xs, S, 0, "images", rng.fork());
        host.start(&mut xs);
        let toolstack = Toolstack::new(&mut xs);
        let disks = Disks::new(rng.fork());
        let setup = setup(page, port);
        let mut world = World {
            seed,
            now_ns: MS,
            machine,
            xs,
            server: None,
            host,
            toolstack,
            disks,
            guests: vec![],
            hostiles: vec![],
            images: vec![],
            rng,
            turns: 0,
            sleeps: 0,
            ended: None,
            spurious: 0,
            trouble_until_ns: 0,
            queue: BinaryHeap::new(),
            due: BTreeMap::new(),
            entries: 0,
            asleep: false,
            setup,
            next_domain: 2,
            next_disk: 1,
            starting: vec![],
            around_turn: |turn| turn(),
        };
        world.boot();
        world
    }

    /// The server starts.
    pub fn boot(&mut self) {
        let server = Server::new(&mut self.machine.view(S), self.setup);
        self.server = Some(server);
        self.schedule(Agent::Platter, self.now_ns);
    }

    fn schedule(&mut self, agent: Agent, at_ns: u64) {
        if self.due.get(&agent).is_some_and(|due| *due <= at_ns) {
            return;
        }
        self.due.insert(agent, at_ns);
        self.entries += 1;
        self.queue.push(Reverse((at_ns, self.entries, agent)));
    }

    /// Runs whoever is next. False when nobody is.
    fn step(&mut self) -> bool {
        let Some(Reverse((at_ns, _, agent))) = self.queue.pop() else { return false };
        if self.due.get(&agent) != Some(&at_ns) {
            return true;
        }
        self.due.remove(&agent);
        self.now_ns = self.now_ns.max(at_ns);
        let now_ns = self.now_ns;
        let (machine, xs) = (&mut self.machine, &mut self.xs);
        if now_ns >= self.trouble_until_ns {
            xs.refuse = 0;
        }
        let again = match agent {
            Agent::Platter => {
                self.run_platter();
                None
            }
            Agent::Xenstored => xs.run(machine).then(|| now_ns + self.rng.between(4000, 30_000)),
            Agent::Host => self.host.run(machine, xs, now_ns),
            Agent::Toolstack => {
                let again = self.toolstack.run(xs, now_ns);
                self.start_attached();
                again
            }
            Agent::Disks => {
                let again = self.disks.run(machine, xs, now_ns);
                if core::mem::take(&mut self.disks.lost) {
                    self.guests.iter_mut().for_each(|guest| guest.oracle.cache_lost());
                }
                again
            }
            Agent::Guest(index) => self.guests[index].run(machine, xs, now_ns),
            Agent::Hostile(index) => self.hostiles[index].run(machine, xs, now_ns),
        };
        if let Some(at_ns) = again {
            self.schedule(agent, at_ns.max(now_ns + 1));
        }
        self.pass_on_events();
        true
    }

    fn run_platter(&mut self) {
        let Some(server) = &mut self.server else { return };
        self.machine.cost_ns = 0;
        let (machine, now_ns) = (&mut self.machine, self.now_ns);
        let mut turn = Turn::Again;
        (self.around_turn)(&mut || turn = server.poll(&mut machine.view(S), now_ns));
        self.turns += 1;
        let done_ns = now_ns + TURN_NS + self.machine.cost_ns;
        self.asleep = false;
        match turn {
            Turn::Again => self.schedule(Agent::Platter, done_ns),
            Turn::Sleep { until_ns } => {
                self.asleep = true;
                self.sleeps += 1;
                let pending = self.machine.any_pending(S, server.ports());
                let at_ns = if pending { done_ns } else { until_ns.max(done_ns) };
                self.schedule(Agent::Platter, at_ns);
            }
            Turn::End(ending) => {
                self.ended = Some(ending);
                self.stop_platter();
            }
        }
        if core::mem::take(&mut self.machine.doorbell) {
            self.poke_disks();
        }
    }

    /// The domain is gone, whatever it was doing.
    pub fn stop_platter(&mut self) {
        if let Some(server) = self.server.take() {
            // Dropping it in the middle of its work would break the rule that every request is
            // answered; a machine that loses power does not drop anything either.
            core::mem::forget(server);
        }
    }

    fn pass_on_events(&mut self) {
        if self.rng.chance(self.spurious) {
            let choice = self.rng.word();
            self.machine.disturb(S, choice);
        }
        while let Some(domain) = self.machine.woken.pop() {
            self.wake(domain);
        }
        while let Some(domain) = self.xs.woken.pop() {
            self.wake(domain);
        }
        if self.xs.has_output() {
            self.wake(XENSTORED);
        }
    }

    fn wake(&mut self, domain: u16) {
        let soon = self.now_ns + self.rng.between(2000, 25_000);
        let agent = match domain {
            S => {
                let Some(server) = &self.server else { return };
                if !self.asleep || !self.machine.any_pending(S, server.ports()) {
                    return;
                }
                Agent::Platter
            }
            0 => Agent::Host,
            domain if domain == PCIBACK || domain >= BACKENDS => Agent::Disks,
            XENSTORED => Agent::Xenstored,
            TOOLSTACK => {
                let late = self.now_ns + self.rng.between(100_000, 4 * MS);
                return self.schedule(Agent::Toolstack, late);
            }
            domain => match self.agent_of(domain) {
                Some(agent) => agent,
                None => return,
            },
        };
        self.schedule(agent, soon);
    }

    fn agent_of(&self, domain: u16) -> Option<Agent> {
        if let Some(index) = self.guests.iter().position(|guest| guest.domain == domain) {
            return Some(Agent::Guest(index));
        }
        let index = self.hostiles.iter().position(|hostile| hostile.domain == domain)?;
        Some(Agent::Hostile(index))
    }

    /// For so long xenstored refuses so many of 1000 requests of platter's.
    pub fn trouble(&mut self, per_mille: u64, ns: u64) {
        self.xs.refuse = per_mille;
        self.trouble_until_ns = self.now_ns + ns;
    }

    /// Runs for so long.
    pub fn run_for(&mut self, ns: u64) {
        let end_ns = self.now_ns + ns;
        self.run_until_ns(end_ns);
    }

    fn run_until_ns(&mut self, end_ns: u64) {
        while self.queue.peek().is_some_and(|Reverse((at_ns, ..))| *at_ns <= end_ns) {
            self.step();
        }
        self.now_ns = self.now_ns.max(end_ns);
    }

    /// Runs until `done` says so; panics after `limit_ns`.
    pub fn run_until(&mut self, what: &str, limit_ns: u64, done: impl Fn(&World) -> bool) {
        let end_ns = self.now_ns + limit_ns;
        while !done(self) {
            assert!(self.now_ns < end_ns, "seed {}: {what} takes too long", self.seed);
            assert!(self.step(), "seed {}: nothing happens any more before {what}", self.seed);
        }
    }

    /// A new domain's number, with its place in xenstore.
    pub fn new_domain(&mut self) -> u16 {
        let domain = self.next_domain;
        self.next_domain += 1;
        self.machine.add_domain(domain, GUEST_FRAMES);
        let home = format!("/local/domain/{domain}");
        self.xs.write(0, &home, b"").expect("dom0 may write");
        self.xs.set_owner(&home, 0, &[domain]);
        domain
    }

    /// Puts an image of zeros on the share and a guest with habits before it; its disk is being
    /// attached. The number of the guest.
    pub fn add_guest(&mut self, format: Format, sectors: u64, habits: Habits) -> usize {
        let disk = self.new_disk();
        let path = format!("disk{disk}.{}", format.name());
        images::create(&mut self.host.files, &path, format, sectors, 0, None);
        let oracle = Oracle::new(disk, sectors);
        self.add_guest_on(&path, format, habits, oracle, "", Carrier::Vbd)
    }

    /// A number for a disk.
    pub fn new_disk(&mut self) -> u32 {
        self.next_disk += 1;
        self.next_disk - 1
    }

    /// A guest on an image that is there; `options` follow the path in `params`.
    pub fn add_guest_on(
        &mut self,
        path: &str,
        format: Format,
        habits: Habits,
        oracle: Oracle,
        options: &str,
        carrier: Carrier,
    ) -> usize {
        let mut line = self.line(&format!("/images/{path},format={}{options}", format.name()));
        line.carrier = carrier;
        if carrier == Carrier::Qdisk {
            line.params = format!("aio:{}", line.params);
        }
        let rng = self.rng.fork();
        self.guests.push(Guest::new(line.clone(), habits, oracle, rng));
        self.images.push(Image { path: path.to_string(), format, partition: None });
        self.start_when_attached(line)
    }

    /// Attaches the disk of the guest that was added last; it starts when that is done.
    fn start_when_attached(&mut self, line: DiskLine) -> usize {
        let index = self.guests.len() - 1;
        self.attach(&line);
        self.starting.push(index);
        index
    }

    /// Gives platter a disk with a partition for each of these images, and a guest before each;
    /// to be called before the world runs.
    pub fn add_disk(&mut self, kind: DiskKind, block_bytes: u32, guests: Vec<DiskGuest>) {
        let images: Vec<Vec<u8>> = guests.iter().map(DiskGuest::image).collect();
        let lengths: Vec<usize> = images.iter().map(Vec::len).collect();
        let (mut media, firsts) = partitioned(&lengths, block_bytes as usize);
        for (image, first) in images.iter().zip(&firsts) {
            media[*first..first + image.len()].copy_from_slice(image);
        }
        let (machine, xs) = (&mut self.machine, &mut self.xs);
        match kind {
            DiskKind::Blk => self.disks.blk = Some(Blk::new(machine, xs, media, block_bytes)),
            DiskKind::Nvme => self.disks.pci = Some(Pci::new(machine, xs, media, block_bytes)),
        }
        self.poke_disks();
        for (index, guest) in guests.into_iter().enumerate() {
            let DiskGuest { format, habits, options, .. } = guest;
            let (disk, number) = (kind.name(), index + 1);
            let name = format.name();
            let line = self.line(&format!("/{disk}/p{number},format={name}{options}"));
            let mut oracle = Oracle::new(self.new_disk(), guest.sectors);
            oracle.discards_are_wild = true;
            let rng = self.rng.fork();
            self.guests.push(Guest::new(line.clone(), habits, oracle, rng));
            let partition =
                Partition { disk: kind, first_byte: firsts[index], bytes: lengths[index] };
            let (path, partition) = (format!("{disk}-p{number}.{name}"), Some(partition));
            self.images.push(Image { path, format, partition });
            self.start_when_attached(line);
        }
    }

    /// Lets platter's disks look at the world soon.
    pub fn poke_disks(&mut self) {
        let (low, high) = self.disks.pace.latency_ns;
        let soon = self.now_ns + self.rng.between(low, high);
        self.schedule(Agent::Disks, soon);
    }

    /// The backend domain of platter's disk dies; what it had not flushed may be lost.
    pub fn kill_backend(&mut self) {
        let Some(blk) = &mut self.disks.blk else { return };
        blk.die(&mut self.machine, &mut self.xs, &mut self.disks.rng);
        self.guests.iter_mut().for_each(|guest| guest.oracle.cache_lost());
        self.pass_on_events();
    }

    /// The NVMe controller loses power for a moment, and its cache.
    pub fn cut_controller(&mut self) {
        let Some(nvme) = &self.machine.nvme else { return };
        let rng = &mut self.disks.rng;
        lose_cache(rng, |keep| nvme.borrow_mut().power_cut(keep));
        self.guests.iter_mut().for_each(|guest| guest.oracle.cache_lost());
    }

    /// `xl block-detach` of platter's disk: its backend closes it in order.
    pub fn detach_backend(&mut self) {
        let Some(blk) = &mut self.disks.blk else { return };
        blk.detach(&mut self.xs);
        self.poke_disks();
        self.pass_on_events();
    }

    /// The toolstack gives platter the disk again, from a new backend domain.
    pub fn revive_backend(&mut self) {
        let Some(blk) = &mut self.disks.blk else { return };
        blk.unplug(&mut self.xs);
        blk.plug(&mut self.machine, &mut self.xs);
        self.poke_disks();
        self.pass_on_events();
    }

    /// A disk line for a new domain.
    pub fn line(&mut self, params: &str) -> DiskLine {
        DiskLine {
            guest: self.new_domain(),
            devid: 51712,
            carrier: Carrier::Vbd,
            params: params.to_string(),
            writable: true,
            cdrom: false,
            protocol: None,
        }
    }

    pub fn attach(&mut self, line: &DiskLine) {
        self.toolstack.attach(&mut self.xs, line, self.now_ns);
        self.schedule(Agent::Toolstack, self.now_ns + MS);
        self.pass_on_events();
    }

    pub fn detach(&mut self, line: &DiskLine, force: bool) {
        self.toolstack.detach(&mut self.xs, line, force, self.now_ns);
        self.schedule(Agent::Toolstack, self.now_ns + MS);
        self.pass_on_events();
    }

    fn start_attached(&mut self) {
        let (xs, now_ns) = (&mut self.xs, self.now_ns);
        let (mut started, mut late) = (vec![], vec![]);
        for index in self.starting.clone() {
            let guest = &mut self.guests[index];
            let Some(verdict) = self.toolstack.verdict(&guest.line, true) else { continue };
            started.push(index);
            if verdict.outcome == Outcome::Done {
                guest.start(xs, now_ns);
                continue;
            }
            assert!(
                guest.habits.errors_allowed,
                "the disk of guest {} is not attached: {verdict:?}",
                guest.domain
            );
            guest.vanish();
            late.extend((verdict.outcome == Outcome::TimedOut).then(|| guest.line.clone()));
        }
        // A store that answers late makes libxl give up, and take the disk away.
        late.iter().for_each(|line| self.detach(line, true));
        self.starting.retain(|index| !started.contains(index));
        for index in started {
            self.schedule(Agent::Guest(index), self.now_ns + 1000);
        }
    }

    /// Lets an agent look at the world now.
    pub fn poke_guest(&mut self, index: usize) {
        self.schedule(Agent::Guest(index), self.now_ns + 1000);
    }

    /// Lets the host's 9p server look at the world now.
    pub fn poke_host(&mut self) {
        self.schedule(Agent::Host, self.now_ns + 1000);
        self.pass_on_events();
    }

    pub fn add_hostile(&mut self, hostile: Hostile) -> usize {
        self.hostiles.push(hostile);
        let index = self.hostiles.len() - 1;
        self.schedule(Agent::Hostile(index), self.now_ns + MS);
        index
    }

    /// The guest's domain is destroyed: it stops at once, the toolstack takes its disk away.
    pub fn destroy_guest(&mut self, index: usize) {
        self.guests[index].vanish();
        self.starting.retain(|starting| *starting != index);
        let line = self.guests[index].line.clone();
        self.detach(&line, true);
        self.machine.kill(line.guest);
    }

    /// Waits until every guest has done what it does.
    pub fn run_guests(&mut self, limit_ns: u64) {
        self.run_until("the guests' work", limit_ns, |world| {
            world.guests.iter().all(Guest::is_done)
        });
    }

    /// Detaches every disk in order, ends, and judges everything that is left.
    /// `lossy`: the store failed now and then, so that only what was flushed is sure.
    pub fn wind_up(&mut self, lossy: bool) {
        self.hostiles.iter_mut().for_each(|hostile| hostile.stopping = true);
        let lines: Vec<DiskLine> = self
            .guests
            .iter()
            .map(|guest| &guest.line)
            .chain(self.hostiles.iter().map(|hostile| &hostile.line))
            .filter(|line| self.xs.exists(&line.be()))
            .cloned()
            .collect();
        for line in &lines {
            let hostile = self.hostiles.iter().any(|hostile| hostile.line == *line);
            self.detach(line, hostile);
        }
        self.run_until("the toolstack's work", 60_000 * MS, |world| !world.toolstack.is_busy());
        for verdict in self.toolstack.verdicts.iter().filter(|verdict| !verdict.attach) {
            let hostile = self.hostiles.iter().any(|hostile| hostile.line == verdict.line);
            assert!(
                verdict.outcome == Outcome::Done || hostile,
                "seed {}: a detach failed: {verdict:?}",
                self.seed
            );
        }
        for index in 0..self.hostiles.len() {
            let domain = self.hostiles[index].domain;
            self.hostiles[index].check_memory(&self.machine);
            self.machine.kill(domain);
        }
        // A server that keeps an answer back is given up after half a minute.
        self.run_until("the end of every request", 60_000 * MS, |world| {
            world.server.as_ref().is_none_or(|server| server.census() == Default::default())
        });
        self.run_for(3000 * MS);
        self.check_idle();
        self.verify_images(lossy);
    }

    /// Nothing is attached: nothing may be held.
    pub fn check_idle(&mut self) {
        let seed = self.seed;
        let turns = self.turns;
        self.run_for(2000 * MS);
        let turns = self.turns - turns;
        assert!(turns <= 20, "seed {seed}: {turns} turns in two idle seconds");
        let server = self.server.as_ref().expect("the server lives");
        let census = server.census();
        assert!(census == Default::default(), "seed {seed}: left behind: {census:?}");
        let held = self.holdings();
        assert!(held.maps == 0, "seed {seed}: {} pages are still mapped", held.maps);
        // What serves its own disks keeps its grants from cycle to cycle.
        let (granted, mapped) = self.machine.grants_below(S, XENSTORED);
        assert!(granted == mapped, "seed {seed}: {granted} granted, the host maps {mapped}");
        for line in self.guests.iter().map(|g| &g.line) {
            let mapped = self.machine.mapped_by_others(line.guest);
            assert!(mapped == 0, "seed {seed}: pages of guest {} are mapped", line.guest);
        }
        let stale: Vec<String> = self
            .xs
            .owned(S)
            .into_iter()
            .filter(|path| path.contains("/backend/vbd") || path.contains("/backend/qdisk"))
            .filter(|path| !path.contains("/error/"))
            .chain(self.xs.owned(S).into_iter().filter(|path| path.contains("/data/disk/")))
            .collect();
        assert!(stale.is_empty(), "seed {seed}: nodes stay behind: {stale:?}");
        let dropped = platter_xen::ring::permits_dropped();
        assert!(dropped == 0, "seed {seed}: {dropped} requests were dropped unanswered");
    }

    pub fn holdings(&self) -> Holdings {
        self.machine.holdings(S)
    }

    /// Every image against its guest's history.
    pub fn verify_images(&self, after_cut: bool) {
        for (image, guest) in self.images.iter().zip(&self.guests) {
            let (path, format) = (&image.path, image.format);
            let Some(partition) = image.partition else {
                images::verify(&self.host.files, path, format, &guest.oracle, after_cut);
                continue;
            };
            let mut files = Files::new();
            files.fixed = true;
            files.put(path, self.disks.bytes(&self.machine, partition));
            images::verify(&files, path, format, &guest.oracle, after_cut);
        }
    }

    /// The power goes: platter and the host stop where they are, files keep what a disk keeps.
    pub fn cut_power(&mut self) {
        self.stop_platter();
        let (machine, xs) = (&mut self.machine, &mut self.xs);
        self.host.die(machine, xs, false);
        self.host.files.cut(&mut self.rng);
        self.disks.cut(&mut self.machine);
    }
}

/// A guest whose image lies in a partition.
pub struct DiskGuest {
    pub format: Format,
    pub sectors: u64,
    pub habits: Habits,
    pub options: String,
}

impl DiskGuest {
    /// The partition's first contents, with room for the image to fill up.
    fn image(&self) -> Vec<u8> {
        let mut files = Files::new();
        // The smallest block of a VHDX is 1 MiB.
        let block_bytes = if self.format == Format::Vhdx { 1 << 20 } else { 0 };
        images::create(&mut files, "image", self.format, self.sectors, block_bytes, None);
        let mut bytes = files.get("image").expect("just made").live.clone();
        let room = match self.format {
            Format::Raw => bytes.len(),
            _ => bytes.len() + self.sectors as usize * 512 * 2 + (4 << 20),
        };
        bytes.resize(room.next_multiple_of(4096), 0);
        bytes
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop_platter();
    }
}

fn setup(page: Region, port: Port) -> Setup {
    Setup { domid: DomId(S), xenstore_page: page, xenstore_port: port, heap_bytes: 8 << 20 }
}

/// What the toolstack made of the storage domain's own tree (libxl_create.c).
fn plant(xs: &mut Xenstore) {
    let home = format!("/local/domain/{S}");
    xs.write(0, &home, b"").expect("dom0 may write");
    xs.set_owner(&home, 0, &[S]);
    for ours in [
        "control/shutdown",
        "control/feature-poweroff",
        "control/feature-reboot",
        "data",
        "drivers",
        "feature",
        "attr",
        "error",
    ] {
        let path = format!("{home}/{ours}");
        xs.write(0, &path, b"").expect("dom0 may write");
        xs.set_owner(&path, S, &[]);
    }
}
