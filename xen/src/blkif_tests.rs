//! Byte layouts and every refusal. Vectors are written by hand from public/io/blkif.h. Would
//! miss: a misreading of that header shared by parser and vectors (the rig's guests find it).

use super::*;

const LIMITS: Limits = Limits {
    capacity_sectors: 1000,
    sector_bytes: 512,
    read_only: false,
    indirect_segments_max: 256,
    flush: true,
    discard: true,
};

fn segment(gref: u32, first_sect: u8, last_sect: u8) -> Segment {
    Segment { gref: Gref(gref), first_sect, last_sect }
}

fn parse(raw: &RawRequest) -> Result<Request, BadRequest> {
    Request::parse(raw, Abi::X86_64, &LIMITS)
}

fn simple(operation: u8, sector: u64, segments: &[Segment]) -> RawRequest {
    emit_transfer(Abi::X86_64, operation, 7, 0, sector, segments)
}

#[test]
fn a_native_write_as_bytes() {
    let mut raw = [0u8; 112];
    raw[0] = 1; // BLKIF_OP_WRITE
    raw[1] = 2; // nr_segments
    raw[2] = 0x00; // handle 0xca00 (xvda)
    raw[3] = 0xca;
    raw[8..16].copy_from_slice(&[0xef, 0xbe, 0xad, 0xde, 0, 0, 0, 0]); // id
    raw[16..24].copy_from_slice(&[0x10, 0, 0, 0, 0, 0, 0, 0]); // sector_number 16
    raw[24..32].copy_from_slice(&[9, 0, 0, 0, 0, 7, 0, 0]); // gref 9, sectors 0..=7
    raw[32..40].copy_from_slice(&[10, 1, 0, 0, 2, 3, 0xff, 0xff]); // gref 266, 2..=3, junk
    let Ok(Request::Write(transfer)) = parse(&raw) else { panic!() };
    assert_eq!((transfer.sector, transfer.sectors), (16, 10));
    assert_eq!(transfer.segments[..], [segment(9, 0, 7), segment(266, 2, 3)]);
    assert_eq!(transfer.segments[1].offset_bytes(), 1024);
    assert_eq!(transfer.segments[1].len_bytes(), 1024);
    assert_eq!(response_key(&raw, Abi::X86_64), (0xdead_beef, 1));
}

#[test]
fn a_32_bit_read_as_bytes() {
    let mut raw = [0u8; 112];
    raw[0] = 0;
    raw[1] = 1;
    raw[4..12].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]); // id, unaligned as i386 packs it
    raw[12..20].copy_from_slice(&[3, 0, 0, 0, 0, 0, 0, 0]); // sector_number
    raw[20..28].copy_from_slice(&[5, 0, 0, 0, 1, 1, 0, 0]);
    let Ok(Request::Read(transfer)) = Request::parse(&raw, Abi::X86_32, &LIMITS) else { panic!() };
    assert_eq!((transfer.sector, transfer.sectors), (3, 1));
    assert_eq!(response_key(&raw, Abi::X86_32), (0x0807_0605_0403_0201, 0));
}

#[test]
fn discard_in_both_layouts() {
    for abi in [Abi::X86_64, Abi::X86_32] {
        let raw = emit_discard(abi, 4, 8, 16, true);
        let wanted = Request::Discard { sector: 8, sectors: 16, secure: true };
        assert_eq!(Request::parse(&raw, abi, &LIMITS), Ok(wanted));
    }
    let raw = emit_discard(Abi::X86_32, 4, 8, 16, false);
    assert_eq!(&raw[20..28], &[16, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(parse(&emit_discard(Abi::X86_64, 4, 8, 0, false)), Err(BadRequest::DiscardEmpty));
    let far = emit_discard(Abi::X86_64, 4, 999, 2, false);
    assert_eq!(parse(&far), Err(BadRequest::BeyondEnd));
    let wild = emit_discard(Abi::X86_64, 4, u64::MAX, 2, false);
    assert_eq!(parse(&wild), Err(BadRequest::SectorOverflow));
}

#[test]
fn indirect_in_both_layouts() {
    for abi in [Abi::X86_64, Abi::X86_32] {
        let raw = emit_indirect(abi, op::WRITE, 4, 0, 8, 256, &[Gref(77)]);
        let Ok(Request::Indirect(indirect)) = Request::parse(&raw, abi, &LIMITS) else { panic!() };
        assert_eq!(indirect.operation, IndirectOp::Write);
        assert_eq!(indirect.grefs[..], [Gref(77)]);
        assert_eq!(response_key(&raw, abi), (4, op::WRITE), "the response repeats indirect_op");
        let mut copy = [0; 2048];
        let ones = [segment(3, 1, 1); 256];
        assert_eq!(emit_descriptors(&ones, &mut copy), 2048);
        let mut into = [Segment::EMPTY; 256];
        assert_eq!(indirect.parse_segments(&copy, &LIMITS, &mut into), Ok(256));
        assert_eq!(into, ones);
        let short = indirect.parse_segments(&copy[..2047], &LIMITS, &mut into);
        assert_eq!(short, Err(BadRequest::IndirectShort));
        let few = indirect.parse_segments(&copy, &LIMITS, &mut into[..255]);
        assert_eq!(few, Err(BadRequest::SegmentsTooMany));
        emit_descriptors(&[segment(3, 0, 7); 256], &mut copy);
        let long = indirect.parse_segments(&copy, &LIMITS, &mut into);
        assert_eq!(long, Err(BadRequest::BeyondEnd));
    }
}

#[test]
fn indirect_refusals() {
    let emit = |operation, sector, count| {
        emit_indirect(Abi::X86_64, operation, 1, 0, sector, count, &[Gref(1)])
    };
    assert_eq!(parse(&emit(op::WRITE_BARRIER, 0, 1)), Err(BadRequest::IndirectOperation));
    assert_eq!(parse(&emit(op::INDIRECT, 0, 1)), Err(BadRequest::IndirectOperation));
    assert_eq!(parse(&emit(op::READ, 0, 0)), Err(BadRequest::SegmentsNone));
    assert_eq!(parse(&emit(op::READ, 0, 257)), Err(BadRequest::SegmentsTooMany));
    assert_eq!(parse(&emit(op::READ, 1001, 1)), Err(BadRequest::BeyondEnd));
    let wide = Limits { indirect_segments_max: u16::MAX, ..LIMITS };
    let raw = emit(op::READ, 0, u16::MAX);
    assert_eq!(Request::parse(&raw, Abi::X86_64, &wide), Err(BadRequest::SegmentsTooMany));
}

#[test]
fn segment_refusals() {
    assert_eq!(parse(&simple(op::READ, 0, &[])), Err(BadRequest::SegmentsNone));
    let mut raw = simple(op::READ, 0, &[segment(1, 0, 0)]);
    raw[1] = 12;
    assert_eq!(parse(&raw), Err(BadRequest::SegmentsTooMany));
    raw[1] = 255;
    assert_eq!(parse(&raw), Err(BadRequest::SegmentsTooMany));
    let beyond = simple(op::READ, 0, &[segment(1, 0, 8)]);
    assert_eq!(parse(&beyond), Err(BadRequest::SegmentBeyondPage));
    let wild = simple(op::READ, 0, &[segment(1, 0, 255)]);
    assert_eq!(parse(&wild), Err(BadRequest::SegmentBeyondPage));
    let empty = simple(op::READ, 0, &[segment(1, 4, 3)]);
    assert_eq!(parse(&empty), Err(BadRequest::SegmentEmpty));
    // The eleventh is looked at too.
    let mut eleven = [segment(1, 0, 0); 11];
    assert!(parse(&simple(op::READ, 0, &eleven)).is_ok());
    eleven[10] = segment(1, 7, 0);
    assert_eq!(parse(&simple(op::READ, 0, &eleven)), Err(BadRequest::SegmentEmpty));
}

#[test]
fn the_end_of_the_disk_is_exact() {
    assert!(parse(&simple(op::WRITE, 992, &[segment(1, 0, 7)])).is_ok());
    let over = simple(op::WRITE, 993, &[segment(1, 0, 7)]);
    assert_eq!(parse(&over), Err(BadRequest::BeyondEnd));
    let wild = simple(op::WRITE, u64::MAX - 3, &[segment(1, 0, 7)]);
    assert_eq!(parse(&wild), Err(BadRequest::SectorOverflow));
}

#[test]
fn read_only_refuses_all_that_changes_the_disk() {
    let limits = Limits { read_only: true, ..LIMITS };
    let one = [segment(1, 0, 0)];
    let refused = [
        simple(op::WRITE, 0, &one),
        simple(op::WRITE_BARRIER, 0, &one),
        simple(op::FLUSH_DISKCACHE, 0, &one),
        emit_discard(Abi::X86_64, 1, 0, 1, false),
        emit_indirect(Abi::X86_64, op::WRITE, 1, 0, 0, 1, &[Gref(1)]),
    ];
    for raw in refused {
        assert_eq!(Request::parse(&raw, Abi::X86_64, &limits), Err(BadRequest::ReadOnly));
    }
    for raw in [simple(op::READ, 0, &one), simple(op::FLUSH_DISKCACHE, 0, &[])] {
        assert!(Request::parse(&raw, Abi::X86_64, &limits).is_ok());
    }
}

#[test]
fn flush_and_barrier_with_and_without_segments() {
    let Ok(Request::Flush(flush)) = parse(&simple(op::FLUSH_DISKCACHE, u64::MAX, &[])) else {
        panic!("a bare flush carries no sector that matters")
    };
    assert_eq!(flush.sectors, 0);
    assert!(matches!(parse(&simple(op::WRITE_BARRIER, 0, &[])), Ok(Request::WriteBarrier(_))));
    let with = simple(op::FLUSH_DISKCACHE, 2, &[segment(1, 0, 0)]);
    assert!(matches!(parse(&with), Ok(Request::Flush(t)) if t.sectors == 1));
}

#[test]
fn what_is_not_offered_is_unsupported_not_an_error() {
    let bare = Limits { flush: false, discard: false, indirect_segments_max: 0, ..LIMITS };
    for operation in [op::FLUSH_DISKCACHE, op::WRITE_BARRIER, op::DISCARD, op::INDIRECT] {
        let raw = simple(operation, 0, &[segment(1, 0, 0)]);
        let refusal = Request::parse(&raw, Abi::X86_64, &bare).unwrap_err();
        assert_eq!(refusal, BadRequest::NotOffered);
        assert_eq!(refusal.status(), Status::Unsupported);
    }
    for operation in [4, 7, 128, 255] {
        let refusal = parse(&simple(operation, 0, &[segment(1, 0, 0)])).unwrap_err();
        assert_eq!(refusal, BadRequest::UnknownOperation);
        assert_eq!(refusal.status(), Status::Unsupported);
    }
}

#[test]
fn four_kilobyte_sectors_want_whole_ones() {
    let limits = Limits { sector_bytes: 4096, ..LIMITS };
    let check = |sector, segment| {
        Request::parse(&simple(op::READ, sector, &[segment]), Abi::X86_64, &limits)
    };
    assert!(check(8, segment(1, 0, 7)).is_ok());
    assert_eq!(check(4, segment(1, 0, 7)), Err(BadRequest::Unaligned));
    assert_eq!(check(8, segment(1, 0, 3)), Err(BadRequest::Unaligned));
    assert_eq!(check(8, segment(1, 4, 7)), Err(BadRequest::Unaligned));
}

#[test]
fn responses_hold_no_stale_bytes() {
    let response = Response { id: u64::MAX, operation: 255, status: -2 };
    let bytes = response.emit();
    assert_eq!(bytes[8..], [255, 0, 0xfe, 0xff, 0, 0, 0, 0], "padding is zero (XSA-216)");
    assert_eq!(Response::parse(&bytes), response);
}

#[test]
fn protocol_words() {
    assert_eq!(Abi::from_protocol(None), Some(Abi::X86_32));
    assert_eq!(Abi::from_protocol(Some(b"x86_64-abi")), Some(Abi::X86_64));
    assert_eq!(Abi::from_protocol(Some(b"native")), Some(Abi::X86_64));
    assert_eq!(Abi::from_protocol(Some(b"x86_32-abi")), Some(Abi::X86_32));
    assert_eq!(Abi::from_protocol(Some(b"arm-abi")), None);
    assert_eq!(Abi::from_protocol(Some(b"")), None);
}

#[test]
fn refusal_names_are_distinct_and_in_order() {
    for (index, refusal) in BadRequest::ALL.iter().enumerate() {
        assert_eq!(*refusal as usize, index);
        for other in &BadRequest::ALL[index + 1..] {
            assert_ne!(refusal.name(), other.name());
        }
    }
}

#[test]
fn no_bytes_make_the_parser_panic() {
    // Every value of the first four bytes that steers it, over fillers that reach the extremes.
    for operation in 0..=8u8 {
        for second in 0..=255u8 {
            for filler in [0u8, 1, 7, 8, 0x7f, 0x80, 0xff] {
                let mut raw = [filler; 112];
                (raw[0], raw[1]) = (operation, second);
                for abi in [Abi::X86_64, Abi::X86_32] {
                    let _ = Request::parse(&raw, abi, &LIMITS);
                }
            }
        }
    }
}
