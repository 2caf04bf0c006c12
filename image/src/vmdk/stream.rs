//! A streamOptimized VMDK, laid out as it is written once from front to end (VMware Virtual Disk
//! Format 5.0, "Stream-Optimized Compressed Sparse Extents"): header, descriptor, compressed
//! grains behind markers, each grain table after its grains, the directory, a footer with the
//! real header, an end marker.
//!
//! The caller compresses (zlib) and writes; here is only where what goes. Memory: one grain
//! table and the directory, 4 bytes for each 32 MiB of the disk.

use alloc::format;
use alloc::vec::Vec;

use super::create::{
    DESCRIPTOR_SECTORS, GRAIN_BYTES, SPARSE_SECTORS_MAX, TABLE_ENTRIES, check_name, describe,
};
use super::descriptor::NO_PARENT;
use super::header::{
    FLAG_COMPRESSED, FLAG_MARKERS, FLAG_NEWLINES, GD_AT_END, MARKER_FOOTER, Sparse,
};
use crate::create::{CreateFault, CreateParams, Wanted};
use crate::types::SECTOR_BYTES;

/// What a marker without data announces.
const MARKER_TABLE: u32 = 1;
const MARKER_DIRECTORY: u32 = 2;
/// First sector of a grain: behind header and descriptor, at a grain's multiple.
const OVERHEAD_SECTORS: u64 = GRAIN_BYTES / SECTOR_BYTES;
/// Version of VMDKs with compressed grains.
const VERSION: u32 = 3;

/// A new streamOptimized image. Append what each call gives, in the order of the calls: `start`,
/// `grain` for grains in ascending order, `finish`.
#[derive(Debug)]
pub struct VmdkStream {
    header: Sparse,
    text: Vec<u8>,
    /// Entries of the grain table under way, and which table it is.
    table: Vec<u32>,
    table_index: u64,
    directory: Vec<u32>,
    /// Where the next byte goes.
    sector: u64,
    next_grain: u64,
    out: Vec<u8>,
}

impl VmdkStream {
    /// Plans an image of `params.sectors`; options: `adapter_type`, `hwversion`.
    pub fn new(params: &CreateParams) -> Result<VmdkStream, CreateFault> {
        let mut wanted = Wanted::new(params.options);
        // What `create` would be told for the other kinds.
        let _ = wanted.text("subformat");
        let adapter = wanted.text("adapter_type").unwrap_or("lsilogic");
        let version = wanted.text("hwversion").unwrap_or("4");
        wanted.finish()?;
        let plain = |text: &str| text.bytes().all(|b| b.is_ascii_alphanumeric());
        if params.backing.is_some() || !plain(adapter) || !plain(version) {
            return Err(CreateFault::new("a streamOptimized VMDK has no backing file"));
        }
        if params.cluster_bytes != 0 && params.cluster_bytes != GRAIN_BYTES {
            return Err(CreateFault::new("a streamOptimized VMDK has grains of 64 KiB"));
        }
        if params.sectors == 0 || params.sectors > SPARSE_SECTORS_MAX {
            return Err(CreateFault::new("a sparse VMDK extent holds less than 2 TiB"));
        }
        let line = format!("RW {} SPARSE \"{}\"\n", params.sectors, check_name(params.name)?);
        let parent = format!("parentCID={NO_PARENT:08x}\n");
        let text = describe(params, "streamOptimized", &parent, &line, (adapter, version));
        if text.len() as u64 > DESCRIPTOR_SECTORS * SECTOR_BYTES {
            return Err(CreateFault::new("the names are too long for the descriptor"));
        }
        let header = Sparse {
            version: VERSION,
            flags: FLAG_NEWLINES | FLAG_COMPRESSED | FLAG_MARKERS,
            sectors: params.sectors,
            grain_sectors: GRAIN_BYTES / SECTOR_BYTES,
            descriptor: (SECTOR_BYTES, DESCRIPTOR_SECTORS * SECTOR_BYTES),
            table_entries: TABLE_ENTRIES,
            directory: 0,
            redundant: 0,
            is_compressed: true,
            is_unclean: false,
        };
        let tables = header.directory_entries() as usize;
        Ok(VmdkStream {
            header,
            text: text.into_bytes(),
            table: alloc::vec![0; TABLE_ENTRIES as usize],
            table_index: 0,
            directory: alloc::vec![0; tables],
            sector: OVERHEAD_SECTORS,
            next_grain: 0,
            out: Vec::new(),
        })
    }

    /// Bytes of a grain; the last one of a disk is filled up with zeros.
    pub fn grain_bytes(&self) -> usize {
        GRAIN_BYTES as usize
    }

    /// The front of the file.
    pub fn start(&mut self) -> &[u8] {
        self.out.clear();
        let mut first = self.header.emit(OVERHEAD_SECTORS);
        first[56..64].copy_from_slice(&GD_AT_END.to_le_bytes());
        self.out.extend(first);
        self.out.extend(&self.text);
        self.out.resize((OVERHEAD_SECTORS * SECTOR_BYTES) as usize, 0);
        &self.out
    }

    /// Grain number `grain`, above all before it, as a zlib stream. Grains left out are zeros.
    pub fn grain(&mut self, grain: u64, packed: &[u8]) -> Result<&[u8], CreateFault> {
        let grains = self.header.sectors.div_ceil(self.header.grain_sectors);
        assert!(grain >= self.next_grain && grain < grains, "grains come in ascending order");
        assert!(packed.len() as u64 <= 2 * GRAIN_BYTES && !packed.is_empty(), "a zlib stream");
        self.out.clear();
        if grain / TABLE_ENTRIES != self.table_index {
            self.end_table();
            self.table_index = grain / TABLE_ENTRIES;
        }
        let sector = self.sector + self.out.len() as u64 / SECTOR_BYTES;
        let entry = u32::try_from(sector)
            .map_err(|_| CreateFault::new("the image would be longer than 2 TiB"))?;
        self.table[(grain % TABLE_ENTRIES) as usize] = entry;
        self.out.extend((grain * self.header.grain_sectors).to_le_bytes());
        self.out.extend((packed.len() as u32).to_le_bytes());
        self.out.extend(packed);
        self.next_grain = grain + 1;
        Ok(self.given())
    }

    /// The back of the file.
    pub fn finish(&mut self) -> &[u8] {
        self.out.clear();
        self.end_table();
        let sectors = (self.directory.len() as u64 * 4).div_ceil(SECTOR_BYTES);
        self.marker(sectors, MARKER_DIRECTORY);
        self.header.directory = (self.sector * SECTOR_BYTES) + self.out.len() as u64;
        for entry in &self.directory {
            self.out.extend(entry.to_le_bytes());
        }
        self.pad();
        self.marker(1, MARKER_FOOTER);
        let footer = self.header.emit(OVERHEAD_SECTORS);
        self.out.extend(footer);
        // The end of the stream is a marker of zeros.
        self.out.extend([0; SECTOR_BYTES as usize]);
        self.given()
    }

    /// Puts the table under way, if it names any grain.
    fn end_table(&mut self) {
        if self.table.iter().all(|&entry| entry == 0) {
            return;
        }
        self.marker(TABLE_ENTRIES * 4 / SECTOR_BYTES, MARKER_TABLE);
        let sector = self.sector + self.out.len() as u64 / SECTOR_BYTES;
        // Grains before it have sector numbers of 32 bits; it is a sector or two further.
        self.directory[self.table_index as usize] = sector as u32;
        for entry in &mut self.table {
            self.out.extend(core::mem::take(entry).to_le_bytes());
        }
    }

    fn marker(&mut self, sectors: u64, kind: u32) {
        self.pad();
        let start = self.out.len();
        self.out.extend(sectors.to_le_bytes());
        self.out.extend(0u32.to_le_bytes());
        self.out.extend(kind.to_le_bytes());
        self.out.resize(start + SECTOR_BYTES as usize, 0);
    }

    fn pad(&mut self) {
        let len = self.out.len().next_multiple_of(SECTOR_BYTES as usize);
        self.out.resize(len, 0);
    }

    /// Whole sectors, and the place moved on.
    fn given(&mut self) -> &[u8] {
        self.pad();
        self.sector += self.out.len() as u64 / SECTOR_BYTES;
        &self.out
    }
}
