//! A backend domain that serves a disk to the storage domain, as Linux's blkback does: its
//! handshake around the ring model (`blkback_model.rs`), its restarts, its death.
//!
//! Guards that a domain that died touches nothing any more. Must never: take a ring before the
//! frontend published it.

use platter_xen::DomId;
use platter_xen::vbd::DiskNodes;

use super::{BACKENDS, Pace, lose_cache};
use crate::blkback_model::BlkbackModel;
use crate::machine::Machine;
use crate::rng::Rng;
use crate::world::S;
use crate::xenstore::Xenstore;

/// `xvda` (Xen docs, xen-vbd-interface).
const VDEV: u32 = 51_712;

/// See the module's head.
pub struct Blk {
    pub model: BlkbackModel,
    /// The domain that serves now.
    pub domain: u16,
    alive: bool,
    /// Close in order, then begin a new cycle with these limits of queues and ring pages.
    restart: Option<(u32, u32)>,
    /// It is being taken away for good.
    detaching: bool,
    /// What the toolstack says that it serves.
    pub params: &'static str,
    fe: String,
}

impl Blk {
    /// A disk of S, given to it in xenstore.
    pub fn new(machine: &mut Machine, xs: &mut Xenstore, media: Vec<u8>, sector: u32) -> Blk {
        let mut blk = Blk {
            model: BlkbackModel::new(DomId(S), media, sector),
            domain: BACKENDS - 1,
            alive: false,
            restart: None,
            detaching: false,
            params: "/dev/vg0/images",
            fe: format!("/local/domain/{S}/device/vbd/{VDEV}"),
        };
        blk.plug(machine, xs);
        blk
    }

    fn be(&self) -> String {
        format!("/local/domain/{}/backend/vbd/{S}/{VDEV}", self.domain)
    }

    /// A new backend domain, and the toolstack's nodes that name it (libxl's device_disk_add).
    pub fn plug(&mut self, machine: &mut Machine, xs: &mut Xenstore) {
        self.domain += 1;
        (self.alive, self.detaching) = (true, false);
        machine.add_domain(self.domain, 4096);
        let (be, fe) = (self.be(), self.fe.clone());
        let mut nodes = vec![
            (format!("{fe}/backend"), be.clone()),
            (format!("{fe}/backend-id"), self.domain.to_string()),
            (format!("{fe}/state"), "1".to_string()),
            (format!("{fe}/virtual-device"), VDEV.to_string()),
            (format!("{be}/frontend"), fe.clone()),
            (format!("{be}/online"), "1".to_string()),
            (format!("{be}/params"), self.params.to_string()),
            (format!("{be}/state"), "2".to_string()),
        ];
        nodes.extend(self.features());
        xs.transaction(&nodes, &[(be, 0, S), (fe.clone(), S, self.domain)]);
        xs.watch(self.domain, &fe);
    }

    fn features(&self) -> Vec<(String, String)> {
        let nodes = self.model.nodes.nodes().into_iter();
        nodes.map(|(key, value)| (format!("{}/{key}", self.be()), value)).collect()
    }

    /// Lets the backend offer something else, before the world runs.
    pub fn offer(&mut self, xs: &mut Xenstore, change: impl FnOnce(&mut DiskNodes)) {
        for (path, _) in self.features() {
            xs.remove(0, &path).expect("dom0 may");
        }
        change(&mut self.model.nodes);
        xs.transaction(&self.features(), &[(self.be(), 0, S)]);
    }

    /// The domain dies; its cache may be lost with it. Its directories stay until the toolstack
    /// takes them away.
    pub fn die(&mut self, machine: &mut Machine, xs: &mut Xenstore, rng: &mut Rng) {
        self.alive = false;
        self.model.disconnect(&mut machine.view(self.domain));
        self.model.forget_domain();
        lose_cache(rng, |keep| self.model.power_cut(keep));
        xs.unwatch_all(self.domain);
        machine.kill(self.domain);
        let home = format!("/local/domain/{}", self.domain);
        let _ = xs.remove(0, &home);
    }

    /// `xl block-detach` of a disk whose backend is dead: at once.
    pub fn unplug(&self, xs: &mut Xenstore) {
        let _ = xs.remove(0, &self.fe);
    }

    /// `xl block-detach`: closes, and both directories go when that is done.
    pub fn detach(&mut self, xs: &mut Xenstore) {
        self.detaching = true;
        self.set(xs, 5);
    }

    /// blkback is taken off the disk and put back, perhaps another version with other limits: an
    /// orderly close, then a new cycle.
    pub fn restart(&mut self, queues_max: u32, ring_page_order_max: u32) {
        self.restart = self.alive.then_some((queues_max, ring_page_order_max));
    }

    /// The disk under it grows (`lvextend` in the backend's domain): blkback writes the size and
    /// its state anew.
    pub fn grow(&mut self, xs: &mut Xenstore, bytes: usize) {
        self.model.media.resize(bytes, 0);
        self.model.nodes.sectors = bytes as u64 / 512;
        let be = self.be();
        for (key, value) in [("sectors", self.model.nodes.sectors), ("state", 4)] {
            xs.write(0, &format!("{be}/{key}"), value.to_string().as_bytes()).expect("dom0 may");
        }
    }

    fn set(&self, xs: &mut Xenstore, state: u32) {
        let path = format!("{}/state", self.be());
        xs.write(0, &path, state.to_string().as_bytes()).expect("dom0 may write");
    }

    /// Its turn; true when it has more to do.
    pub fn run(
        &mut self,
        machine: &mut Machine,
        xs: &mut Xenstore,
        pace: Pace,
        rng: &mut Rng,
    ) -> bool {
        if !self.alive {
            return false;
        }
        self.handshake(machine, xs);
        if rng.chance(pace.fail) {
            self.model.faults.fail = rng.between(1, 3) as u32;
        }
        let most = rng.between(1, pace.most) as usize;
        let mut hv = machine.view(self.domain);
        self.model.step(&mut hv, most, &mut |count| rng.below(count as u64) as usize);
        self.restart.is_some() || self.model.is_busy()
    }

    fn handshake(&mut self, machine: &mut Machine, xs: &mut Xenstore) {
        let ours = xs.number(0, &format!("{}/state", self.be()));
        let theirs = xs.number(0, &format!("{}/state", self.fe));
        match (ours, theirs) {
            (Some(2), Some(3)) => {
                self.connect(machine, xs);
                self.set(xs, 4);
            }
            (Some(4), Some(4)) if let Some((queues, order)) = self.restart.take() => {
                self.offer(xs, |nodes| {
                    (nodes.queues_max, nodes.ring_page_order_max) = (queues, order);
                });
                self.set(xs, 5);
            }
            (Some(4), Some(5)) => self.set(xs, 5),
            (Some(4 | 5), Some(6)) | (Some(4), None) => {
                self.model.disconnect(&mut machine.view(self.domain));
                self.set(xs, 6);
            }
            (Some(6), _) if self.detaching => {
                self.alive = false;
                self.model.forget_domain();
                for path in [self.fe.clone(), self.be()] {
                    let _ = xs.remove(0, &path);
                }
            }
            (Some(6), Some(1)) => self.set(xs, 2),
            _ => {}
        }
    }

    fn connect(&mut self, machine: &mut Machine, xs: &Xenstore) {
        let fe = &self.fe;
        let number = |key: &str| Some(xs.number(0, &format!("{fe}/{key}"))? as u32);
        self.model.connect(&mut machine.view(self.domain), &number);
    }
}
