//! The Rust heap: a bounded piece of our memory, with counters.
//!
//! For start and attach. The request path allocates nothing, and [`heap_stats`] is how that is
//! shown: `allocations` stands still while requests run. linked_list_allocator is first fit over
//! a list of holes, so its cost grows with fragmentation: one more reason to keep it off the
//! request path. Guest data never lives here: it lives in pool frames.

use core::alloc::{GlobalAlloc, Layout};
use core::ptr::{self, NonNull};

use linked_list_allocator::Heap;
use spin::Mutex;

/// What the heap has done so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HeapStats {
    pub bytes_total: usize,
    pub bytes_used: usize,
    pub bytes_peak: usize,
    /// Allocations since the start, freed ones included.
    pub allocations: u64,
}

struct Counted {
    heap: Heap,
    bytes_peak: usize,
    allocations: u64,
}

/// One processor and no interrupts: the lock is only ever found taken when an allocation is made
/// inside another one, which is our mistake. So it is tried, never waited for.
struct Global(Mutex<Counted>);

#[cfg_attr(not(test), global_allocator)]
static HEAP: Global =
    Global(Mutex::new(Counted { heap: Heap::empty(), bytes_peak: 0, allocations: 0 }));

const NESTED: &str = "the heap is used inside itself";

// SAFETY: every block comes from the one heap behind the lock, which keeps blocks disjoint.
unsafe impl GlobalAlloc for Global {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let mut counted = self.0.try_lock().expect(NESTED);
        let Ok(block) = counted.heap.allocate_first_fit(layout) else {
            return ptr::null_mut();
        };
        counted.allocations += 1;
        counted.bytes_peak = counted.bytes_peak.max(counted.heap.used());
        block.as_ptr()
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        let block = NonNull::new(block).expect("freed a null pointer");
        let mut counted = self.0.try_lock().expect(NESTED);
        // SAFETY: the caller vouches that `block` came from `alloc` with this layout.
        unsafe { counted.heap.deallocate(block, layout) };
    }
}

/// Gives the heap its memory. Once.
///
/// # Safety
/// The range is mapped, writable, and used by nothing else, ever.
pub(crate) unsafe fn init(start: u64, bytes: usize) {
    let mut counted = HEAP.0.try_lock().expect(NESTED);
    assert!(counted.heap.size() == 0, "the heap has its memory already");
    // SAFETY: the caller vouches for the range.
    unsafe { counted.heap.init(start as *mut u8, bytes) };
}

/// The counters as they stand.
pub fn heap_stats() -> HeapStats {
    let counted = HEAP.0.try_lock().expect(NESTED);
    HeapStats {
        bytes_total: counted.heap.size(),
        bytes_used: counted.heap.used(),
        bytes_peak: counted.bytes_peak,
        allocations: counted.allocations,
    }
}
