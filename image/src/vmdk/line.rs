//! The size in an extent's line of the descriptor, changed in place.
//!
//! Order guarded: all that a change moves lies in one sector, so that a power cut leaves the old
//! text or the new one. Digits that are more than before push what follows into the NULs at the
//! text's end (or lengthen its file); where the text ends in a later sector, they take the room of
//! empty lines in their own. Words are never touched, nor are blanks added: libvmdk finds the
//! sections by their comments, and it and VirtualBox want one blank between the words of a line.

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

use super::descriptor::{CidDigits, TEXT_BYTES_MAX, starts_extent};
use crate::fault::ImageFault;
use crate::format::Ctx;
use crate::types::{FileNo, SECTOR_BYTES, Step};

/// A change of the descriptor, to be written by the next flush.
pub(super) struct Edit {
    pub at: u64,
    pub bytes: heapless::Vec<u8, { SECTOR_BYTES as usize }>,
    pub is_sent: bool,
}

/// The descriptor's text as it stands after the next flush.
pub(super) struct Text {
    file: FileNo,
    at: u64,
    bytes: Vec<u8>,
    /// Bytes that it may come to.
    room: usize,
}

impl Text {
    /// Reads it from `place`, offset and length; the CID is the one that was written last.
    pub fn read(
        ctx: &mut Ctx,
        file: FileNo,
        (at, len): (u64, u64),
        (cid, digits): (CidDigits, &[u8]),
    ) -> Step<Text> {
        let mut bytes = vec![0; len as usize];
        ctx.read(file, at, &mut bytes)?;
        let cid = (cid.at - at) as usize;
        bytes[cid..cid + digits.len()].copy_from_slice(digits);
        let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
        let nuls = bytes[end..].iter().take_while(|&&b| b == 0).count();
        let room = match end + nuls {
            // Something follows, from which a NUL must go on parting it.
            all if all < bytes.len() => all - 1,
            all if at == 0 && ctx.files.info(file).can_grow => all.max(TEXT_BYTES_MAX as usize),
            all => all,
        };
        bytes.truncate(end);
        Ok(Text { file, at, bytes, room })
    }

    /// One byte past it in its file.
    pub fn end(&self) -> u64 {
        self.at + self.bytes.len() as u64
    }

    /// The change that gives the extent of this number another size.
    pub fn plan(&self, extent: usize, sectors: u64) -> Result<Change, ImageFault> {
        let refuse = |what| Err(ImageFault::unsupported(self.file, what, sectors));
        let text = &self.bytes;
        let Some(old) = size_digits(text, extent) else {
            return refuse("growing a VMDK whose descriptor has no line for the extent");
        };
        // The sector in which the number starts, as a stretch of the text.
        let sector = (self.at + old.start as u64) / SECTOR_BYTES * SECTOR_BYTES;
        let first = sector.saturating_sub(self.at) as usize;
        let end = (sector + SECTOR_BYTES - self.at) as usize;
        if old.end > end {
            return refuse("growing a VMDK whose extent's size crosses a sector: convert it");
        }
        let number = format!("{sectors:0width$}", width = old.len());
        let mut need = number.len() - old.len();
        let mut change = Change { range: old.clone(), bytes: number.into_bytes() };
        if need > 0 && text.len() + need <= end.min(self.room) {
            change.bytes.extend(&text[old.end..]);
            change.range.end = text.len();
        } else if need > 0 {
            let end = end.min(text.len());
            change.bytes.extend(without_empty_lines(&text[old.end..end], &mut need));
            change.range.end = end;
            // A line that starts in an earlier sector ends here with what looks like an empty one.
            let cut = match first {
                0 => Some(0),
                _ => text[first - 1..old.start].iter().position(|&b| b == b'\n').map(|n| first + n),
            };
            if let Some(first) = cut.filter(|_| need > 0) {
                let before = without_empty_lines(&text[first..old.start], &mut need);
                change.bytes.splice(0..0, before);
                change.range.start = first;
            }
            if need > 0 {
                return refuse(
                    "growing a VMDK whose descriptor has no room for the size: convert it",
                );
            }
        }
        Ok(change)
    }

    /// Makes a change that [`plan`](Self::plan) gave.
    pub fn make(&mut self, change: Change) -> Edit {
        let at = self.at + change.range.start as u64;
        let bytes = heapless::Vec::from_slice(&change.bytes).expect("all is in one sector");
        self.bytes.splice(change.range, change.bytes);
        assert!(self.bytes.len() <= self.room, "a planned change has room");
        Edit { at, bytes, is_sent: false }
    }
}

/// A stretch of the text, and what shall stand there.
pub(super) struct Change {
    range: Range<usize>,
    bytes: Vec<u8>,
}

/// Where the size of an extent stands.
fn size_digits(text: &[u8], extent: usize) -> Option<Range<usize>> {
    let mut end = 0;
    let lines = text.split_inclusive(|&b| b == b'\n').map(|line| {
        end += line.len();
        (end - line.len(), line)
    });
    // As the parser finds them.
    let mut of_extents =
        lines.filter(|(_, line)| starts_extent(String::from_utf8_lossy(line).trim_start()));
    let (start, line) = of_extents.nth(extent)?;
    let start = start + line.iter().position(u8::is_ascii_digit)?;
    let count = text[start..].iter().take_while(|b| b.is_ascii_digit()).count();
    Some(start..start + count)
}

/// `lines` less the bytes of empty lines that are needed.
fn without_empty_lines(lines: &[u8], need: &mut usize) -> Vec<u8> {
    let mut kept = Vec::with_capacity(lines.len());
    for line in lines.split_inclusive(|&b| b == b'\n') {
        if matches!(line, b"\n" | b"\r\n") {
            let taken = line.len().min(*need);
            *need -= taken;
            kept.extend(&line[taken..]);
        } else {
            kept.extend(line);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    //! Would miss: the order of the writes; the power-cut tests of the images hold that.

    use super::*;

    const TEXT: &str = "# Disk DescriptorFile\nCID=1\n\n# Extent description\nRW 99 FLAT \"a\" 0\n\
        RW 100 ZERO\n\n# The Disk Data Base\n#DDB\n\nddb.adapterType = \"ide\"\n";

    /// The text that starts at `at` and may get to `room` after the change, and before it.
    fn changed(
        text: &str,
        (at, room): (u64, usize),
        extent: usize,
        sectors: u64,
    ) -> Result<(String, usize), ImageFault> {
        let bytes = text.as_bytes().to_vec();
        let mut new = Text { file: FileNo(0), at, bytes, room };
        let change = new.plan(extent, sectors)?;
        let edit = new.make(change);
        let sector = |at: u64| at / SECTOR_BYTES;
        assert_eq!(sector(edit.at), sector(edit.at + edit.bytes.len() as u64 - 1));
        // What is written is what the text differs in.
        let mut written = text.as_bytes().to_vec();
        written.resize(text.len().max(new.bytes.len()), 0);
        let from = (edit.at - at) as usize;
        written[from..from + edit.bytes.len()].copy_from_slice(&edit.bytes);
        assert_eq!(written, new.bytes);
        Ok((String::from_utf8(new.bytes).unwrap(), edit.bytes.len()))
    }

    #[test]
    fn more_digits_push_the_text_on_while_it_ends_in_the_same_sector() {
        let (text, _) = changed(TEXT, (512, 10_240), 0, 123_456).unwrap();
        assert_eq!(text, TEXT.replace("RW 99", "RW 123456"));
        let (text, _) =
            changed(TEXT, (1024 - TEXT.len() as u64 - 4, 10_240), 1, 9_999_999).unwrap();
        assert_eq!(text, TEXT.replace("RW 100", "RW 9999999"));
        let (text, len) = changed(TEXT, (0, TEXT.len()), 0, 88).unwrap();
        assert_eq!((text, len), (TEXT.replace("99", "88"), 2));
        let padded = TEXT.replace("99", "0099");
        let (text, len) = changed(&padded, (0, padded.len()), 0, 100).unwrap();
        assert_eq!((text, len), (padded.replace("0099", "0100"), 4));
    }

    #[test]
    fn where_nothing_can_be_pushed_empty_lines_give_their_room() {
        let want = TEXT.replace("RW 99", "RW 100").replace("ZERO\n\n", "ZERO\n");
        assert_eq!(changed(TEXT, (0, TEXT.len()), 0, 100).unwrap().0, want);
        let want = TEXT.replace("RW 99", "RW 98765").replace("\n\n", "\n");
        assert_eq!(changed(TEXT, (512, TEXT.len()), 0, 98_765).unwrap().0, want);
        let fault = changed(TEXT, (0, TEXT.len()), 0, 987_654).unwrap_err();
        assert!(fault.field.contains("no room"));
        let dos = TEXT.replace('\n', "\r\n");
        let want = dos.replace("RW 99", "RW 100").replace("ZERO\r\n\r\n", "ZERO\r\n\n");
        assert_eq!(changed(&dos, (0, dos.len()), 0, 100).unwrap().0, want);
    }

    /// Wherever a sector ends within the text, lines and words are what they were.
    #[test]
    fn only_sizes_and_empty_lines_change_at_any_place() {
        let words = |text: &str| -> Vec<String> {
            let full = text.split('\n').map(|line| line.trim_end_matches('\r'));
            full.filter(|line| !line.is_empty()).map(String::from).collect()
        };
        let mut refused = 0;
        for text in [String::from(TEXT), TEXT.replace('\n', "\r\n")] {
            for at in 512..1024 {
                for (extent, old, new) in [(0, "RW 99", "RW 1234"), (1, "RW 100", "RW 1000")] {
                    let sectors = new[3..].parse().unwrap();
                    match changed(&text, (at, 10_240), extent, sectors) {
                        Ok((after, _)) => {
                            assert_eq!(words(&after), words(&text.replace(old, new)), "at {at}");
                        }
                        Err(_) => refused += 1,
                    }
                }
            }
        }
        assert!(refused < 300, "{refused} of 2048 places");
    }
}
