//! Filesystems made by mke2fs and debugfs (`vectors/make-ext4.sh`): fragmented, with holes,
//! with unwritten extents, with and without checksums, with block maps. Misses:
//! meta_bg, bigalloc, directories with a hash tree (`tests/ext4_tools.rs` has those).

use alloc::vec::Vec;

use super::*;
use crate::vectors::expand;

struct Case {
    image: Vec<u8>,
    block: usize,
    /// Blocks of fragments.raw, an extent each.
    fragments: usize,
}

fn cases() -> [Case; 3] {
    let case = |sparse: &[u8], megabytes: usize, block, fragments| Case {
        image: expand(sparse, megabytes << 20),
        block,
        fragments,
    };
    [
        case(include_bytes!("../../vectors/ext4-default.sparse"), 8, 4096, 40),
        case(include_bytes!("../../vectors/ext4-1k.sparse"), 4, 1024, 300),
        case(include_bytes!("../../vectors/ext4-maps.sparse"), 4, 1024, 300),
    ]
}

fn find(image: &[u8], path: &str, access: Access) -> Result<(Found, Mapper), MetaFault> {
    let mut mapper = Mapper::new();
    let found = open(&image, path, access, &mut mapper)?;
    Ok((found, mapper))
}

/// The file's bytes by its extents; holes are zeros.
fn content(image: &[u8], path: &str) -> Vec<u8> {
    let (found, mapper) = find(image, path, Access::ReadOnly).unwrap();
    let mut bytes = alloc::vec![0; found.size_bytes as usize];
    for extent in mapper.extents() {
        let from = extent.sector as usize * 512;
        let to = extent.start as usize * 512;
        let len = (extent.sectors as usize * 512).min(bytes.len() - to);
        bytes[to..to + len].copy_from_slice(&image[from..from + len]);
    }
    bytes
}

/// What `fill` of the script wrote.
fn letters(blocks: usize, block: usize) -> Vec<u8> {
    (0..blocks * block).map(|at| b'A' + (at / block % 26) as u8).collect()
}

fn sentence(result: Result<(Found, Mapper), MetaFault>) -> &'static str {
    match result {
        Err(MetaFault::Refused(StoreFault::Refused(why))) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn files_read_what_debugfs_wrote() {
    for case in cases() {
        assert!(is_ext4(&case.image.as_slice()).unwrap());
        let read = |path| content(&case.image, path);
        assert!(read("images/plain.raw") == letters(5, case.block));
        assert!(read("images/fragments.raw") == letters(case.fragments, case.block));
        let mut holes = letters(9, case.block);
        holes[3 * case.block..6 * case.block].fill(0);
        assert!(read("images/holes.raw") == holes);
    }
}

#[test]
fn a_fragmented_file_has_its_extents_and_may_be_written() {
    for case in cases() {
        let result = find(&case.image, "images/fragments.raw", Access::ReadWrite).unwrap();
        assert!(result.1.extents().len() > case.fragments * 3 / 4);
        assert!(!result.1.has_gaps(result.0.size_bytes));
        assert!(find(&case.image, "images/plain.raw", Access::ReadWrite).is_ok());
    }
}

#[test]
fn holes_and_unwritten_extents_refuse_writing_and_say_what_to_do() {
    for case in cases() {
        let why = sentence(find(&case.image, "images/holes.raw", Access::ReadWrite));
        assert!(why.contains("cp --sparse=never"));
    }
    // debugfs cannot fallocate a file with a block map.
    for case in cases().into_iter().take(2) {
        let why = sentence(find(&case.image, "images/unwritten.raw", Access::ReadWrite));
        assert!(why.contains("unwritten"));
        let mut expected = letters(5, case.block);
        expected.resize(10 * case.block, 0);
        assert!(content(&case.image, "images/unwritten.raw") == expected);
    }
}

#[test]
fn what_is_not_there_or_not_a_file_is_refused() {
    for case in cases() {
        let fault = |path| find(&case.image, path, Access::ReadOnly).unwrap_err();
        assert_eq!(fault("images/plain.ra"), StoreFault::NotFound.into());
        assert_eq!(fault("image/plain.raw"), StoreFault::NotFound.into());
        assert_eq!(fault("images/plain.raw/x"), StoreFault::NotFound.into());
        assert_eq!(fault("images"), StoreFault::NotAFile.into());
        assert_eq!(fault("images/../images/plain.raw"), StoreFault::BadPath.into());
        assert_eq!(fault("images//plain.raw"), StoreFault::BadPath.into());
        assert_eq!(fault(""), StoreFault::BadPath.into());
        let why = sentence(find(&case.image, "images/link", Access::ReadOnly));
        assert!(why.contains("symbolic link"));
    }
}

/// Offset of the superblock field, the value or-ed in, and a word of the refusal.
#[test]
fn states_and_features_that_forbid_writing_refuse_it() {
    let [_, case, _] = cases();
    let bent = [
        (0x60, 0x04, "journal"),
        (0x61, 0x01, "multiple mount"),
        (0x62, 0x80, "incompatible"),
        (0x65, 0x40, "forbids writing"),
        (0x3A, 0x02, "errors"),
    ];
    for (at, bit, word) in bent {
        let mut image = case.image.clone();
        image[1024 + at] |= bit;
        let why = sentence(find(&image, "images/plain.raw", Access::ReadWrite));
        assert!(why.contains(word), "{why}");
    }
    let mut image = case.image.clone();
    image[1024 + 0x3A] &= !1;
    assert!(sentence(find(&image, "images/plain.raw", Access::ReadWrite)).contains("mounted"));
    assert!(find(&image, "images/plain.raw", Access::ReadOnly).is_ok());
}

#[test]
fn every_checksum_is_verified() {
    let [case, ..] = cases();
    let bend = |at: usize| {
        let mut image = case.image.clone();
        image[at] ^= 1;
        sentence(find(&image, "images/fragments.raw", Access::ReadOnly))
    };
    assert!(bend(1024 + 0x48).contains("superblock"));
    // Descriptors in block 1.
    assert!(bend(4096 + 0xC).contains("descriptor"));
    let (found, _) = find(&case.image, "images/fragments.raw", Access::ReadOnly).unwrap();
    let fs = Superblock::read(&case.image.as_slice()).unwrap();
    let inode = fs.inode_at(&case.image.as_slice(), found.inode).unwrap() as usize;
    assert!(bend(inode + 0x10).contains("inode"));
    // The extent block, at the end of its last entry.
    let extents = 4096 * 26;
    assert!(bend(extents + 12 + 40 * 12 - 1).contains("extent block"));
}

#[test]
fn extents_beyond_the_end_or_out_of_order_are_refused() {
    // Without checksums, so that the walk itself has to see it.
    let [_, case, _] = cases();
    let (found, _) = find(&case.image, "images/plain.raw", Access::ReadOnly).unwrap();
    let fs = Superblock::read(&case.image.as_slice()).unwrap();
    let inode = fs.inode_at(&case.image.as_slice(), found.inode).unwrap() as usize;
    let mut image = case.image.clone();
    // ee_len and ee_start_lo of the first extent: five blocks from the last but one.
    let entry = inode + 0x28 + 12;
    image[entry + 4..][..2].copy_from_slice(&5u16.to_le_bytes());
    image[entry + 8..][..4].copy_from_slice(&(4096u32 - 2).to_le_bytes());
    let why = sentence(find(&image, "images/plain.raw", Access::ReadOnly));
    assert!(why.contains("beyond its end"), "{why}");
    // ee_block of the fifth entry of the first leaf of fragments.raw.
    let (_, mapper) = find(&case.image, "images/fragments.raw", Access::ReadOnly).unwrap();
    let header = [0x0A, 0xF3];
    let leaf = (0..case.image.len()).step_by(1024).find(|&at| {
        let first = &case.image[at + 12..at + 24];
        let sector = mapper.extents()[0].sector as u32 / 2;
        case.image[at..at + 2] == header && first[8..12] == sector.to_le_bytes()
    });
    image = case.image.clone();
    image[leaf.unwrap() + 12 + 4 * 12..][..4].copy_from_slice(&1u32.to_le_bytes());
    let why = sentence(find(&image, "images/fragments.raw", Access::ReadOnly));
    assert!(why.contains("not in order"), "{why}");
}

/// Where the inode of a file is.
fn inode_of(image: &[u8], path: &str) -> usize {
    let (found, _) = find(image, path, Access::ReadOnly).unwrap();
    let fs = Superblock::read(&image).unwrap();
    fs.inode_at(&image, found.inode).unwrap() as usize
}

#[test]
fn a_file_in_the_filesystem_s_own_blocks_is_not_written() {
    // Without checksums: the first block number of a file with a map, of one with extents.
    let [_, extents, maps] = cases();
    for (case, at) in [(extents, 0x28 + 12 + 8), (maps, 0x28)] {
        let image = case.image.as_slice();
        let fs = Superblock::read(&image).unwrap();
        let inode = inode_of(image, "images/plain.raw");
        let first = u32::from_le_bytes(image[inode + at..][..4].try_into().unwrap());
        let mut bent = case.image.clone();
        let mut open = |block: u64| {
            bent[inode + at..][..4].copy_from_slice(&(block as u32).to_le_bytes());
            // What it lay in reads from wherever it says, but is not written.
            assert!(find(&bent, "images/plain.raw", Access::ReadOnly).is_ok());
            match find(&bent, "images/plain.raw", Access::ReadWrite) {
                Err(MetaFault::Refused(StoreFault::Refused(why))) => Some(why),
                other => other.map(|_| None).unwrap(),
            }
        };
        assert_eq!(open(u64::from(first)), None);
        for (start, count) in fs.own_blocks(&image, 0).unwrap() {
            for block in [start, start + count - 1] {
                assert!(open(block).is_some_and(|why| why.contains("itself")), "{block}");
            }
        }
    }
}

#[test]
fn a_file_in_one_block_twice_or_in_its_own_tree_is_not_written() {
    let [_, _, case] = cases();
    let inode = inode_of(&case.image, "images/fragments.raw");
    let word = |at: usize| u32::from_le_bytes(case.image[at..at + 4].try_into().unwrap());
    let (second, indirect) = (word(inode + 0x28 + 4), word(inode + 0x28 + 48));
    for (block, why) in [(second, "two parts"), (indirect, "itself")] {
        let mut image = case.image.clone();
        image[inode + 0x28..][..4].copy_from_slice(&block.to_le_bytes());
        let said = sentence(find(&image, "images/fragments.raw", Access::ReadWrite));
        assert!(said.contains(why), "{said}");
    }
}

#[test]
fn a_tree_that_leads_in_circles_ends_soon() {
    // A block of the map that names itself, under three levels: 2^24 blocks of a file, all in
    // blocks that are in the cache.
    let [_, _, case] = cases();
    let mut image = case.image.clone();
    let inode = inode_of(&image, "images/plain.raw");
    let own = find(&image, "images/plain.raw", Access::ReadOnly).unwrap().1;
    let [first, second, third] = [0, 1, 2].map(|n| own.extents()[0].sector / 2 + n);
    for (from, to) in [(first, second), (second, third)] {
        for entry in image[from as usize * 1024..][..1024].chunks_exact_mut(4) {
            entry.copy_from_slice(&(to as u32).to_le_bytes());
        }
    }
    image[third as usize * 1024..][..1024].fill(0);
    image[inode + 0x28..][..60].fill(0);
    image[inode + 0x28 + 56..][..4].copy_from_slice(&(first as u32).to_le_bytes());
    // Its size: all that three levels hold.
    image[inode + 4..][..4].copy_from_slice(&u32::MAX.to_le_bytes());
    image[inode + 0x6C..][..4].copy_from_slice(&3u32.to_le_bytes());
    let why = sentence(find(&image, "images/plain.raw", Access::ReadOnly));
    assert!(why.contains("circles"), "{why}");
}

#[test]
fn a_filesystem_larger_than_its_volume_is_refused() {
    let [case, ..] = cases();
    let short = &case.image[..case.image.len() - 4096];
    assert!(sentence(find(short, "images/plain.raw", Access::ReadOnly)).contains("larger"));
}

/// A reader that knows only some blocks, as the cache of an opening does.
struct Partly<'a> {
    image: &'a [u8],
    known: Vec<u64>,
}

impl ReadBlocks for Partly<'_> {
    fn len_bytes(&self) -> u64 {
        self.image.len() as u64
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), MetaFault> {
        for block in offset / 4096..(offset + into.len() as u64).div_ceil(4096) {
            if !self.known.contains(&block) {
                return Err(MetaFault::Miss(crate::meta::Miss { disk: 0, block }));
            }
        }
        self.image.read_at(offset, into)
    }
}

#[test]
fn an_opening_that_misses_goes_on_where_it_was() {
    for case in cases() {
        let mut partly = Partly { image: &case.image, known: Vec::new() };
        let mut mapper = Mapper::new();
        loop {
            match open(&partly, "images/fragments.raw", Access::ReadOnly, &mut mapper) {
                Ok(_) => break,
                Err(MetaFault::Miss(miss)) => partly.known.push(miss.block),
                Err(fault) => panic!("{fault:?}"),
            }
        }
        let whole = find(&case.image, "images/fragments.raw", Access::ReadOnly).unwrap().1;
        assert_eq!(mapper.extents(), whole.extents());
    }
}

#[test]
fn bent_metadata_never_panics() {
    for case in cases().into_iter().skip(1) {
        let mut image = case.image;
        let places = (1024..2048).chain(2048..2048 + 512).chain(case.block * 20..case.block * 24);
        for at in places {
            for bits in [0x80, 0x41] {
                image[at] ^= bits;
                let _ = find(&image, "images/fragments.raw", Access::ReadWrite);
                image[at] ^= bits;
            }
        }
    }
}
