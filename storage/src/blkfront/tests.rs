//! The frontend against a model of blkback (`sim/src/blkback_model.rs`) under the block store,
//! through whole cycles of the handshake. Misses: xenstore itself, Linux's blkback (the rig).

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use platter_xen::DomId;
use platter_xen::vbd::BACK_KEYS;

use super::*;
use crate::blkback_model::BlkbackModel;
use crate::block_store::BlockStore;
use crate::fake::Fake;
use crate::harness::{Harness, pattern};
use crate::{Answer, Done, FileId, Store, Tag};

pub(super) struct World {
    pub hv: Fake,
    pub back: BlkbackModel,
    pub store: BlockStore<Blkfront>,
    /// What the backend's `state` node shows.
    pub state: Option<u8>,
    /// Our own nodes as last written.
    own: Vec<(String, String)>,
    newest_first: bool,
    /// What the backend was told to serve.
    pub params: Option<&'static [u8]>,
}

impl World {
    pub fn new(bytes: usize, sector_bytes: u32) -> World {
        let mut hv = Fake::new(4096);
        let back = BlkbackModel::new(DomId(0), alloc::vec![0; bytes], sector_bytes);
        let mut store = BlockStore::new(&mut hv, 512, 128).unwrap();
        store.attach("xvda", Blkfront::new(DomId(0), 51_712));
        let state = Some(2);
        World { hv, back, store, state, own: Vec::new(), newest_first: false, params: None }
    }

    pub fn front(&self) -> &Blkfront {
        self.store.device(0)
    }

    /// One look of the frontend at the backend's nodes.
    fn update(&mut self) -> FrontStep {
        let nodes = self.back.nodes.nodes();
        let value = |key: &&str| {
            let found = nodes.iter().find(|(name, _)| name == key);
            found.map(|(_, value)| value.clone().into_bytes())
        };
        let values: Vec<Option<Vec<u8>>> = BACK_KEYS.iter().map(value).collect();
        let values: [Option<Vec<u8>>; 12] = values.try_into().unwrap();
        let text = self.state.map(|state| state.to_string());
        let state = text.as_ref().map(|text| text.as_bytes());
        let (front, pool) = self.store.device_mut(0);
        let step = front.update(
            &mut self.hv,
            pool,
            BackNodes { state, params: self.params, values: &values },
        );
        if let FrontStep::Write(nodes) = &step {
            for (key, value) in nodes {
                self.own.retain(|(other, _)| other != key);
                self.own.push((key.clone(), value.clone()));
            }
        }
        step
    }

    fn node(&self, key: &str) -> Option<u32> {
        find(&self.own, key)
    }

    /// Both sides follow each other until neither moves.
    pub fn settle(&mut self) {
        for _ in 0..20 {
            let moved = matches!(self.update(), FrontStep::Write(_));
            let before = self.state;
            match (self.node("state"), self.state) {
                (Some(3), Some(2)) => {
                    let own = self.own.clone();
                    self.back.connect(&mut self.hv, &|key| find(&own, key));
                    self.state = Some(4);
                }
                (Some(5), Some(4)) => self.state = Some(5),
                (Some(6), Some(4 | 5)) => {
                    self.back.disconnect(&mut self.hv);
                    self.state = Some(6);
                }
                (Some(1), Some(6)) => self.state = Some(2),
                _ => {}
            }
            if !moved && before == self.state {
                return;
            }
        }
        panic!("no rest");
    }

    pub fn step(&mut self) {
        let newest = self.newest_first;
        let mut pick = |count: usize| if newest { count - 1 } else { 0 };
        self.back.step(&mut self.hv, 16, &mut pick);
    }

    pub fn poll(&mut self) -> Option<Done> {
        self.store.release(&mut self.hv);
        self.store.poll(&mut self.hv, 0)
    }

    pub fn open(&mut self) -> FileId {
        self.settle();
        assert!(self.front().is_connected());
        self.poll();
        self.open_path("xvda")
    }
}

fn find(nodes: &[(String, String)], key: &str) -> Option<u32> {
    let found = nodes.iter().find(|(name, _)| name == key);
    found.and_then(|(_, value)| value.parse().ok())
}

impl Harness for World {
    type Device = Blkfront;

    fn parts(&mut self) -> (&mut BlockStore<Blkfront>, &mut Fake) {
        (&mut self.store, &mut self.hv)
    }

    fn done(&mut self) -> Done {
        for _ in 0..1000 {
            if let Some(done) = self.poll() {
                return done;
            }
            self.step();
        }
        panic!("no answer");
    }
}

#[test]
fn connect_write_flush_read() {
    for sector in [512, 4096] {
        let mut world = World::new(1 << 20, sector);
        let file = world.open();
        assert_eq!((world.node("multi-queue-num-queues"), world.node("state")), (Some(4), Some(4)));
        assert_eq!(world.node("feature-persistent"), Some(1));
        // One sector up, direct, indirect, the largest.
        for (len, offset) in [(512, 512), (4096, 8192), (45_056, 65_536), (131_072, 1 << 19)] {
            let bytes = pattern(len);
            world.write_all(file, offset, &bytes);
            assert!(world.read(file, offset, len as u32) == bytes);
        }
        assert!(world.back.indirect >= 2);
        // More than there are pages of descriptors, one after the other.
        for _ in 0..INDIRECT_PAGES + 1 {
            world.write_all(file, 1 << 19, &pattern(131_072));
        }
        assert!(world.back.media.iter().all(|&byte| byte == 0), "still in the cache");
        assert_eq!(world.flush(file), Ok(Answer::Flushed));
        assert!(world.back.media[1 << 19..][..131_072] == pattern(131_072));
    }
}

#[test]
fn a_plain_old_backend_gets_eleven_segments_on_one_page_and_no_flush() {
    let mut world = World::new(1 << 20, 512);
    let nodes = &mut world.back.nodes;
    (nodes.indirect_segments_max, nodes.ring_page_order_max, nodes.flush) = (0, 0, false);
    (nodes.discard_granularity_bytes, nodes.barrier, nodes.queues_max) = (None, false, 1);
    let file = world.open();
    assert_eq!(world.node("ring-page-order"), None);
    assert_eq!(world.node("multi-queue-num-queues"), None);
    assert_eq!(world.write(1, file, 0, &pattern(131_072)), 45_056);
    assert_eq!(world.done().result, Ok(Answer::Written(45_056)));
    assert_eq!(world.flush(file), Ok(Answer::Flushed));
    assert_eq!(world.back.executed[2], 0);
    let refused = world.store.discard(&mut world.hv, Tag(1), file, 0, 4096);
    assert_eq!(refused, Err(StoreFault::Unsupported));
}

#[test]
fn a_backend_that_knows_only_barriers_is_flushed_by_empty_ones() {
    let mut world = World::new(1 << 20, 512);
    world.back.nodes.flush = false;
    let file = world.open();
    world.write_all(file, 0, &[5; 512]);
    assert_eq!(world.flush(file), Ok(Answer::Flushed));
    assert_eq!((world.back.executed[2], world.back.media[0]), (1, 5));
}

#[test]
fn queues_are_as_many_as_both_know_and_share_the_pages() {
    for (offered, order, queues, pages) in
        [(1, 4, 1, 4), (1, 1, 1, 2), (2, 4, 2, 2), (3, 4, 3, 1), (4, 0, 4, 1), (8, 4, 4, 1)]
    {
        let mut world = World::new(1 << 20, 512);
        (world.back.nodes.queues_max, world.back.nodes.ring_page_order_max) = (offered, order);
        let file = world.open();
        assert_eq!(world.node("multi-queue-num-queues").unwrap_or(1), queues);
        assert_eq!(1 << world.node("ring-page-order").unwrap_or(0), pages);
        world.back.faults.stalled = true;
        let most = (queues * pages * 32).min(128);
        for number in 0..most {
            assert!(world.write(number, file, u64::from(number) * 512, &[1; 512]) > 0);
        }
        let loads = world.front().rings.iter().map(FrontRing::outstanding);
        assert_eq!(loads.collect::<Vec<u32>>(), alloc::vec![pages * 32; queues as usize]);
        world.back.faults.stalled = false;
        for _ in 0..most {
            assert_eq!(world.done().result, Ok(Answer::Written(512)));
        }
    }
}

#[test]
fn a_new_cycle_has_the_next_backend_s_queues_in_the_same_directory() {
    // What an earlier cycle wrote of queues and pages stays there and must be written over.
    let mut world = World::new(1 << 20, 512);
    let file = world.open();
    let limits = [(1, 2), (4, 0), (1, 0), (2, 2), (1, 0), (8, 4)];
    for (round, (queues, order)) in limits.into_iter().enumerate() {
        world.back.faults.stalled = true;
        for number in 0..100 {
            let at = u64::from(number) * 4096;
            assert!(world.write(number, file, at, &[round as u8 + 1; 4096]) > 0);
        }
        world.step();
        world.state = Some(5);
        world.back.faults.stalled = false;
        (world.back.nodes.queues_max, world.back.nodes.ring_page_order_max) = (queues, order);
        world.settle();
        for _ in 0..100 {
            assert_eq!(world.done().result, Ok(Answer::Written(4096)));
        }
        assert_eq!(world.flush(file), Ok(Answer::Flushed));
        assert!(world.back.media[..100 * 4096].iter().all(|byte| *byte == round as u8 + 1));
        assert_eq!(world.front().ports().len(), queues.min(4) as usize);
    }
    assert_eq!(world.front().counters().connects, 7);
}

#[test]
fn an_answer_on_the_wrong_ring_breaks_it() {
    let mut world = World::new(1 << 20, 512);
    let file = world.open();
    world.back.faults.stalled = true;
    world.write(1, file, 0, &[5; 512]);
    world.write(2, file, 512, &[6; 512]);
    // Request 0 went to the first ring: its answer comes on the second.
    let ring = world.front().rings[1].region();
    world.hv.write(ring, 64, &[0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
    world.hv.store_u32(ring, 8, 1);
    assert_eq!(world.poll(), None);
    assert!(world.front().is_broken());
}

#[test]
fn many_operations_in_any_order() {
    let mut world = World::new(1 << 20, 512);
    let file = world.open();
    world.newest_first = true;
    let bytes = pattern(1 << 20);
    let (mut sent, mut answered) = (0, 0);
    while answered < 2048 {
        while sent < 2048 {
            let at = sent * 512;
            if world.write(sent as u32, file, at as u64, &bytes[at..at + 512]) == 0 {
                break;
            }
            sent += 1;
        }
        world.step();
        while let Some(done) = world.poll() {
            assert_eq!(done.result, Ok(Answer::Written(512)));
            answered += 1;
        }
    }
    assert_eq!(world.flush(file), Ok(Answer::Flushed));
    assert!(world.back.media == bytes);
}

#[test]
fn a_backend_that_closes_and_comes_back_gets_what_it_did_not_answer() {
    let mut world = World::new(1 << 20, 512);
    let file = world.open();
    world.back.faults.stalled = true;
    for tag in 0..40 {
        let bytes = alloc::vec![tag as u8 + 1; 60 * 1024];
        assert!(world.write(tag, file, u64::from(tag) * 4096, &bytes[..4096]) > 0);
    }
    assert_eq!(world.write(40, file, 1 << 19, &pattern(131_072)), 131_072);
    world.step();
    world.state = Some(5);
    world.back.faults.stalled = false;
    // The next one takes eleven segments only.
    world.back.nodes.indirect_segments_max = 0;
    world.settle();
    assert!(world.front().is_connected());
    for _ in 0..41 {
        assert!(matches!(world.done().result, Ok(Answer::Written(_))));
    }
    assert_eq!(world.flush(file), Ok(Answer::Flushed));
    for tag in 0..40usize {
        assert!(world.back.media[tag * 4096..][..4096].iter().all(|&b| b == tag as u8 + 1));
    }
    assert!(world.back.media[1 << 19..][..131_072] == pattern(131_072));
    assert_eq!(world.front().counters().connects, 2);
}

/// It takes its time from Closed to InitWait; our own write makes us look once more before.
#[test]
fn a_backend_that_is_slow_to_leave_closed_is_waited_for() {
    let mut world = World::new(1 << 20, 512);
    world.settle();
    world.state = Some(5);
    assert!(matches!(world.update(), FrontStep::Write(_)));
    assert!(matches!(world.update(), FrontStep::Write(_)));
    assert_eq!(world.node("state"), Some(6));
    world.back.disconnect(&mut world.hv);
    world.state = Some(6);
    assert!(matches!(world.update(), FrontStep::Write(_)));
    for _ in 0..3 {
        assert_eq!((world.update(), world.node("state")), (FrontStep::Wait, Some(1)));
    }
    world.state = Some(2);
    world.settle();
    assert!(world.front().is_connected());
}

#[test]
fn operations_wait_while_no_backend_is_there() {
    let mut world = World::new(1 << 20, 512);
    let file = world.open();
    world.back.disconnect(&mut world.hv);
    world.state = None;
    world.settle();
    assert!(world.write(1, file, 0, &[5; 512]) > 0);
    for _ in 0..10 {
        assert_eq!(world.poll(), None);
    }
    // A new backend shows itself closed first, then ready.
    world.state = Some(6);
    world.settle();
    assert_eq!(world.done().result, Ok(Answer::Written(512)));
}

#[test]
fn a_backend_that_vanishes_with_unflushed_writes_fails_the_next_flush() {
    let mut world = World::new(1 << 20, 512);
    let file = world.open();
    world.write_all(file, 0, &[5; 512]);
    world.back.power_cut(&mut |_| false);
    world.back.disconnect(&mut world.hv);
    world.state = None;
    world.settle();
    world.state = Some(6);
    world.settle();
    assert_eq!(world.flush(file), Err(StoreFault::Io(5)));
    assert_eq!(world.flush(file), Ok(Answer::Flushed));
}

#[test]
fn a_backend_that_closes_in_good_order_costs_no_flush() {
    let mut world = World::new(1 << 20, 512);
    let file = world.open();
    world.write_all(file, 0, &[5; 512]);
    world.state = Some(5);
    world.settle();
    assert_eq!(world.front().counters().connects, 2);
    assert_eq!(world.flush(file), Ok(Answer::Flushed));
}

#[test]
fn a_response_with_the_wrong_operation_breaks_the_ring() {
    let mut world = World::new(1 << 20, 512);
    let file = world.open();
    world.back.faults.stalled = true;
    world.write(1, file, 0, &[5; 512]);
    let ring = world.front().rings[0].region();
    // Request 0 was a WRITE; the answer says READ and success.
    let rsp_prod = world.hv.load_u32(ring, 8);
    let slot = 64 + rsp_prod as usize % 128 * 112;
    world.hv.write(ring, slot, &[0; 12]);
    world.hv.store_u32(ring, 8, rsp_prod + 1);
    assert_eq!(world.poll(), None);
    assert!(world.front().is_broken());
}

#[test]
fn a_response_to_nothing_breaks_the_ring_and_a_new_cycle_begins() {
    let mut world = World::new(1 << 20, 512);
    let file = world.open();
    world.back.faults.stalled = true;
    world.write(1, file, 0, &[5; 512]);
    // The backend answers request 77, operation READ: rsp_prod 1, first slot.
    let ring = world.front().rings[0].region();
    world.hv.write(ring, 64, &[77, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    world.hv.store_u32(ring, 8, 1);
    assert_eq!(world.poll(), None);
    assert!(world.front().is_broken());
    world.back.faults.stalled = false;
    world.settle();
    assert!(world.front().is_connected());
    assert_eq!(world.done().result, Ok(Answer::Written(512)));
    assert_eq!(world.front().counters().broken, 1);
}

#[test]
fn faults_are_answered() {
    let mut world = World::new(1 << 20, 512);
    let file = world.open();
    world.back.faults.fail = 2;
    world.write(1, file, 0, &[5; 512]);
    assert_eq!(world.done().result, Err(StoreFault::Io(5)));
    assert_eq!(world.flush(file), Err(StoreFault::Io(5)));
    (world.back.faults.fail, world.back.faults.fail_unsupported) = (1, true);
    assert_eq!(world.flush(file), Err(StoreFault::Unsupported));
    assert_eq!(world.flush(file), Ok(Answer::Flushed));
}

#[test]
fn discards_go_out_and_a_resize_is_seen() {
    let mut world = World::new(1 << 20, 512);
    let file = world.open();
    world.store.discard(&mut world.hv, Tag(1), file, 4096, 8192).unwrap();
    assert_eq!(world.done().result, Ok(Answer::Punched));
    assert_eq!(world.back.executed[3], 1);
    world.back.media.resize(2 << 20, 0);
    world.back.nodes.sectors = 4096;
    assert_eq!(world.update(), FrontStep::Wait);
    world.store.size(&mut world.hv, Tag(1), file).unwrap();
    assert_eq!(world.done().result, Ok(Answer::Size(2 << 20)));
    world.write_all(file, (2 << 20) - 4096, &[1; 4096]);
}

#[test]
fn pages_that_a_removed_disk_s_backend_may_write_come_back_when_it_lets_go() {
    let mut world = World::new(1 << 20, 512);
    let file = world.open();
    world.poll();
    let frames = world.hv.taken;
    world.back.faults.stalled = true;
    world.store.read(&mut world.hv, Tag(1), file, 0, 8192).unwrap();
    // It maps its rings and the pages of that read.
    let (rings, pages) = (512..516, 0..512);
    world.hv.keeps = rings.clone().chain(pages.clone()).map(Gref).collect();
    world.store.device_mut(0).0.remove();
    let mut now_ns = 0;
    let mut free = |world: &mut World| {
        now_ns += 1_000_000_000;
        world.store.release(&mut world.hv);
        assert_eq!(world.store.poll(&mut world.hv, now_ns), None);
        (world.store.device_mut(0).1.free_pages(), world.store.growth(0).lost_pages)
    };
    assert_eq!(world.done().result, Err(StoreFault::Gone));
    assert_eq!(free(&mut world), (510, 2));
    assert!(Store::<Fake>::poll_at_ns(&world.store).is_some());
    // While it can read its rings a page's grant is not made anew, though it maps no page.
    world.hv.keeps = rings.map(Gref).collect();
    assert_eq!(free(&mut world), (510, 2));
    world.hv.keeps = pages.map(Gref).collect();
    assert_eq!(free(&mut world), (510, 2));
    world.hv.keeps.clear();
    assert_eq!(free(&mut world), (512, 0));
    assert!(Store::<Fake>::made_room(&mut world.store));
    assert_eq!(world.hv.taken, frames - 4 - INDIRECT_PAGES);
    assert_eq!(world.store.read(&mut world.hv, Tag(1), file, 0, 512), Err(StoreFault::Gone));
    // The same domain serves it again.
    let (front, pool) = world.store.device_mut(0);
    front.replug(&mut world.hv, pool, DomId(0));
    world.back.disconnect(&mut world.hv);
    world.back.faults.stalled = false;
    world.state = Some(2);
    world.settle();
    world.write_all(file, 0, &pattern(4096));
    assert_eq!(world.hv.grants.iter().flatten().count(), 512 + 4 + INDIRECT_PAGES);
}

#[test]
fn a_pool_that_is_lost_fails_operations_instead_of_waiting_for_nothing() {
    let mut world = World::new(1 << 20, 512);
    let file = world.open();
    world.poll();
    world.back.faults.stalled = true;
    let mut sent = 0;
    while world.write(sent, file, 0, &[1; 131_072]) > 0 {
        sent += 1;
    }
    world.hv.keeps = (0..world.hv.grants.len() as u32).map(Gref).collect();
    let (front, pool) = world.store.device_mut(0);
    front.remove();
    front.replug(&mut world.hv, pool, DomId(0));
    for _ in 0..sent {
        assert_eq!(world.done().result, Err(StoreFault::Gone));
    }
    world.poll();
    assert_eq!(world.store.growth(0).lost_pages, 512);
    let lack = world.store.read(&mut world.hv, Tag(1), file, 0, 512);
    assert_eq!(lack, Err(StoreFault::Limit(0)));
}

#[test]
fn grants_that_are_refused_cost_nothing() {
    let mut world = World::new(1 << 20, 512);
    let frames = world.hv.taken;
    for most in [10, 512, 515, 520] {
        world.hv.grants_max = Some(most);
        for _ in 0..3 {
            assert!(matches!(world.update(), FrontStep::Refused(FrontFault::Refused(_))));
            assert_eq!(world.hv.taken, frames);
        }
    }
    world.hv.grants_max = None;
    world.open();
    assert_eq!(world.hv.grants.iter().flatten().count(), 512 + 4 + INDIRECT_PAGES);
}

#[test]
fn a_disk_whose_backend_died_waits_for_another_and_is_sent_everything_again() {
    let mut world = World::new(1 << 20, 512);
    let file = world.open();
    for round in 1..=6u16 {
        world.back.faults.stalled = true;
        world.write(1, file, 0, &[round as u8; 512]);
        world.step();
        world.back.disconnect(&mut world.hv);
        world.state = None;
        world.settle();
        world.store.device_mut(0).0.unplug();
        assert_eq!(world.poll(), None, "it waits");
        // A new driver domain: six of them need the pool's places for peers again.
        let (front, pool) = world.store.device_mut(0);
        front.replug(&mut world.hv, pool, DomId(round));
        world.back.faults.stalled = false;
        world.state = Some(2);
        world.settle();
        assert_eq!(world.done().result, Ok(Answer::Written(512)));
        let grants = world.hv.grants.iter().flatten().count();
        assert_eq!(grants, 512 + 4 + INDIRECT_PAGES, "old grants have ended");
    }
    assert_eq!(world.front().counters().resends, 6);
    assert_eq!(world.read(file, 0, 512), [6; 512]);
}

#[test]
fn operations_do_not_wait_for_a_backend_for_ever() {
    let mut world = World::new(1 << 20, 512);
    let file = world.open();
    world.back.faults.stalled = true;
    world.write(1, file, 0, &[5; 512]);
    world.back.disconnect(&mut world.hv);
    world.state = None;
    world.settle();
    world.write(2, file, 4096, &[6; 512]);
    assert_eq!(world.poll(), None);
    let due_ns = Store::<Fake>::poll_at_ns(&world.store).unwrap();
    let mut ended = Vec::new();
    while let Some(done) = world.store.poll(&mut world.hv, due_ns) {
        ended.push((done.tag, done.result));
    }
    for _ in 0..2 {
        ended.extend(world.store.poll(&mut world.hv, due_ns).map(|done| (done.tag, done.result)));
    }
    assert_eq!(ended, [(Tag(1), Err(StoreFault::Gone)), (Tag(2), Err(StoreFault::Gone))]);
    world.back.faults.stalled = false;
    world.state = Some(6);
    world.settle();
    world.poll();
    world.write_all(file, 0, &[7; 512]);
}

#[test]
fn two_disks_of_one_backend_share_the_grants_of_the_pool() {
    let mut hv = Fake::new(4096);
    let mut pool = Pool::new(&mut hv, 64).unwrap();
    let first = pool.grant_to(&mut hv, DomId(0)).unwrap();
    assert_eq!(pool.grant_to(&mut hv, DomId(0)), Ok(first));
    assert_ne!(pool.grant_to(&mut hv, DomId(3)), Ok(first));
    assert_eq!(hv.grants.len(), 128);
}
