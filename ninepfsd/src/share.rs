//! One directory that a domain may reach, and nothing above, beside or linked from it.
//!
//! Every path is opened beneath the share's root by openat2 with RESOLVE_BENEATH and
//! RESOLVE_NO_SYMLINKS (Linux 5.6): the kernel keeps the promise, not our string handling.
//! Only regular files and directories are ever opened.

use std::ffi::CStr;
use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, ResolveFlags, Stat, StatFs, fchmod, fstat,
    mkdirat, openat, openat2, renameat_with, statat, unlinkat,
};
use rustix::io::Errno;

use crate::usage::{Charge, Counted, FILES_MAX, Usage};

/// What becomes of a file's bytes in the page cache of this domain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Cache {
    /// They stay there; writes reach the disk when they are synced or the kernel wants to.
    #[default]
    Writeback,
    /// They leave as soon as the disk has them (Linux 6.14, ext4 and XFS; else as writeback).
    Dontcache,
    /// What is aligned to 4 KiB goes past it (O_DIRECT), by way of a worker.
    Direct,
}

/// What the administrator allows for a share.
#[derive(Clone, Copy, Debug, Default)]
pub struct Policy {
    pub read_only: bool,
    /// Largest size that a file may be given, bytes; 0 for none.
    pub file_bytes_max: u64,
    /// The space that all files together may take, bytes; 0 for none.
    pub share_bytes_max: u64,
    pub cache: Cache,
}

impl Policy {
    /// With another limit for the share's space; the lower one counts, 0 is none.
    pub fn within(self, bytes_max: u64) -> Policy {
        let limits = [self.share_bytes_max, bytes_max];
        let share_bytes_max = limits.into_iter().filter(|bytes| *bytes > 0).min().unwrap_or(0);
        Policy { share_bytes_max, ..self }
    }
}

pub struct Share {
    root: File,
    /// The device that the root lies on.
    device: u64,
    pub policy: Policy,
    /// Of a share whose space is limited.
    usage: Option<Arc<Usage>>,
}

const RESOLVE: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS);

impl Share {
    pub fn open(root: &Path, policy: Policy) -> std::io::Result<Share> {
        Share::open_below(root, Path::new("."), policy)
    }

    /// Opens `path` below a directory, which no link in it leads out of.
    pub fn open_below(directory: &Path, path: &Path, policy: Policy) -> std::io::Result<Share> {
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        // It need not be readable itself.
        let directory = openat(CWD, directory, flags | OFlags::PATH, Mode::empty())?;
        let root = openat2(&directory, path, flags, Mode::empty(), ResolveFlags::BENEATH)?;
        let root = File::from(root);
        let usage = (policy.share_bytes_max > 0).then(|| Usage::of(&root)).transpose()?;
        let device = fstat(&root)?.st_dev;
        let share = Share { root, device, policy, usage };
        Ok(share)
    }

    /// A name as one component of a path: never empty, `.`, `..`, nor with a slash in it.
    pub fn join(directory: &str, name: &str) -> Result<String, Errno> {
        if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']) {
            return Err(Errno::NOENT);
        }
        Ok(if directory.is_empty() { name.to_string() } else { format!("{directory}/{name}") })
    }

    /// What a frontend knows a file by: inodes of other file systems, mounted below the root, are
    /// told apart from the root's own.
    pub fn number_of(&self, device: u64, inode: u64) -> u64 {
        inode ^ (device ^ self.device).rotate_left(40)
    }

    /// Opens a path relative to the root; the root itself is the empty path.
    pub fn open_at(&self, path: &str, flags: OFlags, mode: Mode) -> Result<File, Errno> {
        let path = if path.is_empty() { "." } else { path };
        // A path alone is not opened: a device or FIFO does nothing then, and openat2 wants
        // no other flags.
        let safe = OFlags::NOCTTY | OFlags::NONBLOCK;
        let safe = if flags.contains(OFlags::PATH) { OFlags::empty() } else { safe };
        let flags = flags | safe | OFlags::CLOEXEC;
        openat2(&self.root, path, flags, mode, RESOLVE).map(File::from)
    }

    /// What lies at a path; only regular files and directories exist for a frontend.
    pub fn stat(&self, path: &str) -> Result<Stat, Errno> {
        let stat = fstat(self.open_at(path, OFlags::PATH, Mode::empty())?)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile | FileType::Directory => Ok(stat),
            _ => Err(Errno::ACCESS),
        }
    }

    /// Opens a directory in one that is open.
    pub fn open_folder(at: &File, name: &CStr) -> Result<File, Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        openat2(at, name, flags, Mode::empty(), RESOLVE).map(File::from)
    }

    /// Opens a regular file or a directory for reading, or a file for writing too; cut and with
    /// writes that wait for the disk where `how` says so.
    pub fn open_file(&self, path: &str, write: bool, how: OFlags) -> Result<File, Errno> {
        self.stat(path)?;
        let truncate = how.contains(OFlags::TRUNC);
        if write || truncate {
            self.prove_writable()?;
        }
        let flags = access(write) | synced(how) | how & OFlags::TRUNC;
        let file = self.open_at(path, flags, Mode::empty())?;
        if truncate {
            self.shrank();
        }
        // It may have been exchanged since the look above.
        match FileType::from_raw_mode(fstat(&file)?.st_mode) {
            FileType::RegularFile | FileType::Directory => Ok(file),
            _ => Err(Errno::ACCESS),
        }
    }

    /// The same file once more, past the page cache; `None` where its file system cannot.
    pub fn open_direct(&self, path: &str, write: bool, how: OFlags, same: &File) -> Option<File> {
        if self.policy.cache != Cache::Direct {
            return None;
        }
        let flags = access(write) | synced(how) | OFlags::DIRECT;
        let file = self.open_at(path, flags, Mode::empty()).ok()?;
        let (this, that) = (fstat(&file).ok()?, fstat(same).ok()?);
        let is_regular = FileType::from_raw_mode(this.st_mode) == FileType::RegularFile;
        let is_same = (this.st_dev, this.st_ino) == (that.st_dev, that.st_ino);
        (is_regular && is_same).then_some(file)
    }

    /// Makes a file that the server itself can always open again; one that is there already is
    /// opened, and cut where that is asked, unless it must be new.
    pub fn create(&self, path: &str, mode: u32, how: OFlags) -> Result<File, Errno> {
        self.prove_writable()?;
        self.charge_name()?;
        if !how.contains(OFlags::EXCL) {
            // A device or FIFO is not even opened.
            match self.stat(path) {
                Ok(_) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(errno),
            }
        }
        let how_made = how & (OFlags::EXCL | OFlags::TRUNC);
        let flags = OFlags::RDWR | OFlags::CREATE | how_made | synced(how);
        let file = self.open_at(path, flags, Mode::from_raw_mode(mode & 0o777 | 0o600))?;
        if how.contains(OFlags::TRUNC) {
            self.shrank();
        }
        match FileType::from_raw_mode(fstat(&file)?.st_mode) {
            FileType::RegularFile => Ok(file),
            _ => Err(Errno::ACCESS),
        }
    }

    /// The rights to a file or directory, of which the server itself keeps its own.
    pub fn set_mode(file: &File, mode: u32) -> Result<(), Errno> {
        let is_directory = FileType::from_raw_mode(fstat(file)?.st_mode) == FileType::Directory;
        let own = if is_directory { 0o700 } else { 0o600 };
        fchmod(file, Mode::from_raw_mode(mode & 0o777 | own))
    }

    /// Makes a directory that the server itself can always read: what lies in others that it may
    /// write to would not be counted.
    pub fn make_directory(&self, directory: &str, name: &str, mode: u32) -> Result<(), Errno> {
        self.prove_writable()?;
        self.charge_name()?;
        let at = self.directory(directory)?;
        mkdirat(&at, name, Mode::from_raw_mode(mode & 0o777 | 0o700))
    }

    pub fn remove(&self, directory: &str, name: &str, is_directory: bool) -> Result<(), Errno> {
        self.prove_writable()?;
        let flags = if is_directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        unlinkat(&self.directory(directory)?, name, flags)?;
        self.shrank();
        Ok(())
    }

    pub fn rename(&self, (from, old): (&str, &str), (to, new): (&str, &str)) -> Result<(), Errno> {
        self.prove_writable()?;
        let (from, to) = (self.directory(from)?, self.directory(to)?);
        renameat_with(&from, old, &to, new, RenameFlags::empty())?;
        self.shrank();
        Ok(())
    }

    /// What an entry of an open directory is, if it exists for a frontend.
    pub fn kind_of(directory: &File, name: &str, kind: FileType) -> Option<FileType> {
        if name == "." || name == ".." {
            return None;
        }
        let kind = match kind {
            FileType::Unknown => {
                let stat = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
                FileType::from_raw_mode(stat.st_mode)
            }
            kind => kind,
        };
        matches!(kind, FileType::Directory | FileType::RegularFile).then_some(kind)
    }

    /// The file system's figures, within what the share is allowed.
    pub fn statfs(&self) -> Result<StatFs, Errno> {
        let mut stat = rustix::fs::fstatfs(&self.root)?;
        if let Some(used) = self.usage_now() {
            let (used, limit) = (used?, self.policy.share_bytes_max);
            let blocks = |bytes: u64| bytes / (stat.f_bsize as u64).max(1);
            let (all, free) = (blocks(limit), blocks(limit.saturating_sub(used.bytes)));
            stat.f_blocks = stat.f_blocks.min(all);
            stat.f_bfree = stat.f_bfree.min(free);
            stat.f_bavail = stat.f_bavail.min(free);
            stat.f_files = stat.f_files.min(FILES_MAX);
            stat.f_ffree = stat.f_ffree.min(FILES_MAX.saturating_sub(used.files));
        }
        Ok(stat)
    }

    /// May a file be made so long?
    pub fn prove_size(&self, end_bytes: u64) -> Result<(), Errno> {
        let max = self.policy.file_bytes_max;
        if max > 0 && end_bytes > max { Err(Errno::FBIG) } else { Ok(()) }
    }

    /// Whether there is space for a change of `range` of a file. Keep the answer until it is made.
    pub fn charge(&self, file: &File, range: Range<u64>) -> Result<Option<Charge>, Errno> {
        self.usage.as_ref().map(|usage| usage.charge(self, file, range)).transpose()
    }

    /// For a request that gives space back; drop it once that is done.
    pub fn giving_back(&self) -> Option<Charge> {
        self.usage.as_ref().map(Usage::giving_back)
    }

    /// A frontend has this file from now on.
    pub fn opened(&self, file: &Arc<File>) {
        if let Some(usage) = &self.usage {
            usage.opened(file);
        }
    }

    fn charge_name(&self) -> Result<(), Errno> {
        self.usage.as_ref().map_or(Ok(()), |usage| usage.charge_name(self))
    }

    /// Something was removed, or cut, or closed for the last time.
    pub fn shrank(&self) {
        if let Some(usage) = &self.usage {
            usage.shrank();
        }
    }

    /// The count of a share whose space is limited; it is made anew once nobody has it.
    pub fn usage(&self) -> Option<Arc<Usage>> {
        self.usage.clone()
    }

    /// What is in use of a share whose space is limited.
    pub fn usage_now(&self) -> Option<Result<Counted, Errno>> {
        self.usage.as_ref().map(|usage| usage.now(self))
    }

    pub fn prove_writable(&self) -> Result<(), Errno> {
        if self.policy.read_only { Err(Errno::ROFS) } else { Ok(()) }
    }

    fn directory(&self, path: &str) -> Result<File, Errno> {
        self.open_at(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())
    }
}

/// rustix takes O_SYNC's bits for it.
pub const DSYNC: OFlags = OFlags::from_bits_retain(libc::O_DSYNC as u32);

/// Whether a write waits for the disk, as openat2 is told: of O_SYNC's two bits a client may send
/// one.
pub fn synced(how: OFlags) -> OFlags {
    if how.intersects(OFlags::SYNC.difference(DSYNC)) { OFlags::SYNC } else { how & DSYNC }
}

fn access(write: bool) -> OFlags {
    if write { OFlags::RDWR } else { OFlags::RDONLY }
}

/// Would miss: what a hostile administrator does; the shares are the administrator's.
#[cfg(test)]
pub(crate) mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn share(policy: Policy) -> (tempdir::TempDir, Share) {
        let dir = tempdir::TempDir::new();
        std::fs::write(dir.path().join("file"), b"content").expect("a file");
        std::fs::create_dir(dir.path().join("sub")).expect("a directory");
        symlink("/etc/passwd", dir.path().join("link")).expect("a link");
        symlink("sub", dir.path().join("inner")).expect("a link");
        let share = Share::open(dir.path(), policy).expect("a share");
        (dir, share)
    }

    #[test]
    fn nothing_outside_or_linked_is_reached() {
        let (_dir, share) = share(Policy::default());
        assert!(share.stat("file").is_ok());
        for path in ["../etc/passwd", "link", "inner", "sub/../../etc", "/etc/passwd"] {
            assert!(share.stat(path).is_err(), "{path}");
            assert!(share.open_file(path, false, OFlags::empty()).is_err(), "{path}");
        }
        for name in ["", ".", "..", "a/b", "a\0b"] {
            assert!(Share::join("sub", name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn no_share_lies_behind_a_link_that_leads_out() {
        let (dir, _share) = share(Policy::default());
        symlink("..", dir.path().join("out")).expect("a link");
        symlink("/", dir.path().join("sub/root")).expect("a link");
        let open = |path| Share::open_below(dir.path(), Path::new(path), Policy::default()).is_ok();
        assert!(open("") && open("sub") && open("./sub/") && open("inner"));
        for path in ["out", "sub/root", "sub/root/etc", "inner/../..", "file", "none"] {
            assert!(!open(path), "{path}");
        }
    }

    #[test]
    fn special_files_do_not_exist() {
        let (dir, share) = share(Policy::default());
        let fifo = dir.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, Mode::from_raw_mode(0o600)).expect("a fifo");
        assert_eq!(share.stat("fifo").map(|_| ()), Err(Errno::ACCESS));
        assert_eq!(share.open_file("fifo", false, OFlags::empty()).map(|_| ()), Err(Errno::ACCESS));
        let root = share.open_file("", false, OFlags::empty()).expect("the root");
        let kind = |name| Share::kind_of(&root, name, FileType::Unknown);
        assert_eq!((kind("file"), kind("fifo")), (Some(FileType::RegularFile), None));
        assert_eq!((kind("link"), kind("..")), (None, None));
    }

    #[test]
    fn what_is_there_is_created_only_where_it_need_not_be_new() {
        let (dir, share) = share(Policy::default());
        let fifo = dir.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, Mode::from_raw_mode(0o600)).expect("a fifo");
        let create = |name, how| share.create(name, 0o600, how).map(|file| size(&file));
        assert_eq!(create("file", OFlags::EXCL | OFlags::TRUNC), Err(Errno::EXIST));
        assert_eq!(create("file", OFlags::empty()), Ok(7));
        assert_eq!(create("file", OFlags::TRUNC), Ok(0));
        assert_eq!(create("fifo", OFlags::empty()), Err(Errno::ACCESS));
        assert_eq!(create("link", OFlags::empty()), Err(Errno::LOOP));
        assert_eq!(create("inner/new", OFlags::empty()), Err(Errno::LOOP));
    }

    fn size(file: &File) -> i64 {
        fstat(file).expect("it is open").st_size
    }

    #[test]
    fn a_read_only_share_changes_nothing() {
        let (_dir, share) = share(Policy { read_only: true, ..Policy::default() });
        assert!(share.open_file("file", true, OFlags::empty()).is_err());
        assert!(share.create("new", 0o644, OFlags::EXCL).is_err());
        assert!(share.remove("", "file", false).is_err());
        assert!(share.make_directory("", "new", 0o755).is_err());
        assert!(share.rename(("", "file"), ("", "other")).is_err());
        assert!(share.open_file("file", false, OFlags::empty()).is_ok());
    }

    /// A directory that goes when the test ends.
    pub mod tempdir {
        use std::path::{Path, PathBuf};
        use std::sync::atomic::{AtomicU32, Ordering};

        pub struct TempDir(PathBuf);

        static NEXT: AtomicU32 = AtomicU32::new(0);

        impl TempDir {
            pub fn new() -> TempDir {
                let number = NEXT.fetch_add(1, Ordering::Relaxed);
                let name = format!("platter-9pfsd-{}-{number}", std::process::id());
                let path = std::env::temp_dir().join(name);
                std::fs::create_dir_all(&path).expect("a temporary directory");
                TempDir(path)
            }

            pub fn path(&self) -> &Path {
                &self.0
            }
        }

        impl Drop for TempDir {
            fn drop(&mut self) {
                let _ = std::fs::remove_dir_all(&self.0);
            }
        }
    }
}
