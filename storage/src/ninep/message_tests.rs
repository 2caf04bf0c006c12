//! Message layouts, both directions. Vectors are written by hand from the protocol's
//! descriptions. Would miss: a server that deviates from them (the rig's servers find it).

extern crate std;

use super::*;
use std::vec;

fn head(bytes: &[u8]) -> MessageHead {
    let mut seven = [0; 7];
    seven.copy_from_slice(&bytes[..7]);
    MessageHead::parse(&seven, u32::MAX).unwrap()
}

fn emit_request(request: &Request, tag: u16) -> std::vec::Vec<u8> {
    let mut bytes = vec![0xa5; 600];
    let len = request.emit(tag, &mut bytes).unwrap();
    bytes.truncate(len);
    bytes
}

fn emit_answer(answer: &Answer, tag: u16) -> std::vec::Vec<u8> {
    let mut bytes = vec![0xa5; 600];
    let len = answer.emit(tag, &mut bytes).unwrap();
    bytes.truncate(len);
    bytes
}

fn names<'a>(list: &[&'a str]) -> Vec<&'a str, WALK_MAX> {
    list.iter().copied().collect()
}

fn requests() -> std::vec::Vec<Request<'static>> {
    vec![
        Request::Version { msize: 65536, version: VERSION_PLATTER },
        Request::Attach { fid: 0, afid: NOFID, uname: "root", aname: "", n_uname: 0 },
        Request::Walk { fid: 0, newfid: 1, names: names(&["a", "b.qcow2"]) },
        Request::Walk { fid: 0, newfid: 1, names: names(&[]) },
        Request::Lopen { fid: 1, flags: open::READ_WRITE },
        Request::Getattr { fid: 1, mask: GETATTR_BASIC },
        Request::Setattr { fid: 1, valid: SETATTR_SIZE, size: 1 << 40 },
        Request::Read { fid: 1, offset: u64::MAX, count: 4096 },
        Request::Write { fid: 1, offset: 512, count: 512 },
        Request::Fsync { fid: 1, datasync: 1 },
        Request::Clunk { fid: 1 },
        Request::Flush { oldtag: 3 },
        Request::Allocate { fid: 1, mode: AllocateMode::Punch, offset: 4096, len: 8192 },
        Request::Extents { fid: 1, offset: 0, len: u64::MAX },
    ]
}

fn answers() -> std::vec::Vec<Answer<'static>> {
    let qid = Qid { kind: 0x80, version: 7, path: 0x1122_3344_5566_7788 };
    vec![
        Answer::Lerror { ecode: 2 },
        Answer::Version { msize: 4096, version: VERSION_PLAIN },
        Answer::Attach { qid },
        Answer::Walk { qids: [qid; 16].into_iter().collect() },
        Answer::Lopen { qid, iounit: 0 },
        Answer::Getattr { qid, mode: 0o100_600, size: 1 << 33, blksize: 4096, blocks: 8 },
        Answer::Setattr,
        Answer::Read { count: 100_000 },
        Answer::Write { count: 512 },
        Answer::Fsync,
        Answer::Clunk,
        Answer::Flush,
        Answer::Allocate,
        Answer::Extents {
            end: 9,
            extents: [Extent { offset: 1, len: 2 }; 16].into_iter().collect(),
        },
    ]
}

#[test]
fn version_as_bytes() {
    let wanted = b"\x15\0\0\0\x64\xff\xff\0\x20\0\0\x08\09P2000.L";
    let request = Request::Version { msize: 8192, version: "9P2000.L" };
    assert_eq!(emit_request(&request, NOTAG), wanted);
}

#[test]
fn walk_as_bytes() {
    let wanted = b"\x17\0\0\0\x6e\x05\0\0\0\0\0\x01\0\0\0\x02\0\x01\0a\x01\0b";
    let request = Request::Walk { fid: 0, newfid: 1, names: names(&["a", "b"]) };
    assert_eq!(emit_request(&request, 5), wanted);
}

#[test]
fn write_counts_the_data_that_follows() {
    let request = Request::Write { fid: 2, offset: 0x0102_0304, count: 512 };
    let wanted = b"\x17\x02\0\0\x76\x05\0\x02\0\0\0\x04\x03\x02\x01\0\0\0\0\0\x02\0\0";
    assert_eq!(emit_request(&request, 5), wanted);
}

#[test]
fn getattr_answer_has_its_160_bytes() {
    let answer = &answers()[5];
    let bytes = emit_answer(answer, 1);
    assert_eq!(bytes.len(), 160);
    assert_eq!(bytes[28..32], 0o100_600u32.to_le_bytes());
    assert_eq!(bytes[56..64], (1u64 << 33).to_le_bytes());
}

#[test]
fn every_request_survives_the_wire() {
    for request in requests() {
        let bytes = emit_request(&request, 9);
        assert_eq!((head(&bytes).tag, head(&bytes).id), (9, request.id()));
        assert_eq!(Request::parse(head(&bytes), &bytes[7..]), Ok(request));
    }
}

#[test]
fn every_answer_survives_the_wire() {
    for answer in answers() {
        let bytes = emit_answer(&answer, 9);
        assert!(bytes.len() <= ANSWER_BYTES_MAX);
        assert_eq!(Answer::parse(head(&bytes), &bytes[7..]), Ok(answer));
    }
}

#[test]
fn every_cut_and_every_extra_byte_is_refused() {
    let check = |bytes: &[u8], is_data: bool, parse: &dyn Fn(MessageHead, &[u8]) -> bool| {
        for cut in 7..bytes.len() {
            // The size agrees with what is there: only the fields can tell.
            let mut head = head(bytes);
            head.size = cut as u32;
            assert!(!parse(head, &bytes[7..cut]), "cut at {cut}: {bytes:?}");
        }
        let mut more = bytes.to_vec();
        more.push(0);
        let mut head = head(bytes);
        if !is_data {
            assert!(!parse(head, &more[7..]), "size short of the bytes");
        }
        head.size += 1;
        assert!(!parse(head, &more[7..]), "a byte too many: {bytes:?}");
    };
    for request in requests() {
        let is_data = matches!(request, Request::Write { .. });
        let bytes = emit_request(&request, 1);
        check(&bytes, is_data, &|head, body| Request::parse(head, body).is_ok());
    }
    for answer in answers() {
        let is_data = matches!(answer, Answer::Read { .. });
        let bytes = emit_answer(&answer, 1);
        check(&bytes, is_data, &|head, body| Answer::parse(head, body).is_ok());
    }
}

#[test]
fn counts_and_values_are_bounded() {
    let mut walk = emit_request(&Request::Walk { fid: 0, newfid: 1, names: names(&["a"]) }, 1);
    walk[15] = 17;
    for _ in 0..16 {
        walk.extend_from_slice(b"\x01\0a");
    }
    let mut h = head(&walk);
    h.size = walk.len() as u32;
    assert_eq!(Request::parse(h, &walk[7..]), Err(Malformed::Count));
    let mode = Request::Allocate { fid: 1, mode: AllocateMode::Zero, offset: 0, len: 1 };
    let mut bytes = emit_request(&mode, 1);
    bytes[11] = 3;
    assert_eq!(Request::parse(head(&bytes), &bytes[7..]), Err(Malformed::Value));
    let nul = emit_request(&Request::Walk { fid: 0, newfid: 1, names: names(&["a\0b"]) }, 1);
    assert_eq!(Request::parse(head(&nul), &nul[7..]), Err(Malformed::Text));
}

#[test]
fn data_counts_must_match_the_size() {
    for count in [0, 511, 513, u32::MAX] {
        let mut bytes = emit_answer(&Answer::Read { count: 512 }, 1);
        bytes[7..11].copy_from_slice(&u32::to_le_bytes(count));
        assert_eq!(Answer::parse(head(&bytes), &bytes[7..]), Err(Malformed::Length));
    }
}

#[test]
fn unknown_numbers_are_named() {
    for id in [0, 1, 6, 78, 99, 107, 255] {
        let h = MessageHead { size: 7, id, tag: 0 };
        assert_eq!(Answer::parse(h, &[]), Err(Malformed::Unknown(id)));
        assert_eq!(Request::parse(h, &[]), Err(Malformed::Unknown(id)));
    }
}

#[test]
fn what_does_not_fit_is_not_emitted() {
    for request in requests() {
        let len = emit_request(&request, 1).len();
        assert_eq!(request.emit(1, &mut vec![0; len - 1]), None);
    }
}
