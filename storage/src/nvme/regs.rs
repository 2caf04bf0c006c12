//! Controller registers (NVMe 1.4, 3.1).

/// Offsets in bytes from the start of BAR0.
pub const CAP: usize = 0x00;
pub const VS: usize = 0x08;
/// INTMS: interrupt mask set.
pub const INTMS: usize = 0x0C;
pub const CC: usize = 0x14;
pub const CSTS: usize = 0x1C;
pub const AQA: usize = 0x24;
pub const ASQ: usize = 0x28;
pub const ACQ: usize = 0x30;
pub const DOORBELLS: usize = 0x1000;

/// CC.EN with the NVM command set, 4 KiB pages, round robin, entries of 64 and 16 bytes
/// (3.1.5).
pub const CC_ENABLED: u32 = 1 | 6 << 16 | 4 << 20;
/// CC.SHN: normal shutdown.
pub const CC_SHUTDOWN: u32 = 1 << 14;
/// The version that brought the list of active namespaces: 1.1.
pub const VERSION_1_1: u32 = 0x0001_0100;
/// What a device that is gone reads as.
pub const GONE: u32 = u32::MAX;

/// CAP (3.1.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cap(pub u64);

impl Cap {
    /// Entries of an I/O queue at most, at least 2.
    pub fn entries_max(self) -> u32 {
        (self.0 as u32 & 0xFFFF) + 1
    }

    /// Worst case of enabling and disabling.
    pub fn timeout_ns(self) -> u64 {
        // CAP.TO in units of 500 ms; a controller that says 0 still gets one.
        (self.0 >> 24 & 0xFF).max(1) * 500_000_000
    }

    /// Distance of two doorbells in bytes.
    pub fn doorbell_stride(self) -> usize {
        4 << (self.0 >> 32 & 0xF)
    }

    pub fn has_nvm_commands(self) -> bool {
        self.0 >> 37 & 1 == 1
    }

    /// Pages of 4096 bytes are supported.
    pub fn has_small_pages(self) -> bool {
        self.0 >> 48 & 0xF == 0
    }
}

/// CSTS (3.1.6).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Csts(pub u32);

impl Csts {
    pub fn is_gone(self) -> bool {
        self.0 == GONE
    }

    pub fn is_ready(self) -> bool {
        self.0 & 1 == 1
    }

    pub fn has_failed(self) -> bool {
        self.0 >> 1 & 1 == 1
    }

    pub fn is_shut_down(self) -> bool {
        self.0 >> 2 & 3 == 2
    }
}
