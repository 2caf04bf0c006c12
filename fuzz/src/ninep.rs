//! What the 9p targets share. Messages of both directions parse or are refused, and what parses
//! is written the same again. A frontend that breaks every rule of its ring gets at most an end
//! of its session: no panic, nothing outside its share.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use platter_9pfsd::frontend::Frontend;
use platter_9pfsd::more::More;
use platter_9pfsd::os::uring::Uring;
use platter_9pfsd::serving::Serving;
use platter_9pfsd::share::{Cache, Policy, Share};
use platter_9pfsd::workers::{Mailbox, Workers};
use platter_storage::ninep::message::{Answer, Request, VERSION_PLATTER, open};
use platter_xen::PAGE_BYTES;
use platter_xen::ninepfs::{HEAD_BYTES, Interface, MessageHead, parse_front_nodes};

/// Files of a share may grow to this.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// All together to this, where there is a limit.
const SHARE_BYTES_MAX: u64 = 1 << 18;
/// Steps of a session.
const STEPS_MAX: usize = 200;

/// One message, as both ends would see it.
pub fn message(input: &[u8]) {
    let Some((start, body)) = input.split_first_chunk::<{ HEAD_BYTES as usize }>() else { return };
    let Ok(mut head) = MessageHead::parse(start, 1 << 20) else { return };
    let mut bytes = [0; 8192];
    if let Ok(request) = Request::parse(head, body) {
        let len = request.emit(head.tag, &mut bytes).expect("no longer than it was");
        head.size = HEAD_BYTES + body.len() as u32;
        if let Request::Write { count, .. } = request {
            head.size = len as u32 + count;
        }
        assert_eq!(Request::parse(head, &bytes[HEAD_BYTES as usize..len]), Ok(request));
    }
    if let Ok(answer) = Answer::parse(head, body) {
        let _ = answer.emit(head.tag, &mut bytes);
    }
    let _ = More::parse(head.id, body);
    let mut page = [0; PAGE_BYTES];
    page[..body.len().min(PAGE_BYTES)].copy_from_slice(&body[..body.len().min(PAGE_BYTES)]);
    let _ = Interface::parse(&page);
    let _ =
        parse_front_nodes(|name| Some(body.split(|b| *b == name.len() as u8).next()?.to_vec()), 8);
}

struct World {
    directory: PathBuf,
    serving: Serving,
    front: Frontend,
}

impl World {
    /// `kind`, bit by bit: past the page cache; by io_uring; with a limited share.
    fn new(kind: u8) -> World {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        static WORKERS: OnceLock<Workers> = OnceLock::new();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("platter-fuzz-{}-{number}", std::process::id());
        let directory = PathBuf::from("/dev/shm").join(name);
        std::fs::create_dir_all(directory.join("share/sub")).expect("a directory");
        std::fs::write(directory.join("share/file"), b"0123456789").expect("a file");
        std::fs::write(directory.join("outside"), b"outside").expect("a file");
        let cache = if kind & 1 == 0 { Cache::Writeback } else { Cache::Direct };
        let share_bytes_max = if kind & 4 == 0 { 0 } else { SHARE_BYTES_MAX };
        let file_bytes_max = FILE_BYTES_MAX;
        let policy = Policy { file_bytes_max, share_bytes_max, cache, ..Policy::default() };
        let share = Share::open(&directory.join("share"), policy).expect("a share");
        let (front, ring) = Frontend::pair(4, 0).expect("memory");
        let workers = WORKERS.get_or_init(|| Workers::start(2).expect("threads")).clone();
        let mailbox = Arc::new(Mailbox::new().expect("a mailbox"));
        let mut serving = Serving::new(vec![ring], share, workers, mailbox);
        // Without it where the kernel has none.
        serving.set_uring(if kind & 2 == 0 { None } else { Uring::open() });
        World { directory, serving, front }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let outside = std::fs::read(self.directory.join("outside"));
        assert_eq!(outside.expect("nobody may remove it"), b"outside");
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// A session: the input says of what kind the share is, then, step by step, what the frontend does.
pub fn session(input: &[u8]) {
    let Some((kind, mut input)) = input.split_first() else { return };
    let mut world = World::new(*kind);
    let begin = [
        Request::Version { msize: 32768, version: VERSION_PLATTER },
        Request::Attach { fid: 0, afid: u32::MAX, uname: "", aname: "", n_uname: 0 },
        Request::Walk { fid: 0, newfid: 1, names: ["file"].into_iter().collect() },
        Request::Lopen { fid: 1, flags: open::READ_WRITE },
    ];
    for request in &begin {
        world.front.ask(0, request, &[]);
        world.serving.turn().expect("nothing is wrong yet");
        assert_eq!(world.front.take(&mut []).expect("an answer").0.id, request.id() + 1);
    }
    for _ in 0..STEPS_MAX {
        let Some((&[what, len], rest)) = input.split_first_chunk() else { break };
        let (bytes, rest) = rest.split_at(usize::from(len).min(rest.len()));
        input = rest;
        let word = bytes.first_chunk().map_or(u32::from(len), |four| u32::from_le_bytes(*four));
        match what % 8 {
            // A message whose size is right.
            0..=3 if world.front.room() >= bytes.len() as u32 + HEAD_BYTES => {
                let size = HEAD_BYTES + bytes.len() as u32;
                let head = [&size.to_le_bytes()[..], &[what >> 2 | 64], &[len, 0]].concat();
                let id = bytes.first().map_or(what, |id| *id);
                let head = if what % 8 < 2 { head } else { [&head[..4], &[id, len, 0]].concat() };
                let from = usize::from(what % 8 >= 2 && !bytes.is_empty());
                let size = (size - from as u32).to_le_bytes();
                world.front.put(&[&size[..], &head[4..], &bytes[from..]].concat());
            }
            // Bytes.
            4 if world.front.room() >= bytes.len() as u32 => world.front.put(bytes),
            // An index of the ring, or anything of the two pages.
            5 => world.front.interface.store(4 * (usize::from(len) % 18), word),
            6 => world.front.data.write(usize::from(len) * 100, bytes),
            _ => {
                if world.serving.turn().is_err() {
                    return;
                }
                world.serving.bells().for_each(drop);
                world.front.skip();
            }
        }
    }
    for _ in 0..20 {
        if world.serving.turn().is_err() {
            return;
        }
        world.front.skip();
    }
}
