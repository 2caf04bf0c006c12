//! LVM2: linear and striped logical volumes over one or several disks, read from the text
//! metadata (lvm2 `lib/format_text/layout.h`, `lib/label/label.h`).
//!
//! Guards: labels, metadata area headers and texts are used only with their CRCs right; of
//! several copies the one with the highest `seqno` counts, and copies of one number must say the
//! same. A volume that lies over another one or over LVM's own sectors is refused. Everything
//! that is not a plain map of extents (thin, RAID, snapshots, caches, a missing physical volume)
//! is refused by name. Must never: write LVM metadata, activate, or guess a layout.

mod claims;
mod group;
mod label;
mod text;

pub use group::{Group, Member};
pub use label::{AREAS_MAX, LABEL_SECTORS, PhysicalVolume, Uuid, read_label, read_text};
pub use text::{Text, Value};

#[cfg(test)]
mod tests;
