//! A new VHDX ([MS-VHDX] 2): headers, log, metadata and BAT at one MiB each or more, then, for a
//! fixed disk, all blocks.

use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use crate::create::{Backing, Content, Create, CreateFault, CreateParams, Entry, Wanted, random};
use crate::format::Format;
use crate::types::SECTOR_BYTES;

use super::crc::Crc;
use super::header::{
    BAT_REGION, BLOCK_BYTES_MAX, BLOCK_BYTES_MIN, DISK_BYTES_MAX, FILE_SIGNATURE, Guid,
    HEADER_BYTES, HEADER_OFFSETS, Header, ITEMS, LOG_BYTES_MAX, METADATA_REGION, MIB, Metadata,
    NO_GUID, REGION_OFFSETS, TABLE_BYTES, VHDX_LOCATOR, guid_from_number, put,
};
use super::log::version_4;
use super::map::ENTRY_FULL;

const LOG_OFFSET: u64 = MIB;
/// Windows' usual block sizes: 32 MiB, and 2 MiB for a differencing disk.
const BLOCK_USUAL: u64 = 32 << 20;
const BLOCK_USUAL_CHILD: u64 = 2 << 20;
/// Flags of a metadata entry ([MS-VHDX] 2.6.1.2): is of the virtual disk, is required.
const IS_DISK: u32 = 2;
const IS_REQUIRED: u32 = 4;

pub(crate) fn create(params: &CreateParams) -> Result<Create, CreateFault> {
    let mut wanted = Wanted::new(params.options);
    let fixed = match (wanted.text("subformat"), params.backing) {
        (None, _) | (Some("dynamic"), None) => false,
        (Some("fixed"), None) => true,
        (Some(other), _) => {
            let why = alloc::format!("subformat={other} is not dynamic or fixed, or has a parent");
            return Err(CreateFault(why));
        }
    };
    let log_bytes = wanted.number("log_size", MIB)?.next_multiple_of(MIB).max(MIB);
    let logical = wanted.number("logical_sector_size", 512)?;
    let physical = wanted.number("physical_sector_size", 4096)?;
    let reserve = wanted.preallocation(fixed, false)?;
    wanted.finish()?;
    if log_bytes > LOG_BYTES_MAX {
        return Err(CreateFault::new("the log of a VHDX has at most 64 MiB"));
    }
    if ![logical, physical].iter().all(|size| matches!(size, 512 | 4096)) {
        return Err(CreateFault::new("the sectors of a VHDX have 512 or 4096 bytes"));
    }
    let child = params.backing.is_some();
    let block_bytes = match params.cluster_bytes {
        0 if child => BLOCK_USUAL_CHILD,
        0 => BLOCK_USUAL,
        bytes => bytes,
    };
    if !(BLOCK_BYTES_MIN as u64..=BLOCK_BYTES_MAX as u64).contains(&block_bytes) {
        return Err(CreateFault::new("a VHDX block has 1 MiB to 256 MiB"));
    }
    let disk_bytes = params.sectors.saturating_mul(SECTOR_BYTES);
    if disk_bytes > DISK_BYTES_MAX || !disk_bytes.is_multiple_of(logical) {
        let why = "a VHDX holds at most 64 TiB, in whole logical sectors";
        return Err(CreateFault::new(why));
    }
    let shape = Metadata {
        block_bytes: block_bytes as u32,
        leave_allocated: fixed,
        has_parent: child,
        disk_bytes,
        logical_bytes: logical as u32,
    };
    let locator = params.backing.map(|backing| locator(params, &backing)).transpose()?;
    let mut create = plan(params, &shape, physical as u32, log_bytes, locator);
    create.reserve(reserve);
    Ok(create)
}

fn plan(
    params: &CreateParams,
    shape: &Metadata,
    physical: u32,
    log_bytes: u64,
    locator: Option<Vec<u8>>,
) -> Create {
    let metadata_offset = LOG_OFFSET + log_bytes;
    let bat_offset = metadata_offset + MIB;
    let bat_bytes = (shape.bat_entries() * 8).next_multiple_of(MIB);
    let data_offset = bat_offset + bat_bytes;
    let blocks = if shape.leave_allocated { shape.blocks() } else { 0 };
    let block_bytes = shape.block_bytes as u64;
    let mut create = Create::one_file(data_offset + blocks * block_bytes);
    let mut first = vec![0; 520];
    put(&mut first, 0, FILE_SIGNATURE);
    let creator: Vec<u8> = "platter".encode_utf16().flat_map(u16::to_le_bytes).collect();
    put(&mut first, 8, &creator);
    create.put(0, 0, Content::Bytes(first));
    for (n, offset) in HEADER_OFFSETS.into_iter().enumerate() {
        let header = Header {
            sequence: n as u64 + 1,
            file_write_guid: new_guid(params, 0),
            data_write_guid: new_guid(params, 1),
            log_guid: NO_GUID,
            log_version: 0,
            version: 1,
            log_length: log_bytes as u32,
            log_offset: LOG_OFFSET,
        };
        let mut bytes = [0; HEADER_BYTES];
        header.emit(&mut bytes);
        create.put(0, offset, Content::Bytes(bytes.to_vec()));
    }
    let regions = regions((bat_offset, bat_bytes), (metadata_offset, MIB));
    for offset in REGION_OFFSETS {
        create.put(0, offset, Content::Bytes(regions.clone()));
    }
    let (table, items) = metadata(params, shape, physical, locator);
    create.put(0, metadata_offset, Content::Bytes(table));
    create.put(0, metadata_offset + TABLE_BYTES, Content::Bytes(items));
    // The BAT of a fixed disk, a chunk at a time: a sector bitmap entry follows each.
    let ratio = shape.chunk_ratio();
    for chunk in 0..blocks.div_ceil(ratio) {
        let start = chunk * ratio;
        let first = (data_offset + start * block_bytes) | ENTRY_FULL;
        let count = ratio.min(blocks - start);
        let table = Content::Table { entry: Entry::Le64, first, step: block_bytes, count };
        create.put(0, bat_offset + chunk * (ratio + 1) * 8, table);
    }
    create
}

/// The region table ([MS-VHDX] 2.2.3).
pub(super) fn regions(bat: (u64, u64), metadata: (u64, u64)) -> Vec<u8> {
    let mut b = vec![0; TABLE_BYTES as usize];
    put(&mut b, 0, b"regi");
    put(&mut b, 8, &2u32.to_le_bytes());
    let regions = [(BAT_REGION, bat), (METADATA_REGION, metadata)];
    for (n, (guid, (offset, length))) in regions.into_iter().enumerate() {
        let at = 16 + n * 32;
        put(&mut b, at, &guid);
        put(&mut b, at + 16, &offset.to_le_bytes());
        put(&mut b, at + 24, &(length as u32).to_le_bytes());
        put(&mut b, at + 28, &1u32.to_le_bytes());
    }
    let sum = Crc::new().with(&b).value();
    put(&mut b, 4, &sum.to_le_bytes());
    b
}

/// The metadata table and its items, which begin 64 KiB behind it ([MS-VHDX] 2.6).
fn metadata(
    params: &CreateParams,
    shape: &Metadata,
    physical: u32,
    locator: Option<Vec<u8>>,
) -> (Vec<u8>, Vec<u8>) {
    let flags = shape.leave_allocated as u32 | (shape.has_parent as u32) << 1;
    let parameters = [shape.block_bytes.to_le_bytes(), flags.to_le_bytes()].concat();
    let contents = [
        (parameters, IS_REQUIRED),
        (shape.disk_bytes.to_le_bytes().to_vec(), IS_DISK | IS_REQUIRED),
        (new_guid(params, 2).to_vec(), IS_DISK | IS_REQUIRED),
        (shape.logical_bytes.to_le_bytes().to_vec(), IS_DISK | IS_REQUIRED),
        (physical.to_le_bytes().to_vec(), IS_DISK | IS_REQUIRED),
        (locator.unwrap_or_default(), IS_REQUIRED),
    ];
    let (mut table, mut items) = (vec![0; 32], Vec::new());
    let mut count = 0u16;
    for (guid, (bytes, flags)) in ITEMS.iter().zip(contents) {
        if bytes.is_empty() {
            continue;
        }
        let mut entry = [0; 32];
        put(&mut entry, 0, guid);
        put(&mut entry, 16, &(TABLE_BYTES as u32 + items.len() as u32).to_le_bytes());
        put(&mut entry, 20, &(bytes.len() as u32).to_le_bytes());
        put(&mut entry, 24, &flags.to_le_bytes());
        table.extend(entry);
        items.extend(bytes);
        count += 1;
    }
    put(&mut table, 0, b"metadata");
    put(&mut table, 10, &count.to_le_bytes());
    (table, items)
}

/// The parent locator item ([MS-VHDX] 2.6.2.6).
fn locator(params: &CreateParams, backing: &Backing) -> Result<Vec<u8>, CreateFault> {
    let identity = match (backing.format, backing.identity) {
        (Format::Vhdx, Some(identity)) => identity,
        _ => return Err(CreateFault::new("the parent of a VHDX is a VHDX")),
    };
    if params.sectors < backing.sectors {
        return Err(CreateFault::new("a VHDX cannot be smaller than its parent"));
    }
    let path = alloc::format!(".\\{}", backing.name.replace('/', "\\"));
    let pairs = [("parent_linkage", guid_text(identity)), ("relative_path", path)];
    let mut b = vec![0; 20 + 12 * pairs.len()];
    put(&mut b, 0, &VHDX_LOCATOR);
    put(&mut b, 18, &(pairs.len() as u16).to_le_bytes());
    for (n, (key, value)) in pairs.into_iter().enumerate() {
        let at = 20 + 12 * n;
        for (text, offset_at, length_at) in
            [(String::from(key), at, at + 8), (value, at + 4, at + 10)]
        {
            let units: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
            let offset = b.len() as u32;
            put(&mut b, offset_at, &offset.to_le_bytes());
            put(&mut b, length_at, &(units.len() as u16).to_le_bytes());
            b.extend(units);
        }
    }
    Ok(b)
}

fn guid_text(number: u128) -> String {
    let d = alloc::format!("{number:032x}");
    let parts = [&d[..8], &d[8..12], &d[12..16], &d[16..20], &d[20..]];
    alloc::format!("{{{}}}", parts.join("-"))
}

fn new_guid(params: &CreateParams, n: u64) -> Guid {
    let (high, low) = (random(params.seed, n * 2), random(params.seed, n * 2 + 1));
    guid_from_number(version_4((high as u128) << 64 | low as u128))
}
