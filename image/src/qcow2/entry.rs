//! Entries of L1 and L2 tables (docs/interop/qcow2, "Cluster mapping" and "Extended L2
//! Entries"): the raw words, and what they mean once checked.

/// Bit 63: the cluster's refcount is exactly one.
pub const COPIED: u64 = 1 << 63;
pub const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of a standard descriptor: reads as zeros.
pub const ZERO: u64 = 1;
/// Bits 9 to 55.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits of a standard entry that must be clear.
pub const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
pub const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;

/// An L2 entry with, in images with extended L2 entries, its subcluster bitmap.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct L2Entry {
    pub word: u64,
    /// Bits 0-31 allocated, 32-63 reads as zeros. 0 without extended L2 entries.
    pub bitmap: u64,
}

impl L2Entry {
    /// An entry of 8 bytes, or 16 with extended L2 entries.
    pub fn parse(bytes: &[u8]) -> L2Entry {
        let word = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().expect("eight bytes"));
        let (first, second) = bytes.split_at(8);
        L2Entry { word: word(first), bitmap: if second.is_empty() { 0 } else { word(second) } }
    }
}

/// What an entry says of its cluster, subclusters apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cluster {
    /// The layer below decides.
    Absent,
    /// Reads as zeros; with a host cluster kept for it, or none.
    Zero { host: Option<u64>, copied: bool },
    /// Data, in whole or, with extended L2 entries, as the bitmap says.
    Data { host: u64, copied: bool },
    /// Compressed bytes at any offset of the image file.
    Compressed { offset: u64, bytes: u32 },
}

/// Why an entry cannot be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bad(pub &'static str);

/// The properties of an image that decide how entries are read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Kind {
    pub cluster_bits: u32,
    pub v3: bool,
    pub extended: bool,
    pub data_file: bool,
}

impl Kind {
    /// Of an entry of an L2 table.
    pub fn entry_bytes(self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// The meaning of an entry for the guest cluster that starts at byte `guest`.
    pub fn cluster(self, entry: L2Entry, guest: u64) -> Result<Cluster, Bad> {
        let L2Entry { word, bitmap } = entry;
        if word & COMPRESSED != 0 {
            return self.compressed(word);
        }
        let (host, copied) = (word & OFFSET, word & COPIED != 0);
        if !host.is_multiple_of(1 << self.cluster_bits) {
            return Err(Bad("an L2 entry's cluster offset, unaligned"));
        }
        let present = host != 0 || (self.data_file && copied);
        if self.data_file && present && host != guest {
            return Err(Bad(
                "an L2 entry's offset that differs from the guest's, with a data file",
            ));
        }
        if self.extended {
            let (allocated, zero) = (bitmap as u32, (bitmap >> 32) as u32);
            if allocated & zero != 0 {
                return Err(Bad("a subcluster both allocated and zero"));
            }
            if !present && allocated != 0 {
                return Err(Bad("an allocated subcluster of a cluster without offset"));
            }
            // With subclusters "absent" and "zero" are the bitmap's business.
            return Ok(match (present, zero) {
                (true, _) => Cluster::Data { host, copied },
                (false, 0) => Cluster::Absent,
                (false, _) => Cluster::Zero { host: None, copied: false },
            });
        }
        if word & ZERO != 0 {
            if !self.v3 {
                return Err(Bad("an L2 entry with the zero flag in a version 2 image"));
            }
            return Ok(Cluster::Zero { host: present.then_some(host), copied });
        }
        Ok(if present { Cluster::Data { host, copied } } else { Cluster::Absent })
    }

    fn compressed(self, word: u64) -> Result<Cluster, Bad> {
        if self.data_file {
            return Err(Bad("a compressed cluster in an image with a data file"));
        }
        let x = 62 - (self.cluster_bits - 8);
        let offset = word & ((1 << x) - 1);
        if offset >> 56 != 0 || offset == 0 {
            return Err(Bad("a compressed cluster's offset"));
        }
        let sectors = (word >> x) & ((1 << (self.cluster_bits - 8)) - 1);
        let bytes = (sectors + 1) * 512 - offset % 512;
        Ok(Cluster::Compressed { offset, bytes: bytes as u32 })
    }
}

#[cfg(test)]
mod tests {
    //! Would miss: what the map makes of an entry.

    use super::*;

    const V3: Kind = Kind { cluster_bits: 16, v3: true, extended: false, data_file: false };

    fn word(word: u64) -> L2Entry {
        L2Entry { word, bitmap: 0 }
    }

    #[test]
    fn standard_entries() {
        let data = Cluster::Data { host: 0x50000, copied: true };
        assert_eq!(V3.cluster(word(0x8000_0000_0005_0000), 0), Ok(data));
        assert_eq!(V3.cluster(word(0), 0), Ok(Cluster::Absent));
        let zero = Cluster::Zero { host: None, copied: false };
        assert_eq!(V3.cluster(word(1), 0), Ok(zero));
        let zero = Cluster::Zero { host: Some(0x50000), copied: true };
        assert_eq!(V3.cluster(word(0x8000_0000_0005_0001), 0), Ok(zero));
        assert!(V3.cluster(word(0x8000_0000_0005_0200), 0).is_err());
        assert!(Kind { v3: false, ..V3 }.cluster(word(1), 0).is_err());
        let external = Kind { data_file: true, ..V3 };
        assert_eq!(external.cluster(word(COPIED), 0), Ok(Cluster::Data { host: 0, copied: true }));
        assert!(external.cluster(word(COPIED | 0x10000), 0).is_err());
    }

    #[test]
    fn compressed_entries_count_additional_sectors() {
        // As qemu-img convert -c -o cluster_size=65536 writes them: x is 54.
        let entry = word(COMPRESSED | (3 << 54) | 0x50123);
        let bytes = 4 * 512 - 0x123;
        assert_eq!(V3.cluster(entry, 0), Ok(Cluster::Compressed { offset: 0x50123, bytes }));
        let small = Kind { cluster_bits: 9, ..V3 };
        let entry = word(COMPRESSED | (1 << 61) | 0x600);
        assert_eq!(small.cluster(entry, 0), Ok(Cluster::Compressed { offset: 0x600, bytes: 1024 }));
        assert!(small.cluster(word(COMPRESSED | 1 << 57), 0).is_err());
    }

    #[test]
    fn subclusters_are_allocated_or_zero_not_both() {
        let extended = Kind { extended: true, ..V3 };
        let entry = |word, bitmap| L2Entry { word, bitmap };
        assert!(extended.cluster(entry(COPIED | 0x50000, 1 | 1 << 32), 0).is_err());
        assert!(extended.cluster(entry(0, 1), 0).is_err());
        let zero = Cluster::Zero { host: None, copied: false };
        assert_eq!(extended.cluster(entry(0, 1 << 32), 0), Ok(zero));
        let data = Cluster::Data { host: 0x50000, copied: true };
        assert_eq!(extended.cluster(entry(COPIED | 0x50000, 1 << 32), 0), Ok(data));
    }
}
