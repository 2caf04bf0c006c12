//! VMDK as whole images: grain tables that are missing, and extents that hold more than they need.
//!
//! Would miss: several writes in flight at once and power cuts (the tool's image tests), growing
//! (tests/grow.rs), other authors' readers (both).

mod foreign;

use foreign::*;
use platter_image::{CreateParams, FlushStep, Format};
use platter_tool::medium::RamFolder;

/// A table goes in at once, with the directory's entry behind it. Made during a flush that is past
/// the table's phase, the entry would be durable before it.
#[test]
fn a_grain_table_is_not_made_during_a_flush() {
    let folder = RamFolder::new();
    let mut bytes = made(&params(Format::Vmdk, 200_000));
    for at in [48, 56] {
        let sector = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        assert!(sector > 0);
        bytes[sector as usize * 512 + 4..][..4].fill(0);
    }
    folder.put("a.vmdk", bytes);
    let mut engine = open(&folder, "a.vmdk", rw(Format::Vmdk));
    engine.write(0, &[1; 512]).unwrap();
    engine.image().flush_begin();
    while !matches!(engine.image().flush_step(), FlushStep::Write { .. }) {}
    assert!(prepare(&mut engine, 65_536, 1).is_none());
    engine.image().flush_end(false);
    engine.write(65_536, &[2; 512]).unwrap();
    engine.close().unwrap();
    let mut engine = open(&folder, "a.vmdk", ro(Format::Vmdk));
    assert_eq!(check_all(&mut engine).corruptions, 0);
    for (sector, byte) in [(0, 1), (65_536, 2)] {
        let mut read = [9; 1024];
        engine.read(sector, &mut read).unwrap();
        assert!(read[..512] == [byte; 512] && read[512..] == [0; 512]);
    }
}

#[test]
fn a_flat_extents_file_is_never_cut() {
    let folder = RamFolder::new();
    let options = &[("subformat", "monolithicFlat")];
    let (name, flat) = ("a.vmdk", "a-flat.vmdk");
    create(&folder, &CreateParams { name, options, ..params(Format::Vmdk, 2048) });
    let mut bytes = folder.bytes(flat).unwrap();
    bytes.resize(3 << 20, 0x77);
    folder.put(flat, bytes.clone());
    let mut engine = open(&folder, name, rw(Format::Vmdk));
    engine.resize(4096).unwrap();
    engine.close().unwrap();
    assert!(folder.bytes(flat).unwrap() == bytes);
    let mut engine = open(&folder, name, rw(Format::Vmdk));
    assert_eq!(engine.sectors(), 4096);
    engine.resize(8192).unwrap();
    assert_eq!(folder.bytes(flat).unwrap().len(), 4 << 20);
}
