//! The frontend's side of a block device's handshake, for platter's own disks and for bare PV
//! guests that need one.
//!
//! Guards that a frontend follows its backend wherever it goes, whole cycle included: a
//! level-triggered decision, the mirror of [`crate::xenbus::decide`]. Nodes are in
//! [`crate::vbd`], requests in [`crate::blkif`], the ring in [`crate::ring`]. Must never: use a
//! ring before the backend shows Connected, or use a granted page for anything else before its
//! grant could be revoked: backends unmap when we show Closed, not when they show Closing.

use crate::xenbus::XenbusState;

/// What a frontend's decision depends on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrontView {
    /// What we wrote to our own state last; the toolstack starts with Initialising.
    pub own: XenbusState,
    /// The backend's state; `None` when the node is missing.
    pub back: Option<XenbusState>,
    /// We want the device: false asks for an orderly close.
    pub wanted: bool,
}

/// What a frontend does next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FrontAction {
    /// Nothing, until a node or our wish changes. A change of the backend's `state` node to
    /// Connected while we are connected means: read `sectors` again.
    Wait,
    /// Grant rings, allocate ports, write [`crate::vbd::front_nodes`], then Initialised.
    Publish,
    /// Read the backend's nodes, then write Connected; requests may go out.
    Connect,
    /// Fail what is outstanding, then write Closing.
    Close,
    /// Close all ports, write Closed, and revoke the grants as the backend lets go of them
    /// ([`crate::Hypervisor::revoke`] says false until then).
    Release,
    /// Write Initialising: ready for a new cycle.
    Restart,
}

/// Decides what to do about a device of ours.
pub fn decide(view: &FrontView) -> FrontAction {
    use XenbusState::{Closed, Closing, Connected, InitWait, Initialised, Initialising};
    let back = view.back.unwrap_or(Closed);
    match view.own {
        Initialising => match back {
            InitWait | Connected if view.wanted => FrontAction::Publish,
            Closing => FrontAction::Release,
            // Still, after our Restart: a backend leaves Closed when it sees us Initialising,
            // and would find Closed again, or stand at InitWait with nobody before it.
            Closed if !view.wanted && view.back.is_some() => FrontAction::Release,
            _ => FrontAction::Wait,
        },
        Initialised | Connected => match back {
            Connected if view.wanted => {
                if view.own == Connected {
                    FrontAction::Wait
                } else {
                    FrontAction::Connect
                }
            }
            Closing | Connected => FrontAction::Close,
            Closed => FrontAction::Release,
            // Not yet connected: the backend takes its time. Connected: it has started anew.
            _ if view.own == Initialised && view.wanted => FrontAction::Wait,
            _ => FrontAction::Close,
        },
        Closing => match back {
            Closing | Closed | Initialising | InitWait => FrontAction::Release,
            _ => FrontAction::Wait,
        },
        Closed if view.wanted && view.back == Some(Closed) => FrontAction::Restart,
        _ => FrontAction::Wait,
    }
}

#[cfg(test)]
mod tests {
    //! Both decision functions against each other. Would miss: other backends' habits.

    use super::*;
    use crate::xenbus::{self, Action, Image, Kind, Memory, Rings, View};

    /// Plays both ends, each reading what the other shows, until neither moves.
    struct Pair {
        front: FrontView,
        back: View,
        granted: bool,
        grants_due: bool,
    }

    impl Pair {
        fn new() -> Pair {
            let own = XenbusState::Initialising;
            let back = View {
                kind: Kind::Qdisk,
                own: Some(own),
                front: Some(own),
                online: true,
                image: Image::Ready,
                rings: Rings::Down,
                connect_refused: false,
                memory: Memory::default(),
                now_ns: 0,
            };
            let front = FrontView { own, back: Some(own), wanted: true };
            Pair { front, back, granted: false, grants_due: false }
        }

        fn run(&mut self) {
            for _ in 0..50 {
                let moved = self.step_back() | self.step_front();
                if !moved {
                    return;
                }
            }
            panic!("no rest");
        }

        fn step_back(&mut self) -> bool {
            self.back.front = Some(self.front.own);
            let state = match xenbus::decide(&self.back) {
                Action::Wait | Action::WaitFor(_) => return false,
                Action::Publish => XenbusState::InitWait,
                Action::Connect => {
                    assert!(self.granted, "mapped what was not granted");
                    self.back.rings = Rings::Up;
                    XenbusState::Connected
                }
                Action::Write(state) => state,
                Action::Release => {
                    self.back.rings = Rings::Down;
                    return true;
                }
                other => panic!("{other:?}"),
            };
            self.back.own = Some(state);
            self.back.memory.written(state, 0);
            true
        }

        fn step_front(&mut self) -> bool {
            self.front.back = self.back.own;
            if self.grants_due && self.back.rings == Rings::Down {
                (self.granted, self.grants_due) = (false, false);
            }
            self.front.own = match decide(&self.front) {
                FrontAction::Wait => return false,
                FrontAction::Publish => {
                    assert!(!self.granted, "granted twice");
                    self.granted = true;
                    XenbusState::Initialised
                }
                FrontAction::Connect => XenbusState::Connected,
                FrontAction::Close => XenbusState::Closing,
                FrontAction::Release => {
                    self.grants_due = true;
                    XenbusState::Closed
                }
                FrontAction::Restart => XenbusState::Initialising,
            };
            true
        }

        fn states(&self) -> (u8, u8) {
            (self.front.own.number(), self.back.own.map_or(0, XenbusState::number))
        }
    }

    #[test]
    fn connect_close_and_connect_again() {
        let mut pair = Pair::new();
        for _ in 0..3 {
            pair.front.wanted = true;
            pair.run();
            assert_eq!(pair.states(), (4, 4));
            pair.front.wanted = false;
            pair.run();
            assert_eq!(pair.states(), (6, 6));
            assert!(!pair.granted && pair.back.rings == Rings::Down);
        }
    }

    #[test]
    fn the_toolstack_takes_the_device() {
        let mut pair = Pair::new();
        pair.run();
        pair.back.own = Some(XenbusState::Closing);
        pair.back.online = false;
        pair.front.wanted = false;
        pair.run();
        assert_eq!(pair.states(), (6, 6));
        assert!(!pair.granted);
    }

    #[test]
    fn a_front_that_is_ready_stays_so_while_the_backend_shows_closed() {
        let back = Some(XenbusState::Closed);
        let mut view = FrontView { own: XenbusState::Closed, back, wanted: true };
        assert_eq!(decide(&view), FrontAction::Restart);
        view.own = XenbusState::Initialising;
        assert_eq!(decide(&view), FrontAction::Wait, "or it never sees us ready");
        view.wanted = false;
        assert_eq!(decide(&view), FrontAction::Release);
        (view.back, view.wanted) = (Some(XenbusState::Closing), true);
        assert_eq!(decide(&view), FrontAction::Release, "it waits for our Closed");
    }

    #[test]
    fn a_backend_that_vanishes_releases_the_front() {
        let mut view = FrontView { own: XenbusState::Connected, back: None, wanted: true };
        assert_eq!(decide(&view), FrontAction::Release);
        view.own = XenbusState::Closed;
        assert_eq!(decide(&view), FrontAction::Wait, "until a backend stands there again");
        view.back = Some(XenbusState::Closed);
        assert_eq!(decide(&view), FrontAction::Restart);
    }
}
