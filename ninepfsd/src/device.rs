//! One connected frontend: its rings, its session, and a thread that serves them.
//!
//! The thread sleeps on the event channels and on the workers; files are read and written by
//! the workers, so that many requests of one frontend are under way at once. Bounded: requests
//! and bytes in flight; beyond that the frontend's ring waits.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow};
use platter_storage::ninep::message::PLATTER_IN_FLIGHT;
use platter_xen::{Gref, Port};
use rustix::event::{PollFd, PollFlags, poll};

use crate::os::evtchn::Evtchn;
use crate::ring::{Fault, Ring};
use crate::session::{Outcome, Reply, Session};
use crate::share::Share;
use crate::workers::{Done, Task, Workers};

/// Bytes of requests that one frontend may have under way.
const IN_FLIGHT_BYTES_MAX: usize = 16 << 20;

/// A frontend being served; stops when dropped.
pub struct Device {
    stop: Arc<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

struct Serving {
    evtchn: Evtchn,
    rings: Vec<Ring>,
    in_flight: Vec<u32>,
    in_flight_bytes: usize,
    session: Session,
    workers: Workers,
    answers: Receiver<Done>,
    answer_to: Sender<Done>,
    /// The workers' and the owner's way to wake the thread.
    wake: UnixStream,
    waker: Arc<UnixStream>,
}

impl Device {
    /// Maps the rings and starts serving. `name` is for messages.
    pub fn start(
        name: &str,
        domid: u16,
        rings: &[(Gref, Port)],
        share: Share,
        workers: Workers,
        on_end: impl FnOnce(String) + Send + 'static,
    ) -> Result<Device> {
        let evtchn = Evtchn::open().context("cannot open /dev/xen/evtchn")?;
        let mut mapped = Vec::new();
        for (gref, port) in rings {
            let port = evtchn.bind(domid, port.0).context("cannot bind an event channel")?;
            let ring = Ring::new(domid, *gref, port);
            mapped.push(ring.map_err(|fault| anyhow!("cannot map a ring: {fault}"))?);
        }
        let half = mapped.iter().map(Ring::half_bytes).min().context("no rings")?;
        let (wake, waker) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        waker.set_nonblocking(true)?;
        let waker = Arc::new(waker);
        let stop = Arc::clone(&waker);
        let (answer_to, answers) = channel();
        let mut serving = Serving {
            evtchn,
            in_flight: vec![0; mapped.len()],
            rings: mapped,
            in_flight_bytes: 0,
            session: Session::new(share, half),
            workers,
            answers,
            answer_to,
            wake,
            waker,
        };
        let name = name.to_string();
        let thread = std::thread::Builder::new().name("9pfs".to_string()).spawn(move || {
            let why = match serving.run() {
                Ok(()) => "stopped".to_string(),
                Err(fault) => fault.to_string(),
            };
            drop(serving);
            on_end(format!("{name}: {why}"));
        })?;
        Ok(Device { stop, thread: Some(thread) })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // A thread that has ended has no use for it.
        let _ = (&*self.stop).write_all(STOP);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

const WAKE: &[u8] = b"w";
const STOP: &[u8] = b"s";

impl Serving {
    fn run(&mut self) -> Result<(), Fault> {
        loop {
            while let Ok(done) = self.answers.try_recv() {
                self.finish(done)?;
            }
            let mut went_on = false;
            for index in 0..self.rings.len() {
                went_on |= self.serve(index)?;
            }
            for ring in &mut self.rings {
                ring.send()?;
                if std::mem::take(&mut ring.notify) {
                    self.evtchn.notify(ring.port).map_err(Fault::Map)?;
                }
            }
            if !went_on && self.sleep().map_err(Fault::Map)? {
                return Ok(());
            }
        }
    }

    /// Takes what a ring has. True when it took anything.
    fn serve(&mut self, index: usize) -> Result<bool, Fault> {
        let mut took = false;
        loop {
            let ring = &mut self.rings[index];
            let full = self.in_flight[index] >= PLATTER_IN_FLIGHT
                || self.in_flight_bytes >= IN_FLIGHT_BYTES_MAX
                || ring.is_full();
            if full {
                return Ok(took);
            }
            let Some(incoming) = ring.take(self.session.msize)? else { return Ok(took) };
            took = true;
            let tag = incoming.head.tag;
            match self.session.handle(incoming) {
                Outcome::Answer(Reply { bytes, data }) => {
                    self.rings[index].answer(bytes, data)?;
                }
                Outcome::Work(job) => {
                    let job = match job.run_now(tag) {
                        Ok(Reply { bytes, data }) => {
                            self.rings[index].answer(bytes, data)?;
                            continue;
                        }
                        Err(job) => job,
                    };
                    let bytes = job.bytes();
                    self.in_flight[index] += 1;
                    self.in_flight_bytes += bytes;
                    let waker = Arc::clone(&self.waker);
                    let to = self.answer_to.clone();
                    self.workers.run(Task { job, tag, ring: index, bytes, to, waker });
                }
            }
        }
    }

    fn finish(&mut self, done: Done) -> Result<(), Fault> {
        self.in_flight[done.ring] -= 1;
        self.in_flight_bytes -= done.bytes;
        self.rings[done.ring].answer(done.reply.bytes, done.reply.data)
    }

    /// Waits for the frontend or the workers; true when told to stop.
    fn sleep(&mut self) -> std::io::Result<bool> {
        let mut fds =
            [PollFd::new(&self.evtchn, PollFlags::IN), PollFd::new(&self.wake, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let [events, wakes] = fds.map(|fd| fd.revents().contains(PollFlags::IN));
        if events {
            self.evtchn.take()?;
        }
        if wakes {
            let mut words = [0; 256];
            let len = self.wake.read(&mut words).unwrap_or(0);
            return Ok(words[..len].contains(&STOP[0]));
        }
        Ok(false)
    }
}

/// Wakes a device's thread.
pub fn wake(mut waker: &UnixStream) {
    // Full means that it will wake anyway; gone, that nobody waits.
    let _ = waker.write_all(WAKE);
}
