//! An NVMe controller with one namespace, as a model: registers, queues in the host's memory, a
//! volatile write cache, faults on demand (NVM Express 1.4).
//!
//! Deterministic: nothing happens but in [`NvmeModel::step`], and the caller picks which fetched
//! command is next. Stricter than hardware where that finds bugs: a register or command that the
//! specification forbids panics, except where a real controller answers with an error.

use std::collections::BTreeMap;
use std::vec::Vec;

/// The host's memory, by the addresses that it gave to the device.
pub trait Dma {
    fn read(&self, address: u64, into: &mut [u8]);
    fn write(&mut self, address: u64, from: &[u8]);
}

/// What goes wrong.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// This many I/O commands from now are swallowed: they never complete unless aborted.
    pub swallow: u32,
    /// Aborts are refused.
    pub abort_refused: bool,
    /// This many I/O commands from now fail with this status (type and code; bit 14: final).
    pub fail: u32,
    pub fail_status: u16,
    /// This many admin commands from now fail with an internal error.
    pub fail_admin: u32,
    /// All registers read as ones, nothing is done any more.
    pub gone: bool,
    /// CSTS.RDY never changes again, and a shutdown is never complete.
    pub stuck: bool,
    /// CSTS.CFS is set until the next reset.
    pub fatal: bool,
    /// The next completion names a command that does not exist.
    pub wrong_cid: bool,
}

struct Ring {
    address: u64,
    entries: u16,
    /// Submission: next to fetch. Completion: next to write.
    at: u16,
    /// Submission: the tail that the host wrote. Completion: the head that it wrote.
    doorbell: u16,
    phase: bool,
}

/// A command that was fetched and not yet executed.
struct Fetched {
    qid: u16,
    entry: [u8; 64],
    swallowed: bool,
}

/// See the module's head.
pub struct NvmeModel {
    /// What survives a power cut.
    pub media: Vec<u8>,
    /// Written and not flushed, by block.
    pub cache: BTreeMap<u64, Vec<u8>>,
    pub faults: Faults,
    pub block_bytes: u32,
    /// MDTS: 2^n pages of 4096 bytes; 0: no limit.
    pub mdts: u8,
    /// CAP.MQES, one based: entries of an I/O queue at most.
    pub entries_max: u16,
    /// First byte of the serial number, and of the namespace's NGUID.
    pub serial: u8,
    pub nguid: u8,
    /// I/O queue pairs that are granted.
    pub pairs: u16,
    /// Executed I/O commands by opcode.
    pub executed: BTreeMap<u8, u64>,
    pub resets: u32,
    pub aborts: u32,
    cc: u32,
    ready: bool,
    aqa: u32,
    asq: u64,
    acq: u64,
    sqs: BTreeMap<u16, Ring>,
    cqs: BTreeMap<u16, Ring>,
    fetched: Vec<Fetched>,
    event: Option<u16>,
}

const SUCCESS: u16 = 0;
const INVALID_OPCODE: u16 = 0x01;
const INVALID_FIELD: u16 = 0x02;
const INTERNAL: u16 = 0x06;
const ABORTED: u16 = 0x07;
const LBA_OUT_OF_RANGE: u16 = 0x80;

impl NvmeModel {
    pub fn new(media: Vec<u8>, block_bytes: u32) -> NvmeModel {
        NvmeModel {
            media,
            cache: BTreeMap::new(),
            faults: Faults::default(),
            block_bytes,
            mdts: 5,
            entries_max: 256,
            serial: b'm',
            nguid: 1,
            pairs: 2,
            executed: BTreeMap::new(),
            resets: 0,
            aborts: 0,
            cc: 0,
            ready: false,
            aqa: 0,
            asq: 0,
            acq: 0,
            sqs: BTreeMap::new(),
            cqs: BTreeMap::new(),
            fetched: Vec::new(),
            event: None,
        }
    }

    /// A register read by the host.
    pub fn read_u32(&self, offset: usize) -> u32 {
        if self.faults.gone {
            return u32::MAX;
        }
        match offset {
            // CAP: contiguous queues, 1 s, NVM commands.
            0x00 => u32::from(self.entries_max - 1) | 1 << 16 | 2 << 24,
            0x04 => 1 << 5,
            0x08 => 0x0001_0400,
            0x14 => self.cc,
            0x1C => {
                let shut_down = match self.cc >> 14 & 3 {
                    0 => 0,
                    _ if self.faults.stuck => 1 << 2,
                    _ => 2 << 2,
                };
                u32::from(self.ready) | u32::from(self.faults.fatal) << 1 | shut_down
            }
            _ => panic!("read of register {offset:#x}"),
        }
    }

    /// A register written by the host.
    pub fn write_u32(&mut self, offset: usize, value: u32) {
        if self.faults.gone {
            return;
        }
        match offset {
            0x0C => {}
            0x14 => self.write_cc(value),
            0x24 => self.aqa = value,
            0x28 => self.asq = self.asq & !0xFFFF_FFFF | u64::from(value),
            0x2C => self.asq = self.asq & 0xFFFF_FFFF | u64::from(value) << 32,
            0x30 => self.acq = self.acq & !0xFFFF_FFFF | u64::from(value),
            0x34 => self.acq = self.acq & 0xFFFF_FFFF | u64::from(value) << 32,
            0x1000.. => self.write_doorbell((offset - 0x1000) / 4, value as u16),
            _ => panic!("write of register {offset:#x}"),
        }
    }

    fn write_cc(&mut self, value: u32) {
        let (was, is) = (self.cc & 1 == 1, value & 1 == 1);
        self.cc = value;
        if self.faults.stuck || was == is {
            return;
        }
        self.ready = is;
        self.sqs.clear();
        self.cqs.clear();
        self.fetched.clear();
        self.event = None;
        if !is {
            self.resets += 1;
            self.faults.fatal = false;
            return;
        }
        assert_eq!(value >> 16 & 0xFF, 0x46, "entry sizes");
        assert!(
            self.asq.is_multiple_of(4096) && self.acq.is_multiple_of(4096) && self.asq != 0,
            "admin queues"
        );
        let entries = |shift: u32| (self.aqa >> shift & 0xFFF) as u16 + 1;
        self.sqs.insert(0, ring(self.asq, entries(0)));
        self.cqs.insert(0, ring(self.acq, entries(16)));
    }

    fn write_doorbell(&mut self, index: usize, value: u16) {
        if !self.ready {
            // The host has yet to notice.
            return;
        }
        let (qid, rings) = ((index / 2) as u16, index % 2);
        let rings = if rings == 0 { &mut self.sqs } else { &mut self.cqs };
        let ring = rings.get_mut(&qid).expect("doorbell of a queue that does not exist");
        assert!(value < ring.entries, "doorbell beyond its queue");
        ring.doorbell = value;
    }

    /// Fetches what was submitted, then executes at most `most` commands; `pick` chooses the
    /// next of n. How many completed.
    pub fn step(
        &mut self,
        dma: &mut dyn Dma,
        most: usize,
        pick: &mut dyn FnMut(usize) -> usize,
    ) -> usize {
        if !self.ready || self.faults.gone || self.faults.fatal {
            return 0;
        }
        self.fetch(dma);
        for done in 0..most {
            let able: Vec<usize> =
                (0..self.fetched.len()).filter(|&index| !self.fetched[index].swallowed).collect();
            if able.is_empty() {
                return done;
            }
            let index = able[pick(able.len())];
            let command = self.fetched.remove(index);
            self.execute(dma, command);
        }
        most
    }

    /// Loses what was not flushed, but for the blocks that `keep` lets reach the media.
    pub fn power_cut(&mut self, keep: &mut dyn FnMut(u64) -> bool) {
        for (block, bytes) in core::mem::take(&mut self.cache) {
            if keep(block) {
                self.store(block, &bytes);
            }
        }
        (self.cc, self.ready) = (0, false);
        self.sqs.clear();
        self.cqs.clear();
        self.fetched.clear();
    }

    /// There are commands to fetch or to execute.
    pub fn is_busy(&self) -> bool {
        let able = self.fetched.iter().any(|command| !command.swallowed);
        let new = self.sqs.values().any(|ring| ring.at != ring.doorbell);
        self.ready && !self.faults.gone && !self.faults.fatal && (able || new)
    }

    /// An orderly shutdown was asked for.
    pub fn was_shut_down(&self) -> bool {
        self.cc >> 14 & 3 != 0
    }

    /// Disabled (CC.EN): it reaches for no memory.
    pub fn is_off(&self) -> bool {
        self.cc & 1 == 0
    }

    /// Put into its slot anew: reset, with what its cache held on its media.
    pub fn plug_in(&mut self) {
        self.power_cut(&mut |_| true);
        self.faults = Faults::default();
    }

    /// Tells the host that namespaces changed, if it asked to be told.
    pub fn notice_namespaces(&mut self, dma: &mut dyn Dma) {
        if let Some(cid) = self.event.take() {
            self.complete(dma, 0, cid, 2, SUCCESS);
        }
    }

    fn fetch(&mut self, dma: &dyn Dma) {
        for (&qid, ring) in &mut self.sqs {
            while ring.at != ring.doorbell {
                let mut entry = [0; 64];
                dma.read(ring.address + u64::from(ring.at) * 64, &mut entry);
                ring.at = (ring.at + 1) % ring.entries;
                let swallowed = qid != 0 && self.faults.swallow > 0;
                self.faults.swallow -= u32::from(swallowed);
                self.fetched.push(Fetched { qid, entry, swallowed });
            }
        }
    }

    fn execute(&mut self, dma: &mut dyn Dma, command: Fetched) {
        let Fetched { qid, entry, .. } = command;
        let cid = u16::from_le_bytes([entry[2], entry[3]]);
        if qid == 0 {
            if let Some((result, status)) = self.admin(dma, &entry, cid) {
                self.complete(dma, qid, cid, result, status);
            }
            return;
        }
        let status = if self.faults.fail > 0 {
            self.faults.fail -= 1;
            self.faults.fail_status
        } else {
            self.io(dma, &entry)
        };
        *self.executed.entry(entry[0]).or_default() += u64::from(status == SUCCESS);
        self.complete(dma, qid, cid, 0, status);
    }

    fn complete(&mut self, dma: &mut dyn Dma, qid: u16, cid: u16, result: u32, status: u16) {
        let head = self.sqs[&qid].at;
        let ring = self.cqs.get_mut(&qid).expect("completion queue");
        assert!((ring.at + 1) % ring.entries != ring.doorbell, "completion queue overrun");
        let wrong = core::mem::take(&mut self.faults.wrong_cid);
        let cid = if wrong { cid ^ 0x4000 } else { cid };
        let mut entry = [0; 16];
        entry[..4].copy_from_slice(&result.to_le_bytes());
        entry[8..10].copy_from_slice(&head.to_le_bytes());
        entry[10..12].copy_from_slice(&qid.to_le_bytes());
        entry[12..14].copy_from_slice(&cid.to_le_bytes());
        entry[14..].copy_from_slice(&(status << 1 | u16::from(ring.phase)).to_le_bytes());
        dma.write(ring.address + u64::from(ring.at) * 16, &entry);
        ring.at += 1;
        if ring.at == ring.entries {
            (ring.at, ring.phase) = (0, !ring.phase);
        }
    }

    /// Result and status; `None` when it is answered later.
    fn admin(&mut self, dma: &mut dyn Dma, entry: &[u8; 64], cid: u16) -> Option<(u32, u16)> {
        let (d10, d11) = (dword(entry, 10), dword(entry, 11));
        let page = qword(entry, 24);
        let (qid, entries) = (d10 as u16, (d10 >> 16) as u16 + 1);
        let makes_queue = matches!(entry[0], 0x01 | 0x05);
        assert!(!makes_queue || entries <= self.entries_max, "a queue beyond CAP.MQES");
        if self.faults.fail_admin > 0 {
            self.faults.fail_admin -= 1;
            return Some((0, INTERNAL));
        }
        match entry[0] {
            0x01 => {
                assert_eq!(d11 >> 16, u32::from(qid), "its own completion queue");
                assert!(self.cqs.contains_key(&qid), "completion queue first");
                self.sqs.insert(qid, ring(page, entries));
            }
            0x05 => {
                assert_eq!(d11, 1, "contiguous, without interrupts");
                self.cqs.insert(qid, ring(page, entries));
            }
            0x02 => self.log_page(dma, d10, page),
            0x06 => return Some((0, self.identify(dma, d10, dword(entry, 1), page))),
            0x08 => return Some((self.abort(dma, d10), SUCCESS)),
            0x09 if d10 == 0x07 => {
                let count = u32::from(self.pairs) - 1;
                return Some((count << 16 | count, SUCCESS));
            }
            0x09 => {}
            0x0C => {
                self.event = Some(cid);
                return None;
            }
            _ => return Some((0, INVALID_OPCODE)),
        }
        Some((0, SUCCESS))
    }

    fn abort(&mut self, dma: &mut dyn Dma, d10: u32) -> u32 {
        self.aborts += 1;
        let (qid, cid) = (d10 as u16, (d10 >> 16) as u16);
        let is_it = |it: &Fetched| it.qid == qid && it.entry[2..4] == cid.to_le_bytes();
        let index = self.fetched.iter().position(is_it);
        let Some(index) = index.filter(|_| !self.faults.abort_refused) else { return 1 };
        self.fetched.remove(index);
        self.complete(dma, qid, cid, 0, ABORTED);
        0
    }

    fn identify(&mut self, dma: &mut dyn Dma, cns: u32, nsid: u32, page: u64) -> u16 {
        let mut bytes = [0; 4096];
        match cns {
            0 if nsid == 1 => {
                let blocks = self.media.len() as u64 / u64::from(self.block_bytes);
                bytes[..8].copy_from_slice(&blocks.to_le_bytes());
                // Format 1, so that the index matters.
                bytes[26] = 1;
                bytes[33] = 1 << 3 | 1;
                bytes[104] = self.nguid;
                bytes[128 + 4 + 2] = self.block_bytes.trailing_zeros() as u8;
            }
            1 => {
                bytes[4..24].copy_from_slice(b"model-1             ");
                bytes[4] = self.serial;
                bytes[77] = self.mdts;
                bytes[92..96].copy_from_slice(&(1u32 << 8).to_le_bytes());
                (bytes[512], bytes[513]) = (0x66, 0x44);
                bytes[516] = 1;
                bytes[520] = 1 << 2 | 1 << 3;
                bytes[525] = 1;
            }
            2 => bytes[0] = 1,
            _ => return INVALID_FIELD,
        }
        dma.write(page, &bytes);
        SUCCESS
    }

    fn log_page(&mut self, dma: &mut dyn Dma, d10: u32, page: u64) {
        let len = ((d10 >> 16) as usize + 1) * 4;
        let mut bytes = std::vec![0; len];
        if d10 & 0xFF == 2 {
            bytes[1..3].copy_from_slice(&310u16.to_le_bytes());
            bytes[160] = 7;
        }
        dma.write(page, &bytes);
    }

    fn io(&mut self, dma: &mut dyn Dma, entry: &[u8; 64]) -> u16 {
        if dword(entry, 1) != 1 {
            return 0x0B;
        }
        let blocks_max = self.media.len() as u64 / u64::from(self.block_bytes);
        let slba = u64::from(dword(entry, 11)) << 32 | u64::from(dword(entry, 10));
        let blocks = u64::from(dword(entry, 12) & 0xFFFF) + 1;
        let inside = |slba: u64, blocks: u64| slba + blocks <= blocks_max;
        match entry[0] {
            0x00 => {
                for (block, bytes) in core::mem::take(&mut self.cache) {
                    self.store(block, &bytes);
                }
            }
            0x01 | 0x02 if inside(slba, blocks) => {
                return self.transfer(dma, entry, slba, blocks);
            }
            0x08 if inside(slba, blocks) => {
                for block in slba..slba + blocks {
                    self.cache.insert(block, std::vec![0; self.block_bytes as usize]);
                }
            }
            0x09 => {
                let mut range = [0; 16];
                dma.read(qword(entry, 24), &mut range);
                let count = u64::from(dword(&range, 1));
                let first = qword(&range, 8);
                assert!(dword(entry, 10) == 0 && dword(entry, 11) == 4, "one range, deallocate");
                if !inside(first, count) {
                    return LBA_OUT_OF_RANGE;
                }
            }
            0x01 | 0x02 | 0x08 => return LBA_OUT_OF_RANGE,
            _ => return INVALID_OPCODE,
        }
        SUCCESS
    }

    fn transfer(&mut self, dma: &mut dyn Dma, entry: &[u8; 64], slba: u64, blocks: u64) -> u16 {
        let block_bytes = self.block_bytes as usize;
        let len = blocks as usize * block_bytes;
        if self.mdts != 0 && len > 4096 << self.mdts {
            return INVALID_FIELD;
        }
        let pages = pages_of(dma, entry, len);
        for index in 0..blocks as usize {
            let block = slba + index as u64;
            let mut bytes = std::vec![0; block_bytes];
            let at = index * block_bytes;
            let address = pages[at / 4096] + (at % 4096) as u64;
            if entry[0] == 0x01 {
                dma.read(address, &mut bytes);
                self.cache.insert(block, bytes);
            } else {
                let media = &self.media[block as usize * block_bytes..][..block_bytes];
                let bytes = self.cache.get(&block).map_or(media, |bytes| bytes);
                dma.write(address, bytes);
            }
        }
        SUCCESS
    }

    fn store(&mut self, block: u64, bytes: &[u8]) {
        let at = block as usize * bytes.len();
        self.media[at..at + bytes.len()].copy_from_slice(bytes);
    }
}

fn ring(address: u64, entries: u16) -> Ring {
    assert!(address.is_multiple_of(4096) && entries >= 2, "a queue is whole pages");
    Ring { address, entries, at: 0, doorbell: 0, phase: true }
}

/// The pages of a transfer by PRP1, PRP2 and the list.
fn pages_of(dma: &dyn Dma, entry: &[u8; 64], len: usize) -> Vec<u64> {
    let (prp1, prp2) = (qword(entry, 24), qword(entry, 32));
    assert_eq!(prp1 % 4096, 0, "platter's transfers begin at a page");
    let count = len.div_ceil(4096);
    let mut pages = std::vec![prp1];
    match count {
        1 => assert_eq!(prp2, 0, "PRP2 is reserved for one page"),
        2 => pages.push(prp2),
        _ => {
            assert!(prp2 % 4096 + (count as u64 - 1) * 8 <= 4096, "a list within one page");
            for index in 0..count as u64 - 1 {
                let mut address = [0; 8];
                dma.read(prp2 + index * 8, &mut address);
                pages.push(u64::from_le_bytes(address));
            }
        }
    }
    pages
}

fn dword(bytes: &[u8], index: usize) -> u32 {
    u32::from_le_bytes(bytes[index * 4..index * 4 + 4].try_into().unwrap())
}

fn qword(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}
