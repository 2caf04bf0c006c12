//! The QED header (QEMU docs/interop/qed_spec, "Header"): 64 bytes, little-endian.

use crate::fault::{FaultKind, ImageFault};
use crate::files::NAME_BYTES_MAX;
use crate::types::{FileNo, SECTOR_BYTES};

/// Bytes of the header's fields.
pub(super) const HEADER_BYTES: usize = 64;
/// "QED\0".
const MAGIC: u32 = 0x0044_4551;
/// Features that must be understood: a backing file, a check before use, no format probing.
pub(super) const FEATURE_BACKING_FILE: u64 = 1;
pub(super) const FEATURE_NEED_CHECK: u64 = 2;
pub(super) const FEATURE_BACKING_RAW: u64 = 4;
const FEATURES_KNOWN: u64 = FEATURE_BACKING_FILE | FEATURE_NEED_CHECK | FEATURE_BACKING_RAW;
/// Cluster and table sizes (specification; QEMU's limits too).
const CLUSTER_BYTES_MIN: u32 = 4 << 10;
const CLUSTER_BYTES_MAX: u32 = 64 << 20;
const TABLE_CLUSTERS_MAX: u32 = 16;

/// Offsets of the fields that are written or that messages name.
pub(super) mod at {
    pub const FEATURES: u64 = 16;
    pub const AUTOCLEAR: u64 = 32;
    pub const L1_OFFSET: u64 = 40;
    pub const IMAGE_SIZE: u64 = 48;
    pub const NAME_OFFSET: u64 = 56;
}

/// A header whose fields are valid, alone and together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Header {
    pub cluster_bytes: u64,
    /// Bytes of an L1 or L2 table.
    pub table_bytes: u64,
    /// Bytes before the first cluster that a table may name.
    pub header_bytes: u64,
    pub features: u64,
    pub autoclear: u64,
    pub l1_offset: u64,
    pub image_bytes: u64,
    /// Where the backing file's name is and its length; length 0 for none.
    pub name_offset: u64,
    pub name_bytes: usize,
}

fn u32_at(bytes: &[u8; HEADER_BYTES], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().expect("4 bytes"))
}

fn u64_at(bytes: &[u8; HEADER_BYTES], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().expect("8 bytes"))
}

impl Header {
    /// Entries of a table.
    pub fn table_entries(&self) -> u64 {
        self.table_bytes / 8
    }

    /// Largest disk of this geometry, bytes.
    pub fn image_bytes_max(&self) -> u128 {
        u128::from(self.table_entries()).pow(2) * u128::from(self.cluster_bytes)
    }

    pub fn parse(file: FileNo, bytes: &[u8; HEADER_BYTES]) -> Result<Header, ImageFault> {
        let corrupt = |field, offset, value| Err(ImageFault::corrupt(file, field, offset, value));
        let magic = u32_at(bytes, 0);
        if magic != MAGIC {
            let fault = ImageFault::new(FaultKind::NotThisFormat, file, "the magic of QED");
            return Err(ImageFault { value: magic.into(), ..fault });
        }
        let (cluster_size, table_size) = (u32_at(bytes, 4), u32_at(bytes, 8));
        let header_size = u32_at(bytes, 12);
        let features = u64_at(bytes, 16);
        if features & !FEATURES_KNOWN != 0 {
            let unknown = features & !FEATURES_KNOWN;
            return Err(ImageFault::unsupported(file, "features of QED unknown here", unknown));
        }
        let range = CLUSTER_BYTES_MIN..=CLUSTER_BYTES_MAX;
        if !cluster_size.is_power_of_two() || !range.contains(&cluster_size) {
            return corrupt("cluster_size", 4, cluster_size.into());
        }
        if !table_size.is_power_of_two() || table_size > TABLE_CLUSTERS_MAX {
            return corrupt("table_size", 8, table_size.into());
        }
        let cluster_bytes = u64::from(cluster_size);
        let header = Header {
            cluster_bytes,
            table_bytes: u64::from(table_size) * cluster_bytes,
            header_bytes: u64::from(header_size) * cluster_bytes,
            features,
            autoclear: u64_at(bytes, 32),
            l1_offset: u64_at(bytes, 40),
            image_bytes: u64_at(bytes, 48),
            name_offset: u32_at(bytes, 56).into(),
            name_bytes: if features & FEATURE_BACKING_FILE != 0 {
                u32_at(bytes, 60) as usize
            } else {
                0
            },
        };
        if header.header_bytes == 0 {
            return corrupt("header_size", 12, 0);
        }
        if !header.l1_offset.is_multiple_of(cluster_bytes) || header.l1_offset < header.header_bytes
        {
            return corrupt("l1_table_offset", at::L1_OFFSET, header.l1_offset);
        }
        if !header.image_bytes.is_multiple_of(SECTOR_BYTES)
            || u128::from(header.image_bytes) > header.image_bytes_max()
            || header.image_bytes > i64::MAX as u64
        {
            return corrupt("image_size", at::IMAGE_SIZE, header.image_bytes);
        }
        if features & FEATURE_BACKING_FILE != 0 {
            let (name, max) = (header.name_bytes as u64, NAME_BYTES_MAX as u64);
            if name == 0 || name > max {
                return Err(ImageFault::limit(file, "backing_filename_size", name, max));
            }
            if header.name_offset < HEADER_BYTES as u64
                || header.name_offset + name > header.header_bytes
            {
                return corrupt("backing_filename_offset", at::NAME_OFFSET, header.name_offset);
            }
        }
        Ok(header)
    }

    /// The 64 bytes of this header.
    pub fn emit(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |offset: usize, value: &[u8]| {
            bytes[offset..offset + value.len()].copy_from_slice(value);
        };
        put(0, &MAGIC.to_le_bytes());
        put(4, &(self.cluster_bytes as u32).to_le_bytes());
        put(8, &((self.table_bytes / self.cluster_bytes) as u32).to_le_bytes());
        put(12, &((self.header_bytes / self.cluster_bytes) as u32).to_le_bytes());
        put(16, &self.features.to_le_bytes());
        put(32, &self.autoclear.to_le_bytes());
        put(40, &self.l1_offset.to_le_bytes());
        put(48, &self.image_bytes.to_le_bytes());
        if self.name_bytes > 0 {
            put(56, &(self.name_offset as u32).to_le_bytes());
            put(60, &(self.name_bytes as u32).to_le_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    //! Would miss: what the tables hold; the image tests read whole images.

    use super::*;

    /// `qemu-img create -f qed -b b.img -F raw c.qed` over a raw file of 10 MiB.
    const VECTOR: [u8; HEADER_BYTES] = [
        0x51, 0x45, 0x44, 0, 0, 0, 1, 0, 4, 0, 0, 0, 1, 0, 0, 0, // magic, sizes
        5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // features: backing file, raw
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, // autoclear, l1_table_offset
        0, 0, 0xa0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 5, 0, 0, 0, // image_size, name
    ];

    fn parse(edit: impl Fn(&mut [u8])) -> Result<Header, ImageFault> {
        let mut bytes = VECTOR;
        edit(&mut bytes);
        Header::parse(FileNo(0), &bytes)
    }

    #[test]
    fn a_header_of_qemu_is_read_and_emitted_alike() {
        let header = parse(|_| {}).unwrap();
        assert_eq!((header.cluster_bytes, header.table_bytes), (65_536, 262_144));
        assert_eq!((header.l1_offset, header.image_bytes), (65_536, 10 << 20));
        assert_eq!((header.name_offset, header.name_bytes), (64, 5));
        assert_eq!(header.features, FEATURE_BACKING_FILE | FEATURE_BACKING_RAW);
        assert_eq!(header.emit(), VECTOR);
    }

    #[test]
    fn hostile_fields_are_refused() {
        let edits: [(usize, &[u8]); 15] = [
            (0, b"QED1"),
            (4, &[0; 4]),
            (4, &[0, 8, 0, 0]),
            (4, &[1, 0, 1, 0]),
            (4, &[0, 0, 0, 8]),
            (8, &[0; 4]),
            (8, &[3, 0, 0, 0]),
            (8, &[32, 0, 0, 0]),
            (12, &[0; 4]),
            (16, &[0x0d]),
            (40, &[1]),
            (40, &[0; 8]),
            (48, &[1]),
            (48, &[0xff; 8]),
            (60, &[0xff; 4]),
        ];
        for (at, value) in edits {
            let edited = parse(|bytes| bytes[at..at + value.len()].copy_from_slice(value));
            assert!(edited.is_err(), "{value:?} at {at}");
        }
        let unknown = parse(|bytes| bytes[16] = 0x0d).unwrap_err();
        assert!(unknown.field.contains("features") && unknown.value == 8);
    }
}
