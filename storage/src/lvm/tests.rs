//! A group of three physical volumes made by lvm2 (`vectors/make-lvm.sh`), and texts bent by
//! hand for what cannot be made without device-mapper. Misses: groups of thousands of volumes.

use alloc::string::String;

use super::{read_text as read_wanted_text, *};
use crate::StoreFault;
use crate::meta::{MetaFault, ReadBlocks};
use crate::vectors::expand;
use crate::volume::Volume;
use alloc::vec::Vec;

const BYTES: usize = 64 << 20;
const EXTENT: u64 = 2048;
const PE_START: u64 = 2048;

fn disks() -> [Vec<u8>; 3] {
    [
        expand(include_bytes!("../../vectors/lvm-pv0.sparse"), BYTES),
        expand(include_bytes!("../../vectors/lvm-pv1.sparse"), BYTES),
        expand(include_bytes!("../../vectors/lvm-pv2.sparse"), BYTES),
    ]
}

fn read_text(device: &dyn ReadBlocks, area: (u64, u64)) -> Result<Option<Vec<u8>>, MetaFault> {
    read_wanted_text(device, area, &|_| true)
}

/// Text of the group and its members, each on the disk of its number.
fn group() -> (Vec<u8>, Vec<Member>) {
    let mut text = Vec::new();
    let mut members = Vec::new();
    for (disk, bytes) in (0..).zip(disks()) {
        let pv = read_label(&bytes.as_slice()).unwrap().unwrap();
        text = read_text(&bytes.as_slice(), pv.areas[0]).unwrap().unwrap();
        let sectors = BYTES as u64 / 512;
        let areas = pv.areas_padded();
        members.push(Member { uuid: pv.uuid, disk, sector: 0, sectors, areas });
    }
    (text, members)
}

fn volume(text: &[u8], name: &str, members: &[Member]) -> Result<(Volume, bool), StoreFault> {
    Group::parse(text)?.volume(name, members, &|_| BYTES as u64 / 512)
}

fn at(volume: &Volume, extent: u64) -> (u8, u64) {
    let place = volume.place(extent * EXTENT).unwrap();
    (place.disk, (place.sector - PE_START) / EXTENT)
}

#[test]
fn lvm2_linear_volumes_are_where_lvs_says() {
    let (text, members) = group();
    let parsed = Group::parse(&text).unwrap();
    assert_eq!((parsed.name(), parsed.seqno()), ("vg0", 6));
    let (images, writable) = volume(&text, "images", &members).unwrap();
    assert!(writable);
    assert_eq!((images.sectors(), at(&images, 0)), (8 * EXTENT, (0, 0)));
    let (other, _) = volume(&text, "other-1", &members).unwrap();
    assert_eq!(at(&other, 4), (0, 12));
    let (grown, _) = volume(&text, "grown", &members).unwrap();
    assert_eq!(grown.sectors(), 30 * EXTENT);
    assert_eq!((at(&grown, 19), at(&grown, 20), at(&grown, 29)), ((0, 32), (1, 0), (1, 9)));
}

#[test]
fn an_lvm2_striped_volume_alternates_its_physical_volumes() {
    let (text, members) = group();
    let (striped, _) = volume(&text, "striped", &members).unwrap();
    assert_eq!(striped.sectors(), 12 * EXTENT);
    let place = |sector| striped.place(sector).map(|p| (p.disk, p.sector, p.sectors)).unwrap();
    assert_eq!(place(0), (0, PE_START + 33 * EXTENT, 32));
    assert_eq!(place(32), (1, PE_START + 10 * EXTENT, 32));
    assert_eq!(place(64 + 5), (2, PE_START + 5, 27));
    assert_eq!(place(96), (0, PE_START + 33 * EXTENT + 32, 32));
}

#[test]
fn a_missing_or_doubled_physical_volume_refuses_only_what_needs_it() {
    let (text, mut members) = group();
    members.remove(1);
    assert!(volume(&text, "images", &members).is_ok());
    assert!(matches!(volume(&text, "grown", &members), Err(StoreFault::Refused(_))));
    members.push(Member { disk: 3, ..members[0] });
    assert!(matches!(volume(&text, "images", &members), Err(StoreFault::Refused(_))));
}

#[test]
fn a_volume_beyond_its_physical_volume_is_refused() {
    let (text, mut members) = group();
    // The disk is large enough, the partition is not.
    members[0].sectors = PE_START + 7 * EXTENT;
    assert!(matches!(volume(&text, "images", &members), Err(StoreFault::Refused(_))));
    members[0].sectors += EXTENT;
    assert!(volume(&text, "images", &members).is_ok());
}

#[test]
fn other_segment_types_are_refused_by_name() {
    let (text, members) = group();
    let text = String::from_utf8(text).unwrap();
    for kind in ["thin", "raid1", "cache", "snapshot", "vdo-pool", "mirror", "hologram"] {
        let mut bent = String::from("\"");
        bent.push_str(kind);
        bent.push('"');
        let bent = text.replacen("\"striped\"", &bent, 1);
        let result = volume(bent.as_bytes(), "images", &members);
        let Err(StoreFault::Refused(why)) = result else { panic!("{kind}: {result:?}") };
        let named = kind.trim_end_matches("1").trim_end_matches("-pool");
        let word = if kind == "hologram" { "unknown" } else { named };
        assert!(why.to_lowercase().contains(word), "{kind}: {why}");
    }
}

#[test]
fn the_origin_of_a_snapshot_is_refused() {
    let (text, members) = group();
    let snapshot = "logical_volumes {\nsnapshot0 {\nstatus = [\"READ\"]\nsegment1 {\n\
        type = \"snapshot\"\norigin = \"images\"\ncow_store = \"other-1\"\n}\n}\n";
    let text = String::from_utf8(text).unwrap().replacen("logical_volumes {", snapshot, 1);
    for name in ["images", "other-1"] {
        let result = volume(text.as_bytes(), name, &members);
        assert!(matches!(result, Err(StoreFault::Refused(why)) if why.contains("snapshot")));
    }
    assert!(volume(text.as_bytes(), "grown", &members).is_ok());
}

#[test]
fn names_that_do_not_exist_are_not_found() {
    let (text, members) = group();
    assert_eq!(volume(&text, "image", &members), Err(StoreFault::NotFound));
    assert_eq!(volume(&text, "", &members), Err(StoreFault::NotFound));
}

#[test]
fn a_broken_label_header_or_text_is_not_used() {
    let [disk, ..] = disks();
    let mut disk = disk;
    let pv = read_label(&disk.as_slice()).unwrap().unwrap();
    disk[512 + 100] ^= 1;
    assert_eq!(read_label(&disk.as_slice()).unwrap(), None);
    disk[512 + 100] ^= 1;
    for at in [pv.areas[0].0 as usize + 30, pv.areas[0].0 as usize + 45] {
        disk[at] ^= 1;
        assert_eq!(read_text(&disk.as_slice(), pv.areas[0]).unwrap(), None);
        disk[at] ^= 1;
    }
    assert!(read_text(&disk.as_slice(), pv.areas[0]).unwrap().is_some());
}

/// Moves the text of a disk's metadata area so that it begins `before` bytes from the ring's end.
fn wrap(disk: &mut [u8], area: (u64, u64), before: usize) {
    use crate::bytes::{crc32_raw, u64_at};
    let start = area.0 as usize;
    let text = read_text(&&*disk, area).unwrap().unwrap();
    let offset = u64_at(disk, start + 32).unwrap() as usize - before;
    let first = before.min(text.len());
    disk[start + offset..][..first].copy_from_slice(&text[..first]);
    disk[start + 512..][..text.len() - first].copy_from_slice(&text[first..]);
    disk[start + 40..start + 48].copy_from_slice(&(offset as u64).to_le_bytes());
    let crc = crc32_raw(0xF597_A6CF, &disk[start + 4..start + 512]);
    disk[start..start + 4].copy_from_slice(&crc.to_le_bytes());
}

#[test]
fn a_text_that_goes_on_at_the_start_of_its_ring_is_whole() {
    let [disk, ..] = disks();
    let pv = read_label(&disk.as_slice()).unwrap().unwrap();
    let text = read_text(&disk.as_slice(), pv.areas[0]).unwrap().unwrap();
    for before in [1, 512, 513, text.len() - 1, text.len()] {
        let mut disk = disk.clone();
        wrap(&mut disk, pv.areas[0], before);
        assert_eq!(read_text(&disk.as_slice(), pv.areas[0]).unwrap().as_ref(), Some(&text));
    }
}

#[test]
fn what_other_volumes_of_the_group_say_does_not_matter() {
    let (text, members) = group();
    let odd = "logical_volumes {\nodd {\ndelta = -1\nratio = 0.5\nlarge = 99999999999999999999\n\
        tags = [\"a}\", \"b\\\"]\"]\nempty = []\n}\n";
    let past = "\nhistorical_logical_volumes {\ngone {\nid = \"x\"\norigin = \"-images\"\n}\n}\n";
    let text = String::from_utf8(text).unwrap().replacen("logical_volumes {", odd, 1);
    let at = text.find("logical_volumes").unwrap();
    let text = [&text[..at], past, &text[at..]].concat();
    assert_eq!(volume(text.as_bytes(), "images", &members).unwrap().0.sectors(), 8 * EXTENT);
    for field in ["extent_size = 2048", "extent_count = 8", "pe_start = 2048"] {
        let (name, number) = field.split_once("= ").unwrap();
        for bad in ["-", "+", ".", "999999999999"] {
            let bent = text.replacen(field, &[name, "= ", bad, number].concat(), 1);
            assert!(volume(bent.as_bytes(), "images", &members).is_err(), "{name}{bad}");
        }
    }
}

/// The text with one change, and why `name` is refused then; `None` when it is served.
fn why(from: &str, to: &str, name: &str) -> Option<&'static str> {
    let (text, members) = group();
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains(from), "{from}");
    match volume(text.replacen(from, to, 1).as_bytes(), name, &members) {
        Err(StoreFault::Refused(why)) => Some(why),
        other => {
            other.unwrap();
            None
        }
    }
}

#[test]
fn a_volume_over_another_one_or_itself_is_refused_and_others_are_served() {
    let overlaps = Some("the LVM volume overlaps another volume of its group");
    // `other-1` begins within `images`, the second part of `grown` within `striped`.
    for (from, to, all) in [
        ("\"pv0\", 8\n", "\"pv0\", 7\n", ["images", "other-1"]),
        ("\"pv1\", 0\n", "\"pv1\", 13\n", ["grown", "striped"]),
        ("\"pv2\", 0\n", "\"pv1\", 6\n", ["grown", "striped"]),
    ] {
        for name in ["images", "other-1", "grown", "striped"] {
            let expected = if all.contains(&name) { overlaps } else { None };
            assert_eq!(why(from, to, name), expected, "{from} {to} {name}");
        }
    }
    let twice = why("\"pv2\", 0\n", "\"pv1\", 10\n", "striped");
    assert_eq!(twice, Some("the LVM volume has two parts in one place"));
}

#[test]
fn a_volume_over_lvm_s_own_sectors_is_refused() {
    let own = Some("the LVM volume lies over LVM's own metadata");
    for start in ["0", "3", "8", "2047"] {
        let to = ["pe_start = ", start].concat();
        assert_eq!(why("pe_start = 2048", &to, "images"), own, "{to}");
    }
    assert_eq!(why("pe_start = 2048", "pe_start = 2056", "images"), None);
    let (text, mut members) = group();
    // A second area, behind the extents: nothing may grow into it.
    let extent = |number: u64| (PE_START + number * EXTENT) * 512;
    members[0].areas[1] = (extent(8), 1 << 20);
    assert!(volume(&text, "images", &members).is_ok());
    assert!(matches!(volume(&text, "other-1", &members), Err(StoreFault::Refused(_))));
    members[0].areas[1] = (extent(8) - 1, 1);
    assert!(matches!(volume(&text, "images", &members), Err(StoreFault::Refused(_))));
    let beyond = Some("the volume reaches beyond its physical volume");
    assert_eq!(why("pe_count = 63", "pe_count = 7", "images"), beyond);
    assert_eq!(why("pe_count = 63", "pe_count = 8", "images"), None);
}

#[test]
fn bent_texts_never_panic() {
    let (text, members) = group();
    for at in 0..text.len() {
        let mut bent = text.clone();
        bent[at] = [b'}', b'"', b'9', b'[', 0xFF][at % 5];
        let _ = volume(&bent, "striped", &members);
        let _ = volume(&text[..at], "striped", &members);
    }
}
