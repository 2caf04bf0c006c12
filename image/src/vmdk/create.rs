//! New VMDK images: monolithicSparse, monolithicFlat, twoGbMaxExtentSparse, twoGbMaxExtentFlat.
//! Sparse extents come with all grain tables, both copies, as VMware and QEMU make them.

use alloc::format;
use alloc::string::String;

use super::descriptor::{NO_PARENT, TEXT_BYTES_MAX};
use super::header::{FLAG_NEWLINES, FLAG_REDUNDANT, FLAG_ZERO_GRAIN, Sparse};
use crate::create::{Content, Create, CreateFault, CreateParams, Entry, Wanted, random};
use crate::format::Format;
use crate::types::{FileNo, SECTOR_BYTES};

/// The usual grain, 64 KiB, and the usual entries of a grain table.
pub(super) const GRAIN_BYTES: u64 = 64 << 10;
pub(super) const TABLE_ENTRIES: u64 = 512;
/// Room of an embedded descriptor.
pub(super) const DESCRIPTOR_SECTORS: u64 = 20;
/// Sectors of an extent of the split kinds: 2 GiB.
pub(super) const SPLIT_SECTORS: u64 = (2 << 30) / SECTOR_BYTES;
/// Sectors that the u32 entries of a sparse extent can reach, with room for its tables.
pub(super) const SPARSE_SECTORS_MAX: u64 = (1 << 32) - (1 << 26);
/// Most extents that are opened again.
const EXTENTS_MAX: u64 = super::descriptor::EXTENTS_MAX as u64;

/// What `subformat` says.
#[derive(Clone, Copy)]
struct Kind {
    name: &'static str,
    is_flat: bool,
    is_split: bool,
}

const KINDS: [Kind; 4] = [
    Kind { name: "monolithicSparse", is_flat: false, is_split: false },
    Kind { name: "monolithicFlat", is_flat: true, is_split: false },
    Kind { name: "twoGbMaxExtentSparse", is_flat: false, is_split: true },
    Kind { name: "twoGbMaxExtentFlat", is_flat: true, is_split: true },
];

/// Options: `subformat`, `zeroed_grain=on|off`, `adapter_type`, `hwversion`.
pub(crate) fn create(params: &CreateParams) -> Result<Create, CreateFault> {
    let mut wanted = Wanted::new(params.options);
    let asked = wanted.text("subformat").unwrap_or("monolithicSparse");
    let zero_grain = wanted.switch("zeroed_grain", false)?;
    let adapter = wanted.text("adapter_type").unwrap_or("ide");
    let version = wanted.text("hwversion").unwrap_or("4");
    let is_flat = KINDS.iter().any(|kind| kind.name == asked && kind.is_flat);
    let reserve = wanted.preallocation(is_flat, false)?;
    wanted.finish()?;
    let kind = KINDS.iter().find(|kind| kind.name == asked).ok_or_else(|| {
        CreateFault(format!(
            "subformat={asked} cannot be created, only monolithicSparse, \
            monolithicFlat, twoGbMaxExtentSparse, twoGbMaxExtentFlat"
        ))
    })?;
    if kind.is_flat && (params.backing.is_some() || zero_grain) {
        return Err(CreateFault::new("a flat VMDK has no backing file and no zeroed grains"));
    }
    if !["ide", "buslogic", "lsilogic", "legacyESX"].contains(&adapter)
        || !version.bytes().all(|b| b.is_ascii_digit())
    {
        return Err(CreateFault::new(
            "adapter_type is ide, buslogic, lsilogic or legacyESX, hwversion a number",
        ));
    }
    let extents = split(params, kind)?;
    let parent = parent_lines(params)?;
    let mut lines = String::new();
    for (name, sectors) in &extents {
        let (word, end) = if kind.is_flat { ("FLAT", " 0") } else { ("SPARSE", "") };
        lines += &format!("RW {sectors} {word} \"{name}\"{end}\n");
    }
    let text = describe(params, kind.name, &parent, &lines, (adapter, version));
    if !kind.is_flat && !kind.is_split {
        let header = sparse(params, zero_grain, (params.sectors, true))?;
        if text.len() as u64 > DESCRIPTOR_SECTORS * SECTOR_BYTES {
            return Err(CreateFault::new("the names are too long for the descriptor"));
        }
        let mut create = Create::one_file(overhead(&header));
        create.put(0, SECTOR_BYTES, Content::Bytes(text.into_bytes()));
        put_sparse(&mut create, 0, &header);
        return Ok(create);
    }
    if text.len() as u64 > TEXT_BYTES_MAX {
        return Err(CreateFault::new("the names of so many extents are too long for a descriptor"));
    }
    let mut create = Create::one_file(text.len() as u64);
    create.put(0, 0, Content::Bytes(text.into_bytes()));
    for (name, sectors) in extents {
        if kind.is_flat {
            create.add_file(name, sectors * SECTOR_BYTES);
        } else {
            let header = sparse(params, zero_grain, (sectors, false))?;
            let file = create.add_file(name, overhead(&header));
            put_sparse(&mut create, file, &header);
        }
    }
    create.reserve(reserve);
    Ok(create)
}

/// The descriptor's text.
pub(super) fn describe(
    params: &CreateParams,
    create_type: &str,
    parent: &str,
    lines: &str,
    (adapter, version): (&str, &str),
) -> String {
    // All ones would mean "no parent" where a child names it.
    let cid = random(params.seed, 0) as u32 & 0x7fff_ffff;
    let heads = if adapter == "ide" { 16 } else { 255 };
    let cylinders = params.sectors / (63 * heads);
    format!(
        "# Disk DescriptorFile\nversion=1\nCID={cid:08x}\n{parent}createType=\"{create_type}\"\n\n\
         # Extent description\n{lines}\n# The Disk Data Base\n#DDB\n\n\
         ddb.virtualHWVersion = \"{version}\"\nddb.geometry.cylinders = \"{cylinders}\"\n\
         ddb.geometry.heads = \"{heads}\"\nddb.geometry.sectors = \"63\"\n\
         ddb.adapterType = \"{adapter}\"\n"
    )
}

/// Names and sectors of the extents.
fn split(
    params: &CreateParams,
    kind: &Kind,
) -> Result<alloc::vec::Vec<(String, u64)>, CreateFault> {
    let name = check_name(params.name)?;
    let (stem, suffix) = match name.rsplit_once('.') {
        Some((stem, suffix)) => (stem, format!(".{suffix}")),
        None => (name, String::new()),
    };
    if !kind.is_flat && params.sectors > SPARSE_SECTORS_MAX && !kind.is_split {
        return Err(CreateFault::new("a sparse VMDK extent holds less than 2 TiB"));
    }
    if !kind.is_split {
        let own = if kind.is_flat { format!("{stem}-flat{suffix}") } else { String::from(name) };
        return Ok(alloc::vec![(own, params.sectors)]);
    }
    let count = params.sectors.div_ceil(SPLIT_SECTORS);
    if count > EXTENTS_MAX {
        return Err(CreateFault(format!(
            "the disk needs {count} extents, the limit is {EXTENTS_MAX}"
        )));
    }
    let letter = if kind.is_flat { 'f' } else { 's' };
    let extent = |n: u64| {
        let sectors = (params.sectors - n * SPLIT_SECTORS).min(SPLIT_SECTORS);
        (format!("{stem}-{letter}{:03}{suffix}", n + 1), sectors)
    };
    Ok((0..count).map(extent).collect())
}

/// A file's name that can stand in a descriptor.
pub(super) fn check_name(name: &str) -> Result<&str, CreateFault> {
    if name.is_empty() || name.contains(['"', '\n', '\r', '/', '\0']) {
        return Err(CreateFault::new("a VMDK cannot hold its file's name"));
    }
    Ok(name)
}

fn parent_lines(params: &CreateParams) -> Result<String, CreateFault> {
    let Some(backing) = &params.backing else {
        return Ok(format!("parentCID={NO_PARENT:08x}\n"));
    };
    if backing.format != Format::Vmdk {
        return Err(CreateFault::new("the backing file of a VMDK must be a VMDK"));
    }
    if backing.name.contains(['"', '\n', '\r', '\0']) {
        return Err(CreateFault::new("a VMDK cannot hold the name of this backing file"));
    }
    let cid = backing.identity.and_then(|cid| u32::try_from(cid).ok());
    let cid = cid.filter(|&cid| cid != NO_PARENT).ok_or_else(|| {
        CreateFault::new("the backing VMDK has no CID by which it could be known")
    })?;
    Ok(format!("parentCID={cid:08x}\nparentFileNameHint=\"{}\"\n", backing.name))
}

/// Layout: header, descriptor, redundant directory and tables, directory and tables, grains.
fn sparse(
    params: &CreateParams,
    zero_grain: bool,
    (sectors, has_descriptor): (u64, bool),
) -> Result<Sparse, CreateFault> {
    let grain_bytes = if params.cluster_bytes == 0 { GRAIN_BYTES } else { params.cluster_bytes };
    let descriptor_sectors = if has_descriptor { DESCRIPTOR_SECTORS } else { 0 };
    let mut header = Sparse {
        version: if zero_grain { 2 } else { 1 },
        flags: FLAG_NEWLINES | FLAG_REDUNDANT | if zero_grain { FLAG_ZERO_GRAIN } else { 0 },
        sectors,
        grain_sectors: grain_bytes / SECTOR_BYTES,
        descriptor: (u64::from(has_descriptor) * SECTOR_BYTES, descriptor_sectors * SECTOR_BYTES),
        table_entries: TABLE_ENTRIES,
        directory: 0,
        redundant: (1 + descriptor_sectors) * SECTOR_BYTES,
        is_compressed: false,
        is_unclean: false,
    };
    if grain_bytes >= SECTOR_BYTES {
        header.directory = header.redundant + tables_bytes(&header);
    }
    match Sparse::parse(FileNo(0), 0, &header.emit(0)) {
        Ok(_) => Ok(header),
        Err(fault) => Err(CreateFault(format!("such an extent is not possible: {fault}"))),
    }
}

/// Bytes of a directory, in whole sectors.
fn directory_bytes(header: &Sparse) -> u64 {
    (header.directory_entries() * 4).next_multiple_of(SECTOR_BYTES)
}

/// Bytes of a directory and its tables.
fn tables_bytes(header: &Sparse) -> u64 {
    directory_bytes(header) + header.directory_entries() * TABLE_ENTRIES * 4
}

/// First byte of the first grain.
fn overhead(header: &Sparse) -> u64 {
    (header.directory + tables_bytes(header)).next_multiple_of(header.grain_bytes())
}

fn put_sparse(create: &mut Create, file: usize, header: &Sparse) {
    let overhead_sectors = overhead(header) / SECTOR_BYTES;
    create.put(file, 0, Content::Bytes(header.emit(overhead_sectors).to_vec()));
    for directory in [header.redundant, header.directory] {
        let table = Content::Table {
            entry: Entry::Le32,
            first: (directory + directory_bytes(header)) / SECTOR_BYTES,
            step: TABLE_ENTRIES * 4 / SECTOR_BYTES,
            count: header.directory_entries(),
        };
        create.put(file, directory, table);
    }
}
