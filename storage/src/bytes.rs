//! Checked reads of little-endian fields, and the two CRCs of on-disk structures.
//!
//! Every reader answers `None` beyond the slice: a parser of foreign bytes never indexes.

/// A little-endian field at a byte offset.
pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let end = at.checked_add(2)?;
    Some(u16::from_le_bytes(bytes.get(at..end)?.try_into().ok()?))
}

/// A little-endian field at a byte offset.
pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let end = at.checked_add(4)?;
    Some(u32::from_le_bytes(bytes.get(at..end)?.try_into().ok()?))
}

/// A little-endian field at a byte offset.
pub fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let end = at.checked_add(8)?;
    Some(u64::from_le_bytes(bytes.get(at..end)?.try_into().ok()?))
}

/// `N` bytes at a byte offset.
pub fn array_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    let end = at.checked_add(N)?;
    bytes.get(at..end)?.try_into().ok()
}

/// What tells two things apart by the bytes that name them: FNV-1a, 64 bits. No protection
/// against someone who looks for two equal ones.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mark(pub u64);

impl Mark {
    pub const NONE: Mark = Mark(0xCBF2_9CE4_8422_2325);

    /// With another name, which ends here: `ab`, `c` is not `a`, `bc`.
    #[must_use]
    pub fn with(self, name: &[u8]) -> Mark {
        let step = |mark: u64, byte: &u8| (mark ^ u64::from(*byte)).wrapping_mul(0x100_0000_01B3);
        Mark((name.len() as u64).to_le_bytes().iter().chain(name).fold(self.0, step))
    }
}

/// The table of a reflected CRC-32 with this reflected polynomial.
const fn crc_table(polynomial: u32) -> [u32; 256] {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let mut value = index as u32;
        let mut bit = 0;
        while bit < 8 {
            value = if value & 1 == 1 { (value >> 1) ^ polynomial } else { value >> 1 };
            bit += 1;
        }
        table[index] = value;
        index += 1;
    }
    table
}

/// IEEE 802.3 (0x04C11DB7 reflected): GPT and LVM.
static IEEE: [u32; 256] = crc_table(0xEDB8_8320);
/// Castagnoli (0x1EDC6F41 reflected): ext4.
static CASTAGNOLI: [u32; 256] = crc_table(0x82F6_3B78);

fn update(table: &[u32; 256], mut crc: u32, bytes: &[u8]) -> u32 {
    for &byte in bytes {
        crc = table[usize::from(crc as u8 ^ byte)] ^ (crc >> 8);
    }
    crc
}

/// CRC-32 as GPT uses it: initial value and final inversion all ones (UEFI 2.10, 5.3.2).
pub fn crc32(bytes: &[u8]) -> u32 {
    !update(&IEEE, !0, bytes)
}

/// The IEEE CRC without the final inversion, continued from `crc` (LVM2 starts at 0xF597A6CF).
pub fn crc32_raw(crc: u32, bytes: &[u8]) -> u32 {
    update(&IEEE, crc, bytes)
}

/// CRC-32C without the final inversion, continued from `crc` (ext4 starts at all ones).
pub fn crc32c_raw(crc: u32, bytes: &[u8]) -> u32 {
    update(&CASTAGNOLI, crc, bytes)
}

#[cfg(test)]
mod tests {
    //! Misses nothing but speed: the check values are the published ones.
    use super::*;

    #[test]
    fn crcs_have_their_published_check_values() {
        assert_eq!(crc32(b"123456789"), 0xCBF4_3926);
        assert_eq!(!crc32c_raw(!0, b"123456789"), 0xE306_9283);
    }

    #[test]
    fn a_field_beyond_the_slice_is_none() {
        assert_eq!(u32_at(&[1, 0, 0, 0], 0), Some(1));
        assert_eq!(u32_at(&[1, 0, 0, 0], 1), None);
        assert_eq!(u64_at(&[0; 8], usize::MAX), None);
    }
}
