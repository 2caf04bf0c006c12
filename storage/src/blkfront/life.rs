//! How a disk comes and goes beyond one backend's cycle: taken away by the toolstack, given
//! again, perhaps by another domain, and left when our own domain ends.
//!
//! Guards the difference between a disk that was taken away on purpose (its backend closed
//! first: everything fails at once) and one whose backend died (its directory just vanished:
//! operations wait for the next backend, for [`WAIT_NS`]). Must never: free a frame whose grant
//! did not end.

use platter_xen::xenbus::XenbusState;
use platter_xen::{DomId, Hypervisor};

use super::{Blkfront, Shared};
use crate::disk::{DiskDone, Held};
use crate::pool::Pool;
use crate::store::StoreFault;

/// How long operations wait for a backend (ours): a driver domain is up again within it, and a
/// guest that is destroyed meanwhile is not held for ever.
pub(super) const WAIT_NS: u64 = 60_000_000_000;

impl Blkfront {
    /// Our own directory is gone. A disk whose backend died stays and waits for another.
    pub fn unplug(&mut self) {
        if !self.vanished {
            self.remove();
        }
    }

    /// The toolstack removed the device for good: everything outstanding fails, nothing is taken.
    pub fn remove(&mut self) {
        self.gone = true;
        self.left.extend(self.shared.take());
        self.wanted = false;
        self.rings.clear();
        for index in 0..self.slots.len() {
            if let Some(slot) = self.slots[index].take() {
                self.indirect_free.extend(slot.indirect);
                self.fail_unfinished(slot.work);
            }
        }
        self.fail_pending();
    }

    fn fail_pending(&mut self) {
        while let Some(work) = self.held.pop_front().or_else(|| self.pending.pop_front()) {
            self.answer(work, Err(StoreFault::Gone));
        }
    }

    /// Our directory was made anew, with a backend in `domid`: a new first cycle begins.
    pub fn replug<H: Hypervisor>(&mut self, hv: &mut H, pool: &mut Pool, domid: DomId) {
        if self.own == XenbusState::Connected {
            self.disconnect(false);
        }
        self.rings.clear();
        self.close_ports(hv);
        (self.queues_named, self.pages_named) = (false, false);
        if domid != self.domid {
            self.left.extend(self.shared.take());
        }
        self.end_left(hv);
        if let Some(peer) = self.peer.take_if(|_| domid != self.domid) {
            pool.let_go(hv, peer);
        }
        self.domid = domid;
        (self.gone, self.wanted, self.vanished) = (false, true, false);
        self.own = XenbusState::Initialising;
    }

    /// Ends what was shared with backends that were left, as far as they have let go.
    pub(super) fn end_left<H: Hypervisor>(&mut self, hv: &mut H) {
        self.left.retain_mut(|shared| !shared.end(hv));
    }

    /// Asks for an orderly close: our domain ends. Nothing may be outstanding. True at the first
    /// call: then [`Blkfront::update`] has something to do.
    pub fn close(&mut self) -> bool {
        core::mem::take(&mut self.wanted)
    }

    /// There is no backend that holds anything of ours.
    pub fn is_closed(&self) -> bool {
        matches!(self.own, XenbusState::Initialising | XenbusState::Closed)
    }

    /// What our own `state` node says, as far as we wrote it.
    pub fn own_state(&self) -> XenbusState {
        self.own
    }

    /// Counts the time without a backend; operations that waited too long fail.
    pub(super) fn watch_the_wait(&mut self, now_ns: u64) {
        if self.is_connected() {
            (self.wait_until_ns, self.waits_in_vain) = (None, false);
            return;
        }
        let until_ns = *self.wait_until_ns.get_or_insert(now_ns.saturating_add(WAIT_NS));
        if now_ns >= until_ns {
            self.fail_pending();
        }
        self.waits_in_vain = now_ns >= until_ns;
    }

    /// Fails a request that a backend may still be at: its pages are not used before it let go.
    pub(super) fn fail_unfinished(&mut self, work: super::Work) {
        self.counters.errors += 1;
        let result = Err(StoreFault::Gone);
        let held = self.peer.map_or(Held::Nobody, Held::Backend);
        self.done.push_back(DiskDone { tag: work.tag, result, held });
    }
}

impl Shared {
    /// Ends its grants and frees its frames; false while a backend maps some.
    pub(super) fn end<H: Hypervisor>(&mut self, hv: &mut H) -> bool {
        for grefs in [&mut self.ring_grefs, &mut self.indirect_grefs] {
            grefs.retain(|gref| !hv.revoke(*gref));
        }
        let ended = self.ring_grefs.is_empty() && self.indirect_grefs.is_empty();
        if ended {
            hv.frames_free(self.rings);
            hv.frames_free(self.indirect);
        }
        ended
    }
}
