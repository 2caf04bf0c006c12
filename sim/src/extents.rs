//! What a 9p server in memory says of a file's ranges that have space (Textents): the simulator's
//! server and the one of storage's tests.
//!
//! Guards what a client may conclude: what no extent names reads as zeros. Must never: name more
//! extents than an answer may.

use platter_storage::ninep::message::{Answer, EXTENTS_MAX, Extent};

/// Blocks of zeros have no space.
const BLOCK: u64 = 4096;

/// The answer for `bytes` from `offset` on.
pub fn extents(bytes: &[u8], offset: u64, len: u64) -> Answer<'static> {
    let end = offset.saturating_add(len).min(bytes.len() as u64);
    let mut list = heapless::Vec::<Extent, EXTENTS_MAX>::new();
    let mut at = offset;
    while at < end {
        let next = (at / BLOCK * BLOCK + BLOCK).min(end);
        let is_data = bytes[at as usize..next as usize].iter().any(|byte| *byte != 0);
        if is_data {
            let is_new = list.last().is_none_or(|last| last.offset + last.len < at);
            if is_new && list.push(Extent { offset: at, len: 0 }).is_err() {
                break;
            }
            list.last_mut().expect("this one or the one before").len += next - at;
        }
        at = next;
    }
    Answer::Extents { end: at, extents: list }
}
