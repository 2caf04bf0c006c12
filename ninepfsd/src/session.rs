//! A 9P session: fids, and what each request means for the files of the share.
//!
//! Answers what is quick at once; reading, writing and syncing become [`Job`]s for the workers.
//! Guards that each request gets one answer and that a frontend's fids are bounded.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use platter_storage::ninep::message::{
    AllocateMode, Answer, EXTENTS_MAX, Extent, Malformed, QID_DIR, Qid, RREAD_BYTES, Request,
    SETATTR_SIZE, VERSION_PLAIN, VERSION_PLATTER, VERSION_UNKNOWN, Writer, open,
};
use platter_xen::ninepfs::MessageHead;
use rustix::fs::{FallocateFlags, SeekFrom, Stat, fallocate, seek};
use rustix::io::{Errno, IoSlice, IoSliceMut, ReadWriteFlags, preadv2, pwritev2};

use crate::more::{More, REMOVE_DIRECTORY};
use crate::ring::Incoming;
use crate::share::Share;

/// Fids of one frontend.
const FIDS_MAX: usize = 4096;
/// Longest message, as one ring allows at most.
const MSIZE_MAX: u32 = 1 << 20;
const MSIZE_MIN: u32 = 4096;
/// Longest answer without data.
const ANSWER_BYTES: usize = 1024;

/// What a worker does with an open file.
pub enum Job {
    Read { file: Arc<File>, offset: u64, count: u32 },
    Write { file: Arc<File>, offset: u64, data: Vec<u8> },
    Sync { file: Arc<File>, data_only: bool },
    Allocate { file: Arc<File>, mode: AllocateMode, offset: u64, len: u64 },
}

/// An answer, ready for the ring.
pub struct Reply {
    pub bytes: Vec<u8>,
    pub data: Vec<u8>,
}

/// What became of a request.
pub enum Outcome {
    Answer(Reply),
    Work(Job),
}

struct Fid {
    /// Relative to the share; empty for its root.
    path: String,
    file: Option<Arc<File>>,
    writable: bool,
    /// A directory's listing, as of the first read of it.
    entries: Vec<(String, u64, bool)>,
}

pub struct Session {
    share: Share,
    fids: HashMap<u32, Fid>,
    pub msize: u32,
    /// Largest message that the rings can carry.
    msize_max: u32,
}

impl Session {
    pub fn new(share: Share, half_bytes: u32) -> Session {
        let msize_max = half_bytes.min(MSIZE_MAX);
        Session { share, fids: HashMap::new(), msize: msize_max, msize_max }
    }

    pub fn handle(&mut self, incoming: Incoming) -> Outcome {
        let tag = incoming.head.tag;
        match self.dispatch(incoming) {
            Ok(outcome) => outcome,
            Err(errno) => Outcome::Answer(error(tag, errno)),
        }
    }

    fn dispatch(&mut self, incoming: Incoming) -> Result<Outcome, Errno> {
        let Incoming { head, body, data } = incoming;
        match Request::parse(head, &body) {
            Ok(request) => self.known(head, request, data),
            Err(Malformed::Unknown(id)) => match More::parse(id, &body) {
                Ok(Some(more)) => self.more(head.tag, more).map(Outcome::Answer),
                Ok(None) => Err(Errno::OPNOTSUPP),
                Err(_) => Err(Errno::INVAL),
            },
            Err(_) => Err(Errno::INVAL),
        }
    }

    fn known(
        &mut self,
        head: MessageHead,
        request: Request,
        data: Vec<u8>,
    ) -> Result<Outcome, Errno> {
        let answer = match request {
            Request::Version { msize, version } => self.version(msize, version),
            Request::Attach { fid, .. } => {
                let qid = qid(&self.share.stat("")?);
                self.bind(fid, String::new())?;
                Answer::Attach { qid }
            }
            Request::Walk { fid, newfid, names } => self.walk(fid, newfid, &names)?,
            Request::Lopen { fid, flags } => self.lopen(fid, flags)?,
            Request::Getattr { fid, .. } => {
                let path = self.fid(fid)?.path.clone();
                let stat = match &self.fid(fid)?.file {
                    Some(file) => rustix::fs::fstat(file)?,
                    None => self.share.stat(&path)?,
                };
                Answer::Getattr {
                    qid: qid(&stat),
                    mode: stat.st_mode,
                    size: stat.st_size as u64,
                    blksize: stat.st_blksize as u64,
                    blocks: stat.st_blocks as u64,
                }
            }
            Request::Setattr { fid, valid, size } => self.setattr(fid, valid, size)?,
            Request::Read { fid, offset, count } => {
                let file = self.file(fid)?;
                let count = count.min(self.msize.saturating_sub(RREAD_BYTES));
                return Ok(Outcome::Work(Job::Read { file, offset, count }));
            }
            Request::Write { fid, offset, .. } => {
                let file = self.writable(fid)?;
                let end = offset.checked_add(data.len() as u64).ok_or(Errno::FBIG)?;
                self.share.prove_size(end)?;
                return Ok(Outcome::Work(Job::Write { file, offset, data }));
            }
            Request::Fsync { fid, datasync } => {
                let file = self.file(fid)?;
                return Ok(Outcome::Work(Job::Sync { file, data_only: datasync != 0 }));
            }
            Request::Clunk { fid } => {
                self.fids.remove(&fid).ok_or(Errno::BADF)?;
                Answer::Clunk
            }
            // Requests are answered as they are done; a flushed one keeps its own answer.
            Request::Flush { .. } => Answer::Flush,
            Request::Allocate { fid, mode, offset, len } => {
                let file = self.writable(fid)?;
                return Ok(Outcome::Work(Job::Allocate { file, mode, offset, len }));
            }
            Request::Extents { fid, offset, len } => extents(&*self.file(fid)?, offset, len)?,
        };
        Ok(Outcome::Answer(reply(head.tag, &answer)))
    }

    fn more(&mut self, tag: u16, more: More) -> Result<Reply, Errno> {
        let mut bytes = vec![0; ANSWER_BYTES];
        match more {
            More::Lcreate { fid, name, flags, mode } => {
                return self.lcreate(tag, fid, name, flags, mode);
            }
            More::Readdir { fid, offset, count } => return self.readdir(tag, fid, offset, count),
            More::Statfs { fid } => {
                self.fid(fid)?;
                return self.statfs(tag);
            }
            More::Mkdir { dfid, name, mode } => {
                let directory = self.fid(dfid)?.path.clone();
                let path = Share::join(&directory, name)?;
                self.share.make_directory(&directory, name, mode)?;
                let w = &mut Writer::new(&mut bytes, crate::more::id::TMKDIR + 1, tag);
                w.qid(qid(&self.share.stat(&path)?));
                return finish(w).map(|len| cut(bytes, len));
            }
            More::Getlock { start, len, process, client, .. } => {
                return unlocked(tag, start, len, process, client);
            }
            More::Lock { .. } => {
                let w = &mut Writer::new(&mut bytes, crate::more::id::TLOCK + 1, tag);
                w.u8(0); // granted
                return finish(w).map(|len| cut(bytes, len));
            }
            More::Rename { fid, dfid, name } => {
                let from = self.fid(fid)?.path.clone();
                let to = self.fid(dfid)?.path.clone();
                let path = Share::join(&to, name)?;
                self.share.rename(split(&from), (&to, name))?;
                self.fid_mut(fid)?.path = path;
            }
            More::Renameat { from, old, to, new } => {
                let (from, to) = (self.fid(from)?.path.clone(), self.fid(to)?.path.clone());
                Share::join(&from, old).and(Share::join(&to, new))?;
                self.share.rename((&from, old), (&to, new))?;
            }
            More::Unlinkat { dfid, name, flags } => {
                let directory = self.fid(dfid)?.path.clone();
                Share::join(&directory, name)?;
                self.share.remove(&directory, name, flags & REMOVE_DIRECTORY != 0)?;
            }
            More::Remove { fid } => {
                // The fid goes whatever happens to the file (9P2000, remove).
                let fid = self.fids.remove(&fid).ok_or(Errno::BADF)?;
                let (directory, name) = split(&fid.path);
                let stat = self.share.stat(&fid.path)?;
                let is_directory = qid(&stat).kind == QID_DIR;
                self.share.remove(directory, name, is_directory)?;
            }
        }
        // What is left answers with nothing.
        let id = match more {
            More::Rename { .. } => crate::more::id::TRENAME,
            More::Renameat { .. } => crate::more::id::TRENAMEAT,
            More::Unlinkat { .. } => crate::more::id::TUNLINKAT,
            _ => crate::more::id::TREMOVE,
        };
        let w = &mut Writer::new(&mut bytes, id + 1, tag);
        finish(w).map(|len| cut(bytes, len))
    }

    /// Tversion begins a session anew: all fids are gone.
    fn version(&mut self, msize: u32, version: &str) -> Answer<'static> {
        self.fids.clear();
        let version = match version {
            VERSION_PLATTER => VERSION_PLATTER,
            VERSION_PLAIN => VERSION_PLAIN,
            _ => VERSION_UNKNOWN,
        };
        self.msize = msize.min(self.msize_max).max(MSIZE_MIN.min(self.msize_max));
        Answer::Version { msize: self.msize.min(msize), version }
    }

    fn walk(&mut self, fid: u32, newfid: u32, names: &[&str]) -> Result<Answer<'static>, Errno> {
        let mut path = self.fid(fid)?.path.clone();
        if self.fid(fid)?.file.is_some() && fid == newfid {
            return Err(Errno::BUSY);
        }
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
                Ok(stat) => qids.push(qid(&stat)).expect("as many as names"),
                Err(errno) if qids.is_empty() => return Err(errno),
                Err(_) => return Ok(Answer::Walk { qids }),
            }
        }
        self.bind(newfid, path)?;
        Ok(Answer::Walk { qids })
    }

    fn lopen(&mut self, fid: u32, flags: u32) -> Result<Answer<'static>, Errno> {
        let write = flags & open::ACCESS_MASK != open::READ_ONLY;
        let truncate = flags & libc::O_TRUNC as u32 != 0;
        let path = self.fid(fid)?.path.clone();
        let file = self.share.open_file(&path, write, truncate)?;
        let qid = qid(&rustix::fs::fstat(&file)?);
        let fid = self.fid_mut(fid)?;
        (fid.file, fid.writable) = (Some(Arc::new(file)), write);
        Ok(Answer::Lopen { qid, iounit: 0 })
    }

    fn lcreate(
        &mut self,
        tag: u16,
        fid: u32,
        name: &str,
        flags: u32,
        mode: u32,
    ) -> Result<Reply, Errno> {
        let path = Share::join(&self.fid(fid)?.path, name)?;
        let file = self.share.create(&path, mode, flags & libc::O_EXCL as u32 != 0)?;
        let qid = qid(&rustix::fs::fstat(&file)?);
        let fid = self.fid_mut(fid)?;
        (fid.path, fid.file, fid.writable) = (path, Some(Arc::new(file)), true);
        let mut bytes = vec![0; ANSWER_BYTES];
        let w = &mut Writer::new(&mut bytes, crate::more::id::TLCREATE + 1, tag);
        w.qid(qid);
        w.u32(0); // iounit: as much as fits
        finish(w).map(|len| cut(bytes, len))
    }

    fn setattr(&mut self, fid: u32, valid: u32, size: u64) -> Result<Answer<'static>, Errno> {
        if valid & SETATTR_SIZE != 0 {
            self.share.prove_writable()?;
            self.share.prove_size(size)?;
            let path = self.fid(fid)?.path.clone();
            match &self.fid(fid)?.file {
                Some(file) if self.fid(fid)?.writable => rustix::fs::ftruncate(file, size)?,
                _ => rustix::fs::ftruncate(self.share.open_file(&path, true, false)?, size)?,
            }
        }
        // Modes, owners and times are the administrator's: what is asked for them is granted
        // and left as it is.
        Ok(Answer::Setattr)
    }

    fn readdir(&mut self, tag: u16, fid: u32, offset: u64, count: u32) -> Result<Reply, Errno> {
        const RREADDIR_BYTES: u32 = 11;
        let path = self.fid(fid)?.path.clone();
        if offset == 0 {
            self.fid_mut(fid)?.entries = self.share.entries(&path)?;
        }
        let room = count.min(self.msize.saturating_sub(RREADDIR_BYTES)) as usize;
        let mut data = Vec::new();
        for (index, (name, inode, is_directory)) in
            self.fid(fid)?.entries.iter().enumerate().skip(offset as usize)
        {
            // qid[13] offset[8] type[1] name[s]
            if data.len() + 24 + name.len() > room {
                break;
            }
            let (qid_kind, entry_kind) =
                if *is_directory { (QID_DIR, libc::DT_DIR) } else { (0, libc::DT_REG) };
            data.push(qid_kind);
            data.extend_from_slice(&0u32.to_le_bytes());
            data.extend_from_slice(&inode.to_le_bytes());
            data.extend_from_slice(&(index as u64 + 1).to_le_bytes());
            data.push(entry_kind);
            data.extend_from_slice(&(name.len() as u16).to_le_bytes());
            data.extend_from_slice(name.as_bytes());
        }
        let mut bytes = vec![0; ANSWER_BYTES];
        let w = &mut Writer::new(&mut bytes, crate::more::id::TREADDIR + 1, tag);
        w.u32(data.len() as u32);
        let len = w.finish(data.len() as u32).ok_or(Errno::INVAL)?;
        bytes.truncate(len);
        Ok(Reply { bytes, data })
    }

    fn statfs(&self, tag: u16) -> Result<Reply, Errno> {
        let stat = self.share.statfs()?;
        let mut bytes = vec![0; ANSWER_BYTES];
        let w = &mut Writer::new(&mut bytes, crate::more::id::TSTATFS + 1, tag);
        w.u32(stat.f_type as u32);
        w.u32(stat.f_bsize as u32);
        for value in [stat.f_blocks, stat.f_bfree, stat.f_bavail, stat.f_files, stat.f_ffree] {
            w.u64(value);
        }
        w.u64(0); // fsid
        w.u32(255); // longest name
        finish(w).map(|len| cut(bytes, len))
    }

    fn bind(&mut self, fid: u32, path: String) -> Result<(), Errno> {
        if !self.fids.contains_key(&fid) && self.fids.len() >= FIDS_MAX {
            return Err(Errno::MFILE);
        }
        let fresh = Fid { path, file: None, writable: false, entries: Vec::new() };
        self.fids.insert(fid, fresh);
        Ok(())
    }

    fn fid(&self, fid: u32) -> Result<&Fid, Errno> {
        self.fids.get(&fid).ok_or(Errno::BADF)
    }

    fn fid_mut(&mut self, fid: u32) -> Result<&mut Fid, Errno> {
        self.fids.get_mut(&fid).ok_or(Errno::BADF)
    }

    fn file(&self, fid: u32) -> Result<Arc<File>, Errno> {
        self.fid(fid)?.file.clone().ok_or(Errno::BADF)
    }

    fn writable(&self, fid: u32) -> Result<Arc<File>, Errno> {
        let file = self.file(fid)?;
        if self.fid(fid)?.writable { Ok(file) } else { Err(Errno::BADF) }
    }
}

impl Job {
    /// Memory that it holds until it is answered.
    pub fn bytes(&self) -> usize {
        match self {
            Job::Read { count, .. } => *count as usize,
            Job::Write { data, .. } => data.len(),
            Job::Sync { .. } | Job::Allocate { .. } => 0,
        }
    }

    /// Does the work if that needs no waiting: bytes that the page cache has, or has room for.
    /// Two switches of threads cost more than the copy; `Err` gives the job back.
    pub fn run_now(self, tag: u16) -> Result<Reply, Job> {
        let now = ReadWriteFlags::NOWAIT;
        match &self {
            Job::Read { file, offset, count } => {
                let mut data = vec![0; *count as usize];
                let mut into = [IoSliceMut::new(&mut data)];
                match preadv2(file, &mut into, *offset, now) {
                    Ok(len) if len == data.len() => {
                        let head = reply(tag, &Answer::Read { count: len as u32 });
                        Ok(Reply { bytes: head.bytes, data })
                    }
                    _ => Err(self),
                }
            }
            Job::Write { file, offset, data } => {
                match pwritev2(file, &[IoSlice::new(data)], *offset, now) {
                    Ok(len) if len == data.len() => {
                        Ok(reply(tag, &Answer::Write { count: len as u32 }))
                    }
                    // Written again from the start, the same bytes: no harm.
                    _ => Err(self),
                }
            }
            Job::Sync { .. } | Job::Allocate { .. } => Err(self),
        }
    }

    /// Does the work; called by a worker.
    pub fn run(self, tag: u16) -> Reply {
        let done = match self {
            Job::Read { file, offset, count } => {
                let mut data = vec![0; count as usize];
                return match read_at(&file, offset, &mut data) {
                    Ok(len) => {
                        data.truncate(len);
                        let head = reply(tag, &Answer::Read { count: len as u32 });
                        Reply { bytes: head.bytes, data }
                    }
                    Err(errno) => error(tag, errno),
                };
            }
            Job::Write { file, offset, data } => {
                write_at(&file, offset, &data).map(|len| Answer::Write { count: len as u32 })
            }
            Job::Sync { file, data_only: true } => {
                rustix::fs::fdatasync(&file).map(|()| Answer::Fsync)
            }
            Job::Sync { file, data_only: false } => {
                rustix::fs::fsync(&file).map(|()| Answer::Fsync)
            }
            Job::Allocate { file, mode, offset, len } => {
                allocate(&file, mode, offset, len).map(|()| Answer::Allocate)
            }
        };
        match done {
            Ok(answer) => reply(tag, &answer),
            Err(errno) => error(tag, errno),
        }
    }
}

fn read_at(file: &File, offset: u64, into: &mut [u8]) -> Result<usize, Errno> {
    let mut done = 0;
    while done < into.len() {
        match file.read_at(&mut into[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(len) => done += len,
            Err(fault) if fault.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) if done > 0 => break,
            Err(fault) => return Err(errno_of(&fault)),
        }
    }
    Ok(done)
}

fn write_at(file: &File, offset: u64, data: &[u8]) -> Result<usize, Errno> {
    let mut done = 0;
    while done < data.len() {
        match file.write_at(&data[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(len) => done += len,
            Err(fault) if fault.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) if done > 0 => break,
            Err(fault) => return Err(errno_of(&fault)),
        }
    }
    Ok(done)
}

fn errno_of(fault: &std::io::Error) -> Errno {
    Errno::from_io_error(fault).unwrap_or(Errno::IO)
}

/// None of the modes changes the file's size; a range beyond the end is cut at the end.
fn allocate(file: &File, mode: AllocateMode, offset: u64, len: u64) -> Result<(), Errno> {
    let size = rustix::fs::fstat(file)?.st_size as u64;
    let len = len.min(size.saturating_sub(offset));
    if len == 0 {
        return Ok(());
    }
    let flags = match mode {
        AllocateMode::Allocate => FallocateFlags::empty(),
        AllocateMode::Punch => FallocateFlags::PUNCH_HOLE,
        AllocateMode::Zero => FallocateFlags::ZERO_RANGE,
    };
    fallocate(file, flags | FallocateFlags::KEEP_SIZE, offset, len)
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

fn qid(stat: &Stat) -> Qid {
    let is_directory = stat.st_mode & libc::S_IFMT == libc::S_IFDIR;
    let version = (stat.st_mtime as u64 ^ ((stat.st_size as u64) << 8)) as u32;
    Qid { kind: if is_directory { QID_DIR } else { 0 }, version, path: stat.st_ino }
}

/// Nobody holds a lock: there is one server, and locks are advice among its clients.
fn unlocked(tag: u16, start: u64, len: u64, process: u32, client: &str) -> Result<Reply, Errno> {
    const UNLOCKED: u8 = 2;
    let mut bytes = vec![0; ANSWER_BYTES];
    let w = &mut Writer::new(&mut bytes, crate::more::id::TGETLOCK + 1, tag);
    w.u8(UNLOCKED);
    w.u64(start);
    w.u64(len);
    w.u32(process);
    w.text(client);
    finish(w).map(|len| cut(bytes, len))
}

/// The directory and the last component of a path.
fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

fn reply(tag: u16, answer: &Answer) -> Reply {
    let mut bytes = vec![0; ANSWER_BYTES];
    let len = answer.emit(tag, &mut bytes).expect("answers are shorter than their buffer");
    cut(bytes, len)
}

fn error(tag: u16, errno: Errno) -> Reply {
    reply(tag, &Answer::Lerror { ecode: errno.raw_os_error() as u32 })
}

fn finish(writer: &mut Writer) -> Result<usize, Errno> {
    writer.finish(0).ok_or(Errno::INVAL)
}

fn cut(mut bytes: Vec<u8>, len: usize) -> Reply {
    bytes.truncate(len);
    Reply { bytes, data: Vec::new() }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
