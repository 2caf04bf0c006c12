//! The xenstore handshake of one disk: given the backend's nodes as they are now, what to write
//! below `device/vbd/<n>`. The decision is [`platter_xen::blkfront::decide`]; here it is done.
//!
//! Guards that rings and grants outlive every cycle: they are made once, because a backend is
//! known to have unmapped them only when it shows Closed, and the next cycle begins after that.

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use platter_xen::blkfront::{FrontAction, FrontView, decide};
use platter_xen::blkif::Abi;
use platter_xen::ring::FrontRing;
use platter_xen::vbd::{BackFault, Connect, DiskNodes, Queue, front_nodes};
use platter_xen::xenbus::XenbusState;
use platter_xen::{Gref, Hypervisor, Refusal, Region};

use super::{Blkfront, INDIRECT_PAGES, RING_PAGE_ORDER_MAX, Shared};
use crate::pool::Pool;

/// The backend's nodes as they stand; a missing one is `None`.
#[derive(Clone, Copy, Debug)]
pub struct BackNodes<'a, V> {
    pub state: Option<&'a [u8]>,
    /// Values of [`platter_xen::vbd::BACK_KEYS`].
    pub values: &'a [Option<V>; 12],
}

/// Why a disk cannot be connected.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FrontFault {
    /// No frames for the ring and the pages of descriptors.
    Memory,
    /// No grants or event channel.
    Refused(Refusal),
    Nodes(BackFault),
}

/// What the caller does next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum FrontStep {
    /// Nothing, until a node of the backend changes.
    Wait,
    /// Write these nodes below our own directory, in this order, then ask again.
    Write(Vec<(String, String)>),
    /// As `Wait`, with a reason for people.
    Refused(FrontFault),
}

impl Blkfront {
    /// Decides from the backend's nodes. Call at each event on the backend's `state` with all
    /// nodes read anew, and after each write.
    pub fn update<H: Hypervisor, V: AsRef<[u8]>>(
        &mut self,
        hv: &mut H,
        pool: &mut Pool,
        back: BackNodes<'_, V>,
    ) -> FrontStep {
        let theirs = back.state.and_then(XenbusState::parse);
        // A ring that was found broken is closed in good order, then comes a new cycle.
        let wanted = self.wanted && !self.is_broken();
        let view = FrontView { own: self.own, back: theirs, wanted };
        match decide(&view) {
            FrontAction::Wait => {
                if self.is_connected() && theirs == Some(XenbusState::Connected) {
                    self.look_again(&back);
                }
                FrontStep::Wait
            }
            FrontAction::Publish => match self.offer(hv, pool, &back) {
                Ok(nodes) => self.write(XenbusState::Initialised, nodes),
                Err(fault) => FrontStep::Refused(fault),
            },
            FrontAction::Connect => match DiskNodes::parse(back.values) {
                Ok(nodes) => {
                    self.nodes = Some(nodes);
                    self.counters.connects += 1;
                    self.vanished = false;
                    self.write(XenbusState::Connected, Vec::new())
                }
                Err(fault) => FrontStep::Refused(FrontFault::Nodes(fault)),
            },
            FrontAction::Close => {
                self.leave(theirs);
                self.write(XenbusState::Closing, Vec::new())
            }
            FrontAction::Release => {
                self.leave(theirs);
                if let Some(port) = self.port.take() {
                    hv.close_port(port);
                }
                self.write(XenbusState::Closed, Vec::new())
            }
            FrontAction::Restart => self.write(XenbusState::Initialising, Vec::new()),
        }
    }

    /// Orderly is what goes by way of Closing; a backend that shows anything else has not
    /// finished what it took.
    fn leave(&mut self, theirs: Option<XenbusState>) {
        let orderly = matches!(theirs, Some(XenbusState::Closing | XenbusState::Closed));
        if self.own == XenbusState::Connected {
            self.vanished = theirs.is_none();
            self.disconnect(orderly);
        }
        self.ring = None;
    }

    /// The size may have changed while we are connected.
    fn look_again<V: AsRef<[u8]>>(&mut self, back: &BackNodes<'_, V>) {
        if let (Ok(now), Some(nodes)) = (DiskNodes::parse(back.values), &mut self.nodes) {
            nodes.sectors = now.sectors;
        }
    }

    fn write(&mut self, state: XenbusState, mut nodes: Vec<(String, String)>) -> FrontStep {
        self.own = state;
        nodes.push(("state".to_string(), state.number().to_string()));
        FrontStep::Write(nodes)
    }

    /// Rings, grants and a port for a new cycle.
    fn offer<H: Hypervisor, V: AsRef<[u8]>>(
        &mut self,
        hv: &mut H,
        pool: &mut Pool,
        back: &BackNodes<'_, V>,
    ) -> Result<Vec<(String, String)>, FrontFault> {
        if self.shared.is_none() {
            self.shared = Some(self.share(hv, pool)?);
        }
        let Some(shared) = &self.shared else { return Err(FrontFault::Memory) };
        // Before Connected only the limits need to be there.
        let order = back.values[9].as_ref().and_then(|text| {
            platter_xen::xenstore::decimal(text.as_ref()).map(|order| order.min(4) as u32)
        });
        let pages = 1 << order.unwrap_or(0).min(RING_PAGE_ORDER_MAX);
        let region = Region { pages, ..shared.ring };
        if let Some(port) = self.port.take() {
            hv.close_port(port);
        }
        let port = hv.alloc_unbound(self.domid).map_err(FrontFault::Refused)?;
        self.port = Some(port);
        self.ring = Some(FrontRing::init(hv, region, Abi::X86_64));
        let grefs = shared.ring_grefs.iter().take(pages as usize).copied().collect();
        let mut queues = heapless::Vec::new();
        let pushed = queues.push(Queue { grefs, port });
        assert!(pushed.is_ok(), "one queue fits");
        Ok(front_nodes(&Connect { abi: Abi::X86_64, queues }))
    }

    /// Grants the pool, the ring and the pages of descriptors: once for all cycles.
    fn share<H: Hypervisor>(&self, hv: &mut H, pool: &mut Pool) -> Result<Shared, FrontFault> {
        let peer = pool.grant_to(hv, self.domid).map_err(FrontFault::Refused)?;
        let ring = hv.frames_alloc(1 << RING_PAGE_ORDER_MAX).ok_or(FrontFault::Memory)?;
        let Some(indirect) = hv.frames_alloc(INDIRECT_PAGES) else {
            hv.frames_free(ring);
            return Err(FrontFault::Memory);
        };
        let mut grant_all = |region: Region| -> Result<Vec<Gref>, Refusal> {
            (0..region.pages as usize)
                .map(|page| hv.grant(self.domid, region.page(page), true))
                .collect()
        };
        let ring_grefs = grant_all(ring).map_err(FrontFault::Refused)?;
        let indirect_grefs = grant_all(indirect).map_err(FrontFault::Refused)?;
        Ok(Shared { peer, ring, ring_grefs, indirect, indirect_grefs })
    }
}
