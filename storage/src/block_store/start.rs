//! Cutting a request to one run of one disk, sending it, and what follows a device's answer.

use platter_xen::{Hypervisor, PAGE_BYTES};

use super::ops::{Kind, Op};
use super::{BlockStore, Doubt, File};
use crate::disk::{Device, DiskDone, DiskIo, DiskOp, DiskSubmit, DiskTag, Geometry, Held};
use crate::pool::RUN_PAGES_MAX;
use crate::store::{FileId, StoreFault, Submit, Tag, Window};
use crate::volume::Spot;

/// Bytes that any one operation moves at most.
const RUN_BYTES: u64 = (RUN_PAGES_MAX * PAGE_BYTES) as u64;

/// Between two looks whether a backend has let go of pages (ours).
const REGAIN_NS: u64 = 1_000_000_000;

/// The answer to a file's first flush after a device lost its volatile cache: EIO.
const CACHE_LOST: StoreFault = StoreFault::Io(5);

/// Bytes that any one discard covers at most: their number has 32 bits.
const RANGE_BYTES: u64 = 1 << 31;

/// A stretch of a file cut to one run of one disk.
struct Cut {
    disk: u8,
    /// First byte on the disk.
    at: u64,
    /// At least 1.
    bytes: u64,
    geometry: Geometry,
}

/// Where a stretch of a file begins.
enum Begins {
    Disk(Cut),
    Zeros(u64),
    End,
}

impl<D> BlockStore<D> {
    /// The run that byte `offset` of a file lies on, up to `len` bytes of it.
    fn cut<H: Hypervisor>(&self, file: &File, offset: u64, len: u64) -> Result<Begins, StoreFault>
    where
        D: Device<H>,
    {
        let left = file.layout.size_bytes.saturating_sub(offset);
        let len = len.min(left);
        let Some(spot) = file.layout.spot(offset / 512).filter(|_| len > 0) else {
            return Ok(Begins::End);
        };
        let within = offset % 512;
        let run = |sectors: u64| len.min(sectors.saturating_mul(512) - within);
        let place = match spot {
            Spot::Zeros(sectors) => return Ok(Begins::Zeros(run(sectors))),
            Spot::Disk(place) => place,
        };
        let geometry = self.geometry::<H>(place.disk).ok_or(StoreFault::Gone)?;
        let at = place.sector.checked_mul(512).ok_or(StoreFault::BeyondEnd)? + within;
        let bytes = run(place.sectors);
        let cut = Cut { disk: place.disk, at, bytes, geometry };
        // The disk may have shrunk since the file was opened.
        let end = at.saturating_add(bytes).div_ceil(512);
        if end > geometry.sectors { Err(StoreFault::BeyondEnd) } else { Ok(Begins::Disk(cut)) }
    }

    pub(super) fn start_read<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        tag: Tag,
        file: FileId,
        offset: u64,
        len: u32,
    ) -> Result<Submit, StoreFault>
    where
        D: Device<H>,
    {
        let op = Op { kind: Kind::Read, tag, file, ..Op::NEW };
        let (op, from_disk) = match self.cut::<H>(self.file(file)?, offset, u64::from(len))? {
            // Nothing to read: answered without a device.
            Begins::End => (op, false),
            Begins::Zeros(bytes) => (Op { len: bytes.min(RUN_BYTES) as u32, ..op }, false),
            Begins::Disk(cut) => {
                let block = u64::from(cut.geometry.block_bytes);
                let within = cut.at % block;
                let most = u64::from(cut.geometry.io_bytes_max).min(RUN_BYTES) - within;
                let bytes = cut.bytes.min(most);
                let sectors = ((within + bytes).div_ceil(block) * block / 512) as u32;
                let sector = (cut.at - within) / 512;
                let (within, len) = (within as u32, bytes as u32);
                (Op { disk: cut.disk, sector, sectors, within, len, ..op }, true)
            }
        };
        let Some(index) = self.enter(op) else { return self.no_room() };
        if from_disk {
            self.try_start(hv, index);
        } else {
            if op.len > 0 {
                let run = self.pool.run(self.ops.get(index).page, 0, op.len as usize);
                hv.zero(run.region, run.offset, run.len);
            }
            self.ops.finish(index);
        }
        Ok(Submit::Taken(op.len))
    }

    pub(super) fn start_write<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        tag: Tag,
        file: FileId,
        (offset, len): (u64, u32),
        fill: &mut dyn FnMut(&mut H, Window) -> bool,
    ) -> Result<Submit, StoreFault>
    where
        D: Device<H>,
    {
        let open = self.writable(file)?;
        let end = offset.checked_add(u64::from(len)).ok_or(StoreFault::BeyondEnd)?;
        if end > open.layout.size_bytes || len == 0 {
            return Err(StoreFault::BeyondEnd);
        }
        let Begins::Disk(cut) = self.cut::<H>(open, offset, u64::from(len))? else {
            return Err(StoreFault::NoSpace);
        };
        if cut.geometry.read_only {
            return Err(StoreFault::ReadOnly);
        }
        let block = u64::from(cut.geometry.block_bytes);
        let within = cut.at % block;
        let whole = cut.bytes / block * block;
        let op = Op { tag, file, disk: cut.disk, ..Op::NEW };
        let op = if within == 0 && whole > 0 {
            let len = whole.min(u64::from(cut.geometry.io_bytes_max)).min(RUN_BYTES) as u32;
            Op { kind: Kind::Write, sector: cut.at / 512, sectors: len / 512, len, ..op }
        } else {
            let len = cut.bytes.min(block - within) as u32;
            let (sector, sectors) = ((cut.at - within) / 512, (block / 512) as u32);
            let within = within as u32;
            Op { kind: Kind::Modify, sector, sectors, within, len, ..op }
        };
        let Some(index) = self.enter(op) else { return self.no_room() };
        let window = self.window(self.ops.get(index));
        if !fill(hv, window) {
            let op = self.ops.cancel(index);
            self.free_pages(&op);
            return Ok(Submit::Taken(0));
        }
        self.try_start(hv, index);
        Ok(Submit::Taken(op.len))
    }

    /// Zeroes or discards the first run of a range.
    pub(super) fn start_range<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        tag: Tag,
        file: FileId,
        kind: Kind,
        (offset, len): (u64, u64),
    ) -> Result<Submit, StoreFault>
    where
        D: Device<H>,
    {
        let open = self.writable(file)?;
        let end = offset.checked_add(len).ok_or(StoreFault::BeyondEnd)?;
        if end > open.layout.size_bytes || len == 0 {
            return Err(StoreFault::BeyondEnd);
        }
        let Begins::Disk(cut) = self.cut::<H>(open, offset, len)? else {
            return Err(StoreFault::NoSpace);
        };
        let geometry = cut.geometry;
        if geometry.read_only {
            return Err(StoreFault::ReadOnly);
        }
        let block = u64::from(geometry.block_bytes);
        let (unit, first, most) = match kind {
            Kind::Zeroes => (block, 0, geometry.zeroes_sectors_max),
            _ => {
                let unit = (u64::from(geometry.discard_unit) * 512).max(block);
                (unit, u64::from(geometry.discard_first) * 512 % unit, geometry.discard_sectors_max)
            }
        };
        // A discard leaves out what is no whole unit at either end; zeroes must be exact.
        let skip = (first + unit - cut.at % unit) % unit;
        let left = cut.bytes.min(RANGE_BYTES).saturating_sub(skip);
        let whole = left.min(u64::from(most) * 512) / unit * unit;
        if most == 0 || kind == Kind::Zeroes && (skip > 0 || whole == 0) {
            return Err(StoreFault::Unsupported);
        }
        let (sector, sectors) = ((cut.at + skip) / 512, (whole / 512) as u32);
        let len = (if whole == 0 { cut.bytes.min(RANGE_BYTES) } else { skip + whole }) as u32;
        let op = Op { kind, tag, file, disk: cut.disk, sector, sectors, len, ..Op::NEW };
        let Some(index) = self.ops.take(op) else { return Ok(Submit::NoRoom) };
        match sectors {
            0 => self.end(hv, index),
            _ => self.try_start(hv, index),
        }
        Ok(Submit::Taken(len))
    }

    /// No room now; never when nothing is under way that could make some.
    fn no_room(&self) -> Result<Submit, StoreFault> {
        match self.ops.is_empty() {
            true => Err(StoreFault::Limit(self.pool.free_pages() as u32)),
            false => Ok(Submit::NoRoom),
        }
    }

    /// Pages that backends held come back as these let go.
    pub(super) fn regain_pages<H: Hypervisor>(&mut self, hv: &mut H, now_ns: u64)
    where
        D: Device<H>,
    {
        self.regain_at_ns = None;
        for device in 0..self.devices.len() {
            if !self.pool.is_held_at(device) {
                continue;
            }
            if self.devices[device].device.is_left(hv) {
                self.made_room |= self.pool.regain(hv, device) > 0;
            }
            if self.pool.is_held_at(device) {
                self.regain_at_ns = Some(now_ns.saturating_add(REGAIN_NS));
            }
        }
    }

    /// Enters an operation with its pages; `None` when there is no room for either.
    pub(super) fn enter(&mut self, mut op: Op) -> Option<u16> {
        if !self.ops.has_room() {
            return None;
        }
        let bytes = (op.sectors as usize * 512).max(op.len as usize);
        if bytes > 0 {
            let pages = bytes.div_ceil(PAGE_BYTES);
            op.page = self.pool.take(pages)?;
            op.pages = pages as u8;
        }
        if op.kind == Kind::Modify {
            let Some(scratch) = self.pool.take(1) else {
                self.pool.give(op.page, usize::from(op.pages));
                return None;
            };
            (op.scratch, op.scratch_pages) = (scratch, 1);
        }
        self.ops.take(op)
    }

    /// Sends what can be sent of an operation; the rest waits.
    pub(super) fn try_start<H: Hypervisor>(&mut self, hv: &mut H, index: u16)
    where
        D: Device<H>,
    {
        if self.ops.must_wait(index) {
            self.ops.wait(index);
            return;
        }
        let file = self.files.get(usize::from(self.ops.get(index).file.0)).and_then(Option::as_ref);
        match file.map_or(Doubt::None, |file| file.doubt) {
            Doubt::None => {}
            Doubt::Open { .. } => return self.ops.wait(index),
            Doubt::Proved(_) => {
                let op = self.ops.get_mut(index);
                (op.result, op.flush_left) = (Err(StoreFault::Gone), 0);
                // What other disks have of a flush is answered first.
                if op.parts == 0 {
                    self.end(hv, index);
                }
                return;
            }
        }
        if self.ops.get(index).kind == Kind::Flush {
            return self.start_flush(hv, index);
        }
        let op = self.ops.get(index);
        let (kind, page) = match op.kind {
            Kind::Read | Kind::Meta => (DiskOp::Read, op.page),
            Kind::Write => (DiskOp::Write, op.page),
            Kind::Modify if op.merged => (DiskOp::Write, op.page),
            Kind::Modify => (DiskOp::Read, op.scratch),
            Kind::Zeroes => (DiskOp::Zeroes, 0),
            Kind::Discard => (DiskOp::Discard, 0),
            Kind::Flush => (DiskOp::Flush, 0),
        };
        let io = DiskIo { op: kind, sector: op.sector, sectors: op.sectors, page };
        match self.send(hv, op.disk, index, io) {
            DiskSubmit::Taken => self.ops.get_mut(index).parts = 1,
            DiskSubmit::NoRoom => self.ops.wait(index),
            DiskSubmit::Fault(fault) => {
                self.ops.get_mut(index).result = Err(fault);
                self.end(hv, index);
            }
        }
    }

    /// An operation has nothing left to do: its answer is ready.
    fn end<H: Hypervisor>(&mut self, hv: &mut H, index: u16) {
        if self.ops.get(index).kind == Kind::Meta {
            return self.finish_meta(hv, index);
        }
        self.account(index);
        self.ops.finish(index);
    }

    /// Enters a finished operation in its file's account of the disks' volatile caches.
    fn account(&mut self, index: u16) {
        let op = self.ops.get_mut(index);
        let file = self.files.get_mut(usize::from(op.file.0)).and_then(Option::as_mut);
        let Some(file) = file else { return };
        match op.kind {
            Kind::Flush => {
                if core::mem::take(&mut file.lost) {
                    op.result = op.result.and(Err(CACHE_LOST));
                }
                if op.result.is_ok() {
                    file.flushed = file.flushed.max(op.mark);
                }
            }
            // One that failed may have changed something too.
            Kind::Write | Kind::Modify | Kind::Zeroes => file.writes += 1,
            Kind::Read | Kind::Discard | Kind::Meta => {}
        }
    }

    fn send<H: Hypervisor>(&mut self, hv: &mut H, disk: u8, index: u16, io: DiskIo) -> DiskSubmit
    where
        D: Device<H>,
    {
        let Some(disk) = self.disks.get(usize::from(disk)) else {
            return DiskSubmit::Fault(StoreFault::Gone);
        };
        let Some(attached) = self.devices.get_mut(disk.device) else {
            return DiskSubmit::Fault(StoreFault::Gone);
        };
        // It came back in this turn: the files on it are not doubted yet.
        if attached.returns != attached.device.returns() {
            return DiskSubmit::NoRoom;
        }
        attached.device.submit(hv, &self.pool, disk.unit, DiskTag(index), io)
    }

    /// Sends a flush to every disk that has not had it yet.
    fn start_flush<H: Hypervisor>(&mut self, hv: &mut H, index: u16)
    where
        D: Device<H>,
    {
        let io = DiskIo { op: DiskOp::Flush, sector: 0, sectors: 0, page: 0 };
        let mut left = self.ops.get(index).flush_left;
        while left != 0 {
            let disk = left.trailing_zeros() as u8;
            match self.send(hv, disk, index, io) {
                DiskSubmit::Taken => self.ops.get_mut(index).parts += 1,
                DiskSubmit::NoRoom => break,
                DiskSubmit::Fault(fault) => self.ops.get_mut(index).result = Err(fault),
            }
            left &= left - 1;
        }
        self.ops.get_mut(index).flush_left = left;
        if left != 0 {
            self.ops.wait(index);
        } else if self.ops.get(index).parts == 0 {
            self.end(hv, index);
        }
    }

    /// Tries everything that waits once, in order.
    pub(super) fn restart_waiting<H: Hypervisor>(&mut self, hv: &mut H)
    where
        D: Device<H>,
    {
        for _ in 0..self.ops.waiting() {
            let Some(index) = self.ops.next_waiting() else { return };
            self.try_start(hv, index);
        }
    }

    pub(super) fn poll_devices<H: Hypervisor>(&mut self, hv: &mut H, now_ns: u64)
    where
        D: Device<H>,
    {
        for device in 0..self.devices.len() {
            while let Some(done) = self.devices[device].device.poll(hv, &self.pool, now_ns) {
                self.finish_part(hv, done);
            }
            let returns = self.devices[device].device.returns();
            if returns != core::mem::replace(&mut self.devices[device].returns, returns) {
                self.doubt_files_of(device);
            }
            self.settle_held(device);
            // After the answers: what was answered before may be lost, what comes later is not.
            let losses = self.devices[device].device.losses();
            if losses != core::mem::replace(&mut self.devices[device].losses, losses) {
                self.lose_caches_of(device);
            }
        }
        self.find_units();
    }

    /// A device lost its cache: each file with unflushed writes hears of it at its next flush.
    fn lose_caches_of(&mut self, device: usize) {
        let of_device = (0..).zip(&self.disks).filter(|(_, disk)| disk.device == device);
        let lost = of_device.fold(0u32, |mask, (number, _): (u32, _)| mask | 1 << number);
        for file in self.files.iter_mut().flatten().filter(|file| file.disks & lost != 0) {
            file.lost |= file.writes != file.flushed;
        }
    }

    /// One answer of a device.
    fn finish_part<H: Hypervisor>(&mut self, hv: &mut H, done: DiskDone)
    where
        D: Device<H>,
    {
        let index = done.tag.0;
        let op = self.ops.get_mut(index);
        assert!(op.parts > 0, "a device answered what it was not asked");
        op.parts -= 1;
        if done.held != Held::Nobody {
            op.held = done.held;
        }
        if let Err(fault) = done.result {
            op.result = Err(fault);
        }
        let failed = op.result.is_err();
        if op.kind == Kind::Modify && !op.merged && !failed {
            op.merged = true;
            let op = *op;
            self.merge(hv, &op);
            return self.try_start(hv, index);
        }
        // A flush that still waits for room at another disk ends when it has been there.
        if op.parts == 0 && op.flush_left == 0 {
            self.end(hv, index);
        }
    }

    /// Completes the buffer of a read-modify-write from the old block.
    fn merge<H: Hypervisor>(&mut self, hv: &mut H, op: &Op) {
        let block = op.sectors as usize * 512;
        let (from, to) = (op.within as usize, (op.within + op.len) as usize);
        for (start, end) in [(0, from), (to, block)] {
            let old = self.pool.run(op.scratch, start, end - start);
            let new = self.pool.run(op.page, start, end - start);
            if end > start {
                hv.move_bytes((old.region, old.offset), (new.region, new.offset), end - start);
            }
        }
    }
}
