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
use crate::engine::{Op, OpKind, Stretch};
use crate::limits::SIZE_NS;

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
            if bytes > self.file_bytes {
                // There may be room for what was refused.
                (self.file_bytes, self.refused_sectors) = (bytes, 0);
            }
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

    /// Grows the disk to what is wanted, as soon as nothing stands in the way, and tells of it when
    /// its file is long enough.
    pub(super) fn resize_on<H: Hypervisor + Bus>(&mut self, world: &mut Surroundings<'_, H>) {
        let wanted = self.wanted_sectors;
        // An image that is not open yet has no size.
        let ready = self.stage == Stage::Ready && self.busy == Busy::No;
        let Some(disk) = &mut self.disk else { return };
        let due = ready && wanted > disk.image.sectors() && wanted != self.refused_sectors;
        disk.growing = due && disk.flush.tail.is_none();
        // Places may change while it grows, step by step: nothing else is under way then.
        if disk.growing && disk.requests == 0 {
            self.grow_step(world);
        }
        self.has_grown();
    }

    fn grow_step<H: Hypervisor + Bus>(&mut self, world: &mut Surroundings<'_, H>) {
        let raw = self.is_raw();
        let Some(disk) = &mut self.disk else { return };
        match disk.image.resize(self.wanted_sectors) {
            Ok(ResizePlan { grow }) => {
                // A raw file is as long as it says; others must be made so.
                disk.flush.tail = grow.filter(|_| !raw);
                disk.flush.wanted = true;
                disk.growing = false;
            }
            Err(Stop::Fault(fault)) => {
                log::warn!("guest {} disk {}: cannot grow: {fault}", self.guest.0, self.vdev);
                // Asked for again with each look, it is answered once.
                self.refused_sectors = self.wanted_sectors;
                disk.growing = false;
            }
            Err(stop) => {
                if disk.stopped(world.engine, world.hv, stop).is_err() {
                    self.wanted_sectors = 0;
                    disk.growing = false;
                }
            }
        }
    }

    /// What the image has become, the guest may use; a file that had to be made longer is so first.
    fn has_grown(&mut self) {
        let Some(disk) = self.disk.as_mut().filter(|_| self.stage == Stage::Ready) else { return };
        let unit = u64::from(disk.limits.sector_bytes) / SECTOR_BYTES;
        let sectors = disk.image.sectors() / unit * unit;
        if disk.growing || disk.flush.tail.is_some() || sectors == disk.limits.capacity_sectors {
            return;
        }
        disk.limits.capacity_sectors = sectors;
        log::info!("guest {} disk {}: now {} MiB", self.guest.0, self.vdev, sectors / 2048);
    }
}
