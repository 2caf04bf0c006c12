//! The end of the domain by a fault of our own: the reason, the registers and the way there on
//! the console, then SHUTDOWN_crash, so that the toolstack sees a crash and `on_crash` applies.
//!
//! Nothing here allocates or waits for a lock. A crash while reporting a crash says so in one
//! line; one more says nothing. `addr2line -f -C -e build/platter.debug ADDRESS...` names the
//! lines of a trace; frames are followed by frame pointers, which `make kernel` compiles in.

use core::arch::asm;
use core::fmt::{self, Display};
use core::panic::PanicInfo;
use core::ptr;
use core::sync::atomic::{AtomicU32, Ordering};

use crate::console::{self, last_words};
use crate::hypercall;
use crate::trap::Frame;

/// Frames that a trace follows.
const TRACE_MAX: usize = 32;

unsafe extern "C" {
    // Bounds from the linker script: only their addresses mean anything.
    static platter_text_start: u8;
    static platter_text_end: u8;
    static platter_stack_bottom: u8;
    static platter_stack_top: u8;
}

const AGAIN: &str = "crashed again while reporting the crash";

/// How many crashes have begun.
static DEPTH: AtomicU32 = AtomicU32::new(0);

/// What a kernel's panic handler does; [`crate::entry`] makes the handler.
pub fn panic(info: &PanicInfo) -> ! {
    let (rsp, rbp) = stack_registers();
    match (DEPTH.fetch_add(1, Ordering::Relaxed), info.location()) {
        (0, location) => {
            match location {
                Some(location) => last_words(format_args!("crash: panic at {location}")),
                None => last_words(format_args!("crash: panic")),
            }
            last_words(format_args!("  {}", info.message()));
            last_words(format_args!("  rsp {rsp:016x} rbp {rbp:016x}"));
            last_words(format_args!("  trace:{}", Trace { first: None, rbp }));
        }
        (1, Some(at)) => last_words(format_args!("  {AGAIN}: panic at {at}")),
        _ => {}
    }
    end()
}

/// An exception's report.
pub(crate) fn trap(frame: &Frame) -> ! {
    let (name, rip) = (frame.name(), frame.rip());
    match DEPTH.fetch_add(1, Ordering::Relaxed) {
        0 => report(frame),
        1 => last_words(format_args!("  {AGAIN}: {name} at rip {rip:#x}")),
        _ => {}
    }
    end()
}

fn report(frame: &Frame) {
    let (name, error, rip) = (frame.name(), frame.error_code(), frame.rip());
    match frame.fault_address() {
        Some(at) => last_words(format_args!("crash: {name} at address {at:#x}")),
        None => last_words(format_args!("crash: {name}")),
    }
    let Frame { vector, rax, rbx, rcx, rdx, rsi, rdi, rbp, .. } = *frame;
    let Frame { r8, r9, r10, r11, r12, r13, r14, r15, .. } = *frame;
    let (rsp, flags) = (frame.rsp(), frame.rflags());
    last_words(format_args!("  vector {vector} error {error:#x} rip {rip:016x}"));
    last_words(format_args!("  rsp {rsp:016x} rbp {rbp:016x} flags {flags:08x}"));
    last_words(format_args!("  rax {rax:016x} rbx {rbx:016x} rcx {rcx:016x}"));
    last_words(format_args!("  rdx {rdx:016x} rsi {rsi:016x} rdi {rdi:016x}"));
    last_words(format_args!("  r8  {r8:016x} r9  {r9:016x} r10 {r10:016x}"));
    last_words(format_args!("  r11 {r11:016x} r12 {r12:016x} r13 {r13:016x}"));
    last_words(format_args!("  r14 {r14:016x} r15 {r15:016x}"));
    last_words(format_args!("  trace:{}", Trace { first: Some(rip), rbp }));
}

/// The toolstack sees a crash once dom0 has had the time to read why.
fn end() -> ! {
    if DEPTH.load(Ordering::Relaxed) <= 2 {
        console::flush();
    }
    hypercall::sched_shutdown(xen_sys::SHUTDOWN_crash)
}

fn stack_registers() -> (u64, u64) {
    let (rsp, rbp);
    // SAFETY: two registers are read, nothing is written.
    unsafe { asm!("mov {}, rsp", "mov {}, rbp", out(reg) rsp, out(reg) rbp, options(nomem)) };
    (rsp, rbp)
}

/// Return addresses up the chain of frame pointers, as far as it makes sense.
struct Trace {
    first: Option<u64>,
    rbp: u64,
}

impl Display for Trace {
    fn fmt(&self, out: &mut fmt::Formatter) -> fmt::Result {
        let text = &raw const platter_text_start as u64..&raw const platter_text_end as u64;
        let stack = &raw const platter_stack_bottom as u64..&raw const platter_stack_top as u64;
        if let Some(address) = self.first {
            write!(out, " {address:#x}")?;
        }
        let mut rbp = self.rbp;
        for _ in 0..TRACE_MAX {
            if rbp % 8 != 0 || !stack.contains(&rbp) || !stack.contains(&(rbp + 15)) {
                break;
            }
            // SAFETY: both words lie in the mapped stack.
            let [next, return_address] = unsafe { ptr::read(rbp as *const [u64; 2]) };
            if !text.contains(&return_address) {
                break;
            }
            // One back lies in the call itself, which is the line that a reader wants.
            write!(out, " {:#x}", return_address - 1)?;
            if next <= rbp {
                break;
            }
            rbp = next;
        }
        Ok(())
    }
}

/// What the precompiled libraries name although nothing unwinds here: panics abort.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() -> ! {
    panic!("unwinding is not built in")
}

/// As above.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    panic!("unwinding is not built in")
}
