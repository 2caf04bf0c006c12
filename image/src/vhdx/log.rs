//! What a VHDX writes beside its data and its tables: headers and the log ([MS-VHDX] 2.2.2, 2.3).
//!
//! Order guarded, within one flush: after the data, new GUIDs in the headers; then one log entry
//! with every changed block of the BAT and of sector bitmaps; then, if the log was empty, the
//! header that says it no longer is; then the blocks in place; each step durable before the
//! next. A header is written to the place of the older one, then to the other, so one always
//! holds. An entry is at most half the log, and never lies on the one before it: until it is
//! durable the one before can be replayed.

use alloc::boxed::Box;

use crate::create::random;
use crate::format::Own;
use crate::meta::{Meta, Phase};
use crate::types::FileNo;

use super::crc::Crc;
use super::header::{
    Guid, HEADER_BYTES, HEADER_OFFSETS, Header, MIB, NO_GUID, guid_from_number, guid_number, put,
};
use super::load::Region;
use super::replay::{DESCRIPTORS, HEADER_DESCRIPTORS, SECTOR, descriptor_sectors};

/// Which GUIDs the next flush changes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Wanted {
    Nothing,
    File,
    FileAndData,
}

/// An entry being written.
struct Entry {
    /// Changed blocks in it, and its sectors.
    blocks: u64,
    sectors: u64,
    /// The next sector; the first one comes last, when the checksum is known.
    next: u64,
    /// Place in the cache after the last block taken.
    cursor: usize,
    crc: Crc,
}

/// Headers and log of a file that is written.
pub(super) struct Journal {
    seed: u64,
    drawn: u64,
    /// The current header, durable, and which of the two it is.
    header: Header,
    slot: usize,
    /// A header handed out.
    pending: Header,
    /// Steps of the header update under way.
    update: u8,
    wanted: Wanted,
    new_file_guid: Guid,
    new_data_guid: Guid,
    done: Wanted,
    /// The log of the last user of the file is being replayed: changes go in place.
    pub replaying: bool,
    want_empty: bool,
    log_guid: Guid,
    /// Log sector and sequence number of the next entry.
    position: u64,
    sequence: u64,
    entry: Option<Entry>,
    logged: bool,
    stage: u8,
    /// Bytes up to which the file is durable, and up to which it is in use.
    pub flushed_end: u64,
    pub end: u64,
    out: Box<[u8; HEADER_BYTES]>,
}

/// Changed blocks that an entry can hold in half of a log of this length.
pub(super) fn entry_blocks_max(log: Region) -> u64 {
    let half = log.length / SECTOR / 2;
    // One sector in 128 holds descriptors, and the header takes the room of two of them.
    half - half.div_ceil(DESCRIPTORS) - 1
}

impl Journal {
    pub fn new(seed: u64, header: Header, slot: usize, size: u64) -> Journal {
        // The same seed twice must not give the same GUIDs twice.
        let id = guid_number(header.file_write_guid);
        let seed = seed ^ id as u64 ^ (id >> 64) as u64 ^ header.sequence;
        let mut journal = Journal {
            seed,
            drawn: 0,
            header,
            slot,
            pending: header,
            update: 0,
            wanted: Wanted::Nothing,
            new_file_guid: NO_GUID,
            new_data_guid: NO_GUID,
            done: Wanted::Nothing,
            replaying: header.log_guid != NO_GUID,
            want_empty: false,
            log_guid: NO_GUID,
            position: 0,
            sequence: 1,
            entry: None,
            logged: false,
            stage: 0,
            flushed_end: size,
            end: size,
            out: Box::new([0; HEADER_BYTES]),
        };
        journal.new_file_guid = journal.draw();
        journal.new_data_guid = journal.draw();
        journal
    }

    /// A random GUID (RFC 4122, version 4).
    fn draw(&mut self) -> Guid {
        let (high, low) = (random(self.seed, self.drawn), random(self.seed, self.drawn + 1));
        self.drawn += 2;
        guid_from_number(version_4((high as u128) << 64 | low as u128))
    }

    pub fn want_file_guid(&mut self) {
        self.wanted = self.wanted.max(Wanted::File);
    }

    pub fn want_data_guid(&mut self) {
        self.wanted = Wanted::FileAndData;
    }

    pub fn file_guid_changed(&self) -> bool {
        self.done >= Wanted::File
    }

    pub fn data_guid_changed(&self) -> bool {
        self.done == Wanted::FileAndData
    }

    pub fn data_write_guid(&self) -> Guid {
        self.header.data_write_guid
    }

    pub fn log_guid_set(&self) -> bool {
        self.header.log_guid != NO_GUID
    }

    pub fn want_empty_log(&mut self) {
        self.want_empty = true;
    }

    pub fn is_dirty(&self) -> bool {
        self.wanted != Wanted::Nothing || self.want_empty && self.log_guid_set()
    }

    pub fn own_bytes(&self) -> &[u8] {
        &self.out[..]
    }

    pub fn flush_own(&mut self, meta: &Meta, file: FileNo, log: Region, phase: Phase) -> Own {
        loop {
            let due = if self.stage < 3 { Phase::BEFORE } else { Phase::HEADER };
            if self.stage > 3 || due > phase {
                return Own::Nothing;
            }
            let step = match self.stage {
                0 => self.change_guids(file),
                1 => self.write_entry(meta, file, log),
                2 => self.open_log(file),
                _ => self.empty_log(file),
            };
            match step {
                Own::Nothing => self.stage += 1,
                step => return step,
            }
        }
    }

    pub fn flushed(&mut self, ok: bool) {
        self.stage = 0;
        self.update = 0;
        self.entry = None;
        self.logged = false;
        if ok {
            self.flushed_end = self.flushed_end.max(self.end);
        }
    }

    /// The header's two places, one after the other ([MS-VHDX] 2.2.2.1).
    fn update(&mut self, file: FileNo, change: impl Fn(&mut Header)) -> Own {
        self.update += 1;
        match self.update {
            2 | 4 => return Own::Sync,
            3 | 5 => {
                self.header = self.pending;
                self.slot = 1 - self.slot;
            }
            _ => {}
        }
        if self.update == 5 {
            self.update = 0;
            return Own::Nothing;
        }
        self.pending = self.header;
        self.pending.sequence += 1;
        change(&mut self.pending);
        self.pending.emit(&mut self.out);
        Own::Write { file, offset: HEADER_OFFSETS[1 - self.slot] }
    }

    fn change_guids(&mut self, file: FileNo) -> Own {
        let wanted = self.wanted;
        if wanted == Wanted::Nothing {
            return Own::Nothing;
        }
        let (file_guid, data_guid) = (self.new_file_guid, self.new_data_guid);
        let step = self.update(file, |header| {
            header.file_write_guid = file_guid;
            if wanted == Wanted::FileAndData {
                header.data_write_guid = data_guid;
            }
        });
        if step == Own::Nothing {
            self.done = self.done.max(wanted);
            self.wanted = Wanted::Nothing;
        }
        step
    }

    fn open_log(&mut self, file: FileNo) -> Own {
        let log_guid = self.log_guid;
        if !self.logged || self.update == 0 && self.header.log_guid == log_guid {
            return Own::Nothing;
        }
        self.update(file, |header| header.log_guid = log_guid)
    }

    /// All is in place: the log holds nothing that is needed.
    fn empty_log(&mut self, file: FileNo) -> Own {
        if !self.want_empty || self.update == 0 && !self.log_guid_set() {
            self.want_empty = false;
            return Own::Nothing;
        }
        let step = self.update(file, |header| header.log_guid = NO_GUID);
        if step == Own::Nothing {
            self.want_empty = false;
        }
        step
    }

    fn write_entry(&mut self, meta: &Meta, file: FileNo, log: Region) -> Own {
        let mut entry = match self.entry.take() {
            Some(entry) => entry,
            None if self.replaying || !meta.is_dirty() => return Own::Nothing,
            None => self.begin_entry(meta, log),
        };
        let sector = entry.next;
        entry.next += 1;
        if sector == entry.sectors + 1 {
            self.entry = Some(entry);
            return Own::Sync;
        }
        if sector == entry.sectors + 2 {
            self.position = (self.position + entry.sectors) % (log.length / SECTOR);
            self.sequence += 1;
            self.logged = true;
            return Own::Nothing;
        }
        let heads = descriptor_sectors(entry.blocks);
        let at = if sector == entry.sectors {
            self.head_sector(meta, &entry, Some(entry.crc.value()));
            0
        } else {
            if sector < heads {
                let first = sector * DESCRIPTORS - HEADER_DESCRIPTORS;
                entry.cursor = self.descriptors(meta, &entry, first, 0);
            } else {
                entry.cursor = if sector == heads { 0 } else { entry.cursor };
                entry.cursor = self.data_sector(meta, entry.cursor);
            }
            entry.crc = entry.crc.with(&self.out[..]);
            sector
        };
        self.entry = Some(entry);
        let at = (self.position + at) % (log.length / SECTOR);
        Own::Write { file, offset: log.offset + at * SECTOR }
    }

    fn begin_entry(&mut self, meta: &Meta, log: Region) -> Entry {
        let blocks = meta.dirty_blocks() as u64;
        assert!(blocks <= entry_blocks_max(log), "more changes than a log entry holds");
        if !self.log_guid_set() {
            self.log_guid = self.draw();
        } else {
            self.log_guid = self.header.log_guid;
        }
        let sectors = descriptor_sectors(blocks) + blocks;
        let mut entry = Entry { blocks, sectors, next: 1, cursor: 0, crc: Crc::new() };
        entry.cursor = self.head_sector(meta, &entry, None);
        entry.crc = entry.crc.with(&self.out[..]);
        entry
    }

    /// The sector with the entry's header ([MS-VHDX] 2.3.1.1) and the first descriptors.
    fn head_sector(&mut self, meta: &Meta, entry: &Entry, sum: Option<u32>) -> usize {
        let from_start = Entry { cursor: 0, ..*entry };
        let cursor = self.descriptors(meta, &from_start, 0, HEADER_DESCRIPTORS);
        let (flushed, last) = (self.flushed_end / MIB * MIB, self.end.next_multiple_of(MIB));
        let tail = self.position * SECTOR;
        let b = &mut self.out[..];
        put(b, 0, b"loge");
        put(b, 4, &sum.unwrap_or(0).to_le_bytes());
        put(b, 8, &((entry.sectors * SECTOR) as u32).to_le_bytes());
        put(b, 12, &(tail as u32).to_le_bytes());
        put(b, 16, &self.sequence.to_le_bytes());
        put(b, 24, &(entry.blocks as u32).to_le_bytes());
        put(b, 32, &self.log_guid);
        put(b, 48, &flushed.to_le_bytes());
        put(b, 56, &last.to_le_bytes());
        cursor
    }

    /// Descriptors of the blocks from number `first` on ([MS-VHDX] 2.3.1.3), leaving room for
    /// `skip` of them. Gives the place in the cache after the last.
    fn descriptors(&mut self, meta: &Meta, entry: &Entry, first: u64, skip: u64) -> usize {
        let sequence = self.sequence;
        let b = &mut self.out[..];
        b.fill(0);
        let mut cursor = entry.cursor;
        let count = (entry.blocks - first).min(DESCRIPTORS - skip);
        for n in 0..count {
            let (place, _, offset, bytes) = meta.dirty_block(cursor).expect("counted before");
            cursor = place + 1;
            let at = ((skip + n) * 32) as usize;
            put(b, at, b"desc");
            put(b, at + 4, &bytes[4092..]);
            put(b, at + 8, &bytes[..8]);
            put(b, at + 16, &offset.to_le_bytes());
            put(b, at + 24, &sequence.to_le_bytes());
        }
        cursor
    }

    /// The data sector of the next block ([MS-VHDX] 2.3.1.4).
    fn data_sector(&mut self, meta: &Meta, cursor: usize) -> usize {
        let (place, _, _, bytes) = meta.dirty_block(cursor).expect("counted before");
        let b = &mut self.out[..];
        b.copy_from_slice(bytes);
        put(b, 0, b"data");
        put(b, 4, &((self.sequence >> 32) as u32).to_le_bytes());
        put(b, 4092, &(self.sequence as u32).to_le_bytes());
        place + 1
    }
}

/// A random number with the version and variant bits of a random UUID.
pub(super) fn version_4(random: u128) -> u128 {
    let (version, variant) = (0x4000u128 << 64, 0x8000u128 << 48);
    random & !(0xf000u128 << 64) & !(0xc000u128 << 48) | version | variant
}
