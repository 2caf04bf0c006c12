//! Sizes as qemu-img takes and prints them: powers of 1024.

use std::fmt;

/// Bytes from `4096`, `64k`, `1.5G`; no suffix means bytes.
pub fn parse(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not a size: a number and one of k, M, G, T, P, E");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].trim_end_matches(['i', 'B']) {
        "" | "b" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return Err(wrong()),
    };
    let unit = 1u64 << shift;
    if let Ok(whole) = digits.parse::<u64>() {
        return whole.checked_mul(unit).ok_or_else(|| format!("{text} is beyond 2^64 bytes"));
    }
    let number: f64 = digits.parse().map_err(|_| wrong())?;
    let bytes = number * unit as f64;
    let fits = number.is_finite() && number >= 0.0 && bytes < u64::MAX as f64 && shift > 0;
    if fits { Ok(bytes as u64) } else { Err(wrong()) }
}

/// Bytes of a disk: a size rounded up to whole sectors.
pub fn parse_disk(text: &str) -> Result<u64, String> {
    let bytes = parse(text)?;
    bytes.checked_next_multiple_of(512).ok_or_else(|| format!("{text} is beyond 2^64 bytes"))
}

/// A number of bytes in the largest unit that it reaches.
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        let at = (63 - self.0.max(1).leading_zeros() as usize) / 10;
        let value = self.0 as f64 / (1u64 << (10 * at)) as f64;
        let text = format!("{value:.3}");
        let text = text.trim_end_matches('0').trim_end_matches('.');
        write!(f, "{text} {}", units[at])
    }
}

#[cfg(test)]
mod tests {
    //! Would miss: nothing else; sizes are all there is.

    use super::*;

    #[test]
    fn sizes_are_read_as_qemu_img_reads_them() {
        assert_eq!(parse("4096"), Ok(4096));
        assert_eq!(parse("64k"), Ok(65536));
        assert_eq!(parse("1.5G"), Ok(3 << 29));
        assert_eq!(parse("2TiB"), Ok(2 << 40));
        assert_eq!(parse_disk("513"), Ok(1024));
        for wrong in ["", "k", "1x", "-1", "1.5", "17E", "nan", "1e400k", "0x10", "1kk"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        assert!(parse_disk("18446744073709551615").is_err());
    }

    #[test]
    fn sizes_are_printed_short() {
        assert_eq!(Bytes(0).to_string(), "0 B");
        assert_eq!(Bytes(1536).to_string(), "1.5 KiB");
        assert_eq!(Bytes(4 << 20).to_string(), "4 MiB");
        assert_eq!(Bytes(u64::MAX).to_string(), "16 EiB");
    }
}
