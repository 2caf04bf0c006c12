//! Labels, physical volume headers and metadata areas: where a physical volume keeps its text.

use alloc::vec::Vec;

use crate::StoreFault;
use crate::bytes::{array_at, crc32_raw, u32_at, u64_at};
use crate::meta::{MetaFault, ReadBlocks, read_vec, reserve};

/// `INITIAL_CRC` (lvm2 `lib/misc/crc.h`).
const CRC_START: u32 = 0xF597_A6CF;
/// The label is in one of the first four sectors (`LABEL_SCAN_SECTORS`).
pub const LABEL_SECTORS: usize = 4;
const LABEL_ID: &[u8; 8] = b"LABELONE";
const LABEL_TYPE: &[u8; 8] = b"LVM2 001";
/// `FMTT_MAGIC` (`lib/format_text/layout.h`).
const AREA_MAGIC: &[u8; 16] = b"\x20LVM2\x20x[5A%r0N*>";
/// Bytes of a metadata area's header, where its ring of text begins (`MDA_HEADER_SIZE`).
const AREA_HEADER_BYTES: u64 = 512;
/// `RAW_LOCN_IGNORED`: the area holds no current text.
const LOCATION_IGNORED: u32 = 1;
/// Areas of one kind on one physical volume (ours; lvm2 makes at most two).
pub const AREAS_MAX: usize = 4;
/// Longest text (ours): lvm2's default metadata area is 1 MiB and holds two of them.
pub const TEXT_BYTES_MAX: u64 = 1 << 20;

/// Bytes of a text that tell whose it is: a name of 127 bytes and an identity of 38.
const HEAD_BYTES: u64 = 512;

/// A UUID's 32 characters without dashes.
pub type Uuid = [u8; 32];

/// What a label says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PhysicalVolume {
    pub uuid: Uuid,
    /// Metadata areas: (first byte, bytes). May be empty: `--metadatacopies 0`.
    pub areas: Vec<(u64, u64)>,
}

impl PhysicalVolume {
    /// The areas, zeros for those that are not there.
    pub fn areas_padded(&self) -> [(u64, u64); AREAS_MAX] {
        let mut padded = [(0, 0); AREAS_MAX];
        padded.iter_mut().zip(&self.areas).for_each(|(to, from)| *to = *from);
        padded
    }
}

/// Reads the label; `None` when this is not a physical volume.
pub fn read_label(device: &dyn ReadBlocks) -> Result<Option<PhysicalVolume>, MetaFault> {
    let bytes = LABEL_SECTORS as u64 * 512;
    if device.len_bytes() < bytes {
        return Ok(None);
    }
    let sectors = read_vec(device, 0, bytes as usize)?;
    let found = sectors
        .chunks_exact(512)
        .enumerate()
        .find_map(|(number, sector)| parse_label(sector, number as u64));
    Ok(found)
}

/// `struct label_header` and `struct pv_header`, which follow in the same sector.
fn parse_label(sector: &[u8], number: u64) -> Option<PhysicalVolume> {
    if sector.get(..8)? != LABEL_ID || sector.get(24..32)? != LABEL_TYPE {
        return None;
    }
    let crc_right = crc32_raw(CRC_START, sector.get(20..)?) == u32_at(sector, 16)?;
    if !crc_right || u64_at(sector, 8)? != number {
        return None;
    }
    let header = u32_at(sector, 20)? as usize;
    let uuid = array_at(sector, header)?;
    let lists = header.checked_add(40)?;
    let (_, after) = parse_areas(sector, lists)?;
    let (areas, _) = parse_areas(sector, after)?;
    Some(PhysicalVolume { uuid, areas })
}

/// A list of (offset, size) ended by zeros; also where the next list begins.
fn parse_areas(sector: &[u8], mut at: usize) -> Option<(Vec<(u64, u64)>, usize)> {
    let mut areas = Vec::new();
    loop {
        let (offset, size) = (u64_at(sector, at)?, u64_at(sector, at.checked_add(8)?)?);
        at = at.checked_add(16)?;
        if offset == 0 {
            return Some((areas, at));
        }
        if areas.len() == AREAS_MAX {
            return None;
        }
        areas.push((offset, size));
    }
}

/// The current text of a metadata area; `None` when it holds none (a new physical volume, an
/// ignored area), or none that can be used: a header or text with a wrong sum, as a torn write
/// leaves it, or longer than we read. One whose first bytes are not `wanted` is not read.
pub fn read_text(
    device: &dyn ReadBlocks,
    area: (u64, u64),
    wanted: &dyn Fn(&[u8]) -> bool,
) -> Result<Option<Vec<u8>>, MetaFault> {
    let header = match read_vec(device, area.0, AREA_HEADER_BYTES as usize) {
        Err(MetaFault::Refused(StoreFault::BeyondEnd)) => return Ok(None),
        other => other?,
    };
    let Some(location) = parse_area(&header, area.0) else { return Ok(None) };
    if location.bytes > TEXT_BYTES_MAX {
        return Ok(None);
    }
    let head = location.bytes.min(HEAD_BYTES);
    for bytes in [head, location.bytes] {
        let mut text = reserve(bytes as usize)?;
        text.resize(bytes as usize, 0);
        match location.read(device, &mut text) {
            Err(MetaFault::Refused(StoreFault::BeyondEnd)) => return Ok(None),
            other => other?,
        }
        if !wanted(text.get(..head as usize).unwrap_or(&[])) {
            return Ok(None);
        }
        if bytes == location.bytes {
            let right = crc32_raw(CRC_START, &text) == location.crc;
            return Ok(right.then_some(text));
        }
    }
    Ok(None)
}

/// Where a text stands in the ring of its area, in bytes of the device.
struct Location {
    offset: u64,
    bytes: u64,
    crc: u32,
    ring_start: u64,
    ring_end: u64,
}

impl Location {
    /// Reads its first bytes, around the ring's end.
    fn read(&self, device: &dyn ReadBlocks, text: &mut [u8]) -> Result<(), MetaFault> {
        let first = (text.len() as u64).min(self.ring_end - self.offset) as usize;
        let (first, again) = text.split_at_mut(first);
        device.read_at(self.offset, first)?;
        device.read_at(self.ring_start, again)
    }
}

/// `struct mda_header` with its first `struct raw_locn`, which names the committed text.
fn parse_area(header: &[u8], area_start: u64) -> Option<Location> {
    let crc_right = crc32_raw(CRC_START, header.get(4..)?) == u32_at(header, 0)?;
    if !crc_right || header.get(4..20)? != AREA_MAGIC || u32_at(header, 20)? != 1 {
        return None;
    }
    let (start, size) = (u64_at(header, 24)?, u64_at(header, 32)?);
    let (offset, bytes) = (u64_at(header, 40)?, u64_at(header, 48)?);
    let (crc, flags) = (u32_at(header, 56)?, u32_at(header, 60)?);
    let ring_bytes = size.checked_sub(AREA_HEADER_BYTES)?;
    let inside = offset >= AREA_HEADER_BYTES && offset < size && bytes > 0 && bytes <= ring_bytes;
    if start != area_start || !inside || flags & LOCATION_IGNORED != 0 {
        return None;
    }
    let ring_end = start.checked_add(size)?;
    let ring_start = start + AREA_HEADER_BYTES;
    Some(Location { offset: start + offset, bytes, crc, ring_start, ring_end })
}
