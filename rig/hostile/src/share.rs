//! Attacks on the 9p server behind a share: its rings, its messages, its nodes.
//!
//! As with disks, an attack may end in errors or in a share that is closed; afterwards the share
//! must be served to whoever behaves, and no page of ours may be kept.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use platter_loadgen::Guest;
use platter_loadgen::front::{
    CLOSED, CLOSING, CONNECTED, Disk, INIT_WAIT, INITIALISED, INITIALISING, STEP_NS, free_granted,
    grant_all,
};
use platter_loadgen::guest::{MS_NS, SECOND_NS};
use platter_loadgen::random::Random;
use platter_loadgen::xs::XenStore;
use platter_xen::ninepfs::{
    GREFS, Half, IN_CONS, IN_PROD, OUT_CONS, OUT_PROD, RING_ORDER, VERSION,
};
use platter_xen::xenstore::Op;
use platter_xen::{Gref, Port, Region};

use crate::ground::Tally;

/// All attacks on a share, in the order in which they are made.
pub const ATTACKS: [&str; 8] =
    ["indexes", "sizes", "messages", "tags", "fids", "nonsense-nodes", "state-flap", "churn"];

/// How long a server may take to close a ring whose indexes are wrong; it need not.
const REFUSAL_NS: u64 = SECOND_NS / 2;
/// How long an answer may take on a host that is not slow.
const ANSWER_NS: u64 = 5 * SECOND_NS;
const ORDER: u32 = 4;
/// Message numbers (9P2000.L).
const TVERSION: u8 = 100;
const TATTACH: u8 = 104;
const TWALK: u8 = 110;
const TREAD: u8 = 116;
const TFLUSH: u8 = 108;
const RLERROR: u8 = 7;

/// What attacks need.
pub struct ShareGround<'a, G> {
    pub guest: &'a mut G,
    pub xs: &'a mut XenStore,
    /// The share; a disk's steps through xenstore are a share's as well.
    pub share: Disk,
    pub random: Random,
    pub attack_ns: u64,
    /// How much slower than an idle host this one is: waits are so many times as long.
    pub slowness: u64,
}

/// The first share that the toolstack gave us; its backend's state is watched.
pub fn find<G: Guest>(guest: &mut G, xs: &mut XenStore) -> Option<Disk> {
    let number = xs.list(guest, "device/9pfs").into_iter().next()?;
    let front = format!("device/9pfs/{number}");
    let back = xs.read(guest, &format!("{front}/backend"))?;
    let id = xs.number(guest, &format!("{front}/backend-id"))?;
    let back_id = platter_xen::DomId(u16::try_from(id).ok()?);
    xs.watch(guest, &format!("{back}/state"));
    Some(Disk { vdev: "share".to_string(), front, back, back_id })
}

/// One ring of ours.
struct Link {
    interface: Region,
    data: Region,
    grefs: Vec<Gref>,
    port: Port,
    out_prod: u32,
    in_cons: u32,
}

impl<G: Guest> ShareGround<'_, G> {
    /// Makes one attack.
    ///
    /// # Errors
    /// What the server did that no frontend may make it do.
    pub fn attack(&mut self, name: &str) -> Result<Tally, String> {
        match name {
            "indexes" => self.indexes(),
            "sizes" => self.sizes(),
            "messages" => self.messages(),
            "tags" => self.tags(),
            "fids" => self.fids(),
            "nonsense-nodes" => self.nonsense(),
            "state-flap" => self.flap(),
            "churn" => self.churn(),
            _ => Err("no attack of this name".to_string()),
        }
    }

    /// A session that behaves.
    ///
    /// # Errors
    /// Why it was not served.
    pub fn is_served(&mut self) -> Result<(), String> {
        let mut link = self.open()?;
        let served = self.begin(&mut link);
        self.leave(link)?;
        served
    }

    /// Fills a ring with reads that nobody will take, for whoever ends the domain at once.
    pub fn leave_in_flight(&mut self) {
        let Ok(mut link) = self.open() else { return };
        if self.begin(&mut link).is_ok() {
            for tag in 0..200 {
                self.ask(&mut link, TREAD, tag, &[0; 16]);
            }
        }
    }

    fn show(&mut self, state: u8) {
        self.share.show(self.guest, self.xs, state);
    }

    fn wait(&mut self, states: &[u8]) -> Result<u8, String> {
        self.share.wait_for(self.guest, self.xs, states, STEP_NS * self.slowness)
    }

    fn write(&mut self, key: &str, value: &str) {
        let path = format!("{}/{key}", self.share.front);
        self.xs.write(self.guest, &path, value.as_bytes()).ok();
    }

    fn make(&mut self) -> Result<Link, String> {
        let none = || "no memory for a ring".to_string();
        let to = self.share.back_id;
        let interface = self.guest.frames_alloc(1).ok_or_else(none)?;
        let data = self.guest.frames_alloc(1 << ORDER).ok_or_else(none)?;
        let mut grefs = grant_all(self.guest, to, interface, true)?;
        grefs.extend(grant_all(self.guest, to, data, true)?);
        let port = self.guest.alloc_unbound(to).map_err(|fault| format!("{fault:?}"))?;
        self.guest.zero(interface, 0, interface.bytes());
        self.guest.store_u32(interface, RING_ORDER, ORDER);
        for (index, gref) in grefs[1..].iter().enumerate() {
            self.guest.store_u32(interface, GREFS + 4 * index, gref.0);
        }
        Ok(Link { interface, data, grefs, port, out_prod: 0, in_cons: 0 })
    }

    fn describe(&mut self, link: &Link) {
        self.write("version", VERSION);
        self.write("num-rings", "1");
        self.write("ring-ref0", &format!("{}", link.grefs[0].0));
        self.write("event-channel-0", &format!("{}", link.port.0));
    }

    fn open(&mut self) -> Result<Link, String> {
        self.wait(&[INIT_WAIT])?;
        let link = self.make()?;
        self.describe(&link);
        self.show(INITIALISED);
        self.wait(&[CONNECTED])?;
        self.show(CONNECTED);
        Ok(link)
    }

    /// To a fresh start, whatever was; the ring must be ours again.
    fn leave(&mut self, link: Link) -> Result<(), String> {
        self.show(CLOSED);
        // It may be waiting for a frontend still, and holds nothing then.
        self.wait(&[CLOSED, INIT_WAIT, 0])?;
        self.show(INITIALISING);
        self.wait(&[INIT_WAIT])?;
        self.guest.close_port(link.port);
        let interface = free_granted(self.guest, link.interface, &link.grefs[..1]);
        let data = free_granted(self.guest, link.data, &link.grefs[1..]);
        if interface && data { Ok(()) } else { Err("a ring is kept".to_string()) }
    }

    fn half(&self) -> Half {
        Half::of_order(ORDER).expect("a legal order")
    }

    /// Puts bytes on the ring and tells the server.
    fn put(&mut self, link: &mut Link, bytes: &[u8]) {
        let half = self.half();
        let mut rest = bytes;
        for (offset, len) in half.split(link.out_prod, bytes.len() as u32) {
            let (now, later) = rest.split_at(len as usize);
            self.guest.write(link.data, (half.bytes() + offset) as usize, now);
            rest = later;
        }
        link.out_prod = link.out_prod.wrapping_add(bytes.len() as u32);
        self.guest.store_u32(link.interface, OUT_PROD, link.out_prod);
        self.guest.notify(link.port);
    }

    fn ask(&mut self, link: &mut Link, id: u8, tag: u16, body: &[u8]) {
        let size = (7 + body.len() as u32).to_le_bytes();
        let message = [&size[..], &[id], &tag.to_le_bytes(), body].concat();
        self.put(link, &message);
    }

    /// The next answer's number; `None` when none comes.
    fn answer(&mut self, link: &mut Link) -> Option<u8> {
        let until_ns = self.guest.now_ns() + ANSWER_NS * self.slowness;
        loop {
            self.guest.take_pending(link.port);
            let queued = self.guest.load_u32(link.interface, IN_PROD).wrapping_sub(link.in_cons);
            if queued >= 7 {
                let mut head = [0; 7];
                for (at, byte) in head.iter_mut().enumerate() {
                    let offset = self.half().mask(link.in_cons.wrapping_add(at as u32));
                    let mut one = [0];
                    self.guest.read(link.data, offset as usize, &mut one);
                    *byte = one[0];
                }
                let size = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
                link.in_cons = link.in_cons.wrapping_add(size);
                self.guest.store_u32(link.interface, IN_CONS, link.in_cons);
                return Some(head[4]);
            }
            // Asked only when nothing came for a while: xenstore is slower than the server.
            let nap_ns = self.guest.now_ns() + 50 * MS_NS;
            self.guest.sleep_until(&[link.port], nap_ns);
            let now_ns = self.guest.now_ns();
            if now_ns >= nap_ns && (now_ns > until_ns || self.has_closed()) {
                return None;
            }
        }
    }

    fn has_closed(&mut self) -> bool {
        let state = self.share.back_state(self.guest, self.xs);
        state.is_none_or(|state| state == CLOSING || state == CLOSED)
    }

    fn must(&mut self, link: &mut Link, id: u8, body: &[u8]) -> Result<(), String> {
        self.ask(link, id, 1, body);
        match self.answer(link) {
            Some(answer) if answer == id + 1 => Ok(()),
            answer => Err(format!("message {id} was answered by {answer:?}")),
        }
    }

    fn begin(&mut self, link: &mut Link) -> Result<(), String> {
        let version = b"9P2000.L";
        let msize = 16384u32.to_le_bytes();
        self.must(link, TVERSION, &[&msize[..], &[8, 0], version].concat())?;
        // fid 0, no afid, no names, no number.
        let none = u32::MAX.to_le_bytes();
        self.must(link, TATTACH, &[&[0; 4][..], &none, &[0; 4], &none].concat())
    }

    /// Indexes that no ring can have: the server lets go, or waits for ever; never more.
    fn indexes(&mut self) -> Result<Tally, String> {
        let mut tally = Tally::default();
        for (at, value) in [
            (OUT_PROD, u32::MAX),
            (OUT_PROD, self.half().bytes() + 1),
            (OUT_PROD, 0x8000_0000),
            (IN_CONS, 1),
            (IN_CONS, 0x7fff_ffff),
            (OUT_CONS, 77),
            (IN_PROD, 77),
        ] {
            let mut link = self.open()?;
            self.begin(&mut link)?;
            self.guest.store_u32(link.interface, at, value);
            self.guest.notify(link.port);
            let states = [CLOSING, CLOSED];
            if self.share.wait_for(self.guest, self.xs, &states, REFUSAL_NS).is_err() {
                self.ask(&mut link, TREAD, 2, &[0; 16]);
                let _ = self.answer(&mut link);
            }
            tally.tried += 1;
            tally.closed += u64::from(self.has_closed());
            self.leave(link)?;
        }
        Ok(tally)
    }

    /// Messages whose size is a lie.
    fn sizes(&mut self) -> Result<Tally, String> {
        let mut tally = Tally::default();
        for size in [0, 6, 8, 16385, 1 << 20, 0x7fff_ffff, u32::MAX] {
            let mut link = self.open()?;
            self.begin(&mut link)?;
            let bytes = [&size.to_le_bytes()[..], &[TWALK, 9, 0], &[0xff; 64]].concat();
            self.put(&mut link, &bytes);
            let _ = self.answer(&mut link);
            tally.tried += 1;
            tally.closed += u64::from(self.has_closed());
            self.leave(link)?;
        }
        Ok(tally)
    }

    /// Every message number with bytes that are no message: each is answered.
    fn messages(&mut self) -> Result<Tally, String> {
        let mut tally = Tally::default();
        let mut link = self.open()?;
        self.begin(&mut link)?;
        let until_ns = self.guest.now_ns() + self.attack_ns;
        let mut id = 0u8;
        while self.guest.now_ns() < until_ns || id != 0 {
            let mut body = Vec::new();
            for _ in 0..self.random.below(96) {
                body.push(self.random.below(5) as u8);
            }
            self.ask(&mut link, id, u16::from(id), &body);
            if self.answer(&mut link).is_none() {
                let why = format!("message {id} of {} bytes is not answered", body.len());
                self.leave(link)?;
                return Err(why);
            }
            tally.tried += 1;
            id = id.wrapping_add(1);
        }
        self.leave(link)?;
        Ok(tally)
    }

    /// One tag for many requests, and flushes of requests, of nothing, and of themselves.
    fn tags(&mut self) -> Result<Tally, String> {
        let mut tally = Tally::default();
        let mut link = self.open()?;
        self.begin(&mut link)?;
        for round in 0..50 {
            for tag in [5, 5, 0xffff, 5] {
                self.ask(&mut link, TREAD, tag, &[0; 16]);
                self.ask(&mut link, TFLUSH, tag, &[round, 0]);
            }
            for _ in 0..8 {
                if self.answer(&mut link).is_none() {
                    self.leave(link)?;
                    return Err("a request among others of its tag is not answered".to_string());
                }
                tally.tried += 1;
            }
        }
        self.leave(link)?;
        Ok(tally)
    }

    /// Fids without end: the server must say that there is one.
    fn fids(&mut self) -> Result<Tally, String> {
        let mut tally = Tally::default();
        let mut link = self.open()?;
        self.begin(&mut link)?;
        // Many at once: a round trip takes long on an emulated machine.
        const BATCH: u32 = 16;
        for first in (1..10_000u32).step_by(BATCH as usize) {
            for fid in first..first + BATCH {
                let body = [&[0; 4][..], &fid.to_le_bytes(), &[0; 2]].concat();
                self.ask(&mut link, TWALK, fid as u16, &body);
            }
            let mut refused = 0;
            for _ in 0..BATCH {
                match self.answer(&mut link) {
                    Some(answer) => refused += u64::from(answer == RLERROR),
                    None => return Err(format!("a walk after fid {first} is not answered")),
                }
            }
            tally.tried += u64::from(BATCH);
            if refused > 0 {
                tally.errors += refused;
                self.leave(link)?;
                return Ok(tally);
            }
        }
        Err("there is no end of fids".to_string())
    }

    /// Nodes and interface pages that no frontend has: none of them may connect.
    fn nonsense(&mut self) -> Result<Tally, String> {
        let mut tally = Tally::default();
        for (key, value) in [
            ("version", "2"),
            ("version", ""),
            ("num-rings", "0"),
            ("num-rings", "2"),
            ("num-rings", "9"),
            ("num-rings", "4294967297"),
            ("ring-ref0", "0"),
            ("ring-ref0", "4294967295"),
            ("ring-ref0", "99999999999999999999"),
            ("event-channel-0", "0"),
            ("event-channel-0", "1"),
            ("event-channel-0", "4000000000"),
            ("event-channel-0", "x"),
        ] {
            let refused = self.show_ring(|ground, _| ground.write(key, value))?;
            tally.tried += 1;
            tally.served += u64::from(!refused);
        }
        // The interface page: orders, and pages that are not ours to give.
        for order in [0, 10, 255, u32::MAX] {
            let refused = self.show_ring(|ground, link| {
                ground.guest.store_u32(link.interface, RING_ORDER, order);
            })?;
            tally.tried += 1;
            tally.served += u64::from(!refused);
        }
        for gref in [0, 1, 2, 100_000, u32::MAX] {
            let refused = self.show_ring(|ground, link| {
                ground.guest.store_u32(link.interface, GREFS + 4, gref);
            })?;
            tally.tried += 1;
            // xenstore's and the console's pages are granted to dom0 at birth: low references.
            tally.served += u64::from(!refused && gref > 8);
        }
        Ok(tally)
    }

    /// Shows a ring that `spoil` has spoilt; whether the server refused it. Closes again.
    fn show_ring(&mut self, spoil: impl FnOnce(&mut Self, &Link)) -> Result<bool, String> {
        self.wait(&[INIT_WAIT])?;
        let link = self.make()?;
        self.describe(&link);
        spoil(self, &link);
        self.show(INITIALISED);
        let states = [CONNECTED, CLOSING, CLOSED];
        let state = self.wait(&states)?;
        self.leave(link)?;
        Ok(state != CONNECTED)
    }

    /// States in no order at all, and what is no state.
    fn flap(&mut self) -> Result<Tally, String> {
        let mut tally = Tally::default();
        let link = self.make()?;
        self.describe(&link);
        let state = format!("{}/state", self.share.front);
        let until_ns = self.guest.now_ns() + self.attack_ns;
        while self.guest.now_ns() < until_ns {
            let digit = [b'0' + self.random.below(9) as u8];
            let value = if self.random.below(8) == 0 { &b"44"[..] } else { &digit };
            self.xs.send(self.guest, Op::Write { path: &state, value }).ok();
            tally.tried += 1;
            if self.random.below(4) == 0 {
                let nap_ns = self.guest.now_ns() + self.random.below(60) * MS_NS;
                self.guest.sleep_until(&[], nap_ns);
            }
        }
        self.leave(link)?;
        Ok(tally)
    }

    /// Opens and closes without ever waiting for the server.
    fn churn(&mut self) -> Result<Tally, String> {
        let mut tally = Tally::default();
        let link = self.make()?;
        self.describe(&link);
        let until_ns = self.guest.now_ns() + self.attack_ns;
        while self.guest.now_ns() < until_ns {
            for step in [INITIALISING, INITIALISED, CONNECTED, CLOSING, CLOSED] {
                self.show(step);
            }
            tally.tried += 1;
            let nap_ns = self.guest.now_ns() + self.random.below(30) * MS_NS;
            self.guest.sleep_until(&[], nap_ns);
        }
        self.leave(link)?;
        Ok(tally)
    }
}
