//! blkif: block requests and responses as bytes, for both x86 layouts.
//!
//! Guards the copy-once and allegation-then-proof rules for block requests: everything here
//! works on private copies of ring slots and indirect pages, and what `parse` returns has had
//! every field proved against [`Limits`]. Layouts: Xen public/io/blkif.h. Must never: touch
//! shared memory, accept a value it did not check, panic on any input.
//!
//! All sector numbers on the wire count 512-byte units, whatever `sector-size` says
//! (blkif.h since Xen 4.18; Linux always).

use heapless::Vec;

use crate::Gref;

/// The unit of `sectors`, `sector_number`, `first_sect` and `last_sect` (blkif.h).
pub const SECTOR_BYTES: u32 = 512;
/// `BLKIF_MAX_SEGMENTS_PER_REQUEST` (blkif.h).
pub const SEGMENTS_DIRECT_MAX: usize = 11;
/// The most that may be advertised in `feature-max-indirect-segments`; blkback's
pub const SEGMENTS_INDIRECT_MAX: usize = 256;
/// `BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST` (blkif.h).
pub const INDIRECT_PAGES_MAX: usize = 8;
/// Segment descriptors in one indirect page: 4096 / 8.
pub const SEGMENTS_PER_INDIRECT_PAGE: usize = 512;
/// Bytes of one segment descriptor: gref u32, first u8, last u8, padding u16.
pub const SEGMENT_BYTES: usize = 8;
/// Bytes of the larger request layout; the smaller one uses a prefix.
pub const REQUEST_BYTES_MAX: usize = 112;
/// Bytes of the larger response layout.
pub const RESPONSE_BYTES_MAX: usize = 16;
/// Last 512-byte sector of a page.
const LAST_SECT_MAX: u8 = 7;

/// `BLKIF_OP_*` (blkif.h).
pub mod op {
    pub const READ: u8 = 0;
    pub const WRITE: u8 = 1;
    pub const WRITE_BARRIER: u8 = 2;
    pub const FLUSH_DISKCACHE: u8 = 3;
    pub const DISCARD: u8 = 5;
    pub const INDIRECT: u8 = 6;
}

/// `VDISK_*`, the bits of `info` (blkif.h).
pub mod info {
    pub const CDROM: u32 = 1;
    pub const REMOVABLE: u32 = 2;
    pub const READONLY: u32 = 4;
}

/// `BLKIF_DISCARD_SECURE` (blkif.h): ignored unless `discard-secure` was advertised.
const DISCARD_SECURE: u8 = 1;

/// One slot's private copy. Bytes beyond the layout's request size are zero.
pub type RawRequest = [u8; REQUEST_BYTES_MAX];

/// How a frontend's compiler laid the structures out. A native x86-64 frontend is `X86_64`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Abi {
    X86_64,
    X86_32,
}

impl Abi {
    /// From the frontend's `protocol` node. A missing node means 32-bit, as in Linux blkback,
    /// tapback and QEMU; an unknown word is refused.
    pub fn from_protocol(protocol: Option<&[u8]>) -> Option<Abi> {
        match protocol {
            None | Some(b"x86_32-abi") => Some(Abi::X86_32),
            Some(b"x86_64-abi" | b"native") => Some(Abi::X86_64),
            Some(_) => None,
        }
    }

    /// The word for the `protocol` node (public/io/protocols.h).
    pub const fn protocol(self) -> &'static str {
        match self {
            Abi::X86_64 => "x86_64-abi",
            Abi::X86_32 => "x86_32-abi",
        }
    }

    /// Bytes of a request, which is also the stride of ring slots.
    pub const fn request_bytes(self) -> usize {
        match self {
            Abi::X86_64 => 112,
            Abi::X86_32 => 108,
        }
    }

    /// Bytes of a response, padding included.
    pub const fn response_bytes(self) -> usize {
        match self {
            Abi::X86_64 => 16,
            Abi::X86_32 => 12,
        }
    }

    const fn fields(self) -> Fields {
        match self {
            Abi::X86_64 => {
                Fields { id: 8, sector: 16, segments: 24, nr_sectors: 24, handle: 24, grefs: 28 }
            }
            Abi::X86_32 => {
                Fields { id: 4, sector: 12, segments: 20, nr_sectors: 20, handle: 20, grefs: 24 }
            }
        }
    }
}

/// Byte offsets that differ between the layouts. Common to both: operation at 0; nr_segments,
/// discard flag and indirect_op at 1; handle and the indirect nr_segments (u16) at 2.
struct Fields {
    id: usize,
    sector: usize,
    segments: usize,
    /// Of a discard.
    nr_sectors: usize,
    /// Of an indirect request.
    handle: usize,
    /// Of an indirect request.
    grefs: usize,
}

/// `BLKIF_RSP_*` (blkif.h).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    Okay,
    Error,
    Unsupported,
}

impl Status {
    pub const fn wire(self) -> i16 {
        match self {
            Status::Okay => 0,
            Status::Error => -1,
            Status::Unsupported => -2,
        }
    }
}

/// What a disk allows; requests are proved against it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Size of the disk in 512-byte sectors.
    pub capacity_sectors: u64,
    /// The advertised `sector-size`: 512 to 4096, a power of two. Requests must be aligned to it.
    pub sector_bytes: u32,
    pub read_only: bool,
    /// Most segments of an indirect request; 0 when indirect requests are not advertised.
    pub indirect_segments_max: u16,
    /// FLUSH and WRITE_BARRIER are advertised.
    pub flush: bool,
    /// DISCARD is advertised.
    pub discard: bool,
}

/// A granted piece of a page: sectors `first_sect..=last_sect`, proved `first <= last < 8`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    pub gref: Gref,
    pub first_sect: u8,
    pub last_sect: u8,
}

impl Segment {
    /// A placeholder for tables.
    pub const EMPTY: Segment = Segment { gref: Gref(0), first_sect: 0, last_sect: 0 };

    /// Length in 512-byte sectors, 1 to 8.
    pub fn sectors(self) -> u32 {
        u32::from(self.last_sect - self.first_sect) + 1
    }

    /// Byte offset in the granted page.
    pub fn offset_bytes(self) -> u16 {
        u16::from(self.first_sect) * SECTOR_BYTES as u16
    }

    /// Length in bytes, 512 to 4096.
    pub fn len_bytes(self) -> u16 {
        (self.sectors() * SECTOR_BYTES) as u16
    }

    /// Parses one 8-byte descriptor of a private copy.
    fn parse(bytes: &[u8], unit: u8) -> Result<Segment, BadRequest> {
        let (Some(gref), Some(&first), Some(&last)) =
            (u32_at(bytes, 0), bytes.get(4), bytes.get(5))
        else {
            return Err(BadRequest::IndirectShort);
        };
        if last > LAST_SECT_MAX {
            return Err(BadRequest::SegmentBeyondPage);
        }
        if first > last {
            return Err(BadRequest::SegmentEmpty);
        }
        if first % unit != 0 || (last + 1) % unit != 0 {
            return Err(BadRequest::Unaligned);
        }
        Ok(Segment { gref: Gref(gref), first_sect: first, last_sect: last })
    }

    fn emit(self, into: &mut [u8]) {
        into[..4].copy_from_slice(&self.gref.0.to_le_bytes());
        into[4] = self.first_sect;
        into[5] = self.last_sect;
        into[6..SEGMENT_BYTES].fill(0);
    }
}

/// A proved run of sectors with the pages that hold its bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Transfer {
    /// First 512-byte sector of the disk.
    pub sector: u64,
    /// Length in 512-byte sectors: the sum over `segments`.
    pub sectors: u32,
    pub segments: Vec<Segment, SEGMENTS_DIRECT_MAX>,
}

/// What an indirect request does; nothing else may be indirect (blkback).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IndirectOp {
    Read,
    Write,
}

/// An indirect request whose segment pages have not been read yet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Indirect {
    pub operation: IndirectOp,
    /// First 512-byte sector; not yet proved to fit, the length is unknown.
    pub sector: u64,
    /// 1 to [`Limits::indirect_segments_max`].
    pub nr_segments: u16,
    /// The pages that hold the descriptors, as many as `nr_segments` needs.
    pub grefs: Vec<Gref, INDIRECT_PAGES_MAX>,
}

impl Indirect {
    /// Bytes of descriptors in all pages together: what must be copied before
    /// [`Indirect::parse_segments`].
    pub fn descriptor_bytes(&self) -> usize {
        usize::from(self.nr_segments) * SEGMENT_BYTES
    }

    /// Proves the descriptors from `copy`, a private copy of the first
    /// [`descriptor_bytes`](Self::descriptor_bytes) of the pages, into `into`.
    /// Returns the length of the transfer in 512-byte sectors.
    pub fn parse_segments(
        &self,
        copy: &[u8],
        limits: &Limits,
        into: &mut [Segment],
    ) -> Result<u32, BadRequest> {
        let count = usize::from(self.nr_segments);
        if count > into.len() {
            return Err(BadRequest::SegmentsTooMany);
        }
        let mut sectors = 0u32;
        for (index, slot) in into.iter_mut().take(count).enumerate() {
            let at = index * SEGMENT_BYTES;
            let bytes = copy.get(at..at + SEGMENT_BYTES).ok_or(BadRequest::IndirectShort)?;
            *slot = Segment::parse(bytes, limits.unit())?;
            // At most 65535 * 8: cannot overflow.
            sectors += slot.sectors();
        }
        limits.prove_range(self.sector, u64::from(sectors))?;
        Ok(sectors)
    }
}

/// A request whose every field is proved, [`Indirect`] excepted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request {
    Read(Transfer),
    Write(Transfer),
    /// Earlier writes durable, then these, then durable. May have no segments.
    WriteBarrier(Transfer),
    /// A flush; with segments: flush, then write them (QEMU, blkback).
    Flush(Transfer),
    Discard {
        sector: u64,
        sectors: u64,
        secure: bool,
    },
    Indirect(Indirect),
}

impl Request {
    /// Proves a private copy of a slot.
    pub fn parse(raw: &RawRequest, abi: Abi, limits: &Limits) -> Result<Request, BadRequest> {
        match raw[0] {
            op::READ => Ok(Request::Read(parse_transfer(raw, abi, limits, 1)?)),
            op::WRITE => {
                limits.prove_writable()?;
                Ok(Request::Write(parse_transfer(raw, abi, limits, 1)?))
            }
            op::WRITE_BARRIER if limits.flush => {
                limits.prove_writable()?;
                Ok(Request::WriteBarrier(parse_transfer(raw, abi, limits, 0)?))
            }
            op::FLUSH_DISKCACHE if limits.flush => {
                let transfer = parse_transfer(raw, abi, limits, 0)?;
                if !transfer.segments.is_empty() {
                    limits.prove_writable()?;
                }
                Ok(Request::Flush(transfer))
            }
            op::DISCARD if limits.discard => parse_discard(raw, abi, limits),
            op::INDIRECT if limits.indirect_segments_max > 0 => parse_indirect(raw, abi, limits),
            op::WRITE_BARRIER | op::FLUSH_DISKCACHE | op::DISCARD | op::INDIRECT => {
                Err(BadRequest::NotOffered)
            }
            _ => Err(BadRequest::UnknownOperation),
        }
    }
}

impl Limits {
    /// 512-byte sectors in a sector of the disk.
    fn unit(&self) -> u8 {
        let unit = self.sector_bytes / SECTOR_BYTES;
        assert!(unit.is_power_of_two() && unit <= 8, "sector size is 512 to 4096");
        unit as u8
    }

    fn prove_writable(&self) -> Result<(), BadRequest> {
        if self.read_only { Err(BadRequest::ReadOnly) } else { Ok(()) }
    }

    fn prove_range(&self, sector: u64, sectors: u64) -> Result<(), BadRequest> {
        let end = sector.checked_add(sectors).ok_or(BadRequest::SectorOverflow)?;
        if end > self.capacity_sectors {
            return Err(BadRequest::BeyondEnd);
        }
        let unit = u64::from(self.unit());
        if !sector.is_multiple_of(unit) || !sectors.is_multiple_of(unit) {
            return Err(BadRequest::Unaligned);
        }
        Ok(())
    }
}

fn parse_transfer(
    raw: &RawRequest,
    abi: Abi,
    limits: &Limits,
    segments_min: usize,
) -> Result<Transfer, BadRequest> {
    let fields = abi.fields();
    let count = usize::from(raw[1]);
    if count > SEGMENTS_DIRECT_MAX {
        return Err(BadRequest::SegmentsTooMany);
    }
    if count < segments_min {
        return Err(BadRequest::SegmentsNone);
    }
    let sector = u64_of(raw, fields.sector);
    let mut segments = Vec::new();
    let mut sectors = 0u32;
    for bytes in raw[fields.segments..].chunks_exact(SEGMENT_BYTES).take(count) {
        let segment = Segment::parse(bytes, limits.unit())?;
        sectors += segment.sectors();
        segments.push(segment).map_err(|_| BadRequest::SegmentsTooMany)?;
    }
    if count > 0 {
        // A flush without segments carries no meaningful sector.
        limits.prove_range(sector, u64::from(sectors))?;
    }
    Ok(Transfer { sector, sectors, segments })
}

fn parse_discard(raw: &RawRequest, abi: Abi, limits: &Limits) -> Result<Request, BadRequest> {
    let fields = abi.fields();
    let sector = u64_of(raw, fields.sector);
    let sectors = u64_of(raw, fields.nr_sectors);
    limits.prove_writable()?;
    if sectors == 0 {
        return Err(BadRequest::DiscardEmpty);
    }
    limits.prove_range(sector, sectors)?;
    Ok(Request::Discard { sector, sectors, secure: raw[1] & DISCARD_SECURE != 0 })
}

fn parse_indirect(raw: &RawRequest, abi: Abi, limits: &Limits) -> Result<Request, BadRequest> {
    let fields = abi.fields();
    let operation = match raw[1] {
        op::READ => IndirectOp::Read,
        op::WRITE => IndirectOp::Write,
        _ => return Err(BadRequest::IndirectOperation),
    };
    if operation == IndirectOp::Write {
        limits.prove_writable()?;
    }
    let nr_segments = u16::from_le_bytes([raw[2], raw[3]]);
    if nr_segments == 0 {
        return Err(BadRequest::SegmentsNone);
    }
    let pages = usize::from(nr_segments).div_ceil(SEGMENTS_PER_INDIRECT_PAGE);
    if nr_segments > limits.indirect_segments_max || pages > INDIRECT_PAGES_MAX {
        return Err(BadRequest::SegmentsTooMany);
    }
    let sector = u64_of(raw, fields.sector);
    limits.prove_range(sector, 0)?;
    let mut grefs = Vec::new();
    for index in 0..pages {
        let gref = u32_at(raw, fields.grefs + index * 4).ok_or(BadRequest::SegmentsTooMany)?;
        grefs.push(Gref(gref)).map_err(|_| BadRequest::SegmentsTooMany)?;
    }
    Ok(Request::Indirect(Indirect { operation, sector, nr_segments, grefs }))
}

/// Why a request is refused. Each has a counter of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum BadRequest {
    UnknownOperation,
    /// A known operation whose feature was not advertised.
    NotOffered,
    SegmentsNone,
    SegmentsTooMany,
    /// `first_sect > last_sect`.
    SegmentEmpty,
    /// `last_sect > 7`.
    SegmentBeyondPage,
    /// Not a multiple of the advertised sector size.
    Unaligned,
    /// `sector_number + n` does not fit 64 bits.
    SectorOverflow,
    BeyondEnd,
    ReadOnly,
    DiscardEmpty,
    /// `indirect_op` is neither READ nor WRITE.
    IndirectOperation,
    /// Fewer descriptor bytes than `nr_segments` needs.
    IndirectShort,
}

impl BadRequest {
    /// All of them, in the order of their discriminants: the names of the counters.
    pub const ALL: [BadRequest; 13] = [
        BadRequest::UnknownOperation,
        BadRequest::NotOffered,
        BadRequest::SegmentsNone,
        BadRequest::SegmentsTooMany,
        BadRequest::SegmentEmpty,
        BadRequest::SegmentBeyondPage,
        BadRequest::Unaligned,
        BadRequest::SectorOverflow,
        BadRequest::BeyondEnd,
        BadRequest::ReadOnly,
        BadRequest::DiscardEmpty,
        BadRequest::IndirectOperation,
        BadRequest::IndirectShort,
    ];

    /// The counter's name.
    pub const fn name(self) -> &'static str {
        match self {
            BadRequest::UnknownOperation => "unknown-operation",
            BadRequest::NotOffered => "not-offered",
            BadRequest::SegmentsNone => "segments-none",
            BadRequest::SegmentsTooMany => "segments-too-many",
            BadRequest::SegmentEmpty => "segment-empty",
            BadRequest::SegmentBeyondPage => "segment-beyond-page",
            BadRequest::Unaligned => "unaligned",
            BadRequest::SectorOverflow => "sector-overflow",
            BadRequest::BeyondEnd => "beyond-end",
            BadRequest::ReadOnly => "read-only",
            BadRequest::DiscardEmpty => "discard-empty",
            BadRequest::IndirectOperation => "indirect-operation",
            BadRequest::IndirectShort => "indirect-short",
        }
    }

    /// What the guest is told.
    pub const fn status(self) -> Status {
        match self {
            BadRequest::UnknownOperation | BadRequest::NotOffered => Status::Unsupported,
            _ => Status::Error,
        }
    }
}

/// The `id` and the `operation` a response must repeat: for an indirect request the inner one.
pub fn response_key(raw: &RawRequest, abi: Abi) -> (u64, u8) {
    let operation = if raw[0] == op::INDIRECT { raw[1] } else { raw[0] };
    (u64_of(raw, abi.fields().id), operation)
}

/// A response. Both layouts: id at 0, operation at 8, status at 10.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Response {
    pub id: u64,
    pub operation: u8,
    /// `BLKIF_RSP_*`; anything but 0 is a failure.
    pub status: i16,
}

impl Response {
    /// The bytes of a response, padding zeroed (XSA-216); the first
    /// [`Abi::response_bytes`] of them go onto the ring.
    pub fn emit(self) -> [u8; RESPONSE_BYTES_MAX] {
        let mut bytes = [0; RESPONSE_BYTES_MAX];
        bytes[..8].copy_from_slice(&self.id.to_le_bytes());
        bytes[8] = self.operation;
        bytes[10..12].copy_from_slice(&self.status.to_le_bytes());
        bytes
    }

    /// For frontends: a private copy of a slot. Whether `id` was ever asked is theirs to check.
    pub fn parse(bytes: &[u8; RESPONSE_BYTES_MAX]) -> Response {
        let mut id = [0; 8];
        id.copy_from_slice(&bytes[..8]);
        Response {
            id: u64::from_le_bytes(id),
            operation: bytes[8],
            status: i16::from_le_bytes([bytes[10], bytes[11]]),
        }
    }
}

/// For frontends: a READ, WRITE, WRITE_BARRIER or FLUSH with at most 11 segments.
pub fn emit_transfer(
    abi: Abi,
    operation: u8,
    id: u64,
    handle: u16,
    sector: u64,
    segments: &[Segment],
) -> RawRequest {
    assert!(segments.len() <= SEGMENTS_DIRECT_MAX, "direct requests hold 11 segments");
    let fields = abi.fields();
    let mut raw = head(abi, operation, segments.len() as u8, id, sector);
    raw[2..4].copy_from_slice(&handle.to_le_bytes());
    for (segment, into) in
        segments.iter().zip(raw[fields.segments..].chunks_exact_mut(SEGMENT_BYTES))
    {
        segment.emit(into);
    }
    raw
}

/// For frontends: a DISCARD.
pub fn emit_discard(abi: Abi, id: u64, sector: u64, sectors: u64, secure: bool) -> RawRequest {
    let at = abi.fields().nr_sectors;
    let mut raw = head(abi, op::DISCARD, u8::from(secure), id, sector);
    raw[at..at + 8].copy_from_slice(&sectors.to_le_bytes());
    raw
}

/// For frontends: an indirect READ or WRITE whose descriptors lie in the pages `grefs`.
pub fn emit_indirect(
    abi: Abi,
    operation: u8,
    id: u64,
    handle: u16,
    sector: u64,
    nr_segments: u16,
    grefs: &[Gref],
) -> RawRequest {
    assert!(grefs.len() <= INDIRECT_PAGES_MAX, "8 indirect pages");
    let fields = abi.fields();
    let mut raw = head(abi, op::INDIRECT, operation, id, sector);
    raw[2..4].copy_from_slice(&nr_segments.to_le_bytes());
    raw[fields.handle..fields.handle + 2].copy_from_slice(&handle.to_le_bytes());
    for (gref, into) in grefs.iter().zip(raw[fields.grefs..].chunks_exact_mut(4)) {
        into.copy_from_slice(&gref.0.to_le_bytes());
    }
    raw
}

/// For frontends: descriptors of an indirect page; returns the bytes used.
pub fn emit_descriptors(segments: &[Segment], into: &mut [u8]) -> usize {
    let bytes = segments.len() * SEGMENT_BYTES;
    for (segment, slot) in segments.iter().zip(into[..bytes].chunks_exact_mut(SEGMENT_BYTES)) {
        segment.emit(slot);
    }
    bytes
}

fn head(abi: Abi, operation: u8, second: u8, id: u64, sector: u64) -> RawRequest {
    let fields = abi.fields();
    let mut raw = [0; REQUEST_BYTES_MAX];
    raw[0] = operation;
    raw[1] = second;
    raw[fields.id..fields.id + 8].copy_from_slice(&id.to_le_bytes());
    raw[fields.sector..fields.sector + 8].copy_from_slice(&sector.to_le_bytes());
    raw
}

/// `at` is one of [`Fields`], always inside a slot.
fn u64_of(raw: &RawRequest, at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&raw[at..at + 8]);
    u64::from_le_bytes(bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(four.try_into().ok()?))
}

#[cfg(test)]
#[path = "blkif_tests.rs"]
mod tests;
