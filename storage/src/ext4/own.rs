//! Whether a file that is to be written lies where nothing else does, as far as the filesystem
//! itself says: in no block twice, and in none of the filesystem's own (superblocks, descriptors,
//! bitmaps, inode tables, the journal, the file's own tree).
//!
//! Guards everybody else on a filesystem that was bent: with extents into its metadata one guest
//! could write whatever file it likes. What two files share cannot be seen from one of them; both
//! are open when that matters, and the block store compares them. Must never: stop where a block
//! is missing without going on from there.

use alloc::vec::Vec;

use super::inode::Inode;
use super::map::Mapper;
use super::superblock::Superblock;
use crate::meta::{MetaFault, ReadBlocks, refused};

/// Groups whose descriptors are read (ours): 8 TiB of blocks of 4 KiB. What lies behind is not
/// looked at.
const GROUPS_MAX: u64 = 65_536;

/// Runs of blocks, sorted: first block and count.
struct Runs(Vec<(u64, u64)>);

impl Runs {
    fn of(fs: &Superblock, mapper: &Mapper) -> Runs {
        let unit = fs.block_bytes / 512;
        let runs = mapper.extents().iter().map(|it| (it.sector / unit, it.sectors / unit));
        let mut runs: Vec<(u64, u64)> = runs.collect();
        runs.sort_unstable();
        Runs(runs)
    }

    fn is_sound(&self) -> bool {
        self.0.windows(2).all(|two| two[0].0 + two[0].1 <= two[1].0)
    }

    /// Whether one of these blocks is among them; `is_sound` was asked before.
    fn hit(&self, (first, count): (u64, u64)) -> bool {
        let end = first.saturating_add(count);
        let at = self.0.partition_point(|&(start, _)| start < end);
        let last = at.checked_sub(1).and_then(|at| self.0.get(at));
        count > 0 && last.is_some_and(|&(start, len)| start + len > first)
    }
}

const INTO_METADATA: &str = "the ext4 file lies in blocks of the filesystem itself: run e2fsck";

/// Proves the places of a file whose extents are in `mapper`, which keeps how far that came.
pub fn prove(
    volume: &dyn ReadBlocks,
    fs: &Superblock,
    mapper: &mut Mapper,
) -> Result<(), MetaFault> {
    let runs = Runs::of(fs, mapper);
    if !runs.is_sound() {
        return refused("two parts of the ext4 file lie in one place: run e2fsck");
    }
    if mapper.nodes().any(|block| runs.hit((block, 1))) {
        return refused(INTO_METADATA);
    }
    if let Some(number) = fs.journal {
        let journal = Inode::read(volume, fs, number)?;
        let mut blocks = Mapper::new();
        blocks.collect(volume, fs, &journal)?;
        let theirs = Runs::of(fs, &blocks);
        if theirs.0.iter().any(|run| runs.hit(*run)) || blocks.nodes().any(|it| runs.hit((it, 1))) {
            return refused(INTO_METADATA);
        }
    }
    for group in mapper.groups_proved..fs.groups().min(GROUPS_MAX) {
        if fs.own_blocks(volume, group as u32)?.iter().any(|run| runs.hit(*run)) {
            return refused(INTO_METADATA);
        }
        mapper.groups_proved = group + 1;
    }
    Ok(())
}
