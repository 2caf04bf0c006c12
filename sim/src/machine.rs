//! Seam 1 in software: frames, grant tables and event channels of several domains.
//!
//! Guards what a hypervisor guards: nobody reaches a frame that was not granted to him, a grant
//! cannot end while it is mapped, an event reaches the port it is bound to. A page marked
//! hostile reads differently every time another domain looks (a guest that rewrites it between
//! two reads). Must never: take the real time, lose count of a map or a port.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use platter_xen::{
    Bus, Direction, DomId, GrantCopy, Gref, Hypervisor, Mmio, PAGE_BYTES, Port, Refusal, Region,
};

use crate::nvme_model::{Dma, NvmeModel};
use crate::rng::mix;
use crate::world::S;

/// Machine address of the NVMe controller's registers, and where its doorbells begin.
pub const BAR0: u64 = 0xFE_8000_4000;
const DOORBELLS: usize = 0x1000;

/// GNTST_bad_domain, GNTST_bad_gntref, GNTST_permission_denied (public/grant_table.h).
const BAD_DOMAIN: i16 = -2;
const BAD_GNTREF: i16 = -3;
const DENIED: i16 = -8;
/// Grant entries of one domain: eight frames of 512 entries each.
const GRANTS_MAX: usize = 8 * 512;
const PORTS_MAX: usize = 4096;

type Page = Box<[u8; PAGE_BYTES]>;

/// What stands at a page number of a domain's own numbering.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Slot {
    Free,
    Own(u32),
    Mapped { frame: u32, domain: u16, gref: u32, writable: bool },
}

#[derive(Clone, Copy, Debug)]
struct Grant {
    peer: u16,
    frame: u32,
    writable: bool,
    used: bool,
    maps: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Channel {
    Free,
    Unbound { peer: u16 },
    Bound { peer: u16, port: u32 },
}

#[derive(Clone, Copy, Debug)]
struct PortState {
    channel: Channel,
    pending: bool,
}

/// One domain's tables.
#[derive(Debug)]
pub struct Domain {
    slots: Vec<Slot>,
    grants: Vec<Grant>,
    grants_free: Vec<u32>,
    ports: Vec<PortState>,
    frames_max: usize,
    frames: usize,
    alive: bool,
    calls: Cell<Calls>,
}

impl Domain {
    fn new(frames_max: usize) -> Domain {
        let closed = PortState { channel: Channel::Free, pending: false };
        // Port 0 and gref 0 are never given out, as in Xen.
        let unused = Grant { peer: u16::MAX, frame: 0, writable: false, used: false, maps: 0 };
        Domain {
            slots: vec![],
            grants: vec![unused],
            grants_free: vec![],
            ports: vec![closed],
            frames_max,
            frames: 0,
            alive: true,
            calls: Cell::new(Calls::default()),
        }
    }

    fn count(&self, add: impl FnOnce(&mut Calls)) {
        let mut calls = self.calls.get();
        add(&mut calls);
        self.calls.set(calls);
    }

    fn free_run(&mut self, pages: usize) -> usize {
        let mut run = 0;
        for index in 0..self.slots.len() {
            run = if self.slots[index] == Slot::Free { run + 1 } else { 0 };
            if run == pages {
                return index + 1 - pages;
            }
        }
        let start = self.slots.len() - run;
        self.slots.resize(start + pages, Slot::Free);
        start
    }
}

/// What a domain asked of the machine since it was made: what its work costs, whatever the
/// processor.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Calls {
    /// Hypercalls of grant copies, and the copies in them.
    pub copies: u64,
    pub copy_ops: u64,
    pub notifies: u64,
    /// Looks at shared memory and writes to it, other than by grant copy.
    pub accesses: u64,
    /// Bytes that these moved.
    pub bytes: u64,
}

/// What a domain holds: the leak oracle compares two of these.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Holdings {
    pub frames: usize,
    pub maps: usize,
    pub grants: usize,
    pub ports: usize,
}

/// The machine.
pub struct Machine {
    frames: Vec<Option<Page>>,
    /// Frames that read differently each time.
    hostile: Vec<bool>,
    /// Whose each frame is.
    owners: Vec<u16>,
    free: Vec<u32>,
    domains: BTreeMap<u16, Domain>,
    /// Domains that an event has reached since the world looked.
    pub woken: Vec<u16>,
    /// Time that hypercalls took since the world looked.
    pub cost_ns: u64,
    /// Grant copies that failed since the start.
    pub copies_refused: u64,
    noise: Cell<u64>,
    /// Of 1000 reads of a hostile page, so many are of something else.
    pub noise_per_mille: u64,
    /// The controller that platter may have.
    pub nvme: Option<RefCell<NvmeModel>>,
    /// Something was submitted to it since the world looked.
    pub doorbell: bool,
}

impl Machine {
    pub fn new(seed: u64) -> Machine {
        Machine {
            frames: vec![],
            hostile: vec![],
            owners: vec![],
            free: vec![],
            domains: BTreeMap::new(),
            woken: Vec::with_capacity(64),
            cost_ns: 0,
            copies_refused: 0,
            noise: Cell::new(mix(seed)),
            noise_per_mille: 0,
            nvme: None,
            doorbell: false,
        }
    }

    pub fn add_domain(&mut self, domain: u16, frames_max: usize) {
        let before = self.domains.insert(domain, Domain::new(frames_max));
        assert!(before.is_none(), "domain identifiers are not used again");
    }

    /// The domain is gone: its ports close, its grants end. Frames that others map stay.
    pub fn kill(&mut self, domain: u16) {
        let ports = self.domains[&domain].ports.len() as u32;
        for port in 1..ports {
            self.close(domain, port);
        }
        let dead = self.domains.get_mut(&domain).expect("a domain");
        dead.alive = false;
        dead.grants.iter_mut().filter(|grant| grant.maps == 0).for_each(|g| g.used = false);
    }

    /// The machine through the eyes of one domain.
    pub fn view(&mut self, domain: u16) -> View<'_> {
        View { machine: self, domain }
    }

    pub fn holdings(&self, domain: u16) -> Holdings {
        let of = &self.domains[&domain];
        let mapped = |slot: &&Slot| matches!(slot, Slot::Mapped { .. });
        Holdings {
            frames: of.frames,
            maps: of.slots.iter().filter(mapped).count(),
            grants: of.grants.iter().filter(|grant| grant.used).count(),
            ports: of.ports.iter().filter(|port| port.channel != Channel::Free).count(),
        }
    }

    /// Memory as a device of `domain` reaches it: its own frames and no others, by machine
    /// address.
    pub fn dma(&mut self, domain: u16) -> DeviceView<'_> {
        DeviceView { machine: self, domain }
    }

    /// Grants of `domain` to domains below this number, and how many of them are mapped.
    pub fn grants_below(&self, domain: u16, end: u16) -> (usize, usize) {
        let used = || self.domains[&domain].grants.iter().filter(|g| g.used && g.peer < end);
        (used().count(), used().filter(|grant| grant.maps > 0).count())
    }

    pub fn calls(&self, domain: u16) -> Calls {
        self.domains[&domain].calls.get()
    }

    /// Grants of `domain` that somebody still maps.
    pub fn mapped_by_others(&self, domain: u16) -> usize {
        self.domains[&domain].grants.iter().filter(|g| g.maps > 0).count()
    }

    pub fn any_pending(&self, domain: u16, ports: &[Port]) -> bool {
        let of = &self.domains[&domain].ports;
        ports.iter().any(|port| of.get(port.0 as usize).is_some_and(|state| state.pending))
    }

    /// Sets a port's pending bit with no reason: a spurious event.
    pub fn disturb(&mut self, domain: u16, choice: u64) {
        let of = self.domains.get_mut(&domain).expect("a domain");
        let count = of.ports.len() as u64;
        let port = &mut of.ports[(choice % count) as usize];
        if matches!(port.channel, Channel::Bound { .. }) {
            port.pending = true;
            self.wake(domain);
        }
    }

    /// Joins two new ports of two domains, as the toolstack does for xenstore.
    pub fn join(&mut self, a: u16, b: u16) -> (Port, Port) {
        let (Ok(at_a), Ok(at_b)) = (self.new_port(a), self.new_port(b)) else {
            panic!("a new domain has ports")
        };
        self.port_mut(a, at_a).channel = Channel::Bound { peer: b, port: at_b };
        self.port_mut(b, at_b).channel = Channel::Bound { peer: a, port: at_a };
        (Port(at_a), Port(at_b))
    }

    /// All pages a domain owns: for looking for what it should not have.
    pub fn owned_pages(&self, domain: u16) -> impl Iterator<Item = &[u8; PAGE_BYTES]> {
        self.domains[&domain].slots.iter().filter_map(|slot| match slot {
            Slot::Own(frame) => self.frames[*frame as usize].as_deref(),
            _ => None,
        })
    }

    /// From now on other domains read something else there now and then.
    pub fn set_hostile(&mut self, domain: u16, region: Region, hostile: bool) {
        for page in 0..region.pages {
            let (frame, _) = self.frame(domain, region.first_page + page);
            self.hostile[frame as usize] = hostile;
        }
    }

    fn port_mut(&mut self, domain: u16, port: u32) -> &mut PortState {
        &mut self.domains.get_mut(&domain).expect("a domain").ports[port as usize]
    }

    fn new_port(&mut self, domain: u16) -> Result<u32, Refusal> {
        let of = self.domains.get_mut(&domain).expect("a domain");
        let free = of.ports.iter().skip(1).position(|port| port.channel == Channel::Free);
        if let Some(index) = free {
            of.ports[index + 1].pending = false;
            return Ok(index as u32 + 1);
        }
        if of.ports.len() >= PORTS_MAX {
            return Err(Refusal::Full);
        }
        of.ports.push(PortState { channel: Channel::Free, pending: false });
        Ok(of.ports.len() as u32 - 1)
    }

    fn close(&mut self, domain: u16, port: u32) {
        let state = self.port_mut(domain, port);
        let channel = core::mem::replace(&mut state.channel, Channel::Free);
        state.pending = false;
        if let Channel::Bound { peer, port } = channel {
            // The other end can be bound once more (Xen's evtchn_close).
            self.port_mut(peer, port).channel = Channel::Unbound { peer: domain };
        }
    }

    fn wake(&mut self, domain: u16) {
        if !self.woken.contains(&domain) {
            self.woken.push(domain);
        }
    }

    fn new_frame(&mut self, owner: u16) -> u32 {
        let page = Box::new([0; PAGE_BYTES]);
        if let Some(frame) = self.free.pop() {
            self.frames[frame as usize] = Some(page);
            self.owners[frame as usize] = owner;
            return frame;
        }
        self.frames.push(Some(page));
        self.owners.push(owner);
        self.hostile.push(false);
        self.frames.len() as u32 - 1
    }

    /// Frame behind a page number, and whether it is another domain's.
    fn frame(&self, domain: u16, page: u32) -> (u32, bool) {
        match self.domains[&domain].slots.get(page as usize) {
            Some(Slot::Own(frame)) => (*frame, false),
            Some(Slot::Mapped { frame, .. }) => (*frame, true),
            _ => panic!("domain {domain} touches page {page}, which it does not have"),
        }
    }

    fn page(&self, frame: u32) -> &[u8; PAGE_BYTES] {
        self.frames[frame as usize].as_deref().expect("a frame in use")
    }

    fn page_mut(&mut self, frame: u32) -> &mut [u8; PAGE_BYTES] {
        self.frames[frame as usize].as_deref_mut().expect("a frame in use")
    }

    fn next_noise(&self) -> u64 {
        self.noise.set(self.noise.get().wrapping_add(0x9e37_79b9_7f4a_7c15));
        mix(self.noise.get())
    }

    /// Another domain reads a page whose owner rewrites it all the time.
    fn add_noise(&self, into: &mut [u8]) {
        if into.is_empty() || self.next_noise() % 1000 >= self.noise_per_mille {
            return;
        }
        for _ in 0..1 + self.next_noise() % 4 {
            let at = (self.next_noise() % into.len() as u64) as usize;
            into[at] = self.next_noise() as u8;
        }
    }

    fn copy_one(&mut self, caller: u16, op: &GrantCopy) -> i16 {
        let (end, page_end) = (op.gref_offset + op.len, op.page_offset + op.len);
        assert!(op.len > 0 && end as usize <= PAGE_BYTES && page_end as usize <= PAGE_BYTES);
        let Some(granter) = self.domains.get(&op.domid.0) else { return BAD_DOMAIN };
        if !granter.alive {
            return BAD_DOMAIN;
        }
        let Some(grant) = granter.grants.get(op.gref.0 as usize).filter(|grant| grant.used) else {
            return BAD_GNTREF;
        };
        if grant.peer != caller {
            return DENIED;
        }
        if op.direction == Direction::ToGuest && !grant.writable {
            return DENIED;
        }
        let theirs = grant.frame;
        let (ours, foreign) = self.frame(caller, op.page.first_page);
        assert!(!foreign, "grant copies go to pages of our own");
        let (at, len) = (op.gref_offset as usize, op.len as usize);
        let here = op.page_offset as usize;
        let mut bytes = [0; PAGE_BYTES];
        match op.direction {
            Direction::FromGuest => {
                bytes[..len].copy_from_slice(&self.page(theirs)[at..at + len]);
                if self.hostile[theirs as usize] {
                    self.add_noise(&mut bytes[..len]);
                }
                self.page_mut(ours)[here..here + len].copy_from_slice(&bytes[..len]);
            }
            Direction::ToGuest => {
                bytes[..len].copy_from_slice(&self.page(ours)[here..here + len]);
                self.page_mut(theirs)[at..at + len].copy_from_slice(&bytes[..len]);
            }
        }
        0
    }
}

/// A domain's hypercalls and memory.
pub struct View<'a> {
    pub machine: &'a mut Machine,
    pub domain: u16,
}

impl View<'_> {
    fn own(&mut self) -> &mut Domain {
        self.machine.domains.get_mut(&self.domain).expect("a domain")
    }

    fn count(&self, add: impl FnOnce(&mut Calls)) {
        self.machine.domains[&self.domain].count(add);
    }

    fn count_access(&self, bytes: usize) {
        self.count(|calls| {
            calls.accesses += 1;
            calls.bytes += bytes as u64;
        });
    }

    /// Calls `part` for each page's piece of a range: page number, offset, length, and how many
    /// bytes came before.
    fn pieces(region: Region, offset: usize, len: usize, mut part: impl FnMut(u32, usize, usize)) {
        assert!(offset + len <= region.bytes(), "access beyond its region");
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let within = at % PAGE_BYTES;
            let now = (PAGE_BYTES - within).min(len - done);
            part(region.first_page + (at / PAGE_BYTES) as u32, within, now);
            done += now;
        }
    }

    fn map_one(&mut self, domid: DomId, gref: Gref) -> Result<(u32, bool), Refusal> {
        let caller = self.domain;
        let bad = Refusal::Grant(BAD_GNTREF);
        let granter = self.machine.domains.get_mut(&domid.0);
        let granter = granter.filter(|granter| granter.alive);
        let granter = granter.ok_or(Refusal::Grant(BAD_DOMAIN))?;
        let grant = granter.grants.get_mut(gref.0 as usize).filter(|grant| grant.used);
        let grant = grant.ok_or(bad)?;
        if grant.peer != caller || !grant.writable {
            return Err(Refusal::Grant(DENIED));
        }
        grant.maps += 1;
        Ok((grant.frame, grant.writable))
    }

    fn unmap_one(&mut self, page: u32) {
        let slot = core::mem::replace(&mut self.own().slots[page as usize], Slot::Free);
        let Slot::Mapped { domain, gref, .. } = slot else {
            panic!("unmap of a page that is not mapped")
        };
        let granter = self.machine.domains.get_mut(&domain).expect("domains are kept");
        let grant = &mut granter.grants[gref as usize];
        grant.maps -= 1;
        if grant.maps == 0 && !granter.alive {
            grant.used = false;
        }
    }
}

impl Hypervisor for View<'_> {
    fn frames_alloc(&mut self, pages: usize) -> Option<Region> {
        if self.frames_left() < pages {
            return None;
        }
        let first = self.own().free_run(pages);
        for index in first..first + pages {
            let frame = self.machine.new_frame(self.domain);
            self.own().slots[index] = Slot::Own(frame);
        }
        self.own().frames += pages;
        Some(Region { first_page: first as u32, pages: pages as u32 })
    }

    fn frames_free(&mut self, region: Region) {
        for page in region.first_page..region.first_page + region.pages {
            let slot = core::mem::replace(&mut self.own().slots[page as usize], Slot::Free);
            let Slot::Own(frame) = slot else { panic!("freed what was not its own") };
            let granted = self.own().grants.iter().any(|grant| grant.used && grant.frame == frame);
            assert!(!granted, "freed a frame that is still granted");
            self.machine.frames[frame as usize] = None;
            self.machine.hostile[frame as usize] = false;
            self.machine.free.push(frame);
        }
        self.own().frames -= region.pages as usize;
    }

    fn frames_left(&self) -> usize {
        let own = &self.machine.domains[&self.domain];
        own.frames_max - own.frames
    }

    fn dma_address(&self, region: Region, index: usize) -> u64 {
        u64::from(self.machine.frame(self.domain, region.page(index).first_page).0) << 12
    }

    fn read(&self, region: Region, offset: usize, into: &mut [u8]) {
        self.count_access(into.len());
        let mut rest = into;
        View::pieces(region, offset, rest.len(), |page, within, len| {
            let (frame, foreign) = self.machine.frame(self.domain, page);
            let (now, later) = core::mem::take(&mut rest).split_at_mut(len);
            now.copy_from_slice(&self.machine.page(frame)[within..within + len]);
            if foreign && self.machine.hostile[frame as usize] {
                self.machine.add_noise(now);
            }
            rest = later;
        });
    }

    fn write(&mut self, region: Region, offset: usize, from: &[u8]) {
        self.count_access(from.len());
        let mut rest = from;
        View::pieces(region, offset, from.len(), |page, within, len| {
            let (frame, _) = self.machine.frame(self.domain, page);
            let (now, later) = rest.split_at(len);
            self.machine.page_mut(frame)[within..within + len].copy_from_slice(now);
            rest = later;
        });
    }

    fn load_u32(&self, region: Region, offset: usize) -> u32 {
        assert!(offset.is_multiple_of(4), "an unaligned load");
        let mut bytes = [0; 4];
        self.read(region, offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn store_u32(&mut self, region: Region, offset: usize, value: u32) {
        assert!(offset.is_multiple_of(4), "an unaligned store");
        self.write(region, offset, &value.to_le_bytes());
    }

    fn fence(&self) {}

    fn move_bytes(&mut self, from: (Region, usize), to: (Region, usize), len: usize) {
        let mut done = 0;
        let mut page = [0; PAGE_BYTES];
        while done < len {
            let now = (len - done).min(PAGE_BYTES);
            self.read(from.0, from.1 + done, &mut page[..now]);
            self.write(to.0, to.1 + done, &page[..now]);
            done += now;
        }
    }

    fn zero(&mut self, region: Region, offset: usize, len: usize) {
        View::pieces(region, offset, len, |page, within, len| {
            let (frame, _) = self.machine.frame(self.domain, page);
            self.machine.page_mut(frame)[within..within + len].fill(0);
        });
    }

    fn grant(&mut self, domid: DomId, page: Region, writable: bool) -> Result<Gref, Refusal> {
        assert!(page.pages == 1);
        let (frame, foreign) = self.machine.frame(self.domain, page.first_page);
        assert!(!foreign, "a mapped page cannot be granted on");
        let entry = Grant { peer: domid.0, frame, writable, used: true, maps: 0 };
        let own = self.own();
        // The entry freed last is used first: whoever still uses it hits something else.
        if let Some(free) = own.grants_free.pop() {
            own.grants[free as usize] = entry;
            return Ok(Gref(free));
        }
        if own.grants.len() >= GRANTS_MAX {
            return Err(Refusal::Full);
        }
        own.grants.push(entry);
        Ok(Gref(own.grants.len() as u32 - 1))
    }

    fn revoke(&mut self, gref: Gref) -> bool {
        let grant = &mut self.own().grants[gref.0 as usize];
        assert!(grant.used, "revoked twice");
        grant.used = grant.maps > 0;
        let ended = !grant.used;
        if ended {
            self.own().grants_free.push(gref.0);
        }
        ended
    }

    fn map(&mut self, domid: DomId, grefs: &[Gref]) -> Result<Region, Refusal> {
        let first = self.own().free_run(grefs.len());
        for (index, gref) in grefs.iter().enumerate() {
            match self.map_one(domid, *gref) {
                Ok((frame, writable)) => {
                    let (domain, gref) = (domid.0, gref.0);
                    self.own().slots[first + index] =
                        Slot::Mapped { frame, domain, gref, writable };
                }
                Err(refusal) => {
                    (first..first + index).for_each(|page| self.unmap_one(page as u32));
                    return Err(refusal);
                }
            }
        }
        self.machine.cost_ns += 3000 + 500 * grefs.len() as u64;
        Ok(Region { first_page: first as u32, pages: grefs.len() as u32 })
    }

    fn unmap(&mut self, region: Region) {
        (region.first_page..region.first_page + region.pages).for_each(|page| self.unmap_one(page));
    }

    fn copy(&mut self, ops: &mut [GrantCopy]) {
        self.machine.cost_ns += 800 + 400 * ops.len() as u64;
        self.count(|calls| {
            calls.copies += 1;
            calls.copy_ops += ops.len() as u64;
        });
        for op in ops {
            op.status = self.machine.copy_one(self.domain, op);
            self.machine.copies_refused += u64::from(op.status != 0);
        }
    }

    fn bind_interdomain(&mut self, domid: DomId, remote: Port) -> Result<Port, Refusal> {
        let caller = self.domain;
        let einval = Refusal::Errno(-22);
        let peer = self.machine.domains.get(&domid.0).filter(|peer| peer.alive).ok_or(einval)?;
        let wanted = Channel::Unbound { peer: caller };
        if peer.ports.get(remote.0 as usize).is_none_or(|port| port.channel != wanted) {
            return Err(einval);
        }
        let port = self.machine.new_port(caller)?;
        let here = self.machine.port_mut(caller, port);
        // Xen raises the event once at binding: something may have been missed before.
        *here =
            PortState { channel: Channel::Bound { peer: domid.0, port: remote.0 }, pending: true };
        self.machine.port_mut(domid.0, remote.0).channel = Channel::Bound { peer: caller, port };
        Ok(Port(port))
    }

    fn alloc_unbound(&mut self, domid: DomId) -> Result<Port, Refusal> {
        let port = self.machine.new_port(self.domain)?;
        self.machine.port_mut(self.domain, port).channel = Channel::Unbound { peer: domid.0 };
        Ok(Port(port))
    }

    fn close_port(&mut self, port: Port) {
        assert!(self.machine.port_mut(self.domain, port.0).channel != Channel::Free);
        self.machine.close(self.domain, port.0);
    }

    fn notify(&mut self, port: Port) {
        self.machine.cost_ns += 700;
        self.count(|calls| calls.notifies += 1);
        if let Channel::Bound { peer, port } = self.machine.port_mut(self.domain, port.0).channel {
            self.machine.port_mut(peer, port).pending = true;
            self.machine.wake(peer);
        }
    }

    fn take_pending(&mut self, port: Port) -> bool {
        core::mem::take(&mut self.machine.port_mut(self.domain, port.0).pending)
    }
}

/// See [`Machine::dma`].
pub struct DeviceView<'a> {
    machine: &'a mut Machine,
    domain: u16,
}

impl DeviceView<'_> {
    /// The frame behind an address, and the offset in it: what an IOMMU would let pass.
    fn frame(&self, address: u64, len: usize) -> (u32, usize) {
        let (frame, within) = ((address >> 12) as u32, (address & 0xFFF) as usize);
        let owner = self.machine.owners.get(frame as usize);
        assert!(owner == Some(&self.domain), "a device reaches a frame of domain {owner:?}");
        assert!(within + len <= PAGE_BYTES, "a device access across a page");
        (frame, within)
    }
}

impl Dma for DeviceView<'_> {
    fn read(&self, address: u64, into: &mut [u8]) {
        let (frame, at) = self.frame(address, into.len());
        into.copy_from_slice(&self.machine.page(frame)[at..at + into.len()]);
    }
    fn write(&mut self, address: u64, from: &[u8]) {
        let (frame, at) = self.frame(address, from.len());
        self.machine.page_mut(frame)[at..at + from.len()].copy_from_slice(from);
    }
}

/// One device: the NVMe controller, if platter was given one.
impl Bus for View<'_> {
    fn map_mmio(&mut self, machine_address: u64, pages: usize) -> Result<Mmio, Refusal> {
        let ours = self.domain == S && self.machine.nvme.is_some();
        if !ours || machine_address != BAR0 {
            return Err(Refusal::Errno(-1));
        }
        Ok(Mmio { first_page: 0, pages: pages as u32 })
    }
    fn unmap_mmio(&mut self, _: Mmio) {}
    fn mmio_read_u32(&self, _: Mmio, offset: usize) -> u32 {
        let nvme = self.machine.nvme.as_ref();
        nvme.map_or(u32::MAX, |nvme| nvme.borrow().read_u32(offset))
    }
    fn mmio_write_u32(&mut self, _: Mmio, offset: usize, value: u32) {
        self.machine.doorbell |= offset >= DOORBELLS;
        if let Some(nvme) = &self.machine.nvme {
            nvme.borrow_mut().write_u32(offset, value);
        }
    }
}
