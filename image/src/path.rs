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
    }

    #[test]
    fn half_a_surrogate_pair_is_no_name() {
        assert_eq!(utf16(&[0x00, 0xd8, b'a', 0], u16::from_le_bytes), None);
        assert_eq!(utf16(&[0, 0], u16::from_le_bytes), None);
        let name = utf16(&[0, b'a', 0, b'b', 0, 0, 0, b'c'], u16::from_be_bytes);
        assert_eq!(name.as_deref(), Some("ab"));
    }
}
