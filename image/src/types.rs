//! The nouns of the image engine, each with its unit in its type.

use crate::fault::ImageFault;

/// Bytes in a guest sector (blkif counts in these whatever the disk's sector size).
pub const SECTOR_BYTES: u64 = 512;

/// The n-th file of an image, in the order the files were opened: 0 is the image itself, then
/// its backing files, parents, extents and data files as they are met.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct FileNo(pub u16);

/// A range of guest sectors, never empty, its end not beyond `u64::MAX / 512`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SectorRange {
    pub start: u64,
    pub count: u64,
}

impl SectorRange {
    pub fn new(start: u64, count: u64) -> SectorRange {
        assert!(count > 0, "an empty sector range");
        assert!(start.checked_add(count).is_some_and(|end| end <= u64::MAX / SECTOR_BYTES));
        SectorRange { start, count }
    }

    /// First sector after the range.
    pub fn end(self) -> u64 {
        self.start + self.count
    }

    /// The first `count` sectors of this range, or all of it when it is shorter.
    pub fn prefix(self, count: u64) -> SectorRange {
        SectorRange::new(self.start, self.count.min(count))
    }

    /// First byte of the range in the guest's disk.
    pub fn start_bytes(self) -> u64 {
        self.start * SECTOR_BYTES
    }

    /// Length in bytes.
    pub fn bytes(self) -> u64 {
        self.count * SECTOR_BYTES
    }
}

/// A stretch of a file that the caller must read and [`fill`](crate::Image::fill) in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockRef {
    pub file: FileNo,
    pub offset: u64,
    /// Bytes; what lies beyond the end of the file is filled in as zeros.
    pub len: u32,
}

/// Where guest bytes lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// In this file from this byte on, contiguous.
    File { file: FileNo, offset: u64 },
    /// Nowhere: they read as zeros.
    Zero,
    /// In the engine's own memory (a decompressed cluster): fetch them with
    /// [`Image::bytes`](crate::Image::bytes) before the next call that may change the image.
    Memory { offset: usize },
}

/// One contiguous piece of a guest range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Guest sectors covered, from the start of what was asked; at least 1.
    pub sectors: u64,
    pub place: Place,
}

/// A write or copy that must be done before a [`WritePlan`] is committed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Prelude {
    Zero {
        file: FileNo,
        offset: u64,
        len: u64,
    },
    /// The ranges do not overlap.
    Copy {
        file: FileNo,
        from: u64,
        to: u64,
        len: u64,
    },
}

/// Preludes one plan can ask for: a new table, a new table above it, a refcount block or two.
pub const PRELUDES_MAX: usize = 4;

/// The obligation to [`commit`](crate::Image::commit) or [`abandon`](crate::Image::abandon).
/// Neither `Copy` nor `Clone`: it is answered exactly once.
#[must_use = "a prepared write must be committed or abandoned"]
#[derive(Debug)]
pub struct Prepared {
    pub(crate) slot: u16,
}

/// What to do for the first `sectors` of a guest write: run the preludes; write guest bytes
/// at `offset` of `file`; fill `head` and `tail` around them with what the image reads there now
/// ([`map_read`](crate::Image::map_read) still gives the old contents); then commit.
#[must_use = "a plan holds a prepared write"]
#[derive(Debug)]
pub struct WritePlan {
    pub prepared: Prepared,
    /// Guest sectors covered, from the start of what was asked; at least 1.
    pub sectors: u64,
    pub file: FileNo,
    /// Byte of `file` where the first guest byte goes; contiguous from there.
    pub offset: u64,
    /// Guest sectors just before the covered ones, to be copied to just before `offset`.
    pub head: Option<SectorRange>,
    /// Guest sectors just after the covered ones, to be copied to just after them.
    pub tail: Option<SectorRange>,
    pub preludes: heapless::Vec<Prelude, PRELUDES_MAX>,
}

/// What became of a discard of the first `sectors` of a range.
#[must_use = "a discard may ask for a punch"]
#[derive(Debug)]
pub struct DiscardPlan {
    pub sectors: u64,
    /// Give this stretch of a file back, if the store can; no harm if it cannot.
    pub punch: Option<(FileNo, u64, u64)>,
}

/// A resize was done: its metadata is to be flushed.
#[must_use = "the file may have to grow"]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ResizePlan {
    /// Make this file so many bytes long, before the flush.
    pub grow: Option<(FileNo, u64)>,
}

/// One step of making an image durable. The caller may have several writes in flight, but a
/// sync covers all that came before it and nothing after it may start until it is done.
#[derive(Debug)]
pub enum FlushStep<'a> {
    Write { file: FileNo, offset: u64, bytes: &'a [u8] },
    Sync { file: FileNo },
    Done,
}

/// Why a planner cannot answer now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    /// Read this, fill it in, call again. Asked once for each block: whoever else needs it
    /// meanwhile gets `Busy`.
    Miss(BlockRef),
    /// Something in flight must end first (a fill, a commit, a flush): call again then.
    Busy,
    /// Too much is dirty, or an order requires it: run a flush, then call again.
    NeedFlush,
    Fault(ImageFault),
}

impl From<ImageFault> for Stop {
    fn from(fault: ImageFault) -> Stop {
        Stop::Fault(fault)
    }
}

/// What every planner returns: straight-line code that stops through `?`.
pub type Step<T> = Result<T, Stop>;
