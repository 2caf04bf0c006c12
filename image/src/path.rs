//! Paths as Windows programs write them into images, for VHD, VHDX and VMDK.
//!
//! It must never decide that a name may be opened: that is checked where files are opened.

use alloc::string::String;

/// UTF-16 up to the first zero; `None` if it is malformed or empty.
pub(crate) fn utf16(data: &[u8], unit: fn([u8; 2]) -> u16) -> Option<String> {
    let units = data.chunks_exact(2).map(|pair| unit([pair[0], pair[1]]));
    let text: Result<String, _> = char::decode_utf16(units.take_while(|&u| u != 0)).collect();
    text.ok().filter(|text| !text.is_empty())
}

/// A Windows path as this engine writes paths: `/`, and no `.` parts in front.
pub(crate) fn relative(path: &str) -> String {
    let path = path.replace('\\', "/");
    let mut rest = path.as_str();
    while let Some(after) = rest.strip_prefix("./") {
        rest = after;
    }
    String::from(rest)
}

/// Where a path leads from the folder of the file that holds it: relative ones as they are, of an
/// absolute one (a drive's, a share's, a volume's) the file of that name in the same folder, since
/// absolute paths are those of another machine. `None` for a path without a name.
pub(crate) fn beside(path: &str) -> Option<String> {
    let has_drive = path.as_bytes().get(1) == Some(&b':');
    if has_drive || path.starts_with(['/', '\\']) {
        return last(path);
    }
    Some(relative(path)).filter(|path| !path.is_empty())
}

/// Does a path, as [`relative`] gives it, leave its folder upwards?
pub(crate) fn leads_out(path: &str) -> bool {
    path.split('/').any(|part| part == "..")
}

/// The last component of a path.
pub(crate) fn last(path: &str) -> Option<String> {
    let name = path.rsplit(['/', '\\']).next()?;
    (!name.is_empty()).then(|| String::from(name))
}

#[cfg(test)]
mod tests {
    //! Would miss: names read from the wrong place; that is tested with whole images.

    use super::*;
    use alloc::vec::Vec;

    fn le(text: &str) -> Vec<u8> {
        text.encode_utf16().flat_map(u16::to_le_bytes).collect()
    }

    #[test]
    fn paths_of_windows_become_relative_names() {
        let path = utf16(&le(".\\base\\p.vhd"), u16::from_le_bytes).unwrap();
        assert_eq!(relative(&path), "base/p.vhd");
        assert_eq!(relative("..\\p.vhd"), "../p.vhd");
        assert_eq!(last("C:\\vms\\p.vhd").as_deref(), Some("p.vhd"));
        assert_eq!(last("C:\\vms\\"), None);
        for (path, name) in [
            ("C:\\vms\\p.vhd", Some("p.vhd")),
            ("\\\\host\\share\\p.vhd", Some("p.vhd")),
            ("\\\\?\\Volume{26a21bda}\\p.vhd", Some("p.vhd")),
            ("/vmfs/volumes/5f1/p.vhd", Some("p.vhd")),
            ("sub\\p.vhd", Some("sub/p.vhd")),
            ("..\\p.vhd", Some("../p.vhd")),
            (".\\", None),
            ("/vms/", None),
        ] {
            assert_eq!(beside(path).as_deref(), name, "{path}");
        }
        assert!(leads_out("../p") && leads_out("a/../../p") && !leads_out("a..b/..c"));
    }

    #[test]
    fn half_a_surrogate_pair_is_no_name() {
        assert_eq!(utf16(&[0x00, 0xd8, b'a', 0], u16::from_le_bytes), None);
        assert_eq!(utf16(&[0, 0], u16::from_le_bytes), None);
        let name = utf16(&[0, b'a', 0, b'b', 0, 0, 0, b'c'], u16::from_be_bytes);
        assert_eq!(name.as_deref(), Some("ab"));
    }
}
