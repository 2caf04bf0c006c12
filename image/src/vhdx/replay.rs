//! Replaying the log of a VHDX that was not closed ([MS-VHDX] 2.3).
//!
//! Order guarded: first the active sequence is found (the valid run of entries with the highest
//! sequence number whose head's tail lies in the run), then its entries are applied from tail
//! to head. An image that may be written gets the changes in place, durable before the header
//! says that the log is empty; one that is read-only gets an overlay, and the file is left alone.
//! It keeps its place between calls. It must never trust an entry whose checksum, signatures
//! and sequence numbers do not all hold, nor let one change the headers or the log itself.

use alloc::boxed::Box;
use alloc::vec::Vec;

use crate::fault::{FaultKind, ImageFault};
use crate::format::Ctx;
use crate::meta::{BLOCK_BYTES, Phase};
use crate::types::{FileNo, Step};

use super::crc::Crc;
use super::header::{
    DISK_BYTES_MAX, Guid, HEADER_BYTES, Header, REGION_OFFSETS, guid_at, u32_at, u64_at,
};

/// Bytes of a log sector; descriptors in one, and how many of them the entry's header takes.
pub(super) const SECTOR: u64 = 4096;
pub(super) const DESCRIPTORS: u64 = 128;
pub(super) const HEADER_DESCRIPTORS: u64 = 2;
/// Longest file that a log may tell of (ours): twice the largest disk.
const FILE_BYTES_MAX: u64 = 2 * DISK_BYTES_MAX;
/// Most bytes that a log may zero (ours): some of the longest BAT, which has half a GiB.
const ZERO_BYTES_MAX: u64 = 4 << 30;
/// Changes kept for a read-only image (ours: a log of 1 MiB holds 254).
const PATCHES_MAX: usize = 4096;

/// Sectors that hold an entry's header and descriptors.
pub(super) fn descriptor_sectors(count: u64) -> u64 {
    (count + HEADER_DESCRIPTORS).div_ceil(DESCRIPTORS)
}

/// A change of the log that a read-only image sees.
pub(super) struct Patch {
    offset: u64,
    len: u64,
    /// Byte of the data sector in the file, `None` for zeros.
    data: Option<u64>,
    /// What the data sector's own fields cover.
    leading: [u8; 8],
    trailing: [u8; 4],
}

/// The changes of a log, later ones last.
pub(super) struct Overlay {
    patches: Vec<Patch>,
}

impl Overlay {
    /// Reads within one cache block, through the overlay.
    pub fn get(&self, ctx: &mut Ctx, file: FileNo, offset: u64, into: &mut [u8]) -> Step<()> {
        let covers = |p: &&Patch| p.offset <= offset && offset - p.offset < p.len;
        let Some(patch) = self.patches.iter().rev().find(covers) else {
            return ctx.meta.get(file, offset, into);
        };
        let Some(data) = patch.data else {
            into.fill(0);
            return Ok(());
        };
        let within = (offset % SECTOR) as usize;
        ctx.meta.get(file, data + within as u64, into)?;
        for (i, byte) in into.iter_mut().enumerate() {
            match within + i {
                at @ 0..8 => *byte = patch.leading[at],
                at @ 4092.. => *byte = patch.trailing[at - 4092],
                _ => {}
            }
        }
        Ok(())
    }

    /// Does the log change any of these bytes?
    pub fn touches(&self, offset: u64, len: u64) -> bool {
        self.patches.iter().any(|p| p.offset < offset + len && offset < p.offset + p.len)
    }
}

/// The head of an entry ([MS-VHDX] 2.3.1.1), its fields checked one by one.
struct EntryHeader {
    sum: u32,
    sectors: u64,
    /// Log sector where the sequence begins as of this entry.
    tail: u64,
    sequence: u64,
    descriptors: u64,
    flushed_file_offset: u64,
    last_file_offset: u64,
}

impl EntryHeader {
    fn parse(b: &[u8], guid: &Guid, log_sectors: u64) -> Option<EntryHeader> {
        let length = u32_at(b, 8) as u64;
        let tail = u32_at(b, 12) as u64;
        let entry = EntryHeader {
            sum: u32_at(b, 4),
            sectors: length / SECTOR,
            tail: tail / SECTOR,
            sequence: u64_at(b, 16),
            descriptors: u32_at(b, 24) as u64,
            flushed_file_offset: u64_at(b, 48),
            last_file_offset: u64_at(b, 56),
        };
        let holds = &b[..4] == b"loge"
            && length.is_multiple_of(SECTOR)
            && (1..=log_sectors).contains(&entry.sectors)
            && tail.is_multiple_of(SECTOR)
            && entry.tail < log_sectors
            && entry.sequence > 0
            && guid_at(b, 32) == *guid
            && descriptor_sectors(entry.descriptors) <= entry.sectors;
        holds.then_some(entry)
    }
}

/// An entry being read through.
struct Scan {
    header: EntryHeader,
    start: u64,
    done: u64,
    crc: Crc,
    /// Descriptors that have a data sector.
    data: u64,
}

impl Scan {
    /// Takes the next sector; false when it breaks the entry.
    fn take(&mut self, b: &[u8]) -> bool {
        let at = self.done;
        self.done += 1;
        self.crc = if at == 0 { self.crc.with_hole(b, 4) } else { self.crc.with(b) };
        if at < descriptor_sectors(self.header.descriptors) {
            let first = if at == 0 { HEADER_DESCRIPTORS } else { 0 };
            let before = at * DESCRIPTORS;
            let end = self.header.descriptors + HEADER_DESCRIPTORS;
            return (first..DESCRIPTORS.min(end - before)).all(|n| {
                let d = &b[n as usize * 32..][..32];
                let data = &d[..4] == b"desc";
                self.data += data as u64;
                (data || &d[..4] == b"zero" && u64_at(d, 8).is_multiple_of(SECTOR))
                    && u64_at(d, 16).is_multiple_of(SECTOR)
                    && u64_at(d, 24) == self.header.sequence
            });
        }
        let sequence = (u32_at(b, 4) as u64) << 32 | u32_at(b, 4092) as u64;
        &b[..4] == b"data" && sequence == self.header.sequence
    }

    /// All sectors taken: do the checksum and the number of data sectors hold?
    fn holds(&self) -> bool {
        let data = self.header.sectors - descriptor_sectors(self.header.descriptors);
        self.crc.value() == self.header.sum && self.data == data
    }
}

/// A run of valid entries, each one's sequence number one above the last one's.
#[derive(Default)]
struct Run {
    /// Log sectors where its entries start.
    starts: Vec<u32>,
    sectors: u64,
    sequence: u64,
    tail: u64,
    flushed_file_offset: u64,
    last_file_offset: u64,
}

enum Stage {
    Find,
    /// Entry of the active sequence, descriptor, data sectors and zeroed bytes so far.
    Apply {
        entry: usize,
        descriptor: u64,
        data: u64,
        zeroed: u64,
    },
    Applied,
}

/// A replay under way.
pub(super) struct Replay {
    file: FileNo,
    guid: Guid,
    log_offset: u64,
    log_sectors: u64,
    stage: Stage,
    /// Where the run under way starts.
    from: u64,
    run: Run,
    scan: Option<Scan>,
    active: Run,
    /// Sectors read through so far: bounded, whatever the entries claim.
    work: u64,
    /// Bytes zeroed by the descriptors done.
    zeros: u64,
    buffer: Box<[u8; SECTOR as usize]>,
    overlay: Option<Overlay>,
}

impl Replay {
    pub fn new(file: FileNo, header: &Header, writable: bool) -> Replay {
        Replay {
            file,
            guid: header.log_guid,
            log_offset: header.log_offset,
            log_sectors: header.log_length as u64 / SECTOR,
            stage: Stage::Find,
            from: 0,
            run: Run::default(),
            scan: None,
            active: Run::default(),
            work: 0,
            zeros: 0,
            buffer: Box::new([0; SECTOR as usize]),
            overlay: (!writable).then_some(Overlay { patches: Vec::new() }),
        }
    }

    pub fn into_overlay(self) -> Option<Overlay> {
        self.overlay.filter(|overlay| !overlay.patches.is_empty())
    }

    /// Finds the active sequence.
    pub fn find(&mut self, ctx: &mut Ctx) -> Step<()> {
        while matches!(self.stage, Stage::Find) {
            match self.scan.take() {
                None => self.look_for_entry(ctx)?,
                Some(mut scan) => {
                    let read = self.read(ctx, scan.start + scan.done);
                    if read.is_err() {
                        self.scan = Some(scan);
                        return read;
                    }
                    self.work += 1;
                    if self.work > self.log_sectors.saturating_mul(8) {
                        let field = "VHDX log, its entries lie on each other";
                        return Err(self.corrupt(field, self.work).into());
                    }
                    if !scan.take(&self.buffer[..]) {
                        self.end_run()?;
                    } else if scan.done < scan.header.sectors {
                        self.scan = Some(scan);
                    } else if scan.holds() {
                        self.extend_run(&scan);
                    } else {
                        self.end_run()?;
                    }
                }
            }
        }
        Ok(())
    }

    fn look_for_entry(&mut self, ctx: &mut Ctx) -> Step<()> {
        let start = self.from + self.run.sectors;
        if self.run.sectors >= self.log_sectors {
            return Ok(self.end_run()?);
        }
        self.read(ctx, start)?;
        let header = EntryHeader::parse(&self.buffer[..], &self.guid, self.log_sectors);
        let follows = |h: &EntryHeader| {
            let next =
                self.run.starts.is_empty() || Some(h.sequence) == self.run.sequence.checked_add(1);
            next && self.run.sectors + h.sectors <= self.log_sectors
        };
        match header.filter(follows) {
            Some(header) => {
                self.scan = Some(Scan { header, start, done: 0, crc: Crc::new(), data: 0 });
            }
            None => self.end_run()?,
        }
        Ok(())
    }

    fn extend_run(&mut self, scan: &Scan) {
        self.run.starts.push((scan.start % self.log_sectors) as u32);
        self.run.sectors += scan.header.sectors;
        self.run.sequence = scan.header.sequence;
        self.run.tail = scan.header.tail;
        self.run.flushed_file_offset = scan.header.flushed_file_offset;
        self.run.last_file_offset = scan.header.last_file_offset;
    }

    /// The run can go no further: is it the best so far? Then on to the next place.
    fn end_run(&mut self) -> Result<(), ImageFault> {
        let mut run = core::mem::take(&mut self.run);
        self.from += run.sectors.max(1);
        let tail = run.starts.iter().position(|&start| start as u64 == run.tail);
        if let Some(tail) = tail
            && run.sequence > self.active.sequence
        {
            run.starts.drain(..tail);
            self.active = run;
        }
        if self.from < self.log_sectors {
            return Ok(());
        }
        if self.active.starts.is_empty() {
            // [MS-VHDX] 2.3.3: a log GUID promises a sequence; without one the file is corrupt, as
            // nobody knows which changes are lost. QEMU opens it as if the log were empty, and has
            // to: it sets the GUID before its first entry, and a cut between the two leaves this.
            // What was lost cannot be told from what was never begun, so that is for whoever owns
            // the image to say (`qemu-img check -r all` empties the log), and not for a server.
            return Err(self.corrupt("VHDX log, no valid sequence of entries in it", 0));
        }
        self.stage = Stage::Apply { entry: 0, descriptor: 0, data: 0, zeroed: 0 };
        Ok(())
    }

    /// Applies the active sequence; stops with `NeedFlush` when the cache is full.
    pub fn apply(&mut self, ctx: &mut Ctx) -> Step<()> {
        let size = ctx.files.size(self.file);
        let Run { flushed_file_offset, last_file_offset, .. } = self.active;
        if last_file_offset > FILE_BYTES_MAX {
            let field = "VHDX log: the file's length";
            let fault = ImageFault::limit(self.file, field, last_file_offset, FILE_BYTES_MAX);
            return Err(fault.into());
        }
        if flushed_file_offset > size {
            let field = "VHDX file, cut off: the log tells of a longer one";
            return Err(self.corrupt(field, flushed_file_offset).into());
        }
        if last_file_offset > size && self.overlay.is_none() {
            let end = last_file_offset - last_file_offset % 512;
            if end >= size.saturating_add(512) {
                ctx.meta.set(self.file, end - 512, &[0; 512], Phase::TABLE)?;
            }
        }
        ctx.files.grow(self.file, last_file_offset);
        while let Stage::Apply { entry, descriptor, .. } = self.stage {
            let Some(&start) = self.active.starts.get(entry) else {
                self.stage = Stage::Applied;
                break;
            };
            self.read(ctx, start as u64)?;
            let count = u32_at(&self.buffer[..], 24) as u64;
            if descriptor < count {
                self.apply_descriptor(ctx, start as u64, count)?;
            } else {
                let entry = entry + 1;
                self.stage = Stage::Apply { entry, descriptor: 0, data: 0, zeroed: 0 };
            }
        }
        Ok(())
    }

    fn apply_descriptor(&mut self, ctx: &mut Ctx, start: u64, count: u64) -> Step<()> {
        let Stage::Apply { entry, descriptor, data, zeroed } = self.stage else {
            panic!("applying outside of Apply");
        };
        let at = descriptor + HEADER_DESCRIPTORS;
        self.read(ctx, start + at / DESCRIPTORS)?;
        let d = &self.buffer[(at % DESCRIPTORS) as usize * 32..][..32];
        let offset = u64_at(d, 16);
        let is_data = &d[..4] == b"desc";
        let len = if is_data { SECTOR } else { u64_at(d, 8) };
        let trailing = d[4..8].try_into().expect("four bytes");
        let leading = d[8..16].try_into().expect("eight bytes");
        self.check_target(ctx, offset, len)?;
        let zeros = if is_data { 0 } else { len };
        if self.zeros + zeros > ZERO_BYTES_MAX {
            let field = "VHDX log: bytes to zero";
            return Err(ImageFault::limit(self.file, field, zeros, ZERO_BYTES_MAX).into());
        }
        let source = (start + descriptor_sectors(count) + data) % self.log_sectors;
        let source = self.log_offset + source * SECTOR;
        let file = self.file;
        if let Some(overlay) = &mut self.overlay {
            if overlay.patches.len() >= PATCHES_MAX {
                let fault = ImageFault::new(FaultKind::ReadOnly, file, LONG_LOG);
                return Err(fault.into());
            }
            let data = is_data.then_some(source);
            overlay.patches.push(Patch { offset, len, data, leading, trailing });
        } else if is_data {
            self.read(ctx, start + descriptor_sectors(count) + data)?;
            self.buffer[..8].copy_from_slice(&leading);
            self.buffer[4092..].copy_from_slice(&trailing);
            ctx.meta.create(file, offset, Phase::TABLE)?;
            ctx.meta.put(file, offset, &self.buffer[..], Phase::TABLE);
        } else if zeroed < len {
            ctx.meta.create(file, offset + zeroed, Phase::TABLE)?;
            self.stage = Stage::Apply { entry, descriptor, data, zeroed: zeroed + BLOCK_BYTES };
            return Ok(());
        }
        let data = data + is_data as u64;
        self.zeros += zeros;
        self.stage = Stage::Apply { entry, descriptor: descriptor + 1, data, zeroed: 0 };
        Ok(())
    }

    /// May the log change this stretch?
    fn check_target(&self, ctx: &Ctx, offset: u64, len: u64) -> Result<(), ImageFault> {
        let end = offset.checked_add(len);
        let log_end = self.log_offset + self.log_sectors * SECTOR;
        let inside = end.is_some_and(|end| end <= ctx.files.size(self.file));
        let in_log = end.is_some_and(|end| offset < log_end && self.log_offset < end);
        if offset < REGION_OFFSETS[0] || !inside || in_log {
            return Err(self.corrupt("VHDX log descriptor's file offset", offset));
        }
        Ok(())
    }

    /// Reads a log sector, counted from the log's start and around its end.
    fn read(&mut self, ctx: &mut Ctx, sector: u64) -> Step<()> {
        let offset = self.log_offset + sector % self.log_sectors * SECTOR;
        ctx.meta.get(self.file, offset, &mut self.buffer[..])
    }

    fn corrupt(&self, field: &'static str, value: u64) -> ImageFault {
        ImageFault::corrupt(self.file, field, self.log_offset, value)
    }
}

const LONG_LOG: &str = "the VHDX log holds more changes than are kept beside a read-only file; \
                        open it for writing once";

const _: () = assert!(HEADER_BYTES as u64 == SECTOR && BLOCK_BYTES == SECTOR);
