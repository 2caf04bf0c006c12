//! The wire protocol against a server played by hand on the same page. Would miss: timing of a
//! real xenstored, quotas, oxenstored's habits.

use super::*;
use crate::fake::Fake;
use std::vec;

struct World {
    hv: Fake,
    page: Region,
    client: Client,
}

/// One message as the server sees it: type, req_id, tx_id, payload.
type Seen = (u32, u32, u32, Vec<u8>);

impl World {
    fn new() -> World {
        let mut hv = Fake::new(4);
        let page = hv.frames_alloc(1).unwrap();
        let port = hv.alloc_unbound(crate::DomId(0)).unwrap();
        let client = Client::new(&hv, page, port);
        World { hv, page, client }
    }

    /// Takes whatever bytes the client has put on the ring.
    fn server_bytes(&mut self) -> Vec<u8> {
        let prod = self.hv.load_u32(self.page, REQ_PROD);
        let mut cons = self.hv.load_u32(self.page, REQ_CONS);
        let mut bytes = vec![];
        while cons != prod {
            let mut one = [0];
            self.hv.read(self.page, REQ + (cons % RING_BYTES) as usize, &mut one);
            bytes.push(one[0]);
            cons = cons.wrapping_add(1);
        }
        self.hv.store_u32(self.page, REQ_CONS, cons);
        bytes
    }

    fn server_messages(&mut self) -> Vec<Seen> {
        let bytes = self.server_bytes();
        let mut rest = &bytes[..];
        let mut seen = vec![];
        while let Some(len) = message_bytes(rest).unwrap() {
            let payload = rest[HEADER_BYTES..len].to_vec();
            seen.push((word(rest, 0), word(rest, 1), word(rest, 2), payload));
            rest = &rest[len..];
        }
        assert!(rest.is_empty(), "a message is cut");
        seen
    }

    fn server_put(&mut self, bytes: &[u8]) {
        let mut prod = self.hv.load_u32(self.page, RSP_PROD);
        for byte in bytes {
            self.hv.write(self.page, RSP + (prod % RING_BYTES) as usize, &[*byte]);
            prod = prod.wrapping_add(1);
        }
        assert!(prod.wrapping_sub(self.hv.load_u32(self.page, RSP_CONS)) <= RING_BYTES);
        self.hv.store_u32(self.page, RSP_PROD, prod);
    }

    fn answer(&mut self, kind: u32, req_id: u32, payload: &[u8]) {
        self.server_put(&message(kind, req_id, payload));
    }

    fn read(&mut self, token: u32) {
        self.client.submit(TxId::NONE, Op::Read { path: "domid" }, Token(token)).unwrap();
    }

    fn poll(&mut self) -> Option<Event> {
        self.client.poll(&mut self.hv)
    }
}

fn message(kind: u32, req_id: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![];
    for word in [kind, req_id, 0, payload.len() as u32] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.extend_from_slice(payload);
    bytes
}

fn reply(token: u32, result: Result<&[u8], XsError>) -> Option<Event> {
    Some(Event::Reply { token: Token(token), result: result.map(<[u8]>::to_vec) })
}

#[test]
fn a_read_as_bytes() {
    let mut world = World::new();
    world.read(9);
    assert_eq!(world.poll(), None);
    let wanted = [2u32, 1, 0, 6].map(u32::to_le_bytes).concat();
    assert_eq!(world.server_bytes(), [&wanted[..], b"domid\0"].concat());
    assert_eq!(world.hv.notified[0], 1);
    world.answer(kind::READ, 1, b"5");
    assert_eq!(world.poll(), reply(9, Ok(b"5")));
    assert!(world.client.is_idle());
}

#[test]
fn payloads_of_every_operation() {
    let mut world = World::new();
    let ops: [(Op, u32, &[u8]); 10] = [
        (Op::Write { path: "data/a", value: b"v\0w" }, 11, b"data/a\0v\0w"),
        (Op::Mkdir { path: "data" }, 12, b"data\0"),
        (Op::Rm { path: "data" }, 13, b"data\0"),
        (Op::Directory { path: "/" }, 1, b"/\0"),
        (Op::Watch { path: "backend", watch: Token(3) }, 4, b"backend\x003\0"),
        (Op::Unwatch { path: "backend", watch: Token(3) }, 5, b"backend\x003\0"),
        (Op::TransactionStart, 6, b"\0"),
        (Op::TransactionEnd { commit: true }, 7, b"T\0"),
        (Op::GetDomainPath { domid: 17 }, 10, b"17\0"),
        (Op::SetPerms { path: "data", perms: &["n5", "r0"] }, 14, b"data\0n5\0r0\0"),
    ];
    for (index, (op, _, _)) in ops.iter().enumerate() {
        world.client.submit(TxId(7), *op, Token(index as u32)).unwrap();
    }
    assert_eq!(world.poll(), None);
    for (seen, (_, kind, payload)) in world.server_messages().into_iter().zip(ops) {
        assert_eq!((seen.0, seen.2, &seen.3[..]), (kind, 7, payload));
    }
}

#[test]
fn messages_larger_than_the_ring_pass_in_pieces_both_ways() {
    let mut world = World::new();
    let value = vec![0x5a; 4000];
    world.client.submit(TxId::NONE, Op::Write { path: "a", value: &value }, Token(1)).unwrap();
    let mut sent = vec![];
    while sent.len() < 4018 {
        assert_eq!(world.poll(), None);
        let piece = world.server_bytes();
        assert!(!piece.is_empty());
        sent.extend(piece);
    }
    assert_eq!(sent[18..], value[..]);
    let answer = message(kind::WRITE, 1, &[7; 4096]);
    let mut last = None;
    for piece in answer.chunks(1000) {
        assert_eq!(last, None);
        world.server_put(piece);
        last = world.poll();
    }
    assert_eq!(last, reply(1, Ok(&[7; 4096])));
}

#[test]
fn indexes_pass_two_to_the_thirty_two() {
    let mut world = World::new();
    for index in [REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD] {
        world.hv.store_u32(world.page, index, u32::MAX - 3);
    }
    world.client = Client::new(&world.hv, world.page, world.client.port());
    world.read(1);
    world.poll();
    let seen = world.server_messages();
    world.answer(kind::READ, seen[0].1, b"hello");
    assert_eq!(world.poll(), reply(1, Ok(b"hello")));
}

#[test]
fn never_more_than_sixteen_on_the_wire() {
    let mut world = World::new();
    for token in 0..40 {
        world.read(token);
    }
    assert_eq!(world.poll(), None);
    let mut seen = world.server_messages();
    assert_eq!(seen.len(), 16);
    for token in 0..40 {
        let (kind, req_id, ..) = seen.remove(0);
        world.answer(kind, req_id, b"x");
        assert_eq!(world.poll(), reply(token, Ok(b"x")));
        assert_eq!(world.poll(), None);
        seen.extend(world.server_messages());
        assert!(seen.len() <= 16);
    }
}

#[test]
fn the_queue_is_bounded() {
    let mut world = World::new();
    for token in 0..QUEUE_MAX as u32 {
        world.read(token);
    }
    let more = world.client.submit(TxId::NONE, Op::TransactionStart, Token(0));
    assert_eq!(more, Err(NotQueued::Full));
    let mut world = World::new();
    let big = Op::Write { path: "a", value: &[0; 4000] };
    let taken =
        (0..QUEUE_MAX).take_while(|_| world.client.submit(TxId::NONE, big, Token(0)).is_ok());
    assert_eq!(taken.count(), QUEUE_BYTES_MAX / 4018, "bytes are bounded too");
}

#[test]
fn errors_have_names() {
    let mut world = World::new();
    let errors: [(&[u8], XsError); 5] = [
        (b"ENOENT\0", XsError::NoEnt),
        (b"EACCES\0", XsError::Access),
        (b"EAGAIN\0", XsError::Again),
        (b"ENOSPC\0", XsError::NoSpace),
        (b"nonsense", XsError::Other),
    ];
    for (text, error) in errors {
        world.read(1);
        world.poll();
        let req_id = world.server_messages()[0].1;
        world.answer(kind::ERROR, req_id, text);
        assert_eq!(world.poll(), reply(1, Err(error)));
    }
}

fn watch(world: &mut World, path: &str, token: u32) {
    let op = Op::Watch { path, watch: Token(token) };
    world.client.submit(TxId::NONE, op, Token(0)).unwrap();
    world.poll();
    let req_id = world.server_messages()[0].1;
    world.answer(kind::WATCH, req_id, b"OK\0");
    assert_eq!(world.poll(), reply(0, Ok(b"OK\0")));
}

fn fire(world: &mut World, payload: &str) {
    world.answer(kind::WATCH_EVENT, 0, payload.as_bytes());
}

#[test]
fn a_storm_on_one_path_is_one_event() {
    let mut world = World::new();
    watch(&mut world, "/b", 4);
    for _ in 0..20 {
        fire(&mut world, "/b/1/state\x004\0");
    }
    let event = Event::Watch { path: "/b/1/state".into(), watch: Token(4) };
    assert_eq!(world.poll(), Some(event));
    assert_eq!(world.poll(), None);
}

#[test]
fn a_storm_on_many_paths_collapses_into_the_watch() {
    let mut world = World::new();
    watch(&mut world, "/b", 4);
    watch(&mut world, "/c", 5);
    fire(&mut world, "/c/x\x005\0");
    // Straight into the table: as if the server refilled the ring while the client drained it.
    for index in 0..1000 {
        world.client.note_event(format!("/b/{index}\x004\0").as_bytes());
        assert!(world.client.events.len() <= EVENTS_MAX);
    }
    let c = Event::Watch { path: "/c/x".into(), watch: Token(5) };
    let b = Event::Watch { path: "/b".into(), watch: Token(4) };
    assert_eq!([world.poll(), world.poll(), world.poll()], [Some(c), Some(b), None]);
}

#[test]
fn events_of_no_watch_and_nonsense_are_forgotten() {
    let mut world = World::new();
    watch(&mut world, "/b", 4);
    for payload in ["/b\x005\0", "/b\0four\0", "/b", "", "\x004\0", "/b\x0099999999999\0"] {
        fire(&mut world, payload);
    }
    assert_eq!(world.poll(), None);
    let op = Op::Unwatch { path: "/b", watch: Token(4) };
    world.client.submit(TxId::NONE, op, Token(0)).unwrap();
    fire(&mut world, "/b\x004\0");
    assert_eq!(world.poll(), None);
}

#[test]
fn a_refused_watch_yields_no_events() {
    let mut world = World::new();
    let op = Op::Watch { path: "/b", watch: Token(4) };
    world.client.submit(TxId::NONE, op, Token(0)).unwrap();
    world.poll();
    world.answer(kind::ERROR, 1, b"EACCES\0");
    assert_eq!(world.poll(), reply(0, Err(XsError::Access)));
    fire(&mut world, "/b\x004\0");
    assert_eq!(world.poll(), None);
}

#[test]
fn what_breaks_the_connection() {
    let oversized = [1u32, 1, 0, 4097].map(u32::to_le_bytes).concat();
    let unasked = message(kind::READ, 77, b"x");
    let wrong_type = message(kind::WRITE, 1, b"x");
    let cases =
        [(oversized, Broken::Length), (unasked, Broken::Reply), (wrong_type, Broken::Reply)];
    for (bytes, broken) in cases {
        let mut world = World::new();
        world.read(1);
        world.poll();
        world.server_put(&bytes);
        assert_eq!(world.poll(), Some(Event::Dead(broken)));
        assert_eq!(world.poll(), None);
        let after = world.client.submit(TxId::NONE, Op::TransactionStart, Token(0));
        assert_eq!(after, Err(NotQueued::Dead));
    }
    let mut world = World::new();
    world.hv.store_u32(world.page, RSP_PROD, 1025);
    assert_eq!(world.poll(), Some(Event::Dead(Broken::Index)));
}

#[test]
fn a_broken_connection_is_reset_where_the_server_can() {
    let mut world = World::new();
    world.hv.store_u32(world.page, SERVER_FEATURES, FEATURE_RECONNECTION);
    world.hv.store_u32(world.page, RSP_PROD, 5000);
    assert_eq!(world.poll(), None);
    assert_eq!(world.hv.load_u32(world.page, CONNECTION), RECONNECT);
    for index in [REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD] {
        world.hv.store_u32(world.page, index, 0);
    }
    assert_eq!(world.poll(), None, "the server has not finished");
    world.hv.store_u32(world.page, CONNECTION, CONNECTED);
    assert_eq!(world.poll(), Some(Event::Reset));
    world.read(3);
    world.poll();
    let req_id = world.server_messages()[0].1;
    world.answer(kind::READ, req_id, b"5");
    assert_eq!(world.poll(), reply(3, Ok(b"5")));
}

#[test]
fn insane_paths_never_reach_the_wire() {
    let mut world = World::new();
    for path in ["", "/local/domain/", "a//b", "a\0b", &"x".repeat(3073)] {
        let refused = world.client.submit(TxId::NONE, Op::Read { path }, Token(0));
        assert_eq!(refused, Err(NotQueued::BadPath));
    }
    let long = Op::Write { path: "a", value: &[0; 4096] };
    assert_eq!(world.client.submit(TxId::NONE, long, Token(0)), Err(NotQueued::TooLong));
}

#[test]
fn numbers_and_names() {
    assert_eq!(decimal(b"51712"), Some(51712));
    assert_eq!(decimal(b"18446744073709551615"), Some(u64::MAX));
    for bad in ["18446744073709551616", "", "-1", "+1", " 1", "1 ", "0x1", "1\0"] {
        assert_eq!(decimal(bad.as_bytes()), None, "{bad}");
    }
    assert_eq!(names(b"vbd\0qdisk\0\xff\0").collect::<Vec<_>>(), ["vbd", "qdisk"]);
    assert_eq!(TxId::parse(b"42\0"), Some(TxId(42)));
    assert_eq!(TxId::parse(b"0\0"), None);
}

#[test]
fn random_bytes_from_the_server_never_panic_nor_pile_up() {
    let mut seed = 1u32;
    let mut next = || {
        seed ^= seed << 13;
        seed ^= seed >> 17;
        seed ^= seed << 5;
        seed
    };
    let mut ends = [0; 3];
    for _ in 0..2000 {
        let mut world = World::new();
        watch(&mut world, "/b", 4);
        for _ in 0..10 {
            world.read(1);
            assert_eq!(world.poll(), None);
            let kind =
                [kind::READ, kind::WATCH_EVENT, kind::ERROR, next() % 20][next() as usize % 4];
            let oldest = world.client.in_flight.first().map_or(0, |entry| entry.req_id);
            let mut bytes = message(kind, oldest, b"/b/1/state\x004\0");
            match next() % 12 {
                0 => bytes[next() as usize % 16] ^= 1 << (next() % 8),
                1 => bytes.truncate(next() as usize % bytes.len()),
                _ => {}
            }
            let there = world.hv.load_u32(world.page, RSP_PROD);
            let there = there.wrapping_sub(world.hv.load_u32(world.page, RSP_CONS));
            if there as usize + bytes.len() <= RING_BYTES as usize {
                world.server_put(&bytes);
            }
            while let Some(event) = world.poll() {
                ends[match event {
                    Event::Reply { .. } => 0,
                    Event::Watch { .. } => 1,
                    Event::Reset | Event::Dead(_) => 2,
                }] += 1;
            }
            world.server_bytes();
            assert!(world.client.incoming.capacity() <= 3 * PAYLOAD_BYTES_MAX);
            if matches!(world.client.state, State::Dead) {
                break;
            }
        }
    }
    assert!(ends.iter().all(|count| *count > 100), "each kind was reached: {ends:?}");
}
