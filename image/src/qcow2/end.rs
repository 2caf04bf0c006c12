//! The end of the file: its last cluster is there as a whole.
//!
//! Clusters are taken by a count and a pointer; what of the last one nobody wrote is not in the
//! file. QEMU and this engine take that for zeros, other readers stop there. So before the image
//! is closed the last sector is written back as it reads. Guarded: it is read after all writes
//! and nothing else is written until it is durable, so no bytes are ever put back over newer ones.
//! It must never change what the sector holds, nor a file to which no cluster was added.

use crate::format::Ctx;
use crate::meta::Phase;
use crate::types::{SECTOR_BYTES, Step, Stop};

use super::Qcow2;

/// How far the file is known to be there.
pub(super) struct End {
    /// Bytes of the file, or of its last completed cluster.
    complete: u64,
    /// The last sector is being read anew: what is cached of it may be older than data that was
    /// written beside the cache.
    reading: bool,
}

impl End {
    pub fn new(file_bytes: u64) -> End {
        End { complete: file_bytes, reading: false }
    }

    /// Something is about to be written.
    pub fn changing(&mut self) {
        self.reading = false;
    }
}

impl Qcow2 {
    /// Completes the last cluster of a file that has grown since it was opened; then flush.
    pub(super) fn complete_end(&mut self, ctx: &mut Ctx) -> Step<()> {
        let info = ctx.files.info(self.file);
        let Some(writer) = &mut self.writer else { return Ok(()) };
        if !info.can_grow || info.size_bytes <= writer.end.complete {
            return Ok(());
        }
        if ctx.meta.flushing() || writer.in_flight() {
            return Err(Stop::Busy);
        }
        let end = info.size_bytes.next_multiple_of(1 << self.kind.cluster_bits);
        let at = end - SECTOR_BYTES;
        if !writer.end.reading {
            ctx.meta.read_again(self.file, at, SECTOR_BYTES)?;
            writer.end.reading = true;
        }
        ctx.meta.reserve(self.file, at)?;
        let mut sector = [0; SECTOR_BYTES as usize];
        ctx.meta.get(self.file, at, &mut sector)?;
        ctx.meta.put(self.file, at, &sector, Phase::BEFORE);
        ctx.files.grow(self.file, end);
        writer.end = End::new(end);
        writer.awaits_flush = true;
        Ok(())
    }
}
