//! Every known frontend's sequence of states, the toolstack's, and their races, played against
//! the decision function as the kernel would call it. Would miss: what a frontend does with the
//! ring, and real delays.

use super::*;
use std::format;
use std::string::String;

/// A device and its surroundings; actions take effect at once.
struct World {
    view: View,
    /// States that our node has shown, by our own writes.
    shown: String,
    deleted: bool,
    forgotten: bool,
    connects: u32,
}

fn state(number: u8) -> XenbusState {
    XenbusState::parse(format!("{number}").as_bytes()).unwrap()
}

impl World {
    /// As the toolstack makes it: both ends at 1, online.
    fn new(kind: Kind) -> World {
        let view = View {
            kind,
            own: Some(XenbusState::Initialising),
            front: Some(XenbusState::Initialising),
            online: true,
            image: Image::Opening,
            rings: Rings::Down,
            connect_refused: false,
            memory: Memory::default(),
            now_ns: 1_000_000_000,
        };
        World { view, shown: String::new(), deleted: false, forgotten: false, connects: 0 }
    }

    /// A device whose image is open and whose InitWait dom0 has read.
    fn ready(kind: Kind) -> World {
        let mut world = World::new(kind);
        world.settle();
        world.view.image = Image::Ready;
        world.settle();
        assert_eq!(world.shown, "2");
        world.sleep(INIT_WAIT_VISIBLE_NS);
        world
    }

    fn connected() -> World {
        let mut world = World::ready(Kind::Vbd);
        world.front(3);
        world.front(4);
        assert_eq!((world.shown.as_str(), world.view.rings), ("24", Rings::Up));
        world
    }

    fn write(&mut self, state: XenbusState) {
        self.view.own = Some(state);
        self.view.memory.written(state, self.view.now_ns);
        self.shown.push((b'0' + state.number()) as char);
    }

    /// Decides and acts until there is nothing to do now.
    fn settle(&mut self) -> Action {
        for _ in 0..20 {
            let action = decide(&self.view);
            match action {
                Action::Wait | Action::WaitFor(_) => return action,
                Action::Publish => self.write(XenbusState::InitWait),
                Action::Connect => {
                    assert_eq!(self.view.rings, Rings::Down, "connected twice");
                    self.connects += 1;
                    self.view.rings = Rings::Up;
                    self.write(XenbusState::Connected);
                }
                Action::Release => {
                    assert_ne!(self.view.rings, Rings::Down, "released twice");
                    self.view.rings = Rings::Down;
                }
                Action::Write(state) => {
                    assert_ne!(self.view.own, Some(state), "written twice");
                    self.write(state);
                }
                Action::DeleteState => self.view.own = None,
                Action::DeleteBackend => {
                    assert_eq!(self.view.rings, Rings::Down);
                    self.view.own = None;
                    self.deleted = true;
                }
                Action::Forget => {
                    assert_eq!(self.view.rings, Rings::Down);
                    self.forgotten = true;
                    return action;
                }
            }
        }
        panic!("no rest: {:?}", self.view)
    }

    fn front(&mut self, number: u8) -> Action {
        self.view.front = Some(state(number));
        self.settle()
    }

    fn sleep(&mut self, ns: u64) -> Action {
        self.view.now_ns += ns;
        self.settle()
    }

    /// What libxl's generic remove writes, in one transaction.
    fn toolstack_removes(&mut self) -> Action {
        self.view.online = false;
        if self.view.own.is_some_and(|own| own != XenbusState::Closed) {
            self.view.own = Some(XenbusState::Closing);
        }
        self.settle()
    }

    fn own(&self) -> u8 {
        self.view.own.unwrap().number()
    }

    /// Closed is shown, rests a while, then the directory goes.
    fn assert_goes(&mut self) {
        assert_eq!(self.own(), 6);
        assert_eq!(self.view.rings, Rings::Down);
        assert!(!self.deleted, "dom0 must have time to read 6");
        self.sleep(CLOSED_VISIBLE_NS);
        assert!(self.deleted && self.forgotten);
    }
}

#[test]
fn state_texts() {
    for number in 0..=8u8 {
        assert_eq!(state(number).number(), number);
    }
    for bad in ["", "9", "04", " 4", "4\0", "-1", "44"] {
        assert_eq!(XenbusState::parse(bad.as_bytes()), None);
    }
}

#[test]
fn linux_connects_and_closes() {
    let mut world = World::connected();
    world.front(5);
    assert_eq!((world.own(), world.view.rings), (5, Rings::Up), "released at 6, not before");
    world.front(6);
    assert_eq!((world.own(), world.view.rings), (6, Rings::Down));
    world.front(1);
    world.front(3);
    world.front(4);
    assert_eq!(world.shown, "245624");
}

#[test]
fn init_wait_stays_visible_before_a_fast_frontend() {
    let mut world = World::new(Kind::Vbd);
    world.front(3);
    world.view.image = Image::Ready;
    assert_eq!(world.settle(), Action::WaitFor(INIT_WAIT_VISIBLE_NS));
    assert_eq!(world.sleep(INIT_WAIT_VISIBLE_NS - 1), Action::WaitFor(1));
    assert_eq!(world.own(), 2);
    world.sleep(1);
    assert_eq!(world.own(), 4);
    // Only the first time: nobody waits for a later one.
    for number in [6, 1, 3] {
        world.front(number);
    }
    assert_eq!(world.own(), 4);
}

#[test]
fn a_qdisk_is_not_held_back() {
    let mut world = World::new(Kind::Qdisk);
    world.front(3);
    world.view.image = Image::Ready;
    world.settle();
    assert_eq!(world.shown, "24");
}

#[test]
fn pvgrub2_jumps_to_closed_and_its_successor_connects() {
    let mut world = World::ready(Kind::Vbd);
    world.front(3);
    assert_eq!(world.own(), 4);
    world.front(6);
    assert_eq!((world.own(), world.view.rings), (6, Rings::Down));
    world.front(1);
    assert_eq!(world.own(), 2, "before Linux looks");
    world.front(3);
    world.front(4);
    assert_eq!((world.shown.as_str(), world.connects), ("24624", 2));
}

#[test]
fn pvgrub2_whose_return_to_1_was_merged() {
    let mut world = World::ready(Kind::Vbd);
    for number in [3, 6, 3] {
        world.front(number);
    }
    assert_eq!(world.shown, "24624");
}

#[test]
fn mini_os_and_ovmf_jump_to_connected_and_want_exactly_5_then_6() {
    let mut world = World::ready(Kind::Vbd);
    world.front(4);
    assert_eq!(world.own(), 4);
    world.front(5);
    assert_eq!(world.own(), 5, "OVMF takes 6 for an error here");
    world.front(6);
    assert_eq!(world.own(), 6);
    world.front(1);
    assert_eq!(world.own(), 2);
    assert_eq!(world.view.rings, Rings::Down);
}

#[test]
fn a_frontend_that_was_ready_before_us() {
    for ready in [3, 4] {
        let mut world = World::new(Kind::Vbd);
        assert_eq!(world.front(ready), Action::Wait, "the image is still opening");
        world.view.image = Image::Ready;
        world.settle();
        world.sleep(INIT_WAIT_VISIBLE_NS);
        assert_eq!(world.shown, "24");
    }
}

#[test]
fn windows_closes_before_it_ever_connects() {
    let mut world = World::ready(Kind::Vbd);
    for (front, own) in [(5, 5), (6, 6), (1, 2), (3, 4), (4, 4)] {
        world.front(front);
        assert_eq!(world.own(), own, "front {front}");
    }
    // And again on every resume.
    for (front, own) in [(5, 5), (6, 6), (1, 2), (3, 4)] {
        world.front(front);
        assert_eq!(world.own(), own, "front {front}");
    }
    assert_eq!(world.connects, 2);
}

#[test]
fn a_crash_kernel_starts_at_1_without_closing() {
    let mut world = World::connected();
    world.front(1);
    assert_eq!((world.own(), world.view.rings), (2, Rings::Down));
    world.front(3);
    assert_eq!((world.own(), world.connects), (4, 2));
}

#[test]
fn stale_or_missing_keys_leave_the_device_waiting() {
    let mut world = World::ready(Kind::Vbd);
    world.view.connect_refused = true;
    assert_eq!(world.front(3), Action::Wait);
    assert_eq!(world.own(), 2);
    world.view.connect_refused = false; // something of the frontend changed
    world.settle();
    assert_eq!(world.own(), 4);
}

#[test]
fn a_broken_ring_is_released_at_once_and_the_frontend_told() {
    let mut world = World::connected();
    world.view.rings = Rings::Broken;
    world.settle();
    assert_eq!((world.own(), world.view.rings), (5, Rings::Down));
    for (front, own) in [(5, 5), (6, 6), (1, 2), (3, 4)] {
        world.front(front);
        assert_eq!(world.own(), own);
    }
}

#[test]
fn the_frontend_directory_vanishes() {
    let mut world = World::connected();
    world.view.front = None;
    world.settle();
    assert_eq!((world.own(), world.view.rings), (6, Rings::Down));
    assert!(!world.deleted, "online: the toolstack has not asked");
    world.toolstack_removes();
    world.sleep(CLOSED_VISIBLE_NS);
    assert!(world.deleted);
}

#[test]
fn detach_from_a_running_guest() {
    let mut world = World::connected();
    assert_eq!(world.toolstack_removes(), Action::Wait, "the frontend closes first");
    assert_eq!((world.own(), world.view.rings), (5, Rings::Up));
    assert_eq!(world.front(5), Action::Wait);
    world.front(6);
    world.assert_goes();
}

#[test]
fn destroy_deletes_the_frontend_in_the_same_transaction() {
    let mut world = World::connected();
    world.view.front = None;
    world.toolstack_removes();
    world.assert_goes();
}

#[test]
fn removal_before_and_without_a_connection() {
    for front in [1, 3, 4, 6] {
        for image in [Image::Opening, Image::Ready, Image::Failed] {
            let mut world = World::new(Kind::Vbd);
            world.view.image = image;
            world.view.front = Some(state(front));
            world.toolstack_removes();
            world.assert_goes();
        }
    }
}

#[test]
fn removal_that_meets_a_closing_frontend() {
    // online=0 and state 5 arrive when we have written 5 ourselves: only online tells.
    let mut world = World::connected();
    world.front(5);
    world.toolstack_removes();
    assert_eq!((world.own(), world.view.rings), (5, Rings::Up));
    world.front(6);
    world.assert_goes();
}

#[test]
fn removal_that_meets_closed_and_reopening() {
    let mut world = World::connected();
    world.front(6);
    world.toolstack_removes(); // leaves 6 alone, sets online=0
    world.front(1);
    assert_eq!(world.own(), 6, "no way back");
    world.assert_goes();
}

#[test]
fn state_5_seen_before_online_0_ends_the_same() {
    // The two nodes are read one after the other: the removal may be half seen.
    for front in [1, 3, 4, 5, 6] {
        let mut world = World::ready(Kind::Vbd);
        world.front(front);
        world.view.own = Some(XenbusState::Closing);
        world.settle();
        world.view.front = None;
        world.view.online = false;
        world.settle();
        world.assert_goes();
    }
}

#[test]
fn dom0s_5_is_never_overwritten_while_the_frontend_is_connected() {
    let mut world = World::connected();
    world.view.own = Some(XenbusState::Closing); // online=0 is not read yet
    assert_eq!(world.settle(), Action::Wait);
    assert_eq!((world.own(), world.view.rings), (5, Rings::Up));
}

#[test]
fn online_0_alone_asks_the_frontend() {
    let mut world = World::connected();
    world.view.online = false;
    world.settle();
    assert_eq!(world.own(), 5);
    world.front(6);
    world.assert_goes();
}

#[test]
fn a_dying_guests_qdisk_gets_6_from_dom0_and_goes_at_once() {
    let mut world = World::ready(Kind::Qdisk);
    world.front(3);
    world.view.own = Some(XenbusState::Closed);
    world.settle();
    assert!(world.deleted && world.forgotten);
}

#[test]
fn dom0_deletes_everything_by_force() {
    let mut world = World::connected();
    (world.view.own, world.view.front, world.view.online) = (None, None, false);
    world.settle();
    assert!(world.forgotten && !world.deleted);
    assert_eq!(world.view.rings, Rings::Down);
}

#[test]
fn an_image_that_cannot_be_opened_fails_xl_create_at_once() {
    let mut world = World::new(Kind::Vbd);
    world.view.image = Image::Failed;
    world.settle();
    assert_eq!(world.view.own, None, "libxl reacts to the missing node");
    assert!(world.forgotten && !world.deleted, "the reason beside it stays");
    assert_eq!(world.shown, "");
}

#[test]
fn an_image_that_cannot_be_opened_closes_a_qdisk() {
    let mut world = World::new(Kind::Qdisk);
    world.view.image = Image::Failed;
    world.settle();
    assert_eq!(world.own(), 6);
    world.toolstack_removes();
    world.assert_goes();
}

#[test]
fn an_image_lost_while_connected_closes_the_device() {
    let mut world = World::connected();
    world.view.image = Image::Failed;
    world.settle();
    assert_eq!((world.own(), world.view.rings), (5, Rings::Down));
    world.front(5);
    assert_eq!(world.own(), 5);
    world.front(6);
    assert_eq!(world.own(), 6);
    assert_eq!(world.front(1), Action::Wait);
    world.view.image = Image::Ready;
    world.settle();
    assert_eq!(world.own(), 2, "it came back");
}

#[test]
fn nonsense_in_our_own_node_is_overwritten() {
    let mut world = World::connected();
    for number in [0, 1, 2, 3, 7, 8] {
        world.view.own = Some(state(number));
        world.settle();
        assert_eq!((world.own(), world.view.rings), (4, Rings::Up));
    }
}

#[test]
fn no_sequence_of_states_keeps_anything_after_removal() {
    // Every sequence of five frontend states, then a removal with the frontend dead.
    for code in 0..9u32.pow(5) {
        let mut world = World::ready(Kind::Vbd);
        let mut rest = code;
        for _ in 0..5 {
            world.front((rest % 9) as u8);
            rest /= 9;
        }
        world.view.front = None;
        world.toolstack_removes();
        world.assert_goes();
    }
}

#[test]
fn every_view_has_an_answer_that_makes_sense() {
    let states = || (0..=8).map(|n| Some(state(n))).chain([None]);
    for own in states() {
        for front in states() {
            for wrote in states() {
                for rings in [Rings::Down, Rings::Up, Rings::Broken, Rings::Releasing] {
                    for image in [Image::Opening, Image::Ready, Image::Failed] {
                        for online in [false, true] {
                            let mut memory = Memory::default();
                            wrote.inspect(|state| memory.written(*state, 0));
                            let view = View {
                                own,
                                front,
                                rings,
                                image,
                                online,
                                memory,
                                ..World::new(Kind::Vbd).view
                            };
                            check(&view);
                        }
                    }
                }
            }
        }
    }
}

fn check(view: &View) {
    match decide(view) {
        Action::Release => assert!(matches!(view.rings, Rings::Up | Rings::Broken), "{view:?}"),
        Action::Connect | Action::Forget | Action::DeleteBackend => {
            assert_eq!(view.rings, Rings::Down, "{view:?}");
        }
        Action::Write(state) => assert_ne!(view.own, Some(state), "{view:?}"),
        _ => {}
    }
}
