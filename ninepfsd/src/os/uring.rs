//! Reads and writes that wait for a disk, by io_uring: no thread waits with them, and a turn's
//! are handed over by one system call.
//!
//! A ring is made before the sandbox is entered and restricted to reading and writing open files;
//! inside, only its io_uring_enter is allowed. Guards that memory and file of what is under way
//! stay where they are until the kernel has ended it. Must never: end with something under way.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use io_uring::register::Restriction;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use platter_storage::ninep::message::PLATTER_IN_FLIGHT;
use platter_xen::ninepfs::RINGS_MAX;
use rustix::io::Errno;

use crate::job::Job;

/// As many as a frontend may have under way.
const ENTRIES: usize = PLATTER_IN_FLIGHT as usize * RINGS_MAX;

/// A request of a frontend that the kernel has.
struct Flight {
    job: Job,
    tag: u16,
    ring: usize,
}

/// Something that has ended.
pub struct End {
    pub job: Job,
    pub tag: u16,
    pub ring: usize,
    pub moved: Moved,
}

/// How it ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Moved {
    All,
    Failed(Errno),
    /// A part, or nothing because it would have waited: somebody must do it as a whole.
    Part,
}

pub struct Uring {
    uring: IoUring,
    /// Never grows, so that nothing in it moves. The index is what the kernel tells us by.
    flights: Box<[Option<Flight>]>,
    under_way: usize,
}

impl Uring {
    /// `None` where the kernel does not have it, or not for us.
    pub fn open() -> Option<Uring> {
        let uring = IoUring::builder().setup_r_disabled().build(ENTRIES as u32).ok()?;
        let mut allowed =
            [Restriction::sqe_op(opcode::Read::CODE), Restriction::sqe_op(opcode::Write::CODE)];
        uring.submitter().register_restrictions(&mut allowed).ok()?;
        uring.submitter().register_enable_rings().ok()?;
        Some(Uring { uring, flights: (0..ENTRIES).map(|_| None).collect(), under_way: 0 })
    }

    /// Takes over a read or write; it begins with the next [`Uring::submit`]. Gives back what
    /// it is not for.
    pub fn start(&mut self, job: Job, tag: u16, ring: usize) -> Result<(), Job> {
        let free = self.flights.iter().position(Option::is_none);
        let Some(index) = free.filter(|_| job.suits_uring()) else { return Err(job) };
        let flight = self.flights[index].insert(Flight { job, tag, ring });
        let Some(entry) = entry(&mut flight.job) else {
            return Err(self.flights[index].take().expect("just put there").job);
        };
        // SAFETY: file and buffer of the entry are owned by the flight, which stays in its place
        // and is not touched until the kernel has ended it; dropping waits for that.
        let pushed = unsafe { self.uring.submission().push(&entry.user_data(index as u64)) };
        if pushed.is_err() {
            return Err(self.flights[index].take().expect("just put there").job);
        }
        self.under_way += 1;
        Ok(())
    }

    /// Begins what was started since the last time. False when some of it has to wait.
    pub fn submit(&mut self) -> bool {
        self.uring.submission().is_empty() || self.uring.submit().is_ok()
    }

    /// Something that has ended.
    pub fn take(&mut self) -> Option<End> {
        let done: cqueue::Entry = self.uring.completion().next()?;
        let flight = self.flights[done.user_data() as usize].take();
        let Flight { job, tag, ring } = flight.expect("the kernel ends what it has, once");
        self.under_way -= 1;
        let moved = match done.result() {
            count if count == job.bytes() as i32 => Moved::All,
            count if count >= 0 => Moved::Part,
            code => match Errno::from_raw_os_error(-code) {
                Errno::AGAIN | Errno::INTR => Moved::Part,
                errno => Moved::Failed(errno),
            },
        };
        Some(End { job, tag, ring, moved })
    }

    /// Waits until nothing is under way any more.
    pub fn drain(&mut self) {
        while self.under_way > 0 {
            // It fails only when interrupted, or short of memory for a moment.
            let _ = self.uring.submit_and_wait(1);
            while self.take().is_some() {}
        }
    }
}

/// What the kernel is told of a job.
fn entry(job: &mut Job) -> Option<squeue::Entry> {
    match job {
        Job::Read { file, offset, count, buffer, how } => {
            let bytes = buffer.slice_mut(*count as usize);
            let fd = types::Fd(file.as_raw_fd());
            let read = opcode::Read::new(fd, bytes.as_mut_ptr(), *count).offset(*offset);
            Some(read.rw_flags(how.bits() as i32).build())
        }
        Job::Write { file, offset, count, buffer, how, .. } => {
            let bytes = buffer.slice(*count as usize);
            let fd = types::Fd(file.as_raw_fd());
            let write = opcode::Write::new(fd, bytes.as_ptr(), *count).offset(*offset);
            Some(write.rw_flags(how.bits() as i32).build())
        }
        Job::Sync { .. } | Job::Allocate { .. } => None,
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        self.drain();
    }
}

/// Readable once something has ended.
impl AsFd for Uring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring keeps its descriptor open for as long as it lives.
        unsafe { BorrowedFd::borrow_raw(self.uring.as_raw_fd()) }
    }
}

/// Would miss: what disks and file systems do; the kernel's own files are used here.
#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::Arc;

    use rustix::io::ReadWriteFlags;

    use super::*;
    use crate::buffer::Pool;

    fn read(file: &Arc<File>, offset: u64, count: u32) -> Job {
        let (file, buffer) = (Arc::clone(file), Pool::default().take(count as usize));
        Job::Read { file, offset, count, buffer, how: ReadWriteFlags::empty() }
    }

    fn wait(uring: &mut Uring) -> End {
        assert!(uring.submit());
        loop {
            if let Some(end) = uring.take() {
                return end;
            }
            std::thread::yield_now();
        }
    }

    #[test]
    fn whole_ones_are_done_parts_and_others_go_back() {
        // A kernel without it is served by the workers alone.
        let Some(mut uring) = Uring::open() else { return };
        let path = std::env::temp_dir().join(format!("platter-uring-{}", std::process::id()));
        std::fs::write(&path, [7; 10_000]).expect("a file");
        let file = Arc::new(File::open(&path).expect("it"));
        assert!(uring.start(read(&file, 4096, 4096), 3, 1).is_ok());
        let End { job, tag, ring, moved } = wait(&mut uring);
        assert_eq!((moved, tag, ring), (Moved::All, 3, 1));
        assert!(job.into_buffer().expect("the read's").slice(4096) == [7; 4096]);
        assert!(uring.start(read(&file, 8192, 4096), 4, 0).is_ok());
        assert_eq!(wait(&mut uring).moved, Moved::Part, "the file ends there");
        let sync = Job::Sync { file: Arc::clone(&file), data_only: true };
        assert!(uring.start(sync, 5, 0).is_err());
        // A directory cannot be read.
        let directory = Arc::new(File::open(std::env::temp_dir()).expect("it"));
        assert!(uring.start(read(&directory, 0, 4096), 6, 0).is_ok());
        assert_eq!(wait(&mut uring).moved, Moved::Failed(Errno::ISDIR));
        // As many as there may be, and then no more; dropping waits for them.
        let started = (0..).take_while(|_| uring.start(read(&file, 0, 4096), 0, 0).is_ok());
        assert_eq!(started.count(), ENTRIES);
        assert!(uring.submit());
        drop(uring);
        std::fs::remove_file(&path).expect("removed");
    }

    #[test]
    fn nothing_but_reading_and_writing_is_allowed() {
        let Some(mut uring) = Uring::open() else { return };
        let entry = opcode::Nop::new().build();
        // SAFETY: it uses no memory.
        unsafe { uring.uring.submission().push(&entry) }.expect("room");
        uring.uring.submit().expect("the kernel takes it");
        let done = uring.uring.completion().next().expect("refused at once");
        assert_eq!(done.result(), -libc::EACCES);
    }
}
