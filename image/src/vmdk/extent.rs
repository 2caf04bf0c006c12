//! One extent of a VMDK: where its sectors are, and whether they can be written.

use alloc::boxed::Box;
use alloc::vec::Vec;

use super::descriptor::{Descriptor, Line, LineAccess, LineKind};
use super::header::{self, HEADER_BYTES, SeSparse, Sparse};
use super::sparse::{SeTables, Tables};
use crate::append::{Shape, Space};
use crate::fault::{FaultKind, ImageFault};
use crate::files::Access;
use crate::format::{Ctx, Found, read_only};
use crate::types::{FileNo, SECTOR_BYTES, SectorRange, Step};

/// First byte that the u32 sector numbers of grain tables cannot reach.
const REACH_BYTES: u64 = (1 << 32) * SECTOR_BYTES;
/// Sectors from the footer's header to the end of the file: itself and the end marker.
const FOOTER_SECTORS: u64 = 2;
/// How far before the end it is looked for: some pad the file (archives to 10 KiB, others to a
/// grain).
const FOOTER_SECTORS_MAX: u64 = 256;

pub(super) enum Body {
    /// The header is still to be read; which kind the descriptor names.
    Unread(LineKind),
    /// The data starts at this byte.
    Flat(u64),
    Zero,
    /// With free space if it can be written.
    Sparse(Tables, Option<Box<Space>>),
    SeSparse(SeTables),
}

pub(super) struct Extent {
    pub file: FileNo,
    /// First guest sector, and how many; 0 for a whole file not yet read.
    pub start: u64,
    pub sectors: u64,
    access: LineAccess,
    pub body: Body,
}

/// Opens the files that a descriptor names.
pub(super) fn open_all(
    ctx: &mut Ctx,
    file: FileNo,
    access: Access,
    found: &Descriptor,
) -> Step<Vec<Extent>> {
    let mut extents = Vec::with_capacity(found.lines.len());
    let mut start = 0;
    for line in &found.lines {
        let access = match line.access {
            LineAccess::ReadWrite => access,
            LineAccess::ReadOnly => Access::ReadOnly,
        };
        let file = match line.kind {
            LineKind::Zero => file,
            _ => ctx.files.open(file, &line.name, access)?,
        };
        check_apart(file, line, &extents)?;
        extents.push(Extent::of_line(ctx, file, start, line)?);
        start += line.sectors;
    }
    if extents.is_empty() {
        return Err(ImageFault::corrupt(file, "a VMDK descriptor without extents", 0, 0).into());
    }
    Ok(extents)
}

/// A file may stand in several lines only with stretches of flat data that lie apart: two extents
/// would take the same space for new grains.
fn check_apart(file: FileNo, line: &Line, before: &[Extent]) -> Result<(), ImageFault> {
    let start = line.offset_sectors.saturating_mul(SECTOR_BYTES);
    let end = start.saturating_add(line.sectors.saturating_mul(SECTOR_BYTES));
    let meets = |other: &Extent| match (line.kind, &other.body) {
        _ if other.file != file => false,
        (LineKind::Zero, _) | (_, Body::Zero) => false,
        (LineKind::Flat, &Body::Flat(at)) => start < at + other.sectors * SECTOR_BYTES && at < end,
        _ => true,
    };
    if before.iter().any(meets) {
        let why = "one file stands twice among the extents of a VMDK";
        return Err(ImageFault::new(FaultKind::Refused, file, why));
    }
    Ok(())
}

impl Extent {
    /// A sparse extent that is the whole image.
    pub fn whole_file(file: FileNo) -> Extent {
        let body = Body::Unread(LineKind::Sparse);
        Extent { file, start: 0, sectors: 0, access: LineAccess::ReadWrite, body }
    }

    fn of_line(ctx: &Ctx, file: FileNo, start: u64, line: &Line) -> Result<Extent, ImageFault> {
        let body = match line.kind {
            LineKind::Flat => {
                let end = line.offset_sectors.checked_add(line.sectors);
                let have = ctx.files.size(file) / SECTOR_BYTES;
                if end.is_none_or(|end| end > have) {
                    let field = "sectors of a flat extent";
                    let need = end.unwrap_or(u64::MAX);
                    return Err(ImageFault::limit(file, field, need, have));
                }
                Body::Flat(line.offset_sectors * SECTOR_BYTES)
            }
            LineKind::Zero => Body::Zero,
            kind => Body::Unread(kind),
        };
        Ok(Extent { file, start, sectors: line.sectors, access: line.access, body })
    }

    /// First guest sector after it.
    pub fn end(&self) -> u64 {
        // The descriptor's sum was checked.
        self.start + self.sectors
    }

    /// Reads the header, if it is still to be read.
    pub fn load(&mut self, ctx: &mut Ctx, access: Access) -> Step<()> {
        let Body::Unread(kind) = self.body else { return Ok(()) };
        let mut bytes = [0; HEADER_BYTES];
        ctx.read(self.file, 0, &mut bytes)?;
        let (sectors, body) = if kind == LineKind::SeSparse {
            self.load_se(ctx, &bytes)?
        } else {
            self.load_sparse(ctx, &bytes, access)?
        };
        if self.sectors == 0 {
            self.sectors = sectors;
        } else if sectors < self.sectors {
            let field = "capacity, below what the descriptor says,";
            return Err(ImageFault::corrupt(self.file, field, 12, sectors).into());
        }
        self.body = body;
        // What lies beyond the line's sectors belongs to nobody: tails must not reach there.
        match &mut self.body {
            Body::Sparse(tables, _) => tables.header.sectors = self.sectors,
            Body::SeSparse(tables) => tables.header.sectors = self.sectors,
            _ => {}
        }
        Ok(())
    }

    fn load_sparse(
        &self,
        ctx: &mut Ctx,
        first: &[u8; HEADER_BYTES],
        access: Access,
    ) -> Step<(u64, Body)> {
        let (file, size) = (self.file, ctx.files.size(self.file));
        let header = match header::has_footer(first) {
            true => self.footer(ctx)?,
            false => Sparse::parse(file, 0, first)?,
        };
        for (field, start) in [("gdOffset", header.directory), ("rgdOffset", header.redundant)] {
            let end = start.saturating_add(header.directory_entries() * 4);
            if start != 0 && end > size {
                let field = if field == "gdOffset" {
                    "gdOffset, with a directory beyond the end of the file,"
                } else {
                    "rgdOffset, with a directory beyond the end of the file,"
                };
                return Err(ImageFault::corrupt(file, field, 56, start).into());
            }
        }
        let is_cowd =
            u32::from_le_bytes([first[0], first[1], first[2], first[3]]) == header::MAGIC_COWD;
        // Version 3 without compression is VMware's for change tracking: it is read only.
        let writable = access == Access::ReadWrite
            && self.access == LineAccess::ReadWrite
            && !is_cowd
            && !header.is_compressed
            && header.version < 3;
        let space = writable
            .then(|| Space::at_end(file, ctx.files.info(file), REACH_BYTES).map(Box::new))
            .transpose()?;
        let tables = Tables { file, header, is_writable: writable };
        Ok((header.sectors, Body::Sparse(tables, space)))
    }

    /// The header that stands at the end of the file.
    fn footer(&self, ctx: &mut Ctx) -> Step<Sparse> {
        let (file, sectors) = (self.file, ctx.files.size(self.file) / SECTOR_BYTES);
        let mut bytes = [0; HEADER_BYTES];
        let usual = sectors.saturating_sub(FOOTER_SECTORS);
        // It is looked for in one step, so all the blocks must be in the cache at once.
        let far = FOOTER_SECTORS_MAX.min(ctx.meta.capacity_bytes() / SECTOR_BYTES / 2);
        let mut sector = usual;
        while sector > sectors.saturating_sub(far) {
            ctx.read(file, (sector - 1) * SECTOR_BYTES, &mut bytes)?;
            if header::is_footer_marker(&bytes) {
                ctx.read(file, sector * SECTOR_BYTES, &mut bytes)?;
                if let Ok(header) = Sparse::parse(file, sector * SECTOR_BYTES, &bytes) {
                    return Ok(header);
                }
            }
            sector -= 1;
        }
        // Whatever is wrong with it is said of the usual place.
        let at = usual * SECTOR_BYTES;
        ctx.read(file, at, &mut bytes)?;
        if header::has_footer(&bytes) {
            let field = "gdOffset of the footer";
            return Err(ImageFault::corrupt(file, field, at, header::GD_AT_END).into());
        }
        Ok(Sparse::parse(file, at, &bytes)?)
    }

    fn load_se(&self, ctx: &mut Ctx, first: &[u8; HEADER_BYTES]) -> Step<(u64, Body)> {
        let (file, size) = (self.file, ctx.files.size(self.file));
        let header = SeSparse::parse(file, first)?;
        let mut bytes = [0; HEADER_BYTES];
        if header.volatile >= size || header.directory >= size {
            let field = "an seSparse header, with tables beyond the end of the file,";
            return Err(ImageFault::corrupt(file, field, 80, header.volatile).into());
        }
        ctx.read(file, header.volatile, &mut bytes)?;
        SeSparse::check_volatile(file, header.volatile, &bytes)?;
        Ok((header.sectors, Body::SeSparse(SeTables { file, header })))
    }

    /// Of a single file the descriptor says how long the disk is: its maker may have rounded the
    /// capacity up to whole grains (VirtualBox does; QEMU then sees a longer disk).
    pub fn end_at(&mut self, lines: &[Line]) {
        let Body::Sparse(tables, _) = &mut self.body else { return };
        let [Line { sectors, kind: LineKind::Sparse, .. }] = lines else { return };
        let rest = self.sectors.checked_sub(*sectors);
        if rest.is_some_and(|rest| rest < tables.header.grain_sectors) {
            self.sectors = *sectors;
            tables.header.sectors = *sectors;
        }
    }

    /// Where the descriptor inside this extent is, if there is one.
    pub fn descriptor(&self) -> Option<(u64, u64)> {
        match &self.body {
            Body::Sparse(tables, _) if tables.header.descriptor.0 != 0 => {
                Some(tables.header.descriptor)
            }
            _ => None,
        }
    }

    pub fn map(&self, ctx: &mut Ctx, local: SectorRange) -> Step<(Found, u64)> {
        match &self.body {
            Body::Unread(_) => unreachable!("a layer is ready before it is read"),
            Body::Flat(offset) => {
                let offset = offset + local.start_bytes();
                Ok((Found::Data { file: self.file, offset }, local.count))
            }
            Body::Zero => Ok((Found::Zero, local.count)),
            Body::Sparse(tables, _) => tables.map(ctx, local),
            Body::SeSparse(tables) => tables.map(ctx, local),
        }
    }

    /// The reason why it cannot be written, if there is one.
    pub fn check_writable(&self) -> Result<(), ImageFault> {
        let why = match &self.body {
            _ if self.access == LineAccess::ReadOnly => "the descriptor says RDONLY",
            Body::Flat(_) | Body::Sparse(_, Some(_)) => return Ok(()),
            Body::Sparse(tables, None) if tables.header.is_compressed => {
                "a compressed (streamOptimized) VMDK extent is read only: convert it"
            }
            Body::Sparse(tables, None) if tables.header.version == 3 => {
                "a VMDK of version 3 tracks changes and is read only"
            }
            Body::Sparse(..) => "an ESX (COWD) extent is read only: convert it",
            Body::SeSparse(_) => "an seSparse extent is read only: convert it",
            Body::Zero => "a ZERO extent has no place for data",
            Body::Unread(_) => "the extent is not read yet",
        };
        Err(read_only(self.file, why))
    }

    /// Its writer left the mark of an open disk. Nothing follows from it: a writer that keeps
    /// to the order of tables and grains leaves no worse than an unequal redundant table.
    pub fn is_unclean(&self) -> bool {
        matches!(&self.body, Body::Sparse(tables, _) if tables.header.is_unclean)
    }

    pub fn unpacked_bytes(&self) -> u32 {
        match &self.body {
            Body::Sparse(tables, _) if tables.header.is_compressed => {
                tables.header.grain_bytes() as u32
            }
            _ => 0,
        }
    }

    /// Bytes in a grain, 0 if there are none.
    pub fn grain_bytes(&self) -> u64 {
        match &self.body {
            Body::Sparse(tables, _) => tables.cluster_bytes(),
            Body::SeSparse(tables) => tables.cluster_bytes(),
            _ => 0,
        }
    }

    /// Grains that a check looks at.
    pub fn grains(&self) -> u64 {
        match &self.body {
            Body::Sparse(tables, _) => tables.clusters(),
            Body::SeSparse(tables) => tables.clusters(),
            _ => 0,
        }
    }
}
