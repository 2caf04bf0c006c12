//! Bytes between a guest's granted pages and ours, by grant copy: the one copy of the data path.

use platter_storage::{Run, Window};
use platter_xen::blkif::Segment;
use platter_xen::{Direction, DomId, GrantCopy, Hypervisor, PAGE_BYTES};

use crate::limits::COPIES_MAX;

/// The guest's side of a request: its segments in order.
pub struct Guest<'a> {
    pub domid: DomId,
    pub segments: &'a [Segment],
}

/// Room for one batch of grant copies; kept, so that nothing is allocated on the way.
pub type Batch = heapless::Vec<GrantCopy, COPIES_MAX>;

/// Copies all of `window`'s bytes from or to the guest's bytes starting at `at` (bytes from the
/// start of the request). The first grant that fails ends it with its GNTST status.
pub fn copy<H: Hypervisor>(
    hv: &mut H,
    batch: &mut Batch,
    guest: &Guest,
    at: usize,
    window: &Window,
    direction: Direction,
) -> Result<(), i16> {
    let mut cursor = Cursor::new(guest, at);
    batch.clear();
    for run in &window.runs {
        let mut done = 0;
        while done < run.len {
            let (gref, gref_offset, guest_left) = cursor.place();
            let ours = run.offset + done;
            let page_left = PAGE_BYTES - ours % PAGE_BYTES;
            let len = guest_left.min(page_left).min(run.len - done);
            let copy = GrantCopy {
                domid: guest.domid,
                gref,
                gref_offset,
                page: run.region.page(ours / PAGE_BYTES),
                page_offset: (ours % PAGE_BYTES) as u16,
                len: len as u16,
                direction,
                status: 0,
            };
            batch.push(copy).expect("a batch is run when it is full");
            if batch.is_full() {
                run_batch(hv, batch)?;
            }
            cursor.advance(len);
            done += len;
        }
    }
    run_batch(hv, batch)
}

/// Copies `len` bytes of our memory, the same for each stretch of it (zeros), to the guest.
pub fn copy_repeated<H: Hypervisor>(
    hv: &mut H,
    batch: &mut Batch,
    guest: &Guest,
    at: usize,
    from: Run,
    len: usize,
) -> Result<(), i16> {
    let mut done = 0;
    while done < len {
        let part = Run { len: from.len.min(len - done), ..from };
        copy(hv, batch, guest, at + done, &one_run(part), Direction::ToGuest)?;
        done += part.len;
    }
    Ok(())
}

/// A window of one run.
pub fn one_run(run: Run) -> Window {
    Window { runs: [run, Run { len: 0, ..run }] }
}

fn run_batch<H: Hypervisor>(hv: &mut H, batch: &mut Batch) -> Result<(), i16> {
    hv.copy(batch);
    let failed = batch.iter().map(|op| op.status).find(|&status| status != 0);
    batch.clear();
    failed.map_or(Ok(()), Err)
}

/// A position in the guest's segments.
struct Cursor<'a> {
    segments: &'a [Segment],
    index: usize,
    /// Bytes into the segment.
    within: usize,
}

impl<'a> Cursor<'a> {
    fn new(guest: &Guest<'a>, at: usize) -> Cursor<'a> {
        let mut cursor = Cursor { segments: guest.segments, index: 0, within: 0 };
        cursor.advance(at);
        cursor
    }

    /// Grant, byte offset in the page, and bytes left in the segment.
    fn place(&self) -> (platter_xen::Gref, u16, usize) {
        let segment = &self.segments[self.index];
        let left = segment.len_bytes() as usize - self.within;
        (segment.gref, segment.offset_bytes() + self.within as u16, left)
    }

    fn advance(&mut self, mut bytes: usize) {
        while bytes > 0 {
            let left = self.segments[self.index].len_bytes() as usize - self.within;
            if bytes < left {
                self.within += bytes;
                return;
            }
            bytes -= left;
            self.index += 1;
            self.within = 0;
        }
    }
}
