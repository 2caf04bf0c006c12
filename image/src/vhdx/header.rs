//! The structures of a VHDX: headers, region table, metadata table and its items, parent locator
//! ([MS-VHDX] 2.2, 2.6). All fields are little-endian.
//!
//! Protocol guarded: a header or table counts only if its signature and checksum hold; what is
//! required and not known is refused. It must never read a file: it is given bytes.

use crate::fault::ImageFault;
use crate::types::FileNo;

use super::crc::Crc;

pub(super) const MIB: u64 = 1 << 20;
/// "vhdxfile" ([MS-VHDX] 2.2.1).
pub(super) const FILE_SIGNATURE: &[u8; 8] = b"vhdxfile";
/// Where the two headers and the two region tables stand ([MS-VHDX] 2.2).
pub(super) const HEADER_OFFSETS: [u64; 2] = [64 << 10, 128 << 10];
pub(super) const REGION_OFFSETS: [u64; 2] = [192 << 10, 256 << 10];
pub(super) const HEADER_BYTES: usize = 4096;
/// Bytes of a region table, its entries included; as many of a metadata table.
pub(super) const TABLE_BYTES: u64 = 64 << 10;
/// Most entries of either table ([MS-VHDX] 2.2.3.1, 2.6.1.1).
pub(super) const ENTRIES_MAX: u32 = 2047;
pub(super) const ENTRY_BYTES: u64 = 32;
/// Bytes before the first entry of a region table, of a metadata table.
pub(super) const REGION_HEAD_BYTES: u64 = 16;
pub(super) const METADATA_HEAD_BYTES: u64 = 32;
/// Longest log worked with (ours; Windows writes 1 MiB, the field allows 4 GiB).
pub(super) const LOG_BYTES_MAX: u64 = 64 << 20;
/// Highest sequence number of a header that others follow (ours): no file lives so long.
const SEQUENCE_MAX: u64 = 1 << 63;
/// Largest disk: 64 TiB ([MS-VHDX] 2.6.2.2).
pub(super) const DISK_BYTES_MAX: u64 = 64 << 40;
/// Block sizes ([MS-VHDX] 2.6.2.1).
pub(super) const BLOCK_BYTES_MIN: u32 = 1 << 20;
pub(super) const BLOCK_BYTES_MAX: u32 = 256 << 20;

/// A GUID as it stands in a file: the first three fields little-endian.
pub(super) type Guid = [u8; 16];

/// A GUID of this text, as it stands in a file.
const fn guid(text: u128) -> Guid {
    let b = text.to_be_bytes();
    [
        b[3], b[2], b[1], b[0], b[5], b[4], b[7], b[6], b[8], b[9], b[10], b[11], b[12], b[13],
        b[14], b[15],
    ]
}

/// A GUID as the number that its text spells.
pub(super) const fn guid_number(on_disk: Guid) -> u128 {
    // The exchange of bytes is its own inverse.
    u128::from_be_bytes(guid(u128::from_be_bytes(on_disk)))
}

pub(super) const fn guid_from_number(number: u128) -> Guid {
    guid(number)
}

pub(super) const NO_GUID: Guid = [0; 16];
pub(super) const BAT_REGION: Guid = guid(0x2dc27766_f623_4200_9d64_115e9bfd4a08);
pub(super) const METADATA_REGION: Guid = guid(0x8b7ca206_4790_4b9a_b8fe_575f050f886e);
pub(super) const FILE_PARAMETERS: Guid = guid(0xcaa16737_fa36_4d43_b3b6_33f0aa44e76b);
pub(super) const DISK_SIZE: Guid = guid(0x2fa54224_cd1b_4876_b211_5dbed83bf4b8);
pub(super) const DISK_ID: Guid = guid(0xbeca12ab_b2e6_4523_93ef_c309e000c746);
pub(super) const LOGICAL_SECTOR: Guid = guid(0x8141bf1d_a96f_4709_ba47_f233a8faab5f);
pub(super) const PHYSICAL_SECTOR: Guid = guid(0xcda348c7_445d_4471_9cc9_e9885251c556);
pub(super) const PARENT_LOCATOR: Guid = guid(0xa8d35f2d_b30b_454d_abf7_d3d84834ab0c);
pub(super) const VHDX_LOCATOR: Guid = guid(0xb04aefb7_d19e_4a81_b789_25b8e9445913);

/// The metadata items that are known, in the order in which they are kept.
pub(super) const ITEMS: [Guid; 6] =
    [FILE_PARAMETERS, DISK_SIZE, DISK_ID, LOGICAL_SECTOR, PHYSICAL_SECTOR, PARENT_LOCATOR];

pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

pub(super) fn guid_at(bytes: &[u8], at: usize) -> Guid {
    bytes[at..at + 16].try_into().expect("sixteen bytes")
}

pub(super) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// A valid header ([MS-VHDX] 2.2.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Header {
    pub sequence: u64,
    pub file_write_guid: Guid,
    pub data_write_guid: Guid,
    /// Not zero: the log holds entries that must be replayed.
    pub log_guid: Guid,
    pub log_version: u16,
    pub version: u16,
    pub log_length: u32,
    pub log_offset: u64,
}

impl Header {
    /// `None` unless signature and checksum hold.
    pub fn parse(b: &[u8; HEADER_BYTES]) -> Option<Header> {
        if &b[..4] != b"head" || u32_at(b, 4) != Crc::new().with_hole(b, 4).value() {
            return None;
        }
        Some(Header {
            sequence: u64_at(b, 8),
            file_write_guid: guid_at(b, 16),
            data_write_guid: guid_at(b, 32),
            log_guid: guid_at(b, 48),
            log_version: u16_at(b, 64),
            version: u16_at(b, 66),
            log_length: u32_at(b, 68),
            log_offset: u64_at(b, 72),
        })
    }

    pub fn emit(&self, b: &mut [u8; HEADER_BYTES]) {
        b.fill(0);
        put(b, 0, b"head");
        put(b, 8, &self.sequence.to_le_bytes());
        put(b, 16, &self.file_write_guid);
        put(b, 32, &self.data_write_guid);
        put(b, 48, &self.log_guid);
        put(b, 64, &self.log_version.to_le_bytes());
        put(b, 66, &self.version.to_le_bytes());
        put(b, 68, &self.log_length.to_le_bytes());
        put(b, 72, &self.log_offset.to_le_bytes());
        let sum = Crc::new().with(&b[..]).value();
        put(b, 4, &sum.to_le_bytes());
    }

    /// Refuses what this engine does not know; `offset` is the header's.
    pub fn check(&self, file: FileNo, offset: u64) -> Result<(), ImageFault> {
        if self.version != 1 {
            return Err(ImageFault::unsupported(file, "VHDX version", self.version as u64));
        }
        if self.log_version != 0 {
            let field = "VHDX log version";
            return Err(ImageFault::unsupported(file, field, self.log_version as u64));
        }
        if self.sequence > SEQUENCE_MAX {
            let field = "VHDX header's sequence number";
            return Err(ImageFault::limit(file, field, self.sequence, SEQUENCE_MAX));
        }
        let length = self.log_length as u64;
        if !length.is_multiple_of(MIB) || length == 0 {
            return Err(ImageFault::corrupt(file, "VHDX log length", offset + 68, length));
        }
        if length > LOG_BYTES_MAX {
            return Err(ImageFault::limit(file, "VHDX log length", length, LOG_BYTES_MAX));
        }
        if !self.log_offset.is_multiple_of(MIB) || self.log_offset < MIB {
            let field = "VHDX log offset";
            return Err(ImageFault::corrupt(file, field, offset + 72, self.log_offset));
        }
        Ok(())
    }
}

/// What the metadata says of the disk ([MS-VHDX] 2.6.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Metadata {
    pub block_bytes: u32,
    /// Blocks are never taken back: a fixed disk.
    pub leave_allocated: bool,
    pub has_parent: bool,
    pub disk_bytes: u64,
    pub logical_bytes: u32,
}

impl Metadata {
    /// From the items' bytes; `at` is the metadata region's offset, for messages.
    pub fn parse(
        file: FileNo,
        at: u64,
        parameters: [u8; 8],
        disk_bytes: u64,
        logical_bytes: u32,
        physical_bytes: u32,
    ) -> Result<Metadata, ImageFault> {
        let bad = |field, value| Err(ImageFault::corrupt(file, field, at, value));
        let block_bytes = u32_at(&parameters, 0);
        let in_range = (BLOCK_BYTES_MIN..=BLOCK_BYTES_MAX).contains(&block_bytes);
        if !block_bytes.is_power_of_two() || !in_range {
            return bad("VHDX block size", block_bytes as u64);
        }
        let flags = u32_at(&parameters, 4);
        if flags > 3 {
            let field = "VHDX file parameters";
            return Err(ImageFault::unsupported(file, field, flags as u64));
        }
        if !matches!(logical_bytes, 512 | 4096) {
            return bad("VHDX logical sector size", logical_bytes as u64);
        }
        if !matches!(physical_bytes, 512 | 4096) {
            return bad("VHDX physical sector size", physical_bytes as u64);
        }
        if disk_bytes == 0 || !disk_bytes.is_multiple_of(logical_bytes as u64) {
            return bad("VHDX virtual disk size", disk_bytes);
        }
        if disk_bytes > DISK_BYTES_MAX {
            let field = "VHDX virtual disk size";
            return Err(ImageFault::limit(file, field, disk_bytes, DISK_BYTES_MAX));
        }
        let has_parent = flags & 2 != 0;
        let leave_allocated = flags & 1 != 0 && !has_parent;
        Ok(Metadata { block_bytes, leave_allocated, has_parent, disk_bytes, logical_bytes })
    }

    /// Payload blocks in a chunk ([MS-VHDX] 2.4).
    pub fn chunk_ratio(&self) -> u64 {
        (1 << 23) * self.logical_bytes as u64 / self.block_bytes as u64
    }

    pub fn blocks(&self) -> u64 {
        self.disk_bytes.div_ceil(self.block_bytes as u64)
    }

    /// Entries of the BAT ([MS-VHDX] 2.5).
    pub fn bat_entries(&self) -> u64 {
        let (blocks, ratio) = (self.blocks(), self.chunk_ratio());
        if self.has_parent {
            blocks.div_ceil(ratio) * (ratio + 1)
        } else {
            blocks + (blocks - 1) / ratio
        }
    }
}

#[cfg(test)]
mod tests {
    //! Would miss: fields that QEMU never sets; whole images test those.

    use super::*;

    /// `qemu-img create -f vhdx -o block_size=1M x.vhdx 5M` (10.0.2), bytes 64 KiB and on; the
    /// rest of the 4 KiB is zeros.
    const HEADER: [u8; 80] = [
        0x68, 0x65, 0x61, 0x64, 0xc3, 0x01, 0x9b, 0x48, // signature, checksum
        0x77, 0xdb, 0x40, 0x2a, 0, 0, 0, 0, // sequence number
        0x79, 0x60, 0x71, 0x7b, 0xf4, 0x2b, 0x4b, 0x82, // file write GUID
        0xae, 0xd9, 0xe9, 0xf8, 0xbf, 0xd8, 0x8a, 0xdd, //
        0x49, 0xd1, 0xd4, 0x24, 0x1a, 0xde, 0x4d, 0x2c, // data write GUID
        0x8f, 0xa3, 0x47, 0xf7, 0xae, 0xd9, 0x80, 0x0a, //
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // log GUID
        0, 0, 1, 0, 0, 0, 0x10, 0, // log version, version, log length
        0, 0, 0x10, 0, 0, 0, 0, 0, // log offset
    ];

    #[test]
    fn a_header_of_qemu_is_read_and_written_again_bit_by_bit() {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..80].copy_from_slice(&HEADER);
        let header = Header::parse(&bytes).unwrap();
        assert_eq!(header.sequence, 0x2a40_db77);
        assert_eq!((header.version, header.log_version), (1, 0));
        assert_eq!((header.log_offset, header.log_length), (MIB, 1 << 20));
        let guid = guid_number(header.data_write_guid);
        assert_eq!(guid, 0x24d4d149_de1a_2c4d_8fa3_47f7aed9800a);
        let mut again = [1; HEADER_BYTES];
        header.emit(&mut again);
        assert_eq!(again, bytes);
        for at in [0, 5, 9, 79, 4095] {
            let mut broken = bytes;
            broken[at] ^= 1;
            assert!(Header::parse(&broken).is_none(), "byte {at} is covered");
        }
    }

    #[test]
    fn guids_stand_in_a_file_as_qemu_writes_them() {
        // The same file, at 192 KiB + 16 and + 48: the regions' GUIDs.
        let bat = [
            0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0x00, 0x42, 0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd,
            0x4a, 0x08,
        ];
        let metadata = [
            0x06, 0xa2, 0x7c, 0x8b, 0x90, 0x47, 0x9a, 0x4b, 0xb8, 0xfe, 0x57, 0x5f, 0x05, 0x0f,
            0x88, 0x6e,
        ];
        assert_eq!((BAT_REGION, METADATA_REGION), (bat, metadata));
        assert_eq!(guid_from_number(guid_number(bat)), bat);
    }

    #[test]
    fn the_bat_has_a_bitmap_entry_for_each_chunk() {
        let shape = |has_parent, disk_bytes, logical_bytes| Metadata {
            block_bytes: 32 << 20,
            leave_allocated: false,
            has_parent,
            disk_bytes,
            logical_bytes,
        };
        // [MS-VHDX] 2.4: 4 GiB to a chunk, 32 GiB with sectors of 4096 bytes.
        assert_eq!(shape(false, 4 << 30, 512).chunk_ratio(), 128);
        assert_eq!(shape(false, 4 << 30, 4096).chunk_ratio(), 1024);
        assert_eq!(shape(false, 4 << 30, 512).bat_entries(), 128);
        assert_eq!(shape(false, (4 << 30) + 512, 512).bat_entries(), 130);
        assert_eq!(shape(true, 512, 512).bat_entries(), 129);
        assert_eq!(shape(true, (4 << 30) + 512, 512).bat_entries(), 258);
    }
}
