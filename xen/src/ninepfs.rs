//! The 9pfs transport: 9P messages over pairs of byte rings (Xen docs/misc/9pfs.pandoc,
//! public/io/9pfs.h).
//!
//! Guards the order reserve, fill, seal, push: whole requests become visible by one `out_prod`
//! update, because QEMU's server marks a ring busy before it looks whether the message is whole;
//! and by one event for all of a turn's, because an event is a hypercall. Answers the same way
//! back: each is taken, and the room of all is given back by one `in_cons` update.
//! A response's 7-byte head is read once and bounded before anything trusts it. Must never: hold
//! a byte of a message, interpret one beyond its head, believe an index of the other side.
//!
//! The first half of this file is plain arithmetic and layout without a hypervisor: a server
//! over ordinary mapped memory uses the same. The interface page: `in_cons`@0, `in_prod`@4,
//! `out_cons`@64, `out_prod`@68, `ring_order`@128, grefs from 132: 56 bytes of padding follow
//! each pair of indexes. "In" is towards the frontend.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use crate::xenstore::decimal;
use crate::{DomId, Gref, Hypervisor, PAGE_BYTES, Port, Refusal, Region};

pub const IN_CONS: usize = 0;
pub const IN_PROD: usize = 4;
pub const OUT_CONS: usize = 64;
pub const OUT_PROD: usize = 68;
pub const RING_ORDER: usize = 128;
pub const GREFS: usize = 132;

/// Two halves of at least a page each.
pub const ORDER_MIN: u32 = 1;
/// The most grefs that fit the interface page: 512 (9pfs.pandoc).
pub const ORDER_MAX: u32 = 9;
/// The most rings we set up: QEMU's `MAX_RINGS`.
pub const RINGS_MAX: usize = 8;
/// The only protocol version there is (`versions`, `version`).
pub const VERSION: &str = "1";
/// size[4] id[1] tag[2], the head of every 9P message.
pub const HEAD_BYTES: u32 = 7;

/// The other end broke the ring; it must not be used again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Broken {
    /// `prod - cons` exceeds the half's size.
    Index,
    /// A message's size is below 7 or above what was agreed.
    Size(u32),
    /// `ring_order` outside 1 to 9.
    Order(u32),
}

/// One direction's byte ring: `1 << (order + 11)` bytes (`XEN_FLEX_RING_SIZE`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Half {
    bytes: u32,
}

impl Half {
    pub fn of_order(order: u32) -> Result<Half, Broken> {
        if !(ORDER_MIN..=ORDER_MAX).contains(&order) {
            return Err(Broken::Order(order));
        }
        Ok(Half { bytes: 1 << (order + 11) })
    }

    /// Size in bytes, a power of two.
    pub const fn bytes(self) -> u32 {
        self.bytes
    }

    /// A free-running index as an offset into the half.
    pub const fn mask(self, index: u32) -> u32 {
        index & (self.bytes - 1)
    }

    /// Bytes produced and not consumed.
    pub fn queued(self, prod: u32, cons: u32) -> Result<u32, Broken> {
        let queued = prod.wrapping_sub(cons);
        if queued > self.bytes { Err(Broken::Index) } else { Ok(queued) }
    }

    /// Bytes that may be produced.
    pub fn room(self, prod: u32, cons: u32) -> Result<u32, Broken> {
        Ok(self.bytes - self.queued(prod, cons)?)
    }

    /// `len` bytes from `index` as at most two runs of (offset in the half, length).
    /// `len` is at most the half's size.
    pub fn split(self, index: u32, len: u32) -> [(u32, u32); 2] {
        assert!(len <= self.bytes, "longer than the ring");
        let at = self.mask(index);
        let first = len.min(self.bytes - at);
        [(at, first), (0, len - first)]
    }
}

/// The four free-running indexes as one end has read them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RingIndexes {
    pub in_cons: u32,
    pub in_prod: u32,
    pub out_cons: u32,
    pub out_prod: u32,
}

/// Where a ring's data pages are: what the interface page says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Interface {
    pub order: u32,
    /// `1 << order` of them; "in" is the first half.
    pub grefs: Vec<Gref>,
}

impl Interface {
    /// For a server: from a private copy of the interface page.
    pub fn parse(page: &[u8; PAGE_BYTES]) -> Result<Interface, Broken> {
        let word = |at: usize| {
            let mut four = [0; 4];
            four.copy_from_slice(&page[at..at + 4]);
            u32::from_le_bytes(four)
        };
        let order = word(RING_ORDER);
        Half::of_order(order)?;
        let grefs = (0..1usize << order).map(|index| Gref(word(GREFS + index * 4))).collect();
        Ok(Interface { order, grefs })
    }

    /// The order and grefs, to be written at [`RING_ORDER`].
    pub fn emit(&self) -> Vec<u8> {
        assert!(self.grefs.len() == 1 << self.order, "a gref for each page");
        let mut bytes = Vec::from(self.order.to_le_bytes());
        self.grefs.iter().for_each(|gref| bytes.extend_from_slice(&gref.0.to_le_bytes()));
        bytes
    }
}

/// size[4] id[1] tag[2].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MessageHead {
    /// Of the whole message, these 7 bytes included.
    pub size: u32,
    pub id: u8,
    pub tag: u16,
}

impl MessageHead {
    /// Proves `7 <= size <= size_max`.
    pub fn parse(bytes: &[u8; HEAD_BYTES as usize], size_max: u32) -> Result<Self, Broken> {
        let size = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        if !(HEAD_BYTES..=size_max).contains(&size) {
            return Err(Broken::Size(size));
        }
        let tag = u16::from_le_bytes([bytes[5], bytes[6]]);
        Ok(MessageHead { size, id: bytes[4], tag })
    }
}

/// What a backend offers in xenstore before it shows InitWait.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Offer {
    pub rings_max: u32,
    pub order_max: u32,
}

/// Why an offer cannot be taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OfferFault {
    /// `versions` is missing or lacks "1".
    Version,
    /// `max-rings` is missing, not a number, or 0.
    Rings,
    /// `max-ring-page-order` is missing, not a number, or 0.
    Order,
    /// Not even one ring of the smallest order fits our frames.
    Frames,
}

/// How many rings of which order we set up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    pub rings: u32,
    pub order: u32,
}

impl Shape {
    /// Frames that this shape takes, interface pages included.
    pub fn frames(self) -> usize {
        self.rings as usize * ((1 << self.order) + 1)
    }
}

impl Offer {
    /// From the backend's `versions`, `max-rings` and `max-ring-page-order`.
    pub fn parse(
        versions: Option<&[u8]>,
        rings: Option<&[u8]>,
        order: Option<&[u8]>,
    ) -> Result<Offer, OfferFault> {
        let versions = versions.ok_or(OfferFault::Version)?;
        if !versions.split(|byte| *byte == b',').any(|word| word == VERSION.as_bytes()) {
            return Err(OfferFault::Version);
        }
        let number = |text: Option<&[u8]>| text.and_then(decimal).filter(|value| *value > 0);
        let rings = number(rings).ok_or(OfferFault::Rings)?;
        let order = number(order).ok_or(OfferFault::Order)?;
        Ok(Offer {
            rings_max: rings.min(RINGS_MAX as u64) as u32,
            order_max: order.min(u64::from(ORDER_MAX)) as u32,
        })
    }

    /// All rings, each as large as `frames_max` allows; fewer rings only when even the smallest
    /// do not fit: QEMU serves one request per ring, so rings are depth.
    pub fn choose(self, frames_max: usize) -> Result<Shape, OfferFault> {
        for rings in (1..=self.rings_max).rev() {
            for order in (ORDER_MIN..=self.order_max).rev() {
                let shape = Shape { rings, order };
                if shape.frames() <= frames_max {
                    return Ok(shape);
                }
            }
        }
        Err(OfferFault::Frames)
    }
}

/// The nodes a frontend writes below its own directory before state 3; `tag` is the
/// toolstack's. Note the hyphen before the number of an event channel.
pub fn front_nodes(rings: &[(Gref, Port)]) -> Vec<(String, String)> {
    let mut nodes = Vec::new();
    nodes.push((String::from("version"), String::from(VERSION)));
    nodes.push((String::from("num-rings"), format!("{}", rings.len())));
    for (index, (gref, port)) in rings.iter().enumerate() {
        nodes.push((format!("ring-ref{index}"), format!("{}", gref.0)));
        nodes.push((format!("event-channel-{index}"), format!("{}", port.0)));
    }
    nodes
}

/// Why a server cannot connect a frontend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FrontFault {
    Version,
    Rings,
    /// `ring-ref%u` of this ring is missing or not a u32.
    RingRef(u32),
    /// `event-channel-%u` of this ring is missing or not a u32.
    EventChannel(u32),
}

/// For a server: what a frontend wrote, read through `node`.
pub fn parse_front_nodes(
    mut node: impl FnMut(&str) -> Option<Vec<u8>>,
    rings_max: u32,
) -> Result<Vec<(Gref, Port)>, FrontFault> {
    if node("version").as_deref() != Some(VERSION.as_bytes()) {
        return Err(FrontFault::Version);
    }
    let rings = node("num-rings").and_then(|text| decimal(&text)).unwrap_or(0);
    if rings == 0 || rings > u64::from(rings_max) {
        return Err(FrontFault::Rings);
    }
    let mut number = |name: String| {
        node(&name).and_then(|text| decimal(&text)).and_then(|value| u32::try_from(value).ok())
    };
    (0..rings as u32)
        .map(|ring| {
            let gref = number(format!("ring-ref{ring}")).ok_or(FrontFault::RingRef(ring))?;
            let port =
                number(format!("event-channel-{ring}")).ok_or(FrontFault::EventChannel(ring))?;
            Ok((Gref(gref), Port(port)))
        })
        .collect()
}

/// A run of bytes in a region; an unused one has length 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Span {
    pub region: Region,
    pub offset: usize,
    pub len: usize,
}

/// Room on the out ring for one whole message; invisible until sealed and pushed. Dropping it
/// undoes nothing because nothing was done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reservation {
    index: u32,
    len: u32,
}

/// Why a ring could not be set up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SetupFault {
    NoFrames,
    Refused(Refusal),
}

/// The frontend's end of one ring pair.
#[derive(Debug)]
pub struct FrontRing {
    interface: Region,
    data: Region,
    half: Half,
    order: u32,
    port: Port,
    /// The interface page's, then the data pages'. Emptied as they are revoked.
    grefs: Vec<Gref>,
    /// Behind the last sealed request, and what the server has been shown of that.
    out_prod: u32,
    out_shown: u32,
    /// Behind the last answer taken, and what has been given back to the server.
    in_cons: u32,
    in_shown: u32,
    /// The head of the message at `in_cons`, once read.
    head: Option<MessageHead>,
    open: bool,
}

impl FrontRing {
    /// Takes frames, grants them to `domid` and allocates a port. Undoes all of it on failure.
    pub fn new<H: Hypervisor>(
        hv: &mut H,
        domid: DomId,
        order: u32,
    ) -> Result<FrontRing, SetupFault> {
        let half = Half::of_order(order).expect("the order comes from a Shape");
        let pages = 1usize << order;
        let interface = hv.frames_alloc(1).ok_or(SetupFault::NoFrames)?;
        let Some(data) = hv.frames_alloc(pages) else {
            hv.frames_free(interface);
            return Err(SetupFault::NoFrames);
        };
        let mut ring = FrontRing {
            interface,
            data,
            half,
            order,
            port: Port(0),
            grefs: Vec::with_capacity(pages + 1),
            out_prod: 0,
            out_shown: 0,
            in_cons: 0,
            in_shown: 0,
            head: None,
            open: false,
        };
        match ring.share(hv, domid) {
            Ok(()) => Ok(ring),
            Err(refusal) => {
                // Nobody has mapped anything yet: revoking cannot be refused.
                ring.try_release(hv);
                Err(SetupFault::Refused(refusal))
            }
        }
    }

    fn share<H: Hypervisor>(&mut self, hv: &mut H, domid: DomId) -> Result<(), Refusal> {
        self.grefs.push(hv.grant(domid, self.interface, true)?);
        for index in 0..self.data.pages as usize {
            self.grefs.push(hv.grant(domid, self.data.page(index), true)?);
        }
        self.port = hv.alloc_unbound(domid)?;
        self.open = true;
        let grefs = Vec::from(&self.grefs[1..]);
        let bytes = Interface { order: self.order, grefs }.emit();
        hv.zero(self.interface, 0, PAGE_BYTES);
        hv.write(self.interface, RING_ORDER, &bytes);
        Ok(())
    }

    /// What the backend must know: the interface page and the port.
    pub fn address(&self) -> (Gref, Port) {
        (self.grefs[0], self.port)
    }

    pub fn port(&self) -> Port {
        self.port
    }

    /// Bytes in each direction: the most one message can have.
    pub fn half_bytes(&self) -> u32 {
        self.half.bytes()
    }

    /// Ends the sharing. False while the other side still maps a page: call again later. When
    /// true the frames are given back and the ring must not be used.
    pub fn try_release<H: Hypervisor>(&mut self, hv: &mut H) -> bool {
        if core::mem::take(&mut self.open) {
            hv.close_port(self.port);
        }
        while let Some(gref) = self.grefs.last() {
            if !hv.revoke(*gref) {
                return false;
            }
            self.grefs.pop();
        }
        hv.frames_free(self.interface);
        hv.frames_free(self.data);
        true
    }

    /// Starts over with the same pages and grants and a new port, for a server that has come
    /// back: a dead one may keep its mappings for long, and frames are few.
    pub fn restart<H: Hypervisor>(&mut self, hv: &mut H, domid: DomId) -> Result<(), Refusal> {
        let port = hv.alloc_unbound(domid)?;
        if core::mem::replace(&mut self.open, true) {
            hv.close_port(self.port);
        }
        self.port = port;
        hv.zero(self.interface, 0, RING_ORDER);
        (self.out_prod, self.out_shown) = (0, 0);
        (self.in_cons, self.in_shown, self.head) = (0, 0, None);
        Ok(())
    }

    /// Pages of the data area as a power of two.
    pub fn order(&self) -> u32 {
        self.order
    }

    /// Reserves room for a message of `len` bytes; `None` while there is not enough.
    pub fn reserve<H: Hypervisor>(&self, hv: &H, len: u32) -> Result<Option<Reservation>, Broken> {
        let out_cons = hv.load_u32(self.interface, OUT_CONS);
        if self.half.room(self.out_prod, out_cons)? < len {
            return Ok(None);
        }
        Ok(Some(Reservation { index: self.out_prod, len }))
    }

    /// The bytes `at..at + len` of a reserved message, to be filled by whoever has them.
    pub fn out_spans(&self, reservation: &Reservation, at: u32, len: u32) -> [Span; 2] {
        assert!(at <= reservation.len && len <= reservation.len - at, "beyond the message");
        self.spans(self.half.bytes() as usize, reservation.index.wrapping_add(at), len)
    }

    /// Writes bytes into a reserved message.
    pub fn put<H: Hypervisor>(&self, hv: &mut H, to: &Reservation, at: u32, bytes: &[u8]) {
        let mut rest = bytes;
        for span in self.out_spans(to, at, bytes.len() as u32) {
            let (now, later) = rest.split_at(span.len);
            hv.write(span.region, span.offset, now);
            rest = later;
        }
    }

    /// A message is filled, apart from what its owner still puts into its spans before the next
    /// [`push`](Self::push).
    pub fn seal(&mut self, reservation: Reservation) {
        assert!(reservation.index == self.out_prod, "one reservation at a time");
        self.out_prod = self.out_prod.wrapping_add(reservation.len);
    }

    /// Makes sealed messages visible. True if there are any: the server must be
    /// [told](Self::tell), for the interface has no word for "I am awake".
    pub fn push<H: Hypervisor>(&mut self, hv: &mut H) -> bool {
        if self.out_prod == self.out_shown {
            return false;
        }
        self.out_shown = self.out_prod;
        hv.store_u32(self.interface, OUT_PROD, self.out_prod);
        true
    }

    /// Sends the server an event.
    pub fn tell<H: Hypervisor>(&self, hv: &mut H) {
        hv.notify(self.port);
    }

    /// The head of the next whole response, at most `size_max` long; `None` while there is none.
    /// The head is read once, however often this is called.
    pub fn peek<H: Hypervisor>(
        &mut self,
        hv: &H,
        size_max: u32,
    ) -> Result<Option<MessageHead>, Broken> {
        let in_prod = hv.load_u32(self.interface, IN_PROD);
        let taken = self.in_cons.wrapping_sub(self.in_shown);
        let queued = self.half.queued(in_prod, self.in_shown)?;
        let queued = queued.checked_sub(taken).ok_or(Broken::Index)?;
        if self.head.is_none() && queued >= HEAD_BYTES {
            let mut bytes = [0; HEAD_BYTES as usize];
            self.get(hv, 0, &mut bytes);
            self.head = Some(MessageHead::parse(&bytes, size_max.min(self.half.bytes()))?);
        }
        Ok(self.head.filter(|head| head.size <= queued))
    }

    /// The head of the next response, whole or not, and the index it begins at, once
    /// [`peek`](Self::peek) has seen it.
    pub fn begun(&self) -> Option<(MessageHead, u32)> {
        Some((self.head?, self.in_cons))
    }

    /// The bytes `at..at + len` of the next response. The server can still change them.
    pub fn in_spans(&self, at: u32, len: u32) -> [Span; 2] {
        self.spans(0, self.in_cons.wrapping_add(at), len)
    }

    /// Copies bytes of the next response out.
    pub fn get<H: Hypervisor>(&self, hv: &H, at: u32, into: &mut [u8]) {
        let mut rest = into;
        for span in self.in_spans(at, rest.len() as u32) {
            let (now, later) = rest.split_at_mut(span.len);
            hv.read(span.region, span.offset, now);
            rest = later;
        }
    }

    /// Goes on to the response after the peeked one, whose bytes stay where they are until
    /// [`release`](Self::release).
    pub fn consume(&mut self) {
        let head = self.head.take().expect("consume follows a peek that yielded");
        self.in_cons = self.in_cons.wrapping_add(head.size);
    }

    /// Gives the room of consumed responses back. Sends no event: the caller keeps the answers
    /// it has asked for within the ring, so that a server never waits for room.
    pub fn release<H: Hypervisor>(&mut self, hv: &mut H) {
        if self.in_cons != self.in_shown {
            self.in_shown = self.in_cons;
            hv.store_u32(self.interface, IN_CONS, self.in_cons);
        }
    }

    fn spans(&self, base: usize, index: u32, len: u32) -> [Span; 2] {
        self.half.split(index, len).map(|(offset, len)| Span {
            region: self.data,
            offset: base + offset as usize,
            len: len as usize,
        })
    }
}

#[cfg(test)]
#[path = "ninepfs_tests.rs"]
mod tests;
