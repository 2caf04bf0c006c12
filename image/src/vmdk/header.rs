//! The headers of sparse extents, little-endian: "KDMV" (VMware Virtual Disk Format 5.0,
//! "Hosted Sparse Extents"), "COWD" (the same, "ESX Server Sparse Extents") and seSparse (QEMU
//! block/vmdk.c; VMware never published it).

use crate::fault::{FaultKind, ImageFault};
use crate::types::{FileNo, SECTOR_BYTES};

/// Bytes read of any header: one sector.
pub(super) const HEADER_BYTES: usize = 512;
pub(super) const MAGIC_HOSTED: u32 = 0x564d_444b;
pub(super) const MAGIC_COWD: u32 = 0x4457_4f43;
/// Type of a marker: the real header follows.
pub(super) const MARKER_FOOTER: u32 = 3;
/// `gdOffset`: the real header is a footer at the end of the file.
pub(super) const GD_AT_END: u64 = u64::MAX;

/// Offsets of the fields of a hosted header that a longer disk changes.
pub(super) const CAPACITY_AT: u64 = 12;
pub(super) const REDUNDANT_AT: u64 = 48;
pub(super) const DIRECTORY_AT: u64 = 56;

/// `flags`.
pub(super) const FLAG_NEWLINES: u32 = 1;
pub(super) const FLAG_REDUNDANT: u32 = 1 << 1;
pub(super) const FLAG_ZERO_GRAIN: u32 = 1 << 2;
pub(super) const FLAG_COMPRESSED: u32 = 1 << 16;
pub(super) const FLAG_MARKERS: u32 = 1 << 17;
/// Flags that a reader must know, and the two of them that are known here (VMware's open-vmdk).
const FLAGS_REQUIRED: u32 = 0xffff_0000;
const FLAGS_KNOWN: u32 = FLAG_COMPRESSED | FLAG_MARKERS;
/// Bytes that a text-mode transfer would change: "\n \r\n".
pub(super) const NEWLINES: [u8; 4] = [b'\n', b' ', b'\r', b'\n'];

/// Largest grain (QEMU's limit) and largest one that is unpacked (ours).
const GRAIN_SECTORS_MAX: u64 = 0x20_0000;
const PACKED_GRAIN_SECTORS_MAX: u64 = 4096;
/// Smallest grain of a hosted extent (specification).
const HOSTED_GRAIN_SECTORS_MIN: u64 = 8;
/// Entries of a grain table: hosted at least (a sector of them: VMware's open-vmdk) and at most
/// (QEMU), ESX always.
const HOSTED_ENTRIES_MIN: u32 = 128;
const HOSTED_ENTRIES_MAX: u32 = 512;
const COWD_ENTRIES: u64 = 4096;
/// Most entries of a grain directory (QEMU's limit).
const DIRECTORY_ENTRIES_MAX: u64 = 32 << 20;

/// What the header of a hosted or ESX extent says, valid alone and together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Sparse {
    pub version: u32,
    pub flags: u32,
    pub sectors: u64,
    pub grain_sectors: u64,
    /// Where the descriptor is, bytes; length 0 for none.
    pub descriptor: (u64, u64),
    pub table_entries: u64,
    /// Bytes; the redundant one is 0 for none.
    pub directory: u64,
    pub redundant: u64,
    /// Compressed grains (zlib).
    pub is_compressed: bool,
    /// `uncleanShutdown`.
    pub is_unclean: bool,
}

fn u32_at(bytes: &[u8; HEADER_BYTES], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().expect("4 bytes"))
}

fn u64_at(bytes: &[u8; HEADER_BYTES], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().expect("8 bytes"))
}

/// Is this the header whose fields stand in a footer?
pub(super) fn has_footer(bytes: &[u8; HEADER_BYTES]) -> bool {
    u32_at(bytes, 0) == MAGIC_HOSTED && u64_at(bytes, 56) == GD_AT_END
}

/// Is this a marker that a footer follows?
pub(super) fn is_footer_marker(bytes: &[u8; HEADER_BYTES]) -> bool {
    u32_at(bytes, 8) == 0 && u32_at(bytes, 12) == MARKER_FOOTER
}

/// The descriptor of a file that holds nothing else behind its header: offset and length.
pub(super) fn only_descriptor(bytes: &[u8; HEADER_BYTES]) -> Option<(u64, u64)> {
    let (offset, sectors) = (u64_at(bytes, 28), u64_at(bytes, 36));
    let is_sparse = u32_at(bytes, 0) == MAGIC_HOSTED && !has_footer(bytes);
    let is_empty = is_sparse && u64_at(bytes, 12) == 0 && offset > 0;
    let place = (offset.checked_mul(SECTOR_BYTES)?, sectors.checked_mul(SECTOR_BYTES)?);
    is_empty.then_some(place)
}

impl Sparse {
    /// Bytes of a grain.
    pub fn grain_bytes(&self) -> u64 {
        self.grain_sectors * SECTOR_BYTES
    }

    /// Entries of the grain directory.
    pub fn directory_entries(&self) -> u64 {
        self.sectors.div_ceil(self.table_entries * self.grain_sectors)
    }

    /// Parses the sector at `at` of `file`: `KDMV` or `COWD`.
    pub fn parse(file: FileNo, at: u64, bytes: &[u8; HEADER_BYTES]) -> Result<Sparse, ImageFault> {
        let corrupt =
            |field, offset: u64, value| Err(ImageFault::corrupt(file, field, at + offset, value));
        let sparse = match u32_at(bytes, 0) {
            MAGIC_HOSTED => hosted(file, at, bytes)?,
            MAGIC_COWD => cowd(file, bytes)?,
            other => {
                let field = "the magic of a sparse VMDK extent";
                let fault = ImageFault::new(FaultKind::NotThisFormat, file, field);
                return Err(ImageFault { value: other.into(), ..fault });
            }
        };
        if !sparse.grain_sectors.is_power_of_two() || sparse.grain_sectors > GRAIN_SECTORS_MAX {
            return corrupt("grainSize", 20, sparse.grain_sectors);
        }
        if sparse.is_compressed && sparse.grain_sectors > PACKED_GRAIN_SECTORS_MAX {
            let (grain, max) = (sparse.grain_sectors, PACKED_GRAIN_SECTORS_MAX);
            return Err(ImageFault::limit(file, "grainSize of compressed grains", grain, max));
        }
        if sparse.sectors == 0
            || sparse.sectors > u64::MAX / SECTOR_BYTES
            || sparse.directory_entries() > DIRECTORY_ENTRIES_MAX
        {
            return corrupt("capacity", 12, sparse.sectors);
        }
        if sparse.directory < HEADER_BYTES as u64 {
            return corrupt("gdOffset", 56, sparse.directory);
        }
        Ok(sparse)
    }

    /// A hosted header.
    pub fn emit(&self, overhead_sectors: u64) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |offset: usize, value: &[u8]| {
            bytes[offset..offset + value.len()].copy_from_slice(value);
        };
        put(0, &MAGIC_HOSTED.to_le_bytes());
        put(4, &self.version.to_le_bytes());
        put(8, &self.flags.to_le_bytes());
        put(12, &self.sectors.to_le_bytes());
        put(20, &self.grain_sectors.to_le_bytes());
        put(28, &(self.descriptor.0 / SECTOR_BYTES).to_le_bytes());
        put(36, &(self.descriptor.1 / SECTOR_BYTES).to_le_bytes());
        put(44, &(self.table_entries as u32).to_le_bytes());
        put(48, &(self.redundant / SECTOR_BYTES).to_le_bytes());
        put(56, &(self.directory / SECTOR_BYTES).to_le_bytes());
        put(64, &overhead_sectors.to_le_bytes());
        put(73, &NEWLINES);
        put(77, &u16::from(self.is_compressed).to_le_bytes());
        bytes
    }
}

/// A sector number as bytes.
fn sectors_to_bytes(file: FileNo, field: &'static str, sectors: u64) -> Result<u64, ImageFault> {
    let bytes = sectors.checked_mul(SECTOR_BYTES).filter(|&bytes| bytes <= i64::MAX as u64);
    bytes.ok_or_else(|| ImageFault::corrupt(file, field, 0, sectors))
}

fn hosted(file: FileNo, at: u64, bytes: &[u8; HEADER_BYTES]) -> Result<Sparse, ImageFault> {
    let corrupt =
        |field, offset: u64, value| Err(ImageFault::corrupt(file, field, at + offset, value));
    let (version, flags) = (u32_at(bytes, 4), u32_at(bytes, 8));
    if version == 0 || version > 3 {
        return Err(ImageFault::unsupported(file, "the version of a VMDK", version.into()));
    }
    if flags & FLAGS_REQUIRED & !FLAGS_KNOWN != 0 {
        let unknown = flags & FLAGS_REQUIRED & !FLAGS_KNOWN;
        return Err(ImageFault::unsupported(file, "flags of a VMDK unknown here", unknown.into()));
    }
    if flags & FLAG_NEWLINES != 0 && bytes[73..77] != NEWLINES {
        let field = "the newline test, damaged by a transfer as text,";
        return corrupt(field, 73, u32_at(bytes, 73).into());
    }
    let algorithm = u16::from_le_bytes([bytes[77], bytes[78]]);
    if algorithm > 1 {
        let field = "a VMDK compression algorithm";
        return Err(ImageFault::unsupported(file, field, algorithm.into()));
    }
    let entries = u32_at(bytes, 44);
    let known = HOSTED_ENTRIES_MIN..=HOSTED_ENTRIES_MAX;
    if !entries.is_power_of_two() || !known.contains(&entries) {
        return corrupt("numGTEsPerGT", 44, entries.into());
    }
    let grain_sectors = u64_at(bytes, 20);
    if grain_sectors < HOSTED_GRAIN_SECTORS_MIN {
        return corrupt("grainSize", 20, grain_sectors);
    }
    let redundant = if flags & FLAG_REDUNDANT != 0 { u64_at(bytes, 48) } else { 0 };
    Ok(Sparse {
        version,
        flags,
        sectors: u64_at(bytes, 12),
        grain_sectors,
        descriptor: (
            sectors_to_bytes(file, "descriptorOffset", u64_at(bytes, 28))?,
            sectors_to_bytes(file, "descriptorSize", u64_at(bytes, 36))?,
        ),
        table_entries: entries.into(),
        directory: sectors_to_bytes(file, "gdOffset", u64_at(bytes, 56))?,
        redundant: sectors_to_bytes(file, "rgdOffset", redundant)?,
        is_compressed: algorithm == 1,
        is_unclean: bytes[72] != 0,
    })
}

fn cowd(file: FileNo, bytes: &[u8; HEADER_BYTES]) -> Result<Sparse, ImageFault> {
    let version = u32_at(bytes, 4);
    if version != 1 {
        return Err(ImageFault::unsupported(file, "the version of a COWD extent", version.into()));
    }
    let sparse = Sparse {
        version,
        flags: 0,
        sectors: u32_at(bytes, 12).into(),
        grain_sectors: u32_at(bytes, 16).into(),
        descriptor: (0, 0),
        table_entries: COWD_ENTRIES,
        directory: u64::from(u32_at(bytes, 20)) * SECTOR_BYTES,
        redundant: 0,
        is_compressed: false,
        is_unclean: false,
    };
    if sparse.grain_sectors == 0 {
        return Err(ImageFault::corrupt(file, "granularity", 16, 0));
    }
    if sparse.directory_entries() > u32_at(bytes, 24).into() {
        let entries = u32_at(bytes, 24).into();
        return Err(ImageFault::corrupt(file, "numGDEntries", 24, entries));
    }
    Ok(sparse)
}

/// What the constant header of an seSparse extent says. Offsets are bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct SeSparse {
    pub sectors: u64,
    pub volatile: u64,
    pub directory: u64,
    pub directory_bytes: u64,
    pub tables: u64,
    pub grains: u64,
}

/// Sectors in an seSparse grain and in a grain table: no others are known (QEMU).
pub(super) const SE_GRAIN_SECTORS: u64 = 8;
pub(super) const SE_TABLE_SECTORS: u64 = 64;
const SE_MAGIC: u64 = 0xcafe_babe;
const SE_VERSION: u64 = 0x2_0000_0001;
const SE_VOLATILE_MAGIC: u64 = 0xcafe_cafe;

impl SeSparse {
    pub fn parse(file: FileNo, bytes: &[u8; HEADER_BYTES]) -> Result<SeSparse, ImageFault> {
        let unsupported = |field, value| Err(ImageFault::unsupported(file, field, value));
        if u64_at(bytes, 0) != SE_MAGIC {
            let fault = ImageFault::new(FaultKind::NotThisFormat, file, "the magic of seSparse");
            return Err(ImageFault { value: u64_at(bytes, 0), ..fault });
        }
        if u64_at(bytes, 8) != SE_VERSION {
            return unsupported("the version of seSparse", u64_at(bytes, 8));
        }
        if u64_at(bytes, 24) != SE_GRAIN_SECTORS || u64_at(bytes, 32) != SE_TABLE_SECTORS {
            return unsupported("the grain or table size of seSparse", u64_at(bytes, 24));
        }
        if u64_at(bytes, 40) != 0 {
            return unsupported("flags of seSparse", u64_at(bytes, 40));
        }
        let place = |field, at| sectors_to_bytes(file, field, u64_at(bytes, at));
        let header = SeSparse {
            sectors: u64_at(bytes, 16),
            volatile: place("volatile_header_offset", 80)?,
            directory: place("grain_dir_offset", 128)?,
            directory_bytes: place("grain_dir_size", 136)?,
            tables: place("grain_tables_offset", 144)?,
            grains: place("grains_offset", 192)?,
        };
        let per_entry = SE_TABLE_SECTORS * (SECTOR_BYTES / 8) * SE_GRAIN_SECTORS;
        let entries = header.sectors.div_ceil(per_entry);
        if header.sectors == 0
            || entries > DIRECTORY_ENTRIES_MAX
            || entries > header.directory_bytes / 8
        {
            return Err(ImageFault::corrupt(file, "capacity", 16, header.sectors));
        }
        Ok(header)
    }

    /// Checks the volatile header: a journal to be replayed is refused.
    pub fn check_volatile(
        file: FileNo,
        at: u64,
        bytes: &[u8; HEADER_BYTES],
    ) -> Result<(), ImageFault> {
        if u64_at(bytes, 0) != SE_VOLATILE_MAGIC {
            let field = "the volatile header of seSparse";
            return Err(ImageFault::corrupt(file, field, at, u64_at(bytes, 0)));
        }
        if u64_at(bytes, 24) != 0 {
            return Err(ImageFault::unsupported(file, "an seSparse journal to replay", 0));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    //! Would miss: what the tables hold; the image tests read whole VMDKs.

    use super::*;

    /// `qemu-img create -f vmdk -o zeroed_grain=on z.vmdk 10M`, its first sector.
    fn vector() -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let fields: [(usize, &[u8]); 11] = [
            (0, b"KDMV"),
            (4, &[2, 0, 0, 0]),      // version
            (8, &[7, 0, 0, 0]),      // flags: newlines, redundant, zero grains
            (12, &[0, 0x50]),        // capacity
            (20, &[0x80]),           // grainSize
            (28, &[1]),              // descriptorOffset
            (36, &[20]),             // descriptorSize
            (44, &[0, 2]),           // numGTEsPerGT
            (48, &[21]),             // rgdOffset
            (56, &[26]),             // gdOffset
            (73, &[10, 32, 13, 10]), // newline test
        ];
        for (offset, value) in fields {
            bytes[offset..offset + value.len()].copy_from_slice(value);
        }
        bytes[64] = 0x80; // overHead
        bytes
    }

    fn parse(edit: impl Fn(&mut [u8])) -> Result<Sparse, ImageFault> {
        let mut bytes = vector();
        edit(&mut bytes);
        Sparse::parse(FileNo(0), 0, &bytes)
    }

    #[test]
    fn a_header_of_qemu_is_read_and_emitted_alike() {
        let header = parse(|_| {}).unwrap();
        assert_eq!((header.sectors, header.grain_bytes()), (20_480, 65_536));
        assert_eq!(header.descriptor, (512, 20 * 512));
        assert_eq!((header.redundant, header.directory), (21 * 512, 26 * 512));
        assert_eq!(header.directory_entries(), 1);
        assert_eq!(header.emit(0x80), vector());
    }

    #[test]
    fn hostile_fields_are_refused() {
        let edits: [(usize, &[u8]); 16] = [
            (0, b"XXXX"),
            (4, &[4, 0, 0, 0]),
            (8, &[7, 0, 4, 0]),
            (12, &[0; 8]),
            (12, &[0xff; 8]),
            (20, &[4, 0, 0, 0, 0, 0, 0, 0]),
            (20, &[0x81, 0, 0, 0, 0, 0, 0, 0]),
            (20, &[0xff; 8]),
            (20, &[0, 0, 0x40, 0, 0, 0, 0, 0]),
            (44, &[0; 4]),
            (44, &[64, 0, 0, 0]),
            (44, &[0, 4, 0, 0]),
            (48, &[0xff; 8]),
            (56, &[0; 8]),
            (73, b"\n \n\n"),
            (77, &[2, 0]),
        ];
        for (at, value) in edits {
            let edited = parse(|bytes| bytes[at..at + value.len()].copy_from_slice(value));
            assert!(edited.is_err(), "{value:?} at {at}");
        }
    }
}
