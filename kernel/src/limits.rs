//! Every bound of the server, in one place, each with its worst-case memory or its source.

/// Disks attached at once, as far as memory goes: that refuses some before. xenstore's default
/// quota of 1000 nodes allows about 34 with the toolstack's 15 nodes a disk and ours.
pub const DISKS_MAX: usize = 32;
/// Stores: 9p shares and disks of the storage domain itself.
pub const STORES_MAX: usize = 8;
/// Devices of the storage domain itself.
pub const FRONTS_MAX: usize = 16;
/// Guest requests in flight over all disks: 2.2 KiB each, most of it 256 segments.
pub const REQUESTS_MAX: usize = 192;
/// With so few requests under way the domain sleeps after a turn without another look.
pub const REQUESTS_CALM_MAX: usize = 4;
/// A disk's share of them, at the least.
pub const REQUESTS_PER_DISK_MIN: usize = 4;
/// Requests that those who serve do not have together: what they hold while their store is away
/// leaves these to disks that come meanwhile, until shares are even.
pub const REQUESTS_KEPT: usize = 16;
/// The same of store operations: opening a disk needs some.
pub const OPS_KEPT: usize = 32;
/// Store operations that one disk may have under way while another, that asks for little, wants
/// the store too: what lies in a server's queue delays everybody behind it, and a server is busy
/// with this many.
pub const OPS_CONTENDED_MAX: usize = 4;
/// Bytes of the guest's in these operations, at which no more is submitted, and the boundaries
/// at which large requests are then cut: a default qcow2 cluster, so that no cut leaves a
/// cluster partly written.
pub const BYTES_CONTENDED_MAX: u64 = 64 * 1024;
/// How long after its last request a disk still counts as wanting the store.
pub const CONTENDED_NS: u64 = 100_000_000;
/// Requests taken from one disk in a turn.
pub const QUANTUM_REQUESTS: usize = 32;
/// And no more than about so many sectors (512 KiB): large requests make long turns.
pub const QUANTUM_SECTORS: u64 = 1024;
/// The same while another disk, that asks for little, wants the store (128 KiB).
pub const QUANTUM_CONTENDED_REQUESTS: usize = 16;
pub const QUANTUM_CONTENDED_SECTORS: u64 = 256;
/// Steps in which a request is planned before others have their turn: most take one, a discard of
/// a whole disk one for each of its tables.
pub const STEPS_MAX: usize = 64;
/// Store operations in flight over all disks: about 100 bytes each.
pub const OPS_MAX: usize = 256;
/// Bytes of guests' requests that leave as one message when they follow each other: beyond that
/// a message costs by its bytes.
pub const TRAIN_BYTES_MAX: u32 = 128 * 1024;
/// Copy jobs (copy-on-write, zeroing of new tables) at once; each holds one bounce buffer.
pub const JOBS_MAX: usize = 8;
/// Reasons of refused disks kept in `error/backend`: three nodes of our quota each.
pub const EXPLAINED_MAX: usize = 16;
/// Bytes of a bounce buffer: a default qcow2 cluster.
pub const BOUNCE_BYTES: usize = 64 * 1024;
/// Segments of one request, indirect ones included (Linux blkback's limit).
pub const SEGMENTS_MAX: usize = 256;
/// Queues of one disk.
pub const QUEUES_MAX: usize = 4;
/// Ring order: 16 pages (XENBUS_MAX_RING_GRANT_ORDER in Linux).
pub const RING_ORDER_MAX: u32 = 4;
/// Grant copies in one hypercall: 32 requests of 4 KiB from a 9p ring, where a page of data
/// lies over two pages, take 64 and 8 of 64 KiB 256; 32 bytes each.
pub const COPIES_MAX: usize = 256;
/// Parts of requests that copy without a store operation (zeros) queued at once.
pub const PIECES_MAX: usize = 64;
/// Longest `params` taken from xenstore, bytes (half a xenstore node, ours).
pub const PARAMS_BYTES_MAX: usize = 1024;
/// Metadata cache of one disk, bytes, before the memory given to the domain scales it.
pub const CACHE_BYTES_MIN: usize = 256 * 1024;
pub const CACHE_BYTES_MAX: usize = 8 * 1024 * 1024;
/// How long an attach may wait for its store to appear; libxl gives up after 10 s, and the
/// reason should stand in its log before that.
pub const STORE_WAIT_NS: u64 = 8_000_000_000;
/// Dirty metadata is flushed after this much time even if the guest never flushes.
pub const FLUSH_AFTER_NS: u64 = 5_000_000_000;
/// Between two looks at the size of a raw file.
pub const SIZE_NS: u64 = 2_000_000_000;
/// Between two refreshes of a disk's counters in xenstore.
pub const STATS_NS: u64 = 2_000_000_000;
