//! The formats, and what each must be able to do: one trait, one enum, no probing.

use alloc::boxed::Box;
use alloc::string::String;

use crate::check::{CheckParams, CheckProgress, CheckReport};
use crate::create::{Create, CreateFault, CreateParams};
use crate::fault::ImageFault;
use crate::files::{Access, Files};
use crate::info::{Details, SnapshotInfo};
use crate::meta::{Meta, Phase};
use crate::qcow::Qcow;
use crate::qcow2::Qcow2;
use crate::qed::Qed;
use crate::raw::Raw;
use crate::types::{DiscardPlan, FileNo, ResizePlan, SectorRange, Step, WritePlan};
use crate::vdi::Vdi;
use crate::vhd::Vhd;
use crate::vhdx::Vhdx;
use crate::vmdk::Vmdk;

/// An image format, always named by configuration, never guessed from content.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    Raw,
    Qcow2,
    Qed,
    Qcow,
    Vdi,
    Vmdk,
    Vhd,
    Vhdx,
}

impl Format {
    /// Every format there is.
    pub const ALL: [Format; 8] = [
        Format::Raw,
        Format::Qcow2,
        Format::Qed,
        Format::Qcow,
        Format::Vdi,
        Format::Vmdk,
        Format::Vhd,
        Format::Vhdx,
    ];

    /// All names that a user may give, for messages.
    pub fn names() -> String {
        Format::ALL.map(Format::name).join(", ")
    }

    /// The format a user names with `format=`.
    pub fn by_name(name: &str) -> Option<Format> {
        Some(match name {
            "raw" => Format::Raw,
            "qcow2" => Format::Qcow2,
            "qed" => Format::Qed,
            "qcow" => Format::Qcow,
            "vdi" => Format::Vdi,
            "vmdk" => Format::Vmdk,
            "vhd" | "vpc" => Format::Vhd,
            "vhdx" => Format::Vhdx,
            _ => return None,
        })
    }

    /// The format that a file name's suffix stands for, in upper or lower case, `None` for any
    /// other suffix. `.avhd` and `.avhdx` are the differencing disks of Hyper-V's checkpoints.
    pub fn by_suffix(path: &str) -> Option<Format> {
        const SUFFIXES: [(&str, Format); 11] = [
            ("raw", Format::Raw),
            ("img", Format::Raw),
            ("qcow2", Format::Qcow2),
            ("qed", Format::Qed),
            ("qcow", Format::Qcow),
            ("vdi", Format::Vdi),
            ("vmdk", Format::Vmdk),
            ("vhd", Format::Vhd),
            ("avhd", Format::Vhd),
            ("vhdx", Format::Vhdx),
            ("avhdx", Format::Vhdx),
        ];
        let (_, suffix) = path.rsplit_once('.')?;
        let known = SUFFIXES.iter().find(|(known, _)| known.eq_ignore_ascii_case(suffix));
        known.map(|&(_, format)| format)
    }

    /// The format whose mark stands in the first sector of a file. Only to warn or to refuse: a
    /// guest can write any of them into a raw disk.
    pub fn marked(first: &[u8; 512]) -> Option<Format> {
        let u32_at = |at: usize| first[at..at + 4].try_into().expect("four bytes");
        Some(match &first[..4] {
            b"QFI\xfb" if first[4..8] == [0, 0, 0, 1] => Format::Qcow,
            b"QFI\xfb" => Format::Qcow2,
            b"QED\0" => Format::Qed,
            b"KDMV" | b"COWD" => Format::Vmdk,
            b"# Di" if first.starts_with(b"# Disk Descriptor") => Format::Vmdk,
            b"cone" if first.starts_with(b"conectix") => Format::Vhd,
            b"vhdx" if first.starts_with(b"vhdxfile") => Format::Vhdx,
            _ if u32::from_le_bytes(u32_at(0x40)) == 0xbeda_107f => Format::Vdi,
            _ => return None,
        })
    }

    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
            Format::Qed => "qed",
            Format::Qcow => "qcow",
            Format::Vdi => "vdi",
            Format::Vmdk => "vmdk",
            Format::Vhd => "vhd",
            Format::Vhdx => "vhdx",
        }
    }
}

/// What a format module works with: the shared cache and the files opened so far.
pub(crate) struct Ctx<'a> {
    pub meta: &'a mut Meta,
    pub files: &'a mut Files,
    /// Freshness for identifiers, from the caller.
    pub seed: u64,
    /// The image is opened to be checked: what a repair could make anew may be missing.
    pub for_check: bool,
}

impl Ctx<'_> {
    /// Copies a stretch that may span cache blocks, for headers and names at open. Short, since
    /// all its blocks must be resident at once: at most 64 KiB.
    pub fn read(&mut self, file: FileNo, offset: u64, into: &mut [u8]) -> Step<()> {
        let mut done = 0;
        while done < into.len() {
            let at = offset + done as u64;
            let room = (crate::meta::BLOCK_BYTES - at % crate::meta::BLOCK_BYTES) as usize;
            let len = room.min(into.len() - done);
            self.meta.get(file, at, &mut into[done..done + len])?;
            done += len;
        }
        Ok(())
    }
}

/// What a layer holds at the start of a range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Found {
    Data {
        file: FileNo,
        offset: u64,
    },
    Zero,
    /// Nothing here: the layer below decides, zeros if there is none.
    Absent,
    /// Part of a compressed cluster.
    Packed(Packed),
}

/// A compressed cluster and where in its unpacked bytes the range starts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Packed {
    pub file: FileNo,
    pub offset: u64,
    /// Bytes of the compressed stream, an upper bound.
    pub packed_bytes: u32,
    /// Bytes it unpacks to: never more is written.
    pub unpacked_bytes: u32,
    pub skip: u32,
    pub codec: Codec,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Codec {
    /// Raw deflate (qcow, qcow2).
    Deflate,
    /// zlib with its header (VMDK).
    Zlib,
    Zstd,
}

/// What an opened layer says of itself.
pub(crate) struct OpenedLayer {
    pub layer: AnyLayer,
    pub parent: Option<Parent>,
}

/// The file below a layer, as the image names it.
pub(crate) struct Parent {
    pub name: String,
    /// The format the image gives for it; else its suffix decides, else it is refused.
    pub format: Option<Format>,
}

/// A step of a flush that comes from a layer and not from the cache: a footer, a header, a log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Own {
    Nothing,
    Write {
        file: FileNo,
        offset: u64,
    },
    /// Everything before is durable before what follows.
    Sync,
}

/// One image file of a chain. Guest ranges given are never beyond `sectors()`.
pub(crate) trait Layer {
    /// Size of the disk in guest sectors.
    fn sectors(&self) -> u64;

    /// What lies at the start of `range`, and for how many sectors (1 to `range.count`).
    fn map(&mut self, ctx: &mut Ctx, range: SectorRange) -> Step<(Found, u64)>;

    /// Reserves for a write of the start of `range` (top layer only). Ranges of plans in
    /// flight never overlap, but they may share a cluster: then answer `Busy`. `slot` names
    /// the plan, below `PLANS_MAX`, free at the call.
    fn prepare(&mut self, ctx: &mut Ctx, slot: u16, range: SectorRange) -> Step<WritePlan>;

    /// Makes the mapping of plan `slot` visible. Cannot fail: all was reserved; blocks it puts
    /// into must be loaded by `prepare` and pinned, or kept in the plan until they are.
    fn commit(&mut self, ctx: &mut Ctx, slot: u16);

    /// Gives back what plan `slot` reserved.
    fn abandon(&mut self, ctx: &mut Ctx, slot: u16);

    /// Lets go of the start of `range` (whole clusters; the rest is left), or, with `zero`,
    /// makes it read as zeros where that needs no data written (else `sectors` is 0).
    fn discard(&mut self, ctx: &mut Ctx, range: SectorRange, zero: bool) -> Step<DiscardPlan>;

    /// Called after `open`, again after each stop, until it is ready: work at open that takes
    /// more reads or writes than one step (a log to replay, a table to scan). It keeps its
    /// place between calls, and gets changes written by stopping with `NeedFlush`.
    fn ready(&mut self, _ctx: &mut Ctx) -> Step<()> {
        Ok(())
    }

    /// Largest unpacked cluster that `map` may answer as `Packed`; 0 for none.
    fn unpacked_bytes(&self) -> u32 {
        0
    }

    /// Is there nothing to read where clusters cannot be unpacked?
    fn packs_all(&self) -> bool {
        false
    }

    /// May a cluster be packed by zstd?
    fn unpacks_zstd(&self) -> bool {
        false
    }

    /// The parent, of a layer that knew it only once it was ready (asked once).
    fn late_parent(&mut self) -> Option<Parent> {
        None
    }

    /// What a child must name to mean this very image: a UUID or content identifier.
    fn identity(&self) -> Option<u128> {
        None
    }

    /// Is a parent of this identity (`None`: its format has none) the one this layer was made
    /// on?
    fn accepts_parent(&self, _identity: Option<u128>) -> bool {
        true
    }

    /// Something about the file that its owner should know (a footer recovered from its copy).
    fn note(&self) -> Option<&'static str> {
        None
    }

    /// Does the layer itself hold something to write in the next flush?
    fn is_dirty(&self) -> bool {
        false
    }

    /// What the layer itself writes in a flush, before the cache's units of `phase`: called
    /// until it answers `Nothing`. The bytes of a `Write` are then `own_bytes`.
    fn flush_own(&mut self, _ctx: &mut Ctx, _phase: Phase) -> Own {
        Own::Nothing
    }

    fn own_bytes(&self) -> &[u8] {
        &[]
    }

    /// After all dirty metadata is durable (`ok`) or not: deferred frees happen here.
    fn flushed(&mut self, _ctx: &mut Ctx, _ok: bool) {}

    /// Marks the image clean before it is closed; the caller flushes after it.
    fn finish(&mut self, _ctx: &mut Ctx) -> Step<()> {
        Ok(())
    }

    /// Makes the disk `sectors` long (never shorter). Called again from the start after each
    /// stop; nothing may be visible before the last step.
    fn resize(&mut self, _ctx: &mut Ctx, _sectors: u64) -> Step<ResizePlan> {
        Err(ImageFault::unsupported(FileNo(0), "resizing an image of this format", 0).into())
    }

    /// What the layer knows of itself.
    fn details(&self) -> Details {
        Details::default()
    }
}

/// What is asked of a layer only by those who look at images and mend them. Apart from [`Layer`],
/// whose table of methods is linked whole: a kernel that never asks does not hold these.
pub(crate) trait Inspect {
    /// Internal snapshot number `n` (below `details().snapshots`).
    fn snapshot(&mut self, _ctx: &mut Ctx, _n: u32) -> Step<Option<SnapshotInfo>> {
        Ok(None)
    }

    /// Starts a check of this layer; memory for it may be taken here, within the budget given.
    fn check_begin(&mut self, _ctx: &mut Ctx, _params: CheckParams) -> Result<(), ImageFault> {
        Ok(())
    }

    /// A bounded part of the check; it keeps its place between calls.
    fn check_step(&mut self, _ctx: &mut Ctx) -> Step<CheckProgress> {
        Ok(CheckProgress::Done(CheckReport::default()))
    }
}

/// Does `work` with a layer's writer, taken out meanwhile so that both can be borrowed; `slot` says
/// where it is. A layer that was opened read-only has none.
pub(crate) fn with_writer<L, W, T>(
    layer: &mut L,
    slot: fn(&mut L) -> (FileNo, &mut Option<Box<W>>),
    work: impl FnOnce(&mut L, &mut W) -> Step<T>,
) -> Step<T> {
    let (file, place) = slot(layer);
    let Some(mut writer) = place.take() else {
        return Err(read_only(file, "the file is open read-only").into());
    };
    let result = work(layer, &mut writer);
    *slot(layer).1 = Some(writer);
    result
}

/// Plans a new image of `params.format`.
pub(crate) fn create(params: &CreateParams) -> Result<Create, CreateFault> {
    match params.format {
        Format::Raw => crate::raw::create(params),
        Format::Qcow2 => crate::qcow2::create(params),
        Format::Qed => crate::qed::create(params),
        Format::Qcow => crate::qcow::create(params),
        Format::Vdi => crate::vdi::create(params),
        Format::Vmdk => crate::vmdk::create(params),
        Format::Vhd => crate::vhd::create(params),
        Format::Vhdx => crate::vhdx::create(params),
    }
}

/// Any layer, by enum: static dispatch, no boxes on the request path.
pub(crate) enum AnyLayer {
    Raw(Raw),
    Qcow2(Qcow2),
    Qed(Qed),
    Qcow(Qcow),
    Vdi(Vdi),
    Vmdk(Vmdk),
    Vhd(Vhd),
    Vhdx(Vhdx),
}

/// What the layer is, by reference.
macro_rules! whichever {
    ($any:expr) => {
        match $any {
            AnyLayer::Raw(layer) => layer,
            AnyLayer::Qcow2(layer) => layer,
            AnyLayer::Qed(layer) => layer,
            AnyLayer::Qcow(layer) => layer,
            AnyLayer::Vdi(layer) => layer,
            AnyLayer::Vmdk(layer) => layer,
            AnyLayer::Vhd(layer) => layer,
            AnyLayer::Vhdx(layer) => layer,
        }
    };
}

impl AnyLayer {
    pub fn open(ctx: &mut Ctx, format: Format, file: FileNo, access: Access) -> Step<OpenedLayer> {
        match format {
            Format::Raw => Raw::open(ctx, file, access),
            Format::Qcow2 => Qcow2::open(ctx, file, access),
            Format::Qed => Qed::open(ctx, file, access),
            Format::Qcow => Qcow::open(ctx, file, access),
            Format::Vdi => Vdi::open(ctx, file, access),
            Format::Vmdk => Vmdk::open(ctx, file, access),
            Format::Vhd => Vhd::open(ctx, file, access),
            Format::Vhdx => Vhdx::open(ctx, file, access),
        }
    }

    pub fn get_ref(&self) -> &dyn Layer {
        whichever!(self)
    }

    pub fn get(&mut self) -> &mut dyn Layer {
        whichever!(self)
    }

    pub fn inspect(&mut self) -> &mut dyn Inspect {
        whichever!(self)
    }
}

/// A refusal of writes, said once.
pub(crate) fn read_only(file: FileNo, why: &'static str) -> ImageFault {
    ImageFault::new(crate::fault::FaultKind::ReadOnly, file, why)
}

#[cfg(test)]
mod tests {
    //! Would miss: what is done with the answers; the image tests open such files.

    use super::*;

    #[test]
    fn a_suffix_counts_in_any_case() {
        for (name, format) in [
            ("a.VHD", Some(Format::Vhd)),
            ("a.b.Vmdk", Some(Format::Vmdk)),
            ("d_1B2C.avhdx", Some(Format::Vhdx)),
            ("d.AVHD", Some(Format::Vhd)),
            ("a.IMG", Some(Format::Raw)),
            ("a.iso", None),
            ("vhd", None),
        ] {
            assert_eq!(Format::by_suffix(name), format, "{name}");
        }
    }
}
