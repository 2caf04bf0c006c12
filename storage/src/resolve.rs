//! From a path to the sectors that it names: `xvda`, `xvda/p2`, `xvda/LABEL`, `xvda/VG/LV`,
//! `xvda/p1/dir/a.qcow2`, `xvda/VG/LV/a.qcow2`.
//!
//! The first component is a disk. The next is looked for as a partition (number, label, GUID),
//! then as a volume group with a physical volume on that disk or partition, then as a name on
//! an ext4 filesystem there. Straight-line code over [`Disks`]: a missing block stops it, and it
//! starts again when that block is there.

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use crate::bytes::Mark;
use crate::ext4::{self, Mapper};
use crate::lvm::{Group, Member, PhysicalVolume, read_label, read_text};
use crate::meta::{Disks, MetaFault, VolumeReader, refused};
use crate::partition::{Scheme, Table, read_table};
use crate::volume::{Layout, Volume};
use crate::{Access, StoreFault};

/// Physical volumes looked at over all disks (ours).
const MEMBERS_MAX: usize = 256;

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

/// Finds what `path` names. `mapper` keeps the extents of a file between calls.
pub fn resolve(
    disks: &dyn Disks,
    path: &str,
    access: Access,
    mapper: &mut Mapper,
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
        let range = (disk, 0, sectors);
        return within(disks, range, whole, mark, rest, access, mapper);
    };
    if access == Access::ReadWrite && table.trespasses(partition) {
        return refused("the partition overlaps another one or the partition table");
    }
    let range = (disk, partition.sector, partition.sectors);
    let volume = Volume::linear(disk, partition.sector, partition.sectors);
    match after {
        None => Ok(plain(volume, true, mark)),
        Some(rest) => within(disks, range, volume, mark, rest, access, mapper),
    }
}

/// What `rest` names inside a disk or partition: a logical volume or a file.
fn within(
    disks: &dyn Disks,
    range: (u8, u64, u64),
    volume: Volume,
    mark: Mark,
    rest: &str,
    access: Access,
    mapper: &mut Mapper,
) -> Result<Resolved, MetaFault> {
    let (word, after) = split(rest);
    if let Some(found) = logical_volume(disks, range, word, after)? {
        let after = after.and_then(|after| split(after).1);
        let resolved = plain(found.volume, found.writable, found.mark);
        return match after {
            None => Ok(resolved),
            Some(path) => file(disks, resolved, path, access, mapper),
        };
    }
    file(disks, plain(volume, true, mark), rest, access, mapper)
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

fn table_of(disks: &dyn Disks, disk: u8, whole: &Volume) -> Result<Table, MetaFault> {
    read_table(&VolumeReader { disks, volume: whole }, disks.block_bytes(disk))
}

/// A physical volume that was found.
struct Found {
    member: Member,
    label: PhysicalVolume,
}

impl Found {
    fn volume(&self) -> Volume {
        Volume::linear(self.member.disk, self.member.sector, self.member.sectors)
    }
}

/// A logical volume.
#[derive(PartialEq, Eq)]
struct FoundVolume {
    volume: Volume,
    writable: bool,
    mark: Mark,
}

/// The logical volume `rest` of group `group`, if that group has a physical volume in `range`
/// of `disk`. `None` when it has not.
fn logical_volume(
    disks: &dyn Disks,
    (disk, first, sectors): (u8, u64, u64),
    group: &str,
    rest: Option<&str>,
) -> Result<Option<FoundVolume>, MetaFault> {
    // A scan over everything only where the place that was named holds LVM at all.
    let mut here = Vec::new();
    scan_disk(disks, disk, &mut here)?;
    let inside = |member: &Member| {
        member.disk == disk && member.sector >= first && member.sector - first < sectors
    };
    if !here.iter().any(|found| inside(&found.member)) {
        return Ok(None);
    }
    let mut all = Vec::new();
    for disk in 0..disks.count() {
        scan_disk(disks, disk, &mut all)?;
    }
    let members: Vec<Member> = all.iter().map(|found| found.member).collect();
    let name = rest.map(|rest| split(rest).0);
    let mut best: Option<Newest> = None;
    for found in &all {
        let volume = found.volume();
        let reader = VolumeReader { disks, volume: &volume };
        for &area in &found.label.areas {
            let Some(text) = read_text(&reader, area)? else { continue };
            // What cannot be read, or does not name the place where it stands, is somebody else's:
            // a guest's whole disk may be a partition that we look at.
            let Ok(parsed) = Group::parse(&text) else { continue };
            if parsed.name() != group || !parsed.holds(&found.member.uuid) {
                continue;
            }
            // Not by whose text it is: a physical volume may have none of its own. Groups that
            // have nothing here may have the same name.
            let is_here = |found: &Found| inside(&found.member) && parsed.holds(&found.member.uuid);
            if !here.iter().any(is_here) {
                continue;
            }
            let volume = name.map(|name| found_volume(disks, &parsed, name, &members));
            let (seqno, id) = (parsed.seqno(), parsed.id().unwrap_or("").to_string());
            Newest { seqno, id, volume }.enter(&mut best)?;
        }
    }
    let Some(Newest { volume, .. }) = best else { return Ok(None) };
    Ok(Some(volume.unwrap_or(Err(StoreFault::NotAFile))?))
}

fn found_volume(
    disks: &dyn Disks,
    group: &Group<'_>,
    name: &str,
    members: &[Member],
) -> Result<FoundVolume, StoreFault> {
    let (volume, writable) = group.volume(name, members, &|disk| disks.sectors(disk))?;
    let ids = [group.id(), group.volume_id(name)].map(|id| id.unwrap_or("").as_bytes());
    Ok(FoundVolume { volume, writable, mark: Mark::NONE.with(ids[0]).with(ids[1]) })
}

/// What the current text of a group says, so far.
struct Newest {
    seqno: u64,
    id: String,
    /// Of the volume that was asked for, if one was.
    volume: Option<Result<FoundVolume, StoreFault>>,
}

impl Newest {
    /// Of several texts the one with the higher number counts; those of one number must agree.
    fn enter(self, best: &mut Option<Newest>) -> Result<(), MetaFault> {
        match best {
            Some(newest) if newest.id != self.id => refused("two LVM volume groups have that name"),
            Some(newest) if newest.seqno > self.seqno => Ok(()),
            Some(newest) if newest.seqno == self.seqno => match newest.volume == self.volume {
                true => Ok(()),
                false => refused("two copies of the LVM metadata disagree: run vgck"),
            },
            _ => {
                *best = Some(self);
                Ok(())
            }
        }
    }
}

/// Physical volumes on a disk: on all of it, or on its partitions.
fn scan_disk(disks: &dyn Disks, disk: u8, into: &mut Vec<Found>) -> Result<(), MetaFault> {
    let sectors = disks.sectors(disk);
    if sectors == 0 {
        return Ok(());
    }
    let whole = Volume::linear(disk, 0, sectors);
    let table = match table_of(disks, disk, &whole) {
        Err(MetaFault::Miss(miss)) => return Err(MetaFault::Miss(miss)),
        // Another disk's broken table is not this opening's concern.
        Err(MetaFault::Refused(_)) => return Ok(()),
        Ok(table) => table,
    };
    let ranges: Vec<(u64, u64)> = match table.scheme {
        Scheme::None => alloc::vec![(0, sectors)],
        _ => table.partitions.iter().map(|part| (part.sector, part.sectors)).collect(),
    };
    for (sector, sectors) in ranges {
        let volume = Volume::linear(disk, sector, sectors);
        let Some(label) = read_label(&VolumeReader { disks, volume: &volume })? else { continue };
        if into.len() == MEMBERS_MAX {
            return refused("more than 256 LVM physical volumes");
        }
        let areas = label.areas_padded();
        let member = Member { uuid: label.uuid, disk, sector, sectors, areas };
        into.push(Found { member, label });
    }
    Ok(())
}
