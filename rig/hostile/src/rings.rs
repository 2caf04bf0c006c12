//! Attacks on ring indexes and events.

use alloc::string::{String, ToString};

use platter_loadgen::Guest;
use platter_loadgen::front::{CLOSED, CONNECTED, INIT_WAIT, INITIALISED, INITIALISING, Wires};
use platter_loadgen::guest::SECOND_NS;
use platter_xen::blkif::{emit_transfer, op};

use crate::ground::{Ground, PLAIN, Tally, WIDE};

/// Offset of the producer index of requests in a ring (io/ring.h).
pub const REQ_PROD: usize = 0;

/// More produced than a ring holds, in several ways: that disk closes (CVE-2010-4247).
pub fn indexes<G: Guest>(ground: &mut Ground<'_, G>) -> Result<Tally, String> {
    let mut tally = Tally::default();
    for value in [33, 0x100, 0x8000_0000, u32::MAX] {
        let link = ground.open(PLAIN)?;
        ground.guest.store_u32(link.wires.rings[0].region(), REQ_PROD, value);
        ground.guest.notify(link.wires.ports[0]);
        tally.tried += 1;
        tally.closed += u64::from(ground.is_closed_within(20 * SECOND_NS));
        ground.leave(link)?;
    }
    // Backwards, after honest requests.
    let mut link = ground.open(PLAIN)?;
    let page = ground.page(true)?;
    let raw = emit_transfer(PLAIN.abi, op::READ, 1, 0, 0, &[page.segment()]);
    let put = ground.put(&mut link, &[raw; 8]);
    ground.answers(&mut link, put);
    ground.guest.store_u32(link.wires.rings[0].region(), REQ_PROD, 3);
    ground.guest.notify(link.wires.ports[0]);
    tally.tried += 1;
    tally.closed += u64::from(ground.is_closed_within(20 * SECOND_NS));
    ground.leave(link)?;
    ground.free(page)?;
    if tally.closed < tally.tried {
        return Err("a broken ring was served on".to_string());
    }
    Ok(tally)
}

/// A ring that is overfull before it is connected.
pub fn early_index<G: Guest>(ground: &mut Ground<'_, G>) -> Result<Tally, String> {
    let mut tally = Tally::default();
    ground.wait(&[INIT_WAIT])?;
    let wires = Wires::make(ground.guest, ground.disk.back_id, PLAIN)?;
    ground.guest.store_u32(wires.rings[0].region(), REQ_PROD, 1000);
    ground.disk.describe(ground.guest, ground.xs, &wires);
    ground.show(INITIALISED);
    tally.tried = 1;
    let patience_ns = ground.attack_ns;
    let states = [CONNECTED];
    let connected = ground.disk.wait_for(ground.guest, ground.xs, &states, patience_ns);
    tally.served = u64::from(connected.is_ok());
    ground.show(CLOSED);
    ground.wait(&[CLOSED])?;
    ground.disk.forget(ground.guest, ground.xs, &wires, false);
    ground.show(INITIALISING);
    if wires.free(ground.guest) { Ok(tally) } else { Err("a ring is kept".to_string()) }
}

/// Events without requests, as fast as they go.
pub fn event_flood<G: Guest>(ground: &mut Ground<'_, G>) -> Result<Tally, String> {
    let link = ground.open(PLAIN)?;
    let until_ns = ground.guest.now_ns() + ground.attack_ns;
    let mut tally = Tally::default();
    while ground.guest.now_ns() < until_ns {
        (0..64).for_each(|_| ground.guest.notify(link.wires.ports[0]));
        tally.tried += 64;
    }
    ground.leave(link)?;
    Ok(tally)
}

/// Closed, from one moment to the next, with every slot of a large ring under way.
pub fn close_in_flight<G: Guest>(ground: &mut Ground<'_, G>) -> Result<Tally, String> {
    let mut tally = Tally::default();
    let page = ground.page(true)?;
    for _ in 0..3 {
        let mut link = ground.open(WIDE)?;
        let raw = emit_transfer(WIDE.abi, op::READ, 1, 0, 0, &[page.segment()]);
        tally.tried += ground.put(&mut link, &[raw; 512]);
        ground.show(CLOSED);
        ground.wait(&[CLOSED, 0])?;
        tally.closed += 1;
        ground.disk.forget(ground.guest, ground.xs, &link.wires, false);
        ground.show(INITIALISING);
        if !link.wires.free(ground.guest) {
            return Err("a ring is kept".to_string());
        }
    }
    ground.free(page)?;
    Ok(tally)
}
