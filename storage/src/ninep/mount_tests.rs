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
fn a_smaller_server_than_before_waits_until_the_old_one_lets_go() {
    let mut world = World::unmounted(Server::new(false), 100);
    let frames = world.hv.frames_left();
    update(&mut world, back("2"));
    update(&mut world, back("4"));
    update(&mut world, back("6"));
    update(&mut world, back("6"));
    let held = world.hv.grants[4].take(); // still mapped, to the fake
    let fewer = BackNodes { max_rings: Some(b"1"), ..back("2") };
    for _ in 0..2 {
        assert_eq!(update(&mut world, fewer), MountStep::Refused(MountFault::Shrunk));
    }
    // Even if the old offer comes back: some of the rings are gone.
    assert_eq!(update(&mut world, back("2")), MountStep::Refused(MountFault::Shrunk));
    world.hv.grants[4] = held;
    assert_eq!(state_written(update(&mut world, fewer)), "3");
    assert_eq!(frames - world.hv.frames_left(), 65, "one ring of order 6 fits 100 frames");
}

#[test]
fn a_server_that_cannot_do_is_not_asked_in_a_loop() {
    let mut server = Server::new(false);
    server.msize_max = 100;
    let mut world = World::unmounted(server, 100);
    for _ in 0..40 {
        world.handshake_once();
        world.poll_all();
    }
    let refused =
        MountStep::Refused(MountFault::GivenUp("the 9p server wants an unusable message size"));
    assert_eq!(world.step(), refused);
    assert_eq!(world.server.served[&100], 2 * FAILURES_MAX, "two dialects, three times");
    // A new server starts at 1.
    assert_eq!(state_written(update(&mut world, back("1"))), "1");
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
