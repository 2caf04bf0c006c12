//! Targets that are not images to write into but streams, laid out once from front to end with
//! compressed clusters: `platter convert -c` to qcow2, and VMDK's subformat streamOptimized.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::Path;

use flate2::{Compress, Compression, FlushCompress, Status};
use indicatif::ProgressBar;
use platter_image::{CreateFault, CreateParams, Format, Qcow2Stream, SECTOR_BYTES, VmdkStream};

use super::common::Failure;
use crate::create::{Replace, claim, empty};
use crate::engine::Engine;
use crate::flow::{Flow, Piece, is_zero};
use crate::made::Made;
use crate::pool::{Desk, Pool};

/// The level at which zlib is usually run.
const LEVEL: u32 = 6;
/// How far back qcow2's deflate may look, as a power of two: QEMU inflates with a window of this.
const QCOW2_WINDOW_BITS: u8 = 12;
const VMDK_WINDOW_BITS: u8 = 15;
/// Clusters being packed at once.
const CLUSTERS_MAX: usize = 32;

/// Writes the disk that `reader` holds to a new file at `path`.
pub fn write(
    reader: Engine,
    params: &CreateParams,
    (path, replace): (&Path, &Replace),
    bar: &ProgressBar,
) -> Result<(), Failure> {
    let layout = Layout::new(params).map_err(|why| refused(path, &why))?;
    let mut made = Made::default();
    let file = claim(path, replace, &mut made)?;
    empty(path, &file, &mut made)?;
    fill(reader, layout, (path, file), params.sectors, bar)?;
    made.keep();
    Ok(())
}

fn refused(path: &Path, why: &CreateFault) -> Failure {
    Failure::new(format!("{}: {why}", path.display()))
}

fn failed(path: &Path, doing: &str, error: &std::io::Error) -> Failure {
    Failure::new(format!("{}: cannot {doing}: {error}", path.display()))
}

/// Where what goes.
enum Layout {
    Qcow2(Qcow2Stream),
    Vmdk(VmdkStream),
}

/// A cluster's bytes, compressed or, where that gains nothing in a qcow2, as they are.
struct Packed {
    bytes: Vec<u8>,
    is_packed: bool,
}

impl Layout {
    fn new(params: &CreateParams) -> Result<Layout, CreateFault> {
        Ok(match params.format {
            Format::Qcow2 => Layout::Qcow2(Qcow2Stream::new(params)?),
            _ => Layout::Vmdk(VmdkStream::new(params)?),
        })
    }

    fn cluster_bytes(&self) -> usize {
        match self {
            Layout::Qcow2(stream) => stream.cluster_bytes(),
            Layout::Vmdk(stream) => stream.grain_bytes(),
        }
    }

    fn start(&mut self) -> &[u8] {
        match self {
            Layout::Qcow2(stream) => stream.start(),
            Layout::Vmdk(stream) => stream.start(),
        }
    }

    fn cluster(&mut self, number: u64, packed: &Packed) -> Result<&[u8], CreateFault> {
        match self {
            Layout::Qcow2(stream) => Ok(stream.cluster(number, &packed.bytes, packed.is_packed)),
            Layout::Vmdk(stream) => stream.grain(number, &packed.bytes),
        }
    }

    fn finish(&mut self) -> Result<&[u8], CreateFault> {
        match self {
            Layout::Qcow2(stream) => stream.finish(),
            Layout::Vmdk(stream) => Ok(stream.finish()),
        }
    }

    /// What is written over the start of the file when all else is there.
    fn header(&self) -> Vec<u8> {
        match self {
            Layout::Qcow2(stream) => stream.header(),
            Layout::Vmdk(_) => Vec::new(),
        }
    }

    /// How a cluster is packed, on any thread.
    fn packer(&self) -> fn(&mut Desk, Vec<u8>) -> Packed {
        match self {
            Layout::Qcow2(stream) if stream.is_zstd() => |desk, bytes| {
                let mut packed = vec![0; bytes.len() - 1];
                // It fails where there is no room, for nothing is gained then.
                match desk.packing().compress_to_buffer(&bytes, &mut packed[..]) {
                    Ok(len) => {
                        packed.truncate(len);
                        Packed { bytes: packed, is_packed: true }
                    }
                    Err(_) => Packed { bytes, is_packed: false },
                }
            },
            Layout::Qcow2(_) => |_, bytes| {
                let raw = Compress::new_with_window_bits(
                    Compression::new(LEVEL),
                    false,
                    QCOW2_WINDOW_BITS,
                );
                match deflate(raw, &bytes, bytes.len() - 1) {
                    Some(packed) => Packed { bytes: packed, is_packed: true },
                    None => Packed { bytes, is_packed: false },
                }
            },
            Layout::Vmdk(_) => |_, bytes| {
                let zlib =
                    Compress::new_with_window_bits(Compression::new(LEVEL), true, VMDK_WINDOW_BITS);
                let packed = deflate(zlib, &bytes, bytes.len() * 2);
                Packed { bytes: packed.expect("it grows by a few bytes at most"), is_packed: true }
            },
        }
    }
}

/// All of `bytes` in at most `len_max`, or `None`.
fn deflate(mut stream: Compress, bytes: &[u8], len_max: usize) -> Option<Vec<u8>> {
    let mut packed = vec![0; len_max];
    let status = stream.compress(bytes, &mut packed, FlushCompress::Finish);
    packed.truncate(stream.total_out() as usize);
    matches!(status, Ok(Status::StreamEnd)).then_some(packed)
}

/// Clusters on their way into the file: packed by many threads, written in their order.
struct Packer<'a, P> {
    layout: Layout,
    put: P,
    path: &'a Path,
    pool: Pool<(u64, Packed)>,
    /// Clusters being packed, in order, and what is packed of them.
    order: VecDeque<u64>,
    packed: BTreeMap<u64, Packed>,
}

impl<P: FnMut(&[u8]) -> Result<(), Failure>> Packer<'_, P> {
    /// Takes a cluster over, unless it is zeros; the bytes are zeros then.
    fn add(&mut self, number: u64, cluster: &mut [u8]) -> Result<(), Failure> {
        if is_zero(cluster) {
            return Ok(());
        }
        while self.pool.out() >= CLUSTERS_MAX {
            self.write(1)?;
        }
        let bytes = cluster.to_vec();
        cluster.fill(0);
        self.order.push_back(number);
        let pack = self.layout.packer();
        self.pool.submit(move |desk| (number, pack(desk, bytes)));
        Ok(())
    }

    /// Waits for so many clusters and writes those whose turn it is.
    fn write(&mut self, at_least: usize) -> Result<(), Failure> {
        self.packed.extend(self.pool.take(at_least));
        while let Some(number) = self.order.front() {
            let Some(packed) = self.packed.remove(number) else { break };
            let bytes = self.layout.cluster(*number, &packed);
            (self.put)(bytes.map_err(|why| refused(self.path, &why))?)?;
            self.order.pop_front();
        }
        Ok(())
    }
}

fn fill(
    reader: Engine,
    mut layout: Layout,
    (path, file): (&Path, File),
    sectors: u64,
    bar: &ProgressBar,
) -> Result<(), Failure> {
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let cluster_bytes = layout.cluster_bytes();
    let cluster_sectors = cluster_bytes as u64 / SECTOR_BYTES;
    let told = |error: std::io::Error| failed(path, "write", &error);
    let mut put = |bytes: &[u8]| out.write_all(bytes).map_err(told);
    put(layout.start())?;
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get());
    let (pool, order, packed) = (Pool::new(threads), VecDeque::new(), BTreeMap::new());
    let mut packer = Packer { layout, put, path, pool, order, packed };
    let mut flow = Flow::new(reader, sectors);
    // A cluster under way: which one, and its bytes; stretches of zeros end within clusters.
    let mut cluster = vec![0; cluster_bytes];
    let mut spare = None;
    let mut number = 0;
    while let Some(Piece { sector, count, bytes, .. }) = flow.next(spare.take())? {
        let mut at = sector;
        while at < sector + count {
            if at / cluster_sectors != number {
                packer.add(number, &mut cluster)?;
                number = at / cluster_sectors;
            }
            let end = ((at / cluster_sectors + 1) * cluster_sectors).min(sector + count);
            if let Some(bytes) = &bytes {
                let byte = |sector: u64| (sector * SECTOR_BYTES) as usize;
                let into = byte(at % cluster_sectors);
                let from = &bytes[byte(at - sector)..byte(end - sector)];
                cluster[into..into + from.len()].copy_from_slice(from);
                at = end;
            } else {
                // Zeros up to the end of this cluster, then whole ones at once.
                at = end.max((sector + count) / cluster_sectors * cluster_sectors);
            }
        }
        spare = bytes;
        bar.inc(count * SECTOR_BYTES);
    }
    packer.add(number, &mut cluster)?;
    packer.write(packer.pool.out())?;
    let mut layout = packer.layout;
    out.write_all(layout.finish().map_err(|why| refused(path, &why))?).map_err(told)?;
    let header = layout.header();
    if !header.is_empty() {
        // It names what must be durable by then.
        out.flush().and_then(|()| out.get_ref().sync_data()).map_err(told)?;
        out.seek(SeekFrom::Start(0)).map_err(told)?;
        out.write_all(&header).map_err(told)?;
    }
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
        assert!(
            write(reader, &params, (&path, &Replace::default()), &ProgressBar::hidden()).is_ok()
        );
        assert!(std::fs::metadata(&path).unwrap().len() < 400_000);
        let vmdk = options(Format::Vmdk, Access::ReadOnly);
        let mut engine = Engine::open(&DiskFolder::new(&root), "s.vmdk", vmdk).unwrap();
        let mut read = vec![0xee; disk.len()];
        engine.read(0, &mut read).unwrap();
        assert!(read == disk);
        std::fs::remove_dir_all(&root).unwrap();
    }
}
