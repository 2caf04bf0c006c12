//! Where the bytes of image files live: real files, or RAM for tests.
//!
//! A medium is shared (`&self`): positioned I/O has no cursor, so several threads may move data
//! while one runs the planner. It must never buffer: what is written is handed on at once, and
//! `sync` returns only when it is durable.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, IoSliceMut};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use platter_image::{Access, FileInfo};
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::{ReadWriteFlags, preadv2};

use crate::lock;

/// One file of an image.
pub trait Medium: Send + Sync {
    /// Reads `into.len()` bytes; what lies beyond the end of the file reads as zeros.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;

    /// Reads if that needs no waiting for a disk; false if it does, or none can tell.
    fn read_cached(&self, _offset: u64, _into: &mut [u8]) -> bool {
        false
    }

    /// Do writes end in memory? Then many at once gain nothing: those to one file take turns.
    fn is_cached(&self) -> bool {
        true
    }

    /// Writes all of `bytes`, growing the file when they end beyond it.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Returns when everything written before is durable.
    fn sync(&self) -> io::Result<()>;

    /// Cuts or grows (with zeros) the file.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Bytes in the file now.
    fn len(&self) -> io::Result<u64>;

    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Gives a stretch back: it may read as zeros or as before. Never changes the length.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes a stretch read as zeros, growing the file when it ends beyond it.
    fn zero(&self, offset: u64, len: u64) -> io::Result<()>;

    /// The first stretch at or after `offset` and before `end` that may hold something else
    /// than zeros: start and length; `None` when all of it is a hole.
    fn data_after(&self, offset: u64, end: u64) -> io::Result<Option<(u64, u64)>> {
        Ok((offset < end).then(|| (offset, end - offset)))
    }
}

/// Where files are opened: a directory, or a set of RAM files. Paths are relative to it, and
/// what an image names is never opened outside it.
pub trait Folder {
    /// Opens what the user named.
    fn open(&self, path: &str, access: Access) -> io::Result<(Arc<dyn Medium>, FileInfo)>;

    /// Opens what an image named: never outside the folder.
    fn open_named(&self, path: &str, access: Access) -> io::Result<(Arc<dyn Medium>, FileInfo)>;
}

/// A path for a file named by another: `name` beside `named_by`.
pub fn beside(named_by: &str, name: &str) -> String {
    match named_by.rsplit_once('/') {
        Some((folder, _)) => format!("{folder}/{name}"),
        None => String::from(name),
    }
}

/// What a direct transfer starts and ends at, in the file and in memory: all that disks ask for.
const DIRECT_BYTES: u64 = 4096;

/// A real file or block device.
pub struct Disk {
    file: File,
    /// The same file past the page cache, for what is aligned; the kernel keeps the two in step.
    direct: Option<File>,
}

impl Disk {
    /// The file to move these bytes with.
    fn way(&self, offset: u64, bytes: &[u8]) -> &File {
        let aligned = |value: u64| value.is_multiple_of(DIRECT_BYTES);
        let all = aligned(offset) && aligned(bytes.len() as u64);
        match &self.direct {
            Some(direct) if all && aligned(bytes.as_ptr().addr() as u64) => direct,
            _ => &self.file,
        }
    }
}

impl Disk {
    /// Creates an empty file, or empties one.
    pub fn create(path: &Path) -> io::Result<Disk> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(true).open(path)?;
        Ok(Disk { file, direct: None })
    }

    /// Opens and locks a file and says what the engine wants to know of it. If it is `shared`,
    /// others may be writing to it.
    pub fn open(
        path: &Path,
        access: Access,
        shared: bool,
        direct: bool,
    ) -> io::Result<(Disk, FileInfo)> {
        let write = access == Access::ReadWrite;
        let file = OpenOptions::new().read(true).write(write).open(path)?;
        let meta = file.metadata()?;
        if meta.is_dir() {
            return Err(io::Error::new(io::ErrorKind::IsADirectory, "it is a directory"));
        }
        if !shared {
            lock::lock(&file, access)?;
        }
        let past_cache = || {
            let flags = rustix::fs::OFlags::DIRECT.bits() as i32;
            OpenOptions::new().read(true).write(write).custom_flags(flags).open(path)
        };
        let direct = direct.then(past_cache).transpose()?;
        let disk = Disk { file, direct };
        let info = FileInfo {
            size_bytes: disk.len()?,
            can_grow: !meta.file_type().is_block_device(),
            identity: meta.dev().rotate_left(40) ^ meta.ino(),
        };
        Ok((disk, info))
    }
}

impl Medium for Disk {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < into.len() {
            let (at, rest) = (offset + done as u64, &mut into[done..]);
            match self.way(at, rest).read_at(rest, at) {
                Ok(0) => {
                    into[done..].fill(0);
                    return Ok(());
                }
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn read_cached(&self, offset: u64, into: &mut [u8]) -> bool {
        if self.direct.is_some() {
            return false;
        }
        let len = into.len();
        let mut slices = [IoSliceMut::new(into)];
        let read = preadv2(&self.file, &mut slices, offset, ReadWriteFlags::NOWAIT);
        read.is_ok_and(|count| count == len)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.way(offset, bytes).write_all_at(bytes, offset)
    }

    fn is_cached(&self) -> bool {
        self.direct.is_none()
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn len(&self) -> io::Result<u64> {
        let meta = self.file.metadata()?;
        if meta.file_type().is_block_device() {
            return Ok(rustix::fs::seek(&self.file, SeekFrom::End(0))?);
        }
        Ok(meta.len())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // A store that cannot punch loses nothing but room.
        let _ = rustix::fs::fallocate(&self.file, flags, offset, len);
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let old = self.len()?;
        let inside = old.saturating_sub(offset).min(len);
        if offset + len > old {
            // Not by setting the length: another thread may have grown the file further.
            self.write_at(offset + len - 1, &[0])?;
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if inside == 0 || rustix::fs::fallocate(&self.file, flags, offset, inside).is_ok() {
            return Ok(());
        }
        let zeros = vec![0; inside.min(1 << 20) as usize];
        let mut done = 0;
        while done < inside {
            let count = (inside - done).min(zeros.len() as u64);
            self.write_at(offset + done, &zeros[..count as usize])?;
            done += count;
        }
        Ok(())
    }

    fn data_after(&self, offset: u64, end: u64) -> io::Result<Option<(u64, u64)>> {
        if offset >= end {
            return Ok(None);
        }
        let start = match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return Ok(None),
            Err(_) => return Ok(Some((offset, end - offset))),
        };
        if start >= end {
            return Ok(None);
        }
        let stop = rustix::fs::seek(&self.file, SeekFrom::Hole(start)).unwrap_or(end).min(end);
        Ok(Some((start, stop - start)))
    }
}

/// A directory of the system.
pub struct DiskFolder {
    root: PathBuf,
    shared: bool,
    direct: bool,
}

impl DiskFolder {
    pub fn new(root: impl Into<PathBuf>) -> DiskFolder {
        DiskFolder { root: root.into(), shared: false, direct: false }
    }

    /// Files are not locked: others may be writing to them.
    pub fn shared(self) -> DiskFolder {
        DiskFolder { shared: true, ..self }
    }

    /// Bytes go past the page cache where they are aligned.
    pub fn direct(self) -> DiskFolder {
        DiskFolder { direct: true, ..self }
    }

    /// The folder that holds `path`, and the file's name in it.
    pub fn of(path: &Path) -> io::Result<(DiskFolder, String)> {
        let name = path.file_name().and_then(|name| name.to_str());
        let Some(name) = name else {
            let why = "the path does not end in a file name in UTF-8";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        };
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
        Ok((DiskFolder::new(parent.unwrap_or(Path::new("."))), String::from(name)))
    }
}

impl Folder for DiskFolder {
    fn open(&self, path: &str, access: Access) -> io::Result<(Arc<dyn Medium>, FileInfo)> {
        let (disk, info) = Disk::open(&self.root.join(path), access, self.shared, self.direct)?;
        Ok((Arc::new(disk), info))
    }

    fn open_named(&self, path: &str, access: Access) -> io::Result<(Arc<dyn Medium>, FileInfo)> {
        let plain = Path::new(path).components().all(|c| matches!(c, Component::Normal(_)));
        let full = self.root.join(path);
        // A link may lead elsewhere in the folder, not out of it.
        if !plain || !full.canonicalize()?.starts_with(self.root.canonicalize()?) {
            let why = "it lies outside the folder of the image that names it";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
        self.open(path, access)
    }
}

/// What happened to RAM files, in order, for tests that cut the power.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// `zero` and `punch` of a file count as writes of zeros.
    Write {
        file: usize,
        offset: u64,
        bytes: Vec<u8>,
    },
    SetLen {
        file: usize,
        len: u64,
    },
    Sync {
        file: usize,
    },
}

#[derive(Default)]
struct World {
    names: BTreeMap<String, usize>,
    files: Vec<Vec<u8>>,
    log: Option<Vec<Event>>,
    /// Bytes that a file may have.
    limit: Option<u64>,
    /// Files are as long as they are: partitions.
    fixed: bool,
}

/// Files in RAM; a clone is the same folder.
#[derive(Clone, Default)]
pub struct RamFolder {
    world: Arc<Mutex<World>>,
}

impl RamFolder {
    pub fn new() -> RamFolder {
        RamFolder::default()
    }

    /// Puts a file in place (or replaces its bytes) and says its number in events.
    pub fn put(&self, name: &str, bytes: Vec<u8>) -> usize {
        let mut world = self.lock();
        if let Some(&file) = world.names.get(name) {
            world.files[file] = bytes;
            return file;
        }
        let file = world.files.len();
        world.files.push(bytes);
        world.names.insert(String::from(name), file);
        file
    }

    /// A file's bytes now.
    pub fn bytes(&self, name: &str) -> Option<Vec<u8>> {
        let world = self.lock();
        world.names.get(name).map(|&file| world.files[file].clone())
    }

    /// Names of all files, by number.
    pub fn names(&self) -> Vec<String> {
        let world = self.lock();
        let mut names = vec![String::new(); world.files.len()];
        for (name, &file) in &world.names {
            names[file] = name.clone();
        }
        names
    }

    /// Files cannot grow, as partitions cannot.
    pub fn fix(&self, fixed: bool) {
        self.lock().fixed = fixed;
    }

    /// Refuses to let a file grow beyond so many bytes, as a full disk does.
    pub fn limit(&self, bytes: u64) {
        self.lock().limit = Some(bytes);
    }

    /// Starts recording events, forgetting earlier ones.
    pub fn record(&self) {
        self.lock().log = Some(Vec::new());
    }

    /// The events since `record`.
    pub fn events(&self) -> Vec<Event> {
        self.lock().log.clone().unwrap_or_default()
    }

    /// Number of events since `record`.
    pub fn events_len(&self) -> usize {
        self.lock().log.as_ref().map_or(0, Vec::len)
    }

    fn lock(&self) -> MutexGuard<'_, World> {
        self.world.lock().expect("no thread died holding RAM files")
    }
}

impl Folder for RamFolder {
    fn open(&self, path: &str, _access: Access) -> io::Result<(Arc<dyn Medium>, FileInfo)> {
        let world = self.lock();
        let Some(&file) = world.names.get(path) else {
            return Err(io::Error::new(io::ErrorKind::NotFound, "no such RAM file"));
        };
        let size_bytes = world.files[file].len() as u64;
        let info = FileInfo { size_bytes, can_grow: !world.fixed, identity: file as u64 };
        Ok((Arc::new(Ram { folder: self.clone(), file }), info))
    }

    fn open_named(&self, path: &str, access: Access) -> io::Result<(Arc<dyn Medium>, FileInfo)> {
        self.open(path, access)
    }
}

/// One file of a [`RamFolder`].
pub struct Ram {
    folder: RamFolder,
    file: usize,
}

impl Ram {
    fn change(&self, event: Event) -> io::Result<()> {
        let mut world = self.folder.lock();
        let end = match &event {
            Event::Write { offset, bytes, .. } => offset.saturating_add(bytes.len() as u64),
            Event::SetLen { len, .. } => *len,
            Event::Sync { .. } => 0,
        };
        if world.limit.is_some_and(|limit| end > limit) {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "the RAM file is full"));
        }
        apply(&mut world.files, &event);
        if let Some(log) = &mut world.log {
            log.push(event);
        }
        Ok(())
    }
}

/// Carries out one event.
pub fn apply(files: &mut [Vec<u8>], event: &Event) {
    match event {
        Event::Write { file, offset, bytes } => {
            let at = *offset as usize;
            let end = at + bytes.len();
            if files[*file].len() < end {
                files[*file].resize(end, 0);
            }
            files[*file][at..end].copy_from_slice(bytes);
        }
        Event::SetLen { file, len } => files[*file].resize(*len as usize, 0),
        Event::Sync { .. } => {}
    }
}

impl Medium for Ram {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let world = self.folder.lock();
        let bytes = &world.files[self.file];
        let start = bytes.len().min(usize::try_from(offset).unwrap_or(usize::MAX));
        let count = into.len().min(bytes.len() - start);
        into[..count].copy_from_slice(&bytes[start..start + count]);
        into[count..].fill(0);
        Ok(())
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.change(Event::Write { file: self.file, offset, bytes: bytes.to_vec() })
    }

    fn sync(&self) -> io::Result<()> {
        self.change(Event::Sync { file: self.file })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Event::SetLen { file: self.file, len })
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.folder.lock().files[self.file].len() as u64)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = self.len()?.min(offset.saturating_add(len));
        if offset < end { self.zero(offset, end - offset) } else { Ok(()) }
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let limit = self.folder.lock().limit;
        if limit.is_some_and(|limit| offset.saturating_add(len) > limit) {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "the RAM file is full"));
        }
        self.write_at(offset, &vec![0; len as usize])
    }
}
