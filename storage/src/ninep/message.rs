//! 9P2000.L messages as bytes, both directions, and platter's own two additions.
//!
//! Guards allegation-then-proof for everything a 9p server (or, in a server, a client) sends:
//! every length is checked, trailing bytes are refused, bulk data is never looked at. Works on
//! private copies. Must never: panic on any input, touch shared memory.
//!
//! Sources: the Linux kernel's 9P2000.L protocol (diod's protocol.md); 9P2000 for VERSION,
//! ATTACH, WALK, READ, WRITE, CLUNK, FLUSH. All integers are little-endian; a string is a u16
//! length and UTF-8 bytes; every message begins with size[4] id[1] tag[2].
//!
//! # The dialect `9P2000.L.platter1`
//! A server that answers Tversion with this string speaks 9P2000.L and also:
//! - takes up to [`PLATTER_IN_FLIGHT`] requests per ring at once and answers in any order, each
//!   on the ring it came by (a plain server is given one per ring);
//! - rings one event channel for news on all rings, and is content with one for all of them;
//! - `Tallocate` 80: fid[4] mode[4] offset[8] len[8], `Rallocate` 81: empty. mode 0 allocates
//!   the range, 1 punches a hole, 2 makes it read as zeros and keeps it allocated. None changes
//!   the file's size; a range beyond the end is cut at the end;
//! - `Textents` 82: fid[4] offset[8] len[8], `Rextents` 83: end[8] count[2] then count times
//!   offset[8] len[8]: the allocated ranges in `offset..end`, in order, at most
//!   [`EXTENTS_MAX`]; `end` tells how far the answer reaches, and ask again from there. To a fid
//!   that is open for writing the answer is EBUSY when another fid of any client is too: who
//!   gets ranges may keep them for a second, until it writes there itself.
//!
//! The numbers 78 to 99 are used by no 9P dialect known to us.

use heapless::Vec;
use platter_xen::ninepfs::MessageHead;

pub const VERSION_PLAIN: &str = "9P2000.L";
pub const VERSION_PLATTER: &str = "9P2000.L.platter1";
/// What a server answers to a version it does not know.
pub const VERSION_UNKNOWN: &str = "unknown";
/// Requests per ring in the platter dialect.
pub const PLATTER_IN_FLIGHT: u32 = 16;

/// The tag of Tversion.
pub const NOTAG: u16 = 0xffff;
/// "No fid" in Tattach's afid.
pub const NOFID: u32 = 0xffff_ffff;
/// `P9_NONUNAME`: a string user name counts.
pub const NONUNAME: u32 = 0xffff_ffff;
/// `MAXWELEM`: names in one Twalk.
pub const WALK_MAX: usize = 16;
/// Ranges in one Rextents.
pub const EXTENTS_MAX: usize = 16;
/// Bytes of a Tread answer before its data: head and count.
pub const RREAD_BYTES: u32 = 11;
/// Bytes of a Twrite before its data: head, fid, offset, count.
pub const TWRITE_BYTES: u32 = 23;
/// Longest answer that is not data, as asked by our client: Rwalk 217, Rextents 273.
pub const ANSWER_BYTES_MAX: usize = 512;

/// Message numbers; the answer to `T` is `T + 1`.
pub mod id {
    pub const RLERROR: u8 = 7;
    pub const TLOPEN: u8 = 12;
    pub const TGETATTR: u8 = 24;
    pub const TSETATTR: u8 = 26;
    pub const TFSYNC: u8 = 50;
    pub const TALLOCATE: u8 = 80;
    pub const TEXTENTS: u8 = 82;
    pub const TVERSION: u8 = 100;
    pub const TATTACH: u8 = 104;
    pub const TFLUSH: u8 = 108;
    pub const TWALK: u8 = 110;
    pub const TREAD: u8 = 116;
    pub const TWRITE: u8 = 118;
    pub const TCLUNK: u8 = 120;
}

/// Flags of Tlopen: Linux's open(2) numbers.
pub mod open {
    pub const READ_ONLY: u32 = 0;
    pub const READ_WRITE: u32 = 2;
    /// The bits that hold the access mode.
    pub const ACCESS_MASK: u32 = 3;
}

/// `P9_GETATTR_BASIC`: everything but creation time, generation and data version.
pub const GETATTR_BASIC: u64 = 0x7ff;
/// `P9_ATTR_SIZE` of Tsetattr's `valid`.
pub const SETATTR_SIZE: u32 = 0x8;
/// `QTDIR` and `QTSYMLINK` of a qid's type.
pub const QID_DIR: u8 = 0x80;
pub const QID_SYMLINK: u8 = 0x02;
/// `S_IFMT` and `S_IFREG`.
pub const MODE_KIND_MASK: u32 = 0o170_000;
pub const MODE_REGULAR: u32 = 0o100_000;

/// The server's name for a file: type[1] version[4] path[8].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Qid {
    pub kind: u8,
    pub version: u32,
    /// The same number for the same file, whatever path led to it.
    pub path: u64,
}

/// Mode of [`Request::Allocate`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AllocateMode {
    Allocate,
    Punch,
    Zero,
}

impl AllocateMode {
    fn parse(wire: u32) -> Result<AllocateMode, Malformed> {
        match wire {
            0 => Ok(AllocateMode::Allocate),
            1 => Ok(AllocateMode::Punch),
            2 => Ok(AllocateMode::Zero),
            _ => Err(Malformed::Value),
        }
    }

    fn wire(self) -> u32 {
        match self {
            AllocateMode::Allocate => 0,
            AllocateMode::Punch => 1,
            AllocateMode::Zero => 2,
        }
    }
}

/// A range of a file, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Extent {
    pub offset: u64,
    pub len: u64,
}

/// A T-message.
#[derive(Clone, PartialEq, Eq, Debug)]
#[expect(clippy::large_enum_variant, reason = "no heap on the request path")]
pub enum Request<'a> {
    Version {
        msize: u32,
        version: &'a str,
    },
    Attach {
        fid: u32,
        afid: u32,
        uname: &'a str,
        aname: &'a str,
        n_uname: u32,
    },
    Walk {
        fid: u32,
        newfid: u32,
        names: Vec<&'a str, WALK_MAX>,
    },
    Lopen {
        fid: u32,
        flags: u32,
    },
    Getattr {
        fid: u32,
        mask: u64,
    },
    /// `size` counts when `valid` holds [`SETATTR_SIZE`]; the other attributes are parsed and
    /// dropped, and emitted as zero.
    Setattr {
        fid: u32,
        valid: u32,
        size: u64,
    },
    Read {
        fid: u32,
        offset: u64,
        count: u32,
    },
    /// The `count` data bytes follow and are not part of this.
    Write {
        fid: u32,
        offset: u64,
        count: u32,
    },
    Fsync {
        fid: u32,
        datasync: u32,
    },
    Clunk {
        fid: u32,
    },
    Flush {
        oldtag: u16,
    },
    Allocate {
        fid: u32,
        mode: AllocateMode,
        offset: u64,
        len: u64,
    },
    Extents {
        fid: u32,
        offset: u64,
        len: u64,
    },
}

/// An R-message.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer<'a> {
    /// A Linux errno.
    Lerror {
        ecode: u32,
    },
    Version {
        msize: u32,
        version: &'a str,
    },
    Attach {
        qid: Qid,
    },
    /// Fewer qids than names: the first missing name does not exist.
    Walk {
        qids: Vec<Qid, WALK_MAX>,
    },
    Lopen {
        qid: Qid,
        iounit: u32,
    },
    Getattr {
        qid: Qid,
        mode: u32,
        size: u64,
        blksize: u64,
        blocks: u64,
    },
    Setattr,
    /// The `count` data bytes follow and are not part of this.
    Read {
        count: u32,
    },
    Write {
        count: u32,
    },
    Fsync,
    Clunk,
    Flush,
    Allocate,
    Extents {
        end: u64,
        extents: Vec<Extent, EXTENTS_MAX>,
    },
}

/// Why bytes are not a message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Malformed {
    /// Fewer bytes than its fields need.
    Short,
    /// Bytes left over, or a data count that is not what the message's size says.
    Length,
    /// A string is not UTF-8 or holds a NUL.
    Text,
    /// More names, qids or extents than allowed.
    Count,
    /// A field has no such value.
    Value,
    /// A message number that we do not speak. A server answers Rlerror EOPNOTSUPP.
    Unknown(u8),
}

/// A cursor over a message's body; every step is checked. For messages of other dialects too.
pub struct Reader<'a> {
    /// What is not read yet.
    pub rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub fn take(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (now, rest) = self.rest.split_at_checked(len).ok_or(Malformed::Short)?;
        self.rest = rest;
        Ok(now)
    }

    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        Ok(bytes)
    }

    pub fn u8(&mut self) -> Result<u8, Malformed> {
        Ok(self.array::<1>()?[0])
    }

    pub fn u16(&mut self) -> Result<u16, Malformed> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub fn u64(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub fn text(&mut self) -> Result<&'a str, Malformed> {
        let len = usize::from(self.u16()?);
        let text = core::str::from_utf8(self.take(len)?).map_err(|_| Malformed::Text)?;
        if text.contains('\0') { Err(Malformed::Text) } else { Ok(text) }
    }

    pub fn qid(&mut self) -> Result<Qid, Malformed> {
        Ok(Qid { kind: self.u8()?, version: self.u32()?, path: self.u64()? })
    }

    /// A u16 count, then that many of `item`.
    pub fn list<T, const N: usize>(
        &mut self,
        mut item: impl FnMut(&mut Self) -> Result<T, Malformed>,
    ) -> Result<Vec<T, N>, Malformed> {
        let mut list = Vec::new();
        for _ in 0..self.u16()? {
            list.push(item(self)?).map_err(|_| Malformed::Count)?;
        }
        Ok(list)
    }
}

/// Appends fields; once something did not fit, nothing more is written and `finish` is `None`.
/// Builds a message; never writes beyond its buffer.
pub struct Writer<'a> {
    into: &'a mut [u8],
    len: usize,
    fits: bool,
}

impl<'a> Writer<'a> {
    pub fn new(into: &'a mut [u8], id: u8, tag: u16) -> Writer<'a> {
        let mut writer = Writer { into, len: 0, fits: true };
        writer.u32(0);
        writer.u8(id);
        writer.u16(tag);
        writer
    }

    pub fn put(&mut self, bytes: &[u8]) {
        match self.into.get_mut(self.len..).and_then(|rest| rest.get_mut(..bytes.len())) {
            Some(slot) if self.fits => {
                slot.copy_from_slice(bytes);
                self.len += bytes.len();
            }
            _ => self.fits = false,
        }
    }

    pub fn u8(&mut self, value: u8) {
        self.put(&[value]);
    }

    pub fn u16(&mut self, value: u16) {
        self.put(&value.to_le_bytes());
    }

    pub fn u32(&mut self, value: u32) {
        self.put(&value.to_le_bytes());
    }

    pub fn u64(&mut self, value: u64) {
        self.put(&value.to_le_bytes());
    }

    pub fn text(&mut self, text: &str) {
        match u16::try_from(text.len()) {
            Ok(len) => self.u16(len),
            Err(_) => self.fits = false,
        }
        self.put(text.as_bytes());
    }

    pub fn qid(&mut self, qid: Qid) {
        self.u8(qid.kind);
        self.u32(qid.version);
        self.u64(qid.path);
    }

    pub fn zeros(&mut self, count: usize) {
        (0..count).for_each(|_| self.u8(0));
    }

    /// Enters the size, `data` bytes that follow included. Returns the bytes written here.
    pub fn finish(&mut self, data: u32) -> Option<usize> {
        let size = u32::try_from(self.len).ok()?.checked_add(data)?;
        if !self.fits {
            return None;
        }
        self.into[..4].copy_from_slice(&size.to_le_bytes());
        Some(self.len)
    }
}

impl<'a> Request<'a> {
    /// From a message's head and a private copy of what follows it: for a Twrite at least the
    /// 16 bytes before its data, for all others everything.
    pub fn parse(head: MessageHead, body: &'a [u8]) -> Result<Request<'a>, Malformed> {
        let r = &mut Reader { rest: body };
        if head.id == id::TWRITE {
            let (fid, offset, count) = (r.u32()?, r.u64()?, r.u32()?);
            prove_data(head, TWRITE_BYTES, count)?;
            return Ok(Request::Write { fid, offset, count });
        }
        prove_whole(head, body)?;
        let request = match head.id {
            id::TVERSION => Request::Version { msize: r.u32()?, version: r.text()? },
            id::TATTACH => Request::Attach {
                fid: r.u32()?,
                afid: r.u32()?,
                uname: r.text()?,
                aname: r.text()?,
                n_uname: r.u32()?,
            },
            id::TWALK => {
                Request::Walk { fid: r.u32()?, newfid: r.u32()?, names: r.list(Reader::text)? }
            }
            id::TLOPEN => Request::Lopen { fid: r.u32()?, flags: r.u32()? },
            id::TGETATTR => Request::Getattr { fid: r.u32()?, mask: r.u64()? },
            id::TSETATTR => parse_setattr(r)?,
            id::TREAD => Request::Read { fid: r.u32()?, offset: r.u64()?, count: r.u32()? },
            id::TFSYNC => Request::Fsync { fid: r.u32()?, datasync: r.u32()? },
            id::TCLUNK => Request::Clunk { fid: r.u32()? },
            id::TFLUSH => Request::Flush { oldtag: r.u16()? },
            id::TALLOCATE => Request::Allocate {
                fid: r.u32()?,
                mode: AllocateMode::parse(r.u32()?)?,
                offset: r.u64()?,
                len: r.u64()?,
            },
            id::TEXTENTS => Request::Extents { fid: r.u32()?, offset: r.u64()?, len: r.u64()? },
            other => return Err(Malformed::Unknown(other)),
        };
        if r.rest.is_empty() { Ok(request) } else { Err(Malformed::Length) }
    }

    /// The message's number.
    pub fn id(&self) -> u8 {
        match self {
            Request::Version { .. } => id::TVERSION,
            Request::Attach { .. } => id::TATTACH,
            Request::Walk { .. } => id::TWALK,
            Request::Lopen { .. } => id::TLOPEN,
            Request::Getattr { .. } => id::TGETATTR,
            Request::Setattr { .. } => id::TSETATTR,
            Request::Read { .. } => id::TREAD,
            Request::Write { .. } => id::TWRITE,
            Request::Fsync { .. } => id::TFSYNC,
            Request::Clunk { .. } => id::TCLUNK,
            Request::Flush { .. } => id::TFLUSH,
            Request::Allocate { .. } => id::TALLOCATE,
            Request::Extents { .. } => id::TEXTENTS,
        }
    }

    /// Writes the message, a Twrite's data excepted but counted in its size. Returns the bytes
    /// written; `None` when they do not fit `into`.
    pub fn emit(&self, tag: u16, into: &mut [u8]) -> Option<usize> {
        let w = &mut Writer::new(into, self.id(), tag);
        let mut data = 0;
        match self {
            Request::Version { msize, version } => {
                w.u32(*msize);
                w.text(version);
            }
            Request::Attach { fid, afid, uname, aname, n_uname } => {
                w.u32(*fid);
                w.u32(*afid);
                w.text(uname);
                w.text(aname);
                w.u32(*n_uname);
            }
            Request::Walk { fid, newfid, names } => {
                w.u32(*fid);
                w.u32(*newfid);
                w.u16(names.len() as u16);
                names.iter().for_each(|name| w.text(name));
            }
            Request::Getattr { fid, mask } => {
                w.u32(*fid);
                w.u64(*mask);
            }
            Request::Setattr { fid, valid, size } => {
                w.u32(*fid);
                w.u32(*valid);
                w.zeros(12); // mode, uid, gid
                w.u64(*size);
                w.zeros(32); // atime and mtime, seconds and nanoseconds
            }
            Request::Write { fid, offset, count } | Request::Read { fid, offset, count } => {
                w.u32(*fid);
                w.u64(*offset);
                w.u32(*count);
                data = if self.id() == id::TWRITE { *count } else { 0 };
            }
            Request::Lopen { fid, flags: word } | Request::Fsync { fid, datasync: word } => {
                w.u32(*fid);
                w.u32(*word);
            }
            Request::Clunk { fid } => w.u32(*fid),
            Request::Flush { oldtag } => w.u16(*oldtag),
            Request::Allocate { fid, mode, offset, len } => {
                w.u32(*fid);
                w.u32(mode.wire());
                w.u64(*offset);
                w.u64(*len);
            }
            Request::Extents { fid, offset, len } => {
                w.u32(*fid);
                w.u64(*offset);
                w.u64(*len);
            }
        }
        w.finish(data)
    }
}

fn parse_setattr<'a>(r: &mut Reader<'a>) -> Result<Request<'a>, Malformed> {
    let (fid, valid) = (r.u32()?, r.u32()?);
    r.take(12)?; // mode, uid, gid
    let size = r.u64()?;
    r.take(32)?; // atime and mtime, seconds and nanoseconds
    Ok(Request::Setattr { fid, valid, size })
}

impl<'a> Answer<'a> {
    /// From a message's head and a private copy of what follows it: for an Rread at least the
    /// 4 bytes before its data, for all others everything.
    pub fn parse(head: MessageHead, body: &'a [u8]) -> Result<Answer<'a>, Malformed> {
        let r = &mut Reader { rest: body };
        if head.id == id::TREAD + 1 {
            let count = r.u32()?;
            prove_data(head, RREAD_BYTES, count)?;
            return Ok(Answer::Read { count });
        }
        prove_whole(head, body)?;
        if head.id == id::RLERROR {
            let answer = Answer::Lerror { ecode: r.u32()? };
            return if r.rest.is_empty() { Ok(answer) } else { Err(Malformed::Length) };
        }
        let request = head.id.checked_sub(1).ok_or(Malformed::Unknown(head.id))?;
        let answer = match request {
            id::TVERSION => Answer::Version { msize: r.u32()?, version: r.text()? },
            id::TATTACH => Answer::Attach { qid: r.qid()? },
            id::TWALK => Answer::Walk { qids: r.list(Reader::qid)? },
            id::TLOPEN => Answer::Lopen { qid: r.qid()?, iounit: r.u32()? },
            id::TGETATTR => parse_getattr(r)?,
            id::TSETATTR => Answer::Setattr,
            id::TWRITE => Answer::Write { count: r.u32()? },
            id::TFSYNC => Answer::Fsync,
            id::TCLUNK => Answer::Clunk,
            id::TFLUSH => Answer::Flush,
            id::TALLOCATE => Answer::Allocate,
            id::TEXTENTS => {
                let end = r.u64()?;
                let extents = r.list(|r| Ok(Extent { offset: r.u64()?, len: r.u64()? }))?;
                Answer::Extents { end, extents }
            }
            _ => return Err(Malformed::Unknown(head.id)),
        };
        if r.rest.is_empty() { Ok(answer) } else { Err(Malformed::Length) }
    }

    /// The message's number.
    pub fn id(&self) -> u8 {
        match self {
            Answer::Lerror { .. } => id::RLERROR,
            Answer::Version { .. } => id::TVERSION + 1,
            Answer::Attach { .. } => id::TATTACH + 1,
            Answer::Walk { .. } => id::TWALK + 1,
            Answer::Lopen { .. } => id::TLOPEN + 1,
            Answer::Getattr { .. } => id::TGETATTR + 1,
            Answer::Setattr => id::TSETATTR + 1,
            Answer::Read { .. } => id::TREAD + 1,
            Answer::Write { .. } => id::TWRITE + 1,
            Answer::Fsync => id::TFSYNC + 1,
            Answer::Clunk => id::TCLUNK + 1,
            Answer::Flush => id::TFLUSH + 1,
            Answer::Allocate => id::TALLOCATE + 1,
            Answer::Extents { .. } => id::TEXTENTS + 1,
        }
    }

    /// Writes the message, an Rread's data excepted but counted in its size. Returns the bytes
    /// written; `None` when they do not fit `into`.
    pub fn emit(&self, tag: u16, into: &mut [u8]) -> Option<usize> {
        let w = &mut Writer::new(into, self.id(), tag);
        let mut data = 0;
        match self {
            Answer::Lerror { ecode: word } | Answer::Write { count: word } => w.u32(*word),
            Answer::Version { msize, version } => {
                w.u32(*msize);
                w.text(version);
            }
            Answer::Attach { qid } => w.qid(*qid),
            Answer::Walk { qids } => {
                w.u16(qids.len() as u16);
                qids.iter().for_each(|qid| w.qid(*qid));
            }
            Answer::Lopen { qid, iounit } => {
                w.qid(*qid);
                w.u32(*iounit);
            }
            Answer::Getattr { qid, mode, size, blksize, blocks } => {
                w.u64(GETATTR_BASIC);
                w.qid(*qid);
                w.u32(*mode);
                w.zeros(8); // uid, gid
                w.u64(1); // nlink
                w.u64(0); // rdev
                w.u64(*size);
                w.u64(*blksize);
                w.u64(*blocks);
                w.zeros(80); // four times, then gen and data_version
            }
            Answer::Read { count } => {
                w.u32(*count);
                data = *count;
            }
            Answer::Extents { end, extents } => {
                w.u64(*end);
                w.u16(extents.len() as u16);
                for extent in extents {
                    w.u64(extent.offset);
                    w.u64(extent.len);
                }
            }
            Answer::Setattr | Answer::Fsync | Answer::Clunk | Answer::Flush | Answer::Allocate => {}
        }
        w.finish(data)
    }
}

/// valid[8] qid[13] mode[4] uid[4] gid[4] nlink[8] rdev[8] size[8] blksize[8] blocks[8], then
/// atime, mtime, ctime, btime (16 each), gen[8], data_version[8].
fn parse_getattr<'a>(r: &mut Reader<'a>) -> Result<Answer<'a>, Malformed> {
    r.u64()?;
    let (qid, mode) = (r.qid()?, r.u32()?);
    r.take(8 + 16)?;
    let (size, blksize, blocks) = (r.u64()?, r.u64()?, r.u64()?);
    r.take(80)?;
    Ok(Answer::Getattr { qid, mode, size, blksize, blocks })
}

/// The message is `before` bytes and `count` bytes of data, no more and no less.
fn prove_data(head: MessageHead, before: u32, count: u32) -> Result<(), Malformed> {
    if before.checked_add(count) == Some(head.size) { Ok(()) } else { Err(Malformed::Length) }
}

fn prove_whole(head: MessageHead, body: &[u8]) -> Result<(), Malformed> {
    let rest = head.size.checked_sub(platter_xen::ninepfs::HEAD_BYTES).ok_or(Malformed::Short)?;
    if rest as usize == body.len() { Ok(()) } else { Err(Malformed::Length) }
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
