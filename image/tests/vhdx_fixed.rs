//! VHDX in a store of fixed size, a partition: it is longer than what is in use, and holds anything
//! there.
//!
//! Would miss: power cuts (the tool's image tests), and everything that is the same in a store
//! that grows (tests/vhdx.rs).

mod foreign;

use foreign::*;
use platter_image::{Backing, CreateParams, FlushStep, Format, Options};
use platter_tool::medium::RamFolder;

const MIB: usize = 1 << 20;
const BLOCK: u64 = 2048;

/// `p.vhdx`, and over it `c.vhdx` if it `has_parent`; the name of the one on top, in a store with
/// room for so many blocks of 1 MiB more.
fn fixed(folder: &RamFolder, sectors: u64, room: u64, has_parent: bool) -> &'static str {
    let base = CreateParams { cluster_bytes: 1 << 20, ..params(Format::Vhdx, sectors) };
    folder.put("p.vhdx", made(&base));
    let mut name = "p.vhdx";
    if has_parent {
        let identity = open(folder, name, ro(Format::Vhdx)).image().identity();
        let backing = Backing { name, format: Format::Vhdx, identity, sectors };
        name = "c.vhdx";
        folder.put(name, made(&CreateParams { backing: Some(backing), seed: 5, ..base }));
    }
    let mut bytes = folder.bytes(name).unwrap();
    bytes.resize(bytes.len() + room as usize * MIB, 0xee);
    folder.put(name, bytes);
    folder.fix(true);
    name
}

#[test]
fn more_blocks_than_free_places_are_kept_have_a_place_each() {
    const BLOCKS: u64 = 80;
    for has_parent in [false, true] {
        let folder = RamFolder::new();
        let name = fixed(&folder, BLOCKS * BLOCK, BLOCKS + 1, has_parent);
        let mut model = vec![0; BLOCKS as usize * MIB];
        let mut engine = open(&folder, name, rw(Format::Vhdx));
        for block in 0..BLOCKS {
            let at = block * BLOCK + 16;
            engine.write(at, &[block as u8 + 1; 4096]).unwrap();
            model[at as usize * 512..][..4096].fill(block as u8 + 1);
        }
        engine.close().unwrap();
        let mut engine = open(&folder, name, rw(Format::Vhdx));
        assert_eq!(check_all(&mut engine).corruptions, 0, "{has_parent}");
        assert!(read_all(&mut engine) == model, "{has_parent}");
    }
}

/// A new sector bitmap starts from zeros in the cache. If its plan comes to nothing, another
/// block gets the place, and must not be written over by them.
#[test]
fn a_plan_that_has_to_wait_leaves_no_zeros_behind() {
    let folder = RamFolder::new();
    let sectors = 2000 * BLOCK;
    let name = fixed(&folder, sectors, 8, true);
    // Four blocks can be pinned: two BAT entries of others, one of ours and the bits.
    let options = Options { budget_bytes: 16 * 4096, ..rw(Format::Vhdx) };
    let mut engine = open(&folder, name, options);
    let others = [600, 1200].map(|block| prepare(&mut engine, block * BLOCK, BLOCK).unwrap());
    assert!(prepare(&mut engine, 0, 8).is_none(), "the entry of the bitmap cannot be pinned");
    others.into_iter().for_each(|plan| engine.image().abandon(plan.prepared));
    let data = vec![7; 4 * MIB];
    engine.write(1800 * BLOCK, &data).unwrap();
    engine.close().unwrap();
    let mut read = vec![0; data.len()];
    let mut engine = open(&folder, name, ro(Format::Vhdx));
    engine.read(1800 * BLOCK, &mut read).unwrap();
    assert!(read == data);
}

/// A log entry's checksum is known before all of it is written: what it holds must not change.
#[test]
fn nothing_gets_dirty_while_a_log_entry_is_written() {
    let folder = RamFolder::new();
    let name = fixed(&folder, 9000 * BLOCK, 12, true);
    let mut engine = open(&folder, name, rw(Format::Vhdx));
    // Bits of a block that is not present mean nothing, and are cleared when it gets its place.
    engine.write(8, &[1; 4096]).unwrap();
    engine.write(BLOCK + 8, &[1; 4096]).unwrap();
    engine.close().unwrap();
    let mut bytes = folder.bytes(name).unwrap();
    bytes[3 * MIB + 8..3 * MIB + 16].fill(0);
    folder.put(name, bytes);
    // Of block 5000 there is no bitmap yet.
    for (other, start) in [(2 * BLOCK, BLOCK), (3 * BLOCK, 5000 * BLOCK)] {
        let mut engine = open(&folder, name, rw(Format::Vhdx));
        engine.write(other, &[2; 4096]).unwrap();
        let before = folder.bytes(name).unwrap();
        engine.image().flush_begin();
        let mut steps = 0;
        let log = loop {
            steps += 1;
            assert!(steps < 100, "a flush without a log entry");
            if let FlushStep::Write { offset, .. } = engine.image().flush_step()
                && (MIB..2 * MIB).contains(&(offset as usize))
            {
                break offset;
            }
        };
        assert!(prepare(&mut engine, start, 8).is_none(), "{start} {log}");
        engine.image().flush_end(false);
        assert!(folder.bytes(name).unwrap() == before, "no step was carried out");
        engine.write(start, &[3; 4096]).unwrap();
        engine.close().unwrap();
        let mut engine = open(&folder, name, ro(Format::Vhdx));
        assert_eq!(check_all(&mut engine).corruptions, 0);
        for (at, byte) in [(start, 3), (other, 2)] {
            let mut read = vec![9; MIB];
            engine.read(at, &mut read).unwrap();
            let (ours, rest) = read.split_at(4096);
            assert!(ours.iter().all(|&b| b == byte) && rest.iter().all(|&b| b == 0), "{at}");
        }
    }
}

/// The disk ends within a block, all of which becomes present with the disk's part of it.
#[test]
fn what_lies_behind_the_end_of_the_disk_does_not_show_when_it_grows() {
    let folder = RamFolder::new();
    let name = fixed(&folder, BLOCK + 800, 4, true);
    let mut engine = open(&folder, name, rw(Format::Vhdx));
    engine.write(BLOCK + 8, &[1; 512]).unwrap();
    engine.write(BLOCK, &[2; 800 * 512]).unwrap();
    engine.resize(2 * BLOCK).unwrap();
    let mut read = vec![9; 1248 * 512];
    engine.read(BLOCK + 800, &mut read).unwrap();
    assert!(read.iter().all(|&b| b == 0));
}
