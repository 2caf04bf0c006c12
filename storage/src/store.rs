//! What a store is to the kernel: files with positioned reads, writes and flushes, all
//! asynchronous, all answered exactly once through [`Store::poll`].
//!
//! A store knows nothing of guests, formats or clusters. It never reports a flush that it did
//! not send, never allocates on the request path, and never waits: when it has no room now it
//! says so ([`Submit::NoRoom`]) and the caller comes back after a poll.

use platter_xen::{Hypervisor, Region};

/// The caller's name for one outstanding operation of a store; given back in [`Done`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tag(pub u32);

/// An open file (9p fid, partition, logical volume, file on ext4) of one store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileId(pub u16);

/// A stretch of shared memory: `len` bytes of `region` from `offset`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    pub region: Region,
    pub offset: usize,
    pub len: usize,
}

/// Where the bytes of one operation lie or must be put: one run, or two where a ring wraps.
/// An unused second run has `len` 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Window {
    pub runs: [Run; 2],
}

impl Window {
    /// Bytes in both runs.
    pub fn len(&self) -> usize {
        self.runs[0].len + self.runs[1].len
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes up to `bytes` from its front; what is left stays.
    pub fn split(&mut self, bytes: usize) -> Window {
        let mut taken = *self;
        let mut left = bytes;
        for (from, run) in self.runs.iter_mut().zip(&mut taken.runs) {
            run.len = run.len.min(left);
            left -= run.len;
            (from.offset, from.len) = (from.offset + run.len, from.len - run.len);
        }
        taken
    }
}

/// Why a store could not do something. The kernel maps it once to what a guest sees.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StoreFault {
    NotFound,
    Permission,
    /// The path is refused before anything is sent: `..`, empty, too long or too deep.
    BadPath,
    NotAFile,
    NoSpace,
    ReadOnly,
    /// Beyond the end of a file that cannot grow (a partition, a file on ext4).
    BeyondEnd,
    /// The store cannot do this at all (punch a hole over plain 9P2000.L, say).
    Unsupported,
    /// The store's server or device has gone; it may come back.
    Gone,
    /// The server or device answered something its protocol does not allow.
    Protocol,
    /// Too many open files or operations; the figure is the limit.
    Limit(u32),
    /// Refused with this Linux errno (9p Rlerror) or device status.
    Io(u32),
    /// A named reason why a volume or file cannot be used, as a sentence for people.
    Refused(&'static str),
}

/// What an accepted operation was cut to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Submit {
    /// Taken; covers this many bytes from the start of what was asked (at least one sector, at
    /// most [`Store::io_bytes_max`]). The caller submits the rest as further operations.
    Taken(u32),
    /// No room now; nothing was done. Try again after a [`Store::poll`] that yielded something, or
    /// when [`Store::made_room`] says so.
    NoRoom,
}

/// Access wanted at open.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    ReadOnly,
    ReadWrite,
}

/// An opened file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Opened {
    pub file: FileId,
    pub size_bytes: u64,
    /// Smallest unit the store writes in one piece, 512 or 4096; smaller writes are
    /// read-modify-write inside the store.
    pub block_bytes: u32,
    /// False for volumes and files on ext4: a write past `size_bytes` is refused.
    pub can_grow: bool,
    /// [`Store::punch`] works on this file.
    pub can_punch: bool,
    /// A number for the file on its store that is the same at every open (9p qid path, device
    /// and first block): two opens of one file are recognised by it, whatever their paths.
    pub identity: u64,
}

/// One answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Done {
    pub tag: Tag,
    pub result: Result<Answer, StoreFault>,
}

/// What succeeded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    Opened(Opened),
    /// The bytes read, in order; may be fewer than asked (the caller asks for the rest); empty
    /// where all that was asked for reads as zeros: at the end of the file, or in a hole. Valid
    /// until the next [`Store::release`] of this store.
    Read(Window),
    /// Bytes written, at least 1; may be fewer than submitted.
    Written(u32),
    /// Everything that was answered before this flush was submitted is durable.
    Flushed,
    Punched,
    /// The file's size now.
    Size(u64),
}

/// A place where image bytes live. Static dispatch: `H` is the machine or the simulator.
pub trait Store<H: Hypervisor> {
    /// Largest `len` one operation takes.
    fn io_bytes_max(&self) -> u32;

    /// Opens `path` (relative to the store, `/`-separated, no leading slash). The answer is
    /// [`Answer::Opened`].
    fn open(&mut self, hv: &mut H, tag: Tag, path: &str, access: Access) -> Result<(), StoreFault>;

    /// Closes a file when nothing is outstanding on it. No answer.
    fn close(&mut self, hv: &mut H, file: FileId);

    /// Asks for the current size. The answer is [`Answer::Size`].
    fn size(&mut self, hv: &mut H, tag: Tag, file: FileId) -> Result<Submit, StoreFault>;

    /// Reads up to `len` bytes at `offset`. The answer is [`Answer::Read`].
    fn read(
        &mut self,
        hv: &mut H,
        tag: Tag,
        file: FileId,
        offset: u64,
        len: u32,
    ) -> Result<Submit, StoreFault>;

    /// Writes at `offset`. When there is room, calls `fill` once with the window to put the
    /// bytes into (its length is what will be taken); if `fill` returns false nothing is sent
    /// and the result is `Ok(Submit::Taken(0))`, with no answer to come. The answer otherwise
    /// is [`Answer::Written`]. Where the store is [`deferring`](Self::is_deferring), the bytes
    /// may be put there after `fill` has returned, until [`push`](Self::push).
    fn write(
        &mut self,
        hv: &mut H,
        tag: Tag,
        file: FileId,
        offset: u64,
        len: u32,
        fill: &mut dyn FnMut(&mut H, Window) -> bool,
    ) -> Result<Submit, StoreFault>;

    /// Makes durable what was answered before. The answer is [`Answer::Flushed`].
    fn flush(&mut self, hv: &mut H, tag: Tag, file: FileId) -> Result<Submit, StoreFault>;

    /// Makes a range read as zeros and gives its space back where the store can. The answer is
    /// [`Answer::Punched`]. `Taken(0)` means all of the range: lengths may exceed 32 bits.
    fn punch(
        &mut self,
        hv: &mut H,
        tag: Tag,
        file: FileId,
        offset: u64,
        len: u64,
    ) -> Result<Submit, StoreFault>;

    /// Says that a range's bytes are not needed any more: it may read as anything afterwards.
    /// The answer is [`Answer::Punched`], `Taken(0)` means all of it. Stores that cannot refuse it.
    fn discard(
        &mut self,
        _hv: &mut H,
        _tag: Tag,
        _file: FileId,
        _offset: u64,
        _len: u64,
    ) -> Result<Submit, StoreFault> {
        Err(StoreFault::Unsupported)
    }

    /// What is submitted leaves with the next [`push`](Self::push) and not before.
    fn is_deferring(&self) -> bool {
        false
    }

    /// Sends what was submitted since the last time. Called at the end of each turn: one event
    /// to the other side for all of it.
    fn push(&mut self, _hv: &mut H) {}

    /// Takes back a write submitted since the last [`push`](Self::push), whose bytes could not
    /// be had: nothing is written and no answer comes.
    fn void(&mut self, _hv: &mut H, _tag: Tag) {
        unreachable!("only deferring stores take a write back")
    }

    /// When [`poll`](Self::poll) must be called next even if no event comes: 0 means at once (a
    /// device without interrupts has work outstanding), `None` that events suffice.
    fn poll_at_ns(&self) -> Option<u64> {
        None
    }

    /// Takes in events and yields the next answer. The caller calls until it gets `None`.
    /// `now_ns` drives timeouts.
    fn poll(&mut self, hv: &mut H, now_ns: u64) -> Option<Done>;

    /// Ends the life of all windows that answers have given out: the caller has copied them.
    fn release(&mut self, hv: &mut H);

    /// True once after room appeared of which no answer told: what took it was the store's own (a
    /// file that was being closed), or the server has gone. A store for which it is never true
    /// has an operation of the caller's under way whenever it is full.
    fn made_room(&mut self) -> bool {
        false
    }
}

/// Would miss: that callers give each its part in the order they were asked; the kernel's tests
/// in the simulator see that.
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_is_split_across_its_runs() {
        let region = Region { first_page: 0, pages: 4 };
        let run = |offset, len| Run { region, offset, len };
        let mut window = Window { runs: [run(4000, 96), run(0, 500)] };
        let front = window.split(40);
        assert_eq!((front.runs, front.len()), ([run(4000, 40), run(0, 0)], 40));
        let across = window.split(100);
        assert_eq!(across.runs, [run(4040, 56), run(0, 44)]);
        let rest = window.split(1000);
        assert_eq!((rest.runs[0].len, rest.runs[1]), (0, run(44, 456)));
        assert!(window.is_empty());
    }
}
