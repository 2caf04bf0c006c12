//! The handshake with a server that comes late, goes and comes back. Would miss: what a real
//! toolstack writes in between.

use super::*;
use crate::ninep::testing::{Server, World};

fn back(state: &'static str) -> BackNodes<'static> {
    BackNodes {
        state: Some(state.as_bytes()),
        versions: Some(b"1"),
        max_rings: Some(b"2"),
        max_ring_page_order: Some(b"9"),
    }
}

fn update(world: &mut World, back: BackNodes) -> MountStep {
    world.mount.update(&mut world.hv, &mut world.client, back)
}

fn state_written(step: MountStep) -> String {
    let MountStep::Write(nodes) = step else { panic!("{step:?}") };
    let (name, value) = nodes.last().unwrap().clone();
    assert_eq!(name, "state", "the state comes last");
    value
}

#[test]
fn a_server_that_comes_late() {
    let mut world = World::unmounted(Server::new(false), 100);
    for _ in 0..3 {
        assert_eq!(update(&mut world, BackNodes::default()), MountStep::Wait);
        assert_eq!(update(&mut world, back("1")), MountStep::Wait);
    }
    let MountStep::Write(nodes) = update(&mut world, back("2")) else { panic!() };
    let names: Vec<_> = nodes.iter().map(|(name, _)| name.as_str()).collect();
    let wanted = [
        "version",
        "num-rings",
        "ring-ref0",
        "event-channel-0",
        "ring-ref1",
        "event-channel-1",
        "state",
    ];
    assert_eq!(names, wanted);
    assert_eq!(nodes[6].1, "3");
    assert_eq!(update(&mut world, back("2")), MountStep::Wait);
    assert_eq!(world.client.session(), Session::Down, "not before the backend shows 4");
    let step = update(&mut world, back("4"));
    assert_eq!(state_written(step), "4");
    assert_eq!(update(&mut world, back("4")), MountStep::Wait);
}

#[test]
fn rings_take_no_more_than_their_frames() {
    for frames in [6, 40, 100, 600] {
        let mut world = World::unmounted(Server::new(false), frames);
        let before = world.hv.frames_left();
        assert_eq!(state_written(update(&mut world, back("2"))), "3");
        assert!(before - world.hv.frames_left() <= frames);
    }
    let mut world = World::unmounted(Server::new(false), 2);
    let refused = MountStep::Refused(MountFault::Offer(OfferFault::Frames));
    assert_eq!(update(&mut world, back("2")), refused);
}

#[test]
fn frames_that_are_not_there_are_given_back() {
    let mut world = World::unmounted(Server::new(false), 600);
    world.hv.frames_max = 400;
    let before = world.hv.frames_left();
    let step = update(&mut world, back("2"));
    assert_eq!(step, MountStep::Refused(MountFault::Setup(SetupFault::NoFrames)));
    assert_eq!(world.hv.frames_left(), before);
}

#[test]
fn every_way_of_going_leads_back() {
    for gone in ["0", "1", "2", "3", "5", "6"] {
        let mut world = World::unmounted(Server::new(false), 100);
        update(&mut world, back("2"));
        update(&mut world, back("4"));
        let step = update(&mut world, back(gone));
        let fresh = matches!(gone, "1" | "2");
        assert_eq!(state_written(step), if fresh { "1" } else { "6" }, "{gone}");
        assert_eq!(world.client.session(), Session::Down);
        if !fresh {
            assert_eq!(update(&mut world, back("5")), MountStep::Wait);
            assert_eq!(state_written(update(&mut world, back("6"))), "1");
        }
        assert_eq!(state_written(update(&mut world, back("2"))), "3");
        assert_eq!(state_written(update(&mut world, back("4"))), "4");
    }
}

#[test]
fn a_smaller_server_than_before_is_refused_with_a_reason() {
    let mut world = World::unmounted(Server::new(false), 100);
    update(&mut world, back("2"));
    update(&mut world, back("4"));
    update(&mut world, back("6"));
    update(&mut world, back("6"));
    let fewer = BackNodes { max_rings: Some(b"1"), ..back("2") };
    assert_eq!(update(&mut world, fewer), MountStep::Refused(MountFault::Shrunk));
    assert_eq!(state_written(update(&mut world, back("2"))), "3");
}

#[test]
fn hostile_offers() {
    let mut world = World::unmounted(Server::new(false), 100);
    for versions in [None, Some(&b""[..]), Some(b"2")] {
        let step = update(&mut world, BackNodes { versions, ..back("2") });
        assert_eq!(step, MountStep::Refused(MountFault::Offer(OfferFault::Version)));
    }
    let step = update(&mut world, BackNodes { max_rings: Some(b"0"), ..back("2") });
    assert_eq!(step, MountStep::Refused(MountFault::Offer(OfferFault::Rings)));
    for state in ["", "44", "-1", "4\0"] {
        assert_eq!(update(&mut world, back(state)), MountStep::Wait);
    }
}
