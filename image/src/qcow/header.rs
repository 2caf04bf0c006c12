//! The qcow version 1 header (QEMU block/qcow.c, "QCowHeader"): 48 bytes, big-endian.

use crate::fault::{FaultKind, ImageFault};
use crate::files::NAME_BYTES_MAX;
use crate::types::{FileNo, SECTOR_BYTES};

/// Bytes of the header.
pub(super) const HEADER_BYTES: usize = 48;
/// "QFI\xfb".
const MAGIC: u32 = 0x5146_49fb;
const VERSION: u32 = 1;
/// Cluster and table sizes as powers of two (QEMU's limits).
const CLUSTER_BITS: core::ops::RangeInclusive<u8> = 9..=16;
const L2_BITS: core::ops::RangeInclusive<u8> = 6..=13;
/// Entries of an L1 table (QEMU: its bytes fit a C int).
pub(super) const L1_ENTRIES_MAX: u64 = i32::MAX as u64 / 8;

/// Offsets of the disk's size and of where the L1 table lies.
pub(super) const SIZE_AT: u64 = 24;
pub(super) const L1_OFFSET_AT: u64 = 40;

/// A header whose fields are valid, alone and together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Header {
    /// Where the backing file's name is and its length; length 0 for none.
    pub name_offset: u64,
    pub name_bytes: usize,
    pub mtime: u32,
    pub disk_bytes: u64,
    pub cluster_bits: u8,
    pub l2_bits: u8,
    pub l1_offset: u64,
}

impl Header {
    pub fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries of an L2 table.
    pub fn l2_entries(&self) -> u64 {
        1 << self.l2_bits
    }

    /// Entries of the L1 table.
    pub fn l1_entries(&self) -> u64 {
        self.disk_bytes.div_ceil(self.l2_entries() * self.cluster_bytes())
    }

    /// First byte after the L1 table.
    pub fn l1_end(&self) -> u64 {
        self.l1_offset.saturating_add(self.l1_entries() * 8)
    }

    pub fn parse(file: FileNo, bytes: &[u8; HEADER_BYTES]) -> Result<Header, ImageFault> {
        let u32_at = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4"));
        let u64_at = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8"));
        let corrupt = |field, offset, value| Err(ImageFault::corrupt(file, field, offset, value));
        let magic = u32_at(0);
        if magic != MAGIC {
            let fault = ImageFault::new(FaultKind::NotThisFormat, file, "the magic of qcow");
            return Err(ImageFault { value: magic.into(), ..fault });
        }
        if u32_at(4) != VERSION {
            let fault = ImageFault::new(FaultKind::NotThisFormat, file, "the version of qcow");
            return Err(ImageFault { value: u32_at(4).into(), ..fault });
        }
        let header = Header {
            name_offset: u64_at(8),
            name_bytes: if u64_at(8) != 0 { u32_at(16) as usize } else { 0 },
            mtime: u32_at(20),
            disk_bytes: u64_at(24),
            cluster_bits: bytes[32],
            l2_bits: bytes[33],
            l1_offset: u64_at(40),
        };
        if !CLUSTER_BITS.contains(&header.cluster_bits) {
            return corrupt("cluster_bits", 32, header.cluster_bits.into());
        }
        if !L2_BITS.contains(&header.l2_bits) {
            return corrupt("l2_bits", 33, header.l2_bits.into());
        }
        match u32_at(36) {
            0 => {}
            1 => return Err(ImageFault::unsupported(file, "AES encryption of qcow", 1)),
            other => return corrupt("crypt_method", 36, other.into()),
        }
        if header.disk_bytes < SECTOR_BYTES || header.l1_entries() > L1_ENTRIES_MAX {
            return corrupt("size", SIZE_AT, header.disk_bytes);
        }
        if header.l1_offset < HEADER_BYTES as u64 || !header.l1_offset.is_multiple_of(8) {
            return corrupt("l1_table_offset", 40, header.l1_offset);
        }
        let (name, max) = (header.name_bytes as u64, NAME_BYTES_MAX as u64);
        if name > max {
            return Err(ImageFault::limit(file, "backing_file_size", name, max));
        }
        if header.name_offset != 0 && name == 0 {
            return corrupt("backing_file_size", 16, 0);
        }
        if name > 0 && header.name_offset < HEADER_BYTES as u64 {
            return corrupt("backing_file_offset", 8, header.name_offset);
        }
        Ok(header)
    }

    pub fn emit(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |offset: usize, value: &[u8]| {
            bytes[offset..offset + value.len()].copy_from_slice(value);
        };
        put(0, &MAGIC.to_be_bytes());
        put(4, &VERSION.to_be_bytes());
        if self.name_bytes > 0 {
            put(8, &self.name_offset.to_be_bytes());
            put(16, &(self.name_bytes as u32).to_be_bytes());
        }
        put(20, &self.mtime.to_be_bytes());
        put(24, &self.disk_bytes.to_be_bytes());
        put(32, &[self.cluster_bits, self.l2_bits]);
        put(40, &self.l1_offset.to_be_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    //! Would miss: what the tables hold; the image tests read whole images.

    use super::*;

    /// `qemu-img create -f qcow -b b.img -F raw c.qcow` over a raw file of 10 MiB.
    const VECTOR: [u8; HEADER_BYTES] = [
        0x51, 0x46, 0x49, 0xfb, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0,
        0x30, // magic, version, name at
        0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xa0, 0, 0, // name length, mtime, size
        9, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x38, // bits, crypt, l1_table_offset
    ];

    fn parse(edit: impl Fn(&mut [u8])) -> Result<Header, ImageFault> {
        let mut bytes = VECTOR;
        edit(&mut bytes);
        Header::parse(FileNo(0), &bytes)
    }

    #[test]
    fn a_header_of_qemu_is_read_and_emitted_alike() {
        let header = parse(|_| {}).unwrap();
        assert_eq!((header.cluster_bytes(), header.l2_entries()), (512, 4096));
        assert_eq!((header.l1_offset, header.l1_entries()), (0x38, 5));
        assert_eq!((header.name_offset, header.name_bytes), (0x30, 5));
        assert_eq!(header.emit(), VECTOR);
    }

    /// Among them those of CVE-2014-0222 (l2_bits) and CVE-2014-0223 (size).
    #[test]
    fn hostile_fields_are_refused() {
        let edits: [(usize, &[u8]); 13] = [
            (0, b"QFI\xfa"),
            (7, &[2]),
            (8, &[0; 7]),
            (16, &[0, 0, 4, 0]),
            (16, &[0; 4]),
            (24, &[0; 8]),
            (24, &[0xff; 8]),
            (32, &[8]),
            (32, &[17]),
            (33, &[5]),
            (33, &[14]),
            (36, &[0, 0, 0, 1]),
            (40, &[0; 8]),
        ];
        for (at, value) in edits {
            let edited = parse(|bytes| {
                bytes[at..at + value.len()].copy_from_slice(value);
                // The third breaks the name's place.
                bytes[15] = if at == 8 { 1 } else { bytes[15] };
            });
            assert!(edited.is_err(), "{value:?} at {at}");
        }
    }
}
