//! The kernel binary: joins the machine and the server, and holds no logic of its own.
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

use log::info;
use platter_arch::{BootInfo, Machine, Shutdown};
use platter_kernel::{Ending, Server, Setup, Turn};

platter_arch::entry!(main);

fn main(mut machine: Machine, boot: BootInfo) -> ! {
    let setup = Setup {
        domid: boot.domid,
        xenstore_page: boot.xenstore_page,
        xenstore_port: boot.xenstore_port,
        heap_bytes: platter_arch::heap_stats().bytes_total,
    };
    let mut server = Server::new(&mut machine, setup);
    let mut said_ready = false;
    loop {
        machine.gather_events(server.has_little_to_do());
        let now_ns = machine.now_ns();
        match server.poll(&mut machine, now_ns) {
            Turn::Again => {}
            Turn::Sleep { until_ns } => machine.poll(server.ports(), until_ns),
            Turn::End(Ending::Poweroff) => machine.shutdown(Shutdown::Poweroff),
            Turn::End(Ending::Reboot) => machine.shutdown(Shutdown::Reboot),
        }
        if !said_ready && server.is_ready() {
            said_ready = true;
            let us = (machine.now_ns() - boot.start_ns) / 1000;
            let memory_mib = boot.memory_pages * platter_xen::PAGE_BYTES >> 20;
            info!("ready in {}.{:03} ms (memory {memory_mib} MiB)", us / 1000, us % 1000);
        }
    }
}
