//! A disk's frontend, step by step: whoever plays one decides the order.
//!
//! [`connect`] and [`disconnect`] are the steps of a well-behaved one. Pages that were granted are
//! freed only once every grant of them is revoked, so that a backend that keeps something mapped
//! shows: [`Wires::free`] says no.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use platter_xen::blkif::Abi;
use platter_xen::ring::FrontRing;
use platter_xen::vbd::{BACK_KEYS, Connect, DiskNodes, Queue, front_nodes};
use platter_xen::xenstore::{Op, decimal};
use platter_xen::{DomId, Gref, PAGE_BYTES, Port, Region};

use crate::guest::{Guest, MS_NS, SECOND_NS};
use crate::xs::XenStore;

/// How long a backend may take for one step.
pub const STEP_NS: u64 = 20 * SECOND_NS;
/// How long a backend that has closed may keep our pages.
pub const KEEP_NS: u64 = 2 * SECOND_NS;

/// xenbus states by their numbers, as frontends write them.
pub const INITIALISING: u8 = 1;
pub const INIT_WAIT: u8 = 2;
pub const INITIALISED: u8 = 3;
pub const CONNECTED: u8 = 4;
pub const CLOSING: u8 = 5;
pub const CLOSED: u8 = 6;

/// The shape of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    pub abi: Abi,
    pub queues: usize,
    /// log2 of the pages of each ring.
    pub order: u32,
}

/// One disk of this domain.
#[derive(Clone, Debug)]
pub struct Disk {
    /// What the user calls it.
    pub vdev: String,
    /// Our directory, relative to our domain's.
    pub front: String,
    /// The backend's directory.
    pub back: String,
    pub back_id: DomId,
}

impl Disk {
    /// All disks that the toolstack gave us, by number; their backends' states are watched.
    pub fn all<G: Guest>(guest: &mut G, xs: &mut XenStore) -> Vec<Disk> {
        let mut disks = Vec::new();
        for number in xs.list(guest, "device/vbd") {
            let front = format!("device/vbd/{number}");
            let Some(back) = xs.read(guest, &format!("{front}/backend")) else { continue };
            let id = xs.number(guest, &format!("{front}/backend-id"));
            let Some(back_id) = id.and_then(|id| u16::try_from(id).ok()) else { continue };
            let vdev = xs.read(guest, &format!("{back}/dev")).unwrap_or(number);
            xs.watch(guest, &format!("{back}/state"));
            disks.push(Disk { vdev, front, back, back_id: DomId(back_id) });
        }
        disks
    }

    /// Shows our state.
    pub fn show<G: Guest>(&self, guest: &mut G, xs: &mut XenStore, state: u8) {
        let path = format!("{}/state", self.front);
        xs.write(guest, &path, &[b'0' + state]).ok();
    }

    /// What we show.
    pub fn shown<G: Guest>(&self, guest: &mut G, xs: &mut XenStore) -> Option<u8> {
        state_of(xs.read(guest, &format!("{}/state", self.front)))
    }

    /// The backend's state; `None` when it is gone.
    pub fn back_state<G: Guest>(&self, guest: &mut G, xs: &mut XenStore) -> Option<u8> {
        state_of(xs.read(guest, &format!("{}/state", self.back)))
    }

    /// Waits until the backend's state is one of these (0 stands for gone), and hands it back.
    ///
    /// # Errors
    /// After `patience_ns`: what it shows instead.
    pub fn wait_for<G: Guest>(
        &self,
        guest: &mut G,
        xs: &mut XenStore,
        states: &[u8],
        patience_ns: u64,
    ) -> Result<u8, String> {
        let until_ns = guest.now_ns() + patience_ns;
        loop {
            let state = self.back_state(guest, xs).unwrap_or(0);
            if states.contains(&state) {
                return Ok(state);
            }
            if guest.now_ns() >= until_ns {
                return Err(format!("{}: backend at {state}, not {states:?}", self.vdev));
            }
            xs.wait_change(guest, until_ns);
        }
    }

    /// Writes the nodes that describe our rings.
    pub fn describe<G: Guest>(&self, guest: &mut G, xs: &mut XenStore, wires: &Wires) {
        for (key, value) in front_nodes(&wires.connect_nodes()) {
            xs.write(guest, &format!("{}/{key}", self.front), value.as_bytes()).ok();
        }
    }

    /// Removes them again, `protocol` too unless `keep_protocol`.
    pub fn forget<G: Guest>(
        &self,
        guest: &mut G,
        xs: &mut XenStore,
        wires: &Wires,
        keep_protocol: bool,
    ) {
        for (key, _) in front_nodes(&wires.connect_nodes()) {
            let top = key.split('/').next().unwrap_or(&key).to_string();
            if !(keep_protocol && top == "protocol") {
                xs.remove(guest, &format!("{}/{top}", self.front));
            }
        }
    }

    /// What the backend says of the disk.
    ///
    /// # Errors
    /// The node that is of no use.
    pub fn nodes<G: Guest>(&self, guest: &mut G, xs: &mut XenStore) -> Result<DiskNodes, String> {
        let values = BACK_KEYS.map(|key| {
            let path = format!("{}/{key}", self.back);
            xs.ask(guest, Op::Read { path: &path }).ok()
        });
        DiskNodes::parse(&values).map_err(|fault| format!("{}: {fault:?}", self.vdev))
    }

    /// `shape` within what the backend offers.
    pub fn fitting<G: Guest>(&self, guest: &mut G, xs: &mut XenStore, shape: Shape) -> Shape {
        let mut limit = |key: &str| xs.number(guest, &format!("{}/{key}", self.back));
        let order = limit("max-ring-page-order").unwrap_or(0).min(4) as u32;
        let queues = limit("multi-queue-max-queues").unwrap_or(1).clamp(1, 4) as usize;
        Shape { queues: shape.queues.min(queues), order: shape.order.min(order), ..shape }
    }
}

fn state_of(text: Option<String>) -> Option<u8> {
    decimal(text?.as_bytes()).and_then(|state| u8::try_from(state).ok())
}

/// Rings with their grants and ports, granted to one backend.
#[derive(Debug)]
pub struct Wires {
    pub shape: Shape,
    pub rings: Vec<FrontRing>,
    pub ports: Vec<Port>,
    pub grefs: Vec<Vec<Gref>>,
}

impl Wires {
    /// Makes them.
    ///
    /// # Errors
    /// When the domain has no memory, grants or ports left.
    pub fn make<G: Guest>(guest: &mut G, to: DomId, shape: Shape) -> Result<Wires, String> {
        let mut wires = Wires { shape, rings: Vec::new(), ports: Vec::new(), grefs: Vec::new() };
        for _ in 0..shape.queues {
            let region = guest.frames_alloc(1 << shape.order).ok_or("no memory for a ring")?;
            wires.grefs.push(grant_all(guest, to, region, true)?);
            wires.rings.push(FrontRing::init(guest, region, shape.abi));
            let port = guest.alloc_unbound(to).map_err(|why| format!("no port: {why:?}"))?;
            wires.ports.push(port);
        }
        Ok(wires)
    }

    /// As the nodes say it.
    pub fn connect_nodes(&self) -> Connect {
        let mut queues = heapless::Vec::new();
        for (grefs, port) in self.grefs.iter().zip(&self.ports) {
            let grefs = grefs.iter().copied().collect();
            let pushed = queues.push(Queue { grefs, port: *port });
            assert!(pushed.is_ok(), "at most four queues");
        }
        Connect { abi: self.shape.abi, queues }
    }

    /// Gives everything back; false when the backend keeps a page for longer than
    /// [`KEEP_NS`]: that page is lost then.
    pub fn free<G: Guest>(self, guest: &mut G) -> bool {
        self.ports.iter().for_each(|port| guest.close_port(*port));
        let mut all = true;
        for (ring, grefs) in self.rings.iter().zip(&self.grefs) {
            all &= free_granted(guest, ring.region(), grefs);
        }
        all
    }
}

/// A grant for each page of a region.
///
/// # Errors
/// When the grant table is full.
pub fn grant_all<G: Guest>(
    guest: &mut G,
    to: DomId,
    region: Region,
    writable: bool,
) -> Result<Vec<Gref>, String> {
    (0..region.bytes() / PAGE_BYTES)
        .map(|page| guest.grant(to, region.page(page), writable))
        .collect::<Result<_, _>>()
        .map_err(|why| format!("no grants: {why:?}"))
}

/// Revokes the grants of a region and frees it; false, and the region is lost, when the other
/// side keeps a page.
pub fn free_granted<G: Guest>(guest: &mut G, region: Region, grefs: &[Gref]) -> bool {
    let until_ns = guest.now_ns() + KEEP_NS;
    let mut all = true;
    for gref in grefs {
        let mut gone = guest.revoke(*gref);
        while !gone && guest.now_ns() < until_ns {
            let nap_ns = guest.now_ns() + 5 * MS_NS;
            guest.sleep_until(&[], nap_ns);
            gone = guest.revoke(*gref);
        }
        all &= gone;
    }
    if all {
        guest.frames_free(region);
    }
    all
}

/// A connected disk.
#[derive(Debug)]
pub struct Link {
    pub wires: Wires,
    pub nodes: DiskNodes,
}

/// Connects as Linux's blkfront does, with what fits of `shape`.
///
/// # Errors
/// A sentence about the step that failed; everything is given back then.
pub fn connect<G: Guest>(
    guest: &mut G,
    xs: &mut XenStore,
    disk: &Disk,
    shape: Shape,
) -> Result<Link, String> {
    if disk.shown(guest, xs) != Some(INITIALISING) {
        disk.show(guest, xs, INITIALISING);
    }
    disk.wait_for(guest, xs, &[INIT_WAIT], STEP_NS)?;
    let shape = disk.fitting(guest, xs, shape);
    let wires = Wires::make(guest, disk.back_id, shape)?;
    disk.describe(guest, xs, &wires);
    disk.show(guest, xs, INITIALISED);
    let connected = disk.wait_for(guest, xs, &[CONNECTED], STEP_NS);
    match connected.and_then(|_| disk.nodes(guest, xs)) {
        Ok(nodes) => {
            disk.show(guest, xs, CONNECTED);
            Ok(Link { wires, nodes })
        }
        Err(why) => {
            disk.show(guest, xs, CLOSED);
            disk.forget(guest, xs, &wires, false);
            wires.free(guest);
            Err(why)
        }
    }
}

/// Closes as Linux's blkfront does: Closing, Closed, and then everything must be ours again.
///
/// # Errors
/// When the backend does not follow, or keeps a page.
pub fn disconnect<G: Guest>(
    guest: &mut G,
    xs: &mut XenStore,
    disk: &Disk,
    link: Link,
) -> Result<(), String> {
    disk.show(guest, xs, CLOSING);
    let closing = disk.wait_for(guest, xs, &[CLOSING, CLOSED, 0], STEP_NS);
    disk.show(guest, xs, CLOSED);
    let closed = disk.wait_for(guest, xs, &[CLOSED, 0], STEP_NS);
    disk.forget(guest, xs, &link.wires, false);
    let ours = link.wires.free(guest);
    closing.and(closed)?;
    if ours { Ok(()) } else { Err(format!("{}: the backend keeps our pages", disk.vdev)) }
}
