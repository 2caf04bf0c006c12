//! The threads that wait for disks: a few for all frontends, so that a slow file holds up none
//! of them and no frontend makes threads.
//!
//! Guards that a frontend's thread is woken once for many answers, and only when it sleeps.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use crate::bell::Bell;
use crate::buffer::Buffer;
use crate::job::{Job, Outcome};

/// Work for one request.
pub struct Task {
    pub job: Job,
    pub tag: u16,
    pub ring: usize,
    pub to: Arc<Mailbox>,
}

/// What became of it.
pub struct Done {
    pub outcome: Outcome,
    pub buffer: Option<Buffer>,
    pub tag: u16,
    pub ring: usize,
}

/// Where a frontend's thread finds answers, and how it is woken.
pub struct Mailbox {
    done: Mutex<VecDeque<Done>>,
    sleeping: AtomicBool,
    stop: AtomicBool,
    bell: Bell,
}

/// The way to the threads.
#[derive(Clone)]
pub struct Workers {
    queue: Arc<Queue>,
}

struct Queue {
    tasks: Mutex<VecDeque<Task>>,
    came: Condvar,
}

const FREE: &str = "nobody panics with it in hand";

impl Mailbox {
    pub fn new() -> std::io::Result<Mailbox> {
        let (sleeping, stop) = (AtomicBool::new(false), AtomicBool::new(false));
        Ok(Mailbox { done: Mutex::default(), sleeping, stop, bell: Bell::new()? })
    }

    fn put(&self, done: Done) {
        self.done.lock().expect(FREE).push_back(done);
        self.ring();
    }

    pub fn take(&self) -> Option<Done> {
        self.done.lock().expect(FREE).pop_front()
    }

    /// Asks the thread to end.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.ring();
    }

    pub fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    fn ring(&self) {
        if self.sleeping.swap(false, Ordering::SeqCst) {
            self.bell.ring();
        }
    }

    /// From now on whoever puts something here rings. False when something is here already.
    pub fn go_to_sleep(&self) -> bool {
        self.sleeping.store(true, Ordering::SeqCst);
        let nothing = self.done.lock().expect(FREE).is_empty() && !self.is_stopped();
        if !nothing {
            self.sleeping.store(false, Ordering::SeqCst);
        }
        nothing
    }

    /// Nobody needs to ring any more. `rang`: somebody has.
    pub fn wake_up(&self, rang: bool) {
        self.sleeping.store(false, Ordering::SeqCst);
        if rang {
            self.bell.silence();
        }
    }
}

/// Readable once somebody rang.
impl AsFd for Mailbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

impl Workers {
    pub fn start(count: usize) -> std::io::Result<Workers> {
        let queue = Arc::new(Queue { tasks: Mutex::default(), came: Condvar::new() });
        for _ in 0..count {
            let queue = Arc::clone(&queue);
            std::thread::Builder::new()
                .name("file".to_string())
                .spawn(move || work_for_ever(&queue))?;
        }
        Ok(Workers { queue })
    }

    pub fn run(&self, task: Task) {
        self.queue.tasks.lock().expect(FREE).push_back(task);
        self.queue.came.notify_one();
    }

    /// Does the next task, as a worker would; false when there is none.
    #[cfg(test)]
    pub fn work_once(&self) -> bool {
        let next = self.queue.tasks.lock().expect(FREE).pop_front();
        next.map(work).is_some()
    }
}

fn work_for_ever(queue: &Queue) {
    loop {
        let mut tasks = queue.tasks.lock().expect(FREE);
        let task = loop {
            match tasks.pop_front() {
                Some(task) => break task,
                None => tasks = queue.came.wait(tasks).expect(FREE),
            }
        };
        drop(tasks);
        work(task);
    }
}

fn work(Task { job, tag, ring, to }: Task) {
    let (outcome, buffer) = job.run();
    to.put(Done { outcome, buffer, tag, ring });
}
