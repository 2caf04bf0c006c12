//! pciback with one NVMe function: its handshake, the configuration space behind the shared
//! page, and the controller's own pace. The controller itself (`nvme_model.rs`) stands in the
//! machine, where platter's register accesses find it.
//!
//! Guards the order of a removal: the function is taken only after the frontend's answer. Must
//! never: let the controller reach memory that platter did not name.

use platter_xen::{DomId, Gref, Hypervisor, Port, Region};

use super::{PCIBACK, Pace, lose_cache};
use crate::machine::{BAR0, Machine};
use crate::nvme_model::NvmeModel;
use crate::rng::Rng;
use crate::world::S;
use crate::xenstore::Xenstore;

const VDEV: &str = "0000:00:00.0";
/// Statuses of failed commands: internal error (transient), write fault, read error, final.
const STATUSES: [u16; 4] = [0x06, 0x280, 0x281, 0x4006];

/// See the module's head.
pub struct Pci {
    page: Option<(Region, Port)>,
    space: [u8; 256],
    be: String,
    fe: String,
    /// The controller lost power, and its cache.
    pub lost: bool,
}

impl Pci {
    /// Gives S a controller with these media.
    pub fn new(machine: &mut Machine, xs: &mut Xenstore, media: Vec<u8>, block: u32) -> Pci {
        let pci = Pci {
            page: None,
            lost: false,
            space: config_space(),
            be: format!("/local/domain/{PCIBACK}/backend/pci/{S}/0"),
            fe: format!("/local/domain/{S}/device/pci/0"),
        };
        machine.add_domain(PCIBACK, 16);
        machine.nvme = Some(NvmeModel::new(media, block).into());
        let (be, fe) = (pci.be.clone(), pci.fe.clone());
        let node =
            |path: &str, key: &str, value: &str| (format!("{path}/{key}"), value.to_string());
        let nodes = [
            node(&fe, "backend", &be),
            node(&fe, "backend-id", &PCIBACK.to_string()),
            node(&fe, "state", "1"),
            node(&be, "frontend", &fe),
            node(&be, "online", "1"),
            node(&be, "num_devs", "1"),
            node(&be, "vdev-0", VDEV),
            node(&be, "state-0", "3"),
            node(&be, "state", "1"),
        ];
        xs.transaction(&nodes, &[(be, 0, S), (fe.clone(), S, PCIBACK)]);
        xs.watch(PCIBACK, &fe);
        pci
    }

    fn set(&self, xs: &mut Xenstore, key: &str, value: &str) {
        xs.write(0, &format!("{}/{key}", self.be), value.as_bytes()).expect("dom0 may write");
    }

    /// `xl pci-detach`, or `pci-attach` of the same function.
    pub fn reconfigure(&self, xs: &mut Xenstore, attach: bool) {
        if attach {
            self.set(xs, "vdev-0", VDEV);
        }
        self.set(xs, "state-0", if attach { "1" } else { "5" });
        self.set(xs, "state", "7");
    }

    /// The function is not ours any more.
    pub fn is_detached(&self, xs: &Xenstore) -> bool {
        xs.number(0, &format!("{}/state-0", self.be)) == Some(6)
    }

    /// Its turn; true when it has more to do.
    pub fn run(
        &mut self,
        machine: &mut Machine,
        xs: &mut Xenstore,
        pace: Pace,
        rng: &mut Rng,
    ) -> bool {
        self.handshake(machine, xs);
        self.serve_page(machine);
        let Some(nvme) = machine.nvme.take() else { return false };
        let mut model = nvme.into_inner();
        if model.is_busy() {
            self.lost |= hurt(&mut model, pace, rng);
        }
        let most = rng.between(1, pace.most) as usize;
        model.step(&mut machine.dma(S), most, &mut |count| rng.below(count as u64) as usize);
        let busy = model.is_busy();
        machine.nvme = Some(model.into());
        busy
    }

    fn handshake(&mut self, machine: &mut Machine, xs: &mut Xenstore) {
        let number = |path: &str, key: &str| xs.number(0, &format!("{path}/{key}"));
        let (ours, theirs) = (number(&self.be, "state"), number(&self.fe, "state"));
        let (function, known) = (number(&self.be, "state-0"), self.page.is_some());
        match (ours, theirs) {
            (Some(1), Some(3)) if !known => {
                let gref = Gref(number(&self.fe, "pci-op-ref").expect("its page") as u32);
                let port = Port(number(&self.fe, "event-channel").expect("its port") as u32);
                let mut hv = machine.view(PCIBACK);
                let page = hv.map(DomId(S), &[gref]).expect("platter grants its page");
                let port = hv.bind_interdomain(DomId(S), port).expect("its port waits");
                self.page = Some((page, port));
                self.set(xs, "state", "4");
            }
            (Some(7), Some(7)) => {
                match function {
                    Some(5) => {
                        let model = machine.nvme.as_ref().expect("the controller").borrow();
                        let rests = model.was_shut_down() || model.is_off();
                        assert!(rests || model.faults.gone, "taken while in use");
                        drop(model);
                        self.set(xs, "state-0", "6");
                        xs.remove(0, &format!("{}/vdev-0", self.be)).expect("dom0 may");
                    }
                    Some(1) => {
                        let nvme = machine.nvme.as_ref().expect("the controller");
                        nvme.borrow_mut().plug_in();
                        self.set(xs, "state-0", "3");
                    }
                    _ => {}
                }
                self.set(xs, "state", "8");
            }
            (Some(8), Some(4)) => self.set(xs, "state", "4"),
            _ => {}
        }
    }

    /// One configuration access (public/io/pciif.h).
    fn serve_page(&mut self, machine: &mut Machine) {
        let Some((page, port)) = self.page else { return };
        let mut hv = machine.view(PCIBACK);
        hv.take_pending(port);
        if hv.load_u32(page, 0) & 1 == 0 {
            return;
        }
        let field = |at: usize| hv.load_u32(page, at);
        let (cmd, at, size, value) = (field(4), field(24) as usize, field(28) as usize, field(32));
        let place = &mut self.space[at..at + size];
        let mut word = [0; 4];
        match cmd {
            0 => word[..size].copy_from_slice(place),
            1 => place.copy_from_slice(&value.to_le_bytes()[..size]),
            other => panic!("operation {other} of pciif"),
        }
        hv.store_u32(page, 32, u32::from_le_bytes(word));
        hv.store_u32(page, 8, 0);
        hv.store_u32(page, 0, 0);
        hv.notify(port);
    }
}

/// What goes wrong with a busy controller; true when it lost its cache.
fn hurt(model: &mut NvmeModel, pace: Pace, rng: &mut Rng) -> bool {
    if rng.chance(pace.fail) {
        model.faults.fail = rng.between(1, 3) as u32;
        model.faults.fail_status = *rng.pick(&STATUSES);
    }
    if rng.chance(pace.swallow) {
        model.faults.swallow = rng.between(1, 3) as u32;
        model.faults.abort_refused = rng.chance(500);
    }
    model.faults.fatal |= rng.chance(pace.fatal);
    model.faults.wrong_cid |= rng.chance(pace.wrong_cid);
    let cut = rng.chance(pace.cut);
    if cut {
        lose_cache(rng, |keep| model.power_cut(keep));
    }
    cut
}

/// Class NVMe, BAR0 of 64 bits, no capabilities.
fn config_space() -> [u8; 256] {
    let mut space = [0; 256];
    space[0x08..0x0C].copy_from_slice(&0x0108_0202u32.to_le_bytes());
    space[0x10..0x18].copy_from_slice(&(BAR0 | 4).to_le_bytes());
    space
}
