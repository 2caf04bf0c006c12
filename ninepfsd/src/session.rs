//! A 9P session: fids, and what each request means for the files of the share.
//!
//! Answers what is quick at once; reading and writing it hands back to whoever has the ring,
//! the rest becomes [`Job`]s for the workers. Guards that each request gets one answer, and that
//! a frontend's fids, open files and memory are bounded.

use std::collections::HashMap;
use std::fs::File;
use std::mem::MaybeUninit;

use platter_storage::ninep::message::{
    AllocateMode, Answer, EXTENTS_MAX, Extent, Malformed, QID_DIR, Qid, RREAD_BYTES, Request,
    VERSION_PLAIN, VERSION_PLATTER, VERSION_UNKNOWN, Writer, open,
};
use platter_xen::ninepfs::MessageHead;
use rustix::fs::{
    FileType, OFlags, RawDir, SeekFrom, Stat, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, seek,
};
use rustix::io::Errno;

use crate::job::{self, Job};
use crate::locks;
use crate::more::{self, Attributes, More, REMOVE_DIRECTORY, Time};
use crate::open::{Move, Open};
use crate::share::{Share, synced};

/// Fids of one frontend.
pub const FIDS_MAX: usize = 4096;
/// What a fid takes beside its path, in its table too.
pub const FID_BYTES: usize = 2 * size_of::<(u32, Fid)>();
/// Names of all fids of one frontend together.
pub const PATHS_BYTES_MAX: usize = 1 << 20;
/// Files that one frontend may have open: platter has 2048 at most.
pub const OPEN_MAX: usize = 2176;
/// Longest message, as one ring allows at most.
pub const MSIZE_MAX: u32 = 1 << 20;
const MSIZE_MIN: u32 = 4096;
/// Longest answer without data.
pub const ANSWER_BYTES: usize = 1024;
/// Data of one Rreaddir, and what is asked of the kernel at once.
const LISTING_BYTES_MAX: u32 = 64 << 10;
const LISTING_STEP_BYTES: usize = 16 << 10;

/// What became of a request. Answers stand in the buffer that was given, up to this length.
pub enum Outcome<'a> {
    Answer(usize),
    /// With data that follows it.
    Listing(usize, Vec<u8>),
    Move(Move<'a>),
    Work(Job),
    /// Answer it once nothing with this tag is under way.
    Flush {
        oldtag: u16,
    },
}

struct Fid {
    /// Relative to the share; empty for its root.
    path: String,
    open: Option<Open>,
    /// Locks were asked for by it.
    locked: bool,
}

pub struct Session {
    /// Whose locks are whose.
    number: u64,
    share: Share,
    fids: HashMap<u32, Fid>,
    /// Of all their paths.
    path_bytes: usize,
    pub msize: u32,
    /// Largest message that the rings can carry.
    msize_max: u32,
    /// The frontend speaks platter's dialect.
    pub is_platter: bool,
}

impl Session {
    pub fn new(share: Share, half_bytes: u32) -> Session {
        let msize_max = half_bytes.min(MSIZE_MAX);
        let fids = HashMap::new();
        let number = locks::new_session();
        let (msize, path_bytes, is_platter) = (msize_max, 0, false);
        Session { number, share, fids, path_bytes, msize, msize_max, is_platter }
    }

    /// What a request means; `out` takes an answer. `body` is what follows the head, of a Twrite
    /// without its data.
    pub fn handle(&mut self, head: MessageHead, body: &[u8], out: &mut [u8]) -> Outcome<'_> {
        self.dispatch(head, body, out)
            .unwrap_or_else(|errno| Outcome::Answer(error(head.tag, errno, out)))
    }

    fn dispatch(
        &mut self,
        head: MessageHead,
        body: &[u8],
        out: &mut [u8],
    ) -> Result<Outcome<'_>, Errno> {
        match Request::parse(head, body) {
            Ok(Request::Setattr { fid, .. }) => {
                let attributes = Attributes::parse(&body[size_of_val(&fid)..]);
                self.setattr(fid, &attributes.map_err(|_| Errno::INVAL)?)?;
                Ok(Outcome::Answer(emit(head.tag, &Answer::Setattr, out)))
            }
            Ok(Request::Getattr { fid, .. }) => {
                let stat = self.stat(fid)?;
                let writer = &mut Writer::new(out, head.id + 1, head.tag);
                more::getattr(writer, self.qid(&stat), &stat);
                writer.finish(0).map(Outcome::Answer).ok_or(Errno::INVAL)
            }
            Ok(request) => self.known(head.tag, request, out),
            Err(Malformed::Unknown(id)) => match More::parse(id, body) {
                Ok(Some(More::Readdir { fid, offset, count })) => {
                    let (len, listing) = self.readdir(head.tag, fid, offset, count, out)?;
                    Ok(Outcome::Listing(len, listing))
                }
                Ok(Some(more)) => {
                    let writer = &mut Writer::new(out, id + 1, head.tag);
                    self.more(more, writer)?;
                    writer.finish(0).map(Outcome::Answer).ok_or(Errno::INVAL)
                }
                Ok(None) => Err(Errno::OPNOTSUPP),
                Err(_) => Err(Errno::INVAL),
            },
            Err(_) => Err(Errno::INVAL),
        }
    }

    fn known(&mut self, tag: u16, request: Request, out: &mut [u8]) -> Result<Outcome<'_>, Errno> {
        let answer = match request {
            Request::Version { msize, version } => self.version(msize, version),
            Request::Attach { fid, .. } => {
                let qid = self.qid(&self.share.stat("")?);
                self.bind(fid, String::new())?;
                Answer::Attach { qid }
            }
            Request::Walk { fid, newfid, names } => self.walk(fid, newfid, &names)?,
            Request::Lopen { fid, flags } => self.lopen(fid, flags)?,
            Request::Getattr { .. } | Request::Setattr { .. } => {
                unreachable!("`dispatch` answers it")
            }
            Request::Read { fid, offset, count } => {
                end_of(offset, count.into())?;
                let count = count.min(self.msize.saturating_sub(RREAD_BYTES));
                let open = self.open(fid)?;
                return Ok(Outcome::Move(Move {
                    open,
                    offset,
                    count,
                    is_write: false,
                    charge: None,
                }));
            }
            Request::Write { fid, offset, count } => {
                let end = end_of(offset, count.into())?;
                let open = writable(&mut self.fids, fid)?;
                self.share.prove_size(end)?;
                let charge = self.share.charge(&open.file, offset..end)?;
                return Ok(Outcome::Move(Move { open, offset, count, is_write: true, charge }));
            }
            Request::Fsync { fid, datasync } => {
                let file = self.open(fid)?.file.clone();
                return Ok(Outcome::Work(Job::Sync { file, data_only: datasync != 0 }));
            }
            Request::Clunk { fid } => {
                self.forget(fid)?;
                self.share.shrank();
                Answer::Clunk
            }
            Request::Flush { oldtag } => return Ok(Outcome::Flush { oldtag }),
            Request::Allocate { fid, mode, offset, len } => {
                end_of(offset, len)?;
                let file = writable(&mut self.fids, fid)?.file.clone();
                let end = offset.saturating_add(job::within_file(&file, offset, len)?);
                let charge = match mode {
                    AllocateMode::Punch => self.share.giving_back(),
                    AllocateMode::Allocate | AllocateMode::Zero => {
                        self.share.charge(&file, offset..end)?
                    }
                };
                return Ok(Outcome::Work(Job::Allocate { file, mode, offset, len, charge }));
            }
            Request::Extents { fid, offset, len } => {
                end_of(offset, len)?;
                let open = self.open(fid)?;
                if open.writable && !open.writes_alone() {
                    return Err(Errno::BUSY);
                }
                extents(&open.file, offset, len)?
            }
        };
        Ok(Outcome::Answer(emit(tag, &answer, out)))
    }

    /// Does what is not in platter's own client, and writes what the answer says.
    fn more(&mut self, more: More, w: &mut Writer) -> Result<(), Errno> {
        match more {
            More::Lcreate { fid, name, flags, mode } => {
                self.prove_openable(fid)?;
                let path = Share::join(&self.fid(fid)?.path, name)?;
                self.prove_path(&path)?;
                let how = OFlags::from_bits_retain(flags);
                let file = self.share.create(&path, mode, how)?;
                w.qid(self.qid(&rustix::fs::fstat(&file)?));
                w.u32(0); // iounit: as much as fits
                let open = self.opened(file, &path, true, how);
                self.move_to(fid, path)?.open = Some(open);
            }
            More::Statfs { fid } => {
                self.fid(fid)?;
                self.statfs(w)?;
            }
            More::Mkdir { dfid, name, mode } => {
                let directory = &self.fid(dfid)?.path;
                let path = Share::join(directory, name)?;
                self.share.make_directory(directory, name, mode)?;
                w.qid(self.qid(&self.share.stat(&path)?));
            }
            More::Lock { fid, lock } => {
                const GRANTED: u8 = 0;
                const BLOCKED: u8 = 1;
                let granted = locks::set(self.lock(fid, &lock)?)?;
                self.fid_mut(fid)?.locked = true;
                w.u8(if granted { GRANTED } else { BLOCKED });
            }
            More::Getlock { fid, lock } => {
                let found = locks::conflict(&self.lock(fid, &lock)?);
                w.u8(found.as_ref().map_or(locks::UNLOCK, |found| found.kind));
                w.u64(found.as_ref().map_or(lock.start, |found| found.start));
                w.u64(found.as_ref().map_or(lock.len, locks::Lock::len_bytes));
                w.u32(found.as_ref().map_or(lock.process, |found| found.owner.process));
                w.text(found.as_ref().map_or(lock.client, |found| &found.owner.client));
            }
            More::Rename { fid, dfid, name } => {
                let (from, to) = (self.fid(fid)?.path.clone(), self.fid(dfid)?.path.clone());
                self.rename(split(&from), (&to, name))?;
            }
            More::Renameat { from, old, to, new } => {
                let (from, to) = (self.fid(from)?.path.clone(), self.fid(to)?.path.clone());
                self.rename((&from, old), (&to, new))?;
            }
            More::Unlinkat { dfid, name, flags } => {
                let directory = &self.fid(dfid)?.path;
                Share::join(directory, name)?;
                self.share.remove(directory, name, flags & REMOVE_DIRECTORY != 0)?;
            }
            More::Remove { fid } => {
                // The fid goes whatever happens to the file (9P2000, remove).
                let fid = self.forget(fid)?;
                let (directory, name) = split(&fid.path);
                let is_directory = is_directory(&self.share.stat(&fid.path)?);
                self.share.remove(directory, name, is_directory)?;
            }
            More::Readdir { .. } => unreachable!("its answer has data: `dispatch` does it"),
        }
        Ok(())
    }

    /// Every fid at or below the old name stands for the new one from then on.
    fn rename(&mut self, (from, old): (&str, &str), (to, new): (&str, &str)) -> Result<(), Errno> {
        let (before, after) = (Share::join(from, old)?, Share::join(to, new)?);
        let is_below = |fid: &Fid| {
            let rest = fid.path.strip_prefix(&before);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        let moved = self.fids.values().filter(|fid| is_below(fid)).count();
        let path_bytes = self.path_bytes + moved * after.len() - moved * before.len();
        if path_bytes > PATHS_BYTES_MAX.max(self.path_bytes) {
            return Err(Errno::MFILE);
        }
        self.share.rename((from, old), (to, new))?;
        for fid in self.fids.values_mut().filter(|fid| is_below(fid)) {
            fid.path.replace_range(..before.len(), &after);
        }
        self.path_bytes = path_bytes;
        Ok(())
    }

    fn lock(&self, fid: u32, lock: &more::Lock) -> Result<locks::Lock, Errno> {
        let open = self.fid(fid)?.open.as_ref().ok_or(Errno::BADF)?;
        let (process, client) = (lock.process, lock.client.to_string());
        let owner = locks::Owner { session: self.number, process, client };
        let stat = rustix::fs::fstat(&open.file)?;
        locks::Lock::new(&stat, lock.kind, (lock.start, lock.len), owner, fid)
    }

    /// Tversion begins a session anew: all fids are gone.
    fn version(&mut self, msize: u32, version: &str) -> Answer<'static> {
        self.fids.clear();
        self.path_bytes = 0;
        self.share.shrank();
        locks::release(self.number, None);
        let version = match version {
            VERSION_PLATTER => VERSION_PLATTER,
            VERSION_PLAIN => VERSION_PLAIN,
            _ => VERSION_UNKNOWN,
        };
        self.is_platter = version == VERSION_PLATTER;
        self.msize = msize.min(self.msize_max).max(MSIZE_MIN.min(self.msize_max));
        Answer::Version { msize: self.msize.min(msize), version }
    }

    fn walk(&mut self, fid: u32, newfid: u32, names: &[&str]) -> Result<Answer<'static>, Errno> {
        let from = self.fid(fid)?;
        if from.open.is_some() && fid == newfid {
            return Err(Errno::BUSY);
        }
        let mut path = from.path.clone();
        let mut qids = heapless::Vec::new();
        for name in names {
            let found = match *name {
                ".." => Ok(split(&path).0.to_string()),
                "." => Ok(path.clone()),
                name => Share::join(&path, name),
            };
            let stat = found.and_then(|found| {
                path = found;
                self.share.stat(&path)
            });
            match stat {
                Ok(stat) => qids.push(self.qid(&stat)).expect("as many as names"),
                Err(errno) if qids.is_empty() => return Err(errno),
                Err(_) => return Ok(Answer::Walk { qids }),
            }
        }
        if fid == newfid {
            self.prove_path(&path)?;
            self.move_to(fid, path)?;
        } else {
            self.bind(newfid, path)?;
        }
        Ok(Answer::Walk { qids })
    }

    fn lopen(&mut self, fid: u32, flags: u32) -> Result<Answer<'static>, Errno> {
        self.prove_openable(fid)?;
        let write = flags & open::ACCESS_MASK != open::READ_ONLY;
        let how = OFlags::from_bits_retain(flags);
        let path = &self.fid(fid)?.path;
        let file = self.share.open_file(path, write, how)?;
        let qid = self.qid(&rustix::fs::fstat(&file)?);
        let open = self.opened(file, path, write, how);
        self.fid_mut(fid)?.open = Some(open);
        Ok(Answer::Lopen { qid, iounit: 0 })
    }

    /// A file that a fid will have.
    fn opened(&self, file: File, path: &str, write: bool, how: OFlags) -> Open {
        let direct = self.share.open_direct(path, write, how, &file);
        let access = if write { OFlags::RDWR } else { OFlags::RDONLY };
        let open = Open::new(file, direct, access | synced(how), self.share.policy.cache);
        self.share.opened(&open.file);
        open
    }

    /// One file for each fid, and so many for a frontend.
    fn prove_openable(&self, fid: u32) -> Result<(), Errno> {
        if self.fid(fid)?.open.is_some() {
            return Err(Errno::INVAL);
        }
        let open = self.fids.values().filter(|fid| fid.open.is_some()).count();
        if open < OPEN_MAX { Ok(()) } else { Err(Errno::MFILE) }
    }

    fn stat(&self, fid: u32) -> Result<Stat, Errno> {
        let fid = self.fid(fid)?;
        match &fid.open {
            Some(open) => rustix::fs::fstat(&open.file),
            None => self.share.stat(&fid.path),
        }
    }

    /// Size, mode and times; all files are the frontend's root's, and stay so.
    fn setattr(&mut self, fid: u32, wanted: &Attributes) -> Result<(), Errno> {
        let fid = self.fid(fid)?;
        self.share.prove_writable()?;
        self.share.prove_size(wanted.size.unwrap_or(0))?;
        if [wanted.user, wanted.group].into_iter().flatten().any(|id| id != 0) {
            return Err(Errno::PERM);
        }
        let opened;
        let file = match &fid.open {
            Some(open) if open.writable || wanted.size.is_none() => &*open.file,
            _ => {
                let write = wanted.size.is_some();
                opened = self.share.open_file(&fid.path, write, OFlags::empty())?;
                &opened
            }
        };
        if let Some(size) = wanted.size {
            rustix::fs::ftruncate(file, size)?;
            self.share.shrank();
        }
        if let Some(mode) = wanted.mode {
            Share::set_mode(file, mode)?;
        }
        // A file that is cut is modified by that: to set it to now once more wants more rights.
        let modified = wanted.modified.filter(|at| *at != Time::Now || wanted.size.is_none());
        if wanted.accessed.is_some() || modified.is_some() {
            let times = [wanted.accessed, modified].map(timespec);
            let [last_access, last_modification] = times;
            let times =
                Timestamps { last_access: last_access?, last_modification: last_modification? };
            rustix::fs::futimens(file, &times)?;
        }
        Ok(())
    }

    /// Entries from `offset` on, which is where an earlier one said that the next is. Nothing is
    /// kept between two of them: a directory can be long.
    fn readdir(
        &self,
        tag: u16,
        fid: u32,
        offset: u64,
        count: u32,
        out: &mut [u8],
    ) -> Result<(usize, Vec<u8>), Errno> {
        const RREADDIR_BYTES: u32 = 11;
        let directory = &*self.fid(fid)?.open.as_ref().ok_or(Errno::BADF)?.file;
        let room = count.min(self.msize.saturating_sub(RREADDIR_BYTES)).min(LISTING_BYTES_MAX);
        let mut data = Vec::new();
        let device = rustix::fs::fstat(directory)?.st_dev;
        seek(directory, SeekFrom::Start(offset))?;
        let mut step = [MaybeUninit::uninit(); LISTING_STEP_BYTES];
        let mut entries = RawDir::new(directory, &mut step);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let Ok(name) = entry.file_name().to_str() else { continue };
            let Some(kind) = Share::kind_of(directory, name, entry.file_type()) else { continue };
            // qid[13] offset[8] type[1] name[s]
            if data.len() + 24 + name.len() > room as usize {
                if data.is_empty() {
                    return Err(Errno::INVAL);
                }
                break;
            }
            let is_directory = kind == FileType::Directory;
            let (qid_kind, entry_kind) =
                if is_directory { (QID_DIR, libc::DT_DIR) } else { (0, libc::DT_REG) };
            data.push(qid_kind);
            data.extend_from_slice(&0u32.to_le_bytes());
            let number = self.share.number_of(device, entry.ino());
            data.extend_from_slice(&number.to_le_bytes());
            data.extend_from_slice(&entry.next_entry_cookie().to_le_bytes());
            data.push(entry_kind);
            data.extend_from_slice(&(name.len() as u16).to_le_bytes());
            data.extend_from_slice(name.as_bytes());
        }
        let w = &mut Writer::new(out, more::id::TREADDIR + 1, tag);
        w.u32(data.len() as u32);
        let len = w.finish(data.len() as u32).ok_or(Errno::INVAL)?;
        Ok((len, data))
    }

    fn statfs(&self, w: &mut Writer) -> Result<(), Errno> {
        let stat = self.share.statfs()?;
        w.u32(stat.f_type as u32);
        w.u32(stat.f_bsize as u32);
        for value in [stat.f_blocks, stat.f_bfree, stat.f_bavail, stat.f_files, stat.f_ffree] {
            w.u64(value);
        }
        w.u64(0); // fsid
        w.u32(255); // longest name
        Ok(())
    }

    fn qid(&self, stat: &Stat) -> Qid {
        let kind = if is_directory(stat) { QID_DIR } else { 0 };
        let version = (stat.st_mtime as u64 ^ ((stat.st_size as u64) << 8)) as u32;
        Qid { kind, version, path: self.share.number_of(stat.st_dev, stat.st_ino) }
    }

    fn bind(&mut self, fid: u32, path: String) -> Result<(), Errno> {
        if self.fids.contains_key(&fid) {
            return Err(Errno::EXIST);
        }
        if self.fids.len() >= FIDS_MAX {
            return Err(Errno::MFILE);
        }
        self.prove_path(&path)?;
        self.path_bytes += path.len();
        self.fids.insert(fid, Fid { path, open: None, locked: false });
        Ok(())
    }

    /// Is there room for one more path?
    fn prove_path(&self, path: &str) -> Result<(), Errno> {
        if self.path_bytes + path.len() > PATHS_BYTES_MAX { Err(Errno::MFILE) } else { Ok(()) }
    }

    /// A fid stands for another path from now on; there is room.
    fn move_to(&mut self, fid: u32, path: String) -> Result<&mut Fid, Errno> {
        let fid = self.fids.get_mut(&fid).ok_or(Errno::BADF)?;
        self.path_bytes = self.path_bytes - fid.path.len() + path.len();
        fid.path = path;
        Ok(fid)
    }

    fn forget(&mut self, fid: u32) -> Result<Fid, Errno> {
        let gone = self.fids.remove(&fid).ok_or(Errno::BADF)?;
        self.path_bytes -= gone.path.len();
        if gone.locked {
            locks::release(self.number, Some(fid));
        }
        Ok(gone)
    }

    fn fid(&self, fid: u32) -> Result<&Fid, Errno> {
        self.fids.get(&fid).ok_or(Errno::BADF)
    }

    fn fid_mut(&mut self, fid: u32) -> Result<&mut Fid, Errno> {
        self.fids.get_mut(&fid).ok_or(Errno::BADF)
    }

    fn open(&mut self, fid: u32) -> Result<&mut Open, Errno> {
        self.fid_mut(fid)?.open.as_mut().ok_or(Errno::BADF)
    }
}

/// Where a range of a file ends; no file is longer than that.
fn end_of(offset: u64, len: u64) -> Result<u64, Errno> {
    let end = offset.checked_add(len).filter(|end| i64::try_from(*end).is_ok());
    end.ok_or(Errno::INVAL)
}

fn writable(fids: &mut HashMap<u32, Fid>, fid: u32) -> Result<&mut Open, Errno> {
    let open = fids.get_mut(&fid).and_then(|fid| fid.open.as_mut());
    open.filter(|open| open.writable).ok_or(Errno::BADF)
}

impl Drop for Session {
    fn drop(&mut self) {
        self.fids.clear();
        self.share.shrank();
        locks::release(self.number, None);
    }
}

/// Allocated ranges, by SEEK_DATA and SEEK_HOLE.
fn extents(file: &File, offset: u64, len: u64) -> Result<Answer<'static>, Errno> {
    let end = offset.saturating_add(len);
    let mut list = heapless::Vec::<Extent, EXTENTS_MAX>::new();
    let mut at = offset;
    while at < end && !list.is_full() {
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) if data < end => data,
            Ok(_) | Err(Errno::NXIO) => {
                at = end;
                break;
            }
            Err(errno) => return Err(errno),
        };
        let hole = seek(file, SeekFrom::Hole(data))?.min(end);
        if list.push(Extent { offset: data, len: hole - data }).is_err() {
            break;
        }
        at = hole;
    }
    Ok(Answer::Extents { end: at, extents: list })
}

fn timespec(time: Option<Time>) -> Result<Timespec, Errno> {
    match time {
        None => Ok(Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT }),
        Some(Time::Now) => Ok(Timespec { tv_sec: 0, tv_nsec: UTIME_NOW }),
        Some(Time::At { nanoseconds: 1_000_000_000.., .. }) => Err(Errno::INVAL),
        // Before 1970 it is negative.
        Some(Time::At { seconds, nanoseconds }) => {
            Ok(Timespec { tv_sec: seconds.cast_signed(), tv_nsec: nanoseconds.cast_signed() })
        }
    }
}

fn is_directory(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
}

/// The directory and the last component of a path.
fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

/// An answer's length in `out`.
pub fn emit(tag: u16, answer: &Answer, out: &mut [u8]) -> usize {
    answer.emit(tag, out).expect("answers are shorter than their buffer")
}

pub fn error(tag: u16, errno: Errno, out: &mut [u8]) -> usize {
    emit(tag, &Answer::Lerror { ecode: errno.raw_os_error() as u32 }, out)
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
