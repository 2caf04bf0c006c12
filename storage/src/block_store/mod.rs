//! [`Store`] over block devices: whole disks, partitions, logical volumes and files on ext4.
//!
//! One block store holds all disks of the domain, because a volume group may span them; the
//! first component of a path is the disk's name. Guards: every operation taken is answered
//! once; a write smaller than a disk's block is read-modify-write, alone on its block
//! (`ops.rs`); a flush is answered when every disk that the file lies on confirmed it, and fails
//! once when a disk lost its cache with writes of this file in it; what cannot go to its device
//! now waits here in order, never in the caller. Must never: allocate on the request path, write
//! metadata, serve two images that overlap when one is writable, or one from a disk that is not
//! the one it was opened on.

#[cfg(test)]
mod away_tests;
mod doubt;
#[cfg(test)]
mod forged_tests;
mod growth;
#[cfg(test)]
mod growth_tests;
mod opening;
mod ops;
mod start;
#[cfg(test)]
mod tests;

use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::vec::Vec;

use platter_xen::Hypervisor;

use crate::bytes::Mark;
use crate::disk::{Device, Geometry, Held, SECTORS_MAX};
use crate::meta::META_BLOCKS_MAX;
use crate::pool::Pool;
use crate::store::{Access, Answer, Done, FileId, Store, StoreFault, Submit, Tag, Window};
use crate::volume::Layout;
use doubt::Doubt;
pub use growth::Growth;
use opening::{Opening, Request};
use ops::{Kind, Op, Ops};

/// Disks of the domain: a bit each in a file's mask.
pub const DISKS_MAX: usize = 32;
/// Open files (ours): images of all guests and their backing chains.
pub const FILES_MAX: usize = 512;
/// Openings that wait for their turn (ours); one runs at a time.
const OPENINGS_MAX: usize = 64;
/// Longest path, bytes (ours).
const PATH_BYTES_MAX: usize = 1024;

/// A named disk: a unit of a device.
struct Disk {
    name: String,
    device: usize,
    unit: usize,
}

struct Attached<D> {
    name: String,
    device: D,
    /// Units that have a [`Disk`].
    units: usize,
    /// Of the device, as far as files know of them.
    losses: u32,
    returns: u32,
    growth: Growth,
}

struct File {
    path: String,
    /// Its number among all openings.
    opened: u64,
    layout: Layout,
    access: Access,
    identity: u64,
    /// The file is all of this disk and follows its size.
    whole_disk: Option<u8>,
    /// One bit for each disk that it lies on.
    disks: u32,
    /// Writes answered, and how many of them were answered before a flush that succeeded began.
    writes: u64,
    flushed: u64,
    /// A device lost its cache when there were more of the former: the next flush fails, once.
    lost: bool,
    /// Its place is to be looked at anew.
    asked: bool,
    /// The change of its place that was not followed.
    not_followed: Option<&'static str>,
    /// What it was opened on: identities of its devices and of what its content names.
    source: u64,
    mark: Mark,
    doubt: Doubt,
}

/// See the module's head.
pub struct BlockStore<D> {
    pool: Pool,
    devices: Vec<Attached<D>>,
    disks: Vec<Disk>,
    files: Vec<Option<File>>,
    ops: Ops,
    /// Answers that need no operation: openings and sizes.
    answers: VecDeque<Done>,
    requests: VecDeque<Request>,
    opening: Option<Opening>,
    /// Files opened so far, and openings and looks begun.
    opened: u64,
    openings: u64,
    /// Some file is asked for its size; the next look, and at which file to begin.
    looks_asked: bool,
    next_look_ns: u64,
    look_at: usize,
    /// Some file is doubted.
    doubts: bool,
    /// When to look again for pages that backends hold, and whether some came back.
    regain_at_ns: Option<u64>,
    made_room: bool,
    /// Cache blocks of one opening; less than [`META_BLOCKS_MAX`] only in tests.
    meta_blocks_max: usize,
    /// Operations whose windows answers have given out.
    lent: Vec<u16>,
}

impl<D> BlockStore<D> {
    /// Takes `pool_pages` frames and room for `ops_max` operations (at most 4096) at once.
    /// `None` when there are not that many frames.
    pub fn new<H: Hypervisor>(
        hv: &mut H,
        pool_pages: usize,
        ops_max: usize,
    ) -> Option<BlockStore<D>> {
        Some(BlockStore {
            pool: Pool::new(hv, pool_pages)?,
            devices: Vec::new(),
            disks: Vec::with_capacity(DISKS_MAX),
            files: Vec::new(),
            ops: Ops::new(ops_max),
            answers: VecDeque::with_capacity(ops_max + OPENINGS_MAX),
            requests: VecDeque::new(),
            opening: None,
            opened: 0,
            openings: 0,
            looks_asked: false,
            next_look_ns: 0,
            look_at: 0,
            doubts: false,
            regain_at_ns: None,
            made_room: false,
            meta_blocks_max: META_BLOCKS_MAX,
            lent: Vec::with_capacity(ops_max),
        })
    }

    /// Adds a device; its units become disks called `name`, or `name` and `n` and their number.
    /// Returns the number for [`device_mut`](Self::device_mut).
    pub fn attach(&mut self, name: &str, device: D) -> usize {
        let (name, growth) = (String::from(name), Growth::default());
        self.devices.push(Attached { name, device, units: 0, losses: 0, returns: 0, growth });
        self.devices.len() - 1
    }

    /// Puts another device in the place of one that has nothing outstanding; its disks keep
    /// their names, and open files go on over it. The old one. Counts as a loss of the cache.
    pub fn replace(&mut self, index: usize, device: D) -> D {
        let attached = &mut self.devices[index];
        // A new device begins at 0.
        attached.losses = u32::MAX;
        core::mem::replace(&mut attached.device, device)
    }

    pub fn device(&self, index: usize) -> &D {
        &self.devices[index].device
    }

    /// A device and the pool, whose pages blkfront grants.
    pub fn device_mut(&mut self, index: usize) -> (&mut D, &mut Pool) {
        (&mut self.devices[index].device, &mut self.pool)
    }

    /// All devices, in the order they were attached.
    pub fn devices(&self) -> impl Iterator<Item = &D> {
        self.devices.iter().map(|attached| &attached.device)
    }

    /// How many attached devices have a name that begins with `prefix`: for naming the next.
    pub fn count_named(&self, prefix: &str) -> usize {
        self.devices.iter().filter(|attached| attached.name.starts_with(prefix)).count()
    }

    /// Whether a device is attached whose disks may still turn up under that name.
    pub fn expects(&self, name: &str) -> bool {
        let unfound = |attached: &&Attached<D>| attached.units == 0;
        self.devices.iter().filter(unfound).any(|attached| name.starts_with(&attached.name))
    }

    /// Whether a disk of that name was found: a path may begin with it.
    pub fn has_disk(&self, name: &str) -> bool {
        self.disks.iter().any(|disk| disk.name == name)
    }

    /// Names of all disks, in the order they were found.
    pub fn disk_names(&self) -> impl Iterator<Item = &str> {
        self.disks.iter().map(|disk| disk.name.as_str())
    }

    fn file(&self, file: FileId) -> Result<&File, StoreFault> {
        self.files.get(usize::from(file.0)).and_then(Option::as_ref).ok_or(StoreFault::NotFound)
    }

    fn writable(&self, file: FileId) -> Result<&File, StoreFault> {
        let file = self.file(file)?;
        if file.access == Access::ReadOnly { Err(StoreFault::ReadOnly) } else { Ok(file) }
    }

    /// Geometry of a disk.
    fn geometry<H: Hypervisor>(&self, disk: u8) -> Option<Geometry>
    where
        D: Device<H>,
    {
        let disk = self.disks.get(usize::from(disk))?;
        let geometry = self.devices.get(disk.device)?.device.geometry(disk.unit)?;
        Some(Geometry { sectors: geometry.sectors.min(SECTORS_MAX), ..geometry })
    }

    /// Whether some of a mask of disks waits for its backend.
    fn is_away<H: Hypervisor>(&self, disks: u32) -> bool
    where
        D: Device<H>,
    {
        let mut of =
            (0..).zip(&self.disks).filter(|(number, _): &(u32, _)| disks >> number & 1 == 1);
        of.any(|(_, disk)| self.devices.get(disk.device).is_some_and(|at| at.device.is_away()))
    }

    /// Names the units that devices have found since the last time.
    fn find_units<H: Hypervisor>(&mut self)
    where
        D: Device<H>,
    {
        for (index, attached) in self.devices.iter_mut().enumerate() {
            while attached.units < attached.device.units() && self.disks.len() < DISKS_MAX {
                let unit = attached.units;
                let name = match attached.device.unit_number(unit) {
                    Some(number) => alloc::format!("{}n{number}", attached.name),
                    None => attached.name.clone(),
                };
                self.disks.push(Disk { name, device: index, unit });
                attached.units += 1;
            }
        }
    }

    /// Ends the life of the windows given out.
    fn end_loans(&mut self) {
        while let Some(index) = self.lent.pop() {
            let op = self.ops.release(index);
            self.free_pages(&op);
        }
    }

    fn free_pages(&mut self, op: &Op) {
        for (first, count) in [(op.page, op.pages), (op.scratch, op.scratch_pages)] {
            let device = self.disks.get(usize::from(op.disk)).map_or(0, |disk| disk.device);
            match (count, op.held) {
                (0, _) => {}
                (_, Held::Nobody) => self.pool.give(first, usize::from(count)),
                (_, held) => {
                    self.pool.lose(first, usize::from(count), (device, held));
                    self.regain_at_ns.get_or_insert(0);
                }
            }
        }
    }

    /// The answer of a finished operation, whose window lives until the next release.
    fn answer(&mut self, index: u16) -> Done {
        let op = *self.ops.get(index);
        self.lent.push(index);
        let answer = match op.kind {
            Kind::Read | Kind::Meta => Answer::Read(self.window(&op)),
            Kind::Write | Kind::Modify => Answer::Written(op.len),
            Kind::Flush => Answer::Flushed,
            Kind::Zeroes | Kind::Discard => Answer::Punched,
        };
        Done { tag: op.tag, result: op.result.map(|()| answer) }
    }

    fn window(&self, op: &Op) -> Window {
        let len = if op.pages == 0 { 0 } else { op.len as usize };
        let run = self.pool.run(op.page, op.within as usize, len);
        Window { runs: [run, crate::Run { offset: run.offset + len, len: 0, ..run }] }
    }
}

impl<H: Hypervisor, D: Device<H>> Store<H> for BlockStore<D> {
    fn io_bytes_max(&self) -> u32 {
        (crate::pool::RUN_PAGES_MAX * platter_xen::PAGE_BYTES) as u32
    }

    fn open(&mut self, _: &mut H, tag: Tag, path: &str, access: Access) -> Result<(), StoreFault> {
        if path.is_empty() || path.len() > PATH_BYTES_MAX {
            return Err(StoreFault::BadPath);
        }
        if self.requests.len() == OPENINGS_MAX {
            return Err(StoreFault::Limit(OPENINGS_MAX as u32));
        }
        self.requests.push_back(Request { tag, path: String::from(path), access, look: None });
        Ok(())
    }

    fn close(&mut self, _: &mut H, file: FileId) {
        if let Some(slot) = self.files.get_mut(usize::from(file.0)) {
            *slot = None;
        }
    }

    fn size(&mut self, _: &mut H, tag: Tag, file: FileId) -> Result<Submit, StoreFault> {
        let whole = self.file(file)?.whole_disk;
        let sectors = whole.and_then(|disk| self.geometry::<H>(disk)).map(|it| it.sectors);
        if self.answers.len() == self.answers.capacity() {
            return Ok(Submit::NoRoom);
        }
        let slot = self.files.get_mut(usize::from(file.0)).and_then(Option::as_mut);
        let open = slot.ok_or(StoreFault::NotFound)?;
        if let Some(sectors) = sectors {
            open.layout.volume.resize_linear(sectors);
            open.layout.size_bytes = sectors.saturating_mul(512);
        }
        let result = Ok(Answer::Size(open.layout.size_bytes));
        self.answers.push_back(Done { tag, result });
        self.ask_for_look(file);
        // Nothing is cut: a size has no length.
        Ok(Submit::Taken(0))
    }

    fn read(
        &mut self,
        hv: &mut H,
        tag: Tag,
        file: FileId,
        offset: u64,
        len: u32,
    ) -> Result<Submit, StoreFault> {
        self.start_read(hv, tag, file, offset, len)
    }

    fn write(
        &mut self,
        hv: &mut H,
        tag: Tag,
        file: FileId,
        offset: u64,
        len: u32,
        fill: &mut dyn FnMut(&mut H, Window) -> bool,
    ) -> Result<Submit, StoreFault> {
        self.start_write(hv, tag, file, (offset, len), fill)
    }

    fn flush(&mut self, hv: &mut H, tag: Tag, file: FileId) -> Result<Submit, StoreFault> {
        let disks = self.file(file)?.disks;
        let mark = self.file(file)?.writes;
        let op = Op { kind: Kind::Flush, tag, file, mark, flush_left: disks, ..Op::NEW };
        let Some(index) = self.ops.take(op) else { return Ok(Submit::NoRoom) };
        self.try_start(hv, index);
        Ok(Submit::Taken(0))
    }

    fn punch(
        &mut self,
        hv: &mut H,
        tag: Tag,
        file: FileId,
        offset: u64,
        len: u64,
    ) -> Result<Submit, StoreFault> {
        self.start_range(hv, tag, file, Kind::Zeroes, (offset, len))
    }

    fn discard(
        &mut self,
        hv: &mut H,
        tag: Tag,
        file: FileId,
        offset: u64,
        len: u64,
    ) -> Result<Submit, StoreFault> {
        self.start_range(hv, tag, file, Kind::Discard, (offset, len))
    }

    fn poll_at_ns(&self) -> Option<u64> {
        let begins = self.opening.is_none() && !self.requests.is_empty();
        if !self.ops.nothing_ready() || !self.answers.is_empty() || begins {
            return Some(0);
        }
        let may_look = self.looks_asked && self.opening.is_none();
        let look_ns = may_look.then_some(self.next_look_ns);
        let devices = self.devices.iter().filter_map(|attached| attached.device.poll_at_ns());
        let devices = devices.chain(self.regain_at_ns);
        devices.chain(look_ns).chain(self.doubts_at_ns()).min()
    }

    fn poll(&mut self, hv: &mut H, now_ns: u64) -> Option<Done> {
        if self.ops.nothing_ready() {
            self.poll_devices(hv, now_ns);
            if self.regain_at_ns.is_some_and(|at_ns| at_ns <= now_ns) {
                self.regain_pages(hv, now_ns);
            }
            self.look_at_doubted::<H>(now_ns);
            self.restart_waiting(hv);
            self.look_for_growth::<H>(now_ns);
            self.advance_opening(hv);
        }
        if let Some(done) = self.answers.pop_front() {
            return Some(done);
        }
        let index = self.ops.next_ready()?;
        Some(self.answer(index))
    }

    fn release(&mut self, hv: &mut H) {
        if !self.lent.is_empty() {
            self.end_loans();
            self.restart_waiting(hv);
        }
    }

    fn made_room(&mut self) -> bool {
        core::mem::take(&mut self.made_room)
    }
}
