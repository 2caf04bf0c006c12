//! Threads that move and unpack bytes for one thread that plans: jobs go out, answers come back
//! in the order in which they end. It knows nothing of images.
//!
//! Threads are started when there is work for them and joined at the end; jobs that nobody
//! waits for any more are still done.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};

use platter_image::Decoders;
use zstd::bulk::Compressor;

/// What a thread has for itself, to be used again by each job.
#[derive(Default)]
pub struct Desk {
    decoders: Option<Decoders>,
    /// A packed cluster, and one of which only a part is wanted.
    packed: Vec<u8>,
    unpacked: Vec<u8>,
    encoder: Option<Compressor<'static>>,
}

impl Desk {
    /// Decoders, and memory for packed and unpacked bytes. They are made for the first packed
    /// cluster: most images have none.
    pub fn unpacking(&mut self) -> (&mut Decoders, &mut Vec<u8>, &mut Vec<u8>) {
        let decoders = self.decoders.get_or_insert_default();
        (decoders, &mut self.packed, &mut self.unpacked)
    }

    /// A zstd encoder: its tables are a megabyte or two, which are made once.
    pub fn packing(&mut self) -> &mut Compressor<'static> {
        let level = zstd::DEFAULT_COMPRESSION_LEVEL;
        let made = || Compressor::new(level).expect("there is memory for the tables");
        self.encoder.get_or_insert_with(made)
    }
}

type Job<T> = Box<dyn FnOnce(&mut Desk) -> T + Send>;

struct State<T> {
    jobs: VecDeque<Job<T>>,
    answers: VecDeque<T>,
    /// Threads that wait for a job.
    idle: usize,
    /// Answers that the planning thread waits for before it wants to be woken.
    wanted: usize,
    closed: bool,
}

struct Shared<T> {
    state: Mutex<State<T>>,
    job_there: Condvar,
    answers_there: Condvar,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().expect("no thread dies holding the queues")
    }
}

pub struct Pool<T> {
    shared: Arc<Shared<T>>,
    threads: Vec<JoinHandle<()>>,
    threads_max: usize,
    /// Jobs whose answers were not taken.
    out: usize,
}

impl<T: Send + 'static> Pool<T> {
    pub fn new(threads_max: usize) -> Pool<T> {
        let state = State {
            jobs: VecDeque::new(),
            answers: VecDeque::new(),
            idle: 0,
            wanted: usize::MAX,
            closed: false,
        };
        let shared = Shared {
            state: Mutex::new(state),
            job_there: Condvar::new(),
            answers_there: Condvar::new(),
        };
        Pool { shared: Arc::new(shared), threads: Vec::new(), threads_max, out: 0 }
    }

    /// Jobs whose answers were not taken.
    pub fn out(&self) -> usize {
        self.out
    }

    pub fn submit(&mut self, job: impl FnOnce(&mut Desk) -> T + Send + 'static) {
        self.out += 1;
        let mut state = self.shared.lock();
        state.jobs.push_back(Box::new(job));
        let starved = state.jobs.len() > state.idle;
        let wake = state.idle > 0;
        drop(state);
        if wake {
            self.shared.job_there.notify_one();
        }
        if starved && self.threads.len() < self.threads_max {
            let shared = Arc::clone(&self.shared);
            self.threads.push(thread::spawn(move || work(&shared)));
        }
    }

    /// The answers there are, once there are `at_least` so many.
    pub fn take(&mut self, at_least: usize) -> VecDeque<T> {
        assert!(at_least <= self.out, "more answers wanted than jobs out");
        let mut state = self.shared.lock();
        while state.answers.len() < at_least {
            state.wanted = at_least;
            state = self.shared.answers_there.wait(state).expect("no thread dies holding them");
        }
        state.wanted = usize::MAX;
        let answers = std::mem::take(&mut state.answers);
        self.out -= answers.len();
        answers
    }
}

impl<T> Drop for Pool<T> {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.job_there.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

fn work<T>(shared: &Shared<T>) {
    let mut desk = Desk::default();
    let mut state = shared.lock();
    loop {
        if let Some(job) = state.jobs.pop_front() {
            drop(state);
            let answer = job(&mut desk);
            state = shared.lock();
            state.answers.push_back(answer);
            if state.answers.len() >= state.wanted {
                shared.answers_there.notify_one();
            }
        } else if state.closed {
            return;
        } else {
            state.idle += 1;
            state = shared.job_there.wait(state).expect("no thread dies holding the queues");
            state.idle -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    //! Would miss: how fast it is.

    use super::*;

    #[test]
    fn every_job_is_answered_once() {
        let mut pool = Pool::new(3);
        let mut seen = vec![0; 500];
        for n in 0..500 {
            pool.submit(move |_| n);
            while pool.out() >= 20 {
                pool.take(5).into_iter().for_each(|n: usize| seen[n] += 1);
            }
        }
        let rest = pool.out();
        pool.take(rest).into_iter().for_each(|n| seen[n] += 1);
        assert!(pool.out() == 0 && seen.iter().all(|&times| times == 1));
    }
}
