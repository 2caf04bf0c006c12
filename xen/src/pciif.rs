//! pciif: PCI configuration space over the page shared with pciback (Xen public/io/pciif.h).
//!
//! Guards one operation at a time: fill, set `XEN_PCIF_active`, notify, and the page is the
//! backend's until that bit clears. Must never: read the answer before the bit has cleared,
//! wait. The caller gives up on a silent backend by its own clock.

use crate::{Hypervisor, Port, Region};

/// `XEN_PCI_MAGIC`, for the `magic` node.
pub const MAGIC: &str = "7";
/// `XEN_PCIF_active`: the operation is the backend's.
const ACTIVE: u32 = 1;

const FLAGS: usize = 0;
/// `struct xen_pci_op` at 4: cmd, err, domain, bus, devfn, offset, size, value, info, then
/// msix_entries[128] of vector u16 and entry u16.
const OP: usize = 4;
const ERR: usize = OP + 4;
const VALUE: usize = OP + 28;
const OP_WORDS: usize = 9;
const MSIX_ENTRIES: usize = OP + OP_WORDS * 4;
/// `SH_INFO_MAX_VEC`.
pub const MSIX_VECTORS_MAX: usize = 128;

/// Seconds after which Linux's pcifront gives an operation up: ours too.
pub const TIMEOUT_NS: u64 = 2_000_000_000;

/// A device as pciback names it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Device {
    pub domain: u16,
    pub bus: u8,
    /// Device in bits 7..3, function in bits 2..0.
    pub devfn: u8,
}

/// Width of a configuration access in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Width {
    One = 1,
    Two = 2,
    Four = 4,
}

/// `XEN_PCI_OP_*`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    /// The answer is the value read.
    ConfRead {
        offset: u16,
        width: Width,
    },
    ConfWrite {
        offset: u16,
        width: Width,
        value: u32,
    },
    /// The answer is the pirq.
    EnableMsi,
    DisableMsi,
    /// Vectors for table entries `0..vectors`; read their pirqs by [`Pciif::msix_pirq`].
    EnableMsix {
        vectors: u16,
    },
    DisableMsix,
}

impl Op {
    const fn cmd(self) -> u32 {
        match self {
            Op::ConfRead { .. } => 0,
            Op::ConfWrite { .. } => 1,
            Op::EnableMsi => 2,
            Op::DisableMsi => 3,
            Op::EnableMsix { .. } => 4,
            Op::DisableMsix => 5,
        }
    }

    /// cmd, err, domain, bus, devfn, offset, size, value, info.
    fn words(self, device: Device) -> [u32; OP_WORDS] {
        let (offset, size, value) = match self {
            Op::ConfRead { offset, width } => (offset, width as u32, 0),
            Op::ConfWrite { offset, width, value } => (offset, width as u32, value),
            Op::EnableMsix { vectors } => (0, 0, u32::from(vectors)),
            Op::EnableMsi | Op::DisableMsi | Op::DisableMsix => (0, 0, 0),
        };
        [
            self.cmd(),
            0,
            u32::from(device.domain),
            u32::from(device.bus),
            u32::from(device.devfn),
            u32::from(offset),
            size,
            value,
            0,
        ]
    }
}

/// `XEN_PCI_ERR_*`, and what else a backend may say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PciFault {
    DeviceNotFound,
    InvalidOffset,
    AccessDenied,
    NotImplemented,
    OpFailed,
    Other(i32),
}

impl PciFault {
    fn parse(err: i32) -> Result<(), PciFault> {
        Err(match err {
            0 => return Ok(()),
            -1 => PciFault::DeviceNotFound,
            -2 => PciFault::InvalidOffset,
            -3 => PciFault::AccessDenied,
            -4 => PciFault::NotImplemented,
            -5 => PciFault::OpFailed,
            other => PciFault::Other(other),
        })
    }
}

/// The shared page and whose it is now.
#[derive(Debug)]
pub struct Pciif {
    page: Region,
    port: Port,
    busy: bool,
}

impl Pciif {
    /// Takes a page of ours that pciback has been granted.
    pub fn new<H: Hypervisor>(hv: &mut H, page: Region, port: Port) -> Pciif {
        hv.zero(page, 0, page.bytes());
        Pciif { page, port, busy: false }
    }

    pub fn port(&self) -> Port {
        self.port
    }

    /// Hands an operation to pciback. One at a time: the previous one has been answered.
    pub fn start<H: Hypervisor>(&mut self, hv: &mut H, device: Device, op: Op) {
        assert!(!self.busy, "one operation at a time");
        let words = op.words(device);
        for (index, word) in words.iter().enumerate() {
            hv.write(self.page, OP + index * 4, &word.to_le_bytes());
        }
        if let Op::EnableMsix { vectors } = op {
            assert!(usize::from(vectors) <= MSIX_VECTORS_MAX, "the page has 128 entries");
            for entry in 0..vectors {
                let [low, high] = entry.to_le_bytes();
                hv.write(self.page, MSIX_ENTRIES + usize::from(entry) * 4, &[0, 0, low, high]);
            }
        }
        let flags = hv.load_u32(self.page, FLAGS);
        hv.store_u32(self.page, FLAGS, flags | ACTIVE);
        self.busy = true;
        hv.notify(self.port);
    }

    /// The answer, once there is one: the value of a read, the pirq of an MSI.
    pub fn poll<H: Hypervisor>(&mut self, hv: &H) -> Option<Result<u32, PciFault>> {
        if !self.busy || hv.load_u32(self.page, FLAGS) & ACTIVE != 0 {
            return None;
        }
        self.busy = false;
        let err = hv.load_u32(self.page, ERR) as i32;
        let value = hv.load_u32(self.page, VALUE);
        Some(PciFault::parse(err).map(|()| value))
    }

    /// The pirq of an MSI-X entry after [`Op::EnableMsix`] was answered.
    pub fn msix_pirq<H: Hypervisor>(&self, hv: &H, entry: u16) -> u16 {
        assert!(!self.busy && usize::from(entry) < MSIX_VECTORS_MAX, "read after the answer");
        let mut vector = [0; 2];
        hv.read(self.page, MSIX_ENTRIES + usize::from(entry) * 4, &mut vector);
        u16::from_le_bytes(vector)
    }
}

/// A device's address from pciback's `dev-%d` or `vdev-%d` node: `dddd:bb:dd.f`, hexadecimal.
pub fn parse_device(text: &[u8]) -> Option<Device> {
    let text = core::str::from_utf8(text).ok()?;
    let (domain, rest) = text.split_once(':')?;
    let (bus, rest) = rest.split_once(':')?;
    let (slot, function) = rest.split_once('.')?;
    let slot = hex(slot, 2).filter(|slot| *slot < 32)?;
    let function = hex(function, 2).filter(|function| *function < 8)?;
    Some(Device {
        domain: hex(domain, 4)? as u16,
        bus: hex(bus, 2)? as u8,
        devfn: (slot << 3 | function) as u8,
    })
}

/// 1 to `digits` hexadecimal digits; `from_str_radix` would take a sign too.
fn hex(text: &str, digits: usize) -> Option<u32> {
    if text.is_empty() || text.len() > digits || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u32::from_str_radix(text, 16).ok()
}

#[cfg(test)]
mod tests {
    //! The shared page as bytes, a backend played by hand. Would miss: pciback's own filters.

    use super::*;
    use crate::DomId;
    use crate::fake::Fake;

    const NVME: Device = Device { domain: 0, bus: 1, devfn: 0 };

    fn world() -> (Fake, Pciif) {
        let mut hv = Fake::new(2);
        let page = hv.frames_alloc(1).unwrap();
        let port = hv.alloc_unbound(DomId(0)).unwrap();
        let pciif = Pciif::new(&mut hv, page, port);
        (hv, pciif)
    }

    #[test]
    fn a_config_write_as_bytes() {
        let (mut hv, mut pciif) = world();
        let op = Op::ConfWrite { offset: 0x10, width: Width::Four, value: 0xffff_ffff };
        pciif.start(&mut hv, Device { domain: 2, bus: 3, devfn: 0x21 }, op);
        let words = [1u32, 1, 0, 2, 3, 0x21, 0x10, 4, 0xffff_ffff, 0].map(u32::to_le_bytes);
        let mut page = [0; 40];
        hv.read(pciif.page, 0, &mut page);
        assert_eq!(page, words.concat()[..]);
        assert_eq!(hv.notified[0], 1);
    }

    #[test]
    fn an_answer_is_taken_once_and_only_when_the_bit_has_cleared() {
        let (mut hv, mut pciif) = world();
        pciif.start(&mut hv, NVME, Op::ConfRead { offset: 0, width: Width::Four });
        hv.store_u32(pciif.page, VALUE, 0x0010_1b36);
        assert_eq!(pciif.poll(&hv), None);
        // Bit 1 (AER handler) is not ours.
        hv.store_u32(pciif.page, FLAGS, 2);
        assert_eq!(pciif.poll(&hv), Some(Ok(0x0010_1b36)));
        assert_eq!(pciif.poll(&hv), None);
        pciif.start(&mut hv, NVME, Op::EnableMsi);
        assert_eq!(hv.load_u32(pciif.page, FLAGS), 3);
    }

    #[test]
    fn errors_have_names() {
        let cases = [(-1, PciFault::DeviceNotFound), (-5, PciFault::OpFailed)];
        for (err, fault) in cases.into_iter().chain([(7, PciFault::Other(7))]) {
            let (mut hv, mut pciif) = world();
            pciif.start(&mut hv, NVME, Op::DisableMsi);
            hv.store_u32(pciif.page, ERR, err as u32);
            hv.store_u32(pciif.page, FLAGS, 0);
            assert_eq!(pciif.poll(&hv), Some(Err(fault)));
        }
    }

    #[test]
    fn msix_entries_go_out_and_pirqs_come_back() {
        let (mut hv, mut pciif) = world();
        pciif.start(&mut hv, NVME, Op::EnableMsix { vectors: 2 });
        let mut entries = [0; 12];
        hv.read(pciif.page, 40, &mut entries);
        assert_eq!(entries, [0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]);
        assert_eq!(hv.load_u32(pciif.page, VALUE), 2);
        hv.write(pciif.page, 44, &[0x2a, 0]);
        hv.store_u32(pciif.page, FLAGS, 0);
        assert_eq!(pciif.poll(&hv), Some(Ok(2)));
        assert_eq!(pciif.msix_pirq(&hv, 1), 42);
    }

    #[test]
    fn device_names() {
        let device = Device { domain: 0, bus: 0x1f, devfn: 0xf9 };
        assert_eq!(parse_device(b"0000:1f:1f.1"), Some(device));
        for bad in ["", "0000:1f:20.1", "0000:1f:1f.8", "0000:1f:1f", "0:0:0.+1", "10000:0:0.0"] {
            assert_eq!(parse_device(bad.as_bytes()), None, "{bad}");
        }
    }
}
