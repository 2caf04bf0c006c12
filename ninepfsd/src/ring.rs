//! The server's end of one 9pfs ring (Xen docs/misc/9pfs.pandoc), over mapped pages.
//!
//! Guards copy-once: a message is copied out whole before any of it is believed, and indexes
//! are ours; the frontend's are bounded each time. Must never: wait for the frontend.

use std::collections::VecDeque;
use std::{fmt, io};

use platter_storage::ninep::message::TWRITE_BYTES;
use platter_xen::ninepfs::{
    Broken, HEAD_BYTES, Half, IN_CONS, IN_PROD, Interface, MessageHead, OUT_CONS, OUT_PROD,
};
use platter_xen::{Gref, PAGE_BYTES};

use crate::os::gntdev::Mapping;

/// Longest request that carries no data: a Twalk of 16 names of 255 bytes and more.
const BODY_BYTES_MAX: u32 = 16 * 1024;

/// A request as it was copied out.
pub struct Incoming {
    pub head: MessageHead,
    /// The fields after the head; of a Twrite without its data.
    pub body: Vec<u8>,
    /// A Twrite's data.
    pub data: Vec<u8>,
}

/// An answer that may have to wait for room.
struct Outgoing {
    bytes: Vec<u8>,
    data: Vec<u8>,
}

pub struct Ring {
    interface: Mapping,
    data: Mapping,
    half: Half,
    out_cons: u32,
    in_prod: u32,
    waiting: VecDeque<Outgoing>,
    pub port: u32,
    /// Something was consumed or produced since the frontend was last told.
    pub notify: bool,
}

/// Why a ring cannot be served any more.
#[derive(Debug)]
pub enum Fault {
    Map(io::Error),
    Broken(Broken),
    /// A request longer than any we know.
    TooLong(u32),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Map(fault) => write!(f, "Xen's devices: {fault}"),
            Fault::Broken(broken) => write!(f, "its ring is broken: {broken:?}"),
            Fault::TooLong(bytes) => write!(f, "its request is {bytes} bytes long"),
        }
    }
}

impl From<Broken> for Fault {
    fn from(broken: Broken) -> Fault {
        Fault::Broken(broken)
    }
}

impl Ring {
    /// Maps the ring that interface page `gref` of `domid` describes.
    pub fn new(domid: u16, gref: Gref, port: u32) -> Result<Ring, Fault> {
        let interface = Mapping::new(domid, &[gref]).map_err(Fault::Map)?;
        let mut page = [0; PAGE_BYTES];
        interface.read(0, &mut page);
        let described = Interface::parse(&page)?;
        let half = Half::of_order(described.order)?;
        let data = Mapping::new(domid, &described.grefs).map_err(Fault::Map)?;
        let (out_cons, in_prod) = (interface.load(OUT_CONS), interface.load(IN_PROD));
        let waiting = VecDeque::new();
        Ok(Ring { interface, data, half, out_cons, in_prod, waiting, port, notify: false })
    }

    /// Bytes in each direction.
    pub fn half_bytes(&self) -> u32 {
        self.half.bytes()
    }

    /// The next request, if it is there whole.
    pub fn take(&mut self, msize: u32) -> Result<Option<Incoming>, Fault> {
        let queued = self.half.queued(self.interface.load(OUT_PROD), self.out_cons)?;
        if queued < HEAD_BYTES {
            return Ok(None);
        }
        let mut bytes = [0; HEAD_BYTES as usize];
        self.read_out(0, &mut bytes);
        let head = MessageHead::parse(&bytes, msize.min(self.half.bytes()))?;
        if queued < head.size {
            return Ok(None);
        }
        let is_write = head.id == platter_storage::ninep::message::id::TWRITE;
        let fields = if is_write { head.size.min(TWRITE_BYTES) } else { head.size };
        if fields > BODY_BYTES_MAX {
            return Err(Fault::TooLong(head.size));
        }
        let mut body = vec![0; (fields - HEAD_BYTES) as usize];
        self.read_out(HEAD_BYTES, &mut body);
        let mut data = vec![0; (head.size - fields) as usize];
        self.read_out(fields, &mut data);
        self.out_cons = self.out_cons.wrapping_add(head.size);
        self.interface.store(OUT_CONS, self.out_cons);
        self.notify = true;
        Ok(Some(Incoming { head, body, data }))
    }

    /// Copies bytes of the message at `out_cons`; the out half is the second.
    fn read_out(&self, at: u32, into: &mut [u8]) {
        let mut rest = into;
        let base = self.half.bytes() as usize;
        for (offset, len) in self.half.split(self.out_cons.wrapping_add(at), rest.len() as u32) {
            let (now, later) = rest.split_at_mut(len as usize);
            self.data.read(base + offset as usize, now);
            rest = later;
        }
    }

    /// Answers with a message and the data that follows it.
    pub fn answer(&mut self, bytes: Vec<u8>, data: Vec<u8>) -> Result<(), Fault> {
        self.waiting.push_back(Outgoing { bytes, data });
        self.send()
    }

    /// Answers are waiting for room.
    pub fn is_full(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Sends what fits.
    pub fn send(&mut self) -> Result<(), Fault> {
        while let Some(next) = self.waiting.front() {
            let len = (next.bytes.len() + next.data.len()) as u32;
            if self.half.room(self.in_prod, self.interface.load(IN_CONS))? < len {
                return Ok(());
            }
            let next = self.waiting.pop_front().expect("just looked at");
            self.write_in(0, &next.bytes);
            self.write_in(next.bytes.len() as u32, &next.data);
            self.in_prod = self.in_prod.wrapping_add(len);
            self.interface.store(IN_PROD, self.in_prod);
            self.notify = true;
        }
        Ok(())
    }

    fn write_in(&self, at: u32, bytes: &[u8]) {
        let mut rest = bytes;
        for (offset, len) in self.half.split(self.in_prod.wrapping_add(at), bytes.len() as u32) {
            let (now, later) = rest.split_at(len as usize);
            self.data.write(offset as usize, now);
            rest = later;
        }
    }
}
