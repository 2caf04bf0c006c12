//! Zstandard frames (RFC 8878), unpacked straight into a cluster.
//!
//! Bounds: all memory is taken when the decoder is made and does not depend on the stream; what
//! comes out ends at the cluster's end, whatever a block claims; every loop ends with the input or
//! the output. It must never index by what the stream says without a check: a broken stream is
//! `None`. Dictionaries are refused; checksums are not compared, as for the other codecs.

mod bits;
mod fse;
mod huffman;
mod sequences;

use alloc::boxed::Box;
use alloc::vec;

use self::bits::word;
use self::huffman::Huffman;
use self::sequences::{Output, Sequences};

/// Longest block (RFC 8878, 3.1.1.2.4), and so longest literals of one.
const BLOCK_BYTES_MAX: usize = 128 << 10;

/// A decoder with all the memory it will ever need.
pub(crate) struct Zstd {
    literals: Box<[u8]>,
    huffman: Huffman,
    sequences: Sequences,
}

impl Zstd {
    pub fn new() -> Zstd {
        Zstd {
            literals: vec![0; BLOCK_BYTES_MAX].into_boxed_slice(),
            huffman: Huffman::new(),
            sequences: Sequences::new(),
        }
    }

    /// Unpacks one frame: bytes that came out, at most all of `output`. What follows them there
    /// may be anything.
    pub fn unpack(&mut self, input: &[u8], output: &mut [u8]) -> Option<usize> {
        let mut input = input.get(frame_header_bytes(input)?..)?;
        self.huffman.is_set = false;
        self.sequences.begin();
        let mut output = Output::new(output);
        loop {
            let head = input.get(..3)?;
            let head = u32::from_le_bytes([head[0], head[1], head[2], 0]);
            let (is_last, kind, size) = (head & 1 != 0, head >> 1 & 3, (head >> 3) as usize);
            input = &input[3..];
            let taken = if kind == 1 { 1 } else { size };
            let block = input.get(..taken)?;
            match kind {
                0 => output.push(block),
                1 => output.fill(block[0], size),
                2 => self.block(block, &mut output)?,
                _ => return None,
            }
            if is_last || output.room() == 0 {
                return Some(output.len());
            }
            input = &input[taken..];
        }
    }

    /// A compressed block (3.1.1.3): literals, then sequences.
    fn block(&mut self, block: &[u8], output: &mut Output) -> Option<()> {
        let head = LiteralsHead::parse(block)?;
        let rest = block.get(head.end..)?;
        let packed = &block[head.start..head.end];
        let alone = *rest.first()? == 0;
        if alone && head.size <= output.room() {
            // Straight to where they belong.
            return self.huffman.literals(&head, packed, output.take(head.size));
        }
        let literals = match head.kind {
            0 => packed,
            _ => {
                let into = &mut self.literals[..head.size];
                self.huffman.literals(&head, packed, into)?;
                into
            }
        };
        if alone {
            output.push(literals);
            return Some(());
        }
        self.sequences.run(rest, literals, output)
    }
}

/// The head of a block's literals (3.1.1.3.1.1).
struct LiteralsHead {
    /// 0 raw, 1 one byte repeated, 2 packed with a tree, 3 packed with the tree of before.
    kind: u8,
    four_streams: bool,
    /// Bytes that come out: at most those of a block.
    size: usize,
    /// Where the bytes lie in the block that they come from.
    start: usize,
    end: usize,
}

impl LiteralsHead {
    fn parse(block: &[u8]) -> Option<LiteralsHead> {
        let first = *block.first()?;
        let (kind, format) = (first & 3, first >> 2 & 3);
        let head = (word(block, 0) >> 4) as usize;
        let (size, start, packed) = if kind < 2 {
            let (size, start) = match format {
                0 | 2 => (usize::from(first >> 3), 1),
                1 => (head & 0xfff, 2),
                _ => (head & 0xf_ffff, 3),
            };
            (size, start, if kind == 0 { size } else { 1 })
        } else {
            let (width, start) = [(10, 3), (10, 3), (14, 4), (18, 5)][usize::from(format)];
            let mask = (1 << width) - 1;
            (head & mask, start, head >> width & mask)
        };
        let end = start + packed;
        let fits = size <= BLOCK_BYTES_MAX && end <= block.len();
        fits.then_some(LiteralsHead { kind, four_streams: format != 0, size, start, end })
    }
}

/// Length of a frame's header (3.1.1.1); `None` for anything else and for one with a dictionary.
fn frame_header_bytes(input: &[u8]) -> Option<usize> {
    if input.get(..4)? != [0x28, 0xb5, 0x2f, 0xfd] {
        return None;
    }
    let descriptor = *input.get(4)?;
    let single_segment = descriptor & 0x20 != 0;
    let dictionary = [0, 1, 2, 4][usize::from(descriptor & 3)];
    let size = match descriptor >> 6 {
        0 => usize::from(single_segment),
        order => 1 << order,
    };
    let at = 5 + usize::from(!single_segment);
    let id = input.get(at..at + dictionary)?;
    let is_plain = descriptor & 8 == 0 && id.iter().all(|&byte| byte == 0);
    is_plain.then_some(at + dictionary + size)
}

#[cfg(test)]
mod tests {
    //! The oracles are ruzstd, which compresses too, and the zstd program where it is installed.
    //! Would miss: streams that neither of them makes (the fuzz targets of compressed images).

    extern crate std;

    use alloc::vec::Vec;
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;
    use crate::create::random;

    /// Contents of many kinds.
    fn contents(len: usize) -> Vec<Vec<u8>> {
        let noise: Vec<u8> = (0..len as u64).map(|n| random(5, n) as u8).collect();
        let letters = |n: u64| b"etaoin shrdlucmfwypvbgkjqxz,.\n"[(random(7, n) % 30) as usize];
        let skewed = |n: u64| letters(n & random(9, n));
        let text: Vec<u8> = (0..len as u64).map(skewed).collect();
        let mut mixed = text.clone();
        for start in (0..len).step_by(5000) {
            let (from, count) = (random(3, start as u64) as usize % (start + 1), 900);
            let piece = mixed[from..(from + count).min(len)].to_vec();
            let end = (start + piece.len()).min(len);
            mixed[start..end].copy_from_slice(&piece[..end - start]);
        }
        let counting = (0..len).map(|n| (n / 300) as u8).collect();
        let few = noise.iter().map(|byte| byte & 3).collect();
        vec![vec![0; len], noise, text, mixed, counting, few]
    }

    fn by_program(level: &str, data: &[u8]) -> Option<Vec<u8>> {
        let mut zstd = Command::new("zstd");
        let zstd = zstd.args(["-q", "-c", "--ultra", level]).stderr(Stdio::null());
        let mut child = zstd.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().ok()?;
        let mut input = child.stdin.take()?;
        let data = data.to_vec();
        let feeder = std::thread::spawn(move || input.write_all(&data));
        let output = child.wait_with_output().ok()?;
        feeder.join().ok()?.ok()?;
        output.status.success().then_some(output.stdout)
    }

    fn by_ruzstd(data: &[u8]) -> Vec<u8> {
        let level = ruzstd::encoding::CompressionLevel::Fastest;
        ruzstd::encoding::compress_to_vec(data, level)
    }

    #[test]
    fn what_others_pack_comes_out_whole() {
        let mut zstd = Zstd::new();
        let (mut packed, mut programs) = (0, 0);
        for len in [1, 5, 600, 4096, 65536, 300_000, 2 << 20] {
            for data in contents(len) {
                let mut streams = vec![by_ruzstd(&data)];
                let levels: &[&str] = if len > 65536 { &["-3"] } else { &["-1", "-3", "-19"] };
                let streams_of_program = levels.iter().filter_map(|level| by_program(level, &data));
                streams.extend(streams_of_program);
                packed += 1;
                programs += streams.len() - 1;
                for stream in streams {
                    let mut output = vec![0xee; len];
                    assert_eq!(zstd.unpack(&stream, &mut output), Some(len), "{len}");
                    assert!(output == data, "{len}");
                    // What does not fit is left out: never more than the output.
                    let mut short = vec![0; len / 2];
                    assert_eq!(zstd.unpack(&stream, &mut short), Some(len / 2));
                    assert!(short == data[..len / 2]);
                    // More than the stream holds: what it holds.
                    let mut long = vec![0; len + 9];
                    assert_eq!(zstd.unpack(&stream, &mut long), Some(len));
                }
            }
        }
        assert!(packed == 42 && (programs == 0 || programs > 80), "{packed} {programs}");
    }

    #[test]
    fn broken_streams_are_none_or_bounded() {
        let mut zstd = Zstd::new();
        let mut output = vec![0; 65536];
        for data in contents(65536) {
            let stream = by_program("-5", &data).unwrap_or_else(|| by_ruzstd(&data));
            for cut in (0..stream.len()).step_by(stream.len() / 50 + 1) {
                let whole = zstd.unpack(&stream[..cut], &mut output);
                assert!(whole.is_none_or(|len| len <= output.len()));
            }
            for n in 0..400 {
                let mut bad = stream.clone();
                for flip in 0..1 + random(n, 0) % 4 {
                    let at = random(n, flip * 2 + 1) as usize % bad.len().min(400);
                    bad[at] ^= 1 << (random(n, flip * 2 + 2) % 8);
                }
                let _ = zstd.unpack(&bad, &mut output);
            }
            // The decoder is as good as new after them.
            assert_eq!(zstd.unpack(&stream, &mut output), Some(65536));
            assert!(output == data);
        }
        // A dictionary, a skippable frame, a window of 2 GiB, which costs nothing.
        assert_eq!(zstd.unpack(&[0x28, 0xb5, 0x2f, 0xfd, 0x21, 9, 1], &mut output), None);
        assert_eq!(zstd.unpack(&[0x50, 0x2a, 0x4d, 0x18, 0, 0, 0, 0], &mut output), None);
        let huge = [0x28, 0xb5, 0x2f, 0xfd, 0, 0xa8, 0x0b, 0, 0, 7];
        assert_eq!(zstd.unpack(&huge, &mut output), Some(1));
        assert_eq!(output[0], 7);
    }

    /// A block of a few hundred bytes that claims gigabytes: sequences of the longest match, each
    /// for two bytes of input. It must end at the output.
    #[test]
    fn a_bomb_in_one_block_ends_with_the_output() {
        let count = 1000usize;
        // 1000 times one literal; always the codes for literal length 1, the last offset, and
        // match length 65539 and 16 bits.
        let mut block = vec![0x85, 0x3e, b'x'];
        block.extend([128 + (count >> 8) as u8, count as u8, 0x54, 1, 0, 52]);
        block.extend(vec![0xff; count * 2 + 1]);
        let mut stream = vec![0x28, 0xb5, 0x2f, 0xfd, 0, 0x58];
        let head = (block.len() << 3 | 2 << 1 | 1) as u32;
        stream.extend(&head.to_le_bytes()[..3]);
        stream.extend(block);
        let mut output = vec![0; 2 << 20];
        let unpacked = Zstd::new().unpack(&stream, &mut output);
        assert_eq!(unpacked, Some(2 << 20), "of 131 million bytes");
        assert!(output.iter().all(|&byte| byte == b'x'));
    }
}
