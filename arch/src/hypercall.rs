//! Hypercalls: a direct `syscall`, and one small wrapper for each that the machine uses.
//!
//! Calling convention (Xen public/arch-x86/xen-x86_64.h): number in rax; arguments in rdi, rsi,
//! rdx, r10, r8; result in rax; rcx and r11 are lost. A debug build of Xen destroys the argument
//! registers as well, so they are all declared lost. The blocks are never `nostack`: an
//! exception frame may land below the stack pointer. The xen-sys crate's own wrappers are not
//! used: they put the fifth argument in r9 and hand SCHEDOP_shutdown its argument by value.

use core::arch::asm;
use core::ffi::c_void;
use core::ptr;

/// Ourselves, wherever a domain is asked for (Xen public/xen.h, `DOMID_SELF`).
pub(crate) const DOMID_SELF: u16 = 0x7ff0;
/// Owner of device memory (Xen public/xen.h, `DOMID_IO`).
pub(crate) const DOMID_IO: u16 = 0x7ff1;

/// Ports that one SCHEDOP_poll takes (Xen common/sched/core.c, `do_poll`).
pub(crate) const POLL_PORTS_MAX: usize = 128;

/// Any hypercall.
///
/// # Safety
/// The arguments are what the hypercall `number` expects, and what they point to is ours to be
/// read or written by it.
unsafe fn hypercall(number: u32, args: [u64; 4]) -> i64 {
    let result: i64;
    // SAFETY: the caller vouches for the arguments; the clobbers are those of the convention.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") u64::from(number) => result,
            inlateout("rdi") args[0] => _,
            inlateout("rsi") args[1] => _,
            inlateout("rdx") args[2] => _,
            inlateout("r10") args[3] => _,
            lateout("r8") _,
            lateout("r9") _,
            lateout("rcx") _,
            lateout("r11") _,
        )
    };
    result
}

/// Zero and up is success; the rest is an errno (Xen public/errno.h), which fits an i32.
fn checked(result: i64) -> Result<i64, i32> {
    if result < 0 { Err(i32::try_from(result).unwrap_or(i32::MIN)) } else { Ok(result) }
}

/// Lets another domain run.
pub(crate) fn sched_yield() {
    // SAFETY: SCHEDOP_yield takes no argument.
    unsafe { hypercall(xen_sys::__HYPERVISOR_sched_op, [xen_sys::SCHEDOP_yield.into(), 0, 0, 0]) };
}

/// The argument of SCHEDOP_poll: a sleep until one of `ports` is pending or the system time is
/// `timeout_ns`; 0 is for ever. It lives as long as the ports.
pub(crate) fn poll_of(ports: &mut [u32], timeout_ns: u64) -> xen_sys::sched_poll {
    assert!(ports.len() <= POLL_PORTS_MAX, "more ports than one poll takes");
    let nr_ports = ports.len() as u32;
    xen_sys::sched_poll { ports: ports.as_mut_ptr(), nr_ports, timeout: timeout_ns }
}

/// Sleeps until one of `ports` is pending or the system time is `timeout_ns`; 0 is for ever.
pub(crate) fn sched_poll(ports: &mut [u32], timeout_ns: u64) {
    let poll = poll_of(ports, timeout_ns);
    let args = [xen_sys::SCHEDOP_poll.into(), &raw const poll as u64, 0, 0];
    // SAFETY: `poll` and the ports it names live until the call returns.
    let result = unsafe { hypercall(xen_sys::__HYPERVISOR_sched_op, args) };
    assert!(result == 0, "SCHEDOP_poll of {} ports failed: {result}", ports.len());
}

/// One hypercall of a [`multicall`].
pub(crate) fn call(number: u32, command: u32, arg: u64) -> xen_sys::multicall_entry {
    let args = [command.into(), arg, 0, 0, 0, 0];
    xen_sys::multicall_entry { op: number.into(), result: 0, args }
}

/// Several hypercalls, in order, for one way into Xen and back. Each leaves its result.
///
/// # Safety
/// As for [`hypercall`], for each of them.
pub(crate) unsafe fn multicall(calls: &mut [xen_sys::multicall_entry]) {
    let args = [calls.as_mut_ptr() as u64, calls.len() as u64, 0, 0];
    // SAFETY: the calls are a slice, and the caller vouches for each.
    let result = unsafe { hypercall(xen_sys::__HYPERVISOR_multicall, args) };
    assert!(result == 0, "a multicall of {} failed: {result}", calls.len());
}

/// Ends the domain with a SHUTDOWN_* reason.
pub(crate) fn sched_shutdown(reason: u32) -> ! {
    let shutdown = xen_sys::sched_shutdown { reason };
    let args = [xen_sys::SCHEDOP_shutdown.into(), &raw const shutdown as u64, 0, 0];
    loop {
        // SAFETY: `shutdown` lives until the call returns, if it ever does.
        unsafe { hypercall(xen_sys::__HYPERVISOR_sched_op, args) };
    }
}

/// An event channel operation on its own struct.
///
/// # Safety
/// `T` is the struct of EVTCHNOP `command`.
pub(crate) unsafe fn event_channel_op<T>(command: u32, arg: &mut T) -> Result<(), i32> {
    let args = [command.into(), ptr::from_mut(arg) as u64, 0, 0];
    // SAFETY: the caller vouches that command and struct belong together.
    checked(unsafe { hypercall(xen_sys::__HYPERVISOR_event_channel_op, args) }).map(|_| ())
}

/// A batch of grant table operations. Success says nothing about the single ones.
///
/// # Safety
/// `T` is the struct of GNTTABOP `command`, and the addresses and frames in it are ours to give.
pub(crate) unsafe fn grant_table_op<T>(command: u32, ops: &mut [T]) -> Result<(), i32> {
    let args = [command.into(), ops.as_mut_ptr() as u64, ops.len() as u64, 0];
    // SAFETY: the caller vouches for the contents; the length is the slice's own.
    checked(unsafe { hypercall(xen_sys::__HYPERVISOR_grant_table_op, args) }).map(|_| ())
}

/// Writes page table entries. `owner` is DOMID_SELF, or DOMID_IO for device memory.
///
/// # Safety
/// No entry takes a page away, or its write permission, that Rust still uses, and none makes
/// memory of others reachable through a reference.
pub(crate) unsafe fn mmu_update(
    updates: &mut [xen_sys::mmu_update],
    owner: u16,
) -> Result<(), i32> {
    let args = [updates.as_mut_ptr() as u64, updates.len() as u64, 0, owner.into()];
    // SAFETY: the caller vouches for the entries.
    checked(unsafe { hypercall(xen_sys::__HYPERVISOR_mmu_update, args) }).map(|_| ())
}

/// Drops all cached translations of this virtual processor.
pub(crate) fn flush_tlb() {
    let mut op = xen_sys::mmuext_op {
        cmd: xen_sys::MMUEXT_TLB_FLUSH_LOCAL,
        arg1: xen_sys::mmuext_op__bindgen_ty_1 { mfn: 0 },
        arg2: xen_sys::mmuext_op__bindgen_ty_2 { nr_ents: 0 },
    };
    let args = [&raw mut op as u64, 1, 0, DOMID_SELF.into()];
    // SAFETY: a flush takes no argument beyond its command.
    let result = unsafe { hypercall(xen_sys::__HYPERVISOR_mmuext_op, args) };
    assert!(result == 0, "MMUEXT_TLB_FLUSH_LOCAL failed: {result}");
}

/// Registers exception handlers. The table ends with an entry whose address is 0.
///
/// # Safety
/// Every address is an entry that understands Xen's exception frame and does not return.
pub(crate) unsafe fn set_trap_table(table: *const c_void) -> Result<(), i32> {
    // SAFETY: the caller vouches for the table.
    let result =
        unsafe { hypercall(xen_sys::__HYPERVISOR_set_trap_table, [table as u64, 0, 0, 0]) };
    checked(result).map(|_| ())
}
