//! The storage domain's own disks in the world: a disk that a backend domain serves, an NVMe
//! controller behind pciback; guests' images lie in their partitions.
//!
//! Guards one-seed-one-run: the models do something only in [`Disks::run`], which draws order
//! and pace from its own source of chance. Must never: lose what was flushed.

pub mod blk;
pub mod pci;

use crate::machine::Machine;
use crate::rng::Rng;
use crate::xenstore::Xenstore;
use blk::Blk;
use pci::Pci;

/// The first of the domains that serve disks, privileged towards xenstore; each death of a
/// backend domain takes the next number.
pub const BACKENDS: u16 = 32_100;
/// pciback's domain.
pub const PCIBACK: u16 = 32_002;

/// Which of the two.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DiskKind {
    Blk,
    Nvme,
}

impl DiskKind {
    /// What platter calls it.
    pub fn name(self) -> &'static str {
        match self {
            DiskKind::Blk => "xvda",
            DiskKind::Nvme => "nvme0n1",
        }
    }
}

/// A stretch of a disk that holds an image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Partition {
    pub disk: DiskKind,
    pub first_byte: usize,
    pub bytes: usize,
}

/// How fast they are, and how often what goes wrong.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    pub latency_ns: (u64, u64),
    /// Requests of one turn at most.
    pub most: u64,
    /// Of 1000 turns: the next requests fail (and how many).
    pub fail: u64,
    /// NVMe: the next commands are swallowed.
    pub swallow: u64,
    /// NVMe: the controller reports a fatal status.
    pub fatal: u64,
    /// NVMe: it loses power for a moment, and its cache with it.
    pub cut: u64,
    /// NVMe: a completion for no command.
    pub wrong_cid: u64,
}

impl Pace {
    pub const CALM: Pace = Pace {
        latency_ns: (5_000, 60_000),
        most: 4,
        fail: 0,
        swallow: 0,
        fatal: 0,
        cut: 0,
        wrong_cid: 0,
    };
}

/// All disks of the storage domain.
pub struct Disks {
    pub blk: Option<Blk>,
    pub pci: Option<Pci>,
    pub pace: Pace,
    /// A cache was lost since the world looked.
    pub lost: bool,
    pub rng: Rng,
}

impl Disks {
    pub fn new(rng: Rng) -> Disks {
        Disks { blk: None, pci: None, pace: Pace::CALM, lost: false, rng }
    }

    /// Their turn. When they must run again without an event.
    pub fn run(&mut self, machine: &mut Machine, xs: &mut Xenstore, now_ns: u64) -> Option<u64> {
        let (pace, rng) = (self.pace, &mut self.rng);
        let mut more = false;
        if let Some(blk) = &mut self.blk {
            more |= blk.run(machine, xs, pace, rng);
        }
        if let Some(pci) = &mut self.pci {
            more |= pci.run(machine, xs, pace, rng);
            self.lost |= core::mem::take(&mut pci.lost);
        }
        let later_ns = rng.between(pace.latency_ns.0, pace.latency_ns.1);
        more.then_some(now_ns + later_ns)
    }

    /// The bytes of a partition as a read would give them now, or as they are after a cut.
    pub fn bytes(&self, machine: &Machine, partition: Partition) -> Vec<u8> {
        let range = partition.first_byte..partition.first_byte + partition.bytes;
        let (mut bytes, cached, unit) = match partition.disk {
            DiskKind::Blk => {
                let model = &self.blk.as_ref().expect("the disk").model;
                (model.media[range.clone()].to_vec(), model.cache.clone(), 512)
            }
            DiskKind::Nvme => {
                let model = machine.nvme.as_ref().expect("the controller").borrow();
                let unit = model.block_bytes as usize;
                (model.media[range.clone()].to_vec(), model.cache.clone(), unit)
            }
        };
        for (number, block) in cached {
            let at = number as usize * unit;
            if range.contains(&at) {
                bytes[at - range.start..][..unit].copy_from_slice(&block);
            }
        }
        bytes
    }

    /// The power goes: caches keep what they happened to have written.
    pub fn cut(&mut self, machine: &mut Machine) {
        if let Some(blk) = &mut self.blk {
            lose_cache(&mut self.rng, |keep| blk.model.power_cut(keep));
        }
        if let Some(nvme) = &machine.nvme {
            lose_cache(&mut self.rng, |keep| nvme.borrow_mut().power_cut(keep));
        }
    }
}

/// Keeps any part of a cache: none of it, all, or each block by chance.
pub fn lose_cache(rng: &mut Rng, cut: impl FnOnce(&mut dyn FnMut(u64) -> bool)) {
    let kept = *rng.pick(&[0, 300, 700, 1000]);
    cut(&mut |_| rng.chance(kept));
}

/// Media with a partition table of up to four primary partitions of these lengths in bytes
/// (UEFI 2.10, table 5.1), each at a boundary of 64 KiB: the media, and where each begins.
pub fn partitioned(lengths: &[usize], block_bytes: usize) -> (Vec<u8>, Vec<usize>) {
    const ALIGN: usize = 64 << 10;
    assert!(lengths.len() <= 4, "primary partitions");
    let mut media = vec![0; ALIGN];
    let mut firsts = vec![];
    for (index, length) in lengths.iter().enumerate() {
        let first = media.len();
        firsts.push(first);
        media.resize((first + length).next_multiple_of(ALIGN), 0);
        let entry = &mut media[446 + index * 16..][..16];
        entry[4] = 0x83;
        entry[8..12].copy_from_slice(&((first / block_bytes) as u32).to_le_bytes());
        entry[12..].copy_from_slice(&((length / block_bytes) as u32).to_le_bytes());
    }
    media[510..512].copy_from_slice(&[0x55, 0xAA]);
    (media, firsts)
}
