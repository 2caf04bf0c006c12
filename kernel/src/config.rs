//! The disk line's `target`: PATH[,OPTION...], the only configuration a disk has.
//!
//! PATH is /STORE/REST. The image format comes from here, never from the image's content.

use alloc::string::String;
use core::fmt;

use platter_image::Format;

/// What a user asked for one disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// 9p tag, or the storage domain's own disk (`xvda`, `nvme0n1`).
    pub store: String,
    /// The path within the store, without a leading slash.
    pub path: String,
    pub format: Format,
    pub iops: Option<Rate>,
    pub bps: Option<Rate>,
    /// Sector size told to the guest, 512 or 4096 bytes.
    pub sector_bytes: u32,
    pub discard: bool,
    pub cache: Cache,
    /// Files named inside the image may be opened.
    pub backing: bool,
}

/// A sustained rate per second, and how much may be taken at once after a pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    pub per_second: u64,
    pub burst: u64,
}

/// When a write is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// When the store has it; durable at the guest's next flush.
    Writeback,
    /// When it is durable.
    Writethrough,
    /// As writeback, and flushes are answered without being done: for scratch disks.
    Unsafe,
}

/// Why a `target` is refused: one sentence with the word it is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConfigFault {
    Empty,
    TooLong(usize),
    NoStore(String),
    NoPath(String),
    BadPath(String),
    UnknownOption(String),
    BadValue { option: String, value: String, expected: &'static str },
    UnknownFormat(String),
}

impl fmt::Display for ConfigFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConfigFault::Empty => write!(f, "target is empty: write target=/STORE/PATH"),
            ConfigFault::TooLong(n) => {
                write!(
                    f,
                    "target is {n} bytes long, the limit is {}",
                    crate::limits::PARAMS_BYTES_MAX
                )
            }
            ConfigFault::NoStore(path) => {
                write!(f, "target '{path}' does not begin with /STORE: write target=/STORE/PATH")
            }
            ConfigFault::NoPath(path) => {
                write!(f, "target '{path}' names a store and nothing in it: add the file's path")
            }
            ConfigFault::BadPath(path) => {
                write!(f, "path '{path}' holds '..', '.' or an empty part: write it out plainly")
            }
            ConfigFault::UnknownOption(option) => write!(
                f,
                "unknown option '{option}': known are format, iops, bps, sector, discard, \
                 cache, backing"
            ),
            ConfigFault::BadValue { option, value, expected } => {
                write!(f, "option {option} is '{value}', expected {expected}")
            }
            ConfigFault::UnknownFormat(name) => {
                write!(f, "unknown format '{name}': known are {}", Format::names())
            }
        }
    }
}

impl DiskConfig {
    /// Parses `params` as dom0 wrote it. For a qdisk carrier (`qdisk` true) it begins with
    /// `FMT:`, where libxl says `aio` for raw.
    pub fn parse(params: &str, qdisk: bool) -> Result<DiskConfig, ConfigFault> {
        if params.len() > crate::limits::PARAMS_BYTES_MAX {
            return Err(ConfigFault::TooLong(params.len()));
        }
        let (carried, rest) = match params.split_once(':') {
            Some((word, rest)) if qdisk => (Some(if word == "aio" { "raw" } else { word }), rest),
            _ => (None, params),
        };
        let mut words = rest.split(',');
        let full = words.next().unwrap_or("").trim();
        let (store, path) = split_path(full)?;
        let mut config = DiskConfig {
            store: String::from(store),
            path: String::from(path),
            format: Format::by_suffix(path).unwrap_or(Format::Raw),
            iops: None,
            bps: None,
            sector_bytes: 512,
            discard: true,
            cache: Cache::Writeback,
            backing: true,
        };
        if let Some(name) = carried.filter(|&name| name != "raw") {
            config.format = format_named(name)?;
        }
        for word in words.map(str::trim).filter(|word| !word.is_empty()) {
            config.apply(word)?;
        }
        Ok(config)
    }

    fn apply(&mut self, word: &str) -> Result<(), ConfigFault> {
        let (option, value) = word.split_once('=').unwrap_or((word, ""));
        let bad = |expected| {
            Err(ConfigFault::BadValue {
                option: String::from(option),
                value: String::from(value),
                expected,
            })
        };
        match (option, value) {
            ("format", name) => self.format = format_named(name)?,
            ("iops", _) => match parse_rate(value) {
                Some(rate) => self.iops = Some(rate),
                None => return bad("requests a second as NUMBER or NUMBER/BURST, with k or M"),
            },
            ("bps", _) => match parse_rate(value) {
                Some(rate) => self.bps = Some(rate),
                None => return bad("bytes a second as NUMBER or NUMBER/BURST, with k, M or G"),
            },
            ("sector", "512") => self.sector_bytes = 512,
            ("sector", "4096") => self.sector_bytes = 4096,
            ("sector", _) => return bad("512 or 4096"),
            ("discard", "on") => self.discard = true,
            ("discard", "off") => self.discard = false,
            ("discard", _) => return bad("on or off"),
            ("cache", "writeback") => self.cache = Cache::Writeback,
            ("cache", "writethrough") => self.cache = Cache::Writethrough,
            ("cache", "unsafe") => self.cache = Cache::Unsafe,
            ("cache", _) => return bad("writeback, writethrough or unsafe"),
            ("backing", "allow") => self.backing = true,
            ("backing", "deny") => self.backing = false,
            ("backing", _) => return bad("allow or deny"),
            _ => return Err(ConfigFault::UnknownOption(String::from(option))),
        }
        Ok(())
    }
}

fn format_named(name: &str) -> Result<Format, ConfigFault> {
    Format::by_name(name).ok_or_else(|| ConfigFault::UnknownFormat(String::from(name)))
}

/// Splits /STORE/REST. REST may be empty for a whole disk: the store decides that.
fn split_path(full: &str) -> Result<(&str, &str), ConfigFault> {
    if full.is_empty() {
        return Err(ConfigFault::Empty);
    }
    let Some(inner) = full.strip_prefix('/') else {
        return Err(ConfigFault::NoStore(String::from(full)));
    };
    let (store, path) = inner.split_once('/').unwrap_or((inner, ""));
    if store.is_empty() {
        return Err(ConfigFault::NoStore(String::from(full)));
    }
    let plain = |part: &str| !part.is_empty() && part != "." && part != "..";
    if !plain(store) || (!path.is_empty() && !path.split('/').all(plain)) {
        return Err(ConfigFault::BadPath(String::from(full)));
    }
    Ok((store, path))
}

/// NUMBER or NUMBER/BURST; without a burst, one second's worth.
fn parse_rate(text: &str) -> Option<Rate> {
    let (rate, burst) = match text.split_once('/') {
        Some((rate, burst)) => (parse_number(rate)?, parse_number(burst)?),
        None => (parse_number(text)?, parse_number(text)?),
    };
    (rate > 0 && burst > 0).then_some(Rate { per_second: rate, burst })
}

/// A positive number with an optional binary suffix; at most 2^50, so that sums never overflow.
fn parse_number(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'k' | b'K' => (&text[..text.len() - 1], 10),
        b'M' => (&text[..text.len() - 1], 20),
        b'G' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let value: u64 = digits.parse().ok()?;
    let scaled = value.checked_mul(1 << shift)?;
    (scaled <= 1 << 50).then_some(scaled)
}

/// Would miss: what the stores make of a path; only the words are tested here.
#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    fn parse(params: &str) -> Result<DiskConfig, ConfigFault> {
        DiskConfig::parse(params, false)
    }

    #[test]
    fn a_plain_path_is_raw_with_defaults() {
        let config = parse("/images/debian.img").unwrap();
        assert_eq!((config.store.as_str(), config.path.as_str()), ("images", "debian.img"));
        assert_eq!(config.format, Format::Raw);
        assert_eq!(config.sector_bytes, 512);
        assert!(config.backing && config.discard);
        assert_eq!(config.cache, Cache::Writeback);
    }

    #[test]
    fn options_are_taken_and_the_last_word_wins() {
        let config = parse(
            "/s/a/b,iops=2k/4k,bps=10M,sector=4096,discard=off,cache=writethrough,backing=deny",
        )
        .unwrap();
        assert_eq!(config.iops, Some(Rate { per_second: 2048, burst: 4096 }));
        assert_eq!(config.bps, Some(Rate { per_second: 10 << 20, burst: 10 << 20 }));
        assert_eq!(config.sector_bytes, 4096);
        assert!(!config.discard && !config.backing);
        assert_eq!(config.cache, Cache::Writethrough);
        assert_eq!(config.path, "a/b");
    }

    #[test]
    fn a_qdisk_carrier_gives_the_format_before_the_colon() {
        let config = DiskConfig::parse("aio:/images/a", true).unwrap();
        assert_eq!(config.format, Format::Raw);
        assert!(DiskConfig::parse("nonsense:/images/a", true).is_err());
        // On the vbd carrier a colon is part of the file's name.
        assert_eq!(parse("/images/a:b").unwrap().path, "a:b");
    }

    #[test]
    fn refusals_name_the_word() {
        for (params, word) in [
            ("", "empty"),
            ("images/a", "images/a"),
            ("//a", "//a"),
            ("/images/../etc/passwd", ".."),
            ("/images/a//b", "a//b"),
            ("/images/a,speed=1", "speed"),
            ("/images/a,iops=0", "iops"),
            ("/images/a,bps=99999999999G", "bps"),
            ("/images/a,sector=1024", "1024"),
            ("/images/a,format=tar", "tar"),
        ] {
            let fault = parse(params).expect_err(params).to_string();
            assert!(fault.contains(word), "{params}: {fault}");
        }
        assert!(parse(&"/a".repeat(600)).unwrap_err().to_string().contains("limit"));
    }

    #[test]
    fn a_store_alone_is_a_whole_disk() {
        let config = parse("/xvda").unwrap();
        assert_eq!((config.store.as_str(), config.path.as_str()), ("xvda", ""));
    }
}
