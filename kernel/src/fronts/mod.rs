//! The storage domain's own devices: 9p shares, disks of other domains, PCI functions. Found at
//! start, brought up whenever their backends appear, and again after they died.
//!
//! One slot for each directory below `device/`. Level-triggered: any event makes a slot read
//! its backend's nodes anew and ask its machine (mount, blkfront or pcifront, all in storage)
//! what to write. What xenstored refuses is read or written again after a pause, and our state is
//! never written before all that it stands for.

mod disk;
mod health;
mod pci;
mod share;

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use platter_storage::any::AnyDevice;
use platter_storage::block_store::BlockStore;
use platter_storage::ninep::{Mount, MountFault};
use platter_xen::xenstore::{XsError, decimal};
use platter_xen::{Bus, DomId, Hypervisor, Port};

use crate::engine::{Engine, StoreSlot};
use crate::stores::AnyStore;
use crate::xs::{Awaited, Purpose, Xs, pause_ns};

/// Watch tokens of the backends' states.
const WATCH_BASE: u32 = 100;
/// Pages of the pool that carries the data of all disks: at most 4 MiB.
const POOL_PAGES_MAX: usize = 1024;
/// Operations of all disks at once.
const DISK_OPS_MAX: usize = 256;

/// The kind of a device, by the name of its directory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FrontKind {
    Share,
    Disk,
    Pci,
}

impl FrontKind {
    pub const ALL: [FrontKind; 3] = [FrontKind::Share, FrontKind::Disk, FrontKind::Pci];

    /// The name of their directory below `device`.
    pub fn name(self) -> &'static str {
        self.directory().trim_start_matches("device/")
    }

    /// The directory of our own that lists them.
    pub fn directory(self) -> &'static str {
        match self {
            FrontKind::Share => "device/9pfs",
            FrontKind::Disk => "device/vbd",
            FrontKind::Pci => "device/pci",
        }
    }
}

/// What a slot drives, once its nodes are read.
enum Drive {
    /// Nothing yet.
    Unread,
    Share {
        mount: Mount,
        store: u8,
        was_up: bool,
        said: Option<MountFault>,
    },
    /// A device of the block store.
    Disk {
        device: usize,
        was_up: bool,
    },
    Pci(pci::PciDrive),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Busy {
    No,
    Front,
    Back,
    /// The second round of a PCI backend: the functions that the first one counted.
    Functions,
    Writing,
}

/// One device of ours.
pub struct FrontSlot {
    index: u8,
    kind: FrontKind,
    /// `device/KIND/N`, ours to write.
    fe: String,
    be: String,
    /// What users call it: a share's tag, a disk's name.
    name: String,
    drive: Drive,
    busy: Busy,
    awaited: Awaited,
    /// How often something was refused in a row.
    refusals: u32,
    /// When to look again after that.
    wake_ns: Option<u64>,
    /// What its machine wants to stand below our directory and does not yet.
    unwritten: Vec<(String, String)>,
    values: BTreeMap<String, Vec<u8>>,
    look: bool,
    /// Our own directory changed: it may be gone, or name another backend.
    look_at_own: bool,
    frames_max: usize,
    said: health::Said,
    stats_ns: u64,
}

impl FrontSlot {
    /// `number`: the device's place below its directory. `frames_max`: for its rings or pool.
    pub fn new(index: u8, kind: FrontKind, number: &str, frames_max: usize) -> FrontSlot {
        FrontSlot {
            index,
            kind,
            fe: format!("{}/{number}", kind.directory()),
            be: String::new(),
            name: String::new(),
            drive: Drive::Unread,
            busy: Busy::No,
            awaited: Awaited::default(),
            refusals: 0,
            wake_ns: None,
            unwritten: Vec::new(),
            values: BTreeMap::new(),
            look: true,
            look_at_own: false,
            frames_max,
            said: health::Said::default(),
            stats_ns: 0,
        }
    }

    pub fn kind(&self) -> FrontKind {
        self.kind
    }

    pub fn is(&self, kind: FrontKind, number: &str) -> bool {
        self.kind == kind && self.fe.rsplit('/').next() == Some(number)
    }

    pub fn concerns(&self, path: &str) -> bool {
        !self.be.is_empty() && (path.starts_with(&self.be) || self.be.starts_with(path))
    }

    pub fn look(&mut self) {
        self.look = true;
    }

    /// Something of its own directory changed, `key` alone if that is known. It may not have
    /// been complete when it was read; a disk may be taken from us and given again.
    pub fn look_at_own(&mut self, key: Option<&str>) {
        self.look |= matches!(self.drive, Drive::Unread);
        let ours = !matches!(key, None | Some("backend" | "backend-id"));
        self.look_at_own |= matches!(self.drive, Drive::Disk { .. }) && !ours;
    }

    /// Its turn: notices what happened below it, and asks xenstore what it needs to know.
    pub fn turn<H: Hypervisor + Bus>(
        &mut self,
        engine: &mut Engine<AnyStore>,
        xs: &mut Xs,
        hv: &mut H,
        now_ns: u64,
    ) {
        match self.kind {
            FrontKind::Share => self.notice_share(engine),
            FrontKind::Disk => self.notice_disk(engine),
            FrontKind::Pci => self.search(engine, hv, now_ns),
        }
        self.show_stats(engine, xs, now_ns);
        if self.wake_ns.is_some_and(|wake_ns| now_ns < wake_ns) {
            return;
        }
        self.wake_ns = None;
        if self.busy == Busy::No && core::mem::take(&mut self.look_at_own) {
            self.values.clear();
            let keys = disk::OWN_KEYS.iter().map(|key| key.to_string());
            return self.read(xs, now_ns, Busy::Front, keys);
        }
        if self.busy == Busy::No && !self.unwritten.is_empty() {
            return self.write_on(xs, now_ns);
        }
        if self.busy != Busy::No || !self.look {
            return;
        }
        self.look = false;
        if self.be.is_empty() && !matches!(self.drive, Drive::Unread) {
            return;
        }
        let (busy, keys): (Busy, &[&str]) = match (&self.drive, self.kind) {
            (Drive::Unread, FrontKind::Share) => (Busy::Front, &share::FRONT_KEYS),
            (Drive::Unread, _) => (Busy::Front, &["backend", "backend-id"]),
            (_, FrontKind::Share) => (Busy::Back, &share::BACK_KEYS),
            (_, FrontKind::Disk) => (Busy::Back, &disk::BACK_KEYS),
            (_, FrontKind::Pci) => (Busy::Back, &pci::BACK_KEYS),
        };
        self.values.clear();
        self.read(xs, now_ns, busy, keys.iter().map(|key| key.to_string()));
    }

    /// The names of the stores behind it are known.
    pub fn is_settled(&self) -> bool {
        match &self.drive {
            Drive::Unread => false,
            Drive::Share { .. } | Drive::Disk { .. } => true,
            Drive::Pci(pci) => pci.front.is_settled(),
        }
    }

    /// When it must be looked after again even without an event.
    pub fn poll_at_ns(&self, now_ns: u64) -> Option<u64> {
        let drive_ns = match &self.drive {
            Drive::Pci(pci) => pci.poll_at_ns(now_ns),
            _ => None,
        };
        drive_ns.into_iter().chain(self.wake_ns).min()
    }

    /// An event channel of its own, beside those of its store.
    pub fn port(&self) -> Option<Port> {
        match &self.drive {
            Drive::Pci(pci) => pci.front.port(),
            _ => None,
        }
    }

    fn read(&mut self, xs: &mut Xs, now_ns: u64, busy: Busy, keys: impl Iterator<Item = String>) {
        self.busy = busy;
        self.awaited = Awaited::default();
        let below = if busy == Busy::Front { &self.fe } else { &self.be };
        for key in keys {
            let path = format!("{below}/{key}");
            let purpose = Purpose::FrontKey { index: self.index, key };
            self.awaited.sent(xs.read(&path, purpose));
        }
        if self.awaited.is_over() {
            self.try_later(now_ns);
        }
    }

    /// What was under way was refused: after a pause it is done again.
    fn try_later(&mut self, now_ns: u64) {
        let busy = core::mem::replace(&mut self.busy, Busy::No);
        let own = busy == Busy::Front && !matches!(self.drive, Drive::Unread);
        self.look_at_own |= own;
        self.look |= !own;
        self.refusals += 1;
        self.wake_ns = Some(now_ns + pause_ns(self.refusals));
    }

    /// The connection to xenstore began anew: no answer will come, no watch stands.
    pub fn begin_anew(&mut self, xs: &mut Xs) {
        self.busy = Busy::No;
        self.look = true;
        self.look_at_own(None);
        if !self.be.is_empty() {
            self.watch_backend(xs);
        }
    }

    /// A key was answered.
    pub fn key_read<H: Hypervisor + Bus>(
        &mut self,
        surroundings: (&mut Engine<AnyStore>, &mut Xs, &mut H),
        now_ns: u64,
        key: String,
        result: Result<Vec<u8>, XsError>,
    ) {
        let (engine, xs, hv) = surroundings;
        let refused = match &result {
            Ok(_) | Err(XsError::NoEnt) => false,
            // So it reads when the backend's domain is gone.
            Err(XsError::Access) => self.busy == Busy::Front,
            Err(_) => true,
        };
        self.values.extend(result.ok().map(|value| (key, value)));
        if !self.awaited.answered(refused) {
            return;
        }
        if self.awaited.is_refused() {
            return self.try_later(now_ns);
        }
        self.refusals = 0;
        match (core::mem::replace(&mut self.busy, Busy::No), self.kind) {
            (Busy::Front, _) if !matches!(self.drive, Drive::Unread) => {
                self.own_read(engine, xs, hv);
            }
            (Busy::Front, _) => self.front_read(engine, xs, hv),
            (Busy::Back, FrontKind::Share) => self.share_read(engine, hv),
            (Busy::Back, FrontKind::Disk) => self.disk_read(engine, hv),
            (Busy::Back, FrontKind::Pci) => self.pci_read(xs, hv, now_ns),
            (Busy::Functions, _) => self.functions_read(hv),
            (Busy::No | Busy::Writing, _) => {}
        }
        if self.busy == Busy::No && !self.unwritten.is_empty() {
            self.write_on(xs, now_ns);
        }
    }

    /// All but the last together; the last, our state, when the others stand.
    fn write_on(&mut self, xs: &mut Xs, now_ns: u64) {
        self.busy = Busy::Writing;
        self.awaited = Awaited::default();
        let now = self.unwritten.len().saturating_sub(1).max(1);
        for (key, value) in self.unwritten.iter().take(now) {
            let purpose = Purpose::FrontWritten { index: self.index };
            self.awaited.sent(xs.write(&format!("{}/{key}", self.fe), value, purpose));
        }
        if self.awaited.is_over() {
            self.try_later(now_ns);
        }
    }

    /// One of our writes was answered.
    pub fn written(&mut self, xs: &mut Xs, now_ns: u64, result: Result<Vec<u8>, XsError>) {
        if !self.awaited.answered(result.is_err()) {
            return;
        }
        if self.awaited.is_refused() {
            return self.try_later(now_ns);
        }
        self.refusals = 0;
        if self.unwritten.len() > 1 {
            self.unwritten = self.unwritten.split_off(self.unwritten.len() - 1);
            return self.write_on(xs, now_ns);
        }
        self.unwritten.clear();
        (self.busy, self.look) = (Busy::No, true);
    }

    /// Our domain ends: disks are closed, controllers shut down. True when that is done.
    pub fn wind_up<H: Hypervisor + Bus>(
        &mut self,
        engine: &mut Engine<AnyStore>,
        hv: &mut H,
        now_ns: u64,
    ) -> bool {
        let done = match self.kind {
            FrontKind::Share => true,
            FrontKind::Disk => self.leave_disk(engine),
            FrontKind::Pci => self.leave_pci(engine, hv, now_ns),
        };
        done && self.busy == Busy::No && self.unwritten.is_empty()
    }

    fn text(&self, key: &str) -> Option<&str> {
        core::str::from_utf8(self.values.get(key)?).ok()
    }

    fn value(&self, key: &str) -> Option<&[u8]> {
        self.values.get(key).map(Vec::as_slice)
    }

    /// The backend's directory and domain, as our own directory names them.
    fn named_backend(&self) -> Option<(String, DomId)> {
        let id =
            self.value("backend-id").and_then(decimal).and_then(|id| u16::try_from(id).ok())?;
        Some((self.text("backend")?.into(), DomId(id)))
    }

    /// Our own directory is read: who serves us.
    fn front_read<H: Hypervisor + Bus>(
        &mut self,
        engine: &mut Engine<AnyStore>,
        xs: &mut Xs,
        hv: &mut H,
    ) {
        let Some((be, domid)) = self.named_backend() else { return };
        self.be = be;
        let taken = match self.kind {
            FrontKind::Share => self.take_share(engine, domid),
            FrontKind::Disk => self.take_disk(engine, hv, domid),
            FrontKind::Pci => self.take_pci(engine, hv, domid),
        };
        match taken {
            Ok(()) => {
                self.watch_backend(xs);
                self.look = true;
            }
            Err(why) => log::warn!("{} is not used: {why}", self.fe),
        }
    }

    fn watch_backend(&self, xs: &mut Xs) {
        xs.watch(&format!("{}/state", self.be), WATCH_BASE + u32::from(self.index));
    }

    fn forget_backend(&mut self, xs: &mut Xs) {
        if !self.be.is_empty() {
            xs.unwatch(&format!("{}/state", self.be), WATCH_BASE + u32::from(self.index));
            self.be.clear();
        }
    }

    /// Nodes to be written below our own directory, their last the state.
    fn write(&mut self, nodes: Vec<(String, String)>) {
        self.unwritten = nodes;
    }
}

/// The block store's place among the stores; made when the first device needs it.
fn block_store<'a, H: Hypervisor>(
    engine: &'a mut Engine<AnyStore>,
    hv: &mut H,
    frames_max: usize,
) -> Result<&'a mut BlockStore<AnyDevice>, &'static str> {
    let is_block = |slot: &StoreSlot<AnyStore>| matches!(slot.store, AnyStore::Block(_));
    let place = match engine.stores.iter().position(is_block) {
        Some(place) => place,
        None => {
            let store = BlockStore::new(hv, frames_max.min(POOL_PAGES_MAX), DISK_OPS_MAX)
                .ok_or("no memory for its data: raise memory= of the storage domain")?;
            let store = AnyStore::Block(Box::new(store));
            let slot = StoreSlot { name: String::new(), store, full: false };
            engine.stores.push(slot).map_err(|_| "too many stores")?;
            engine.stores.len() - 1
        }
    };
    match &mut engine.stores[place].store {
        AnyStore::Block(store) => Ok(store),
        AnyStore::NineP(_) => unreachable!("found by its kind"),
    }
}
