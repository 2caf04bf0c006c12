//! What all disks share: the stores, the tables of work under way, and the bounce memory.
//! Everything is allocated once, at start.

use alloc::string::String;
use alloc::vec::Vec;

use platter_image::{BlockRef, Prepared};
use platter_storage::any::AnyDevice;
use platter_storage::block_store::Growth;
use platter_storage::{FileId, Run, Store, StoreFault, Submit, Tag, Window};
use platter_xen::{Direction, DomId, Hypervisor, PAGE_BYTES, Region};

use crate::disk::DESCRIPTORS_BYTES;
use crate::fault::Fault;
use crate::job::Job;
use crate::limits::{
    BOUNCE_BYTES, DISKS_MAX, JOBS_MAX, OPS_MAX, QUANTUM_REQUESTS, REQUESTS_MAX, STORES_MAX,
};
use crate::request::{Request, Segments};
use crate::stores::AnyStore;
use crate::table::{Id, Table};
use crate::transfer::{Copies, Guest, Owner, Repeated};

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
    /// Bytes that a read has brought and that are on their way to the guest.
    pub moving: u32,
    /// Its rest found no room in the store, and waits for some.
    pub waiting: bool,
    pub kind: OpKind,
    /// The write's mapping, to be committed when it is done.
    pub prepared: Option<Prepared>,
    /// For reads: which of the disk's read counters it stands in.
    pub parity: u8,
    /// The one whose bytes follow, in the same message.
    pub behind: Option<Id>,
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
        from: DomId,
    },
    /// A block for the image, gathered in `buffer`.
    MetaRead {
        block: BlockRef,
        buffer: u16,
    },
    /// A write of the bytes in `from`, whole or not at all.
    FlushWrite {
        from: Run,
    },
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
        Op {
            disk,
            stretch,
            done: 0,
            moving: 0,
            waiting: false,
            kind,
            prepared: None,
            parity: 0,
            behind: None,
        }
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
    /// It had no room; cleared when it answers something, or tells that it made room.
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
    Yes,
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

const _: () = assert!(QUANTUM_REQUESTS * DESCRIPTORS_BYTES <= BOUNCE_BYTES);

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
    /// Segment lists of a quantum of indirect requests.
    pub descriptors: Region,
    /// One flush scratch region for each disk that was ever attached, kept.
    scratches: [Option<Region>; DISKS_MAX],
    pub copies: Copies,
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
            descriptors: frames(),
            scratches: [None; DISKS_MAX],
            copies: Copies::new(),
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

    /// Enters an operation and submits it.
    pub fn submit<H: Hypervisor>(&mut self, hv: &mut H, op: Op) -> Submitted
    where
        S: Store<H>,
    {
        if !self.has_room(op.stretch.handle) {
            return Submitted::NoRoom;
        }
        let Ok(id) = self.ops.insert(op) else { return Submitted::NoRoom };
        let submitted = self.ask(hv, id);
        if !matches!(submitted, Submitted::Yes) {
            self.ops.take(id);
        }
        submitted
    }

    /// Submits the rest of an operation, from `done` on, and those behind it. Without room it
    /// waits in its place.
    pub fn go_on<H: Hypervisor>(&mut self, hv: &mut H, id: Id) -> Submitted
    where
        S: Store<H>,
    {
        let handle = self.ops.get(id).stretch.handle;
        let full = self.stores[handle.store as usize].full;
        let submitted = if full { Submitted::NoRoom } else { self.ask(hv, id) };
        self.ops.get(id).waiting = matches!(submitted, Submitted::NoRoom);
        submitted
    }

    /// Asks the store for what is left of an operation and those behind it.
    fn ask<H: Hypervisor>(&mut self, hv: &mut H, id: Id) -> Submitted
    where
        S: Store<H>,
    {
        let len = self.train_bytes(id);
        let Engine { stores, ops, requests, segments, copies, .. } = self;
        let op = ops.get(id);
        let (kind, done) = (op.kind, op.done as usize);
        let Stretch { handle: Handle { store, file }, offset, .. } = op.rest();
        let tag = Tag(id.0 as u32);
        let slot = &mut stores[store as usize];
        let store = &mut slot.store;
        let later = store.is_deferring() && done == 0;
        let mut fault = None;
        let asked = match kind {
            OpKind::GuestRead { .. } | OpKind::MetaRead { .. } | OpKind::JobRead { .. } => {
                store.read(hv, tag, file, offset, len)
            }
            OpKind::GuestWrite { .. } => {
                let mut guests = Guests { ops, requests, segments, copies };
                store.write(hv, tag, file, offset, len, &mut |hv, window| {
                    fault = guests.bring(hv, id, window, later).err();
                    fault.is_none()
                })
            }
            OpKind::JobWrite { from, .. } | OpKind::FlushWrite { from } => {
                let whole = matches!(kind, OpKind::FlushWrite { .. });
                let rest = Run { offset: from.offset + done, len: from.len - done, ..from };
                store.write(hv, tag, file, offset, len, &mut |hv, window| {
                    if whole && window.len() < rest.len {
                        fault = Some(Fault::Store(StoreFault::Limit(window.len() as u32)));
                        return false;
                    }
                    move_window(hv, &window, rest, false);
                    true
                })
            }
            OpKind::FlushSync => store.flush(hv, tag, file),
            // Stores that cannot refuse it. What one takes of it becomes the operation's
            // stretch, 0 bytes if that is all.
            OpKind::Punch { end, .. } => {
                let taken = store.discard(hv, tag, file, offset, end - offset);
                if let Ok(Submit::Taken(bytes)) = taken {
                    ops.get(id).stretch.len = bytes;
                }
                taken
            }
            OpKind::Size | OpKind::Open => unreachable!("the device asks for these itself"),
        };
        match (asked, fault) {
            (Ok(Submit::Taken(_)), None) => Submitted::Yes,
            (Ok(Submit::NoRoom), _) => {
                slot.full = true;
                Submitted::NoRoom
            }
            (_, Some(fault)) => Submitted::Failed(fault),
            (Err(fault), None) => Submitted::Failed(fault.into()),
        }
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

    /// Bytes still to be done by an operation and those behind it.
    fn train_bytes(&mut self, id: Id) -> u32 {
        let (mut bytes, mut next) = (0, Some(id));
        while let Some(id) = next {
            let op = self.ops.get(id);
            bytes += op.rest().len;
            next = op.behind;
        }
        bytes
    }

    /// The first of the train that an operation is in.
    pub fn head_of(&self, id: Id) -> Id {
        let mut head = id;
        while let Some((before, _)) = self.ops.iter().find(|(_, op)| op.behind == Some(head)) {
            head = before;
        }
        head
    }

    /// An operation of a disk that is closed is over, with those behind it: what it holds is
    /// free.
    pub fn orphaned(&mut self, id: Id) {
        let mut next = Some(id);
        while let Some(id) = next {
            let op = self.ops.take(id).expect("an operation ends once");
            next = op.behind;
            if let OpKind::MetaRead { buffer, .. } = op.kind {
                self.gather.give_back(buffer);
            }
        }
    }

    /// The disk in this place is closed: its operations that wait for room wait no more.
    pub fn orphan_waiting(&mut self, disk: u16) {
        while let Some(id) = self.waiting_op(disk) {
            self.orphaned(id);
        }
    }

    /// An operation of this disk that waits for room.
    pub fn waiting_op(&self, disk: u16) -> Option<Id> {
        self.ops.iter().find(|(_, op)| op.disk == disk && op.waiting).map(|(id, _)| id)
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

    /// A device of the block store, and how what lies on it grew.
    pub fn device(&self, index: usize) -> Option<(&AnyDevice, Growth)> {
        self.stores.iter().find_map(|slot| match &slot.store {
            AnyStore::Block(store) => Some((store.devices().nth(index)?, store.growth(index))),
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

/// What writes are made of, while a store takes them.
struct Guests<'a> {
    ops: &'a mut Table<Op>,
    requests: &'a mut Table<Request>,
    segments: &'a Segments,
    copies: &'a mut Copies,
}

impl Guests<'_> {
    /// Has the bytes of a write and of those behind it copied to the store's window: at once, or
    /// `later` with all others of the turn.
    fn bring<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        head: Id,
        mut window: Window,
        later: bool,
    ) -> Result<(), Fault> {
        let mut next = Some(head);
        while let (Some(id), false) = (next, window.is_empty()) {
            let op = self.ops.get(id);
            let OpKind::GuestWrite { request, at, from } = op.kind else {
                unreachable!("a train of writes has writes only")
            };
            next = op.behind;
            let at = (at + op.done) as usize;
            let part = Repeated::once(window.split(op.rest().len as usize));
            let segments = self.segments.of(request, self.requests.get(request).segments);
            let guest = Guest { domid: from, segments };
            let direction = Direction::FromGuest;
            match later {
                true => self.copies.queue(hv, Owner::Op(id), &guest, at, &part, direction),
                false => self.copies.now(hv, &guest, at, &part, direction).map_err(Fault::Grant)?,
            }
        }
        Ok(())
    }
}
