//! Discards and zeroes: entries change at once, in the metadata cache; the clusters they named
//! are given to [`Frees`](super::refcount::Frees), which waits until that is durable.
//!
//! A discard never brings back what an older layer holds: where zeros cannot be said without
//! data (version 2 over a backing file) it does nothing.

use crate::format::Ctx;
use crate::meta::BLOCK_BYTES;
use crate::types::{DiscardPlan, FileNo, SECTOR_BYTES, SectorRange, Step, Stop};

use super::Qcow2;
use super::entry::{Cluster, L2Entry, ZERO};
use super::write::PLAN_CLUSTERS_MAX;

/// A stretch of a file to give back.
type Punch = Option<(FileNo, u64, u64)>;

impl Qcow2 {
    pub(super) fn discard_range(
        &mut self,
        ctx: &mut Ctx,
        range: SectorRange,
        zero: bool,
    ) -> Step<DiscardPlan> {
        self.before_change(ctx)?;
        let start = range.start_bytes();
        let l2_end = ((start >> self.l2_reach_bits()) + 1) << self.l2_reach_bits();
        let end = (start + range.bytes()).min(l2_end);
        let answer = |bytes: u64, punch| Ok(DiscardPlan { sectors: bytes / SECTOR_BYTES, punch });
        let unit = if self.kind.extended { self.subcluster_bytes() } else { self.cluster_bytes() };
        let l2 = self.l2(ctx, start)?;
        self.wait_for_l2(start, l2)?;
        self.check_l2(start, l2)?;
        let Some(l2) = l2 else {
            // Nothing here: zeros already, unless a layer below says otherwise.
            let done = !zero || !self.has_backing();
            return answer(if done { end - start } else { 0 }, None);
        };
        // Reading as zeros without data needs the zero flag, or nothing below.
        let can = l2.copied && !self.kind.data_file && (self.kind.v3 || !self.has_backing());
        if !can {
            return answer(if zero { 0 } else { end - start }, None);
        }
        if !start.is_multiple_of(unit) {
            let next = start.next_multiple_of(unit).min(end);
            return answer(if zero { 0 } else { next - start }, None);
        }
        let mut done = start;
        let mut punch: Punch = None;
        let first_at = self.entry_offset(l2, start);
        for _ in 0..PLAN_CLUSTERS_MAX {
            let at = self.entry_offset(l2, done);
            if done >= end || at / BLOCK_BYTES != first_at / BLOCK_BYTES {
                break;
            }
            let before = punch;
            let next = match self.discard_piece(ctx, at, (start, done, end), zero, &mut punch) {
                Ok(next) => next,
                Err(_) if done > start => break,
                Err(stop) => return Err(stop),
            };
            if next == done {
                punch = before;
                break;
            }
            done = next;
        }
        if done == start && !zero {
            // Less than a unit at the end: kept.
            done = end;
        }
        answer(done - start, punch)
    }

    /// Lets go of guest bytes `done` to at most `end` within one cluster; gives where it got
    /// to, `done` for nowhere. It reads nothing unless it is the first piece, at `start`.
    fn discard_piece(
        &mut self,
        ctx: &mut Ctx,
        at: u64,
        (start, done, end): (u64, u64, u64),
        zero: bool,
        punch: &mut Punch,
    ) -> Step<u64> {
        let size = self.cluster_bytes();
        let cluster = done & !(size - 1);
        let disk_end = self.header.size_bytes & !(SECTOR_BYTES - 1);
        let stop = end.min(cluster + size);
        if self.is_held(cluster) {
            return Err(Stop::Busy);
        }
        let entry = self.entry(ctx, at)?;
        let found = self.cluster(at, entry, done)?;
        let whole = done == cluster && (stop == cluster + size || stop == disk_end);
        if !whole {
            return match (zero, self.kind.extended) {
                (true, true) => self.zero_subclusters(ctx, at, entry, found, (done, stop)),
                (true, false) => Ok(done),
                (false, _) => Ok(stop),
            };
        }
        let new = match found {
            Cluster::Absent | Cluster::Zero { host: None, .. } if !zero => return Ok(stop),
            Cluster::Absent if !self.has_backing() => return Ok(stop),
            Cluster::Zero { host: None, .. } if !self.kind.extended => return Ok(stop),
            _ if self.kind.extended => L2Entry { word: 0, bitmap: u64::MAX << 32 },
            _ if self.kind.v3 => L2Entry { word: ZERO, bitmap: 0 },
            _ => L2Entry { word: 0, bitmap: 0 },
        };
        if let Cluster::Data { host, copied: true } = found {
            self.check_host(ctx, at, host, size)?;
            if self.may_be_table(host) {
                if done > start {
                    return Ok(done);
                }
                self.check_data(ctx, host, 1)?;
            }
            match punch {
                Some((_, offset, len)) if *offset + *len == host => *len += size,
                Some(_) => return Ok(done),
                None => *punch = Some((self.data, host, size)),
            }
        }
        if !self.writer().space.frees.room(1) {
            return Err(Stop::NeedFlush);
        }
        ctx.meta.reserve(self.file, at)?;
        self.release(ctx, at, entry, done);
        self.put_entry(ctx, at, new);
        Ok(stop)
    }

    /// Makes whole subclusters read as zeros.
    fn zero_subclusters(
        &self,
        ctx: &mut Ctx,
        at: u64,
        entry: L2Entry,
        found: Cluster,
        (done, stop): (u64, u64),
    ) -> Step<u64> {
        let size = self.subcluster_bytes();
        let disk_end = self.header.size_bytes & !(SECTOR_BYTES - 1);
        let reached = if stop == disk_end { stop } else { stop / size * size };
        if reached <= done || matches!(found, Cluster::Compressed { .. }) {
            return Ok(done);
        }
        let within = done % self.cluster_bytes();
        let (first, count) = (within / size, (reached - done).div_ceil(size));
        let bits = ((1u64 << count) - 1) << first;
        ctx.meta.reserve(self.file, at)?;
        let bitmap = entry.bitmap & !bits | bits << 32;
        self.put_entry(ctx, at, L2Entry { word: entry.word, bitmap });
        Ok(reached)
    }
}
