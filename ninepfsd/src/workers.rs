//! The threads that wait for disks: a few for all frontends, so that a slow file holds up none
//! of them and no frontend makes threads.
//!
//! Guards that a frontend's thread is woken once for many answers, and only when it sleeps; that
//! frontends take turns, and that none has all workers wait for its files. Must never: do a task
//! of a frontend that [`Workers::drain`] has returned for.

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
    /// A frontend that is waited for has nothing left here.
    emptied: Condvar,
}

/// What there is to do, by frontend; those who have something, in the order of their turns.
struct Tasks {
    frontends: VecDeque<Frontend>,
    /// Workers that do nothing.
    idle: usize,
}

#[derive(Default)]
struct Frontend {
    /// Which: its mailbox lives as long as it has tasks.
    mailbox: usize,
    waiting: VecDeque<Task>,
    running: usize,
    /// It is being waited for until it has nothing.
    ends: bool,
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

    /// Who waits longest for a turn and may have one more worker: who has some leaves more than
    /// that to the others, so that each that hangs takes half of the rest.
    fn next(&self) -> Option<usize> {
        let idle = self.idle;
        let may = |frontend: &Frontend| !frontend.waiting.is_empty() && frontend.running < idle;
        self.frontends.iter().position(may)
    }

    fn take(&mut self) -> Option<Task> {
        let place = self.next()?;
        let mut frontend = self.frontends.remove(place).expect("just found");
        let task = frontend.waiting.pop_front();
        frontend.running += 1;
        self.idle -= 1;
        self.frontends.push_back(frontend);
        task
    }

    /// A task of this frontend is done; whether somebody waited for that.
    fn done(&mut self, mailbox: usize) -> bool {
        self.idle += 1;
        let frontend = self.frontend(mailbox);
        frontend.running -= 1;
        let ends = frontend.ends;
        self.tidy();
        ends && !self.has(mailbox)
    }

    /// Forgets the tasks of a frontend that nobody has begun; the others are waited for.
    fn forget(&mut self, mailbox: usize) -> VecDeque<Task> {
        let frontend = self.frontend(mailbox);
        frontend.ends = true;
        let tasks = std::mem::take(&mut frontend.waiting);
        self.tidy();
        tasks
    }

    /// Keeps nothing of those who have nothing.
    fn tidy(&mut self) {
        self.frontends.retain(|frontend| frontend.running > 0 || !frontend.waiting.is_empty());
    }

    fn has(&self, mailbox: usize) -> bool {
        self.frontends.iter().any(|frontend| frontend.mailbox == mailbox)
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
    pub fn start(count: usize) -> std::io::Result<Workers> {
        let workers = Workers::absent(count);
        for _ in 0..count {
            let queue = Arc::clone(&workers.queue);
            std::thread::Builder::new()
                .name("file".to_string())
                .spawn(move || work_for_ever(&queue))?;
        }
        Ok(workers)
    }

    /// So many are wanted; nobody works as yet.
    pub(crate) fn absent(count: usize) -> Workers {
        let tasks = Mutex::new(Tasks { frontends: VecDeque::new(), idle: count });
        let (came, emptied) = (Condvar::new(), Condvar::new());
        Workers { queue: Arc::new(Queue { tasks, came, emptied }) }
    }

    pub fn run(&self, task: Task) {
        self.queue.tasks.lock().expect(FREE).put(task);
        self.queue.came.notify_one();
    }

    /// Forgets what is not begun of a frontend, and waits for what is. It gives no more tasks.
    pub fn drain(&self, mailbox: &Arc<Mailbox>) {
        let mailbox = number_of(mailbox);
        let forgotten = self.queue.tasks.lock().expect(FREE).forget(mailbox);
        // To close a file may take time, too.
        drop(forgotten);
        let tasks = self.queue.tasks.lock().expect(FREE);
        drop(self.queue.emptied.wait_while(tasks, |tasks| tasks.has(mailbox)).expect(FREE));
    }

    /// Takes the next task, as a worker would; `None` when there is none.
    #[cfg(test)]
    pub fn begin(&self) -> Option<impl FnOnce() + Send + 'static> {
        let queue = Arc::clone(&self.queue);
        let task = self.queue.tasks.lock().expect(FREE).take()?;
        Some(move || work(&queue, task))
    }

    /// Does it as well; false when there is none.
    #[cfg(test)]
    pub fn work_once(&self) -> bool {
        self.begin().map(|work| work()).is_some()
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
        // One that is done may let two begin: another's, and its own frontend's next.
        let is_more = tasks.next().is_some();
        drop(tasks);
        if is_more {
            queue.came.notify_one();
        }
        work(queue, task);
    }
}

fn work(queue: &Queue, Task { job, tag, ring, to }: Task) {
    let (outcome, buffer) = job.run();
    let is_awaited = queue.tasks.lock().expect(FREE).done(number_of(&to));
    to.put(Done { outcome, buffer, tag, ring });
    if is_awaited {
        queue.emptied.notify_all();
    }
}

/// Would miss: workers that wait; these are asked what they would do next.
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frontends_take_turns_and_none_has_all_workers() {
        let file = Arc::new(std::fs::File::open("/").expect("a directory"));
        let mailboxes = [(), (), ()].map(|()| Arc::new(Mailbox::new().expect("a mailbox")));
        let mut tasks = Tasks { frontends: VecDeque::new(), idle: 6 };
        let put = |tasks: &mut Tasks, of: usize, tag| {
            let job = Job::Sync { file: Arc::clone(&file), data_only: true };
            tasks.put(Task { job, tag, ring: 0, to: Arc::clone(&mailboxes[of]) });
        };
        let next = |tasks: &mut Tasks| tasks.take().map(|task| task.tag);
        let all = |tasks: &mut Tasks| -> Vec<_> { std::iter::from_fn(|| next(tasks)).collect() };
        (0..5).for_each(|tag| put(&mut tasks, 0, tag));
        assert_eq!(all(&mut tasks), [0, 1, 2], "half of them are left to others");
        // These hang: the second takes half of the rest, and there is one for a third.
        (10..15).for_each(|tag| put(&mut tasks, 1, tag));
        assert_eq!(all(&mut tasks), [10, 11]);
        (20..22).for_each(|tag| put(&mut tasks, 2, tag));
        assert_eq!(all(&mut tasks), [20]);
        // Whoever waits longest and may have it gets the worker that is free again.
        tasks.done(number_of(&mailboxes[2]));
        assert_eq!(all(&mut tasks), [21]);
        tasks.done(number_of(&mailboxes[0]));
        assert_eq!(all(&mut tasks), []);
        tasks.done(number_of(&mailboxes[2]));
        assert_eq!(all(&mut tasks), []);
        tasks.done(number_of(&mailboxes[0]));
        assert_eq!(all(&mut tasks), [3]);
        for (of, count) in [(0, 2), (1, 2)] {
            (0..count).for_each(|_| _ = tasks.done(number_of(&mailboxes[of])));
        }
        assert_eq!(all(&mut tasks), [12, 4, 13, 14]);
        for (of, count) in [(0, 1), (1, 3)] {
            (0..count).for_each(|_| _ = tasks.done(number_of(&mailboxes[of])));
        }
        assert_eq!(tasks.idle, 6);
        // Of three one is done, and two begin: whoever finds the first must say so.
        tasks.idle = 3;
        (0..3).for_each(|tag| put(&mut tasks, 0, tag));
        (10..13).for_each(|tag| put(&mut tasks, 1, tag));
        assert_eq!(
            (next(&mut tasks), next(&mut tasks), next(&mut tasks)),
            (Some(0), Some(10), None)
        );
        tasks.done(number_of(&mailboxes[1]));
        assert_eq!(next(&mut tasks), Some(1));
        assert!(tasks.next().is_some(), "the second has none");
        assert_eq!(all(&mut tasks), [11]);
        for mailbox in &mailboxes {
            tasks.forget(number_of(mailbox));
        }
        for (of, count) in [(0, 2), (1, 1)] {
            (0..count).for_each(|_| _ = tasks.done(number_of(&mailboxes[of])));
        }
        assert_eq!(tasks.idle, 3);
        assert!(tasks.frontends.is_empty(), "nothing is kept of those who have nothing");
    }

    #[test]
    fn one_worker_is_enough() {
        let workers = Workers::start(1).expect("a thread");
        let mailbox = Arc::new(Mailbox::new().expect("a mailbox"));
        let file = Arc::new(std::fs::File::open("/").expect("a directory"));
        for tag in 0..3 {
            let job = Job::Sync { file: Arc::clone(&file), data_only: true };
            workers.run(Task { job, tag, ring: 0, to: Arc::clone(&mailbox) });
        }
        let mut done = 0;
        while done < 3 {
            done += std::iter::from_fn(|| mailbox.take()).count();
            std::thread::yield_now();
        }
    }
}
