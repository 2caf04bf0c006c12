//! The synchronous driver: it runs the planners of `platter-image` over media, one request at a
//! time, and does the I/O they ask for.
//!
//! Order guarded: preludes and data of a plan are written before its commit; a flush writes and
//! syncs in the order the planner gives. With one request at a time nothing is ever in flight,
//! so a planner that answers `Busy` is broken: that is asserted. It must never decide where
//! bytes lie.

use std::sync::Arc;

use platter_image::{
    Access, CheckParams, CheckProgress, CheckReport, Extent, FileInfo, FileNo, FlushStep, Image,
    ImageFault, OpenStep, Options, Place, Prelude, SECTOR_BYTES, SectorRange, Step, Stop,
    WritePlan,
};

use crate::buffer::Buffer;
use crate::fault::{Cause, Fault};
use crate::medium::{Folder, Medium, beside};

/// Bytes moved at once by a prelude or while writing zeros.
const CHUNK_BYTES: u64 = 1 << 20;
/// Stops of one planner call that bring it nothing new, after which it makes no progress: blocks
/// that are read again since others pushed them out, and room.
const STOPS_MAX: usize = 1 << 20;

/// An open image.
pub struct Engine {
    image: Image,
    media: Media,
    /// A buffer for head, guest bytes and tail of a plan, to be used again.
    bounce: Option<Buffer>,
}

/// The open files of an image, by `FileNo`.
struct Media {
    files: Vec<OpenMedium>,
    /// Syncs are left out (see [`Engine::hurry`]).
    hurry: bool,
}

struct OpenMedium {
    path: String,
    medium: Arc<dyn Medium>,
}

impl Media {
    fn file(&self, file: FileNo) -> &OpenMedium {
        &self.files[file.0 as usize]
    }

    fn fault(&self, fault: ImageFault) -> Fault {
        // A file that could not be opened has no entry: the last one named it.
        let at = (fault.file.0 as usize).min(self.files.len() - 1);
        Fault { file: self.files[at].path.clone(), cause: Cause::Image(Box::new(fault)) }
    }

    fn read(&self, file: FileNo, offset: u64, into: &mut [u8]) -> Result<(), Fault> {
        let open = self.file(file);
        open.medium.read_at(offset, into).map_err(|e| Fault::io(&open.path, "read", e))
    }

    fn write(&self, file: FileNo, offset: u64, bytes: &[u8]) -> Result<(), Fault> {
        let open = self.file(file);
        open.medium.write_at(offset, bytes).map_err(|e| Fault::io(&open.path, "write", e))
    }

    fn zero(&self, file: FileNo, offset: u64, len: u64) -> Result<(), Fault> {
        let open = self.file(file);
        open.medium.zero(offset, len).map_err(|e| Fault::io(&open.path, "write zeros", e))
    }

    fn sync(&self, file: FileNo) -> Result<(), Fault> {
        if self.hurry {
            return Ok(());
        }
        let open = self.file(file);
        open.medium.sync().map_err(|e| Fault::io(&open.path, "sync", e))
    }

    fn punch(&self, file: FileNo, offset: u64, len: u64) -> Result<(), Fault> {
        let open = self.file(file);
        open.medium.punch(offset, len).map_err(|e| Fault::io(&open.path, "punch a hole", e))
    }

    fn prelude(&self, prelude: Prelude) -> Result<(), Fault> {
        match prelude {
            Prelude::Zero { file, offset, len } => self.zero(file, offset, len),
            Prelude::Copy { file, from, to, len } => {
                let mut buffer = vec![0; len.min(CHUNK_BYTES) as usize];
                let mut done = 0;
                while done < len {
                    let count = (len - done).min(CHUNK_BYTES) as usize;
                    self.read(file, from + done, &mut buffer[..count])?;
                    self.write(file, to + done, &buffer[..count])?;
                    done += count as u64;
                }
                Ok(())
            }
        }
    }
}

/// Runs a whole flush.
fn flush(image: &mut Image, media: &Media) -> Result<(), Fault> {
    image.flush_begin();
    let result = loop {
        let step = match image.flush_step() {
            FlushStep::Write { file, offset, bytes } => media.write(file, offset, bytes),
            FlushStep::Sync { file } => media.sync(file),
            FlushStep::Done => break Ok(()),
        };
        if step.is_err() {
            break step;
        }
    };
    image.flush_end(result.is_ok());
    result
}

/// Calls a planner until it answers.
fn drive<T>(
    image: &mut Image,
    media: &Media,
    mut call: impl FnMut(&mut Image) -> Step<T>,
) -> Result<T, Fault> {
    let (mut idle, mut furthest) = (0, None);
    while idle < STOPS_MAX {
        idle += 1;
        match call(image) {
            Ok(answer) => return Ok(answer),
            Err(Stop::Miss(block)) => {
                let place = Some((block.file.0, block.offset));
                if place > furthest {
                    (idle, furthest) = (0, place);
                }
                let mut small = [0; 4096];
                let mut large = Vec::new();
                let bytes = match block.len as usize {
                    len if len <= small.len() => &mut small[..len],
                    len => {
                        large.resize(len, 0);
                        &mut large[..]
                    }
                };
                if let Err(fault) = media.read(block.file, block.offset, bytes) {
                    image.fill_failed(block);
                    return Err(fault);
                }
                image.fill(block, bytes);
            }
            Err(Stop::NeedFlush) => {
                if image.is_dirty() {
                    idle = 0;
                }
                flush(image, media)?;
            }
            Err(Stop::Busy) => panic!("a planner waits, with nothing in flight"),
            Err(Stop::Fault(fault)) => return Err(media.fault(fault)),
        }
    }
    panic!("a planner makes no progress");
}

impl Engine {
    /// Opens `path` in `folder` and all that it names (if the options allow it).
    pub fn open(folder: &dyn Folder, path: &str, options: Options) -> Result<Engine, Fault> {
        Engine::open_by(folder, path, options, Image::begin)
    }

    /// Opens `path` without what lies below it, read-only: what it does not hold reads as zeros.
    pub fn open_alone(folder: &dyn Folder, path: &str, options: Options) -> Result<Engine, Fault> {
        let options = Options { access: Access::ReadOnly, ..options };
        Engine::open_by(folder, path, options, Image::begin_alone)
    }

    /// Opens `path` to check it: what a repair could make anew may be missing.
    pub fn open_to_check(
        folder: &dyn Folder,
        path: &str,
        options: Options,
    ) -> Result<Engine, Fault> {
        Engine::open_by(folder, path, options, Image::begin_check)
    }

    fn open_by(
        folder: &dyn Folder,
        path: &str,
        options: Options,
        begin: fn(&str, FileInfo, Options) -> Image,
    ) -> Result<Engine, Fault> {
        let opened = folder.open(path, options.access);
        let (medium, info) = opened.map_err(|e| Fault::io(path, "open", e))?;
        let first = OpenMedium { path: String::from(path), medium };
        let mut media = Media { files: vec![first], hurry: false };
        let mut image = begin(path, info, options);
        loop {
            match drive(&mut image, &media, Image::open_step)? {
                OpenStep::Ready => break,
                OpenStep::File { file, named_by, name, access } => {
                    let path = beside(&media.file(named_by).path, &name);
                    let opened = folder.open_named(&path, access);
                    let (medium, info) = opened.map_err(|e| Fault::io(&path, "open", e))?;
                    assert!(file.0 as usize == media.files.len(), "files are opened in order");
                    media.files.push(OpenMedium { path, medium });
                    image.file_opened(file, info).map_err(|fault| media.fault(fault))?;
                }
            }
        }
        Ok(Engine { image, media, bounce: None })
    }

    /// Leaves syncs out until [`Engine::finish`]: for an image that is being made and is worth
    /// nothing before it is complete.
    pub fn hurry(&mut self) {
        self.media.hurry = true;
    }

    /// Size of the disk in guest sectors.
    pub fn sectors(&mut self) -> u64 {
        self.image.sectors()
    }

    /// The planner, for what the driver does not wrap.
    pub fn image(&mut self) -> &mut Image {
        &mut self.image
    }

    /// Layers in the chain.
    pub fn depth(&self) -> usize {
        self.image.depth()
    }

    /// Paths of the open files, by `FileNo`, relative to the folder.
    pub fn paths(&self) -> Vec<String> {
        self.media.files.iter().map(|open| open.path.clone()).collect()
    }

    /// Path of an open file, relative to the folder.
    pub fn path(&self, file: FileNo) -> &str {
        &self.media.file(file).path
    }

    /// The medium of a file, for moving data beside the planner.
    pub fn medium(&self, file: FileNo) -> Arc<dyn Medium> {
        Arc::clone(&self.media.file(file).medium)
    }

    /// Calls a planner of the image until it answers, doing the I/O it asks for.
    pub fn drive<T>(&mut self, call: impl FnMut(&mut Image) -> Step<T>) -> Result<T, Fault> {
        drive(&mut self.image, &self.media, call)
    }

    /// Where the first piece of `range` lies.
    pub fn map(&mut self, range: SectorRange) -> Result<Extent, Fault> {
        self.drive(|image| image.map_read(range))
    }

    /// Reads from `sector` on; `into` is whole sectors.
    pub fn read(&mut self, sector: u64, into: &mut [u8]) -> Result<(), Fault> {
        read(&mut self.image, &self.media, sector, into)
    }

    /// Writes from `sector` on; `bytes` are whole sectors. Durable only after a flush.
    pub fn write(&mut self, sector: u64, bytes: &[u8]) -> Result<(), Fault> {
        let mut done = 0;
        while done < bytes.len() {
            let range = range_of(sector, bytes.len(), done);
            let plan = self.drive(|image| image.prepare_write(range))?;
            let count = (plan.sectors * SECTOR_BYTES) as usize;
            self.carry_out(plan, range.start, &bytes[done..done + count])?;
            done += count;
        }
        Ok(())
    }

    /// Makes sectors read as zeros, without writing data where the format allows it.
    pub fn write_zeroes(&mut self, sector: u64, count: u64) -> Result<(), Fault> {
        let zeros = vec![0; (count * SECTOR_BYTES).min(CHUNK_BYTES) as usize];
        let mut done = 0;
        while done < count {
            let range = SectorRange::new(sector + done, count - done);
            let plan = self.drive(|image| image.discard(range, true))?;
            if plan.sectors > 0 {
                self.punch(plan.punch)?;
                done += plan.sectors;
                continue;
            }
            // Only the first piece cannot be zeroed: write no more than a cluster's worth, so
            // that what follows gets its chance.
            let step = range.prefix(zero_step(range));
            self.write(step.start, &zeros[..step.bytes() as usize])?;
            done += step.count;
        }
        Ok(())
    }

    /// Lets sectors go: they may read as anything that was there, or zeros.
    pub fn discard(&mut self, sector: u64, count: u64) -> Result<(), Fault> {
        let mut done = 0;
        while done < count {
            let range = SectorRange::new(sector + done, count - done);
            let plan = self.drive(|image| image.discard(range, false))?;
            assert!(plan.sectors > 0, "a discard makes progress");
            self.punch(plan.punch)?;
            done += plan.sectors;
        }
        Ok(())
    }

    /// Returns when all that was written is durable.
    pub fn flush(&mut self) -> Result<(), Fault> {
        flush(&mut self.image, &self.media)
    }

    /// Makes all durable and closes. Dropping an engine without closing it is a power cut.
    pub fn close(mut self) -> Result<(), Fault> {
        self.finish()
    }

    /// Makes all durable and marks the image clean: it may be written again.
    pub fn finish(&mut self) -> Result<(), Fault> {
        if self.media.hurry {
            // Everything is written first, then made durable by one more round of syncs.
            self.flush()?;
            self.drive(Image::finish)?;
            self.flush()?;
            self.media.hurry = false;
            return self.flush();
        }
        self.flush()?;
        self.drive(Image::finish)?;
        self.flush()
    }

    /// Makes the disk `sectors` long, never shorter; durable when it returns.
    pub fn resize(&mut self, sectors: u64) -> Result<(), Fault> {
        let plan = self.drive(|image| image.resize(sectors))?;
        if let Some((file, len)) = plan.grow {
            let open = self.media.file(file);
            let told = |error| Fault::io(&open.path, "grow", error);
            if open.medium.len().map_err(told)? < len {
                open.medium.set_len(len).map_err(told)?;
            }
        }
        self.flush()
    }

    /// Checks the top layer; `progress` is told how far it is. Repairs are durable when it
    /// returns.
    pub fn check(
        &mut self,
        params: CheckParams,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<CheckReport, Fault> {
        let begun = self.image.check_begin(params);
        begun.map_err(|fault| self.media.fault(fault))?;
        loop {
            match self.drive(Image::check_step)? {
                CheckProgress::More { done, total } => progress(done, total),
                CheckProgress::Copy { file, from, to, bytes: len } => {
                    self.media.prelude(Prelude::Copy { file, from, to, len })?;
                }
                CheckProgress::Cut { file, bytes } => {
                    self.flush()?;
                    let open = self.media.file(file);
                    let told = |error| Fault::io(&open.path, "cut", error);
                    open.medium.set_len(bytes).map_err(told)?;
                    self.media.sync(file)?;
                }
                CheckProgress::Done(report) => {
                    if self.image.is_dirty() {
                        self.flush()?;
                    }
                    return Ok(report);
                }
            }
        }
    }

    fn punch(&mut self, punch: Option<(FileNo, u64, u64)>) -> Result<(), Fault> {
        match punch {
            Some((file, offset, len)) => self.media.punch(file, offset, len),
            None => Ok(()),
        }
    }

    /// Preludes, then head, guest bytes and tail in one write, then the commit.
    pub(crate) fn carry_out(
        &mut self,
        plan: WritePlan,
        start: u64,
        bytes: &[u8],
    ) -> Result<(), Fault> {
        let written = match self.carry(&plan, start, bytes) {
            Ok(Carried::Plain { offset }) => self.media.write(plan.file, offset, bytes),
            Ok(Carried::Whole { offset, bytes }) => {
                let result = self.media.write(plan.file, offset, &bytes);
                self.bounce = Some(bytes);
                result
            }
            Err(fault) => Err(fault),
        };
        match written {
            Ok(()) => self.image.commit(plan.prepared),
            Err(_) => self.image.abandon(plan.prepared),
        }
        written
    }

    /// All of a plan but its one write, which is to be done before its commit: the preludes,
    /// and what stands around the guest's bytes.
    pub(crate) fn carry(
        &mut self,
        plan: &WritePlan,
        start: u64,
        bytes: &[u8],
    ) -> Result<Carried, Fault> {
        for &prelude in &plan.preludes {
            self.media.prelude(prelude)?;
        }
        if plan.head.is_none() && plan.tail.is_none() {
            return Ok(Carried::Plain { offset: plan.offset });
        }
        let head = plan.head.map_or(0, |head| head.bytes() as usize);
        let tail = plan.tail.map_or(0, |tail| tail.bytes() as usize);
        let len = head + bytes.len() + tail;
        let mut whole =
            self.bounce.take().map_or_else(|| Buffer::new(len), |spare| spare.with_len(len));
        if let Some(range) = plan.head {
            assert!(range.end() == start, "the head ends where the plan starts");
            read(&mut self.image, &self.media, range.start, &mut whole[..head])?;
        }
        whole[head..head + bytes.len()].copy_from_slice(bytes);
        if let Some(range) = plan.tail {
            assert!(range.start == start + plan.sectors, "the tail starts where the plan ends");
            read(&mut self.image, &self.media, range.start, &mut whole[head + bytes.len()..])?;
        }
        Ok(Carried::Whole { offset: plan.offset - head as u64, bytes: whole })
    }
}

/// What is left of a plan: one write.
pub(crate) enum Carried {
    /// The guest's bytes.
    Plain { offset: u64 },
    /// These, with the guest's among them.
    Whole { offset: u64, bytes: Buffer },
}

/// The part of a buffer of `len` bytes for `sector` that is not done yet.
fn range_of(sector: u64, len: usize, done: usize) -> SectorRange {
    assert!(len.is_multiple_of(SECTOR_BYTES as usize), "requests are whole sectors");
    SectorRange::new(sector + done as u64 / SECTOR_BYTES, (len - done) as u64 / SECTOR_BYTES)
}

/// Sectors to write as zeros before asking again: up to the next multiple of 64 KiB.
fn zero_step(range: SectorRange) -> u64 {
    const STEP: u64 = (64 << 10) / SECTOR_BYTES;
    STEP - range.start % STEP
}

fn read(image: &mut Image, media: &Media, sector: u64, into: &mut [u8]) -> Result<(), Fault> {
    let mut done = 0;
    while done < into.len() {
        let range = range_of(sector, into.len(), done);
        let extent = drive(image, media, |image| image.map_read(range))?;
        let count = (extent.sectors * SECTOR_BYTES) as usize;
        let piece = &mut into[done..done + count];
        match extent.place {
            Place::File { file, offset } => media.read(file, offset, piece)?,
            Place::Zero => piece.fill(0),
            Place::Memory { offset } => piece.copy_from_slice(image.bytes(offset, count)),
        }
        done += count;
    }
    Ok(())
}

/// Options for an image of a named format: the defaults of the command line and of tests.
pub fn options(format: platter_image::Format, access: Access) -> Options {
    Options { format, access, allow_names: true, budget_bytes: 1 << 20, seed: 1 }
}

#[cfg(test)]
mod tests {
    //! Would miss: everything about formats; it only proves that the driver moves bytes and
    //! keeps files inside their folder.

    use super::*;
    use crate::medium::{DiskFolder, Event, RamFolder};
    use platter_image::{BlockRef, Format};

    #[test]
    fn raw_in_ram_reads_what_was_written_and_syncs_on_flush() {
        let folder = RamFolder::new();
        folder.put("a.raw", vec![7; 8192]);
        let mut engine =
            Engine::open(&folder, "a.raw", options(Format::Raw, Access::ReadWrite)).unwrap();
        assert_eq!(engine.sectors(), 16);
        folder.record();
        engine.write(3, &[9; 1024]).unwrap();
        engine.write_zeroes(8, 2).unwrap();
        let mut bytes = [0; 8192];
        engine.read(0, &mut bytes).unwrap();
        assert!(bytes[..1536].iter().all(|&b| b == 7));
        assert!(bytes[1536..2560].iter().all(|&b| b == 9));
        assert!(bytes[4096..5120].iter().all(|&b| b == 0));
        assert!(!folder.events().iter().any(|e| matches!(e, Event::Sync { .. })));
        engine.flush().unwrap();
        assert!(matches!(folder.events().last(), Some(Event::Sync { file: 0 })));
        let fault = engine.read(16, &mut bytes[..512]).unwrap_err();
        assert_eq!(fault.to_string(), "a.raw: sector 17 is beyond the end of the disk, 16 sectors");
    }

    /// Tables may be longer than any number of stops.
    #[test]
    fn a_planner_may_read_any_number_of_blocks() {
        let folder = RamFolder::new();
        folder.put("a.raw", vec![7; 8192]);
        let raw = options(Format::Raw, Access::ReadOnly);
        let mut engine = Engine::open(&folder, "a.raw", raw).unwrap();
        let mut offset = 0;
        let answer = engine.drive(|_| {
            offset += 4096;
            let block = BlockRef { file: FileNo(0), offset, len: 4096 };
            if offset >> 12 > STOPS_MAX as u64 { Ok(5) } else { Err(Stop::Miss(block)) }
        });
        assert_eq!(answer.unwrap(), 5);
    }

    #[test]
    fn a_read_only_disk_refuses_writes_and_a_folder_keeps_its_files() {
        let root = std::env::temp_dir().join(format!("platter-engine-{}", std::process::id()));
        std::fs::create_dir_all(root.join("in")).unwrap();
        std::fs::write(root.join("in/a.raw"), [1; 4096]).unwrap();
        std::fs::write(root.join("out.raw"), [2; 4096]).unwrap();
        let folder = DiskFolder::new(root.join("in"));
        let ro = options(Format::Raw, Access::ReadOnly);
        let mut engine = Engine::open(&folder, "a.raw", ro).unwrap();
        assert!(engine.write(0, &[0; 512]).is_err());
        assert!(folder.open_named("../out.raw", Access::ReadOnly).is_err());
        std::os::unix::fs::symlink(root.join("out.raw"), root.join("in/link.raw")).unwrap();
        assert!(folder.open_named("link.raw", Access::ReadOnly).is_err());
        assert!(folder.open_named("a.raw", Access::ReadOnly).is_ok());
        std::fs::remove_dir_all(&root).unwrap();
    }
}
