//! raw: guest sector n is byte 512 n of the file. The only format without metadata.

use crate::create::{Create, CreateFault, CreateParams, Wanted};
use crate::fault::{FaultKind, ImageFault};
use crate::files::Access;
use crate::format::{AnyLayer, Ctx, Found, Layer, OpenedLayer, read_only};
use crate::types::{
    DiscardPlan, FileNo, Prepared, ResizePlan, SECTOR_BYTES, SectorRange, Step, WritePlan,
};

pub(crate) struct Raw {
    file: FileNo,
    sectors: u64,
    access: Access,
}

impl Raw {
    /// A file whose length is not a multiple of 512 is served without its last partial sector.
    pub fn open(ctx: &mut Ctx, file: FileNo, access: Access) -> Step<OpenedLayer> {
        let sectors = ctx.files.size(file) / SECTOR_BYTES;
        if sectors == 0 {
            let fault = ImageFault::new(FaultKind::NotThisFormat, file, "the file's length");
            return Err(ImageFault { value: ctx.files.size(file), ..fault }.into());
        }
        let layer = AnyLayer::Raw(Raw { file, sectors, access });
        Ok(OpenedLayer { layer, parent: None })
    }
}

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
