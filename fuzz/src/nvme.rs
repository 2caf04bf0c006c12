//! A pciback and an NVMe controller that answer anything: configuration space, completions and
//! the pages of Identify and logs are right but for what the input changes.
//!
//! Guards: nothing panics, each operation is answered once at most. Must never: reach memory that
//! the driver did not name (the machine stops that).

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use platter_storage::block_store::BlockStore;
use platter_storage::nvme::Nvme;
use platter_storage::pcifront::{PciFound, Pcifront};
use platter_storage::{Access, Answer, Store, Tag};
use platter_xen::{DomId, Hypervisor};

use crate::fake::{Fake, Registers};

const PAGE: usize = 4096;
const MS: u64 = 1_000_000;
/// Turns of the store; most of those after the start submit something.
const ROUNDS: u32 = 160;

/// The input, read from its beginning; zeros change nothing and follow its end.
struct Script<'a>(&'a [u8]);

impl Script<'_> {
    fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    fn word(&mut self) -> u32 {
        u32::from_le_bytes([(); 4].map(|()| self.byte()))
    }

    /// Changes some bytes of an answer.
    fn bend(&mut self, bytes: &mut [u8]) {
        for _ in 0..self.byte() % 16 {
            let at = usize::from(self.byte()) | usize::from(self.byte()) << 8;
            bytes[at % bytes.len()] = self.byte();
        }
    }
}

/// A submission queue with its completion queue.
struct Queue {
    sq: u64,
    cq: u64,
    entries: u16,
    head: u16,
    tail: u16,
    phase: u16,
    doorbell: u16,
}

impl Queue {
    fn new(sq: u64, cq: u64, entries: u16) -> Queue {
        Queue { sq, cq, entries, head: 0, tail: 0, phase: 1, doorbell: 0 }
    }
}

#[derive(Default)]
struct Controller {
    cap_bend: u32,
    cc: u32,
    csts_bend: u32,
    aqa: u32,
    asq: u64,
    acq: u64,
    queues: BTreeMap<u16, Queue>,
    /// Completion queues that were created: address and entries.
    cqs: BTreeMap<u16, u64>,
}

struct Behind(Rc<RefCell<Controller>>);

impl Registers for Behind {
    fn read_u32(&mut self, offset: usize) -> u32 {
        let controller = self.0.borrow();
        match offset {
            0x00 => (0xFF | 1 << 16 | 2 << 24) ^ controller.cap_bend,
            0x04 => 1 << 5,
            0x08 => 0x0001_0400,
            0x14 => controller.cc,
            0x1C => {
                let shut_down = if controller.cc >> 14 & 3 != 0 { 2 << 2 } else { 0 };
                (controller.cc & 1 | shut_down) ^ controller.csts_bend
            }
            _ => 0,
        }
    }

    fn write_u32(&mut self, offset: usize, value: u32) {
        let mut controller = self.0.borrow_mut();
        let half = |old: u64, high: bool| match high {
            false => old & !0xFFFF_FFFF | u64::from(value),
            true => old & 0xFFFF_FFFF | u64::from(value) << 32,
        };
        match offset {
            0x14 => controller.enable(value),
            0x24 => controller.aqa = value,
            0x28 | 0x2C => controller.asq = half(controller.asq, offset == 0x2C),
            0x30 | 0x34 => controller.acq = half(controller.acq, offset == 0x34),
            0x1000.. => {
                let index = (offset - 0x1000) / 4;
                if let (0, Some(queue)) =
                    (index % 2, controller.queues.get_mut(&((index / 2) as u16)))
                {
                    queue.doorbell = value as u16 % queue.entries;
                }
            }
            _ => {}
        }
    }
}

impl Controller {
    fn enable(&mut self, cc: u32) {
        let (was, is) = (self.cc & 1, cc & 1);
        self.cc = cc;
        if was != is {
            self.queues.clear();
            self.cqs.clear();
        }
        if was < is {
            let entries = (self.aqa & 0xFFF) as u16 + 1;
            self.queues.insert(0, Queue::new(self.asq, self.acq, entries));
        }
    }

    /// Answers what was submitted, as the input bends it.
    fn step(&mut self, hv: &mut Fake, script: &mut Script<'_>) {
        let mut created = Vec::new();
        for (&qid, queue) in &mut self.queues {
            while queue.head != queue.doorbell {
                let at = Fake::dma(queue.sq + u64::from(queue.head) * 64);
                let entry: [u8; 64] = hv.pages[at..at + 64].try_into().expect("64 bytes");
                queue.head = (queue.head + 1) % queue.entries;
                let mut answer = [0; 16];
                if qid == 0 {
                    admin(hv, script, &entry, &mut answer, &mut self.cqs, &mut created);
                }
                answer[8..10].copy_from_slice(&queue.head.to_le_bytes());
                answer[12..14].copy_from_slice(&entry[2..4]);
                let how = script.byte();
                if how & 1 == 1 {
                    script.bend(&mut answer);
                }
                if how & 6 == 6 {
                    // Swallowed.
                    continue;
                }
                let status = u16::from_le_bytes([answer[14], answer[15]]) & !1 | queue.phase;
                answer[14..].copy_from_slice(&status.to_le_bytes());
                let at = Fake::dma(queue.cq + u64::from(queue.tail) * 16);
                hv.pages[at..at + 16].copy_from_slice(&answer);
                queue.tail = (queue.tail + 1) % queue.entries;
                queue.phase ^= u16::from(queue.tail == 0);
            }
        }
        for (qid, sq, entries) in created {
            if let Some(cq) = self.cqs.get(&qid) {
                self.queues.insert(qid, Queue::new(sq, *cq, entries));
            }
        }
    }
}

/// What the admin commands do that the driver sends (NVMe 1.4, 5).
fn admin(
    hv: &mut Fake,
    script: &mut Script<'_>,
    entry: &[u8; 64],
    answer: &mut [u8; 16],
    cqs: &mut BTreeMap<u16, u64>,
    created: &mut Vec<(u16, u64, u16)>,
) {
    let prp = u64::from_le_bytes(entry[24..32].try_into().expect("eight bytes"));
    let (qid, size) =
        (u16::from_le_bytes([entry[40], entry[41]]), u16::from_le_bytes([entry[42], entry[43]]));
    match entry[0] {
        0x01 => created.push((qid, prp, size.wrapping_add(1).max(2))),
        0x05 => {
            cqs.insert(qid, prp);
        }
        0x02 | 0x06 => {
            let mut page = [0; PAGE];
            match (entry[0], entry[40]) {
                (0x06, 0) => {
                    page[..8].copy_from_slice(&2048u64.to_le_bytes());
                    page[8..16].copy_from_slice(&2048u64.to_le_bytes());
                    page[130] = 9;
                }
                (0x06, 1) => {
                    (page[77], page[512], page[513], page[516]) = (5, 0x66, 0x44, 1);
                    (page[93], page[520], page[525]) = (1, 0x0C, 1);
                }
                (0x06, _) => page[0] = 1,
                _ => (page[1], page[2]) = (0x36, 1),
            }
            script.bend(&mut page);
            let at = Fake::dma(prp);
            hv.pages[at..at + PAGE].copy_from_slice(&page);
        }
        0x09 => answer[..4].copy_from_slice(&0x0003_0003u32.to_le_bytes()),
        _ => {}
    }
}

/// See the module's head.
pub fn nvme(input: &[u8]) {
    let mut script = Script(input);
    let controller = Rc::new(RefCell::new(Controller::default()));
    let mut hv = Fake::new(512);
    hv.registers = Some(RefCell::new(Box::new(Behind(controller.clone()))));
    if script.byte() & 1 == 1 {
        controller.borrow_mut().cap_bend = script.word();
    }
    let Some(nvme) = find(&mut hv, &mut script) else { return };
    let mut store = BlockStore::new(&mut hv, 64, 16).expect("there is memory");
    store.attach("nvme0", nvme);
    let (mut file, mut answers) = (None, [0u32; ROUNDS as usize]);
    for round in 0..ROUNDS {
        let how = script.byte();
        let now_ns = u64::from(round) * MS * (1 + u64::from(how >> 4) * 40);
        controller.borrow_mut().csts_bend = if how & 0xF == 0xF { script.word() } else { 0 };
        while let Some(done) = store.poll(&mut hv, now_ns) {
            answers[done.tag.0 as usize] += 1;
            if let Ok(Answer::Opened(opened)) = done.result {
                file = Some(opened.file);
            }
        }
        store.release(&mut hv);
        controller.borrow_mut().step(&mut hv, &mut script);
        // Refusals are theirs.
        let tag = Tag(round);
        let _ = match (file, round % 10) {
            (None, 0) => store.open(&mut hv, tag, "nvme0n1", Access::ReadWrite).map(drop),
            (Some(file), 1) => store.read(&mut hv, tag, file, 512, 65_536).map(drop),
            (Some(file), 2) => store.write(&mut hv, tag, file, 0, 512, &mut |_, _| true).map(drop),
            (Some(file), 3) => store.discard(&mut hv, tag, file, 4096, 8192).map(drop),
            (Some(file), 4) => store.flush(&mut hv, tag, file).map(drop),
            (Some(file), 5) => store.size(&mut hv, tag, file).map(drop),
            (Some(file), 6) => store.punch(&mut hv, tag, file, 4096, 8192).map(drop),
            _ => Ok(()),
        };
    }
    assert!(answers.iter().all(|count| *count <= 1), "one operation has one answer");
}

/// The function behind pciback, by what it says of its configuration space.
fn find(hv: &mut Fake, script: &mut Script<'_>) -> Option<Nvme> {
    let mut front = Pcifront::new(DomId(0));
    let functions = [Some(b"0000:00:00.0".as_slice()), Some(b"3".as_slice())];
    front.update(hv, Some(b"1"), &functions);
    front.update(hv, Some(b"4"), &functions);
    let (page, _) = front.shared_page()?;
    for _ in 0..200 {
        match front.poll(hv, 0) {
            Some(PciFound::Nvme(_, nvme)) => return Some(*nvme),
            Some(_) => return None,
            None if hv.load_u32(page, 0) & 1 == 0 => return None,
            None => {}
        }
        let mut words = [0; 8];
        let value: u32 = match hv.load_u32(page, 24) {
            0x08 => 0x0108_0202,
            0x10 => 0xFEB0_0000,
            _ => 0,
        };
        words[4..].copy_from_slice(&value.to_le_bytes());
        if script.byte() & 7 == 7 {
            script.bend(&mut words);
        }
        hv.write(page, 8, &words[..4]);
        hv.write(page, 32, &words[4..]);
        hv.store_u32(page, 0, 0);
    }
    None
}
