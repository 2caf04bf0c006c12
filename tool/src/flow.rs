//! Reads a disk from start to end in large pieces, some of them ahead, leaving out what is known
//! to be zeros.

use std::collections::VecDeque;

use platter_image::{Apart, Place, SECTOR_BYTES, SectorRange};

use crate::buffer::Buffer;
use crate::engine::Engine;
use crate::fault::Fault;
use crate::flight::Flight;

/// Bytes of a piece: large enough that a system call costs nothing beside the copy, and small
/// enough that some of them stay in the processor's caches.
pub const PIECE_BYTES: usize = 1 << 20;
/// Pieces read ahead: as many as there are processors to unpack them, within these. More would
/// be memory to fault in.
const AHEAD: std::ops::RangeInclusive<usize> = 2..=8;
/// Sectors of a stretch that is asked for at once.
const ASK_SECTORS: u64 = (1 << 30) / SECTOR_BYTES;

/// A stretch of a disk.
pub struct Piece {
    pub sector: u64,
    pub count: u64,
    /// The bytes, or `None`: all zeros.
    pub bytes: Option<Buffer>,
}

/// A piece in its turn, whose bytes may still be under way.
struct Awaited {
    sector: u64,
    count: u64,
    bytes: Option<Buffer>,
    under_way: bool,
}

/// The pieces of a disk, in order, without gaps.
pub struct Flow {
    flight: Flight,
    ahead_max: usize,
    /// What was asked for and not handed out, in order.
    ahead: VecDeque<Awaited>,
    sector: u64,
    end: u64,
    /// Sectors from `sector` on that are known to be zeros.
    zeros: u64,
    spares: Vec<Buffer>,
}

impl Flow {
    /// From the disk's start to `end` sectors.
    pub fn new(engine: Engine, end: u64) -> Flow {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let ahead_max = processors.clamp(*AHEAD.start(), *AHEAD.end());
        let flight = Flight::new(engine, ahead_max);
        let (ahead, spares) = (VecDeque::new(), Vec::new());
        Flow { flight, ahead_max, ahead, sector: 0, end, zeros: 0, spares }
    }

    /// The next piece; `spare` is a buffer to use again. Pieces of data end at multiples of
    /// their size, so that they cover whole clusters.
    pub fn next(&mut self, spare: Option<Buffer>) -> Result<Option<Piece>, Fault> {
        self.spares.extend(spare);
        while self.ahead.len() < self.ahead_max && self.sector < self.end {
            self.ask()?;
        }
        while self.ahead.front().is_some_and(|piece| piece.under_way) {
            let read = self.flight.next_read()?.expect("the piece is under way");
            let at = self.ahead.iter().position(|piece| piece.sector == read.tag);
            let piece = &mut self.ahead[at.expect("it was asked for")];
            (piece.bytes, piece.under_way) = (Some(read.bytes), false);
        }
        let piece = self.ahead.pop_front();
        Ok(piece.map(|Awaited { sector, count, bytes, .. }| Piece { sector, count, bytes }))
    }

    /// Asks for one more piece.
    fn ask(&mut self) -> Result<(), Fault> {
        if self.zeros == 0 {
            self.zeros = self.zero_run()?;
        }
        let sector = self.sector;
        if self.zeros > 0 {
            let count = std::mem::take(&mut self.zeros);
            self.sector += count;
            self.ahead.push_back(Awaited { sector, count, bytes: None, under_way: false });
            return Ok(());
        }
        let whole = PIECE_BYTES as u64 / SECTOR_BYTES;
        let count = (whole - sector % whole).min(self.end - sector);
        let len = (count * SECTOR_BYTES) as usize;
        let spare = self.spares.pop().map(|spare| spare.with_len(len));
        let buffer = spare.unwrap_or_else(|| Buffer::new(len));
        let bytes = self.flight.read(sector, sector, buffer)?;
        self.sector += count;
        let under_way = bytes.is_none();
        self.ahead.push_back(Awaited { sector, count, bytes, under_way });
        Ok(())
    }

    /// How many sectors from here on are zeros for certain, as far as maps and holes tell.
    fn zero_run(&mut self) -> Result<u64, Fault> {
        let mut run = 0;
        while self.sector + run < self.end {
            let at = self.sector + run;
            let range = SectorRange::new(at, (self.end - at).min(ASK_SECTORS));
            let extent = match self.flight.engine().drive(|image| image.map_apart(range))? {
                Apart::Extent(extent) => extent,
                Apart::Packed { .. } => break,
            };
            match extent.place {
                Place::Zero => run += extent.sectors,
                Place::Memory { .. } => panic!("clusters are left packed"),
                Place::File { file, offset } => {
                    let hole = self.hole(file, offset, extent.sectors)?;
                    run += hole;
                    if hole < extent.sectors {
                        break;
                    }
                }
            }
        }
        Ok(run)
    }

    /// Sectors of a hole at `offset`; stretches too short to gain by asking count as data.
    fn hole(
        &mut self,
        file: platter_image::FileNo,
        offset: u64,
        sectors: u64,
    ) -> Result<u64, Fault> {
        let len = sectors * SECTOR_BYTES;
        if len < PIECE_BYTES as u64 {
            return Ok(0);
        }
        let engine = self.flight.engine();
        let data = engine.medium(file).data_after(offset, offset + len);
        let data = data.map_err(|e| Fault::io(engine.path(file), "look for holes", e))?;
        Ok(data.map_or(sectors, |(start, _)| (start - offset) / SECTOR_BYTES))
    }
}

/// Are these bytes all zeros?
pub fn is_zero(bytes: &[u8]) -> bool {
    // Most data differs at once; the rest is compared in stretches a compiler makes wide.
    let head = bytes.len().min(16);
    bytes[..head].iter().all(|&b| b == 0)
        && bytes.chunks(1024).all(|chunk| chunk.iter().fold(0, |or, &b| or | b) == 0)
}

/// The stretches of `bytes` that are worth writing: start and length in bytes, multiples of
/// `grain` but for the end. Zeros shorter than a grain are data.
pub fn data_runs(bytes: &[u8], grain: usize) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (at, chunk) in bytes.chunks(grain).enumerate() {
        if is_zero(chunk) {
            continue;
        }
        let start = at * grain;
        match runs.last_mut() {
            Some((from, len)) if *from + *len == start => *len += chunk.len(),
            _ => runs.push((start, chunk.len())),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    //! Would miss: holes of real files (the conversion tests have them).

    use super::*;

    #[test]
    fn zeros_are_left_out_by_whole_grains_only() {
        let mut bytes = vec![0; 10_000];
        bytes[4096] = 1;
        bytes[8191] = 1;
        bytes[9999] = 1;
        assert_eq!(data_runs(&bytes, 4096), [(4096, 5904)]);
        assert_eq!(data_runs(&bytes, 512), [(4096, 512), (7680, 512), (9728, 272)]);
        assert_eq!(data_runs(&bytes[..4096], 512), []);
        assert!(!is_zero(&bytes) && is_zero(&bytes[..4096]) && is_zero(&[]));
    }
}
