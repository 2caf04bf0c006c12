//! Openings: one at a time, each a run of [`resolve`] that is repeated while blocks are read.

use alloc::string::String;
use alloc::vec::Vec;

use platter_xen::Hypervisor;

use super::ops::{Kind, Op};
use super::{BlockStore, Disk, Doubt, FILES_MAX, File};
use crate::disk::{Device, Geometry};
use crate::meta::{
    Disks, META_BLOCK_BYTES, META_BLOCKS_MAX, MetaCache, MetaFault, Miss, block_sectors,
};
use crate::resolve::{Progress, Resolved, resolve};
use crate::store::{Access, Answer, Done, FileId, Opened, StoreFault, Tag};
use crate::volume::{Extent, Layout};

/// Cache blocks read at once: what follows a missing block is often wanted next.
const AHEAD_BLOCKS: u64 = 8;

/// An opening that waits for its turn.
pub struct Request {
    pub tag: Tag,
    pub path: String,
    pub access: Access,
    /// No opening, but a look at what is open.
    pub look: Option<Look>,
}

/// A look at an open file's place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Look {
    pub file: FileId,
    /// Tells the file from a later one with its number.
    pub opened: u64,
    /// Whether it is still there, and not whether it has grown.
    pub doubted: bool,
}

/// The opening that runs.
pub struct Opening {
    request: Request,
    cache: MetaCache,
    progress: Progress,
    /// Its steps when the cache was last emptied.
    steps: u64,
    /// The heap had no room for a block.
    full: bool,
    /// Its number, and the disk that it reads from just now.
    number: u64,
    reading: Option<u8>,
    fault: Option<StoreFault>,
    /// A disk came back meanwhile: nothing that was read counts.
    anew: bool,
}

impl Opening {
    pub(super) fn begin_anew(&mut self) {
        self.anew = true;
    }

    /// Room for another block. What was found stays: as long as that grows, the blocks it came
    /// from may go.
    fn make_room(&mut self) -> Result<(), StoreFault> {
        if self.cache.has_room() && !self.full {
            return Ok(());
        }
        if self.progress.steps() <= self.steps {
            return Err(StoreFault::Limit(META_BLOCKS_MAX as u32));
        }
        (self.steps, self.full) = (self.progress.steps(), false);
        self.cache.clear();
        Ok(())
    }
}

/// The disks as [`resolve`] sees them.
struct View<'a> {
    disks: &'a [Disk],
    files: &'a [Option<File>],
    geometries: Vec<Option<Geometry>>,
    cache: &'a MetaCache,
}

impl View<'_> {
    fn geometry(&self, disk: u8) -> Option<Geometry> {
        self.geometries.get(usize::from(disk)).copied().flatten()
    }
}

impl Disks for View<'_> {
    fn count(&self) -> u8 {
        self.disks.len() as u8
    }

    fn name(&self, disk: u8) -> &str {
        self.disks.get(usize::from(disk)).map_or("", |disk| &disk.name)
    }

    fn sectors(&self, disk: u8) -> u64 {
        self.geometry(disk).map_or(0, |geometry| geometry.sectors)
    }

    fn block_bytes(&self, disk: u8) -> u32 {
        self.geometry(disk).map_or(512, |geometry| geometry.block_bytes)
    }

    fn read(&self, disk: u8, offset: u64, into: &mut [u8]) -> Result<(), MetaFault> {
        let end = offset.checked_add(into.len() as u64).ok_or(StoreFault::BeyondEnd)?;
        if end > self.sectors(disk).saturating_mul(512) {
            return Err(StoreFault::BeyondEnd.into());
        }
        self.cache.read(disk, offset, into)
    }

    fn is_written(&self, disk: u8, sector: u64, sectors: u64) -> bool {
        let written = self.files.iter().flatten().filter(|file| file.access == Access::ReadWrite);
        written.flat_map(|file| file.layout.volume.areas()).any(|area| {
            area.disk == disk
                && area.sector < sector.saturating_add(sectors)
                && sector < area.sector.saturating_add(area.sectors)
        })
    }
}

impl<D> BlockStore<D> {
    /// Runs the opening whose turn it is until it misses a block or ends.
    pub(super) fn advance_opening<H: Hypervisor>(&mut self, hv: &mut H)
    where
        D: Device<H>,
    {
        if self.opening.is_none() {
            let Some(request) = self.requests.pop_front() else { return };
            self.openings += 1;
            self.opening = Some(Opening {
                request,
                cache: MetaCache::new(self.meta_blocks_max),
                progress: Progress::default(),
                steps: 0,
                full: false,
                number: self.openings,
                reading: None,
                fault: None,
                anew: false,
            });
        }
        self.give_up_read::<H>();
        let Some(mut opening) = self.opening.take_if(|it| it.reading.is_none()) else { return };
        if core::mem::take(&mut opening.anew) {
            (opening.fault, opening.steps, opening.full) = (None, 0, false);
            opening.progress = Progress::default();
            opening.cache.clear();
        }
        let count = self.disks.len() as u8;
        // What is away is not there: nobody's opening waits for it.
        let is_there = |disk: &u8| !self.is_away::<H>(1 << disk);
        let geometry = |disk| Some(disk).filter(is_there).and_then(|disk| self.geometry::<H>(disk));
        let geometries = (0..count).map(geometry).collect();
        let (disks, files) = (&self.disks, &self.files);
        let view = View { disks, files, geometries, cache: &opening.cache };
        let request = &opening.request;
        let resolved = match opening.fault {
            Some(fault) => Err(fault.into()),
            None => resolve(&view, &request.path, request.access, &mut opening.progress),
        };
        let geometries = view.geometries;
        let resolved = match resolved {
            Ok(resolved) => Ok(resolved),
            Err(MetaFault::Refused(fault)) => Err(fault),
            Err(MetaFault::Miss(miss)) => match opening.make_room() {
                Err(fault) => Err(fault),
                Ok(()) => {
                    let geometry = geometries.get(usize::from(miss.disk)).copied().flatten();
                    self.opening = Some(opening);
                    return self.read_meta(hv, miss, geometry);
                }
            },
        };
        let Request { tag, path, access, look } = opening.request;
        match look {
            Some(look) if look.doubted => return self.judge::<H>(look, resolved),
            Some(look) => return self.looked(look, resolved, &geometries),
            None => {}
        }
        let entered =
            resolved.and_then(|found| self.enter_file::<H>(found, path, access, &geometries));
        self.answers.push_back(Done { tag, result: entered.map(Answer::Opened) });
    }

    /// A read whose disk went away is not waited for: others want to be opened too.
    fn give_up_read<H: Hypervisor>(&mut self)
    where
        D: Device<H>,
    {
        let disk = self.opening.as_ref().and_then(|opening| opening.reading);
        if !disk.is_some_and(|disk| self.is_away::<H>(1 << disk)) {
            return;
        }
        self.openings += 1;
        if let Some(opening) = &mut self.opening {
            (opening.number, opening.reading) = (self.openings, None);
            opening.fault = Some(StoreFault::Gone);
        }
    }

    /// Starts reading a missing block, or leaves it for the next poll when there is no room.
    fn read_meta<H: Hypervisor>(&mut self, hv: &mut H, miss: Miss, disk: Option<Geometry>)
    where
        D: Device<H>,
    {
        let Some(opening) = &mut self.opening else { return };
        let capacity = disk.map_or(0, |geometry| geometry.sectors);
        let most = disk.map_or(0, |geometry| geometry.io_bytes_max / META_BLOCK_BYTES as u32);
        let Some((sector, mut sectors)) = block_sectors(miss, capacity) else {
            opening.fault = Some(StoreFault::BeyondEnd);
            return;
        };
        for block in 1..AHEAD_BLOCKS.min(u64::from(most)) {
            let next = Miss { block: miss.block + block, ..miss };
            match block_sectors(next, capacity) {
                Some((_, more)) if !opening.cache.has(miss.disk, next.block) => sectors += more,
                _ => break,
            }
        }
        let (len, mark) = (sectors * 512, opening.number);
        let op = Op { kind: Kind::Meta, mark, disk: miss.disk, sector, sectors, len, ..Op::NEW };
        let Some(index) = self.enter(op) else {
            if let Some(opening) = self.opening.as_mut().filter(|_| self.ops.is_empty()) {
                opening.fault = Some(StoreFault::Limit(self.pool.free_pages() as u32));
            }
            return;
        };
        if let Some(opening) = &mut self.opening {
            opening.reading = Some(miss.disk);
        }
        self.try_start(hv, index);
    }

    /// A metadata read came back.
    pub(super) fn finish_meta<H: Hypervisor>(&mut self, hv: &mut H, index: u16) {
        let op = self.ops.cancel(index);
        // Another one may run by now.
        if let Some(opening) = self.opening.as_mut().filter(|it| it.number == op.mark) {
            opening.reading = None;
            opening.fault = op.result.err();
            let mut block = [0; META_BLOCK_BYTES];
            let bytes = op.len as usize;
            for (number, at) in (0..bytes).step_by(META_BLOCK_BYTES).enumerate() {
                if op.result.is_err() || !opening.cache.has_room() {
                    break;
                }
                let take = META_BLOCK_BYTES.min(bytes - at);
                let run = self.pool.run(op.page, at, take);
                hv.read(run.region, run.offset, &mut block[..take]);
                let first = op.sector * 512 / META_BLOCK_BYTES as u64;
                let miss = Miss { disk: op.disk, block: first + number as u64 };
                if !opening.cache.fill(miss, &block[..take]) {
                    opening.full = true;
                    break;
                }
            }
        }
        self.free_pages(&op);
    }

    /// Makes a file of what was found.
    fn enter_file<H: Hypervisor>(
        &mut self,
        found: Resolved,
        path: String,
        access: Access,
        geometries: &[Option<Geometry>],
    ) -> Result<Opened, StoreFault>
    where
        D: Device<H>,
    {
        if access == Access::ReadWrite && !found.writable {
            return Err(StoreFault::ReadOnly);
        }
        let clash = self.files.iter().flatten().any(|other| {
            let writes = access == Access::ReadWrite || other.access == Access::ReadWrite;
            writes && other.identity != found.identity && overlap(&other.layout, &found.layout)
        });
        if clash {
            return Err(StoreFault::Refused(
                "it overlaps another open image, and one of the two is open for writing",
            ));
        }
        let slot = match self.files.iter().position(Option::is_none) {
            Some(slot) => slot,
            None if self.files.len() < FILES_MAX => {
                self.files.push(None);
                self.files.len() - 1
            }
            None => return Err(StoreFault::Limit(FILES_MAX as u32)),
        };
        let disks = found.layout.volume.disks();
        let under = (0..).zip(geometries).filter(|(disk, _)| disks >> disk & 1 == 1);
        let under = || under.clone().filter_map(|(_, geometry)| *geometry);
        let large = under().any(|geometry| geometry.block_bytes > 512);
        let block_bytes = if large { 4096 } else { 512 };
        let writes = access == Access::ReadWrite;
        let can_punch = writes && under().all(|geometry| geometry.zeroes_sectors_max > 0);
        if writes && under().any(|geometry| geometry.read_only) {
            return Err(StoreFault::ReadOnly);
        }
        let whole_disk = found.whole_disk.then(|| disks.trailing_zeros() as u8);
        let (size_bytes, identity) = (found.layout.size_bytes, found.identity);
        let (layout, mark) = (found.layout, found.mark);
        let source = self.source_of::<H>(disks);
        self.opened += 1;
        self.files[slot] = Some(File {
            path,
            opened: self.opened,
            layout,
            access,
            identity,
            whole_disk,
            disks,
            writes: 0,
            flushed: 0,
            lost: false,
            asked: false,
            not_followed: None,
            source,
            mark,
            doubt: Doubt::None,
        });
        let file = FileId(slot as u16);
        Ok(Opened { file, size_bytes, block_bytes, can_grow: false, can_punch, identity })
    }
}

/// Whether two layouts share a sector of a disk. Files of one volume are compared by extents,
/// everything else by the areas of the volumes: a file and the disk under it do overlap.
pub(super) fn overlap(one: &Layout, other: &Layout) -> bool {
    if one.volume == other.volume
        && let (Some(one), Some(other)) = (&one.extents, &other.extents)
    {
        return extents_overlap(one, other);
    }
    one.volume.areas().any(|a| {
        other.volume.areas().any(|b| {
            a.disk == b.disk && a.sector < b.sector + b.sectors && b.sector < a.sector + a.sectors
        })
    })
}

fn extents_overlap(one: &[Extent], other: &[Extent]) -> bool {
    let sorted = |extents: &[Extent]| {
        let mut runs: Vec<(u64, u64)> =
            extents.iter().map(|extent| (extent.sector, extent.sectors)).collect();
        runs.sort_unstable();
        runs
    };
    let (one, other) = (sorted(one), sorted(other));
    let mut others = other.iter().peekable();
    for &(start, len) in &one {
        while others.peek().is_some_and(|&&(at, length)| at + length <= start) {
            others.next();
        }
        if others.peek().is_some_and(|&&(at, _)| at < start + len) {
            return true;
        }
    }
    false
}
