//! PCI functions passed through to us: NVMe controllers become disks `nvme0`, `nvme1`, ...,
//! their namespaces `nvme0n1` and so on.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use platter_storage::any::AnyDevice;
use platter_storage::pcifront::{PciFound, PciStep, Pcifront};
use platter_xen::{Bus, DomId, Hypervisor};

use super::{Busy, Drive, FrontSlot, block_store};
use crate::engine::Engine;
use crate::stores::AnyStore;
use crate::xs::Xs;

pub(super) const BACK_KEYS: [&str; 2] = ["state", "num_devs"];

impl FrontSlot {
    pub(super) fn take_pci<H: Hypervisor>(
        &mut self,
        engine: &mut Engine<AnyStore>,
        hv: &mut H,
        domid: DomId,
    ) -> Result<(), &'static str> {
        block_store(engine, hv, self.frames_max)?;
        self.drive = Drive::Pci { front: Box::new(Pcifront::new(domid)) };
        Ok(())
    }

    /// Goes on looking for controllers behind the backend.
    pub(super) fn search<H: Hypervisor + Bus>(
        &mut self,
        engine: &mut Engine<AnyStore>,
        hv: &mut H,
        now_ns: u64,
    ) {
        let Drive::Pci { front } = &mut self.drive else { return };
        while let Some(found) = front.poll(hv, now_ns) {
            match found {
                PciFound::Nvme(device, nvme) => {
                    let Ok(store) = block_store(engine, hv, self.frames_max) else { return };
                    let number = store.count_named("nvme");
                    let name = format!("nvme{number}");
                    log::info!("{name} is an NVMe controller at {device:?}");
                    store.attach(&name, AnyDevice::Nvme(nvme));
                }
                PciFound::Refused(device, why) => {
                    log::warn!("PCI function {device:?} is not used: {why:?}");
                }
                PciFound::Unmapped(device, why) => {
                    log::warn!("the registers of {device:?} cannot be mapped: {why:?}");
                }
                PciFound::Unfit(device, why) => {
                    log::warn!("the NVMe controller at {device:?} cannot be used: {why:?}");
                }
            }
        }
    }

    /// The first round: how many functions there are.
    pub(super) fn pci_read<H: Hypervisor>(&mut self, xs: &mut Xs, hv: &mut H) {
        let keys: Vec<String> = Pcifront::keys(self.value("num_devs")).collect();
        if keys.is_empty() {
            return self.functions_read(xs, hv);
        }
        self.read(xs, Busy::Functions, keys.into_iter());
    }

    pub(super) fn functions_read<H: Hypervisor>(&mut self, xs: &mut Xs, hv: &mut H) {
        let keys: Vec<String> = Pcifront::keys(self.value("num_devs")).collect();
        let functions: Vec<Option<&Vec<u8>>> =
            keys.iter().map(|key| self.values.get(key)).collect();
        let state = self.values.get("state").map(Vec::as_slice);
        let Drive::Pci { front } = &mut self.drive else { return };
        match front.update(hv, state, &functions) {
            PciStep::Wait => {}
            PciStep::Write(nodes) => self.write(xs, &nodes),
            PciStep::Refused(why) => log::warn!("PCI passthrough cannot be set up: {why:?}"),
        }
    }
}
