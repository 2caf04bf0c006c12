//! A VHDX whose checksums hold whatever its fields say: the input is the file's sectors that are
//! not zeros, and headers, region tables and log entries get their CRCs before it is opened, so
//! that a changed field is seen by what stands behind the checksum. With the script's last bit the
//! sectors are changes of a differencing image, whose parent lies beside it.

use std::sync::OnceLock;

use platter_image::{Access, Backing, CreateParams, Format, Options};
use platter_tool::engine::Engine;

use crate::exercise;
use crate::sparse::{Pages, SparseFolder};

/// Bytes of a record of an input: a sector's number (16 bits), then the sector.
const RECORD_BYTES: usize = 2 + 512;
/// Records of an input: an image with a log that waits has some fifty.
const RECORDS_MAX: usize = 96;
/// Sectors of the file: the header, the log, the BAT and the metadata, a MiB each, and blocks.
const SECTORS_MAX: u64 = 24 << 11;
/// Where headers and region tables stand, and how long each is ([MS-VHDX] 2.2).
const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
const HEADER_BYTES: u64 = 4 << 10;
const REGION_TABLES: [u64; 2] = [192 << 10, 256 << 10];
const REGION_TABLE_BYTES: u64 = 64 << 10;
/// A page, and the unit of the log (2.3.1).
const PAGE: u64 = 4 << 10;
/// Bytes of log entries that are summed for one input.
const SUMMED_BYTES_MAX: u64 = 256 << 10;

/// The last ten bytes of an input: the file's length in sectors, and the script.
pub fn vhdx(input: &[u8]) {
    let Some((rest, script)) = input.split_last_chunk::<8>() else { return };
    let Some((records, sectors)) = rest.split_last_chunk::<2>() else { return };
    if records.len() > RECORDS_MAX * RECORD_BYTES {
        return;
    }
    let bytes = u64::from(u16::from_le_bytes(*sectors)).min(SECTORS_MAX) * 512;
    let family = (script[7] & 0x80 != 0).then(family);
    let mut file = family.map_or(Pages::default(), |(_, child)| child.clone());
    file.set_len(bytes);
    for record in records.chunks_exact(RECORD_BYTES) {
        let at = u64::from(u16::from_le_bytes([record[0], record[1]])) * 512;
        if at < bytes {
            file.write(at, &record[2..]);
        }
    }
    seal(&mut file);
    let parent = family.map(|(parent, _)| (PARENT, parent.clone()));
    exercise("vhdx", file, parent, script);
}

const PARENT: &str = "p.vhdx";

fn open(folder: &SparseFolder, name: &str) -> Engine {
    let (format, access) = (Format::Vhdx, Access::ReadWrite);
    let options = Options { format, access, allow_names: true, budget_bytes: 128 << 10, seed: 7 };
    Engine::open(folder, name, options).expect("a plain image")
}

/// A parent with something in it, and a child of it with some sectors of its own.
fn family() -> &'static (Pages, Pages) {
    static FAMILY: OnceLock<(Pages, Pages)> = OnceLock::new();
    FAMILY.get_or_init(|| {
        let params = CreateParams {
            format: Format::Vhdx,
            name: "top",
            sectors: 3 << 11,
            cluster_bytes: 1 << 20,
            options: &[],
            backing: None,
            seed: 1,
            unix_seconds: 0,
        };
        let mut folder = SparseFolder::new(32 << 20);
        folder.put(PARENT, Pages::from_bytes(&crate::made(&params)));
        let mut engine = open(&folder, PARENT);
        engine.write(0, &[1; 8192]).expect("a write");
        let (format, sectors) = (Format::Vhdx, params.sectors);
        let identity = engine.image().identity();
        engine.close().expect("a flush");
        let backing = Some(Backing { name: PARENT, format, identity, sectors });
        let child = crate::made(&CreateParams { backing, seed: 2, ..params });
        folder.put("top", Pages::from_bytes(&child));
        let mut engine = open(&folder, "top");
        engine.write(8, &[2; 4096]).expect("a write");
        engine.close().expect("a flush");
        let pages = |name: &str| folder.get(name).expect("it was put there");
        (pages(PARENT), pages("top"))
    })
}

fn seal(file: &mut Pages) {
    for (at, len) in HEADERS.map(|at| (at, HEADER_BYTES)) {
        seal_at(file, at, len);
    }
    for (at, len) in REGION_TABLES.map(|at| (at, REGION_TABLE_BYTES)) {
        seal_at(file, at, len);
    }
    let mut left = SUMMED_BYTES_MAX;
    for header in HEADERS {
        if let Some((start, len)) = log_of(file, header) {
            seal_log(file, start, len, &mut left);
        }
    }
}

fn u32_at(file: &Pages, at: u64) -> u64 {
    let mut bytes = [0; 4];
    file.read(at, &mut bytes);
    u32::from_le_bytes(bytes).into()
}

/// Where a header says that the log is, if that lies in the file.
fn log_of(file: &Pages, header: u64) -> Option<(u64, u64)> {
    let len = u32_at(file, header + 68);
    let start = u32_at(file, header + 72) | u32_at(file, header + 76) << 32;
    (start.checked_add(len)? <= file.bytes() && len >= PAGE).then_some((start, len))
}

/// The checksum lies at byte 4 of every structure, over which it counts as zeros.
fn seal_at(file: &mut Pages, at: u64, len: u64) {
    if at + len <= file.bytes() && u32_at(file, at) != 0 {
        file.write(at + 4, &[0; 4]);
        let sum = !sum(file, at, len, !0);
        file.write(at + 4, &sum.to_le_bytes());
    }
}

/// Entries begin at multiples of a page, and may run over the log's end to its start.
fn seal_log(file: &mut Pages, start: u64, log_bytes: u64, left: &mut u64) {
    if !start.is_multiple_of(PAGE) {
        return;
    }
    let end = start + log_bytes / PAGE * PAGE;
    for at in file.held(start, end) {
        let len = u32_at(file, at + 8);
        let sums = u32_at(file, at) == u64::from(u32::from_le_bytes(*b"loge"));
        if !sums || len > log_bytes || len > *left || len < 64 {
            continue;
        }
        *left -= len;
        file.write(at + 4, &[0; 4]);
        let first = len.min(end - at);
        let state = sum(file, at, first, !0);
        let sum = !sum(file, start, len - first, state);
        file.write(at + 4, &sum.to_le_bytes());
    }
}

/// CRC-32C of a stretch, from `state` on; pages of zeros are stepped over.
fn sum(file: &Pages, at: u64, len: u64, mut state: u32) -> u32 {
    static ZEROS: OnceLock<[u32; 32]> = OnceLock::new();
    // What a page of zeros does to a state is linear: it is known from what it does to each bit.
    let zeros = ZEROS.get_or_init(|| {
        std::array::from_fn(|bit| (0..PAGE).fold(1 << bit, |state, _| step(state, 0)))
    });
    let (mut at, end) = (at, at + len);
    while at < end {
        let next = end.min((at / PAGE + 1) * PAGE);
        if next - at == PAGE && file.held(at, next).is_empty() {
            let bits = zeros.iter().enumerate().filter(|(bit, _)| state >> bit & 1 == 1);
            state = bits.fold(0, |sum, (_, image)| sum ^ image);
        } else {
            let mut bytes = [0; PAGE as usize];
            let bytes = &mut bytes[..(next - at) as usize];
            file.read(at, bytes);
            state = bytes.iter().fold(state, |state, &byte| step(state, byte));
        }
        at = next;
    }
    state
}

fn step(state: u32, byte: u8) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut n = 0;
        while n < 256 {
            let (mut value, mut bit) = (n as u32, 0);
            while bit < 8 {
                value = if value & 1 == 1 { value >> 1 ^ 0x82f6_3b78 } else { value >> 1 };
                bit += 1;
            }
            table[n] = value;
            n += 1;
        }
        table
    };
    state >> 8 ^ TABLE[usize::from(state as u8 ^ byte)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_step_over_zeros_and_hold() {
        let mut file = Pages::from_bytes(b"123456789");
        assert_eq!(!sum(&file, 0, 9, !0), 0xe306_9283);
        file.set_len(5 * PAGE);
        file.write(4 * PAGE, b"x");
        let mut bytes = vec![0; 5 * PAGE as usize];
        file.read(0, &mut bytes);
        assert_eq!(sum(&file, 0, 5 * PAGE, !0), bytes.iter().fold(!0, |s, &b| step(s, b)));
    }

    #[test]
    fn a_sealed_image_opens() {
        let (parent, child) = family();
        let mut child = child.clone();
        for at in HEADERS.into_iter().chain(REGION_TABLES) {
            child.write(at + 4, &[0xff; 4]);
        }
        seal(&mut child);
        let mut folder = SparseFolder::new(32 << 20);
        folder.put(PARENT, parent.clone());
        folder.put("top", child);
        assert_eq!(open(&folder, "top").sectors(), 3 << 11);
    }
}
