//! Growing a disk while it is served.
//!
//! A raw file or disk is grown by whoever owns it: its size is looked at now and then. Any other
//! image is grown by us, when the toolstack's domain writes the new size in bytes to `resize` in
//! the backend directory; on a disk of ours it has as much room as that disk has then. The guest
//! learns of it by `sectors` and our state written once more.

use platter_image::{FileNo, Format, ResizePlan, SECTOR_BYTES, Stop};
use platter_storage::{Answer, Store, StoreFault, Submit, Tag};
use platter_xen::xenstore::decimal;
use platter_xen::{Bus, Hypervisor};

use super::{Busy, Device, Stage, Surroundings};
use crate::disk::DiskFile;
use crate::engine::{Op, OpKind, Stretch, Submitted};
use crate::limits::SIZE_NS;

/// The last sector of a file that must be longer.
const TAIL_BYTES: u32 = 512;

impl Device {
    /// Asks for the size of a file that others may make longer when it is time.
    pub(super) fn watch_size<H: Hypervisor + Bus>(&mut self, world: &mut Surroundings<'_, H>) {
        let raw = self.is_raw();
        let due = world.now_ns >= self.size_ns && self.is_serving() && !self.read_only;
        let Some(disk) = self.disk.as_mut().filter(|_| due) else { return };
        if !raw && disk.files[0].can_grow {
            return;
        }
        self.size_ns = world.now_ns + SIZE_NS;
        let DiskFile { handle, .. } = disk.files[0];
        let op = Op::new(self.index, Stretch { handle, offset: 0, len: 0 }, OpKind::Size);
        let Ok(id) = world.engine.ops.insert(op) else { return };
        let slot = &mut world.engine.stores[handle.store as usize];
        match slot.store.size(world.hv, Tag(id.0 as u32), handle.file) {
            Ok(Submit::Taken(_)) => disk.ops += 1,
            Ok(Submit::NoRoom) | Err(_) => {
                world.engine.ops.take(id);
            }
        }
    }

    fn is_raw(&self) -> bool {
        self.config.as_ref().is_some_and(|config| config.format == Format::Raw)
    }

    /// The file's size, as it is now.
    pub fn size_answer(&mut self, answer: Result<Answer, StoreFault>) {
        let raw = self.is_raw();
        let Some(disk) = &mut self.disk else { return };
        disk.ops -= 1;
        disk.kick = true;
        if let Ok(Answer::Size(bytes)) = answer {
            if !disk.files[0].can_grow {
                // A disk of ours was made longer by its own domain.
                disk.image.file_grew(FileNo(0), bytes);
            }
            if raw {
                self.wanted_sectors = bytes / SECTOR_BYTES;
            }
        }
    }

    /// `resize` in the backend directory, in bytes.
    pub(super) fn read_resize(&mut self) {
        let bytes = self.values.get(&self.below_be("resize")).and_then(|text| decimal(text));
        if let Some(bytes) = bytes {
            self.wanted_sectors = bytes / SECTOR_BYTES;
        }
    }

    /// Grows the disk to what is wanted, as soon as nothing stands in the way.
    pub(super) fn resize_on<H: Hypervisor + Bus>(&mut self, world: &mut Surroundings<'_, H>) {
        self.grow_step(world);
        let growing = self.is_to_grow();
        self.disk.iter_mut().for_each(|disk| disk.growing = growing);
    }

    fn is_to_grow(&mut self) -> bool {
        // An image that is not open yet has no size.
        if self.stage != Stage::Ready || self.busy != Busy::No || self.grow_tail.is_some() {
            return false;
        }
        let wanted = self.wanted_sectors;
        self.disk.as_mut().is_some_and(|disk| wanted > disk.image.sectors())
    }

    fn grow_step<H: Hypervisor + Bus>(&mut self, world: &mut Surroundings<'_, H>) {
        if self.stage == Stage::Ready && self.grow_tail.is_some() {
            return self.grow_on(world);
        }
        let is_to_grow = self.is_to_grow();
        let Some(disk) = &mut self.disk else { return };
        // Places may change while it grows, step by step: nothing else is under way then.
        if !is_to_grow || disk.requests > 0 {
            return;
        }
        match disk.image.resize(self.wanted_sectors) {
            Ok(ResizePlan { grow }) => {
                // A raw file is as long as it says; others must be made so.
                self.grow_tail = grow.filter(|_| !self.is_raw());
                self.grow_on(world);
            }
            Err(Stop::Fault(fault)) => {
                log::warn!("guest {} disk {}: cannot grow: {fault}", self.guest.0, self.vdev);
                self.wanted_sectors = 0;
            }
            Err(stop) => {
                if disk.stopped(world.engine, world.hv, stop).is_err() {
                    self.wanted_sectors = 0;
                }
            }
        }
    }

    /// Makes the file long enough, flushes, and tells the guest.
    fn grow_on<H: Hypervisor + Bus>(&mut self, world: &mut Surroundings<'_, H>) {
        let Some(disk) = &mut self.disk else { return };
        if let Some((file, bytes)) = self.grow_tail {
            let offset = bytes.saturating_sub(TAIL_BYTES.into());
            let stretch = Stretch { handle: disk.handle(file), offset, len: TAIL_BYTES };
            let zeros = platter_storage::Run {
                region: world.engine.zeros,
                offset: 0,
                len: TAIL_BYTES as usize,
            };
            let op = Op::new(self.index, stretch, OpKind::FlushWrite { from: zeros });
            let submitted = world.engine.submit(world.hv, op);
            if matches!(submitted, Submitted::NoRoom) {
                return;
            }
            disk.note_flush_op(submitted);
        }
        self.grow_tail = None;
        disk.flush.wanted |= disk.image.is_dirty();
        let unit = u64::from(disk.limits.sector_bytes) / SECTOR_BYTES;
        let sectors = disk.image.sectors() / unit * unit;
        disk.limits.capacity_sectors = sectors;
        log::info!("guest {} disk {}: now {} MiB", self.guest.0, self.vdev, sectors / 2048);
    }
}
