//! Who is to blame, and what the guest hears of it: the one place where a fault becomes a
//! response status and a counter.

use platter_image::{FaultKind, ImageFault};
use platter_storage::StoreFault;
use platter_xen::blkif::{BadRequest, Status};

/// Anything that keeps a guest's request from being done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// The guest wrote a request that breaks the protocol or the disk's limits.
    Request(BadRequest),
    /// A grant that the guest named could not be copied.
    Grant(i16),
    /// The image is wrong, full or read-only.
    Image(ImageFault),
    /// The store failed.
    Store(StoreFault),
    /// The guest's frontend has gone before the request was begun.
    Unheard,
    /// Ours: planned work could not go on although nothing was in its way.
    Stuck,
    /// Ours: no memory left for another disk.
    Memory,
}

/// Who is to blame: decides what happens to the disk beyond this request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Party {
    Guest,
    Image,
    Store,
    Own,
}

impl Fault {
    pub fn party(&self) -> Party {
        match self {
            Fault::Request(_) | Fault::Grant(_) | Fault::Unheard => Party::Guest,
            Fault::Image(_) => Party::Image,
            Fault::Store(_) => Party::Store,
            Fault::Stuck | Fault::Memory => Party::Own,
        }
    }

    /// What the guest is answered.
    pub fn status(&self) -> Status {
        match self {
            Fault::Request(bad) => bad.status(),
            Fault::Store(StoreFault::Unsupported) => Status::Unsupported,
            _ => Status::Error,
        }
    }

    /// Name of its counter.
    pub fn name(&self) -> &'static str {
        match self {
            Fault::Request(bad) => bad.name(),
            Fault::Grant(_) => "bad-grant",
            Fault::Unheard => "unheard",
            Fault::Image(fault) => match fault.kind {
                FaultKind::Full => "image-full",
                FaultKind::ReadOnly => "image-read-only",
                FaultKind::Limit => "image-limit",
                _ => "image-fault",
            },
            Fault::Store(StoreFault::Gone) => "store-gone",
            Fault::Store(StoreFault::NoSpace) => "store-no-space",
            Fault::Store(_) => "store-error",
            Fault::Stuck => "stuck",
            Fault::Memory => "no-memory",
        }
    }
}

impl From<ImageFault> for Fault {
    fn from(fault: ImageFault) -> Fault {
        match fault.kind {
            FaultKind::Memory => Fault::Memory,
            _ => Fault::Image(fault),
        }
    }
}

impl From<StoreFault> for Fault {
    fn from(fault: StoreFault) -> Fault {
        Fault::Store(fault)
    }
}
