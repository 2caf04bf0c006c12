//! A device's rings: from the frontend's keys to mapped pages, and back to nothing.
//!
//! Guards that whatever a frontend writes ends in full release of what was taken for it: ring
//! pages mapped in part are unmapped, ports bound are closed (XSA-71, XSA-361).

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use platter_xen::ring::BackRing;
use platter_xen::vbd::{Connect, ConnectFault, FIRST_KEYS, Layout};
use platter_xen::xenbus::{Rings, XenbusState};
use platter_xen::{Bus, Hypervisor};

use super::{Batch, Device, Surroundings};
use crate::disk::{Disk, Queue};
use crate::limits::{QUEUES_MAX, RING_ORDER_MAX};

impl Device {
    pub(super) fn read_shape<H: Hypervisor + Bus>(&mut self, world: &mut Surroundings<'_, H>) {
        let paths = FIRST_KEYS.map(|key| self.below_fe(key));
        self.read(world, Batch::Shape, &paths);
    }

    fn below_fe(&self, key: &str) -> String {
        format!("{}/{key}", self.fe.as_deref().unwrap_or(""))
    }

    pub(super) fn shape_read<H: Hypervisor + Bus>(&mut self, world: &mut Surroundings<'_, H>) {
        let values = FIRST_KEYS.map(|key| self.values.get(&self.below_fe(key)).map(Vec::as_slice));
        match Layout::parse(values, QUEUES_MAX as u32, RING_ORDER_MAX) {
            Ok(layout) => {
                self.layout = Some(layout);
                let paths: Vec<String> =
                    layout.keys().iter().map(|key| self.below_fe(key)).collect();
                self.read(world, Batch::Keys, &paths);
            }
            Err(fault) => self.refuse_connect(world, fault.name()),
        }
    }

    pub(super) fn keys_read<H: Hypervisor + Bus>(&mut self, world: &mut Surroundings<'_, H>) {
        let Some(layout) = self.layout.take() else { return };
        let values: Vec<Option<&Vec<u8>>> =
            layout.keys().iter().map(|key| self.values.get(&self.below_fe(key))).collect();
        let connected = layout
            .connect(&values)
            .map_err(ConnectFault::name)
            .and_then(|connect| self.connect(world, &connect));
        match connected {
            Ok(()) => {
                self.rings = Rings::Up;
                self.write_state(world, XenbusState::Connected);
            }
            Err(why) => self.refuse_connect(world, why),
        }
    }

    /// Maps and binds everything, or nothing.
    fn connect<H: Hypervisor + Bus>(
        &mut self,
        world: &mut Surroundings<'_, H>,
        connect: &Connect,
    ) -> Result<(), &'static str> {
        let Some(disk) = &mut self.disk else { return Err("the disk is not open") };
        assert!(disk.queues.is_empty(), "a connect before the last one was released");
        disk.unheard = false;
        for queue in &connect.queues {
            let taken = connect_queue(world.hv, disk, connect, queue);
            if let Err(why) = taken {
                release_queues(world.hv, disk);
                return Err(why);
            }
        }
        Ok(())
    }

    /// The frontend's keys cannot be used: said once, until the frontend changes.
    fn refuse_connect<H: Hypervisor + Bus>(&mut self, world: &mut Surroundings<'_, H>, why: &str) {
        self.connect_refused = true;
        if world.now_ns >= self.refusal_shown_ns {
            self.refusal_shown_ns = world.now_ns + REFUSAL_LOG_NS;
            let (guest, vdev) = (self.guest.0, &self.vdev);
            log::warn!("guest {guest} disk {vdev}: cannot connect its frontend: {why}");
            let reason = format!("cannot connect the frontend: {why}");
            world.xs.explain(&self.name, &reason);
        }
        if let Some(disk) = &mut self.disk {
            disk.stats.connect_refused();
        }
    }

    pub(super) fn begin_release(&mut self) {
        self.rings = Rings::Releasing;
        self.disk.iter_mut().for_each(|disk| disk.flush.forget_failure());
    }

    /// Carries a release on: what is in flight ends first, then every page and port is let go.
    pub(super) fn release_on<H: Hypervisor + Bus>(&mut self, world: &mut Surroundings<'_, H>) {
        if self.rings != Rings::Releasing {
            return;
        }
        let Some(disk) = &mut self.disk else {
            self.rings = Rings::Down;
            self.look = true;
            return;
        };
        disk.queues.iter_mut().for_each(|queue| queue.active = false);
        if disk.image.is_dirty() && !disk.flush.failed_last() {
            disk.flush.wanted = true;
        }
        disk.pump_flush(world.engine, world.hv);
        if disk.is_idle() {
            disk.publish(world.hv);
            release_queues(world.hv, disk);
            self.rings = Rings::Down;
            self.look = true;
        }
    }

    /// A ring was found broken: the decision closes the disk, others live.
    pub fn check_rings(&mut self, now_ns: u64) {
        let Some(disk) = &mut self.disk else { return };
        if self.rings == Rings::Up && disk.queues.iter().any(|queue| queue.ring.is_broken()) {
            if now_ns >= self.break_shown_ns {
                self.break_shown_ns = now_ns + REFUSAL_LOG_NS;
                log::warn!("guest {} disk {}: it broke its ring; closed", self.guest.0, self.vdev);
            }
            disk.stats.ring_broken();
            self.rings = Rings::Broken;
            self.look = true;
        }
    }
}

/// Between two lines about one disk's refused frontends, or broken rings: guests provoke them.
const REFUSAL_LOG_NS: u64 = 5_000_000_000;

fn connect_queue<H: Hypervisor + Bus>(
    hv: &mut H,
    disk: &mut Disk,
    connect: &Connect,
    queue: &platter_xen::vbd::Queue,
) -> Result<(), &'static str> {
    let region = hv.map(disk.guest, &queue.grefs).map_err(|_| "its ring cannot be mapped")?;
    let Ok(ring) = BackRing::attach(hv, region, connect.abi) else {
        hv.unmap(region);
        return Err("its ring holds more than fits");
    };
    let Ok(port) = hv.bind_interdomain(disk.guest, queue.port) else {
        hv.unmap(region);
        return Err("its event channel cannot be bound");
    };
    // There may be requests from before we listened.
    disk.queues
        .push(Queue { ring, region, port, active: true })
        .unwrap_or_else(|_| unreachable!("the layout bounds the queues"));
    Ok(())
}

fn release_queues<H: Hypervisor + Bus>(hv: &mut H, disk: &mut Disk) {
    for queue in &disk.queues {
        hv.close_port(queue.port);
        hv.unmap(queue.region);
    }
    disk.queues.clear();
}
