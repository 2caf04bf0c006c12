//! Shared memory rewritten while the backend reads it (CVE-2015-8550): a backend that looks twice
//! sees two different things.

use alloc::string::String;
use alloc::vec::Vec;

use platter_loadgen::Guest;
use platter_loadgen::front::Link;
use platter_loadgen::guest::MS_NS;
use platter_xen::blkif::{
    RawRequest, SEGMENT_BYTES, emit_descriptors, emit_indirect, emit_transfer, op,
};

use crate::ground::{Ground, PLAIN, Page, Tally};

/// Slots begin here; each has this many bytes in a 64-bit guest's ring (io/ring.h, blkif.h).
const SLOTS_AT: usize = 64;
const SLOT_BYTES: u64 = 112;
const SLOTS: u64 = 32;
/// `req_event` and `rsp_event`: when to tell whom. `rsp_prod` is left alone: the backend reads it
/// at its start only, and we could take no answers with a wrong one.
const EVENT_INDEXES: [usize; 2] = [4, 12];
/// A race that breaks its ring begins anew so often.
const RINGS_MAX: usize = 4;
/// Rewrites between two looks for answers.
const BURST: usize = 200;

/// Keeps a ring full of good requests, and lets `scribble` at it while they are read.
fn race<G: Guest>(
    ground: &mut Ground<'_, G>,
    requests: &[RawRequest],
    mut scribble: impl FnMut(&mut Ground<'_, G>, &Link),
) -> Result<Tally, String> {
    let mut tally = Tally::default();
    // The time counts while there is a race: opening a disk takes its own.
    let mut left_ns = ground.attack_ns;
    for _ in 0..RINGS_MAX {
        if left_ns == 0 {
            break;
        }
        let mut link = ground.open(PLAIN)?;
        let since_ns = ground.guest.now_ns();
        loop {
            let put = ground.put(&mut link, requests);
            (0..BURST).for_each(|_| scribble(ground, &link));
            tally.tried += BURST as u64;
            let more = ground.answers_within(&mut link, put, 2000 * MS_NS);
            tally.errors += more.errors;
            tally.unsupported += more.unsupported;
            tally.okay += more.okay;
            // Too few: the ring was broken by what we did to it, or is about to be closed.
            let missing = more.errors + more.unsupported + more.okay < put;
            if missing || ground.guest.now_ns() - since_ns > left_ns {
                break;
            }
        }
        left_ns = left_ns.saturating_sub(ground.guest.now_ns() - since_ns);
        tally.closed += u64::from(ground.is_closed_within(MS_NS));
        ground.leave(link)?;
    }
    Ok(tally)
}

fn reads(page: &Page) -> [RawRequest; SLOTS as usize] {
    let raw = emit_transfer(PLAIN.abi, op::READ, 1, 0, 0, &[page.segment(); 11]);
    [raw; SLOTS as usize]
}

/// Requests change: operation, counts, sectors, grants, whatever a random byte meets.
pub fn slots<G: Guest>(ground: &mut Ground<'_, G>) -> Result<Tally, String> {
    let page = ground.page(true)?;
    let tally = race(ground, &reads(&page), |ground, link| {
        let slot = SLOTS_AT as u64 + ground.random.below(SLOTS) * SLOT_BYTES;
        // The operation stays READ: what a disk holds is checked after each attack.
        let at = slot + 1 + ground.random.below(SLOT_BYTES - 1);
        let byte = [ground.random.bits() as u8];
        ground.guest.write(link.wires.rings[0].region(), at as usize, &byte);
    })?;
    ground.free(page)?;
    Ok(tally)
}

/// Descriptors change.
pub fn indirect<G: Guest>(ground: &mut Ground<'_, G>) -> Result<Tally, String> {
    let (page, descriptors) = (ground.page(true)?, ground.page(true)?);
    let segments: Vec<_> = (0..128).map(|_| page.segment()).collect();
    let mut bytes = [0; 128 * SEGMENT_BYTES];
    emit_descriptors(&segments, &mut bytes);
    ground.guest.write(descriptors.region, 0, &bytes);
    let raw = emit_indirect(PLAIN.abi, op::READ, 2, 0, 0, 128, &[descriptors.gref]);
    let tally = race(ground, &[raw; 8], |ground, _| {
        let slot = ground.random.below(128) as usize * SEGMENT_BYTES;
        let good = bytes[..SEGMENT_BYTES].to_vec();
        let mut bad = good.clone();
        bad[ground.random.below(6) as usize] = ground.random.bits() as u8;
        ground.guest.write(descriptors.region, slot, &bad);
        ground.guest.write(descriptors.region, slot, &good);
    })?;
    ground.free(page)?;
    ground.free(descriptors)?;
    Ok(tally)
}

/// The indexes that ask for events change, ours and the backend's.
pub fn indexes<G: Guest>(ground: &mut Ground<'_, G>) -> Result<Tally, String> {
    let page = ground.page(true)?;
    let tally = race(ground, &reads(&page), |ground, link| {
        let at = EVENT_INDEXES[ground.random.below(2) as usize];
        let value = ground.random.bits() as u32;
        ground.guest.store_u32(link.wires.rings[0].region(), at, value);
    })?;
    ground.free(page)?;
    Ok(tally)
}
