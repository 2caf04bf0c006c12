//! What each logical volume of a group claims of the physical volumes: no sector may be another
//! volume's, claimed twice, or LVM's own.
//!
//! Guards neighbours from a text that was bent: whoever is served a volume writes nothing that is
//! somebody else's by the same text. Must never: refuse one volume for what is odd in others.

use alloc::vec::Vec;

use super::label::Uuid;
use super::text::{Text, Value};
use crate::StoreFault;

/// Sectors of a physical volume.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Claim {
    pv: usize,
    sector: u64,
    sectors: u64,
}

impl Claim {
    fn end(&self) -> u64 {
        self.sector.saturating_add(self.sectors)
    }
}

/// The text's physical volumes: name, identity and where their first extent begins.
struct Pv<'a> {
    name: &'a str,
    uuid: Option<Uuid>,
    start: u64,
}

/// Refuses `name` (one of `volumes`) when it claims a sector twice, or one that another claims.
/// `pvs` is the section of physical volumes.
pub fn prove(
    text: &Text<'_>,
    pvs: usize,
    volumes: usize,
    name: &str,
    extent_sectors: u64,
) -> Result<(), StoreFault> {
    let mut known: Vec<Pv<'_>> = Vec::new();
    for (node, name, value) in text.members(pvs) {
        if value == Value::Section {
            let uuid = text.string(node, "id").and_then(super::group::plain_uuid);
            known.push(Pv { name, uuid, start: text.number(node, "pe_start").unwrap_or(0) });
        }
    }
    let (mut own, mut foreign) = (Vec::new(), Vec::new());
    for (volume, other, value) in text.members(volumes) {
        if value == Value::Section {
            let into = if other == name { &mut own } else { &mut foreign };
            collect(text, volume, extent_sectors, &known, into);
        }
    }
    own.sort_unstable();
    if own.windows(2).any(|two| two[0].pv == two[1].pv && two[0].end() > two[1].sector) {
        return Err(StoreFault::Refused("the LVM volume has two parts in one place"));
    }
    let taken = |claim: &Claim| {
        // Its own parts do not overlap: the last one that begins before the other's end is the
        // one to look at.
        let before = |part: &Claim| (part.pv, part.sector) < (claim.pv, claim.end());
        let at = own.partition_point(before);
        let last = at.checked_sub(1).and_then(|at| own.get(at));
        last.is_some_and(|part| part.pv == claim.pv && part.end() > claim.sector)
    };
    if foreign.iter().any(taken) {
        return Err(StoreFault::Refused("the LVM volume overlaps another volume of its group"));
    }
    Ok(())
}

/// All that one volume claims, as far as it can be read. Parts that lie on other volumes claim
/// nothing themselves.
fn collect(
    text: &Text<'_>,
    volume: usize,
    extent_sectors: u64,
    known: &[Pv<'_>],
    into: &mut Vec<Claim>,
) {
    for (segment, key, value) in text.members(volume) {
        if value != Value::Section || !key.starts_with("segment") {
            continue;
        }
        let extents = text.number(segment, "extent_count").unwrap_or(0);
        let stripes = text.number(segment, "stripe_count").unwrap_or(1).max(1);
        let sectors = (extents / stripes).saturating_mul(extent_sectors);
        let mut elements = text.array(segment, "stripes");
        while let (Some(Value::Text(name)), Some(Value::Number(extent))) =
            (elements.next(), elements.next())
        {
            let Some(found) = known.iter().find(|pv| pv.name == name) else { continue };
            // Two names of one physical volume are one place.
            let same = |pv: &Pv<'_>| pv.uuid.is_some() && pv.uuid == found.uuid;
            let Some(pv) = known.iter().position(same) else { continue };
            let sector = extent.saturating_mul(extent_sectors).saturating_add(found.start);
            if sectors > 0 {
                into.push(Claim { pv, sector, sectors });
            }
        }
    }
}
