//! What can go wrong with a running controller: commands that take too long, failure status,
//! removal; and what runs beside operations: the health page, notices of changed namespaces.
//!
//! Guards: pages of an operation are free only when the controller gave it back, or was seen
//! stopped (CSTS.RDY clear), or is gone from the bus. Abort first, reset when that does not
//! help, give up after [`RESETS_MAX`] resets without one success in between.

use platter_xen::{Bus, Hypervisor};

use super::bringup::{Phase, SLOT_ABORT, SLOT_EVENT, SLOT_HEALTH};
use super::command::{Command, Completion};
use super::queue::Work;
use super::{Health, Nvme, RETRIES_MAX, regs};
use crate::disk::{DiskDone, Held};
use crate::store::StoreFault;

/// A command that takes longer is aborted (ours; Linux: 30 s, then reset).
const COMMAND_TIMEOUT_NS: u64 = 8_000_000_000;
/// An aborted command that is still there after this much more means a reset.
const ABORT_TIMEOUT_NS: u64 = 2_000_000_000;
/// How often to look for either, and at CSTS.
const CHECK_NS: u64 = 500_000_000;
/// Between two readings of the health page.
const HEALTH_NS: u64 = 60_000_000_000;
/// Resets in a row without a success.
const RESETS_MAX: u8 = 5;

/// Asynchronous event: type Notice, information Namespace Attribute Changed (NVMe 1.4, 5.2.1).
const EVENT_TYPE_NOTICE: u32 = 2;
const EVENT_NAMESPACES: u32 = 0;

impl Nvme {
    /// Stops the controller and starts it anew; what was with it is sent again.
    pub(super) fn reset<H: Hypervisor + Bus>(&mut self, hv: &mut H) {
        if self.resets_in_vain == RESETS_MAX {
            return self.die(false);
        }
        self.resets_in_vain += 1;
        self.counters.resets += 1;
        self.stop(hv);
    }

    /// The controller was seen stopped: its operations are ours again.
    pub(super) fn take_all_back(&mut self) {
        while self.admin.take_back().is_some() {}
        for index in 0..self.pairs.len() {
            while let Some(slot) = self.pairs[index].take_back() {
                let Some(mut work) = slot.work else { continue };
                if work.retries == RETRIES_MAX {
                    self.fail(work, StoreFault::Gone, Held::Nobody);
                    continue;
                }
                work.retries += 1;
                self.counters.retries += 1;
                self.pending.push_back(work);
            }
        }
    }

    /// Gives up. `stopped`: it surely does no DMA any more.
    pub(super) fn die(&mut self, stopped: bool) {
        self.phase = Phase::Dead { stopped };
        for index in 0..self.pairs.len() {
            while let Some(slot) = self.pairs[index].take_back() {
                if let Some(work) = slot.work {
                    let held = if stopped { Held::Nobody } else { Held::Device };
                    self.fail(work, StoreFault::Gone, held);
                }
            }
        }
        while let Some(work) = self.pending.pop_front() {
            // It was given back before: nobody writes to its pages.
            self.fail(work, StoreFault::Gone, Held::Nobody);
        }
    }

    fn fail(&mut self, work: Work, fault: StoreFault, held: Held) {
        self.done.push_back(DiskDone { tag: work.tag, result: Err(fault), held });
    }

    /// Looks, now and then, whether the controller still lives.
    pub(super) fn watch<H: Hypervisor + Bus>(&mut self, hv: &mut H) {
        if self.now_ns < self.next_check_ns {
            return;
        }
        self.next_check_ns = self.now_ns.saturating_add(CHECK_NS);
        if self.has_fallen(hv) {
            return;
        }
        if self.must_reset(hv) {
            self.counters.timeouts += 1;
            return self.reset(hv);
        }
        if self.now_ns >= self.next_health_ns && self.admin_is_free(SLOT_HEALTH) {
            self.next_health_ns = self.now_ns.saturating_add(HEALTH_NS);
            let page = hv.dma_address(self.page, 0);
            self.send_admin(hv, SLOT_HEALTH, &Command::health(page));
        } else if self.namespaces_changed && self.admin_is_free(SLOT_HEALTH) {
            self.namespaces_changed = false;
            self.relist(hv);
        }
    }

    /// A controller that was enabled and does not say so any more, or has failed, or is gone: a
    /// new start, or the end.
    pub(super) fn has_fallen<H: Hypervisor + Bus>(&mut self, hv: &mut H) -> bool {
        let csts = regs::Csts(hv.mmio_read_u32(self.mmio, regs::CSTS));
        if csts.is_gone() {
            self.die(true);
        } else if !csts.is_ready() {
            // Not by us: it lost power or was reset from below, and with it perhaps what was
            // answered and not flushed.
            self.losses += 1;
            self.reset(hv);
        } else if csts.has_failed() {
            self.reset(hv);
        } else {
            return false;
        }
        true
    }

    fn admin_is_free(&mut self, slot: u16) -> bool {
        self.admin.busy().all(|(number, _)| number != slot)
    }

    /// Aborts the first command that takes too long; true when one outlived its abort.
    fn must_reset<H: Hypervisor + Bus>(&mut self, hv: &mut H) -> bool {
        let now = self.now_ns;
        let mut late = None;
        for pair in &mut self.pairs {
            let id = pair.id;
            for (number, slot) in pair.busy() {
                let age = now.saturating_sub(slot.sent_ns);
                if slot.aborting && age > COMMAND_TIMEOUT_NS + ABORT_TIMEOUT_NS {
                    return true;
                }
                if !slot.aborting && age > COMMAND_TIMEOUT_NS && late.is_none() {
                    late = Some((id, number));
                }
            }
        }
        let Some((id, number)) = late else { return false };
        if !self.admin_is_free(SLOT_ABORT) {
            return false;
        }
        self.counters.timeouts += 1;
        self.counters.aborts += 1;
        for pair in &mut self.pairs {
            if pair.id == id {
                pair.busy().filter(|(slot, _)| *slot == number).for_each(|(_, slot)| {
                    slot.aborting = true;
                });
            }
        }
        self.send_admin(hv, SLOT_ABORT, &Command::abort(id, number));
        false
    }

    /// Asks for events, when the controller has any.
    pub(super) fn start_background<H: Hypervisor + Bus>(&mut self, hv: &mut H) {
        if self.events_wanted && self.admin_is_free(SLOT_EVENT) {
            self.send_admin(hv, SLOT_EVENT, &Command::async_event());
        }
    }

    /// The answer to a command beside the operations.
    pub(super) fn background<H: Hypervisor + Bus>(&mut self, hv: &mut H, completion: Completion) {
        let good = completion.status.is_success();
        match completion.cid {
            SLOT_HEALTH if good => {
                // A disk that nobody uses comes back too.
                self.resets_in_vain = 0;
                self.health = Health::parse(&self.answer(hv));
            }
            SLOT_EVENT if good => {
                let (kind, information) = (completion.result & 7, completion.result >> 8 & 0xFF);
                self.namespaces_changed |=
                    kind == EVENT_TYPE_NOTICE && information == EVENT_NAMESPACES;
                self.start_background(hv);
            }
            SLOT_EVENT => self.events_wanted = false,
            // An abort's own answer says nothing: the command's does. A health page that is
            // refused is asked for again a minute later.
            _ => {}
        }
    }
}
