//! One backend device: what the toolstack and the frontend show in xenstore, and what we do
//! about it. The decision is [`xenbus::decide`]; this file carries it out.
//!
//! Level-triggered: any event makes the device look at both ends anew. One action at a time;
//! while its writes or reads are under way nothing else is decided. A refusal of xenstored is no
//! answer: nothing is decided from it, and after a pause the device looks again.

mod connect;
mod open;
mod publish;
mod resize;

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use platter_xen::vbd::Layout;
use platter_xen::xenbus::{self, Action, Kind, Memory, Rings, View, XenbusState};
use platter_xen::xenstore::XsError;
use platter_xen::{Bus, DomId, Hypervisor};

use crate::config::DiskConfig;
use crate::disk::Disk;
use crate::engine::Engine;
use crate::opening::Opening;
use crate::stores::AnyStore;
use crate::xs::{self, Awaited, Purpose, Xs};

/// Keys that the toolstack wrote for the disk (xen-facts: libxl's device_disk_add).
const DESCRIBE: [&str; 7] =
    ["frontend", "frontend-id", "params", "mode", "dev", "device-type", "discard-enable"];

/// Those of them that say which disk it is.
const IDENTITY: [&str; 3] = ["frontend", "params", "mode"];

/// What a batch of reads is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Batch {
    /// The disk's description.
    Describe,
    /// Both ends' states.
    Look,
    /// Whether the directory describes the same disk still.
    Identity,
    /// The frontend's shape: how many queues and pages.
    Shape,
    /// The frontend's rings.
    Keys,
    /// Whether a directory that we could not delete is still ours to delete.
    Last,
}

/// What is under way with xenstore.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Busy {
    No,
    Reading(Batch),
    /// Nodes beside its state; when all of them stand, this state is written.
    Publishing(Option<XenbusState>),
    Writing,
}

/// Between two lines about one disk's refused nodes: a guest makes us look at them.
const TROUBLE_LOG_NS: u64 = 5_000_000_000;

/// After so many refusals in a row our own directory is one that we may not see any more.
const ACCESS_TRIES: u32 = 8;

/// Where the image stands.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Stage {
    /// The description is not read yet.
    Unread,
    /// The store is not there, or full, or another disk still holds the file.
    WaitStore,
    /// The store was asked for the image's own file.
    AskTop,
    Opening(Opening),
    Ready,
    Failed,
    /// Marking the image clean; then this goes on.
    Finishing(Then),
    Finished,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Then {
    DeleteBackend,
    Forget,
    /// Another disk lies at the same path: forget this one, then look there.
    Replace,
}

/// What the server does after a device's turn.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    Stays,
    /// It is gone: drop it.
    Gone,
}

/// What a device may use of the server in its turn.
pub struct Surroundings<'a, H> {
    pub engine: &'a mut Engine<AnyStore>,
    pub xs: &'a mut Xs,
    pub hv: &'a mut H,
    pub now_ns: u64,
    /// Metadata cache for one image, bytes.
    pub cache_bytes: usize,
    /// All stores that will ever be are known by name.
    pub fronts_known: bool,
    /// Files held by the other devices.
    pub held: &'a [Held],
}

/// A file in use: two disks may share it only if neither writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Held {
    pub device: u16,
    pub store: u8,
    pub identity: u64,
    pub writable: bool,
    /// Its holder is on the way out.
    pub leaving: bool,
}

pub struct Device {
    pub index: u16,
    /// Tells answers to this device from answers to its predecessor in the same place.
    serial: u32,
    kind: Kind,
    pub guest: DomId,
    /// Backend directory, absolute.
    pub be: String,
    /// Frontend directory, absolute, once described.
    fe: Option<String>,
    /// `vbd/G/D`, for paths of our own.
    pub name: String,
    /// What the user calls it (`xvda`).
    vdev: String,
    config: Option<DiskConfig>,
    read_only: bool,
    cdrom: bool,
    discard: bool,
    stage: Stage,
    since_ns: u64,
    said_waiting: bool,
    /// What it was described by.
    identity: [Option<Vec<u8>>; 3],
    /// To be done if that is so still.
    due: Option<Action>,
    paths: Vec<String>,
    held: Vec<Held>,
    pub disk: Option<Disk>,
    rings: Rings,
    memory: Memory,
    connect_refused: bool,
    /// When the next refusal may be logged.
    refusal_shown_ns: u64,
    /// When the next broken ring may be logged.
    break_shown_ns: u64,
    layout: Option<Layout>,
    front_seen: Option<XenbusState>,
    busy: Busy,
    awaited: Awaited,
    /// How often something was refused in a row.
    refusals: u32,
    /// When the next refusal of xenstored may be logged.
    trouble_shown_ns: u64,
    /// The disk's size as it is being shown, and as it stands.
    showing: Option<u64>,
    shown_sectors: Option<u64>,
    values: BTreeMap<String, Vec<u8>>,
    /// Something may have changed: look.
    pub look: bool,
    pub wake_ns: Option<u64>,
    /// When a raw file's size is looked at next.
    size_ns: u64,
    /// The size that the disk should have, if larger than it is.
    wanted_sectors: u64,
    /// The size that it cannot have.
    refused_sectors: u64,
    /// The longest that the image's file was seen.
    file_bytes: u64,
    stats_shown: String,
    stats_ns: u64,
    fate: Fate,
}

impl Device {
    pub fn new(
        index: u16,
        serial: u32,
        kind: Kind,
        guest: DomId,
        be: String,
        name: String,
    ) -> Device {
        Device {
            index,
            serial,
            kind,
            guest,
            be,
            fe: None,
            name,
            vdev: String::new(),
            config: None,
            read_only: true,
            cdrom: false,
            discard: false,
            stage: Stage::Unread,
            since_ns: 0,
            said_waiting: false,
            identity: [const { None }; 3],
            due: None,
            paths: Vec::new(),
            held: Vec::new(),
            disk: None,
            rings: Rings::Down,
            memory: Memory::default(),
            connect_refused: false,
            refusal_shown_ns: 0,
            break_shown_ns: 0,
            layout: None,
            front_seen: None,
            busy: Busy::No,
            awaited: Awaited::default(),
            refusals: 0,
            trouble_shown_ns: 0,
            showing: None,
            shown_sectors: None,
            values: BTreeMap::new(),
            look: true,
            wake_ns: None,
            size_ns: 0,
            wanted_sectors: 0,
            refused_sectors: 0,
            file_bytes: 0,
            stats_shown: String::new(),
            stats_ns: 0,
            fate: Fate::Stays,
        }
    }

    pub fn held(&self) -> impl Iterator<Item = Held> + '_ {
        let leaving = matches!(self.stage, Stage::Finishing(_) | Stage::Finished);
        self.held.iter().map(move |held| Held { leaving, ..*held })
    }

    /// The watch token of its frontend's state.
    pub fn watch(&self) -> u32 {
        1000 + self.index as u32
    }

    /// Does an event at `path` concern it?
    pub fn concerns(&self, path: &str) -> bool {
        // A merged event names the watch's own path, above ours.
        path.starts_with(self.be.as_str())
            || self.be.starts_with(path)
            || self.fe.as_deref().is_some_and(|fe| path.starts_with(fe))
    }

    /// Carries the device on as far as it goes now.
    pub fn turn<H: Hypervisor + Bus>(&mut self, world: &mut Surroundings<'_, H>) -> Fate {
        if self.wake_ns.is_some_and(|wake_ns| world.now_ns >= wake_ns) {
            self.wake_ns = None;
            self.look = true;
        }
        self.open_on(world);
        self.release_on(world);
        self.finish_on(world);
        if self.stage == Stage::Finished {
            self.leave(world);
        }
        self.watch_size(world);
        self.resize_on(world);
        self.show_size(world);
        if self.busy == Busy::No && self.look && self.fate == Fate::Stays {
            self.look = false;
            match self.stage {
                Stage::Unread => {
                    self.since_ns = world.now_ns;
                    self.read(world, Batch::Describe, &DESCRIBE.map(|key| self.below_be(key)));
                }
                Stage::Finished => self.look_at_last(world),
                _ => self.read_states(world),
            }
        }
        self.show_stats(world);
        self.fate
    }

    /// Requests are taken from its rings.
    pub fn is_serving(&self) -> bool {
        self.rings == Rings::Up && self.stage == Stage::Ready
    }

    /// It serves, and nothing of it waits for a turn.
    pub fn is_steady(&self) -> bool {
        let waits = |disk: &Disk| {
            disk.kick || disk.growing || disk.flush.is_running() || !disk.waiting.is_empty()
        };
        let quiet = self.busy == Busy::No && !self.look && self.fate == Fate::Stays;
        self.is_serving() && quiet && !self.disk.as_ref().is_some_and(waits)
    }

    /// The domain ends: the image is made clean, whatever the guest does. True when it is.
    pub fn wind_up<H: Hypervisor + Bus>(&mut self, world: &mut Surroundings<'_, H>) -> bool {
        match self.rings {
            Rings::Up | Rings::Broken => self.begin_release(),
            Rings::Down => self.begin_finish(world, Then::Forget),
            Rings::Releasing => {}
        }
        self.release_on(world);
        self.disk.is_none()
    }

    fn below_be(&self, key: &str) -> String {
        format!("{}/{key}", self.be)
    }

    fn read_states<H>(&mut self, world: &mut Surroundings<'_, H>) {
        let mut paths = Vec::from(["state", "online", "resize"].map(|key| self.below_be(key)));
        paths.extend(self.fe.as_ref().map(|fe| format!("{fe}/state")));
        self.read(world, Batch::Look, &paths);
    }

    fn read<H>(&mut self, world: &mut Surroundings<'_, H>, batch: Batch, paths: &[String]) {
        self.busy = Busy::Reading(batch);
        self.values.clear();
        self.awaited = Awaited::default();
        for path in paths {
            let purpose =
                Purpose::DeviceKey { index: self.index, serial: self.serial, key: path.clone() };
            self.awaited.sent(world.xs.read(path, purpose));
        }
        if self.awaited.is_over() {
            self.try_later(world.now_ns);
        }
    }

    /// Whatever was under way was refused: looks again after a pause.
    fn try_later(&mut self, now_ns: u64) {
        self.busy = Busy::No;
        self.showing = None;
        self.refusals += 1;
        self.wake_ns = Some(now_ns + xs::pause_ns(self.refusals));
        if now_ns >= self.trouble_shown_ns {
            self.trouble_shown_ns = now_ns + TROUBLE_LOG_NS;
            log::warn!("disk {}: xenstore refuses its nodes; trying again", self.name);
        }
    }

    /// A key was answered.
    pub fn key_read<H: Hypervisor + Bus>(
        &mut self,
        world: &mut Surroundings<'_, H>,
        serial: u32,
        key: String,
        result: Result<Vec<u8>, XsError>,
    ) {
        if serial != self.serial {
            return;
        }
        let refused = match &result {
            Ok(_) | Err(XsError::NoEnt) => false,
            // So it reads when the guest is gone, or hides its nodes.
            Err(XsError::Access) if !key.starts_with(&self.be) => false,
            Err(XsError::Access) => self.refusals < ACCESS_TRIES,
            Err(_) => true,
        };
        self.values.extend(result.ok().map(|value| (key, value)));
        if !self.awaited.answered(refused) {
            return;
        }
        let Busy::Reading(batch) = core::mem::replace(&mut self.busy, Busy::No) else { return };
        if self.awaited.is_refused() {
            return self.try_later(world.now_ns);
        }
        self.refusals = 0;
        match batch {
            Batch::Describe => self.described(world),
            Batch::Look => self.decide(world),
            Batch::Identity => self.identity_read(world),
            Batch::Shape => self.shape_read(world),
            Batch::Keys => self.keys_read(world),
            Batch::Last => self.last_read(world),
        }
    }

    /// Our write of a state was answered.
    pub fn state_written(
        &mut self,
        serial: u32,
        state: XenbusState,
        now_ns: u64,
        result: Result<Vec<u8>, XsError>,
    ) {
        if serial != self.serial {
            return;
        }
        if result.is_err() {
            return self.try_later(now_ns);
        }
        self.memory.written(state, now_ns);
        self.shown_sectors = self.showing.take().or(self.shown_sectors);
        self.busy = Busy::No;
        self.look = true;
    }

    /// One of its other nodes was written: with the last one its state may be.
    pub fn node_written<H>(
        &mut self,
        world: &mut Surroundings<'_, H>,
        serial: u32,
        result: Result<Vec<u8>, XsError>,
    ) {
        if serial != self.serial {
            return;
        }
        if !self.awaited.answered(result.is_err()) {
            return;
        }
        let Busy::Publishing(state) = core::mem::replace(&mut self.busy, Busy::No) else { return };
        match state {
            _ if self.awaited.is_refused() => self.try_later(world.now_ns),
            Some(state) => self.write_state(world, state),
            None => self.shown_sectors = self.showing.take().or(self.shown_sectors),
        }
    }

    /// A removal was answered.
    pub fn removed<H: Hypervisor + Bus>(
        &mut self,
        world: &mut Surroundings<'_, H>,
        serial: u32,
        result: Result<Vec<u8>, XsError>,
    ) {
        if serial != self.serial {
            return;
        }
        if !matches!(result, Ok(_) | Err(XsError::NoEnt)) {
            return self.try_later(world.now_ns);
        }
        self.busy = Busy::No;
        match self.stage {
            Stage::Finished => self.deleted(world),
            _ => self.look = true,
        }
    }

    fn text(&self, key: &str) -> Option<&str> {
        let value = self.values.get(&self.below_be(key))?;
        core::str::from_utf8(value).ok()
    }

    fn described<H: Hypervisor + Bus>(&mut self, world: &mut Surroundings<'_, H>) {
        let front = format!("/local/domain/{}/", self.guest.0);
        let Some(fe) = self.text("frontend").filter(|fe| fe.starts_with(&front)) else {
            // Not complete yet, or not dom0's words: an event will come, or it goes away.
            self.stage = Stage::Unread;
            self.fate = if self.values.is_empty() { Fate::Gone } else { Fate::Stays };
            return;
        };
        self.fe = Some(String::from(fe));
        self.identity = self.identity_shown();
        self.vdev = self.text("dev").unwrap_or("?").to_string();
        self.read_only = self.text("mode") != Some("w");
        self.cdrom = self.text("device-type") == Some("cdrom");
        self.discard = self.text("discard-enable") != Some("0") && !self.read_only;
        world.xs.watch(&format!("{}/state", self.fe.as_deref().unwrap_or("")), self.watch());
        let params = self.text("params").unwrap_or("").to_string();
        match DiskConfig::parse(&params, self.kind == Kind::Qdisk) {
            Ok(config) => {
                self.config = Some(config);
                self.stage = Stage::WaitStore;
            }
            Err(fault) => self.fail(world, &fault.to_string()),
        }
        self.look = true;
    }

    fn image_state(&self) -> xenbus::Image {
        match self.stage {
            Stage::Ready | Stage::Finishing(_) | Stage::Finished => xenbus::Image::Ready,
            Stage::Failed => xenbus::Image::Failed,
            _ => xenbus::Image::Opening,
        }
    }

    /// Both ends' states are read: act.
    fn decide<H: Hypervisor + Bus>(&mut self, world: &mut Surroundings<'_, H>) {
        let state = |path: &str| {
            let text = self.values.get(path)?;
            Some(XenbusState::parse(text).unwrap_or(XenbusState::Unknown))
        };
        let front = self.fe.as_ref().and_then(|fe| state(&format!("{fe}/state")));
        let own = state(&self.below_be("state"));
        self.read_resize();
        if front != self.front_seen {
            self.connect_refused = false;
            self.front_seen = front;
        }
        let online = self.text("online").is_some_and(|online| online != "0");
        self.memory.saw_online(online, world.now_ns);
        let view = View {
            kind: self.kind,
            own,
            front,
            online,
            image: self.image_state(),
            rings: self.rings,
            connect_refused: self.connect_refused,
            memory: self.memory,
            now_ns: world.now_ns,
        };
        let action = xenbus::decide(&view);
        if self.memory.is_overwritten(own) {
            self.due = Some(action);
            return self.read(world, Batch::Identity, &IDENTITY.map(|key| self.below_be(key)));
        }
        self.act(world, action);
    }

    fn identity_shown(&self) -> [Option<Vec<u8>>; 3] {
        IDENTITY.map(|key| self.values.get(&self.below_be(key)).cloned())
    }

    /// Our state was overwritten: does the directory describe the disk that we serve?
    fn identity_read<H: Hypervisor + Bus>(&mut self, world: &mut Surroundings<'_, H>) {
        let Some(action) = self.due.take() else { return };
        let shown = self.identity_shown();
        if shown == self.identity {
            return self.act(world, action);
        }
        if shown.iter().all(Option::is_none) {
            // It went meanwhile: the next look says so.
            self.look = true;
        } else if self.rings == Rings::Down {
            self.begin_finish(world, Then::Replace);
        } else {
            self.act(world, Action::Release);
        }
    }

    /// The connection to xenstore began anew: no answer will come, no watch stands.
    pub fn begin_anew(&mut self, xs: &mut Xs) {
        (self.busy, self.showing, self.look) = (Busy::No, None, true);
        if let (Some(fe), false) = (&self.fe, self.stage == Stage::Finished) {
            xs.watch(&format!("{fe}/state"), self.watch());
        }
    }

    fn act<H: Hypervisor + Bus>(&mut self, world: &mut Surroundings<'_, H>, action: Action) {
        match action {
            Action::Wait => {}
            Action::WaitFor(ns) => self.wake_ns = Some(world.now_ns + ns),
            Action::Publish => self.publish(world),
            Action::Connect => self.read_shape(world),
            Action::Release => {
                self.begin_release();
                if let Some(disk) = &mut self.disk {
                    use XenbusState::{Closed, Initialising};
                    disk.unheard = matches!(self.front_seen, None | Some(Closed | Initialising));
                    disk.kick = true;
                }
                self.release_on(world);
            }
            Action::Write(state) => self.write_state(world, state),
            Action::DeleteState => {
                let purpose = Purpose::DeviceRemoved { index: self.index, serial: self.serial };
                self.busy = Busy::Writing;
                if !world.xs.remove(&self.below_be("state"), purpose) {
                    self.try_later(world.now_ns);
                }
            }
            Action::DeleteBackend => self.begin_finish(world, Then::DeleteBackend),
            Action::Forget => self.begin_finish(world, Then::Forget),
        }
    }

    fn write_state<H>(&mut self, world: &mut Surroundings<'_, H>, state: XenbusState) {
        let purpose = Purpose::DeviceState { index: self.index, serial: self.serial, state };
        let text = state.number().to_string();
        self.busy = Busy::Writing;
        if !world.xs.write(&self.below_be("state"), &text, purpose) {
            self.try_later(world.now_ns);
        }
    }
}
