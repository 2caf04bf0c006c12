//! A logical volume by its group's name and its own, over the physical volumes of all disks.
//!
//! Disks and partitions of guests are looked at like any other, and what stands there is whatever
//! a guest wrote. Guards: nobody's labels and texts cost another one's opening more than time. What
//! was found is kept from step to step and the blocks it came from may go, so one text at a time
//! is in memory; physical volumes of one disk are bounded; a text is read when it begins with the
//! group's name, and, once the place that was named has told the group's identity, with that.
//! Where an open image may be written nothing is believed. Must never: refuse one opening for what
//! is wrong with somebody else's physical volume.

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use crate::StoreFault;
use crate::bytes::Mark;
use crate::lvm::{AREAS_MAX, Group, LABEL_SECTORS, Member, read_label, read_text};
use crate::meta::{Disks, MetaFault, VolumeReader, refused};
use crate::partition::Scheme;
use crate::resolve::table_of;
use crate::volume::Volume;

/// Physical volumes of one disk (ours): more are passed over, the one that was named is not.
const MEMBERS_OF_DISK_MAX: usize = 32;

/// Sectors of a disk.
#[derive(Clone, Copy, Debug)]
pub struct Range {
    pub disk: u8,
    pub sector: u64,
    pub sectors: u64,
}

impl Range {
    fn holds(&self, disk: u8, sector: u64) -> bool {
        self.disk == disk && sector >= self.sector && sector - self.sector < self.sectors
    }
}

/// A logical volume.
#[derive(Clone, PartialEq, Eq)]
pub struct FoundVolume {
    pub volume: Volume,
    pub writable: bool,
    pub mark: Mark,
}

/// See the module's head.
#[derive(Default)]
pub struct Scan {
    members: Vec<Member>,
    /// Disks that are done, the one that was named first, and of the next one ranges and physical
    /// volumes that are.
    disks: u8,
    ranges: usize,
    of_disk: usize,
    /// Texts that are done, of all areas of all members.
    texts: usize,
    best: Option<Newest>,
    steps: u64,
}

impl Scan {
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The logical volume `name` of group `group`, if that group has a physical volume in
    /// `range`. `None` when it has not.
    pub fn logical_volume(
        &mut self,
        disks: &dyn Disks,
        range: Range,
        group: &str,
        name: Option<&str>,
    ) -> Result<Option<FoundVolume>, MetaFault> {
        self.find_members(disks, range)?;
        let is_here = |member: &Member| range.holds(member.disk, member.sector);
        if !self.members.iter().any(is_here) {
            return Ok(None);
        }
        while let Some(member) = self.members.get(self.texts / AREAS_MAX) {
            let area = member.areas[self.texts % AREAS_MAX];
            if area.1 > 0 {
                let member = *member;
                self.judge_text(disks, range, &member, area, (group, name))?;
            }
            self.texts += 1;
            self.steps += 1;
        }
        let Some(Newest { volume, .. }) = &self.best else { return Ok(None) };
        Ok(Some(volume.clone().unwrap_or(Err(StoreFault::NotAFile))?))
    }

    /// Physical volumes on all disks; on none but the one that was named when there is none in
    /// `range`.
    fn find_members(&mut self, disks: &dyn Disks, range: Range) -> Result<(), MetaFault> {
        let is_here = |member: &Member| range.holds(member.disk, member.sector);
        while self.disks < disks.count() {
            if self.disks > 0 && !self.members.iter().any(is_here) {
                return Ok(());
            }
            let disk = match self.disks {
                0 => range.disk,
                // Those before the one that was named move up by one.
                other => other - u8::from(other <= range.disk),
            };
            self.scan_disk(disks, disk, range)?;
            self.disks += 1;
            (self.ranges, self.of_disk) = (0, 0);
        }
        Ok(())
    }

    /// Physical volumes on a disk: on all of it, or on its partitions.
    fn scan_disk(&mut self, disks: &dyn Disks, disk: u8, named: Range) -> Result<(), MetaFault> {
        let sectors = disks.sectors(disk);
        // An image may be all of it.
        if sectors == 0 || disks.is_written(disk, 0, 1) {
            return Ok(());
        }
        let table = match table_of(disks, disk, &Volume::linear(disk, 0, sectors)) {
            Err(MetaFault::Miss(miss)) => return Err(MetaFault::Miss(miss)),
            // Another disk's broken table is not this opening's concern.
            Err(MetaFault::Refused(_)) => return Ok(()),
            Ok(table) => table,
        };
        let ranges: Vec<(u64, u64)> = match table.scheme {
            Scheme::None => alloc::vec![(0, sectors)],
            _ => table.partitions.iter().map(|part| (part.sector, part.sectors)).collect(),
        };
        let is_named = |&(sector, _): &(u64, u64)| named.holds(disk, sector);
        let first = ranges.iter().copied().filter(is_named);
        let others = ranges.iter().copied().filter(|range| !is_named(range));
        for (sector, sectors) in first.chain(others).skip(self.ranges) {
            if self.of_disk == MEMBERS_OF_DISK_MAX {
                return Ok(());
            }
            if !disks.is_written(disk, sector, LABEL_SECTORS as u64) {
                let volume = Volume::linear(disk, sector, sectors);
                if let Some(label) = read_label(&VolumeReader { disks, volume: &volume })? {
                    let areas = label.areas_padded();
                    self.members.push(Member { uuid: label.uuid, disk, sector, sectors, areas });
                    self.of_disk += 1;
                }
            }
            self.ranges += 1;
            self.steps += 1;
        }
        Ok(())
    }

    /// Reads one text and enters what it says, if it is the group's.
    fn judge_text(
        &mut self,
        disks: &dyn Disks,
        range: Range,
        member: &Member,
        area: (u64, u64),
        (group, name): (&str, Option<&str>),
    ) -> Result<(), MetaFault> {
        let volume = Volume::linear(member.disk, member.sector, member.sectors);
        let id = self.best.as_ref().map(|best| best.id.as_str());
        let begins = |head: &[u8]| begins_with(head, group, id.unwrap_or(""));
        // One that is too long for us is passed over only if it may be somebody else's.
        let ours = id.is_some() || range.holds(member.disk, member.sector);
        let text = match read_text(&VolumeReader { disks, volume: &volume }, area, &begins) {
            Err(MetaFault::Refused(StoreFault::Limit(_))) if !ours => None,
            other => other?,
        };
        let Some(text) = text else { return Ok(()) };
        // What cannot be read, or does not name the place where it stands, is somebody else's:
        // a guest's whole disk may be a partition that we look at.
        let parsed = match Group::parse(&text) {
            Err(fault @ StoreFault::Limit(_)) if ours => return Err(fault.into()),
            Err(_) => return Ok(()),
            Ok(parsed) if parsed.name() == group && parsed.holds(&member.uuid) => parsed,
            Ok(_) => return Ok(()),
        };
        // Not by whose text it is: a physical volume may have none of its own. Groups that
        // have nothing here may have the same name.
        let is_here =
            |member: &Member| range.holds(member.disk, member.sector) && parsed.holds(&member.uuid);
        if !self.members.iter().any(is_here) {
            return Ok(());
        }
        let volume = name.map(|name| found_volume(disks, &parsed, name, &self.members));
        let (seqno, id) = (parsed.seqno(), parsed.id().unwrap_or("").to_string());
        Newest { seqno, id, volume }.enter(&mut self.best)
    }
}

/// Whether a text is of group `group`, with the identity `id` unless that is empty: lvm2 writes
/// the name first and the identity next.
fn begins_with(head: &[u8], group: &str, id: &str) -> bool {
    let Some(after) = head.strip_prefix(group.as_bytes()) else { return false };
    let ends = after.first().is_some_and(|byte| byte.is_ascii_whitespace() || *byte == b'{');
    ends && (id.is_empty() || after.windows(id.len()).any(|word| word == id.as_bytes()))
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
