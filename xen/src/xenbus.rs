//! xenbus: the states of a device's two ends, and what a backend does about them.
//!
//! Guards the contract with libxl and with every frontend (Xen docs/misc/blkif and what libxl's
//! libxl_device.c really waits for): InitWait stays visible until dom0 has read it, Closed stays
//! visible before the directory is deleted, a close asked for by anyone ends in full release.
//! Level-triggered: [`decide`] is a pure function of what both ends show *now*, because watches
//! merge and give no old value; any sequence of states a guest shows ends in a legal place
//! (CVE-2010-3699, XSA-350). Must never: remember a transition, wait, touch the rings.
//!
//! The caller reads the nodes, calls [`decide`], does the one action, calls
//! [`Memory::written`] once a state write is acknowledged, reads the nodes again and decides
//! again; on [`Action::Wait`] it stops until an event.

/// `enum xenbus_state` (public/io/xenbus.h).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum XenbusState {
    Unknown = 0,
    Initialising = 1,
    InitWait = 2,
    Initialised = 3,
    Connected = 4,
    Closing = 5,
    Closed = 6,
    Reconfiguring = 7,
    Reconfigured = 8,
}

impl XenbusState {
    /// From a `state` node: one digit, as frontends compare it as text.
    pub fn parse(text: &[u8]) -> Option<XenbusState> {
        Some(match text {
            b"0" => XenbusState::Unknown,
            b"1" => XenbusState::Initialising,
            b"2" => XenbusState::InitWait,
            b"3" => XenbusState::Initialised,
            b"4" => XenbusState::Connected,
            b"5" => XenbusState::Closing,
            b"6" => XenbusState::Closed,
            b"7" => XenbusState::Reconfiguring,
            b"8" => XenbusState::Reconfigured,
            _ => return None,
        })
    }

    /// For the `state` node.
    pub const fn number(self) -> u8 {
        self as u8
    }
}

/// How long the first InitWait stays before we leave it. libxl waits for exactly "2"; with a
/// fast frontend the next state would overwrite it within a millisecond and `xl block-attach`
/// would time out. An xl that is scheduled at all reads it in far less.
pub const INIT_WAIT_VISIBLE_NS: u64 = 200_000_000;
/// How long Closed stays before the directory is deleted: libxl waits for "6" first, up to 10 s,
/// and takes a missing node for an error.
pub const CLOSED_VISIBLE_NS: u64 = 300_000_000;

/// Which directory of the backend the device lies in: libxl treats them differently.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// `backend/vbd`: dom0 waits for InitWait.
    Vbd,
    /// `backend/qdisk`: dom0 waits for nothing at creation.
    Qdisk,
}

/// Where the disk's image stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Image {
    Opening,
    Ready,
    Failed,
}

/// Where the rings to the frontend stand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rings {
    /// Nothing mapped, no port bound.
    Down,
    Up,
    /// The other end broke a ring: mapped still, no longer served.
    Broken,
    /// Being drained and unmapped.
    Releasing,
}

/// What we wrote to our own state, and when.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Memory {
    wrote: Option<XenbusState>,
    wrote_at_ns: u64,
    /// Our first InitWait has been followed by another state.
    served: bool,
    /// Since when the toolstack has wanted the device gone.
    offline_since_ns: Option<u64>,
}

impl Memory {
    /// The write of `state` has been acknowledged by xenstored.
    pub fn written(&mut self, state: XenbusState, now_ns: u64) {
        self.served |= self.wrote == Some(XenbusState::InitWait) && state != XenbusState::InitWait;
        self.wrote = Some(state);
        self.wrote_at_ns = now_ns;
    }

    /// Does our node hold what we did not write, after we had written something? dom0 asks for
    /// removal so, or has made the directory anew for another disk.
    pub fn is_overwritten(&self, own: Option<XenbusState>) -> bool {
        self.wrote.is_some() && own.is_some() && self.wrote != own
    }

    /// `online` was read: before each [`decide`].
    pub fn saw_online(&mut self, online: bool, now_ns: u64) {
        self.offline_since_ns = (!online).then(|| self.offline_since_ns.unwrap_or(now_ns));
    }
}

/// Everything a decision depends on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct View {
    pub kind: Kind,
    /// `be/state`; `None` when the node is missing, Unknown when it is not a state.
    pub own: Option<XenbusState>,
    /// The frontend's `state`, likewise.
    pub front: Option<XenbusState>,
    /// `be/online`: false when the node says 0 or is missing.
    pub online: bool,
    pub image: Image,
    pub rings: Rings,
    /// The frontend's keys were refused, and nothing of the frontend has changed since.
    pub connect_refused: bool,
    pub memory: Memory,
    pub now_ns: u64,
}

/// What the caller does next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Nothing, until a node or the image changes.
    Wait,
    /// Decide again after so many nanoseconds, or at an event.
    WaitFor(u64),
    /// Write all keys of the disk, then InitWait.
    Publish,
    /// Read the frontend's keys, map its rings, bind its ports, write Connected, and look at
    /// the rings once without an event: a frontend may have put requests there before.
    Connect,
    /// Stop taking requests, drain, unmap every ring, close every port.
    Release,
    Write(XenbusState),
    /// Delete `be/state`: the only failure that libxl notices at once. What else is in the
    /// directory stays, the reason among it.
    DeleteState,
    /// Delete the whole directory, then forget the device.
    DeleteBackend,
    /// The directory is gone: close the image and free everything.
    Forget,
}

/// Decides what to do about a device.
pub fn decide(view: &View) -> Action {
    if view.rings == Rings::Releasing {
        return Action::Wait;
    }
    let Some(own) = view.own else { return view.after_release(Action::Forget) };
    // Our own node changes by dom0's hand too, and only by its: Closing asks for removal, Closed
    // (of a qdisk whose guest is dying) for removal at once.
    let foreign = view.memory.wrote != Some(own);
    if foreign && own == XenbusState::Closed {
        return view.after_release(Action::DeleteBackend);
    }
    if !view.online || (foreign && own == XenbusState::Closing) {
        return view.remove(own);
    }
    match view.image {
        Image::Opening => Action::Wait,
        Image::Failed => view.fail(own),
        Image::Ready if foreign => view.claim(),
        Image::Ready => view.serve(own),
    }
}

impl View {
    fn is_down(&self) -> bool {
        self.rings == Rings::Down
    }

    fn after_release(&self, action: Action) -> Action {
        if self.is_down() { action } else { Action::Release }
    }

    /// The toolstack wants the device gone. A connected frontend is asked first.
    fn remove(&self, own: XenbusState) -> Action {
        use XenbusState::{Closed, Closing, Initialising};
        let front_lives = !matches!(self.front, None | Some(Closed | Initialising));
        if self.rings == Rings::Up && front_lives {
            return if own == Closing { Action::Wait } else { Action::Write(Closing) };
        }
        if !self.is_down() {
            return Action::Release;
        }
        if own != Closed {
            return Action::Write(Closed);
        }
        // A Closed from before the toolstack came stands for it no longer than one written now.
        self.once_visible(CLOSED_VISIBLE_NS, Action::DeleteBackend)
    }

    /// `action`, but not before our last write has stood for `visible_ns`, nor so soon after
    /// the toolstack began to wait for it.
    fn once_visible(&self, visible_ns: u64, action: Action) -> Action {
        let since_ns = self.memory.wrote_at_ns.max(self.memory.offline_since_ns.unwrap_or(0));
        let stood_ns = self.now_ns.saturating_sub(since_ns);
        match visible_ns.checked_sub(stood_ns) {
            None | Some(0) => action,
            Some(rest_ns) => Action::WaitFor(rest_ns),
        }
    }

    fn fail(&self, own: XenbusState) -> Action {
        use XenbusState::{Closed, Closing, Connected, Initialising};
        if !self.is_down() {
            return Action::Release;
        }
        if self.kind == Kind::Vbd && !self.memory.served {
            return Action::DeleteState;
        }
        match (own, self.front) {
            (Closed, _) => Action::Wait,
            (Connected, _) => Action::Write(Closing),
            (Closing, Some(front)) if !matches!(front, Closed | Initialising) => Action::Wait,
            _ => Action::Write(Closed),
        }
    }

    /// Our node holds what we did not write: the toolstack's first Initialising, or nonsense.
    fn claim(&self) -> Action {
        match self.memory.wrote {
            Some(wrote) if !self.is_down() => Action::Write(wrote),
            _ => Action::Publish,
        }
    }

    fn serve(&self, own: XenbusState) -> Action {
        use XenbusState::{Closed, Closing, Connected, InitWait, Initialised, Initialising};
        let connected = matches!(own, Connected | Closing);
        if self.rings == Rings::Broken || (!connected && !self.is_down()) {
            return Action::Release;
        }
        match (own, self.front) {
            (InitWait, front) => self.leave_init_wait(front),
            // A frontend that has started anew (kexec, crash kernel) or that skipped our Closed.
            (Connected | Closing, Some(Initialising)) => self.after_release(Action::Publish),
            (Connected | Closing, None | Some(Closed)) => self.after_release(Action::Write(Closed)),
            (Connected, Some(Closing)) => Action::Write(Closing),
            (Connected, _) if self.is_down() => Action::Write(Closing),
            (Connected | Closing, _) => Action::Wait,
            // The frontend's return to 1 may have been merged into what came after it.
            (Closed, Some(Initialising | Initialised | Connected)) => Action::Publish,
            (Closed, _) => Action::Wait,
            (
                XenbusState::Unknown
                | Initialising
                | Initialised
                | XenbusState::Reconfiguring
                | XenbusState::Reconfigured,
                _,
            ) => Action::Publish,
        }
    }

    fn leave_init_wait(&self, front: Option<XenbusState>) -> Action {
        use XenbusState::{Closed, Closing, Connected, Initialised};
        let action = match front {
            // Linux shows 3 here; mini-os, pv-grub and OVMF jump to 4.
            Some(Initialised | Connected) if !self.connect_refused => Action::Connect,
            Some(Closing) => Action::Write(Closing),
            Some(Closed) => Action::Write(Closed),
            _ => return Action::Wait,
        };
        if self.kind == Kind::Vbd && !self.memory.served {
            self.once_visible(INIT_WAIT_VISIBLE_NS, action)
        } else {
            action
        }
    }
}

#[cfg(test)]
#[path = "xenbus_tests.rs"]
mod tests;
