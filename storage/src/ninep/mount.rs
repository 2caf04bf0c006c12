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
    /// Several sessions in a row failed before anything could be opened, the last one for this
    /// reason. Tried again with a new server only.
    GivenUp(&'static str),
}

/// Sessions that fail before they are up until we stop: a server that cannot do is not asked in
/// a loop.
const FAILURES_MAX: u32 = 3;

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
    /// Sessions in a row that never were up, and why the last one failed.
    failures: u32,
    failure: &'static str,
}

impl Mount {
    /// `domid`: the backend's (`backend-id`). `frames_max`: what all rings of the share may take.
    pub fn new(domid: DomId, frames_max: usize) -> Mount {
        let own = XenbusState::Initialising;
        Mount { domid, frames_max, own, failures: 0, failure: "" }
    }

    /// Decides from the backend's nodes. Call at each event on the backend's `state`, after each
    /// write, and when [`Client::session`] turns [`Session::Broken`].
    pub fn update<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        client: &mut Client,
        back: BackNodes<'_>,
    ) -> MountStep {
        use XenbusState::{Closed, Connected, InitWait, Initialised, Initialising};
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
                self.count(client);
                if client.session().is_connected() {
                    client.lose(Session::Down);
                }
                // A new server that is already waiting need not see us close.
                let fresh = matches!(theirs, Initialising | InitWait);
                self.write(if fresh { Initialising } else { Closed })
            }
            (Closed, Initialising) => {
                self.failures = 0;
                self.write(Initialising)
            }
            (Closed, Closed | InitWait) if self.failures >= FAILURES_MAX => {
                MountStep::Refused(MountFault::GivenUp(self.failure))
            }
            (Closed, Closed | InitWait) => self.write(Initialising),
            _ => MountStep::Wait,
        }
    }

    fn count(&mut self, client: &Client) {
        match client.session() {
            Session::Broken(reason) if !client.was_up => {
                self.failures += 1;
                self.failure = reason;
            }
            _ => self.failures = 0,
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
            let fits = !client.releasing && client.fits(offer);
            if !fits && !client.release(hv) {
                return Err(MountFault::Shrunk);
            }
            if client.lanes.is_empty() {
                let shape = offer.choose(self.frames_max).map_err(MountFault::Offer)?;
                client.set_up(hv, self.domid, shape)
            } else {
                client.restart(hv, self.domid)
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

    /// The rings that we have are within what a server offers.
    fn fits(&self, offer: Offer) -> bool {
        let order = self.lanes.first().map_or(0, |lane| lane.ring.order());
        self.lanes.len() as u32 <= offer.rings_max && order <= offer.order_max
    }

    /// Gives all rings back. False while an old server still maps some.
    fn release<H: Hypervisor>(&mut self, hv: &mut H) -> bool {
        self.lanes.retain_mut(|lane| !lane.ring.try_release(hv));
        self.releasing = !self.lanes.is_empty();
        !self.releasing
    }

    fn restart<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        domid: DomId,
    ) -> Result<Vec<(Gref, Port)>, MountFault> {
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
