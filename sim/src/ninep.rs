//! The host's 9p server: plain (QEMU-like, one request per ring) or in platter's dialect, over
//! the rings of a 9pfs backend in domain 0.
//!
//! Guards the promises a client may rely on: an answer for each request, a read of what was
//! written, Fsync durable for what was answered before it was sent. Faults are asked for one by
//! one. Shares its codec with the client: a misreading common to both stays unseen here.

use std::collections::BTreeMap;

use platter_storage::ninep::message::{
    Answer, MODE_KIND_MASK, Qid, Request, VERSION_PLAIN, VERSION_PLATTER, VERSION_UNKNOWN,
};
use platter_xen::ninepfs::{
    HEAD_BYTES, Half, IN_CONS, IN_PROD, Interface, MessageHead, OUT_CONS, OUT_PROD,
    parse_front_nodes,
};
use platter_xen::{DomId, Gref, Hypervisor, PAGE_BYTES, Port, Region};

use crate::extents::extents;
use crate::files::Files;
use crate::machine::Machine;
use crate::rng::Rng;
use crate::xenstore::Xenstore;

/// The domain it runs in.
pub const HOST: u16 = 0;
/// Requests a ring has under way in platter's dialect.
const DEPTH: usize = 16;
const ENOENT: u32 = 2;
const EIO: u32 = 5;
const EBADF: u32 = 9;
const ENOSPC: u32 = 28;
const EOPNOTSUPP: u32 = 95;
const TWRITE_HEAD: usize = 16;
/// Where an answer has its kind, and an answer to a read its count.
const KIND_AT: usize = 4;
const COUNT_AT: usize = 7;
const RREAD: u8 = 117;

/// What goes wrong, in cases of 1000.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Reads and writes that do only a part.
    pub short: u64,
    /// Of these, those that end within a sector.
    pub ragged: u64,
    pub error: u64,
    /// Syncs that find no space.
    pub full: u64,
    /// Answers with a flipped bit in their size or kind, or in the count of what was read: lies
    /// that a client can find out.
    pub garbage: u64,
}

struct Ring {
    interface: Region,
    data: Region,
    half: Half,
    port: Port,
    in_progress: usize,
}

struct Job {
    due_ns: u64,
    ring: usize,
    head: MessageHead,
    body: Vec<u8>,
    /// Number of the first change that it does not cover (Fsync).
    mark: u64,
    /// A write whose bytes are in the file already.
    applied: Option<u32>,
    /// A file's extents as they were when the question came.
    extents: Option<Answer<'static>>,
}

/// The server and its files.
pub struct Server {
    pub files: Files,
    pub platter: bool,
    pub rings_max: u32,
    pub order_max: u32,
    pub faults: Faults,
    /// Shortest and longest time of a request.
    pub latency_ns: (u64, u64),
    /// What each KiB costs beyond that, one request after the other.
    pub kib_ns: u64,
    busy_until_ns: u64,
    /// It neither takes requests nor answers those that it has.
    pub stalled: bool,
    be: String,
    fe: String,
    client: u16,
    rings: Vec<Ring>,
    fids: BTreeMap<u32, String>,
    jobs: Vec<Job>,
    alive: bool,
    rng: Rng,
    /// Requests served, by message number.
    pub served: BTreeMap<u8, u64>,
}

impl Server {
    /// A share with this tag for domain `client`, announced in xenstore.
    pub fn new(xs: &mut Xenstore, client: u16, number: u32, tag: &str, rng: Rng) -> Server {
        let be = format!("/local/domain/0/backend/9pfs/{client}/{number}");
        let fe = format!("/local/domain/{client}/device/9pfs/{number}");
        for (path, value) in [
            (format!("{fe}/tag"), tag.to_string()),
            (format!("{fe}/backend"), be.clone()),
            (format!("{fe}/backend-id"), "0".to_string()),
            (format!("{fe}/state"), "1".to_string()),
            (format!("{be}/frontend"), fe.clone()),
            (format!("{be}/state"), "1".to_string()),
        ] {
            xs.write(0, &path, value.as_bytes()).expect("dom0 may write");
        }
        xs.set_owner(&fe, client, &[0]);
        xs.set_owner(&be, 0, &[client]);
        xs.watch(HOST, &fe);
        Server {
            files: Files::new(),
            platter: false,
            rings_max: 8,
            order_max: 4,
            faults: Faults::default(),
            latency_ns: (20_000, 80_000),
            kib_ns: 0,
            busy_until_ns: 0,
            stalled: false,
            be,
            fe,
            client,
            rings: vec![],
            fids: BTreeMap::new(),
            jobs: vec![],
            alive: false,
            rng,
            served: BTreeMap::new(),
        }
    }

    /// Begins to serve, or serves again.
    pub fn start(&mut self, xs: &mut Xenstore) {
        self.alive = true;
        for (key, value) in [
            ("versions", "1".to_string()),
            ("max-rings", self.rings_max.to_string()),
            ("max-ring-page-order", self.order_max.to_string()),
            ("state", "2".to_string()),
        ] {
            let path = format!("{}/{key}", self.be);
            xs.write(0, &path, value.as_bytes()).expect("dom0 may write");
        }
    }

    /// Dies as a process does: requests stay unanswered, fids are gone. With `noisy` its last
    /// word is a Closed in xenstore.
    pub fn die(&mut self, machine: &mut Machine, xs: &mut Xenstore, noisy: bool) {
        self.alive = false;
        self.disconnect(machine);
        if noisy {
            self.set_state(xs, "6");
        }
    }

    pub fn is_alive(&self) -> bool {
        self.alive
    }

    fn set_state(&self, xs: &mut Xenstore, state: &str) {
        xs.write(0, &format!("{}/state", self.be), state.as_bytes()).expect("dom0 may write");
    }

    fn disconnect(&mut self, machine: &mut Machine) {
        let mut hv = machine.view(HOST);
        for ring in self.rings.drain(..) {
            hv.close_port(ring.port);
            hv.unmap(ring.interface);
            hv.unmap(ring.data);
        }
        self.fids.clear();
        self.jobs.clear();
    }

    /// Its turn. When it must run again without an event.
    pub fn run(&mut self, machine: &mut Machine, xs: &mut Xenstore, now_ns: u64) -> Option<u64> {
        if !self.alive || self.stalled {
            return None;
        }
        self.handshake(machine, xs);
        for index in 0..self.rings.len() {
            let port = self.rings[index].port;
            machine.view(HOST).take_pending(port);
            while self.take_request(machine, now_ns, index) {}
        }
        while let Some(at) = self.jobs.iter().position(|job| job.due_ns <= now_ns) {
            let job = self.jobs.swap_remove(at);
            self.finish(machine, job);
            for index in 0..self.rings.len() {
                while self.take_request(machine, now_ns, index) {}
            }
        }
        self.jobs.iter().map(|job| job.due_ns).min()
    }

    fn handshake(&mut self, machine: &mut Machine, xs: &mut Xenstore) {
        let ours = xs.text(0, &format!("{}/state", self.be)).unwrap_or_default();
        let theirs = xs.text(0, &format!("{}/state", self.fe)).unwrap_or_default();
        match (ours.as_str(), theirs.as_str()) {
            ("2", "3") => {
                self.connect(machine, xs);
                self.set_state(xs, "4");
            }
            ("4", "1" | "5" | "6" | "") => {
                self.disconnect(machine);
                self.set_state(xs, "6");
            }
            ("6", "1") => self.set_state(xs, "2"),
            _ => {}
        }
    }

    fn connect(&mut self, machine: &mut Machine, xs: &Xenstore) {
        let node = |name: &str| xs.read(0, &format!("{}/{name}", self.fe)).ok().map(<[u8]>::to_vec);
        let rings = parse_front_nodes(node, self.rings_max).expect("platter writes good nodes");
        let client = DomId(self.client);
        let mut hv = machine.view(HOST);
        for (gref, port) in rings {
            let interface = hv.map(client, &[gref]).expect("platter grants its rings");
            let mut bytes = [0; PAGE_BYTES];
            hv.read(interface, 0, &mut bytes);
            let parsed = Interface::parse(&bytes).expect("platter writes a good interface page");
            assert!(parsed.order <= self.order_max, "a larger ring than was offered");
            let grefs: Vec<Gref> = parsed.grefs.clone();
            let data = hv.map(client, &grefs).expect("platter grants its rings");
            let port = hv.bind_interdomain(client, port).expect("platter's port waits for us");
            let half = Half::of_order(parsed.order).expect("parsed");
            self.rings.push(Ring { interface, data, half, port, in_progress: 0 });
        }
    }

    /// Takes a request off a ring if the server's kind allows one more.
    fn take_request(&mut self, machine: &mut Machine, now_ns: u64, index: usize) -> bool {
        let rings = self.rings.len();
        let depth = if self.platter { DEPTH } else { 1 };
        let ring = &mut self.rings[index];
        if ring.in_progress >= depth {
            return false;
        }
        let mut hv = machine.view(HOST);
        let cons = hv.load_u32(ring.interface, OUT_CONS);
        let prod = hv.load_u32(ring.interface, OUT_PROD);
        let queued = ring.half.queued(prod, cons).expect("platter keeps its indexes");
        if queued == 0 {
            return false;
        }
        let base = ring.half.bytes() as usize;
        let mut head = [0; HEAD_BYTES as usize];
        assert!(queued >= HEAD_BYTES, "a partial message was published");
        read_at(&hv, ring, base, cons, &mut head);
        let head = MessageHead::parse(&head, ring.half.bytes()).expect("platter writes good heads");
        assert!(queued >= head.size, "a partial message was published");
        assert!(usize::from(head.tag) % rings == index, "ring = tag % rings");
        let mut body = vec![0; (head.size - HEAD_BYTES) as usize];
        read_at(&hv, ring, base, cons.wrapping_add(HEAD_BYTES), &mut body);
        hv.store_u32(ring.interface, OUT_CONS, cons.wrapping_add(head.size));
        hv.notify(ring.port);
        ring.in_progress += 1;
        *self.served.entry(head.id).or_default() += 1;
        let moving_ns = moved_bytes(head, &body) * self.kib_ns / 1024;
        self.busy_until_ns = self.busy_until_ns.max(now_ns) + moving_ns;
        let latency_ns = self.rng.between(self.latency_ns.0, self.latency_ns.1);
        let due_ns = self.busy_until_ns + latency_ns;
        let mark = self.files.mark();
        let mut job = Job { due_ns, ring: index, head, body, mark, applied: None, extents: None };
        if self.rng.chance(500) {
            job.applied = self.try_write(&job);
            job.extents = self.extents_now(&job);
        }
        self.jobs.push(job);
        true
    }

    /// Carries out a Twrite; the bytes written, `None` for another message or no space.
    fn try_write(&mut self, job: &Job) -> Option<u32> {
        let request = Request::parse(job.head, &job.body).expect("platter writes good messages");
        let Request::Write { fid, offset, count } = request else { return None };
        let path = self.fids.get(&fid)?.clone();
        let count = self.shorten(count);
        let bytes = &job.body[TWRITE_HEAD..TWRITE_HEAD + count as usize];
        self.files.write(&path, offset, bytes).then_some(count)
    }

    /// The answer to a Textents as things stand.
    fn extents_now(&self, job: &Job) -> Option<Answer<'static>> {
        match Request::parse(job.head, &job.body) {
            Ok(Request::Extents { fid, offset, len }) => {
                let file = self.files.get(self.fids.get(&fid)?)?;
                Some(extents(&file.live, offset, len))
            }
            _ => None,
        }
    }

    fn shorten(&mut self, count: u32) -> u32 {
        if count < 2 || !self.rng.chance(self.faults.short) {
            return count;
        }
        if self.rng.chance(self.faults.ragged) {
            return self.rng.between(1, u64::from(count) - 1) as u32;
        }
        let sectors = u64::from(count / 512);
        if sectors < 2 { count } else { self.rng.between(1, sectors - 1) as u32 * 512 }
    }

    fn finish(&mut self, machine: &mut Machine, job: Job) {
        let mut data = vec![];
        let answer = self.answer(&job, &mut data);
        let mut bytes = vec![0; 600];
        let len = answer.emit(job.head.tag, &mut bytes).expect("answers are short");
        bytes.truncate(len);
        bytes.extend_from_slice(&data);
        if self.rng.chance(self.faults.garbage) {
            let at = *self.rng.pick(&[0, 1, 2, 3, KIND_AT, COUNT_AT]);
            let at = if at == COUNT_AT && bytes[KIND_AT] != RREAD { KIND_AT } else { at };
            bytes[at] ^= 1 << self.rng.below(8);
        }
        let ring = &mut self.rings[job.ring];
        let mut hv = machine.view(HOST);
        let prod = hv.load_u32(ring.interface, IN_PROD);
        let cons = hv.load_u32(ring.interface, IN_CONS);
        let len = bytes.len() as u32;
        let room = ring.half.room(prod, cons).expect("platter keeps its indexes");
        assert!(room >= len, "platter asked for more than its ring can take");
        let [first, second] = ring.half.split(prod, len);
        hv.write(ring.data, first.0 as usize, &bytes[..first.1 as usize]);
        hv.write(ring.data, second.0 as usize, &bytes[first.1 as usize..]);
        hv.store_u32(ring.interface, IN_PROD, prod.wrapping_add(len));
        hv.notify(ring.port);
        ring.in_progress -= 1;
    }

    fn answer(&mut self, job: &Job, data: &mut Vec<u8>) -> Answer<'static> {
        let request = Request::parse(job.head, &job.body).expect("platter writes good messages");
        let io =
            matches!(request, Request::Read { .. } | Request::Write { .. } | Request::Fsync { .. });
        if io && self.rng.chance(self.faults.error) {
            return Answer::Lerror { ecode: EIO };
        }
        if matches!(request, Request::Fsync { .. }) && self.rng.chance(self.faults.full) {
            return Answer::Lerror { ecode: ENOSPC };
        }
        match &request {
            Request::Version { msize, version } => {
                self.fids.clear();
                let version = match *version {
                    VERSION_PLATTER if self.platter => VERSION_PLATTER,
                    VERSION_PLAIN => VERSION_PLAIN,
                    _ => VERSION_UNKNOWN,
                };
                Answer::Version { msize: *msize, version }
            }
            Request::Attach { fid, .. } => {
                self.fids.insert(*fid, String::new());
                Answer::Attach { qid: Qid { kind: 0x80, version: 1, path: 1 } }
            }
            Request::Walk { fid, newfid, names } => self.walk(*fid, *newfid, names),
            Request::Clunk { fid } => match self.fids.remove(fid) {
                Some(_) => Answer::Clunk,
                None => Answer::Lerror { ecode: EBADF },
            },
            Request::Lopen { fid, .. }
            | Request::Getattr { fid, .. }
            | Request::Setattr { fid, .. }
            | Request::Read { fid, .. }
            | Request::Write { fid, .. }
            | Request::Fsync { fid, .. }
            | Request::Extents { fid, .. }
            | Request::Allocate { fid, .. } => match self.fids.get(fid).cloned() {
                Some(path) => self.file_answer(&path, &request, job, data),
                None => Answer::Lerror { ecode: EBADF },
            },
            Request::Flush { .. } => Answer::Lerror { ecode: EOPNOTSUPP },
        }
    }

    fn qid(&self, path: &str) -> Option<Qid> {
        let folder = format!("{path}/");
        if self.files.paths().any(|known| known.starts_with(&folder)) {
            return Some(Qid { kind: 0x80, version: 1, path: 2 });
        }
        let file = self.files.get(path)?;
        let kind = match file.mode & MODE_KIND_MASK {
            0o040_000 => 0x80,
            0o120_000 => 0x02,
            _ => 0,
        };
        Some(Qid { kind, version: 1, path: file.identity })
    }

    fn walk(&mut self, fid: u32, newfid: u32, names: &[&str]) -> Answer<'static> {
        let Some(mut path) = self.fids.get(&fid).cloned() else {
            return Answer::Lerror { ecode: EBADF };
        };
        assert!(fid == newfid || !self.fids.contains_key(&newfid), "a fid is used twice");
        let mut qids = heapless::Vec::new();
        for name in names {
            path = if path.is_empty() { name.to_string() } else { format!("{path}/{name}") };
            let Some(qid) = self.qid(&path) else { break };
            qids.push(qid).expect("at most 16 names");
        }
        if qids.is_empty() {
            return Answer::Lerror { ecode: ENOENT };
        }
        if qids.len() == names.len() {
            self.fids.insert(newfid, path);
        }
        Answer::Walk { qids }
    }

    fn file_answer(
        &mut self,
        path: &str,
        request: &Request<'_>,
        job: &Job,
        data: &mut Vec<u8>,
    ) -> Answer<'static> {
        let Some(qid) = self.qid(path) else { return Answer::Lerror { ecode: ENOENT } };
        let Some(file) = self.files.get(path) else {
            // A folder.
            let (mode, size) = (0o040_755, 4096);
            return Answer::Getattr { qid, mode, size, blksize: 4096, blocks: 8 };
        };
        let (mode, size) = (file.mode, file.live.len() as u64);
        match request {
            Request::Getattr { .. } => {
                Answer::Getattr { qid, mode, size, blksize: 4096, blocks: 0 }
            }
            Request::Lopen { .. } => {
                assert!(mode & MODE_KIND_MASK == 0o100_000, "opened what is not a regular file");
                Answer::Lopen { qid, iounit: 0 }
            }
            Request::Read { offset, count, .. } => {
                let count = self.shorten(*count);
                let live = &self.files.get(path).expect("just seen").live;
                let start = (*offset).min(size) as usize;
                let end = (start + count as usize).min(live.len());
                data.extend_from_slice(&live[start..end]);
                Answer::Read { count: data.len() as u32 }
            }
            Request::Write { .. } => match job.applied.or_else(|| self.try_write(job)) {
                Some(count) => Answer::Write { count },
                None => Answer::Lerror { ecode: ENOSPC },
            },
            Request::Setattr { size, .. } => {
                self.files.set_len(path, *size);
                Answer::Setattr
            }
            Request::Allocate { offset, len, .. } => {
                let end = offset.saturating_add(*len).min(size);
                let zeros = vec![0; end.saturating_sub(*offset) as usize];
                self.files.write(path, *offset, &zeros);
                Answer::Allocate
            }
            Request::Extents { offset, len, .. } => match &job.extents {
                Some(answer) => answer.clone(),
                None => extents(&file.live, *offset, *len),
            },
            _ => {
                self.files.sync(path, job.mark);
                Answer::Fsync
            }
        }
    }
}

/// Bytes of file that a request moves.
fn moved_bytes(head: MessageHead, body: &[u8]) -> u64 {
    match Request::parse(head, body) {
        Ok(Request::Read { count, .. } | Request::Write { count, .. }) => u64::from(count),
        _ => 0,
    }
}

fn read_at(hv: &impl Hypervisor, ring: &Ring, base: usize, index: u32, into: &mut [u8]) {
    let [first, second] = ring.half.split(index, into.len() as u32);
    let (now, later) = into.split_at_mut(first.1 as usize);
    hv.read(ring.data, base + first.0 as usize, now);
    hv.read(ring.data, base + second.0 as usize, later);
}
