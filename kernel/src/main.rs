//! The kernel binary: joins the machine and the server, and holds no logic of its own.
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

use log::info;
use platter_arch::{BootInfo, Machine};

platter_arch::entry!(main);

fn main(mut machine: Machine, boot: BootInfo) -> ! {
    let ready_us = (machine.now_ns() - boot.start_ns) / 1000;
    let memory_mib = (boot.memory_pages * platter_xen::PAGE_BYTES) >> 20;
    let (ms, us) = (ready_us / 1000, ready_us % 1000);
    info!("ready in {ms}.{us:03} ms (memory {memory_mib} MiB)");
    loop {
        machine.poll(&[boot.xenstore_port], u64::MAX);
    }
}
