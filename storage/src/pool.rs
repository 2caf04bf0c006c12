//! The pages that disk data travels through: one region of our own frames, granted once to each
//! blkback that serves us, reachable by NVMe through its machine addresses.
//!
//! Guards: a run of pages belongs to one operation from [`Pool::take`] to [`Pool::give`]; a page
//! that a device may still write to ([`Pool::lose`]) is never handed out again. Allocation is a
//! bitmap search, bounded by the number of pages; nothing here touches the heap after start.

use alloc::vec::Vec;

use platter_xen::{DomId, Gref, Hypervisor, PAGE_BYTES, Refusal, Region};

use crate::store::Run;

/// Most pages of one operation: 128 KiB, 32 segments of blkif and one PRP list.
pub const RUN_PAGES_MAX: usize = 32;
/// Most pages of a pool: a page number is 16 bits in [`crate::disk::DiskIo`].
pub const POOL_PAGES_MAX: usize = 8192;
/// Domains the pool can be granted to: disks of ours come from dom0 or a few driver domains.
const PEERS_MAX: usize = 4;

struct Peer {
    domid: DomId,
    grefs: Vec<Gref>,
    /// Disks that it serves.
    users: usize,
}

/// See the module's head.
pub struct Pool {
    region: Region,
    /// One bit a page, 1 when in use.
    used: Vec<u64>,
    free_pages: usize,
    /// Where the next search begins: spreads use, so that short runs do not always rescan.
    next: usize,
    peers: Vec<Option<Peer>>,
}

impl Pool {
    /// Takes `pages` frames (32 to [`POOL_PAGES_MAX`]). `None` when there are not that many.
    pub fn new<H: Hypervisor>(hv: &mut H, pages: usize) -> Option<Pool> {
        assert!((RUN_PAGES_MAX..=POOL_PAGES_MAX).contains(&pages), "pool size is ours");
        let region = hv.frames_alloc(pages)?;
        let used = alloc::vec![0; pages.div_ceil(64)];
        Some(Pool { region, used, free_pages: pages, next: 0, peers: Vec::new() })
    }

    fn pages(&self) -> usize {
        self.region.pages as usize
    }

    pub fn free_pages(&self) -> usize {
        self.free_pages
    }

    fn is_used(&self, page: usize) -> bool {
        self.used[page / 64] >> (page % 64) & 1 == 1
    }

    fn mark(&mut self, first: usize, count: usize, used: bool) {
        for page in first..first + count {
            assert!(self.is_used(page) != used, "page taken or given twice");
            self.used[page / 64] ^= 1 << (page % 64);
        }
    }

    /// A free run of `count` pages, 1 to [`RUN_PAGES_MAX`]; the number of its first page.
    pub fn take(&mut self, count: usize) -> Option<u16> {
        assert!((1..=RUN_PAGES_MAX).contains(&count), "length of a run");
        if count > self.free_pages {
            return None;
        }
        let first = self
            .search(self.next, self.pages(), count)
            .or_else(|| self.search(0, (self.next + count).min(self.pages()), count))?;
        self.mark(first, count, true);
        self.free_pages -= count;
        self.next = first + count;
        Some(first as u16)
    }

    fn search(&self, from: usize, to: usize, count: usize) -> Option<usize> {
        let mut run = 0;
        for page in from..to {
            if self.is_used(page) {
                run = 0;
                continue;
            }
            run += 1;
            if run == count {
                return Some(page + 1 - count);
            }
        }
        None
    }

    /// Gives a run back.
    pub fn give(&mut self, first: u16, count: usize) {
        self.mark(first as usize, count, false);
        self.free_pages += count;
    }

    /// Never gives a run back: a device that could not be stopped may still write to it.
    pub fn lose(&mut self, first: u16, count: usize) {
        for page in first as usize..first as usize + count {
            assert!(self.is_used(page), "only a page in use can be lost");
        }
    }

    /// One page as a region of its own.
    pub fn page(&self, page: u16) -> Region {
        self.region.page(page as usize)
    }

    /// `len` bytes from byte `offset` of the run that starts at `page`.
    pub fn run(&self, page: u16, offset: usize, len: usize) -> Run {
        let offset = page as usize * PAGE_BYTES + offset;
        assert!(offset + len <= self.region.bytes(), "run beyond the pool");
        Run { region: self.region, offset, len }
    }

    /// The address a device uses for a page.
    pub fn dma_address<H: Hypervisor>(&self, hv: &H, page: u16) -> u64 {
        hv.dma_address(self.region, page as usize)
    }

    /// Grants every page to `domid`, once however many disks it serves; the number of the peer
    /// for [`gref`](Self::gref).
    pub fn grant_to<H: Hypervisor>(&mut self, hv: &mut H, domid: DomId) -> Result<usize, Refusal> {
        for (index, peer) in self.peers.iter_mut().enumerate() {
            if let Some(peer) = peer.as_mut().filter(|peer| peer.domid == domid) {
                peer.users += 1;
                return Ok(index);
            }
        }
        let place = self.peers.iter().position(Option::is_none);
        if place.is_none() && self.peers.len() == PEERS_MAX {
            return Err(Refusal::Full);
        }
        let mut grefs = Vec::with_capacity(self.pages());
        for page in 0..self.pages() {
            match hv.grant(domid, self.region.page(page), true) {
                Ok(gref) => grefs.push(gref),
                Err(refusal) => {
                    for gref in grefs {
                        // Nobody was told of these grants: nobody can have mapped them.
                        hv.revoke(gref);
                    }
                    return Err(refusal);
                }
            }
        }
        let peer = Some(Peer { domid, grefs, users: 1 });
        match place {
            Some(place) => self.peers[place] = peer,
            None => self.peers.push(peer),
        }
        Ok(place.unwrap_or(self.peers.len() - 1))
    }

    /// A peer serves one disk less; the grants end with the last one. What it maps for ever stays
    /// granted, to a domain that is gone or that had the page anyway.
    pub fn let_go<H: Hypervisor>(&mut self, hv: &mut H, peer: usize) {
        let place = &mut self.peers[peer];
        let Some(of) = place.as_mut() else { unreachable!("a peer is let go once by each disk") };
        of.users -= 1;
        if of.users == 0 {
            of.grefs.iter().for_each(|gref| {
                hv.revoke(*gref);
            });
            *place = None;
        }
    }

    /// The grant of a page for a peer.
    pub fn gref(&self, peer: usize, page: u16) -> Gref {
        let peer = self.peers[peer].as_ref().expect("a peer that serves a disk");
        peer.grefs[page as usize]
    }
}
