//! Writing: reserve clusters and a table entry block, have the data written, then put the
//! entries. One plan changes entries of one cache block (and of its copy) only, so that it pins
//! at most two blocks.

use alloc::boxed::Box;

use super::{Added, Entry, NewTable, Shape, Space, Table, Use};
use crate::format::Ctx;
use crate::image::PLANS_MAX;
use crate::meta::{BLOCK_BYTES, Phase};
use crate::types::{
    DiscardPlan, FileNo, PRELUDES_MAX, Prelude, Prepared, SECTOR_BYTES, SectorRange, Step, Stop,
    WritePlan,
};

/// Which map of a layer is meant, and how it lies in the guest's disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Part {
    /// Number of the map within the layer (an extent).
    pub unit: u16,
    /// Guest sector of the map's first one.
    pub base_sector: u64,
    /// Absent clusters may hold something, in a layer below.
    pub has_parent: bool,
}

#[derive(Clone, Copy)]
enum Plan {
    Free,
    InPlace,
    New(New),
}

/// Clusters to be mapped when the plan is committed.
#[derive(Clone, Copy)]
struct New {
    unit: u16,
    cluster: u64,
    count: u64,
    offset: u64,
    entry: u64,
    copy: Option<u64>,
    table: Option<NewTable>,
}

impl New {
    fn overlaps(&self, unit: u16, cluster: u64, count: u64) -> bool {
        self.unit == unit && self.cluster < cluster + count && cluster < self.cluster + self.count
    }
}

/// The plans in flight of a writable layer.
pub(crate) struct Writer {
    plans: Box<[Plan; PLANS_MAX]>,
}

/// What a new run of clusters needs, before anything is changed.
struct Draft {
    new: New,
    space: Space,
    /// The head's and the tail's old contents read as zeros.
    head_zero: bool,
    tail_zero: bool,
}

impl Writer {
    pub fn new() -> Writer {
        Writer { plans: Box::new([Plan::Free; PLANS_MAX]) }
    }

    /// The map that plan `slot` belongs to, `None` for one that changes no map.
    pub fn unit(&self, slot: u16) -> Option<u16> {
        match self.plans[slot as usize] {
            Plan::New(new) => Some(new.unit),
            _ => None,
        }
    }

    /// [`Layer::prepare`](crate::format::Layer::prepare) for a range of one map.
    pub fn prepare<S: Shape>(
        &mut self,
        ctx: &mut Ctx,
        (shape, space, part): (&S, &mut Space, Part),
        slot: u16,
        range: SectorRange,
    ) -> Step<WritePlan> {
        let cluster_sectors = shape.cluster_bytes() / SECTOR_BYTES;
        let cluster = range.start / cluster_sectors;
        let within = range.start % cluster_sectors;
        let needed = (within + range.count).div_ceil(cluster_sectors);
        let (entry, count) = shape.run(ctx, cluster, needed)?;
        if let Entry::Data(offset) = entry {
            self.plans[slot as usize] = Plan::InPlace;
            return Ok(WritePlan {
                prepared: Prepared { slot },
                sectors: range.count.min(count * cluster_sectors - within),
                file: shape.file(),
                offset: offset + within * SECTOR_BYTES,
                head: None,
                tail: None,
                preludes: heapless::Vec::new(),
            });
        }
        if self.busy(part.unit, cluster, 1) {
            return Err(Stop::Busy);
        }
        let Some(draft) = self.draft(ctx, (shape, space, part), cluster, needed)? else {
            // The table went in at once: the entry can be located now.
            return self.prepare(ctx, (shape, space, part), slot, range);
        };
        pin(ctx, shape.file(), &draft.new)?;
        let plan = carve(shape, part, &draft, slot, range);
        *space = draft.space;
        space.used();
        self.plans[slot as usize] = Plan::New(draft.new);
        Ok(plan)
    }

    fn busy(&self, unit: u16, cluster: u64, count: u64) -> bool {
        self.plans
            .iter()
            .any(|plan| matches!(plan, Plan::New(new) if new.overlaps(unit, cluster, count)))
    }

    /// Chooses clusters and place; changes nothing, unless a table went in at once (`None`).
    fn draft<S: Shape>(
        &self,
        ctx: &mut Ctx,
        (shape, space, part): (&S, &mut Space, Part),
        cluster: u64,
        needed: u64,
    ) -> Step<Option<Draft>> {
        let mut trial = space.clone();
        let (entry, copy, table) = match shape.locate(ctx, cluster)? {
            Table::At { entry, copy } => (entry, copy, None),
            Table::Missing => match shape.add_table(ctx, &mut trial, cluster)? {
                Added::Installed => {
                    *space = trial;
                    space.used();
                    return Ok(None);
                }
                Added::WithPlan(table) => {
                    if self.makes_table(part.unit, table.directory_at) {
                        return Err(Stop::Busy);
                    }
                    let index = cluster % shape.table_clusters();
                    (table.offset + index * S::ENTRY_BYTES, None, Some(table))
                }
            },
        };
        let is_zero = |entry: Entry| match entry {
            Entry::Absent => !part.has_parent,
            Entry::Zero => true,
            _ => false,
        };
        let bytes = shape.cluster_bytes();
        let max = needed.min(shape.block_clusters(cluster, entry, copy));
        let max = max.min(trial.room(bytes)).max(1);
        let first = if table.is_some() { Entry::Absent } else { shape.entry(ctx, entry)? };
        let (mut count, mut last) = (1, first);
        while count < max && !self.busy(part.unit, cluster + count, 1) {
            if table.is_none() {
                match shape.entry(ctx, entry + count * S::ENTRY_BYTES) {
                    Ok(Entry::Data(_)) | Err(_) => break,
                    Ok(other) => last = other,
                }
            }
            count += 1;
        }
        let offset = trial.take(Use::Clusters, count * bytes, bytes)?;
        let new = New { unit: part.unit, cluster, count, offset, entry, copy, table };
        let (head_zero, tail_zero) = (is_zero(first), is_zero(last));
        Ok(Some(Draft { new, space: trial, head_zero, tail_zero }))
    }

    fn makes_table(&self, unit: u16, directory_at: u64) -> bool {
        self.plans.iter().any(|plan| match plan {
            Plan::New(new) => {
                new.unit == unit && new.table.is_some_and(|t| t.directory_at == directory_at)
            }
            _ => false,
        })
    }

    /// Puts the entries of plan `slot`.
    pub fn commit<S: Shape>(&mut self, ctx: &mut Ctx, shape: &S, slot: u16) {
        let plan = core::mem::replace(&mut self.plans[slot as usize], Plan::Free);
        let Plan::New(new) = plan else { return };
        let width = S::ENTRY_BYTES as usize;
        let file = shape.file();
        for index in 0..new.count {
            let entry = shape.encode(new.offset + index * shape.cluster_bytes());
            let step = index * S::ENTRY_BYTES;
            ctx.meta.put(file, new.entry + step, &entry[..width], Phase::TABLE);
            if let Some(copy) = new.copy {
                ctx.meta.put(file, copy + step, &entry[..width], Phase::TABLE);
            }
        }
        if let Some(table) = new.table {
            let pointer = &table.pointer[..width];
            ctx.meta.put(file, table.directory_at, pointer, Phase::DIRECTORY);
        }
        unpin(ctx, file, &new);
        ctx.files.grow(file, new.offset + new.count * shape.cluster_bytes());
    }

    /// Gives back what plan `slot` reserved.
    pub fn abandon<S: Shape>(
        &mut self,
        ctx: &mut Ctx,
        (shape, space): (&S, &mut Space),
        slot: u16,
    ) {
        let plan = core::mem::replace(&mut self.plans[slot as usize], Plan::Free);
        let Plan::New(new) = plan else { return };
        let file = shape.file();
        unpin(ctx, file, &new);
        space.give_back(Use::Clusters, new.offset, new.count * shape.cluster_bytes());
        if let Some(table) = new.table {
            ctx.meta.forget(file, table.offset, table.bytes.max(BLOCK_BYTES));
            space.give_back(Use::Table, table.offset, table.space_bytes);
        }
    }

    /// [`Layer::discard`](crate::format::Layer::discard) for a range of one map. A discard
    /// leaves the map alone and offers the space for punching; zeroing marks whole clusters
    /// that have no data here. Data is never freed: nothing could find the space again.
    pub fn discard<S: Shape>(
        &mut self,
        ctx: &mut Ctx,
        (shape, part): (&S, Part),
        range: SectorRange,
        zero: bool,
    ) -> Step<DiscardPlan> {
        let cluster_sectors = shape.cluster_bytes() / SECTOR_BYTES;
        let cluster = range.start / cluster_sectors;
        let within = range.start % cluster_sectors;
        let needed = (within + range.count).div_ceil(cluster_sectors);
        let (entry, count) = shape.run(ctx, cluster, needed)?;
        let sectors = range.count.min(count * cluster_sectors - within);
        let nothing = DiscardPlan { sectors, punch: None };
        let refused = DiscardPlan { sectors: 0, punch: None };
        match entry {
            Entry::Zero => Ok(nothing),
            Entry::Absent if !part.has_parent || !zero => Ok(nothing),
            Entry::Data(offset) if !zero => {
                let at = offset + within * SECTOR_BYTES;
                let punch = Some((shape.file(), at, sectors * SECTOR_BYTES));
                Ok(DiscardPlan { sectors, punch })
            }
            Entry::Packed(_) if !zero => Ok(nothing),
            Entry::Data(_) => Ok(refused),
            Entry::Absent | Entry::Packed(_) => {
                let ends_in_cluster = !(within + sectors).is_multiple_of(cluster_sectors);
                let to_end = range.start + sectors == shape.sectors();
                let whole =
                    (within + sectors) / cluster_sectors + u64::from(ends_in_cluster && to_end);
                match shape.zero_entry() {
                    Some(code) if within == 0 && whole > 0 => {
                        let done = put_zero(ctx, shape, cluster, whole, &code)?;
                        let sectors = sectors.min(done * cluster_sectors);
                        Ok(DiscardPlan { sectors, punch: None })
                    }
                    _ => Ok(refused),
                }
            }
        }
    }
}

/// Marks clusters as zero and says how many: 0 when they have no table.
fn put_zero<S: Shape>(
    ctx: &mut Ctx,
    shape: &S,
    cluster: u64,
    count: u64,
    code: &[u8; 8],
) -> Step<u64> {
    let Table::At { entry, copy } = shape.locate(ctx, cluster)? else { return Ok(0) };
    let count = count.min(shape.block_clusters(cluster, entry, copy));
    let file = shape.file();
    ctx.meta.reserve(file, entry)?;
    if let Some(copy) = copy {
        ctx.meta.reserve(file, copy)?;
    }
    for index in 0..count {
        for at in [Some(entry), copy].into_iter().flatten() {
            let code = &code[..S::ENTRY_BYTES as usize];
            ctx.meta.put(file, at + index * S::ENTRY_BYTES, code, Phase::TABLE);
        }
    }
    Ok(count)
}

/// Pins what the commit will change; a new table's block is made here. All or nothing.
fn pin(ctx: &mut Ctx, file: FileNo, new: &New) -> Step<()> {
    let Some(table) = new.table else {
        ctx.meta.pin(file, new.entry)?;
        if let Some(copy) = new.copy
            && let Err(stop) = ctx.meta.pin(file, copy)
        {
            ctx.meta.unpin(file, new.entry);
            return Err(stop);
        }
        return Ok(());
    };
    ctx.meta.pin(file, table.directory_at)?;
    ctx.meta.forget(file, table.offset, table.bytes.max(BLOCK_BYTES));
    let block = new.entry - new.entry % BLOCK_BYTES;
    let made = ctx.meta.create(file, block, Phase::TABLE);
    if let Err(stop) = made.and_then(|()| ctx.meta.pin(file, new.entry)) {
        ctx.meta.forget(file, table.offset, table.bytes.max(BLOCK_BYTES));
        ctx.meta.unpin(file, table.directory_at);
        return Err(stop);
    }
    Ok(())
}

fn unpin(ctx: &mut Ctx, file: FileNo, new: &New) {
    ctx.meta.unpin(file, new.entry);
    if let Some(copy) = new.copy {
        ctx.meta.unpin(file, copy);
    }
    if let Some(table) = new.table {
        ctx.meta.unpin(file, table.directory_at);
    }
}

/// The plan that a draft stands for.
fn carve<S: Shape>(
    shape: &S,
    part: Part,
    draft: &Draft,
    slot: u16,
    range: SectorRange,
) -> WritePlan {
    let new = &draft.new;
    let file = shape.file();
    let cluster_sectors = shape.cluster_bytes() / SECTOR_BYTES;
    let start = new.cluster * cluster_sectors;
    let end = ((new.cluster + new.count) * cluster_sectors).min(shape.sectors());
    let covered_end = range.end().min(end);
    let run_end = new.offset + new.count * shape.cluster_bytes();
    // Freshness was asked of the space as it was before this draft took from it.
    let fresh = draft.space.is_fresh(new.offset);
    let guest = |start: u64, end: u64, known_zero: bool| {
        (start < end && !known_zero)
            .then(|| SectorRange::new(part.base_sector + start, end - start))
    };
    let head = guest(start, range.start, fresh && draft.head_zero);
    let tail = guest(covered_end, end, fresh && draft.tail_zero);
    let written_to = tail.map_or(covered_end, |_| end) - start;
    let mut preludes: heapless::Vec<Prelude, PRELUDES_MAX> = heapless::Vec::new();
    let mut ask = |offset, len| {
        let prelude = Prelude::Zero { file, offset, len };
        assert!(preludes.push(prelude).is_ok(), "two preludes at most");
    };
    if let Some(table) = new.table
        && table.bytes > BLOCK_BYTES
    {
        ask(table.offset, table.bytes);
    }
    let written_end = new.offset + written_to * SECTOR_BYTES;
    if written_end < run_end && fresh {
        // Readers want whole clusters in the file: its end goes to the end of the last one.
        ask(run_end - SECTOR_BYTES, SECTOR_BYTES);
    } else if written_end < run_end {
        // Beyond the end of the disk: a grown disk must read as zeros there.
        ask(written_end, run_end - written_end);
    }
    WritePlan {
        prepared: Prepared { slot },
        sectors: covered_end - range.start,
        file,
        offset: new.offset + (range.start - start) * SECTOR_BYTES,
        head,
        tail,
        preludes,
    }
}
