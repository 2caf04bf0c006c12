//! Files as a host keeps them: what is written is seen at once and durable only after a sync.
//! A power cut keeps any part of what was not synced, in any order, torn at 512 bytes.
//!
//! Must never: lose a synced byte.

use std::collections::BTreeMap;

use crate::rng::Rng;

const TEAR_BYTES: usize = 512;

#[derive(Clone, Debug)]
struct Change {
    number: u64,
    offset: u64,
    bytes: Vec<u8>,
}

/// One file.
#[derive(Clone, Debug)]
pub struct File {
    pub live: Vec<u8>,
    durable: Vec<u8>,
    unsynced: Vec<Change>,
    /// 9p qid path.
    pub identity: u64,
    pub mode: u32,
}

impl File {
    pub fn write(&mut self, number: u64, offset: u64, bytes: &[u8]) {
        apply(&mut self.live, offset, bytes);
        self.unsynced.push(Change { number, offset, bytes: bytes.to_vec() });
    }

    /// Everything that was changed before `before` is durable.
    fn sync(&mut self, before: u64) {
        let changes = core::mem::take(&mut self.unsynced);
        for change in changes {
            if change.number < before {
                apply(&mut self.durable, change.offset, &change.bytes);
            } else {
                self.unsynced.push(change);
            }
        }
    }

    fn cut(&mut self, rng: &mut Rng) {
        let mut changes = core::mem::take(&mut self.unsynced);
        for index in (1..changes.len()).rev() {
            changes.swap(index, rng.below(index as u64 + 1) as usize);
        }
        let keep = *rng.pick(&[0, 300, 700, 1000]);
        for change in changes {
            if !rng.chance(keep) {
                continue;
            }
            let torn = rng.chance(300);
            let mut offset = change.offset;
            for piece in pieces(&change.bytes, offset) {
                if !torn || rng.chance(500) {
                    apply(&mut self.durable, offset, piece);
                }
                offset += piece.len() as u64;
            }
        }
        self.live = self.durable.clone();
    }
}

/// `bytes` split at the file's 512-byte boundaries.
fn pieces(bytes: &[u8], offset: u64) -> impl Iterator<Item = &[u8]> {
    let first = (TEAR_BYTES - offset as usize % TEAR_BYTES).min(bytes.len());
    let (head, rest) = bytes.split_at(first);
    core::iter::once(head).chain(rest.chunks(TEAR_BYTES)).filter(|piece| !piece.is_empty())
}

fn apply(into: &mut Vec<u8>, offset: u64, bytes: &[u8]) {
    let (start, end) = (offset as usize, offset as usize + bytes.len());
    if into.len() < end {
        into.resize(end, 0);
    }
    into[start..end].copy_from_slice(bytes);
}

/// A share's files by their paths.
#[derive(Clone, Debug, Default)]
pub struct Files {
    files: BTreeMap<String, File>,
    changes: u64,
    /// Bytes that all files together may have.
    pub space_bytes: u64,
    /// They cannot grow: they are partitions.
    pub fixed: bool,
}

const MODE_REGULAR: u32 = 0o100_600;

impl Files {
    pub fn new() -> Files {
        Files { files: BTreeMap::new(), changes: 1, space_bytes: u64::MAX, fixed: false }
    }

    /// Puts a file in place, durable.
    pub fn put(&mut self, path: &str, bytes: Vec<u8>) {
        self.put_special(path, bytes, MODE_REGULAR);
    }

    /// A file of another kind: directory, link, device.
    pub fn put_special(&mut self, path: &str, bytes: Vec<u8>, mode: u32) {
        let identity = self.files.len() as u64 + 1000;
        let file = File { durable: bytes.clone(), live: bytes, unsynced: vec![], identity, mode };
        self.files.insert(path.to_string(), file);
    }

    pub fn get(&self, path: &str) -> Option<&File> {
        self.files.get(path)
    }

    pub fn paths(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(String::as_str)
    }

    /// Number of the next change: a sync covers what came before the number it saw.
    pub fn mark(&self) -> u64 {
        self.changes
    }

    /// Bytes that all files have.
    pub fn used_bytes(&self) -> u64 {
        self.files.values().map(|file| file.live.len() as u64).sum()
    }

    /// False when there is no space for it.
    pub fn write(&mut self, path: &str, offset: u64, bytes: &[u8]) -> bool {
        let used = self.used_bytes();
        let Some(file) = self.files.get_mut(path) else { return false };
        let end = offset + bytes.len() as u64;
        let grows = end.saturating_sub(file.live.len() as u64);
        if used.saturating_add(grows) > self.space_bytes {
            return false;
        }
        self.changes += 1;
        file.write(self.changes - 1, offset, bytes);
        true
    }

    pub fn set_len(&mut self, path: &str, len: u64) {
        let Some(file) = self.files.get_mut(path) else { return };
        // A file system's journal keeps sizes in order: durable at once.
        file.live.resize(len as usize, 0);
        file.durable.resize(len as usize, 0);
    }

    pub fn sync(&mut self, path: &str, before: u64) {
        if let Some(file) = self.files.get_mut(path) {
            file.sync(before);
        }
    }

    /// The power is cut: only what was synced is sure to be there.
    pub fn cut(&mut self, rng: &mut Rng) {
        self.files.values_mut().for_each(|file| file.cut(rng));
    }
}

#[cfg(test)]
mod tests {
    //! Would miss: what a real file system does with sizes.

    use super::*;

    #[test]
    fn a_cut_keeps_what_was_synced_and_any_part_of_the_rest() {
        let (mut kept, mut lost, mut torn) = (0, 0, 0);
        for seed in 0..200 {
            let mut files = Files::new();
            files.put("a", vec![0; 4096]);
            assert!(files.write("a", 0, &[1; 1024]));
            let mark = files.mark();
            assert!(files.write("a", 1024, &[2; 1024]));
            files.sync("a", mark);
            files.cut(&mut Rng::new(seed));
            let live = &files.get("a").unwrap().live;
            assert!(live[..1024].iter().all(|byte| *byte == 1), "synced bytes are lost");
            match (live[1024], live[1536]) {
                (2, 2) => kept += 1,
                (0, 0) => lost += 1,
                _ => torn += 1,
            }
        }
        assert!(kept > 10 && lost > 10 && torn > 10, "{kept} {lost} {torn}");
    }

    #[test]
    fn space_is_bounded() {
        let mut files = Files::new();
        files.put("a", vec![0; 512]);
        files.space_bytes = 1024;
        assert!(files.write("a", 512, &[1; 512]));
        assert!(!files.write("a", 1024, &[1; 1]));
        assert!(files.write("a", 0, &[1; 1024]));
    }
}
