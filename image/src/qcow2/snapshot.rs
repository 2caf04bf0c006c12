//! Internal snapshots (docs/interop/qcow2, "Snapshots"): the table is read entry by entry, never
//! as a whole, and never written. What snapshots hold is safe from writes by its refcounts.

use alloc::string::String;
use alloc::vec;

use crate::fault::ImageFault;
use crate::format::Ctx;
use crate::info::SnapshotInfo;
use crate::types::{SECTOR_BYTES, Step};

use super::Qcow2;
use super::header::{L1_BYTES_MAX, SNAPSHOT_TABLE_BYTES_MAX};

/// Most extra data of an entry (QEMU: QCOW_MAX_SNAPSHOT_EXTRA_DATA).
const EXTRA_BYTES_MAX: u64 = 1024;
const FIXED_BYTES: u64 = 40;

/// A checked entry of the snapshot table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Snapshot {
    pub l1_offset: u64,
    pub l1_entries: u64,
    id_bytes: u64,
    name_bytes: u64,
    extra_bytes: u64,
    unix_seconds: u32,
    vm_state_bytes: u64,
    disk_bytes: Option<u64>,
}

impl Snapshot {
    /// Length of the entry, padded.
    pub fn bytes(&self) -> u64 {
        let len = FIXED_BYTES + self.extra_bytes + self.id_bytes + self.name_bytes;
        len.next_multiple_of(8)
    }
}

impl Qcow2 {
    /// The entry at `offset`, which lies in the table.
    pub(super) fn snapshot_at(&self, ctx: &mut Ctx, offset: u64) -> Step<Snapshot> {
        let max = SNAPSHOT_TABLE_BYTES_MAX;
        let within = offset - self.header.snapshots_offset;
        if within > max {
            return Err(ImageFault::limit(self.file, "the snapshot table", within, max).into());
        }
        let mut b = [0; FIXED_BYTES as usize];
        ctx.read(self.file, offset, &mut b)?;
        let u16_at = |at: usize| u64::from(u16::from_be_bytes([b[at], b[at + 1]]));
        let u32_at = |at: usize| u32::from_be_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        let mut snapshot = Snapshot {
            l1_offset: (u64::from(u32_at(0)) << 32) | u64::from(u32_at(4)),
            l1_entries: u32_at(8).into(),
            id_bytes: u16_at(12),
            name_bytes: u16_at(14),
            unix_seconds: u32_at(16),
            vm_state_bytes: u32_at(32).into(),
            extra_bytes: u32_at(36).into(),
            disk_bytes: None,
        };
        let corrupt = |field, value| ImageFault::corrupt(self.file, field, offset, value);
        if snapshot.extra_bytes > EXTRA_BYTES_MAX {
            return Err(corrupt("a snapshot's extra data size", snapshot.extra_bytes).into());
        }
        if snapshot.l1_entries * 8 > L1_BYTES_MAX {
            return Err(corrupt("a snapshot's l1_size", snapshot.l1_entries).into());
        }
        let aligned = snapshot.l1_offset.is_multiple_of(self.cluster_bytes());
        if !aligned || snapshot.l1_offset >= ctx.files.size(self.file) {
            return Err(corrupt("a snapshot's L1 table offset", snapshot.l1_offset).into());
        }
        let mut extra = [0; 16];
        let known = snapshot.extra_bytes.min(16) as usize;
        ctx.read(self.file, offset + FIXED_BYTES, &mut extra[..known])?;
        let u64_of = |b: &[u8]| u64::from_be_bytes(b.try_into().expect("eight bytes"));
        if known >= 8 {
            snapshot.vm_state_bytes = u64_of(&extra[..8]);
        }
        if known >= 16 {
            snapshot.disk_bytes = Some(u64_of(&extra[8..]));
        }
        Ok(snapshot)
    }

    /// Snapshot number `n`, found from the start of the table.
    pub(super) fn snapshot_info(&self, ctx: &mut Ctx, n: u32) -> Step<Option<SnapshotInfo>> {
        if n >= self.header.snapshots {
            return Ok(None);
        }
        let mut offset = self.header.snapshots_offset;
        for _ in 0..n {
            offset += self.snapshot_at(ctx, offset)?.bytes();
        }
        let snapshot = self.snapshot_at(ctx, offset)?;
        let names = offset + FIXED_BYTES + snapshot.extra_bytes;
        let mut text = |at: u64, len: u64| {
            let mut bytes = vec![0; len.min(1024) as usize];
            ctx.read(self.file, at, &mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        let id = text(names, snapshot.id_bytes);
        let id: Step<String> = id;
        Ok(Some(SnapshotInfo {
            id: id?,
            name: text(names + snapshot.id_bytes, snapshot.name_bytes)?,
            sectors: snapshot.disk_bytes.unwrap_or(self.header.size_bytes) / SECTOR_BYTES,
            unix_seconds: snapshot.unix_seconds.into(),
            vm_state_bytes: snapshot.vm_state_bytes,
        }))
    }

    /// Measures the snapshot table, so that writes keep off it; keeps its place between calls.
    pub(super) fn measure_snapshots(&mut self, ctx: &mut Ctx) -> Step<()> {
        while self.snapshots_measured < self.header.snapshots {
            let offset = self.header.snapshots_offset + self.snapshot_table_bytes;
            self.snapshot_table_bytes += self.snapshot_at(ctx, offset)?.bytes();
            self.snapshots_measured += 1;
        }
        Ok(())
    }
}
