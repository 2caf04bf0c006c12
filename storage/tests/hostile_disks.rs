//! Disks bent at random, some bytes at a time, opened by every kind of path: whatever they hold,
//! opening ends with an answer and what it answers lies inside the disk. Misses: what coverage
//! guidance finds (the fuzz targets start from the same vectors).

use platter_storage::meta::{Disks, MetaFault};
use platter_storage::resolve::{Progress, resolve};
use platter_storage::volume::Spot;
use platter_storage::{Access, StoreFault};

struct Bent {
    disks: Vec<Vec<u8>>,
}

impl Disks for Bent {
    fn count(&self) -> u8 {
        self.disks.len() as u8
    }
    fn name(&self, disk: u8) -> &str {
        ["xvda", "xvdb", "xvdc"][usize::from(disk)]
    }
    fn sectors(&self, disk: u8) -> u64 {
        self.disks[usize::from(disk)].len() as u64 / 512
    }
    fn block_bytes(&self, _: u8) -> u32 {
        512
    }
    fn read(&self, disk: u8, offset: u64, into: &mut [u8]) -> Result<(), MetaFault> {
        let from = usize::try_from(offset).map_err(|_| StoreFault::BeyondEnd)?;
        let bytes = self.disks[usize::from(disk)].get(from..from + into.len());
        into.copy_from_slice(bytes.ok_or(StoreFault::BeyondEnd)?);
        Ok(())
    }
    fn is_written(&self, _: u8, _: u64, _: u64) -> bool {
        false
    }
}

/// As `vectors/sparse.py` writes it; also the places that hold something.
fn expand(sparse: &[u8], bytes: usize) -> (Vec<u8>, Vec<usize>) {
    let (mut image, mut places) = (vec![0; bytes], Vec::new());
    let mut rest = sparse;
    while let Some((number, after)) = rest.split_at_checked(8) {
        let number = u64::from_le_bytes(number.try_into().unwrap());
        let at = (number << 1 >> 1) as usize * 512;
        if number >> 63 == 1 {
            image[at..at + 512].fill(after[0]);
            rest = &after[1..];
        } else {
            image[at..at + 512].copy_from_slice(&after[..512]);
            places.push(at);
            rest = &after[512..];
        }
    }
    (image, places)
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

/// Opens a path and proves that all it answers lies inside the disks.
fn open(bent: &Bent, path: &str, access: Access) -> bool {
    let Ok(found) = resolve(bent, path, access, &mut Progress::default()) else { return false };
    let sectors = found.layout.size_bytes.div_ceil(512);
    let mut at = 0;
    // Bounded: a bent size may be exabytes of hole.
    for _ in 0..200 {
        match found.layout.spot(at) {
            None => break,
            Some(Spot::Zeros(count)) => {
                assert!(access == Access::ReadOnly, "a hole cannot be written");
                assert!(count > 0);
                at += count;
            }
            Some(Spot::Disk(place)) => {
                assert!(place.sectors > 0);
                let end = place.sector + place.sectors;
                assert!(end <= bent.sectors(place.disk), "{path} reaches beyond its disk");
                at += place.sectors;
            }
        }
    }
    at <= sectors.next_multiple_of(128)
}

/// Bends and opens, `rounds` times; how often something still opened.
fn bend(bent: &mut Bent, places: &[(usize, usize)], paths: &[&str], rounds: usize) -> usize {
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    let mut opened = 0;
    for _ in 0..rounds {
        let mut undo = Vec::new();
        for _ in 0..1 + random.below(4) {
            let (disk, at) = places[random.below(places.len())];
            let at = at + random.below(512);
            let byte = &mut bent.disks[disk][at];
            undo.push((disk, at, *byte));
            *byte = [0, 0xFF, 0x80, *byte ^ 1, random.below(256) as u8][random.below(5)];
        }
        for path in paths {
            opened += usize::from(open(bent, path, Access::ReadOnly));
            opened += usize::from(open(bent, path, Access::ReadWrite));
        }
        for (disk, at, byte) in undo.into_iter().rev() {
            bent.disks[disk][at] = byte;
        }
    }
    opened
}

const ROUNDS: usize = if cfg!(debug_assertions) { 1500 } else { 20_000 };

#[test]
fn partition_tables() {
    for sparse in [
        include_bytes!("../vectors/gpt.sparse").as_slice(),
        include_bytes!("../vectors/mbr.sparse").as_slice(),
    ] {
        let (image, places) = expand(sparse, 64 << 20);
        let places: Vec<_> = places.into_iter().map(|at| (0, at)).collect();
        let mut bent = Bent { disks: vec![image] };
        let paths = ["xvda/p1", "xvda/p6", "xvda/images", "xvda/p2/x", "xvda"];
        assert!(bend(&mut bent, &places, &paths, ROUNDS) > ROUNDS);
    }
}

#[test]
fn lvm_groups() {
    let vectors = [
        include_bytes!("../vectors/lvm-pv0.sparse").as_slice(),
        include_bytes!("../vectors/lvm-pv1.sparse").as_slice(),
        include_bytes!("../vectors/lvm-pv2.sparse").as_slice(),
    ];
    let mut bent = Bent { disks: Vec::new() };
    let mut all = Vec::new();
    for (disk, sparse) in vectors.into_iter().enumerate() {
        let (image, places) = expand(sparse, 64 << 20);
        bent.disks.push(image);
        all.extend(places.into_iter().map(|at| (disk, at)));
    }
    let paths = ["xvda/vg0/striped", "xvdb/vg0/grown"];
    assert!(bend(&mut bent, &all, &paths, ROUNDS / 10) > ROUNDS / 20);
}

#[test]
fn ext4_filesystems() {
    for (sparse, megabytes) in [
        (include_bytes!("../vectors/ext4-maps.sparse").as_slice(), 4),
        (include_bytes!("../vectors/ext4-1k.sparse").as_slice(), 4),
        (include_bytes!("../vectors/ext4-default.sparse").as_slice(), 8),
    ] {
        let (image, places) = expand(sparse, megabytes << 20);
        let places: Vec<_> = places.into_iter().map(|at| (0, at)).collect();
        let mut bent = Bent { disks: vec![image] };
        let paths = ["xvda/images/fragments.raw", "xvda/images/unwritten.raw"];
        assert!(bend(&mut bent, &places, &paths, ROUNDS / 4) > ROUNDS / 4);
    }
}
