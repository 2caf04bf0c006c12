//! Opening an image: its first file, then whatever the image names, until it can be served.
//!
//! Runs beside other disks' work, one operation at a time. A failure is a sentence for people:
//! it goes to the console, to `error/…` and to `hotplug-error`.

use alloc::format;
use alloc::string::{String, ToString};

use platter_image::{Access as ImageAccess, FileInfo, FileNo, Format, Image, OpenStep, Options};
use platter_storage::{Access, Answer, Opened, Store, StoreFault, Tag};
use platter_xen::Hypervisor;

use crate::config::DiskConfig;
use crate::disk::{Disk, DiskFile};
use crate::engine::{Engine, Handle, Op, OpKind, Stretch};
use crate::fault::Fault;

/// How far an opening got.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Opening {
    /// The file is asked for.
    File(FileNo),
    /// The image is at work.
    Image,
    Ready,
}

/// Asks the store for a file. False when the store has no room now.
pub fn ask_file<H: Hypervisor, S: Store<H>>(
    engine: &mut Engine<S>,
    hv: &mut H,
    disk: u16,
    store: u8,
    path: &str,
    access: Access,
) -> Result<bool, Fault> {
    let handle = Handle { store, file: platter_storage::FileId(0) };
    let op = Op::new(disk, Stretch { handle, offset: 0, len: 0 }, OpKind::Open);
    let Ok(id) = engine.ops.insert(op) else { return Ok(false) };
    let slot = &mut engine.stores[store as usize];
    match slot.store.open(hv, Tag(id.0 as u32), path, access) {
        Ok(()) => Ok(true),
        Err(fault) => {
            engine.ops.take(id);
            match fault {
                StoreFault::Limit(_) => Ok(false),
                fault => Err(fault.into()),
            }
        }
    }
}

/// The image of a disk whose first file is open.
pub fn begin(config: &DiskConfig, opened: &Opened, read_only: bool, budget: usize) -> Image {
    let access = if read_only { ImageAccess::ReadOnly } else { ImageAccess::ReadWrite };
    let options = Options {
        format: config.format,
        access,
        allow_names: config.backing,
        budget_bytes: budget,
        seed: opened.identity,
    };
    Image::begin(&config.path, info(opened), options)
}

/// Images never reach across stores: the store's own number for a file is enough.
fn info(opened: &Opened) -> FileInfo {
    FileInfo { size_bytes: opened.size_bytes, can_grow: opened.can_grow, identity: opened.identity }
}

/// The file as the disk keeps it.
pub fn file_of(store: u8, opened: &Opened, access: Access) -> DiskFile {
    DiskFile {
        handle: Handle { store, file: opened.file },
        writable: access == Access::ReadWrite,
        can_grow: opened.can_grow,
    }
}

impl Disk {
    /// Carries the opening on. `Ok(None)` means wait.
    pub fn open_on<H: Hypervisor, S: Store<H>>(
        &mut self,
        engine: &mut Engine<S>,
        hv: &mut H,
        paths: &mut alloc::vec::Vec<String>,
    ) -> Result<Option<Opening>, Fault> {
        match self.image.open_step() {
            Ok(OpenStep::Ready) => Ok(Some(Opening::Ready)),
            Ok(OpenStep::File { file, named_by, name, access }) => {
                let path = beside(&paths[named_by.0 as usize], &name);
                let access = match access {
                    ImageAccess::ReadOnly => Access::ReadOnly,
                    ImageAccess::ReadWrite => Access::ReadWrite,
                };
                let store = self.files[0].handle.store;
                if !ask_file(engine, hv, self.index, store, &path, access)? {
                    return Ok(None);
                }
                self.ops += 1;
                paths.push(path);
                Ok(Some(Opening::File(file)))
            }
            Err(stop) => self.stopped(engine, hv, stop).map(|()| None),
        }
    }

    /// A file that the image named is open.
    pub fn file_opened(
        &mut self,
        file: FileNo,
        store: u8,
        opened: &Opened,
        access: Access,
    ) -> Result<(), Fault> {
        assert!(file.0 as usize == self.files.len(), "files are opened in order");
        self.files.push(file_of(store, opened, access));
        self.image.file_opened(file, info(opened)).map_err(Fault::Image)
    }
}

/// `name` in the directory of `path`.
fn beside(path: &str, name: &str) -> String {
    match path.rsplit_once('/') {
        Some((directory, _)) => format!("{directory}/{name}"),
        None => name.to_string(),
    }
}

/// The answer to an `Open` operation.
pub fn opened(answer: Result<Answer, StoreFault>) -> Result<Opened, Fault> {
    match answer {
        Ok(Answer::Opened(opened)) => Ok(opened),
        Ok(_) => Err(Fault::Store(StoreFault::Protocol)),
        Err(fault) => Err(Fault::Store(fault)),
    }
}

/// A sentence for people: what could not be opened, where, why, and what to do.
pub fn sentence(path: &str, format: Format, fault: &Fault) -> String {
    let why = match fault {
        Fault::Image(fault) => {
            return format!("'{path}' as {}: {fault}", format.name());
        }
        Fault::Store(fault) => match fault {
            StoreFault::NotFound => "no such file or directory: check target= and the share",
            StoreFault::Permission => "the store's server may not open it: check its permissions",
            StoreFault::BadPath => "the path is refused: it is too long, too deep or not plain",
            StoreFault::NotAFile => "not a regular file: only files can be served",
            StoreFault::NoSpace => "the store is full",
            StoreFault::ReadOnly => "the store is read-only: attach the disk with access 'ro'",
            StoreFault::BeyondEnd => "the image reaches beyond the end of its volume",
            StoreFault::Unsupported => "the store cannot do what this needs",
            StoreFault::Gone => "the store's server is gone: start it again",
            StoreFault::Protocol => "the store's server broke the protocol",
            StoreFault::Limit(limit) => {
                return format!("'{path}': too many open files, the store's limit is {limit}");
            }
            StoreFault::Io(errno) => {
                return format!("'{path}': the store answered error {errno}");
            }
            StoreFault::Refused(why) => why,
        },
        Fault::Stuck => "the image waits for something that will never come",
        Fault::Memory => "no memory for another disk: raise memory= of the storage domain",
        Fault::Request(_) | Fault::Grant(_) | Fault::Unheard => "a guest's mistake while opening",
    };
    format!("'{path}': {why}")
}
