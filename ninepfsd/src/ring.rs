//! The server's end of one 9pfs ring (Xen docs/misc/9pfs.pandoc), over mapped pages.
//!
//! Guards copy-once: a message's fields are copied out before any of them is believed, and
//! indexes are ours; the frontend's are bounded each time. A message's data is never looked at:
//! the kernel moves it between the ring and the file. Must never: wait for the frontend.

use std::collections::VecDeque;
use std::{fmt, io};

use platter_storage::ninep::message::{RREAD_BYTES, TWRITE_BYTES, id};
use platter_xen::ninepfs::{
    Broken, HEAD_BYTES, Half, IN_CONS, IN_PROD, Interface, MessageHead, OUT_CONS, OUT_PROD,
};
use platter_xen::{Gref, PAGE_BYTES};
use rustix::io::Errno;

use crate::open::Transfer;
use crate::os::gntdev::Gntdev;
use crate::os::memory::{Mapping, Spans};

/// Longest request that carries no data: a Twalk of 16 names of 255 bytes and more.
pub const BODY_BYTES_MAX: usize = 16 * 1024;

/// An answer that has to wait for room.
struct Outgoing {
    tag: u16,
    bytes: Vec<u8>,
}

pub struct Ring {
    interface: Mapping,
    data: Mapping,
    half: Half,
    out_cons: u32,
    in_prod: u32,
    /// Bytes of requests taken so far.
    pub consumed: u64,
    waiting: VecDeque<Outgoing>,
    pub port: u32,
    /// Something was consumed or produced since the frontend was last told.
    pub notify: bool,
}

/// Why a ring cannot be served any more.
#[derive(Debug)]
pub enum Fault {
    Xen(io::Error),
    Broken(Broken),
    /// A request longer than any we know.
    TooLong(u32),
    /// So many requests to forget others that each would wait for the next.
    Flushes,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Xen(fault) => write!(f, "Xen's devices: {fault}"),
            Fault::Broken(broken) => write!(f, "its ring is broken: {broken:?}"),
            Fault::Flushes => write!(f, "too many of its Tflushes wait for unread requests"),
            Fault::TooLong(bytes) => write!(f, "its request is {bytes} bytes long"),
        }
    }
}

impl From<Broken> for Fault {
    fn from(broken: Broken) -> Fault {
        Fault::Broken(broken)
    }
}

impl From<io::Error> for Fault {
    fn from(fault: io::Error) -> Fault {
        Fault::Xen(fault)
    }
}

impl Ring {
    /// Maps the ring that interface page `gref` of `domid` describes.
    pub fn map(gntdev: &Gntdev, domid: u16, gref: Gref, port: u32) -> Result<Ring, Fault> {
        let interface = gntdev.map(domid, &[gref])?;
        let mut page = [0; PAGE_BYTES];
        interface.read(0, &mut page);
        let described = Interface::parse(&page)?;
        let data = gntdev.map(domid, &described.grefs)?;
        Ring::over(interface, data, described.order, port)
    }

    /// A ring over pages that are mapped already.
    pub fn over(interface: Mapping, data: Mapping, order: u32, port: u32) -> Result<Ring, Fault> {
        let half = Half::of_order(order)?;
        let (out_cons, in_prod) = (interface.load(OUT_CONS), interface.load(IN_PROD));
        let waiting = VecDeque::new();
        let (consumed, notify) = (0, false);
        Ok(Ring { interface, data, half, out_cons, in_prod, consumed, waiting, port, notify })
    }

    /// Bytes in each direction.
    pub fn half_bytes(&self) -> u32 {
        self.half.bytes()
    }

    /// The head of the next request, if it is there whole.
    pub fn peek(&self, msize: u32) -> Result<Option<MessageHead>, Fault> {
        let queued = self.half.queued(self.interface.load(OUT_PROD), self.out_cons)?;
        if queued < HEAD_BYTES {
            return Ok(None);
        }
        let mut bytes = [0; HEAD_BYTES as usize];
        self.read_out(0, &mut bytes);
        let head = MessageHead::parse(&bytes, msize.min(self.half.bytes()))?;
        Ok(Some(head).filter(|head| queued >= head.size))
    }

    /// Bytes of requests so far, those that are not taken yet too.
    pub fn filled(&self) -> Result<u64, Fault> {
        let queued = self.half.queued(self.interface.load(OUT_PROD), self.out_cons)?;
        Ok(self.consumed + u64::from(queued))
    }

    /// The fields after the head of the next request, copied; of a Twrite without its data.
    pub fn fields<'a>(
        &self,
        head: MessageHead,
        into: &'a mut [u8; BODY_BYTES_MAX],
    ) -> Result<&'a [u8], Fault> {
        let is_write = head.id == id::TWRITE;
        let end = if is_write { head.size.min(TWRITE_BYTES) } else { head.size };
        let body = into.get_mut(..(end - HEAD_BYTES) as usize);
        let body = body.ok_or(Fault::TooLong(head.size))?;
        self.read_out(HEAD_BYTES, body);
        Ok(body)
    }

    /// A Twrite's data, copied.
    pub fn copy_data(&self, into: &mut [u8]) {
        self.read_out(TWRITE_BYTES, into);
    }

    /// Writes a Twrite's data into a file. `now`: rather fail than wait.
    pub fn write_file(&self, transfer: &Transfer, now: bool) -> Result<usize, Errno> {
        let spans = self.out_spans(TWRITE_BYTES, transfer.count as usize);
        self.data.write_file(spans, transfer.file, transfer.offset, transfer.how(now))
    }

    /// Reads a file to where the data of an Rread lies that is sent next; the caller has seen
    /// to it that there is room. `now`: rather fail than wait.
    pub fn read_file(&self, transfer: &Transfer, now: bool) -> Result<usize, Errno> {
        let spans = self.in_spans(RREAD_BYTES, transfer.count as usize);
        self.data.read_file(spans, transfer.file, transfer.offset, transfer.how(now))
    }

    /// Gives the room of the next request, `bytes` long, back to the frontend.
    pub fn consume(&mut self, bytes: u32) {
        self.out_cons = self.out_cons.wrapping_add(bytes);
        self.consumed += u64::from(bytes);
        self.interface.store(OUT_CONS, self.out_cons);
        self.notify = true;
    }

    /// Bytes that can be answered now; none while earlier answers wait.
    pub fn room(&self) -> Result<u32, Fault> {
        if !self.waiting.is_empty() {
            return Ok(0);
        }
        Ok(self.half.room(self.in_prod, self.interface.load(IN_CONS))?)
    }

    /// Sends an answer, `placed` bytes of whose data are in their place; there is room.
    pub fn publish(&mut self, bytes: &[u8], placed: u32) {
        self.write_in(0, bytes);
        self.in_prod = self.in_prod.wrapping_add(bytes.len() as u32 + placed);
        self.interface.store(IN_PROD, self.in_prod);
        self.notify = true;
    }

    /// Sends an answer and its data, now or when there is room.
    pub fn answer(&mut self, tag: u16, bytes: &[u8], data: &[u8]) -> Result<(), Fault> {
        if self.room()? < (bytes.len() + data.len()) as u32 {
            let bytes = [bytes, data].concat();
            self.waiting.push_back(Outgoing { tag, bytes });
            return Ok(());
        }
        self.write_in(bytes.len() as u32, data);
        self.publish(bytes, data.len() as u32);
        Ok(())
    }

    /// Some answer waits for room.
    pub fn is_full(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// What waits for room takes so much memory.
    pub fn waiting_bytes(&self) -> usize {
        self.waiting.iter().map(|answer| answer.bytes.len()).sum()
    }

    /// An answer with this tag waits for room.
    pub fn owes(&self, tag: u16) -> bool {
        self.waiting.iter().any(|answer| answer.tag == tag)
    }

    /// Sends what waits and fits now; whether there was something.
    pub fn send(&mut self) -> Result<bool, Fault> {
        let mut sent = false;
        while let Some(next) = self.waiting.front() {
            let room = self.half.room(self.in_prod, self.interface.load(IN_CONS))?;
            if room < next.bytes.len() as u32 {
                break;
            }
            let next = self.waiting.pop_front().expect("just looked at");
            self.publish(&next.bytes, 0);
            sent = true;
        }
        Ok(sent)
    }

    /// Copies bytes of the message at `out_cons`.
    fn read_out(&self, at: u32, into: &mut [u8]) {
        let mut rest = into;
        for (offset, len) in self.out_spans(at, rest.len()) {
            let (now, later) = rest.split_at_mut(len);
            self.data.read(offset, now);
            rest = later;
        }
    }

    fn write_in(&self, at: u32, bytes: &[u8]) {
        let mut rest = bytes;
        for (offset, len) in self.in_spans(at, bytes.len()) {
            let (now, later) = rest.split_at(len);
            self.data.write(offset, now);
            rest = later;
        }
    }

    /// Where bytes of the message at `out_cons` lie: the out half is the second.
    fn out_spans(&self, at: u32, len: usize) -> Spans {
        let base = self.half.bytes() as usize;
        let spans = self.half.split(self.out_cons.wrapping_add(at), len as u32);
        spans.map(|(offset, len)| (base + offset as usize, len as usize))
    }

    /// Where bytes of the message at `in_prod` will lie.
    fn in_spans(&self, at: u32, len: usize) -> Spans {
        let spans = self.half.split(self.in_prod.wrapping_add(at), len as u32);
        spans.map(|(offset, len)| (offset as usize, len as usize))
    }
}
