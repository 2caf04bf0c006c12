//! What all disks share: the stores, the tables of work under way, and the bounce memory.
//! Everything is allocated once, at start.

use alloc::string::String;
use alloc::vec::Vec;

use platter_image::{BlockRef, Prepared};
use platter_storage::any::AnyDevice;
use platter_storage::{FileId, Run, Store, Submit, Tag, Window};
use platter_xen::{Hypervisor, PAGE_BYTES, Region};

use crate::fault::Fault;
use crate::job::Job;
use crate::limits::{BOUNCE_BYTES, DISKS_MAX, JOBS_MAX, OPS_MAX, REQUESTS_MAX, STORES_MAX};
use crate::request::{Request, Segments};
use crate::stores::AnyStore;
use crate::table::{Id, Table};
use crate::transfer::Batch;

/// A file of an image as its store knows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Handle {
    pub store: u8,
    pub file: FileId,
}

/// A stretch of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stretch {
    pub handle: Handle,
    pub offset: u64,
    pub len: u32,
}

/// One store operation under way.
pub struct Op {
    pub disk: u16,
    pub stretch: Stretch,
    /// Bytes done of the stretch; the rest is submitted again.
    pub done: u32,
    pub kind: OpKind,
    /// The write's mapping, to be committed when it is done.
    pub prepared: Option<Prepared>,
    /// For reads: which of the disk's read counters it stands in.
    pub parity: u8,
}

/// What an operation is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OpKind {
    /// Guest bytes of `request` from byte `at` of it.
    GuestRead {
        request: Id,
        at: u32,
    },
    GuestWrite {
        request: Id,
        at: u32,
    },
    /// A block for the image, gathered in `buffer`.
    MetaRead {
        block: BlockRef,
        buffer: u16,
    },
    FlushWrite,
    FlushSync,
    /// A read into the job's bounce buffer at byte `at`.
    JobRead {
        job: Id,
        at: u32,
    },
    /// A write of the bytes in `from`.
    JobWrite {
        job: Id,
        from: Run,
    },
    /// Lets space go, up to byte `end` of the file in the end.
    Punch {
        request: Id,
        end: u64,
    },
    /// Control: the size of a raw file.
    Size,
    /// Control: the answer belongs to the disk's opening.
    Open,
}

impl Op {
    pub fn new(disk: u16, stretch: Stretch, kind: OpKind) -> Op {
        Op { disk, stretch, done: 0, kind, prepared: None, parity: 0 }
    }

    /// What is still to be done.
    pub fn rest(&self) -> Stretch {
        Stretch {
            offset: self.stretch.offset + self.done as u64,
            len: self.stretch.len - self.done,
            ..self.stretch
        }
    }
}

pub struct StoreSlot<S> {
    /// The first word of a disk's path.
    pub name: String,
    pub store: S,
    /// It had no room; cleared when it answers something.
    pub full: bool,
}

impl StoreSlot<AnyStore> {
    /// First words of paths that lead to it.
    pub fn names(&self) -> alloc::vec::Vec<&str> {
        match &self.store {
            AnyStore::NineP(_) => alloc::vec![self.name.as_str()],
            AnyStore::Block(store) => store.disk_names().collect(),
        }
    }
}

/// How a submission went.
pub enum Submitted {
    Yes(Id),
    NoRoom,
    Failed(Fault),
}

/// Buffers that gather blocks of metadata read in parts.
pub struct Gather {
    pub small: Vec<[u8; PAGE_BYTES]>,
    free: Vec<u16>,
    /// One long one, for compressed clusters.
    pub long: Vec<u8>,
    long_used: bool,
}

/// The number of the long buffer.
const LONG: u16 = u16::MAX;
/// Metadata reads at once.
const GATHERS: usize = 64;

impl Gather {
    fn new() -> Gather {
        Gather {
            small: alloc::vec![[0; PAGE_BYTES]; GATHERS],
            free: (0..GATHERS as u16).collect(),
            long: Vec::new(),
            long_used: false,
        }
    }

    /// Called at attach: the longest block that an image will ask for.
    pub fn reserve_long(&mut self, len: usize) {
        if self.long.len() < len {
            self.long.resize(len, 0);
        }
    }

    fn take(&mut self, len: usize) -> Option<u16> {
        if len <= PAGE_BYTES {
            return self.free.pop();
        }
        assert!(len <= self.long.len(), "an attach reserves what its image asks for");
        let free = !self.long_used;
        self.long_used = true;
        free.then_some(LONG)
    }

    pub fn give_back(&mut self, buffer: u16) {
        if buffer == LONG {
            self.long_used = false;
        } else {
            self.free.push(buffer);
        }
    }

    pub fn bytes(&mut self, buffer: u16) -> &mut [u8] {
        if buffer == LONG { &mut self.long } else { &mut self.small[buffer as usize] }
    }
}

pub struct Engine<S> {
    pub stores: heapless::Vec<StoreSlot<S>, STORES_MAX>,
    pub requests: Table<Request>,
    pub segments: Segments,
    pub ops: Table<Op>,
    pub jobs: Table<Job>,
    /// One buffer a job, by its place.
    pub bounces: Vec<Region>,
    pub zeros: Region,
    pub staging: Region,
    /// One flush scratch region for each disk that was ever attached, kept.
    scratches: [Option<Region>; DISKS_MAX],
    pub batch: Batch,
    pub gather: Gather,
}

impl<S> Engine<S> {
    /// Takes all memory that serving will ever need: about 2 MiB.
    pub fn new<H: Hypervisor>(hv: &mut H) -> Engine<S> {
        let mut frames = || {
            hv.frames_alloc(BOUNCE_BYTES / PAGE_BYTES)
                .expect("the domain has memory for its bounce buffers: give it memory=16 or more")
        };
        Engine {
            stores: heapless::Vec::new(),
            requests: Table::new(REQUESTS_MAX),
            segments: Segments::new(),
            ops: Table::new(OPS_MAX),
            jobs: Table::new(JOBS_MAX),
            bounces: (0..JOBS_MAX).map(|_| frames()).collect(),
            zeros: frames(),
            staging: frames(),
            scratches: [None; DISKS_MAX],
            batch: Batch::new(),
            gather: Gather::new(),
        }
    }

    /// Can a store take more right now? What this says no to need not be planned.
    pub fn has_room(&self, handle: Handle) -> bool {
        !self.ops.is_full() && !self.stores[handle.store as usize].full
    }

    /// Bytes one operation on this file may move; a page while its server is away.
    pub fn io_bytes_max<H: Hypervisor>(&self, handle: Handle) -> u32
    where
        S: Store<H>,
    {
        self.stores[handle.store as usize].store.io_bytes_max().max(PAGE_BYTES as u32)
    }

    /// Submits a read for `op.stretch` from `op.done` on.
    pub fn submit_read<H: Hypervisor>(&mut self, hv: &mut H, op: Op) -> Submitted
    where
        S: Store<H>,
    {
        let rest = op.rest();
        self.submit(rest.handle, op, |store, tag| {
            store.read(hv, tag, rest.handle.file, rest.offset, rest.len)
        })
    }

    /// Submits a write whose bytes `fill` puts into the window it is given; `fill` answering
    /// false makes it [`Submitted::Failed`] with the fault that `fill` left in `fault`.
    pub fn submit_write<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        op: Op,
        fill: &mut dyn FnMut(&mut H, &mut Batch, Window) -> Result<(), Fault>,
    ) -> Submitted
    where
        S: Store<H>,
    {
        let rest = op.rest();
        let mut fault = None;
        let mut batch = core::mem::take(&mut self.batch);
        let submitted = self.submit(rest.handle, op, |store, tag| {
            let fill = &mut |hv: &mut H, window: Window| match fill(hv, &mut batch, window) {
                Ok(()) => true,
                Err(why) => {
                    fault = Some(why);
                    false
                }
            };
            store.write(hv, tag, rest.handle.file, rest.offset, rest.len, fill)
        });
        self.batch = batch;
        match (fault, submitted) {
            (Some(fault), Submitted::Yes(id)) => {
                self.ops.take(id).expect("just submitted");
                Submitted::Failed(fault)
            }
            (_, submitted) => submitted,
        }
    }

    /// Submits a flush of the file.
    pub fn submit_flush<H: Hypervisor>(&mut self, hv: &mut H, op: Op) -> Submitted
    where
        S: Store<H>,
    {
        let handle = op.stretch.handle;
        self.submit(handle, op, |store, tag| store.flush(hv, tag, handle.file))
    }

    /// Lets a stretch go, of a length that may exceed 32 bits: what the store took of it becomes
    /// the operation's stretch, 0 bytes if that is all. Stores that cannot refuse it.
    pub fn submit_discard<H: Hypervisor>(&mut self, hv: &mut H, op: Op, len: u64) -> Submitted
    where
        S: Store<H>,
    {
        let Stretch { handle, offset, .. } = op.stretch;
        let mut took = 0;
        let submitted = self.submit(handle, op, |store, tag| {
            let taken = store.discard(hv, tag, handle.file, offset, len);
            if let Ok(Submit::Taken(bytes)) = taken {
                took = bytes;
            }
            taken
        });
        if let Submitted::Yes(id) = submitted {
            self.ops.get(id).stretch.len = took;
        }
        submitted
    }

    fn submit(
        &mut self,
        handle: Handle,
        op: Op,
        ask: impl FnOnce(&mut S, Tag) -> Result<Submit, platter_storage::StoreFault>,
    ) -> Submitted {
        if !self.has_room(handle) {
            return Submitted::NoRoom;
        }
        let Ok(id) = self.ops.insert(op) else { return Submitted::NoRoom };
        let slot = &mut self.stores[handle.store as usize];
        match ask(&mut slot.store, Tag(id.0 as u32)) {
            Ok(Submit::Taken(_)) => return Submitted::Yes(id),
            Ok(Submit::NoRoom) => slot.full = true,
            Err(fault) => {
                self.ops.take(id);
                return Submitted::Failed(fault.into());
            }
        }
        self.ops.take(id);
        Submitted::NoRoom
    }

    /// A buffer for a block of metadata, if there is one now.
    pub fn gather_buffer(&mut self, block: BlockRef) -> Option<u16> {
        self.gather.take(block.len as usize)
    }

    /// The flush scratch region of disk `index`; `None` when memory is used up.
    pub fn scratch<H: Hypervisor>(&mut self, hv: &mut H, index: u16) -> Option<Region> {
        let place = &mut self.scratches[index as usize];
        if place.is_none() {
            *place = hv.frames_alloc(BOUNCE_BYTES / PAGE_BYTES);
        }
        *place
    }

    /// An operation of a disk that is closed was answered: what it holds is free.
    pub fn orphaned(&mut self, op: &Op) {
        if let OpKind::MetaRead { buffer, .. } = op.kind {
            self.gather.give_back(buffer);
        }
    }

    /// Operations of ours are under way at this store.
    pub fn store_has_ops(&self, store: u8) -> bool {
        self.ops.iter().any(|(_, op)| op.stretch.handle.store == store)
    }

    /// Operations of the disk in this place are under way.
    pub fn has_ops_of(&self, disk: u16) -> bool {
        self.ops.iter().any(|(_, op)| op.disk == disk)
    }

    /// The run of a job's bounce buffer.
    pub fn bounce(&self, job: Id, offset: usize, len: usize) -> Run {
        assert!(offset + len <= BOUNCE_BYTES);
        Run { region: self.bounces[job.0 as usize], offset, len }
    }
}

impl Engine<AnyStore> {
    /// The store that a path's first word names, a share or one of the disks.
    pub fn store_named(&self, name: &str) -> Option<u8> {
        let named = |slot: &StoreSlot<AnyStore>| match &slot.store {
            AnyStore::NineP(_) => slot.name == name,
            AnyStore::Block(store) => store.has_disk(name) || store.expects(name),
        };
        self.stores.iter().position(named).map(|index| index as u8)
    }

    /// A disk may be expected that has not turned up.
    pub fn is_found(&self, store: u8, name: &str) -> bool {
        match &self.stores[store as usize].store {
            AnyStore::NineP(_) => true,
            AnyStore::Block(store) => store.has_disk(name),
        }
    }

    /// The path within its store: disks' paths begin with the disk's name.
    pub fn path_in_store(&self, store: u8, name: &str, path: &str) -> String {
        match &self.stores[store as usize].store {
            AnyStore::NineP(_) => String::from(path),
            AnyStore::Block(_) if path.is_empty() => String::from(name),
            AnyStore::Block(_) => alloc::format!("{name}/{path}"),
        }
    }

    pub fn device_mut(&mut self, index: usize) -> Option<&mut AnyDevice> {
        self.stores.iter_mut().find_map(|slot| match &mut slot.store {
            AnyStore::Block(store) => Some(store.device_mut(index).0),
            AnyStore::NineP(_) => None,
        })
    }

    /// A device of the block store.
    pub fn device(&self, index: usize) -> Option<&AnyDevice> {
        self.stores.iter().find_map(|slot| match &slot.store {
            AnyStore::Block(store) => store.devices().nth(index),
            AnyStore::NineP(_) => None,
        })
    }
}

/// Copies between a window of a store and a run of ours.
pub fn move_window<H: Hypervisor>(hv: &mut H, window: &Window, ours: Run, into_ours: bool) {
    assert!(window.len() <= ours.len);
    let mut done = 0;
    for run in &window.runs {
        let (theirs, mine) = ((run.region, run.offset), (ours.region, ours.offset + done));
        if run.len > 0 {
            let (from, to) = if into_ours { (theirs, mine) } else { (mine, theirs) };
            hv.move_bytes(from, to, run.len);
        }
        done += run.len;
    }
}
