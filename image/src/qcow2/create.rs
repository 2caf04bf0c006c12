//! A new qcow2 image: header, refcount table and blocks, L1 table, and, when metadata is
//! preallocated, all L2 tables and room for the data, in this order without gaps.

use alloc::string::String;
use alloc::vec::Vec;

use crate::create::{Content, Create, CreateFault, CreateParams, Entry, Wanted};
use crate::files::NAME_BYTES_MAX;
use crate::types::SECTOR_BYTES;

use super::entry::COPIED;
use super::header::{
    AUTOCLEAR_DATA_FILE_RAW, CLUSTER_BITS_MAX, CLUSTER_BITS_MIN, COMPATIBLE_LAZY_REFCOUNTS,
    EXTENSION_BACKING_FORMAT, EXTENSION_DATA_FILE, HEADER_BYTES_MAX, Header,
    INCOMPATIBLE_COMPRESSION, INCOMPATIBLE_DATA_FILE, INCOMPATIBLE_EXTENDED_L2, L1_BYTES_MAX,
    REFTABLE_BYTES_MAX, Stretch, V2_BYTES,
};

/// Bytes of a new version 3 header, as QEMU writes it (with compression_type).
const V3_BYTES_NEW: u32 = 112;

/// Clusters of each part.
struct Layout {
    reftable: u64,
    blocks: u64,
    l1: u64,
    l2: u64,
    data: u64,
}

impl Layout {
    fn total(&self) -> u64 {
        1 + self.reftable + self.blocks + self.l1 + self.l2 + self.data
    }
}

fn refuse(text: String) -> CreateFault {
    CreateFault(text)
}

/// Incompatible features; whether clusters are compressed by zstd, and the data file kept raw.
fn features(
    params: &CreateParams,
    wanted: &mut Wanted,
    cluster_bits: u32,
) -> Result<(u64, bool, bool), CreateFault> {
    let mut incompatible = 0;
    if wanted.switch("extended_l2", false)? {
        incompatible |= INCOMPATIBLE_EXTENDED_L2;
        if cluster_bits < 14 {
            return Err(CreateFault::new("extended_l2 needs clusters of at least 16 KiB"));
        }
    }
    let zstd = match wanted.text("compression_type") {
        None | Some("zlib") => false,
        Some("zstd") => true,
        Some(other) => {
            return Err(refuse(alloc::format!("compression_type={other} is not zlib or zstd")));
        }
    };
    incompatible |= if zstd { INCOMPATIBLE_COMPRESSION } else { 0 };
    let data_file = wanted.text("data_file").is_some();
    incompatible |= if data_file { INCOMPATIBLE_DATA_FILE } else { 0 };
    let raw = wanted.switch("data_file_raw", false)?;
    if raw && (!data_file || params.backing.is_some()) {
        return Err(CreateFault::new("data_file_raw needs data_file and no backing file"));
    }
    Ok((incompatible, zstd, raw))
}

/// What the options ask for, as a header without places.
pub(super) fn header(
    params: &CreateParams,
    wanted: &mut Wanted,
) -> Result<(Header, bool), CreateFault> {
    let version = match wanted.text("compat") {
        None | Some("1.1" | "v3") => 3,
        Some("0.10" | "v2") => 2,
        Some(other) => return Err(refuse(alloc::format!("compat={other} is not 0.10 or 1.1"))),
    };
    let size = wanted.number("cluster_size", 65536)?;
    let size = if params.cluster_bytes != 0 { params.cluster_bytes } else { size };
    let bits = size.trailing_zeros();
    if !size.is_power_of_two() || !(CLUSTER_BITS_MIN..=CLUSTER_BITS_MAX).contains(&bits) {
        return Err(CreateFault::new("qcow2 clusters are a power of two, 512 bytes to 2 MiB"));
    }
    let refcount_bits = wanted.number("refcount_bits", 16)?;
    if !refcount_bits.is_power_of_two() || refcount_bits > 64 {
        return Err(CreateFault::new("refcount_bits is a power of two up to 64"));
    }
    let (incompatible, zstd, raw) = features(params, wanted, bits)?;
    let lazy = wanted.switch("lazy_refcounts", false)?;
    if version == 2 && (incompatible != 0 || lazy || refcount_bits != 16) {
        return Err(CreateFault::new("compat=0.10 has none of these features"));
    }
    let metadata = match wanted.text("preallocation") {
        None | Some("off") => raw,
        Some(_) => true,
    };
    if metadata && params.backing.is_some() {
        return Err(CreateFault::new("preallocation would hide the backing file"));
    }
    let Some(size_bytes) = params.sectors.checked_mul(SECTOR_BYTES).filter(|&s| s >> 63 == 0)
    else {
        return Err(CreateFault::new("the size is beyond 2^63 bytes"));
    };
    let header = Header {
        version,
        backing: None,
        cluster_bits: bits,
        size_bytes,
        l1_entries: 0,
        l1_offset: 0,
        reftable_offset: 0,
        reftable_clusters: 0,
        snapshots: 0,
        snapshots_offset: 0,
        incompatible,
        compatible: if lazy { COMPATIBLE_LAZY_REFCOUNTS } else { 0 },
        autoclear: if raw { AUTOCLEAR_DATA_FILE_RAW } else { 0 },
        refcount_order: refcount_bits.trailing_zeros(),
        header_bytes: if version == 3 { V3_BYTES_NEW } else { V2_BYTES as u32 },
        zstd,
        lost: None,
    };
    Ok((header, metadata))
}

/// How many clusters each part takes.
fn layout(header: &mut Header, metadata: bool) -> Result<Layout, CreateFault> {
    let bits = header.cluster_bits;
    let l1_entries = header.size_bytes.div_ceil(1 << (bits + header.l2_bits()));
    if l1_entries * 8 > L1_BYTES_MAX {
        let max = (L1_BYTES_MAX / 8) << (bits + header.l2_bits());
        return Err(refuse(alloc::format!(
            "with clusters of this size the disk can have at most {max} bytes"
        )));
    }
    let clusters = header.size_bytes.div_ceil(1 << bits);
    let mut layout = Layout {
        reftable: 1,
        blocks: 1,
        l1: (l1_entries * 8).div_ceil(1 << bits).max(1),
        l2: if metadata { l1_entries } else { 0 },
        data: if metadata && !header.data_file() { clusters } else { 0 },
    };
    let per_block = 1u64 << (bits + 3 - header.refcount_order);
    // Each round only makes room for the last one's tables: it settles at once.
    loop {
        let blocks = layout.total().div_ceil(per_block);
        let reftable = (blocks * 8).div_ceil(1 << bits);
        if (blocks, reftable) == (layout.blocks, layout.reftable) {
            break;
        }
        (layout.blocks, layout.reftable) = (blocks, reftable);
        if reftable << bits > REFTABLE_BYTES_MAX {
            return Err(CreateFault::new("the refcount table would be larger than 8 MiB"));
        }
    }
    header.l1_entries = l1_entries as u32;
    header.reftable_offset = 1 << bits;
    header.reftable_clusters = layout.reftable as u32;
    header.l1_offset = (1 + layout.reftable + layout.blocks) << bits;
    Ok(layout)
}

/// Header, extensions and the backing file's name.
fn head(header: &mut Header, params: &CreateParams, data_file: Option<&str>) -> Head {
    let mut extensions = Vec::new();
    let mut extension = |kind: u32, data: &[u8]| {
        extensions.extend_from_slice(&kind.to_be_bytes());
        extensions.extend_from_slice(&(data.len() as u32).to_be_bytes());
        extensions.extend_from_slice(data);
        extensions.resize(extensions.len().next_multiple_of(8), 0);
    };
    if let Some(backing) = params.backing {
        // QEMU's word for VHD.
        let name = if backing.format.name() == "vhd" { "vpc" } else { backing.format.name() };
        extension(EXTENSION_BACKING_FORMAT, name.as_bytes());
    }
    if let Some(name) = data_file {
        extension(EXTENSION_DATA_FILE, name.as_bytes());
    }
    extension(0, &[]);
    if let Some(backing) = params.backing {
        let offset = u64::from(header.header_bytes) + extensions.len() as u64;
        header.backing = Some(Stretch { offset, bytes: backing.name.len() as u64 });
        extensions.extend_from_slice(backing.name.as_bytes());
    }
    let mut bytes = header.emit();
    bytes.extend(extensions);
    if bytes.len() > HEADER_BYTES_MAX.min(1 << header.cluster_bits) {
        return Err(CreateFault::new("names and header do not fit into the first cluster"));
    }
    Ok(bytes)
}

type Head = Result<Vec<u8>, CreateFault>;

pub(crate) fn create(params: &CreateParams) -> Result<Create, CreateFault> {
    let mut wanted = Wanted::new(params.options);
    let (mut header, metadata) = header(params, &mut wanted)?;
    let reserve = wanted.preallocation(true, true)?;
    let data_file = wanted.text("data_file");
    wanted.finish()?;
    let long = |name: &str| name.is_empty() || name.len() > NAME_BYTES_MAX;
    if params.backing.is_some_and(|b| long(b.name)) || data_file.is_some_and(long) {
        return Err(CreateFault::new("a file's name is 1 to 1023 bytes"));
    }
    let layout = layout(&mut header, metadata)?;
    let bits = header.cluster_bits;
    let mut create = Create::one_file(layout.total() << bits);
    let bytes = head(&mut header, params, data_file)?;
    create.put(0, 0, Content::Bytes(bytes));
    let table = |entry, first, step, count| Content::Table { entry, first, step, count };
    let blocks = (1 + layout.reftable) << bits;
    create.put(0, 1 << bits, table(Entry::Be64, blocks, 1 << bits, layout.blocks));
    counts(&mut create, blocks, layout.total(), header.refcount_order);
    if metadata {
        let l2 = header.l1_offset + (layout.l1 << bits);
        create.put(0, header.l1_offset, table(Entry::Be64, l2 | COPIED, 1 << bits, layout.l2));
        let data = if header.data_file() { 0 } else { l2 + (layout.l2 << bits) };
        let entry =
            if header.extended_l2() { Entry::Be64And(u32::MAX.into()) } else { Entry::Be64 };
        let clusters = header.size_bytes.div_ceil(1 << bits);
        create.put(0, l2, table(entry, data | COPIED, 1 << bits, clusters));
    }
    if let Some(name) = data_file {
        create.add_file(String::from(name), header.size_bytes);
    }
    create.reserve(reserve);
    Ok(create)
}

/// `clusters` counts of 1, of any width: whole words of a pattern, then what is left.
fn counts(create: &mut Create, offset: u64, clusters: u64, order: u32) {
    let per_word = 64 >> order;
    let one = (0..per_word).fold(0u64, |word, n| word | 1u64 << (n << order));
    let words = clusters / per_word;
    let content = Content::Table { entry: Entry::Be64, first: one, step: 0, count: words };
    create.put(0, offset, content);
    let rest = clusters % per_word;
    let mut bytes = [0; 8];
    for index in 0..rest {
        super::refcount::set_count_in(&mut bytes, order, index, 1);
    }
    if rest > 0 {
        create.put(0, offset + words * 8, Content::Bytes(bytes.to_vec()));
    }
}
