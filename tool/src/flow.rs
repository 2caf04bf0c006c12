//! Reads a disk from start to end in large pieces, some of them ahead, leaving out what is known
//! to be zeros.

use std::collections::VecDeque;

use platter_image::{Apart, Place, SECTOR_BYTES, SectorRange};

use crate::buffer::Buffer;
use crate::engine::Engine;
use crate::fault::Fault;
use crate::flight::{Flight, Read};

/// Bytes of a piece: large enough that a system call costs nothing beside the copy, and small
/// enough that some of them stay in the processor's caches.
pub const PIECE_BYTES: usize = 1 << 20;
/// Pieces read ahead: as many as there are processors to unpack them, within these. With fewer a
/// thread sleeps after each; more would be memory to fault in.
const AHEAD: std::ops::RangeInclusive<usize> = 4..=8;
/// Sectors of a stretch that is asked for at once.
const ASK_SECTORS: u64 = (1 << 30) / SECTOR_BYTES;

/// A stretch of a disk.
pub struct Piece {
    pub sector: u64,
    pub count: u64,
    /// The bytes, or `None`: all zeros.
    pub bytes: Option<Buffer>,
    /// What of them is not zeros, in a flow that looks for it: start and length in bytes.
    pub runs: Vec<(usize, usize)>,
}

/// A piece in its turn, whose bytes may still be under way.
struct Awaited {
    piece: Piece,
    under_way: bool,
}

impl Awaited {
    fn zeros(sector: u64, count: u64) -> Awaited {
        let piece = Piece { sector, count, bytes: None, runs: Vec::new() };
        Awaited { piece, under_way: false }
    }

    fn arrived(&mut self, read: Read) {
        (self.piece.bytes, self.piece.runs) = (Some(read.bytes), read.runs);
        self.under_way = false;
    }
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
    /// Up to this sector the store is known to hold data.
    data_end: u64,
    spares: Vec<Buffer>,
}

impl Flow {
    /// From the disk's start to `end` sectors.
    pub fn new(engine: Engine, end: u64) -> Flow {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let ahead_max = processors.clamp(*AHEAD.start(), *AHEAD.end());
        let flight = Flight::new(engine, ahead_max);
        let (ahead, spares) = (VecDeque::new(), Vec::new());
        Flow { flight, ahead_max, ahead, sector: 0, end, zeros: 0, data_end: 0, spares }
    }

    /// Looks for zeros in the pieces, in steps of `grain` bytes.
    pub fn looking_for_zeros(self, grain: usize) -> Flow {
        Flow { flight: self.flight.looking_for_zeros(grain), ..self }
    }

    /// The next piece; `spare` is a buffer to use again. Pieces of data end at multiples of
    /// their size, so that they cover whole clusters.
    pub fn next(&mut self, spare: Option<Buffer>) -> Result<Option<Piece>, Fault> {
        self.spares.extend(spare);
        while self.ahead.len() < self.ahead_max && self.sector < self.end {
            self.ask()?;
        }
        while self.ahead.front().is_some_and(|awaited| awaited.under_way) {
            let read = self.flight.next_read()?.expect("the piece is under way");
            let at = self.ahead.iter().position(|awaited| awaited.piece.sector == read.tag);
            self.ahead[at.expect("it was asked for")].arrived(read);
        }
        Ok(self.ahead.pop_front().map(|awaited| awaited.piece))
    }

    /// Asks for one more piece.
    fn ask(&mut self) -> Result<(), Fault> {
        if self.zeros == 0 && self.sector >= self.data_end {
            self.zeros = self.zero_run()?;
        }
        let sector = self.sector;
        if self.zeros > 0 {
            let count = std::mem::take(&mut self.zeros);
            self.sector += count;
            self.ahead.push_back(Awaited::zeros(sector, count));
            return Ok(());
        }
        let whole = PIECE_BYTES as u64 / SECTOR_BYTES;
        let count = (whole - sector % whole).min(self.end - sector);
        let len = (count * SECTOR_BYTES) as usize;
        let spare = self.spares.pop().map(|spare| spare.with_len(len));
        let buffer = spare.unwrap_or_else(|| Buffer::new(len));
        let read = self.flight.read(sector, sector, buffer)?;
        self.sector += count;
        let mut awaited = Awaited { under_way: true, ..Awaited::zeros(sector, count) };
        if let Some(read) = read {
            awaited.arrived(read);
        }
        self.ahead.push_back(awaited);
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
                    let (hole, data) = self.hole(file, offset, extent.sectors)?;
                    run += hole;
                    if hole < extent.sectors {
                        self.data_end = at + hole + data;
                        break;
                    }
                }
            }
        }
        Ok(run)
    }

    /// Sectors of a hole at `offset`, and of the data behind it; stretches too short to gain by
    /// asking count as data.
    fn hole(
        &mut self,
        file: platter_image::FileNo,
        offset: u64,
        sectors: u64,
    ) -> Result<(u64, u64), Fault> {
        let len = sectors * SECTOR_BYTES;
        if len < PIECE_BYTES as u64 {
            return Ok((0, 0));
        }
        let engine = self.flight.engine();
        let data = engine.medium(file).data_after(offset, offset + len);
        let data = data.map_err(|e| Fault::io(engine.path(file), "look for holes", e))?;
        Ok(data.map_or((sectors, 0), |(start, len)| {
            ((start - offset) / SECTOR_BYTES, len / SECTOR_BYTES)
        }))
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
    //! Would miss: formats other than raw (the conversion tests have them).

    use super::*;
    use crate::engine::options;
    use crate::medium::{DiskFolder, Folder, RamFolder};
    use platter_image::{Access, Format};

    #[test]
    fn pieces_and_their_runs_are_the_whole_disk_with_holes_and_without() {
        // Whole pieces of data, zeros within them, holes, and an end short enough to be read at
        // once.
        let mut disk = vec![0; (7 << 20) + 20_480];
        for (start, end) in [(5000, 1_500_000), (2 << 20, 4 << 20), (7 << 20, (7 << 20) + 5000)] {
            disk[start..end].iter_mut().enumerate().for_each(|(n, b)| *b = (n / 50) as u8 | 1);
        }
        let root = std::env::temp_dir().join(format!("platter-flow-{}", std::process::id()));
        std::fs::create_dir_all(&root).unwrap();
        let file = std::fs::File::create(root.join("a.raw")).unwrap();
        file.set_len(disk.len() as u64).unwrap();
        for (start, len) in data_runs(&disk, 4096) {
            use std::os::unix::fs::FileExt;
            file.write_all_at(&disk[start..start + len], start as u64).unwrap();
        }
        let ram = RamFolder::new();
        ram.put("a.raw", disk.clone());
        let folders: [&dyn Folder; 2] = [&DiskFolder::new(&root), &ram];
        for folder in folders {
            let raw = options(Format::Raw, Access::ReadOnly);
            let engine = Engine::open(folder, "a.raw", raw).unwrap();
            let mut flow =
                Flow::new(engine, disk.len() as u64 / SECTOR_BYTES).looking_for_zeros(4096);
            let (mut seen, mut at, mut spare) = (vec![0; disk.len()], 0, None);
            while let Some(piece) = flow.next(spare.take()).unwrap() {
                assert_eq!(piece.sector, at);
                at += piece.count;
                let byte = (piece.sector * SECTOR_BYTES) as usize;
                for &(start, len) in &piece.runs {
                    let from = &piece.bytes.as_ref().unwrap()[start..start + len];
                    seen[byte + start..byte + start + len].copy_from_slice(from);
                }
                spare = piece.bytes;
            }
            assert!(at == disk.len() as u64 / SECTOR_BYTES && seen == disk);
        }
        std::fs::remove_dir_all(&root).unwrap();
    }

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
