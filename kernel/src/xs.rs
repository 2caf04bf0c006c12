//! The server's xenstore connection: each request carries its purpose, and gets it back with
//! the answer. Control path only: allocates, bounded by the client's queue.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use platter_xen::xenbus::XenbusState;
use platter_xen::xenstore::{Client, Event, Op, Token, TxId, XsError};
use platter_xen::{Hypervisor, Port, Region};

use crate::fronts::FrontKind;
use crate::limits::EXPLAINED_MAX;

/// What an answer is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Nothing depends on it.
    None,
    /// Names below a directory of the backend tree, at this depth: kinds, guests, devices.
    Scan {
        path: alloc::string::String,
        depth: u8,
    },
    /// Our own devices of a kind.
    Fronts(FrontKind),
    /// A key that device `index` asked for; `serial` tells its successors apart.
    DeviceKey {
        index: u16,
        serial: u32,
        key: alloc::string::String,
    },
    /// Our write of its state.
    DeviceState {
        index: u16,
        serial: u32,
        state: XenbusState,
    },
    /// A removal by which it goes on.
    DeviceRemoved {
        index: u16,
        serial: u32,
    },
    FrontKey {
        index: u8,
        key: alloc::string::String,
    },
    /// The last of a device's writes.
    FrontWritten {
        index: u8,
    },
    Shutdown,
}

pub struct Xs {
    client: Client,
    /// Disks whose refusals stand in `error/backend`, oldest first.
    explained: VecDeque<String>,
    purposes: BTreeMap<u32, Purpose>,
    next: u32,
    /// Something was queued since the last poll, which is what sends it.
    unsent: bool,
    /// Requests that could not be queued: never silently lost.
    pub lost: u32,
}

/// An answer or an event.
pub enum XsEvent {
    Reply {
        purpose: Purpose,
        result: Result<Vec<u8>, XsError>,
    },
    Watch {
        path: alloc::string::String,
    },
    /// All watches and requests are void: begin anew.
    Reset,
    Dead,
}

impl Xs {
    pub fn new<H: Hypervisor>(hv: &H, page: Region, port: Port) -> Xs {
        let client = Client::new(hv, page, port);
        let (purposes, explained) = (BTreeMap::new(), VecDeque::new());
        Xs { client, explained, purposes, next: 1, unsent: false, lost: 0 }
    }

    pub fn port(&self) -> Port {
        self.client.port()
    }

    pub fn is_idle(&self) -> bool {
        self.client.is_idle()
    }

    /// False when the queue is full: no answer will come.
    pub fn read(&mut self, path: &str, purpose: Purpose) -> bool {
        self.submit(Op::Read { path }, purpose)
    }

    pub fn write(&mut self, path: &str, value: &str, purpose: Purpose) {
        self.submit(Op::Write { path, value: value.as_bytes() }, purpose);
    }

    /// Says in `error/backend/KIND/GUEST/DISK/error` why a disk is refused. Only the last of
    /// these stay: they outlive their disks, and each counts against our quota of nodes.
    pub fn explain(&mut self, name: &str, reason: &str) {
        self.write(&format!("error/backend/{name}/error"), reason, Purpose::None);
        self.explained.retain(|known| known != name);
        self.explained.push_back(name.to_string());
        if self.explained.len() <= EXPLAINED_MAX {
            return;
        }
        let Some(oldest) = self.explained.pop_front() else { return };
        // The guest's directory goes with its last disk.
        let guest = oldest.rsplit_once('/').map_or(oldest.as_str(), |(guest, _)| guest);
        let alone = !self.explained.iter().any(|known| known.starts_with(&format!("{guest}/")));
        let gone = if alone { guest } else { &oldest };
        self.remove(&format!("error/backend/{gone}"), Purpose::None);
    }

    pub fn remove(&mut self, path: &str, purpose: Purpose) {
        self.submit(Op::Rm { path }, purpose);
    }

    pub fn list(&mut self, path: &str, purpose: Purpose) {
        self.submit(Op::Directory { path }, purpose);
    }

    /// Events name the path itself, so one token does for all.
    pub fn watch(&mut self, path: &str, watch: u32) {
        self.submit(Op::Watch { path, watch: Token(watch) }, Purpose::None);
    }

    pub fn unwatch(&mut self, path: &str, watch: u32) {
        self.submit(Op::Unwatch { path, watch: Token(watch) }, Purpose::None);
    }

    /// Something waits for a poll to send it: do not sleep before.
    pub fn is_unsent(&self) -> bool {
        self.unsent
    }

    pub fn poll<H: Hypervisor>(&mut self, hv: &mut H) -> Option<XsEvent> {
        self.unsent = false;
        Some(match self.client.poll(hv)? {
            Event::Reply { token: Token(token), result } => {
                let purpose = self.purposes.remove(&token).unwrap_or(Purpose::None);
                XsEvent::Reply { purpose, result }
            }
            Event::Watch { path, watch: _ } => XsEvent::Watch { path },
            Event::Reset => {
                self.purposes.clear();
                XsEvent::Reset
            }
            Event::Dead(_) => XsEvent::Dead,
        })
    }

    fn submit(&mut self, op: Op<'_>, purpose: Purpose) -> bool {
        let token = self.next;
        self.next = self.next.wrapping_add(1);
        if self.client.submit(TxId::NONE, op, Token(token)).is_err() {
            self.lost += 1;
            return false;
        }
        self.unsent = true;
        if purpose != Purpose::None {
            self.purposes.insert(token, purpose);
        }
        true
    }
}
