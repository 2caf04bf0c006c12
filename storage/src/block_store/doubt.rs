//! A device that was away may come back as another disk under its old name: another configuration
//! behind `xvda`, another machine's volume. What is open on it is looked at before anything is
//! sent there.
//!
//! Guards: between the device's return and the verdict on a file, no operation of that file
//! reaches the device, not even one that its predecessor had not answered. Another disk is told by
//! what the device says of itself, by its size, and by the marks that its content bears: the
//! identities of partition table, volume group and volume, file system and file, and their places.
//! A whole disk's content is its guest's, and bears none. Must never: change a file's place.

use platter_xen::Hypervisor;

use super::opening::{Look, Request};
use super::{BlockStore, File};
use crate::disk::{Device, DiskTag};
use crate::resolve::Resolved;
use crate::store::{FileId, StoreFault, Tag};

/// Between two looks at a file whose disks could not be read (ours), and how many of them.
const RETRY_NS: u64 = 100_000_000;
const LOOKS_MAX: u8 = 100;

/// What is held against a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Doubt {
    None,
    /// A device under it came back: looked at so often, and next at this time.
    Open {
        looks: u8,
        at_ns: u64,
    },
    /// The disk under it is another one.
    Proved(&'static str),
}

impl<D> BlockStore<D> {
    /// Says of devices what files must be sure of, for a mask of disks.
    pub(super) fn source_of<H: Hypervisor>(&self, disks: u32) -> u64
    where
        D: Device<H>,
    {
        let on = (0..).zip(&self.disks).filter(|(number, _): &(u32, _)| disks >> number & 1 == 1);
        on.fold(0, |source, (_, disk)| {
            let identity = self.devices.get(disk.device).map_or(0, |at| at.device.identity());
            // Order matters, and no two equal ones may cancel each other out.
            source.rotate_left(7) ^ identity
        })
    }

    /// A device came back: all files on it are doubted, and an opening begins anew.
    pub(super) fn doubt_files_of(&mut self, device: usize) {
        let of_device = (0..).zip(&self.disks).filter(|(_, disk)| disk.device == device);
        let back = of_device.fold(0u32, |mask, (number, _): (u32, _)| mask | 1 << number);
        for file in self.files.iter_mut().flatten().filter(|file| file.disks & back != 0) {
            file.doubt = Doubt::Open { looks: 0, at_ns: 0 };
            self.doubts = true;
        }
        if let Some(opening) = &mut self.opening {
            opening.begin_anew();
        }
    }

    /// What is held back at a device goes on, or fails, when its file was looked at.
    pub(super) fn settle_held<H: Hypervisor>(&mut self, device: usize)
    where
        D: Device<H>,
    {
        let (ops, files) = (&self.ops, &self.files);
        self.devices[device].device.settle(&|DiskTag(index)| {
            let file = files.get(usize::from(ops.get(index).file.0)).and_then(Option::as_ref);
            // An opening begins anew.
            match file.map(|file| file.doubt) {
                Some(Doubt::Open { .. }) => None,
                Some(Doubt::None) => Some(true),
                Some(Doubt::Proved(_)) | None => Some(false),
            }
        });
    }

    /// Begins the next look at a doubted file.
    pub(super) fn look_at_doubted<H: Hypervisor>(&mut self, now_ns: u64)
    where
        D: Device<H>,
    {
        if !self.doubts || self.opening.is_some() {
            return;
        }
        self.doubts = false;
        for at in 0..self.files.len() {
            let Some(file) = self.files[at].as_ref() else { continue };
            let Doubt::Open { looks, at_ns } = file.doubt else { continue };
            self.doubts = true;
            if at_ns > now_ns {
                continue;
            }
            if let Some(verdict) = self.judge_device::<H>(file) {
                self.say(at, verdict);
                continue;
            }
            let at_ns = now_ns.saturating_add(RETRY_NS);
            if self.is_away::<H>(file.disks) {
                // Another of its disks, or the same one again: it would not be found.
                self.files[at].as_mut().into_iter().for_each(|file| {
                    file.doubt = Doubt::Open { looks, at_ns };
                });
                continue;
            }
            let look = Look { file: FileId(at as u16), opened: file.opened, doubted: true };
            let (path, access) = (file.path.clone(), file.access);
            let request = Request { tag: Tag(0), path, access, look: Some(look) };
            if let Some(file) = self.files[at].as_mut() {
                file.doubt = Doubt::Open { looks: looks.saturating_add(1), at_ns };
            }
            return self.requests.push_front(request);
        }
    }

    /// When the next look is due.
    pub(super) fn doubts_at_ns(&self) -> Option<u64> {
        let due = |file: &File| match file.doubt {
            Doubt::Open { at_ns, .. } => Some(at_ns),
            Doubt::None | Doubt::Proved(_) => None,
        };
        let waits = self.doubts && self.opening.is_none();
        self.files.iter().flatten().filter_map(due).min().filter(|_| waits)
    }

    /// A verdict without a look at the content, where there is one.
    fn judge_device<H: Hypervisor>(&self, file: &File) -> Option<Doubt>
    where
        D: Device<H>,
    {
        if self.source_of::<H>(file.disks) != file.source {
            return Some(Doubt::Proved("another disk came under its name"));
        }
        let disk = file.whole_disk?;
        let bytes = self.geometry::<H>(disk)?.sectors.saturating_mul(512);
        let smaller = bytes < file.layout.size_bytes;
        Some(if smaller { Doubt::Proved("it came back smaller") } else { Doubt::None })
    }

    /// A look at a doubted file ended.
    pub(super) fn judge<H: Hypervisor>(&mut self, look: Look, found: Result<Resolved, StoreFault>)
    where
        D: Device<H>,
    {
        let at = usize::from(look.file.0);
        let Some(file) = self.files.get(at).and_then(Option::as_ref) else { return };
        let Doubt::Open { looks, .. } = file.doubt else { return };
        if file.opened != look.opened || self.is_away::<H>(file.disks) {
            return;
        }
        let verdict = match found {
            Ok(found) if file.is_at(&found) => Doubt::None,
            Ok(_) => Doubt::Proved("another disk came under its name: its content is another one"),
            // Away again, an error or a lack of memory of the moment.
            Err(StoreFault::Gone | StoreFault::Io(_) | StoreFault::Limit(_))
                if looks < LOOKS_MAX =>
            {
                return;
            }
            Err(StoreFault::Gone | StoreFault::Io(_) | StoreFault::Limit(_)) => {
                Doubt::Proved("it cannot be read")
            }
            Err(StoreFault::Refused(why)) => Doubt::Proved(why),
            Err(_) => Doubt::Proved("another disk came under its name: what was open is not there"),
        };
        self.say(at, verdict);
    }

    fn say(&mut self, at: usize, verdict: Doubt) {
        if let Some(file) = self.files[at].as_mut() {
            file.doubt = verdict;
        }
        if let (Doubt::Proved(why), Some(growth)) = (verdict, self.growth_of(at)) {
            growth.strange += 1;
            growth.why = Some(why);
        }
    }
}

impl File {
    /// The same thing lies where this file is; it may have grown.
    fn is_at(&self, found: &Resolved) -> bool {
        found.mark == self.mark
            && found.layout.extents == self.layout.extents
            && found.layout.size_bytes >= self.layout.size_bytes
            && found.layout.volume.begins_with(&self.layout.volume)
    }
}
