//! Writing an initramfs: the "newc" cpio format of the kernel's early userspace documentation
//! (Documentation/driver-api/early-userspace/buffer-format.rst in Linux).
//!
//! Several archives may follow each other in one file, so none is compressed: the nested machine
//! would spend more time on unpacking than on reading.

use std::io::{self, Write};

const MAGIC: &str = "070701";
const KIND_DIRECTORY: u32 = 0o040_000;
const KIND_FILE: u32 = 0o100_000;
const KIND_LINK: u32 = 0o120_000;
/// Names and bodies start at multiples of this.
const ALIGNMENT_BYTES: usize = 4;

/// An archive being written.
pub struct Archive<W: Write> {
    output: W,
    inode: u32,
}

impl<W: Write> Archive<W> {
    /// An empty archive on `output`.
    pub fn new(output: W) -> Self {
        Archive { output, inode: 0 }
    }

    /// Adds a directory; its parents must have been added before.
    pub fn directory(&mut self, name: &str) -> io::Result<()> {
        self.member(name, KIND_DIRECTORY | 0o755, &[])
    }

    /// Adds a file that may be executed.
    pub fn file(&mut self, name: &str, body: &[u8]) -> io::Result<()> {
        self.member(name, KIND_FILE | 0o755, body)
    }

    /// Adds a symbolic link to `target`.
    pub fn link(&mut self, name: &str, target: &str) -> io::Result<()> {
        self.member(name, KIND_LINK | 0o777, target.as_bytes())
    }

    /// Writes the trailer and hands the output back.
    pub fn finish(mut self) -> io::Result<W> {
        self.member("TRAILER!!!", 0, &[])?;
        Ok(self.output)
    }

    fn member(&mut self, name: &str, mode: u32, body: &[u8]) -> io::Result<()> {
        self.inode += 1;
        let body_bytes = u32::try_from(body.len()).map_err(io::Error::other)?;
        let name_bytes = u32::try_from(name.len() + 1).map_err(io::Error::other)?;
        // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize
        // check
        let fields = [self.inode, mode, 0, 0, 1, 0, body_bytes, 0, 0, 0, 0, name_bytes, 0];
        let mut header = MAGIC.to_owned();
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        header.push_str(name);
        header.push('\0');
        self.padded(header.as_bytes())?;
        self.padded(body)
    }

    fn padded(&mut self, bytes: &[u8]) -> io::Result<()> {
        let rest = bytes.len().next_multiple_of(ALIGNMENT_BYTES) - bytes.len();
        self.output.write_all(bytes)?;
        self.output.write_all(&[0; ALIGNMENT_BYTES][..rest])
    }
}

#[cfg(test)]
mod tests {
    //! Would miss: what the kernel makes of the archive; every boot of the rig shows that.
    use super::*;

    #[test]
    fn a_file_is_laid_out_as_newc_says() {
        let mut archive = Archive::new(Vec::new());
        archive.file("init", b"abcde").unwrap();
        let bytes = archive.finish().unwrap();
        let header = "070701\
            00000001000081ed000000000000000000000001000000000000000500000000\
            0000000000000000000000000000000500000000";
        assert_eq!(&bytes[..110], header.as_bytes());
        // The name starts at 110, so name and NUL end at 115 and are padded to 116.
        assert_eq!(&bytes[110..124], b"init\0\0abcde\0\0\0");
        assert_eq!(&bytes[124..130], MAGIC.as_bytes());
        assert!(bytes.windows(11).any(|window| window == b"TRAILER!!!\0"));
    }
}
