//! VDI (VirtualBox): one map of blocks behind the header, blocks taken from the end.
//!
//! Orders guarded here: the header's count of blocks is durable before a map entry uses a block
//! (VirtualBox and QEMU take the next block from that count); the rest is that of
//! [`append`](crate::append). Before the first write the map is [scanned](scan), since after a cut
//! the count may be too high, and the image's modification UUID changes.
//!
//! A differencing image names its parent by UUID only. VirtualBox knows the file from its
//! registry; here it is the name after `parent=` in the image's comment (as platter creates
//! it), else `{UUID}.vdi` beside the image, VirtualBox's own name for the files it makes.
//! Whatever the name, the parent's UUID must be the one asked for.

mod create;
mod header;
mod resize;
mod scan;

use alloc::boxed::Box;
use alloc::string::{String, ToString};

use self::header::{HEADER_BYTES, Header, Kind, at};
use self::scan::Scan;
use crate::append::{Added, Checker, Entry, FirstWrite, Part, Shape, Space, Table, Writer};
use crate::check::{CheckParams, CheckProgress};
use crate::create::random;
use crate::fault::ImageFault;
use crate::files::Access;
use crate::format::{AnyLayer, Ctx, Format, Found, Inspect, Layer, OpenedLayer, Parent, read_only};
use crate::info::Details;
use crate::meta::Phase;
use crate::types::{DiscardPlan, FileNo, ResizePlan, SECTOR_BYTES, SectorRange, Step, WritePlan};
pub(crate) use create::create;

/// Map entries: nothing here, and reads as zeros.
const FREE: u32 = 0xffff_ffff;
const ZERO: u32 = 0xffff_fffe;

struct BlockMap {
    file: FileNo,
    header: Header,
}

/// What only a writable layer has.
struct Writing {
    writer: Writer,
    first: FirstWrite,
    /// Until it is done and the space is known.
    scan: Option<Box<Scan>>,
    space: Option<Space>,
    /// Map entries beyond the disk that are known to be free, for growing.
    free_to: u64,
    /// A longer map that is being made.
    moving: Option<resize::Moving>,
}

pub(crate) struct Vdi {
    map: BlockMap,
    writing: Option<Box<Writing>>,
    check: Option<Box<Checker>>,
}

impl BlockMap {
    fn entry_at(&self, block: u64) -> u64 {
        self.header.map_offset + block * 4
    }

    /// One more than the highest block that an entry may name: while a map is being moved, blocks
    /// lie behind all that the disk has.
    fn blocks_end(&self) -> u32 {
        self.header.blocks.max(self.header.allocated)
    }

    /// Entries that fit before the data.
    fn entries_max(&self) -> u64 {
        (self.header.data_offset - self.header.map_offset) / 4
    }
}

impl Shape for BlockMap {
    const ENTRY_BYTES: u64 = 4;

    fn file(&self) -> FileNo {
        self.file
    }

    fn cluster_bytes(&self) -> u64 {
        self.header.block_bytes
    }

    fn sectors(&self) -> u64 {
        self.header.disk_bytes / SECTOR_BYTES
    }

    fn table_clusters(&self) -> u64 {
        u64::from(self.header.blocks).max(1)
    }

    fn locate(&self, _ctx: &mut Ctx, cluster: u64) -> Step<Table> {
        Ok(Table::At { entry: self.entry_at(cluster), copy: None })
    }

    fn entry(&self, ctx: &mut Ctx, at: u64) -> Step<Entry> {
        let value = ctx.meta.get_u32_le(self.file, at)?;
        match value {
            FREE => Ok(Entry::Absent),
            ZERO => Ok(Entry::Zero),
            _ => {
                // Two u32 and a block count of at most 2^30: far from overflow.
                let offset = self.header.data_offset + u64::from(value) * self.header.block_bytes;
                if value >= self.blocks_end() || offset >= ctx.files.size(self.file) {
                    let field = "a block map entry";
                    return Err(ImageFault::corrupt(self.file, field, at, value.into()).into());
                }
                Ok(Entry::Data(offset))
            }
        }
    }

    fn encode(&self, offset: u64) -> [u8; 8] {
        let block = (offset - self.header.data_offset) / self.header.block_bytes;
        block.to_le_bytes()
    }

    fn zero_entry(&self) -> Option<[u8; 8]> {
        Some(u64::from(ZERO).to_le_bytes())
    }

    fn table_bytes(&self) -> u64 {
        0
    }

    fn fixed(&self) -> [(u64, u64); 4] {
        // The header and the map lie before the origin.
        [(0, self.header.data_offset), (0, 0), (0, 0), (0, 0)]
    }

    fn unit_bytes(&self) -> u64 {
        self.header.block_bytes
    }

    fn origin(&self) -> u64 {
        self.header.data_offset
    }

    fn add_table(&self, _ctx: &mut Ctx, _space: &mut Space, _cluster: u64) -> Step<Added> {
        unreachable!("a block map is never missing")
    }
}

impl Vdi {
    pub fn open(ctx: &mut Ctx, file: FileNo, access: Access) -> Step<OpenedLayer> {
        let mut bytes = [0; HEADER_BYTES];
        ctx.read(file, 0, &mut bytes)?;
        let header = Header::parse(file, &bytes)?;
        let map_end = header.map_offset + u64::from(header.blocks) * 4;
        let size = ctx.files.size(file);
        if map_end > size {
            let field = "cBlocks, with a map beyond the end of the file,";
            let blocks = header.blocks.into();
            return Err(ImageFault::corrupt(file, field, at::BLOCKS, blocks).into());
        }
        let parent = (header.kind == Kind::Differencing).then(|| Parent {
            name: match header::parent_name(&bytes) {
                Some(name) => name.to_string(),
                None => registry_name(header.link),
            },
            format: Some(Format::Vdi),
        });
        let writing = (access == Access::ReadWrite).then(|| {
            Box::new(Writing {
                writer: Writer::new(),
                first: FirstWrite::new(true),
                scan: Some(Box::new(Scan::new())),
                space: None,
                free_to: 0,
                moving: None,
            })
        });
        let layer = AnyLayer::Vdi(Vdi { map: BlockMap { file, header }, writing, check: None });
        Ok(OpenedLayer { layer, parent })
    }

    fn part(&self) -> Part {
        let has_parent = self.map.header.kind == Kind::Differencing;
        Part { unit: 0, base_sector: 0, has_parent }
    }

    /// The writable side, once all that must come before a first write is durable.
    fn first_write(&mut self, ctx: &mut Ctx) -> Step<(&mut BlockMap, &mut Writing)> {
        let map = &mut self.map;
        let file = map.file;
        let Some(writing) = &mut self.writing else {
            return Err(read_only(file, "the image is open read-only").into());
        };
        if let Some(scan) = &mut writing.scan {
            writing.space = Some(scan.step(ctx, map)?);
            writing.scan = None;
        }
        writing.first.pass(ctx, |ctx| {
            let old = map.header.modify as u64;
            let (a, b) = (random(ctx.seed ^ old, 0), random(ctx.seed ^ old, 1));
            map.header.modify = random_uuid(a, b);
            let modify = map.header.modify.to_le_bytes();
            ctx.meta.set(file, at::MODIFY, &modify, Phase::BEFORE)
        })?;
        Ok((map, writing))
    }
}

/// A random UUID (RFC 4122, version 4) in the byte order of VDI.
fn random_uuid(a: u64, b: u64) -> u128 {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&a.to_le_bytes());
    bytes[8..].copy_from_slice(&b.to_le_bytes());
    bytes[7] = bytes[7] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    u128::from_le_bytes(bytes)
}

/// The name that VirtualBox gives the file of an image with this UUID.
fn registry_name(uuid: u128) -> String {
    let bytes = uuid.to_le_bytes();
    let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let first = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    let node = bytes[10..].iter().fold(0u64, |node, &b| node << 8 | u64::from(b));
    let clock = u16::from_be_bytes([bytes[8], bytes[9]]);
    alloc::format!(
        "{{{first:08x}-{:04x}-{:04x}-{clock:04x}-{node:012x}}}.vdi",
        u16_at(4),
        u16_at(6)
    )
}

impl Layer for Vdi {
    fn sectors(&self) -> u64 {
        self.map.sectors()
    }

    fn map(&mut self, ctx: &mut Ctx, range: SectorRange) -> Step<(Found, u64)> {
        self.map.map(ctx, range)
    }

    fn prepare(&mut self, ctx: &mut Ctx, slot: u16, range: SectorRange) -> Step<WritePlan> {
        let part = self.part();
        let (map, writing) = self.first_write(ctx)?;
        ctx.meta.reserve(map.file, at::ALLOCATED)?;
        let space = writing.space.as_mut().expect("the map is scanned");
        let plan = writing.writer.prepare(ctx, (&*map, space, part), slot, range)?;
        let end = (space.next() - map.header.data_offset) / map.header.block_bytes;
        if end != u64::from(map.header.allocated) {
            // At most the number of blocks: the space ends there.
            map.header.allocated = end as u32;
            // Its block is resident still: preparing a plan loads nothing once it succeeds.
            let count = map.header.allocated.to_le_bytes();
            ctx.meta.put(map.file, at::ALLOCATED, &count, Phase::BEFORE);
        }
        Ok(plan)
    }

    fn commit(&mut self, ctx: &mut Ctx, slot: u16) {
        let writing = self.writing.as_mut().expect("a plan of a writable layer");
        writing.writer.commit(ctx, &self.map, slot);
    }

    fn abandon(&mut self, ctx: &mut Ctx, slot: u16) {
        let writing = self.writing.as_mut().expect("a plan of a writable layer");
        let space = writing.space.as_mut().expect("the map is scanned");
        writing.writer.abandon(ctx, (&self.map, space), slot);
    }

    fn discard(&mut self, ctx: &mut Ctx, range: SectorRange, zero: bool) -> Step<DiscardPlan> {
        let part = self.part();
        let (map, writing) = self.first_write(ctx)?;
        writing.writer.discard(ctx, (&*map, part), range, zero)
    }

    fn identity(&self) -> Option<u128> {
        Some(self.map.header.uuid)
    }

    fn accepts_parent(&self, identity: Option<u128>) -> bool {
        identity == Some(self.map.header.link)
    }

    fn flushed(&mut self, _ctx: &mut Ctx, ok: bool) {
        if let Some(writing) = &mut self.writing {
            writing.first.flushed(ok);
        }
    }

    fn resize(&mut self, ctx: &mut Ctx, sectors: u64) -> Step<ResizePlan> {
        self.grow(ctx, sectors)
    }

    fn details(&self) -> Details {
        let header = &self.map.header;
        Details {
            variant: match header.kind {
                Kind::Dynamic => "dynamic",
                Kind::Static => "static",
                Kind::Differencing => "differencing",
            },
            cluster_bytes: header.block_bytes,
            figures: alloc::vec![("cBlocksAllocated", header.allocated.into())],
            ..Details::default()
        }
    }
}

impl Inspect for Vdi {
    fn check_begin(&mut self, _ctx: &mut Ctx, params: CheckParams) -> Result<(), ImageFault> {
        self.check = Some(Box::new(Checker::new(params)));
        Ok(())
    }

    fn check_step(&mut self, ctx: &mut Ctx) -> Step<CheckProgress> {
        let check = self.check.as_mut().expect("a check was begun");
        if !check.step(ctx, &self.map)? {
            return Ok(check.progress(self.map.clusters()));
        }
        let mut report = core::mem::take(&mut check.report);
        self.check = None;
        let header = &self.map.header;
        let used = report.end_bytes.saturating_sub(header.data_offset) / header.block_bytes;
        if used > header.allocated.into() {
            let field = "cBlocksAllocated, below the last block in use,";
            let allocated = header.allocated.into();
            report.corrupt(ImageFault::corrupt(self.map.file, field, at::ALLOCATED, allocated));
        }
        Ok(CheckProgress::Done(report))
    }
}
