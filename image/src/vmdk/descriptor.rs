//! The VMDK descriptor (VMware Virtual Disk Format 5.0, "The Descriptor File"): lines of text,
//! in a file of its own or inside a sparse extent. It names the extents, the parent and the
//! content identifiers. All of it is an allegation: names are plain names or refused.

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use crate::fault::{FaultKind, ImageFault};
use crate::files::NAME_BYTES_MAX;
use crate::path::beside;
use crate::types::{FileNo, SECTOR_BYTES};

/// Longest descriptor read (ours; embedded ones have 20 sectors).
pub(super) const TEXT_BYTES_MAX: u64 = 64 << 10;
/// Most extents (ours: 2 TiB in files of 2 GiB).
pub(super) const EXTENTS_MAX: usize = 1024;
/// What editors on Windows put before a text.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
/// `parentCID` of an image without parent.
pub(super) const NO_PARENT: u32 = 0xffff_ffff;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum LineAccess {
    ReadWrite,
    ReadOnly,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum LineKind {
    /// `FLAT` and `VMFS`.
    Flat,
    /// `SPARSE` and `VMFSSPARSE`: which of the two, the extent's magic says.
    Sparse,
    SeSparse,
    Zero,
}

/// An extent line.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Line {
    pub access: LineAccess,
    pub sectors: u64,
    pub kind: LineKind,
    /// Empty for `ZERO`.
    pub name: String,
    /// Where a flat extent's data starts in its file.
    pub offset_sectors: u64,
}

/// The digits of the CID within the text.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct CidDigits {
    pub at: u64,
    pub count: usize,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Descriptor {
    pub cid: u32,
    pub cid_digits: CidDigits,
    pub parent_cid: u32,
    pub parent_hint: Option<String>,
    pub create_type: &'static str,
    /// Changed blocks are tracked beside the image: writes would leave the tracking wrong.
    pub tracks_changes: bool,
    pub lines: Vec<Line>,
}

/// Words for `createType` that are shown as they are.
const CREATE_TYPES: [&str; 12] = [
    "monolithicSparse",
    "monolithicFlat",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
    "streamOptimized",
    "vmfs",
    "vmfsSparse",
    "vmfsThin",
    "vmfsPreallocated",
    "vmfsEagerZeroedThick",
    "seSparse",
    "custom",
];

impl Descriptor {
    /// Parses the text that starts at byte `offset` of `file`.
    pub fn parse(file: FileNo, offset: u64, bytes: &[u8]) -> Result<Descriptor, ImageFault> {
        let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
        let mut found = Descriptor {
            cid: 0,
            cid_digits: CidDigits { at: 0, count: 0 },
            parent_cid: NO_PARENT,
            parent_hint: None,
            create_type: "",
            tracks_changes: false,
            lines: Vec::new(),
        };
        let mut is_latin = false;
        let mut at = offset;
        for raw in bytes[..end].split(|&b| b == b'\n') {
            let start = at;
            at += raw.len() as u64 + 1;
            let mark = if start == offset && raw.starts_with(BYTE_ORDER_MARK) { 3 } else { 0 };
            let raw = &raw[mark..];
            // Comments are in the code page of whoever wrote them; names must be readable.
            let line = match core::str::from_utf8(raw) {
                Err(_) if is_latin => latin(raw),
                _ => String::from_utf8_lossy(raw).into_owned(),
            };
            is_latin |= says_latin(&line);
            found.line(file, start + mark as u64, line.trim_end_matches('\r'))?;
        }
        if found.cid_digits.count == 0 {
            let field = "the VMDK descriptor, without a CID,";
            return Err(ImageFault::corrupt(file, field, offset, 0));
        }
        if found.parent_cid != NO_PARENT && found.parent_hint.is_none() {
            let field = "parentCID, without a parentFileNameHint,";
            return Err(ImageFault::corrupt(file, field, offset, found.parent_cid.into()));
        }
        Ok(found)
    }

    fn line(&mut self, file: FileNo, at: u64, line: &str) -> Result<(), ImageFault> {
        let start = line.trim_start();
        if starts_extent(start) {
            return self.extent(file, at, start);
        }
        let Some((key, value)) = line.split_once('=') else { return Ok(()) };
        let value_at = at + key.len() as u64 + 1;
        let spaces = value.len() - value.trim_start().len();
        let value = value.trim();
        let key = key.trim();
        // VMware's dictionaries do not tell upper from lower case.
        let is = |name: &str| key.eq_ignore_ascii_case(name);
        if is("CID") {
            self.cid = hex(file, value_at, value)?;
            let at = value_at + spaces as u64;
            self.cid_digits = CidDigits { at, count: value.len() };
        } else if is("parentCID") {
            self.parent_cid = hex(file, value_at, value)?;
        } else if is("parentFileNameHint") {
            self.parent_hint = hint(file, value.trim_matches('"'))?;
        } else if is("createType") {
            let given = value.trim_matches('"');
            let known = CREATE_TYPES.iter().find(|known| known.eq_ignore_ascii_case(given));
            self.create_type = known.unwrap_or(&"other");
        } else if is("changeTrackPath") {
            self.tracks_changes = true;
        } else if is("encryptionKeys") || is("keySafe") {
            return Err(ImageFault::unsupported(file, "an encrypted VMDK", 0));
        }
        Ok(())
    }

    /// `ACCESS SECTORS KIND ["NAME" [OFFSET]]`
    fn extent(&mut self, file: FileNo, at: u64, line: &str) -> Result<(), ImageFault> {
        let corrupt = |value| ImageFault::corrupt(file, "an extent line", at, value);
        let (words, rest) = match line.split_once('"') {
            Some((words, rest)) => (words, Some(rest)),
            None => (line, None),
        };
        let mut words = words.split_whitespace();
        let access = words.next().unwrap_or("").to_ascii_uppercase();
        let access = match access.as_str() {
            "RW" => LineAccess::ReadWrite,
            "RDONLY" => LineAccess::ReadOnly,
            _ => return Err(ImageFault::unsupported(file, "a VMDK extent of NOACCESS", 0)),
        };
        let sectors = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
        let kind = words.next().unwrap_or("").to_ascii_uppercase();
        let kind = match kind.as_str() {
            "FLAT" | "VMFS" => LineKind::Flat,
            "SPARSE" | "VMFSSPARSE" => LineKind::Sparse,
            "SESPARSE" => LineKind::SeSparse,
            "ZERO" => LineKind::Zero,
            "VMFSRDM" | "VMFSRAW" => {
                return Err(ImageFault::unsupported(file, "a VMDK extent on a raw device", 0));
            }
            _ => return Err(corrupt(sectors)),
        };
        let end = self.lines.iter().try_fold(sectors, |sum, line| sum.checked_add(line.sectors));
        if sectors == 0 || end.is_none_or(|end| end > u64::MAX / SECTOR_BYTES) {
            return Err(corrupt(sectors));
        }
        let (name, offset) = match rest.map(|rest| rest.split_once('"')) {
            Some(Some((name, offset))) => (name, offset.trim()),
            Some(None) => return Err(corrupt(sectors)),
            None if kind == LineKind::Zero => ("", ""),
            None => return Err(corrupt(sectors)),
        };
        // What may follow the offset speaks of devices.
        let offset_sectors = match offset.split_whitespace().next() {
            None => 0,
            Some(digits) => digits.parse().map_err(|_| corrupt(sectors))?,
        };
        if kind != LineKind::Flat && offset_sectors != 0 {
            return Err(corrupt(sectors));
        }
        check_text(file, name)?;
        if name.contains('/') || matches!(name, "." | "..") {
            let why = "a VMDK extent must be named by a plain name in the same folder";
            return Err(ImageFault::new(FaultKind::Refused, file, why));
        }
        if self.lines.len() >= EXTENTS_MAX {
            let max = EXTENTS_MAX as u64;
            return Err(ImageFault::limit(file, "extents of a VMDK", max + 1, max));
        }
        let name = name.to_string();
        self.lines.push(Line { access, sectors, kind, name, offset_sectors });
        Ok(())
    }
}

/// Does a line, blanks in front of it left out, speak of an extent?
pub(super) fn starts_extent(line: &str) -> bool {
    let word = line.split([' ', '\t']).next().unwrap_or("");
    ["RW", "RDONLY", "NOACCESS"].iter().any(|access| access.eq_ignore_ascii_case(word))
}

/// Can this be the start of a descriptor: a comment, a setting or an extent?
pub(super) fn is_descriptor(text: &[u8]) -> bool {
    let text = text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text).trim_ascii_start();
    let line = text.split(|&b| b == b'\n').next().unwrap_or(text);
    let Ok(line) = core::str::from_utf8(line) else { return text.starts_with(b"#") };
    let is_setting = |(key, _): (&str, &str)| {
        let key = key.trim_end();
        !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'.')
    };
    line.starts_with('#') || starts_extent(line) || line.split_once('=').is_some_and(is_setting)
}

/// Does a line say that names are in the code page of western Windows?
fn says_latin(line: &str) -> bool {
    let Some((key, value)) = line.split_once('=') else { return false };
    let value = value.trim().trim_matches('"');
    key.trim().eq_ignore_ascii_case("encoding")
        && ["windows-1252", "ISO-8859-1"].iter().any(|page| page.eq_ignore_ascii_case(value))
}

/// Text of that code page; the few characters that it has where Unicode has controls are not read.
fn latin(raw: &[u8]) -> String {
    let read =
        |&b: &u8| if (0x80..0xa0).contains(&b) { char::REPLACEMENT_CHARACTER } else { b.into() };
    raw.iter().map(read).collect()
}

/// Where the parent is, relative to the child. An absolute path is that of another machine: the
/// file beside the child is meant, and the CID says whether it is the one.
fn hint(file: FileNo, path: &str) -> Result<Option<String>, ImageFault> {
    if path.len() > NAME_BYTES_MAX {
        let (len, max) = (path.len() as u64, NAME_BYTES_MAX as u64);
        return Err(ImageFault::limit(file, "parentFileNameHint", len, max));
    }
    check_text(file, path)?;
    Ok(beside(path))
}

fn check_text(file: FileNo, name: &str) -> Result<(), ImageFault> {
    if !name.contains(char::REPLACEMENT_CHARACTER) {
        return Ok(());
    }
    let why = "a file name in the VMDK descriptor is not UTF-8";
    Err(ImageFault::new(FaultKind::Refused, file, why))
}

fn hex(file: FileNo, at: u64, digits: &str) -> Result<u32, ImageFault> {
    let plain = digits.bytes().all(|b| b.is_ascii_hexdigit()) && digits.len() <= 8;
    let value = if plain { u32::from_str_radix(digits, 16).ok() } else { None };
    value.ok_or_else(|| ImageFault::corrupt(file, "a CID", at, digits.len() as u64))
}

#[cfg(test)]
mod tests {
    //! Would miss: what the opened extents hold; the image tests open whole VMDKs.

    use super::*;

    /// `qemu-img create -f vmdk -o subformat=twoGbMaxExtentSparse -b b.vmdk -F vmdk d.vmdk 3G`,
    /// line ends as VMware on Windows writes them.
    const TEXT: &str = "# Disk DescriptorFile\r\nversion=1\r\nCID=8f3aa5bc\r\n\
        parentCID=1d90aa11\r\ncreateType=\"twoGbMaxExtentSparse\"\r\n\
        parentFileNameHint=\"b.vmdk\"\r\n\r\n# Extent description\r\n\
        RW 4194304 SPARSE \"d-s001.vmdk\"\r\nRW 2097152 SPARSE \"d-s002.vmdk\"\r\n\r\n\
        # The Disk Data Base\r\n#DDB\r\n\r\nddb.adapterType = \"ide\"\r\n";

    fn parse(text: &str) -> Result<Descriptor, ImageFault> {
        Descriptor::parse(FileNo(0), 512, text.as_bytes())
    }

    /// The fault that one extent line leads to.
    fn line(line: &str) -> String {
        match parse(&alloc::format!("CID=1\n{line}\n")) {
            Ok(found) => panic!("taken: {:?}", found.lines),
            Err(fault) => alloc::format!("{fault}"),
        }
    }

    #[test]
    fn a_split_child_gives_its_extents_parent_and_the_place_of_its_cid() {
        let found = parse(TEXT).unwrap();
        assert_eq!((found.cid, found.parent_cid), (0x8f3a_a5bc, 0x1d90_aa11));
        let at = TEXT.find("8f3aa5bc").unwrap() as u64 + 512;
        assert_eq!(found.cid_digits, CidDigits { at, count: 8 });
        assert_eq!(found.parent_hint.as_deref(), Some("b.vmdk"));
        assert_eq!(found.create_type, "twoGbMaxExtentSparse");
        assert_eq!(found.lines.len(), 2);
        assert_eq!((found.lines[1].sectors, &*found.lines[1].name), (2_097_152, "d-s002.vmdk"));
        assert_eq!(found.lines[1].kind, LineKind::Sparse);
    }

    #[test]
    fn flat_zero_and_read_only_lines_are_understood() {
        let text = "CID=1\nRW 63 FLAT \"a b.vmdk\" 7\nRDONLY 5 ZERO\nRW 9 VMFS \"c.vmdk\"\n";
        let lines = parse(text).unwrap().lines;
        assert_eq!((lines[0].kind, lines[0].offset_sectors), (LineKind::Flat, 7));
        assert_eq!(lines[0].name, "a b.vmdk");
        assert_eq!((lines[1].kind, lines[1].access), (LineKind::Zero, LineAccess::ReadOnly));
        assert_eq!((lines[2].kind, lines[2].offset_sectors), (LineKind::Flat, 0));
    }

    #[test]
    fn hostile_lines_are_refused() {
        for name in ["../x.vmdk", "/etc/shadow", "a/b.vmdk", "..", "."] {
            let fault = line(&alloc::format!("RW 8 FLAT \"{name}\" 0"));
            assert!(fault.contains("plain name"), "{fault}");
        }
        for bad in [
            "RW 0 FLAT \"x\" 0",
            "RW -1 FLAT \"x\" 0",
            "RW 8 FLAT \"x\" -5",
            "RW 8 FLAT \"x",
            "RW 8 FLAT x 0",
            "RW 8 SPARSE \"x\" 5",
            "RW 8 BLOB \"x\"",
            "RW 18446744073709551615 FLAT \"x\" 0",
            "RW",
        ] {
            assert!(line(bad).contains("extent line"), "{bad}");
        }
        assert!(line("NOACCESS 8 FLAT \"x\" 0").contains("NOACCESS"));
        let many = "RW 8 ZERO\n".repeat(EXTENTS_MAX + 1);
        assert!(line(&many).contains("the limit is 1024"));
        assert!(parse("RW 8 ZERO\n").unwrap_err().field.contains("without a CID"));
        assert!(parse("CID=123456789\n").is_err() && parse("CID=+1\n").is_err());
        assert!(parse("CID=1\nparentCID=2\n").is_err());
        let name = b"CID=1\nRW 8 FLAT \"M\xfcll.vmdk\" 0\n";
        assert!(Descriptor::parse(FileNo(0), 0, name).unwrap_err().field.contains("UTF-8"));
    }

    /// As VMware writes them on a Windows of another code page, and as people edit them.
    #[test]
    fn odd_case_code_pages_and_empty_hints_are_no_faults() {
        let text =
            b"# Festplatte f\xfcr M\xfcller\r\nencoding=\"windows-1252\"\r\ncid = 0000000F\r\n\
            PARENTCID=FFFFFFFF\r\nparentFileNameHint=\"\"\r\nCREATETYPE=\"MonolithicFlat\"\r\n\
            RW 8 FLAT \"a.vmdk\" 0\r\nddb.comment = \"\xff\"\r\n";
        let found = Descriptor::parse(FileNo(0), 0, text).unwrap();
        assert_eq!((found.cid, found.parent_cid, found.lines.len()), (15, NO_PARENT, 1));
        assert_eq!((found.create_type, &found.parent_hint), ("monolithicFlat", &None));
        let at = found.cid_digits.at as usize;
        assert_eq!(&text[at..at + found.cid_digits.count], b"0000000F");
    }

    #[test]
    fn a_parent_elsewhere_is_looked_for_beside_the_child() {
        for (path, name) in [
            ("C:\\VMs\\base.vmdk", Some("base.vmdk")),
            ("\\\\host\\share\\base.vmdk", Some("base.vmdk")),
            ("/vmfs/volumes/5f1/vm/base.vmdk", Some("base.vmdk")),
            ("sub\\base.vmdk", Some("sub/base.vmdk")),
            ("../base.vmdk", Some("../base.vmdk")),
            ("/vmfs/", None),
        ] {
            assert_eq!(hint(FileNo(0), path).unwrap().as_deref(), name, "{path}");
        }
        assert!(hint(FileNo(0), &"x".repeat(1024)).is_err());
    }
}
