//! Locks on image files, the ones that QEMU takes (block/file-posix.c): one byte for each thing
//! that the holder does, one for each that it does not let others do. A lock belongs to the open
//! file and goes with it.
//!
//! It must never wait: a file that others hold is refused at once.

use std::fs::File;
use std::io;

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use platter_image::Access;

/// QEMU's RAW_LOCK_PERM_BASE and RAW_LOCK_SHARED_BASE.
const DOES_BASE: i64 = 100;
const KEEPS_BASE: i64 = 200;
/// QEMU's permissions, by bit.
const READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// Locks a file for what will be done with it, or says who is in the way. A filesystem without
/// locks has none.
pub fn lock(file: &File, access: Access) -> io::Result<()> {
    let does: &[i64] = match access {
        Access::ReadOnly => &[READ],
        Access::ReadWrite => &[READ, WRITE, RESIZE],
    };
    // Nobody else may write or resize what we read or write.
    let keeps = [WRITE, RESIZE];
    let ours = does.iter().map(|bit| DOES_BASE + bit);
    for byte in ours.chain(keeps.iter().map(|bit| KEEPS_BASE + bit)) {
        // A shared lock of one byte: only a program with other rules can have it alone.
        let request = flock(byte, libc::F_RDLCK);
        match fcntl(file, FcntlArg::F_OFD_SETLK(&request)) {
            Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => return Err(held(WRITE)),
            Err(_) => return Ok(()),
            Ok(_) => {}
        }
    }
    let against = does.iter().map(|bit| (KEEPS_BASE + bit, *bit));
    for (byte, bit) in against.chain(keeps.iter().map(|bit| (DOES_BASE + bit, *bit))) {
        let mut request = flock(byte, libc::F_WRLCK);
        let asked = fcntl(file, FcntlArg::F_OFD_GETLK(&mut request));
        if asked.is_ok() && i32::from(request.l_type) != libc::F_UNLCK {
            let writes = (DOES_BASE..KEEPS_BASE).contains(&byte);
            return Err(if writes { held(bit) } else { kept() });
        }
    }
    Ok(())
}

fn flock(byte: i64, kind: i32) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

fn held(bit: i64) -> io::Error {
    let what = if bit == RESIZE { "resizing" } else { "writing to" };
    let why = format!("another program is {what} it (-U reads it all the same)");
    io::Error::new(io::ErrorKind::ResourceBusy, why)
}

fn kept() -> io::Error {
    let why = "another program is using it and lets nobody change it";
    io::Error::new(io::ErrorKind::ResourceBusy, why)
}

#[cfg(test)]
mod tests {
    //! Would miss: whether QEMU sees our locks; the command line's tests ask it.

    use super::*;

    #[test]
    fn one_writer_or_many_readers() {
        let path = std::env::temp_dir().join(format!("platter-lock-{}", std::process::id()));
        std::fs::write(&path, b"x").unwrap();
        let open = || File::options().read(true).write(true).open(&path).unwrap();
        let (first, second, third) = (open(), open(), open());
        lock(&first, Access::ReadOnly).unwrap();
        lock(&second, Access::ReadOnly).unwrap();
        assert!(lock(&third, Access::ReadWrite).is_err());
        drop((first, second, third));
        let (first, second) = (open(), open());
        lock(&first, Access::ReadWrite).unwrap();
        let why = lock(&second, Access::ReadOnly).unwrap_err().to_string();
        assert!(why.contains("writing"), "{why}");
        drop(first);
        let third = open();
        drop(second);
        lock(&third, Access::ReadWrite).unwrap();
        std::fs::remove_file(&path).unwrap();
    }
}
