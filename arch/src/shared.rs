//! The page shared with Xen: event bits, the clock, and the address of the last page fault.
//!
//! Events: every port stays masked for good and no upcall is ever taken; a port's pending bit is
//! read and cleared here, and SCHEDOP_poll sleeps until one is set. An unmasked port would wake
//! each sleep early once its selector bit is latched, so [`mask_all`] comes first of all.
//! Time: system time in ns since Xen booted, from the counter and the scale that Xen publishes
//! (Xen public/xen.h, `struct vcpu_time_info`).

use core::arch::x86_64::_rdtsc;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use platter_xen::Port;
use xen_sys::{shared_info, vcpu_time_info};

use crate::layout::SHARED_INFO;

/// Ports of the two-level event ABI (Xen public/event_channel.h).
const PORTS: u32 = 4096;

static MAPPED: AtomicBool = AtomicBool::new(false);

const fn info() -> *mut shared_info {
    SHARED_INFO as *mut shared_info
}

/// Says that the page is mapped, and masks every port: Xen starts a domain with all unmasked.
///
/// # Safety
/// The shared info frame is mapped at its address, writable.
pub(crate) unsafe fn mapped() {
    MAPPED.store(true, Ordering::Relaxed);
    for word in 0..64 {
        // SAFETY: the page is mapped; Xen reads these words, so each is written whole.
        unsafe { ptr::write_volatile(&raw mut (*info()).evtchn_mask[word], !0) };
    }
    fence(Ordering::SeqCst);
    // What was latched while ports were unmasked would end the first sleep early.
    // SAFETY: as above.
    unsafe { ptr::write_volatile(&raw mut (*info()).vcpu_info[0].evtchn_pending_sel, 0) };
    // SAFETY: as above.
    unsafe { ptr::write_volatile(&raw mut (*info()).vcpu_info[0].evtchn_upcall_pending, 0) };
}

/// Whether the page can be read yet.
pub(crate) fn is_mapped() -> bool {
    MAPPED.load(Ordering::Relaxed)
}

/// Atomically reads and clears a port's pending bit.
pub(crate) fn take_pending(port: Port) -> bool {
    assert!(port.0 < PORTS && is_mapped(), "no such port: {}", port.0);
    let bit = 1u64 << (port.0 % 64);
    // SAFETY: the page is mapped for good and the word is aligned; others use atomics as well.
    let word =
        unsafe { AtomicU64::from_ptr(&raw mut (*info()).evtchn_pending[(port.0 / 64) as usize]) };
    // A plain look first: a locked operation on a quiet port costs twenty times as much.
    word.load(Ordering::Acquire) & bit != 0 && word.fetch_and(!bit, Ordering::SeqCst) & bit != 0
}

/// The address of the last page fault (Xen public/arch-x86/xen-x86_64.h, `arch_vcpu_info`).
pub(crate) fn fault_address() -> Option<u64> {
    // SAFETY: the page is mapped when the guard says so.
    is_mapped().then(|| unsafe { ptr::read_volatile(&raw const (*info()).vcpu_info[0].arch.cr2) })
}

/// The processor's time stamp counter.
pub(crate) fn counter() -> u64 {
    // SAFETY: every x86-64 processor has it; Xen emulates it where it hides it.
    unsafe { _rdtsc() }
}

/// System time in ns: monotonic, the same for every domain of this host. 0 before the page is
/// mapped.
pub fn now_ns() -> u64 {
    if is_mapped() { counter_to_ns(counter(), &clock()) } else { 0 }
}

/// A counter value from before, in system time.
pub(crate) fn counter_ns(counter: u64) -> u64 {
    counter_to_ns(counter, &clock())
}

/// A consistent copy of the clock's scale: an odd or changed version means Xen is writing it.
fn clock() -> vcpu_time_info {
    assert!(is_mapped(), "the clock is read before the shared page is mapped");
    // SAFETY: the page is mapped for good; only raw pointers into it are made.
    let time = unsafe { &raw const (*info()).vcpu_info[0].time };
    loop {
        // SAFETY: the page is mapped and the field is aligned.
        let before = unsafe { ptr::read_volatile(&raw const (*time).version) };
        fence(Ordering::Acquire);
        // SAFETY: plain numbers, for which any bits are valid.
        let copy = unsafe { ptr::read_volatile(time) };
        fence(Ordering::Acquire);
        // SAFETY: as above.
        let after = unsafe { ptr::read_volatile(&raw const (*time).version) };
        if before == after && before & 1 == 0 {
            return copy;
        }
    }
}

/// `system_time + (((counter - tsc_timestamp) << tsc_shift) * tsc_to_system_mul >> 32)`.
///
/// The difference is signed and wraps: the counter of our entry may lie before the last update,
/// and an emulated counter starts at 0 with the domain, so the stamp of an update before that is
/// negative (Xen arch/x86/time.c, `gtime_to_gtsc`).
fn counter_to_ns(counter: u64, clock: &vcpu_time_info) -> u64 {
    let difference = counter.wrapping_sub(clock.tsc_timestamp) as i64;
    let delta = u128::from(difference.unsigned_abs());
    let shift = u32::from(clock.tsc_shift.unsigned_abs()).min(32);
    let shifted = if clock.tsc_shift < 0 { delta >> shift } else { delta << shift };
    let scaled = (shifted * u128::from(clock.tsc_to_system_mul)) >> 32;
    let ns = u64::try_from(scaled).unwrap_or(u64::MAX);
    match difference >= 0 {
        true => clock.system_time.saturating_add(ns),
        false => clock.system_time.saturating_sub(ns),
    }
}

/// What they would miss: a clock page that Xen updates meanwhile.
#[cfg(test)]
mod tests {
    use super::*;

    fn clock(tsc_shift: i8, tsc_to_system_mul: u32) -> vcpu_time_info {
        vcpu_time_info {
            version: 2,
            pad0: 0,
            tsc_timestamp: 1_000_000,
            system_time: 5_000_000_000,
            tsc_to_system_mul,
            tsc_shift,
            pad1: [0; 3],
        }
    }

    #[test]
    fn one_ghz_counts_nanoseconds() {
        // 2^31 of 2^32, shifted left by one: 1 ns a tick.
        let clock = clock(1, 1 << 31);
        assert_eq!(counter_to_ns(1_000_000, &clock), 5_000_000_000);
        assert_eq!(counter_to_ns(1_000_777, &clock), 5_000_000_777);
        assert_eq!(counter_to_ns(999_000, &clock), 4_999_999_000, "before the last update");
    }

    #[test]
    fn an_emulated_counter_is_younger_than_its_stamp() {
        let clock = vcpu_time_info { tsc_timestamp: -800_000i64 as u64, ..clock(1, 1 << 31) };
        assert_eq!(counter_to_ns(300, &clock), 5_000_800_300);
    }

    #[test]
    fn faster_counters_shift_right_and_long_gaps_do_not_overflow() {
        // 4 GHz: shifted right by one, then half.
        let fast = clock(-1, 1 << 31);
        assert_eq!(counter_to_ns(1_000_000 + 4_000, &fast), 5_000_001_000);
        let year_ticks = 4_000_000_000u64 * 3600 * 24 * 365;
        let year_ns = 1_000_000_000u64 * 3600 * 24 * 365;
        assert_eq!(counter_to_ns(1_000_000 + year_ticks, &fast), 5_000_000_000 + year_ns);
    }
}
