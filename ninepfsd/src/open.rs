//! An open file, and the question whether to read and write it at once or by a worker.
//!
//! Two switches of threads cost more than copying 64 KiB, so what needs no waiting is done at
//! once. Where the kernel can tell (RWF_NOWAIT) it is asked. Where it cannot (writes on ext4,
//! everything on tmpfs) it is tried, and [`Patience`] ends when that turns out slow.

use std::collections::HashMap;
use std::fs::File;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::io::{Errno, IoSliceMut, ReadWriteFlags, preadv2};

use crate::os::memory::{How, RWF_DONTCACHE};
use crate::os::times_slept;
use crate::share::{Cache, DSYNC};
use crate::usage::Charge;

/// That a file is open for writing, among all clients of this server.
struct Writer((u64, u64));

/// How many there are, by device and inode.
static WRITERS: LazyLock<Mutex<HashMap<(u64, u64), u32>>> = LazyLock::new(Mutex::default);
const FREE: &str = "nobody panics with it in hand";

impl Writer {
    fn of(file: &File) -> Option<Writer> {
        let stat = rustix::fs::fstat(file).ok()?;
        let file = (stat.st_dev, stat.st_ino);
        *WRITERS.lock().expect(FREE).entry(file).or_default() += 1;
        Some(Writer(file))
    }

    fn is_alone(&self) -> bool {
        WRITERS.lock().expect(FREE)[&self.0] == 1
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let mut writers = WRITERS.lock().expect(FREE);
        let count = writers.get_mut(&self.0).expect("it was entered");
        *count -= 1;
        if *count == 0 {
            writers.remove(&self.0);
        }
    }
}

/// A file or directory that a fid has opened.
pub struct Open {
    pub file: Arc<File>,
    /// The same past the page cache, for what is aligned.
    pub direct: Option<Arc<File>>,
    pub writable: bool,
    /// Writes wait for the disk.
    pub synced: bool,
    writer: Option<Writer>,
    /// Its bytes leave the page cache at once.
    pub dontcache: bool,
    /// The kernel says of this file whether reading or writing would wait.
    pub foretells: Foretells,
}

#[derive(Clone, Copy)]
pub struct Foretells {
    pub read: bool,
    pub write: bool,
}

/// Bytes of a file on their way from or to a ring.
pub struct Transfer<'a> {
    pub file: &'a File,
    pub offset: u64,
    pub count: u32,
    pub dontcache: bool,
}

/// A read or write that was asked for.
pub struct Move<'a> {
    pub open: &'a mut Open,
    pub offset: u64,
    pub count: u32,
    pub is_write: bool,
    /// Space that a write may take.
    pub charge: Option<Charge>,
}

impl Transfer<'_> {
    /// The file has no more than so many bytes from there on.
    pub fn ends_after(&self, len: usize) -> bool {
        let end = self.offset.saturating_add(len as u64);
        rustix::fs::fstat(self.file).is_ok_and(|stat| stat.st_size as u64 <= end)
    }

    pub fn how(&self, now: bool) -> How {
        How { now, dontcache: self.dontcache }
    }
}

const DONTCACHE: ReadWriteFlags = ReadWriteFlags::from_bits_retain(RWF_DONTCACHE as u32);

/// O_DIRECT wants this of offsets, lengths and memory; every disk is content with it.
const DIRECT_BYTES: u32 = 4096;

impl Open {
    /// `how` it was opened.
    pub fn new(file: File, direct: Option<File>, how: OFlags, cache: Cache) -> Open {
        let writable = how.contains(OFlags::RDWR);
        let synced = writable && how.contains(DSYNC);
        let dontcache = cache == Cache::Dontcache && can_dontcache(&file);
        let foretells = Foretells { read: true, write: true };
        let writer = writable.then(|| Writer::of(&file)).flatten();
        let (file, direct) = (Arc::new(file), direct.map(Arc::new));
        Open { file, direct, writable, synced, writer, dontcache, foretells }
    }

    /// Nobody writes the file by another fid of any client.
    pub fn writes_alone(&self) -> bool {
        self.writer.as_ref().is_some_and(Writer::is_alone)
    }

    /// How a worker reads or writes it.
    pub fn worker_flags(&self) -> ReadWriteFlags {
        if self.dontcache { DONTCACHE } else { ReadWriteFlags::empty() }
    }
}

impl Move<'_> {
    /// Whoever does it waits for the disk.
    pub fn must_wait(&self) -> bool {
        self.direct().is_some() || self.is_write && self.open.synced
    }

    /// The file to use past the page cache, for this one.
    pub fn direct(&self) -> Option<&Arc<File>> {
        let is_aligned = self.offset.is_multiple_of(DIRECT_BYTES.into())
            && self.count.is_multiple_of(DIRECT_BYTES);
        self.open.direct.as_ref().filter(|_| is_aligned)
    }
}

/// Whether the kernel and the file system know RWF_DONTCACHE: nothing is read far beyond the end.
fn can_dontcache(file: &File) -> bool {
    preadv2(file, &mut [IoSliceMut::new(&mut [0])], 1 << 42, DONTCACHE).is_ok()
}

/// What one request may take at once, on average, where that slept: a processor that is taken
/// away is no reason to have others do the work.
const SLOW: Duration = Duration::from_millis(1);
/// Requests that go to workers once it took longer.
const WORKERS_TURNS: u32 = 64;
/// Requests that are not timed after a turn that was quick: to time one takes up to four system
/// calls, as much as all else of a small request.
const TRUSTED: u32 = 16;

/// Whether to try what may have to wait.
#[derive(Default)]
pub struct Patience {
    /// Requests that still go to workers.
    workers: u32,
    /// Requests that are still tried without being timed.
    trusted: u32,
    /// Since when one was timed in this turn, and how many were served from there on.
    since: Option<(Instant, i64)>,
    served: u32,
}

impl Patience {
    /// Does `transfer` at once, unless it waits or might be slow: then `None`. It is told whether
    /// to fail rather than wait; `is_whole` says whether so many bytes are all there is.
    pub fn at_once(
        &mut self,
        foretells: &mut bool,
        is_whole: impl Fn(usize) -> bool,
        transfer: impl Fn(bool) -> Result<usize, Errno>,
    ) -> Option<Result<usize, Errno>> {
        self.served += 1;
        if *foretells {
            match transfer(true) {
                Ok(len) if is_whole(len) => return Some(Ok(len)),
                // Done again as a whole by whoever may wait.
                Ok(_) | Err(Errno::AGAIN | Errno::INTR | Errno::FAULT) => return None,
                Err(Errno::OPNOTSUPP) => *foretells = false,
                Err(errno) => return Some(Err(errno)),
            }
        }
        if self.workers > 0 {
            self.workers -= 1;
            return None;
        }
        if self.trusted > 0 {
            self.trusted -= 1;
        } else if self.since.is_none() {
            (self.since, self.served) = (Some((Instant::now(), times_slept())), 1);
        }
        match transfer(false) {
            Err(Errno::INTR | Errno::FAULT) => None,
            result => Some(result),
        }
    }

    /// As after something slow.
    #[cfg(test)]
    pub fn exhausted() -> Patience {
        Patience { workers: 1, ..Patience::default() }
    }

    /// A turn is over: was trying worth it?
    pub fn judge(&mut self) {
        let served = std::mem::take(&mut self.served);
        let Some((since, slept)) = self.since.take() else { return };
        if since.elapsed() > SLOW * served && times_slept() > slept {
            self.workers = WORKERS_TURNS;
        } else {
            self.trusted = TRUSTED;
        }
    }
}

/// Would miss: whether a millisecond is the right measure for a disk.
#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn what_waits_goes_to_workers() {
        let (mut patience, eight) = (Patience::default(), |len| len == 8);
        let mut foretells = true;
        assert_eq!(patience.at_once(&mut foretells, eight, |_| Err(Errno::AGAIN)), None);
        assert_eq!(patience.at_once(&mut foretells, eight, |_| Ok(4)), None, "a part");
        assert_eq!(patience.at_once(&mut foretells, eight, |_| Ok(8)), Some(Ok(8)));
        let failed = patience.at_once(&mut foretells, eight, |_| Err(Errno::IO));
        assert_eq!((failed, foretells), (Some(Err(Errno::IO)), true));
    }

    #[test]
    fn what_cannot_be_foretold_is_tried_until_it_is_slow() {
        let (mut patience, eight) = (Patience::default(), |len| len == 8);
        let mut foretells = true;
        let delay = Cell::new(Duration::ZERO);
        let file = |now| {
            if now {
                return Err(Errno::OPNOTSUPP);
            }
            std::thread::sleep(delay.get());
            Ok(4)
        };
        // A part is an answer here: the file has no more.
        assert_eq!(patience.at_once(&mut foretells, eight, file), Some(Ok(4)));
        assert!(!foretells);
        patience.judge();
        delay.set(SLOW * 3);
        // It was quick, so it is not timed each time.
        for _ in 0..=TRUSTED {
            assert_eq!(patience.at_once(&mut foretells, eight, file), Some(Ok(4)));
            patience.judge();
        }
        for _ in 0..2 {
            for _ in 0..WORKERS_TURNS {
                assert_eq!(patience.at_once(&mut foretells, eight, file), None);
                patience.judge();
            }
            // Slow as it was, the next one is timed.
            assert_eq!(patience.at_once(&mut foretells, eight, file), Some(Ok(4)));
            patience.judge();
        }
    }
}
