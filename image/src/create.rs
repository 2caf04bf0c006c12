//! New images as a stream of writes: what to write where, in pieces of bounded size, so that the
//! kernel and the tool make images by the same code and a preallocated table of any length never
//! stands in memory.
//!
//! What no write covers reads as zeros; a file shall end up at its stated length. The writes go
//! into new, empty files: nothing is ordered, one sync at the end makes the image durable.

use alloc::borrow::ToOwned;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;

use crate::format::Format;

/// Most bytes in one [`CreateWrite`].
pub const CREATE_WRITE_BYTES_MAX: usize = 64 << 10;

/// The image a new one is laid over.
#[derive(Clone, Copy, Debug)]
pub struct Backing<'a> {
    /// As it will stand in the new image: relative to the new image's folder.
    pub name: &'a str,
    pub format: Format,
    /// [`Image::identity`](crate::Image::identity) of it: UUID or content identifier.
    pub identity: Option<u128>,
    /// Size of its disk in sectors.
    pub sectors: u64,
}

/// What to create.
#[derive(Clone, Copy, Debug)]
pub struct CreateParams<'a> {
    pub format: Format,
    /// File name of the image, without folder: some formats name their files after it.
    pub name: &'a str,
    /// Size of the disk in 512-byte sectors.
    pub sectors: u64,
    /// Bytes in a cluster, block or grain; 0 for the format's default.
    pub cluster_bytes: u64,
    /// The format's own options, named as `qemu-img create -o` names them where it has them
    /// (`compat`, `subformat`, `refcount_bits`, `lazy_refcounts`, `preallocation`, ...).
    pub options: &'a [(&'a str, &'a str)],
    pub backing: Option<Backing<'a>>,
    /// Randomness for identifiers.
    pub seed: u64,
    /// Seconds since 1970, for the formats that keep a time.
    pub unix_seconds: u64,
}

/// Why an image cannot be created: one sentence.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CreateFault(pub String);

impl fmt::Display for CreateFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl CreateFault {
    pub fn new(why: &str) -> CreateFault {
        CreateFault(why.to_owned())
    }
}

/// Whether a file's room is taken when it is made (`preallocation` of `qemu-img create`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reserve {
    /// As it is written.
    Nothing,
    /// By the store, as fast as it can (`falloc`).
    Room,
    /// By writing zeros (`full`).
    Zeros,
}

/// A file to make.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CreateFile {
    /// `None`: the image itself. Else a plain name beside it (VMDK extents).
    pub name: Option<String>,
    /// Its final length.
    pub bytes: u64,
    /// What to do with all of it before the writes.
    pub reserve: Reserve,
}

/// One write into file number `file` of [`Create::files`].
#[derive(Debug)]
pub struct CreateWrite<'a> {
    pub file: usize,
    pub offset: u64,
    pub bytes: &'a [u8],
}

/// Width and byte order of the entries of a generated table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Entry {
    Be32,
    Be64,
    Le32,
    Le64,
    /// The value and then this word, both big-endian.
    Be64And(u64),
}

impl Entry {
    fn bytes(self) -> usize {
        match self {
            Entry::Be32 | Entry::Le32 => 4,
            Entry::Be64 | Entry::Le64 => 8,
            Entry::Be64And(_) => 16,
        }
    }

    fn emit(self, value: u64, into: &mut [u8]) {
        match self {
            Entry::Be32 => into.copy_from_slice(&(value as u32).to_be_bytes()),
            Entry::Be64 => into.copy_from_slice(&value.to_be_bytes()),
            Entry::Le32 => into.copy_from_slice(&(value as u32).to_le_bytes()),
            Entry::Le64 => into.copy_from_slice(&value.to_le_bytes()),
            Entry::Be64And(word) => {
                into[..8].copy_from_slice(&value.to_be_bytes());
                into[8..].copy_from_slice(&word.to_be_bytes());
            }
        }
    }
}

/// What a piece of a new file holds.
#[derive(Clone, Debug)]
pub(crate) enum Content {
    Bytes(Vec<u8>),
    /// `count` entries `first`, `first + step`, ...: tables of any length.
    Table {
        entry: Entry,
        first: u64,
        step: u64,
        count: u64,
    },
}

#[derive(Clone, Debug)]
struct Piece {
    file: usize,
    offset: u64,
    content: Content,
}

/// A new image: its files and the stream of its writes.
#[derive(Debug)]
pub struct Create {
    files: Vec<CreateFile>,
    pieces: Vec<Piece>,
    /// Piece that comes next, and bytes or entries of it already given.
    at: usize,
    done: u64,
    buffer: Vec<u8>,
}

impl Create {
    /// Plans a new image; nothing is written yet.
    pub fn new(params: &CreateParams) -> Result<Create, CreateFault> {
        if params.sectors == 0 || params.sectors > u64::MAX / crate::SECTOR_BYTES {
            return Err(CreateFault::new("the size must be at least one sector and below 2^64"));
        }
        if params.cluster_bytes != 0 && !params.cluster_bytes.is_power_of_two() {
            return Err(CreateFault::new("the cluster size must be a power of two"));
        }
        crate::format::create(params)
    }

    /// For formats: a plan with one file, the image itself, of `bytes`.
    pub(crate) fn one_file(bytes: u64) -> Create {
        Create {
            files: vec![CreateFile { name: None, bytes, reserve: Reserve::Nothing }],
            pieces: Vec::new(),
            at: 0,
            done: 0,
            buffer: Vec::new(),
        }
    }

    /// For formats: another file beside the image; gives its number.
    pub(crate) fn add_file(&mut self, name: String, bytes: u64) -> usize {
        self.files.push(CreateFile { name: Some(name), bytes, reserve: Reserve::Nothing });
        self.files.len() - 1
    }

    /// For formats: takes the room of all files.
    pub(crate) fn reserve(&mut self, reserve: Reserve) {
        self.files.iter_mut().for_each(|file| file.reserve = reserve);
    }

    /// For formats: the content of a stretch of a file.
    pub(crate) fn put(&mut self, file: usize, offset: u64, content: Content) {
        self.pieces.push(Piece { file, offset, content });
    }

    /// The files to make, the image itself first.
    pub fn files(&self) -> &[CreateFile] {
        &self.files
    }

    /// The next write, `None` when all are given.
    pub fn next_write(&mut self) -> Option<CreateWrite<'_>> {
        loop {
            let piece = self.pieces.get(self.at)?;
            let (file, start) = (piece.file, piece.offset);
            self.buffer.clear();
            let offset = match &piece.content {
                Content::Bytes(bytes) => {
                    let rest = &bytes[self.done as usize..];
                    let len = rest.len().min(CREATE_WRITE_BYTES_MAX);
                    self.buffer.extend_from_slice(&rest[..len]);
                    let offset = start + self.done;
                    self.done += len as u64;
                    offset
                }
                &Content::Table { entry, first, step, count } => {
                    let width = entry.bytes();
                    let entries = (count - self.done).min((CREATE_WRITE_BYTES_MAX / width) as u64);
                    self.buffer.resize(entries as usize * width, 0);
                    for (i, into) in self.buffer.chunks_exact_mut(width).enumerate() {
                        let n = self.done + i as u64;
                        entry.emit(first.wrapping_add(step.wrapping_mul(n)), into);
                    }
                    let offset = start + self.done * width as u64;
                    self.done += entries;
                    offset
                }
            };
            if self.buffer.is_empty() {
                (self.at, self.done) = (self.at + 1, 0);
                continue;
            }
            return Some(CreateWrite { file, offset, bytes: &self.buffer });
        }
    }
}

/// The options of a [`CreateParams`], taken one by one; what is left over is unknown.
pub(crate) struct Wanted<'a> {
    options: &'a [(&'a str, &'a str)],
    known: Vec<&'static str>,
}

impl<'a> Wanted<'a> {
    pub fn new(options: &'a [(&'a str, &'a str)]) -> Wanted<'a> {
        Wanted { options, known: Vec::new() }
    }

    /// The value given for an option.
    pub fn text(&mut self, name: &'static str) -> Option<&'a str> {
        self.known.push(name);
        self.options.iter().rev().find(|(given, _)| *given == name).map(|&(_, value)| value)
    }

    /// `on` or `off`.
    pub fn switch(&mut self, name: &'static str, default: bool) -> Result<bool, CreateFault> {
        match self.text(name) {
            None => Ok(default),
            Some("on" | "true") => Ok(true),
            Some("off" | "false") => Ok(false),
            Some(other) => Err(CreateFault(alloc::format!("{name}={other} is not on or off"))),
        }
    }

    /// `preallocation` of an image whose data all has its place: `off`, `falloc` or `full`;
    /// `metadata` where `allows_metadata`, which takes no room for data.
    pub fn preallocation(
        &mut self,
        is_fixed: bool,
        allows_metadata: bool,
    ) -> Result<Reserve, CreateFault> {
        let wants = match self.text("preallocation") {
            None | Some("off") => return Ok(Reserve::Nothing),
            Some("metadata") if allows_metadata => return Ok(Reserve::Nothing),
            Some("falloc") => Reserve::Room,
            Some("full") => Reserve::Zeros,
            Some(other) => {
                let modes = if allows_metadata { "off, metadata," } else { "off," };
                let why = alloc::format!("preallocation={other} is not {modes} falloc or full");
                return Err(CreateFault(why));
            }
        };
        if is_fixed {
            return Ok(wants);
        }
        Err(CreateFault::new("preallocation needs the fixed subformat, whose data has its place"))
    }

    pub fn number(&mut self, name: &'static str, default: u64) -> Result<u64, CreateFault> {
        match self.text(name) {
            None => Ok(default),
            Some(text) => text
                .parse()
                .map_err(|_| CreateFault(alloc::format!("{name}={text} is not a number"))),
        }
    }

    /// Refuses by name the first option that was never asked for.
    pub fn finish(self) -> Result<(), CreateFault> {
        match self.options.iter().find(|(given, _)| !self.known.contains(given)) {
            None => Ok(()),
            Some((given, _)) => {
                Err(CreateFault(alloc::format!("unknown option {given} for this format")))
            }
        }
    }
}

/// Numbers for identifiers out of a seed (splitmix64).
pub(crate) fn random(seed: u64, n: u64) -> u64 {
    let mut z = seed.wrapping_add((n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    //! Would miss: whether what a format plans is an image; each format tests that.

    use super::*;

    #[test]
    fn a_table_comes_in_bounded_writes_and_continues_where_it_stopped() {
        let mut create = Create::one_file(1 << 20);
        create.put(0, 0, Content::Bytes(vec![7; 70_000]));
        let table = Content::Table { entry: Entry::Be32, first: 5, step: 2, count: 20_000 };
        create.put(0, 4096 * 100, table);
        let mut file = vec![0; 1 << 20];
        let mut writes = 0;
        while let Some(CreateWrite { file: 0, offset, bytes }) = create.next_write() {
            assert!(!bytes.is_empty() && bytes.len() <= CREATE_WRITE_BYTES_MAX);
            file[offset as usize..][..bytes.len()].copy_from_slice(bytes);
            writes += 1;
        }
        assert_eq!(writes, 4);
        assert!(file[..70_000].iter().all(|&b| b == 7) && file[70_000] == 0);
        for n in [0u32, 1, 16_383, 16_384, 19_999] {
            let at = 4096 * 100 + n as usize * 4;
            assert_eq!(file[at..at + 4], (5 + 2 * n).to_be_bytes());
        }
        assert_eq!(file[4096 * 100 + 80_000..][..4], [0; 4]);
    }

    #[test]
    fn an_unknown_option_is_refused_by_name() {
        let mut wanted = Wanted::new(&[("compat", "1.1"), ("compatt", "1.1")]);
        assert_eq!(wanted.text("compat"), Some("1.1"));
        let fault = wanted.finish().unwrap_err();
        assert_eq!(fault.0, "unknown option compatt for this format");
    }
}
