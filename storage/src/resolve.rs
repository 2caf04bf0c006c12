//! From a path to the sectors that it names: `xvda`, `xvda/p2`, `xvda/LABEL`, `xvda/VG/LV`,
//! `xvda/p1/dir/a.qcow2`, `xvda/VG/LV/a.qcow2`.
//!
//! The first component is a disk. The next is looked for as a partition (number, label, GUID),
//! then as a volume group with a physical volume on that disk or partition, then as a name on
//! an ext4 filesystem there. Straight-line code over [`Disks`]: a missing block stops it, and it
//! starts again when that block is there.

use crate::bytes::Mark;
use crate::ext4::{self, Mapper};
use crate::meta::{Disks, MetaFault, VolumeReader, refused};
use crate::partition::{Table, read_table};
use crate::scan::{Range, Scan};
use crate::volume::{Layout, Volume};
use crate::{Access, StoreFault};

/// What one opening has found on its way, kept from call to call.
#[derive(Default)]
pub struct Progress {
    scan: Scan,
    mapper: Mapper,
}

impl Progress {
    /// Grows from call to call, or the opening makes no progress.
    pub fn steps(&self) -> u64 {
        self.mapper.progress().saturating_add(self.scan.steps())
    }
}

/// What a path names.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Resolved {
    pub layout: Layout,
    /// The disk, when the path names all of it: its size may change.
    pub whole_disk: bool,
    /// False for a volume that LVM marks read-only.
    pub writable: bool,
    /// See [`crate::Opened::identity`].
    pub identity: u64,
    /// Of the names that the disk's content bears on the way there: partition table, volume group
    /// and volume, file system and file.
    pub mark: Mark,
}

/// Finds what `path` names.
pub fn resolve(
    disks: &dyn Disks,
    path: &str,
    access: Access,
    progress: &mut Progress,
) -> Result<Resolved, MetaFault> {
    let (name, rest) = split(path);
    let disk = (0..disks.count()).find(|&disk| disks.name(disk) == name);
    let disk = disk.ok_or(StoreFault::NotFound)?;
    let sectors = disks.sectors(disk);
    if sectors == 0 {
        return Err(StoreFault::Gone.into());
    }
    let whole = Volume::linear(disk, 0, sectors);
    let Some(rest) = rest else {
        return Ok(Resolved { whole_disk: true, ..plain(whole, true, Mark::NONE) });
    };
    let table = table_of(disks, disk, &whole)?;
    let mark = Mark::NONE.with(&table.id);
    let (word, after) = split(rest);
    let (partition, ambiguous) = table.find(word);
    if ambiguous {
        return refused("several partitions have that label: name one by number or GUID");
    }
    let Some(partition) = partition else {
        let range = Range { disk, sector: 0, sectors };
        return within(disks, range, whole, mark, rest, access, progress);
    };
    if access == Access::ReadWrite && table.trespasses(partition) {
        return refused("the partition overlaps another one or the partition table");
    }
    let (sector, sectors) = (partition.sector, partition.sectors);
    let range = Range { disk, sector, sectors };
    let volume = Volume::linear(disk, partition.sector, partition.sectors);
    match after {
        None => Ok(plain(volume, true, mark)),
        Some(rest) => within(disks, range, volume, mark, rest, access, progress),
    }
}

/// What `rest` names inside a disk or partition: a logical volume or a file.
fn within(
    disks: &dyn Disks,
    range: Range,
    volume: Volume,
    mark: Mark,
    rest: &str,
    access: Access,
    progress: &mut Progress,
) -> Result<Resolved, MetaFault> {
    let (word, after) = split(rest);
    let (name, below) = after.map(split).unzip();
    if let Some(found) = progress.scan.logical_volume(disks, range, word, name)? {
        let after = below.flatten();
        let resolved = plain(found.volume, found.writable, found.mark);
        return match after {
            None => Ok(resolved),
            Some(path) => file(disks, resolved, path, access, &mut progress.mapper),
        };
    }
    file(disks, plain(volume, true, mark), rest, access, &mut progress.mapper)
}

fn plain(volume: Volume, writable: bool, mark: Mark) -> Resolved {
    let identity = identity_of(&volume, 0);
    Resolved { layout: Layout::whole(volume), whole_disk: false, writable, identity, mark }
}

/// Disk and sector of a byte of the volume: no two things start at the same place, but a disk
/// and its first bytes, which is one thing.
fn identity_of(volume: &Volume, sector: u64) -> u64 {
    volume.place(sector).map_or(u64::MAX, |place| u64::from(place.disk) << 48 | place.sector)
}

/// A file on the filesystem that `on` holds.
fn file(
    disks: &dyn Disks,
    on: Resolved,
    path: &str,
    access: Access,
    mapper: &mut Mapper,
) -> Result<Resolved, MetaFault> {
    let volume = on.layout.volume;
    let reader = VolumeReader { disks, volume: &volume };
    if !ext4::is_ext4(&reader)? {
        return Err(StoreFault::NotFound.into());
    }
    let found = ext4::open(&reader, path, access, mapper)?;
    let extents = core::mem::take(mapper).into_extents();
    let first = extents.first().map(|extent| extent.sector);
    // A file without a block is told apart by its inode; bit 63 keeps it from all places.
    let none = 1 << 63 | identity_of(&volume, 0) ^ u64::from(found.inode) << 16;
    let identity = first.map_or(none, |sector| identity_of(&volume, sector));
    let layout = Layout { volume, extents: Some(extents), size_bytes: found.size_bytes };
    let mark = on.mark.with(&found.mark.0.to_le_bytes());
    Ok(Resolved { layout, identity, mark, ..on })
}

/// The first component and the rest, if any.
fn split(path: &str) -> (&str, Option<&str>) {
    match path.split_once('/') {
        Some((word, rest)) => (word, Some(rest)),
        None => (path, None),
    }
}

pub(crate) fn table_of(disks: &dyn Disks, disk: u8, whole: &Volume) -> Result<Table, MetaFault> {
    read_table(&VolumeReader { disks, volume: whole }, disks.block_bytes(disk))
}
