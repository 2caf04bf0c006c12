//! A 9p share: its tag is the first word of a disk's path.

use alloc::boxed::Box;
use alloc::string::String;

use platter_storage::ninep::{BackNodes, Client, Mount, MountStep, Session};
use platter_xen::{DomId, Hypervisor};

use super::{Drive, FrontSlot};
use crate::engine::{Engine, StoreSlot};
use crate::stores::AnyStore;

pub(super) const FRONT_KEYS: [&str; 3] = ["tag", "backend", "backend-id"];
pub(super) const BACK_KEYS: [&str; 4] = ["state", "versions", "max-rings", "max-ring-page-order"];

impl FrontSlot {
    pub(super) fn take_share(
        &mut self,
        engine: &mut Engine<AnyStore>,
        domid: DomId,
    ) -> Result<(), &'static str> {
        self.name = self.text("tag").map(String::from).ok_or("it has no tag")?;
        if engine.store_named(&self.name).is_some() {
            return Err("its tag is taken");
        }
        let name = self.name.clone();
        let store = AnyStore::NineP(Box::new(Client::new()));
        let slot = StoreSlot { name, store, full: false };
        engine.stores.push(slot).map_err(|_| "too many stores")?;
        let store = engine.stores.len() as u8 - 1;
        let mount = Mount::new(domid, self.frames_max);
        self.drive = Drive::Share { mount, store, was_up: false, said: None };
        log::info!("store '{}' waits for its server", self.name);
        Ok(())
    }

    /// Says when the session comes and goes, and looks again when it broke.
    pub(super) fn notice_share(&mut self, engine: &Engine<AnyStore>) {
        let Drive::Share { store, was_up, .. } = &mut self.drive else { return };
        let AnyStore::NineP(client) = &engine.stores[*store as usize].store else { return };
        let session = client.session();
        let up = session == Session::Up;
        if up != core::mem::replace(was_up, up) {
            let name = &self.name;
            match session {
                Session::Up => log::info!("store '{name}' is up"),
                Session::Broken(why) => log::warn!("store '{name}' is given up: {why}"),
                _ => log::warn!("store '{name}' lost its server; its disks report errors"),
            }
        }
        self.look |= matches!(session, Session::Broken(_));
    }

    pub(super) fn share_read<H: Hypervisor>(&mut self, engine: &mut Engine<AnyStore>, hv: &mut H) {
        let values = &self.values;
        let value = |key: &str| values.get(key).map(|value| value.as_slice());
        let back = BackNodes {
            state: value("state"),
            versions: value("versions"),
            max_rings: value("max-rings"),
            max_ring_page_order: value("max-ring-page-order"),
        };
        let Drive::Share { mount, store, said, .. } = &mut self.drive else { return };
        let AnyStore::NineP(client) = &mut engine.stores[*store as usize].store else { return };
        match mount.update(hv, client, back) {
            MountStep::Wait => {}
            MountStep::Refused(fault) => {
                if said.replace(fault) != Some(fault) {
                    log::warn!("store '{}' cannot be brought up: {fault:?}", self.name);
                }
            }
            MountStep::Write(nodes) => self.write(nodes),
        }
    }
}
