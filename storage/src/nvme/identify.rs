//! What a controller and its namespaces say of themselves (NVMe 1.4, 5.15.2), and SMART
//! (5.14.1.2), parsed from private copies of 4096 or 512 bytes.

use alloc::vec::Vec;

use crate::bytes::{array_at, u16_at, u32_at, u64_at};

/// MDTS beyond this says more than 64 bits hold: no limit to us.
const MDTS_MAX: u32 = 51;
/// Namespaces of one controller (ours).
pub const NAMESPACES_MAX: usize = 16;

/// Identify Controller, the fields that matter here (NVMe 1.4, figure 247).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ControllerInfo {
    /// ASCII, padded with blanks.
    pub serial: [u8; 20],
    pub model: [u8; 40],
    pub firmware: [u8; 8],
    /// Most bytes of one transfer, by MDTS in units of 4096 bytes; `None`: no limit.
    pub transfer_bytes_max: Option<u64>,
    /// NN: the highest namespace number.
    pub namespaces: u32,
    pub dataset_management: bool,
    pub write_zeroes: bool,
    /// VWC: there is a volatile write cache.
    pub write_cache: bool,
    /// OAES: notices of changed namespaces are sent.
    pub namespace_notices: bool,
}

impl ControllerInfo {
    /// Parses the structure; `None` when a queue entry size is not the one we use.
    pub fn parse(bytes: &[u8]) -> Option<ControllerInfo> {
        let (sqes, cqes) = (*bytes.get(512)?, *bytes.get(513)?);
        // Required and largest sizes as powers of two: 64 and 16 bytes must be among them.
        let holds = |sizes: u8, size: u8| sizes & 0xF <= size && sizes >> 4 >= size;
        if !holds(sqes, 6) || !holds(cqes, 4) {
            return None;
        }
        let mdts = u32::from(*bytes.get(77)?);
        let oncs = u16_at(bytes, 520)?;
        Some(ControllerInfo {
            serial: array_at(bytes, 4)?,
            model: array_at(bytes, 24)?,
            firmware: array_at(bytes, 64)?,
            transfer_bytes_max: (1..=MDTS_MAX).contains(&mdts).then(|| 4096 << mdts),
            namespaces: u32_at(bytes, 516)?,
            dataset_management: oncs & 1 << 2 != 0,
            write_zeroes: oncs & 1 << 3 != 0,
            write_cache: bytes.get(525)? & 1 != 0,
            namespace_notices: u32_at(bytes, 92)? & 1 << 8 != 0,
        })
    }
}

/// Active namespace numbers, in order, at most [`NAMESPACES_MAX`] (NVMe 1.4, 5.15.2.3).
pub fn parse_namespace_list(bytes: &[u8]) -> Vec<u32> {
    let numbers = bytes.chunks_exact(4).filter_map(|entry| u32_at(entry, 0));
    numbers.take_while(|&number| number != 0).take(NAMESPACES_MAX).collect()
}

/// Identify Namespace (NVMe 1.4, figure 245).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NamespaceInfo {
    /// NSZE, in blocks.
    pub blocks: u64,
    /// 512 to 4096.
    pub block_bytes: u32,
    pub write_protected: bool,
    /// DLFEAT: Write Zeroes may deallocate.
    pub zeroes_deallocate: bool,
    /// NGUID and EUI64; zeros when it has none.
    pub unique: [u8; 24],
}

/// Why a namespace is left out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unusable {
    /// Not there: all zeros.
    Inactive,
    /// Blocks smaller than 512 or larger than 4096 bytes.
    BlockSize,
    /// Blocks carry metadata or protection information.
    Metadata,
    /// Its size in bytes does not fit 64 bits, or the structure is short.
    Broken,
}

impl NamespaceInfo {
    /// Parses the structure.
    pub fn parse(bytes: &[u8]) -> Result<NamespaceInfo, Unusable> {
        let byte = |at: usize| bytes.get(at).copied().ok_or(Unusable::Broken);
        let blocks = u64_at(bytes, 0).ok_or(Unusable::Broken)?;
        if blocks == 0 {
            return Err(Unusable::Inactive);
        }
        let format = usize::from(byte(26)? & 0xF);
        let lbaf = u32_at(bytes, 128 + format * 4).ok_or(Unusable::Broken)?;
        let (metadata, shift) = (lbaf & 0xFFFF, lbaf >> 16 & 0xFF);
        if !(9..=12).contains(&shift) {
            return Err(Unusable::BlockSize);
        }
        if metadata != 0 || byte(29)? & 7 != 0 {
            return Err(Unusable::Metadata);
        }
        if blocks > u64::MAX >> shift {
            return Err(Unusable::Broken);
        }
        Ok(NamespaceInfo {
            blocks,
            block_bytes: 1 << shift,
            write_protected: byte(99)? & 1 != 0,
            zeroes_deallocate: byte(33)? & 1 << 3 != 0,
            unique: array_at(bytes, 104).ok_or(Unusable::Broken)?,
        })
    }

    /// Capacity in 512-byte sectors.
    pub fn sectors(&self) -> u64 {
        self.blocks * u64::from(self.block_bytes / 512)
    }
}

/// SMART / Health Information, the fields that statistics show (NVMe 1.4, figure 193).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Health {
    /// Bits: spare low, temperature, degraded, read-only, backup failed.
    pub critical_warning: u8,
    pub temperature_kelvin: u16,
    pub spare_percent: u8,
    pub used_percent: u8,
    /// Low 64 bits of the counters.
    pub unsafe_shutdowns: u64,
    pub media_errors: u64,
    pub error_log_entries: u64,
}

impl Health {
    pub fn parse(bytes: &[u8]) -> Option<Health> {
        Some(Health {
            critical_warning: *bytes.first()?,
            temperature_kelvin: u16_at(bytes, 1)?,
            spare_percent: *bytes.get(3)?,
            used_percent: *bytes.get(5)?,
            unsafe_shutdowns: u64_at(bytes, 144)?,
            media_errors: u64_at(bytes, 160)?,
            error_log_entries: u64_at(bytes, 176)?,
        })
    }
}
