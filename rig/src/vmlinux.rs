//! The Linux kernel inside a bzImage, unpacked: what GRUB's Xen loader can boot whatever Debian
//! packs its kernels with (it knows no zstd).
//!
//! Source: Linux Documentation/arch/x86/boot.rst, fields setup_sects, payload_offset and
//! payload_length.

use std::fs;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::command::Run;
use crate::suite::text;

/// Bytes of the unpacked size behind a packed kernel.
const SIZE_BYTES: usize = 4;

/// Unpacks the kernel of `image` into `file`.
///
/// # Errors
/// When it is no bzImage, or packed with something else than zstd and xz.
pub fn unpack(image: &Path, file: &Path) -> Result<()> {
    let bytes = fs::read(image).with_context(|| format!("cannot read {}", text(image)))?;
    let packed = payload(&bytes).with_context(|| format!("{} is no bzImage", text(image)))?;
    let kernel = match packed {
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let mut kernel = Vec::new();
            let decoder = ruzstd::decoding::StreamingDecoder::new(packed);
            let mut decoder = decoder.map_err(|error| anyhow::anyhow!("zstd: {error}"))?;
            decoder.read_to_end(&mut kernel)?;
            kernel
        }
        [0xfd, b'7', b'z', b'X', b'Z', ..] => {
            let partial = file.with_extension("xz");
            fs::write(&partial, packed)?;
            let kernel = Run::new("xz -dc").path(&partial).bytes()?;
            fs::remove_file(&partial)?;
            kernel
        }
        _ => bail!("{} is packed with neither zstd nor xz", text(image)),
    };
    fs::write(file, kernel).with_context(|| format!("cannot write {}", text(file)))
}

/// The packed kernel in a bzImage, without the size that follows it.
fn payload(bytes: &[u8]) -> Option<&[u8]> {
    let field = |at: usize| {
        let field = bytes.get(at..at + 4)?;
        Some(u32::from_le_bytes(field.try_into().ok()?) as usize)
    };
    if bytes.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let start = (usize::from(bytes[0x1f1]) + 1) * 512 + field(0x248)?;
    let len = field(0x24c)?.checked_sub(SIZE_BYTES)?;
    bytes.get(start..start.checked_add(len)?)
}

/// Would miss: a kernel that GRUB does not like; scenario 325 boots one.
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_payload_lies_behind_the_setup() {
        let mut bytes = vec![0; 0x800];
        assert_eq!(payload(&bytes), None);
        bytes[0x202..0x206].copy_from_slice(b"HdrS");
        bytes[0x1f1] = 1;
        bytes[0x248] = 0x10;
        bytes[0x24c] = 8;
        bytes[0x410..0x418].copy_from_slice(b"kernSIZE");
        assert_eq!(payload(&bytes), Some(&b"kern"[..]));
        bytes[0x24c..0x250].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(payload(&bytes), None);
    }
}
