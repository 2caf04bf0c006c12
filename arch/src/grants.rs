//! Grants: those we give (table version 1), those we take (maps), and grant copies.
//!
//! Order when giving: domain and frame first, flags last, for the flags make the entry valid.
//! When revoking, the flags go to 0 by compare-and-swap only while nobody has the page mapped
//! (Xen public/grant_table.h). A map is all or nothing, and its pages live in a window with page
//! tables of its own. Every operation has a status; the hypercall's own result says nothing.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;
use core::ptr;
use core::sync::atomic::{AtomicU16, Ordering};

use platter_xen::{Direction, DomId, GrantCopy, Gref, PAGE_BYTES, Refusal};

use crate::hypercall::{DOMID_SELF, grant_table_op};
use crate::layout::{
    GRANT_MAPS, GRANT_MAPS_PAGES, GRANT_TABLE, GRANT_TABLE_FRAMES_MAX, PAGE, page_address,
};
use crate::paging::{AddressSpace, Entry};
use crate::runs::Runs;

const GNTTABOP_MAP: u32 = 0;
const GNTTABOP_UNMAP: u32 = 1;
const GNTTABOP_SETUP_TABLE: u32 = 2;
const GNTTABOP_COPY: u32 = 5;

/// GNTST_okay and GNTST_general_error.
const OKAY: i16 = 0;
const GENERAL_ERROR: i16 = -1;

/// GTF_permit_access, GTF_readonly, GTF_reading | GTF_writing.
const PERMIT_ACCESS: u16 = 1;
const READ_ONLY: u16 = 1 << 2;
const IN_USE: u16 = 3 << 3;
/// GNTMAP_host_map.
const HOST_MAP: u32 = 1 << 1;
/// GNTCOPY_source_gref, GNTCOPY_dest_gref.
const SOURCE_GREF: u16 = 1;
const DEST_GREF: u16 = 2;

/// The first entries belong to the toolstack: xenstore and console (GNTTAB_NR_RESERVED_ENTRIES).
const RESERVED: usize = 8;
const ENTRY_BYTES: u64 = 8;
const ENTRIES_PER_FRAME: usize = PAGE_BYTES / ENTRY_BYTES as usize;

/// Copies in one hypercall; longer batches are split.
const COPY_BATCH: usize = 64;

#[repr(C)]
struct SetupTable {
    dom: u16,
    nr_frames: u32,
    status: i16,
    frame_list: *mut u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct MapRef {
    host_addr: u64,
    flags: u32,
    gref: u32,
    dom: u16,
    status: i16,
    handle: u32,
    dev_bus_addr: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct UnmapRef {
    host_addr: u64,
    dev_bus_addr: u64,
    handle: u32,
    status: i16,
}

/// One end of a copy: a gref of `domid`, or a machine frame of ours.
#[repr(C)]
#[derive(Clone, Copy)]
struct CopyEnd {
    gref_or_mfn: u64,
    domid: u16,
    offset: u16,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Copy {
    source: CopyEnd,
    dest: CopyEnd,
    len: u16,
    flags: u16,
    status: i16,
}

const _: () = assert!(size_of::<SetupTable>() == 24);
const _: () = assert!(size_of::<MapRef>() == 32 && size_of::<UnmapRef>() == 24);
const _: () = assert!(size_of::<Copy>() == 40);

/// The grants that we give.
pub(crate) struct GrantTable {
    frames: usize,
    grefs: Runs,
}

impl GrantTable {
    /// A table without frames; they come with the first grants.
    pub(crate) fn new() -> GrantTable {
        let mut grefs = Runs::new(GRANT_TABLE_FRAMES_MAX * ENTRIES_PER_FRAME);
        assert_eq!(grefs.take(RESERVED), Some(0));
        GrantTable { frames: 0, grefs }
    }

    pub(crate) fn grant(
        &mut self,
        space: &mut AddressSpace,
        domid: DomId,
        mfn: u64,
        writable: bool,
    ) -> Result<Gref, Refusal> {
        let frame = u32::try_from(mfn).expect("version 1 grants reach 16 TiB of memory");
        let index = self.grefs.take(1).ok_or(Refusal::Full)?;
        while index >= self.frames * ENTRIES_PER_FRAME {
            if let Err(refusal) = self.grow(space) {
                self.grefs.give(index, 1);
                return Err(refusal);
            }
        }
        let entry = entry_address(index);
        // SAFETY: the entry lies in a mapped frame of the table and is not valid yet.
        unsafe { ptr::write_volatile((entry + 2) as *mut u16, domid.0) };
        // SAFETY: as above.
        unsafe { ptr::write_volatile((entry + 4) as *mut u32, frame) };
        let rights = if writable { 0 } else { READ_ONLY };
        entry_flags(index).store(PERMIT_ACCESS | rights, Ordering::Release);
        Ok(Gref(index as u32))
    }

    /// False while the other side has the page mapped.
    pub(crate) fn revoke(&mut self, gref: Gref) -> bool {
        let index = gref.0 as usize;
        assert!(index >= RESERVED && self.grefs.all_taken(index, 1), "not a grant of ours");
        let flags = entry_flags(index);
        let seen = flags.load(Ordering::Acquire);
        let unused = seen & IN_USE == 0;
        if !unused || flags.compare_exchange(seen, 0, Ordering::SeqCst, Ordering::SeqCst).is_err() {
            return false;
        }
        self.grefs.give(index, 1);
        true
    }

    /// Whether a grant of ours that is not revoked gives away any of these pages. For the moment
    /// of freeing them: what is granted and handed out anew would be another guest's to read.
    pub(crate) fn gives_away(&self, space: &AddressSpace, first_page: u32, pages: usize) -> bool {
        let given: Vec<u64> =
            (0..pages as u32).map(|i| space.mfn(page_address(first_page + i))).collect();
        (RESERVED..self.frames * ENTRIES_PER_FRAME).any(|index| {
            // SAFETY: the entry lies in a mapped frame of the table; only we write its frame.
            let frame = unsafe { ptr::read_volatile((entry_address(index) + 4) as *const u32) };
            self.grefs.all_taken(index, 1) && given.contains(&frame.into())
        })
    }

    /// Asks Xen for one more frame and maps it.
    fn grow(&mut self, space: &mut AddressSpace) -> Result<(), Refusal> {
        if self.frames == GRANT_TABLE_FRAMES_MAX {
            return Err(Refusal::Full);
        }
        let mut list = [0u64; GRANT_TABLE_FRAMES_MAX];
        let mut op = [SetupTable {
            dom: DOMID_SELF,
            nr_frames: self.frames as u32 + 1,
            status: GENERAL_ERROR,
            frame_list: list.as_mut_ptr(),
        }];
        // SAFETY: the list has room for every frame that may be asked for.
        unsafe { grant_table_op(GNTTABOP_SETUP_TABLE, &mut op) }.map_err(Refusal::Errno)?;
        if op[0].status != OKAY {
            return Err(Refusal::Grant(op[0].status));
        }
        let address = GRANT_TABLE + self.frames as u64 * PAGE;
        space.map_frame(address, list[self.frames], Entry::WRITE);
        space.settle();
        self.frames += 1;
        Ok(())
    }
}

fn entry_address(index: usize) -> u64 {
    GRANT_TABLE + index as u64 * ENTRY_BYTES
}

fn entry_flags(index: usize) -> &'static AtomicU16 {
    // SAFETY: the entry lies in a mapped frame, aligned; Xen changes it by atomics as well.
    unsafe { AtomicU16::from_ptr(entry_address(index) as *mut u16) }
}

/// The grants that we have mapped.
pub(crate) struct GrantMaps {
    pages: Runs,
    /// Xen's handle of each mapped page of the window.
    handles: Box<[u32]>,
}

impl GrantMaps {
    pub(crate) fn new() -> GrantMaps {
        let handles = vec![0; GRANT_MAPS_PAGES].into_boxed_slice();
        GrantMaps { pages: Runs::new(GRANT_MAPS_PAGES), handles }
    }

    /// Whether these pages of the window are mapped.
    pub(crate) fn all_mapped(&self, first: usize, count: usize) -> bool {
        self.pages.all_taken(first, count)
    }

    /// Maps all or nothing, and returns the first page within the window.
    pub(crate) fn map(&mut self, domid: DomId, grefs: &[Gref]) -> Result<usize, Refusal> {
        let first = self.pages.take(grefs.len()).ok_or(Refusal::Full)?;
        let mut ops: Vec<MapRef> = grefs
            .iter()
            .enumerate()
            .map(|(i, gref)| MapRef {
                host_addr: map_address(first + i),
                flags: HOST_MAP,
                gref: gref.0,
                dom: domid.0,
                status: GENERAL_ERROR,
                handle: 0,
                dev_bus_addr: 0,
            })
            .collect();
        // SAFETY: the addresses are unmapped pages of the window, of which no reference exists.
        let result = unsafe { grant_table_op(GNTTABOP_MAP, &mut ops) };
        let mut refusal = result.err().map(Refusal::Errno);
        for (i, op) in ops.iter().enumerate() {
            self.handles[first + i] = op.handle;
            if op.status != OKAY {
                refusal = refusal.or(Some(Refusal::Grant(op.status)));
            }
        }
        let Some(refusal) = refusal else { return Ok(first) };
        for (i, _) in ops.iter().enumerate().filter(|(_, op)| op.status == OKAY) {
            self.unmap_pages(first + i, 1);
        }
        self.pages.give(first, grefs.len());
        Err(refusal)
    }

    /// Unmaps a run that [`GrantMaps::map`] returned.
    pub(crate) fn unmap(&mut self, first: usize, count: usize) {
        assert!(self.all_mapped(first, count), "not a mapped grant");
        self.unmap_pages(first, count);
        self.pages.give(first, count);
    }

    fn unmap_pages(&mut self, first: usize, count: usize) {
        let of_page = |page: usize| UnmapRef {
            host_addr: map_address(page),
            dev_bus_addr: 0,
            handle: self.handles[page],
            status: GENERAL_ERROR,
        };
        let mut ops: Vec<UnmapRef> = (first..first + count).map(of_page).collect();
        // SAFETY: the pages are ours to unmap: no reference into the window exists.
        let result = unsafe { grant_table_op(GNTTABOP_UNMAP, &mut ops) };
        let unmapped = result.is_ok() && ops.iter().all(|op| op.status == OKAY);
        assert!(unmapped, "a grant did not unmap: {result:?}");
    }
}

fn map_address(page: usize) -> u64 {
    GRANT_MAPS + page as u64 * PAGE
}

/// A reusable batch of copies: the request path allocates nothing.
pub(crate) struct CopyBatch {
    ops: Box<[Copy]>,
}

impl CopyBatch {
    pub(crate) fn new() -> CopyBatch {
        let end = CopyEnd { gref_or_mfn: 0, domid: 0, offset: 0 };
        let op = Copy { source: end, dest: end, len: 0, flags: 0, status: 0 };
        CopyBatch { ops: vec![op; COPY_BATCH].into_boxed_slice() }
    }

    /// Runs the copies; `mfn_of` gives the frame of each one's page of ours.
    pub(crate) fn run(&mut self, copies: &mut [GrantCopy], mfn_of: impl Fn(&GrantCopy) -> u64) {
        for chunk in copies.chunks_mut(COPY_BATCH) {
            let ops = &mut self.ops[..chunk.len()];
            for (op, copy) in ops.iter_mut().zip(chunk.iter()) {
                *op = to_wire(copy, mfn_of(copy));
            }
            // SAFETY: our ends are frames of the pool, which no reference points into; Xen checks
            // the guest's ends.
            let result = unsafe { grant_table_op(GNTTABOP_COPY, ops) };
            for (op, copy) in ops.iter().zip(chunk.iter_mut()) {
                copy.status = if result.is_ok() { op.status } else { GENERAL_ERROR };
            }
        }
    }
}

fn to_wire(copy: &GrantCopy, mfn: u64) -> Copy {
    let fits = |offset: u16| usize::from(offset) + usize::from(copy.len) <= PAGE_BYTES;
    assert!(copy.len > 0 && fits(copy.gref_offset) && fits(copy.page_offset), "crosses a page");
    let theirs =
        CopyEnd { gref_or_mfn: copy.gref.0.into(), domid: copy.domid.0, offset: copy.gref_offset };
    let ours = CopyEnd { gref_or_mfn: mfn, domid: DOMID_SELF, offset: copy.page_offset };
    let (source, dest, flags) = match copy.direction {
        Direction::FromGuest => (theirs, ours, SOURCE_GREF),
        Direction::ToGuest => (ours, theirs, DEST_GREF),
    };
    Copy { source, dest, len: copy.len, flags, status: GENERAL_ERROR }
}

/// What they would miss: whether Xen agrees.
#[cfg(test)]
mod tests {
    use super::*;
    use platter_xen::Region;

    fn copy(direction: Direction, gref_offset: u16, len: u16) -> GrantCopy {
        let page = Region { first_page: 700, pages: 1 };
        let (domid, gref) = (DomId(5), Gref(99));
        GrantCopy { domid, gref, gref_offset, page, page_offset: 512, len, direction, status: 0 }
    }

    #[test]
    fn a_copy_names_the_guest_by_gref_and_us_by_frame() {
        let wire = to_wire(&copy(Direction::FromGuest, 1024, 3072), 0xabcde);
        assert_eq!((wire.source.gref_or_mfn, wire.source.domid, wire.source.offset), (99, 5, 1024));
        assert_eq!(
            (wire.dest.gref_or_mfn, wire.dest.domid, wire.dest.offset),
            (0xabcde, DOMID_SELF, 512)
        );
        assert_eq!((wire.flags, wire.status), (SOURCE_GREF, GENERAL_ERROR));
        let wire = to_wire(&copy(Direction::ToGuest, 0, 1), 7);
        assert_eq!((wire.source.gref_or_mfn, wire.dest.gref_or_mfn), (7, 99));
        assert_eq!(wire.flags, DEST_GREF);
    }

    #[test]
    #[should_panic(expected = "crosses a page")]
    fn a_copy_across_a_page_is_our_mistake() {
        to_wire(&copy(Direction::ToGuest, 1025, 3072), 7);
    }

    #[test]
    fn reserved_grants_are_never_given() {
        let mut table = GrantTable::new();
        assert_eq!(table.grefs.take(1), Some(RESERVED));
    }
}
