//! Page tables of a PV guest: read directly, written only through Xen, which checks each entry.
//!
//! The rules it keeps: memory is writable or executable, never both; a page that serves as a
//! page table has no writable mapping (Xen refuses it otherwise); L1 entries leave USER clear,
//! for with it Xen makes a *user*, global page of it. Machine frames (mfn) are what entries
//! hold; `pfn` numbers our memory from 0.

use core::ptr;

use bitflags::bitflags;

use crate::hypercall::{self, DOMID_SELF};
use crate::layout::{
    MACHINE_TO_PFN, MEMORY_PAGES_MAX, PAGE, PAGE_SHIFT, VIRT_BASE, WINDOW_BASE, WINDOW_END,
};

bitflags! {
    /// Bits of a page table entry (Intel SDM vol. 3, 4.5).
    #[derive(Clone, Copy, PartialEq, Eq)]
    pub(crate) struct Entry: u64 {
        const PRESENT = 1;
        const WRITABLE = 1 << 1;
        const USER = 1 << 2;
        const WRITE_THROUGH = 1 << 3;
        const UNCACHED = 1 << 4;
        const ACCESSED = 1 << 5;
        const DIRTY = 1 << 6;
        const NO_EXECUTE = 1 << 63;

        const CODE = Self::PRESENT.bits() | Self::ACCESSED.bits();
        const READ = Self::CODE.bits() | Self::NO_EXECUTE.bits();
        const WRITE = Self::READ.bits() | Self::WRITABLE.bits() | Self::DIRTY.bits();
        const DEVICE = Self::WRITE.bits() | Self::UNCACHED.bits() | Self::WRITE_THROUGH.bits();
        /// An entry that points to a lower table. Here USER must be set.
        const TABLE = Self::CODE.bits() | Self::WRITABLE.bits() | Self::USER.bits()
            | Self::DIRTY.bits();
    }
}

/// The frame in an entry: bits 12 to 51. Xen uses bit 52 and up for itself.
const FRAME_MASK: u64 = 0x000f_ffff_ffff_f000;
const ENTRIES: u64 = 512;
/// Bytes that one L1 table maps.
const L1_SPAN: u64 = ENTRIES * PAGE;
/// Updates in one hypercall.
const BATCH: usize = 64;

/// Which frames are ours and where the page tables stand.
pub(crate) struct AddressSpace {
    /// `mfns[pfn]` is the machine frame of that page.
    mfns: &'static [u64],
    l4: u64,
    /// Pages kept for page tables: the next one, and the end of them.
    next_table: u64,
    tables_end: u64,
    /// Address behind the last page of our memory that is mapped.
    mapped_end: u64,
    batch: [xen_sys::mmu_update; BATCH],
    batched: usize,
}

impl AddressSpace {
    /// From what the domain builder says: list of frames, top page table, first unused page.
    /// The first unused pages become page tables, as many as all our memory can need.
    pub(crate) fn new(mfns: &'static [u64], l4: u64, first_unused: u64) -> AddressSpace {
        let batch = [xen_sys::mmu_update { ptr: 0, val: 0 }; BATCH];
        let mut space = AddressSpace {
            mfns,
            l4,
            next_table: first_unused,
            tables_end: first_unused,
            mapped_end: first_unused,
            batch,
            batched: 0,
        };
        let tables = |bytes: u64| bytes.div_ceil(L1_SPAN) + bytes.div_ceil(L1_SPAN * ENTRIES);
        let count = tables(space.end()) + tables(WINDOW_END - WINDOW_BASE);
        space.tables_end += count * PAGE;
        assert!(space.tables_end <= space.end(), "too little memory: {} pages", mfns.len());
        while space.mapped_end < space.end() && space.is_mapped(space.mapped_end) {
            space.mapped_end += PAGE;
        }
        space
    }

    /// Address behind the last page of our memory.
    pub(crate) fn end(&self) -> u64 {
        VIRT_BASE + self.pages() * PAGE
    }

    /// The first page that nothing uses and no page table will.
    pub(crate) fn first_unused(&self) -> u64 {
        self.tables_end
    }

    /// Address behind the last page of our memory that is mapped.
    pub(crate) fn mapped_end(&self) -> u64 {
        self.mapped_end
    }

    fn is_mapped(&self, address: u64) -> bool {
        let entry = self.l1_of(address).map(|l1| self.entry(l1, address >> PAGE_SHIFT));
        entry.is_some_and(|entry| entry & Entry::PRESENT.bits() != 0)
    }

    fn pages(&self) -> u64 {
        (self.mfns.len() as u64).min(MEMORY_PAGES_MAX)
    }

    /// The machine frame behind an address of our own memory.
    pub(crate) fn mfn(&self, address: u64) -> u64 {
        assert!((VIRT_BASE..self.end()).contains(&address), "not our memory: {address:#x}");
        self.mfns[((address - VIRT_BASE) >> PAGE_SHIFT) as usize]
    }

    /// Maps our memory up to an address, in steps of one L1 table. What is large is mapped when
    /// it is needed: 2 GiB at once would keep the start waiting for 0.2 s under emulation.
    pub(crate) fn map_until(&mut self, address: u64) {
        assert!(address <= self.end(), "beyond our memory");
        while self.mapped_end < address {
            // The builder maps whole L1 tables, so what is missing begins with a missing one.
            assert!(self.l1_of(self.mapped_end).is_none(), "a page table with a hole");
            self.add_l1(self.mapped_end, self.end());
            let next = (self.mapped_end / L1_SPAN + 1) * L1_SPAN;
            self.mapped_end = next.min(self.end());
        }
    }

    /// Makes empty page tables for the windows.
    pub(crate) fn make_windows(&mut self) {
        for at in (WINDOW_BASE..WINDOW_END).step_by(L1_SPAN as usize) {
            self.add_l1(at, at);
        }
    }

    /// Queues one L1 entry for a page of our own memory.
    pub(crate) fn protect(&mut self, address: u64, rights: Entry) {
        let value = match rights.is_empty() {
            true => 0,
            false => self.mfn(address) << PAGE_SHIFT | rights.bits(),
        };
        self.queue(address, value);
    }

    /// Queues one L1 entry for a frame that is not in the list (shared info, grant table).
    pub(crate) fn map_frame(&mut self, address: u64, mfn: u64, rights: Entry) {
        assert!((WINDOW_BASE..WINDOW_END).contains(&address), "outside the windows");
        self.queue(address, mfn << PAGE_SHIFT | rights.bits());
    }

    /// Writes one device page's entry at once; Xen may refuse the frame.
    pub(crate) fn map_device(&mut self, address: u64, mfn: u64) -> Result<(), i32> {
        self.commit();
        let value = mfn << PAGE_SHIFT | Entry::DEVICE.bits();
        let mut update = [xen_sys::mmu_update { ptr: self.l1_entry(address), val: value }];
        // SAFETY: the page lies in the device window, of which no reference exists.
        unsafe { hypercall::mmu_update(&mut update, hypercall::DOMID_IO) }
    }

    /// Queues the removal of a window's entry.
    pub(crate) fn unmap(&mut self, address: u64) {
        assert!((WINDOW_BASE..WINDOW_END).contains(&address), "outside the windows");
        self.queue(address, 0);
    }

    /// Sends what is queued. Old translations may live on until [`AddressSpace::settle`].
    fn commit(&mut self) {
        let updates = &mut self.batch[..self.batched];
        self.batched = 0;
        if updates.is_empty() {
            return;
        }
        // SAFETY: whoever queued an entry vouched for it: rights of our own image follow its
        // sections, and the windows hold no references.
        let result = unsafe { hypercall::mmu_update(updates, DOMID_SELF) };
        assert!(result.is_ok(), "Xen refused a page table entry: {result:?}");
    }

    /// Sends what is queued and drops old translations.
    pub(crate) fn settle(&mut self) {
        self.commit();
        hypercall::flush_tlb();
    }

    fn queue(&mut self, address: u64, value: u64) {
        let ptr = self.l1_entry(address);
        self.write_entry(ptr, value);
    }

    fn write_entry(&mut self, entry_machine_address: u64, value: u64) {
        let command = u64::from(xen_sys::MMU_NORMAL_PT_UPDATE);
        self.batch[self.batched] =
            xen_sys::mmu_update { ptr: entry_machine_address | command, val: value };
        self.batched += 1;
        if self.batched == BATCH {
            self.commit();
        }
    }

    /// Machine address of the L1 entry that maps `address`.
    fn l1_entry(&self, address: u64) -> u64 {
        let l1 = self.l1_of(address).expect("no page table there");
        self.entry_machine_address(l1, address >> PAGE_SHIFT)
    }

    fn entry_machine_address(&self, table: u64, index: u64) -> u64 {
        (self.mfn(table) << PAGE_SHIFT) + index % ENTRIES * 8
    }

    /// Our address of the L1 table for `address`, if there is one.
    fn l1_of(&self, address: u64) -> Option<u64> {
        let l3 = self.below(self.l4, address >> 39)?;
        let l2 = self.below(l3, address >> 30)?;
        self.below(l2, address >> 21)
    }

    fn below(&self, table: u64, index: u64) -> Option<u64> {
        let entry = self.entry(table, index);
        if entry & Entry::PRESENT.bits() == 0 {
            return None;
        }
        let slot = MACHINE_TO_PFN + (entry & FRAME_MASK) / PAGE * 8;
        // SAFETY: Xen maps its table for every guest; the frame is one of ours, so it has a slot.
        let pfn = unsafe { ptr::read_volatile(slot as *const u64) };
        assert!(pfn < self.pages(), "a page table outside our memory");
        Some(VIRT_BASE + pfn * PAGE)
    }

    fn entry(&self, table: u64, index: u64) -> u64 {
        let slot = table + index % ENTRIES * 8;
        // SAFETY: `table` is a page table of ours, mapped read-only; Xen may write it meanwhile.
        unsafe { ptr::read_volatile(slot as *const u64) }
    }

    /// Adds the L1 table for `at`, with our own memory in it below `end`.
    fn add_l1(&mut self, at: u64, end: u64) {
        let first = at / L1_SPAN * L1_SPAN;
        let l3 = self.below(self.l4, at >> 39).expect("the builder made the first L3 table");
        let l2 = match self.below(l3, at >> 30) {
            Some(l2) => l2,
            None => {
                let l2 = self.new_table(|_| 0);
                self.hook(l3, at >> 30, l2);
                l2
            }
        };
        let mfns = self.mfns;
        let l1 = self.new_table(|index| {
            let address = first + index * PAGE;
            match (VIRT_BASE..end).contains(&address) {
                true => {
                    let pfn = (address - VIRT_BASE) >> PAGE_SHIFT;
                    mfns[pfn as usize] << PAGE_SHIFT | Entry::WRITE.bits()
                }
                false => 0,
            }
        });
        self.hook(l2, at >> 21, l1);
    }

    /// Fills an unused page and makes it read-only, so that Xen accepts it as a page table.
    fn new_table(&mut self, entry_of: impl Fn(u64) -> u64) -> u64 {
        let table = self.next_table;
        assert!(table < self.tables_end, "no page is left for page tables");
        self.next_table += PAGE;
        for index in 0..ENTRIES {
            let slot = (table + index * 8) as *mut u64;
            // SAFETY: the page is mapped, writable and unused; nothing refers to it.
            unsafe { ptr::write_volatile(slot, entry_of(index)) };
        }
        self.protect(table, Entry::READ);
        table
    }

    fn hook(&mut self, table: u64, index: u64, lower: u64) {
        let value = self.mfn(lower) << PAGE_SHIFT | Entry::TABLE.bits();
        self.write_entry(self.entry_machine_address(table, index), value);
        self.commit();
    }
}
