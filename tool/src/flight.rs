//! Many requests of one image in flight: this thread alone asks the planner, a pool moves and
//! unpacks the bytes.
//!
//! Order guarded: a plan's preludes are done before its bytes go out, and it is committed after
//! they are written; a flush covers what was written before it, since all answers are taken
//! first. Reads and writes are never in flight together (asserted): a mapping that was read
//! would have to be held against what is written meanwhile.

use std::collections::VecDeque;
use std::sync::Arc;

use platter_image::{
    Apart, FileNo, Image, PLANS_MAX, PackedCluster, Place, Prepared, SECTOR_BYTES, SectorRange,
    Step, Stop,
};

use crate::buffer::Buffer;
use crate::engine::{Carried, Engine};
use crate::fault::{Cause, Fault};
use crate::flow::data_runs;
use crate::medium::Medium;
use crate::pool::{Desk, Pool};

/// Requests in flight at most: the plans that an image has room for.
pub const DEPTH_MAX: usize = PLANS_MAX;
/// Threads at most: a few for each processor, and room for those that wait for a disk.
const THREADS_MAX: usize = 16;
/// Up to so many bytes are read at once when the page cache has them: less than it costs to
/// have another thread do it.
const AT_ONCE_BYTES: usize = 64 << 10;

/// A read that is done, by the tag it was asked with.
pub struct Read {
    pub tag: u64,
    pub bytes: Buffer,
    /// What of it is not zeros (see [`data_runs`]), where that was wanted: looked for by the
    /// thread that read it, whose processor still has it.
    pub runs: Vec<(usize, usize)>,
}

impl Read {
    fn new(tag: u64, bytes: Buffer, grain: usize) -> Read {
        let runs = if grain > 0 { data_runs(&bytes, grain) } else { Vec::new() };
        Read { tag, bytes, runs }
    }
}

enum Answer {
    Read { read: Read, result: Result<(), (FileNo, Cause)> },
    Wrote { prepared: Prepared, file: FileNo, result: std::io::Result<()> },
}

/// A part of a read: where so many bytes come from.
enum Part {
    Zero,
    File {
        file: FileNo,
        medium: Arc<dyn Medium>,
        offset: u64,
    },
    Packed {
        medium: Arc<dyn Medium>,
        cluster: PackedCluster,
    },
    /// They are in the buffer already.
    There,
}

pub struct Flight {
    engine: Engine,
    pool: Pool<Answer>,
    /// With one request at a time there is nothing to gain from other threads: this one does it.
    alone: Option<Box<Desk>>,
    depth: usize,
    reads: VecDeque<Read>,
    /// The first write that failed since the last time one was told.
    failed: Option<Fault>,
    writing: bool,
    /// Where a read would go on from the one before.
    next_sector: u64,
    /// Zeros of reads are looked for in steps of so many bytes; 0: they are not.
    grain: usize,
}

impl Flight {
    /// Up to `depth` requests of `engine` in flight.
    pub fn new(engine: Engine, depth: usize) -> Flight {
        let depth = depth.clamp(1, DEPTH_MAX);
        let pool = Pool::new(depth.min(THREADS_MAX));
        let alone = (depth == 1).then(Box::default);
        let (reads, failed) = (VecDeque::new(), None);
        let (writing, next_sector, grain) = (false, 0, 0);
        Flight { engine, pool, alone, depth, reads, failed, writing, next_sector, grain }
    }

    /// Looks for zeros in what is read, in steps of `grain` bytes.
    pub fn looking_for_zeros(self, grain: usize) -> Flight {
        Flight { grain, ..self }
    }

    /// The engine, with nothing in flight.
    pub fn settle(&mut self) -> Result<&mut Engine, Fault> {
        while self.pool.out() > 0 {
            self.collect(self.pool.out())?;
        }
        match self.failed.take() {
            Some(fault) => Err(fault),
            None => Ok(&mut self.engine),
        }
    }

    /// The engine for questions that change nothing.
    pub fn engine(&mut self) -> &mut Engine {
        &mut self.engine
    }

    /// Room for another request?
    pub fn has_room(&self) -> bool {
        self.pool.out() < self.depth
    }

    /// Reads from `sector` on. The bytes come back at once if that is quick, else later by
    /// [`Flight::next_read`].
    pub fn read(
        &mut self,
        tag: u64,
        sector: u64,
        mut bytes: Buffer,
    ) -> Result<Option<Read>, Fault> {
        assert!(!self.writing || self.pool.out() == 0, "reads and writes do not mix");
        self.writing = false;
        let mut parts = Vec::new();
        let sequential = sector == self.next_sector;
        let mut at = 0;
        while at < bytes.len() {
            let start = sector + at as u64 / SECTOR_BYTES;
            let range = SectorRange::new(start, (bytes.len() - at) as u64 / SECTOR_BYTES);
            let apart = self.engine.drive(|image| image.map_apart(range))?;
            let (len, part) = self.part(apart);
            let cluster = match &part {
                Part::Packed { cluster, .. } => cluster.unpacked_bytes(),
                _ => 0,
            };
            let part = if sequential && len < cluster {
                // The engine keeps the cluster for the requests that want the rest of it.
                self.engine.read(start, &mut bytes[at..at + len])?;
                Part::There
            } else {
                part
            };
            match &mut self.alone {
                Some(desk) => {
                    let result = read_part(&part, desk, &mut bytes[at..at + len]);
                    result.map_err(|(file, cause)| fault(&self.engine, file, cause))?;
                }
                None => parts.push((len, part)),
            }
            at += len;
        }
        self.next_sector = sector + bytes.len() as u64 / SECTOR_BYTES;
        if self.alone.is_some() {
            return Ok(Some(Read::new(tag, bytes, self.grain)));
        }
        if bytes.len() <= AT_ONCE_BYTES && read_at_once(&parts, &mut bytes) {
            return Ok(Some(Read::new(tag, bytes, self.grain)));
        }
        let grain = self.grain;
        self.pool.submit(move |desk| {
            let result = read_parts(&parts, desk, &mut bytes);
            Answer::Read { read: Read::new(tag, bytes, grain), result }
        });
        Ok(None)
    }

    fn part(&self, apart: Apart) -> (usize, Part) {
        match apart {
            Apart::Extent(extent) => {
                let part = match extent.place {
                    Place::File { file, offset } => {
                        Part::File { file, medium: self.engine.medium(file), offset }
                    }
                    Place::Zero => Part::Zero,
                    Place::Memory { .. } => panic!("clusters are left packed"),
                };
                ((extent.sectors * SECTOR_BYTES) as usize, part)
            }
            Apart::Packed { sectors, cluster } => {
                let medium = self.engine.medium(cluster.file());
                ((sectors * SECTOR_BYTES) as usize, Part::Packed { medium, cluster })
            }
        }
    }

    /// The next read that is done, `None` when none is in flight.
    pub fn next_read(&mut self) -> Result<Option<Read>, Fault> {
        while self.reads.is_empty() && self.pool.out() > 0 {
            self.collect(1)?;
        }
        Ok(self.reads.pop_front())
    }

    /// Writes bytes `from` to `to` of a buffer from `sector` on. A failure may be told by a
    /// later call; [`Flight::settle`] tells the last.
    pub fn write(
        &mut self,
        sector: u64,
        bytes: &Arc<Buffer>,
        (from, to): (usize, usize),
    ) -> Result<(), Fault> {
        assert!(self.writing || self.pool.out() == 0, "reads and writes do not mix");
        self.writing = true;
        if self.alone.is_some() {
            return self.engine.write(sector, &bytes[from..to]);
        }
        let mut at = from;
        while at < to {
            while !self.has_room() {
                // Woken for several at once: each wake costs as much as a small write.
                self.collect(1 + self.depth / 4)?;
            }
            if let Some(fault) = self.failed.take() {
                return Err(fault);
            }
            let start = sector + (at - from) as u64 / SECTOR_BYTES;
            let range = SectorRange::new(start, (to - at) as u64 / SECTOR_BYTES);
            let plan = self.ask(|image| image.prepare_write(range))?;
            let end = at + (plan.sectors * SECTOR_BYTES) as usize;
            let medium = self.engine.medium(plan.file);
            if medium.is_cached() {
                self.engine.carry_out(plan, start, &bytes[at..end])?;
                at = end;
                continue;
            }
            let carried = match self.engine.carry(&plan, start, &bytes[at..end]) {
                Ok(carried) => carried,
                Err(fault) => {
                    self.engine.image().abandon(plan.prepared);
                    return Err(fault);
                }
            };
            let (prepared, file) = (plan.prepared, plan.file);
            let (bytes, span) = (Arc::clone(bytes), at..end);
            self.pool.submit(move |_| {
                let result = match &carried {
                    Carried::Plain { offset } => medium.write_at(*offset, &bytes[span]),
                    Carried::Whole { offset, bytes } => medium.write_at(*offset, bytes),
                };
                Answer::Wrote { prepared, file, result }
            });
            at = end;
        }
        Ok(())
    }

    /// Calls a planner until it answers; what it waits for are our own plans.
    fn ask<T>(&mut self, mut call: impl FnMut(&mut Image) -> Step<T>) -> Result<T, Fault> {
        loop {
            let answer = self.engine.drive(|image| match call(image) {
                Err(Stop::Busy) => Ok(None),
                Err(stop) => Err(stop),
                Ok(answer) => Ok(Some(answer)),
            });
            match answer? {
                Some(answer) => return Ok(answer),
                None => {
                    assert!(self.pool.out() > 0, "a planner waits, with nothing in flight");
                    self.collect(1)?;
                }
            }
        }
    }

    /// Takes answers: at least so many, or all that are out.
    fn collect(&mut self, at_least: usize) -> Result<(), Fault> {
        let mut failed = None;
        for answer in self.pool.take(at_least.min(self.pool.out())) {
            match answer {
                Answer::Read { read, result: Ok(()) } => self.reads.push_back(read),
                Answer::Read { result: Err((file, cause)), .. } => {
                    failed = Some(fault(&self.engine, file, cause));
                }
                Answer::Wrote { prepared, result: Ok(()), .. } => {
                    self.engine.image().commit(prepared);
                }
                Answer::Wrote { prepared, file, result: Err(error) } => {
                    self.engine.image().abandon(prepared);
                    let fault = Fault::io(self.engine.path(file), "write", error);
                    self.failed.get_or_insert(fault);
                }
            }
        }
        failed.map_or(Ok(()), Err)
    }
}

/// Reads what needs no waiting; false if something does.
fn read_at_once(parts: &[(usize, Part)], bytes: &mut [u8]) -> bool {
    let mut at = 0;
    for (len, part) in parts {
        let into = &mut bytes[at..at + len];
        match part {
            Part::Zero => into.fill(0),
            Part::There => {}
            Part::File { medium, offset, .. } if medium.read_cached(*offset, into) => {}
            _ => return false,
        }
        at += len;
    }
    true
}

fn fault(engine: &Engine, file: FileNo, cause: Cause) -> Fault {
    Fault { file: String::from(engine.path(file)), cause }
}

fn read_parts(
    parts: &[(usize, Part)],
    desk: &mut Desk,
    bytes: &mut [u8],
) -> Result<(), (FileNo, Cause)> {
    let mut at = 0;
    for (len, part) in parts {
        read_part(part, desk, &mut bytes[at..at + len])?;
        at += len;
    }
    Ok(())
}

fn read_part(part: &Part, desk: &mut Desk, into: &mut [u8]) -> Result<(), (FileNo, Cause)> {
    let io = |error| Cause::Io { doing: "read", error };
    match part {
        Part::Zero => into.fill(0),
        Part::There => {}
        Part::File { file, medium, offset } => {
            medium.read_at(*offset, into).map_err(|error| (*file, io(error)))?;
        }
        Part::Packed { medium, cluster } => {
            let (decoders, packed, unpacked) = desk.unpacking();
            let file = cluster.file();
            let (offset, len) = cluster.stretch();
            packed.resize(len, 0);
            medium.read_at(offset, packed).map_err(|error| (file, io(error)))?;
            let done = if into.len() == cluster.unpacked_bytes() {
                cluster.unpack(decoders, packed, into)
            } else {
                unpacked.resize(cluster.unpacked_bytes(), 0);
                let done = cluster.unpack(decoders, packed, unpacked);
                into.copy_from_slice(&unpacked[cluster.skip()..][..into.len()]);
                done
            };
            done.map_err(|fault| (file, Cause::Image(Box::new(fault))))?;
        }
    }
    Ok(())
}
