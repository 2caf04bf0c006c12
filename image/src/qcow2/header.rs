//! The qcow2 header, versions 2 and 3, and its extensions (docs/interop/qcow2, "Header" and
//! "Header extensions"): bytes are checked once, and what [`Header`] holds is within the
//! specification and within the limits below. It must never trust a length or an offset before
//! it was compared with the file.

use alloc::string::String;

use crate::fault::{FaultKind, FaultName, ImageFault};
use crate::format::Format;
use crate::types::FileNo;

/// "QFI\xfb".
pub const MAGIC: u32 = 0x5146_49fb;
pub const V2_BYTES: usize = 72;
/// Shortest version 3 header.
pub const V3_BYTES: usize = 104;
/// Limits of QEMU's parser (block/qcow2.h), or tighter.
pub const CLUSTER_BITS_MIN: u32 = 9;
pub const CLUSTER_BITS_MAX: u32 = 21;
pub const L1_BYTES_MAX: u64 = 32 << 20;
pub const REFTABLE_BYTES_MAX: u64 = 8 << 20;
pub const SNAPSHOTS_MAX: u32 = 65_536;
pub const SNAPSHOT_TABLE_BYTES_MAX: u64 = 64 << 20;
pub const BITMAPS_MAX: u32 = 65_535;
/// Bytes of a bitmap directory (QEMU: 65,535 entries of 1 KiB).
pub const BITMAP_DIRECTORY_BYTES_MAX: u64 = 64 << 20;
/// Header and extensions that are read (ours; QEMU: the first cluster). The backing file's name
/// may stand after it.
pub const HEADER_BYTES_MAX: usize = 4096;

pub const INCOMPATIBLE_DIRTY: u64 = 1 << 0;
pub const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
pub const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
pub const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
pub const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;
pub const COMPATIBLE_LAZY_REFCOUNTS: u64 = 1 << 0;
pub const AUTOCLEAR_DATA_FILE_RAW: u64 = 1 << 1;

const EXTENSION_END: u32 = 0;
pub const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
const EXTENSION_BITMAPS: u32 = 0x2385_2875;
const EXTENSION_CRYPTO: u32 = 0x0537_be77;
pub const EXTENSION_DATA_FILE: u32 = 0x4441_5441;

/// Offsets of fields that are written.
pub mod field {
    pub const SIZE: u64 = 24;
    /// `l1_size` and `l1_table_offset`, contiguous.
    pub const L1: u64 = 36;
    /// `refcount_table_offset` and `refcount_table_clusters`, contiguous.
    pub const REFTABLE: u64 = 48;
    pub const INCOMPATIBLE: u64 = 72;
    pub const AUTOCLEAR: u64 = 88;
}

/// A stretch of the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stretch {
    pub offset: u64,
    pub bytes: u64,
}

/// A valid header.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Header {
    pub version: u32,
    /// Where the name of the backing file stands.
    pub backing: Option<Stretch>,
    pub cluster_bits: u32,
    pub size_bytes: u64,
    pub l1_entries: u32,
    pub l1_offset: u64,
    pub reftable_offset: u64,
    pub reftable_clusters: u32,
    pub snapshots: u32,
    pub snapshots_offset: u64,
    pub incompatible: u64,
    pub compatible: u64,
    pub autoclear: u64,
    pub refcount_order: u32,
    pub header_bytes: u32,
    pub zstd: bool,
    /// Where the refcount table should be there is none: why. Its place and length are 0 then;
    /// only a check goes on.
    pub lost: Option<ImageFault>,
}

/// What the extensions say.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Extensions {
    /// `Some(None)`: a format is named that is not one of ours.
    pub backing_format: Option<Option<Format>>,
    pub data_file: Option<String>,
    pub bitmap_directory: Option<Stretch>,
    pub bitmaps: u32,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

impl Header {
    /// Checks the first `HEADER_BYTES_MAX` bytes of a file (zeros beyond its end) that is
    /// `file_bytes` long.
    pub fn parse(file: FileNo, b: &[u8], file_bytes: u64) -> Result<Header, ImageFault> {
        assert!(b.len() >= HEADER_BYTES_MAX);
        if u32_at(b, 0) != MAGIC {
            let fault = ImageFault::new(FaultKind::NotThisFormat, file, "magic");
            return Err(ImageFault { value: u32_at(b, 0).into(), ..fault });
        }
        let version = u32_at(b, 4);
        if version != 2 && version != 3 {
            return Err(ImageFault::unsupported(file, "qcow2 version", version.into()));
        }
        let v3 = version == 3;
        let u64_v3 = |at| if v3 { u64_at(b, at) } else { 0 };
        let header = Header {
            version,
            backing: match u64_at(b, 8) {
                0 => None,
                offset => Some(Stretch { offset, bytes: u32_at(b, 16).into() }),
            },
            cluster_bits: u32_at(b, 20),
            size_bytes: u64_at(b, 24),
            l1_entries: u32_at(b, 36),
            l1_offset: u64_at(b, 40),
            reftable_offset: u64_at(b, 48),
            reftable_clusters: u32_at(b, 56),
            snapshots: u32_at(b, 60),
            snapshots_offset: u64_at(b, 64),
            incompatible: u64_v3(72),
            compatible: u64_v3(80),
            autoclear: u64_v3(88),
            refcount_order: if v3 { u32_at(b, 96) } else { 4 },
            header_bytes: if v3 { u32_at(b, 100) } else { V2_BYTES as u32 },
            zstd: false,
            lost: None,
        };
        header.check_geometry(file)?;
        header.check_features(file, b)?;
        header.check_tables(file, file_bytes)?;
        let zstd = header.compression(file, b)?;
        Ok(match header.check_reftable(file, file_bytes) {
            Ok(()) => Header { zstd, ..header },
            Err(why) => {
                let (reftable_offset, reftable_clusters) = (0, 0);
                Header { zstd, lost: Some(why), reftable_offset, reftable_clusters, ..header }
            }
        })
    }

    fn check_geometry(&self, file: FileNo) -> Result<(), ImageFault> {
        let bits = self.cluster_bits;
        if !(CLUSTER_BITS_MIN..=CLUSTER_BITS_MAX).contains(&bits) {
            let max = CLUSTER_BITS_MAX.into();
            return Err(ImageFault::limit(file, "cluster_bits", bits.into(), max));
        }
        if self.refcount_order > 6 {
            let order = self.refcount_order.into();
            return Err(ImageFault::limit(file, "refcount_order", order, 6));
        }
        let bytes = u64::from(self.header_bytes);
        if self.version == 3 {
            if bytes < V3_BYTES as u64 || !bytes.is_multiple_of(8) {
                return Err(ImageFault::corrupt(file, "header_length", 100, bytes));
            }
            let max = (HEADER_BYTES_MAX as u64 - 8).min(1 << bits);
            if bytes > max {
                return Err(ImageFault::limit(file, "header_length", bytes, max));
            }
        }
        if self.size_bytes < 512 {
            return Err(ImageFault::corrupt(file, "size", field::SIZE, self.size_bytes));
        }
        // Beyond this no sector number would fit (QEMU: INT64_MAX).
        if self.size_bytes > i64::MAX as u64 {
            let max = i64::MAX as u64;
            return Err(ImageFault::limit(file, "size", self.size_bytes, max));
        }
        Ok(())
    }

    fn check_features(&self, file: FileNo, b: &[u8]) -> Result<(), ImageFault> {
        match u32_at(b, 32) {
            0 => {}
            1 => {
                let what = "AES encryption of qcow2 (crypt_method; broken by design)";
                return Err(ImageFault::unsupported(file, what, 1));
            }
            2 => {
                let what = "LUKS encryption of qcow2 (crypt_method): no passphrase can be given; \
                            decrypt it first with qemu-img convert";
                return Err(ImageFault::unsupported(file, what, 2));
            }
            other => return Err(ImageFault::unsupported(file, "crypt_method", other.into())),
        }
        let known = INCOMPATIBLE_DIRTY
            | INCOMPATIBLE_CORRUPT
            | INCOMPATIBLE_DATA_FILE
            | INCOMPATIBLE_COMPRESSION
            | INCOMPATIBLE_EXTENDED_L2;
        let unknown = self.incompatible & !known;
        if unknown != 0 {
            let what = "an incompatible feature of qcow2 that is not known (its bits)";
            let name = self.feature_names(b, unknown);
            return Err(ImageFault { name, ..ImageFault::unsupported(file, what, unknown) });
        }
        if self.extended_l2() && self.cluster_bits < 14 {
            let bits = self.cluster_bits.into();
            return Err(ImageFault::corrupt(file, "cluster_bits with extended L2", 20, bits));
        }
        if self.autoclear & AUTOCLEAR_DATA_FILE_RAW != 0 {
            if !self.data_file() {
                let autoclear = self.autoclear;
                return Err(ImageFault::corrupt(file, "raw data file bit", 88, autoclear));
            }
            if self.backing.is_some() {
                let what = "a raw external data file with a backing file";
                return Err(ImageFault::unsupported(file, what, self.autoclear));
            }
        }
        if self.data_file() && self.snapshots != 0 {
            let snapshots = self.snapshots.into();
            return Err(ImageFault::corrupt(file, "nb_snapshots with a data file", 60, snapshots));
        }
        Ok(())
    }

    fn compression(&self, file: FileNo, b: &[u8]) -> Result<bool, ImageFault> {
        let present = self.version == 3 && self.header_bytes > V3_BYTES as u32;
        let kind = if present { b[V3_BYTES] } else { 0 };
        let flagged = self.incompatible & INCOMPATIBLE_COMPRESSION != 0;
        match (flagged, kind) {
            (false, 0) => Ok(false),
            (true, 1) => Ok(true),
            (true, 2..) => Err(ImageFault::unsupported(file, "compression_type", kind.into())),
            _ => Err(ImageFault::corrupt(file, "compression_type", 104, kind.into())),
        }
    }

    /// A table lies on a cluster boundary, starts inside the file and is not too large.
    fn check_table(
        &self,
        (file, file_bytes): (FileNo, u64),
        (field, at): (&'static str, u64),
        offset: u64,
        bytes: u64,
        max: u64,
    ) -> Result<(), ImageFault> {
        if bytes > max {
            return Err(ImageFault::limit(file, field, bytes, max));
        }
        let end = offset.checked_add(bytes).filter(|&end| end <= i64::MAX as u64);
        let aligned = offset.is_multiple_of(self.cluster_bytes());
        if end.is_none() || !aligned || offset == 0 || offset >= file_bytes {
            return Err(ImageFault::corrupt(file, field, at, offset));
        }
        Ok(())
    }

    fn check_reftable(&self, file: FileNo, file_bytes: u64) -> Result<(), ImageFault> {
        let bytes = u64::from(self.reftable_clusters) << self.cluster_bits;
        if bytes == 0 {
            return Err(ImageFault::corrupt(file, "refcount_table_clusters", 56, 0));
        }
        let (offset, max) = (self.reftable_offset, REFTABLE_BYTES_MAX);
        self.check_table((file, file_bytes), ("the refcount table", 48), offset, bytes, max)
    }

    fn check_tables(&self, file: FileNo, file_bytes: u64) -> Result<(), ImageFault> {
        let table = |field, at, offset, bytes, max| {
            self.check_table((file, file_bytes), (field, at), offset, bytes, max)
        };
        let l1_bytes = u64::from(self.l1_entries) * 8;
        let needed = self.size_bytes.div_ceil(self.cluster_bytes() << self.l2_bits());
        if needed > u64::from(self.l1_entries) {
            return Err(ImageFault::corrupt(file, "l1_size", 36, self.l1_entries.into()));
        }
        table("the L1 table", 40, self.l1_offset, l1_bytes, L1_BYTES_MAX)?;
        if self.snapshots > SNAPSHOTS_MAX {
            let (value, max) = (self.snapshots.into(), SNAPSHOTS_MAX.into());
            return Err(ImageFault::limit(file, "nb_snapshots", value, max));
        }
        if self.snapshots > 0 {
            let bytes = u64::from(self.snapshots) * 40;
            let max = SNAPSHOT_TABLE_BYTES_MAX;
            table("the snapshot table", 64, self.snapshots_offset, bytes, max)?;
        }
        if let Some(name) = self.backing {
            let max = crate::files::NAME_BYTES_MAX as u64;
            if name.bytes > max {
                return Err(ImageFault::limit(file, "backing_file_size", name.bytes, max));
            }
            let end = name.offset.saturating_add(name.bytes);
            if end > self.cluster_bytes() || name.offset < u64::from(self.header_bytes) {
                return Err(ImageFault::corrupt(file, "backing_file_offset", 8, name.offset));
            }
        }
        Ok(())
    }

    pub fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    pub fn extended_l2(&self) -> bool {
        self.incompatible & INCOMPATIBLE_EXTENDED_L2 != 0
    }

    pub fn data_file(&self) -> bool {
        self.incompatible & INCOMPATIBLE_DATA_FILE != 0
    }

    /// log2 of the entries of an L2 table.
    pub fn l2_bits(&self) -> u32 {
        self.cluster_bits - if self.extended_l2() { 4 } else { 3 }
    }

    /// Shows each extension up to the end of the first cluster, the name of the backing file, or
    /// `HEADER_BYTES_MAX`: its offset, type and data.
    fn each_extension(
        &self,
        file: FileNo,
        b: &[u8],
        mut show: impl FnMut(usize, u32, &[u8]) -> Result<(), ImageFault>,
    ) -> Result<(), ImageFault> {
        let mut end = HEADER_BYTES_MAX.min(1 << self.cluster_bits);
        if let Some(name) = self.backing {
            end = end.min(name.offset as usize);
        }
        let mut at = self.header_bytes as usize;
        while at + 8 <= end {
            let (kind, len) = (u32_at(b, at), u32_at(b, at + 4) as usize);
            if kind == EXTENSION_END {
                break;
            }
            let start = at + 8;
            if len > end - start {
                return Err(ImageFault::corrupt(file, "header extension length", at as u64, {
                    len as u64
                }));
            }
            show(at, kind, &b[start..start + len])?;
            at = start + len.next_multiple_of(8);
        }
        Ok(())
    }

    /// What the image calls these incompatible features in its feature name table: entries of
    /// 48 bytes, the type (0 for incompatible), the bit, the name.
    fn feature_names(&self, b: &[u8], bits: u64) -> FaultName {
        let mut names = FaultName::NONE;
        // A broken extension: what was named before it is named.
        let _ = self.each_extension(FileNo(0), b, |_, kind, data| {
            for entry in data.chunks_exact(48).filter(|_| kind == EXTENSION_FEATURE_NAMES) {
                if entry[0] == 0 && entry[1] < 64 && bits & (1 << entry[1]) != 0 {
                    let name = entry[2..].split(|&byte| byte == 0).next().unwrap_or(&[]);
                    names.add(name);
                }
            }
            Ok(())
        });
        names
    }

    /// Checks the extensions in the same bytes.
    pub fn extensions(&self, file: FileNo, b: &[u8]) -> Result<Extensions, ImageFault> {
        let mut found = Extensions::default();
        self.each_extension(file, b, |at, kind, data| {
            match kind {
                EXTENSION_BACKING_FORMAT => {
                    let name = core::str::from_utf8(data).unwrap_or("");
                    found.backing_format = Some(Format::by_name(name));
                }
                EXTENSION_DATA_FILE => {
                    found.data_file = String::from_utf8(data.to_vec()).ok();
                }
                EXTENSION_BITMAPS => self.bitmaps(file, at, data, &mut found)?,
                EXTENSION_CRYPTO => {
                    let what = "a LUKS encryption header (extension 0x0537be77) in an image that \
                                says it is not encrypted (crypt_method 0): type";
                    return Err(ImageFault::corrupt(file, what, at as u64, kind.into()));
                }
                _ => {}
            }
            Ok(())
        })?;
        Ok(found)
    }

    fn bitmaps(
        &self,
        file: FileNo,
        at: usize,
        data: &[u8],
        found: &mut Extensions,
    ) -> Result<(), ImageFault> {
        if data.len() != 24 {
            let len = data.len() as u64;
            return Err(ImageFault::corrupt(file, "bitmaps extension length", at as u64, len));
        }
        let (count, bytes, offset) = (u32_at(data, 0), u64_at(data, 8), u64_at(data, 16));
        if count > BITMAPS_MAX || bytes > BITMAP_DIRECTORY_BYTES_MAX {
            let max = BITMAP_DIRECTORY_BYTES_MAX;
            return Err(ImageFault::limit(file, "bitmap_directory_size", bytes, max));
        }
        let end = offset.checked_add(bytes).filter(|&end| end <= i64::MAX as u64);
        let placed = offset.is_multiple_of(self.cluster_bytes()) && offset != 0;
        if count == 0 || !placed || end.is_none() {
            return Err(ImageFault::corrupt(file, "bitmap_directory_offset", at as u64, offset));
        }
        found.bitmaps = count;
        found.bitmap_directory = Some(Stretch { offset, bytes });
        Ok(())
    }
}

/// The fields of a new header; it never has a snapshot or an extension of its own.
impl Header {
    /// The header itself, `header_bytes` long.
    pub fn emit(&self) -> alloc::vec::Vec<u8> {
        let mut b = alloc::vec![0; self.header_bytes as usize];
        let mut put = |at: usize, bytes: &[u8]| b[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC.to_be_bytes());
        put(4, &self.version.to_be_bytes());
        if let Some(name) = self.backing {
            put(8, &name.offset.to_be_bytes());
            put(16, &(name.bytes as u32).to_be_bytes());
        }
        put(20, &self.cluster_bits.to_be_bytes());
        put(24, &self.size_bytes.to_be_bytes());
        put(36, &self.l1_entries.to_be_bytes());
        put(40, &self.l1_offset.to_be_bytes());
        put(48, &self.reftable_offset.to_be_bytes());
        put(56, &self.reftable_clusters.to_be_bytes());
        put(60, &self.snapshots.to_be_bytes());
        put(64, &self.snapshots_offset.to_be_bytes());
        if self.version == 3 {
            put(72, &self.incompatible.to_be_bytes());
            put(80, &self.compatible.to_be_bytes());
            put(88, &self.autoclear.to_be_bytes());
            put(96, &self.refcount_order.to_be_bytes());
            put(100, &self.header_bytes.to_be_bytes());
            if self.header_bytes as usize > V3_BYTES {
                put(104, &[self.zstd as u8]);
            }
        }
        b
    }
}

#[cfg(test)]
mod tests {
    //! Would miss: how a refused header leaves the file (the hostile tests hold that).

    use super::*;

    /// qemu-img create -f qcow2 -b base.raw -F raw
    ///   -o compression_type=zstd,lazy_refcounts=on,refcount_bits=8 v.qcow2 10M
    const V3: [u8; 136] = [
        0x51, 0x46, 0x49, 0xfb, 0, 0, 0, 3, // magic, version
        0, 0, 0, 0, 0, 0, 0x02, 0x10, 0, 0, 0, 8, // backing file: offset, length
        0, 0, 0, 16, 0, 0, 0, 0, 0, 0xa0, 0, 0, // cluster_bits, size
        0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 3, 0, 0, // crypt_method, L1: entries, offset
        0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, // refcount table: offset, clusters
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // snapshots
        0, 0, 0, 0, 0, 0, 0, 8, // incompatible: compression type
        0, 0, 0, 0, 0, 0, 0, 1, // compatible: lazy refcounts
        0, 0, 0, 0, 0, 0, 0, 0, // autoclear
        0, 0, 0, 3, 0, 0, 0, 112, // refcount_order, header_length
        1, 0, 0, 0, 0, 0, 0, 0, // compression_type and padding
        0xe2, 0x79, 0x2a, 0xca, 0, 0, 0, 3, b'r', b'a', b'w', 0, 0, 0, 0, 0, // backing format
        0, 0, 0, 0, 0, 0, 0, 0, // end (cut: the feature name table)
    ];

    /// qemu-img create -f qcow2 -o compat=0.10 w.qcow2 1G
    const V2: [u8; 72] = [
        0x51, 0x46, 0x49, 0xfb, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // no backing
        0, 0, 0, 16, 0, 0, 0, 0, 0x40, 0, 0, 0, // cluster_bits, size
        0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 3, 0, 0, // crypt_method, L1: entries, offset
        0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, // refcount table: offset, clusters
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // snapshots
    ];

    fn padded(bytes: &[u8]) -> [u8; HEADER_BYTES_MAX] {
        let mut all = [0; HEADER_BYTES_MAX];
        all[..bytes.len()].copy_from_slice(bytes);
        all
    }

    #[test]
    fn a_version_3_header_of_qemu_is_parsed_and_emitted() {
        let bytes = padded(&V3);
        let header = Header::parse(FileNo(0), &bytes, 4 << 16).unwrap();
        let expected = Header {
            version: 3,
            backing: Some(Stretch { offset: 0x210, bytes: 8 }),
            cluster_bits: 16,
            size_bytes: 10 << 20,
            l1_entries: 1,
            l1_offset: 3 << 16,
            reftable_offset: 1 << 16,
            reftable_clusters: 1,
            snapshots: 0,
            snapshots_offset: 0,
            incompatible: INCOMPATIBLE_COMPRESSION,
            compatible: COMPATIBLE_LAZY_REFCOUNTS,
            autoclear: 0,
            refcount_order: 3,
            header_bytes: 112,
            zstd: true,
            lost: None,
        };
        assert_eq!(header, expected);
        assert_eq!(header.emit(), V3[..112]);
        let extensions = header.extensions(FileNo(0), &bytes).unwrap();
        assert_eq!(extensions.backing_format, Some(Some(Format::Raw)));
        assert_eq!((extensions.data_file, extensions.bitmaps), (None, 0));
    }

    #[test]
    fn a_version_2_header_has_no_features() {
        let bytes = padded(&V2);
        let header = Header::parse(FileNo(0), &bytes, 4 << 16).unwrap();
        assert_eq!((header.version, header.refcount_order, header.header_bytes), (2, 4, 72));
        assert_eq!((header.incompatible, header.compatible, header.autoclear), (0, 0, 0));
        assert_eq!((header.l1_entries, header.size_bytes, header.backing), (2, 1 << 30, None));
        assert_eq!(header.emit(), V2);
        // What follows is no field of version 2.
        let mut bytes = padded(&V2);
        bytes[72..112].fill(0xa5);
        assert_eq!(Header::parse(FileNo(0), &bytes, 4 << 16).unwrap(), header);
    }

    #[test]
    fn a_backing_format_that_is_not_ours_is_known_to_be_given() {
        let mut bytes = padded(&V3);
        bytes[120..123].copy_from_slice(b"rbd");
        let header = Header::parse(FileNo(0), &bytes, 4 << 16).unwrap();
        let extensions = header.extensions(FileNo(0), &bytes).unwrap();
        assert_eq!(extensions.backing_format, Some(None));
    }
}
