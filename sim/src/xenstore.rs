//! xenstored: the tree, its owners, watches, and the platter domain's connection over the ring
//! page. The toolstack, guests and 9p servers call it directly: their connections are not under
//! test.
//!
//! Guards what the real one guards: nobody writes what is not his (XSA-115 for watches: nobody
//! hears of what he may not read), quotas, one answer per request in order. Must never: lose a
//! watch event, or merge two.

use std::collections::{BTreeMap, VecDeque};

use platter_xen::{Hypervisor, PAGE_BYTES, Port, Region};

use crate::machine::Machine;
use crate::rng::Rng;

/// xenstored's own domain here.
pub const XENSTORED: u16 = 32000;
/// Nodes of one unprivileged domain (xenstored_core.c).
const NODES_MAX: usize = 1000;
const WATCHES_MAX: usize = 128;
const RING_BYTES: u32 = 1024;
const REQ: usize = 0;
const RSP: usize = 1024;
const REQ_CONS: usize = 2048;
const REQ_PROD: usize = 2052;
const RSP_CONS: usize = 2056;
const RSP_PROD: usize = 2060;
const SERVER_FEATURES: usize = 2064;
const CONNECTION: usize = 2068;
const HEADER_BYTES: usize = 16;
const PAYLOAD_BYTES_MAX: usize = 4096;
const ERROR: u32 = 16;
const WATCH_EVENT: u32 = 15;

/// An errno by its name, as it stands on the wire.
pub type Errno = &'static str;

#[derive(Clone, Debug)]
struct Node {
    value: Vec<u8>,
    owner: u16,
    readers: Vec<u16>,
}

#[derive(Clone, Debug)]
struct Watch {
    /// Domain that set it; its events go to the ring, or make its agent run.
    domain: u16,
    path: String,
    token: String,
    /// Bytes to cut from the front of the paths it reports: it was set with a relative path.
    cut: usize,
    wired: bool,
}

/// The tree and all connections.
pub struct Xenstore {
    nodes: BTreeMap<String, Node>,
    watches: Vec<Watch>,
    /// Domains whose watches fired since the world looked; not the wired one.
    pub woken: Vec<u16>,
    wired: u16,
    page: Region,
    port: Port,
    incoming: Vec<u8>,
    outgoing: VecDeque<u8>,
    /// Requests that platter made.
    pub requests: u64,
    /// Watch events sent to platter.
    pub events: u64,
    /// A watch was just entered: its own event comes after its answer.
    fresh: bool,
    /// Of 1000 requests of platter, so many are refused: quotas, no memory, an error of its disk.
    pub refuse: u64,
    luck: Rng,
}

fn parent(path: &str) -> Option<&str> {
    let (parent, _) = path.rsplit_once('/')?;
    Some(if parent.is_empty() { "/" } else { parent })
}

/// dom0 and what runs there under a name of its own.
fn is_privileged(domain: u16) -> bool {
    domain == 0 || domain >= XENSTORED
}

/// Is `path` the place of `watch`, or below it?
fn is_below(path: &str, watch: &str) -> bool {
    path.strip_prefix(watch)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/') || watch == "/")
}

impl Xenstore {
    /// Another series of refusals.
    pub fn seed(&mut self, seed: u64) {
        self.luck = Rng::new(seed);
    }

    /// `wired` is the platter domain, `page` its xenstore page in its own numbering, `port`
    /// xenstored's end of its channel.
    pub fn new(wired: u16, page: Region, port: Port) -> Xenstore {
        let root = Node { value: vec![], owner: 0, readers: vec![] };
        Xenstore {
            nodes: BTreeMap::from([(String::from("/"), root)]),
            watches: vec![],
            woken: vec![],
            wired,
            page,
            port,
            incoming: vec![],
            outgoing: VecDeque::new(),
            requests: 0,
            events: 0,
            fresh: false,
            refuse: 0,
            luck: Rng::new(0xe5),
        }
    }

    fn absolute(domain: u16, path: &str) -> String {
        if path.starts_with('/') {
            return path.to_string();
        }
        format!("/local/domain/{domain}/{path}")
    }

    fn may_read(&self, domain: u16, path: &str) -> bool {
        let mut at = path;
        let node = loop {
            match (self.nodes.get(at), parent(at)) {
                (Some(node), _) => break node,
                (None, Some(above)) => at = above,
                (None, None) => return false,
            }
        };
        is_privileged(domain) || node.owner == domain || node.readers.contains(&domain)
    }

    fn may_write(&self, domain: u16, path: &str) -> bool {
        let mut at = path;
        loop {
            match (self.nodes.get(at), parent(at)) {
                (Some(node), _) => return domain == 0 || node.owner == domain,
                (None, Some(above)) => at = above,
                (None, None) => return false,
            }
        }
    }

    pub fn read(&self, domain: u16, path: &str) -> Result<&[u8], Errno> {
        let path = Self::absolute(domain, path);
        if !self.may_read(domain, &path) {
            return Err("EACCES");
        }
        self.nodes.get(&path).map(|node| node.value.as_slice()).ok_or("ENOENT")
    }

    /// A node as text, for agents.
    pub fn text(&self, domain: u16, path: &str) -> Option<String> {
        String::from_utf8(self.read(domain, path).ok()?.to_vec()).ok()
    }

    pub fn number(&self, domain: u16, path: &str) -> Option<u64> {
        self.text(domain, path)?.parse().ok()
    }

    pub fn exists(&self, path: &str) -> bool {
        self.nodes.contains_key(path)
    }

    /// Writes a node; creates it and what is missing above it.
    pub fn write(&mut self, domain: u16, path: &str, value: &[u8]) -> Result<(), Errno> {
        let path = Self::absolute(domain, path);
        if !self.may_write(domain, &path) {
            return Err("EACCES");
        }
        self.create(domain, &path)?;
        self.nodes.get_mut(&path).expect("just made").value = value.to_vec();
        self.fire(&path);
        Ok(())
    }

    fn create(&mut self, domain: u16, path: &str) -> Result<(), Errno> {
        if self.nodes.contains_key(path) {
            return Ok(());
        }
        if domain != 0 && self.nodes_of(domain) >= NODES_MAX {
            return Err("ENOSPC");
        }
        let above = parent(path).ok_or("EINVAL")?.to_string();
        self.create(domain, &above)?;
        let mut node = self.nodes[&above].clone();
        node.value.clear();
        // A new node inherits its parent's access; an unprivileged maker becomes its owner.
        if domain != 0 {
            node.owner = domain;
        }
        self.nodes.insert(path.to_string(), node);
        Ok(())
    }

    pub fn remove(&mut self, domain: u16, path: &str) -> Result<(), Errno> {
        let path = Self::absolute(domain, path);
        if !self.may_write(domain, &path) {
            return Err("EACCES");
        }
        if !self.nodes.contains_key(&path) {
            let above = parent(&path).is_some_and(|above| self.nodes.contains_key(above));
            return if above { Ok(()) } else { Err("ENOENT") };
        }
        let below = format!("{path}/");
        let gone: Vec<String> = self
            .nodes
            .range(path.clone()..)
            .map(|(name, _)| name)
            .take_while(|name| name.starts_with(&path))
            .filter(|name| **name == path || name.starts_with(&below))
            .cloned()
            .collect();
        // Who may not read a node does not hear of its end: asked before it is gone.
        self.fire(&path);
        for name in gone.iter().skip(1) {
            self.fire_exact(name);
        }
        gone.iter().for_each(|name| {
            self.nodes.remove(name);
        });
        Ok(())
    }

    pub fn list(&self, domain: u16, path: &str) -> Result<Vec<String>, Errno> {
        let path = Self::absolute(domain, path);
        if !self.may_read(domain, &path) {
            return Err("EACCES");
        }
        if !self.nodes.contains_key(&path) {
            return Err("ENOENT");
        }
        let below = if path == "/" { path } else { format!("{path}/") };
        let children = self.nodes.range(below.clone()..).map(|(name, _)| name.as_str());
        Ok(children
            .take_while(|name| name.starts_with(&below))
            .map(|name| &name[below.len()..])
            .filter(|rest| !rest.is_empty() && !rest.contains('/'))
            .map(String::from)
            .collect())
    }

    /// dom0's transaction: all nodes and their owners (path, owner, reader) stand before any
    /// watch fires.
    pub fn transaction(&mut self, nodes: &[(String, String)], owners: &[(String, u16, u16)]) {
        for (path, value) in nodes {
            self.create(0, path).expect("dom0 has no quota");
            self.nodes.get_mut(path).expect("just made").value = value.clone().into_bytes();
        }
        for (path, owner, reader) in owners {
            self.set_owner(path, *owner, &[*reader]);
        }
        nodes.iter().for_each(|(path, _)| self.fire(path));
    }

    /// The toolstack's word on who owns a node and everything below it.
    pub fn set_owner(&mut self, path: &str, owner: u16, readers: &[u16]) {
        let below = format!("{path}/");
        for (name, node) in self.nodes.range_mut(path.to_string()..) {
            if name == path || name.starts_with(&below) {
                node.owner = owner;
                node.readers = readers.to_vec();
            } else if !name.starts_with(path) {
                break;
            }
        }
    }

    /// An agent's watch: it is made to run when something changes at or below `path`.
    pub fn watch(&mut self, domain: u16, path: &str) {
        let path = path.to_string();
        let token = String::new();
        self.watches.push(Watch { domain, path, token, cut: 0, wired: false });
    }

    pub fn unwatch_all(&mut self, domain: u16) {
        self.watches.retain(|watch| watch.domain != domain || watch.wired);
    }

    fn fire(&mut self, path: &str) {
        for index in 0..self.watches.len() {
            if is_below(path, &self.watches[index].path) {
                self.deliver(index, path);
            }
        }
    }

    fn fire_exact(&mut self, path: &str) {
        for index in 0..self.watches.len() {
            if self.watches[index].path == path {
                self.deliver(index, path);
            }
        }
    }

    fn deliver(&mut self, index: usize, path: &str) {
        let watch = self.watches[index].clone();
        if !self.may_read(watch.domain, path) {
            return;
        }
        if watch.wired {
            self.events += 1;
            let payload = format!("{}\0{}\0", &path[watch.cut.min(path.len())..], watch.token);
            self.send(WATCH_EVENT, 0, 0, payload.as_bytes());
        } else if !self.woken.contains(&watch.domain) {
            self.woken.push(watch.domain);
        }
    }

    fn send(&mut self, kind: u32, req_id: u32, tx: u32, payload: &[u8]) {
        for word in [kind, req_id, tx, payload.len() as u32] {
            self.outgoing.extend(word.to_le_bytes());
        }
        self.outgoing.extend(payload);
    }

    /// Something waits for room on the ring.
    pub fn has_output(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Nodes that count against a domain's quota.
    pub fn nodes_of(&self, domain: u16) -> usize {
        self.nodes.values().filter(|node| node.owner == domain).count()
    }

    /// Paths of the nodes that a domain owns.
    pub fn owned(&self, domain: u16) -> Vec<String> {
        let of = self.nodes.iter().filter(|(_, node)| node.owner == domain);
        of.map(|(name, _)| name.clone()).collect()
    }

    /// Watches that platter holds.
    pub fn wired_watches(&self) -> usize {
        self.watches.iter().filter(|watch| watch.wired).count()
    }

    /// The domain that was wired has died and another takes its place: nothing of the old
    /// connection stays.
    pub fn rewire(&mut self, page: Region, port: Port) {
        self.watches.retain(|watch| !watch.wired);
        self.incoming.clear();
        self.outgoing.clear();
        (self.page, self.port) = (page, port);
    }

    /// Serves the ring: takes at most one request, puts out what fits. True when there is more
    /// to do without an event.
    pub fn run(&mut self, machine: &mut Machine) -> bool {
        machine.view(XENSTORED).take_pending(self.port);
        self.begin_anew(machine);
        let pulled = self.pull(machine);
        let served = self.serve_one();
        let pushed = self.push(machine);
        if pulled || pushed {
            machine.view(XENSTORED).notify(self.port);
        }
        served || pulled
    }

    /// What platter asked for and has no answer to is lost, and platter is made to see it: the
    /// ring is not what it was (as after a restart of xenstored).
    pub fn lose_connection(&mut self, machine: &mut Machine) {
        let hv = &mut machine.view(self.wired);
        hv.store_u32(self.page, SERVER_FEATURES, 1);
        let cons = hv.load_u32(self.page, RSP_CONS);
        hv.store_u32(self.page, RSP_PROD, cons.wrapping_add(2 * RING_BYTES));
        machine.view(XENSTORED).notify(self.port);
    }

    /// Platter asked for it (xenstore-ring.txt, reconnection).
    fn begin_anew(&mut self, machine: &mut Machine) {
        let hv = &mut machine.view(self.wired);
        if hv.load_u32(self.page, CONNECTION) == 0 {
            return;
        }
        self.incoming.clear();
        self.outgoing.clear();
        self.watches.retain(|watch| !watch.wired);
        for index in [REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD, CONNECTION] {
            hv.store_u32(self.page, index, 0);
        }
        machine.view(XENSTORED).notify(self.port);
    }

    fn pull(&mut self, machine: &mut Machine) -> bool {
        let hv = &mut machine.view(self.wired);
        let (cons, prod) = (hv.load_u32(self.page, REQ_CONS), hv.load_u32(self.page, REQ_PROD));
        let there = prod.wrapping_sub(cons);
        assert!(there <= RING_BYTES, "platter broke the xenstore ring");
        // The real one stops reading while much is unanswered; here: while its buffer is long.
        if self.incoming.len() > 4 * PAYLOAD_BYTES_MAX {
            return false;
        }
        let mut bytes = vec![0; there as usize];
        let at = (cons % RING_BYTES) as usize;
        let first = bytes.len().min(RING_BYTES as usize - at);
        let (now, later) = bytes.split_at_mut(first);
        hv.read(self.page, REQ + at, now);
        hv.read(self.page, REQ, later);
        hv.store_u32(self.page, REQ_CONS, prod);
        self.incoming.extend_from_slice(&bytes);
        there > 0
    }

    fn push(&mut self, machine: &mut Machine) -> bool {
        let hv = &mut machine.view(self.wired);
        let (cons, prod) = (hv.load_u32(self.page, RSP_CONS), hv.load_u32(self.page, RSP_PROD));
        let room = RING_BYTES.saturating_sub(prod.wrapping_sub(cons));
        let bytes: Vec<u8> =
            self.outgoing.drain(..self.outgoing.len().min(room as usize)).collect();
        let at = (prod % RING_BYTES) as usize;
        let first = bytes.len().min(RING_BYTES as usize - at);
        hv.write(self.page, RSP + at, &bytes[..first]);
        hv.write(self.page, RSP, &bytes[first..]);
        hv.store_u32(self.page, RSP_PROD, prod.wrapping_add(bytes.len() as u32));
        !bytes.is_empty()
    }

    fn serve_one(&mut self) -> bool {
        if self.incoming.len() < HEADER_BYTES {
            return false;
        }
        let word = |index: usize| {
            let bytes = &self.incoming[index * 4..index * 4 + 4];
            u32::from_le_bytes(bytes.try_into().expect("four bytes"))
        };
        let (kind, req_id, tx, len) = (word(0), word(1), word(2), word(3) as usize);
        assert!(len <= PAYLOAD_BYTES_MAX, "platter sent a message that is too long");
        if self.incoming.len() < HEADER_BYTES + len {
            return false;
        }
        let message: Vec<u8> = self.incoming.drain(..HEADER_BYTES + len).collect();
        self.requests += 1;
        let payload = &message[HEADER_BYTES..];
        let result = match self.refuse > 0 && self.luck.chance(self.refuse) {
            true => Err(self.refusal(payload)),
            false => self.answer(kind, payload),
        };
        match result {
            Ok(payload) => self.send(kind, req_id, tx, &payload),
            Err(errno) => self.send(ERROR, req_id, tx, format!("{errno}\0").as_bytes()),
        }
        if core::mem::take(&mut self.fresh) {
            let last = self.watches.len() - 1;
            let path = self.watches[last].path.clone();
            self.deliver(last, &path);
        }
        true
    }

    /// Why, by chance. That a foreign node may not be seen is an answer, and never by chance: so
    /// reads the home of a domain that is gone.
    fn refusal(&mut self, payload: &[u8]) -> Errno {
        let home = format!("/local/domain/{}/", self.wired);
        let foreign = payload.starts_with(b"/") && !payload.starts_with(home.as_bytes());
        let access = if foreign { "ENOMEM" } else { "EACCES" };
        let names = [access, "ENOSPC", "EQUOTA", "EAGAIN", "EIO"];
        names[self.luck.below(names.len() as u64) as usize]
    }

    fn answer(&mut self, kind: u32, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        let me = self.wired;
        let text = core::str::from_utf8(payload).map_err(|_| "EINVAL")?;
        let mut words = text.split('\0');
        let path = words.next().ok_or("EINVAL")?;
        assert!(!path.is_empty() && !path.ends_with('/'), "platter asks for '{path}' (XSA-481)");
        let ok = || b"OK\0".to_vec();
        match kind {
            1 => Ok(self
                .list(me, path)?
                .iter()
                .flat_map(|n| format!("{n}\0").into_bytes())
                .collect()),
            2 => self.read(me, path).map(<[u8]>::to_vec),
            4 => {
                if self.wired_watches() >= WATCHES_MAX {
                    return Err("E2BIG");
                }
                let (path, token) = (path.to_string(), words.next().ok_or("EINVAL")?.to_string());
                let absolute = Self::absolute(me, &path);
                let cut = absolute.len() - path.len();
                let same = |w: &&Watch| w.wired && w.path == absolute && w.token == token;
                if self.watches.iter().any(|watch| same(&watch)) {
                    return Err("EEXIST");
                }
                self.watches.push(Watch { domain: me, path: absolute, token, cut, wired: true });
                self.fresh = true;
                Ok(ok())
            }
            5 => {
                let (path, token) = (Self::absolute(me, path), words.next().ok_or("EINVAL")?);
                let ours = |w: &Watch| w.wired && w.path == path && w.token == token;
                let at = self.watches.iter().position(ours).ok_or("ENOENT")?;
                self.watches.remove(at);
                Ok(ok())
            }
            11 => {
                let value = &payload[path.len() + 1..];
                assert!(value.len() < PAGE_BYTES / 2, "a node beyond xenstored's 2048 bytes");
                self.write(me, path, value).map(|()| ok())
            }
            12 => self.write(me, path, b"").map(|()| ok()),
            13 => self.remove(me, path).map(|()| ok()),
            _ => Err("ENOSYS"),
        }
    }
}
