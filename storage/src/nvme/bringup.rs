//! From a stopped controller to namespaces that take operations (NVMe 1.4, 7.6.1).
//!
//! Guards the order: disabled and not ready → admin queues → enabled and ready → Identify
//! Controller → number of queues → completion queue before its submission queue → namespaces.
//! One admin command at a time; its slot is 0, aborts have slot 1, the health page 2, the event
//! request 3 (`recovery.rs`).

use alloc::vec::Vec;

use platter_xen::{Bus, Hypervisor, PAGE_BYTES};

use super::command::{Command, Completion, Identify};
use super::identify::{ControllerInfo, NamespaceInfo, parse_namespace_list};
use super::queue::{Slot, Taken};
use super::{NAMESPACES_MAX, Namespace, Nvme, regs};

/// How soon to look again during bring-up.
pub const STEP_NS: u64 = 1_000_000;
/// An admin command that takes longer means a reset (ours; Linux's default is 60 s, for the
/// slowest formats; we send none of those).
pub const ADMIN_TIMEOUT_NS: u64 = 10_000_000_000;
/// Entries of the admin queue: the four slots and one that stays empty.
const ADMIN_ENTRIES: u16 = 8;

/// Slots of the admin queue by purpose.
pub const SLOT_BRINGUP: u16 = 0;
pub const SLOT_ABORT: u16 = 1;
pub const SLOT_HEALTH: u16 = 2;
pub const SLOT_EVENT: u16 = 3;

/// Where a controller is on its way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// CC.EN is being cleared for the first time or after a failure.
    Start,
    /// Waits for CSTS.RDY to clear.
    Disabling {
        until_ns: u64,
    },
    /// Waits for CSTS.RDY to be set.
    Enabling {
        until_ns: u64,
    },
    Identifying,
    AskingQueues,
    AskingEvents,
    /// The completion queue of this pair, then its submission queue.
    CreatingCq(usize),
    CreatingSq(usize),
    /// The list of changed namespaces is read, which re-arms the notice.
    Changes,
    Listing,
    /// The namespace of this index in the list.
    Inspecting(usize),
    Ready,
    /// Given up; `stopped` when it surely does no DMA any more.
    Dead {
        stopped: bool,
    },
}

impl Nvme {
    /// Clears CC.EN; the rest follows by [`advance`](Self::advance).
    pub(super) fn stop<H: Hypervisor + Bus>(&mut self, hv: &mut H) {
        hv.mmio_write_u32(self.mmio, regs::CC, 0);
        self.phase = Phase::Start;
    }

    /// Goes as far as it can without waiting.
    pub(super) fn advance<H: Hypervisor + Bus>(&mut self, hv: &mut H) {
        match self.phase {
            Phase::Start => {
                let until_ns = self.now_ns.saturating_add(self.timeout_ns);
                self.phase = Phase::Disabling { until_ns };
                self.advance(hv);
            }
            Phase::Disabling { until_ns } => {
                let csts = regs::Csts(hv.mmio_read_u32(self.mmio, regs::CSTS));
                if csts.is_gone() || !csts.is_ready() && self.is_another {
                    self.die(true);
                } else if !csts.is_ready() {
                    self.take_all_back();
                    self.enable(hv);
                } else if self.now_ns > until_ns {
                    self.die(false);
                }
            }
            Phase::Enabling { until_ns } => {
                let csts = regs::Csts(hv.mmio_read_u32(self.mmio, regs::CSTS));
                if csts.is_gone() {
                    self.die(true);
                } else if csts.has_failed() || self.now_ns > until_ns {
                    self.reset(hv);
                } else if csts.is_ready() {
                    self.ask(hv, Phase::Identifying);
                }
            }
            Phase::Dead { .. } => {}
            _ => self.take_admin(hv),
        }
    }

    /// Queues in place, then CC.EN (7.6.1, steps 2 to 4).
    fn enable<H: Hypervisor + Bus>(&mut self, hv: &mut H) {
        // CAP.MQES limits the other queues only (3.1.1).
        self.admin.reset(hv, ADMIN_ENTRIES);
        self.pairs_live = 0;
        let size = u32::from(self.admin.entries() - 1);
        hv.mmio_write_u32(self.mmio, regs::AQA, size << 16 | size);
        let (sq, cq) = (self.admin.sq_address(hv), self.admin.cq_address(hv));
        hv.mmio_write_u64(self.mmio, regs::ASQ, sq);
        hv.mmio_write_u64(self.mmio, regs::ACQ, cq);
        // The admin completion queue cannot be created without interrupts.
        hv.mmio_write_u32(self.mmio, regs::INTMS, u32::MAX);
        hv.mmio_write_u32(self.mmio, regs::CC, regs::CC_ENABLED);
        self.phase = Phase::Enabling { until_ns: self.now_ns.saturating_add(self.timeout_ns) };
    }

    /// Sends the command of a phase and enters it.
    fn ask<H: Hypervisor + Bus>(&mut self, hv: &mut H, phase: Phase) {
        let page = hv.dma_address(self.page, 0);
        let command = match phase {
            Phase::Identifying => Command::identify(Identify::Controller, 0, page),
            Phase::AskingQueues => Command::set_queues(self.pairs.len() as u16),
            Phase::AskingEvents => Command::set_events(),
            Phase::CreatingCq(index) => {
                let pair = &self.pairs[index];
                Command::create_cq(pair.id, pair.entries(), pair.cq_address(hv))
            }
            Phase::CreatingSq(index) => {
                let pair = &self.pairs[index];
                Command::create_sq(pair.id, pair.entries(), pair.sq_address(hv))
            }
            Phase::Changes => Command::changed_namespaces(page),
            Phase::Listing => Command::identify(Identify::NamespaceList, 0, page),
            Phase::Inspecting(index) => {
                let nsid = self.namespaces[index].nsid;
                Command::identify(Identify::Namespace, nsid, page)
            }
            other => unreachable!("{other:?} sends no command"),
        };
        hv.zero(self.page, 0, PAGE_BYTES);
        self.phase = phase;
        self.send_admin(hv, SLOT_BRINGUP, &command);
    }

    pub(super) fn send_admin<H: Hypervisor + Bus>(
        &mut self,
        hv: &mut H,
        slot: u16,
        command: &Command,
    ) {
        let held = Slot { work: None, sent_ns: self.now_ns, aborting: false };
        self.admin.push(hv, slot, command, held);
        self.admin.ring(hv, self.mmio, self.stride);
    }

    /// Admin completions, during bring-up and after.
    pub(super) fn take_admin<H: Hypervisor + Bus>(&mut self, hv: &mut H) {
        // Bounded: events may come as fast as they are asked for.
        for _ in 0..ADMIN_ENTRIES {
            let completion = match self.admin.take(hv) {
                Taken::Nothing => break,
                Taken::Unknown => return self.reset(hv),
                Taken::Command(completion, _) => completion,
            };
            self.admin.report_head(hv, self.mmio, self.stride);
            match completion.cid {
                SLOT_BRINGUP => self.step(hv, completion),
                _ => self.background(hv, completion),
            }
            if matches!(self.phase, Phase::Start | Phase::Dead { .. }) {
                // Stopped by us, which is no loss of its cache.
                return;
            }
        }
        // Once it is ready `watch` looks, less often.
        if self.phase != Phase::Ready && self.has_fallen(hv) {
            return;
        }
        let now = self.now_ns;
        let late = |slot: &Slot| now.saturating_sub(slot.sent_ns) > ADMIN_TIMEOUT_NS;
        // An event request is answered when there is an event.
        if self.admin.busy().any(|(number, slot)| number != SLOT_EVENT && late(slot)) {
            self.counters.timeouts += 1;
            self.reset(hv);
        }
    }

    /// The answer to the command of the phase.
    fn step<H: Hypervisor + Bus>(&mut self, hv: &mut H, completion: Completion) {
        let failed = !completion.status.is_success();
        match self.phase {
            Phase::AskingEvents => {
                // A notice is a convenience: without it a resize is seen at the next start.
                self.events_wanted &= !failed;
                self.ask(hv, Phase::CreatingCq(0));
            }
            Phase::Changes => self.ask(hv, Phase::Listing),
            // Namespaces may come and go while they are listed.
            Phase::Inspecting(index) => self.inspected(hv, index, failed),
            _ if failed => {
                self.counters.errors += 1;
                self.counters.last_status = completion.status.code();
                self.reset(hv);
            }
            Phase::Identifying => self.identified(hv),
            Phase::AskingQueues => {
                // NSQA and NCQA, zero based.
                let granted = (completion.result & 0xFFFF).min(completion.result >> 16) as usize;
                self.pairs_live = (granted + 1).min(self.pairs.len());
                for pair in &mut self.pairs {
                    pair.reset(hv, self.entries_max);
                }
                let next =
                    if self.events_wanted { Phase::AskingEvents } else { Phase::CreatingCq(0) };
                self.ask(hv, next);
            }
            Phase::CreatingCq(index) => self.ask(hv, Phase::CreatingSq(index)),
            Phase::CreatingSq(index) if index + 1 < self.pairs_live => {
                self.ask(hv, Phase::CreatingCq(index + 1));
            }
            Phase::CreatingSq(_) if self.has_list => self.ask(hv, Phase::Listing),
            Phase::CreatingSq(_) => {
                let highest = self.info.map_or(0, |info| info.namespaces);
                self.enter_namespaces(hv, 1..=highest.min(NAMESPACES_MAX as u32));
            }
            Phase::Listing => self.listed(hv),
            _ => self.reset(hv),
        }
    }

    fn identified<H: Hypervisor + Bus>(&mut self, hv: &mut H) {
        let bytes = self.answer(hv);
        let Some(info) = ControllerInfo::parse(&bytes) else { return self.die(false) };
        let is_other = |old: &ControllerInfo| (old.serial, old.model) != (info.serial, info.model);
        if self.expected.as_ref().is_some_and(is_other) {
            self.is_another = true;
            return self.stop(hv);
        }
        self.events_wanted = info.namespace_notices;
        self.info = Some(info);
        self.ask(hv, Phase::AskingQueues);
    }

    fn listed<H: Hypervisor + Bus>(&mut self, hv: &mut H) {
        let list = parse_namespace_list(&self.answer(hv));
        self.enter_namespaces(hv, list.into_iter());
    }

    /// Enters new namespaces behind the known ones: a unit keeps its number for ever.
    fn enter_namespaces<H: Hypervisor + Bus>(
        &mut self,
        hv: &mut H,
        list: impl Iterator<Item = u32>,
    ) {
        for nsid in list {
            let known = self.namespaces.iter().any(|namespace| namespace.nsid == nsid);
            if !known && self.namespaces.len() < NAMESPACES_MAX {
                self.namespaces.push(Namespace::new(nsid));
            }
        }
        self.inspect_next(hv, 0);
    }

    fn inspected<H: Hypervisor + Bus>(&mut self, hv: &mut H, index: usize, failed: bool) {
        let info = NamespaceInfo::parse(&self.answer(hv)).ok().filter(|_| !failed);
        self.namespaces[index].see(info);
        self.inspect_next(hv, index + 1);
    }

    fn inspect_next<H: Hypervisor + Bus>(&mut self, hv: &mut H, index: usize) {
        if index < self.namespaces.len() {
            return self.ask(hv, Phase::Inspecting(index));
        }
        self.phase = Phase::Ready;
        self.namespaces_changed = false;
        self.next_check_ns = self.now_ns;
        self.next_health_ns = self.now_ns;
        self.start_background(hv);
    }

    /// Looks at the namespaces again: operations wait, for some admin commands, until it is done.
    pub(super) fn relist<H: Hypervisor + Bus>(&mut self, hv: &mut H) {
        self.ask(hv, Phase::Changes);
    }

    /// A private copy of what the controller wrote.
    pub(super) fn answer<H: Hypervisor>(&self, hv: &H) -> Vec<u8> {
        let mut bytes = alloc::vec![0; PAGE_BYTES];
        hv.read(self.page, 0, &mut bytes);
        bytes
    }
}
