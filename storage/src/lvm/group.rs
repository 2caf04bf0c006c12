//! A volume group's text as a map: from the name of a logical volume to segments on disks.

use alloc::vec::Vec;

use super::claims;
use super::label::{AREAS_MAX, LABEL_SECTORS, Uuid};
use super::text::{Text, Value};
use crate::StoreFault;
use crate::volume::{Area, STRIPES_MAX, Segment, Volume};

/// A physical volume that was found, as the disk range it lies on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Member {
    pub uuid: Uuid,
    pub disk: u8,
    /// First 512-byte sector on the disk.
    pub sector: u64,
    pub sectors: u64,
    /// Where LVM's own texts lie: first byte and bytes, zeros where there is none.
    pub areas: [(u64, u64); AREAS_MAX],
}

impl Member {
    /// Whether sectors of the physical volume hold its label or a metadata area.
    fn is_lvms_own(&self, sector: u64, sectors: u64) -> bool {
        let end = sector.saturating_add(sectors);
        let hits = |&(start, bytes): &(u64, u64)| {
            let last = start.saturating_add(bytes).div_ceil(512);
            bytes > 0 && start / 512 < end && sector < last
        };
        sector < LABEL_SECTORS as u64 || self.areas.iter().any(hits)
    }
}

/// A parsed volume group.
pub struct Group<'a> {
    text: Text<'a>,
    /// The group's section.
    node: usize,
    name: &'a str,
    extent_sectors: u64,
}

const BAD: StoreFault = StoreFault::Refused("the LVM metadata lacks a field that it must have");

/// Segment types that exist, and why each is refused.
const OTHER_TYPES: [(&str, &str); 12] = [
    ("thin-pool", "an LVM thin pool cannot be served: use a linear or striped volume"),
    ("thin", "an LVM thin volume cannot be served: use a linear or striped volume"),
    ("snapshot", "an LVM snapshot cannot be served: use a linear or striped volume"),
    ("cache", "an LVM cached volume cannot be served: split its cache off"),
    ("writecache", "an LVM write-cached volume cannot be served: split its cache off"),
    ("raid", "an LVM RAID volume cannot be served: let dom0 activate it and give it as a disk"),
    ("mirror", "an LVM mirror cannot be served: let dom0 activate it and give it as a disk"),
    ("vdo", "an LVM VDO volume cannot be served: let dom0 activate it and give it as a disk"),
    ("integrity", "an LVM volume with integrity cannot be served: let dom0 activate it"),
    ("error", "the LVM volume has a segment of type error"),
    ("zero", "an LVM volume with a segment of type zero cannot be served"),
    ("linear", "the LVM volume has a segment of type linear, which lvm2 does not write"),
];

impl<'a> Group<'a> {
    /// Takes the one group of a text.
    pub fn parse(bytes: &'a [u8]) -> Result<Group<'a>, StoreFault> {
        let text = Text::parse(bytes)?;
        let group = text.members(Text::ROOT).find(|&(_, _, value)| value == Value::Section);
        let (node, name, _) = group.ok_or(BAD)?;
        let extent_sectors = text.number(node, "extent_size").ok_or(BAD)?;
        if extent_sectors == 0 || text.string(node, "format").is_some_and(|f| f != "lvm2") {
            return Err(BAD);
        }
        Ok(Group { text, node, name, extent_sectors })
    }

    pub fn name(&self) -> &'a str {
        self.name
    }

    /// Of two texts of a group the one with the higher number is current.
    pub fn seqno(&self) -> u64 {
        self.text.number(self.node, "seqno").unwrap_or(0)
    }

    /// The group's own identity: two groups may share a name.
    pub fn id(&self) -> Option<&'a str> {
        self.text.string(self.node, "id")
    }

    /// The identity of a logical volume, which keeps it when it is renamed.
    pub fn volume_id(&self, name: &str) -> Option<&'a str> {
        let volumes = self.text.section(self.node, "logical_volumes")?;
        self.text.string(self.text.section(volumes, name)?, "id")
    }

    /// Whether a physical volume belongs to this group.
    pub fn holds(&self, uuid: &Uuid) -> bool {
        let Some(pvs) = self.text.section(self.node, "physical_volumes") else { return false };
        self.text.members(pvs).any(|(pv, _, _)| {
            self.text.string(pv, "id").and_then(plain_uuid).as_ref() == Some(uuid)
        })
    }

    /// The map of logical volume `name` over `found`, and whether it may be written.
    /// `capacity` answers the sectors of a disk.
    pub fn volume(
        &self,
        name: &str,
        found: &[Member],
        capacity: &dyn Fn(u8) -> u64,
    ) -> Result<(Volume, bool), StoreFault> {
        if self.text.has(self.node, "status", "EXPORTED") {
            return Err(StoreFault::Refused("the LVM volume group is exported"));
        }
        let volumes = self.text.section(self.node, "logical_volumes");
        let volumes = volumes.ok_or(StoreFault::NotFound)?;
        let node = self.text.section(volumes, name).ok_or(StoreFault::NotFound)?;
        if !self.text.has(node, "status", "VISIBLE") {
            return Err(StoreFault::Refused("the LVM volume is an internal part of another one"));
        }
        if self.text.has(node, "status", "LOCKED") || self.text.has(node, "status", "PVMOVE") {
            return Err(StoreFault::Refused("the LVM volume is being moved by pvmove"));
        }
        self.refuse_snapshots(volumes, name)?;
        let writable = self.text.has(node, "status", "WRITE");
        let count = self.text.number(node, "segment_count").ok_or(BAD)?;
        let mut segments = Vec::new();
        for (segment, key, value) in self.text.members(node) {
            if value == Value::Section && key.starts_with("segment") {
                segments.push(self.segment(segment, found)?);
            }
        }
        if segments.len() as u64 != count {
            return Err(BAD);
        }
        let pvs = self.text.section(self.node, "physical_volumes").ok_or(BAD)?;
        claims::prove(&self.text, pvs, volumes, name, self.extent_sectors)?;
        segments.sort_by_key(|segment| segment.start);
        Ok((Volume::new(segments, capacity)?, writable))
    }

    /// A snapshot is a hidden volume that names its origin: writing the origin without
    /// copying to the snapshot first would destroy the snapshot.
    fn refuse_snapshots(&self, volumes: usize, name: &str) -> Result<(), StoreFault> {
        for (volume, _, value) in self.text.members(volumes) {
            let Some(segment) = self.text.section(volume, "segment1") else { continue };
            if value != Value::Section || self.text.string(segment, "type") != Some("snapshot") {
                continue;
            }
            let is = |key| self.text.string(segment, key) == Some(name);
            if is("origin") {
                return Err(StoreFault::Refused("the LVM volume has a snapshot: remove it first"));
            }
            if is("cow_store") {
                return Err(StoreFault::Refused("the LVM volume is a snapshot"));
            }
        }
        Ok(())
    }

    fn segment(&self, node: usize, found: &[Member]) -> Result<Segment, StoreFault> {
        let text = &self.text;
        let kind = text.string(node, "type").ok_or(BAD)?;
        if kind != "striped" {
            let other = OTHER_TYPES.iter().find(|(prefix, _)| kind.starts_with(prefix));
            let why = other.map_or("the LVM volume has a segment of unknown type", |(_, why)| *why);
            return Err(StoreFault::Refused(why));
        }
        let number = |key| text.number(node, key).ok_or(BAD);
        let extents = |count: u64| count.checked_mul(self.extent_sectors).ok_or(BAD);
        let (start, sectors) =
            (extents(number("start_extent")?)?, extents(number("extent_count")?)?);
        let stripes = number("stripe_count")?;
        if stripes == 0 || stripes > STRIPES_MAX as u64 {
            return Err(StoreFault::Limit(STRIPES_MAX as u32));
        }
        let stripe_sectors = if stripes > 1 { number("stripe_size")? } else { 0 };
        let stripe_sectors = u32::try_from(stripe_sectors).map_err(|_| BAD)?;
        let mut elements = text.array(node, "stripes");
        let mut areas = Vec::new();
        for _ in 0..stripes {
            let (Some(Value::Text(name)), Some(Value::Number(extent))) =
                (elements.next(), elements.next())
            else {
                return Err(BAD);
            };
            areas.push(self.area(name, extent, sectors / stripes, found)?);
        }
        Ok(Segment { start, sectors, areas, stripe_sectors })
    }

    /// The place of physical extent `extent` of the physical volume called `name` in this text.
    fn area(
        &self,
        name: &str,
        extent: u64,
        sectors: u64,
        found: &[Member],
    ) -> Result<Area, StoreFault> {
        let text = &self.text;
        let pvs = text.section(self.node, "physical_volumes").ok_or(BAD)?;
        let Some(pv) = text.section(pvs, name) else {
            return Err(StoreFault::Refused("the LVM volume lies on another logical volume"));
        };
        let uuid = plain_uuid(text.string(pv, "id").ok_or(BAD)?).ok_or(BAD)?;
        let mut members = found.iter().filter(|member| member.uuid == uuid);
        let Some(member) = members.next() else {
            return Err(StoreFault::Refused("a physical volume of the LVM volume is missing"));
        };
        if members.next().is_some() {
            return Err(StoreFault::Refused("two disks carry the same LVM physical volume"));
        }
        if text.has(pv, "flags", "MISSING") || text.has(pv, "status", "MISSING") {
            return Err(StoreFault::Refused("a physical volume is marked as missing"));
        }
        let within = extent
            .checked_mul(self.extent_sectors)
            .and_then(|at| at.checked_add(text.number(pv, "pe_start")?))
            .ok_or(BAD)?;
        let fits = within.checked_add(sectors).is_some_and(|end| end <= member.sectors);
        if !fits {
            return Err(StoreFault::Refused("the volume reaches beyond its physical volume"));
        }
        if member.is_lvms_own(within, sectors) {
            return Err(StoreFault::Refused("the LVM volume lies over LVM's own metadata"));
        }
        let count = sectors.div_ceil(self.extent_sectors);
        let beyond = |extents| extent.checked_add(count).is_none_or(|end| end > extents);
        if text.number(pv, "pe_count").is_some_and(beyond) {
            return Err(StoreFault::Refused("the volume reaches beyond its physical volume"));
        }
        let sector = member.sector.checked_add(within).ok_or(BAD)?;
        Ok(Area { disk: member.disk, sector })
    }
}

/// A UUID as text (`k1fOkr-Ac9y-…`) without its dashes.
pub(super) fn plain_uuid(text: &str) -> Option<Uuid> {
    let mut uuid = [0; 32];
    let mut places = uuid.iter_mut();
    for byte in text.bytes().filter(|&byte| byte != b'-') {
        *places.next()? = byte;
    }
    places.next().is_none().then_some(uuid)
}
