//! Finding what there is to serve: the backend tree, our own shares, and the toolstack's wish
//! that we end.
//!
//! One watch on the backend tree; each event leads to its device or to a scan for new ones, so
//! that merged or lost events cost nothing but a scan.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use platter_xen::DomId;
use platter_xen::xenbus::Kind;
use platter_xen::xenstore::{XsError, names};

use crate::device::Device;
use crate::fronts::{FrontKind, FrontSlot};
use crate::limits::FRONTS_MAX;
use crate::xs::{Purpose, Xs};

/// How the domain ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ending {
    Poweroff,
    Reboot,
}

/// How long images get to become clean before we end all the same.
const END_NS: u64 = 8_000_000_000;

const SHUTDOWN: &str = "control/shutdown";
const WATCH_BACKEND: u32 = 1;
const WATCH_SHUTDOWN: u32 = 2;
const WATCH_DEVICES: u32 = 3;
/// The directory of our own devices; shares may be given to a running domain.
const DEVICES: &str = "device";

pub struct Control {
    domid: DomId,
    /// `/local/domain/S/backend`.
    tree: String,
    fronts: Vec<FrontSlot>,
    /// Kinds of our own devices that are not listed yet.
    unlisted: usize,
    frames_max: usize,
    ready: bool,
    ending: Option<Ending>,
    ends_by_ns: Option<u64>,
    serial: u32,
    said_full: bool,
}

impl Control {
    /// `frames_max`: what the rings and pools of our own devices may take.
    pub fn new(domid: DomId, frames_max: usize, xs: &mut Xs) -> Control {
        let mut control = Control {
            domid,
            tree: format!("/local/domain/{}/backend", domid.0),
            fronts: Vec::new(),
            unlisted: FrontKind::ALL.len(),
            frames_max,
            ready: false,
            ending: None,
            ends_by_ns: None,
            serial: 0,
            said_full: false,
        };
        control.begin(xs);
        control
    }

    /// Sets the watches and looks around, at start and after a reset of the connection.
    pub fn begin(&mut self, xs: &mut Xs) {
        xs.surely_write("control/feature-poweroff", "1");
        xs.surely_write("control/feature-reboot", "1");
        xs.watch(SHUTDOWN, WATCH_SHUTDOWN);
        for kind in FrontKind::ALL {
            xs.list(kind.directory(), Purpose::Fronts(kind));
        }
        xs.watch(DEVICES, WATCH_DEVICES);
        xs.watch(&self.tree, WATCH_BACKEND);
        self.scan(xs, self.tree.clone(), 0);
    }

    pub fn is_ready(&self) -> bool {
        self.ready
    }

    pub fn fronts_mut(&mut self) -> impl Iterator<Item = &mut FrontSlot> {
        self.fronts.iter_mut()
    }

    pub fn front(&mut self, index: u8) -> Option<&mut FrontSlot> {
        self.fronts.get_mut(index as usize)
    }

    /// Our own devices.
    pub fn fronts(&self) -> impl Iterator<Item = &FrontSlot> {
        self.fronts.iter()
    }

    /// All devices of ours are known: a store that is not among them will not come.
    pub fn knows_fronts(&self) -> bool {
        self.unlisted == 0 && self.fronts.iter().all(FrontSlot::is_settled)
    }

    /// The ending asked for, and whether its time is up.
    pub fn ending(&mut self, now_ns: u64) -> Option<(Ending, bool)> {
        let ending = self.ending?;
        let by_ns = *self.ends_by_ns.get_or_insert(now_ns + END_NS);
        Some((ending, now_ns >= by_ns))
    }

    /// A watch fired.
    pub fn changed(&mut self, path: &str, xs: &mut Xs, devices: &mut [Option<Box<Device>>]) {
        if path == SHUTDOWN {
            xs.surely_read(SHUTDOWN, Purpose::Shutdown);
            return;
        }
        if let Some(below) = path.strip_prefix(DEVICES) {
            self.device_changed(xs, below);
            return;
        }
        self.fronts.iter_mut().filter(|f| f.concerns(path)).for_each(FrontSlot::look);
        let mut known = false;
        for device in devices.iter_mut().flatten().filter(|d| d.concerns(path)) {
            device.look = true;
            known |= path.len() >= device.be.len();
        }
        let Some(below) = path.strip_prefix(self.tree.as_str()).filter(|_| !known) else { return };
        let mut parts = below.trim_start_matches('/').split('/').filter(|part| !part.is_empty());
        match (parts.next(), parts.next(), parts.next()) {
            (Some(kind), Some(guest), Some(id)) => self.found(xs, devices, kind, guest, id),
            (Some(kind), Some(guest), None) => {
                self.scan(xs, format!("{}/{kind}/{guest}", self.tree), 2)
            }
            (Some(kind), None, _) => self.scan(xs, format!("{}/{kind}", self.tree), 1),
            (None, _, _) => self.scan(xs, self.tree.clone(), 0),
        }
    }

    /// Something below our own `device`: a device that is new, or not complete yet. What we wrote
    /// ourselves comes back here too, and means nothing.
    fn device_changed(&mut self, xs: &mut Xs, below: &str) {
        let mut parts = below.split('/').filter(|part| !part.is_empty());
        let (name, number) = (parts.next(), parts.next());
        // An event of a whole directory may stand for any number of others.
        let of = |kind: &FrontKind| name.is_none_or(|name| kind.name() == name);
        let Some(number) = number else {
            for kind in FrontKind::ALL.into_iter().filter(of) {
                xs.list(kind.directory(), Purpose::Fronts(kind));
            }
            let fronts = self.fronts.iter_mut().filter(|front| of(&front.kind()));
            return fronts.for_each(|front| front.look_at_own(None));
        };
        let Some(kind) = FrontKind::ALL.into_iter().find(of) else { return };
        match self.fronts.iter_mut().find(|front| front.is(kind, number)) {
            Some(front) => front.look_at_own(parts.next()),
            None => self.found_fronts(kind, number.as_bytes()),
        }
    }

    /// A list or a read of ours was answered.
    pub fn answered(
        &mut self,
        purpose: Purpose,
        result: Result<Vec<u8>, XsError>,
        xs: &mut Xs,
        devices: &mut [Option<Box<Device>>],
    ) {
        match (purpose, result) {
            (Purpose::Scan { path, depth }, result) => {
                self.ready = true;
                let Ok(payload) = result else { return };
                for name in names(&payload) {
                    self.scanned(xs, devices, &path, depth, name);
                }
            }
            (Purpose::Fronts(kind), result) => {
                self.unlisted = self.unlisted.saturating_sub(1);
                self.found_fronts(kind, &result.unwrap_or_default());
            }
            (Purpose::Shutdown, Ok(value)) => self.shutdown(xs, &value),
            _ => {}
        }
    }

    fn scan(&mut self, xs: &mut Xs, path: String, depth: u8) {
        xs.list(&path.clone(), Purpose::Scan { path, depth });
    }

    fn scanned(
        &mut self,
        xs: &mut Xs,
        devices: &mut [Option<Box<Device>>],
        path: &str,
        depth: u8,
        name: &str,
    ) {
        if depth < 2 {
            let kind_known = depth > 0 || matches!(name, "vbd" | "qdisk");
            if kind_known {
                self.scan(xs, format!("{path}/{name}"), depth + 1);
            }
            return;
        }
        let below = path.strip_prefix(self.tree.as_str()).unwrap_or("");
        let mut parts = below.trim_start_matches('/').split('/');
        if let (Some(kind), Some(guest)) = (parts.next(), parts.next()) {
            self.found(xs, devices, kind, guest, name);
        }
    }

    /// A directory `backend/KIND/GUEST/ID` exists, or did a moment ago.
    fn found(
        &mut self,
        xs: &mut Xs,
        devices: &mut [Option<Box<Device>>],
        kind: &str,
        guest: &str,
        id: &str,
    ) {
        let kind_known = match kind {
            "vbd" => Kind::Vbd,
            "qdisk" => Kind::Qdisk,
            _ => return,
        };
        let (Ok(domid), Ok(_)) = (guest.parse::<u16>(), id.parse::<u32>()) else { return };
        let name = format!("{kind}/{guest}/{id}");
        let be = format!("{}/{name}", self.tree);
        if devices.iter().flatten().any(|device| device.be == be) {
            return;
        }
        let Some(index) = devices.iter().position(Option::is_none) else {
            let limit = devices.len();
            if !core::mem::replace(&mut self.said_full, true) {
                log::warn!("disk {name} is refused: {limit} disks are the limit of one domain");
            }
            xs.surely_remove(&format!("{be}/state"));
            return;
        };
        self.serial += 1;
        let (index, serial) = (index as u16, self.serial);
        devices[index as usize] =
            Some(Box::new(Device::new(index, serial, kind_known, DomId(domid), be, name)));
    }

    fn found_fronts(&mut self, kind: FrontKind, payload: &[u8]) {
        let numbers: Vec<String> = names(payload).map(ToString::to_string).collect();
        // Shares divide what there is for rings; disks and controllers have one pool.
        let share = match kind {
            FrontKind::Share => self.frames_max / numbers.len().max(1),
            FrontKind::Disk | FrontKind::Pci => self.frames_max / 2,
        };
        for number in numbers {
            let known = self.fronts.iter().any(|front| front.is(kind, &number));
            if !known && self.fronts.len() < FRONTS_MAX {
                let index = self.fronts.len() as u8;
                self.fronts.push(FrontSlot::new(index, kind, &number, share));
            }
        }
    }

    fn shutdown(&mut self, xs: &mut Xs, value: &[u8]) {
        self.ending = match value {
            b"poweroff" | b"halt" => Some(Ending::Poweroff),
            b"reboot" => Some(Ending::Reboot),
            // Our own acknowledgement, or a suspend that we do not offer.
            _ => return,
        };
        let word = core::str::from_utf8(value).unwrap_or("?");
        log::info!("domain {}: {word} asked for; making every image clean", self.domid.0);
        xs.surely_write(SHUTDOWN, "");
    }
}
