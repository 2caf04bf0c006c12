//! The frontend's end of a ring over ordinary memory, where no Xen is: for the bench, the fuzzer
//! and tests. It can break every rule, since its indexes and bytes are what the caller says.

use platter_storage::ninep::message::Request;
use platter_xen::ninepfs::{
    HEAD_BYTES, Half, IN_CONS, IN_PROD, MessageHead, OUT_CONS, OUT_PROD, RING_ORDER,
};

use crate::os::memory::Mapping;
use crate::ring::{Fault, Ring};

pub struct Frontend {
    pub interface: Mapping,
    pub data: Mapping,
    half: Half,
    out_prod: u32,
    in_cons: u32,
}

impl Frontend {
    /// Both ends of a new ring. The port is only a number here.
    pub fn pair(order: u32, port: u32) -> Result<(Frontend, Ring), Fault> {
        let half = Half::of_order(order)?;
        let (interface, its_interface) = Mapping::pair(1)?;
        let (data, its_data) = Mapping::pair(1 << order)?;
        interface.write(RING_ORDER, &order.to_le_bytes());
        let ring = Ring::over(its_interface, its_data, order, port)?;
        Ok((Frontend { interface, data, half, out_prod: 0, in_cons: 0 }, ring))
    }

    /// Bytes that can be put now; none where somebody has spoilt the indexes.
    pub fn room(&self) -> u32 {
        let room = self.half.room(self.out_prod, self.interface.load(OUT_CONS));
        room.unwrap_or(0)
    }

    /// Puts a message as it is and makes it visible. There is room.
    pub fn put(&mut self, bytes: &[u8]) {
        assert!(bytes.len() as u32 <= self.room(), "no room");
        let mut rest = bytes;
        for (offset, len) in self.half.split(self.out_prod, bytes.len() as u32) {
            let (now, later) = rest.split_at(len as usize);
            self.data.write(self.half.bytes() as usize + offset as usize, now);
            rest = later;
        }
        self.out_prod = self.out_prod.wrapping_add(bytes.len() as u32);
        self.interface.store(OUT_PROD, self.out_prod);
    }

    /// Puts a request whose data is whatever lies in the ring already.
    pub fn ask_moving_nothing(&mut self, tag: u16, request: &Request) {
        let mut bytes = [0; 64];
        let len = request.emit(tag, &mut bytes).expect("a read or write is short");
        let size = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let end = self.out_prod.wrapping_add(size);
        self.put(&bytes[..len]);
        self.out_prod = end;
        self.interface.store(OUT_PROD, end);
    }

    /// Puts a request and its data.
    pub fn ask(&mut self, tag: u16, request: &Request, data: &[u8]) {
        let mut bytes = [0; 8192];
        let len = request.emit(tag, &mut bytes).expect("requests of ours are short");
        if data.is_empty() {
            self.put(&bytes[..len]);
        } else {
            self.put(&[&bytes[..len], data].concat());
        }
    }

    /// The next answer's head and what follows it, of which so many bytes are copied as `into`
    /// has room for; the rest is skipped.
    pub fn take(&mut self, into: &mut [u8]) -> Option<(MessageHead, usize)> {
        let queued = self.interface.load(IN_PROD).wrapping_sub(self.in_cons);
        if queued == 0 {
            return None;
        }
        let mut bytes = [0; HEAD_BYTES as usize];
        self.get(0, &mut bytes);
        let head = MessageHead::parse(&bytes, queued).expect("answers are sent whole");
        let len = into.len().min((head.size - HEAD_BYTES) as usize);
        self.get(HEAD_BYTES, &mut into[..len]);
        self.in_cons = self.in_cons.wrapping_add(head.size);
        self.interface.store(IN_CONS, self.in_cons);
        Some((head, len))
    }

    /// Takes all that was answered, whatever it is.
    pub fn skip(&mut self) {
        self.in_cons = self.interface.load(IN_PROD);
        self.interface.store(IN_CONS, self.in_cons);
    }

    fn get(&self, at: u32, into: &mut [u8]) {
        let mut rest = into;
        let spans = self.half.split(self.in_cons.wrapping_add(at), rest.len() as u32);
        for (offset, len) in spans {
            let (now, later) = rest.split_at_mut(len as usize);
            self.data.read(offset as usize, now);
            rest = later;
        }
    }
}
