//! VHDX: fixed, dynamic and differencing disks with logical sectors of 512 or 4096 bytes
//! ([MS-VHDX], "Virtual Hard Disk v2 (VHDX) File Format").
//!
//! Order guarded: the log is replayed before anything is trusted (`load`, `replay`); every
//! change of the BAT and of sector bitmaps goes through the log (`log`): log entry, sync, in
//! place, sync. Sizes inside are counted in guest sectors of 512 bytes, bits of a sector bitmap
//! in logical sectors. It must never write to a file whose log is not replayed.

mod check;
mod crc;
mod create;
mod header;
mod load;
mod log;
mod map;
mod replay;
mod resize;
mod write;

use alloc::boxed::Box;

use crate::check::{CheckParams, CheckProgress};
use crate::fault::ImageFault;
use crate::files::Access;
use crate::format::{AnyLayer, Ctx, Found, Inspect, Layer, OpenedLayer, Own, Parent};
use crate::info::Details;
use crate::meta::{BLOCK_BYTES, Phase};
use crate::types::{DiscardPlan, FileNo, ResizePlan, SECTOR_BYTES, SectorRange, Step, WritePlan};

use check::Check;
pub(crate) use create::create;
use header::{Metadata, guid_number};
use load::{Load, OTHERS_MAX, Region};
use replay::Overlay;
use write::Writer;

pub(crate) struct Vhdx {
    file: FileNo,
    log: Region,
    bat: Region,
    metadata: Region,
    /// Regions of others: they are kept.
    others: heapless::Vec<Region, OTHERS_MAX>,
    data_write_guid: u128,
    /// parent_linkage and parent_linkage2.
    linkage: [u128; 2],
    geometry: Geometry,
    /// Byte of the virtual disk size.
    size_at: u64,
    note: Option<&'static str>,
    /// While it is being opened.
    load: Option<Box<Load>>,
    /// The log of a file that was not closed and may not be written.
    overlay: Option<Box<Overlay>>,
    check: Option<Box<Check>>,
    /// For the top layer of a writable image.
    writer: Option<Box<Writer>>,
}

/// The disk's shape.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Geometry {
    has_parent: bool,
    leave_allocated: bool,
    sectors: u64,
    block_sectors: u64,
    /// Guest sectors in a logical one: 1 or 8.
    logical: u64,
    chunk_ratio: u64,
}

impl Vhdx {
    fn writer_slot(&mut self) -> (FileNo, &mut Option<Box<Writer>>) {
        (self.file, &mut self.writer)
    }

    pub fn open(ctx: &mut Ctx, file: FileNo, access: Access) -> Step<OpenedLayer> {
        let (header, n) = load::current_header(ctx, file)?;
        let log = Region { offset: header.log_offset, length: header.log_length as u64 };
        let size = ctx.files.size(file);
        if log.offset.checked_add(log.length).is_none_or(|end| end > size) {
            let field = "VHDX log, beyond the end of the file";
            let at = header::HEADER_OFFSETS[n];
            return Err(ImageFault::corrupt(file, field, at, log.offset).into());
        }
        let writable = access == Access::ReadWrite;
        let info = ctx.files.info(file);
        let writer = writable.then(|| Box::new(Writer::new(ctx.seed, info, header, n)));
        let vhdx = Vhdx {
            file,
            log,
            bat: Region::default(),
            metadata: Region::default(),
            others: heapless::Vec::new(),
            data_write_guid: guid_number(header.data_write_guid),
            linkage: [0; 2],
            geometry: Geometry {
                has_parent: false,
                leave_allocated: false,
                sectors: 0,
                block_sectors: 1,
                logical: 1,
                chunk_ratio: 1,
            },
            size_at: 0,
            note: None,
            load: Some(Box::new(Load::new(file, &header, writable))),
            overlay: None,
            check: None,
            writer,
        };
        Ok(OpenedLayer { layer: AnyLayer::Vhdx(vhdx), parent: None })
    }

    fn set_geometry(&mut self, known: &Metadata) {
        self.geometry = Geometry {
            has_parent: known.has_parent,
            leave_allocated: known.leave_allocated,
            sectors: known.disk_bytes / SECTOR_BYTES,
            block_sectors: known.block_bytes as u64 / SECTOR_BYTES,
            logical: known.logical_bytes as u64 / SECTOR_BYTES,
            chunk_ratio: known.chunk_ratio(),
        };
    }

    /// Reads metadata within one cache block, as the log has it.
    fn get(&self, ctx: &mut Ctx, offset: u64, into: &mut [u8]) -> Step<()> {
        match &self.overlay {
            None => ctx.meta.get(self.file, offset, into),
            Some(overlay) => overlay.get(ctx, self.file, offset, into),
        }
    }

    /// Reads metadata that may cross cache blocks: at most some KiB.
    fn get_across(&self, ctx: &mut Ctx, offset: u64, into: &mut [u8]) -> Step<()> {
        let mut done = 0;
        while done < into.len() {
            let at = offset + done as u64;
            let room = (BLOCK_BYTES - at % BLOCK_BYTES) as usize;
            let len = room.min(into.len() - done);
            self.get(ctx, at, &mut into[done..done + len])?;
            done += len;
        }
        Ok(())
    }
}

impl Layer for Vhdx {
    fn sectors(&self) -> u64 {
        self.geometry.sectors
    }

    fn map(&mut self, ctx: &mut Ctx, range: SectorRange) -> Step<(Found, u64)> {
        self.map_range(ctx, range)
    }

    fn prepare(&mut self, ctx: &mut Ctx, slot: u16, range: SectorRange) -> Step<WritePlan> {
        self.prepare_range(ctx, slot, range)
    }

    fn commit(&mut self, ctx: &mut Ctx, slot: u16) {
        self.commit_plan(ctx, slot);
    }

    fn abandon(&mut self, ctx: &mut Ctx, slot: u16) {
        self.abandon_plan(ctx, slot);
    }

    fn discard(&mut self, ctx: &mut Ctx, range: SectorRange, zero: bool) -> Step<DiscardPlan> {
        self.discard_range(ctx, range, zero)
    }

    fn ready(&mut self, ctx: &mut Ctx) -> Step<()> {
        self.load(ctx)
    }

    fn late_parent(&mut self) -> Option<Parent> {
        self.load.take().and_then(|load| load.parent)
    }

    fn identity(&self) -> Option<u128> {
        Some(self.data_write_guid)
    }

    fn accepts_parent(&self, identity: Option<u128>) -> bool {
        identity.is_some_and(|id| id != 0 && self.linkage.contains(&id))
    }

    fn note(&self) -> Option<&'static str> {
        self.note
    }

    fn is_dirty(&self) -> bool {
        self.writer.as_ref().is_some_and(|w| w.is_dirty())
    }

    fn flush_own(&mut self, ctx: &mut Ctx, phase: Phase) -> Own {
        let (file, log) = (self.file, self.log);
        self.writer.as_mut().map_or(Own::Nothing, |w| w.flush_own(ctx.meta, file, log, phase))
    }

    fn own_bytes(&self) -> &[u8] {
        self.writer.as_ref().map_or(&[], |w| w.own_bytes())
    }

    fn flushed(&mut self, _ctx: &mut Ctx, ok: bool) {
        if let Some(writer) = &mut self.writer {
            writer.flushed(ok);
            self.data_write_guid = guid_number(writer.data_write_guid());
        }
    }

    fn finish(&mut self, _ctx: &mut Ctx) -> Step<()> {
        if let Some(writer) = &mut self.writer {
            writer.want_empty_log();
        }
        Ok(())
    }

    fn resize(&mut self, ctx: &mut Ctx, sectors: u64) -> Step<ResizePlan> {
        self.grow(ctx, sectors)
    }

    fn details(&self) -> Details {
        let geometry = &self.geometry;
        let variant = match (geometry.has_parent, geometry.leave_allocated) {
            (true, _) => "differencing",
            (false, true) => "fixed",
            (false, false) => "dynamic",
        };
        let figures = alloc::vec![("logical sector size", geometry.logical * SECTOR_BYTES)];
        let cluster_bytes = geometry.block_sectors * SECTOR_BYTES;
        Details { variant, cluster_bytes, figures, ..Details::default() }
    }
}

impl Inspect for Vhdx {
    fn check_begin(&mut self, _ctx: &mut Ctx, params: CheckParams) -> Result<(), ImageFault> {
        self.begin_check(params);
        Ok(())
    }

    fn check_step(&mut self, ctx: &mut Ctx) -> Step<CheckProgress> {
        self.check_part(ctx)
    }
}
