//! Parents of VHD and VHDX children as Windows, Virtual PC for Mac, XenServer and VirtualBox name
//! them: relative and absolute paths, several locators, folders that were moved, names that lead
//! out. The locators are put together here; what the chains hold is libvhdi's to confirm.
//!
//! Would miss: locators that no writer's documentation tells of.

mod foreign;

use foreign::*;
use platter_image::{Backing, CreateParams, Format};
use platter_tool::engine::Engine;
use platter_tool::medium::RamFolder;

const SECTORS: u64 = 2 * 4096 + 40;
/// Where a VHDX made here has its metadata.
const METADATA: usize = 2 << 20;

fn utf16_le(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

fn utf16_be(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_be_bytes).collect()
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// A parent with something in it under each name, and its identity.
fn parents(format: Format, names: &[&str]) -> (RamFolder, u128) {
    let folder = RamFolder::new();
    create(&folder, &CreateParams { name: names[0], ..params(format, SECTORS) });
    let mut engine = open(&folder, names[0], rw(format));
    engine.write(0, &vec![5; SECTORS as usize * 512]).unwrap();
    engine.close().unwrap();
    let identity = open(&folder, names[0], ro(format)).image().identity().unwrap();
    for name in &names[1..] {
        folder.put(name, folder.bytes(names[0]).unwrap());
    }
    (folder, identity)
}

fn child(format: Format, name: &str, identity: u128) -> Vec<u8> {
    let backing = Backing { name, format, identity: Some(identity), sectors: SECTORS };
    made(&CreateParams { backing: Some(backing), seed: 99, ..params(format, SECTORS) })
}

/// A differencing VHD with these locators and this Unicode name. The space of every second one is
/// told in sectors, as the specification has it, that of the others in bytes, as Windows has it.
fn vhd(identity: u128, locators: &[([u8; 4], Vec<u8>)], name: &[u8]) -> Vec<u8> {
    let mut bytes = child(Format::Vhd, "p.vhd", identity);
    let footer = bytes[..512].to_vec();
    bytes.truncate(bytes.len() - 512);
    bytes[512 + 64..512 + 576].fill(0);
    bytes[512 + 576..512 + 768].fill(0);
    put(&mut bytes, 512 + 64, name);
    for (n, (code, data)) in locators.iter().enumerate() {
        let space = if n % 2 == 0 { 512 } else { 1 };
        let at = 512 + 576 + n * 24;
        let place = bytes.len();
        put(&mut bytes, at, code);
        put(&mut bytes, at + 4, &(space as u32).to_be_bytes());
        put(&mut bytes, at + 8, &(data.len() as u32).to_be_bytes());
        put(&mut bytes, at + 16, &(place as u64).to_be_bytes());
        bytes.extend(data);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
    }
    bytes[512 + 36..512 + 40].fill(0);
    let sum = bytes[512..1536].iter().fold(0u32, |sum, &b| sum.wrapping_add(b.into()));
    put(&mut bytes, 512 + 36, &(!sum).to_be_bytes());
    bytes.extend(footer);
    bytes
}

/// A differencing VHDX with these keys and values.
fn vhdx(identity: u128, pairs: &[(&str, String)]) -> Vec<u8> {
    let mut bytes = child(Format::Vhdx, "p.vhdx", identity);
    let mut item = vec![0; 20 + 12 * pairs.len()];
    let old = METADATA + u32_le(&bytes, METADATA + 32 + 5 * 32 + 16) as usize;
    item[..16].copy_from_slice(&bytes[old..old + 16]);
    put(&mut item, 18, &(pairs.len() as u16).to_le_bytes());
    for (n, (key, value)) in pairs.iter().enumerate() {
        for (text, place, length) in [(*key, 0, 8), (value.as_str(), 4, 10)] {
            let text = utf16_le(text);
            let at = 20 + 12 * n;
            let offset = item.len() as u32;
            put(&mut item, at + place, &offset.to_le_bytes());
            put(&mut item, at + length, &(text.len() as u16).to_le_bytes());
            item.extend(text);
        }
    }
    let entry = METADATA + 32 + 5 * 32;
    put(&mut bytes, entry + 16, &(256u32 << 10).to_le_bytes());
    put(&mut bytes, entry + 20, &(item.len() as u32).to_le_bytes());
    put(&mut bytes, METADATA + (256 << 10), &item);
    bytes
}

fn u32_le(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// Opens a child, writes a little, and reads the chain; or says why it does not open.
fn try_child(folder: &RamFolder, name: &str, format: Format) -> Result<(), String> {
    let mut engine = Engine::open(folder, name, rw(format)).map_err(|fault| fault.to_string())?;
    assert_eq!(engine.depth(), 2);
    engine.write(4100, &[6; 16 * 512]).unwrap();
    engine.close().unwrap();
    let mut want = vec![5; SECTORS as usize * 512];
    want[4100 * 512..4116 * 512].fill(6);
    assert!(read_all(&mut open(folder, name, ro(format))) == want);
    Ok(())
}

/// What libvhdi makes of the chain.
fn hold_by_libvhdi(scratch: &Scratch, folder: &RamFolder, chain: [&str; 2]) {
    chain.iter().for_each(|name| scratch.put(name, &folder.bytes(name).unwrap()));
    let Some(disk) = scratch.by_reader("libvhdi", &chain) else { return };
    let mut want = vec![5; SECTORS as usize * 512];
    want[4100 * 512..4116 * 512].fill(6);
    assert!(disk == want, "libvhdi reads {chain:?}");
}

/// Codes and data.
type Locators = Vec<([u8; 4], Vec<u8>)>;

const W2RU: [u8; 4] = *b"W2ru";
const W2KU: [u8; 4] = *b"W2ku";
const MACX: [u8; 4] = *b"MacX";

#[test]
fn a_vhds_parent_is_found_by_whatever_locator_can_be_read() {
    let (folder, identity) = parents(Format::Vhd, &["p.vhd", "sub/p.vhd", "p q.vhd"]);
    let scratch = Scratch::new("parents-vhd");
    let ru = |path: &str| (W2RU, utf16_le(path));
    let ku = |path: &str| (W2KU, utf16_le(path));
    let mac = |url: &str| (MACX, url.as_bytes().to_vec());
    let name = utf16_be("p.vhd");
    let cases: Vec<(Locators, &[u8])> = vec![
        (vec![ru(".\\p.vhd")], b""),
        (vec![ru("p.vhd\0"), ku("C:\\elsewhere\\q.vhd")], &name),
        (vec![ru("sub\\p.vhd")], b""),
        (vec![ku("C:\\Users\\Public\\Hyper-V\\p.vhd")], b""),
        (vec![ku("\\\\server\\share\\p.vhd")], b""),
        (vec![ku("\\\\?\\Volume{26a21bda-a627-11d7-9931-806e6f6e6963}\\p.vhd")], b""),
        // An absolute path where a relative one belongs.
        (vec![ru("C:\\old\\p.vhd")], b""),
        (vec![ru("\\old\\p.vhd")], b""),
        // The parent was in another folder, and both were moved into one.
        (vec![ru("..\\base\\p.vhd"), ku("D:\\base\\p.vhd")], &name),
        (vec![mac("file://./p.vhd")], b""),
        (vec![mac("file:///Volumes/Disk/p%20q.vhd")], b""),
        (vec![mac("file://localhost/Volumes/Disk/p.vhd")], b""),
        (vec![mac("file://./sub/p.vhd\0")], b""),
        // XenServer's three.
        (vec![mac("file://./p.vhd"), ku("./p.vhd"), ru("./p.vhd")], &name),
        // Codes that are no more, with text in some code page: the name in the header counts.
        (vec![(*b"Wi2r", b".\\x.vhd".to_vec()), (*b"Wi2k", b"C:\\x.vhd".to_vec())], &name),
        (vec![], &name),
        // Half a surrogate pair, nothing at all, and then one that can be read.
        (vec![(W2RU, vec![0, 0xd8]), (W2RU, vec![]), ku("C:\\p.vhd")], b""),
    ];
    for (locators, name) in cases {
        folder.put("c.vhd", vhd(identity, &locators, name));
        try_child(&folder, "c.vhd", Format::Vhd)
            .unwrap_or_else(|fault| panic!("{locators:?}: {fault}"));
        hold_by_libvhdi(&scratch, &folder, ["c.vhd", "p.vhd"]);
    }
    for (locators, says) in [
        (vec![ru("..\\base\\p.vhd")], "'..'"),
        (vec![ru("..\\base\\p.vhd"), mac("file://./../base/p.vhd")], "'..'"),
        (vec![ru("sub\\..\\..\\p.vhd")], "'..'"),
        (vec![ru("no.vhd")], "no.vhd"),
        (vec![ku("C:\\base\\")], "no locator and no name"),
        (vec![ru(".\\")], "no locator and no name"),
        (vec![], "no locator and no name"),
    ] {
        folder.put("c.vhd", vhd(identity, &locators, b""));
        let fault = try_child(&folder, "c.vhd", Format::Vhd).unwrap_err();
        assert!(fault.contains(says), "{locators:?}: {fault}");
    }
    // Data beyond the end of the file.
    let mut far = vhd(identity, &[ru("p.vhd"), ku("C:\\p.vhd")], b"");
    put(&mut far, 512 + 576 + 16, &(1u64 << 40).to_be_bytes());
    far[512 + 36..512 + 40].fill(0);
    let sum = far[512..1536].iter().fold(0u32, |sum, &b| sum.wrapping_add(b.into()));
    put(&mut far, 512 + 36, &(!sum).to_be_bytes());
    folder.put("c.vhd", far);
    try_child(&folder, "c.vhd", Format::Vhd).unwrap();
    folder.put("c.vhd", vhd(identity ^ 1, &[ru("p.vhd")], b""));
    let fault = try_child(&folder, "c.vhd", Format::Vhd).unwrap_err();
    assert!(fault.contains("the parent is not the image"), "{fault}");
}

#[test]
fn a_vhdxs_parent_is_found_by_any_of_its_paths() {
    let (folder, identity) = parents(Format::Vhdx, &["p.vhdx", "sub/p.vhdx"]);
    let scratch = Scratch::new("parents-vhdx");
    let text = format!("{identity:032x}");
    let parts = [&text[..8], &text[8..12], &text[12..16], &text[16..20], &text[20..]];
    let guid = format!("{{{}}}", parts.join("-"));
    let other = guid.replace(&text[..4], "0000");
    let linkage = |guid: &str| ("parent_linkage", String::from(guid));
    let relative = |path: &str| ("relative_path", String::from(path));
    let volume = ("volume_path", String::from("\\\\?\\Volume{26a21bda-a627}\\vm\\p.vhdx"));
    let absolute = |path: &str| ("absolute_win32_path", String::from(path));
    for pairs in [
        vec![linkage(&guid), relative(".\\p.vhdx")],
        vec![linkage(&guid), relative("p.vhdx\0"), absolute("C:\\q.vhdx")],
        vec![absolute("C:\\q.vhdx"), relative("sub\\p.vhdx"), linkage(&guid.to_uppercase())],
        vec![linkage(&text), absolute("\\\\?\\C:\\Hyper-V\\p.vhdx")],
        vec![linkage(&guid), volume.clone(), absolute("C:\\q.vhdx")],
        vec![linkage(&guid), absolute("\\\\server\\share\\p.vhdx")],
        vec![linkage(&guid), relative("C:\\vm\\p.vhdx")],
        // The parent was in another folder, and both were moved into one.
        vec![linkage(&guid), relative("..\\base\\p.vhdx"), absolute("D:\\base\\p.vhdx")],
        vec![relative("..\\base\\p.vhdx"), volume.clone(), linkage(&guid)],
        vec![linkage(&other), ("parent_linkage2", guid.clone()), relative("p.vhdx")],
        vec![("of somebody else", String::from("x")), linkage(&guid), relative("p.vhdx")],
    ] {
        folder.put("c.vhdx", vhdx(identity, &pairs));
        try_child(&folder, "c.vhdx", Format::Vhdx)
            .unwrap_or_else(|fault| panic!("{pairs:?}: {fault}"));
        // libvhdi goes by the first linkage alone, in braces.
        if pairs.contains(&linkage(&guid)) {
            hold_by_libvhdi(&scratch, &folder, ["c.vhdx", "p.vhdx"]);
        }
    }
    for (pairs, says) in [
        (vec![linkage(&guid), relative("..\\base\\p.vhdx")], "'..'"),
        (vec![linkage(&guid), relative("no.vhdx"), absolute("C:\\p.vhdx")], "no.vhdx"),
        (vec![linkage(&guid)], "no path"),
        (vec![linkage(&guid), absolute("C:\\vm\\")], "no path"),
        (vec![linkage(&other), relative("p.vhdx")], "the parent is not the image"),
        (vec![relative("p.vhdx")], "the parent is not the image"),
        (vec![linkage("{00000000-0000-0000-0000-000000000000}"), relative("p.vhdx")], "is not"),
    ] {
        folder.put("c.vhdx", vhdx(identity, &pairs));
        let fault = try_child(&folder, "c.vhdx", Format::Vhdx).unwrap_err();
        assert!(fault.contains(says), "{pairs:?}: {fault}");
    }
}
