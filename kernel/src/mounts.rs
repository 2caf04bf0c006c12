//! The storage domain's own 9p shares: found at start, brought up whenever their servers
//! appear, and again after they died.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use platter_storage::ninep::{BackNodes, Mount, MountStep, Session};
use platter_xen::xenstore::{XsError, decimal};
use platter_xen::{DomId, Hypervisor};

use crate::engine::{Engine, StoreSlot};
use crate::stores::AnyStore;
use crate::xs::{Purpose, Xs};

const FRONT_KEYS: [&str; 3] = ["tag", "backend", "backend-id"];
const BACK_KEYS: [&str; 4] = ["state", "versions", "max-rings", "max-ring-page-order"];

/// Watch tokens of the backends' states.
const WATCH_BASE: u32 = 100;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Busy {
    No,
    Front,
    Back,
    Writing,
}

/// One share.
pub struct MountSlot {
    index: u8,
    /// `device/9pfs/N`, ours to write.
    fe: String,
    be: String,
    tag: String,
    store: Option<u8>,
    mount: Option<Mount>,
    busy: Busy,
    outstanding: usize,
    values: BTreeMap<&'static str, Vec<u8>>,
    look: bool,
    was_up: bool,
    said: Option<platter_storage::ninep::MountFault>,
    frames_max: usize,
}

impl MountSlot {
    /// `number`: the share's place below `device/9pfs`. `frames_max`: for its rings.
    pub fn new(index: u8, number: &str, frames_max: usize) -> MountSlot {
        MountSlot {
            index,
            fe: format!("device/9pfs/{number}"),
            be: String::new(),
            tag: String::new(),
            store: None,
            mount: None,
            busy: Busy::No,
            outstanding: 0,
            values: BTreeMap::new(),
            look: true,
            was_up: false,
            said: None,
            frames_max,
        }
    }

    pub fn is_named(&self, number: &str) -> bool {
        self.fe.rsplit('/').next() == Some(number)
    }

    pub fn concerns(&self, path: &str) -> bool {
        !self.be.is_empty() && path.starts_with(self.be.as_str())
    }

    pub fn look(&mut self) {
        self.look = true;
    }

    /// Its turn: asks xenstore what it needs to know next.
    pub fn turn(&mut self, engine: &mut Engine<AnyStore>, xs: &mut Xs) {
        if let Some(store) = self.store {
            let AnyStore::NineP(client) = &engine.stores[store as usize].store;
            let session = client.session();
            let up = session == Session::Up;
            if up != self.was_up {
                self.was_up = up;
                let tag = &self.tag;
                match session {
                    Session::Up => log::info!("store '{tag}' is up"),
                    Session::Broken(why) => log::warn!("store '{tag}' is given up: {why}"),
                    _ => log::warn!("store '{tag}' lost its server; disks on it report errors"),
                }
            }
            self.look |= matches!(session, Session::Broken(_));
        }
        if self.busy != Busy::No || !self.look {
            return;
        }
        self.look = false;
        match self.mount {
            None => self.read(xs, Busy::Front, &FRONT_KEYS),
            Some(_) => self.read(xs, Busy::Back, &BACK_KEYS),
        }
    }

    fn read(&mut self, xs: &mut Xs, busy: Busy, keys: &[&'static str]) {
        self.busy = busy;
        self.values.clear();
        self.outstanding = 0;
        let below = if busy == Busy::Front { &self.fe } else { &self.be };
        for key in keys {
            let purpose = Purpose::MountKey { index: self.index, key };
            self.outstanding += xs.read(&format!("{below}/{key}"), purpose) as usize;
        }
        if self.outstanding == 0 {
            self.busy = Busy::No;
            self.look = true;
        }
    }

    /// A key was answered.
    pub fn key_read<H: Hypervisor>(
        &mut self,
        engine: &mut Engine<AnyStore>,
        xs: &mut Xs,
        hv: &mut H,
        key: &'static str,
        result: Result<Vec<u8>, XsError>,
    ) {
        if let Ok(value) = result {
            self.values.insert(key, value);
        }
        self.outstanding -= 1;
        if self.outstanding > 0 {
            return;
        }
        match core::mem::replace(&mut self.busy, Busy::No) {
            Busy::Front => self.front_read(engine, xs),
            Busy::Back => self.back_read(engine, xs, hv),
            Busy::No | Busy::Writing => {}
        }
    }

    /// The last of our writes was answered.
    pub fn written(&mut self) {
        self.busy = Busy::No;
        self.look = true;
    }

    fn text(&self, key: &str) -> Option<&str> {
        core::str::from_utf8(self.values.get(key)?).ok()
    }

    /// What the toolstack says of the share: the disks' paths begin with its tag.
    fn front_read(&mut self, engine: &mut Engine<AnyStore>, xs: &mut Xs) {
        let backend_id = self.values.get("backend-id").and_then(|text| decimal(text));
        let (Some(tag), Some(be), Some(id)) = (self.text("tag"), self.text("backend"), backend_id)
        else {
            return;
        };
        (self.tag, self.be) = (String::from(tag), String::from(be));
        let client = platter_storage::ninep::Client::new();
        let slot =
            StoreSlot { name: self.tag.clone(), store: AnyStore::NineP(client), full: false };
        if engine.store_named(&self.tag).is_some() || engine.stores.push(slot).is_err() {
            log::warn!("store '{}' is refused: its tag is taken, or there are too many", self.tag);
            return;
        }
        self.store = Some(engine.stores.len() as u8 - 1);
        self.mount = Some(Mount::new(DomId(id as u16), self.frames_max));
        xs.watch(&format!("{}/state", self.be), WATCH_BASE + self.index as u32);
        log::info!("store '{}' waits for its server", self.tag);
        self.look = true;
    }

    fn back_read<H: Hypervisor>(&mut self, engine: &mut Engine<AnyStore>, xs: &mut Xs, hv: &mut H) {
        let (Some(store), Some(mount)) = (self.store, &mut self.mount) else { return };
        let AnyStore::NineP(client) = &mut engine.stores[store as usize].store;
        let value = |key| self.values.get(key).map(Vec::as_slice);
        let back = BackNodes {
            state: value("state"),
            versions: value("versions"),
            max_rings: value("max-rings"),
            max_ring_page_order: value("max-ring-page-order"),
        };
        match mount.update(hv, client, back) {
            MountStep::Wait => {}
            MountStep::Refused(fault) => {
                if self.said != Some(fault) {
                    log::warn!("store '{}' cannot be brought up: {fault:?}", self.tag);
                    self.said = Some(fault);
                }
            }
            MountStep::Write(nodes) => {
                self.busy = Busy::Writing;
                let last = nodes.len().saturating_sub(1);
                for (index, (key, value)) in nodes.iter().enumerate() {
                    let purpose = match index == last {
                        true => Purpose::MountWritten { index: self.index },
                        false => Purpose::None,
                    };
                    xs.write(&format!("{}/{key}", self.fe), value, purpose);
                }
            }
        }
    }
}
