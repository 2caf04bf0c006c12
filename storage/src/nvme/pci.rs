//! Finding an NVMe function behind pciback: class, registers' address, MSI-X table, command
//! register (PCI 3.0, 6.1 and 6.2; NVMe 1.4, 2.1).
//!
//! Guards: nothing is written before all was proved. pciback shows BARs with their machine
//! addresses. MSI-X stays off, but the pages of its table are read-only for a PV domain as soon
//! as pciback has prepared them: a controller whose doorbells share such a page is refused,
//! because ringing one would fault.

use platter_xen::pciif::{Device, Op, PciFault, Pciif, TIMEOUT_NS, Width};
use platter_xen::{Hypervisor, PAGE_BYTES};

use super::MMIO_PAGES;

/// Class 01 (mass storage), subclass 08 (non-volatile memory), interface 02 (NVMe).
const CLASS_NVME: u32 = 0x01_08_02;
/// Memory space enable, bus master enable and interrupt disable of the command register.
const COMMAND_BITS: u32 = 0x406;
/// Capability identifier of MSI-X.
const CAP_MSIX: u32 = 0x11;
/// Capabilities in 192 bytes of at least 4 each.
const CAPS_MAX: u8 = 48;

/// Why a function is not used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PciRefusal {
    /// Another kind of device.
    NotNvme,
    /// BAR0 is not a memory BAR with an address.
    NoRegisters,
    /// The MSI-X table or pending bits share a page with registers that must be written.
    MsixSharesPage,
    /// pciback refused or did not answer.
    Backend(Option<PciFault>),
}

/// A function that can be started.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Function {
    pub device: Device,
    /// Machine address of BAR0, page aligned; map [`MMIO_PAGES`] pages of it.
    pub registers: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Class,
    Bar0,
    Bar1,
    CapPointer,
    Cap {
        at: u16,
        left: u8,
    },
    /// Table offset at `at + 4`, pending bits at `at + 8`.
    MsixTable {
        at: u16,
    },
    MsixPending {
        at: u16,
    },
    ReadCommand,
    WriteCommand,
}

/// The looking itself: one configuration access at a time.
#[derive(Debug)]
pub struct Probe {
    device: Device,
    step: Step,
    started: bool,
    deadline_ns: u64,
    bar0: u32,
    registers: u64,
}

impl Probe {
    pub fn new(device: Device) -> Probe {
        let step = Step::Class;
        Probe { device, step, started: false, deadline_ns: 0, bar0: 0, registers: 0 }
    }

    /// Goes on; `Some` ends it. The page of `pciif` must be idle at the first call.
    pub fn poll<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        pciif: &mut Pciif,
        now_ns: u64,
    ) -> Option<Result<Function, PciRefusal>> {
        loop {
            if !self.started {
                pciif.start(hv, self.device, self.op());
                self.started = true;
                self.deadline_ns = now_ns.saturating_add(TIMEOUT_NS);
            }
            let value = match pciif.poll(hv) {
                None if now_ns >= self.deadline_ns => {
                    return Some(Err(PciRefusal::Backend(None)));
                }
                None => return None,
                Some(Err(fault)) => return Some(Err(PciRefusal::Backend(Some(fault)))),
                Some(Ok(value)) => value,
            };
            self.started = false;
            match self.took(value) {
                Ok(Some(next)) => self.step = next,
                Ok(None) => {
                    let (device, registers) = (self.device, self.registers);
                    return Some(Ok(Function { device, registers }));
                }
                Err(refusal) => return Some(Err(refusal)),
            }
        }
    }

    /// When the backend has not answered in time; its event tells of an answer before that.
    pub fn deadline_ns(&self) -> u64 {
        self.deadline_ns
    }

    fn op(&self) -> Op {
        let read = |offset| Op::ConfRead { offset, width: Width::Four };
        match self.step {
            Step::Class => read(0x08),
            Step::Bar0 => read(0x10),
            Step::Bar1 => read(0x14),
            Step::CapPointer => Op::ConfRead { offset: 0x34, width: Width::One },
            Step::Cap { at, .. } => read(at),
            Step::MsixTable { at } => read(at + 4),
            Step::MsixPending { at } => read(at + 8),
            Step::ReadCommand => Op::ConfRead { offset: 0x04, width: Width::Two },
            Step::WriteCommand => {
                Op::ConfWrite { offset: 0x04, width: Width::Two, value: self.bar0 }
            }
        }
    }

    /// What follows a value; `None` when all is done.
    fn took(&mut self, value: u32) -> Result<Option<Step>, PciRefusal> {
        let next = match self.step {
            Step::Class if value >> 8 != CLASS_NVME => return Err(PciRefusal::NotNvme),
            Step::Class => Step::Bar0,
            Step::Bar0 => {
                self.bar0 = value;
                let (is_io, kind) = (value & 1 == 1, value >> 1 & 3);
                match kind {
                    _ if is_io => return Err(PciRefusal::NoRegisters),
                    0 => self.with_bar1(0)?,
                    2 => Step::Bar1,
                    _ => return Err(PciRefusal::NoRegisters),
                }
            }
            Step::Bar1 => self.with_bar1(value)?,
            Step::CapPointer => cap_or_command(value, CAPS_MAX),
            Step::Cap { at, .. } if value & 0xFF == CAP_MSIX => Step::MsixTable { at },
            Step::Cap { left, .. } => cap_or_command(value >> 8 & 0xFF, left),
            Step::MsixTable { at } => {
                refuse_shared(value)?;
                Step::MsixPending { at }
            }
            Step::MsixPending { .. } => {
                refuse_shared(value)?;
                Step::ReadCommand
            }
            Step::ReadCommand => {
                self.bar0 = value & 0xFFFF | COMMAND_BITS;
                Step::WriteCommand
            }
            Step::WriteCommand => return Ok(None),
        };
        Ok(Some(next))
    }

    fn with_bar1(&mut self, high: u32) -> Result<Step, PciRefusal> {
        self.registers = u64::from(high) << 32 | u64::from(self.bar0 & !0xF);
        let aligned = self.registers.is_multiple_of(PAGE_BYTES as u64);
        if self.registers == 0 || !aligned || high == u32::MAX {
            return Err(PciRefusal::NoRegisters);
        }
        Ok(Step::CapPointer)
    }
}

/// The next capability of the list, or on to the command register at its end.
fn cap_or_command(pointer: u32, left: u8) -> Step {
    let at = (pointer & 0xFC) as u16;
    match left.checked_sub(1) {
        Some(left) if at >= 0x40 => Step::Cap { at, left },
        _ => Step::ReadCommand,
    }
}

/// An MSI-X offset register: BAR in bits 2..0, offset in the rest. BAR0 is ours.
fn refuse_shared(value: u32) -> Result<(), PciRefusal> {
    let (bar, offset) = (value & 7, (value & !7) as usize);
    if bar == 0 && offset / PAGE_BYTES < MMIO_PAGES {
        return Err(PciRefusal::MsixSharesPage);
    }
    Ok(())
}
