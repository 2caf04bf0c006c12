//! Partitions and logical volumes that grow while they are open: the table or the text is read
//! anew, an opening like any other, and what was added behind the end is served from then on.
//!
//! Guards: no byte that a file has moves. What was moved, cut or taken for something else under
//! an open file is left as it was at its opening, and counted. Must never: follow a file on
//! ext4, where another system would have to be at work on the filesystem that we write to.

use platter_xen::Hypervisor;

use super::opening::{Look, Request, overlap};
use super::{BlockStore, Doubt, File};
use crate::disk::{Device, Geometry};
use crate::resolve::Resolved;
use crate::store::{Access, FileId, StoreFault, Tag};

/// Between two looks, whatever file they are for (ours): a look reads tables of all disks.
const LOOK_NS: u64 = 1_000_000_000;

/// What has grown or not, for the statistics.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Growth {
    /// Partitions and volumes that grew.
    pub grown: u64,
    /// Changes that were not followed, and the last one's reason.
    pub refused: u64,
    pub why: Option<&'static str>,
    /// Files that are not served any more because the disk under them is another one.
    pub strange: u64,
    /// Pages that cannot be used: a backend or controller that was left may still write to them.
    pub lost_pages: usize,
}

impl File {
    /// It is a partition or a logical volume.
    fn may_grow(&self) -> bool {
        self.whole_disk.is_none() && self.layout.extents.is_none()
    }
}

impl<D> BlockStore<D> {
    /// What became of the partitions and volumes that begin on a device.
    pub fn growth(&self, device: usize) -> Growth {
        let lost_pages = self.pool.lost_at(device);
        Growth { lost_pages, ..self.devices[device].growth }
    }

    /// The account of the device that a file begins on.
    pub(super) fn growth_of(&mut self, file: usize) -> Option<&mut Growth> {
        let volume = &self.files.get(file)?.as_ref()?.layout.volume;
        let disk = self.disks.get(usize::from(volume.areas().next()?.disk))?;
        Some(&mut self.devices.get_mut(disk.device)?.growth)
    }

    /// The size of a file was asked for: its place is looked at soon.
    pub(super) fn ask_for_look(&mut self, file: FileId) {
        if let Some(open) = self.files.get_mut(usize::from(file.0)).and_then(Option::as_mut) {
            open.asked |= open.may_grow();
            self.looks_asked |= open.asked;
        }
    }

    /// Starts the next look when it is time; files take turns.
    pub(super) fn look_for_growth<H: Hypervisor>(&mut self, now_ns: u64)
    where
        D: Device<H>,
    {
        let busy = self.opening.is_some() || !self.requests.is_empty();
        if !self.looks_asked || busy || now_ns < self.next_look_ns {
            return;
        }
        let count = self.files.len();
        let mut turns = (0..count).map(|step| (self.look_at + step) % count);
        let asked = |at: &usize| {
            let file = self.files[*at].as_ref().filter(|file| file.asked);
            file.is_some_and(|file| !self.is_away::<H>(file.disks))
        };
        let next = turns.find(asked);
        let Some((at, open)) = next.and_then(|at| Some((at, self.files[at].as_mut()?))) else {
            self.looks_asked = false;
            return;
        };
        open.asked = false;
        let (file, opened) = (FileId(at as u16), open.opened);
        let look = Some(Look { file, opened, doubted: false });
        let (path, access) = (open.path.clone(), open.access);
        self.look_at = at + 1;
        self.next_look_ns = now_ns.saturating_add(LOOK_NS);
        self.requests.push_back(Request { tag: Tag(0), path, access, look });
    }

    /// A look for growth ended.
    pub(super) fn looked<H: Hypervisor>(
        &mut self,
        Look { file, opened, .. }: Look,
        found: Result<Resolved, StoreFault>,
        geometries: &[Option<Geometry>],
    ) where
        D: Device<H>,
    {
        let at = usize::from(file.0);
        let Some(open) = self.files.get(at).and_then(Option::as_ref) else { return };
        if open.opened != opened || open.doubt != Doubt::None {
            return;
        }
        let why = match found {
            Ok(found) if found.layout == open.layout => None,
            Ok(found) => match self.prove_growth(at, open, &found, geometries) {
                None => return self.grow(at, found),
                why => why,
            },
            Err(StoreFault::NotFound) => Some("it is not there any more under its name"),
            Err(StoreFault::Refused(why)) => Some(why),
            // A disk that is away or an error of the moment: the next look tells.
            Err(_) => return,
        };
        let Some(open) = self.files[at].as_mut() else { return };
        // Once for each change, not for each look at it.
        let is_new = why != core::mem::replace(&mut open.not_followed, why) && why.is_some();
        if let Some(growth) = self.growth_of(at).filter(|_| is_new) {
            growth.refused += 1;
            growth.why = why;
        }
    }

    /// Why a file cannot become what was found; `None` when it can.
    fn prove_growth(
        &self,
        at: usize,
        open: &File,
        found: &Resolved,
        geometries: &[Option<Geometry>],
    ) -> Option<&'static str> {
        let (old, new) = (&open.layout.volume, &found.layout.volume);
        let writes = open.access == Access::ReadWrite;
        let read_only = |disk: usize| geometries[disk].is_some_and(|geometry| geometry.read_only);
        let mut others = (0..).zip(&self.files).filter(|(other, _)| *other != at);
        let clash = |other: &File| {
            (writes || other.access == Access::ReadWrite)
                && other.identity != open.identity
                && overlap(&other.layout, &found.layout)
        };
        if found.layout.extents.is_some() || !new.begins_with(old) {
            Some("what it holds was moved, cut or given to something else")
        } else if writes && !found.writable {
            Some("it became read-only")
        } else if writes && new.areas().any(|area| read_only(usize::from(area.disk))) {
            Some("it grew onto a read-only disk")
        } else if others.any(|(_, other)| other.as_ref().is_some_and(clash)) {
            Some("it grew over another open image")
        } else {
            None
        }
    }

    fn grow(&mut self, at: usize, found: Resolved) {
        let Some(open) = self.files[at].as_mut() else { return };
        open.disks = found.layout.volume.disks();
        open.layout = found.layout;
        open.not_followed = None;
        if let Some(growth) = self.growth_of(at) {
            growth.grown += 1;
        }
    }
}
