//! The server's xenstore connection: each request carries its purpose, and gets it back with
//! the answer. Control path only: allocates, bounded by the client's queue.
//!
//! xenstored refuses: its own quotas, no memory, an error of its disk. Whoever asked for the nodes
//! of a device decides anew later; what nobody would ask for again (watches, lists, removals) is
//! made again here, later and later, until it is answered.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use platter_xen::xenbus::XenbusState;
use platter_xen::xenstore::{Client, Event, NotQueued, Op, Token, TxId, WATCHES_MAX, XsError};
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
    /// A node of its, beside its state.
    DeviceWritten {
        index: u16,
        serial: u32,
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
    /// One of a device's writes.
    FrontWritten {
        index: u8,
    },
    Shutdown,
}

/// The first pause after a refusal; each one after it in a row takes twice as long.
const RETRY_NS: u64 = 200_000_000;
/// How often it is doubled: to 6.4 seconds.
const DOUBLINGS_MAX: u32 = 5;
/// Requests that wait to be made again: all watches, and as many others.
const LATE_MAX: usize = 2 * WATCHES_MAX;

/// How long to wait before what was refused `times` in a row is tried again.
pub fn pause_ns(times: u32) -> u64 {
    RETRY_NS << times.saturating_sub(1).min(DOUBLINGS_MAX)
}

/// A request that is made again until it is answered.
#[derive(Clone, PartialEq, Eq)]
enum Ask {
    Read(String),
    Write(String, String),
    Remove(String),
    List(String),
    Watch(String, u32),
    Unwatch(String, u32),
}

impl Ask {
    fn op(&self) -> Op<'_> {
        match self {
            Ask::Read(path) => Op::Read { path },
            Ask::Write(path, value) => Op::Write { path, value: value.as_bytes() },
            Ask::Remove(path) => Op::Rm { path },
            Ask::List(path) => Op::Directory { path },
            Ask::Watch(path, watch) => Op::Watch { path, watch: Token(*watch) },
            Ask::Unwatch(path, watch) => Op::Unwatch { path, watch: Token(*watch) },
        }
    }
}

/// One of these, on the wire or waiting.
struct Insisted {
    ask: Ask,
    purpose: Purpose,
    refusals: u32,
}

/// Answers that whoever asked for several things at once waits for.
#[derive(Default)]
pub struct Awaited {
    outstanding: usize,
    /// Something was refused, or found no room in the queue.
    refused: bool,
}

impl Awaited {
    /// What [`Xs::read`] and the like said of one more request.
    pub fn sent(&mut self, queued: bool) {
        match queued {
            true => self.outstanding += 1,
            false => self.refused = true,
        }
    }

    /// One was answered. True when it was the last.
    pub fn answered(&mut self, refused: bool) -> bool {
        self.refused |= refused;
        self.outstanding -= 1;
        self.is_over()
    }

    pub fn is_over(&self) -> bool {
        self.outstanding == 0
    }

    pub fn is_refused(&self) -> bool {
        self.refused
    }
}

pub struct Xs {
    client: Client,
    /// On the wire, by token.
    insisted: BTreeMap<u32, Insisted>,
    /// Refused; made again at this time.
    late: Vec<(u64, Insisted)>,
    now_ns: u64,
    /// Disks whose refusals stand in `error/backend`, oldest first.
    explained: VecDeque<String>,
    purposes: BTreeMap<u32, Purpose>,
    next: u32,
    /// Something was queued since the last poll, which is what sends it.
    unsent: bool,
    /// Requests given up that nobody makes again: told on the console.
    lost: u32,
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
        let (insisted, late) = (BTreeMap::new(), Vec::new());
        Xs {
            client,
            insisted,
            late,
            now_ns: 0,
            explained,
            purposes,
            next: 1,
            unsent: false,
            lost: 0,
        }
    }

    pub fn port(&self) -> Port {
        self.client.port()
    }

    pub fn is_idle(&self) -> bool {
        self.client.is_idle() && self.late.is_empty()
    }

    /// False when the queue is full: no answer will come.
    pub fn read(&mut self, path: &str, purpose: Purpose) -> bool {
        self.submit(Op::Read { path }, purpose)
    }

    /// As [`Xs::read`].
    pub fn write(&mut self, path: &str, value: &str, purpose: Purpose) -> bool {
        self.submit(Op::Write { path, value: value.as_bytes() }, purpose)
    }

    /// As [`Xs::read`].
    pub fn remove(&mut self, path: &str, purpose: Purpose) -> bool {
        self.submit(Op::Rm { path }, purpose)
    }

    /// Until xenstore answers, be it that there is no such node.
    pub fn surely_read(&mut self, path: &str, purpose: Purpose) {
        self.insist(Ask::Read(path.to_string()), purpose);
    }

    /// For nodes of our own that nobody takes away.
    pub fn surely_write(&mut self, path: &str, value: &str) {
        // What was to be done there before no longer is.
        self.late.retain(|(_, late)| match &late.ask {
            Ask::Write(known, _) => known != path,
            Ask::Remove(above) => !path.starts_with(above.as_str()),
            _ => true,
        });
        self.insist(Ask::Write(path.to_string(), value.to_string()), Purpose::None);
    }

    pub fn surely_remove(&mut self, path: &str) {
        self.insist(Ask::Remove(path.to_string()), Purpose::None);
    }

    pub fn list(&mut self, path: &str, purpose: Purpose) {
        self.insist(Ask::List(path.to_string()), purpose);
    }

    /// Events name the path itself, so one token does for all.
    pub fn watch(&mut self, path: &str, watch: u32) {
        self.forget(&Ask::Unwatch(path.to_string(), watch));
        self.insist(Ask::Watch(path.to_string(), watch), Purpose::None);
    }

    pub fn unwatch(&mut self, path: &str, watch: u32) {
        self.forget(&Ask::Watch(path.to_string(), watch));
        self.insist(Ask::Unwatch(path.to_string(), watch), Purpose::None);
    }

    /// Says in `error/backend/KIND/GUEST/DISK/error` why a disk is refused. Only the last of
    /// these stay: they outlive their disks, and each counts against our quota of nodes.
    pub fn explain(&mut self, name: &str, reason: &str) {
        self.surely_write(&format!("error/backend/{name}/error"), reason);
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
        self.surely_remove(&format!("error/backend/{gone}"));
    }

    fn insist(&mut self, ask: Ask, purpose: Purpose) {
        self.make(Insisted { ask, purpose, refusals: 0 });
    }

    fn make(&mut self, insisted: Insisted) {
        let token = self.next;
        match self.queue(insisted.ask.op(), Purpose::None) {
            Ok(()) => drop(self.insisted.insert(token, insisted)),
            Err(NotQueued::BadPath | NotQueued::TooLong) => self.lose(),
            Err(NotQueued::Full | NotQueued::TooManyWatches | NotQueued::Dead) => {
                self.put_off(insisted);
            }
        }
    }

    fn put_off(&mut self, mut insisted: Insisted) {
        if self.late.len() == LATE_MAX {
            return self.lose();
        }
        insisted.refusals += 1;
        let at_ns = self.now_ns.saturating_add(pause_ns(insisted.refusals));
        self.late.push((at_ns, insisted));
    }

    /// Said at the first, the second, the fourth, ...: whatever floods us does not flood people.
    fn lose(&mut self) {
        self.lost = self.lost.saturating_add(1);
        if self.lost.is_power_of_two() {
            log::warn!("requests to xenstore that were given up: {}", self.lost);
        }
    }

    /// Does not insist on it any longer.
    fn forget(&mut self, ask: &Ask) {
        self.late.retain(|(_, late)| late.ask != *ask);
        self.insisted.retain(|_, made| made.ask != *ask);
    }

    /// When something is to be made again.
    pub fn poll_at_ns(&self) -> Option<u64> {
        self.late.iter().map(|(at_ns, _)| *at_ns).min()
    }

    fn make_late(&mut self) {
        while let Some(at) = self.late.iter().position(|(at_ns, _)| *at_ns <= self.now_ns) {
            let (_, insisted) = self.late.remove(at);
            self.make(insisted);
        }
    }

    /// Something waits for a poll to send it: do not sleep before.
    pub fn is_unsent(&self) -> bool {
        self.unsent
    }

    pub fn poll<H: Hypervisor>(&mut self, hv: &mut H, now_ns: u64) -> Option<XsEvent> {
        self.now_ns = now_ns;
        self.make_late();
        self.unsent = false;
        loop {
            let event = match self.client.poll(hv)? {
                Event::Reply { token: Token(token), result } => match self.replied(token, result) {
                    Some(event) => event,
                    None => continue,
                },
                Event::Watch { path, watch: _ } => XsEvent::Watch { path },
                Event::Reset => {
                    self.purposes.clear();
                    // Watches and lists are asked for by whoever began with them.
                    let made = core::mem::take(&mut self.insisted).into_values();
                    self.late.extend(made.map(|made| (now_ns, made)));
                    self.late
                        .retain(|(_, late)| matches!(late.ask, Ask::Write(..) | Ask::Remove(_)));
                    XsEvent::Reset
                }
                Event::Dead(_) => XsEvent::Dead,
            };
            return Some(event);
        }
    }

    fn replied(&mut self, token: u32, result: Result<Vec<u8>, XsError>) -> Option<XsEvent> {
        let Some(made) = self.insisted.remove(&token) else {
            let purpose = self.purposes.remove(&token).unwrap_or(Purpose::None);
            return Some(XsEvent::Reply { purpose, result });
        };
        match (result, made.ask) {
            // Our removal of it was refused before: it stands, and does not fire anew.
            (Err(XsError::Exists), Ask::Watch(path, _)) => Some(XsEvent::Watch { path }),
            (result @ (Ok(_) | Err(XsError::NoEnt)), _) => {
                Some(XsEvent::Reply { purpose: made.purpose, result })
            }
            (Err(_), ask) => {
                self.put_off(Insisted { ask, ..made });
                None
            }
        }
    }

    fn submit(&mut self, op: Op<'_>, purpose: Purpose) -> bool {
        self.queue(op, purpose).is_ok()
    }

    fn queue(&mut self, op: Op<'_>, purpose: Purpose) -> Result<(), NotQueued> {
        let token = self.next;
        self.next = self.next.wrapping_add(1);
        self.client.submit(TxId::NONE, op, Token(token))?;
        self.unsent = true;
        if purpose != Purpose::None {
            self.purposes.insert(token, purpose);
        }
        Ok(())
    }
}
