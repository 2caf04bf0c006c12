//! A session driven by messages through a ring over ordinary memory.
//! Would miss: Xen's rings and events, which the rig's scenarios exercise.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use platter_storage::ninep::message::{
    AllocateMode, Answer, GETATTR_BASIC, Request, SETATTR_SIZE, Writer, id,
};
use platter_xen::ninepfs::{HEAD_BYTES, MessageHead};

use super::*;
use crate::frontend::Frontend;
use crate::more;
use crate::serving::Serving;
use crate::share::{Cache, Policy};
use crate::workers::{Mailbox, Workers};

struct World {
    directory: PathBuf,
    serving: Serving,
    front: Frontend,
}

impl World {
    fn new(policy: Policy) -> World {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("platter-9pfsd-session-{}-{number}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        std::fs::create_dir_all(directory.join("sub")).expect("a directory");
        std::fs::write(directory.join("sub/file"), b"0123456789").expect("a file");
        let share = Share::open(&directory, policy).expect("a share");
        let (front, ring) = Frontend::pair(6, 0).expect("a ring");
        let workers = Workers::start(1).expect("a worker");
        let mailbox = Arc::new(Mailbox::new().expect("a mailbox"));
        let serving = Serving::new(vec![ring], share, workers, mailbox);
        World { directory, serving, front }
    }

    fn raw(&mut self, head: MessageHead, body: &[u8], data: &[u8]) -> (MessageHead, Vec<u8>) {
        let mut bytes = head.size.to_le_bytes().to_vec();
        bytes.push(head.id);
        bytes.extend_from_slice(&head.tag.to_le_bytes());
        self.front.put(&[&bytes, body, data].concat());
        let mut answer = vec![0; 1 << 17];
        loop {
            self.serving.turn().expect("the ring is sound");
            if let Some((answered, len)) = self.front.take(&mut answer) {
                assert_eq!((answered.size, answered.tag), (HEAD_BYTES + len as u32, head.tag));
                assert!(self.front.take(&mut []).is_none(), "two answers");
                answer.truncate(len);
                return (answered, answer);
            }
        }
    }

    fn ask(&mut self, request: &Request, data: &[u8]) -> (MessageHead, Vec<u8>) {
        let mut bytes = vec![0; 4096];
        let len = request.emit(7, &mut bytes).expect("it fits");
        let body = &bytes[HEAD_BYTES as usize..len];
        let head = MessageHead { size: (len + data.len()) as u32, id: request.id(), tag: 7 };
        self.raw(head, body, data)
    }

    /// Asks and wants the answer of the same kind.
    fn must(&mut self, request: &Request, data: &[u8]) -> (MessageHead, Vec<u8>) {
        let (head, body) = self.ask(request, data);
        assert_eq!(head.id, request.id() + 1, "{request:?}: {:?}", Answer::parse(head, &body));
        (head, body)
    }

    /// Asks and wants this error.
    fn refused(&mut self, request: &Request, data: &[u8], errno: Errno) {
        let (head, body) = self.ask(request, data);
        let expected = Answer::Lerror { ecode: errno.raw_os_error() as u32 };
        assert_eq!(Answer::parse(head, &body), Ok(expected), "{request:?}");
    }

    fn more(&mut self, id: u8, fill: impl FnOnce(&mut Writer)) -> (MessageHead, Vec<u8>) {
        let mut bytes = vec![0; 1024];
        let mut writer = Writer::new(&mut bytes, id, 9);
        fill(&mut writer);
        let len = writer.finish(0).expect("it fits");
        let head = MessageHead { size: len as u32, id, tag: 9 };
        self.raw(head, &bytes[HEAD_BYTES as usize..len], &[])
    }

    fn open(&mut self, write: bool) {
        let version = Request::Version { msize: 65536, version: VERSION_PLATTER };
        self.must(&version, &[]);
        let (uname, aname) = ("", "");
        let attach = Request::Attach { fid: 0, afid: u32::MAX, uname, aname, n_uname: 0 };
        self.must(&attach, &[]);
        let names = ["sub", "file"].into_iter().collect();
        self.must(&Request::Walk { fid: 0, newfid: 1, names }, &[]);
        let flags = if write { open::READ_WRITE } else { open::READ_ONLY };
        self.must(&Request::Lopen { fid: 1, flags }, &[]);
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

#[test]
fn a_file_is_written_read_and_synced() {
    let mut world = World::new(Policy::default());
    world.open(true);
    let count = 3;
    world.must(&Request::Write { fid: 1, offset: 4, count }, b"abc");
    world.must(&Request::Fsync { fid: 1, datasync: 0 }, &[]);
    let (head, body) = world.must(&Request::Read { fid: 1, offset: 2, count: 100 }, &[]);
    assert_eq!(Answer::parse(head, &body[..4]), Ok(Answer::Read { count: 8 }));
    assert_eq!(&body[4..], b"23abc789");
    assert_eq!(std::fs::read(world.directory.join("sub/file")).expect("it"), b"0123abc789");
}

#[test]
fn every_cache_mode_gives_the_same_bytes() {
    for cache in [Cache::Writeback, Cache::Dontcache, Cache::Direct] {
        let mut world = World::new(Policy { cache, ..Policy::default() });
        world.open(true);
        let data: Vec<u8> = (0..8192u32).map(|at| (at / 7) as u8).collect();
        for (offset, count) in [(0, 8192), (4096, 4096), (8192, 4096), (5000, 700)] {
            let data = &data[..count as usize];
            world.must(&Request::Write { fid: 1, offset, count }, data);
            let (_, body) = world.must(&Request::Read { fid: 1, offset, count }, &[]);
            assert!(body[4..] == *data, "{cache:?} {offset}");
        }
        // Over the end of the file, which is at 12288.
        for (offset, count, expected) in [(8192, 8192, 4096), (12288, 4096, 0), (12000, 900, 288)] {
            let (_, body) = world.must(&Request::Read { fid: 1, offset, count }, &[]);
            assert_eq!(body.len(), 4 + expected, "{cache:?} {offset}");
        }
    }
}

#[test]
fn holes_are_punched_and_found() {
    let mut world = World::new(Policy::default());
    world.open(true);
    world.must(&Request::Setattr { fid: 1, valid: SETATTR_SIZE, size: 1 << 20 }, &[]);
    let data = vec![1; 60_000];
    world.must(&Request::Write { fid: 1, offset: 1 << 19, count: 60_000 }, &data);
    let mode = AllocateMode::Punch;
    world.must(&Request::Allocate { fid: 1, mode, offset: 1 << 19, len: 32_768 }, &[]);
    let (head, body) = world.must(&Request::Extents { fid: 1, offset: 0, len: 1 << 20 }, &[]);
    let Ok(Answer::Extents { end, extents }) = Answer::parse(head, &body) else {
        panic!("{body:?}")
    };
    assert_eq!(end, 1 << 20);
    let covers = |at: u64| extents.iter().any(|e| e.offset <= at && at < e.offset + e.len);
    assert!(covers((1 << 19) + 40_000), "{extents:?}");
    assert!(!covers((1 << 19) + 100) || extents.len() == 1, "{extents:?}");
    // Not while somebody else may write it.
    let names = ["sub", "file"].into_iter().collect();
    world.must(&Request::Walk { fid: 0, newfid: 2, names }, &[]);
    world.must(&Request::Lopen { fid: 2, flags: open::READ_WRITE }, &[]);
    world.refused(&Request::Extents { fid: 1, offset: 0, len: 1 }, &[], Errno::BUSY);
    world.must(&Request::Clunk { fid: 2 }, &[]);
    world.must(&Request::Extents { fid: 1, offset: 0, len: 1 }, &[]);
    assert_eq!(std::fs::metadata(world.directory.join("sub/file")).expect("it").len(), 1 << 20);
}

#[test]
fn names_are_made_listed_renamed_and_removed() {
    let mut world = World::new(Policy::default());
    world.open(false);
    let walk = |newfid| Request::Walk { fid: 0, newfid, names: heapless::Vec::new() };
    world.must(&walk(2), &[]);
    let (head, _) = world.more(more::id::TLCREATE, |w| {
        w.u32(2);
        w.text("new");
        w.u32(2);
        w.u32(0o600);
        w.u32(0);
    });
    assert_eq!(head.id, more::id::TLCREATE + 1);
    let (head, _) = world.more(more::id::TRENAMEAT, |w| {
        w.u32(0);
        w.text("new");
        w.u32(0);
        w.text("newer");
    });
    assert_eq!(head.id, more::id::TRENAMEAT + 1);
    world.must(&walk(3), &[]);
    world.must(&Request::Lopen { fid: 3, flags: 0 }, &[]);
    let (_, body) = world.more(more::id::TREADDIR, |w| {
        w.u32(3);
        w.u64(0);
        w.u32(4096);
    });
    let listing = String::from_utf8_lossy(&body).into_owned();
    assert!(listing.contains("newer") && listing.contains("sub"), "{listing}");
    let (head, _) = world.more(more::id::TUNLINKAT, |w| {
        w.u32(0);
        w.text("newer");
        w.u32(0);
    });
    assert_eq!(head.id, more::id::TUNLINKAT + 1);
    assert!(!world.directory.join("newer").exists());
}

#[test]
fn fids_go_with_what_is_renamed() {
    let mut world = World::new(Policy::default());
    world.open(false);
    let walk = |newfid, names: &[&'static str]| Request::Walk {
        fid: 0,
        newfid,
        names: names.iter().copied().collect(),
    };
    world.must(&walk(2, &["sub"]), &[]);
    world.must(&walk(3, &["sub", "file"]), &[]);
    std::fs::write(world.directory.join("sub2"), b"beside it").expect("a file");
    world.must(&walk(4, &["sub2"]), &[]);
    let rename = |w: &mut Writer, to: &str| {
        w.u32(0);
        w.text("sub");
        w.u32(0);
        w.text(to);
    };
    let (head, _) = world.more(more::id::TRENAMEAT, |w| rename(w, "elsewhere"));
    assert_eq!(head.id, more::id::TRENAMEAT + 1);
    world.must(&Request::Lopen { fid: 3, flags: 0 }, &[]);
    let (head, body) = world.must(&Request::Read { fid: 3, offset: 0, count: 4 }, &[]);
    assert_eq!(Answer::parse(head, &body[..4]), Ok(Answer::Read { count: 4 }));
    world.must(&Request::Lopen { fid: 4, flags: 0 }, &[]);
    // By its own fid, with what lies below.
    world.must(&walk(5, &["elsewhere", "file"]), &[]);
    let (head, _) = world.more(more::id::TRENAME, |w| {
        w.u32(2);
        w.u32(0);
        w.text("back");
    });
    assert_eq!(head.id, more::id::TRENAME + 1);
    for fid in [2, 5] {
        world.must(&Request::Lopen { fid, flags: 0 }, &[]);
    }
}

#[test]
fn a_rename_finds_room_for_the_longer_names_of_all_fids_or_does_nothing() {
    let mut world = World::new(Policy::default());
    world.open(false);
    for newfid in 2..FIDS_MAX as u32 {
        let names = ["sub", "file"].into_iter().collect();
        world.must(&Request::Walk { fid: 0, newfid, names }, &[]);
    }
    let mut rename = |old: &str, new: &str| {
        let ask = |w: &mut Writer| {
            w.u32(0);
            w.text(old);
            w.u32(0);
            w.text(new);
        };
        world.more(more::id::TRENAMEAT, ask).0.id == more::id::TRENAMEAT + 1
    };
    let (longest, long) = ("n".repeat(255), "n".repeat(200));
    assert!(!rename("sub", &longest) && rename("sub", &long) && rename(&long, "sub"));
    for newfid in 2..FIDS_MAX as u32 {
        world.must(&Request::Clunk { fid: newfid }, &[]);
    }
    world.must(&Request::Lopen { fid: 0, flags: 0 }, &[]);
}

#[test]
fn attributes_are_changed_or_refused() {
    use std::os::unix::fs::MetadataExt;
    let setattr = |world: &mut World, fid: u32, valid: u32, mode: u32, times: [u64; 4]| {
        let (head, body) = world.more(id::TSETATTR, |w| {
            [fid, valid, mode, 0, 1000].into_iter().for_each(|word| w.u32(word));
            w.u64(4); // size
            times.into_iter().for_each(|word| w.u64(word));
        });
        match Answer::parse(head, &body) {
            Ok(Answer::Lerror { ecode }) => Err(Errno::from_raw_os_error(ecode as i32)),
            answer => {
                assert_eq!(answer, Ok(Answer::Setattr));
                Ok(())
            }
        }
    };
    let (mode, user, group, size, accessed, modified, given) =
        (1, 2, 4, SETATTR_SIZE, 0x10, 0x20, 0x180);
    let mut world = World::new(Policy::default());
    world.open(false);
    let file = world.directory.join("sub/file");
    let now = file.metadata().expect("it").mtime() - 10;
    // By what is open for reading, and by a name.
    let names = ["sub", "file"].into_iter().collect();
    world.must(&Request::Walk { fid: 0, newfid: 2, names }, &[]);
    for fid in [1, 2] {
        let before = -(i64::from(fid)) as u64;
        let times = [5, 999_999_999, before, 7];
        let all = mode | user | accessed | modified | given;
        assert_eq!(setattr(&mut world, fid, all, 0o4151, times), Ok(()));
        let stat = file.metadata().expect("it");
        assert_eq!((stat.mode() & 0o7777, stat.size()), (0o751, 10), "the server keeps its own");
        assert_eq!((stat.atime(), stat.atime_nsec()), (5, 999_999_999));
        assert_eq!((stat.mtime(), stat.mtime_nsec()), (-i64::from(fid), 7));
        assert_eq!(setattr(&mut world, fid, modified, 0, [0; 4]), Ok(()));
        let stat = file.metadata().expect("it");
        assert!(stat.mtime() > now && stat.atime() == 5, "what is not named stays");
        assert_eq!(
            setattr(&mut world, fid, accessed | given, 0, [0, 1 << 30, 0, 0]),
            Err(Errno::INVAL)
        );
        assert_eq!(setattr(&mut world, fid, size | group, 0, [0; 4]), Err(Errno::PERM));
    }
    assert_eq!(file.metadata().expect("it").size(), 10, "nothing was changed");
    assert_eq!(setattr(&mut world, 1, size | modified, 0, [0; 4]), Ok(()));
    assert_eq!(file.metadata().expect("it").size(), 4);
    assert_eq!(setattr(&mut world, 0, mode, 0o500, [0; 4]), Ok(()));
    assert_eq!(world.directory.metadata().expect("it").mode() & 0o777, 0o700);
    assert_eq!(setattr(&mut world, 77, mode, 0o600, [0; 4]), Err(Errno::BADF));

    let mut world = World::new(Policy { read_only: true, ..Policy::default() });
    world.open(false);
    for valid in [mode, user, size, accessed, 0] {
        assert_eq!(setattr(&mut world, 1, valid, 0o600, [0; 4]), Err(Errno::ROFS));
    }
}

#[test]
fn attributes_are_the_files() {
    use std::os::unix::fs::MetadataExt;
    let mut world = World::new(Policy::default());
    world.open(true);
    let file = world.directory.join("sub/file");
    std::fs::hard_link(&file, world.directory.join("link")).expect("a link");
    let (_, body) = world.must(&Request::Getattr { fid: 1, mask: GETATTR_BASIC }, &[]);
    let word = |at: usize| u64::from_le_bytes(body[at..at + 8].try_into().expect("eight bytes"));
    let known = file.metadata().expect("it");
    // valid[8] qid[13] mode[4] uid[4] gid[4] nlink[8] rdev[8] size[8] blksize[8] blocks[8], then
    // atime, mtime.
    assert_eq!((word(33), word(49)), (2, 10));
    assert_eq!((word(89), word(97)), (known.mtime() as u64, known.mtime_nsec() as u64));
    assert_eq!((body.len(), word(13)), (153, known.ino()));
}

#[test]
fn locks_are_kept_and_end_with_their_fid() {
    let mut world = World::new(Policy::default());
    world.open(true);
    let lock = |process: u32| {
        move |w: &mut Writer| {
            w.u32(1);
            w.u8(1); // for writing
            w.u32(1); // flags
            w.u64(10);
            w.u64(20);
            w.u32(process);
            w.text("client");
        }
    };
    assert_eq!(world.more(more::id::TLOCK, lock(1)).1, [0], "granted");
    assert_eq!(world.more(more::id::TLOCK, lock(2)).1, [1], "blocked");
    let (_, body) = world.more(more::id::TGETLOCK, |w| {
        w.u32(1);
        w.u8(0);
        w.u64(0);
        w.u64(0);
        w.u32(2);
        w.text("client");
    });
    let expected = [&[1][..], &10u64.to_le_bytes(), &20u64.to_le_bytes(), &1u32.to_le_bytes()];
    assert_eq!(body[..21], expected.concat());
    world.must(&Request::Clunk { fid: 1 }, &[]);
    world.open(true);
    assert_eq!(world.more(more::id::TLOCK, lock(2)).1, [0], "granted now");
}

#[test]
fn what_is_not_allowed_is_refused() {
    let mut world = World::new(Policy { read_only: true, ..Policy::default() });
    world.open(false);
    world.refused(&Request::Write { fid: 1, offset: 0, count: 1 }, b"x", Errno::BADF);
    let size = Request::Setattr { fid: 1, valid: SETATTR_SIZE, size: 0 };
    world.refused(&size, &[], Errno::ROFS);
    let names = ["sub", "file"].into_iter().collect();
    world.must(&Request::Walk { fid: 0, newfid: 2, names }, &[]);
    world.refused(&Request::Lopen { fid: 2, flags: open::READ_WRITE }, &[], Errno::ROFS);
    world.refused(&Request::Read { fid: 77, offset: 0, count: 1 }, &[], Errno::BADF);
    for names in [["..", "etc"], ["sub", "absent"]] {
        let walk = Request::Walk { fid: 0, newfid: 5, names: names.into_iter().collect() };
        let (head, body) = world.ask(&walk, &[]);
        let walked =
            matches!(Answer::parse(head, &body), Ok(Answer::Walk { qids }) if qids.len() == 2);
        assert!(!walked, "{names:?}");
    }

    let mut world = World::new(Policy { file_bytes_max: 4096, ..Policy::default() });
    world.open(true);
    world.refused(&Request::Write { fid: 1, offset: 4096, count: 1 }, b"x", Errno::FBIG);
    let size = Request::Setattr { fid: 1, valid: SETATTR_SIZE, size: 1 << 40 };
    world.refused(&size, &[], Errno::FBIG);
}

#[test]
fn no_range_ends_where_no_file_can() {
    let mut world = World::new(Policy { share_bytes_max: 1 << 20, ..Policy::default() });
    world.open(true);
    for offset in [i64::MAX as u64, u64::MAX] {
        world.refused(&Request::Write { fid: 1, offset, count: 1 }, b"x", Errno::INVAL);
        world.refused(&Request::Read { fid: 1, offset, count: 1 }, &[], Errno::INVAL);
        world.refused(&Request::Extents { fid: 1, offset, len: 1 }, &[], Errno::INVAL);
        let mode = AllocateMode::Punch;
        world.refused(&Request::Allocate { fid: 1, mode, offset, len: 1 }, &[], Errno::INVAL);
    }
}

#[test]
fn a_file_that_was_opened_so_is_written_to_the_disk() {
    // The bits of 9P2000.L.
    const DATA: u32 = 0o10000;
    const ALL: u32 = 0o4000000;
    for cache in [Cache::Writeback, Cache::Direct] {
        let policy = Policy { cache, ..Policy::default() };
        let world = World::new(policy);
        let share = Share::open(&world.directory, policy).expect("a share");
        let mut session = Session::new(share, 1 << 16);
        session.bind(0, String::new()).expect("the root");
        let names: heapless::Vec<_, 16> = ["sub", "file"].into_iter().collect();
        for (fid, (asked, kept)) in (2..).zip([
            (0, OFlags::empty()),
            (DATA, OFlags::from_bits_retain(DATA)),
            (ALL, OFlags::SYNC),
            (DATA | ALL, OFlags::SYNC),
        ]) {
            session.walk(0, fid, &names).expect("it is there");
            session.lopen(fid, open::READ_WRITE | asked).expect("it is opened");
            let made = fid + 10;
            session.walk(0, made, &[]).expect("a directory");
            let name = &asked.to_string();
            let more = More::Lcreate { fid: made, name, flags: asked, mode: 0o600 };
            session.more(more, &mut Writer::new(&mut [0; 64], 0, 0)).expect("it is made");
            for fid in [fid, made] {
                let open = session.open(fid).expect("it is open");
                for file in [Some(&open.file), open.direct.as_ref()].into_iter().flatten() {
                    let flags = rustix::fs::fcntl_getfl(file).expect("it is open");
                    assert_eq!(flags & OFlags::SYNC, kept, "{asked:o}");
                }
                let (offset, count, charge) = (1, 1, None);
                let order = |is_write| Move { open, offset, count, is_write, charge };
                assert_eq!(order(true).must_wait(), asked != 0, "{asked:o}");
            }
        }
    }
}

#[test]
fn a_share_is_full_at_its_limit_and_says_so() {
    let mut world = World::new(Policy { share_bytes_max: 96 << 10, ..Policy::default() });
    world.open(true);
    let data = vec![1; 60_000];
    let write = |offset| Request::Write { fid: 1, offset, count: 60_000 };
    world.must(&write(0), &data);
    world.refused(&write(60_000), &data, Errno::NOSPC);
    world.must(&write(0), &data);
    // What takes no space is not limited; what would take it is.
    world.must(&Request::Setattr { fid: 1, valid: SETATTR_SIZE, size: 1 << 40 }, &[]);
    let allocate = |mode| Request::Allocate { fid: 1, mode, offset: 1 << 20, len: 1 << 18 };
    world.refused(&allocate(AllocateMode::Allocate), &[], Errno::NOSPC);
    world.must(&allocate(AllocateMode::Punch), &[]);
    let (_, body) = world.more(more::id::TSTATFS, |w| w.u32(1));
    let word = |at: usize| u64::from_le_bytes(body[at..at + 8].try_into().expect("8 bytes"));
    let block = u64::from(u32::from_le_bytes(body[4..8].try_into().expect("4 bytes")));
    let (all, free) = (word(8) * block, word(16) * block);
    assert_eq!(all, 96 << 10);
    assert!((16 << 10..40 << 10).contains(&free), "{free} of {all}");
}

#[test]
fn fids_are_bounded() {
    let mut world = World::new(Policy::default());
    world.open(false);
    for newfid in 2..FIDS_MAX as u32 {
        world.must(&Request::Walk { fid: 0, newfid, names: heapless::Vec::new() }, &[]);
    }
    let walk = Request::Walk { fid: 0, newfid: 99_999, names: heapless::Vec::new() };
    world.refused(&walk, &[], Errno::MFILE);
    world.must(&Request::Clunk { fid: 2 }, &[]);
    world.must(&walk, &[]);
}

#[test]
fn the_names_of_fids_are_bounded() {
    let mut world = World::new(Policy::default());
    world.open(false);
    let name = "n".repeat(250);
    let names = [name.as_str(); 4];
    std::fs::create_dir_all(world.directory.join(names.join("/"))).expect("directories");
    let walk = |newfid| Request::Walk { fid: 0, newfid, names: names.into_iter().collect() };
    let bytes = names.join("/").len();
    let most = (PATHS_BYTES_MAX - "sub/file".len()) / bytes;
    for fid in 2..2 + most as u32 {
        world.must(&walk(fid), &[]);
    }
    world.refused(&walk(4000), &[], Errno::MFILE);
    // A name that goes makes room, and one that becomes longer wants it.
    world.must(&Request::Walk { fid: 0, newfid: 4001, names: heapless::Vec::new() }, &[]);
    let longer = Request::Walk { fid: 4001, newfid: 4001, names: names.into_iter().collect() };
    world.refused(&longer, &[], Errno::MFILE);
    world.must(&Request::Clunk { fid: 2 }, &[]);
    world.must(&longer, &[]);
    world.refused(&walk(4000), &[], Errno::MFILE);
    world.must(&Request::Version { msize: 65536, version: VERSION_PLATTER }, &[]);
    let attach = Request::Attach { fid: 0, afid: 0, uname: "", aname: "", n_uname: 0 };
    world.must(&attach, &[]);
    world.must(&walk(4000), &[]);
}

#[test]
fn open_files_are_bounded() {
    crate::sandbox::raise_descriptors(2, Cache::Writeback).expect("as many as we want");
    let mut world = World::new(Policy::default());
    world.open(false);
    let walk =
        |newfid| Request::Walk { fid: 0, newfid, names: ["sub", "file"].into_iter().collect() };
    // Fid 1 is open already.
    for fid in 2..=OPEN_MAX as u32 {
        world.must(&walk(fid), &[]);
        world.must(&Request::Lopen { fid, flags: open::READ_ONLY }, &[]);
    }
    world.must(&walk(4000), &[]);
    world.refused(&Request::Lopen { fid: 4000, flags: open::READ_ONLY }, &[], Errno::MFILE);
    world.must(&Request::Clunk { fid: 7 }, &[]);
    world.must(&Request::Lopen { fid: 4000, flags: open::READ_ONLY }, &[]);
}

/// Every message number with bodies of random bytes: an answer each, and nothing outside the
/// share is touched.
#[test]
fn garbage_is_answered() {
    let mut world = World::new(Policy::default());
    world.open(true);
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for round in 0..20_000u32 {
        let kind = (round % 256) as u8;
        let mut body: Vec<u8> = (0..random() % 64).map(|_| (random() % 4) as u8).collect();
        let mut data = Vec::new();
        if kind == id::TWRITE {
            body.resize(16, 0);
            data = vec![0; 512];
        }
        let size = HEAD_BYTES + (body.len() + data.len()) as u32;
        world.raw(MessageHead { size, id: kind, tag: round as u16 }, &body, &data);
    }
}
