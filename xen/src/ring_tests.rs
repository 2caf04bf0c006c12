//! Ring arithmetic at both ends. Would miss: real memory ordering (a fence left out), and a
//! peer that writes between two of our loads.

use super::*;
use crate::blkif::{self, Segment, op};
use crate::fake::Fake;
use crate::{Gref, Hypervisor};

const ABIS: [Abi; 2] = [Abi::X86_64, Abi::X86_32];

fn pair(pages: usize, abi: Abi) -> (Fake, FrontRing, BackRing) {
    let mut hv = Fake::new(64);
    let region = hv.frames_alloc(pages).unwrap();
    let front = FrontRing::init(&mut hv, region, abi);
    let back = BackRing::attach(&hv, region, abi).unwrap();
    (hv, front, back)
}

fn request(abi: Abi, id: u64) -> RawRequest {
    let segment = Segment { gref: Gref(id as u32), first_sect: 0, last_sect: 7 };
    blkif::emit_transfer(abi, op::READ, id, 0, id * 8, &[segment])
}

#[test]
fn every_slot_of_every_size_comes_back_with_its_own_id() {
    for abi in ABIS {
        for pages in [1, 2, 4, 8, 16] {
            let (mut hv, mut front, mut back) = pair(pages, abi);
            let slots = pages as u64 * 32;
            // Three times round, so that indexes pass the ring's end.
            for lap in 0..3 {
                for id in 0..slots {
                    assert!(front.put(&mut hv, &request(abi, lap * slots + id)));
                }
                assert!(!front.put(&mut hv, &request(abi, 0)), "a full ring takes no more");
                front.publish(&mut hv);
                for id in 0..slots {
                    let (raw, permit) = back.take(&hv).unwrap().unwrap();
                    let mut whole = request(abi, lap * slots + id);
                    whole[abi.request_bytes()..].fill(0);
                    assert_eq!(raw, whole);
                    back.complete(permit, &mut hv, Status::Okay);
                }
                assert!(back.take(&hv).unwrap().is_none());
                back.publish(&mut hv);
                for id in 0..slots {
                    let response = front.take(&hv).unwrap().unwrap();
                    assert_eq!(response.id, lap * slots + id);
                    assert_eq!(response.status, 0);
                }
                assert!(front.take(&hv).unwrap().is_none());
            }
        }
    }
}

#[test]
fn a_producer_beyond_the_ring_breaks_it_for_good() {
    let (mut hv, front, mut back) = pair(1, Abi::X86_64);
    hv.store_u32(front.region(), REQ_PROD, 33);
    assert!(matches!(back.take(&hv), Err(RingBroken::ProducerBeyond { prod: 33, cons: 0 })));
    hv.store_u32(front.region(), REQ_PROD, 1);
    assert!(matches!(back.take(&hv), Err(RingBroken::Already)));
    assert!(back.is_broken());
}

#[test]
fn a_producer_running_backwards_breaks_the_ring() {
    let (mut hv, mut front, mut back) = pair(1, Abi::X86_64);
    front.put(&mut hv, &request(Abi::X86_64, 1));
    front.publish(&mut hv);
    let (_, permit) = back.take(&hv).unwrap().unwrap();
    back.complete(permit, &mut hv, Status::Okay);
    hv.store_u32(front.region(), REQ_PROD, 0);
    assert!(back.take(&hv).is_err());
}

#[test]
fn a_producer_running_back_into_taken_requests_breaks_the_ring() {
    let (mut hv, mut front, mut back) = pair(1, Abi::X86_64);
    for id in 0..2 {
        front.put(&mut hv, &request(Abi::X86_64, id));
    }
    front.publish(&mut hv);
    let permits = [(); 2].map(|()| back.take(&hv).unwrap().unwrap().1);
    hv.store_u32(front.region(), REQ_PROD, 1);
    assert!(back.take(&hv).is_err());
    permits.into_iter().for_each(Permit::abandon);
}

#[test]
fn a_front_asks_for_the_next_response_before_it_sleeps() {
    let (mut hv, mut front, mut back) = pair(1, Abi::X86_64);
    for id in 0..2 {
        front.put(&mut hv, &request(Abi::X86_64, id));
        front.publish(&mut hv);
        let (_, permit) = back.take(&hv).unwrap().unwrap();
        back.complete(permit, &mut hv, Status::Okay);
        assert!(back.publish(&mut hv), "response {id} wakes the front");
        assert!(front.final_check(&mut hv).unwrap(), "there is a response");
        front.take(&hv).unwrap().unwrap();
        assert!(!front.final_check(&mut hv).unwrap());
    }
}

#[test]
fn unanswered_requests_keep_their_slots() {
    let (mut hv, mut front, mut back) = pair(1, Abi::X86_32);
    for id in 0..32 {
        front.put(&mut hv, &request(Abi::X86_32, id));
    }
    front.publish(&mut hv);
    let (_, permit) = back.take(&hv).unwrap().unwrap();
    // The slot of an unanswered request is filled again: more than the ring holds.
    hv.store_u32(front.region(), REQ_PROD, 33);
    assert!(back.take(&hv).is_err());
    back.complete(permit, &mut hv, Status::Error);
    assert!(!back.publish(&mut hv), "nothing is published on a broken ring");
}

#[test]
fn indexes_pass_two_to_the_thirty_two() {
    let (mut hv, front, _) = pair(1, Abi::X86_64);
    let start = u32::MAX - 1;
    hv.store_u32(front.region(), RSP_PROD, start);
    hv.store_u32(front.region(), REQ_PROD, start.wrapping_add(4));
    let mut back = BackRing::attach(&hv, front.region(), Abi::X86_64).unwrap();
    for _ in 0..4 {
        let (_, permit) = back.take(&hv).unwrap().unwrap();
        back.complete(permit, &mut hv, Status::Okay);
    }
    assert!(back.take(&hv).unwrap().is_none());
    back.publish(&mut hv);
    assert_eq!(hv.load_u32(front.region(), RSP_PROD), 2);
}

#[test]
fn attach_refuses_indexes_that_do_not_fit() {
    let (mut hv, front, _) = pair(1, Abi::X86_64);
    hv.store_u32(front.region(), RSP_PROD, 5);
    assert!(BackRing::attach(&hv, front.region(), Abi::X86_64).is_err());
}

#[test]
fn the_peer_is_told_only_when_it_asked() {
    let (mut hv, mut front, mut back) = pair(1, Abi::X86_64);
    front.put(&mut hv, &request(Abi::X86_64, 1));
    assert!(front.publish(&mut hv), "req_event starts at 1");
    front.put(&mut hv, &request(Abi::X86_64, 2));
    assert!(!front.publish(&mut hv), "the backend has not asked again");
    for _ in 0..2 {
        let (_, permit) = back.take(&hv).unwrap().unwrap();
        back.complete(permit, &mut hv, Status::Okay);
    }
    assert!(!back.final_check(&mut hv).unwrap());
    assert!(back.publish(&mut hv));
    assert!(!back.publish(&mut hv), "nothing new");
    front.put(&mut hv, &request(Abi::X86_64, 3));
    assert!(front.publish(&mut hv), "final_check asked");
    assert!(back.final_check(&mut hv).unwrap(), "there is a request");
}

#[test]
fn a_backend_that_answers_what_was_never_asked_breaks_the_front() {
    let (mut hv, mut front, _) = pair(1, Abi::X86_64);
    hv.store_u32(front.region(), RSP_PROD, 1);
    assert!(front.take(&hv).is_err());
}

#[test]
#[should_panic(expected = "permit was dropped")]
fn a_dropped_permit_is_noticed() {
    let (mut hv, mut front, mut back) = pair(1, Abi::X86_64);
    front.put(&mut hv, &request(Abi::X86_64, 1));
    front.publish(&mut hv);
    drop(back.take(&hv));
}
