//! Has what was written go to the disk while more is written: what only the page cache has at the
//! end is waited for then, with nothing else to do.
//!
//! It must never keep a failed sync to itself: the kernel tells each failure once, and the sync
//! that ends the work would not hear of it.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::{self, JoinHandle};

use crate::medium::Medium;

/// Bytes written before a sync is begun: a tenth of a second of a fast disk.
const STRETCH_BYTES: u64 = 32 << 20;

pub struct Writeback {
    /// One sync may wait for the one under way; more would be the same.
    begin: SyncSender<()>,
    syncing: JoinHandle<io::Result<()>>,
    bytes: u64,
}

impl Writeback {
    pub fn new(media: Vec<Arc<dyn Medium>>) -> Writeback {
        let (begin, begun) = sync_channel(1);
        let syncing = thread::spawn(move || {
            begun.iter().try_for_each(|()| media.iter().try_for_each(|medium| medium.sync()))
        });
        Writeback { begin, syncing, bytes: 0 }
    }

    /// So many bytes more were written.
    pub fn wrote(&mut self, bytes: u64) {
        self.bytes += bytes;
        if self.bytes >= STRETCH_BYTES {
            self.bytes = 0;
            // If it is full, that sync is still to come. If nobody listens, one failed, which
            // `finish` tells.
            let _ = self.begin.try_send(());
        }
    }

    /// Waits for what is under way, and tells what failed.
    pub fn finish(self) -> io::Result<()> {
        drop(self.begin);
        self.syncing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

#[cfg(test)]
mod tests {
    //! Would miss: whether it is faster; the benches tell.

    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Counts its syncs, of which one fails.
    struct Counting {
        syncs: AtomicUsize,
        fails_at: usize,
    }

    impl Medium for Counting {
        fn sync(&self) -> io::Result<()> {
            match self.syncs.fetch_add(1, Ordering::SeqCst) == self.fails_at {
                true => Err(io::Error::other("the disk is gone")),
                false => Ok(()),
            }
        }
        fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
            unreachable!()
        }
        fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
            unreachable!()
        }
        fn set_len(&self, _: u64) -> io::Result<()> {
            unreachable!()
        }
        fn len(&self) -> io::Result<u64> {
            unreachable!()
        }
        fn punch(&self, _: u64, _: u64) -> io::Result<()> {
            unreachable!()
        }
        fn zero(&self, _: u64, _: u64) -> io::Result<()> {
            unreachable!()
        }
    }

    #[test]
    fn each_stretch_is_synced_and_a_failure_is_told_at_the_end() {
        for fails_at in [usize::MAX, 0] {
            let disk = Arc::new(Counting { syncs: AtomicUsize::new(0), fails_at });
            let mut writeback = Writeback::new(vec![disk.clone()]);
            writeback.wrote(STRETCH_BYTES - 1);
            assert_eq!(disk.syncs.load(Ordering::SeqCst), 0);
            for _ in 0..10 {
                writeback.wrote(STRETCH_BYTES);
            }
            let told = writeback.finish();
            let syncs = disk.syncs.load(Ordering::SeqCst);
            match fails_at {
                0 => assert!(syncs == 1 && told.unwrap_err().to_string() == "the disk is gone"),
                _ => assert!((1..=10).contains(&syncs) && told.is_ok()),
            }
        }
    }
}
