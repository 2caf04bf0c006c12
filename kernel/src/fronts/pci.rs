//! PCI functions passed through to us: NVMe controllers become disks `nvme0`, `nvme1`, ...,
//! their namespaces `nvme0n1` and so on.
//!
//! Guards that a function is given back to pciback only after its controller was shut down, and
//! that one which comes back takes its old place, under its old name.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use platter_storage::any::AnyDevice;
use platter_storage::block_store::BlockStore;
use platter_storage::nvme::Nvme;
use platter_storage::pcifront::{PciFound, PciStep, Pcifront};
use platter_xen::pciif::Device;
use platter_xen::{Bus, DomId, Hypervisor};

use super::health::Said;
use super::{Busy, Drive, FrontSlot, block_store};
use crate::engine::Engine;
use crate::stores::AnyStore;
use crate::xs::Xs;

pub(super) const BACK_KEYS: [&str; 2] = ["state", "num_devs"];

/// How soon to look again whether a controller has shut down: no event tells.
const SHUTDOWN_LOOK_NS: u64 = 1_000_000;

/// A controller that was found.
struct Controller {
    device: Device,
    /// Its place among the devices of the block store.
    index: usize,
    said: Said,
}

/// What a PCI slot drives.
pub(super) struct PciDrive {
    pub front: Box<Pcifront>,
    /// The controllers, also those that are away.
    found: Vec<Controller>,
    /// Functions that are being taken from us.
    going: Vec<Device>,
    /// Our domain ends, and they are shutting down.
    leaving: bool,
}

impl PciDrive {
    /// Shuts controllers down; true when all of those meant are.
    fn shut_down<H: Hypervisor + Bus>(
        &self,
        store: &mut BlockStore<AnyDevice>,
        hv: &mut H,
        now_ns: u64,
        meant: impl Fn(&Device) -> bool,
    ) -> bool {
        let mut done = true;
        for controller in self.found.iter().filter(|it| meant(&it.device)) {
            if let (AnyDevice::Nvme(nvme), _) = store.device_mut(controller.index) {
                done &= nvme.shut_down(hv, now_ns);
            }
        }
        done
    }

    /// Place of each controller, and what was said of it.
    pub fn controllers(&mut self) -> impl Iterator<Item = (usize, &mut Said)> {
        self.found.iter_mut().map(|it| (it.index, &mut it.said))
    }

    /// When it must be looked after again even without an event.
    pub fn poll_at_ns(&self, now_ns: u64) -> Option<u64> {
        let shuts_down = !self.going.is_empty() || self.leaving;
        let look_ns = shuts_down.then(|| now_ns.saturating_add(SHUTDOWN_LOOK_NS));
        self.front.poll_at_ns().into_iter().chain(look_ns).min()
    }

    /// A controller turned up, or came back: its place among the devices is the old one then.
    fn enter<H: Hypervisor + Bus>(
        &mut self,
        store: &mut BlockStore<AnyDevice>,
        hv: &mut H,
        device: Device,
        mut nvme: Box<Nvme>,
    ) {
        if let Some(known) = self.found.iter().find(|known| known.device == device) {
            log::info!("there is an NVMe controller at {device:?} again");
            if let (AnyDevice::Nvme(old), _) = store.device_mut(known.index) {
                nvme.succeed(old);
            }
            if let AnyDevice::Nvme(old) = store.replace(known.index, AnyDevice::Nvme(nvme)) {
                old.free(hv);
            }
            return;
        }
        let nvme = AnyDevice::Nvme(nvme);
        let name = format!("nvme{}", store.count_named("nvme"));
        log::info!("{name} is an NVMe controller at {device:?}");
        let index = store.attach(&name, nvme);
        self.found.push(Controller { device, index, said: Said::default() });
    }
}

impl FrontSlot {
    pub(super) fn take_pci<H: Hypervisor>(
        &mut self,
        engine: &mut Engine<AnyStore>,
        hv: &mut H,
        domid: DomId,
    ) -> Result<(), &'static str> {
        block_store(engine, hv, self.frames_max)?;
        let front = Box::new(Pcifront::new(domid));
        self.drive =
            Drive::Pci(PciDrive { front, found: Vec::new(), going: Vec::new(), leaving: false });
        Ok(())
    }

    /// Goes on looking for controllers behind the backend, and leaving those that go.
    pub(super) fn search<H: Hypervisor + Bus>(
        &mut self,
        engine: &mut Engine<AnyStore>,
        hv: &mut H,
        now_ns: u64,
    ) {
        let Drive::Pci(pci) = &mut self.drive else { return };
        let Ok(store) = block_store(engine, hv, self.frames_max) else { return };
        let going = |device: &Device| pci.going.contains(device);
        if !pci.going.is_empty() && pci.shut_down(store, hv, now_ns, going) {
            for device in core::mem::take(&mut pci.going) {
                log::info!("the PCI function {device:?} was taken away");
                pci.front.left(device);
            }
            self.look = true;
        }
        while let Some(found) = pci.front.poll(hv, now_ns) {
            match found {
                PciFound::Nvme(device, nvme) => pci.enter(store, hv, device, nvme),
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

    /// Our domain ends: true when every controller is shut down.
    pub(super) fn leave_pci<H: Hypervisor + Bus>(
        &mut self,
        engine: &mut Engine<AnyStore>,
        hv: &mut H,
        now_ns: u64,
    ) -> bool {
        let Drive::Pci(pci) = &mut self.drive else { return true };
        let store = block_store(engine, hv, self.frames_max);
        let done = store.map_or(true, |store| pci.shut_down(store, hv, now_ns, |_| true));
        pci.leaving = !done;
        done
    }

    /// The first round: how many functions there are.
    pub(super) fn pci_read<H: Hypervisor>(&mut self, xs: &mut Xs, hv: &mut H, now_ns: u64) {
        let keys: Vec<String> = Pcifront::keys(self.value("num_devs")).collect();
        if keys.is_empty() {
            return self.functions_read(hv);
        }
        self.read(xs, now_ns, Busy::Functions, keys.into_iter());
    }

    pub(super) fn functions_read<H: Hypervisor>(&mut self, hv: &mut H) {
        let keys: Vec<String> = Pcifront::keys(self.value("num_devs")).collect();
        let functions: Vec<Option<&Vec<u8>>> =
            keys.iter().map(|key| self.values.get(key)).collect();
        let state = self.values.get("state").map(Vec::as_slice);
        let Drive::Pci(pci) = &mut self.drive else { return };
        match pci.front.update(hv, state, &functions) {
            PciStep::Wait => {}
            PciStep::Write(nodes) => self.write(nodes),
            PciStep::Leave(going) => pci.going = going,
            PciStep::Refused(why) => log::warn!("PCI passthrough cannot be set up: {why:?}"),
        }
    }
}
