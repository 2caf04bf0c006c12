//! The pages that disk data travels through: one region of our own frames, granted once to each
//! blkback that serves us, reachable by NVMe through its machine addresses.
//!
//! Guards: a run of pages belongs to one operation from [`Pool::take`] to [`Pool::give`]; a page
//! that a device may still write to ([`Pool::lose`]) is not handed out again before that has ended
//! for certain. Allocation is a
//! bitmap search, bounded by the number of pages; nothing here touches the heap after start.

use alloc::vec::Vec;

use platter_xen::{DomId, Gref, Hypervisor, PAGE_BYTES, Refusal, Region};

use crate::disk::Held;
use crate::store::Run;

/// Most pages of one operation: 128 KiB, 32 segments of blkif and one PRP list.
pub const RUN_PAGES_MAX: usize = 32;
/// Most pages of a pool: a page number is 16 bits in [`crate::disk::DiskIo`].
pub const POOL_PAGES_MAX: usize = 8192;
/// Domains the pool can be granted to: disks of ours come from dom0 or a few driver domains.
const PEERS_MAX: usize = 4;

struct Peer {
    domid: DomId,
    /// Of each page; none only where a page that was lost could not be granted anew.
    grefs: Vec<Option<Gref>>,
    /// Disks that it serves.
    users: usize,
}

/// A page that somebody outside may still write to.
struct Lost {
    page: u16,
    /// The device it was lost at, and who holds it there.
    device: usize,
    held: Held,
    /// The grant that a peer had that was let go.
    gref: Option<Gref>,
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
    /// Room for all pages: it grows while requests are answered.
    lost: Vec<Lost>,
}

impl Pool {
    /// Takes `pages` frames (32 to [`POOL_PAGES_MAX`]). `None` when there are not that many.
    pub fn new<H: Hypervisor>(hv: &mut H, pages: usize) -> Option<Pool> {
        assert!((RUN_PAGES_MAX..=POOL_PAGES_MAX).contains(&pages), "pool size is ours");
        let region = hv.frames_alloc(pages)?;
        let used = alloc::vec![0; pages.div_ceil(64)];
        let (peers, lost) = (Vec::new(), Vec::with_capacity(pages));
        Some(Pool { region, used, free_pages: pages, next: 0, peers, lost })
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

    /// Keeps a run from use while somebody may write to it.
    pub fn lose(&mut self, first: u16, count: usize, (device, held): (usize, Held)) {
        for page in first..first + count as u16 {
            assert!(self.is_used(usize::from(page)), "only a page in use can be lost");
            self.lost.push(Lost { page, device, held, gref: None });
        }
    }

    /// Pages of `device` that are kept from use.
    pub fn lost_at(&self, device: usize) -> usize {
        self.lost.iter().filter(|lost| lost.device == device).count()
    }

    /// Whether a backend of `device` holds some.
    pub fn is_held_at(&self, device: usize) -> bool {
        self.lost.iter().any(|lost| lost.device == device && lost.held != Held::Device)
    }

    /// Takes back what the backends of `device`, which take no more requests, have let go of. One
    /// that still maps a page, for this disk or another, keeps it. How many came back.
    pub fn regain<H: Hypervisor>(&mut self, hv: &mut H, device: usize) -> usize {
        let before = self.lost.len();
        for index in (0..before).rev() {
            let Lost { page, device: at, held, gref } = self.lost[index];
            let ended = match (held, gref) {
                _ if at != device => false,
                (_, Some(gref)) => hv.revoke(gref),
                (Held::Backend(peer), None) => self.regrant(hv, peer, page),
                (Held::Nobody | Held::Device, None) => held == Held::Nobody,
            };
            if ended {
                self.lost.swap_remove(index);
                self.give(page, 1);
            }
        }
        before - self.lost.len()
    }

    /// Ends a page's grant to a peer and makes another.
    fn regrant<H: Hypervisor>(&mut self, hv: &mut H, peer: usize, page: u16) -> bool {
        let region = self.page(page);
        let Some(peer) = self.peers.get_mut(peer).and_then(Option::as_mut) else { return false };
        let place = &mut peer.grefs[usize::from(page)];
        if place.is_some_and(|gref| !hv.revoke(gref)) {
            return false;
        }
        *place = hv.grant(peer.domid, region, true).ok();
        place.is_some()
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
                Ok(gref) => grefs.push(Some(gref)),
                Err(refusal) => {
                    for gref in grefs.into_iter().flatten() {
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
        if of.users > 0 {
            return;
        }
        for (page, gref) in of.grefs.iter().enumerate() {
            let kept = gref.filter(|gref| !hv.revoke(*gref));
            let of_peer = |lost: &&mut Lost| {
                usize::from(lost.page) == page && lost.held == Held::Backend(peer)
            };
            if let Some(lost) = self.lost.iter_mut().find(of_peer) {
                (lost.held, lost.gref) = (Held::Nobody, kept);
            }
        }
        *place = None;
    }

    /// The grant of a page for a peer.
    pub fn gref(&self, peer: usize, page: u16) -> Gref {
        let peer = self.peers[peer].as_ref().expect("a peer that serves a disk");
        peer.grefs[page as usize].expect("a page in use that is not lost is granted")
    }
}
