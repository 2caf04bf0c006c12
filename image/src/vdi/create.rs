//! A new VDI: header, a map of free entries (static: in order), room for the map to grow.

use super::header::parent_comment;
use super::header::{BLOCK_BYTES_MAX, BLOCKS_MAX, HEADER_BYTES, Header, Kind};
use crate::create::{Content, Create, CreateFault, CreateParams, Entry, Wanted, random};
use crate::format::Format;
use crate::types::SECTOR_BYTES;

/// What VirtualBox and QEMU take (QEMU opens no other).
const BLOCK_BYTES: u64 = 1 << 20;
/// Smallest blocks that are made: whole blocks of a store.
const BLOCK_BYTES_LEAST: u64 = 4 << 10;
/// The data starts at a multiple of this, so that the map of a small disk has room to grow.
const DATA_ALIGN: u64 = 1 << 20;

/// Options: `static=on|off`, and `preallocation`, of which `metadata` means a static image, as in
/// QEMU.
pub(crate) fn create(params: &CreateParams) -> Result<Create, CreateFault> {
    let mut wanted = Wanted::new(params.options);
    let fixed = wanted.switch("static", false)? || wanted.text("preallocation") == Some("metadata");
    let reserve = wanted.preallocation(fixed, true)?;
    wanted.finish()?;
    let block_bytes = if params.cluster_bytes == 0 { BLOCK_BYTES } else { params.cluster_bytes };
    if !(BLOCK_BYTES_LEAST..=BLOCK_BYTES_MAX.into()).contains(&block_bytes) {
        return Err(CreateFault::new("the block size of a VDI is 4 KiB to 256 MiB"));
    }
    let blocks = params.sectors.div_ceil(block_bytes / SECTOR_BYTES);
    if blocks > BLOCKS_MAX.into() {
        return Err(CreateFault::new("a VDI has at most 0x3fffffff blocks"));
    }
    let mut comment = alloc::vec::Vec::new();
    let mut link = 0;
    if let Some(backing) = &params.backing {
        if fixed || backing.format != Format::Vdi {
            return Err(CreateFault::new("only a dynamic VDI over a VDI has a backing file"));
        }
        link = backing.identity.filter(|&uuid| uuid != 0).ok_or_else(|| {
            CreateFault::new("the backing VDI has no UUID by which it could be named")
        })?;
        comment = parent_comment(backing.name)
            .ok_or_else(|| CreateFault::new("the backing file's name is too long for a VDI"))?;
    }
    let uuid = |n| super::random_uuid(random(params.seed, n), random(params.seed, n + 1));
    let map_offset = HEADER_BYTES as u64;
    let data_offset = (map_offset + blocks * 4).next_multiple_of(DATA_ALIGN);
    let header = Header {
        kind: match (fixed, link) {
            (true, _) => Kind::Static,
            (false, 0) => Kind::Dynamic,
            (false, _) => Kind::Differencing,
        },
        map_offset,
        data_offset,
        disk_bytes: params.sectors * SECTOR_BYTES,
        block_bytes,
        blocks: blocks as u32,
        allocated: if fixed { blocks as u32 } else { 0 },
        uuid: uuid(0),
        modify: uuid(2),
        link,
        parent_modify: 0,
    };
    let bytes = data_offset + if fixed { blocks * block_bytes } else { 0 };
    let mut create = Create::one_file(bytes);
    create.put(0, 0, Content::Bytes(header.emit(&comment).to_vec()));
    let (first, step) = if fixed { (0, 1) } else { (u64::from(super::FREE), 0) };
    let table = Content::Table { entry: Entry::Le32, first, step, count: blocks };
    create.put(0, map_offset, table);
    create.reserve(reserve);
    Ok(create)
}
