//! The space that the files of a share take, held against the administrator's limit.
//!
//! Counted as quotas count: what the file system gave to regular files (`st_blocks`), so that a
//! sparse image costs what it holds; of files without a name as long as a frontend has them open.
//! All frontends of a directory share one count. What may take
//! space is charged before it is done, as if everything were new; only when that reaches the
//! limit are the files looked at again, and so is whether the range has space already. Guards
//! that no frontend gets beyond the limit, save for the file system's own blocks about a file;
//! and that counting takes no more than a tenth of one processor, whatever frontends ask for.
//! Must never: let pass what cannot be counted, walk without an end, nor look at files while it
//! holds what others need.

use std::collections::HashSet;
use std::ffi::CString;
use std::fs::File;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, RawDir, SeekFrom, Stat, fstat, openat, seek, statat,
};
use rustix::io::Errno;

use crate::session::OPEN_MAX;
use crate::share::Share;

/// Files and directories of a share that has a limit: the count ends.
pub const FILES_MAX: u64 = 65536;
/// A count is not believed for longer: others than frontends change files too.
const RECOUNT: Duration = Duration::from_secs(30);
/// After a count there is none for so many times as long as it took, and at most for so long.
const REST_FACTOR: u32 = 9;
const REST_MAX: Duration = Duration::from_secs(5);
/// No file system gives less.
const BLOCK_BYTES: u64 = 4096;
/// Steps from data to hole that are looked at in one range; what follows counts as holes.
const STEPS_MAX: usize = 256;
const LISTING_STEP_BYTES: usize = 16 << 10;
/// Names of directories that one count may keep, and the files that a frontend has, or had, open.
pub const COUNT_BYTES_MAX: usize = FILES_MAX as usize * (2 * size_of::<CString>() + NAME_BYTES_MAX)
    + 8 * OPEN_MAX * size_of::<Weak<File>>();
/// With its end, and what an allocator adds.
const NAME_BYTES_MAX: usize = 256 + 16;
/// Walks of one count: a directory that is moved while one is below it ends that.
const MOVES_MAX: usize = 3;
const FREE: &str = "nobody panics with it in hand";

/// What is in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    pub bytes: u64,
    /// Directories too.
    pub files: u64,
}

/// One directory's count.
pub struct Usage {
    /// Device and inode of the directory.
    root: (u64, u64),
    state: Mutex<State>,
    /// A count has ended.
    ended: Condvar,
}

#[derive(Default)]
struct State {
    last: Option<Last>,
    /// Somebody counts.
    counting: bool,
    /// What may have come since the last count, and what may come of requests under way.
    since: Counted,
    under_way: u64,
    /// Something was removed, or may have been, since the last count began.
    shrank: bool,
    /// Files that frontends have, or had, open.
    open: Vec<Weak<File>>,
}

/// What the last count found, or why it ended without.
#[derive(Clone, Copy)]
struct Last {
    found: Result<Counted, Errno>,
    began: Instant,
    ended: Instant,
}

impl Last {
    /// No count begins before.
    fn rests_until(&self) -> Instant {
        self.ended + ((self.ended - self.began) * REST_FACTOR).min(REST_MAX)
    }
}

impl State {
    /// Until when nobody counts; `None` when somebody may.
    fn rests_until(&self) -> Option<Instant> {
        self.last.map(|last| last.rests_until()).filter(|until| *until > Instant::now())
    }

    /// What may be in use.
    fn used(&self) -> Result<Counted, Errno> {
        let Counted { bytes, files } = self.last.ok_or(Errno::AGAIN)?.found?;
        let bytes = bytes.saturating_add(self.since.bytes).saturating_add(self.under_way);
        Ok(Counted { bytes, files: files.saturating_add(self.since.files) })
    }

    /// Whether it fits what may be in use, as far as that is known.
    fn admits(&self, fits: impl Fn(Counted) -> bool) -> bool {
        let is_recent = self.last.is_some_and(|last| last.ended.elapsed() <= RECOUNT);
        let is_known = is_recent || self.counting || self.rests_until().is_some();
        is_known && self.used().is_ok_and(fits)
    }
}

/// Space that a request may take or give back, from its admission to its end.
pub struct Charge {
    usage: Arc<Usage>,
    bytes: u64,
    gives_back: bool,
}

impl Drop for Charge {
    fn drop(&mut self) {
        let mut state = self.usage.lock();
        state.under_way -= self.bytes;
        state.since.bytes += self.bytes;
        state.shrank |= self.gives_back;
    }
}

impl Usage {
    /// The count of a directory, one for all who have it open.
    pub fn of(root: &File) -> Result<Arc<Usage>, Errno> {
        static ALL: Mutex<Vec<Weak<Usage>>> = Mutex::new(Vec::new());
        let stat = fstat(root)?;
        let root = (stat.st_dev, stat.st_ino);
        let mut all = ALL.lock().expect(FREE);
        all.retain(|usage| usage.strong_count() > 0);
        if let Some(usage) = all.iter().filter_map(Weak::upgrade).find(|usage| usage.root == root) {
            return Ok(usage);
        }
        let usage = Arc::new(Usage { root, state: Mutex::default(), ended: Condvar::new() });
        all.push(Arc::downgrade(&usage));
        Ok(usage)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect(FREE)
    }

    /// Charges a change of `range` of a file, before it is made.
    pub fn charge(
        self: &Arc<Usage>,
        share: &Share,
        file: &File,
        range: Range<u64>,
    ) -> Result<Charge, Errno> {
        let limit = share.policy.share_bytes_max;
        let range = range.start / BLOCK_BYTES * BLOCK_BYTES
            ..range.end.checked_next_multiple_of(BLOCK_BYTES).ok_or(Errno::FBIG)?;
        let mut bytes = range.end - range.start;
        let mut state = self.lock();
        if !state.admits(|used| used.bytes.saturating_add(bytes) <= limit) {
            drop(state);
            bytes = bytes_wanting(file, range)?;
            state = self.lock();
            if bytes > 0 {
                let fits = |used: Counted| used.bytes.saturating_add(bytes) <= limit;
                state = self.look_again(share, state, fits)?;
            }
        }
        state.under_way += bytes;
        Ok(Charge { usage: Arc::clone(self), bytes, gives_back: false })
    }

    /// For a request that gives space back, when it has ended.
    pub fn giving_back(self: &Arc<Usage>) -> Charge {
        Charge { usage: Arc::clone(self), bytes: 0, gives_back: true }
    }

    /// Charges one more file or directory.
    pub fn charge_name(&self, share: &Share) -> Result<(), Errno> {
        let fits = |used: Counted| used.files < FILES_MAX;
        self.look_again(share, self.lock(), fits)?.since.files += 1;
        Ok(())
    }

    /// What is in use now; as of the last count, where another would come too soon.
    pub fn now(&self, share: &Share) -> Result<Counted, Errno> {
        let mut state = self.lock();
        if state.last.is_none() || !state.counting && state.rests_until().is_none() {
            state = self.count(share, state);
        }
        state.used()
    }

    /// A frontend has opened a file: it takes space until it is closed, whether or not it keeps
    /// its name.
    pub fn opened(&self, file: &Arc<File>) {
        let open = &mut self.lock().open;
        if open.len() == open.capacity() {
            open.retain(|file| file.strong_count() > 0);
            // Not again for as many as there are.
            open.reserve(open.len().max(64));
        }
        open.push(Arc::downgrade(file));
    }

    /// Bytes of open files that no walk finds. After the walk: what loses its name while that is
    /// under way may be counted twice, and is not missed.
    fn nameless_bytes(&self) -> Result<u64, Errno> {
        let open: Vec<_> = self.lock().open.iter().filter_map(Weak::upgrade).collect();
        let (mut bytes, mut seen) = (0, HashSet::new());
        for file in open {
            let stat = fstat(&file)?;
            if stat.st_nlink == 0 && seen.insert(id_of(&stat)) {
                bytes += bytes_of(&stat);
            }
        }
        Ok(bytes)
    }

    /// Something may have been removed.
    pub fn shrank(&self) {
        self.lock().shrank = true;
    }

    /// Counts until `fits` says yes to what may be in use, or no to what a count found: one that
    /// began after the caller came, or the last one, if nothing was removed since and another
    /// would come too soon. Nobody else waits with the caller.
    fn look_again<'a>(
        &'a self,
        share: &Share,
        mut state: MutexGuard<'a, State>,
        fits: impl Fn(Counted) -> bool,
    ) -> Result<MutexGuard<'a, State>, Errno> {
        let came = Instant::now();
        while !state.admits(&fits) {
            let rests_until = state.rests_until();
            let holds = |last: &Last| {
                last.began >= came || rests_until.is_some() && !state.counting && !state.shrank
            };
            if let Some(last) = state.last.filter(holds) {
                let found = last.found?;
                let bytes = found.bytes.saturating_add(state.under_way);
                if !fits(Counted { bytes, ..found }) {
                    return Err(Errno::NOSPC);
                }
            }
            state = match rests_until {
                Some(until) if !state.counting => {
                    drop(state);
                    std::thread::sleep(until.saturating_duration_since(Instant::now()));
                    self.lock()
                }
                _ => self.count(share, state),
            };
        }
        Ok(state)
    }

    /// Looks at the files, while others go on by what is known; or waits for whoever does.
    fn count<'a>(
        &'a self,
        share: &Share,
        mut state: MutexGuard<'a, State>,
    ) -> MutexGuard<'a, State> {
        if state.counting {
            return self.ended.wait_while(state, |state| state.counting).expect(FREE);
        }
        (state.counting, state.shrank) = (true, false);
        let before = state.since;
        drop(state);
        let began = Instant::now();
        let found = count(share).and_then(|mut found| {
            found.bytes += self.nameless_bytes()?;
            Ok(found)
        });
        let last = Last { found, began, ended: Instant::now() };
        let mut state = self.lock();
        (state.counting, state.last) = (false, Some(last));
        if found.is_ok() {
            // What came meanwhile may have been found or not.
            state.since.bytes -= before.bytes;
            state.since.files -= before.files;
        }
        self.ended.notify_all();
        state
    }
}

/// Bytes of a range that have no space in the file yet.
fn bytes_wanting(file: &File, range: Range<u64>) -> Result<u64, Errno> {
    let stat = fstat(file)?;
    // Space that is reserved and not written looks like a hole below; a whole file of it does not.
    let size = stat.st_size as u64;
    if range.end <= size.next_multiple_of(BLOCK_BYTES) && stat.st_blocks as u64 * 512 >= size {
        return Ok(0);
    }
    let (mut at, mut wanting) = (range.start, 0);
    for _ in 0..STEPS_MAX {
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) => data.min(range.end),
            Err(Errno::NXIO) => range.end,
            Err(errno) => return Err(errno),
        };
        wanting += data - at;
        at = data;
        if at < range.end {
            // The end of the file counts as a hole; its last block is there as a whole.
            let hole = seek(file, SeekFrom::Hole(at))?;
            at = hole.next_multiple_of(BLOCK_BYTES).min(range.end);
        }
        if at == range.end {
            return Ok(wanting);
        }
    }
    Ok(wanting + (range.end - at))
}

fn bytes_of(stat: &Stat) -> u64 {
    stat.st_blocks as u64 * 512
}

fn id_of(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

/// A directory on the way down.
struct Level {
    id: (u64, u64),
    /// Directories in it that are still to be looked at.
    folders: Vec<CString>,
}

/// Looks at every file of a share. Directories that the server may not enter are left out: nobody
/// writes there through it. It goes from directory to directory, up by `..`: renames make paths
/// that are longer than any call takes, and deeper than there are descriptors.
fn count(share: &Share) -> Result<Counted, Errno> {
    (0..MOVES_MAX).find_map(|_| walk(share).transpose()).unwrap_or(Err(Errno::IO))
}

/// `None` when a directory was moved away meanwhile.
fn walk(share: &Share) -> Result<Option<Counted>, Errno> {
    let mut counted = Counted::default();
    let mut at = share.open_at("", OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())?;
    let mut levels = vec![look_into(&at, &mut counted)?];
    while let Some(level) = levels.last_mut() {
        if let Some(name) = level.folders.pop() {
            let folder = match Share::open_folder(&at, &name) {
                Ok(folder) => folder,
                Err(Errno::ACCESS | Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                Err(errno) => return Err(errno),
            };
            let level = look_into(&folder, &mut counted)?;
            if !level.folders.is_empty() {
                levels.push(level);
                at = folder;
            }
            continue;
        }
        levels.pop();
        let Some(above) = levels.last() else { break };
        // A path alone: wherever it leads, nothing is opened there before that is known.
        let up = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        at = File::from(openat(&at, "..", up, Mode::empty())?);
        if id_of(&fstat(&at)?) != above.id {
            return Ok(None);
        }
    }
    Ok(Some(counted))
}

/// Counts what lies in one directory.
fn look_into(folder: &File, counted: &mut Counted) -> Result<Level, Errno> {
    let mut level = Level { id: id_of(&fstat(folder)?), folders: Vec::new() };
    let mut step = [MaybeUninit::uninit(); LISTING_STEP_BYTES];
    let mut entries = RawDir::new(folder, &mut step);
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        counted.files += 1;
        if counted.files > FILES_MAX {
            return Err(Errno::NOSPC);
        }
        let stat = match statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            // Without the right to enter the directory nobody reaches it either.
            Err(Errno::NOENT | Errno::ACCESS) => continue,
            Err(errno) => return Err(errno),
        };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => counted.bytes += bytes_of(&stat),
            FileType::Directory => level.folders.push(name.to_owned()),
            _ => {}
        }
    }
    Ok(level)
}

/// Would miss: file systems that tell of space late (NFS).
#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::share::Policy;
    use crate::share::tests::tempdir::TempDir;

    const KIB: u64 = 1024;

    /// Until the files may be looked at again.
    fn rest(share: &Share) {
        let until = share.usage().expect("a limit").lock().rests_until();
        if let Some(until) = until {
            std::thread::sleep(until.saturating_duration_since(Instant::now()));
        }
    }

    fn share(limit_kib: u64) -> (TempDir, Share) {
        let dir = TempDir::new();
        std::fs::create_dir(dir.path().join("sub")).expect("a directory");
        let policy = Policy { share_bytes_max: limit_kib * KIB, ..Policy::default() };
        let share = Share::open(dir.path(), policy).expect("a share");
        (dir, share)
    }

    fn charge(share: &Share, file: &File, offset_kib: u64, kib: u64) -> Result<(), Errno> {
        let range = offset_kib * KIB..(offset_kib + kib) * KIB;
        let charge = share.charge(file, range.clone())?;
        file.write_all_at(&vec![1; (kib * KIB) as usize], range.start).expect("space on the host");
        drop(charge);
        Ok(())
    }

    #[test]
    fn what_takes_space_counts_and_what_has_it_does_not() {
        let (dir, share) = share(256);
        let file = share.create("sub/sparse", 0o600, OFlags::EXCL).expect("a file");
        file.set_len(1 << 40).expect("a sparse file");
        for offset_kib in [0, 1 << 20, 1 << 28] {
            assert_eq!(charge(&share, &file, offset_kib, 64), Ok(()));
        }
        assert_eq!(charge(&share, &file, 512, 128), Err(Errno::NOSPC));
        // Over what is there, any number of times, in part beside it too.
        for _ in 0..10 {
            assert_eq!(charge(&share, &file, 0, 64), Ok(()));
        }
        assert_eq!(charge(&share, &file, 32, 64), Ok(()));
        rest(&share);
        let used = share.usage_now().expect("a limit").expect("a count");
        assert!((224 * KIB..=256 * KIB).contains(&used.bytes), "{used:?}");
        assert_eq!(used.files, 2);
        // Whoever removes something makes room.
        let room = share.create("room", 0o600, OFlags::EXCL).expect("a file");
        assert_eq!(charge(&share, &room, 0, 64), Err(Errno::NOSPC));
        std::fs::remove_file(dir.path().join("sub/sparse")).expect("removed");
        drop(file);
        rest(&share);
        assert_eq!(charge(&share, &room, 0, 64), Ok(()));
        // Whoever does so through the server need not wait to be believed.
        assert_eq!(charge(&share, &room, 64, 256), Err(Errno::NOSPC));
        share.remove("", "room", false).expect("removed");
        drop(room);
        let room = share.create("room", 0o600, OFlags::EXCL).expect("a file");
        assert_eq!(charge(&share, &room, 0, 256), Ok(()));
    }

    #[test]
    fn a_file_whose_space_is_reserved_is_written_at_the_limit() {
        let (_dir, share) = share(256);
        let file = share.create("reserved", 0o600, OFlags::EXCL).expect("a file");
        let none = rustix::fs::FallocateFlags::empty();
        let held = share.charge(&file, 0..200 * KIB).expect("room");
        rustix::fs::fallocate(&file, none, 0, 200 * KIB).expect("space on the host");
        drop(held);
        let other = share.create("other", 0o600, OFlags::EXCL).expect("a file");
        assert_eq!(charge(&share, &other, 0, 64), Err(Errno::NOSPC));
        assert_eq!(charge(&share, &file, 0, 200), Ok(()));
    }

    #[test]
    fn files_without_a_name_count_while_they_are_open() {
        let (_dir, share) = share(256);
        let create = |name: &str| {
            let file = Arc::new(share.create(name, 0o600, OFlags::EXCL).expect("a file"));
            share.opened(&file);
            file
        };
        let (one, other) = (create("one"), create("other"));
        let twice = Arc::new(share.open_file("one", false, OFlags::empty()).expect("it"));
        share.opened(&twice);
        assert_eq!(charge(&share, &one, 0, 100), Ok(()));
        assert_eq!(charge(&share, &other, 0, 100), Ok(()));
        // Both names go: one is taken away, the other's is given to what is there.
        share.rename(("", "one"), ("", "other")).expect("renamed");
        share.remove("", "other", false).expect("removed");
        let third = create("third");
        assert_eq!(charge(&share, &third, 0, 100), Err(Errno::NOSPC));
        rest(&share);
        let used = share.usage_now().expect("a limit").expect("a count");
        assert!((200 * KIB..=208 * KIB).contains(&used.bytes), "{used:?}");
        drop((one, twice));
        share.shrank();
        assert_eq!(charge(&share, &third, 0, 100), Ok(()));
        drop(other);
        share.shrank();
        for number in 0..1000 {
            drop(create(&number.to_string()));
        }
        assert!(share.usage().expect("a limit").lock().open.len() <= 256, "none is kept");
    }

    #[test]
    fn paths_longer_than_any_call_takes_are_counted() {
        let (dir, share) = share(1024);
        // Each is filled where its path is short, then moved below the others.
        let name = "d".repeat(250);
        let mut top = String::new();
        for number in 0..20 {
            let next = format!("{number}{name}");
            share.make_directory("", &next, 0o700).expect("a directory");
            let path = format!("{next}/file");
            let file = share.create(&path, 0o600, OFlags::EXCL).expect("a file");
            assert_eq!(charge(&share, &file, 0, 8), Ok(()));
            if !top.is_empty() {
                share.rename(("", &top), (&next, &top)).expect("moved");
            }
            top = next;
        }
        rest(&share);
        let used = share.usage_now().expect("a limit").expect("a count");
        assert_eq!((used.files, used.bytes), (41, 160 * KIB));
        assert_eq!(share.create("new", 0o600, OFlags::EXCL).map(|_| ()), Ok(()));
        // For whoever removes the directory, by paths.
        while dir.path().join(&top).exists() {
            let next = std::fs::read_dir(dir.path().join(&top)).expect("a directory");
            let next = next.map(|entry| entry.expect("a name").file_name());
            let next = next.map(|name| name.into_string().expect("text"));
            if let Some(next) = next.into_iter().find(|name| name != "file") {
                share.rename((&top, &next), ("", &next)).expect("moved");
                std::fs::remove_dir_all(dir.path().join(&top)).expect("removed");
                top = next;
            } else {
                break;
            }
        }
    }

    #[test]
    fn room_is_known_of_when_a_request_has_made_it() {
        let (_dir, share) = share(256);
        let file = share.create("file", 0o600, OFlags::EXCL).expect("a file");
        assert_eq!(charge(&share, &file, 0, 200), Ok(()));
        let giving_back = share.giving_back();
        // Counted before anything was given back.
        assert_eq!(charge(&share, &file, 200, 200), Err(Errno::NOSPC));
        file.set_len(0).expect("it is cut");
        drop(giving_back);
        assert_eq!(charge(&share, &file, 200, 200), Ok(()));
    }

    #[test]
    fn all_frontends_of_a_directory_have_one_count() {
        let (dir, one) = share(256);
        let other = Share::open(dir.path(), one.policy).expect("a share");
        let file = one.create("file", 0o600, OFlags::EXCL).expect("a file");
        let held = one.charge(&file, 0..200 * KIB).expect("room");
        // Not written yet, and taken all the same.
        assert_eq!(other.charge(&file, 0..100 * KIB).map(|_| ()), Err(Errno::NOSPC));
        drop(held);
        assert_eq!(other.charge(&file, 0..100 * KIB).map(|_| ()), Ok(()));
    }

    #[test]
    fn names_have_an_end() {
        let (_dir, share) = share(256);
        let usage = share.usage().expect("a limit");
        usage.now(&share).expect("a count");
        usage.lock().since.files = FILES_MAX;
        // The files are looked at, and there are few.
        assert_eq!(usage.charge_name(&share), Ok(()));
        let used = usage.lock().used().expect("a count");
        assert_eq!(used.files, 2);
    }

    #[test]
    fn what_cannot_be_counted_grows_no_more() {
        let (_dir, share) = share(256);
        let file = share.create("file", 0o600, OFlags::EXCL).expect("a file");
        assert_eq!(charge(&share, &file, 0, 64), Ok(()));
        let ended = Instant::now();
        let found = Err(Errno::NOSPC);
        let last = Last { found, began: ended.checked_sub(REST_MAX).expect("an uptime"), ended };
        share.usage().expect("a limit").lock().last = Some(last);
        assert_eq!(charge(&share, &file, 64, 64), Err(Errno::NOSPC));
        assert_eq!(share.create("more", 0o600, OFlags::EXCL).map(|_| ()), Err(Errno::NOSPC));
        assert_eq!(charge(&share, &file, 0, 64), Ok(()), "it has this");
    }

    #[test]
    fn what_lies_in_a_directory_that_cannot_be_read_is_counted() {
        // Write and search alone: files could be made there, and no count saw them.
        let (dir, share) = share(256);
        share.make_directory("", "dark", 0o300).expect("a directory");
        let file = share.create("dark/file", 0, OFlags::EXCL).expect("a file");
        assert_eq!(charge(&share, &file, 0, 200), Ok(()));
        let mode = |path| {
            use std::os::unix::fs::PermissionsExt;
            dir.path().join(path).metadata().expect("it").permissions().mode() & 0o777
        };
        assert_eq!((mode("dark"), mode("dark/file")), (0o700, 0o600));
        rest(&share);
        let used = share.usage_now().expect("a limit").expect("a count");
        assert!(used.bytes >= 200 * KIB, "{used:?}");
    }

    #[test]
    fn a_storm_of_questions_leaves_nine_tenths_of_the_time_to_others() {
        let (dir, share) = share(256);
        for number in 0..300 {
            File::create(dir.path().join(format!("{number}"))).expect("a file");
        }
        let full = share.create("full", 0o600, OFlags::EXCL).expect("a file");
        let usage = share.usage().expect("a limit");
        let mut counts: Vec<Last> = vec![];
        for asked in 0..600 {
            match asked % 3 {
                0 => assert_eq!(share.statfs().map(|_| ()), Ok(())),
                1 => assert_eq!(charge(&share, &full, 0, 512), Err(Errno::NOSPC)),
                _ => share.open_file("full", true, OFlags::TRUNC).map(|_| ()).expect("it is cut"),
            }
            let last = usage.lock().last.expect("a count");
            if counts.last().is_none_or(|before| before.ended != last.ended) {
                counts.push(last);
            }
        }
        for pair in counts.windows(2) {
            assert!(pair[1].began - pair[0].ended >= 9 * (pair[0].ended - pair[0].began));
        }
    }

    #[test]
    fn a_count_holds_up_nobody_whose_request_fits() {
        let (_dir, share) = share(256);
        let usage = share.usage().expect("a limit");
        let file = share.create("file", 0o600, OFlags::EXCL).expect("a file");
        // As if another thread looked at very many files.
        usage.lock().counting = true;
        assert_eq!(charge(&share, &file, 0, 64), Ok(()));
        let used = share.usage_now().expect("a limit").expect("what is known");
        assert_eq!(used.bytes, 64 * KIB);
        std::thread::scope(|scope| {
            let other = scope.spawn(|| charge(&share, &file, 0, 512));
            std::thread::sleep(Duration::from_millis(20));
            assert!(!other.is_finished(), "it waits for the count");
            usage.lock().counting = false;
            usage.ended.notify_all();
            assert_eq!(other.join().expect("it ends"), Err(Errno::NOSPC));
        });
    }
}
