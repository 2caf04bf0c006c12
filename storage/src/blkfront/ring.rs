//! Requests onto the rings, in turn, and responses off them.

use platter_xen::blkif::{
    Abi, Response, SEGMENTS_DIRECT_MAX, Segment, emit_descriptors, emit_discard, emit_indirect,
    emit_transfer, info, op,
};
use platter_xen::{Hypervisor, PAGE_BYTES};

use super::{Blkfront, FAILED, Slot, Work, transfer_op};
use crate::disk::DiskOp;
use crate::pool::{Pool, RUN_PAGES_MAX};
use crate::store::StoreFault;

/// Sectors in a page.
const PAGE_SECTORS: u32 = PAGE_BYTES as u32 / 512;
/// `BLKIF_RSP_EOPNOTSUPP` (blkif.h).
const RSP_UNSUPPORTED: i16 = -2;

impl Blkfront {
    /// Puts one request of an operation onto the ring; false when there is no room for it.
    pub(super) fn send<H: Hypervisor>(&mut self, hv: &mut H, pool: &Pool, work: Work) -> bool {
        if work.io.op == DiskOp::Flush && !self.has_cache() {
            // The backend has no volatile cache: what it answered is durable (blkif.h).
            self.answer(work, Ok(()));
            return true;
        }
        if let Some(fault) = self.unfit(&work) {
            self.answer(work, Err(fault));
            return true;
        }
        let Some(ring) = self.ring_with_room() else { return false };
        let Some(id) = self.slots.iter().position(Option::is_none) else { return false };
        let left = work.io.sectors - work.done;
        let sector = work.io.sector + u64::from(work.done);
        let (raw, slot) = match work.io.op {
            DiskOp::Flush => {
                // An empty barrier is the flush of backends that know nothing else.
                let flush = self.nodes.is_some_and(|nodes| nodes.flush);
                let operation = if flush { op::FLUSH_DISKCACHE } else { op::WRITE_BARRIER };
                let raw = emit_transfer(Abi::X86_64, operation, id as u64, self.handle, 0, &[]);
                (raw, Slot { work, sectors: 0, operation, ring, indirect: None })
            }
            DiskOp::Discard => {
                let raw = emit_discard(Abi::X86_64, id as u64, sector, u64::from(left), false);
                let operation = op::DISCARD;
                (raw, Slot { work, sectors: left, operation, ring, indirect: None })
            }
            DiskOp::Zeroes => {
                self.answer(work, Err(StoreFault::Unsupported));
                return true;
            }
            DiskOp::Read | DiskOp::Write => {
                let most = self.segments_max() as u32 * PAGE_SECTORS;
                let sectors = left.min(most);
                let operation = transfer_op(&work.io);
                let mut slot = Slot { work, sectors, operation, ring, indirect: None };
                match self.transfer(hv, pool, id as u64, sector, &mut slot) {
                    Some(raw) => (raw, slot),
                    None => return false,
                }
            }
        };
        assert!(self.rings[usize::from(ring)].put(hv, &raw), "the ring had room");
        self.slots[id] = Some(slot);
        true
    }

    /// Why this backend cannot do what an earlier one was asked for.
    fn unfit(&self, work: &Work) -> Option<StoreFault> {
        let nodes = self.nodes.as_ref()?;
        let io = &work.io;
        let changes = matches!(io.op, DiskOp::Write | DiskOp::Discard | DiskOp::Zeroes);
        let end = io.sector.saturating_add(u64::from(io.sectors));
        if changes && nodes.info & info::READONLY != 0 {
            Some(StoreFault::ReadOnly)
        } else if io.op == DiskOp::Discard && nodes.discard_granularity_bytes.is_none() {
            Some(StoreFault::Unsupported)
        } else if end > nodes.sectors {
            Some(StoreFault::BeyondEnd)
        } else {
            None
        }
    }

    /// The rings take turns; a full one is passed over.
    fn ring_with_room(&mut self) -> Option<u8> {
        let count = self.rings.len();
        let ring = (0..count)
            .map(|step| (self.next_ring + step) % count)
            .find(|ring| self.rings[*ring].room() > 0)?;
        self.next_ring = ring + 1;
        Some(ring as u8)
    }

    /// A read or write, direct or indirect; `None` when no page of descriptors is free.
    fn transfer<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        pool: &Pool,
        id: u64,
        sector: u64,
        slot: &mut Slot,
    ) -> Option<platter_xen::blkif::RawRequest> {
        let (shared, peer) = (self.shared.as_ref()?, self.peer?);
        // Parts are whole pages, so each begins at one.
        let first = slot.work.io.page + (slot.work.done / PAGE_SECTORS) as u16;
        let count = slot.sectors.div_ceil(PAGE_SECTORS) as usize;
        let mut segments = [Segment::EMPTY; RUN_PAGES_MAX];
        for (index, segment) in segments.iter_mut().take(count).enumerate() {
            let left = slot.sectors - index as u32 * PAGE_SECTORS;
            let gref = pool.gref(peer, first + index as u16);
            let last_sect = (left.min(PAGE_SECTORS) - 1) as u8;
            *segment = Segment { gref, first_sect: 0, last_sect };
        }
        let segments = &segments[..count];
        let (operation, handle) = (slot.operation, self.handle);
        if count <= SEGMENTS_DIRECT_MAX {
            return Some(emit_transfer(Abi::X86_64, operation, id, handle, sector, segments));
        }
        let page = self.indirect_free.pop()?;
        slot.indirect = Some(page);
        let mut bytes = [0; RUN_PAGES_MAX * 8];
        let len = emit_descriptors(segments, &mut bytes);
        hv.write(shared.indirect, usize::from(page) * PAGE_BYTES, &bytes[..len]);
        let grefs = [shared.indirect_grefs[usize::from(page)]];
        let count = count as u16;
        Some(emit_indirect(Abi::X86_64, operation, id, handle, sector, count, &grefs))
    }

    /// Makes requests visible and tells the backend if it asked to be told.
    pub(super) fn publish<H: Hypervisor>(&mut self, hv: &mut H) {
        for (ring, port) in self.rings.iter_mut().zip(&self.ports) {
            if ring.publish(hv) {
                hv.notify(*port);
            }
        }
    }

    pub(super) fn send_pending<H: Hypervisor>(&mut self, hv: &mut H, pool: &Pool) {
        while let Some(work) = self.pending.pop_front() {
            if !self.send(hv, pool, work) {
                self.pending.push_front(work);
                break;
            }
        }
        self.publish(hv);
    }

    /// Takes all responses; a broken ring, and the others with it, are left for the handshake to
    /// replace.
    pub(super) fn take_responses<H: Hypervisor>(&mut self, hv: &mut H) {
        for index in 0..self.ports.len() {
            // Before the look: an event that comes later is for what comes later.
            hv.take_pending(self.ports[index]);
            self.take_responses_of(hv, index);
        }
    }

    fn take_responses_of<H: Hypervisor>(&mut self, hv: &mut H, index: usize) {
        loop {
            let Some(ring) = self.rings.get_mut(index) else { return };
            let taken = match ring.take(hv) {
                Ok(None) => match ring.final_check(hv) {
                    Ok(true) => continue,
                    Ok(false) => return,
                    Err(_) => None,
                },
                Ok(Some(response)) => self.take_slot(index, &response).map(|slot| (slot, response)),
                Err(_) => None,
            };
            let Some((slot, response)) = taken else {
                self.counters.broken += 1;
                // Nothing that this backend says counts any more; the handshake goes on from
                // a ring that is not there.
                return self.disconnect(false);
            };
            self.finish(slot, response.status);
        }
    }

    /// The request that a response answers, if there is one.
    fn take_slot(&mut self, ring: usize, response: &Response) -> Option<Slot> {
        let place = self.slots.get_mut(usize::try_from(response.id).ok()?)?;
        let slot = place.take_if(|slot| {
            usize::from(slot.ring) == ring && slot.operation == response.operation
        })?;
        self.indirect_free.extend(slot.indirect);
        Some(slot)
    }

    fn finish(&mut self, slot: Slot, status: i16) {
        let mut work = slot.work;
        work.done += slot.sectors;
        match status {
            0 if work.io.op != DiskOp::Flush && work.done < work.io.sectors => {
                self.pending.push_back(work);
            }
            0 => self.answer(work, Ok(())),
            RSP_UNSUPPORTED => self.answer(work, Err(StoreFault::Unsupported)),
            _ => self.answer(work, Err(FAILED)),
        }
    }
}
