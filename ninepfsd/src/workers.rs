//! The threads that read, write and sync files: a few for all frontends, so that a slow file
//! holds up none of them and no frontend makes threads.

use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use crate::device;
use crate::session::{Job, Reply};

/// Work for one request.
pub struct Task {
    pub job: Job,
    pub tag: u16,
    pub ring: usize,
    /// Bytes it holds, given back with the answer.
    pub bytes: usize,
    pub to: Sender<Done>,
    pub waker: Arc<UnixStream>,
}

/// A request's answer, for its ring.
pub struct Done {
    pub ring: usize,
    pub bytes: usize,
    pub reply: Reply,
}

/// The way to the threads.
#[derive(Clone)]
pub struct Workers {
    tasks: Sender<Task>,
}

impl Workers {
    pub fn start(count: usize) -> std::io::Result<Workers> {
        let (tasks, queue) = channel();
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..count {
            let queue = Arc::clone(&queue);
            std::thread::Builder::new().name("file".to_string()).spawn(move || work(&queue))?;
        }
        Ok(Workers { tasks })
    }

    pub fn run(&self, task: Task) {
        self.tasks.send(task).expect("the workers live as long as the process");
    }
}

fn work(queue: &Mutex<Receiver<Task>>) {
    loop {
        let next = queue.lock().expect("no worker panics with the queue in hand").recv();
        let Ok(task) = next else { return };
        let reply = task.job.run(task.tag);
        // A device that has gone needs no answer.
        let _ = task.to.send(Done { ring: task.ring, bytes: task.bytes, reply });
        device::wake(&task.waker);
    }
}
