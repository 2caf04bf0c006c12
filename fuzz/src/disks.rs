//! What the targets of the storage domain's own disks share: disks of any bytes opened by every
//! kind of path, texts and structures that checksums would hide, a backend's nodes and ring.
//! Nothing may panic, and what an opening answers lies inside the disks.

use std::collections::BTreeMap;

use platter_sim::machine::Machine;
use platter_storage::any::AnyDevice;
use platter_storage::blkfront::{BackNodes, Blkfront, FrontStep};
use platter_storage::block_store::BlockStore;
use platter_storage::ext4::{Inode, Mapper, Superblock};
use platter_storage::lvm::{Group, Member, Text, read_label, read_text};
use platter_storage::meta::{Disks, MetaFault, ReadBlocks};
use platter_storage::nvme::{ControllerInfo, Health, NamespaceInfo, parse_namespace_list};
use platter_storage::partition::read_table;
use platter_storage::pcifront::Pcifront;
use platter_storage::resolve::{Progress, resolve};
use platter_storage::volume::Spot;
use platter_storage::{Access, Store, StoreFault, Tag};
use platter_xen::vbd::{BACK_KEYS, DiskNodes};
use platter_xen::{DomId, Gref, Hypervisor, pciif};

/// Sectors of each disk: what the vectors of the storage crate were made with.
const SECTORS: u64 = 64 << 11;
/// Bytes of a record of an input: sector number, then the sector.
const RECORD_BYTES: usize = 8 + 512;
/// Where a record's number says which disk: above it, only the bit for filled sectors.
const DISK_SHIFT: u32 = 56;
/// A record with this bit is one byte long, which fills the sector.
const FILLED: u64 = 1 << 63;

/// Three disks, by their sectors that are not zeros.
struct Sparse {
    sectors: BTreeMap<(u8, u64), [u8; 512]>,
    block_bytes: u32,
}

impl Sparse {
    /// From records as `storage/vectors/sparse.py` writes them, the disk's number in bits 56 and
    /// 57 of the sector's.
    fn parse(mut input: &[u8], block_bytes: u32) -> Sparse {
        let mut sectors = BTreeMap::new();
        while let Some((number, rest)) = input.split_first_chunk::<8>() {
            let number = u64::from_le_bytes(*number);
            let place = ((number >> DISK_SHIFT & 3) as u8 % 3, number & 0xFFFF_FFFF);
            let taken = match (number & FILLED != 0, rest.first_chunk::<512>()) {
                (true, _) if !rest.is_empty() => {
                    sectors.insert(place, [rest[0]; 512]);
                    9
                }
                (false, Some(bytes)) => {
                    sectors.insert(place, *bytes);
                    RECORD_BYTES
                }
                _ => break,
            };
            input = &input[taken..];
        }
        let mut disks = Sparse { sectors, block_bytes };
        disks.seal_gpt();
        disks
    }

    /// A GPT's checksums, made right: they keep chance out, not malice (UEFI 2.10, 5.3.2).
    fn seal_gpt(&mut self) {
        let block = u64::from(self.block_bytes);
        let Some(mut header) = self.sectors.get(&(0, block / 512)).copied() else { return };
        let field = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four"));
        let (first, count, size) = (u64::from(field(72)), field(80), field(84));
        let (header_bytes, bytes) = (field(12) as usize, u64::from(count) * u64::from(size));
        if &header[..8] != b"EFI PART" || !(92..=512).contains(&header_bytes) || bytes > 1 << 20 {
            return;
        }
        let mut entries = vec![0; bytes as usize];
        if self.read(0, first * block, &mut entries).is_err() {
            return;
        }
        header[88..92].copy_from_slice(&crc32(&entries).to_le_bytes());
        header[16..20].fill(0);
        let crc = crc32(&header[..header_bytes]);
        header[16..20].copy_from_slice(&crc.to_le_bytes());
        self.sectors.insert((0, block / 512), header);
    }
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 1 { crc >> 1 ^ 0xEDB8_8320 } else { crc >> 1 }
        })
    })
}

impl Disks for Sparse {
    fn count(&self) -> u8 {
        3
    }
    fn name(&self, disk: u8) -> &str {
        ["xvda", "xvdb", "xvdc"][usize::from(disk)]
    }
    fn sectors(&self, _: u8) -> u64 {
        SECTORS
    }
    fn block_bytes(&self, _: u8) -> u32 {
        self.block_bytes
    }
    fn read(&self, disk: u8, offset: u64, into: &mut [u8]) -> Result<(), MetaFault> {
        let end = offset.checked_add(into.len() as u64).ok_or(StoreFault::BeyondEnd)?;
        if end > SECTORS * 512 {
            return Err(StoreFault::BeyondEnd.into());
        }
        let mut done = 0;
        while done < into.len() {
            let at = offset + done as u64;
            let within = at as usize % 512;
            let part = &mut into[done..][..(512 - within).min(end as usize - at as usize)];
            match self.sectors.get(&(disk, at / 512)) {
                Some(sector) => part.copy_from_slice(&sector[within..][..part.len()]),
                None => part.fill(0),
            }
            done += part.len();
        }
        Ok(())
    }
    fn is_written(&self, _: u8, _: u64, _: u64) -> bool {
        false
    }
}

/// One of the disks by itself.
struct One<'a>(&'a Sparse);

impl ReadBlocks for One<'_> {
    fn len_bytes(&self) -> u64 {
        SECTORS * 512
    }
    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), MetaFault> {
        self.0.read(0, offset, into)
    }
}

/// Paths that lead to something in one of the vectors.
const PATHS: [&str; 14] = [
    "xvda",
    "xvda/p1",
    "xvda/p2",
    "xvda/p6",
    "xvda/images",
    "xvda/p2/images/fragments.raw",
    "xvda/p2/images/holes.raw",
    "xvda/images/plain.raw",
    "xvda/deep.raw",
    "xvda/vg0/linear",
    "xvda/platter_vg/linear",
    "xvdb/platter_vg/striped",
    "xvdc/p1/x",
    "xvda/nothing/here",
];

/// Disks of any bytes: their tables, labels and texts, and every path on them.
pub fn paths(input: &[u8]) {
    let Some((&mode, input)) = input.split_first() else { return };
    let block_bytes = if mode & 1 == 1 { 4096 } else { 512 };
    let disks = Sparse::parse(input, block_bytes);
    if let Ok(table) = read_table(&One(&disks), block_bytes) {
        for partition in &table.partitions {
            let end = partition.sector.checked_add(partition.sectors).expect("inside the disk");
            assert!(end <= SECTORS && partition.sectors > 0, "a partition beyond its disk");
        }
        let _ = (table.find("1"), table.find("p1"), table.find("images"));
    }
    if let Ok(Some(volume)) = read_label(&One(&disks)) {
        for area in volume.areas {
            let _ = read_text(&One(&disks), area, &|_| true);
        }
    }
    for path in PATHS {
        for access in [Access::ReadOnly, Access::ReadWrite] {
            open(&disks, path, access);
        }
    }
}

fn open(disks: &Sparse, path: &str, access: Access) {
    let Ok(found) = resolve(disks, path, access, &mut Progress::default()) else { return };
    let mut at = 0;
    // Bounded: a size may be exabytes of hole.
    for _ in 0..200 {
        match found.layout.spot(at) {
            None => return,
            Some(Spot::Zeros(count)) => {
                assert!(access == Access::ReadOnly && count > 0, "a hole cannot be written");
                at += count;
            }
            Some(Spot::Disk(place)) => {
                let end = place.sector.checked_add(place.sectors).expect("inside the disk");
                assert!(end <= SECTORS && place.sectors > 0, "{path} reaches beyond its disk");
                at += place.sectors;
            }
        }
    }
}

/// LVM texts, ext4 structures and NVMe pages as they come, without what guards them.
pub fn structures(input: &[u8]) {
    if let Ok(text) = Text::parse(input) {
        for (section, key, _) in text.members(0) {
            let _ = (text.section(section, key), text.number(section, key));
            let _ = (text.string(section, key), text.array(section, key).count());
        }
    }
    if let Ok(group) = Group::parse(input) {
        let areas = [(0, 0); 4];
        let member = Member { uuid: [b'a'; 32], disk: 0, sector: 0, sectors: SECTORS, areas };
        for name in ["linear", "striped", "volume"] {
            let _ = group.volume(name, &[member], &|_| SECTORS);
        }
        let _ = (group.name(), group.seqno(), group.id(), group.holds(&[b'a'; 32]));
    }
    if let Ok(fs) = Superblock::parse(input) {
        let _ = fs.prove_writable();
        for number in [2, 12, u32::MAX] {
            let _ = fs.inode_at(&input, number);
            let _ = Inode::read(&input, &fs, number);
        }
        if let Some(inode) = Inode::parse(input.get(1024..).unwrap_or(input), &fs, 12) {
            let _ = (inode.prove_dir(), inode.prove_file(Access::ReadWrite));
            let _ = Mapper::new().collect(&input, &fs, &inode);
        }
    }
    let _ = (ControllerInfo::parse(input), Health::parse(input), parse_namespace_list(input));
    if let Ok(info) = NamespaceInfo::parse(input) {
        assert!(info.sectors() >= info.blocks, "sectors are no larger than blocks");
    }
}

/// A backend that says and answers anything: nodes, ring, addresses of PCI functions.
pub fn backend(input: &[u8]) {
    let mut words = input.split(|byte| *byte == b'\n');
    let state = words.next().unwrap_or(b"2");
    let values: [Option<&[u8]>; 12] = BACK_KEYS.map(|_| words.next());
    let _ = DiskNodes::parse(&values);
    let _ = pciif::parse_device(state);
    let _ = Pcifront::keys(Some(state)).count();
    let mut machine = Machine::new(7);
    machine.add_domain(0, 64);
    machine.add_domain(1, 512);
    let mut store = BlockStore::new(&mut machine.view(1), 64, 16).expect("there is memory");
    store.attach("xvda", AnyDevice::Blkfront(Box::new(Blkfront::new(DomId(0), 51_712))));
    let mut ring = None;
    for state in [state, b"2", b"4", b"4"] {
        let (AnyDevice::Blkfront(front), pool) = store.device_mut(0) else { return };
        let nodes = BackNodes { state: Some(state), params: None, values: &values };
        if let FrontStep::Write(nodes) = front.update(&mut machine.view(1), pool, nodes) {
            let written = |name: &str| {
                nodes.iter().find(|(key, _)| key == name).and_then(|(_, v)| v.parse().ok())
            };
            ring = written("ring-ref").or_else(|| written("ring-ref0")).or(ring);
        }
    }
    let (Some(ring), rest) = (ring, words.next().unwrap_or(b"")) else { return };
    let Ok(page) = machine.view(0).map(DomId(1), &[Gref(ring)]) else { return };
    let _ = store.poll(&mut machine.view(1), 0);
    let _ = store.open(&mut machine.view(1), Tag(1), "xvda", Access::ReadWrite);
    let mut answers = 0;
    for part in rest.chunks(24) {
        if let Some((place, bytes)) = part.split_first() {
            let at = usize::from(*place) * 16 % (4096 - bytes.len());
            machine.view(0).write(page, at, bytes);
        }
        for _ in 0..4 {
            answers += usize::from(store.poll(&mut machine.view(1), 0).is_some());
        }
    }
    assert!(answers <= 1, "one opening has one answer");
}
