//! A device's image, from its description to ready, and back to closed and clean.

use alloc::format;
use alloc::string::{String, ToString};

use platter_image::{FileNo, Stop};
use platter_storage::{Access, Answer, Opened, Store, StoreFault};
use platter_xen::{Bus, Hypervisor};

use super::{Batch, Busy, Device, Fate, Held, Stage, Surroundings, Then};
use crate::disk::Disk;
use crate::engine::Engine;
use crate::fault::Fault;
use crate::limits::{SEGMENTS_MAX, STORE_WAIT_NS};
use crate::opening::{self, Opening};
use crate::stores::AnyStore;
use crate::throttle::Throttle;
use crate::xs::Purpose;

/// Said when two disks want one file.
const SHARED: &str = "the image is in use by another disk: a writer must be alone; \
                      detach the other disk, or attach both read-only";

/// The backend directory of a device that has left: nothing lies there.
const NOWHERE: &str = "-";

impl Device {
    /// The disk cannot be served: the reason goes to the three places where people look.
    pub(super) fn fail<H: Hypervisor + Bus>(
        &mut self,
        world: &mut Surroundings<'_, H>,
        reason: &str,
    ) {
        log::warn!("guest {} disk {}: {reason}", self.guest.0, self.vdev);
        world.xs.explain(&self.name, reason);
        world.xs.write(&self.below_be("hotplug-error"), reason, Purpose::None);
        self.close_files(world);
        self.stage = Stage::Failed;
        self.look = true;
    }

    pub(super) fn fail_with<H: Hypervisor + Bus>(
        &mut self,
        world: &mut Surroundings<'_, H>,
        fault: &Fault,
    ) {
        let config = self.config.as_ref().expect("opening follows its configuration");
        let mut path = format!("/{}/{}", config.store, config.path);
        if let [_, .., last] = self.paths.as_slice() {
            path = format!("{path}' and below it '{last}");
        }
        let reason = opening::sentence(&path, config.format, fault);
        self.fail(world, &reason);
    }

    pub(super) fn close_files<H: Hypervisor + Bus>(&mut self, world: &mut Surroundings<'_, H>) {
        if let Some(disk) = self.disk.take() {
            for file in &disk.files {
                let slot = &mut world.engine.stores[file.handle.store as usize];
                slot.store.close(world.hv, file.handle.file);
            }
        }
        self.held.clear();
    }

    /// Opening, step by step.
    pub(super) fn open_on<H: Hypervisor + Bus>(&mut self, world: &mut Surroundings<'_, H>) {
        match self.stage {
            Stage::WaitStore if self.wake_ns.is_none() => self.ask_top(world),
            Stage::Opening(Opening::Image) => {
                let Some(disk) = &mut self.disk else { return };
                disk.pump_flush(world.engine, world.hv);
                match disk.open_on(world.engine, world.hv, &mut self.paths) {
                    Ok(Some(Opening::Ready)) => self.opened_all(world),
                    Ok(Some(next)) => self.stage = Stage::Opening(next),
                    Ok(None) => {}
                    Err(fault) => self.fail_with(world, &fault),
                }
            }
            _ => {}
        }
    }

    pub(super) fn ask_top<H: Hypervisor + Bus>(&mut self, world: &mut Surroundings<'_, H>) {
        let config = self.config.clone().expect("waiting follows the description");
        let asked = match world.engine.store_named(&config.store) {
            None => Ok(false),
            Some(store) if !world.engine.is_found(store, &config.store) => Ok(false),
            Some(store) => {
                let access = if self.read_only { Access::ReadOnly } else { Access::ReadWrite };
                let path = world.engine.path_in_store(store, &config.store, &config.path);
                opening::ask_file(world.engine, world.hv, self.index, store, &path, access)
            }
        };
        match asked {
            Ok(true) => self.stage = Stage::AskTop,
            Ok(false) | Err(Fault::Store(StoreFault::Gone)) => {
                let deadline = self.since_ns + STORE_WAIT_NS;
                let unknown =
                    world.fronts_known && world.engine.store_named(&config.store).is_none();
                if world.now_ns >= deadline || unknown {
                    self.fail(world, &store_missing(world.engine, &config.store));
                    return;
                }
                if !self.said_waiting {
                    let store = &config.store;
                    log::info!(
                        "guest {} disk {}: waits for the server of store '{store}'",
                        self.guest.0,
                        self.vdev
                    );
                    self.said_waiting = true;
                }
                self.wake_ns = Some((world.now_ns + 50_000_000).min(deadline));
            }
            Err(fault) => self.fail_with(world, &fault),
        }
    }

    /// The answer to the opening of a file.
    pub fn file_answer<H: Hypervisor + Bus>(
        &mut self,
        world: &mut Surroundings<'_, H>,
        store: u8,
        answer: Result<Answer, StoreFault>,
    ) {
        if !matches!(self.stage, Stage::AskTop | Stage::Opening(Opening::File(_))) {
            // The device was taken away meanwhile.
            if let Ok(Answer::Opened(opened)) = answer {
                world.engine.stores[store as usize].store.close(world.hv, opened.file);
            }
            return;
        }
        if self.stage == Stage::AskTop && answer == Err(StoreFault::Gone) {
            self.stage = Stage::WaitStore;
            return;
        }
        let opened = match opening::opened(answer) {
            Ok(opened) => opened,
            Err(fault) => return self.fail_with(world, &fault),
        };
        let top = self.stage == Stage::AskTop;
        let writable = top && !self.read_only;
        let held =
            Held { device: self.index, store, identity: opened.identity, writable, leaving: false };
        match conflict(world.held, &held) {
            Some(other) if other.leaving && top => {
                world.engine.stores[store as usize].store.close(world.hv, opened.file);
                self.stage = Stage::WaitStore;
                self.wake_ns = Some(world.now_ns + 50_000_000);
                return;
            }
            Some(_) => {
                world.engine.stores[store as usize].store.close(world.hv, opened.file);
                let config = self.config.as_ref().expect("opening follows its configuration");
                let reason = format!("'/{}/{}': {SHARED}", config.store, config.path);
                return self.fail(world, &reason);
            }
            None => self.held.push(held),
        }
        let access = if writable { Access::ReadWrite } else { Access::ReadOnly };
        let outcome = match self.stage {
            Stage::Opening(Opening::File(file)) => self.more_opened(file, store, &opened, access),
            _ => self.top_opened(world, store, &opened, access),
        };
        match outcome {
            Ok(()) => self.stage = Stage::Opening(Opening::Image),
            Err(fault) => self.fail_with(world, &fault),
        }
    }

    fn top_opened<H: Hypervisor + Bus>(
        &mut self,
        world: &mut Surroundings<'_, H>,
        store: u8,
        opened: &Opened,
        access: Access,
    ) -> Result<(), Fault> {
        let config = self.config.as_ref().expect("opening follows its configuration");
        let image = opening::begin(config, opened, self.read_only, world.cache_bytes);
        let limits = platter_xen::blkif::Limits {
            capacity_sectors: 0,
            sector_bytes: config.sector_bytes,
            read_only: self.read_only,
            indirect_segments_max: SEGMENTS_MAX as u16,
            flush: true,
            discard: false,
        };
        let Some(scratch) = world.engine.scratch(world.hv, self.index) else {
            return Err(Fault::Memory);
        };
        let mut disk = Disk::new(self.index, self.guest, image, limits, scratch);
        disk.files.push(opening::file_of(store, opened, access));
        disk.cache = config.cache;
        disk.throttle = Throttle::new(config.iops, config.bps);
        self.paths = alloc::vec![world.engine.path_in_store(store, &config.store, &config.path)];
        self.disk = Some(disk);
        Ok(())
    }

    fn more_opened(
        &mut self,
        file: FileNo,
        store: u8,
        opened: &Opened,
        access: Access,
    ) -> Result<(), Fault> {
        let disk = self.disk.as_mut().expect("a disk being opened");
        disk.ops -= 1;
        disk.file_opened(file, store, opened, access)
    }

    fn opened_all<H: Hypervisor + Bus>(&mut self, world: &mut Surroundings<'_, H>) {
        let config = self.config.clone().expect("opening follows its configuration");
        let disk = self.disk.as_mut().expect("a disk being opened");
        let unit = (config.sector_bytes / 512) as u64;
        let sectors = disk.image.sectors() / unit * unit;
        disk.limits.capacity_sectors = sectors;
        disk.limits.discard = self.discard && config.discard;
        world.engine.gather.reserve_long(disk.image.miss_bytes_max() as usize);
        let depth = disk.image.depth();
        log::info!(
            "guest {} disk {}: /{}/{} as {}, {} MiB{}{}",
            self.guest.0,
            self.vdev,
            config.store,
            config.path,
            config.format.name(),
            sectors / 2048,
            if self.read_only { ", read-only" } else { "" },
            if depth > 1 { format!(", {depth} layers") } else { String::new() },
        );
        for (layer, note) in disk.image.notes() {
            log::warn!("guest {} disk {}: layer {layer}: {note}", self.guest.0, self.vdev);
        }
        self.stage = Stage::Ready;
        self.look = true;
    }

    /// Marks the image clean before the device goes.
    pub(super) fn begin_finish<H: Hypervisor + Bus>(
        &mut self,
        world: &mut Surroundings<'_, H>,
        then: Then,
    ) {
        match self.stage {
            Stage::Finishing(_) | Stage::Finished => {}
            Stage::Ready if self.disk.is_some() => {
                self.stage = Stage::Finishing(then);
                self.disk.iter_mut().for_each(|disk| disk.flush.forget_failure());
                self.finish_on(world);
            }
            _ => self.finished(world, then),
        }
    }

    /// Carries the finishing on: the image's own marks, then a last flush.
    pub(super) fn finish_on<H: Hypervisor + Bus>(&mut self, world: &mut Surroundings<'_, H>) {
        let Stage::Finishing(then) = self.stage else { return };
        let Some(disk) = &mut self.disk else { return self.finished(world, then) };
        if disk.flush.failed_last() {
            log::warn!(
                "guest {} disk {}: the last flush failed; the image is left as it is",
                self.guest.0,
                self.vdev
            );
            return self.finished(world, then);
        }
        let writable = disk.files.first().is_some_and(|file| file.writable);
        if writable && !disk.flush.is_running() {
            match disk.image.finish() {
                Ok(()) if disk.image.is_dirty() => disk.flush.wanted = true,
                Ok(()) => return self.finished_when_idle(world, then),
                Err(Stop::Busy) if disk.is_idle() => return self.finished(world, then),
                Err(stop) => {
                    if disk.stopped(world.engine, world.hv, stop).is_err() {
                        return self.finished(world, then);
                    }
                }
            }
        } else if !writable {
            return self.finished_when_idle(world, then);
        }
        disk.pump_flush(world.engine, world.hv);
    }

    fn finished_when_idle<H: Hypervisor + Bus>(
        &mut self,
        world: &mut Surroundings<'_, H>,
        then: Then,
    ) {
        if self.disk.as_ref().is_none_or(Disk::is_idle) {
            self.finished(world, then);
        }
    }

    fn finished<H: Hypervisor + Bus>(&mut self, world: &mut Surroundings<'_, H>, then: Then) {
        self.close_files(world);
        self.stage = Stage::Finished;
        if !self.stats_shown.is_empty() {
            world.xs.surely_remove(&self.stats_path());
        }
        world.xs.unwatch(&self.front_state(), self.watch());
        match then {
            Then::DeleteBackend => {
                log::info!("guest {} disk {}: detached", self.guest.0, self.vdev);
                self.delete(world);
            }
            Then::Forget => self.nowhere(world),
            Then::Replace => {
                log::info!("guest {} disk {}: replaced by another", self.guest.0, self.vdev);
                self.deleted(world);
            }
        }
    }

    fn delete<H: Hypervisor + Bus>(&mut self, world: &mut Surroundings<'_, H>) {
        let purpose = Purpose::DeviceRemoved { index: self.index, serial: self.serial };
        self.busy = Busy::Writing;
        if !world.xs.remove(&self.be, purpose) {
            self.try_later(world.now_ns);
        }
    }

    /// Its directory is gone, by us or by others.
    pub(super) fn deleted<H: Hypervisor + Bus>(&mut self, world: &mut Surroundings<'_, H>) {
        // Another device may have come to be at the same path before we heard of it.
        let parent = self.be.rsplit_once('/').map(|(parent, _)| parent.to_string());
        if let Some(path) = parent {
            world.xs.list(&path.clone(), Purpose::Scan { path, depth: 2 });
        }
        self.nowhere(world);
    }

    /// Another device may come to be at the same path while this one still has its place.
    fn nowhere<H: Hypervisor + Bus>(&mut self, world: &mut Surroundings<'_, H>) {
        (self.be, self.wake_ns) = (NOWHERE.to_string(), None);
        self.leave(world);
    }

    /// Its directory could not be deleted: the toolstack may have done so meanwhile.
    pub(super) fn look_at_last<H>(&mut self, world: &mut Surroundings<'_, H>) {
        if self.be != NOWHERE {
            self.read(world, Batch::Last, &[self.below_be("state")]);
        }
    }

    /// Closed is ours; what shows anything else is a new device, or nothing.
    pub(super) fn last_read<H: Hypervisor + Bus>(&mut self, world: &mut Surroundings<'_, H>) {
        match self.text("state") {
            Some("6") => self.delete(world),
            _ => self.deleted(world),
        }
    }

    /// Frees its place once no answer is on the way to it: the next device there would take it
    /// for its own.
    pub(super) fn leave<H: Hypervisor + Bus>(&mut self, world: &mut Surroundings<'_, H>) {
        world.engine.orphan_waiting(self.index);
        if self.be == NOWHERE && !world.engine.has_ops_of(self.index) {
            self.fate = Fate::Gone;
        }
    }

    fn front_state(&self) -> String {
        format!("{}/state", self.fe.as_deref().unwrap_or(""))
    }
}

/// Why a store that a path names cannot be used.
fn store_missing(engine: &Engine<AnyStore>, name: &str) -> String {
    if engine.store_named(name).is_some() {
        return format!("the server of store '{name}' is not there: start it, then attach again");
    }
    let mut known = String::new();
    for name in engine.stores.iter().flat_map(|slot| slot.names()) {
        known.push_str(if known.is_empty() { "" } else { ", " });
        known.push_str(name);
    }
    let known = if known.is_empty() { "none".to_string() } else { known };
    format!("there is no store '{name}': known are {known}; see p9= and disk= of this domain")
}

/// The file that stands in the way of opening `wanted`.
fn conflict(held: &[Held], wanted: &Held) -> Option<Held> {
    let same = |h: &&Held| {
        h.device != wanted.device && h.store == wanted.store && h.identity == wanted.identity
    };
    held.iter().filter(same).find(|h| h.writable || wanted.writable).copied()
}
