//! raw: guest sector n is byte 512 n of the file. The only format without metadata.

use crate::create::{Create, CreateFault, CreateParams, Wanted};
use crate::fault::{FaultKind, ImageFault};
use crate::files::Access;
use crate::format::{AnyLayer, Ctx, Format, Found, Inspect, Layer, OpenedLayer, read_only};
use crate::types::{
    DiscardPlan, FileNo, Prepared, ResizePlan, SECTOR_BYTES, SectorRange, Step, WritePlan,
};

pub(crate) struct Raw {
    file: FileNo,
    sectors: u64,
    access: Access,
    note: Option<&'static str>,
}

impl Raw {
    /// Of a file whose length is not a multiple of 512 the last sector is filled up with zeros,
    /// as QEMU does; a file that would have to grow for that and cannot goes without it.
    pub fn open(ctx: &mut Ctx, file: FileNo, access: Access) -> Step<OpenedLayer> {
        let info = ctx.files.info(file);
        let is_whole = info.size_bytes.is_multiple_of(SECTOR_BYTES);
        let fills_up = access == Access::ReadOnly || info.can_grow;
        let sectors = match fills_up {
            true => info.size_bytes.div_ceil(SECTOR_BYTES),
            false => info.size_bytes / SECTOR_BYTES,
        };
        if sectors == 0 {
            let fault = ImageFault::new(FaultKind::NotThisFormat, file, "the file's length");
            return Err(ImageFault { value: info.size_bytes, ..fault }.into());
        }
        let mut first = [0; SECTOR_BYTES as usize];
        ctx.read(file, 0, &mut first)?;
        let note = match Format::marked(&first) {
            Some(_) => Some(FOREIGN),
            None if is_whole => None,
            None if fills_up => Some("the last sector is not whole: zeros fill it up"),
            None => Some("the last sector is not whole, and it is not served"),
        };
        let layer = AnyLayer::Raw(Raw { file, sectors, access, note });
        Ok(OpenedLayer { layer, parent: None })
    }
}

const FOREIGN: &str = "it starts like an image of another format: if it is one, name that format";

/// A new raw image is a file of zeros.
pub(crate) fn create(params: &CreateParams) -> Result<Create, CreateFault> {
    let mut wanted = Wanted::new(params.options);
    let reserve = wanted.preallocation(true, false)?;
    wanted.finish()?;
    if params.backing.is_some() {
        return Err(CreateFault::new("a raw image cannot have a backing file"));
    }
    match params.sectors.checked_mul(SECTOR_BYTES) {
        Some(bytes) => {
            let mut create = Create::one_file(bytes);
            create.reserve(reserve);
            Ok(create)
        }
        None => Err(CreateFault::new("the size is beyond 2^64 bytes")),
    }
}

impl Layer for Raw {
    fn sectors(&self) -> u64 {
        self.sectors
    }

    fn map(&mut self, _ctx: &mut Ctx, range: SectorRange) -> Step<(Found, u64)> {
        Ok((Found::Data { file: self.file, offset: range.start_bytes() }, range.count))
    }

    fn prepare(&mut self, _ctx: &mut Ctx, slot: u16, range: SectorRange) -> Step<WritePlan> {
        if self.access == Access::ReadOnly {
            return Err(read_only(self.file, "the file is open read-only").into());
        }
        Ok(WritePlan {
            prepared: Prepared { slot },
            sectors: range.count,
            file: self.file,
            offset: range.start_bytes(),
            head: None,
            tail: None,
            preludes: heapless::Vec::new(),
        })
    }

    fn note(&self) -> Option<&'static str> {
        self.note
    }

    fn commit(&mut self, _ctx: &mut Ctx, _slot: u16) {}

    fn abandon(&mut self, _ctx: &mut Ctx, _slot: u16) {}

    fn discard(&mut self, _ctx: &mut Ctx, range: SectorRange, zero: bool) -> Step<DiscardPlan> {
        if self.access == Access::ReadOnly {
            return Err(read_only(self.file, "the file is open read-only").into());
        }
        if zero {
            return Ok(DiscardPlan { sectors: 0, punch: None });
        }
        let punch = Some((self.file, range.start_bytes(), range.bytes()));
        Ok(DiscardPlan { sectors: range.count, punch })
    }

    fn resize(&mut self, ctx: &mut Ctx, sectors: u64) -> Step<ResizePlan> {
        if self.access == Access::ReadOnly {
            return Err(read_only(self.file, "the file is open read-only").into());
        }
        let bytes = sectors * SECTOR_BYTES;
        let info = ctx.files.info(self.file);
        if bytes > info.size_bytes && !info.can_grow {
            let fault = ImageFault::new(FaultKind::Full, self.file, "the disk");
            return Err(ImageFault { value: bytes, limit: info.size_bytes, ..fault }.into());
        }
        ctx.files.grow(self.file, bytes);
        self.sectors = sectors;
        Ok(ResizePlan { grow: Some((self.file, bytes)) })
    }
}

impl Inspect for Raw {}
