//! A new VHD: fixed, dynamic, or differencing over a VHD or, as XenServer has it, a raw parent.
//!
//! It is written under the creator application `win `, as Hyper-V's: every reader then takes the
//! current size and not the geometry for the disk's size.

use alloc::string::String;
use alloc::vec::Vec;

use crate::create::{Backing, Content, Create, CreateFault, CreateParams, Entry, Wanted, random};
use crate::format::Format;
use crate::path::last;
use crate::types::SECTOR_BYTES;

use super::header::{
    BAT_UNUSED, BLOCK_BYTES_MAX, BLOCK_BYTES_USUAL, FOOTER_BYTES, Footer, Geometry, HEADER_BYTES,
    Header, Kind, LOCATORS, Locator, NONE_U64, SECTORS_MAX,
};
use super::name::{MACX, W2RU};

/// Seconds from 1970 to 2000, where VHD's time begins ("Time Stamp").
const YEAR_2000: u64 = 946_684_800;

pub(crate) fn create(params: &CreateParams) -> Result<Create, CreateFault> {
    let mut wanted = Wanted::new(params.options);
    let kind = match (wanted.text("subformat"), params.backing) {
        (None, Some(_)) => Kind::Differencing,
        (Some("fixed"), None) => Kind::Fixed,
        (None | Some("dynamic"), None) => Kind::Dynamic,
        (Some(other), _) => {
            let why = alloc::format!("subformat={other} is not dynamic or fixed, or has a parent");
            return Err(CreateFault(why));
        }
    };
    if !wanted.switch("force_size", true)? {
        return Err(CreateFault::new("force_size=off: the size is never rounded to a geometry"));
    }
    let reserve = wanted.preallocation(kind == Kind::Fixed, false)?;
    wanted.finish()?;
    if params.sectors > SECTORS_MAX {
        return Err(CreateFault::new("a VHD holds at most 2040 GiB"));
    }
    let size = params.sectors * SECTOR_BYTES;
    let footer = Footer {
        kind,
        data_offset: if kind == Kind::Fixed { NONE_U64 } else { FOOTER_BYTES as u64 },
        time_stamp: time(params),
        creator: *b"win ",
        creator_version: 0x000a_0000,
        host_os: *b"Wi2k",
        original_size: size,
        current_size: size,
        geometry: Geometry::of(params.sectors),
        unique_id: uuid(params.seed),
    };
    if kind != Kind::Fixed {
        return dynamic(params, &footer);
    }
    if params.cluster_bytes != 0 {
        return Err(CreateFault::new("a fixed VHD has no blocks"));
    }
    let mut create = Create::one_file(size + FOOTER_BYTES as u64);
    create.put(0, size, Content::Bytes(footer.emit().to_vec()));
    create.reserve(reserve);
    Ok(create)
}

fn dynamic(params: &CreateParams, footer: &Footer) -> Result<Create, CreateFault> {
    let block_bytes = match params.cluster_bytes {
        0 => BLOCK_BYTES_USUAL as u64,
        bytes if (4096..=BLOCK_BYTES_MAX.into()).contains(&bytes) => bytes,
        _ => return Err(CreateFault::new("a VHD block has 4 KiB to 256 MiB")),
    };
    let entries = params.sectors.div_ceil(block_bytes / SECTOR_BYTES);
    let mut header = Header {
        table_offset: (FOOTER_BYTES + HEADER_BYTES) as u64,
        max_table_entries: entries as u32,
        block_bytes: block_bytes as u32,
        parent_id: 0,
        parent_time_stamp: 0,
        parent_name: [0; 512],
        locators: [Locator::default(); LOCATORS],
    };
    let mut end = header.table_offset + header.table_bytes();
    let mut locators = Vec::new();
    if let Some(backing) = params.backing {
        name_parent(params, &backing, &mut header)?;
        for (n, (code, data)) in names(&backing).into_iter().enumerate() {
            let space = (data.len() as u64).next_multiple_of(SECTOR_BYTES);
            // Windows and libvhd write the space in bytes, against the specification.
            header.locators[n] = Locator {
                code,
                space: space as u32,
                data_length: data.len() as u32,
                data_offset: end,
            };
            locators.push((end, data));
            end += space;
        }
    }
    let emitted = footer.emit().to_vec();
    let mut create = Create::one_file(end + FOOTER_BYTES as u64);
    create.put(0, 0, Content::Bytes(emitted.clone()));
    create.put(0, FOOTER_BYTES as u64, Content::Bytes(header.emit().to_vec()));
    let count = header.table_bytes() / 4;
    let unused = BAT_UNUSED as u64;
    let table = Content::Table { entry: Entry::Be32, first: unused, step: 0, count };
    create.put(0, header.table_offset, table);
    for (offset, data) in locators {
        create.put(0, offset, Content::Bytes(data));
    }
    create.put(0, end, Content::Bytes(emitted));
    Ok(create)
}

fn name_parent(
    params: &CreateParams,
    backing: &Backing,
    header: &mut Header,
) -> Result<(), CreateFault> {
    header.parent_id = match (backing.format, backing.identity) {
        (Format::Raw, _) => 0,
        (Format::Vhd, Some(identity)) if identity != 0 => identity,
        _ => {
            return Err(CreateFault::new(
                "the parent of a VHD is a VHD with an identifier, or raw",
            ));
        }
    };
    if params.sectors < backing.sectors {
        return Err(CreateFault::new("a VHD cannot be smaller than its parent"));
    }
    header.parent_time_stamp = time(params);
    let name = last(backing.name).ok_or(CreateFault::new("the parent's name is a folder"))?;
    let units: Vec<u8> = name.encode_utf16().flat_map(u16::to_be_bytes).collect();
    if units.len() > header.parent_name.len() {
        return Err(CreateFault::new("the parent's name has more than 256 characters"));
    }
    header.parent_name[..units.len()].copy_from_slice(&units);
    Ok(())
}

/// The parent's path for Windows and as a URL. Its absolute path is not known here.
fn names(backing: &Backing) -> [([u8; 4], Vec<u8>); 2] {
    let windows = alloc::format!(".\\{}", backing.name.replace('/', "\\"));
    let mut url = String::from("file://./");
    for byte in backing.name.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~/".contains(&byte) {
            url.push(byte as char);
        } else {
            url.push_str(&alloc::format!("%{byte:02X}"));
        }
    }
    let windows = windows.encode_utf16().flat_map(u16::to_le_bytes).collect();
    [(W2RU, windows), (MACX, url.into_bytes())]
}

fn time(params: &CreateParams) -> u32 {
    let since = params.unix_seconds.saturating_sub(YEAR_2000);
    u32::try_from(since).unwrap_or(u32::MAX)
}

/// A random UUID (RFC 4122, version 4).
fn uuid(seed: u64) -> u128 {
    let random = (random(seed, 0) as u128) << 64 | random(seed, 1) as u128;
    let version = 0x4000u128 << 64;
    let variant = 0x8000u128 << 48;
    random & !(0xf000u128 << 64) & !(0xc000u128 << 48) | version | variant
}
