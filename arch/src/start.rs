//! From the domain builder's hand-over to the kernel's own `main`.
//!
//! The order matters: the console first, so that anything later can say why it failed; then
//! exceptions; then page rights, for up to there everything is writable and executable; then the
//! shared page and the masks; then memory, heap and pool. Nothing allocates before the heap.
//!
//! The ELF notes tell the builder where we want to be. Four are needed: without any one of them
//! it says only "no loader found". PADDR_OFFSET = VIRT_BASE because the image is linked at its
//! addresses; VIRT_BASE is 1 MiB and not 0, so that null pointers fault.

use core::arch::global_asm;
use core::ffi::CStr;
use core::ptr;
use core::slice;

use platter_xen::{Port, Region};
use xen_sys::start_info;

use crate::layout::{MACHINE_TO_PFN, PAGE, PAGE_SHIFT, SHARED_INFO, VIRT_BASE, page_number};
use crate::machine::{BootInfo, Machine};
use crate::paging::{AddressSpace, Entry};
use crate::{console, events, heap, shared, trap};

/// Share of the memory that becomes heap, and its largest size in bytes.
const HEAP_SHARE: u64 = 4;
const HEAP_BYTES_MAX: u64 = 64 << 20;

global_asm!(
    r#"
    .section .note.Xen, "a", @note
    .balign 4
    // ELFNOTE(Xen, XEN_ELFNOTE_XEN_VERSION, .asciz "xen-3.0")
    .long 4, 8, {xen_version}
    .asciz "Xen"
    .asciz "xen-3.0"
    // ELFNOTE(Xen, XEN_ELFNOTE_LOADER, .asciz "generic")
    .long 4, 8, {loader}
    .asciz "Xen"
    .asciz "generic"
    // ELFNOTE(Xen, XEN_ELFNOTE_VIRT_BASE, .quad VIRT_BASE)
    .long 4, 8, {virt_base_note}
    .asciz "Xen"
    .quad {virt_base}
    // ELFNOTE(Xen, XEN_ELFNOTE_PADDR_OFFSET, .quad VIRT_BASE)
    .long 4, 8, {paddr_offset}
    .asciz "Xen"
    .quad {virt_base}
    // ELFNOTE(Xen, XEN_ELFNOTE_GUEST_OS, .asciz "platter")
    .long 4, 8, {guest_os}
    .asciz "Xen"
    .asciz "platter"

    // rsi = start info. The builder's stack is one page without a guard, so ours at once; the
    // counter first, for it is the time of entry. rbp = 0 ends a trace.
    .section .text.platter_entry, "ax", @progbits
    .globl _start
    .type _start, @function
_start:
    rdtsc
    shl rdx, 32
    or rax, rdx
    mov rdi, rsi
    mov rsi, rax
    lea rsp, [rip + platter_stack_top]
    xor ebp, ebp
    call platter_start
    ud2
"#,
    xen_version = const xen_sys::XEN_ELFNOTE_XEN_VERSION,
    loader = const xen_sys::XEN_ELFNOTE_LOADER,
    virt_base_note = const xen_sys::XEN_ELFNOTE_VIRT_BASE,
    paddr_offset = const xen_sys::XEN_ELFNOTE_PADDR_OFFSET,
    guest_os = const xen_sys::XEN_ELFNOTE_GUEST_OS,
    virt_base = const VIRT_BASE,
);

unsafe extern "C" {
    // Bounds from the linker script: only their addresses mean anything.
    static platter_text_start: u8;
    static platter_text_end: u8;
    static platter_rodata_end: u8;
    static platter_data_end: u8;
    static platter_stack_guard: u8;
}

unsafe extern "Rust" {
    /// The kernel's name and its main function, both from [`crate::entry`].
    safe static PLATTER_NAME: &'static str;
    safe fn platter_main(machine: Machine, boot: BootInfo) -> !;
}

#[unsafe(no_mangle)]
extern "C" fn platter_start(info_page: *const start_info, entry_counter: u64) -> ! {
    // SAFETY: the builder's page, which nobody writes after the start.
    let info = unsafe { &*info_page };
    // SAFETY: for a domain that is not dom0 the console is this member of the union.
    let console_info = unsafe { info.console.domU };
    let console = builder_page(console_info.mfn);
    console::init(console, Port(console_info.evtchn), PLATTER_NAME);
    trap::init();

    // SAFETY: the builder's list of frames, one for each page, written by nobody after the start.
    let mfns =
        unsafe { slice::from_raw_parts(info.mfn_list as *const u64, info.nr_pages as usize) };
    // Behind the page tables comes the builder's boot stack, one page, which stays unused.
    let first_unused = info.pt_base + (info.nr_pt_frames + 1) * PAGE;
    let mut space = AddressSpace::new(mfns, info.pt_base, first_unused);
    let xenstore = builder_page(info.store_mfn);
    set_rights(&mut space, info, info_page as u64, [console, xenstore]);
    space.make_windows();
    space.map_frame(SHARED_INFO, info.shared_info >> PAGE_SHIFT, Entry::WRITE);
    space.settle();
    // SAFETY: it is, as of the line above.
    unsafe { shared::mapped() };

    let heap_bytes = (info.nr_pages * PAGE / HEAP_SHARE).min(HEAP_BYTES_MAX) / PAGE * PAGE;
    let heap_start = space.first_unused();
    assert!(heap_start + heap_bytes < space.end(), "too little memory: {} pages", info.nr_pages);
    space.map_until(heap_start + heap_bytes);
    // SAFETY: mapped writable as of the line above, and handed out to nobody but the heap.
    unsafe { heap::init(heap_start, heap_bytes as usize) };

    let xenstore_page = Region { first_page: page_number(xenstore), pages: 1 };
    let pool_start = page_number(heap_start + heap_bytes);
    // SAFETY: from there to the end all is unused, and writable as far as it is mapped.
    let machine = unsafe { Machine::new(space, pool_start, xenstore_page) };
    let boot = BootInfo {
        domid: events::own_domid(),
        memory_pages: mfns.len(),
        xenstore_page,
        xenstore_port: Port(info.store_evtchn),
        start_ns: shared::counter_ns(entry_counter),
        cmdline: command_line(info),
    };
    platter_main(machine, boot)
}

/// The address of a page that the builder made and names by its machine frame.
fn builder_page(mfn: u64) -> u64 {
    let slot = MACHINE_TO_PFN + mfn * 8;
    // SAFETY: Xen maps its table for every guest; the frame is one of ours, so it has a slot.
    let pfn = unsafe { ptr::read_volatile(slot as *const u64) };
    VIRT_BASE + pfn * PAGE
}

/// Takes away what the builder gave too much: it maps all but page tables writable and
/// executable. What lies behind our last page table is free memory, mapped so far as it is.
fn set_rights(space: &mut AddressSpace, info: &start_info, info_page: u64, shared: [u64; 2]) {
    let text = &raw const platter_text_start as u64;
    let text_end = &raw const platter_text_end as u64;
    let rodata_end = &raw const platter_rodata_end as u64;
    let data_end = &raw const platter_data_end as u64;
    let tables_end = info.pt_base + info.nr_pt_frames * PAGE;
    let mapped_end = space.mapped_end();
    let mut set = |from: u64, to: u64, rights: Entry| {
        for page in (from..to).step_by(PAGE as usize) {
            space.protect(page, rights);
        }
    };
    set(text, text_end, Entry::CODE);
    set(text_end, rodata_end, Entry::READ);
    set(rodata_end, data_end, Entry::WRITE);
    set(data_end, tables_end, Entry::READ);
    set(tables_end, mapped_end, Entry::WRITE);
    for page in shared {
        assert!((data_end..info_page + 16 * PAGE).contains(&page), "a page out of place");
        set(page, page + PAGE, Entry::WRITE);
    }
    let guard = &raw const platter_stack_guard as u64;
    set(guard, guard + PAGE, Entry::empty());
    space.settle();
}

/// The command line of the domain's configuration, without what is not UTF-8.
fn command_line(info: &'static start_info) -> &'static str {
    let bytes = info.cmd_line.as_ptr().cast::<u8>();
    // SAFETY: the array lies in the builder's page, which lives and stays unwritten for good.
    let bytes = unsafe { slice::from_raw_parts(bytes, info.cmd_line.len()) };
    let line = CStr::from_bytes_until_nul(bytes).ok();
    line.and_then(|line| line.to_str().ok()).unwrap_or("")
}
