//! A new qcow version 1 image: a header, the name of its backing file, an empty L1 table.

use alloc::borrow::ToOwned;

use super::header::{HEADER_BYTES, Header};
use crate::create::{Content, Create, CreateFault, CreateParams, Wanted};
use crate::files::NAME_BYTES_MAX;
use crate::types::{FileNo, SECTOR_BYTES};

/// As `qemu-img create` makes them: 4 KiB clusters; over a backing file, which is copied from
/// in clusters, of one sector, with longer tables.
const ALONE: (u8, u8) = (12, 9);
const OVER_BACKING: (u8, u8) = (9, 12);

/// No options but the cluster size, 512 bytes to 64 KiB.
pub(crate) fn create(params: &CreateParams) -> Result<Create, CreateFault> {
    Wanted::new(params.options).finish()?;
    let (mut cluster_bits, l2_bits) = if params.backing.is_some() { OVER_BACKING } else { ALONE };
    if params.cluster_bytes != 0 {
        cluster_bits = params.cluster_bytes.trailing_zeros() as u8;
    }
    let name = params.backing.as_ref().map_or("", |backing| backing.name);
    if name.len() > NAME_BYTES_MAX {
        return Err(CreateFault::new("the name of the backing file is longer than 1023 bytes"));
    }
    let name_offset = HEADER_BYTES as u64;
    let header = Header {
        name_offset,
        name_bytes: name.len(),
        mtime: params.unix_seconds as u32,
        disk_bytes: params.sectors.saturating_mul(SECTOR_BYTES),
        cluster_bits,
        l2_bits,
        l1_offset: (name_offset + name.len() as u64).next_multiple_of(8),
    };
    if let Err(fault) = Header::parse(FileNo(0), &header.emit()) {
        return Err(CreateFault(alloc::format!("such an image is not possible: {fault}")));
    }
    // QEMU reads the table in whole sectors.
    let mut create = Create::one_file(header.l1_end().next_multiple_of(SECTOR_BYTES));
    create.put(0, 0, Content::Bytes(header.emit().to_vec()));
    create.put(0, name_offset, Content::Bytes(name.to_owned().into_bytes()));
    Ok(create)
}
