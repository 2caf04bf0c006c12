//! A new QED image: a header, the name of its backing file, an empty L1 table.

use alloc::borrow::ToOwned;

use super::header::{FEATURE_BACKING_FILE, FEATURE_BACKING_RAW, HEADER_BYTES, Header};
use crate::create::{Content, Create, CreateFault, CreateParams, Wanted};
use crate::files::NAME_BYTES_MAX;
use crate::format::Format;
use crate::types::{FileNo, SECTOR_BYTES};

/// Defaults of `qemu-img create`.
const CLUSTER_BYTES: u64 = 64 << 10;
const TABLE_CLUSTERS: u64 = 4;

/// Options: `cluster_size` (as the cluster size given), `table_size` in clusters.
pub(crate) fn create(params: &CreateParams) -> Result<Create, CreateFault> {
    let mut wanted = Wanted::new(params.options);
    let table_clusters = wanted.number("table_size", TABLE_CLUSTERS)?;
    let asked = if params.cluster_bytes == 0 { CLUSTER_BYTES } else { params.cluster_bytes };
    let cluster_bytes = wanted.number("cluster_size", asked)?;
    wanted.finish()?;
    if !cluster_bytes.is_power_of_two() || !(4 << 10..=64 << 20).contains(&cluster_bytes) {
        return Err(CreateFault::new("cluster_size must be a power of two, 4 KiB to 64 MiB"));
    }
    // The specification allows 1 too, but QEMU, while it makes such images, opens none.
    if !table_clusters.is_power_of_two() || !(2..=16).contains(&table_clusters) {
        return Err(CreateFault::new("table_size must be 2, 4, 8 or 16"));
    }
    let name = params.backing.as_ref().map_or("", |backing| backing.name);
    if name.len() > NAME_BYTES_MAX {
        return Err(CreateFault::new("the name of the backing file is longer than 1023 bytes"));
    }
    let mut features = 0;
    if let Some(backing) = &params.backing {
        features |= FEATURE_BACKING_FILE;
        if backing.format == Format::Raw {
            features |= FEATURE_BACKING_RAW;
        }
    }
    let header = Header {
        cluster_bytes,
        table_bytes: table_clusters * cluster_bytes,
        header_bytes: cluster_bytes,
        features,
        autoclear: 0,
        l1_offset: cluster_bytes,
        image_bytes: params.sectors.saturating_mul(SECTOR_BYTES),
        name_offset: HEADER_BYTES as u64,
        name_bytes: name.len(),
    };
    if let Err(fault) = Header::parse(FileNo(0), &header.emit()) {
        return Err(CreateFault(alloc::format!("a disk of this size does not fit: {fault}")));
    }
    let mut create = Create::one_file(header.l1_offset + header.table_bytes);
    create.put(0, 0, Content::Bytes(header.emit().to_vec()));
    create.put(0, HEADER_BYTES as u64, Content::Bytes(name.to_owned().into_bytes()));
    Ok(create)
}
