//! The server's turn: answers in, requests on, answers out; then what it waits for.
//!
//! Fairness: disks are served round-robin, each for a quantum, and each may hold its share of
//! the request table; what finds no room in a store is tried again in the same order.

use alloc::boxed::Box;
use alloc::vec::Vec;

use platter_storage::{Answer, Done, Store};
use platter_xen::{Bus, DomId, Hypervisor, Port, Region};

use crate::control::{Control, Ending};
use crate::device::{Device, Fate, Held, Surroundings};
use crate::disk::Disk;
use crate::engine::{Engine, OpKind};
use crate::fault::Fault;
use crate::limits::{
    CACHE_BYTES_MAX, CACHE_BYTES_MIN, CONTENDED_NS, DISKS_MAX, FLUSH_AFTER_NS, OPS_KEPT, OPS_MAX,
    REQUESTS_CALM_MAX, REQUESTS_KEPT, REQUESTS_MAX, REQUESTS_PER_DISK_MIN,
};
use crate::stores::AnyStore;
use crate::table::Id;
use crate::transfer::Owner;
use crate::xs::{Xs, XsEvent};

/// What the machine tells the server at start.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub domid: DomId,
    pub xenstore_page: Region,
    pub xenstore_port: Port,
    /// Bytes of the heap: metadata caches take a part of it.
    pub heap_bytes: usize,
}

/// What the caller does after a turn.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Turn {
    /// There is more to do: another turn.
    Again,
    /// Nothing until an event at one of [`Server::ports`], or this time.
    Sleep { until_ns: u64 },
    /// The toolstack asked for it, and everything is durable.
    End(Ending),
}

/// What a server has under way: all zero when no disk is attached.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Census {
    pub devices: usize,
    pub requests: usize,
    /// Store operations.
    pub ops: usize,
    /// Copy jobs.
    pub jobs: usize,
}

/// The storage domain's server.
pub struct Server {
    engine: Engine<AnyStore>,
    xs: Xs,
    control: Control,
    devices: Vec<Option<Box<Device>>>,
    ports: Vec<Port>,
    /// How many of them are not a disk's rings: xenstore's and the stores', at the start.
    own_ports: usize,
    /// The files in use, as of the last opening.
    held: Vec<Held>,
    /// Where the round-robin starts.
    first: usize,
    cache_bytes: usize,
}

impl Server {
    /// Takes all memory that serving needs and begins to look for shares and disks.
    pub fn new<H: Hypervisor + Bus>(hv: &mut H, setup: Setup) -> Server {
        let engine = Engine::new(hv);
        let mut devices = Vec::new();
        devices.resize_with(DISKS_MAX, || None);
        let mut xs = Xs::new(hv, setup.xenstore_page, setup.xenstore_port);
        // Half of what is left carries the rings of 9p shares; disks need scratch regions too.
        let control = Control::new(setup.domid, hv.frames_left() / 2, &mut xs);
        Server {
            engine,
            xs,
            control,
            devices,
            ports: Vec::new(),
            own_ports: 0,
            held: Vec::new(),
            first: 0,
            cache_bytes: (setup.heap_bytes / 16).clamp(CACHE_BYTES_MIN, CACHE_BYTES_MAX),
        }
    }

    /// The event channels to sleep on.
    pub fn ports(&self) -> &[Port] {
        &self.ports
    }

    /// What is under way, for tests that look for leaks.
    pub fn census(&self) -> Census {
        Census {
            devices: self.devices.iter().flatten().count(),
            requests: self.engine.requests.len(),
            ops: self.engine.ops.len(),
            jobs: self.engine.jobs.len(),
        }
    }

    /// Shares and disks are being looked for; the first answers of xenstore have come.
    pub fn is_ready(&self) -> bool {
        self.control.is_ready()
    }

    /// One turn.
    pub fn poll<H: Hypervisor + Bus>(&mut self, hv: &mut H, now_ns: u64) -> Turn {
        self.clear_events(hv);
        let mut went_on = self.take_answers(hv, now_ns);
        let changed = self.take_control(hv, now_ns);
        went_on |= self.serve(hv, now_ns);
        let ending = self.end(hv, now_ns);
        self.settle_copies(hv);
        self.engine.stores.iter_mut().for_each(|slot| slot.store.push(hv));
        if let Some(ending) = ending {
            return Turn::End(ending);
        }
        if changed || went_on && !self.is_calm() {
            return Turn::Again;
        }
        self.before_sleep(hv, now_ns)
    }

    /// Another turn would find nothing: whatever comes now rings. With more requests under way
    /// another turn is worth it, for what comes meanwhile needs no event then.
    fn is_calm(&self) -> bool {
        self.has_little_to_do() && self.devices.iter().flatten().all(|device| device.is_steady())
    }

    /// So few requests are under way that an event may wait for the end of the turn, which is near.
    /// With more of them whoever waits for it should have it before other bytes are copied.
    pub fn has_little_to_do(&self) -> bool {
        self.engine.requests.len() <= REQUESTS_CALM_MAX
    }

    /// Before anything is looked at: an event that comes later is not lost then.
    fn clear_events<H: Hypervisor + Bus>(&mut self, hv: &mut H) {
        for port in &self.ports[..self.own_ports] {
            hv.take_pending(*port);
        }
    }

    /// Answers of the stores go to whoever asked.
    fn take_answers<H: Hypervisor + Bus>(&mut self, hv: &mut H, now_ns: u64) -> bool {
        let (mut went_on, mut freed) = (false, false);
        for store in 0..self.engine.stores.len() {
            while let Some(done) = self.engine.stores[store].store.poll(hv, now_ns) {
                self.engine.stores[store].full = false;
                went_on = true;
                self.dispatch(hv, now_ns, store as u8, done);
            }
        }
        // The bytes of all that was read go to the guests together, then their room is given
        // back; what goes on after that may take it.
        self.engine.copies.run(hv);
        for slot in &mut self.engine.stores {
            slot.store.release(hv);
            let made_room = Store::<H>::made_room(&mut slot.store);
            slot.full &= !went_on && !made_room;
            freed |= made_room;
        }
        self.settle_copies(hv);
        if went_on | freed {
            self.devices.iter_mut().flatten().filter_map(|d| d.disk.as_mut()).for_each(|disk| {
                disk.kick = true;
            });
        }
        went_on
    }

    fn dispatch<H: Hypervisor + Bus>(&mut self, hv: &mut H, now_ns: u64, store: u8, done: Done) {
        // A tag that is not ours: the store made it up.
        let Ok(place) = u16::try_from(done.tag.0) else { return };
        let id = Id(place);
        let Some(op) = self.engine.ops.find(id) else { return };
        let index = op.disk as usize;
        if op.kind == OpKind::Open {
            self.engine.ops.take(id);
            self.held.clear();
            self.held.extend(self.devices.iter().flatten().flat_map(|device| device.held()));
            let answered = self.with_device(index, hv, now_ns, |device, world| {
                device.file_answer(world, store, done.result);
            });
            if let (false, Ok(Answer::Opened(opened))) = (answered, done.result) {
                self.engine.stores[store as usize].store.close(hv, opened.file);
            }
            return;
        }
        let size = op.kind == OpKind::Size;
        let Some(device) = &mut self.devices[index] else { return self.engine.orphaned(id) };
        if size {
            self.engine.ops.take(id);
            return device.size_answer(done.result);
        }
        match &mut device.disk {
            Some(disk) => disk.answered(&mut self.engine, hv, id, done.result),
            None => self.engine.orphaned(id),
        }
    }

    /// Runs the copies that are queued, and tells their owners.
    fn settle_copies<H: Hypervisor + Bus>(&mut self, hv: &mut H) {
        self.engine.copies.run(hv);
        let mut count = 0;
        while let Some((owner, status)) = self.engine.copies.outcome(count) {
            count += 1;
            let index = match owner {
                Owner::Piece { disk, .. } => disk,
                Owner::Op(id) => self.engine.ops.get(id).disk,
            };
            let device = self.devices[index as usize].as_mut();
            let result = if status == 0 { Ok(()) } else { Err(Fault::Grant(status)) };
            match (device.and_then(|device| device.disk.as_mut()), owner) {
                (Some(disk), _) => disk.copied(&mut self.engine, hv, owner, result),
                (None, Owner::Op(id)) => self.engine.orphaned(id),
                (None, Owner::Piece { .. }) => {}
            }
        }
        self.engine.copies.forget(count);
    }

    /// Runs `act` on a device with its surroundings; false when there is no such device.
    fn with_device<H: Hypervisor + Bus>(
        &mut self,
        index: usize,
        hv: &mut H,
        now_ns: u64,
        act: impl FnOnce(&mut Device, &mut Surroundings<'_, H>),
    ) -> bool {
        let Some(device) = &mut self.devices[index] else { return false };
        let mut world = Surroundings {
            engine: &mut self.engine,
            xs: &mut self.xs,
            hv,
            now_ns,
            cache_bytes: self.cache_bytes,
            fronts_known: self.control.knows_fronts(),
            held: &self.held,
        };
        act(device, &mut world);
        true
    }

    /// xenstore: what changed, what was answered, and each device's turn.
    fn take_control<H: Hypervisor + Bus>(&mut self, hv: &mut H, now_ns: u64) -> bool {
        let mut went_on = false;
        while let Some(event) = self.xs.poll(hv, now_ns) {
            went_on = true;
            match event {
                XsEvent::Watch { path } => {
                    self.control.changed(&path, &mut self.xs, &mut self.devices)
                }
                XsEvent::Reply { purpose, result } => {
                    self.reply(hv, now_ns, purpose, result);
                }
                XsEvent::Reset => {
                    log::warn!("the connection to xenstore began anew");
                    self.control.begin(&mut self.xs);
                    let devices = self.devices.iter_mut().flatten();
                    devices.for_each(|device| device.begin_anew(&mut self.xs));
                    let fronts = self.control.fronts_mut();
                    fronts.for_each(|front| front.begin_anew(&mut self.xs));
                }
                XsEvent::Dead => log::error!("the connection to xenstore is dead"),
            }
        }
        for front in self.control.fronts_mut() {
            front.turn(&mut self.engine, &mut self.xs, hv, now_ns);
        }
        for index in 0..self.devices.len() {
            let mut fate = Fate::Stays;
            self.with_device(index, hv, now_ns, |device, world| fate = device.turn(world));
            if fate == Fate::Gone {
                self.devices[index] = None;
                went_on = true;
            }
        }
        went_on
    }

    fn reply<H: Hypervisor + Bus>(
        &mut self,
        hv: &mut H,
        now_ns: u64,
        purpose: crate::xs::Purpose,
        result: Result<Vec<u8>, platter_xen::xenstore::XsError>,
    ) {
        use crate::xs::Purpose;
        match purpose {
            Purpose::DeviceKey { index, serial, key } => {
                self.with_device(index as usize, hv, now_ns, |device, world| {
                    device.key_read(world, serial, key, result);
                });
            }
            Purpose::DeviceState { index, serial, state } => {
                self.with_device(index as usize, hv, now_ns, |device, _| {
                    device.state_written(serial, state, now_ns, result);
                });
            }
            Purpose::DeviceWritten { index, serial } => {
                self.with_device(index as usize, hv, now_ns, |device, world| {
                    device.node_written(world, serial, result);
                });
            }
            Purpose::DeviceRemoved { index, serial } => {
                self.with_device(index as usize, hv, now_ns, |device, world| {
                    device.removed(world, serial, result);
                });
            }
            Purpose::FrontKey { index, key } => {
                let (engine, xs) = (&mut self.engine, &mut self.xs);
                if let Some(front) = self.control.front(index) {
                    front.key_read((engine, xs, hv), now_ns, key, result);
                }
            }
            Purpose::FrontWritten { index } => {
                if let Some(front) = self.control.front(index) {
                    front.written(&mut self.xs, now_ns, result);
                }
            }
            other => self.control.answered(other, result, &mut self.xs, &mut self.devices),
        }
    }

    /// Requests: taken, planned, carried on, answered.
    fn serve<H: Hypervisor + Bus>(&mut self, hv: &mut H, now_ns: u64) -> bool {
        let serving = self.devices.iter().flatten().filter(|d| d.is_serving()).count();
        let each = |count: usize| count / serving.max(1);
        let share = each(REQUESTS_MAX - REQUESTS_KEPT).max(REQUESTS_PER_DISK_MIN);
        let ops_share = each(OPS_MAX - OPS_KEPT);
        let wants_little =
            |disk: &Disk| disk.is_light() && disk.taken_ns.saturating_add(CONTENDED_NS) > now_ns;
        let disks = self.devices.iter().flatten().filter_map(|device| device.disk.as_ref());
        let light = disks.filter(|disk| wants_little(disk)).count();
        let count = self.devices.len();
        let mut went_on = false;
        let mut next_first = None;
        for turn in 0..count {
            let index = (self.first + turn) % count;
            let Some(device) = &mut self.devices[index] else { continue };
            let serving = device.is_serving();
            let Some(disk) = &mut device.disk else { continue };
            if disk.is_quiet() && !serving {
                // It has nothing to try again; left standing, this would keep the domain awake.
                disk.kick = false;
                continue;
            }
            (disk.share, disk.ops_share) = (share, ops_share);
            disk.contended = light > usize::from(wants_little(disk));
            for queue in &mut disk.queues {
                // While there is always work nothing is asked for by an event: look.
                let waits = serving && queue.ring.has_requests(hv);
                queue.active |= hv.take_pending(queue.port) | waits;
            }
            // Whoever had work first now is last in the next turn; idle disks and empty places
            // have no turn of their own, or the disk behind them would be first nearly always.
            if disk.has_work() {
                next_first.get_or_insert((index + 1) % count);
            }
            if disk.kick {
                went_on |= disk.retry(&mut self.engine, hv);
                disk.pump_jobs(&mut self.engine, hv);
            }
            if serving && disk.queues.iter().any(|queue| queue.active) {
                went_on |= disk.take_requests(&mut self.engine, hv, now_ns);
            }
            disk.lazy_flush(now_ns, FLUSH_AFTER_NS);
            disk.pump_flush(&mut self.engine, hv);
        }
        self.first = next_first.unwrap_or(self.first);
        self.settle_copies(hv);
        for device in self.devices.iter_mut().flatten() {
            if let Some(disk) = &mut device.disk {
                went_on |= disk.kick;
                disk.publish(hv);
                device.check_rings(now_ns);
            }
        }
        went_on
    }

    /// Asks for events, looks once more, and says how long there is nothing to do.
    fn before_sleep<H: Hypervisor + Bus>(&mut self, hv: &mut H, now_ns: u64) -> Turn {
        let idle_ns = now_ns.saturating_add(IDLE_NS);
        let mut until_ns = idle_ns.min(self.xs.poll_at_ns().unwrap_or(u64::MAX));
        self.ports.clear();
        self.ports.push(self.xs.port());
        let mut more = self.xs.is_unsent();
        for slot in &self.engine.stores {
            slot.store.ports(&mut self.ports);
            until_ns = until_ns.min(Store::<H>::poll_at_ns(&slot.store).unwrap_or(u64::MAX));
        }
        for front in self.control.fronts() {
            self.ports.extend(front.port());
            until_ns = until_ns.min(front.poll_at_ns(now_ns).unwrap_or(u64::MAX));
        }
        more |= until_ns <= now_ns;
        self.own_ports = self.ports.len();
        for device in self.devices.iter_mut().flatten() {
            until_ns = until_ns.min(device.wake_ns.unwrap_or(u64::MAX));
            let serving = device.is_serving();
            let Some(disk) = &mut device.disk else { continue };
            // The last request before it grows may have ended in this turn.
            more |= disk.growing && disk.requests == 0 && disk.ops == 0;
            if serving {
                let wait_ns = disk.throttle.wait_ns();
                let ready = disk.final_check(hv) && disk.may_take(&self.engine, 0);
                match ready {
                    true if wait_ns == 0 => more = true,
                    true => until_ns = until_ns.min(now_ns.saturating_add(wait_ns)),
                    false => {}
                }
            }
            self.ports.extend(disk.queues.iter().map(|queue| queue.port));
        }
        if more { Turn::Again } else { Turn::Sleep { until_ns } }
    }

    /// A shutdown asked for: every image is marked clean and flushed first, within a bound.
    fn end<H: Hypervisor + Bus>(&mut self, hv: &mut H, now_ns: u64) -> Option<Ending> {
        let (ending, late) = self.control.ending(now_ns)?;
        let mut open = false;
        for index in 0..self.devices.len() {
            self.with_device(index, hv, now_ns, |device, world| open |= !device.wind_up(world));
        }
        if !open {
            for front in self.control.fronts_mut() {
                open |= !front.wind_up(&mut self.engine, hv, now_ns);
            }
        }
        let done = !open && self.xs.is_idle();
        (done || late).then_some(ending)
    }
}

/// The longest sleep: statistics and lost events are looked after at least this often.
const IDLE_NS: u64 = 500_000_000;
