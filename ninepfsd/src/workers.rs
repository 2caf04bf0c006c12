//! The threads that wait for disks: a few for all frontends, so that a slow file holds up none
//! of them and no frontend makes threads.
//!
//! Guards that a frontend's thread is woken once for many answers, and only when it sleeps; that
//! frontends take turns, and that none has all workers wait for its files.

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
    tasks: Mutex<Tasks>,
    came: Condvar,
}

/// What there is to do, by frontend; those who have something, in the order of their turns.
struct Tasks {
    frontends: VecDeque<Frontend>,
    /// Workers that one frontend may have at a time.
    each: usize,
}

#[derive(Default)]
struct Frontend {
    /// Which: its mailbox lives as long as it has tasks.
    mailbox: usize,
    waiting: VecDeque<Task>,
    running: usize,
}

impl Tasks {
    fn frontend(&mut self, mailbox: usize) -> &mut Frontend {
        let place = self.frontends.iter().position(|frontend| frontend.mailbox == mailbox);
        let place = place.unwrap_or_else(|| {
            self.frontends.push_back(Frontend { mailbox, ..Frontend::default() });
            self.frontends.len() - 1
        });
        &mut self.frontends[place]
    }

    fn put(&mut self, task: Task) {
        self.frontend(number_of(&task.to)).waiting.push_back(task);
    }

    /// The next task of whoever waits longest for a turn and may have one more worker.
    fn take(&mut self) -> Option<Task> {
        let each = self.each;
        let may = |frontend: &Frontend| !frontend.waiting.is_empty() && frontend.running < each;
        let place = self.frontends.iter().position(may)?;
        let mut frontend = self.frontends.remove(place).expect("just found");
        let task = frontend.waiting.pop_front();
        frontend.running += 1;
        self.frontends.push_back(frontend);
        task
    }

    /// A task of this frontend is done.
    fn done(&mut self, mailbox: usize) {
        let frontend = self.frontend(mailbox);
        frontend.running -= 1;
        if frontend.running == 0 && frontend.waiting.is_empty() {
            self.frontends.retain(|frontend| frontend.mailbox != mailbox);
        }
    }
}

fn number_of(mailbox: &Arc<Mailbox>) -> usize {
    Arc::as_ptr(mailbox).addr()
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
    /// One of them is kept for frontends that have none, where there are several.
    pub fn start(count: usize) -> std::io::Result<Workers> {
        let each = count.saturating_sub(1).max(1);
        let tasks = Mutex::new(Tasks { frontends: VecDeque::new(), each });
        let queue = Arc::new(Queue { tasks, came: Condvar::new() });
        for _ in 0..count {
            let queue = Arc::clone(&queue);
            std::thread::Builder::new()
                .name("file".to_string())
                .spawn(move || work_for_ever(&queue))?;
        }
        Ok(Workers { queue })
    }

    pub fn run(&self, task: Task) {
        self.queue.tasks.lock().expect(FREE).put(task);
        self.queue.came.notify_one();
    }

    /// Does the next task, as a worker would; false when there is none.
    #[cfg(test)]
    pub fn work_once(&self) -> bool {
        let next = self.queue.tasks.lock().expect(FREE).take();
        next.map(|task| work(&self.queue, task)).is_some()
    }
}

fn work_for_ever(queue: &Queue) {
    loop {
        let mut tasks = queue.tasks.lock().expect(FREE);
        let task = loop {
            match tasks.take() {
                Some(task) => break task,
                None => tasks = queue.came.wait(tasks).expect(FREE),
            }
        };
        drop(tasks);
        work(queue, task);
    }
}

fn work(queue: &Queue, Task { job, tag, ring, to }: Task) {
    let (outcome, buffer) = job.run();
    queue.tasks.lock().expect(FREE).done(number_of(&to));
    to.put(Done { outcome, buffer, tag, ring });
}

/// Would miss: workers that wait; these are asked what they would do next.
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frontends_take_turns_and_none_has_all_workers() {
        let file = Arc::new(std::fs::File::open("/").expect("a directory"));
        let mailboxes = [(), (), ()].map(|()| Arc::new(Mailbox::new().expect("a mailbox")));
        let mut tasks = Tasks { frontends: VecDeque::new(), each: 2 };
        let put = |tasks: &mut Tasks, of: usize, tag| {
            let job = Job::Sync { file: Arc::clone(&file), data_only: true };
            tasks.put(Task { job, tag, ring: 0, to: Arc::clone(&mailboxes[of]) });
        };
        for tag in 0..4 {
            put(&mut tasks, 0, tag);
        }
        put(&mut tasks, 1, 10);
        put(&mut tasks, 1, 11);
        put(&mut tasks, 2, 20);
        let next = |tasks: &mut Tasks| tasks.take().map(|task| task.tag);
        let taken: Vec<_> = std::iter::from_fn(|| next(&mut tasks)).collect();
        // Two of the first wait until one of its own is done.
        assert_eq!(taken, [0, 10, 20, 1, 11]);
        tasks.done(number_of(&mailboxes[1]));
        assert_eq!(next(&mut tasks), None);
        tasks.done(number_of(&mailboxes[0]));
        assert_eq!((next(&mut tasks), next(&mut tasks)), (Some(2), None));
        for (of, count) in [(0, 2), (1, 1), (2, 1)] {
            (0..count).for_each(|_| tasks.done(number_of(&mailboxes[of])));
        }
        assert_eq!(next(&mut tasks), Some(3));
        tasks.done(number_of(&mailboxes[0]));
        assert!(tasks.frontends.is_empty(), "nothing is kept of those who have nothing");
    }
}
