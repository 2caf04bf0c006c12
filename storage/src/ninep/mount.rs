//! The xenstore handshake of one 9p share, from the frontend's side.
//!
//! Guards that a share is taken up whenever its server appears, however late, and taken up again
//! after the server died: a level-triggered machine, given the backend's nodes as they are now,
//! that says what to write below `device/9pfs/<n>`. Order of Xen's docs/misc/9pfs.pandoc:
//! backend 2, our nodes and 3, backend 4, our 4. Must never: use a ring before the backend
//! shows 4, or after it has left 4.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use platter_xen::ninepfs::{FrontRing, Offer, OfferFault, SetupFault, Shape, front_nodes};
use platter_xen::xenbus::XenbusState;
use platter_xen::{DomId, Gref, Hypervisor, Port};

use super::client::{Client, Lane};
use super::session::Session;

/// The backend's nodes as they stand. A missing node is `None`.
#[derive(Clone, Copy, Default, Debug)]
pub struct BackNodes<'a> {
    pub state: Option<&'a [u8]>,
    pub versions: Option<&'a [u8]>,
    pub max_rings: Option<&'a [u8]>,
    pub max_ring_page_order: Option<&'a [u8]>,
}

/// Why a share cannot be brought up now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MountFault {
    Offer(OfferFault),
    Setup(SetupFault),
    /// A server came back with less than our rings need, and the old one still maps them.
    Shrunk,
}

/// What the caller does next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MountStep {
    /// Nothing, until the backend's state changes or the session breaks.
    Wait,
    /// Write these nodes below our own directory, in this order; then ask again.
    Write(Vec<(String, String)>),
    /// As `Wait`, with a reason for people.
    Refused(MountFault),
}

/// One share's handshake.
#[derive(Debug)]
pub struct Mount {
    domid: DomId,
    frames_max: usize,
    /// Our own state as we wrote it last; the toolstack starts with Initialising.
    own: XenbusState,
}

impl Mount {
    /// `domid`: the backend's (`backend-id`). `frames_max`: what all rings of the share may take.
    pub fn new(domid: DomId, frames_max: usize) -> Mount {
        Mount { domid, frames_max, own: XenbusState::Initialising }
    }

    /// Decides from the backend's nodes. Call at each event on the backend's `state`, after each
    /// write, and when [`Client::session`] turns [`Session::Broken`].
    pub fn update<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        client: &mut Client,
        back: BackNodes<'_>,
    ) -> MountStep {
        use XenbusState::{Closed, Closing, Connected, InitWait, Initialised, Initialising};
        let theirs = back.state.and_then(XenbusState::parse).unwrap_or(XenbusState::Unknown);
        match (self.own, theirs) {
            (Initialising, InitWait) => self.offer(hv, client, back),
            (Initialised, Connected) => {
                client.session_start();
                self.write(Connected)
            }
            (Initialised, InitWait | Initialised) => MountStep::Wait,
            (Connected, Connected) if !matches!(client.session(), Session::Broken(_)) => {
                MountStep::Wait
            }
            (Initialised | Connected, _) => {
                // The server has gone, or we gave it up.
                if client.session().is_connected() {
                    client.lose(Session::Down);
                }
                // A new server that is already waiting need not see us close.
                let fresh = matches!(theirs, Initialising | InitWait);
                self.write(if fresh { Initialising } else { Closed })
            }
            (Closed, Closed | Initialising | InitWait) => self.write(Initialising),
            (Closed, Closing) => MountStep::Wait,
            _ => MountStep::Wait,
        }
    }

    fn write(&mut self, state: XenbusState) -> MountStep {
        self.own = state;
        MountStep::Write(Vec::from([state_node(state)]))
    }

    fn offer<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        client: &mut Client,
        back: BackNodes<'_>,
    ) -> MountStep {
        let offer = Offer::parse(back.versions, back.max_rings, back.max_ring_page_order);
        let rings = offer.map_err(MountFault::Offer).and_then(|offer| {
            if client.lanes.is_empty() {
                let shape = offer.choose(self.frames_max).map_err(MountFault::Offer)?;
                client.set_up(hv, self.domid, shape)
            } else {
                client.restart(hv, self.domid, offer)
            }
        });
        match rings {
            Ok(rings) => {
                self.own = XenbusState::Initialised;
                let mut nodes = front_nodes(&rings);
                nodes.push(state_node(XenbusState::Initialised));
                MountStep::Write(nodes)
            }
            Err(fault) => MountStep::Refused(fault),
        }
    }
}

fn state_node(state: XenbusState) -> (String, String) {
    (String::from("state"), format!("{}", state.number()))
}

impl Client {
    fn set_up<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        domid: DomId,
        shape: Shape,
    ) -> Result<Vec<(Gref, Port)>, MountFault> {
        for _ in 0..shape.rings {
            match FrontRing::new(hv, domid, shape.order) {
                Ok(ring) => self.lanes.push(Lane::new(ring)),
                Err(fault) => {
                    // Nothing has been announced: no one can hold on to them.
                    self.lanes.drain(..).for_each(|mut lane| {
                        lane.ring.try_release(hv);
                    });
                    return Err(MountFault::Setup(fault));
                }
            }
        }
        Ok(self.addresses())
    }

    fn restart<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        domid: DomId,
        offer: Offer,
    ) -> Result<Vec<(Gref, Port)>, MountFault> {
        let order = self.lanes[0].ring.order();
        if self.lanes.len() as u32 > offer.rings_max || order > offer.order_max {
            return Err(MountFault::Shrunk);
        }
        for lane in &mut self.lanes {
            let restarted = lane.ring.restart(hv, domid);
            restarted.map_err(|refusal| MountFault::Setup(SetupFault::Refused(refusal)))?;
        }
        Ok(self.addresses())
    }

    fn addresses(&self) -> Vec<(Gref, Port)> {
        self.lanes.iter().map(|lane| lane.ring.address()).collect()
    }
}

#[cfg(test)]
#[path = "mount_tests.rs"]
mod tests;
