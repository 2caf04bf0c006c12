//! Locks of files (Tlock, Tgetlock): advice among all clients of this server, POSIX's way.
//!
//! Guards that one owner's locks never conflict with each other, that a range is split and
//! replaced as fcntl(2) says, and that a session's locks are bounded and end with it. Must never:
//! wait; whoever is refused asks again.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::Stat;
use rustix::io::Errno;

/// Locks of one session.
const SESSION_LOCKS_MAX: usize = 1024;
/// Longest name that a client has for itself.
const CLIENT_BYTES_MAX: usize = 256;
/// What one session's locks take; a vector may have twice the room it needs.
pub const LOCKS_BYTES_MAX: usize = SESSION_LOCKS_MAX * (2 * size_of::<Lock>() + CLIENT_BYTES_MAX);

/// Kinds on the wire; 0 is for reading.
const WRITE: u8 = 1;
pub const UNLOCK: u8 = 2;

/// Whose it is: a process of a client in a session.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Owner {
    pub session: u64,
    pub process: u32,
    pub client: String,
}

/// A range of a file; `end` is exclusive, and u64::MAX for "to the end of the file".
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Lock {
    file: (u64, u64),
    pub kind: u8,
    pub start: u64,
    end: u64,
    pub owner: Owner,
    /// The fid by which it was taken; it goes with that.
    fid: u32,
}

static LOCKS: Mutex<Vec<Lock>> = Mutex::new(Vec::new());
const FREE: &str = "nobody panics with it in hand";

/// A number for a session that no other has.
pub fn new_session() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Lock {
    /// `len` 0 is "to the end of the file".
    pub fn new(
        stat: &Stat,
        kind: u8,
        (start, len): (u64, u64),
        owner: Owner,
        fid: u32,
    ) -> Result<Lock, Errno> {
        let end = if len == 0 { Some(u64::MAX) } else { start.checked_add(len) };
        let end = end.filter(|_| kind <= UNLOCK && owner.client.len() <= CLIENT_BYTES_MAX);
        let file = (stat.st_dev, stat.st_ino);
        Ok(Lock { file, kind, start, end: end.ok_or(Errno::INVAL)?, owner, fid })
    }

    /// Bytes, 0 for "to the end of the file".
    pub fn len_bytes(&self) -> u64 {
        if self.end == u64::MAX { 0 } else { self.end - self.start }
    }

    fn meets(&self, other: &Lock) -> bool {
        self.file == other.file && self.start < other.end && other.start < self.end
    }

    /// Together they are one: the same owner's, of one kind, by one fid, with nothing between.
    fn is_one_with(&self, other: &Lock) -> bool {
        let touches = self.start <= other.end && other.start <= self.end;
        touches && Lock { start: self.start, end: self.end, ..other.clone() } == *self
    }

    fn conflicts(&self, other: &Lock) -> bool {
        self.meets(other)
            && self.owner != other.owner
            && (self.kind == WRITE || other.kind == WRITE)
    }
}

/// Takes, changes or gives back a range. False when another owner has some of it.
pub fn set(mut lock: Lock) -> Result<bool, Errno> {
    let mut locks = LOCKS.lock().expect(FREE);
    if lock.kind != UNLOCK && locks.iter().any(|other| other.conflicts(&lock)) {
        return Ok(false);
    }
    if lock.kind != UNLOCK {
        for other in locks.iter() {
            if other.is_one_with(&lock) {
                (lock.start, lock.end) = (lock.start.min(other.start), lock.end.max(other.end));
            }
        }
    }
    // What the same owner has there is cut away, and may leave a piece on each side.
    let is_cut = |other: &Lock| other.owner == lock.owner && other.meets(&lock);
    let pieces = |old: &Lock| {
        let before = Lock { end: lock.start, ..old.clone() };
        let after = Lock { start: lock.end, ..old.clone() };
        [before, after].into_iter().filter(|piece| piece.start < piece.end)
    };
    let mut left: Vec<Lock> = locks.iter().filter(|other| is_cut(other)).flat_map(pieces).collect();
    left.extend((lock.kind != UNLOCK).then(|| lock.clone()));
    let is_own = |other: &&Lock| other.owner.session == lock.owner.session;
    let own = locks.iter().filter(is_own).count();
    let cut = locks.iter().filter(|other| is_cut(other)).count();
    // Who has too many gives them back all the same.
    if left.len() > cut && own - cut + left.len() > SESSION_LOCKS_MAX {
        return Err(Errno::NOLCK);
    }
    locks.retain(|other| !is_cut(other));
    locks.extend(left);
    Ok(true)
}

/// A lock that keeps `lock` from being taken.
pub fn conflict(lock: &Lock) -> Option<Lock> {
    LOCKS.lock().expect(FREE).iter().find(|other| other.conflicts(lock)).cloned()
}

/// All locks taken by a fid, or by a whole session, end.
pub fn release(session: u64, fid: Option<u32>) {
    let mut locks = LOCKS.lock().expect(FREE);
    locks.retain(|lock| lock.owner.session != session || fid.is_some_and(|fid| fid != lock.fid));
}

/// Would miss: how long clients wait before they ask again.
#[cfg(test)]
mod tests {
    use super::*;

    const READ: u8 = 0;

    /// Of a file for each test: they share the table.
    fn new(file: &str, kind: u8, range: (u64, u64), owner: &Owner) -> Result<Lock, Errno> {
        let stat = rustix::fs::stat(file).expect("a directory that is always there");
        Lock::new(&stat, kind, range, owner.clone(), 1)
    }

    fn lock(owner: &Owner, kind: u8, start: u64, len: u64) -> Lock {
        new("/", kind, (start, len), owner).expect("a good lock")
    }

    #[test]
    fn owners_keep_each_other_out_and_ranges_split() {
        let owner = |process| Owner { session: new_session(), process, client: "a".to_string() };
        let (one, two) = (owner(1), owner(2));
        assert_eq!(set(lock(&one, WRITE, 100, 100)), Ok(true));
        assert_eq!(set(lock(&one, READ, 150, 0)), Ok(true), "its own is no conflict");
        assert_eq!(set(lock(&two, READ, 120, 1)), Ok(false));
        assert_eq!(set(lock(&two, READ, 150, 10)), Ok(true), "readers share");
        assert_eq!(set(lock(&two, WRITE, 1 << 40, 1)), Ok(false), "to the end of the file");
        let found = conflict(&lock(&two, WRITE, 0, 0)).expect("one");
        assert_eq!((found.start, found.len_bytes(), found.owner.process), (100, 50, 1));
        // The middle is given back: the pieces beside it stay.
        assert_eq!(set(lock(&one, UNLOCK, 120, 10)), Ok(true));
        assert_eq!(set(lock(&two, WRITE, 120, 10)), Ok(true));
        assert_eq!(set(lock(&two, WRITE, 119, 1)), Ok(false));
        assert_eq!(set(lock(&two, WRITE, 130, 1)), Ok(false));
        release(one.session, Some(7));
        assert_eq!(set(lock(&two, WRITE, 130, 1)), Ok(false), "another fid's end");
        release(one.session, Some(1));
        assert_eq!(set(lock(&two, WRITE, 0, 0)), Ok(true));
        release(two.session, None);
        assert_eq!(conflict(&lock(&one, WRITE, 0, 0)), None);
    }

    #[test]
    fn what_is_no_lock_and_what_is_too_many_is_refused() {
        let owner = Owner { session: new_session(), process: 1, client: String::new() };
        let long = Owner { client: "x".repeat(300), ..owner.clone() };
        let refused =
            |kind, range, owner: &Owner| new("/", kind, range, owner) == Err(Errno::INVAL);
        assert!(refused(3, (0, 1), &owner) && refused(READ, (u64::MAX, 2), &owner));
        assert!(refused(READ, (0, 1), &long));
        let lock = |n: u64| new("/usr", READ, (n * 2, 1), &owner).expect("a good lock");
        let taken = (0..2000).take_while(|n| set(lock(*n)) == Ok(true));
        assert_eq!(taken.count(), SESSION_LOCKS_MAX);
        // With no room left they are given back still, and changed where they are.
        let unlock = |range| set(new("/usr", UNLOCK, range, &owner).expect("a good lock"));
        assert_eq!(set(Lock { kind: WRITE, ..lock(0) }), Ok(true));
        assert_eq!(unlock((2, 1)), Ok(true));
        assert_eq!(set(new("/usr", READ, (10_000, 3), &owner).expect("a good lock")), Ok(true));
        assert_eq!(unlock((10_001, 1)), Err(Errno::NOLCK), "it would be two");
        assert_eq!(unlock((0, 0)), Ok(true));
        assert_eq!(set(lock(1)), Ok(true));
        // Neighbours are one: any number of them, from either side and between.
        for at in (0..4000u64).map(|n| if n % 2 == 0 { 50_000 + n } else { 50_000 - n }) {
            let next = new("/usr", READ, (at, 2), &owner).expect("a good lock");
            assert_eq!(set(next), Ok(true), "{at}");
        }
        release(owner.session, None);
    }
}
