//! A VHDX whose checksums hold whatever its fields say: the input is the file's sectors that are
//! not zeros, and headers, region tables and log entries get their CRCs before it is opened, so
//! that a changed field is seen by what stands behind the checksum. With the script's last bit the
//! sectors are changes of a differencing image, whose parent lies beside it.

use std::sync::OnceLock;

use platter_image::{Access, Backing, CreateParams, Format, Options};
use platter_tool::engine::Engine;
use platter_tool::medium::RamFolder;

use crate::exercise;

/// Bytes of a record of an input: a sector's number (16 bits), then the sector.
const RECORD_BYTES: usize = 2 + 512;
/// Sectors of the file: the header, the log, the BAT and the metadata, a MiB each, and blocks.
const SECTORS_MAX: usize = 24 << 11;
/// Where headers and region tables stand, and how long each is ([MS-VHDX] 2.2).
const HEADERS: [usize; 2] = [64 << 10, 128 << 10];
const HEADER_BYTES: usize = 4 << 10;
const REGION_TABLES: [usize; 2] = [192 << 10, 256 << 10];
const REGION_TABLE_BYTES: usize = 64 << 10;
/// Log entries begin at multiples of this (2.3.1).
const LOG_UNIT: usize = 4 << 10;
/// Bytes of log entries that are summed for one input.
const SUMMED_BYTES_MAX: usize = 2 << 20;

/// The last ten bytes of an input: the file's length in sectors, and the script.
pub fn vhdx(input: &[u8]) {
    let Some((rest, script)) = input.split_last_chunk::<8>() else { return };
    let Some((records, sectors)) = rest.split_last_chunk::<2>() else { return };
    let sectors = usize::from(u16::from_le_bytes(*sectors)).min(SECTORS_MAX);
    let family = (script[7] & 0x80 != 0).then(family);
    let mut file = family.map_or(Vec::new(), |(_, child)| child.clone());
    file.resize(sectors * 512, 0);
    for record in records.chunks_exact(RECORD_BYTES) {
        let at = usize::from(u16::from_le_bytes([record[0], record[1]])) * 512;
        if let Some(sector) = file.get_mut(at..at + 512) {
            sector.copy_from_slice(&record[2..]);
        }
    }
    seal(&mut file);
    let parent = family.map(|(parent, _)| (PARENT, &parent[..]));
    exercise("vhdx", file, parent, script);
}

const PARENT: &str = "p.vhdx";

/// A parent with something in it, and a child of it with some sectors of its own.
fn family() -> &'static (Vec<u8>, Vec<u8>) {
    static FAMILY: OnceLock<(Vec<u8>, Vec<u8>)> = OnceLock::new();
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
        let folder = RamFolder::new();
        let open = |name: &str, file: Vec<u8>| {
            folder.put(name, file);
            let (format, access) = (Format::Vhdx, Access::ReadWrite);
            let options =
                Options { format, access, allow_names: true, budget_bytes: 128 << 10, seed: 7 };
            Engine::open(&folder, name, options).expect("a plain image")
        };
        let mut engine = open(PARENT, crate::made(&params));
        engine.write(0, &[1; 8192]).expect("a write");
        let (format, sectors) = (Format::Vhdx, params.sectors);
        let identity = engine.image().identity();
        engine.close().expect("a flush");
        let backing = Some(Backing { name: PARENT, format, identity, sectors });
        let mut engine = open("top", crate::made(&CreateParams { backing, seed: 2, ..params }));
        engine.write(8, &[2; 4096]).expect("a write");
        engine.close().expect("a flush");
        let bytes = |name: &str| folder.bytes(name).expect("it was put there");
        (bytes(PARENT), bytes("top"))
    })
}

fn seal(file: &mut [u8]) {
    for (at, len) in HEADERS.map(|at| (at, HEADER_BYTES)) {
        seal_at(file, at, len);
    }
    for (at, len) in REGION_TABLES.map(|at| (at, REGION_TABLE_BYTES)) {
        seal_at(file, at, len);
    }
    let mut left = SUMMED_BYTES_MAX;
    for header in HEADERS {
        if let Some((start, len)) = log_of(file, header) {
            seal_log(&mut file[start..start + len], &mut left);
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")) as usize
}

/// Where a header says that the log is, if that lies in the file.
fn log_of(file: &[u8], header: usize) -> Option<(usize, usize)> {
    let header = file.get(header..header + 80)?;
    let len = u32_at(header, 68);
    let start = u64::from_le_bytes(header[72..].try_into().expect("eight bytes"));
    let start = usize::try_from(start).ok()?;
    (start.checked_add(len)? <= file.len() && len >= LOG_UNIT).then_some((start, len))
}

/// The checksum lies at byte 4 of every structure, over which it counts as zeros.
fn seal_at(file: &mut [u8], at: usize, len: usize) {
    let Some(bytes) = file.get_mut(at..at + len) else { return };
    bytes[4..8].fill(0);
    let sum = crc32c(&mut bytes.iter().copied());
    bytes[4..8].copy_from_slice(&sum.to_le_bytes());
}

/// Entries may run over the log's end to its start.
fn seal_log(log: &mut [u8], left: &mut usize) {
    let units = log.len() / LOG_UNIT;
    for at in (0..units).map(|unit| unit * LOG_UNIT) {
        let len = u32_at(log, at + 8);
        if &log[at..at + 4] != b"loge" || len > log.len() || len > *left || len < 64 {
            continue;
        }
        *left -= len;
        log[at + 4..at + 8].fill(0);
        let sum = crc32c(&mut log[at..].iter().chain(log.iter()).take(len).copied());
        log[at + 4..at + 8].copy_from_slice(&sum.to_le_bytes());
    }
}

/// CRC-32C, by a table.
fn crc32c(bytes: &mut dyn Iterator<Item = u8>) -> u32 {
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
    let step = |sum: u32, byte: u8| sum >> 8 ^ TABLE[usize::from(sum as u8 ^ byte)];
    !bytes.fold(!0, step)
}
