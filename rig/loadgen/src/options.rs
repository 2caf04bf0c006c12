//! What a run does, from the words of a command line: `op=randread bs=4k depth=32 secs=10`.
//!
//! An unknown word is refused by name: a mistyped load would be measured as another one.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use platter_xen::blkif::Abi;

use crate::front::Shape;

/// A run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Names of the disks (`xvda`); all when empty.
    pub disks: Vec<String>,
    pub shape: Shape,
    /// The name of the kind of load, as it was given.
    pub op: String,
    pub random: bool,
    /// Reads among a hundred reads and writes.
    pub read_percent: u64,
    /// Nothing but one pass in which every sector must name itself or be zero.
    pub check: bool,
    pub block_bytes: u64,
    /// Blocks under way on each disk.
    pub depth: usize,
    pub seconds: u64,
    /// Ends the run after so many blocks; 0 for no such end.
    pub count: u64,
    /// Each so-many-th request is a flush, a discard, a barrier; 0 for none.
    pub flush_every: u64,
    pub discard_every: u64,
    pub barrier_every: u64,
    /// Small requests too are indirect.
    pub indirect: bool,
    /// Content is stamped and checked, and at the end read back over a new connection.
    pub verify: bool,
    /// The range is written once before the run.
    pub fill: bool,
    /// Bytes of each disk that are used, from its start.
    pub range_bytes: u64,
    pub seed: u64,
    /// A frontend whose habits are played instead of a load.
    pub play: Option<String>,
    /// How often.
    pub cycles: u64,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            disks: Vec::new(),
            shape: Shape { abi: Abi::X86_64, queues: 1, order: 0 },
            op: String::from("randread"),
            random: true,
            read_percent: 100,
            check: false,
            block_bytes: 4096,
            depth: 1,
            seconds: 5,
            count: 0,
            flush_every: 0,
            discard_every: 0,
            barrier_every: 0,
            indirect: false,
            verify: false,
            fill: false,
            range_bytes: 64 << 20,
            seed: 1,
            play: None,
            cycles: 1,
        }
    }
}

impl Options {
    /// From the words of a command line.
    ///
    /// # Errors
    /// The word that is not understood.
    pub fn parse(text: &str) -> Result<Options, String> {
        let mut options = Options::default();
        for word in text.split_whitespace() {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            options.set(key, value).ok_or_else(|| format!("`{word}` is not understood"))?;
        }
        let block = options.block_bytes;
        if block == 0 || block % 512 != 0 || block > 512 && block < 4096 && block % 1024 != 0 {
            return Err(format!("bs={block} is no number of sectors"));
        }
        if block > 1 << 20 || block > 4096 && block % 4096 != 0 {
            return Err(format!("bs={block} is neither pages nor at most 1 MiB"));
        }
        if options.depth == 0 || options.depth > 1024 {
            return Err(format!("depth={} is not 1 to 1024", options.depth));
        }
        Ok(options)
    }

    fn set(&mut self, key: &str, value: &str) -> Option<()> {
        match key {
            "disk" => self.disks = value.split(',').map(ToString::to_string).collect(),
            "abi" => self.shape.abi = abi(value)?,
            "queues" => self.shape.queues = size(value).filter(|n| (1..=4).contains(n))? as usize,
            "order" => self.shape.order = size(value).filter(|order| *order <= 4)? as u32,
            "op" => self.set_op(value)?,
            "mix" => self.read_percent = size(value).filter(|percent| *percent <= 100)?,
            "bs" => self.block_bytes = size(value)?,
            "depth" => self.depth = size(value)? as usize,
            "secs" => self.seconds = size(value).filter(|seconds| *seconds <= 86_400)?,
            "count" => self.count = size(value)?,
            "flush" => self.flush_every = size(value)?,
            "discard" => self.discard_every = size(value)?,
            "barrier" => self.barrier_every = size(value)?,
            "indirect" => self.indirect = flag(value)?,
            "verify" => self.verify = flag(value)?,
            "fill" => self.fill = flag(value)?,
            "range" => self.range_bytes = size(value).filter(|bytes| *bytes >= 1 << 20)?,
            "seed" => self.seed = size(value)?,
            "play" => self.play = Some(value.to_string()),
            "cycles" => self.cycles = size(value)?,
            _ => return None,
        }
        Some(())
    }

    fn set_op(&mut self, value: &str) -> Option<()> {
        (self.random, self.read_percent, self.check) = match value {
            "randread" => (true, 100, false),
            "randwrite" => (true, 0, false),
            "randrw" => (true, 50, false),
            "read" => (false, 100, false),
            "write" => (false, 0, false),
            "rw" => (false, 50, false),
            "check" => (false, 100, true),
            _ => return None,
        };
        self.op = value.to_string();
        Some(())
    }
}

fn abi(value: &str) -> Option<Abi> {
    match value {
        "64" => Some(Abi::X86_64),
        "32" => Some(Abi::X86_32),
        _ => None,
    }
}

fn flag(value: &str) -> Option<bool> {
    match value {
        "1" | "" => Some(true),
        "0" => Some(false),
        _ => None,
    }
}

/// A number, with k, m or g for powers of 1024.
fn size(value: &str) -> Option<u64> {
    let (digits, shift) = match value.strip_suffix(['k', 'm', 'g']) {
        Some(digits) if value.ends_with('k') => (digits, 10),
        Some(digits) if value.ends_with('m') => (digits, 20),
        Some(digits) => (digits, 30),
        None => (value, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    //! Would miss: a word that is understood and does nothing.
    use super::*;

    #[test]
    fn words_are_read_and_others_refused_by_name() {
        let text = "op=rw bs=128k depth=64 queues=2 order=4 abi=32 disk=xvda,xvdb flush=10 verify";
        let options = Options::parse(text).unwrap();
        assert_eq!((options.block_bytes, options.depth), (131_072, 64));
        assert_eq!(options.shape, Shape { abi: Abi::X86_32, queues: 2, order: 4 });
        assert_eq!(options.disks, ["xvda", "xvdb"]);
        assert!(!options.random && options.verify && options.read_percent == 50);
        assert_eq!(Options::parse("").unwrap(), Options::default());
        for bad in ["depht=3", "bs=4q", "order=5", "queues=0", "bs=5000", "bs=2m", "abi=16"] {
            assert!(Options::parse(bad).is_err(), "{bad}");
        }
        assert!(Options::parse("depht=3").unwrap_err().contains("depht=3"));
        assert!(Options::parse("range=99999999999g").is_err());
    }
}
