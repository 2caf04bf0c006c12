//! A blkback for disks of the storage domain itself, as a model: serves its rings from bytes in
//! memory, with a cache that a flush empties, and faults on demand (Xen public/io/blkif.h).
//!
//! Deterministic: requests happen only in [`BlkbackModel::step`], and the caller picks which is
//! next. Every request is proved as strictly as by our own backend, and panics when it fails:
//! the frontend under test is ours.

use std::collections::BTreeMap;
use std::format;
use std::string::String;
use std::vec::Vec;

use platter_xen::blkif::{
    Abi, IndirectOp, Limits, Request, SEGMENTS_INDIRECT_MAX, Segment, Status,
};
use platter_xen::ring::{BackRing, Permit};
use platter_xen::vbd::DiskNodes;
use platter_xen::{Direction, DomId, GrantCopy, Gref, Hypervisor, Port, Region};

/// What goes wrong.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// This many requests from now fail.
    pub fail: u32,
    pub fail_unsupported: bool,
    /// Nothing is answered any more.
    pub stalled: bool,
}

/// A data request whose segments are known.
enum Job {
    Transfer { write: bool, sector: u64, segments: Vec<Segment> },
    Flush,
    Discard { sector: u64, sectors: u64 },
}

/// See the module's head.
pub struct BlkbackModel {
    /// What survives a power cut.
    pub media: Vec<u8>,
    /// Written and not flushed, by sector.
    pub cache: BTreeMap<u64, Vec<u8>>,
    pub faults: Faults,
    /// What the nodes say.
    pub nodes: DiskNodes,
    /// Executed requests: reads, writes, flushes, discards; and how many were indirect.
    pub executed: [u64; 4],
    pub indirect: u64,
    peer: DomId,
    queues: Vec<Queue>,
    page: Option<Region>,
    /// Taken and not executed, with the number of their queue.
    jobs: Vec<(usize, Permit, Job)>,
}

/// A ring that is mapped, and its channel.
struct Queue {
    ring: BackRing,
    region: Region,
    port: Port,
}

impl BlkbackModel {
    /// A backend of `peer` with everything offered.
    pub fn new(peer: DomId, media: Vec<u8>, sector_bytes: u32) -> BlkbackModel {
        let nodes = DiskNodes {
            sectors: media.len() as u64 / 512,
            sector_bytes,
            physical_sector_bytes: sector_bytes,
            info: 0,
            flush: true,
            barrier: true,
            discard_alignment_bytes: 0,
            discard_granularity_bytes: Some(sector_bytes),
            indirect_segments_max: SEGMENTS_INDIRECT_MAX as u16,
            queues_max: 8,
            ring_page_order_max: 4,
        };
        BlkbackModel {
            media,
            cache: BTreeMap::new(),
            faults: Faults::default(),
            nodes,
            executed: [0; 4],
            indirect: 0,
            peer,
            queues: Vec::new(),
            page: None,
            jobs: Vec::new(),
        }
    }

    /// Maps the rings that the frontend published; `number` reads a node of its directory. What
    /// Linux's blkback would not take up is a panic here.
    pub fn connect<H: Hypervisor>(&mut self, hv: &mut H, number: &dyn Fn(&str) -> Option<u32>) {
        let count = number("multi-queue-num-queues").unwrap_or(1);
        assert!((1..=self.nodes.queues_max).contains(&count), "{count} queues were not offered");
        let order = number("ring-page-order");
        assert!(order.unwrap_or(0) <= self.nodes.ring_page_order_max, "pages not offered");
        for queue in 0..count {
            let node = |key: &str| {
                let prefix = if count > 1 { format!("queue-{queue}/") } else { String::new() };
                number(&format!("{prefix}{key}")).unwrap_or_else(|| panic!("no {prefix}{key}"))
            };
            let grefs: Vec<Gref> = match order {
                None => std::vec![Gref(node("ring-ref"))],
                Some(order) => {
                    (0..1 << order).map(|page| Gref(node(&format!("ring-ref{page}")))).collect()
                }
            };
            let region = hv.map(self.peer, &grefs).expect("the frontend granted its ring");
            let ring = BackRing::attach(hv, region, Abi::X86_64).expect("a sane ring");
            let remote = Port(node("event-channel"));
            let port = hv.bind_interdomain(self.peer, remote).expect("the frontend's port");
            self.queues.push(Queue { ring, region, port });
        }
        if self.page.is_none() {
            self.page = hv.frames_alloc(1);
        }
    }

    /// Lets the ring go; requests that were not executed are forgotten, those that were and
    /// whose answer was not seen are done: the frontend cannot tell which.
    pub fn disconnect<H: Hypervisor>(&mut self, hv: &mut H) {
        self.jobs.drain(..).for_each(|(_, permit, _)| permit.abandon());
        for queue in self.queues.drain(..) {
            hv.unmap(queue.region);
            hv.close_port(queue.port);
        }
    }

    /// Takes what is on the rings, then executes at most `most` requests; `pick` chooses the
    /// next of n. How many were answered.
    pub fn step<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        most: usize,
        pick: &mut dyn FnMut(usize) -> usize,
    ) -> usize {
        (0..self.queues.len()).for_each(|queue| self.take(hv, queue));
        let mut done = 0;
        while done < most && !self.jobs.is_empty() && !self.faults.stalled {
            let (queue, permit, job) = self.jobs.remove(pick(self.jobs.len()));
            let status = self.execute(hv, &job);
            self.queues[queue].ring.complete(permit, hv, status);
            done += 1;
        }
        for queue in &mut self.queues {
            if queue.ring.publish(hv) {
                hv.notify(queue.port);
            }
        }
        done
    }

    /// Loses what was not flushed, but for the sectors that `keep` lets reach the media.
    pub fn power_cut(&mut self, keep: &mut dyn FnMut(u64) -> bool) {
        for (sector, bytes) in core::mem::take(&mut self.cache) {
            if keep(sector) {
                self.store(sector, &bytes);
            }
        }
    }

    /// It took requests that it has not answered.
    pub fn is_busy(&self) -> bool {
        !self.jobs.is_empty()
    }

    /// The domain that it ran in is gone, and its memory with it.
    pub fn forget_domain(&mut self) {
        self.page = None;
    }

    fn limits(&self) -> Limits {
        Limits {
            capacity_sectors: self.nodes.sectors,
            sector_bytes: self.nodes.sector_bytes,
            read_only: false,
            indirect_segments_max: self.nodes.indirect_segments_max,
            flush: self.nodes.flush || self.nodes.barrier,
            discard: self.nodes.discard_granularity_bytes.is_some(),
        }
    }

    fn take<H: Hypervisor>(&mut self, hv: &mut H, queue: usize) {
        let limits = self.limits();
        loop {
            let ring = &mut self.queues[queue].ring;
            let Some((raw, permit)) = ring.take(hv).expect("our frontend keeps its ring") else {
                let more = ring.final_check(hv).expect("our frontend keeps its ring");
                if more {
                    continue;
                }
                return;
            };
            let request = Request::parse(&raw, Abi::X86_64, &limits).expect("a sane request");
            let job = match request {
                Request::Read(it) => transfer(false, it.sector, &it.segments),
                Request::Write(it) => transfer(true, it.sector, &it.segments),
                Request::Flush(it) => {
                    assert!(it.segments.is_empty(), "we flush by itself");
                    Job::Flush
                }
                Request::Discard { sector, sectors, secure } => {
                    assert!(!secure, "never asked for");
                    Job::Discard { sector, sectors }
                }
                Request::Indirect(it) => {
                    self.indirect += 1;
                    let mut bytes = std::vec![0; it.descriptor_bytes()];
                    self.grant_read(hv, it.grefs[0], &mut bytes);
                    let mut segments = [Segment::EMPTY; SEGMENTS_INDIRECT_MAX];
                    it.parse_segments(&bytes, &limits, &mut segments).expect("sane segments");
                    let count = usize::from(it.nr_segments);
                    transfer(it.operation == IndirectOp::Write, it.sector, &segments[..count])
                }
                Request::WriteBarrier(it) => {
                    assert!(it.segments.is_empty() && !self.nodes.flush, "only where it must be");
                    Job::Flush
                }
            };
            self.jobs.push((queue, permit, job));
        }
    }

    fn grant_read<H: Hypervisor>(&self, hv: &mut H, gref: Gref, into: &mut [u8]) {
        self.copy(hv, gref, 0, into.len(), Direction::FromGuest);
        hv.read(self.page.expect("connected"), 0, into);
    }

    fn copy<H: Hypervisor>(
        &self,
        hv: &mut H,
        gref: Gref,
        offset: u16,
        len: usize,
        direction: Direction,
    ) {
        let mut ops = [GrantCopy {
            domid: self.peer,
            gref,
            gref_offset: offset,
            page: self.page.expect("connected"),
            page_offset: 0,
            len: len as u16,
            direction,
            status: 1,
        }];
        hv.copy(&mut ops);
        assert_eq!(ops[0].status, 0, "a granted page");
    }

    fn execute<H: Hypervisor>(&mut self, hv: &mut H, job: &Job) -> Status {
        if self.faults.fail > 0 {
            self.faults.fail -= 1;
            let unsupported = self.faults.fail_unsupported;
            return if unsupported { Status::Unsupported } else { Status::Error };
        }
        match job {
            Job::Flush => {
                self.executed[2] += 1;
                self.power_cut(&mut |_| true);
            }
            Job::Discard { sector, sectors } => {
                self.executed[3] += 1;
                for sector in *sector..*sector + *sectors {
                    self.cache.insert(sector, std::vec![0xDD; 512]);
                }
            }
            Job::Transfer { write, sector, segments } => {
                self.executed[usize::from(*write)] += 1;
                self.transfer(hv, *write, *sector, segments);
            }
        }
        Status::Okay
    }

    fn transfer<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        write: bool,
        mut sector: u64,
        segments: &[Segment],
    ) {
        let page = self.page.expect("connected");
        for segment in segments {
            let (offset, len) = (segment.offset_bytes(), usize::from(segment.len_bytes()));
            if write {
                self.copy(hv, segment.gref, offset, len, Direction::FromGuest);
            }
            for at in (0..len).step_by(512) {
                let mut bytes = std::vec![0; 512];
                if write {
                    hv.read(page, at, &mut bytes);
                    self.cache.insert(sector, bytes);
                    if !(self.nodes.flush || self.nodes.barrier) {
                        self.power_cut(&mut |_| true);
                    }
                } else {
                    let media = &self.media[sector as usize * 512..][..512];
                    hv.write(page, at, self.cache.get(&sector).map_or(media, |bytes| bytes));
                }
                sector += 1;
            }
            if !write {
                self.copy(hv, segment.gref, offset, len, Direction::ToGuest);
            }
        }
    }

    fn store(&mut self, sector: u64, bytes: &[u8]) {
        let at = sector as usize * 512;
        self.media[at..at + 512].copy_from_slice(bytes);
    }
}

impl Drop for BlkbackModel {
    /// A backend that ends in the middle of its work owes nobody an answer.
    fn drop(&mut self) {
        self.jobs.drain(..).for_each(|(_, permit, _)| permit.abandon());
    }
}

fn transfer(write: bool, sector: u64, segments: &[Segment]) -> Job {
    Job::Transfer { write, sector, segments: segments.to_vec() }
}
