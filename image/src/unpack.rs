//! Compressed clusters: their packed bytes are asked for like metadata, and unpacked into a cache
//! of one or two clusters whose memory is taken when the image is opened.
//!
//! Bounds: a packed stream is read up to one cluster and some slack, whatever its entry claims;
//! never more than one cluster comes out of it, and exactly one must (for zlib: a rest of zeros).
//! Unpacking takes no memory.

use alloc::boxed::Box;
use alloc::vec::Vec;

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags as flags;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};

use crate::fault::ImageFault;
use crate::format::{Codec, Packed};
use crate::memory::{SPARE_BYTES, filled, is_left};
use crate::types::{BlockRef, Extent, FileNo, Step, Stop};
use crate::zstd::Zstd;

/// Most bytes that one `Miss` for packed bytes asks for.
const PIECE_BYTES: u64 = 64 << 10;
/// What a packed cluster may be longer than an unpacked one (ours: zlib's and VMDK's framing).
const SLACK_BYTES: u64 = 4096;
/// Up to this cluster size two are kept, else one.
const TWO_UP_TO_BYTES: usize = 64 << 10;

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Free,
    /// Packed bytes are being fetched; `have` of them are there, `asked` is under way.
    Loading {
        have: u64,
        asked: Option<BlockRef>,
    },
    Ready,
}

struct Slot {
    state: State,
    file: FileNo,
    /// Where the packed stream starts: with `file` the cluster's name.
    offset: u64,
    packed: Vec<u8>,
    unpacked: Vec<u8>,
    used_at: u64,
}

/// The decoders' own memory, for one thread.
pub struct Decoders {
    deflate: Box<DecompressorOxide>,
    /// Only where it is needed: it has 130 KiB.
    zstd: Option<Zstd>,
}

impl Default for Decoders {
    fn default() -> Decoders {
        Decoders { deflate: Box::default(), zstd: Some(Zstd::new()) }
    }
}

/// A compressed cluster that the caller reads and unpacks itself, on a thread of its choice.
#[derive(Clone, Copy, Debug)]
pub struct PackedCluster(Packed);

/// What [`Image::map_apart`](crate::Image::map_apart) answers.
#[derive(Clone, Copy, Debug)]
pub enum Apart {
    Extent(Extent),
    /// So many guest sectors lie in this cluster, from its `skip` on.
    Packed {
        sectors: u64,
        cluster: PackedCluster,
    },
}

impl PackedCluster {
    pub(crate) fn new(packed: Packed) -> PackedCluster {
        PackedCluster(packed)
    }

    pub fn file(&self) -> FileNo {
        self.0.file
    }

    /// The stretch of the file to read: offset and bytes. What lies past the end of the file
    /// counts as zeros.
    pub fn stretch(&self) -> (u64, usize) {
        let (start, end) = span(&self.0);
        (start, (end - start) as usize)
    }

    /// Bytes of the whole cluster.
    pub fn unpacked_bytes(&self) -> usize {
        self.0.unpacked_bytes as usize
    }

    /// Where in them the guest range starts.
    pub fn skip(&self) -> usize {
        self.0.skip as usize
    }

    /// Unpacks the bytes of the stretch into the whole cluster.
    pub fn unpack(
        &self,
        decoders: &mut Decoders,
        stretch: &[u8],
        cluster: &mut [u8],
    ) -> Result<(), ImageFault> {
        unpack(decoders, &self.0, stretch, cluster)
    }
}

/// The cache of unpacked clusters of one image.
pub(crate) struct Unpacker {
    slots: Vec<Slot>,
    unpacked_max: usize,
    decoders: Option<Decoders>,
    clock: u64,
    /// There was no memory for a cluster: why none can be read.
    lack: Option<ImageFault>,
}

impl Unpacker {
    /// No cluster at all.
    pub fn none() -> Unpacker {
        Unpacker { slots: Vec::new(), unpacked_max: 0, decoders: None, clock: 0, lack: None }
    }

    /// For clusters of up to `unpacked_max` bytes; none at all when it is 0, or without the memory
    /// for them. `zstd`: some are packed so.
    pub fn new(unpacked_max: usize, zstd: bool) -> Unpacker {
        let count = match unpacked_max {
            0 => 0,
            max if max <= TWO_UP_TO_BYTES => 2,
            _ => 1,
        };
        let packed_max = unpacked_max + SLACK_BYTES as usize + 1024;
        let needed = (packed_max + unpacked_max) * count;
        let slot = || {
            Some(Slot {
                state: State::Free,
                file: FileNo(0),
                offset: 0,
                packed: filled(0, packed_max)?,
                unpacked: filled(0, unpacked_max)?,
                used_at: 0,
            })
        };
        let slots: Option<Vec<Slot>> = (0..count).map(|_| slot()).collect();
        let Some(slots) = slots.filter(|_| count == 0 || is_left(SPARE_BYTES)) else {
            let field = "memory for unpacked clusters, which the domain has not: raise memory=,";
            let lack = ImageFault::unsupported(FileNo(0), field, needed as u64);
            return Unpacker { lack: Some(lack), ..Unpacker::none() };
        };
        Unpacker {
            slots,
            unpacked_max,
            decoders: (count > 0)
                .then(|| Decoders { deflate: Box::default(), zstd: zstd.then(Zstd::new) }),
            clock: 0,
            lack: None,
        }
    }

    /// Why no packed cluster can be read, if none can.
    pub fn lack(&self) -> Option<ImageFault> {
        self.lack
    }

    /// Longest `Miss`; 0 when there will be none.
    pub fn miss_bytes_max(&self) -> u32 {
        if self.slots.is_empty() { 0 } else { PIECE_BYTES as u32 }
    }

    /// Where in the cache the unpacked bytes of a cluster start (its `skip` not counted).
    pub fn get(&mut self, packed: &Packed) -> Step<usize> {
        self.clock += 1;
        let index = match self.find(packed) {
            Some(index) => index,
            None => self.take(packed)?,
        };
        self.slots[index].used_at = self.clock;
        if let State::Loading { have, asked } = self.slots[index].state {
            if asked.is_some() {
                return Err(Stop::Busy);
            }
            let (start, end) = span(packed);
            if start + have < end {
                let len = (end - start - have).min(PIECE_BYTES) as u32;
                let block = BlockRef { file: packed.file, offset: start + have, len };
                self.slots[index].state = State::Loading { have, asked: Some(block) };
                return Err(Stop::Miss(block));
            }
            // Whatever comes of it, the next one who asks starts afresh after a fault.
            self.slots[index].state = State::Free;
            self.unpack(index, packed)?;
            self.slots[index].state = State::Ready;
        }
        Ok(index * self.unpacked_max)
    }

    /// Unpacked bytes.
    pub fn bytes(&self, offset: usize, len: usize) -> &[u8] {
        let (index, within) = (offset / self.unpacked_max, offset % self.unpacked_max);
        &self.slots[index].unpacked[within..within + len]
    }

    /// Takes in bytes that `get` asked for.
    pub fn fill(&mut self, block: BlockRef, bytes: &[u8]) {
        for slot in &mut self.slots {
            if let State::Loading { have, asked: Some(asked) } = slot.state
                && asked == block
            {
                let (at, len) = (have as usize, block.len as usize);
                let given = len.min(bytes.len());
                slot.packed[at..at + given].copy_from_slice(&bytes[..given]);
                slot.packed[at + given..at + len].fill(0);
                slot.state = State::Loading { have: have + u64::from(block.len), asked: None };
            }
        }
    }

    /// The bytes could not be read.
    pub fn fill_failed(&mut self, block: BlockRef) {
        for slot in &mut self.slots {
            if matches!(slot.state, State::Loading { asked: Some(asked), .. } if asked == block) {
                slot.state = State::Free;
            }
        }
    }

    fn find(&self, packed: &Packed) -> Option<usize> {
        self.slots.iter().position(|slot| {
            slot.state != State::Free && slot.file == packed.file && slot.offset == packed.offset
        })
    }

    fn take(&mut self, packed: &Packed) -> Step<usize> {
        if let Some(lack) = self.lack {
            return Err(lack.into());
        }
        assert!(packed.unpacked_bytes as usize <= self.unpacked_max, "a layer's own limit");
        let idle = |slot: &Slot| match slot.state {
            State::Free => Some(0),
            State::Ready => Some(slot.used_at),
            State::Loading { asked, .. } => asked.is_none().then_some(slot.used_at),
        };
        let choice = self.slots.iter().enumerate().filter_map(|(i, s)| Some((idle(s)?, i))).min();
        let Some((_, index)) = choice else { return Err(Stop::Busy) };
        let slot = &mut self.slots[index];
        slot.state = State::Loading { have: 0, asked: None };
        (slot.file, slot.offset) = (packed.file, packed.offset);
        Ok(index)
    }

    fn unpack(&mut self, index: usize, packed: &Packed) -> Result<(), ImageFault> {
        let slot = &mut self.slots[index];
        let (start, end) = span(packed);
        let stretch = &slot.packed[..(end - start) as usize];
        let cluster = &mut slot.unpacked[..packed.unpacked_bytes as usize];
        let decoders = self.decoders.as_mut().expect("made with the slots");
        unpack(decoders, packed, stretch, cluster)
    }
}

fn unpack(
    decoders: &mut Decoders,
    packed: &Packed,
    stretch: &[u8],
    cluster: &mut [u8],
) -> Result<(), ImageFault> {
    let input = &stretch[(packed.offset - span(packed).0) as usize..];
    let Decoders { deflate, zstd } = decoders;
    let done = match packed.codec {
        Codec::Deflate => inflate(deflate, input, cluster, 0),
        Codec::Zlib => inflate(deflate, input, cluster, flags::TINFL_FLAG_PARSE_ZLIB_HEADER),
        Codec::Zstd => zstd.as_mut().expect("told at open").unpack(input, cluster),
    };
    match done {
        Some(len) if len == cluster.len() => Ok(()),
        Some(len) if packed.codec == Codec::Zlib => {
            cluster[len..].fill(0);
            Ok(())
        }
        short => {
            let value = short.unwrap_or(0) as u64;
            let what = "the unpacked length of a compressed cluster";
            Err(ImageFault::corrupt(packed.file, what, packed.offset, value))
        }
    }
}

/// The stretch of the file to fetch: whole sectors around the packed bytes.
fn span(packed: &Packed) -> (u64, u64) {
    let start = packed.offset & !511;
    let len = u64::from(packed.packed_bytes)
        .min(u64::from(packed.unpacked_bytes) + SLACK_BYTES)
        .saturating_add(packed.offset - start);
    // Formats check that offsets stay far below 2^63.
    (start, start + len.next_multiple_of(512))
}

/// Bytes that came out, at most all of `output`; `None` for a broken stream.
fn inflate(
    state: &mut DecompressorOxide,
    input: &[u8],
    output: &mut [u8],
    more: u32,
) -> Option<usize> {
    state.init();
    let how =
        flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF | flags::TINFL_FLAG_IGNORE_ADLER32 | more;
    let (status, _, written) = decompress(state, input, output, 0, how);
    match status {
        TINFLStatus::Done | TINFLStatus::HasMoreOutput => Some(written),
        // A full cluster is enough: the stream may go on in bytes that were not fetched.
        _ if written == output.len() => Some(written),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    //! Would miss: what an image says of a compressed cluster; this is only about the streams.

    use super::*;
    use alloc::vec;

    fn packed(codec: Codec, bytes: u32) -> Packed {
        let (file, offset, skip) = (FileNo(0), 1024 + 100, 0);
        Packed { file, offset, packed_bytes: bytes, unpacked_bytes: 65536, skip, codec }
    }

    fn run(unpacker: &mut Unpacker, packed: &Packed, stream: &[u8]) -> Step<usize> {
        let mut file = vec![0; 1 << 20];
        file[packed.offset as usize..][..stream.len()].copy_from_slice(stream);
        loop {
            match unpacker.get(packed) {
                Err(Stop::Miss(block)) => {
                    assert!(block.len <= PIECE_BYTES as u32 && block.offset % 512 == 0);
                    let at = block.offset as usize;
                    assert_eq!(unpacker.get(packed), Err(Stop::Busy));
                    unpacker.fill(block, &file[at..at + block.len as usize]);
                }
                answer => return answer,
            }
        }
    }

    #[test]
    fn deflate_comes_out_whole_or_not_at_all() {
        let data: Vec<u8> = (0..65536u32).map(|i| (i / 7 % 251) as u8).collect();
        let stream = miniz_oxide::deflate::compress_to_vec(&data, 6);
        let mut unpacker = Unpacker::new(65536, false);
        let cluster = packed(Codec::Deflate, stream.len() as u32);
        let at = run(&mut unpacker, &cluster, &stream).unwrap();
        assert_eq!(unpacker.bytes(at, 65536), data);
        // Kept: no further miss.
        assert_eq!(unpacker.get(&cluster), Ok(at));

        let short = miniz_oxide::deflate::compress_to_vec(&data[..65535], 6);
        let mut unpacker = Unpacker::new(65536, false);
        let cluster = packed(Codec::Deflate, short.len() as u32);
        assert!(matches!(run(&mut unpacker, &cluster, &short), Err(Stop::Fault(_))));
    }

    /// 64 TiB are more than any process can have.
    #[test]
    fn memory_that_is_not_there_is_a_fault_and_no_panic() {
        let mut unpacker = Unpacker::new(1 << 46, false);
        let fault = unpacker.lack().expect("no memory for that");
        assert!(fault.field.contains("memory for unpacked clusters"));
        assert_eq!(unpacker.get(&packed(Codec::Deflate, 100)), Err(Stop::Fault(fault)));
        let unpacker = Unpacker::new(0, false);
        assert_eq!((unpacker.miss_bytes_max(), unpacker.lack()), (0, None));
    }

    #[test]
    fn a_bomb_ends_at_one_cluster() {
        let stream = miniz_oxide::deflate::compress_to_vec(&vec![0; 64 << 20], 9);
        let mut unpacker = Unpacker::new(65536, false);
        let cluster = packed(Codec::Deflate, stream.len() as u32);
        let at = run(&mut unpacker, &cluster, &stream).unwrap();
        assert_eq!(unpacker.bytes(at, 65536), [0; 65536]);
        // And a claim of 4 GiB of packed bytes fetches no more than a cluster and some.
        assert_eq!(span(&packed(Codec::Deflate, u32::MAX)), (1024, 1024 + 65536 + 4096 + 512));
    }
}
