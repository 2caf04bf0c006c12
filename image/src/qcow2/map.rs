//! From guest sectors to host bytes, through the L1 and L2 tables.

use crate::fault::ImageFault;
use crate::format::{Codec, Ctx, Found, Packed};
use crate::meta::BLOCK_BYTES;
use crate::types::{SECTOR_BYTES, SectorRange, Step};

use super::Qcow2;
use super::entry::{COPIED, Cluster, L2Entry, OFFSET};

/// Clusters joined into one piece of a map at most: bounds the work of one step.
const JOIN_MAX: u32 = 256;

/// An L2 table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct L2 {
    pub offset: u64,
    /// Only the active L1 table points at it: it may be changed in place.
    pub copied: bool,
}

impl Qcow2 {
    /// Guest bytes that one L2 table maps, as a power of two.
    pub(super) fn l2_reach_bits(&self) -> u32 {
        self.header.l2_bits() + self.kind.cluster_bits
    }

    pub(super) fn l1_entry_offset(&self, guest: u64) -> u64 {
        // No overflow: the L1 table was checked to cover the disk and to end below 2^63.
        self.header.l1_offset + (guest >> self.l2_reach_bits()) * 8
    }

    /// The L2 table for guest byte `guest`, if there is one.
    pub(super) fn l2(&self, ctx: &mut Ctx, guest: u64) -> Step<Option<L2>> {
        let at = self.l1_entry_offset(guest);
        let word = ctx.meta.get_u64_be(self.file, at)?;
        self.checked_l2(ctx, at, word)
    }

    /// What an L1 entry read at `at` means.
    pub(super) fn checked_l2(&self, ctx: &Ctx, at: u64, word: u64) -> Step<Option<L2>> {
        let offset = word & OFFSET;
        if offset == 0 {
            return Ok(None);
        }
        if !offset.is_multiple_of(self.cluster_bytes()) || offset >= ctx.files.size(self.file) {
            return Err(ImageFault::corrupt(self.file, "an L1 entry", at, word).into());
        }
        Ok(Some(L2 { offset, copied: word & COPIED != 0 }))
    }

    /// Offset in the file of the entry for guest byte `guest` in its L2 table.
    pub(super) fn entry_offset(&self, l2: L2, guest: u64) -> u64 {
        let bits = self.header.l2_bits();
        let index = (guest >> self.kind.cluster_bits) & ((1 << bits) - 1);
        l2.offset + (index << (self.kind.cluster_bits - bits))
    }

    /// The entry at an offset in the file.
    pub(super) fn entry(&self, ctx: &mut Ctx, at: u64) -> Step<L2Entry> {
        let len = self.kind.entry_bytes() as usize;
        Ok(L2Entry::parse(ctx.meta.slice(self.file, at, len)?))
    }

    /// An entry's meaning, or which entry is wrong.
    pub(super) fn cluster(&self, at: u64, entry: L2Entry, guest: u64) -> Step<Cluster> {
        let guest = guest & !(self.cluster_bytes() - 1);
        self.kind
            .cluster(entry, guest)
            .map_err(|bad| ImageFault::corrupt(self.file, bad.0, at, entry.word).into())
    }

    pub(super) fn map_range(&mut self, ctx: &mut Ctx, range: SectorRange) -> Step<(Found, u64)> {
        let start = range.start_bytes();
        let l2_end = ((start >> self.l2_reach_bits()) + 1) << self.l2_reach_bits();
        let end = (start + range.bytes()).min(l2_end);
        let Some(l2) = self.l2(ctx, start)? else {
            return Ok((Found::Absent, (end - start) / SECTOR_BYTES));
        };
        let first = self.entry_offset(l2, start);
        let mut at = first;
        let mut found = None;
        let mut done = start;
        for _ in 0..JOIN_MAX {
            // A step that answers must not have stopped: what the block does not hold waits.
            if done >= end || at / BLOCK_BYTES != first / BLOCK_BYTES {
                break;
            }
            let entry = self.entry(ctx, at)?;
            let (piece, bytes) = match self.piece(ctx, at, entry, done) {
                Ok(piece) => piece,
                Err(_) if done > start => break,
                Err(stop) => return Err(stop),
            };
            match found {
                None => found = Some(piece),
                Some(found) if joins(found, done - start, piece) => {}
                Some(_) => break,
            }
            done += bytes;
            at = self.entry_offset(l2, done);
        }
        let found = found.expect("the range is not empty");
        Ok((found, (done.min(end) - start) / SECTOR_BYTES))
    }

    /// What lies at guest byte `guest`, and for how many bytes within its cluster.
    fn piece(&self, ctx: &Ctx, at: u64, entry: L2Entry, guest: u64) -> Step<(Found, u64)> {
        let within = guest % self.cluster_bytes();
        let rest = self.cluster_bytes() - within;
        let cluster = self.cluster(at, entry, guest)?;
        if let Cluster::Compressed { offset, bytes } = cluster {
            let packed = Packed {
                file: self.file,
                offset,
                packed_bytes: bytes,
                unpacked_bytes: self.cluster_bytes() as u32,
                skip: within as u32,
                codec: if self.header.zstd { Codec::Zstd } else { Codec::Deflate },
            };
            return Ok((Found::Packed(packed), rest));
        }
        let data = |host: u64| match host + within {
            // Never written: QEMU reads zeros there too.
            offset if offset >= ctx.files.size(self.data) => Found::Zero,
            offset => Found::Data { file: self.data, offset },
        };
        if self.kind.extended {
            let host = entry.word & OFFSET;
            let (status, bytes) = self.subclusters(entry.bitmap, within);
            return Ok(match status {
                Subcluster::Allocated => (data(host), bytes),
                Subcluster::Zero => (Found::Zero, bytes),
                Subcluster::Absent => (Found::Absent, bytes),
            });
        }
        Ok(match cluster {
            Cluster::Data { host, .. } => (data(host), rest),
            Cluster::Zero { .. } => (Found::Zero, rest),
            _ => (Found::Absent, rest),
        })
    }

    pub(super) fn subcluster_bytes(&self) -> u64 {
        self.cluster_bytes() / 32
    }

    /// The status of the subcluster at byte `within` of a cluster, and how many bytes from there
    /// share it.
    fn subclusters(&self, bitmap: u64, within: u64) -> (Subcluster, u64) {
        let size = self.subcluster_bytes();
        let first = (within / size) as u32;
        let status = Subcluster::of(bitmap, first);
        let mut next = first + 1;
        while next < 32 && Subcluster::of(bitmap, next) == status {
            next += 1;
        }
        (status, u64::from(next) * size - within)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Subcluster {
    Allocated,
    Zero,
    Absent,
}

impl Subcluster {
    pub fn of(bitmap: u64, index: u32) -> Subcluster {
        if bitmap & (1 << index) != 0 {
            Subcluster::Allocated
        } else if bitmap & (1 << (32 + index)) != 0 {
            Subcluster::Zero
        } else {
            Subcluster::Absent
        }
    }
}

/// Does `next`, `distance` bytes after `first`, continue it?
fn joins(first: Found, distance: u64, next: Found) -> bool {
    match (first, next) {
        (Found::Zero, Found::Zero) | (Found::Absent, Found::Absent) => true,
        (Found::Data { file, offset }, Found::Data { file: f, offset: o }) => {
            file == f && offset.checked_add(distance) == Some(o)
        }
        _ => false,
    }
}
