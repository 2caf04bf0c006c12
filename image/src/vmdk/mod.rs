//! VMDK: a descriptor, extents behind it (flat, sparse, zero), a parent by content identifier.
//!
//! Orders guarded here: that of [`append`](crate::append) within each extent, both copies of a
//! table changing together; and the CID changes, durably, before the first write after open, so
//! that a child made on an earlier state is refused. Only sparse hosted and flat extents are
//! written; compressed, ESX and seSparse extents and those under change tracking are read.
//! It must never open an extent but by a plain name beside the descriptor.

mod create;
mod descriptor;
mod extent;
mod header;
mod line;
mod resize;
mod sparse;
mod stream;

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use self::descriptor::{CidDigits, Descriptor, NO_PARENT, TEXT_BYTES_MAX, is_descriptor};
use self::extent::{Body, Extent};
use self::header::HEADER_BYTES;
use self::line::{Edit, Text};
use self::resize::Growth;
use crate::append::{Checker, FirstWrite, Part, Writer};
use crate::check::{CheckParams, CheckProgress};
use crate::create::random;
use crate::fault::{FaultKind, ImageFault};
use crate::files::Access;
use crate::format::{
    AnyLayer, Ctx, Format, Found, Inspect, Layer, OpenedLayer, Own, Parent, read_only,
};
use crate::info::Details;
use crate::meta::Phase;
use crate::types::{DiscardPlan, FileNo, Prepared, ResizePlan, SectorRange, Step, WritePlan};
pub(crate) use create::create;
pub use stream::VmdkStream;

/// What only a writable layer has.
struct Writing {
    writer: Writer,
    first: FirstWrite,
    /// The new CID as it stands in the text, to be written by the next flush.
    digits: [u8; 8],
    is_waiting: bool,
    is_sent: bool,
    /// The descriptor's text, once it was changed; the change that waits for the next flush; and
    /// longer directories that are being made.
    text: Option<Text>,
    edit: Option<Edit>,
    growth: Option<Growth>,
    /// What the flush was given last.
    handed: Handed,
}

#[derive(Clone, Copy)]
enum Handed {
    Cid,
    Edit,
}

pub(crate) struct Vmdk {
    file: FileNo,
    /// `None` for a bare sparse extent.
    cid: Option<(u32, CidDigits)>,
    /// Where the descriptor's text stands.
    text_at: Option<(u64, u64)>,
    parent_cid: u32,
    create_type: &'static str,
    tracks_changes: bool,
    extents: Vec<Extent>,
    /// Extents whose headers are read.
    ready: usize,
    writing: Option<Box<Writing>>,
    check: Option<Box<(Checker, usize)>>,
}

impl Vmdk {
    pub fn open(ctx: &mut Ctx, file: FileNo, access: Access) -> Step<OpenedLayer> {
        let mut first = [0; HEADER_BYTES];
        ctx.read(file, 0, &mut first)?;
        let magic = u32::from_le_bytes([first[0], first[1], first[2], first[3]]);
        let is_sparse = matches!(magic, header::MAGIC_HOSTED | header::MAGIC_COWD);
        let text = match header::only_descriptor(&first) {
            Some(place) => Some(place),
            None if is_sparse => None,
            None => Some((0, ctx.files.size(file))),
        };
        let (text_at, descriptor, extents) = match text {
            Some(place) => {
                let (found, place) = read_descriptor(ctx, file, place)?;
                let extents = extent::open_all(ctx, file, access, &found)?;
                (Some(place), Some(found), extents)
            }
            None => {
                let mut own = Extent::whole_file(file);
                own.load(ctx, access)?;
                let (found, place) = match own.descriptor() {
                    Some(place) => {
                        let (found, place) = read_descriptor(ctx, file, place)?;
                        (Some(found), Some(place))
                    }
                    None => (None, None),
                };
                own.end_at(found.as_ref().map_or(&[], |found| &found.lines));
                (place, found, vec![own])
            }
        };
        let has_parent = descriptor.as_ref().is_some_and(|found| found.parent_cid != NO_PARENT);
        let writing = (access == Access::ReadWrite).then(|| {
            Box::new(Writing {
                writer: Writer::new(),
                first: FirstWrite::new(descriptor.is_some()),
                digits: [0; 8],
                is_waiting: false,
                is_sent: false,
                text: None,
                edit: None,
                growth: None,
                handed: Handed::Cid,
            })
        });
        let vmdk = Vmdk {
            file,
            cid: descriptor.as_ref().map(|found| (found.cid, found.cid_digits)),
            text_at,
            parent_cid: descriptor.as_ref().map_or(NO_PARENT, |found| found.parent_cid),
            create_type: descriptor.as_ref().map_or("", |found| found.create_type),
            tracks_changes: descriptor.as_ref().is_some_and(|found| found.tracks_changes),
            extents,
            ready: 0,
            writing,
            check: None,
        };
        let name = descriptor.and_then(|found| found.parent_hint).filter(|_| has_parent);
        let parent = name.map(|name| Parent { name, format: Some(Format::Vmdk) });
        Ok(OpenedLayer { layer: AnyLayer::Vmdk(vmdk), parent })
    }

    fn access(&self) -> Access {
        if self.writing.is_some() { Access::ReadWrite } else { Access::ReadOnly }
    }

    /// The extent that `range` starts in, with the range cut to it and made its own.
    fn extent_at(&self, range: SectorRange) -> (usize, SectorRange) {
        let index = self.extents.partition_point(|extent| extent.end() <= range.start);
        let extent = &self.extents[index];
        let start = range.start - extent.start;
        (index, SectorRange::new(start, range.count.min(extent.sectors - start)))
    }

    fn part(&self, index: usize) -> Part {
        Part {
            unit: index as u16,
            base_sector: self.extents[index].start,
            has_parent: self.parent_cid != NO_PARENT,
        }
    }

    /// Lets a write pass once the new CID is durable.
    fn first_write(&mut self, ctx: &mut Ctx) -> Step<()> {
        let file = self.file;
        let Some(writing) = &mut self.writing else {
            return Err(read_only(file, "the image is open read-only").into());
        };
        if self.tracks_changes {
            return Err(read_only(file, "changed blocks of this VMDK are tracked").into());
        }
        let Writing { first, digits, is_waiting, .. } = &mut **writing;
        let Some((cid, place)) = &mut self.cid else { return first.pass(ctx, |_| Ok(())) };
        first.pass(ctx, |ctx| {
            let seed = ctx.seed ^ u64::from(*cid);
            let mut fresh = (0..).map(|n| new_cid(random(seed, n), place.count));
            let is_new = |new: &u32| new != cid && *new != NO_PARENT;
            *cid = fresh.find(is_new).expect("one of many");
            for (n, digit) in digits[..place.count].iter_mut().rev().enumerate() {
                let value = (*cid >> (4 * n)) & 0xf;
                *digit = b"0123456789abcdef"[value as usize];
            }
            *is_waiting = true;
            Ok(())
        })
    }
}

/// A CID that `digits` hexadecimal digits can hold.
fn new_cid(random: u64, digits: usize) -> u32 {
    assert!((1..=8).contains(&digits), "a CID was parsed");
    (random as u32) >> (32 - 4 * digits as u32)
}

fn read_descriptor(
    ctx: &mut Ctx,
    file: FileNo,
    (at, bytes): (u64, u64),
) -> Step<(Descriptor, (u64, u64))> {
    let size = ctx.files.size(file);
    if at.checked_add(bytes).is_none_or(|end| end > size) {
        let field = "a VMDK descriptor, beyond the end of the file,";
        return Err(ImageFault::corrupt(file, field, at, bytes).into());
    }
    // It is read in one step, so all its blocks must be in the cache at once.
    let max = TEXT_BYTES_MAX.min(ctx.meta.capacity_bytes() / 2);
    let mut text = vec![0; bytes.min(max) as usize];
    ctx.read(file, at, &mut text)?;
    // Much room for a text is no long text.
    if bytes > max && !text.contains(&0) {
        let field = "bytes of a VMDK descriptor";
        return Err(ImageFault::limit(file, field, bytes, max).into());
    }
    if !is_descriptor(&text) {
        let fault = ImageFault::new(FaultKind::NotThisFormat, file, "the start of a descriptor");
        let value = text.iter().take(4).fold(0, |value, &b| value << 8 | u64::from(b));
        return Err(ImageFault { value, offset: at, ..fault }.into());
    }
    Ok((Descriptor::parse(file, at, &text)?, (at, text.len() as u64)))
}

impl Layer for Vmdk {
    fn sectors(&self) -> u64 {
        self.extents.last().map_or(0, Extent::end)
    }

    fn ready(&mut self, ctx: &mut Ctx) -> Step<()> {
        let access = self.access();
        while let Some(extent) = self.extents.get_mut(self.ready) {
            extent.load(ctx, access)?;
            self.ready += 1;
        }
        Ok(())
    }

    fn map(&mut self, ctx: &mut Ctx, range: SectorRange) -> Step<(Found, u64)> {
        let (index, local) = self.extent_at(range);
        self.extents[index].map(ctx, local)
    }

    fn unpacked_bytes(&self) -> u32 {
        self.extents.iter().map(Extent::unpacked_bytes).max().unwrap_or(0)
    }

    fn packs_all(&self) -> bool {
        self.unpacked_bytes() > 0
    }

    fn prepare(&mut self, ctx: &mut Ctx, slot: u16, range: SectorRange) -> Step<WritePlan> {
        self.first_write(ctx)?;
        let (index, local) = self.extent_at(range);
        let part = self.part(index);
        let extent = &mut self.extents[index];
        extent.check_writable()?;
        let writing = self.writing.as_mut().expect("a writable layer");
        match &mut extent.body {
            Body::Sparse(tables, Some(space)) => {
                writing.writer.prepare(ctx, (&*tables, space, part), slot, local)
            }
            Body::Flat(offset) => Ok(WritePlan {
                prepared: Prepared { slot },
                sectors: local.count,
                file: extent.file,
                offset: *offset + local.start_bytes(),
                head: None,
                tail: None,
                preludes: heapless::Vec::new(),
            }),
            _ => Err(read_only(extent.file, "this kind of extent").into()),
        }
    }

    fn commit(&mut self, ctx: &mut Ctx, slot: u16) {
        let writing = self.writing.as_mut().expect("a plan of a writable layer");
        let Some(unit) = writing.writer.unit(slot) else { return };
        if let Body::Sparse(tables, _) = &self.extents[unit as usize].body {
            writing.writer.commit(ctx, tables, slot);
        }
    }

    fn abandon(&mut self, ctx: &mut Ctx, slot: u16) {
        let writing = self.writing.as_mut().expect("a plan of a writable layer");
        let Some(unit) = writing.writer.unit(slot) else { return };
        if let Body::Sparse(tables, Some(space)) = &mut self.extents[unit as usize].body {
            writing.writer.abandon(ctx, (&*tables, space), slot);
        }
    }

    fn discard(&mut self, ctx: &mut Ctx, range: SectorRange, zero: bool) -> Step<DiscardPlan> {
        self.first_write(ctx)?;
        let (index, local) = self.extent_at(range);
        let part = self.part(index);
        let extent = &self.extents[index];
        let writing = self.writing.as_mut().expect("a writable layer");
        match &extent.body {
            Body::Zero => Ok(DiscardPlan { sectors: local.count, punch: None }),
            _ if extent.check_writable().is_err() => {
                // A discard may do nothing; zeros must be written, and that is refused.
                let sectors = if zero { 0 } else { local.count };
                Ok(DiscardPlan { sectors, punch: None })
            }
            Body::Sparse(tables, _) => writing.writer.discard(ctx, (tables, part), local, zero),
            Body::Flat(offset) if !zero => {
                let punch = Some((extent.file, offset + local.start_bytes(), local.bytes()));
                Ok(DiscardPlan { sectors: local.count, punch })
            }
            _ => Ok(DiscardPlan { sectors: 0, punch: None }),
        }
    }

    fn identity(&self) -> Option<u128> {
        self.cid.map(|(cid, _)| cid.into())
    }

    fn accepts_parent(&self, identity: Option<u128>) -> bool {
        identity == Some(self.parent_cid.into())
    }

    fn note(&self) -> Option<&'static str> {
        if self.tracks_changes {
            return Some("its changed blocks are tracked: it is read only");
        }
        self.extents.iter().any(Extent::is_unclean).then_some("it was not closed cleanly")
    }

    fn is_dirty(&self) -> bool {
        let waits = |writing: &Writing| writing.is_waiting || writing.edit.is_some();
        self.writing.as_ref().is_some_and(|writing| waits(writing))
    }

    fn flush_own(&mut self, _ctx: &mut Ctx, phase: Phase) -> Own {
        let Some(writing) = self.writing.as_mut().filter(|_| phase == Phase::HEADER) else {
            return Own::Nothing;
        };
        if let (Some((_, place)), true, false) = (self.cid, writing.is_waiting, writing.is_sent) {
            (writing.is_sent, writing.handed) = (true, Handed::Cid);
            return Own::Write { file: self.file, offset: place.at };
        }
        match &mut writing.edit {
            Some(edit) if !edit.is_sent => {
                (edit.is_sent, writing.handed) = (true, Handed::Edit);
                Own::Write { file: self.file, offset: edit.at }
            }
            _ => Own::Nothing,
        }
    }

    fn own_bytes(&self) -> &[u8] {
        match (&self.writing, self.cid) {
            (Some(writing), Some((_, place))) => match (writing.handed, &writing.edit) {
                (Handed::Edit, Some(edit)) => &edit.bytes,
                _ => &writing.digits[..place.count],
            },
            _ => &[],
        }
    }

    fn flushed(&mut self, _ctx: &mut Ctx, ok: bool) {
        if let Some(writing) = &mut self.writing {
            writing.first.flushed(ok);
            writing.is_waiting &= !(ok && writing.is_sent);
            writing.is_sent = false;
            match &mut writing.edit {
                Some(edit) if ok && edit.is_sent => writing.edit = None,
                Some(edit) => edit.is_sent = false,
                None => {}
            }
        }
    }

    fn resize(&mut self, ctx: &mut Ctx, sectors: u64) -> Step<ResizePlan> {
        self.grow(ctx, sectors)
    }

    fn details(&self) -> Details {
        let cid = self.cid.map(|(cid, _)| ("CID", u64::from(cid)));
        let parent = (self.parent_cid != NO_PARENT).then_some(self.parent_cid);
        Details {
            variant: self.create_type,
            cluster_bytes: self.extents.iter().map(Extent::grain_bytes).max().unwrap_or(0),
            figures: cid
                .into_iter()
                .chain(parent.map(|cid| ("parentCID", u64::from(cid))))
                .chain([("extents", self.extents.len() as u64)])
                .collect(),
            ..Details::default()
        }
    }
}

impl Inspect for Vmdk {
    fn check_begin(&mut self, _ctx: &mut Ctx, params: CheckParams) -> Result<(), ImageFault> {
        self.check = Some(Box::new((Checker::new(params), 0)));
        Ok(())
    }

    fn check_step(&mut self, ctx: &mut Ctx) -> Step<CheckProgress> {
        let (check, index) = &mut **self.check.as_mut().expect("a check was begun");
        let total = self.extents.iter().map(Extent::grains).sum();
        let is_done = match self.extents.get(*index).map(|extent| &extent.body) {
            Some(Body::Sparse(tables, _)) => check.step(ctx, tables)?,
            Some(Body::SeSparse(tables)) => check.step(ctx, tables)?,
            Some(_) => true,
            None => {
                let report = core::mem::take(&mut check.report);
                self.check = None;
                return Ok(CheckProgress::Done(report));
            }
        };
        *index += usize::from(is_done);
        Ok(check.progress(total))
    }
}
