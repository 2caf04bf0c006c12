//! The VDI header, version 1.1 (VirtualBox, Storage/VDICore.h): a text, a signature, then fields,
//! little-endian, all within the first sector.

use crate::fault::{FaultKind, ImageFault};
use crate::types::{FileNo, SECTOR_BYTES};

/// Bytes read: the first sector.
pub(super) const HEADER_BYTES: usize = 512;
const SIGNATURE: u32 = 0xbeda_107f;
const VERSION_1_1: u32 = 0x0001_0001;
/// Size that the fields up to the parent's UUIDs need, and what creators write.
const FIELDS_BYTES: u32 = 0x180;
/// Most blocks: their map must be below 4 GiB (QEMU's limit).
pub(super) const BLOCKS_MAX: u32 = 0x3fff_ffff;
/// Block sizes served, powers of two: 1 MiB is usual, VirtualBox allows others (the largest is
/// ours: no larger than a VHDX block).
const BLOCK_BYTES_MIN: u32 = 512;
pub(super) const BLOCK_BYTES_MAX: u32 = 256 << 20;
/// What stands before the name of the parent in the comment of an image made by platter.
const PARENT_MARK: &[u8] = b"parent=";
pub(super) const COMMENT_BYTES: usize = 256;

/// Offsets of fields.
pub(super) mod at {
    pub const COMMENT: usize = 0x54;
    pub const MAP: u64 = 0x154;
    pub const DATA: u64 = 0x158;
    pub const DISK_BYTES: u64 = 0x170;
    pub const BLOCKS: u64 = 0x180;
    pub const ALLOCATED: u64 = 0x184;
    pub const MODIFY: u64 = 0x198;
}

/// Image types.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Dynamic,
    Static,
    Differencing,
}

/// A header whose fields are valid, alone and together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Header {
    pub kind: Kind,
    pub map_offset: u64,
    pub data_offset: u64,
    pub disk_bytes: u64,
    pub block_bytes: u64,
    pub blocks: u32,
    pub allocated: u32,
    pub uuid: u128,
    pub modify: u128,
    /// UUID of the parent, 0 for none.
    pub link: u128,
    pub parent_modify: u128,
}

fn u32_at(bytes: &[u8; HEADER_BYTES], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().expect("4 bytes"))
}

fn u128_at(bytes: &[u8; HEADER_BYTES], offset: usize) -> u128 {
    u128::from_le_bytes(bytes[offset..offset + 16].try_into().expect("16 bytes"))
}

impl Header {
    pub fn parse(file: FileNo, bytes: &[u8; HEADER_BYTES]) -> Result<Header, ImageFault> {
        let corrupt = |field, offset, value| Err(ImageFault::corrupt(file, field, offset, value));
        let signature = u32_at(bytes, 0x40);
        if signature != SIGNATURE {
            let fault = ImageFault::new(FaultKind::NotThisFormat, file, "the signature of VDI");
            return Err(ImageFault { value: signature.into(), ..fault });
        }
        let version = u32_at(bytes, 0x44);
        if version != VERSION_1_1 {
            let field = "a VDI version other than 1.1";
            return Err(ImageFault::unsupported(file, field, version.into()));
        }
        if u32_at(bytes, 0x48) < FIELDS_BYTES {
            return corrupt("cbHeader", 0x48, u32_at(bytes, 0x48).into());
        }
        let kind = match u32_at(bytes, 0x4c) {
            1 => Kind::Dynamic,
            2 => Kind::Static,
            4 => Kind::Differencing,
            other => {
                let field = "a VDI type other than dynamic, static, differencing";
                return Err(ImageFault::unsupported(file, field, other.into()));
            }
        };
        if u32_at(bytes, 0x17c) != 0 {
            let field = "VDI blocks with extra bytes";
            return Err(ImageFault::unsupported(file, field, u32_at(bytes, 0x17c).into()));
        }
        let sector_size = u32_at(bytes, 0x168);
        if u64::from(sector_size) != SECTOR_BYTES {
            let field = "a VDI sector size other than 512";
            return Err(ImageFault::unsupported(file, field, sector_size.into()));
        }
        let block_bytes = u32_at(bytes, 0x178);
        let range = BLOCK_BYTES_MIN..=BLOCK_BYTES_MAX;
        if !block_bytes.is_power_of_two() || !range.contains(&block_bytes) {
            return corrupt("cbBlock", 0x178, block_bytes.into());
        }
        let disk_bytes = u64::from_le_bytes(bytes[0x170..0x178].try_into().expect("8 bytes"));
        let header = Header {
            kind,
            map_offset: u32_at(bytes, 0x154).into(),
            data_offset: u32_at(bytes, 0x158).into(),
            // As QEMU: the last sector of an odd size is there as a whole.
            disk_bytes: disk_bytes.checked_next_multiple_of(SECTOR_BYTES).unwrap_or(u64::MAX),
            block_bytes: block_bytes.into(),
            blocks: u32_at(bytes, 0x180),
            allocated: u32_at(bytes, 0x184),
            uuid: u128_at(bytes, 0x188),
            modify: u128_at(bytes, 0x198),
            link: u128_at(bytes, 0x1a8),
            parent_modify: u128_at(bytes, 0x1b8),
        };
        header.check(file)
    }

    fn check(self, file: FileNo) -> Result<Header, ImageFault> {
        let corrupt = |field, offset, value| Err(ImageFault::corrupt(file, field, offset, value));
        if self.blocks > BLOCKS_MAX {
            let (blocks, max) = (self.blocks.into(), BLOCKS_MAX.into());
            return Err(ImageFault::limit(file, "cBlocks", blocks, max));
        }
        if self.disk_bytes > u64::from(self.blocks) * self.block_bytes {
            return corrupt("cbDisk", at::DISK_BYTES, self.disk_bytes);
        }
        let map_end = self.map_offset + u64::from(self.blocks) * 4;
        if !self.map_offset.is_multiple_of(SECTOR_BYTES) || self.map_offset < HEADER_BYTES as u64 {
            return corrupt("offBlocks", 0x154, self.map_offset);
        }
        if !self.data_offset.is_multiple_of(SECTOR_BYTES) || self.data_offset < map_end {
            return corrupt("offData", 0x158, self.data_offset);
        }
        if self.kind == Kind::Differencing && self.link == 0 {
            return corrupt("uuidLinkage of a differencing image", 0x1a8, 0);
        }
        if self.kind != Kind::Differencing && self.link != 0 {
            let field = "uuidLinkage of an image that is not differencing";
            return corrupt(field, 0x1a8, self.link as u64);
        }
        Ok(self)
    }

    /// The first sector, with a comment.
    pub fn emit(&self, comment: &[u8]) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |offset: usize, value: &[u8]| {
            bytes[offset..offset + value.len()].copy_from_slice(value);
        };
        put(0, b"<<< Oracle VM VirtualBox Disk Image >>>\n");
        put(0x40, &SIGNATURE.to_le_bytes());
        put(0x44, &VERSION_1_1.to_le_bytes());
        put(0x48, &FIELDS_BYTES.to_le_bytes());
        let kind: u32 = match self.kind {
            Kind::Dynamic => 1,
            Kind::Static => 2,
            Kind::Differencing => 4,
        };
        put(0x4c, &kind.to_le_bytes());
        put(at::COMMENT, comment);
        put(0x154, &(self.map_offset as u32).to_le_bytes());
        put(0x158, &(self.data_offset as u32).to_le_bytes());
        put(0x168, &(SECTOR_BYTES as u32).to_le_bytes());
        put(0x170, &self.disk_bytes.to_le_bytes());
        put(0x178, &(self.block_bytes as u32).to_le_bytes());
        put(0x180, &self.blocks.to_le_bytes());
        put(0x184, &self.allocated.to_le_bytes());
        put(0x188, &self.uuid.to_le_bytes());
        put(0x198, &self.modify.to_le_bytes());
        put(0x1a8, &self.link.to_le_bytes());
        put(0x1b8, &self.parent_modify.to_le_bytes());
        bytes
    }
}

/// The comment that names a parent, or `None` when the name does not fit.
pub(super) fn parent_comment(name: &str) -> Option<alloc::vec::Vec<u8>> {
    let comment = [PARENT_MARK, name.as_bytes()].concat();
    // VirtualBox wants a zero at the end.
    (comment.len() < COMMENT_BYTES).then_some(comment)
}

/// The name that such a comment gives.
pub(super) fn parent_name(bytes: &[u8; HEADER_BYTES]) -> Option<&str> {
    let comment = &bytes[at::COMMENT..at::COMMENT + COMMENT_BYTES];
    let end = comment.iter().position(|&b| b == 0)?;
    let name = comment[..end].strip_prefix(PARENT_MARK)?;
    core::str::from_utf8(name).ok().filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    //! Would miss: what the map holds; the image tests read whole images.

    use super::*;

    /// `qemu-img create -f vdi a.vdi 10M`, its first sector but for the UUIDs' values.
    fn vector() -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let fields: [(usize, &[u8]); 11] = [
            (0x40, &[0x7f, 0x10, 0xda, 0xbe, 1, 0, 1, 0]), // signature, version
            (0x48, &[0x80, 1, 0, 0, 1]),                   // cbHeader, type
            (0x154, &[0, 2, 0, 0, 0, 4]),                  // offBlocks, offData
            (0x168, &[0, 2]),                              // sector size
            (0x170, &[0, 0, 0xa0]),                        // cbDisk
            (0x178, &[0, 0, 0x10]),                        // cbBlock
            (0x180, &[10]),                                // cBlocks
            (0x184, &[0]),                                 // cBlocksAllocated
            (0x188, &[1; 16]),
            (0x198, &[2; 16]),
            (0, b"<<< QEMU VM Virtual Disk Image >>>\n"),
        ];
        for (offset, value) in fields {
            bytes[offset..offset + value.len()].copy_from_slice(value);
        }
        bytes
    }

    fn parse(edit: impl Fn(&mut [u8])) -> Result<Header, ImageFault> {
        let mut bytes = vector();
        edit(&mut bytes);
        Header::parse(FileNo(0), &bytes)
    }

    #[test]
    fn a_header_of_qemu_is_read_and_emitted_alike() {
        let header = parse(|_| {}).unwrap();
        assert_eq!((header.map_offset, header.data_offset), (512, 1024));
        assert_eq!((header.disk_bytes, header.block_bytes), (10 << 20, 1 << 20));
        assert_eq!((header.blocks, header.allocated), (10, 0));
        assert_eq!(header.uuid, 0x0101_0101_0101_0101_0101_0101_0101_0101);
        assert_eq!(header.emit(b"")[0x40..], vector()[0x40..]);
        // An odd size is rounded up, as QEMU does.
        assert_eq!(parse(|bytes| bytes[0x170] = 1).err().map(|f| f.field), Some("cbDisk"));
        let odd = parse(|bytes| bytes[0x170..0x173].copy_from_slice(&[1, 0, 0x9f])).unwrap();
        assert_eq!(odd.disk_bytes, 0x9f_0200);
    }

    #[test]
    fn the_parents_name_stands_in_the_comment() {
        let comment = parent_comment("base.vdi").unwrap();
        let header = parse(|_| {}).unwrap();
        assert_eq!(parent_name(&header.emit(&comment)), Some("base.vdi"));
        assert_eq!(parent_name(&header.emit(b"a comment")), None);
        assert_eq!(parent_comment(&"x".repeat(249)), None);
    }

    /// Among them those of CVE-2014-0144 (sizes of zero and beyond what the map covers).
    #[test]
    fn hostile_fields_are_refused() {
        let edits: [(usize, &[u8]); 15] = [
            (0x40, &[0]),
            (0x44, &[0]),
            (0x48, &[0, 0]),
            (0x4c, &[3]),
            (0x4c, &[4]),
            (0x154, &[1]),
            (0x154, &[0, 0]),
            (0x158, &[0, 2]),
            (0x168, &[0, 16]),
            (0x170, &[0xff; 8]),
            (0x178, &[0; 4]),
            (0x178, &[0, 0, 0x18]),
            (0x17c, &[1]),
            (0x180, &[0xff; 4]),
            (0x1a8, &[1]),
        ];
        for (at, value) in edits {
            let edited = parse(|bytes| bytes[at..at + value.len()].copy_from_slice(value));
            assert!(edited.is_err(), "{value:?} at {at:#x}");
        }
    }
}
