//! Filesystems that the real mke2fs fills, in many shapes, against the files they were filled
//! from: every file must be found and read as it is. Needs e2fsprogs. Misses: what only a
//! kernel's allocator makes; holes (unit tests have those).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use platter_storage::Access;
use platter_storage::ext4::{self, Mapper};
use platter_storage::meta::{MetaFault, Miss, ReadBlocks};

/// Options of mke2fs, and the image's size in MiB.
const SHAPES: [(&str, u32); 10] = [
    ("-t ext4", 96),
    ("-t ext4 -b 1024", 96),
    ("-t ext4 -b 2048 -O ^metadata_csum", 96),
    ("-t ext4 -O ^metadata_csum,uninit_bg", 96),
    ("-t ext4 -O meta_bg,^resize_inode -b 1024 -g 1024", 96),
    ("-t ext4 -O ^64bit", 96),
    ("-t ext4 -O metadata_csum_seed,bigalloc -C 16384", 96),
    ("-t ext4 -I 128 -O ^extents,^64bit,^metadata_csum", 96),
    ("-t ext3 -b 1024", 96),
    ("-t ext2", 96),
];

/// A folder of this test's own, removed at its end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("platter-ext4-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(path.join("tree/many")).unwrap();
        Scratch(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Bytes that differ in every 512 bytes and from file to file.
fn content(len: usize, salt: usize) -> Vec<u8> {
    (0..len).map(|at| ((at / 512).wrapping_mul(31) ^ at ^ salt) as u8).collect()
}

/// 1000 names in one directory (a hash tree), and files of sizes around each step of a map.
fn fill(tree: &Path) -> Vec<(String, usize)> {
    let mut files = Vec::new();
    for number in 0..1000 {
        files.push((format!("many/a-rather-long-name-for-a-file-{number:05}"), number % 700));
    }
    for (number, len) in
        [0, 1, 511, 4096, 12 * 1024 + 1, 280 * 1024, 5 << 20, 17 << 20].into_iter().enumerate()
    {
        files.push((format!("file{number}"), len));
    }
    for (salt, (name, len)) in files.iter().enumerate() {
        fs::write(tree.join(name), content(*len, salt)).unwrap();
    }
    files
}

fn make(scratch: &Path, options: &str, megabytes: u32) -> Vec<u8> {
    let image = scratch.join("fs.img");
    let _ = fs::remove_file(&image);
    let done = Command::new("mke2fs")
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .args(["-q", "-F", "-N", "8192", "-d"])
        .arg(scratch.join("tree"))
        .args(options.split_whitespace())
        .arg(&image)
        .arg(format!("{megabytes}M"))
        .status()
        .expect("mke2fs runs; install e2fsprogs");
    assert!(done.success(), "mke2fs {options}");
    fs::read(&image).unwrap()
}

fn read(image: &[u8], path: &str, options: &str) -> Vec<u8> {
    let mut mapper = Mapper::new();
    let found = ext4::open(&image, path, Access::ReadOnly, &mut mapper);
    let found = found.unwrap_or_else(|fault| panic!("{path} of mke2fs {options}: {fault:?}"));
    let mut bytes = vec![0; found.size_bytes as usize];
    for extent in mapper.extents() {
        let (from, to) = (extent.sector as usize * 512, extent.start as usize * 512);
        let len = (extent.sectors as usize * 512).min(bytes.len() - to);
        bytes[to..to + len].copy_from_slice(&image[from..from + len]);
    }
    bytes
}

/// A reader that knows some blocks of 4096 bytes, as the cache of an opening.
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
                return Err(MetaFault::Miss(Miss { disk: 0, block }));
            }
        }
        self.image.read_at(offset, into)
    }
}

#[test]
fn a_long_block_map_is_read_through_a_cache_that_cannot_hold_it() {
    let scratch = Scratch::new("long");
    let tree = scratch.0.join("tree");
    fs::write(tree.join("long"), content(40 << 20, 5)).unwrap();
    let image = make(&scratch.0, "-t ext3 -b 1024", 96);
    let mut partly = Partly { image: &image, known: Vec::new() };
    let (mut mapper, mut mapped, mut cleared) = (Mapper::new(), 0, 0);
    loop {
        match ext4::open(&partly, "long", Access::ReadWrite, &mut mapper) {
            Ok(_) => break,
            Err(MetaFault::Miss(miss)) => {
                if partly.known.len() == 24 {
                    assert!(mapper.progress() > mapped, "led in circles");
                    (mapped, cleared) = (mapper.progress(), cleared + 1);
                    partly.known.clear();
                }
                partly.known.push(miss.block);
            }
            Err(fault) => panic!("{fault:?}"),
        }
    }
    assert!(cleared > 1, "the cache was large enough");
    let mut whole = Mapper::new();
    ext4::open(&&image[..], "long", Access::ReadWrite, &mut whole).unwrap();
    assert_eq!(mapper.extents(), whole.extents());
}

#[test]
fn every_file_of_every_shape_reads_as_it_is() {
    let scratch = Scratch::new("shapes");
    let files = fill(&scratch.0.join("tree"));
    for (options, megabytes) in SHAPES {
        let image = make(&scratch.0, options, megabytes);
        for (salt, (name, len)) in files.iter().enumerate() {
            // Looking up each of a thousand names in each shape would take minutes.
            if salt % 111 == 0 || !name.starts_with("many") {
                assert!(
                    read(&image, name, options) == content(*len, salt),
                    "{name} of mke2fs {options}"
                );
            }
        }
        let missing = ext4::open(&&image[..], "many/none", Access::ReadOnly, &mut Mapper::new());
        assert!(missing.is_err());
    }
}
