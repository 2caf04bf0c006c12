//! The part of 9P2000.L that platter's client has no use for and other clients (Linux) have:
//! names are created, listed and removed. What both speak is in storage's codec.

use platter_storage::ninep::message::{GETATTR_BASIC, Malformed, Qid, Reader, Writer};
use rustix::fs::Stat;

/// Message numbers (9P2000.L, and 9P2000 for TREMOVE).
pub mod id {
    pub const TSTATFS: u8 = 8;
    pub const TLCREATE: u8 = 14;
    pub const TRENAME: u8 = 20;
    pub const TREADDIR: u8 = 40;
    pub const TLOCK: u8 = 52;
    pub const TGETLOCK: u8 = 54;
    pub const TMKDIR: u8 = 72;
    pub const TRENAMEAT: u8 = 74;
    pub const TUNLINKAT: u8 = 76;
    pub const TREMOVE: u8 = 122;
}

/// `AT_REMOVEDIR` of Tunlinkat's flags.
pub const REMOVE_DIRECTORY: u32 = 0x200;

/// A request of this part.
#[derive(Debug, PartialEq, Eq)]
pub enum More<'a> {
    Statfs { fid: u32 },
    Lcreate { fid: u32, name: &'a str, flags: u32, mode: u32 },
    Rename { fid: u32, dfid: u32, name: &'a str },
    Readdir { fid: u32, offset: u64, count: u32 },
    Lock { fid: u32, lock: Lock<'a> },
    Getlock { fid: u32, lock: Lock<'a> },
    Mkdir { dfid: u32, name: &'a str, mode: u32 },
    Renameat { from: u32, old: &'a str, to: u32, new: &'a str },
    Unlinkat { dfid: u32, name: &'a str, flags: u32 },
    Remove { fid: u32 },
}

/// What Tlock and Tgetlock say of a lock.
#[derive(Debug, PartialEq, Eq)]
pub struct Lock<'a> {
    pub kind: u8,
    pub start: u64,
    pub len: u64,
    pub process: u32,
    pub client: &'a str,
}

impl<'a> More<'a> {
    /// `Ok(None)` for a number that is not of this part either.
    pub fn parse(id: u8, body: &'a [u8]) -> Result<Option<More<'a>>, Malformed> {
        let r = &mut Reader { rest: body };
        let request = match id {
            id::TSTATFS => More::Statfs { fid: r.u32()? },
            id::TLCREATE => {
                let (fid, name, flags, mode) = (r.u32()?, r.text()?, r.u32()?, r.u32()?);
                r.u32()?; // gid: files belong to the server's user
                More::Lcreate { fid, name, flags, mode }
            }
            id::TRENAME => More::Rename { fid: r.u32()?, dfid: r.u32()?, name: r.text()? },
            id::TREADDIR => More::Readdir { fid: r.u32()?, offset: r.u64()?, count: r.u32()? },
            id::TLOCK => {
                let (fid, kind) = (r.u32()?, r.u8()?);
                r.u32()?; // flags: to wait, which the client does, and to reclaim
                More::Lock { fid, lock: lock(r, kind)? }
            }
            id::TGETLOCK => {
                let (fid, kind) = (r.u32()?, r.u8()?);
                More::Getlock { fid, lock: lock(r, kind)? }
            }
            id::TMKDIR => {
                let (dfid, name, mode) = (r.u32()?, r.text()?, r.u32()?);
                r.u32()?; // gid, as above
                More::Mkdir { dfid, name, mode }
            }
            id::TRENAMEAT => {
                More::Renameat { from: r.u32()?, old: r.text()?, to: r.u32()?, new: r.text()? }
            }
            id::TUNLINKAT => More::Unlinkat { dfid: r.u32()?, name: r.text()?, flags: r.u32()? },
            id::TREMOVE => More::Remove { fid: r.u32()? },
            _ => return Ok(None),
        };
        if r.rest.is_empty() { Ok(Some(request)) } else { Err(Malformed::Length) }
    }
}

/// Rgetattr with all that platter's client does not ask for. Files are the frontend's root's.
pub fn getattr(w: &mut Writer, qid: Qid, stat: &Stat) {
    w.u64(GETATTR_BASIC);
    w.qid(qid);
    w.u32(stat.st_mode);
    w.zeros(8); // uid, gid
    w.u64(stat.st_nlink);
    w.u64(0); // rdev
    w.u64(stat.st_size as u64);
    w.u64(stat.st_blksize as u64);
    w.u64(stat.st_blocks as u64);
    for (seconds, nanoseconds) in [
        (stat.st_atime, stat.st_atime_nsec),
        (stat.st_mtime, stat.st_mtime_nsec),
        (stat.st_ctime, stat.st_ctime_nsec),
    ] {
        w.u64(seconds as u64);
        w.u64(nanoseconds);
    }
    w.zeros(32); // btime, gen and data_version
}

/// What Tsetattr is to change, as Linux's `struct iattr` has it.
#[derive(Debug, PartialEq, Eq)]
pub struct Attributes {
    pub mode: Option<u32>,
    /// To whom the file is to belong; `None` leaves it.
    pub user: Option<u32>,
    pub group: Option<u32>,
    pub size: Option<u64>,
    pub accessed: Option<Time>,
    pub modified: Option<Time>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Time {
    Now,
    At { seconds: u64, nanoseconds: u64 },
}

impl Attributes {
    /// Of a Tsetattr, behind its fid. A bit that is not known here is no attribute of Linux's.
    pub fn parse(body: &[u8]) -> Result<Attributes, Malformed> {
        let r = &mut Reader { rest: body };
        let valid = r.u32()?;
        let has = |bit: u32| valid & 1 << bit != 0;
        let (mode, user, group, size) = (r.u32()?, r.u32()?, r.u32()?, r.u64()?);
        let mut time = |bit: u32, bit_given: u32| {
            let at = Time::At { seconds: r.u64()?, nanoseconds: r.u64()? };
            Ok(has(bit).then_some(if has(bit_given) { at } else { Time::Now }))
        };
        let (accessed, modified) = (time(4, 7)?, time(5, 8)?);
        Ok(Attributes {
            mode: has(0).then_some(mode),
            user: has(1).then_some(user),
            group: has(2).then_some(group),
            size: has(3).then_some(size),
            accessed,
            modified,
        })
    }
}

fn lock<'a>(r: &mut Reader<'a>, kind: u8) -> Result<Lock<'a>, Malformed> {
    let (start, len, process) = (r.u64()?, r.u64()?, r.u32()?);
    Ok(Lock { kind, start, len, process, client: r.text()? })
}

/// Would miss: what is done about a request.
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lcreate_as_linux_sends_it() {
        // fid 3, name "a", O_RDWR | O_CREAT, 0644, gid 0.
        let body = [3, 0, 0, 0, 1, 0, b'a', 0x42, 0, 0, 0, 0xa4, 1, 0, 0, 0, 0, 0, 0];
        let request = More::parse(id::TLCREATE, &body);
        let expected = More::Lcreate { fid: 3, name: "a", flags: 0x42, mode: 0o644 };
        assert_eq!(request, Ok(Some(expected)));
    }

    #[test]
    fn short_long_and_unknown_ones_are_told_apart() {
        assert_eq!(More::parse(id::TSTATFS, &[1, 0, 0]), Err(Malformed::Short));
        assert_eq!(More::parse(id::TSTATFS, &[1, 0, 0, 0, 9]), Err(Malformed::Length));
        assert_eq!(More::parse(99, &[]), Ok(None));
    }
}
