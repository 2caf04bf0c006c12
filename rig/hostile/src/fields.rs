//! Requests with each field out of its range, one by one; all of them must be refused.

use alloc::string::String;
use alloc::vec::Vec;

use platter_loadgen::Guest;
use platter_loadgen::front::{connect, disconnect};
use platter_xen::blkif::{
    RawRequest, SEGMENT_BYTES, Segment, emit_descriptors, emit_discard, emit_indirect,
    emit_transfer, op,
};

use crate::ground::{Ground, PLAIN, Page, Tally};

/// Where the segment count and the first segment lie in a 64-bit guest's request (blkif.h).
const COUNT_AT: usize = 1;
const SEGMENTS_AT: usize = 24;

/// Direct requests, discards and indirect ones.
pub fn fields<G: Guest>(ground: &mut Ground<'_, G>) -> Result<Tally, String> {
    let mut link = ground.open(PLAIN)?;
    let (page, descriptors) = (ground.page(true)?, ground.page(true)?);
    let capacity = link.nodes.sectors;
    let mut requests = direct(&page, capacity);
    requests.extend(discards(capacity));
    requests.extend(indirects(&page, &descriptors, capacity));
    let mut tally = ground.must_refuse(&mut link, &requests)?;
    // Descriptors that are wrong: the page says so, not the request.
    for (first_sect, last_sect) in [(5, 2), (0, 8), (0, 255), (255, 255)] {
        let segments = [page.segment(), Segment { gref: page.gref, first_sect, last_sect }];
        let mut bytes = [0; 2 * SEGMENT_BYTES];
        emit_descriptors(&segments, &mut bytes);
        ground.guest.write(descriptors.region, 0, &bytes);
        for operation in [op::READ, op::WRITE] {
            let grefs = [descriptors.gref];
            let raw = emit_indirect(PLAIN.abi, operation, 9, 0, 0, 2, &grefs);
            let more = ground.must_refuse(&mut link, &[raw])?;
            tally.tried += more.tried;
            tally.errors += more.errors;
            tally.served += more.served;
        }
    }
    ground.leave(link)?;
    ground.free(page)?;
    ground.free(descriptors)?;
    Ok(tally)
}

fn direct(page: &Page, capacity: u64) -> Vec<RawRequest> {
    let abi = PLAIN.abi;
    let good = |operation, sector| emit_transfer(abi, operation, 1, 0, sector, &[page.segment()]);
    let mut requests = Vec::new();
    requests.extend([4, 7, 99, 255].map(|operation| good(operation, 0)));
    for operation in [op::READ, op::WRITE, op::WRITE_BARRIER, op::FLUSH_DISKCACHE] {
        for sector in [capacity, capacity - 7, u64::MAX, u64::MAX - 7, 1 << 55] {
            requests.push(good(operation, sector));
        }
        for count in [12, 128, 255] {
            let mut raw = good(operation, 0);
            raw[COUNT_AT] = count;
            requests.push(raw);
        }
        for (first, last) in [(5, 2), (0, 8), (8, 8), (0, 255), (255, 0)] {
            let mut raw = good(operation, 0);
            raw[SEGMENTS_AT + 4] = first;
            raw[SEGMENTS_AT + 5] = last;
            requests.push(raw);
        }
    }
    for operation in [op::READ, op::WRITE] {
        requests.push(emit_transfer(abi, operation, 1, 0, 0, &[]));
    }
    requests
}

fn discards(capacity: u64) -> Vec<RawRequest> {
    let ranges = [
        (0, 0),
        (capacity, 1),
        (0, capacity + 1),
        (u64::MAX, 2),
        (8, u64::MAX),
        (1 << 63, 1 << 63),
    ];
    ranges.map(|(sector, sectors)| emit_discard(PLAIN.abi, 2, sector, sectors, false)).into()
}

fn indirects(page: &Page, descriptors: &Page, capacity: u64) -> Vec<RawRequest> {
    let emit = |operation, sector, count| {
        emit_indirect(PLAIN.abi, operation, 3, 0, sector, count, &[descriptors.gref])
    };
    let mut requests = Vec::new();
    for operation in [op::WRITE_BARRIER, op::FLUSH_DISKCACHE, op::DISCARD, op::INDIRECT, 255] {
        requests.push(emit(operation, 0, 1));
    }
    for count in [0, 257, 4096, 4097, u16::MAX] {
        requests.push(emit(op::READ, 0, count));
    }
    requests.extend([capacity, u64::MAX, 1 << 63].map(|sector| emit(op::WRITE, sector, 1)));
    // Descriptors that are all zero name grant 0, which is not ours to give.
    requests.push(emit(op::READ, 0, 2));
    for gref in [0, 4_000_000, u32::MAX] {
        let grefs = [platter_xen::Gref(gref)];
        requests.push(emit_indirect(PLAIN.abi, op::READ, 3, 0, 0, 11, &grefs));
    }
    // A data page of zeros as descriptors as well.
    requests.push(emit_indirect(PLAIN.abi, op::WRITE, 3, 0, 0, 256, &[page.gref]));
    requests
}

/// Everything that changes a disk which may only be read.
pub fn read_only<G: Guest>(ground: &mut Ground<'_, G>) -> Result<Tally, String> {
    let Some(disk) = ground.read_only else { return Ok(Tally::default()) };
    let attacked = core::mem::replace(&mut ground.disk, disk);
    let outcome = write_all(ground);
    ground.disk = attacked;
    outcome
}

fn write_all<G: Guest>(ground: &mut Ground<'_, G>) -> Result<Tally, String> {
    let mut link = connect(ground.guest, ground.xs, ground.disk, PLAIN)?;
    let (page, descriptors) = (ground.page(true)?, ground.page(false)?);
    let mut bytes = [0; SEGMENT_BYTES];
    emit_descriptors(&[page.segment()], &mut bytes);
    ground.guest.write(descriptors.region, 0, &bytes);
    let abi = PLAIN.abi;
    let mut requests = Vec::new();
    for operation in [op::WRITE, op::WRITE_BARRIER, op::FLUSH_DISKCACHE] {
        requests.push(emit_transfer(abi, operation, 1, 0, 0, &[page.segment()]));
    }
    requests.push(emit_discard(abi, 1, 0, 8, false));
    requests.push(emit_discard(abi, 1, 0, 8, true));
    requests.push(emit_indirect(abi, op::WRITE, 1, 0, 0, 1, &[descriptors.gref]));
    let tally = ground.must_refuse(&mut link, &requests)?;
    disconnect(ground.guest, ground.xs, ground.disk, link)?;
    ground.free(page)?;
    ground.free(descriptors)?;
    Ok(tally)
}
