//! The name of a differencing VHD's parent, from its parent locators and its Unicode name.
//!
//! Order guarded: the relative path first; of an absolute path only the last component is
//! taken, since absolute paths mean nothing here and the parent usually lies beside the child. A
//! relative path that leaves the folder will be refused, so what an absolute one names is better.
//! It must never decide that a name may be opened: that is checked where files are opened.

use alloc::string::String;
use alloc::vec::Vec;

use crate::files::NAME_BYTES_MAX;
use crate::format::Ctx;
use crate::path::{beside, last, leads_out, relative, utf16};
use crate::types::{FileNo, Step};

use super::header::{Header, Locator};

/// Platform codes ("Parent Locator Entry").
pub(super) const W2RU: [u8; 4] = *b"W2ru";
pub(super) const W2KU: [u8; 4] = *b"W2ku";
pub(super) const MACX: [u8; 4] = *b"MacX";

/// Longest locator data read, bytes: the longest name in UTF-16.
const DATA_BYTES_MAX: usize = 2 * NAME_BYTES_MAX;

/// The parent's path relative to the child, with `/`; `None` if nothing names it.
pub(super) fn parent_name(ctx: &mut Ctx, file: FileNo, header: &Header) -> Step<Option<String>> {
    let mut outside = None;
    for code in [W2RU, W2KU, MACX] {
        for locator in header.locators.iter().filter(|l| l.code == code) {
            let Some(data) = read(ctx, file, locator)? else { continue };
            let name = match code {
                W2RU => utf16(&data, u16::from_le_bytes).and_then(|path| beside(&path)),
                W2KU => utf16(&data, u16::from_le_bytes).and_then(|path| last(&path)),
                _ => url(&data),
            };
            match name {
                Some(name) if leads_out(&name) => outside = outside.or(Some(name)),
                Some(name) => return Ok(Some(name)),
                None => {}
            }
        }
    }
    if outside.is_some() {
        return Ok(outside);
    }
    Ok(utf16(&header.parent_name, u16::from_be_bytes).and_then(|path| last(&path)))
}

fn read(ctx: &mut Ctx, file: FileNo, locator: &Locator) -> Step<Option<Vec<u8>>> {
    let len = locator.data_length as usize;
    let end = locator.data_offset.checked_add(len as u64);
    if len == 0 || len > DATA_BYTES_MAX || end.is_none_or(|end| end > ctx.files.size(file)) {
        return Ok(None);
    }
    let mut data = alloc::vec![0; len];
    ctx.read(file, locator.data_offset, &mut data)?;
    Ok(Some(data))
}

/// A file URL (RFC 2396); `file://./x` is libvhd's for a relative path.
fn url(data: &[u8]) -> Option<String> {
    let text = core::str::from_utf8(data).ok()?.trim_end_matches('\0');
    let path = percent_decoded(text.strip_prefix("file://")?)?;
    if path.starts_with("./") { Some(relative(&path)) } else { last(&path) }
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        if *first != b'%' {
            bytes.push(*first);
            rest = after;
            continue;
        }
        let digits = core::str::from_utf8(after.get(..2)?).ok()?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        rest = &after[2..];
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    //! Would miss: a locator read from the wrong place; that is tested with whole images.

    use super::*;

    #[test]
    fn urls_of_libvhd_become_relative_names() {
        assert_eq!(url(b"file://./p%20q.vhd").as_deref(), Some("p q.vhd"));
        assert_eq!(url(b"file:///sr/mount/p.vhd").as_deref(), Some("p.vhd"));
        assert_eq!(url(b"http://x/p.vhd"), None);
        assert_eq!(url(b"file://./p%2"), None);
    }
}
