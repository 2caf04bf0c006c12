//! VHD footer and dynamic disk header: field offsets, parsing and emitting (Microsoft, "Virtual
//! Hard Disk Image Format Specification", version 1.0). All fields are big-endian.
//!
//! Protocol guarded: nothing of a footer or header is used unless its cookie and checksum hold.
//! It must never read a file: it is given bytes.

use core::ops::Range;

use crate::fault::{FaultKind, ImageFault};
use crate::types::{FileNo, SECTOR_BYTES};

/// Bytes of a footer ("Hard Disk Footer Format"). Versions before Virtual PC 2004 wrote 511.
pub(super) const FOOTER_BYTES: usize = 512;
/// Bytes of a dynamic disk header ("Dynamic Disk Header Format").
pub(super) const HEADER_BYTES: usize = 1024;
/// Parent locators in a header.
pub(super) const LOCATORS: usize = 8;
/// No next structure, no BAT entry of a block ("Data Offset", "Block Allocation Table").
pub(super) const NONE_U64: u64 = u64::MAX;
pub(super) const BAT_UNUSED: u32 = u32::MAX;
/// Largest disk: 2040 GiB (the specification's limit; QEMU's too, 0xff000000 sectors).
pub(super) const SECTORS_MAX: u64 = 0xff00_0000;
/// Smallest and largest block. QEMU takes from 512 bytes, libvhd up to 2 MiB; ours: a block of
/// 256 MiB still has a bitmap of 64 KiB.
pub(super) const BLOCK_BYTES_MIN: u32 = 512;
pub(super) const BLOCK_BYTES_MAX: u32 = 256 << 20;
/// The usual block, 2 MiB.
pub(super) const BLOCK_BYTES_USUAL: u32 = 2 << 20;

mod f {
    use super::Range;
    pub const COOKIE: Range<usize> = 0..8;
    pub const FEATURES: usize = 8;
    pub const VERSION: usize = 12;
    pub const DATA_OFFSET: usize = 16;
    pub const TIME_STAMP: usize = 24;
    pub const CREATOR_APPLICATION: Range<usize> = 28..32;
    pub const CREATOR_VERSION: usize = 32;
    pub const CREATOR_HOST_OS: Range<usize> = 36..40;
    pub const ORIGINAL_SIZE: usize = 40;
    pub const CURRENT_SIZE: usize = 48;
    pub const CYLINDERS: usize = 56;
    pub const HEADS: usize = 58;
    pub const SECTORS_PER_TRACK: usize = 59;
    pub const DISK_TYPE: usize = 60;
    pub const CHECKSUM: usize = 64;
    pub const UNIQUE_ID: usize = 68;
    /// Not in the specification: libvhd marks a disk hidden here.
    pub const HIDDEN: usize = 85;
}

mod h {
    use super::Range;
    pub const COOKIE: Range<usize> = 0..8;
    pub const DATA_OFFSET: usize = 8;
    pub const TABLE_OFFSET: usize = 16;
    pub const VERSION: usize = 24;
    pub const MAX_TABLE_ENTRIES: usize = 28;
    pub const BLOCK_SIZE: usize = 32;
    pub const CHECKSUM: usize = 36;
    pub const PARENT_UNIQUE_ID: usize = 40;
    pub const PARENT_TIME_STAMP: usize = 56;
    pub const PARENT_NAME: Range<usize> = 64..576;
    pub const LOCATOR_TABLE: usize = 576;
    pub const LOCATOR_BYTES: usize = 24;
}

const FOOTER_COOKIE: &[u8; 8] = b"conectix";
const HEADER_COOKIE: &[u8; 8] = b"cxsparse";
/// Major version 1; the minor one may grow ("File Format Version").
const VERSION_1: u32 = 0x0001_0000;
/// "Reserved: this bit must always be set to 1".
const FEATURE_RESERVED: u32 = 2;

/// "Disk Type".
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Fixed = 2,
    Dynamic = 3,
    Differencing = 4,
}

/// A valid footer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Footer {
    pub kind: Kind,
    /// Byte of the dynamic disk header, `NONE_U64` for a fixed disk.
    pub data_offset: u64,
    /// Seconds since the year 2000.
    pub time_stamp: u32,
    pub creator: [u8; 4],
    pub creator_version: u32,
    pub host_os: [u8; 4],
    /// Bytes.
    pub original_size: u64,
    pub current_size: u64,
    pub geometry: Geometry,
    pub unique_id: u128,
}

/// "Disk Geometry".
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Geometry {
    pub cylinders: u16,
    pub heads: u8,
    pub sectors_per_track: u8,
}

/// The largest geometry: it says nothing about the size.
pub(super) const GEOMETRY_MAX: Geometry =
    Geometry { cylinders: 65535, heads: 16, sectors_per_track: 255 };

impl Geometry {
    pub fn sectors(self) -> u64 {
        self.cylinders as u64 * self.heads as u64 * self.sectors_per_track as u64
    }

    /// The geometry of a disk of so many sectors (the specification's appendix, "CHS
    /// Calculation").
    pub fn of(sectors: u64) -> Geometry {
        let total = sectors.min(GEOMETRY_MAX.sectors());
        let (spt, heads, cylinders_heads);
        if total >= 65535 * 16 * 63 {
            (spt, heads, cylinders_heads) = (255, 16, total / 255);
        } else {
            let try_17 = total / 17;
            let heads_17 = try_17.div_ceil(1024).max(4);
            if try_17 < heads_17 * 1024 && heads_17 <= 16 {
                (spt, heads, cylinders_heads) = (17, heads_17, try_17);
            } else if total / 31 < 16 * 1024 {
                (spt, heads, cylinders_heads) = (31, 16, total / 31);
            } else {
                (spt, heads, cylinders_heads) = (63, 16, total / 63);
            }
        }
        Geometry {
            cylinders: (cylinders_heads / heads) as u16,
            heads: heads as u8,
            sectors_per_track: spt as u8,
        }
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn u128_at(bytes: &[u8], at: usize) -> u128 {
    u128::from_be_bytes(bytes[at..at + 16].try_into().expect("sixteen bytes"))
}

/// One's complement of the sum of all bytes, the checksum's own taken as zero.
fn checksum(bytes: &[u8], at: usize) -> u32 {
    let own = at..at + 4;
    let sum = bytes.iter().enumerate().filter(|(i, _)| !own.contains(i));
    !sum.fold(0u32, |sum, (_, &b)| sum.wrapping_add(b as u32))
}

/// Is this a footer whose checksum holds? Early XenServer tools marked a disk hidden without
/// computing the checksum again (libvhd takes these too).
pub(super) fn footer_holds(bytes: &[u8; FOOTER_BYTES]) -> bool {
    if &bytes[f::COOKIE] != FOOTER_COOKIE {
        return false;
    }
    let claimed = u32_at(bytes, f::CHECKSUM);
    if claimed == checksum(bytes, f::CHECKSUM) {
        return true;
    }
    let early = matches!(u32_at(bytes, f::CREATOR_VERSION), 0x0000_0001 | 0x0001_0001);
    let hidden = bytes[f::HIDDEN] as u32;
    bytes[f::CREATOR_APPLICATION].starts_with(b"tap")
        && early
        && hidden != 0
        && claimed == checksum(bytes, f::CHECKSUM).wrapping_add(hidden)
}

/// Do a dynamic disk's footer and the bytes at 0 tell of one disk? A fixed disk has no copy: its
/// byte 0 is the guest's.
pub(super) fn same_disk(footer: &[u8; FOOTER_BYTES], first: &[u8; FOOTER_BYTES]) -> bool {
    let same = |range: Range<usize>| footer[range.clone()] == first[range];
    is_fixed(footer)
        || same(f::DATA_OFFSET..f::DATA_OFFSET + 8)
            && same(f::DISK_TYPE..f::DISK_TYPE + 4)
            && same(f::UNIQUE_ID..f::UNIQUE_ID + 16)
}

/// Is it the footer of a fixed disk?
pub(super) fn is_fixed(footer: &[u8; FOOTER_BYTES]) -> bool {
    u32_at(footer, f::DISK_TYPE) == Kind::Fixed as u32
}

impl Footer {
    /// Takes a footer for which `footer_holds`; `offset` is for messages.
    pub fn parse(file: FileNo, offset: u64, b: &[u8; FOOTER_BYTES]) -> Result<Footer, ImageFault> {
        assert!(footer_holds(b));
        let at = |field: usize| offset + field as u64;
        let version = u32_at(b, f::VERSION);
        if version & 0xffff_0000 != VERSION_1 {
            return Err(ImageFault::unsupported(file, "VHD file format version", version as u64));
        }
        let kind = match u32_at(b, f::DISK_TYPE) {
            2 => Kind::Fixed,
            3 => Kind::Dynamic,
            4 => Kind::Differencing,
            other => return Err(ImageFault::unsupported(file, "VHD disk type", other as u64)),
        };
        let data_offset = u64_at(b, f::DATA_OFFSET);
        let misplaced = data_offset < FOOTER_BYTES as u64
            || !data_offset.is_multiple_of(SECTOR_BYTES)
            || data_offset > SECTORS_MAX * 2 * SECTOR_BYTES;
        if kind != Kind::Fixed && misplaced {
            let field = "VHD data offset";
            return Err(ImageFault::corrupt(file, field, at(f::DATA_OFFSET), data_offset));
        }
        Ok(Footer {
            kind,
            data_offset,
            time_stamp: u32_at(b, f::TIME_STAMP),
            creator: b[f::CREATOR_APPLICATION].try_into().expect("four bytes"),
            creator_version: u32_at(b, f::CREATOR_VERSION),
            host_os: b[f::CREATOR_HOST_OS].try_into().expect("four bytes"),
            original_size: u64_at(b, f::ORIGINAL_SIZE),
            current_size: u64_at(b, f::CURRENT_SIZE),
            geometry: Geometry {
                cylinders: u16_at(b, f::CYLINDERS),
                heads: b[f::HEADS],
                sectors_per_track: b[f::SECTORS_PER_TRACK],
            },
            unique_id: u128_at(b, f::UNIQUE_ID),
        })
    }

    pub fn emit(&self) -> [u8; FOOTER_BYTES] {
        let mut b = [0; FOOTER_BYTES];
        b[f::COOKIE].copy_from_slice(FOOTER_COOKIE);
        put(&mut b, f::FEATURES, &FEATURE_RESERVED.to_be_bytes());
        put(&mut b, f::VERSION, &VERSION_1.to_be_bytes());
        put(&mut b, f::DATA_OFFSET, &self.data_offset.to_be_bytes());
        put(&mut b, f::TIME_STAMP, &self.time_stamp.to_be_bytes());
        b[f::CREATOR_APPLICATION].copy_from_slice(&self.creator);
        put(&mut b, f::CREATOR_VERSION, &self.creator_version.to_be_bytes());
        b[f::CREATOR_HOST_OS].copy_from_slice(&self.host_os);
        put(&mut b, f::ORIGINAL_SIZE, &self.original_size.to_be_bytes());
        put(&mut b, f::DISK_TYPE, &(self.kind as u32).to_be_bytes());
        put(&mut b, f::UNIQUE_ID, &self.unique_id.to_be_bytes());
        set_size(&mut b, self.current_size, self.geometry);
        b
    }

    /// Size of the disk in sectors. Virtual PC and QEMU under their own names mean the geometry,
    /// everyone else, and every disk too large for a geometry, the current size (QEMU's rule,
    /// with the current size for creators that nobody knows).
    pub fn sectors(&self, file: FileNo, offset: u64) -> Result<u64, ImageFault> {
        let by_geometry = uses_geometry(&self.creator) && self.geometry != GEOMETRY_MAX;
        let sectors =
            if by_geometry { self.geometry.sectors() } else { self.current_size / SECTOR_BYTES };
        if sectors == 0 {
            let at = offset + f::CURRENT_SIZE as u64;
            return Err(ImageFault::corrupt(file, "VHD current size", at, self.current_size));
        }
        if sectors > SECTORS_MAX {
            return Err(ImageFault::limit(file, "VHD size in sectors", sectors, SECTORS_MAX));
        }
        Ok(sectors)
    }
}

fn uses_geometry(creator: &[u8]) -> bool {
    matches!(creator, b"vpc " | b"qemu")
}

/// Do readers go by the geometry for this creator?
pub(super) fn creator_uses_geometry(footer: &[u8; FOOTER_BYTES]) -> bool {
    uses_geometry(&footer[f::CREATOR_APPLICATION])
}

/// Does XenServer look for a batmap behind the BAT? Since version 1.1 (libvhd).
pub(super) fn has_batmap(footer: &[u8; FOOTER_BYTES]) -> bool {
    footer[f::CREATOR_APPLICATION].starts_with(b"tap") && u32_at(footer, f::CREATOR_VERSION) > 1
}

/// The sector before a batmap of zeros ("tdbatmap", version 1.2; libvhd): cookie, byte of the
/// map, its sectors, version, and the one's complement of the sum of its bytes.
pub(super) fn empty_batmap(map_offset: u64, entries: u32) -> [u8; 512] {
    let mut b = [0; 512];
    put(&mut b, 0, b"tdbatmap");
    put(&mut b, 8, &map_offset.to_be_bytes());
    let sectors = (entries as u64).div_ceil(8).div_ceil(SECTOR_BYTES).max(1) as u32;
    put(&mut b, 16, &sectors.to_be_bytes());
    put(&mut b, 20, &0x0001_0002u32.to_be_bytes());
    put(&mut b, 24, &u32::MAX.to_be_bytes());
    b
}

/// Where the batmap lies that the start of the sector behind the BAT tells of, and its bytes.
pub(super) fn batmap(b: &[u8; 20]) -> Option<(u64, u64)> {
    let len = u32_at(b, 16) as u64 * SECTOR_BYTES;
    b.starts_with(b"tdbatmap").then(|| (u64_at(b, 8), len))
}

fn put(b: &mut [u8], at: usize, bytes: &[u8]) {
    b[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Changes the size in a footer, keeping all that is not known here.
pub(super) fn set_size(b: &mut [u8; FOOTER_BYTES], size_bytes: u64, geometry: Geometry) {
    put(b, f::CURRENT_SIZE, &size_bytes.to_be_bytes());
    put(b, f::CYLINDERS, &geometry.cylinders.to_be_bytes());
    b[f::HEADS] = geometry.heads;
    b[f::SECTORS_PER_TRACK] = geometry.sectors_per_track;
    let sum = checksum(b, f::CHECKSUM);
    put(b, f::CHECKSUM, &sum.to_be_bytes());
}

/// "Parent Locator Entry".
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Locator {
    /// Platform code.
    pub code: [u8; 4],
    /// Sectors kept for the data by the specification; Windows and libvhd write bytes.
    pub space: u32,
    /// Bytes.
    pub data_length: u32,
    pub data_offset: u64,
}

impl Locator {
    /// Bytes kept for its data, whichever unit its maker used; 0 for an unused one.
    pub fn bytes(&self) -> u64 {
        if self.code == [0; 4] {
            return 0;
        }
        let space = self.space as u64;
        let kept = if space < SECTOR_BYTES { space * SECTOR_BYTES } else { space };
        kept.max(self.data_length as u64)
    }
}

/// A valid dynamic disk header.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Header {
    pub table_offset: u64,
    pub max_table_entries: u32,
    pub block_bytes: u32,
    pub parent_id: u128,
    /// Advisory: a copied parent has another.
    pub parent_time_stamp: u32,
    /// "Parent Unicode Name", UTF-16BE.
    pub parent_name: [u8; 512],
    pub locators: [Locator; LOCATORS],
}

impl Header {
    /// `offset` is where the bytes come from, `sectors` the disk's size.
    pub fn parse(
        file: FileNo,
        offset: u64,
        b: &[u8; HEADER_BYTES],
        sectors: u64,
    ) -> Result<Header, ImageFault> {
        let bad = |field, at: usize, value: u64| {
            Err(ImageFault::corrupt(file, field, offset + at as u64, value))
        };
        if &b[h::COOKIE] != HEADER_COOKIE {
            return bad("cookie of the VHD dynamic disk header", 0, u64_at(b, 0));
        }
        let claimed = u32_at(b, h::CHECKSUM);
        if claimed != checksum(b, h::CHECKSUM) {
            let field = "checksum of the VHD dynamic disk header";
            return bad(field, h::CHECKSUM, claimed as u64);
        }
        let version = u32_at(b, h::VERSION);
        if version & 0xffff_0000 != VERSION_1 {
            let field = "version of the VHD dynamic disk header";
            return Err(ImageFault::unsupported(file, field, version as u64));
        }
        let block_bytes = u32_at(b, h::BLOCK_SIZE);
        if !block_bytes.is_power_of_two() || block_bytes < BLOCK_BYTES_MIN {
            return bad("VHD block size", h::BLOCK_SIZE, block_bytes as u64);
        }
        if block_bytes > BLOCK_BYTES_MAX {
            let (value, limit) = (block_bytes as u64, BLOCK_BYTES_MAX as u64);
            return Err(ImageFault::limit(file, "VHD block size", value, limit));
        }
        let max_table_entries = u32_at(b, h::MAX_TABLE_ENTRIES);
        let per_block = block_bytes as u64 / SECTOR_BYTES;
        if (max_table_entries as u64) < sectors.div_ceil(per_block) {
            let field = "VHD max table entries";
            return bad(field, h::MAX_TABLE_ENTRIES, max_table_entries as u64);
        }
        let table_offset = u64_at(b, h::TABLE_OFFSET);
        if !table_offset.is_multiple_of(SECTOR_BYTES) || table_offset < FOOTER_BYTES as u64 {
            return bad("VHD table offset", h::TABLE_OFFSET, table_offset);
        }
        Ok(Header {
            table_offset,
            max_table_entries,
            block_bytes,
            parent_id: u128_at(b, h::PARENT_UNIQUE_ID),
            parent_time_stamp: u32_at(b, h::PARENT_TIME_STAMP),
            parent_name: b[h::PARENT_NAME].try_into().expect("512 bytes"),
            locators: core::array::from_fn(|i| {
                let at = h::LOCATOR_TABLE + i * h::LOCATOR_BYTES;
                Locator {
                    code: b[at..at + 4].try_into().expect("four bytes"),
                    space: u32_at(b, at + 4),
                    data_length: u32_at(b, at + 8),
                    data_offset: u64_at(b, at + 16),
                }
            }),
        })
    }

    pub fn emit(&self) -> [u8; HEADER_BYTES] {
        let mut b = [0; HEADER_BYTES];
        b[h::COOKIE].copy_from_slice(HEADER_COOKIE);
        put(&mut b, h::DATA_OFFSET, &NONE_U64.to_be_bytes());
        put(&mut b, h::VERSION, &VERSION_1.to_be_bytes());
        put(&mut b, h::BLOCK_SIZE, &self.block_bytes.to_be_bytes());
        put(&mut b, h::PARENT_UNIQUE_ID, &self.parent_id.to_be_bytes());
        put(&mut b, h::PARENT_TIME_STAMP, &self.parent_time_stamp.to_be_bytes());
        b[h::PARENT_NAME].copy_from_slice(&self.parent_name);
        for (i, locator) in self.locators.iter().enumerate() {
            let at = h::LOCATOR_TABLE + i * h::LOCATOR_BYTES;
            put(&mut b, at, &locator.code);
            put(&mut b, at + 4, &locator.space.to_be_bytes());
            put(&mut b, at + 8, &locator.data_length.to_be_bytes());
            put(&mut b, at + 16, &locator.data_offset.to_be_bytes());
        }
        set_table(&mut b, self.table_offset, self.max_table_entries);
        b
    }

    /// Bytes of the BAT, padded to sectors.
    pub fn table_bytes(&self) -> u64 {
        (self.max_table_entries as u64 * 4).next_multiple_of(SECTOR_BYTES)
    }
}

/// Moves the BAT in a header, keeping all that is not known here. Only the first sector of the
/// header changes, so a power cut leaves the old header or the new one.
pub(super) fn set_table(b: &mut [u8; HEADER_BYTES], table_offset: u64, max_table_entries: u32) {
    put(b, h::TABLE_OFFSET, &table_offset.to_be_bytes());
    put(b, h::MAX_TABLE_ENTRIES, &max_table_entries.to_be_bytes());
    let sum = checksum(b, h::CHECKSUM);
    put(b, h::CHECKSUM, &sum.to_be_bytes());
}

/// The answer to a file that has no footer anywhere.
pub(super) fn no_footer(file: FileNo, found: u64) -> ImageFault {
    let fault = ImageFault::new(FaultKind::NotThisFormat, file, "the VHD footer's cookie");
    ImageFault { value: found, ..fault }
}

#[cfg(test)]
mod tests {
    //! Would miss: fields that QEMU never sets (hidden, locators); whole images test those.

    use super::*;

    const FILE: FileNo = FileNo(0);

    /// `qemu-img create -f vpc -o force_size=on a.vhd 9M` (10.0.2), bytes 0 to 84.
    const FOOTER: [u8; 84] = [
        // cookie, features, version
        0x63, 0x6f, 0x6e, 0x65, 0x63, 0x74, 0x69, 0x78, 0, 0, 0, 2, 0, 1, 0, 0,
        // data offset, time stamp, creator
        0, 0, 0, 0, 0, 0, 2, 0, 0x32, 0x98, 0x98, 0xc7, 0x71, 0x65, 0x6d, 0x32,
        // creator version, host OS, original size
        0, 5, 0, 3, 0x57, 0x69, 0x32, 0x6b, 0, 0, 0, 0, 0, 0x90, 0, 0,
        // current size, geometry, disk type
        0, 0, 0, 0, 0, 0x90, 0, 0, 0xff, 0xff, 0x10, 0xff, 0, 0, 0, 3,
        // checksum, unique id
        0xff, 0xff, 0xe9, 0x76, 0x51, 0xc0, 0x16, 0x0e, 0xe5, 0x7c, 0x48, 0xfd, 0x85, 0xde, 0x4e,
        0xf7, 0xd6, 0xcb, 0xf0, 0xe0,
    ];

    /// The same file, bytes 512 to 552.
    const HEADER: [u8; 40] = [
        // cookie, data offset
        0x63, 0x78, 0x73, 0x70, 0x61, 0x72, 0x73, 0x65, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
        0xff, // table offset, version, max table entries
        0, 0, 0, 0, 0, 0, 6, 0, 0, 1, 0, 0, 0, 0, 0, 5, // block size, checksum
        0, 0x20, 0, 0, 0xff, 0xff, 0xf4, 0x72,
    ];

    fn padded<const N: usize>(bytes: &[u8]) -> [u8; N] {
        let mut all = [0; N];
        all[..bytes.len()].copy_from_slice(bytes);
        all
    }

    #[test]
    fn a_footer_of_qemu_is_read_and_written_again_bit_by_bit() {
        let bytes = padded(&FOOTER);
        assert!(footer_holds(&bytes));
        let footer = Footer::parse(FILE, 0, &bytes).unwrap();
        assert_eq!(footer.kind, Kind::Dynamic);
        assert_eq!(footer.data_offset, 512);
        assert_eq!(footer.current_size, 9 << 20);
        assert_eq!(footer.geometry, GEOMETRY_MAX);
        assert_eq!(footer.unique_id, 0x51c0160e_e57c48fd_85de4ef7_d6cbf0e0);
        assert_eq!(footer.sectors(FILE, 0).unwrap(), 18432);
        assert_eq!(footer.emit(), bytes);
        for at in 0..84 {
            let mut broken = bytes;
            broken[at] ^= 0x10;
            assert!(!footer_holds(&broken), "byte {at} is covered");
        }
    }

    #[test]
    fn a_header_of_qemu_is_read_and_written_again_bit_by_bit() {
        let bytes = padded(&HEADER);
        let header = Header::parse(FILE, 512, &bytes, 18432).unwrap();
        assert_eq!((header.table_offset, header.max_table_entries), (1536, 5));
        assert_eq!(header.block_bytes, 2 << 20);
        assert_eq!(header.emit(), bytes);
        let fault = Header::parse(FILE, 512, &bytes, 5 * 4096 + 1).unwrap_err();
        assert_eq!(fault.field, "VHD max table entries");
    }

    #[test]
    fn the_size_comes_from_the_geometry_only_for_virtual_pc_and_qemu() {
        let footer = Footer::parse(FILE, 0, &padded(&FOOTER)).unwrap();
        let geometry = Geometry { cylinders: 271, heads: 4, sectors_per_track: 17 };
        let size = |creator: &[u8; 4], geometry| {
            Footer { creator: *creator, geometry, ..footer.clone() }.sectors(FILE, 0).unwrap()
        };
        for creator in [b"vpc ", b"qemu"] {
            assert_eq!(size(creator, geometry), 271 * 4 * 17);
            assert_eq!(size(creator, GEOMETRY_MAX), 18432);
        }
        for creator in [b"win ", b"tap\0", b"d2v ", b"CTXS", b"qem2", b"vbox", b"wa\0\0"] {
            assert_eq!(size(creator, geometry), 18432);
        }
    }

    /// As `qemu-img create -f vpc` (10.0.2) writes them for 1M, 20M, 1G and 32256M, at the sizes
    /// it rounds to.
    #[test]
    fn geometries_are_those_of_the_specification() {
        let triple = |g: Geometry| (g.cylinders, g.heads, g.sectors_per_track);
        assert_eq!(triple(Geometry::of(2108)), (31, 4, 17));
        assert_eq!(triple(Geometry::of(41_004)), (603, 4, 17));
        assert_eq!(triple(Geometry::of(2_097_648)), (2081, 16, 63));
        assert_eq!(triple(Geometry::of(66_063_360)), (16192, 16, 255));
        assert_eq!(triple(Geometry::of(1 << 40)), (65535, 16, 255));
    }

    #[test]
    fn a_hidden_disk_of_an_early_xenserver_keeps_its_stale_checksum() {
        let mut footer = Footer::parse(FILE, 0, &padded(&FOOTER)).unwrap();
        footer.creator = *b"tap\0";
        footer.creator_version = 0x0001_0001;
        let mut bytes = footer.emit();
        bytes[85] = 1;
        assert!(footer_holds(&bytes));
        footer.creator_version = 0x0001_0003;
        let mut bytes = footer.emit();
        bytes[85] = 1;
        assert!(!footer_holds(&bytes));
    }
}
