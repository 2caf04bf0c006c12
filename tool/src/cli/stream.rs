//! `platter convert -O vmdk -o subformat=streamOptimized`: the one target that is not an image
//! to write into but a stream, laid out once from front to end with compressed grains.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use indicatif::ProgressBar;
use miniz_oxide::deflate::compress_to_vec_zlib;
use platter_image::{CreateFault, CreateParams, SECTOR_BYTES, VmdkStream};

use super::common::Failure;
use crate::create::claim;
use crate::engine::Engine;
use crate::flow::{Flow, Piece, is_zero};
use crate::pool::Pool;

/// The level at which zlib is usually run.
const LEVEL: u8 = 6;
/// Grains being packed at once.
const GRAINS_MAX: usize = 32;

/// Writes the disk that `reader` holds to a new file at `path`.
pub fn write(
    reader: Engine,
    params: &CreateParams,
    (path, replace): (&Path, bool),
    bar: &ProgressBar,
) -> Result<(), Failure> {
    let stream = VmdkStream::new(params).map_err(|why| refused(path, &why))?;
    let file = claim(path, replace)?;
    file.set_len(0).map_err(|error| failed(path, "empty", &error))?;
    let result = fill(reader, stream, (path, file), params.sectors, bar);
    if result.is_err() {
        // What is half made is of no use.
        let _ = std::fs::remove_file(path);
    }
    result
}

fn refused(path: &Path, why: &CreateFault) -> Failure {
    Failure::new(format!("{}: {why}", path.display()))
}

fn failed(path: &Path, doing: &str, error: &std::io::Error) -> Failure {
    Failure::new(format!("{}: cannot {doing}: {error}", path.display()))
}

/// Grains on their way into the file: packed by many threads, written in their order.
struct Packer<'a, P> {
    stream: VmdkStream,
    put: P,
    path: &'a Path,
    pool: Pool<(u64, Vec<u8>)>,
    /// Grains being packed, in order, and what is packed of them.
    order: VecDeque<u64>,
    packed: BTreeMap<u64, Vec<u8>>,
}

impl<P: FnMut(&[u8]) -> Result<(), Failure>> Packer<'_, P> {
    /// Takes a grain over, unless it is zeros; the bytes are zeros then.
    fn add(&mut self, number: u64, grain: &mut [u8]) -> Result<(), Failure> {
        if is_zero(grain) {
            return Ok(());
        }
        while self.pool.out() >= GRAINS_MAX {
            self.write(1)?;
        }
        let bytes = grain.to_vec();
        grain.fill(0);
        self.order.push_back(number);
        self.pool.submit(move |_| (number, compress_to_vec_zlib(&bytes, LEVEL)));
        Ok(())
    }

    /// Waits for so many grains and writes those whose turn it is.
    fn write(&mut self, at_least: usize) -> Result<(), Failure> {
        self.packed.extend(self.pool.take(at_least));
        while let Some(number) = self.order.front() {
            let Some(packed) = self.packed.remove(number) else { break };
            let bytes = self.stream.grain(*number, &packed);
            (self.put)(bytes.map_err(|why| refused(self.path, &why))?)?;
            self.order.pop_front();
        }
        Ok(())
    }
}

fn fill(
    reader: Engine,
    mut stream: VmdkStream,
    (path, file): (&Path, File),
    sectors: u64,
    bar: &ProgressBar,
) -> Result<(), Failure> {
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let grain_bytes = stream.grain_bytes();
    let grain_sectors = grain_bytes as u64 / SECTOR_BYTES;
    let mut put = |bytes: &[u8]| out.write_all(bytes).map_err(|e| failed(path, "write", &e));
    put(stream.start())?;
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get());
    let (pool, order, packed) = (Pool::new(threads), VecDeque::new(), BTreeMap::new());
    let mut packer = Packer { stream, put, path, pool, order, packed };
    let mut flow = Flow::new(reader, sectors);
    // A grain under way: which one, and its bytes; stretches of zeros end within grains.
    let mut grain = vec![0; grain_bytes];
    let mut spare = None;
    let mut number = 0;
    while let Some(Piece { sector, count, bytes }) = flow.next(spare.take())? {
        let mut at = sector;
        while at < sector + count {
            if at / grain_sectors != number {
                packer.add(number, &mut grain)?;
                number = at / grain_sectors;
            }
            let end = ((at / grain_sectors + 1) * grain_sectors).min(sector + count);
            if let Some(bytes) = &bytes {
                let byte = |sector: u64| (sector * SECTOR_BYTES) as usize;
                let into = byte(at % grain_sectors);
                let from = &bytes[byte(at - sector)..byte(end - sector)];
                grain[into..into + from.len()].copy_from_slice(from);
                at = end;
            } else {
                // Zeros up to the end of this grain, then whole grains at once.
                at = end.max((sector + count) / grain_sectors * grain_sectors);
            }
        }
        spare = bytes;
        bar.inc(count * SECTOR_BYTES);
    }
    packer.add(number, &mut grain)?;
    packer.write(packer.pool.out())?;
    let mut stream = packer.stream;
    out.write_all(stream.finish()).map_err(|e| failed(path, "write", &e))?;
    let file = out.into_inner().map_err(|e| failed(path, "write", e.error()))?;
    file.sync_all().map_err(|e| failed(path, "sync", &e))
}

#[cfg(test)]
mod tests {
    //! Would miss: readers other than QEMU's and ours; the image tests of VMDK ask them.

    use super::*;
    use crate::engine::options;
    use crate::medium::{DiskFolder, RamFolder};
    use platter_image::{Access, Format};

    #[test]
    fn what_is_streamed_reads_the_same_and_zeros_take_no_room() {
        // Data that starts and ends within grains, a hole, and a last grain cut short.
        let sectors = 30_001u64;
        let mut disk = vec![0; sectors as usize * 512];
        for (start, end) in [(100, 700), (70_000, 3_000_000), (15_000_000, disk.len())] {
            disk[start..end].iter_mut().enumerate().for_each(|(n, b)| *b = (n / 50) as u8);
        }
        let folder = RamFolder::new();
        folder.put("in.raw", disk.clone());
        let raw = options(Format::Raw, Access::ReadOnly);
        let reader = Engine::open(&folder, "in.raw", raw).unwrap();
        let root = std::env::temp_dir().join(format!("platter-stream-{}", std::process::id()));
        std::fs::create_dir_all(&root).unwrap();
        let params = CreateParams {
            format: Format::Vmdk,
            name: "s.vmdk",
            sectors,
            cluster_bytes: 0,
            options: &[("subformat", "streamOptimized")],
            backing: None,
            seed: 1,
            unix_seconds: 0,
        };
        let path = root.join("s.vmdk");
        assert!(write(reader, &params, (&path, false), &ProgressBar::hidden()).is_ok());
        assert!(std::fs::metadata(&path).unwrap().len() < 400_000);
        let vmdk = options(Format::Vmdk, Access::ReadOnly);
        let mut engine = Engine::open(&DiskFolder::new(&root), "s.vmdk", vmdk).unwrap();
        let mut read = vec![0xee; disk.len()];
        engine.read(0, &mut read).unwrap();
        assert!(read == disk);
        std::fs::remove_dir_all(&root).unwrap();
    }
}
