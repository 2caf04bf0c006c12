//! What the tests of the block devices do with a store over one: open, write, read, flush.
//!
//! A world implements [`Harness::parts`] and [`Harness::done`] and has the rest. Must never: let
//! a device work by itself; only `done` does.

use alloc::vec::Vec;

use platter_xen::Hypervisor;

use crate::block_store::BlockStore;
use crate::disk::Device;
use crate::fake::Fake;
use crate::{Access, Answer, Done, FileId, Store, StoreFault, Submit, Tag, Window};

/// A store over a device of some kind, with a machine under it.
pub trait Harness {
    type Device: Device<Fake>;

    fn parts(&mut self) -> (&mut BlockStore<Self::Device>, &mut Fake);

    /// The next answer; whoever must work for it works.
    fn done(&mut self) -> Done;

    fn open_path(&mut self, path: &str) -> FileId {
        let (store, hv) = self.parts();
        store.open(hv, Tag(1), path, Access::ReadWrite).unwrap();
        match self.done().result {
            Ok(Answer::Opened(opened)) => opened.file,
            other => panic!("{other:?}"),
        }
    }

    /// Bytes taken; 0 when there is no room.
    fn write(&mut self, tag: u32, file: FileId, offset: u64, bytes: &[u8]) -> u32 {
        let mut put = |hv: &mut Fake, window: Window| {
            let run = window.runs[0];
            hv.write(run.region, run.offset, &bytes[..run.len]);
            true
        };
        let (store, hv) = self.parts();
        let len = bytes.len() as u32;
        match store.write(hv, Tag(tag), file, offset, len, &mut put).unwrap() {
            Submit::Taken(len) => len,
            Submit::NoRoom => 0,
        }
    }

    fn write_all(&mut self, file: FileId, mut offset: u64, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let taken = self.write(7, file, offset, bytes);
            assert_eq!(self.done().result, Ok(Answer::Written(taken)));
            offset += u64::from(taken);
            bytes = &bytes[taken as usize..];
        }
    }

    fn read(&mut self, file: FileId, offset: u64, len: u32) -> Vec<u8> {
        let (store, hv) = self.parts();
        store.read(hv, Tag(2), file, offset, len).unwrap();
        let Ok(Answer::Read(window)) = self.done().result else { panic!("not read") };
        let run = window.runs[0];
        self.parts().1.bytes(run.region, run.offset, run.len)
    }

    fn flush(&mut self, file: FileId) -> Result<Answer, StoreFault> {
        let (store, hv) = self.parts();
        store.flush(hv, Tag(3), file).unwrap();
        self.done().result
    }
}

/// Bytes that differ from sector to sector.
pub fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at / 512 * 31 + at) as u8).collect()
}
