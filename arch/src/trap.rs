//! Exceptions: every one is fatal and ends in a crash report.
//!
//! Xen enters a handler on the stack that was in use, with this on top of it (Xen
//! arch/x86/x86_64/entry.S, `create_bounce_frame`): rcx, r11, the error code for the vectors that
//! have one, rip, cs, rflags, rsp, ss. A handler never returns, so nothing is restored. A fault
//! on the stack itself (its guard page) cannot be delivered: Xen then ends the domain and prints
//! the registers on its own log.

use core::arch::global_asm;
use core::ffi::c_void;

use crate::{crash, hypercall, shared};

global_asm!(
    r#"
    .section .text.platter_trap, "ax", @progbits
    .irp vector, 0,1,3,4,5,6,7,10,11,12,13,14,16,17,19
    .balign 16
platter_trap_\vector:
    push \vector
    jmp platter_trap_any
    .endr

    .balign 16
platter_trap_any:
    push rdi
    push rsi
    push rdx
    push rax
    push r8
    push r9
    push r10
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    cld
    mov rdi, rsp
    and rsp, -16
    call platter_trap
    ud2

    // struct trap_info: u8 vector, u8 flags, u16 code selector, padding, u64 address.
    .section .rodata.platter_trap_table, "a", @progbits
    .balign 8
platter_trap_table:
    .irp vector, 0,1,3,4,5,6,7,10,11,12,13,14,16,17,19
    .byte \vector, 0
    .short {kernel_cs}
    .long 0
    .quad platter_trap_\vector
    .endr
    .quad 0, 0
"#,
    kernel_cs = const xen_sys::FLAT_KERNEL_CS,
);

const _: () = assert!(size_of::<xen_sys::trap_info>() == 16);

unsafe extern "C" {
    #[link_name = "platter_trap_table"]
    static TRAP_TABLE: c_void;
}

/// What the entry code leaves on the stack, lowest address first.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Frame {
    pub(crate) r15: u64,
    pub(crate) r14: u64,
    pub(crate) r13: u64,
    pub(crate) r12: u64,
    pub(crate) rbp: u64,
    pub(crate) rbx: u64,
    pub(crate) r10: u64,
    pub(crate) r9: u64,
    pub(crate) r8: u64,
    pub(crate) rax: u64,
    pub(crate) rdx: u64,
    pub(crate) rsi: u64,
    pub(crate) rdi: u64,
    pub(crate) vector: u64,
    pub(crate) rcx: u64,
    pub(crate) r11: u64,
    /// From rip, or from the error code when the vector has one. The last word may lie beyond
    /// the frame, but never beyond the stack: a caller's return address is above it.
    rest: [u64; 6],
}

impl Frame {
    fn has_error_code(&self) -> bool {
        matches!(self.vector, 8 | 10..=14 | 17)
    }

    pub(crate) fn error_code(&self) -> u64 {
        if self.has_error_code() { self.rest[0] } else { 0 }
    }

    fn after_error_code(&self, index: usize) -> u64 {
        self.rest[index + usize::from(self.has_error_code())]
    }

    pub(crate) fn rip(&self) -> u64 {
        self.after_error_code(0)
    }

    pub(crate) fn rflags(&self) -> u64 {
        self.after_error_code(2)
    }

    pub(crate) fn rsp(&self) -> u64 {
        self.after_error_code(3)
    }

    /// The exception's name (Intel SDM vol. 3, 6.3.1).
    pub(crate) fn name(&self) -> &'static str {
        match self.vector {
            0 => "divide error",
            1 => "debug exception",
            3 => "breakpoint",
            4 => "overflow",
            5 => "bound range exceeded",
            6 => "invalid opcode",
            7 => "no FPU",
            10 => "invalid TSS",
            11 => "segment not present",
            12 => "stack fault",
            13 => "general protection fault",
            14 => "page fault",
            16 => "x87 error",
            17 => "alignment check",
            19 => "SIMD error",
            _ => "unknown exception",
        }
    }

    /// The address of a page fault.
    pub(crate) fn fault_address(&self) -> Option<u64> {
        if self.vector == 14 { shared::fault_address() } else { None }
    }
}

/// Registers the handlers.
pub(crate) fn init() {
    // SAFETY: the table is made above, ends with a zero entry, and its handlers never return.
    let result = unsafe { hypercall::set_trap_table(&raw const TRAP_TABLE) };
    assert!(result.is_ok(), "set_trap_table failed: {result:?}");
}

#[unsafe(no_mangle)]
extern "C" fn platter_trap(frame: *const Frame) -> ! {
    // SAFETY: the entry code built it, and this stack is not unwound.
    crash::trap(unsafe { &*frame })
}
