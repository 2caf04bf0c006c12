//! What a request costs the server, beside what the kernel's pread and pwrite alone cost.
//!
//! Plays the frontend over ordinary memory, on the server's own thread: what is measured is
//! taking requests, moving bytes and answering; then files past the page cache, by workers and by
//! io_uring. Would miss: events and Xen. `cargo bench -p platter-9pfsd [-- DIRECTORY]`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use platter_9pfsd::frontend::Frontend;
use platter_9pfsd::os::uring::Uring;
use platter_9pfsd::serving::Serving;
use platter_9pfsd::share::{Cache, Policy, Share};
use platter_9pfsd::workers::{Mailbox, Workers};
use platter_storage::ninep::message::{Request, VERSION_PLATTER, open};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::time::{ClockId, clock_gettime};

const FILE_BYTES: u64 = 64 << 20;
const RINGS: usize = 8;
const ORDER: u32 = 9;
const MEASURE: Duration = Duration::from_millis(300);

struct World {
    serving: Serving,
    fronts: Vec<Frontend>,
    mailbox: Arc<Mailbox>,
    random: u64,
}

impl World {
    fn new(directory: &Path, cache: Cache, uring: Option<Uring>) -> World {
        let policy = Policy { cache, ..Policy::default() };
        let share = Share::open(directory, policy).expect("a directory");
        let (fronts, rings) =
            (0..RINGS as u32).map(|port| Frontend::pair(ORDER, port).expect("memory")).unzip();
        let workers = Workers::start(6).expect("threads");
        let mailbox = Arc::new(Mailbox::new().expect("a mailbox"));
        let mut serving = Serving::new(rings, share, workers, Arc::clone(&mailbox));
        serving.set_uring(uring);
        let mut world = World { serving, fronts, mailbox, random: 0x9e37_79b9_7f4a_7c15 };
        world.say(&Request::Version { msize: 1 << 20, version: VERSION_PLATTER });
        let (uname, aname) = ("", "");
        world.say(&Request::Attach { fid: 0, afid: u32::MAX, uname, aname, n_uname: 0 });
        let names = ["bench"].into_iter().collect();
        world.say(&Request::Walk { fid: 0, newfid: 1, names });
        world.say(&Request::Lopen { fid: 1, flags: open::READ_WRITE });
        world
    }

    fn say(&mut self, request: &Request) {
        self.fronts[0].ask(0, request, &[]);
        while self.fronts[0].take(&mut []).is_none() {
            self.serving.turn().expect("a sound ring");
        }
    }

    fn offset(&mut self, bytes: u32) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % (FILE_BYTES / u64::from(bytes)) * u64::from(bytes)
    }

    /// Until the workers or the kernel have done something.
    fn sleep(&self) {
        if !self.mailbox.go_to_sleep() {
            return;
        }
        let mut fds = vec![PollFd::new(&self.mailbox, PollFlags::IN)];
        fds.extend(self.serving.uring().map(|uring| PollFd::new(uring, PollFlags::IN)));
        // A frontend's thread sleeps until something comes; here answers may lie in the rings.
        let patience = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
        let _ = poll(&mut fds, Some(&patience));
        self.mailbox.wake_up(fds[0].revents().contains(PollFlags::IN));
    }

    /// Keeps `depth` requests under way for a while: how many were answered.
    fn play(&mut self, is_write: bool, bytes: u32, depth: usize, while_: impl Fn() -> bool) -> u64 {
        let (mut asked, mut answered) = (0, 0);
        let mut lane = 0;
        while while_() || answered < asked {
            // A message of 1 MiB is longer than half a ring of order 9 by its head.
            while while_() && asked - answered < depth as u64 {
                let (fid, offset, count) = (1, self.offset(bytes), bytes.min((1 << 20) - 4096));
                let request = if is_write {
                    Request::Write { fid, offset, count }
                } else {
                    Request::Read { fid, offset, count }
                };
                let lane_now = lane % RINGS;
                if self.fronts[lane_now].room() < bytes + 64
                    && self.fronts[lane_now].room() < 1 << 20
                {
                    break;
                }
                self.fronts[lane_now].ask_moving_nothing((asked % 128) as u16, &request);
                lane += 1;
                asked += 1;
            }
            if !self.serving.turn().expect("a sound ring") && asked > answered {
                self.sleep();
            }
            self.serving.bells().for_each(drop);
            for front in &mut self.fronts {
                while front.take(&mut []).is_some() {
                    answered += 1;
                }
            }
        }
        answered
    }
}

/// Processor time of the whole process.
fn processor() -> Duration {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// The kernel's part alone.
fn plain(file: &File, world: &mut World, is_write: bool, bytes: u32) -> Duration {
    let mut buffer = vec![1; bytes as usize];
    let (start, before) = (std::time::Instant::now(), processor());
    let mut count = 0;
    while start.elapsed() < MEASURE {
        for _ in 0..16 {
            let offset = world.offset(bytes);
            if is_write {
                file.write_at(&buffer, offset).expect("it writes");
            } else {
                file.read_at(&mut buffer, offset).expect("it reads");
            }
        }
        count += 16;
    }
    (processor() - before) / count
}

fn main() {
    let directory = std::env::args().skip(1).find(|word| !word.starts_with('-'));
    let directory = directory.map_or_else(std::env::temp_dir, PathBuf::from);
    let path = directory.join("bench");
    std::fs::write(&path, vec![7; FILE_BYTES as usize]).expect("room for the file");
    let file = File::options().read(true).write(true).open(&path).expect("it opens");
    println!(
        "{:6} {:>7} {:>4} {:>12} {:>10} {:>10}",
        "", "bytes", "depth", "requests/s", "us CPU", "plain us"
    );
    let mut world = World::new(&directory, Cache::Writeback, None);
    for is_write in [false, true] {
        for bytes in [4 << 10, 64 << 10, 1 << 20] {
            let plain = plain(&file, &mut world, is_write, bytes);
            for depth in [1, 8, 32, 128] {
                row(&mut world, is_write, bytes, depth, plain);
            }
        }
    }
    file.sync_all().expect("it syncs");
    for (name, uring) in [("workers", None), ("io_uring", Uring::open())] {
        println!("past the page cache, by {name}");
        let mut world = World::new(&directory, Cache::Direct, uring);
        for is_write in [false, true] {
            for (bytes, depth) in [(4 << 10, 1), (4 << 10, 32), (64 << 10, 32)] {
                row(&mut world, is_write, bytes, depth, Duration::ZERO);
            }
        }
    }
    std::fs::remove_file(&path).expect("it goes");
}

fn row(world: &mut World, is_write: bool, bytes: u32, depth: usize, plain: Duration) {
    let (start, before) = (std::time::Instant::now(), processor());
    let count = world.play(is_write, bytes, depth, || start.elapsed() < MEASURE);
    let cpu = (processor() - before).as_secs_f64() * 1e6 / count as f64;
    let rate = count as f64 / start.elapsed().as_secs_f64();
    let what = if is_write { "write" } else { "read" };
    let plain = plain.as_secs_f64() * 1e6;
    println!("{what:6} {bytes:>7} {depth:>4} {rate:>12.0} {cpu:>10.2} {plain:>10.2}");
}
