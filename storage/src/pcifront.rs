//! pcifront: the handshake with pciback and the search for NVMe functions behind it (Xen
//! public/io/pciif.h; nodes as Linux pciback and libxl write them).
//!
//! Guards the order: our page, port and `magic` with Initialised, at once and whatever the
//! backend shows (it waits for us); its Connected; then ours, and only then configuration
//! accesses. One access at a time over all functions. Must never: touch a function that pciback
//! does not list, or keep using one that it took away (its registers read as all ones then, and
//! the NVMe driver gives up by itself).

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use platter_xen::pciif::{Device, MAGIC, Pciif, parse_device};
use platter_xen::xenbus::XenbusState;
use platter_xen::xenstore::decimal;
use platter_xen::{Bus, DomId, Hypervisor, Port, Refusal};

use crate::nvme::{MMIO_PAGES, Nvme, PciRefusal, Probe, Unfit};

/// Functions of one domain (ours).
pub const FUNCTIONS_MAX: usize = 16;

/// What the caller does next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PciStep {
    /// Nothing, until a node of the backend changes.
    Wait,
    /// Write these nodes below `device/pci/0`, in this order, then ask again.
    Write(Vec<(String, String)>),
    /// These functions are being taken from us: leave them, call [`Pcifront::left`], ask again.
    Leave(Vec<Device>),
    /// As `Wait`: no frame, grant or event channel.
    Refused(Refusal),
}

/// What was found.
pub enum PciFound {
    /// A started controller: attach it to the block store.
    Nvme(Device, Box<Nvme>),
    /// A function that is not used, and why.
    Refused(Device, PciRefusal),
    /// An NVMe function whose registers cannot be mapped.
    Unmapped(Device, Refusal),
    /// An NVMe controller that cannot be used.
    Unfit(Device, Unfit),
}

/// What we share with pciback.
struct Shared {
    port: Port,
    pciif: Pciif,
}

/// See the module's head.
pub struct Pcifront {
    domid: DomId,
    own: XenbusState,
    shared: Option<Shared>,
    known: Vec<Device>,
    waiting: VecDeque<Device>,
    probe: Option<(Device, Probe)>,
    /// pciback did not answer an access: the page may be its own for ever.
    silent: bool,
}

impl Pcifront {
    /// `domid`: `backend-id`, dom0 always.
    pub fn new(domid: DomId) -> Pcifront {
        Pcifront {
            domid,
            own: XenbusState::Initialising,
            shared: None,
            known: Vec::new(),
            waiting: VecDeque::new(),
            probe: None,
            silent: false,
        }
    }

    /// The event channel, while there is one: its events mean [`Pcifront::poll`].
    pub fn port(&self) -> Option<Port> {
        self.shared.as_ref().map(|shared| shared.port)
    }

    /// Every function behind the backend was looked at.
    pub fn is_settled(&self) -> bool {
        self.own == XenbusState::Connected && !self.is_busy()
    }

    /// When [`Pcifront::poll`] must be called even without an event.
    pub fn poll_at_ns(&self) -> Option<u64> {
        match &self.probe {
            Some((_, probe)) => Some(probe.deadline_ns()),
            None if self.waiting.is_empty() => None,
            None => Some(0),
        }
    }

    /// A function is being looked at, or will be.
    pub fn is_busy(&self) -> bool {
        self.probe.is_some() || !self.waiting.is_empty()
    }

    /// The names of the nodes to read of the backend beside `state`, given the value of
    /// `num_devs`: of each function the address that it has for us, and its own state.
    pub fn keys(num_devs: Option<&[u8]>) -> impl Iterator<Item = String> {
        let count = num_devs.and_then(decimal).unwrap_or(0).min(FUNCTIONS_MAX as u64);
        (0..count)
            .flat_map(|number| [alloc::format!("vdev-{number}"), alloc::format!("state-{number}")])
    }

    /// Decides from the backend's `state` and the values of [`Pcifront::keys`], in their order.
    /// Call at each event on `state`, and after each write.
    pub fn update<H: Hypervisor, V: AsRef<[u8]>>(
        &mut self,
        hv: &mut H,
        state: Option<&[u8]>,
        functions: &[Option<V>],
    ) -> PciStep {
        use XenbusState::{Closed, Closing, Connected, Initialised, Initialising};
        use XenbusState::{Reconfigured, Reconfiguring};
        let theirs = state.and_then(XenbusState::parse).unwrap_or(XenbusState::Unknown);
        match (self.own, theirs) {
            (Initialising, Closing | Closed) => PciStep::Wait,
            (Initialising, _) => match self.share(hv) {
                Ok(nodes) => self.write(Initialised, nodes),
                Err(refusal) => PciStep::Refused(refusal),
            },
            (Initialised, Connected) | (Reconfiguring, Reconfigured | Connected) => {
                self.list(functions);
                self.write(Connected, Vec::new())
            }
            // A function comes or goes: pciback takes it only after our answer.
            (Connected, Reconfiguring) => match self.going(functions) {
                going if going.is_empty() => self.write(Reconfiguring, Vec::new()),
                going => PciStep::Leave(going),
            },
            (Connected | Initialised | Reconfiguring, Closing) => self.write(Closed, Vec::new()),
            _ => PciStep::Wait,
        }
    }

    fn write(&mut self, state: XenbusState, mut nodes: Vec<(String, String)>) -> PciStep {
        self.own = state;
        nodes.push(("state".to_string(), state.number().to_string()));
        PciStep::Write(nodes)
    }

    fn share<H: Hypervisor>(&mut self, hv: &mut H) -> Result<Vec<(String, String)>, Refusal> {
        let page = hv.frames_alloc(1).ok_or(Refusal::Full)?;
        let granted = hv.grant(self.domid, page, true);
        let gref = granted.inspect_err(|_| hv.frames_free(page))?;
        let port = match hv.alloc_unbound(self.domid) {
            Ok(port) => port,
            Err(refusal) => {
                // Nobody was told of it.
                hv.revoke(gref);
                hv.frames_free(page);
                return Err(refusal);
            }
        };
        let pciif = Pciif::new(hv, page, port);
        self.shared = Some(Shared { port, pciif });
        let node = |name: &str, value: String| (name.to_string(), value);
        Ok(Vec::from([
            node("pci-op-ref", gref.0.to_string()),
            node("event-channel", port.0.to_string()),
            node("magic", MAGIC.to_string()),
        ]))
    }

    /// Known functions whose own state says Closing (Linux pciback, xen_pcibk_reconfigure).
    fn going<V: AsRef<[u8]>>(&self, functions: &[Option<V>]) -> Vec<Device> {
        let closing = |state: &Option<V>| {
            let state = state.as_ref().and_then(|text| XenbusState::parse(text.as_ref()));
            state == Some(XenbusState::Closing)
        };
        let pairs = functions.chunks_exact(2).filter(|pair| closing(&pair[1]));
        let devices = pairs.filter_map(|pair| parse_device(pair[0].as_ref()?.as_ref()));
        devices.filter(|device| self.known.contains(device)).collect()
    }

    /// A function is not used any more; when it is listed again it is a new one.
    pub fn left(&mut self, device: Device) {
        self.known.retain(|known| *known != device);
        self.waiting.retain(|waiting| *waiting != device);
    }

    fn list<V: AsRef<[u8]>>(&mut self, functions: &[Option<V>]) {
        for text in functions.iter().step_by(2).flatten().take(FUNCTIONS_MAX) {
            let Some(device) = parse_device(text.as_ref()) else { continue };
            if !self.known.contains(&device) && self.known.len() < FUNCTIONS_MAX {
                self.known.push(device);
                self.waiting.push_back(device);
            }
        }
    }

    /// Goes on looking; yields what it found, one at a time.
    pub fn poll<H: Hypervisor + Bus>(&mut self, hv: &mut H, now_ns: u64) -> Option<PciFound> {
        let shared = self.shared.as_mut()?;
        hv.take_pending(shared.port);
        if self.probe.is_none() {
            let device = self.waiting.pop_front()?;
            if self.silent {
                return Some(PciFound::Refused(device, PciRefusal::Backend(None)));
            }
            self.probe = Some((device, Probe::new(device)));
        }
        let (device, probe) = self.probe.as_mut()?;
        let result = probe.poll(hv, &mut shared.pciif, now_ns)?;
        let device = *device;
        self.probe = None;
        if !self.known.contains(&device) {
            // It was taken away while we looked at it.
            return self.poll(hv, now_ns);
        }
        let function = match result {
            Ok(function) => function,
            Err(refusal) => {
                self.silent = refusal == PciRefusal::Backend(None);
                return Some(PciFound::Refused(device, refusal));
            }
        };
        let mmio = match hv.map_mmio(function.registers, MMIO_PAGES) {
            Ok(mmio) => mmio,
            Err(refusal) => return Some(PciFound::Unmapped(device, refusal)),
        };
        Some(match Nvme::new(hv, mmio) {
            Ok(nvme) => PciFound::Nvme(device, Box::new(nvme)),
            Err(unfit) => {
                hv.unmap_mmio(mmio);
                PciFound::Unfit(device, unfit)
            }
        })
    }
}

#[cfg(test)]
mod tests {
    //! The handshake as libxl and Linux's pciback lead it, a configuration space by hand, a
    //! model of a controller behind the bus. Misses: pciback's own filters (the rig).

    use core::cell::RefCell;
    use std::rc::Rc;

    use platter_xen::Region;

    use super::*;
    use crate::fake::{Fake, Registers};
    use crate::nvme_model::NvmeModel;

    struct Model(Rc<RefCell<NvmeModel>>);

    impl Registers for Model {
        fn read_u32(&mut self, offset: usize) -> u32 {
            self.0.borrow().read_u32(offset)
        }
        fn write_u32(&mut self, offset: usize, value: u32) {
            self.0.borrow_mut().write_u32(offset, value);
        }
    }

    /// What pciback answers for function 0 (NVMe) and 1 (a network card).
    fn serve(hv: &mut Fake, page: Region) {
        if hv.load_u32(page, 0) & 1 == 0 {
            return;
        }
        let (devfn, at) = (hv.load_u32(page, 20), hv.load_u32(page, 24));
        let value = match at {
            0x08 if devfn == 0 => 0x0108_0202,
            0x08 => 0x0200_0000,
            0x10 => 0xFEB0_0000,
            _ => 0,
        };
        hv.store_u32(page, 32, value);
        hv.store_u32(page, 0, 0);
    }

    #[test]
    fn functions_are_found_once_and_the_controller_is_started() {
        let mut hv = Fake::new(64);
        let model = Rc::new(RefCell::new(NvmeModel::new(alloc::vec![0; 4096], 512)));
        hv.registers = Some(RefCell::new(Box::new(Model(model.clone()))));
        let mut front = Pcifront::new(DomId(0));
        let none: [Option<&[u8]>; 0] = [];
        let PciStep::Write(nodes) = front.update(&mut hv, Some(b"1"), &none) else { panic!() };
        let names: Vec<&str> = nodes.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["pci-op-ref", "event-channel", "magic", "state"]);
        assert_eq!((nodes[2].1.as_str(), nodes[3].1.as_str()), ("7", "3"));
        assert_eq!(front.update(&mut hv, Some(b"2"), &none), PciStep::Wait);
        assert!(front.poll(&mut hv, 0).is_none());
        let keys: Vec<String> = Pcifront::keys(Some(b"2")).collect();
        assert_eq!(keys, ["vdev-0", "state-0", "vdev-1", "state-1"]);
        let ready = Some(b"3".as_slice());
        let mut functions = [Some(b"0000:00:00.0".as_slice()), ready, None, ready];
        functions[2] = Some(b"0000:00:00.1".as_slice());
        let PciStep::Write(nodes) = front.update(&mut hv, Some(b"4"), &functions) else { panic!() };
        assert_eq!(nodes[0].1, "4");
        let page = Region { first_page: hv.grants[0].unwrap(), pages: 1 };
        let mut found = Vec::new();
        for _ in 0..100 {
            found.extend(front.poll(&mut hv, 0));
            serve(&mut hv, page);
        }
        assert_eq!(found.len(), 2);
        assert!(matches!(found[0], PciFound::Nvme(Device { devfn: 0, .. }, _)));
        assert!(matches!(found[1], PciFound::Refused(_, PciRefusal::NotNvme)));
        assert!(!front.is_busy() && front.is_settled());
        // A function is added: 7 and 8, nothing is probed twice.
        let PciStep::Write(nodes) = front.update(&mut hv, Some(b"7"), &functions) else { panic!() };
        assert_eq!(nodes[0].1, "7");
        let PciStep::Write(nodes) = front.update(&mut hv, Some(b"8"), &functions) else { panic!() };
        assert_eq!(nodes[0].1, "4");
        assert!(!front.is_busy());
        // The controller goes, and comes back.
        functions[1] = Some(b"5".as_slice());
        let gone = Device { domain: 0, bus: 0, devfn: 0 };
        let step = front.update(&mut hv, Some(b"7"), &functions);
        assert_eq!(step, PciStep::Leave(Vec::from([gone])));
        front.left(gone);
        let PciStep::Write(nodes) = front.update(&mut hv, Some(b"7"), &functions) else { panic!() };
        assert_eq!(nodes[0].1, "7");
        functions[0] = None;
        front.update(&mut hv, Some(b"8"), &functions);
        assert!(!front.is_busy());
        functions[..2].copy_from_slice(&[Some(b"0000:00:00.0".as_slice()), ready]);
        front.update(&mut hv, Some(b"7"), &functions);
        front.update(&mut hv, Some(b"8"), &functions);
        assert!(front.is_busy());
    }

    #[test]
    fn a_silent_backend_is_given_up() {
        let mut hv = Fake::new(64);
        let mut front = Pcifront::new(DomId(0));
        let mut functions = [Some(b"0000:00:00.0".as_slice()), None, None, None];
        functions[2] = Some(b"0000:00:00.1".as_slice());
        front.update(&mut hv, Some(b"1"), &functions);
        front.update(&mut hv, Some(b"4"), &functions);
        assert!(front.poll(&mut hv, 0).is_none());
        assert_eq!(front.poll_at_ns(), Some(2_000_000_000));
        assert!(front.poll(&mut hv, 1_999_999_999).is_none());
        // The other function is not asked for any more.
        for _ in 0..2 {
            let found = front.poll(&mut hv, 2_000_000_000);
            assert!(matches!(found, Some(PciFound::Refused(_, PciRefusal::Backend(None)))));
        }
        assert!(front.poll(&mut hv, 2_000_000_000).is_none());
        assert!(front.poll_at_ns().is_none() && front.is_settled());
    }
}
