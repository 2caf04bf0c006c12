//! What an open image says of itself, as plain structs for tools and logs. Nothing here is
//! needed to serve a disk.

use alloc::string::String;
use alloc::vec::Vec;

use crate::format::Format;
use crate::types::FileNo;

/// One layer of a chain, the top first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LayerInfo {
    pub file: FileNo,
    pub format: Format,
    pub sectors: u64,
    /// UUID or content identifier by which a child knows it.
    pub identity: Option<u128>,
    /// The file below, as the image names it, and the format it gives.
    pub backing: Option<(String, Option<Format>)>,
    /// A remark for the owner of the file.
    pub note: Option<&'static str>,
    pub details: Details,
}

/// What a format knows beyond the common.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Details {
    /// The format's word for its kind: `v3`, `dynamic`, `monolithicSparse`, ...; empty if none.
    pub variant: &'static str,
    /// Bytes in a cluster, block or grain; 0 when the format has none.
    pub cluster_bytes: u64,
    /// Names of the features in use, in the specification's words.
    pub features: Vec<&'static str>,
    /// Numbers worth showing: name and value (`refcount_bits`, `refcount order`, ...).
    pub figures: Vec<(&'static str, u64)>,
    /// Other names: data file, extents, parent locators.
    pub names: Vec<(&'static str, String)>,
    /// Marked as not closed cleanly.
    pub dirty: bool,
    /// Marked as damaged: writes are refused.
    pub corrupt: bool,
    /// Internal snapshots.
    pub snapshots: u32,
}

/// An internal snapshot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SnapshotInfo {
    pub id: String,
    pub name: String,
    /// Sectors of the disk when it was taken.
    pub sectors: u64,
    /// Seconds since 1970.
    pub unix_seconds: u64,
    /// Bytes of saved machine state.
    pub vm_state_bytes: u64,
}
