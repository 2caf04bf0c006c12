//! The blkif shared ring, both ends, over mapped pages named by a [`Region`].
//!
//! Guards two orders (Xen public/io/ring.h): a backend copies a slot out before any response
//! may be written over it, and publishes responses as data, `rsp_prod`, full fence, hold-off
//! check; a frontend the same with requests. Guards answer-exactly-once: taking a request
//! yields a [`Permit`] that stands for its response slot. Must never: believe an index of the
//! other side without bounding it, read a slot twice, allocate.
//!
//! Layout: `req_prod`, `req_event`, `rsp_prod`, `rsp_event` (u32 each), padding to 64 bytes,
//! then slots of [`Abi::request_bytes`] each: 32 per page in both layouts.

use core::sync::atomic::{AtomicU32, Ordering};

use crate::blkif::{
    Abi, REQUEST_BYTES_MAX, RESPONSE_BYTES_MAX, RawRequest, Response, Status, response_key,
};
use crate::{Hypervisor, PAGE_BYTES, Region};

const REQ_PROD: usize = 0;
const REQ_EVENT: usize = 4;
const RSP_PROD: usize = 8;
const RSP_EVENT: usize = 12;
const SLOTS_AT: usize = 64;

/// `max-ring-page-order` that we offer: 16 pages, as Linux blkback.
pub const RING_PAGE_ORDER_MAX: u32 = 4;
/// Pages of the largest ring.
pub const RING_PAGES_MAX: usize = 1 << RING_PAGE_ORDER_MAX;
/// Requests per ring page, in both layouts.
pub const SLOTS_PER_PAGE: u32 = 32;

/// The other end wrote an index that no correct peer writes. The ring must not be used again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RingBroken {
    /// More produced than the ring holds beside what is unanswered (CVE-2010-4247).
    ProducerBeyond { prod: u32, cons: u32 },
    /// The ring was found broken earlier.
    Already,
}

/// Permits dropped without an answer since start: always zero unless platter has a bug.
static PERMITS_DROPPED: AtomicU32 = AtomicU32::new(0);

/// How many permits were dropped unanswered (a counter of our own mistakes).
pub fn permits_dropped() -> u32 {
    PERMITS_DROPPED.load(Ordering::Relaxed)
}

/// The obligation to answer one request, with what its response must repeat. Consumed by
/// [`BackRing::complete`], or by [`Permit::abandon`] when the ring is gone.
#[must_use = "a request must be answered exactly once"]
#[derive(Debug)]
pub struct Permit {
    id: u64,
    operation: u8,
    /// First page of the ring it belongs to: a permit must not wander to another ring.
    ring: u32,
}

impl Permit {
    /// The guest's name of the request, for traces.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The operation that the response will repeat.
    pub fn operation(&self) -> u8 {
        self.operation
    }

    /// Ends the obligation without an answer. Only for a ring that is broken or being released:
    /// there is nobody to answer to.
    pub fn abandon(self) {
        core::mem::forget(self);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        PERMITS_DROPPED.fetch_add(1, Ordering::Relaxed);
        debug_assert!(false, "a permit was dropped: its request would never be answered");
    }
}

fn slots_of(region: Region) -> u32 {
    let pages = region.pages as usize;
    assert!(pages.is_power_of_two() && pages <= RING_PAGES_MAX, "rings have 1 to 16 pages");
    let slots = region.pages * SLOTS_PER_PAGE;
    assert!(SLOTS_AT + slots as usize * Abi::X86_64.request_bytes() <= pages * PAGE_BYTES);
    slots
}

fn slot_offset(abi: Abi, slots: u32, index: u32) -> usize {
    SLOTS_AT + (index & (slots - 1)) as usize * abi.request_bytes()
}

/// The backend's end of one ring.
#[derive(Debug)]
pub struct BackRing {
    region: Region,
    abi: Abi,
    slots: u32,
    req_cons: u32,
    /// Next response slot; published up to `rsp_prod`.
    rsp_prod_pvt: u32,
    rsp_prod: u32,
    broken: bool,
}

impl BackRing {
    /// Starts on a mapped ring at the shared `rsp_prod`, as blkback does: a frontend that
    /// reconnects may have left its indexes where they were.
    pub fn attach<H: Hypervisor>(hv: &H, region: Region, abi: Abi) -> Result<BackRing, RingBroken> {
        let slots = slots_of(region);
        let rsp_prod = hv.load_u32(region, RSP_PROD);
        let req_prod = hv.load_u32(region, REQ_PROD);
        if req_prod.wrapping_sub(rsp_prod) > slots {
            return Err(RingBroken::ProducerBeyond { prod: req_prod, cons: rsp_prod });
        }
        Ok(BackRing {
            region,
            abi,
            slots,
            req_cons: rsp_prod,
            rsp_prod_pvt: rsp_prod,
            rsp_prod,
            broken: false,
        })
    }

    pub fn abi(&self) -> Abi {
        self.abi
    }

    pub fn region(&self) -> Region {
        self.region
    }

    /// Requests taken and not completed.
    pub fn outstanding(&self) -> u32 {
        self.req_cons.wrapping_sub(self.rsp_prod_pvt)
    }

    pub fn is_broken(&self) -> bool {
        self.broken
    }

    fn req_prod<H: Hypervisor>(&mut self, hv: &H) -> Result<u32, RingBroken> {
        if self.broken {
            return Err(RingBroken::Already);
        }
        let prod = hv.load_u32(self.region, REQ_PROD);
        // Unanswered requests hold their slots: the rest is all a correct frontend can fill.
        if prod.wrapping_sub(self.rsp_prod_pvt) > self.slots
            || prod.wrapping_sub(self.req_cons) > self.slots
        {
            self.broken = true;
            return Err(RingBroken::ProducerBeyond { prod, cons: self.req_cons });
        }
        Ok(prod)
    }

    /// A request is there to be taken; false on a broken ring.
    pub fn has_requests<H: Hypervisor>(&mut self, hv: &H) -> bool {
        self.req_prod(hv).is_ok_and(|prod| prod != self.req_cons)
    }

    /// Copies the next request out, once, and reserves the slot of its response.
    pub fn take<H: Hypervisor>(
        &mut self,
        hv: &H,
    ) -> Result<Option<(RawRequest, Permit)>, RingBroken> {
        if self.req_prod(hv)? == self.req_cons {
            return Ok(None);
        }
        let mut raw: RawRequest = [0; REQUEST_BYTES_MAX];
        let offset = slot_offset(self.abi, self.slots, self.req_cons);
        hv.read(self.region, offset, &mut raw[..self.abi.request_bytes()]);
        self.req_cons = self.req_cons.wrapping_add(1);
        let (id, operation) = response_key(&raw, self.abi);
        Ok(Some((raw, Permit { id, operation, ring: self.region.first_page })))
    }

    /// Writes the response. Not visible before [`publish`](Self::publish). On a broken ring the
    /// obligation simply ends.
    pub fn complete<H: Hypervisor>(&mut self, permit: Permit, hv: &mut H, status: Status) {
        assert!(permit.ring == self.region.first_page, "permit of another ring");
        assert!(self.outstanding() > 0, "more answers than requests");
        let response =
            Response { id: permit.id, operation: permit.operation, status: status.wire() };
        permit.abandon();
        if !self.broken {
            let offset = slot_offset(self.abi, self.slots, self.rsp_prod_pvt);
            hv.write(self.region, offset, &response.emit()[..self.abi.response_bytes()]);
        }
        self.rsp_prod_pvt = self.rsp_prod_pvt.wrapping_add(1);
    }

    /// Makes completed responses visible, once per turn. True when the frontend asked to be
    /// told (`rsp_event`): the caller then notifies.
    pub fn publish<H: Hypervisor>(&mut self, hv: &mut H) -> bool {
        let (old, new) = (self.rsp_prod, self.rsp_prod_pvt);
        if old == new || self.broken {
            return false;
        }
        hv.store_u32(self.region, RSP_PROD, new);
        self.rsp_prod = new;
        hv.fence();
        crossed(hv.load_u32(self.region, RSP_EVENT), old, new)
    }

    /// Before going idle: asks for an event at the next request, then looks once more.
    /// True when there is a request now. Without this a lost wake-up is possible.
    pub fn final_check<H: Hypervisor>(&mut self, hv: &mut H) -> Result<bool, RingBroken> {
        if self.req_prod(hv)? != self.req_cons {
            return Ok(true);
        }
        hv.store_u32(self.region, REQ_EVENT, self.req_cons.wrapping_add(1));
        hv.fence();
        Ok(self.req_prod(hv)? != self.req_cons)
    }
}

/// The hold-off rule of `RING_PUSH_*_AND_CHECK_NOTIFY`: the event index lies in `(old, new]`.
fn crossed(event: u32, old: u32, new: u32) -> bool {
    new.wrapping_sub(event) < new.wrapping_sub(old)
}

/// The frontend's end of one ring, as suspicious of its backend as [`BackRing`] is of a guest.
#[derive(Debug)]
pub struct FrontRing {
    region: Region,
    abi: Abi,
    slots: u32,
    req_prod_pvt: u32,
    req_prod: u32,
    rsp_cons: u32,
    broken: bool,
}

impl FrontRing {
    /// Initialises the shared ring; only a frontend does (`SHARED_RING_INIT`).
    pub fn init<H: Hypervisor>(hv: &mut H, region: Region, abi: Abi) -> FrontRing {
        let slots = slots_of(region);
        hv.zero(region, 0, region.bytes());
        hv.store_u32(region, REQ_EVENT, 1);
        hv.store_u32(region, RSP_EVENT, 1);
        FrontRing { region, abi, slots, req_prod_pvt: 0, req_prod: 0, rsp_cons: 0, broken: false }
    }

    pub fn abi(&self) -> Abi {
        self.abi
    }

    pub fn region(&self) -> Region {
        self.region
    }

    /// Requests that still fit.
    pub fn room(&self) -> u32 {
        self.slots - self.outstanding()
    }

    /// Requests put and not answered.
    pub fn outstanding(&self) -> u32 {
        self.req_prod_pvt.wrapping_sub(self.rsp_cons)
    }

    /// Writes a request. Not visible before [`publish`](Self::publish). False when full.
    pub fn put<H: Hypervisor>(&mut self, hv: &mut H, raw: &RawRequest) -> bool {
        if self.room() == 0 {
            return false;
        }
        let offset = slot_offset(self.abi, self.slots, self.req_prod_pvt);
        hv.write(self.region, offset, &raw[..self.abi.request_bytes()]);
        self.req_prod_pvt = self.req_prod_pvt.wrapping_add(1);
        true
    }

    /// Makes requests visible. True when the backend asked to be told.
    pub fn publish<H: Hypervisor>(&mut self, hv: &mut H) -> bool {
        let (old, new) = (self.req_prod, self.req_prod_pvt);
        if old == new {
            return false;
        }
        hv.store_u32(self.region, REQ_PROD, new);
        self.req_prod = new;
        hv.fence();
        crossed(hv.load_u32(self.region, REQ_EVENT), old, new)
    }

    fn rsp_prod<H: Hypervisor>(&mut self, hv: &H) -> Result<u32, RingBroken> {
        if self.broken {
            return Err(RingBroken::Already);
        }
        let prod = hv.load_u32(self.region, RSP_PROD);
        if prod.wrapping_sub(self.rsp_cons) > self.req_prod.wrapping_sub(self.rsp_cons) {
            self.broken = true;
            return Err(RingBroken::ProducerBeyond { prod, cons: self.rsp_cons });
        }
        Ok(prod)
    }

    /// Copies the next response out, once. Its `id` is the backend's word.
    pub fn take<H: Hypervisor>(&mut self, hv: &H) -> Result<Option<Response>, RingBroken> {
        if self.rsp_prod(hv)? == self.rsp_cons {
            return Ok(None);
        }
        let mut bytes = [0; RESPONSE_BYTES_MAX];
        let offset = slot_offset(self.abi, self.slots, self.rsp_cons);
        hv.read(self.region, offset, &mut bytes[..self.abi.response_bytes()]);
        self.rsp_cons = self.rsp_cons.wrapping_add(1);
        Ok(Some(Response::parse(&bytes)))
    }

    /// Before going idle: asks for an event at the next response, then looks once more.
    pub fn final_check<H: Hypervisor>(&mut self, hv: &mut H) -> Result<bool, RingBroken> {
        if self.rsp_prod(hv)? != self.rsp_cons {
            return Ok(true);
        }
        hv.store_u32(self.region, RSP_EVENT, self.rsp_cons.wrapping_add(1));
        hv.fence();
        Ok(self.rsp_prod(hv)? != self.rsp_cons)
    }
}

#[cfg(test)]
#[path = "ring_tests.rs"]
mod tests;
