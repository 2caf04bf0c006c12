//! Ring arithmetic, layout and handshake of 9pfs. Would miss: a server that maps and acts at
//! the same time as we do.

use super::*;
use crate::fake::Fake;
use std::vec;

fn ring(order: u32) -> (Fake, FrontRing) {
    let mut hv = Fake::new(2000);
    let ring = FrontRing::new(&mut hv, DomId(0), order).unwrap();
    (hv, ring)
}

/// A server's side: takes `len` bytes of requests.
fn server_take(hv: &mut Fake, ring: &FrontRing, len: u32) -> Vec<u8> {
    let prod = hv.load_u32(ring.interface, OUT_PROD);
    let cons = hv.load_u32(ring.interface, OUT_CONS);
    assert!(ring.half.queued(prod, cons).unwrap() >= len);
    let mut bytes = vec![0; len as usize];
    let base = ring.half_bytes() as usize;
    let [first, second] = ring.half.split(cons, len);
    hv.read(ring.data, base + first.0 as usize, &mut bytes[..first.1 as usize]);
    hv.read(ring.data, base + second.0 as usize, &mut bytes[first.1 as usize..]);
    hv.store_u32(ring.interface, OUT_CONS, cons.wrapping_add(len));
    bytes
}

fn server_put(hv: &mut Fake, ring: &FrontRing, bytes: &[u8]) {
    let prod = hv.load_u32(ring.interface, IN_PROD);
    let [first, second] = ring.half.split(prod, bytes.len() as u32);
    hv.write(ring.data, first.0 as usize, &bytes[..first.1 as usize]);
    hv.write(ring.data, second.0 as usize, &bytes[first.1 as usize..]);
    hv.store_u32(ring.interface, IN_PROD, prod.wrapping_add(bytes.len() as u32));
}

fn message(size: u32, tag: u16, fill: u8) -> Vec<u8> {
    let mut bytes = Vec::from(size.to_le_bytes());
    bytes.push(117);
    bytes.extend_from_slice(&tag.to_le_bytes());
    bytes.resize(size as usize, fill);
    bytes
}

#[test]
fn the_interface_page_as_bytes() {
    let (hv, ring) = ring(2);
    let mut page = [0; PAGE_BYTES];
    hv.read(ring.interface, 0, &mut page);
    assert_eq!(page[..128], [0; 128]);
    // order 2, then grefs 1 to 4 (0 is the interface page's own).
    assert_eq!(page[128..148], [2, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0]);
    let interface = Interface::parse(&page).unwrap();
    assert_eq!(interface.grefs, [Gref(1), Gref(2), Gref(3), Gref(4)]);
    for order in [0, 10, u32::MAX] {
        page[128..132].copy_from_slice(&u32::to_le_bytes(order));
        assert_eq!(Interface::parse(&page), Err(Broken::Order(order)));
    }
    page[128..132].copy_from_slice(&[9, 0, 0, 0]);
    assert_eq!(Interface::parse(&page).unwrap().grefs.len(), 512);
}

#[test]
fn messages_of_every_alignment_pass_both_ways() {
    let (mut hv, mut ring) = ring(1);
    for lap in 0..500u32 {
        let size = 7 + lap * 37 % 3000;
        let sent = message(size, lap as u16, lap as u8);
        let to = ring.reserve(&hv, size).unwrap().unwrap();
        ring.put(&mut hv, &to, 0, &sent);
        ring.seal(to);
        assert!(ring.push(&mut hv));
        assert_eq!(server_take(&mut hv, &ring, size), sent);
        server_put(&mut hv, &ring, &sent);
        let head = ring.peek(&hv, 4096).unwrap().unwrap();
        assert_eq!(head, MessageHead { size, id: 117, tag: lap as u16 });
        let mut got = vec![0; size as usize];
        ring.get(&hv, 0, &mut got);
        assert_eq!(got, sent);
        ring.consume();
        ring.release(&mut hv);
        assert_eq!(ring.peek(&hv, 4096).unwrap(), None);
    }
}

#[test]
fn nothing_is_visible_before_publish() {
    let (mut hv, mut ring) = ring(1);
    let to = ring.reserve(&hv, 100).unwrap().unwrap();
    ring.put(&mut hv, &to, 0, &[1; 100]);
    assert_eq!(hv.load_u32(ring.interface, OUT_PROD), 0);
    ring.seal(to);
    assert!(ring.push(&mut hv));
    assert_eq!(hv.load_u32(ring.interface, OUT_PROD), 100);
    // One event may do for several rings: the caller says when.
    assert_eq!(hv.notified[0], 0);
    ring.tell(&mut hv);
    assert_eq!(hv.notified[0], 1);
}

#[test]
fn a_full_ring_has_no_room_and_a_mad_one_is_broken() {
    let (mut hv, mut ring) = ring(1);
    let to = ring.reserve(&hv, 4096).unwrap().unwrap();
    ring.seal(to);
    assert!(ring.push(&mut hv));
    assert!(ring.reserve(&hv, 1).unwrap().is_none());
    hv.store_u32(ring.interface, OUT_CONS, 4097);
    assert_eq!(ring.reserve(&hv, 1).unwrap_err(), Broken::Index);
    hv.store_u32(ring.interface, IN_PROD, 4097);
    assert_eq!(ring.peek(&hv, 4096), Err(Broken::Index));
}

#[test]
fn a_response_is_seen_when_whole_and_its_head_is_read_once() {
    let (mut hv, mut ring) = ring(1);
    let answer = message(50, 3, 0xaa);
    server_put(&mut hv, &ring, &answer[..6]);
    assert_eq!(ring.peek(&hv, 4096), Ok(None));
    server_put(&mut hv, &ring, &answer[6..20]);
    assert_eq!(ring.peek(&hv, 4096), Ok(None));
    // The server rewrites the size after we have seen it.
    hv.write(ring.data, 0, &3000u32.to_le_bytes());
    server_put(&mut hv, &ring, &answer[20..]);
    assert_eq!(ring.peek(&hv, 4096).unwrap().unwrap().size, 50);
}

#[test]
fn sizes_out_of_bounds_break_the_ring() {
    for size in [0, 6, 4097, u32::MAX] {
        let (mut hv, mut ring) = ring(2);
        server_put(&mut hv, &ring, &message(7, 0, 0)[..7]);
        hv.write(ring.data, 0, &u32::to_le_bytes(size));
        assert_eq!(ring.peek(&hv, 4096), Err(Broken::Size(size)));
    }
}

#[test]
fn release_gives_all_frames_back_and_waits_for_the_other_side() {
    let (mut hv, mut ring) = ring(3);
    let (left, grants) = (hv.frames_left(), hv.grants.len());
    hv.grants[2] = None; // the fake's "still mapped"
    assert!(!ring.try_release(&mut hv));
    assert_eq!(hv.frames_left(), left);
    hv.grants[2] = Some(0);
    assert!(ring.try_release(&mut hv));
    assert_eq!(hv.frames_left(), 2000);
    assert_eq!(grants, 9);
}

#[test]
fn offers() {
    let parse = |versions: &str, rings: &str, order: &str| {
        Offer::parse(Some(versions.as_bytes()), Some(rings.as_bytes()), Some(order.as_bytes()))
    };
    assert_eq!(parse("1", "4", "9"), Ok(Offer { rings_max: 4, order_max: 9 }));
    assert_eq!(parse("2,1", "99999", "77"), Ok(Offer { rings_max: 8, order_max: 9 }));
    assert_eq!(parse("11", "4", "9"), Err(OfferFault::Version));
    assert_eq!(parse("1", "0", "9"), Err(OfferFault::Rings));
    assert_eq!(parse("1", "4", "-1"), Err(OfferFault::Order));
    assert_eq!(Offer::parse(None, None, None), Err(OfferFault::Version));
}

#[test]
fn the_shape_keeps_rings_and_spends_order() {
    let offer = Offer { rings_max: 8, order_max: 9 };
    assert_eq!(offer.choose(1100), Ok(Shape { rings: 8, order: 7 }));
    assert_eq!(offer.choose(8 * 513), Ok(Shape { rings: 8, order: 9 }));
    assert_eq!(offer.choose(24), Ok(Shape { rings: 8, order: 1 }));
    assert_eq!(offer.choose(23), Ok(Shape { rings: 7, order: 1 }));
    assert_eq!(offer.choose(2), Err(OfferFault::Frames));
}

#[test]
fn front_nodes_round_trip() {
    let rings = [(Gref(8), Port(3)), (Gref(9), Port(4))];
    let nodes = front_nodes(&rings);
    assert_eq!(nodes[3], ("event-channel-0".into(), "3".into()));
    let node = |name: &str| {
        nodes.iter().find(|(n, _)| n == name).map(|(_, value)| value.clone().into_bytes())
    };
    assert_eq!(parse_front_nodes(node, 8).unwrap(), rings);
    assert_eq!(parse_front_nodes(node, 1), Err(FrontFault::Rings));
    let lacking = |name: &str| if name == "ring-ref1" { None } else { node(name) };
    assert_eq!(parse_front_nodes(lacking, 8), Err(FrontFault::RingRef(1)));
}
