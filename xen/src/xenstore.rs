//! xenstore: the wire protocol over the shared xenstore page.
//!
//! Guards the page's two byte rings (Xen public/io/xs_wire.h), the 20 outstanding requests that
//! xenstored allows, and the memory that a watch storm may take (XSA-349): events are merged by
//! path and, beyond [`EVENTS_MAX`], into one event per watch that means "anything below". Must
//! never: queue without a bound, believe an index or a length of the ring, wait.
//!
//! Allocates, within the bounds below: xenstore is not on the request path.

use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use crate::{Hypervisor, Port, Region};

/// `XENSTORE_RING_SIZE` (xs_wire.h): bytes in each direction.
const RING_BYTES: u32 = 1024;
const REQ: usize = 0;
const RSP: usize = 1024;
const REQ_CONS: usize = 2048;
const REQ_PROD: usize = 2052;
const RSP_CONS: usize = 2056;
const RSP_PROD: usize = 2060;
const SERVER_FEATURES: usize = 2064;
const CONNECTION: usize = 2068;
/// `XENSTORE_SERVER_FEATURE_RECONNECTION`.
const FEATURE_RECONNECTION: u32 = 1;
const CONNECTED: u32 = 0;
const RECONNECT: u32 = 1;

/// `struct xsd_sockmsg`: type, req_id, tx_id, len, u32 each.
const HEADER_BYTES: usize = 16;
/// `XENSTORE_PAYLOAD_MAX`.
pub const PAYLOAD_BYTES_MAX: usize = 4096;
/// `XENSTORE_ABS_PATH_MAX`.
pub const PATH_BYTES_MAX: usize = 3072;
/// Requests on the wire at once: below the 20 at which xenstored stops reading us.
const IN_FLIGHT_MAX: usize = 16;
/// Requests waiting for the wire: ours, some 30 disks' keys at once.
pub const QUEUE_MAX: usize = 1024;
/// Bytes that waiting requests may hold: ours.
const QUEUE_BYTES_MAX: usize = 128 * 1024;
/// Distinct paths remembered before events collapse into one per watch: ours.
pub const EVENTS_MAX: usize = 256;
/// Watches of ours: xenstored's own quota (xenstored_core.c).
pub const WATCHES_MAX: usize = 128;

/// `enum xsd_sockmsg_type` (xs_wire.h), as far as we use it.
pub mod kind {
    pub const DIRECTORY: u32 = 1;
    pub const READ: u32 = 2;
    pub const WATCH: u32 = 4;
    pub const UNWATCH: u32 = 5;
    pub const TRANSACTION_START: u32 = 6;
    pub const TRANSACTION_END: u32 = 7;
    pub const GET_DOMAIN_PATH: u32 = 10;
    pub const WRITE: u32 = 11;
    pub const MKDIR: u32 = 12;
    pub const RM: u32 = 13;
    pub const SET_PERMS: u32 = 14;
    pub const WATCH_EVENT: u32 = 15;
    pub const ERROR: u32 = 16;
}

/// A transaction as xenstored names it; [`TxId::NONE`] outside of any.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TxId(pub u32);

impl TxId {
    pub const NONE: TxId = TxId(0);

    /// From the answer to [`Op::TransactionStart`].
    pub fn parse(payload: &[u8]) -> Option<TxId> {
        let id = decimal(trim_nul(payload)).and_then(|id| u32::try_from(id).ok())?;
        (id != 0).then_some(TxId(id))
    }
}

/// The caller's name of a request or a watch; given back in [`Event`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Token(pub u32);

/// A request. Paths are absolute, or relative to our own `/local/domain/<domid>`.
#[derive(Clone, Copy, Debug)]
pub enum Op<'a> {
    Read {
        path: &'a str,
    },
    Write {
        path: &'a str,
        value: &'a [u8],
    },
    Mkdir {
        path: &'a str,
    },
    Rm {
        path: &'a str,
    },
    Directory {
        path: &'a str,
    },
    /// Fires once at once, then at each change of `path` or below. Events carry `watch`.
    Watch {
        path: &'a str,
        watch: Token,
    },
    Unwatch {
        path: &'a str,
        watch: Token,
    },
    TransactionStart,
    TransactionEnd {
        commit: bool,
    },
    GetDomainPath {
        domid: u16,
    },
    /// `perms` as xenstored spells them: `n5`, `r0`, ...
    SetPerms {
        path: &'a str,
        perms: &'a [&'a str],
    },
}

impl Op<'_> {
    fn kind(&self) -> u32 {
        match self {
            Op::Read { .. } => kind::READ,
            Op::Write { .. } => kind::WRITE,
            Op::Mkdir { .. } => kind::MKDIR,
            Op::Rm { .. } => kind::RM,
            Op::Directory { .. } => kind::DIRECTORY,
            Op::Watch { .. } => kind::WATCH,
            Op::Unwatch { .. } => kind::UNWATCH,
            Op::TransactionStart => kind::TRANSACTION_START,
            Op::TransactionEnd { .. } => kind::TRANSACTION_END,
            Op::GetDomainPath { .. } => kind::GET_DOMAIN_PATH,
            Op::SetPerms { .. } => kind::SET_PERMS,
        }
    }

    fn path(&self) -> Option<&str> {
        match self {
            Op::Read { path }
            | Op::Write { path, .. }
            | Op::Mkdir { path }
            | Op::Rm { path }
            | Op::Directory { path }
            | Op::Watch { path, .. }
            | Op::Unwatch { path, .. }
            | Op::SetPerms { path, .. } => Some(path),
            Op::TransactionStart | Op::TransactionEnd { .. } | Op::GetDomainPath { .. } => None,
        }
    }

    fn payload(&self, into: &mut Vec<u8>) {
        if let Some(path) = self.path() {
            put_string(into, path);
        }
        match self {
            Op::Write { value, .. } => into.extend_from_slice(value),
            Op::Watch { watch, .. } | Op::Unwatch { watch, .. } => {
                put_string(into, &format!("{}", watch.0));
            }
            Op::TransactionStart => into.push(0),
            Op::TransactionEnd { commit } => put_string(into, if *commit { "T" } else { "F" }),
            Op::GetDomainPath { domid } => put_string(into, &format!("{domid}")),
            Op::SetPerms { perms, .. } => perms.iter().for_each(|perm| put_string(into, perm)),
            _ => {}
        }
    }
}

fn put_string(into: &mut Vec<u8>, text: &str) {
    into.extend_from_slice(text.as_bytes());
    into.push(0);
}

/// Why a request was not queued.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NotQueued {
    /// The queue is full; poll, then try again.
    Full,
    /// Empty, too long, with a NUL, `//` or a trailing `/` (XSA-481): our own caller's mistake.
    BadPath,
    /// The payload exceeds 4096 bytes.
    TooLong,
    /// More watches than xenstored allows.
    TooManyWatches,
    /// The connection is gone.
    Dead,
}

/// xenstored's refusals.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum XsError {
    NoEnt,
    Access,
    /// The transaction lost a race: do it again.
    Again,
    /// Our quota of nodes is used up.
    NoSpace,
    Exists,
    /// Too many open transactions.
    Busy,
    TooBig,
    Invalid,
    Other,
}

impl XsError {
    fn parse(payload: &[u8]) -> XsError {
        match trim_nul(payload) {
            b"ENOENT" => XsError::NoEnt,
            b"EACCES" | b"EPERM" => XsError::Access,
            b"EAGAIN" => XsError::Again,
            b"ENOSPC" => XsError::NoSpace,
            b"EEXIST" => XsError::Exists,
            b"EBUSY" => XsError::Busy,
            b"E2BIG" => XsError::TooBig,
            b"EINVAL" => XsError::Invalid,
            _ => XsError::Other,
        }
    }
}

/// What [`Client::poll`] yields.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    Reply {
        token: Token,
        result: Result<Vec<u8>, XsError>,
    },
    /// Something changed at `path`, or somewhere below it when events were merged.
    Watch {
        path: String,
        watch: Token,
    },
    /// The connection was reset: every outstanding request and every watch is void.
    Reset,
    /// The connection is broken and cannot be reset.
    Dead(Broken),
}

/// What the server's side of the page got wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Broken {
    /// An index further from its partner than the ring is long.
    Index,
    /// A message longer than 4096 bytes.
    Length,
    /// An answer to nothing that was asked, or of another type.
    Reply,
}

struct InFlight {
    req_id: u32,
    kind: u32,
    token: Token,
    /// For a watch request: what to forget when it is refused.
    watch: Option<Token>,
}

struct Pending {
    entry: InFlight,
    bytes: Vec<u8>,
}

struct Watch {
    token: Token,
    path: String,
    /// Events were merged: yield `path` itself once.
    overflowed: bool,
}

enum State {
    Up,
    Resetting,
    Dead,
}

/// One end of the xenstore page.
pub struct Client {
    page: Region,
    port: Port,
    state: State,
    req_prod: u32,
    rsp_cons: u32,
    req_id_next: u32,
    queue: VecDeque<Pending>,
    queue_bytes: usize,
    /// Bytes of the queue's first entry that are on the ring already.
    sent: usize,
    in_flight: Vec<InFlight>,
    incoming: Vec<u8>,
    watches: Vec<Watch>,
    events: VecDeque<(Token, String)>,
    notify_due: bool,
}

impl Client {
    /// `page` is the mapped xenstore page, `port` its event channel (start_info).
    pub fn new<H: Hypervisor>(hv: &H, page: Region, port: Port) -> Client {
        Client {
            page,
            port,
            state: State::Up,
            req_prod: hv.load_u32(page, REQ_PROD),
            rsp_cons: hv.load_u32(page, RSP_CONS),
            req_id_next: 1,
            queue: VecDeque::new(),
            queue_bytes: 0,
            sent: 0,
            in_flight: Vec::with_capacity(IN_FLIGHT_MAX),
            incoming: Vec::new(),
            watches: Vec::new(),
            events: VecDeque::new(),
            notify_due: false,
        }
    }

    /// The event channel to wait on.
    pub fn port(&self) -> Port {
        self.port
    }

    /// Nothing queued, nothing outstanding.
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.in_flight.is_empty()
    }

    /// Queues a request; it goes out at the next [`poll`](Self::poll). Exactly one
    /// [`Event::Reply`] with `token` follows, unless [`Event::Reset`] or [`Event::Dead`] comes
    /// first. Requests are sent, and answered, in order.
    pub fn submit(&mut self, tx: TxId, op: Op<'_>, token: Token) -> Result<(), NotQueued> {
        match self.state {
            State::Up => {}
            // What is queued now would be void at the reset.
            State::Resetting => return Err(NotQueued::Full),
            State::Dead => return Err(NotQueued::Dead),
        }
        if op.path().is_some_and(|path| !path_is_sane(path)) {
            return Err(NotQueued::BadPath);
        }
        let mut bytes = Vec::from([0; HEADER_BYTES]);
        op.payload(&mut bytes);
        let len = bytes.len() - HEADER_BYTES;
        if len > PAYLOAD_BYTES_MAX {
            return Err(NotQueued::TooLong);
        }
        if self.queue.len() >= QUEUE_MAX || self.queue_bytes + bytes.len() > QUEUE_BYTES_MAX {
            return Err(NotQueued::Full);
        }
        let watch = self.note_watch(&op)?;
        let req_id = self.req_id_next;
        self.req_id_next = self.req_id_next.wrapping_add(1).max(1);
        for (index, word) in [op.kind(), req_id, tx.0, len as u32].into_iter().enumerate() {
            bytes[index * 4..index * 4 + 4].copy_from_slice(&word.to_le_bytes());
        }
        self.queue_bytes += bytes.len();
        let entry = InFlight { req_id, kind: op.kind(), token, watch };
        self.queue.push_back(Pending { entry, bytes });
        Ok(())
    }

    /// Enters or removes a watch in our table; what a refused watch request must undo.
    fn note_watch(&mut self, op: &Op<'_>) -> Result<Option<Token>, NotQueued> {
        match op {
            Op::Watch { path, watch } => {
                if self.watches.len() >= WATCHES_MAX {
                    return Err(NotQueued::TooManyWatches);
                }
                let path = String::from(*path);
                self.watches.push(Watch { token: *watch, path, overflowed: false });
                Ok(Some(*watch))
            }
            Op::Unwatch { watch, .. } => {
                self.forget_watch(*watch);
                Ok(None)
            }
            _ => Ok(None),
        }
    }

    fn forget_watch(&mut self, token: Token) {
        self.watches.retain(|watch| watch.token != token);
        self.events.retain(|(watch, _)| *watch != token);
    }

    /// Moves bytes both ways and yields the next event: replies first, then watch events.
    /// The caller calls until `None`.
    pub fn poll<H: Hypervisor>(&mut self, hv: &mut H) -> Option<Event> {
        if let State::Resetting = self.state {
            if hv.load_u32(self.page, CONNECTION) != CONNECTED {
                return None;
            }
            self.req_prod = hv.load_u32(self.page, REQ_PROD);
            self.rsp_cons = hv.load_u32(self.page, RSP_CONS);
            self.state = State::Up;
            return Some(Event::Reset);
        }
        if let State::Dead = self.state {
            return None;
        }
        match self.exchange(hv) {
            Ok(event) => event,
            Err(broken) => self.give_up(hv, broken),
        }
    }

    fn exchange<H: Hypervisor>(&mut self, hv: &mut H) -> Result<Option<Event>, Broken> {
        while let Some((kind, req_id, payload)) = self.receive(hv)? {
            if kind == kind::WATCH_EVENT {
                self.note_event(&payload);
            } else {
                return Ok(Some(self.reply(kind, req_id, payload)?));
            }
        }
        self.send(hv)?;
        if core::mem::take(&mut self.notify_due) {
            hv.notify(self.port);
        }
        Ok(self.next_watch_event())
    }

    fn give_up<H: Hypervisor>(&mut self, hv: &mut H, broken: Broken) -> Option<Event> {
        self.queue.clear();
        self.queue_bytes = 0;
        self.sent = 0;
        self.in_flight.clear();
        self.incoming.clear();
        self.watches.clear();
        self.events.clear();
        if hv.load_u32(self.page, SERVER_FEATURES) & FEATURE_RECONNECTION == 0 {
            self.state = State::Dead;
            return Some(Event::Dead(broken));
        }
        self.state = State::Resetting;
        hv.store_u32(self.page, CONNECTION, RECONNECT);
        hv.notify(self.port);
        None
    }

    /// Takes what is there of the next message; yields it when it is whole.
    fn receive<H: Hypervisor>(
        &mut self,
        hv: &mut H,
    ) -> Result<Option<(u32, u32, Vec<u8>)>, Broken> {
        loop {
            let want = match message_bytes(&self.incoming)? {
                Some(whole) if self.incoming.len() == whole => {
                    let message = core::mem::take(&mut self.incoming);
                    let payload = message[HEADER_BYTES..].to_vec();
                    return Ok(Some((word(&message, 0), word(&message, 1), payload)));
                }
                Some(whole) => whole,
                None => HEADER_BYTES,
            };
            if !self.pull(hv, want - self.incoming.len())? {
                return Ok(None);
            }
        }
    }

    /// Moves up to `want` bytes off the response ring. False when it is empty.
    fn pull<H: Hypervisor>(&mut self, hv: &mut H, want: usize) -> Result<bool, Broken> {
        let there = hv.load_u32(self.page, RSP_PROD).wrapping_sub(self.rsp_cons);
        if there > RING_BYTES {
            return Err(Broken::Index);
        }
        let at = self.rsp_cons % RING_BYTES;
        let len = (there.min(RING_BYTES - at) as usize).min(want);
        if len == 0 {
            return Ok(false);
        }
        let start = self.incoming.len();
        self.incoming.resize(start + len, 0);
        hv.read(self.page, RSP + at as usize, &mut self.incoming[start..]);
        self.rsp_cons = self.rsp_cons.wrapping_add(len as u32);
        hv.store_u32(self.page, RSP_CONS, self.rsp_cons);
        self.notify_due = true;
        Ok(true)
    }

    fn reply(&mut self, kind: u32, req_id: u32, payload: Vec<u8>) -> Result<Event, Broken> {
        let at = self.in_flight.iter().position(|entry| entry.req_id == req_id);
        let entry = self.in_flight.remove(at.ok_or(Broken::Reply)?);
        let result = if kind == kind::ERROR {
            let error = XsError::parse(&payload);
            // One that stands already fires for us as well.
            if let Some(watch) = entry.watch.filter(|_| error != XsError::Exists) {
                self.forget_watch(watch);
            }
            Err(error)
        } else if kind == entry.kind {
            Ok(payload)
        } else {
            return Err(Broken::Reply);
        };
        Ok(Event::Reply { token: entry.token, result })
    }

    /// Remembers a watch event, merged by path; one that is not ours is forgotten.
    fn note_event(&mut self, payload: &[u8]) {
        let Some((path, token)) = parse_watch_event(payload) else { return };
        let Some(watch) = self.watches.iter_mut().find(|watch| watch.token == token) else {
            return;
        };
        if watch.overflowed || self.events.iter().any(|(t, p)| *t == token && p == path) {
            return;
        }
        if self.events.len() >= EVENTS_MAX {
            watch.overflowed = true;
            self.events.retain(|(t, _)| *t != token);
        } else {
            self.events.push_back((token, String::from(path)));
        }
    }

    fn next_watch_event(&mut self) -> Option<Event> {
        if let Some((watch, path)) = self.events.pop_front() {
            return Some(Event::Watch { path, watch });
        }
        let watch = self.watches.iter_mut().find(|watch| watch.overflowed)?;
        watch.overflowed = false;
        Some(Event::Watch { path: watch.path.clone(), watch: watch.token })
    }

    fn send<H: Hypervisor>(&mut self, hv: &mut H) -> Result<(), Broken> {
        while let Some(first) = self.queue.front() {
            if self.sent == 0 && self.in_flight.len() >= IN_FLIGHT_MAX {
                break;
            }
            let used = self.req_prod.wrapping_sub(hv.load_u32(self.page, REQ_CONS));
            if used > RING_BYTES {
                return Err(Broken::Index);
            }
            let at = self.req_prod % RING_BYTES;
            let rest = &first.bytes[self.sent..];
            let len = rest.len().min((RING_BYTES - used).min(RING_BYTES - at) as usize);
            if len == 0 {
                break;
            }
            hv.write(self.page, REQ + at as usize, &rest[..len]);
            self.req_prod = self.req_prod.wrapping_add(len as u32);
            hv.store_u32(self.page, REQ_PROD, self.req_prod);
            self.notify_due = true;
            self.sent += len;
            if self.sent == first.bytes.len() {
                self.sent = 0;
                self.queue_bytes -= first.bytes.len();
                if let Some(done) = self.queue.pop_front() {
                    self.in_flight.push(done.entry);
                }
            }
        }
        Ok(())
    }
}

/// Length of the message that starts with `bytes`, header included; `None` while even the
/// header is not whole.
pub fn message_bytes(bytes: &[u8]) -> Result<Option<usize>, Broken> {
    if bytes.len() < HEADER_BYTES {
        return Ok(None);
    }
    match word(bytes, 3) as usize {
        len if len <= PAYLOAD_BYTES_MAX => Ok(Some(HEADER_BYTES + len)),
        _ => Err(Broken::Length),
    }
}

/// Path and token of a WATCH_EVENT's payload: `path NUL token NUL`.
pub fn parse_watch_event(payload: &[u8]) -> Option<(&str, Token)> {
    let mut parts = payload.split(|byte| *byte == 0);
    let path = core::str::from_utf8(parts.next()?).ok()?;
    let token = u32::try_from(decimal(parts.next()?)?).ok()?;
    if path.is_empty() || path.len() > PATH_BYTES_MAX {
        return None;
    }
    Some((path, Token(token)))
}

/// The names in a DIRECTORY answer; those that are not UTF-8 are left out.
pub fn names(payload: &[u8]) -> impl Iterator<Item = &str> {
    payload
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .filter_map(|name| core::str::from_utf8(name).ok())
}

/// A decimal number as xenstore nodes hold them: digits only, at least one, no overflow.
pub fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0u64, |value, byte| {
        let digit = byte.checked_sub(b'0').filter(|digit| *digit <= 9)?;
        value.checked_mul(10)?.checked_add(u64::from(digit))
    })
}

fn trim_nul(payload: &[u8]) -> &[u8] {
    payload.strip_suffix(&[0]).unwrap_or(payload)
}

fn path_is_sane(path: &str) -> bool {
    !path.is_empty()
        && path.len() <= PATH_BYTES_MAX
        && !path.contains('\0')
        && !path.contains("//")
        && (path == "/" || !path.ends_with('/'))
}

/// The header's `index`-th word; `bytes` holds a whole header.
fn word(bytes: &[u8], index: usize) -> u32 {
    let mut four = [0; 4];
    four.copy_from_slice(&bytes[index * 4..index * 4 + 4]);
    u32::from_le_bytes(four)
}

#[cfg(test)]
#[path = "xenstore_tests.rs"]
mod tests;
