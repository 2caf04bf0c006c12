//! Files in pieces that copies share: what a cut leaves is a copy of thousands of bytes changed
//! among millions, and two cuts differ in less. A piece says by its number whether it is one that
//! was looked at before.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use platter_image::{Access, FileInfo};
use platter_tool::medium::{Event, Folder, Medium};

use crate::model::SECTOR;

pub const PAGE: usize = 4096;

/// Some bytes, and a number that no other bytes ever have.
#[derive(Clone)]
struct Page {
    number: u64,
    bytes: [u8; PAGE],
}

fn next_number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A file; pages that are all zeros need not be there.
#[derive(Clone, Default)]
pub struct Pages {
    len: usize,
    pages: Vec<Option<Arc<Page>>>,
}

impl Pages {
    pub fn new(bytes: &[u8]) -> Pages {
        let mut pages = Pages::default();
        pages.write(0, bytes);
        pages
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        self.read(0, &mut bytes);
        bytes
    }

    fn set_len(&mut self, len: usize) {
        let cut = len % PAGE;
        if len < self.len && cut > 0 && self.pages[len / PAGE].is_some() {
            let end = self.len.min(len - cut + PAGE);
            self.write(len, &[0; PAGE][..end - len]);
        }
        self.pages.resize(len.div_ceil(PAGE), None);
        self.len = len;
    }

    fn write(&mut self, offset: usize, bytes: &[u8]) {
        if self.len < offset + bytes.len() {
            self.set_len(offset + bytes.len());
        }
        let mut done = 0;
        while done < bytes.len() {
            let (at, within) = ((offset + done) / PAGE, (offset + done) % PAGE);
            let piece = &bytes[done..bytes.len().min(done + PAGE - within)];
            done += piece.len();
            let page = &mut self.pages[at];
            if *piece == [0; PAGE][..piece.len()] && (piece.len() == PAGE || page.is_none()) {
                *page = None;
                continue;
            }
            let empty = || Arc::new(Page { number: 0, bytes: [0; PAGE] });
            let page = Arc::make_mut(page.get_or_insert_with(empty));
            page.number = next_number();
            page.bytes[within..within + piece.len()].copy_from_slice(piece);
        }
    }

    fn read(&self, offset: usize, into: &mut [u8]) {
        let mut done = 0;
        while done < into.len() {
            let (at, within) = ((offset + done) / PAGE, (offset + done) % PAGE);
            let end = into.len().min(done + PAGE - within);
            let piece = &mut into[done..end];
            match self.pages.get(at).and_then(Option::as_ref) {
                Some(page) => piece.copy_from_slice(&page.bytes[within..within + piece.len()]),
                None => piece.fill(0),
            }
            done = end;
        }
    }

    /// The sector at `offset`, with a number that stands for these bytes alone; `None` when there
    /// is nothing: zeros.
    pub fn sector(&self, offset: usize) -> Option<(u64, &[u8])> {
        assert!(offset.is_multiple_of(SECTOR), "sectors lie on whole ones");
        let page = self.pages.get(offset / PAGE)?.as_ref()?;
        let within = offset % PAGE;
        let number = page.number * (PAGE / SECTOR) as u64 + (within / SECTOR) as u64;
        Some((number, &page.bytes[within..within + SECTOR]))
    }
}

/// Carries out one event.
pub fn apply(files: &mut [Pages], event: &Event) {
    match event {
        Event::Write { file, offset, bytes } => files[*file].write(*offset as usize, bytes),
        Event::SetLen { file, len } => files[*file].set_len(*len as usize),
        Event::Sync { .. } => {}
    }
}

/// Keeps those 512-byte sectors of an event that `keeps` says; whatever has none is kept.
pub fn tear(files: &mut [Pages], event: &Event, mut keeps: impl FnMut() -> bool) {
    let Event::Write { file, offset, bytes } = event else {
        return apply(files, event);
    };
    let mut at = 0;
    while at < bytes.len() {
        let here = *offset as usize + at;
        let end = bytes.len().min(at + SECTOR - here % SECTOR);
        if keeps() {
            files[*file].write(here, &bytes[at..end]);
        }
        at = end;
    }
}

/// Files in pages; a clone is the same folder.
#[derive(Clone)]
pub struct PagesFolder {
    names: Arc<BTreeMap<String, usize>>,
    files: Arc<Mutex<Vec<Pages>>>,
}

impl PagesFolder {
    pub fn new(names: &[String], files: Vec<Pages>) -> PagesFolder {
        let names = names.iter().cloned().zip(0..).collect();
        PagesFolder { names: Arc::new(names), files: Arc::new(Mutex::new(files)) }
    }

    pub fn files(&self) -> MutexGuard<'_, Vec<Pages>> {
        self.files.lock().expect("no thread died holding them")
    }

    pub fn number(&self, name: &str) -> usize {
        self.names[name]
    }
}

impl Folder for PagesFolder {
    fn open(&self, path: &str, _access: Access) -> io::Result<(Arc<dyn Medium>, FileInfo)> {
        let Some(&file) = self.names.get(path) else {
            return Err(io::Error::new(io::ErrorKind::NotFound, "no such file in pages"));
        };
        let size_bytes = self.files()[file].len as u64;
        let info = FileInfo { size_bytes, can_grow: true, identity: file as u64 };
        Ok((Arc::new(PagesFile { folder: self.clone(), file }), info))
    }

    fn open_named(&self, path: &str, access: Access) -> io::Result<(Arc<dyn Medium>, FileInfo)> {
        self.open(path, access)
    }
}

struct PagesFile {
    folder: PagesFolder,
    file: usize,
}

impl Medium for PagesFile {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.folder.files()[self.file].read(offset as usize, into);
        Ok(())
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.folder.files()[self.file].write(offset as usize, bytes);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.folder.files()[self.file].set_len(len as usize);
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.folder.files()[self.file].len as u64)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = self.len()?.min(offset.saturating_add(len));
        if offset < end { self.zero(offset, end - offset) } else { Ok(()) }
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_at(offset, &vec![0; len as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;
    use platter_tool::medium;

    /// Pages that copies share are what plain bytes would be, after any events.
    #[test]
    fn pages_hold_what_plain_bytes_hold() {
        let mut rng = Rng::new(5);
        let mut plain = vec![vec![1; 3 * PAGE + 700]];
        let mut pages = vec![Pages::new(&plain[0])];
        for _ in 0..300 {
            let before = (pages.clone(), plain.clone());
            let (offset, len) = (rng.below(5 * PAGE as u64), rng.below(3 * PAGE as u64));
            let bytes = vec![rng.below(3) as u8; len as usize];
            let event = match rng.below(4) {
                0 => Event::SetLen { file: 0, len: offset },
                _ => Event::Write { file: 0, offset, bytes },
            };
            apply(&mut pages, &event);
            medium::apply(&mut plain, &event);
            assert!(pages[0].bytes() == plain[0] && before.0[0].bytes() == before.1[0]);
            let at = rng.below(8 * 4) as usize * SECTOR;
            let there = plain[0].get(at..at + SECTOR).unwrap_or(&[0; SECTOR]);
            match (pages[0].sector(at), before.0[0].sector(at)) {
                (Some((_, bytes)), _) if bytes != there => panic!("sector at {at}"),
                (Some((a, bytes)), Some((b, old))) => assert!(a != b || bytes == old),
                (None, _) => assert!(there.iter().all(|&b| b == 0)),
                _ => {}
            }
        }
    }
}
