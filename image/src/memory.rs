//! Memory for what an image keeps as long as it is open: as much as it asks for, or less, or a
//! fault. Whoever has little memory serves other images with it, and small things are allocated
//! without asking: some is always left.
//!
//! Must never: be asked on the request path.

use alloc::vec::Vec;

use crate::fault::{FaultKind, ImageFault};
use crate::types::FileNo;

/// Memory that must be left when something large was taken (ours): an image claims sizes, and the
/// next one's own structures need some too.
pub(crate) const SPARE_BYTES: usize = 512 << 10;

/// So many of these, if there is memory for them.
pub(crate) fn filled<T: Clone>(value: T, count: usize) -> Option<Vec<T>> {
    let mut all = Vec::new();
    all.try_reserve_exact(count).ok()?;
    all.resize(count, value);
    Some(all)
}

/// Is there so much memory left? Seen by taking it for a moment, which the compiler could leave out
/// if nobody looked at it.
pub(crate) fn is_left(len: usize) -> bool {
    let mut bytes = Vec::<u8>::new();
    let is_left = bytes.try_reserve_exact(len).is_ok();
    core::hint::black_box(&bytes);
    is_left
}

/// What `make` makes of `most`, or of half as much, and so on down to 1.
pub(crate) fn as_much_as_fits<T>(
    most: usize,
    make: impl Fn(usize) -> Option<T>,
) -> Result<T, ImageFault> {
    let halves = core::iter::successors(Some(most.max(1)), |&count| Some(count / 2));
    let made = halves.take_while(|&count| count > 0).find_map(make);
    made.ok_or(LACK)
}

/// There is too little to open one more image, or one more layer.
pub(crate) const LACK: ImageFault = ImageFault {
    kind: FaultKind::Memory,
    file: FileNo(0),
    field: "memory for its tables",
    offset: 0,
    value: 0,
    limit: 0,
    name: crate::fault::FaultName::NONE,
};
