//! Files in memory whose holes cost nothing, so that an image of many MiB with little in it is
//! tried a thousand times a second. Nothing is durable; a write beyond the limit fails as on a
//! full disk.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use platter_image::{Access, FileInfo};
use platter_tool::medium::{Folder, Medium};

const PAGE_BYTES: usize = 4096;

/// A file's bytes; a clone shares what neither changes.
#[derive(Clone, Default)]
pub struct Pages {
    len: u64,
    pages: BTreeMap<u64, Arc<[u8; PAGE_BYTES]>>,
}

impl Pages {
    pub fn from_bytes(bytes: &[u8]) -> Pages {
        let mut pages = Pages::default();
        for (at, page) in bytes.chunks(PAGE_BYTES).enumerate() {
            if page.iter().any(|&b| b != 0) {
                pages.write((at * PAGE_BYTES) as u64, page);
            }
        }
        pages.set_len(bytes.len() as u64);
        pages
    }

    pub fn bytes(&self) -> u64 {
        self.len
    }

    pub fn read(&self, offset: u64, into: &mut [u8]) {
        for (page, within, at, count) in pieces(offset, into.len()) {
            let piece = &mut into[at..at + count];
            match self.pages.get(&page) {
                Some(bytes) => piece.copy_from_slice(&bytes[within..within + count]),
                None => piece.fill(0),
            }
        }
    }

    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        for (page, within, at, count) in pieces(offset, bytes.len()) {
            let page = self.pages.entry(page).or_insert_with(|| Arc::new([0; PAGE_BYTES]));
            Arc::make_mut(page)[within..within + count].copy_from_slice(&bytes[at..at + count]);
        }
        self.len = self.len.max(offset + bytes.len() as u64);
    }

    pub fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.zero(len, self.len - len);
        }
        self.len = len;
    }

    fn zero(&mut self, offset: u64, len: u64) {
        let (first, last) = (offset / PAGE_BYTES as u64, (offset + len) / PAGE_BYTES as u64);
        let held: Vec<u64> = self.pages.range(first..=last).map(|(&page, _)| page).collect();
        for page in held {
            let start = offset.max(page * PAGE_BYTES as u64);
            let end = (offset + len).min((page + 1) * PAGE_BYTES as u64);
            if end - start == PAGE_BYTES as u64 {
                self.pages.remove(&page);
            } else {
                self.write(start, &[0; PAGE_BYTES][..(end - start) as usize]);
            }
        }
    }

    /// Offsets of the pages in a stretch that may hold something else than zeros.
    pub fn held(&self, start: u64, end: u64) -> Vec<u64> {
        let (first, last) = (start / PAGE_BYTES as u64, end.div_ceil(PAGE_BYTES as u64));
        self.pages.range(first..last.max(first)).map(|(page, _)| page * PAGE_BYTES as u64).collect()
    }
}

/// Page, byte within it, byte within the request, count.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let place = offset + at as u64;
        let within = (place % PAGE_BYTES as u64) as usize;
        let count = (len - at).min(PAGE_BYTES - within);
        at += count;
        (count > 0).then_some((place / PAGE_BYTES as u64, within, at - count, count))
    })
}

/// Files by name, and how long any may become.
pub struct SparseFolder {
    files: BTreeMap<String, Arc<File>>,
    limit: u64,
}

impl SparseFolder {
    pub fn new(limit: u64) -> SparseFolder {
        SparseFolder { files: BTreeMap::new(), limit }
    }

    pub fn put(&mut self, name: &str, pages: Pages) {
        let file = File { pages: Mutex::new(pages), limit: self.limit };
        self.files.insert(String::from(name), Arc::new(file));
    }

    /// A file as it is now.
    pub fn get(&self, name: &str) -> Option<Pages> {
        self.files.get(name).map(|file| file.lock().clone())
    }
}

impl Folder for SparseFolder {
    fn open(&self, path: &str, _access: Access) -> io::Result<(Arc<dyn Medium>, FileInfo)> {
        let Some((number, (_, file))) = self.files.iter().enumerate().find(|(_, f)| f.0 == path)
        else {
            return Err(io::Error::new(io::ErrorKind::NotFound, "no such file"));
        };
        let (size_bytes, identity) = (file.lock().len, number as u64);
        let medium: Arc<dyn Medium> = Arc::<File>::clone(file);
        Ok((medium, FileInfo { size_bytes, can_grow: true, identity }))
    }

    fn open_named(&self, path: &str, access: Access) -> io::Result<(Arc<dyn Medium>, FileInfo)> {
        self.open(path, access)
    }
}

struct File {
    pages: Mutex<Pages>,
    limit: u64,
}

impl File {
    fn lock(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().expect("no thread died holding a file")
    }

    fn room(&self, offset: u64, len: u64) -> io::Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.limit => Ok(()),
            _ => Err(io::Error::new(io::ErrorKind::StorageFull, "the file is full")),
        }
    }
}

impl Medium for File {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let pages = self.lock();
        let there = pages.len.saturating_sub(offset).min(into.len() as u64) as usize;
        pages.read(offset, &mut into[..there]);
        into[there..].fill(0);
        Ok(())
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.room(offset, bytes.len() as u64)?;
        self.lock().write(offset, bytes);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.room(len, 0)?;
        self.lock().set_len(len);
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.lock().len)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut pages = self.lock();
        let end = pages.len.min(offset.saturating_add(len));
        if offset < end {
            pages.zero(offset, end - offset);
        }
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.room(offset, len)?;
        let mut pages = self.lock();
        pages.zero(offset, len);
        pages.len = pages.len.max(offset + len);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_the_rest_is_zeros() {
        let mut folder = SparseFolder::new(1 << 20);
        folder.put("a", Pages::from_bytes(&[7; 5000]));
        let (file, info) = folder.open("a", Access::ReadWrite).unwrap();
        assert_eq!(info.size_bytes, 5000);
        file.write_at(9000, &[9; 10]).unwrap();
        file.zero(4000, 500).unwrap();
        let mut bytes = [1; 10_000];
        file.read_at(0, &mut bytes).unwrap();
        let held = |from: usize, to: usize, b: u8| bytes[from..to].iter().all(|&x| x == b);
        assert!(held(0, 4000, 7) && held(4000, 4500, 0) && held(4500, 5000, 7));
        assert!(held(5000, 9000, 0) && held(9000, 9010, 9) && held(9010, 10_000, 0));
        file.set_len(100).unwrap();
        file.set_len(200).unwrap();
        file.read_at(0, &mut bytes).unwrap();
        assert!(bytes[99] == 7 && bytes[100..].iter().all(|&b| b == 0));
        assert!(file.write_at(1 << 20, &[1]).is_err());
    }
}
