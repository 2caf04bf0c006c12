//! Requests that name pages the backend must not, or cannot, have.

use alloc::string::String;
use alloc::vec::Vec;

use platter_loadgen::Guest;
use platter_loadgen::front::{free_granted, grant_all};
use platter_xen::blkif::{RawRequest, Segment, emit_indirect, emit_transfer, op};
use platter_xen::{DomId, Gref};

use crate::ground::{Ground, PLAIN, Page, Tally, WIDE};

fn request(operation: u8, gref: Gref) -> RawRequest {
    let segment = Segment { gref, first_sect: 0, last_sect: 7 };
    emit_transfer(PLAIN.abi, operation, 5, 0, 0, &[segment])
}

/// References that were never given: the reserved ones, beyond the table, random ones.
pub fn bogus<G: Guest>(ground: &mut Ground<'_, G>) -> Result<Tally, String> {
    let mut link = ground.open(PLAIN)?;
    let mut grefs = Vec::from([2, 3, 7, 5000, 32_767, 32_768, 1 << 20, 1 << 31, u32::MAX]);
    grefs.extend((0..32).map(|_| ground.random.bits() as u32 | 1 << 16));
    let both = |gref: &u32| [request(op::READ, Gref(*gref)), request(op::WRITE, Gref(*gref))];
    let requests: Vec<RawRequest> = grefs.iter().flat_map(both).collect();
    let mut tally = ground.must_refuse(&mut link, &requests)?;
    // One good page among bad ones.
    let page = ground.page(true)?;
    let bad = Segment { gref: Gref(u32::MAX), first_sect: 0, last_sect: 7 };
    let mixed = [page.segment(), bad, page.segment()];
    for operation in [op::READ, op::WRITE] {
        let raw = emit_transfer(PLAIN.abi, operation, 5, 0, 0, &mixed);
        let more = ground.must_refuse(&mut link, &[raw])?;
        tally.tried += more.tried;
        tally.errors += more.errors;
        tally.served += more.served;
    }
    ground.leave(link)?;
    ground.free(page)?;
    Ok(tally)
}

/// Pages that were given to dom0, and pages that may only be read.
pub fn foreign<G: Guest>(ground: &mut Ground<'_, G>) -> Result<Tally, String> {
    let mut link = ground.open(PLAIN)?;
    let region = ground.guest.frames_alloc(1).ok_or("no memory")?;
    let grefs = grant_all(ground.guest, DomId(0), region, true)?;
    let read_only = ground.page(false)?;
    let requests = [
        request(op::READ, grefs[0]),
        request(op::WRITE, grefs[0]),
        request(op::READ, read_only.gref),
        emit_indirect(PLAIN.abi, op::READ, 5, 0, 0, 1, &grefs),
    ];
    let tally = ground.must_refuse(&mut link, &requests)?;
    ground.leave(link)?;
    ground.free(read_only)?;
    free_granted(ground.guest, region, &grefs);
    Ok(tally)
}

/// Pages that are taken back while their requests are under way.
pub fn revoked<G: Guest>(ground: &mut Ground<'_, G>) -> Result<Tally, String> {
    let mut tally = Tally::default();
    let mut link = ground.open(WIDE)?;
    let until_ns = ground.guest.now_ns() + ground.attack_ns;
    while ground.guest.now_ns() < until_ns {
        let pages: Vec<Page> = (0..64).map(|_| ground.page(true)).collect::<Result<_, _>>()?;
        let of_page = |(index, page): (usize, &Page)| {
            request(if index % 2 == 0 { op::READ } else { op::WRITE }, page.gref)
        };
        let requests: Vec<RawRequest> = pages.iter().enumerate().map(of_page).collect();
        let put = ground.put(&mut link, &requests);
        ground.free_all(pages)?;
        let more = ground.answers(&mut link, put);
        tally.tried += put;
        tally.errors += more.errors;
        tally.okay += more.okay;
    }
    ground.leave(link)?;
    Ok(tally)
}

/// The ring's own pages as data, and descriptors that are read over by what they describe.
pub fn own_ring<G: Guest>(ground: &mut Ground<'_, G>) -> Result<Tally, String> {
    let mut tally = Tally::default();
    let page = ground.page(true)?;
    for _ in 0..4 {
        let mut link = ground.open(PLAIN)?;
        let ring_gref = link.wires.grefs[0][0];
        let mut noise = [0; 64];
        ground.noise(&mut noise);
        ground.guest.write(page.region, 0, &noise);
        let requests = [
            request(op::WRITE, page.gref),
            emit_indirect(PLAIN.abi, op::READ, 5, 0, 0, 256, &[ring_gref]),
            emit_indirect(PLAIN.abi, op::READ, 5, 0, 0, 8, &[page.gref]),
            request(op::READ, ring_gref),
            request(op::READ, ring_gref),
        ];
        tally.tried += ground.put(&mut link, &requests);
        let patience_ns = ground.attack_ns;
        let more = ground.answers_within(&mut link, requests.len() as u64, patience_ns);
        tally.errors += more.errors;
        tally.okay += more.okay;
        ground.leave(link)?;
    }
    ground.free(page)?;
    Ok(tally)
}
