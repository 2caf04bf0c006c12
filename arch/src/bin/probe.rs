//! A kernel that tests the machine where it can only be tested: under Xen.
//!
//! The domain's command line (`extra=`) says what to do:
//! - `check` goes through every facility and ends with "all checks passed" and a power-off;
//! - `speed` prints what the basic operations cost here;
//! - anything else names a way to die, and the console then must show a crash report (or, for
//!   `stack`, Xen's own log). Reaching "still alive" after one of them is a failure.
//!
//! It must never be given anything of value: it grants and copies pages at will.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;
use core::arch::asm;
use core::fmt::{self, Display};
use core::hint::black_box;
use core::ptr;

use log::{error, info};
use platter_arch::{BootInfo, Machine, Shutdown, heap_stats, now_ns};
use platter_xen::{
    Bus, Direction, DomId, GrantCopy, Gref, Hypervisor, PAGE_BYTES, Port, Refusal, Region,
};

platter_arch::entry!(main);

const MS: u64 = 1_000_000;

fn main(mut machine: Machine, boot: BootInfo) -> ! {
    let ready_us = (machine.now_ns() - boot.start_ns) / 1000;
    info!("ready in {ready_us} us, domain {}, {} pages", boot.domid.0, boot.memory_pages);
    match boot.cmdline {
        "check" => check(&mut machine, &boot),
        "speed" => speed(&mut machine, &boot),
        way => {
            misuse(&mut machine, way);
            die(way);
            error!("still alive after: {way}");
        }
    }
    machine.shutdown(Shutdown::Poweroff)
}

fn check(machine: &mut Machine, boot: &BootInfo) {
    assert!((1..MS * 1000).contains(&(machine.now_ns() - boot.start_ns)), "the clock is off");
    check_frames(machine);
    check_given_grants(machine, boot.domid);
    check_many_grants(machine, boot.domid);
    check_copies(machine, boot.domid);
    check_events(machine, boot.domid);
    check_sleep(machine, boot);
    assert!(machine.map_mmio(0xfee0_0000, 1).is_err(), "mapped registers of nobody's leave");
    assert!(machine.map_mmio(12, 1).is_err(), "mapped an unaligned address");
    info!("all checks passed; {:?}", heap_stats());
}

fn check_frames(machine: &mut Machine) {
    let left = machine.frames_left();
    let frames = machine.frames_alloc(20).expect("20 frames");
    let bytes: Vec<u8> = (0..10_000u32).map(|i| ((i * 31) >> 3) as u8).collect();
    let mut seen = vec![0xff; bytes.len()];
    machine.read(frames, 4000, &mut seen);
    assert!(seen.iter().all(|&byte| byte == 0), "frames are not zeroed");
    machine.write(frames, 4000, &bytes);
    machine.move_bytes((frames, 4000), (frames, 4010), bytes.len());
    machine.read(frames, 4010, &mut seen);
    assert!(seen == bytes, "bytes changed on the way");
    machine.store_u32(frames, 8, 0x0102_0304);
    assert_eq!(machine.load_u32(frames, 8), 0x0102_0304);
    assert_ne!(machine.dma_address(frames, 0), machine.dma_address(frames, 1));
    assert_eq!(machine.dma_address(frames, 0) % PAGE_BYTES as u64, 0);

    let rest = machine.frames_alloc(machine.frames_left()).expect("the pool in one run");
    machine.store_u32(rest, rest.bytes() - 4, 77);
    assert_eq!(machine.load_u32(rest, rest.bytes() - 4), 77, "the end of memory");
    assert_eq!(machine.frames_alloc(1), None);
    machine.frames_free(rest);
    machine.frames_free(frames);
    assert_eq!(machine.frames_left(), left);
}

/// Xen lets a domain use its own grants, so one domain shows both sides.
fn check_given_grants(machine: &mut Machine, own: DomId) {
    let frames = machine.frames_alloc(16).expect("16 frames");
    let gref = machine.grant(own, frames.page(1), true).expect("a grant");
    let mapped = machine.map(own, &[gref]).expect("a map");
    machine.store_u32(mapped, 40, 7);
    assert_eq!(machine.load_u32(frames, PAGE_BYTES + 40), 7, "another page was mapped");
    assert!(!machine.revoke(gref), "revoked while mapped");
    machine.unmap(mapped);
    assert!(machine.revoke(gref), "not revoked after the unmap");

    let read_only = machine.grant(own, frames.page(2), false).expect("a grant");
    assert_eq!(machine.map(own, &[read_only]), Err(Refusal::Grant(-1)));
    assert_eq!(machine.map(own, &[Gref(9999)]), Err(Refusal::Grant(-3)));
    assert_eq!(machine.map(DomId(777), &[Gref(9)]), Err(Refusal::Grant(-2)));

    let mut grefs: Vec<Gref> = Vec::new();
    for page in 0..16 {
        grefs.push(machine.grant(own, frames.page(page), true).expect("a grant"));
    }
    let good = core::mem::replace(&mut grefs[9], read_only);
    assert!(machine.map(own, &grefs).is_err(), "mapped a part");
    grefs[9] = good;
    let mapped = machine.map(own, &grefs).expect("nothing of the failed map remains");
    for page in 0..16 {
        machine.store_u32(frames, page * PAGE_BYTES, page as u32 * 3);
        assert_eq!(machine.load_u32(mapped, page * PAGE_BYTES), page as u32 * 3);
    }
    machine.unmap(mapped);
    for gref in grefs.into_iter().chain([read_only]) {
        assert!(machine.revoke(gref), "a failed map still holds a grant");
    }
    machine.frames_free(frames);
}

/// More than one frame of the table holds.
fn check_many_grants(machine: &mut Machine, own: DomId) {
    let frame = machine.frames_alloc(1).expect("a frame");
    let grefs: Vec<Gref> =
        (0..2000).map(|_| machine.grant(own, frame, true).expect("2000 grants")).collect();
    let last = grefs[1999];
    let mapped = machine.map(own, &[last]).expect("a grant of the last frame");
    machine.store_u32(frame, 0, 5);
    assert_eq!(machine.load_u32(mapped, 0), 5);
    machine.unmap(mapped);
    for gref in grefs {
        assert!(machine.revoke(gref));
    }
    machine.frames_free(frame);
}

fn copy_of(own: DomId, gref: Gref, page: Region) -> GrantCopy {
    let direction = Direction::FromGuest;
    let (domid, len, status) = (own, PAGE_BYTES as u16, 9);
    GrantCopy { domid, gref, gref_offset: 0, page, page_offset: 0, len, direction, status }
}

fn check_copies(machine: &mut Machine, own: DomId) {
    let frames = machine.frames_alloc(101).expect("101 frames");
    let grefs: Vec<Gref> =
        (0..100).map(|page| machine.grant(own, frames.page(page), true).expect("grants")).collect();
    let mut copies: Vec<GrantCopy> =
        grefs.iter().map(|&gref| copy_of(own, gref, frames.page(100))).collect();
    machine.write(frames.page(99), 100, b"from the last");
    let before = heap_stats().allocations;
    machine.copy(&mut copies);
    assert_eq!(heap_stats().allocations, before, "grant copies allocate");
    assert!(copies.iter().all(|copy| copy.status == 0), "a copy failed");
    let mut seen = [0; 13];
    machine.read(frames.page(100), 100, &mut seen);
    assert_eq!(&seen, b"from the last");

    copies[0].direction = Direction::ToGuest;
    (copies[0].page_offset, copies[0].gref_offset, copies[0].len) = (100, 4000, 13);
    copies[1].gref = Gref(60_000);
    copies[2].domid = DomId(777);
    machine.copy(&mut copies[..3]);
    assert_eq!([copies[0].status, copies[1].status, copies[2].status], [0, -3, -2]);
    machine.read(frames.page(0), 4000, &mut seen);
    assert_eq!(&seen, b"from the last");
    for gref in grefs {
        assert!(machine.revoke(gref));
    }
    machine.frames_free(frames);
}

fn check_events(machine: &mut Machine, own: DomId) {
    let port = machine.alloc_unbound(own).expect("a port");
    let other = machine.bind_interdomain(own, port).expect("its other end");
    machine.take_pending(other);
    machine.notify(other);
    assert!(machine.take_pending(port), "no event");
    assert!(!machine.take_pending(port), "not cleared");
    machine.notify(port);
    machine.poll(&[other], u64::MAX);
    assert!(machine.take_pending(other), "no event after a sleep");
    machine.gather_events(true);
    machine.notify(port);
    machine.notify(port);
    assert!(!machine.take_pending(other), "an event that was to wait");
    machine.poll(&[other], u64::MAX);
    assert!(machine.take_pending(other), "no event with a sleep");
    machine.notify(port);
    machine.send_events();
    assert!(machine.take_pending(other), "no event without a sleep");
    machine.gather_events(false);
    machine.notify(other);
    assert!(machine.bind_interdomain(own, Port(3000)).is_err());
    assert!(machine.bind_interdomain(DomId(777), Port(1)).is_err());
    machine.close_port(other);
    machine.notify(other);
    machine.close_port(port);
}

fn check_sleep(machine: &mut Machine, boot: &BootInfo) {
    let port = machine.alloc_unbound(boot.domid).expect("a port");
    let start_ns = now_ns();
    while now_ns() < start_ns + 50 * MS {
        machine.poll(&[port], start_ns + 50 * MS);
        assert!(now_ns() < start_ns + 5000 * MS, "overslept");
    }
    machine.poll(&[port], 0);
    machine.poll(&[port; 300], u64::MAX);
    machine.close_port(port);
}

/// Prints what something costs, as the mean of many.
fn cost<T>(what: &str, times: u64, mut act: impl FnMut() -> T) {
    black_box(act());
    let start_ns = now_ns();
    for _ in 0..times {
        black_box(act());
    }
    info!("{what}: {} ns", (now_ns() - start_ns) / times);
}

fn speed(machine: &mut Machine, boot: &BootInfo) {
    let from = vec![2u8; 1 << 16];
    let mut to = vec![1u8; 1 << 16];
    for len in [64, 512, 4096, 65536] {
        info!("copies of {len} bytes");
        cost("  memcpy", 200, || to[..len].copy_from_slice(black_box(&from[..len])));
        cost("  rep movsb", 200, || {
            let (to, from) = (to.as_mut_ptr(), from.as_ptr());
            // SAFETY: both vectors are longer than `len`.
            unsafe {
                asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _,
                    inout("rcx") len => _)
            }
        });
    }
    let frames = machine.frames_alloc(33).expect("33 frames");
    let mut page = vec![0; PAGE_BYTES];
    cost("read of a page", 200, || machine.read(frames, 0, &mut page));
    cost("load_u32", 1000, || machine.load_u32(frames, 64));
    cost("clock", 1000, now_ns);
    cost("take_pending", 1000, || machine.take_pending(boot.xenstore_port));
    cost("notify", 1000, || machine.notify(Port(0)));
    let mut copies: Vec<GrantCopy> = Vec::new();
    for index in 0..32 {
        let gref = machine.grant(boot.domid, frames.page(index), true).expect("grants");
        copies.push(copy_of(boot.domid, gref, frames.page(32)));
    }
    cost("32 grant copies", 100, || machine.copy(&mut copies));
    let grefs: Vec<Gref> = copies.iter().map(|copy| copy.gref).collect();
    cost("map and unmap of 32", 20, || {
        let mapped = machine.map(boot.domid, &grefs).expect("a map");
        machine.unmap(mapped);
    });
}

/// Regions that were not given out, or are not any more: each must be a panic.
fn misuse(machine: &mut Machine, way: &str) {
    let frames = machine.frames_alloc(4).expect("4 frames");
    match way {
        "forged" => machine.zero(Region { first_page: 0x100, pages: 4 }, 0, 8),
        "beyond" => machine.read(frames, 4 * PAGE_BYTES - 4, &mut [0; 8]),
        "stale" => {
            machine.frames_free(frames);
            machine.load_u32(frames, 0);
        }
        "granted" => {
            machine.grant(DomId(0), frames.page(2), true).expect("a grant");
            machine.frames_free(frames);
        }
        _ => {}
    }
}

/// Panics, or faults, while it is printed.
struct Bomb(fn());

impl Display for Bomb {
    fn fmt(&self, _: &mut fmt::Formatter) -> fmt::Result {
        (self.0)();
        Ok(())
    }
}

#[inline(never)]
fn die(way: &str) {
    match way {
        "null" => read_null(),
        "text" => write_to(die as *mut u64),
        "rodata" => write_to(WORDS.as_ptr().cast_mut()),
        "exec" => call(Box::leak(Box::new([0xc3u8; 16])).as_ptr()),
        "execstack" => call(black_box([0xc3u8; 16]).as_ptr()),
        "stack" => info!("{}", dig(0)),
        "panic" => info!("{}", WORDS[black_box(3)]),
        "panicpanic" => panic!("outer {}", Bomb(|| panic!("inner"))),
        "panicfault" => panic!("outer {}", Bomb(read_null)),
        "logpanic" => info!("before {} after", Bomb(|| panic!("inside a log line"))),
        "memory" => drop(black_box(Vec::<u8>::with_capacity(1 << 40))),
        // SAFETY: it raises an exception, which is what is asked for.
        "opcode" => unsafe { asm!("ud2") },
        _ => error!("unknown command: {way}"),
    }
}

static WORDS: [u64; 2] = [1, 2];

fn read_null() {
    // SAFETY: none: the fault is what is asked for.
    unsafe { ptr::read_volatile(black_box(8usize) as *const u64) };
}

fn write_to(address: *mut u64) {
    // SAFETY: none: the fault is what is asked for.
    unsafe { ptr::write_volatile(address, 0) };
}

fn call(code: *const u8) {
    // SAFETY: none: the fault is what is asked for.
    let function: extern "C" fn() = unsafe { core::mem::transmute(code) };
    function();
}

#[inline(never)]
fn dig(depth: u64) -> u64 {
    let room = black_box([depth; 64]);
    if depth == u64::MAX { 0 } else { dig(depth + 1) + room[3] }
}
