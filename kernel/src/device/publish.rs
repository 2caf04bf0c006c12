//! What a device shows in xenstore: its size and features, and its counters.

use alloc::format;
use alloc::string::{String, ToString};

use platter_xen::blkif::info;
use platter_xen::vbd::DiskNodes;
use platter_xen::xenbus::XenbusState;
use platter_xen::{Bus, Hypervisor};

use super::{Busy, Device, Stage, Surroundings};
use crate::limits::{QUEUES_MAX, RING_ORDER_MAX, STATS_NS};
use crate::xs::{Awaited, Purpose};

/// What is good for speed on every store of ours: pages.
const PHYSICAL_SECTOR_BYTES: u32 = 4096;

impl Device {
    /// Everything a frontend may want to know, and InitWait after it: frontends read features
    /// before they connect (Linux) or after (Windows), so all of it stands from now on.
    pub(super) fn publish<H: Hypervisor + Bus>(&mut self, world: &mut Surroundings<'_, H>) {
        let Some(disk) = &self.disk else { return };
        let mut bits = 0;
        bits |= if self.read_only { info::READONLY } else { 0 };
        bits |= if self.cdrom { info::CDROM | info::READONLY } else { 0 };
        let limits = disk.limits;
        let nodes = DiskNodes {
            sectors: limits.capacity_sectors,
            sector_bytes: limits.sector_bytes,
            physical_sector_bytes: PHYSICAL_SECTOR_BYTES,
            info: bits,
            flush: limits.flush,
            barrier: limits.flush,
            discard_alignment_bytes: 0,
            discard_granularity_bytes: limits.discard.then_some(PHYSICAL_SECTOR_BYTES),
            indirect_segments_max: limits.indirect_segments_max,
            queues_max: QUEUES_MAX as u32,
            ring_page_order_max: RING_ORDER_MAX,
        };
        let mut nodes = nodes.nodes();
        nodes.push(("hotplug-status", "connected".to_string()));
        self.showing = Some(limits.capacity_sectors);
        self.write_nodes(world, &nodes, Some(XenbusState::InitWait));
    }

    /// Writes these, then `state` once all of them stand.
    fn write_nodes<H>(
        &mut self,
        world: &mut Surroundings<'_, H>,
        nodes: &[(&str, String)],
        state: Option<XenbusState>,
    ) {
        self.busy = Busy::Publishing(state);
        self.awaited = Awaited::default();
        for (key, value) in nodes {
            let purpose = Purpose::DeviceWritten { index: self.index, serial: self.serial };
            self.awaited.sent(world.xs.write(&format!("{}/{key}", self.be), value, purpose));
        }
        if self.awaited.is_over() {
            self.try_later(world.now_ns);
        }
    }

    /// The disk grew: the frontend re-reads `sectors` when our state is written again.
    pub(super) fn show_size<H: Hypervisor + Bus>(&mut self, world: &mut Surroundings<'_, H>) {
        let Some(disk) = &self.disk else { return };
        let sectors = disk.limits.capacity_sectors;
        let pauses = self.refusals > 0 && self.wake_ns.is_some();
        let due = self.busy == Busy::No && self.stage == Stage::Ready && !pauses;
        if !due || self.shown_sectors.is_none_or(|shown| shown == sectors) {
            return;
        }
        self.showing = Some(sectors);
        let state = self.is_serving().then_some(XenbusState::Connected);
        self.write_nodes(world, &[("sectors", sectors.to_string())], state);
    }

    /// Counters, for people and tests: one node a disk, `data/disk/KIND-G-D`.
    pub(super) fn show_stats<H: Hypervisor + Bus>(&mut self, world: &mut Surroundings<'_, H>) {
        let due = world.now_ns.saturating_sub(self.stats_ns) >= STATS_NS;
        let Some(disk) = self.disk.as_ref().filter(|_| due && self.stage == Stage::Ready) else {
            return;
        };
        self.stats_ns = world.now_ns;
        let text = disk.stats.to_string();
        if text != self.stats_shown {
            world.xs.write(&self.stats_path(), &text, Purpose::None);
            self.stats_shown = text;
        }
    }

    pub(super) fn stats_path(&self) -> String {
        format!("data/disk/{}", self.name.replace('/', "-"))
    }
}
