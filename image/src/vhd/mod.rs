//! VHD: fixed, dynamic and differencing disks of Virtual PC, Hyper-V, XenServer and QEMU
//! (Microsoft, "Virtual Hard Disk Image Format Specification", version 1.0).
//!
//! A block is a sector bitmap and its data; the BAT says where. A sector whose bit is clear is
//! not in this file: it is the parent's, or zeros. The batmap that XenServer adds ("tdbatmap")
//! only repeats that a bitmap is full, so the bitmaps decide and the batmap is left as it is.
//! Order guarded: block data, then the footer behind it and the block's bitmap, then the BAT
//! entry (see `write`). It must never trust a BAT entry that names the metadata.

mod check;
mod create;
mod header;
mod map;
mod name;
mod repair;
mod resize;
mod write;

use alloc::boxed::Box;

use crate::check::{CheckParams, CheckProgress};
use crate::fault::ImageFault;
use crate::files::Access;
use crate::format::{AnyLayer, Ctx, Format, Found, Inspect, Layer, OpenedLayer, Own, Parent};
use crate::info::Details;
use crate::meta::Phase;
use crate::types::{DiscardPlan, FileNo, ResizePlan, SECTOR_BYTES, SectorRange, Step, WritePlan};

use check::Check;
pub(crate) use create::create;
use header::{FOOTER_BYTES, Footer, HEADER_BYTES, Header, Kind};
use write::Writer;

pub(crate) struct Vhd {
    file: FileNo,
    kind: Kind,
    sectors: u64,
    unique_id: u128,
    parent_id: u128,
    /// Byte of the dynamic disk header.
    header_offset: u64,
    /// Byte of the BAT and its entries.
    table_offset: u64,
    entries: u32,
    block_sectors: u64,
    /// Bytes of a block's bitmap, padded to sectors.
    bitmap_bytes: u64,
    note: Option<&'static str>,
    check: Option<Box<Check>>,
    /// For the top layer of a writable image.
    writer: Option<Box<Writer>>,
}

/// A footer found, where, and its bytes.
struct FoundFooter {
    offset: u64,
    bytes: [u8; FOOTER_BYTES],
    note: Option<&'static str>,
}

/// Looks for the footer in libvhd's order: the last 512 bytes, the last 511, the copy at 0.
///
/// After a power cut the end of a dynamic file may be a guest's data, and a guest could make
/// that look like a footer. The copy at 0 is out of its reach, so it wins where they disagree
/// on what the file is. A guest of a fixed disk has the copy's place too: a footer that says fixed
/// at the end, and a copy with its header at the start, may be either guest's work.
fn find_footer(ctx: &mut Ctx, file: FileNo) -> Step<FoundFooter> {
    let size = ctx.files.size(file);
    let mut first = [0; FOOTER_BYTES];
    ctx.read(file, 0, &mut first)?;
    let copy_holds = size >= FOOTER_BYTES as u64 && header::footer_holds(&first);
    for (len, note) in [
        (FOOTER_BYTES, None),
        (FOOTER_BYTES - 1, Some("the footer has 511 bytes, as old versions wrote it")),
    ] {
        let Some(offset) = size.checked_sub(len as u64) else { continue };
        let mut bytes = [0; FOOTER_BYTES];
        ctx.read(file, offset, &mut bytes[..len])?;
        if !header::footer_holds(&bytes) {
            continue;
        }
        if copy_holds && header::is_fixed(&bytes) && has_header(ctx, file, &first)? {
            let field = "a footer of a fixed VHD at the end, and all of a dynamic one at the start";
            return Err(ImageFault::unsupported(file, field, offset).into());
        }
        if copy_holds && !header::same_disk(&bytes, &first) {
            let note = Some("the footer at the end is of another disk; its copy at 0 is used");
            return Ok(FoundFooter { offset: 0, bytes: first, note });
        }
        return Ok(FoundFooter { offset, bytes, note });
    }
    if copy_holds {
        let note = Some("the footer at the end is damaged or missing; its copy at 0 is used");
        return Ok(FoundFooter { offset: 0, bytes: first, note });
    }
    let found = u64::from_be_bytes(first[..8].try_into().expect("eight bytes"));
    Err(header::no_footer(file, found).into())
}

/// Does the header lie where a footer says?
fn has_header(ctx: &mut Ctx, file: FileNo, footer: &[u8; FOOTER_BYTES]) -> Step<bool> {
    let Ok(footer) = Footer::parse(file, 0, footer) else { return Ok(false) };
    let end = footer.data_offset.saturating_add(HEADER_BYTES as u64);
    if footer.kind == Kind::Fixed || end > ctx.files.size(file) {
        return Ok(false);
    }
    let mut bytes = [0; HEADER_BYTES];
    ctx.read(file, footer.data_offset, &mut bytes)?;
    let sectors = footer.sectors(file, 0)?;
    Ok(Header::parse(file, footer.data_offset, &bytes, sectors).is_ok())
}

impl Vhd {
    fn writer_slot(&mut self) -> (FileNo, &mut Option<Box<Writer>>) {
        (self.file, &mut self.writer)
    }

    pub fn open(ctx: &mut Ctx, file: FileNo, access: Access) -> Step<OpenedLayer> {
        let found = find_footer(ctx, file)?;
        let footer = Footer::parse(file, found.offset, &found.bytes)?;
        let sectors = footer.sectors(file, found.offset)?;
        if footer.kind == Kind::Fixed {
            return Vhd::open_fixed(ctx, file, access, &found, &footer, sectors);
        }
        let size = ctx.files.size(file);
        if footer.data_offset.saturating_add(HEADER_BYTES as u64) > size {
            let field = "VHD data offset, beyond the end of the file";
            return Err(ImageFault::corrupt(file, field, found.offset, footer.data_offset).into());
        }
        let mut bytes = [0; HEADER_BYTES];
        ctx.read(file, footer.data_offset, &mut bytes)?;
        let header = Header::parse(file, footer.data_offset, &bytes, sectors)?;
        let table_end = header.table_offset.saturating_add(header.table_bytes());
        if table_end > size {
            let field = "VHD table offset, the BAT ends beyond the end of the file";
            let at = footer.data_offset;
            return Err(ImageFault::corrupt(file, field, at, header.table_offset).into());
        }
        let block_sectors = header.block_bytes as u64 / SECTOR_BYTES;
        let bitmap_bytes = block_sectors.div_ceil(8).next_multiple_of(SECTOR_BYTES);
        let mut vhd = Vhd {
            file,
            kind: footer.kind,
            sectors,
            unique_id: footer.unique_id,
            parent_id: header.parent_id,
            header_offset: footer.data_offset,
            table_offset: header.table_offset,
            entries: header.max_table_entries,
            block_sectors,
            bitmap_bytes,
            note: found.note,
            check: None,
            writer: None,
        };
        if access == Access::ReadWrite {
            vhd.writer = Some(Box::new(Writer::new(&vhd, ctx.files.info(file), &found.bytes)));
        }
        let parent = match vhd.kind {
            Kind::Differencing => Some(vhd.parent(ctx, &header)?),
            _ => None,
        };
        Ok(OpenedLayer { layer: AnyLayer::Vhd(vhd), parent })
    }

    fn open_fixed(
        ctx: &mut Ctx,
        file: FileNo,
        access: Access,
        found: &FoundFooter,
        footer: &Footer,
        sectors: u64,
    ) -> Step<OpenedLayer> {
        // Byte 0 of a fixed disk is the guest's: what looks like a footer there is no copy.
        if found.offset == 0 {
            return Err(header::no_footer(file, 0).into());
        }
        if sectors * SECTOR_BYTES > found.offset {
            let field = "size of the fixed VHD, beyond its footer";
            return Err(ImageFault::corrupt(file, field, found.offset, sectors).into());
        }
        let mut vhd = Vhd {
            file,
            kind: Kind::Fixed,
            sectors,
            unique_id: footer.unique_id,
            parent_id: 0,
            header_offset: 0,
            table_offset: 0,
            entries: 0,
            block_sectors: 1,
            bitmap_bytes: 0,
            note: found.note,
            check: None,
            writer: None,
        };
        if access == Access::ReadWrite {
            vhd.writer = Some(Box::new(Writer::new(&vhd, ctx.files.info(file), &found.bytes)));
        }
        Ok(OpenedLayer { layer: AnyLayer::Vhd(vhd), parent: None })
    }

    /// The parent as the locators name it. XenServer marks a raw parent by an empty identifier.
    fn parent(&self, ctx: &mut Ctx, header: &Header) -> Step<Parent> {
        let format = if header.parent_id == 0 { Format::Raw } else { Format::Vhd };
        match name::parent_name(ctx, self.file, header)? {
            Some(name) => Ok(Parent { name, format: Some(format) }),
            None => {
                let field = "VHD parent: no locator and no name that can be read";
                Err(ImageFault::corrupt(self.file, field, self.header_offset, 0).into())
            }
        }
    }
}

impl Layer for Vhd {
    fn sectors(&self) -> u64 {
        self.sectors
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
        self.find_end(ctx)
    }

    fn identity(&self) -> Option<u128> {
        Some(self.unique_id)
    }

    fn accepts_parent(&self, identity: Option<u128>) -> bool {
        // A raw parent has no identity, and is named by an empty one.
        identity.unwrap_or(0) == self.parent_id
    }

    fn note(&self) -> Option<&'static str> {
        self.note
    }

    fn is_dirty(&self) -> bool {
        self.writer.as_ref().is_some_and(|w| w.is_dirty())
    }

    fn flush_own(&mut self, _ctx: &mut Ctx, phase: Phase) -> Own {
        match &mut self.writer {
            Some(writer) => writer.flush_own(self.file, self.kind, phase),
            None => Own::Nothing,
        }
    }

    fn own_bytes(&self) -> &[u8] {
        self.writer.as_ref().map_or(&[], |w| w.own_bytes())
    }

    fn flushed(&mut self, _ctx: &mut Ctx, ok: bool) {
        if let Some(writer) = &mut self.writer {
            writer.flushed(ok);
        }
    }

    fn resize(&mut self, ctx: &mut Ctx, sectors: u64) -> Step<ResizePlan> {
        self.grow(ctx, sectors)
    }

    fn details(&self) -> Details {
        let variant = match self.kind {
            Kind::Fixed => "fixed",
            Kind::Dynamic => "dynamic",
            Kind::Differencing => "differencing",
        };
        let fixed = self.kind == Kind::Fixed;
        let cluster_bytes = if fixed { 0 } else { self.block_sectors * SECTOR_BYTES };
        Details { variant, cluster_bytes, ..Details::default() }
    }
}

impl Inspect for Vhd {
    fn check_begin(&mut self, _ctx: &mut Ctx, params: CheckParams) -> Result<(), ImageFault> {
        self.begin_check(params);
        Ok(())
    }

    fn check_step(&mut self, ctx: &mut Ctx) -> Step<CheckProgress> {
        self.check_part(ctx)
    }
}
