//! Submission and completion entries (NVMe 1.4, 4.2 and 4.6), status codes (4.6.1), and the
//! commands that platter sends (5 and 6).
//!
//! Guards: every bit that is not set on purpose is zero; a completion is parsed from one private
//! copy. Must never: name a page that is not in the command's own operation.

use crate::StoreFault;

/// Bytes of a submission entry and of a completion entry (NVMe 1.4, 4.2, 4.6).
pub const SQE_BYTES: usize = 64;
pub const CQE_BYTES: usize = 16;

/// Opcodes of the admin command set (NVMe 1.4, figure 139).
mod admin {
    pub const CREATE_SQ: u8 = 0x01;
    pub const GET_LOG_PAGE: u8 = 0x02;
    pub const CREATE_CQ: u8 = 0x05;
    pub const IDENTIFY: u8 = 0x06;
    pub const ABORT: u8 = 0x08;
    pub const SET_FEATURES: u8 = 0x09;
    pub const ASYNC_EVENT: u8 = 0x0C;
}

/// Opcodes of the NVM command set (NVMe 1.4, figure 346).
mod nvm {
    pub const FLUSH: u8 = 0x00;
    pub const WRITE: u8 = 0x01;
    pub const READ: u8 = 0x02;
    pub const WRITE_ZEROES: u8 = 0x08;
    pub const DATASET_MANAGEMENT: u8 = 0x09;
}

/// Feature identifier of Number of Queues (NVMe 1.4, 5.21.1.7).
const FEATURE_QUEUES: u32 = 0x07;
/// Feature identifier of Asynchronous Event Configuration (5.21.1.11) and its bit for
/// namespace attribute notices.
const FEATURE_EVENTS: u32 = 0x0B;
const EVENT_NAMESPACES: u32 = 1 << 8;
/// Log page identifiers (NVMe 1.4, figure 191).
const LOG_HEALTH: u32 = 0x02;
/// Changed Namespace List: reading it re-arms the notice.
const LOG_NAMESPACES: u32 = 0x04;

/// What Identify asks for (CNS; NVMe 1.4, figure 244).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Identify {
    Namespace = 0,
    Controller = 1,
    NamespaceList = 2,
}

/// A submission entry without its command identifier.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Command {
    opcode: u8,
    nsid: u32,
    prp1: u64,
    prp2: u64,
    dwords: [u32; 6],
}

impl Command {
    /// The 64 bytes of the entry.
    pub fn emit(&self, cid: u16) -> [u8; SQE_BYTES] {
        let mut bytes = [0; SQE_BYTES];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &[self.opcode]);
        put(2, &cid.to_le_bytes());
        put(4, &self.nsid.to_le_bytes());
        put(24, &self.prp1.to_le_bytes());
        put(32, &self.prp2.to_le_bytes());
        for (index, dword) in self.dwords.iter().enumerate() {
            put(40 + index * 4, &dword.to_le_bytes());
        }
        bytes
    }

    /// Identify into the page at `page` (5.15).
    pub fn identify(what: Identify, nsid: u32, page: u64) -> Command {
        let dwords = [what as u32, 0, 0, 0, 0, 0];
        Command { opcode: admin::IDENTIFY, nsid, prp1: page, prp2: 0, dwords }
    }

    /// Asks for `pairs` I/O queue pairs (5.21.1.7); the answer is in dword 0.
    pub fn set_queues(pairs: u16) -> Command {
        let count = u32::from(pairs) - 1;
        let dwords = [FEATURE_QUEUES, count << 16 | count, 0, 0, 0, 0];
        Command { opcode: admin::SET_FEATURES, dwords, ..Command::default() }
    }

    /// Asks for notices of changed namespaces (5.21.1.11).
    pub fn set_events() -> Command {
        let dwords = [FEATURE_EVENTS, EVENT_NAMESPACES, 0, 0, 0, 0];
        Command { opcode: admin::SET_FEATURES, dwords, ..Command::default() }
    }

    /// Creates completion queue `qid` in the page at `page`, without interrupts (5.3).
    pub fn create_cq(qid: u16, entries: u16, page: u64) -> Command {
        const CONTIGUOUS: u32 = 1;
        let size = u32::from(entries - 1) << 16 | u32::from(qid);
        let dwords = [size, CONTIGUOUS, 0, 0, 0, 0];
        Command { opcode: admin::CREATE_CQ, prp1: page, dwords, ..Command::default() }
    }

    /// Creates submission queue `qid`, completed by the queue of the same number (5.4).
    pub fn create_sq(qid: u16, entries: u16, page: u64) -> Command {
        const CONTIGUOUS: u32 = 1;
        let size = u32::from(entries - 1) << 16 | u32::from(qid);
        let dwords = [size, u32::from(qid) << 16 | CONTIGUOUS, 0, 0, 0, 0];
        Command { opcode: admin::CREATE_SQ, prp1: page, dwords, ..Command::default() }
    }

    /// Aborts command `cid` of submission queue `qid` (5.1).
    pub fn abort(qid: u16, cid: u16) -> Command {
        let dwords = [u32::from(cid) << 16 | u32::from(qid), 0, 0, 0, 0, 0];
        Command { opcode: admin::ABORT, dwords, ..Command::default() }
    }

    /// SMART / Health Information of the controller, 512 bytes into `page` (5.14.1.2).
    pub fn health(page: u64) -> Command {
        Command::log(LOG_HEALTH, 512, page)
    }

    /// Changed Namespace List, 4096 bytes into `page` (5.14.1.4).
    pub fn changed_namespaces(page: u64) -> Command {
        Command::log(LOG_NAMESPACES, 4096, page)
    }

    fn log(page_id: u32, bytes: u32, page: u64) -> Command {
        let dwords = [(bytes / 4 - 1) << 16 | page_id, 0, 0, 0, 0, 0];
        let nsid = u32::MAX;
        Command { opcode: admin::GET_LOG_PAGE, nsid, prp1: page, prp2: 0, dwords }
    }

    /// Asynchronous Event Request: answered when something happens (5.2).
    pub fn async_event() -> Command {
        Command { opcode: admin::ASYNC_EVENT, ..Command::default() }
    }

    /// Flush of one namespace (6.8).
    pub fn flush(nsid: u32) -> Command {
        Command { opcode: nvm::FLUSH, nsid, ..Command::default() }
    }

    /// Read or Write of 1 to 65536 blocks (6.9, 6.15).
    pub fn transfer(write: bool, nsid: u32, slba: u64, blocks: u32, prps: (u64, u64)) -> Command {
        let opcode = if write { nvm::WRITE } else { nvm::READ };
        let dwords = [slba as u32, (slba >> 32) as u32, blocks - 1, 0, 0, 0];
        Command { opcode, nsid, prp1: prps.0, prp2: prps.1, dwords }
    }

    /// Write Zeroes of 1 to 65536 blocks, with the request to deallocate or without (6.16).
    pub fn write_zeroes(nsid: u32, slba: u64, blocks: u32, deallocate: bool) -> Command {
        let deac = u32::from(deallocate) << 25;
        let dwords = [slba as u32, (slba >> 32) as u32, deac | (blocks - 1), 0, 0, 0];
        Command { opcode: nvm::WRITE_ZEROES, nsid, dwords, ..Command::default() }
    }

    /// Dataset Management, deallocate, with one range at `ranges` (6.7).
    pub fn deallocate(nsid: u32, ranges: u64) -> Command {
        const DEALLOCATE: u32 = 1 << 2;
        let dwords = [0, DEALLOCATE, 0, 0, 0, 0];
        Command { opcode: nvm::DATASET_MANAGEMENT, nsid, prp1: ranges, prp2: 0, dwords }
    }
}

/// The one range of [`Command::deallocate`] (NVMe 1.4, figure 360).
pub fn range(slba: u64, blocks: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[4..8].copy_from_slice(&blocks.to_le_bytes());
    bytes[8..].copy_from_slice(&slba.to_le_bytes());
    bytes
}

/// A completion entry's fields.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Completion {
    /// Dword 0: the command's own result.
    pub result: u32,
    pub cid: u16,
    pub status: Status,
}

impl Completion {
    /// Parses a private copy.
    pub fn parse(bytes: &[u8; CQE_BYTES]) -> Completion {
        let [r0, r1, r2, r3, .., c0, c1, s0, s1] = *bytes;
        Completion {
            result: u32::from_le_bytes([r0, r1, r2, r3]),
            cid: u16::from_le_bytes([c0, c1]),
            status: Status(u16::from_le_bytes([s0, s1]) >> 1),
        }
    }
}

/// The status field: SC in bits 7..0, SCT 10..8, CRD 12..11, More 13, Do Not Retry 14
/// (NVMe 1.4, figure 126).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Status(pub u16);

impl Status {
    pub fn is_success(self) -> bool {
        self.0 & 0x7FF == 0
    }

    /// Status code type and status code, as people write it: 0x281 is a read error.
    pub fn code(self) -> u16 {
        self.0 & 0x7FF
    }

    /// Whether the same command may succeed when sent again.
    pub fn is_transient(self) -> bool {
        const DO_NOT_RETRY: u16 = 1 << 14;
        // Data transfer, internal, aborted by request, by deletion, namespace not ready; all
        // path related ones (NVMe 1.4, figures 128 and 134).
        let may = matches!(self.code(), 0x04 | 0x06 | 0x07 | 0x08 | 0x82 | 0x300..=0x3FF);
        may && self.0 & DO_NOT_RETRY == 0
    }

    /// What a failed command is to the layers above.
    pub fn fault(self) -> StoreFault {
        match self.code() {
            0x01 => StoreFault::Unsupported,
            0x0B => StoreFault::Gone,
            0x20 | 0x182 => StoreFault::ReadOnly,
            0x80 => StoreFault::BeyondEnd,
            0x81 => StoreFault::NoSpace,
            code => StoreFault::Io(u32::from(code)),
        }
    }
}
