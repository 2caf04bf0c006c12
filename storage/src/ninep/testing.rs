//! A 9p server over the test machine's memory: honest by default, with the faults that tests
//! ask for. Shares the codec with the client, so a misreading common to both stays unseen here.

use std::collections::BTreeMap;
use std::string::{String, ToString};
use std::vec;
use std::vec::Vec;

use platter_xen::ninepfs::Half;
use platter_xen::ninepfs::{
    HEAD_BYTES, IN_CONS, IN_PROD, Interface, MessageHead, OUT_CONS, OUT_PROD, parse_front_nodes,
};
use platter_xen::{Gref, Hypervisor, PAGE_BYTES, Region};

use super::message::{
    Answer, MODE_REGULAR, QID_DIR, QID_SYMLINK, Qid, Request, VERSION_PLAIN, VERSION_PLATTER,
    VERSION_UNKNOWN,
};
use super::{BackNodes, Client, Mount, MountStep, Session};
use crate::extents::extents;
use crate::fake::Fake;
use crate::store::{Done, Store};

pub const MODE_DIR: u32 = 0o040_755;
pub const MODE_SYMLINK: u32 = 0o120_777;

pub struct Node {
    pub mode: u32,
    pub bytes: Vec<u8>,
    pub qid_path: u64,
}

struct Ring {
    interface: Region,
    data: Region,
    half: Half,
}

/// Faults, off by default.
#[derive(Default)]
pub struct Faults {
    /// Reads and writes of at most so many bytes.
    pub io_max: Option<u32>,
    /// This errno for every read, write and fsync.
    pub io_error: Option<u32>,
    /// This errno for every getattr.
    pub getattr_error: Option<u32>,
    /// Every file has this size.
    pub size: Option<u64>,
    /// This errno for every question for extents.
    pub extents_error: Option<u32>,
    /// Takes requests and answers none.
    pub deaf: bool,
    /// Answers reads with so many bytes beyond what was asked.
    pub read_extra: u32,
    /// So many bytes at the end of each answer never come.
    pub withheld: usize,
    /// Answers say that they are so many bytes longer than they are.
    pub promised: u8,
    /// Answers on the ring after the one that was asked.
    pub wrong_ring: bool,
    /// Flips bits of answers: the state of a xorshift generator.
    pub garble: Option<u32>,
}

pub struct Server {
    pub nodes: BTreeMap<String, Node>,
    /// Path of each fid.
    fids: BTreeMap<u32, String>,
    rings: Vec<Ring>,
    pub platter: bool,
    pub rings_max: u32,
    pub order_max: u32,
    pub msize_max: u32,
    pub faults: Faults,
    /// Requests served, by message number.
    pub served: BTreeMap<u8, u32>,
    /// Rings that carried anything but the handshake.
    pub rings_used: Vec<bool>,
    state: u8,
}

impl Server {
    pub fn new(platter: bool) -> Server {
        let mut server = Server {
            nodes: BTreeMap::new(),
            fids: BTreeMap::new(),
            rings: vec![],
            platter,
            rings_max: 8,
            order_max: 9,
            msize_max: u32::MAX,
            faults: Faults::default(),
            served: BTreeMap::new(),
            rings_used: vec![false; 8],
            state: 2,
        };
        server.add("", MODE_DIR, 0);
        server
    }

    pub fn add(&mut self, path: &str, mode: u32, bytes: usize) {
        let bytes = (0..bytes).map(|i| (i / 512 + i) as u8).collect();
        let qid_path = self.nodes.len() as u64 + 100;
        self.nodes.insert(path.to_string(), Node { mode, bytes, qid_path });
    }

    pub fn file(&mut self, path: &str, bytes: usize) {
        self.add(path, MODE_REGULAR | 0o600, bytes);
    }

    fn take_rings(&mut self, hv: &Fake, nodes: &[(String, String)]) {
        let node = |name: &str| {
            nodes.iter().find(|(n, _)| n == name).map(|(_, value)| value.clone().into_bytes())
        };
        let page = |gref: Gref| hv.grants[gref.0 as usize].expect("granted");
        self.rings = parse_front_nodes(node, self.rings_max)
            .unwrap()
            .into_iter()
            .map(|(gref, _)| {
                let interface = Region { first_page: page(gref), pages: 1 };
                let mut bytes = [0; PAGE_BYTES];
                hv.read(interface, 0, &mut bytes);
                let parsed = Interface::parse(&bytes).unwrap();
                assert!(parsed.order <= self.order_max);
                let pages = parsed.grefs.len() as u32;
                let data = Region { first_page: page(parsed.grefs[0]), pages };
                Ring { interface, data, half: Half::of_order(parsed.order).unwrap() }
            })
            .collect();
    }

    /// Dies as a process does: fids are gone, requests stay unanswered.
    pub fn die(&mut self) {
        self.fids.clear();
        self.rings.clear();
        self.state = 6;
    }

    /// Comes back and waits for the frontend.
    pub fn return_(&mut self) {
        self.state = 2;
    }

    /// Serves everything that is on the rings, in ring order backwards, so that answers do not
    /// come in the order of the requests.
    pub fn run(&mut self, hv: &mut Fake) {
        for index in (0..self.rings.len()).rev() {
            let mut waiting = vec![];
            while let Some((head, body)) = self.next_request(hv, index) {
                waiting.push((head, body));
            }
            assert!(self.platter || waiting.len() <= 1, "a plain ring serves one at a time");
            if self.platter {
                waiting.reverse();
            }
            for (head, body) in waiting {
                self.serve(hv, index, head, &body);
            }
        }
    }

    fn next_request(&mut self, hv: &mut Fake, index: usize) -> Option<(MessageHead, Vec<u8>)> {
        let ring = &self.rings[index];
        let cons = hv.load_u32(ring.interface, OUT_CONS);
        let prod = hv.load_u32(ring.interface, OUT_PROD);
        let queued = ring.half.queued(prod, cons).unwrap();
        if queued == 0 {
            return None;
        }
        assert!(queued >= HEAD_BYTES, "a partial message was published");
        let base = ring.half.bytes() as usize;
        let mut head = [0; 7];
        read_at(hv, ring, base, cons, &mut head);
        let head = MessageHead::parse(&head, ring.half.bytes()).unwrap();
        assert!(queued >= head.size, "a partial message was published");
        assert_eq!(usize::from(head.tag) % self.rings.len(), index, "ring = tag % rings");
        let mut body = vec![0; (head.size - HEAD_BYTES) as usize];
        read_at(hv, ring, base, cons.wrapping_add(HEAD_BYTES), &mut body);
        hv.store_u32(ring.interface, OUT_CONS, cons.wrapping_add(head.size));
        *self.served.entry(head.id).or_default() += 1;
        Some((head, body))
    }

    fn serve(&mut self, hv: &mut Fake, index: usize, head: MessageHead, body: &[u8]) {
        if self.faults.deaf {
            return;
        }
        let request = Request::parse(head, body).unwrap();
        let mut data = vec![];
        let mut answer = vec![0; 600];
        if !matches!(request, Request::Version { .. } | Request::Attach { .. }) {
            self.rings_used[index] = true;
        }
        let len = self.answer(&request, body, &mut data).emit(head.tag, &mut answer).unwrap();
        answer.truncate(len);
        answer.extend_from_slice(&data);
        if let Some(seed) = &mut self.faults.garble {
            garble(seed, &mut answer);
        }
        let index = index + usize::from(self.faults.wrong_ring);
        let ring = &self.rings[index % self.rings.len()];
        let prod = hv.load_u32(ring.interface, IN_PROD);
        let cons = hv.load_u32(ring.interface, IN_CONS);
        answer[0] += self.faults.promised;
        answer.truncate(answer.len() - self.faults.withheld);
        let len = answer.len() as u32;
        assert!(ring.half.room(prod, cons).unwrap() >= len, "a server would have to wait");
        let [first, second] = ring.half.split(prod, len);
        hv.write(ring.data, first.0 as usize, &answer[..first.1 as usize]);
        hv.write(ring.data, second.0 as usize, &answer[first.1 as usize..]);
        hv.store_u32(ring.interface, IN_PROD, prod.wrapping_add(len));
    }

    fn qid(&self, path: &str) -> Qid {
        let node = &self.nodes[path];
        let kind = match node.mode {
            MODE_DIR => QID_DIR,
            MODE_SYMLINK => QID_SYMLINK,
            _ => 0,
        };
        Qid { kind, version: 1, path: node.qid_path }
    }

    fn answer(&mut self, request: &Request, body: &[u8], data: &mut Vec<u8>) -> Answer<'static> {
        let is_io =
            matches!(request, Request::Read { .. } | Request::Write { .. } | Request::Fsync { .. });
        if let Some(ecode) = self.faults.io_error.filter(|_| is_io) {
            return Answer::Lerror { ecode };
        }
        let is_getattr = matches!(request, Request::Getattr { .. });
        if let Some(ecode) = self.faults.getattr_error.filter(|_| is_getattr) {
            return Answer::Lerror { ecode };
        }
        match request {
            Request::Version { msize, version } => self.version(*msize, version),
            Request::Attach { fid, .. } => {
                self.fids.insert(*fid, String::new());
                Answer::Attach { qid: self.qid("") }
            }
            Request::Walk { fid, newfid, names } => self.walk(*fid, *newfid, names),
            Request::Clunk { fid } => match self.fids.remove(fid) {
                Some(_) => Answer::Clunk,
                None => Answer::Lerror { ecode: 9 },
            },
            Request::Read { fid, .. }
            | Request::Write { fid, .. }
            | Request::Fsync { fid, .. }
            | Request::Lopen { fid, .. }
            | Request::Getattr { fid, .. }
            | Request::Setattr { fid, .. }
            | Request::Extents { fid, .. }
            | Request::Allocate { fid, .. } => match self.fids.get(fid).cloned() {
                Some(path) => self.file_answer(&path, request, body, data),
                None => Answer::Lerror { ecode: 9 },
            },
            Request::Flush { .. } => Answer::Lerror { ecode: 95 },
        }
    }

    fn version(&mut self, msize: u32, version: &str) -> Answer<'static> {
        self.fids.clear();
        let msize = msize.min(self.msize_max);
        let version = match version {
            VERSION_PLATTER if self.platter => VERSION_PLATTER,
            VERSION_PLAIN => VERSION_PLAIN,
            _ => VERSION_UNKNOWN,
        };
        Answer::Version { msize, version }
    }

    fn walk(&mut self, fid: u32, newfid: u32, names: &[&str]) -> Answer<'static> {
        let Some(mut path) = self.fids.get(&fid).cloned() else {
            return Answer::Lerror { ecode: 9 };
        };
        if fid != newfid && self.fids.contains_key(&newfid) {
            return Answer::Lerror { ecode: 22 };
        }
        let mut qids = heapless::Vec::new();
        for name in names {
            if !path.is_empty() {
                path.push('/');
            }
            path.push_str(name);
            if !self.nodes.contains_key(&path) {
                break;
            }
            qids.push(self.qid(&path)).unwrap();
        }
        if qids.is_empty() {
            return Answer::Lerror { ecode: 2 };
        }
        if qids.len() == names.len() {
            self.fids.insert(newfid, path);
        }
        Answer::Walk { qids }
    }

    fn file_answer(
        &mut self,
        path: &str,
        request: &Request,
        body: &[u8],
        data: &mut Vec<u8>,
    ) -> Answer<'static> {
        let qid = self.qid(path);
        let io_max = self.faults.io_max.unwrap_or(u32::MAX);
        let extents_error = self.faults.extents_error;
        let (read_extra, forged) = (self.faults.read_extra, self.faults.size);
        let node = self.nodes.get_mut(path).unwrap();
        let size = node.bytes.len() as u64;
        match request {
            Request::Getattr { .. } => {
                let size = forged.unwrap_or(size);
                Answer::Getattr { qid, mode: node.mode, size, blksize: 4096, blocks: 0 }
            }
            Request::Lopen { .. } => Answer::Lopen { qid, iounit: 0 },
            Request::Read { offset, count, .. } => {
                let start = (*offset).min(size) as usize;
                let end =
                    (start + ((*count).min(io_max) + read_extra) as usize).min(node.bytes.len());
                data.extend_from_slice(&node.bytes[start..end]);
                Answer::Read { count: data.len() as u32 }
            }
            Request::Write { offset, count, .. } => {
                let count = (*count).min(io_max);
                let (start, end) = (*offset as usize, *offset as usize + count as usize);
                node.bytes.resize(node.bytes.len().max(end), 0);
                node.bytes[start..end].copy_from_slice(&body[16..16 + count as usize]);
                Answer::Write { count }
            }
            Request::Setattr { size, .. } => {
                node.bytes.resize(*size as usize, 0);
                Answer::Setattr
            }
            Request::Allocate { offset, len, .. } => {
                let end = offset.saturating_add(*len).min(size) as usize;
                node.bytes[*offset as usize..end].fill(0);
                Answer::Allocate
            }
            Request::Extents { offset, len, .. } => match extents_error {
                Some(ecode) => Answer::Lerror { ecode },
                None => extents(&node.bytes, *offset, *len),
            },
            _ => Answer::Fsync,
        }
    }
}

fn read_at(hv: &Fake, ring: &Ring, base: usize, index: u32, into: &mut [u8]) {
    let [first, second] = ring.half.split(index, into.len() as u32);
    let (now, later) = into.split_at_mut(first.1 as usize);
    hv.read(ring.data, base + first.0 as usize, now);
    hv.read(ring.data, base + second.0 as usize, later);
}

/// Flips a bit of the first 40 bytes, one answer in eight.
fn garble(seed: &mut u32, bytes: &mut [u8]) {
    let mut next = || {
        *seed ^= *seed << 13;
        *seed ^= *seed >> 17;
        *seed ^= *seed << 5;
        *seed
    };
    if next() % 8 == 0 {
        let at = next() as usize % bytes.len().min(40);
        bytes[at] ^= 1 << (next() % 8);
    }
}

/// A client, a server and the handshake between them.
pub struct World {
    pub hv: Fake,
    pub server: Server,
    pub mount: Mount,
    pub client: Client,
    /// The frontend's nodes in xenstore.
    pub nodes: Vec<(String, String)>,
    pub now_ns: u64,
}

impl World {
    pub fn unmounted(server: Server, frames: usize) -> World {
        World {
            hv: Fake::new(frames + 100),
            server,
            mount: Mount::new(platter_xen::DomId(0), frames),
            client: Client::new(),
            nodes: vec![],
            now_ns: 0,
        }
    }

    /// 8 rings of order 3: 16 KiB each way.
    pub fn new(server: Server) -> World {
        let mut world = World::unmounted(server, 8 * 9);
        world.handshake();
        assert_eq!(world.poll_all(), []);
        assert_eq!(world.client.session(), Session::Up);
        world
    }

    /// One look at the backend's nodes; applies what is to be written. False: nothing to do.
    pub fn step(&mut self) -> MountStep {
        let state = self.server.state.to_string();
        let (rings, order) = (self.server.rings_max.to_string(), self.server.order_max.to_string());
        let back = BackNodes {
            state: Some(state.as_bytes()),
            versions: Some(b"1"),
            max_rings: Some(rings.as_bytes()),
            max_ring_page_order: Some(order.as_bytes()),
        };
        let step = self.mount.update(&mut self.hv, &mut self.client, back);
        if let MountStep::Write(nodes) = &step {
            for (name, value) in nodes {
                self.nodes.retain(|(n, _)| n != name);
                self.nodes.push((name.clone(), value.clone()));
            }
        }
        step
    }

    pub fn front_state(&self) -> &str {
        self.nodes.iter().find(|(name, _)| name == "state").map_or("1", |(_, value)| value)
    }

    /// Lets both ends follow each other to rest.
    pub fn handshake(&mut self) {
        for _ in 0..20 {
            if !self.handshake_once() {
                return;
            }
        }
        panic!("the handshake does not rest");
    }

    /// One step of both ends. False when neither moved.
    pub fn handshake_once(&mut self) -> bool {
        let moved = matches!(self.step(), MountStep::Write(_));
        let state = match (self.server.state, self.front_state()) {
            (2, "3") => {
                self.server.take_rings(&self.hv, &self.nodes.clone());
                4
            }
            (4, "5" | "6") => 6,
            (6, "1") => 2,
            (state, _) => state,
        };
        moved | (std::mem::replace(&mut self.server.state, state) != state)
    }

    /// A turn of the client: it gives back, takes an answer, sends.
    pub fn poll(&mut self) -> Option<Done> {
        Store::release(&mut self.client, &mut self.hv);
        let done = self.client.poll(&mut self.hv, self.now_ns);
        Store::push(&mut self.client, &mut self.hv);
        done
    }

    /// What the client has to say reaches the server, which acts.
    pub fn serve(&mut self) {
        Store::push(&mut self.client, &mut self.hv);
        self.server.run(&mut self.hv);
    }

    /// Runs both ends to rest and collects the answers. Windows are stale then.
    pub fn poll_all(&mut self) -> Vec<Done> {
        let mut all = vec![];
        for _ in 0..200 {
            self.serve();
            let before = all.len();
            while let Some(done) = self.poll() {
                all.push(done);
            }
            let idle = all.len() == before && !self.requests_wait();
            if idle {
                return all;
            }
        }
        all
    }

    /// Bytes of answers that the client has not given back.
    pub fn answers_held(&self) -> u32 {
        let word = |ring: &Ring, offset| self.hv.load_u32(ring.interface, offset);
        self.server.rings.iter().map(|ring| word(ring, IN_PROD) - word(ring, IN_CONS)).sum()
    }

    fn requests_wait(&self) -> bool {
        self.server.rings.iter().any(|ring| {
            self.hv.load_u32(ring.interface, OUT_PROD) != self.hv.load_u32(ring.interface, OUT_CONS)
        })
    }
}
