//! A qcow2 image with compressed clusters, laid out as it is written once from front to end
//! (docs/interop/qcow2): room for the header, the clusters packed without gaps, each L2 table
//! after its clusters, then the L1 table, the refcount table and the refcount blocks.
//!
//! Order guarded: the header is given last, when all that it names has its place; until it is
//! written the file is no qcow2. The caller compresses and writes; here is only
//! where what goes. Memory: one L2 table, the L1 table, and 2 bytes for each cluster of the file.

use alloc::vec::Vec;

use crate::create::{CreateFault, CreateParams, Wanted};

use super::create::header;
use super::entry::{COMPRESSED, COPIED};
use super::header::{Header, L1_BYTES_MAX, REFTABLE_BYTES_MAX};

/// Refcounts of 16 bits: a cluster holds fewer packed ones than they count.
const REFCOUNT_ORDER: u32 = 4;

/// A new qcow2 image with compressed clusters. Append what each call gives, in the order of the
/// calls: `start`, `cluster` for clusters in ascending order, `finish`; then write what `header`
/// gives at the file's start.
#[derive(Debug)]
pub struct Qcow2Stream {
    header: Header,
    /// Entries of the L2 table under way, and which table it is.
    table: Vec<u64>,
    table_index: u64,
    directory: Vec<u64>,
    /// Of each cluster of the file.
    refcounts: Vec<u16>,
    /// Where the next byte goes.
    at: u64,
    next_cluster: u64,
    out: Vec<u8>,
}

impl Qcow2Stream {
    /// Plans an image of `params.sectors`; options: those of qcow2 that such an image can have.
    pub fn new(params: &CreateParams) -> Result<Qcow2Stream, CreateFault> {
        let mut wanted = Wanted::new(params.options);
        let (mut header, metadata) = header(params, &mut wanted)?;
        wanted.finish()?;
        if params.backing.is_some() || header.data_file() || metadata {
            let why = "a compressed image has no backing file, data file or preallocation";
            return Err(CreateFault::new(why));
        }
        if header.extended_l2() || header.refcount_order != REFCOUNT_ORDER {
            let why = "a compressed image is made without extended_l2, with refcount_bits=16";
            return Err(CreateFault::new(why));
        }
        let (bits, l2_bits) = (header.cluster_bits, header.l2_bits());
        let tables = header.size_bytes.div_ceil(1 << (bits + l2_bits));
        if tables * 8 > L1_BYTES_MAX {
            return Err(CreateFault::new("the L1 table would be larger than 32 MiB"));
        }
        header.l1_entries = tables as u32;
        Ok(Qcow2Stream {
            header,
            table: alloc::vec![0; 1 << l2_bits],
            table_index: 0,
            directory: alloc::vec![0; tables as usize],
            refcounts: Vec::new(),
            at: 0,
            next_cluster: 0,
            out: Vec::new(),
        })
    }

    /// Clusters are packed by zstd, else by raw deflate.
    pub fn is_zstd(&self) -> bool {
        self.header.zstd
    }

    /// Bytes of a cluster; the last one of a disk is filled up with zeros.
    pub fn cluster_bytes(&self) -> usize {
        1 << self.header.cluster_bits
    }

    /// The front of the file: room for the header.
    pub fn start(&mut self) -> &[u8] {
        self.out.clear();
        let room = alloc::vec![0; self.cluster_bytes()];
        self.put(&room);
        self.given()
    }

    /// Cluster number `cluster`, above all before it: if `packed`, compressed and shorter than a
    /// cluster, else all its bytes. Clusters left out are zeros.
    pub fn cluster(&mut self, cluster: u64, bytes: &[u8], packed: bool) -> &[u8] {
        let clusters = self.header.size_bytes.div_ceil(self.cluster_bytes() as u64);
        assert!(cluster >= self.next_cluster && cluster < clusters, "they come in ascending order");
        let whole = self.cluster_bytes();
        assert!(if packed { (1..whole).contains(&bytes.len()) } else { bytes.len() == whole });
        self.out.clear();
        let entries = self.table.len() as u64;
        if cluster / entries != self.table_index {
            self.end_table();
            self.table_index = cluster / entries;
        }
        let entry = if packed {
            let offset = self.at + self.out.len() as u64;
            // Sectors that it reaches into after its first.
            let more = (offset % 512 + bytes.len() as u64 - 1) / 512;
            COMPRESSED | more << (62 - (self.header.cluster_bits - 8)) | offset
        } else {
            self.align() | COPIED
        };
        self.table[(cluster % entries) as usize] = entry;
        self.put(bytes);
        self.next_cluster = cluster + 1;
        self.given()
    }

    /// The back of the file.
    pub fn finish(&mut self) -> Result<&[u8], CreateFault> {
        self.out.clear();
        self.end_table();
        self.header.l1_offset = self.align();
        let l1: Vec<u8> = self.directory.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        // A disk without sectors has a table too.
        self.put(if l1.is_empty() { &[0; 8] } else { &l1 });
        self.header.reftable_offset = self.align();
        let bits = self.header.cluster_bits;
        let (used, per_block) = (self.header.reftable_offset >> bits, 1u64 << (bits - 1));
        let (mut blocks, mut tables) = (1, 1);
        // Each round only makes room for the last one's: it settles at once.
        loop {
            let needed = (used + blocks + tables).div_ceil(per_block);
            let needed = (needed, (needed * 8).div_ceil(1 << bits));
            if needed == (blocks, tables) {
                break;
            }
            (blocks, tables) = needed;
        }
        if tables << bits > REFTABLE_BYTES_MAX {
            return Err(CreateFault::new("the refcount table would be larger than 8 MiB"));
        }
        self.header.reftable_clusters = tables as u32;
        let first = self.header.reftable_offset + (tables << bits);
        let table: Vec<u8> =
            (0..blocks).flat_map(|n| (first + (n << bits)).to_be_bytes()).collect();
        self.put(&table);
        self.align();
        self.refcounts.resize((used + blocks + tables) as usize, 1);
        let counts: Vec<u8> = self.refcounts.iter().flat_map(|count| count.to_be_bytes()).collect();
        self.out.extend(counts);
        self.align();
        Ok(self.given())
    }

    /// What stands at the start of a file that is complete.
    pub fn header(&self) -> Vec<u8> {
        let mut bytes = self.header.emit();
        // The end of the extensions.
        bytes.extend([0; 8]);
        bytes
    }

    /// Puts the table under way, if it names any cluster.
    fn end_table(&mut self) {
        if self.table.iter().all(|&entry| entry == 0) {
            return;
        }
        let offset = self.align();
        let bytes: Vec<u8> =
            self.table.iter_mut().flat_map(|e| core::mem::take(e).to_be_bytes()).collect();
        self.put(&bytes);
        self.directory[self.table_index as usize] = offset | COPIED;
    }

    /// Goes on at a cluster's start: where it is.
    fn align(&mut self) -> u64 {
        let end = (self.at + self.out.len() as u64).next_multiple_of(self.cluster_bytes() as u64);
        self.out.resize((end - self.at) as usize, 0);
        end
    }

    /// Bytes that the clusters they lie in are counted for.
    fn put(&mut self, bytes: &[u8]) {
        let (start, bits) = (self.at + self.out.len() as u64, self.header.cluster_bits);
        self.out.extend_from_slice(bytes);
        let last = (start + bytes.len() as u64 - 1) >> bits;
        self.refcounts.resize(self.refcounts.len().max(last as usize + 1), 0);
        for count in &mut self.refcounts[(start >> bits) as usize..=last as usize] {
            *count += 1;
        }
    }

    fn given(&mut self) -> &[u8] {
        self.at += self.out.len() as u64;
        &self.out
    }
}
