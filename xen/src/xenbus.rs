//! xenbus: the states of a device's two ends, and what a backend does about them.

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
