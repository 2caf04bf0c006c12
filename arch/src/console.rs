//! The PV console: a ring in a page that xenconsoled reads (Xen public/io/console.h).
//!
//! Output only. When the ring is full the writer yields for at most [`WAIT_NS_MAX`], then drops
//! what is left and says later how much: a stuck console in dom0 must not stop a disk. Callers
//! bound how often they log; this file bounds how long one line may take. It never allocates,
//! for a crash report goes through here.

use core::fmt::{self, Write};
use core::ptr;
use core::sync::atomic::{Ordering, fence};

use log::{Level, LevelFilter, Log, Metadata, Record};
use platter_xen::Port;
use spin::Mutex;

use crate::{events, hypercall, shared};

/// `struct xencons_interface`: `char in[1024]`, `char out[2048]`, then four 32-bit indexes:
/// in_cons, in_prod, out_cons, out_prod.
const OUT: u64 = 1024;
const OUT_BYTES: u32 = 2048;
const OUT_CONS: u64 = 3080;
const OUT_PROD: u64 = 3084;

/// Longest wait for room, in ns of system time. xenconsoled empties the ring within a few ms.
const WAIT_NS_MAX: u64 = 50_000_000;
/// The same before the clock can be read.
const YIELDS_MAX: u32 = 1000;

/// The ring, and what became of the output so far.
struct Console {
    /// Address of the ring page; 0 until it is known.
    page: u64,
    port: Port,
    /// Set when a wait was in vain, until the ring has room again: only one line pays for it.
    stalled: bool,
    bytes_lost: u64,
}

static CONSOLE: Mutex<Console> =
    Mutex::new(Console { page: 0, port: Port(0), stalled: false, bytes_lost: 0 });

const NESTED: &str = "the console is used inside itself";

/// The name that begins each line: the kernel's own.
static NAME: Mutex<&str> = Mutex::new("");

/// Takes the ring page and its port, and becomes the logger.
pub(crate) fn init(page: u64, port: Port, name: &'static str) {
    let mut console = CONSOLE.try_lock().expect(NESTED);
    console.page = page;
    console.port = port;
    *NAME.try_lock().expect(NESTED) = name;
    log::set_logger(&Lines).expect("there is one logger");
    log::set_max_level(LevelFilter::Info);
}

impl Console {
    fn index(&self, offset: u64) -> u32 {
        // SAFETY: the page is mapped for good; dom0 writes it too, so the read is volatile.
        unsafe { ptr::read_volatile((self.page + offset) as *const u32) }
    }

    /// Bytes that fit. The consumer index is dom0's word: a nonsensical one means no room.
    fn room(&self) -> u32 {
        let held = self.index(OUT_PROD).wrapping_sub(self.index(OUT_CONS));
        OUT_BYTES.saturating_sub(held)
    }

    fn put(&mut self, byte: u8) {
        if self.room() == 0 && !self.wait() {
            self.bytes_lost += 1;
            return;
        }
        let prod = self.index(OUT_PROD);
        let slot = self.page + OUT + u64::from(prod % OUT_BYTES);
        // SAFETY: the slot lies in the ring's output part.
        unsafe { ptr::write_volatile(slot as *mut u8, byte) };
        fence(Ordering::Release);
        // SAFETY: the index lies in the page, aligned.
        unsafe { ptr::write_volatile((self.page + OUT_PROD) as *mut u32, prod.wrapping_add(1)) };
    }

    /// Waits for room. False when there is none, at once after a wait was in vain.
    fn wait(&mut self) -> bool {
        if self.stalled {
            return false;
        }
        events::send(self.port);
        let start_ns = shared::now_ns();
        for _ in 0..YIELDS_MAX {
            hypercall::sched_yield();
            if self.room() > 0 {
                return true;
            }
            if shared::now_ns().saturating_sub(start_ns) > WAIT_NS_MAX {
                break;
            }
        }
        self.stalled = true;
        false
    }

    fn line(&mut self, level: Level, args: fmt::Arguments) {
        if self.page == 0 {
            return;
        }
        if self.room() == OUT_BYTES {
            self.stalled = false;
        }
        let name = NAME.try_lock().map(|name| *name).unwrap_or_default();
        if self.bytes_lost > 0 && !self.stalled {
            let lost = core::mem::take(&mut self.bytes_lost);
            writeln!(self, "{name}: warning: {lost} bytes of console output were lost").ok();
        }
        let mark = match level {
            Level::Error => "error: ",
            Level::Warn => "warning: ",
            _ => "",
        };
        writeln!(self, "{name}: {mark}{args}").ok();
        fence(Ordering::SeqCst);
        events::send(self.port);
    }
}

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                // `xl console` puts the terminal into raw mode.
                self.put(b'\r');
            }
            self.put(byte);
        }
        Ok(())
    }
}

/// The logger: one record, one line.
struct Lines;

impl Log for Lines {
    fn enabled(&self, metadata: &Metadata) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record) {
        if self.enabled(record.metadata()) {
            CONSOLE.try_lock().expect(NESTED).line(record.level(), *record.args());
        }
    }

    fn flush(&self) {}
}

/// A line of a crash report: goes out even when the crash came from inside the console.
pub(crate) fn last_words(args: fmt::Arguments) {
    if CONSOLE.is_locked() {
        // SAFETY: the holder is below us on the stack and is never returned to.
        unsafe { CONSOLE.force_unlock() };
    }
    if let Some(mut console) = CONSOLE.try_lock() {
        console.stalled = false;
        console.line(Level::Error, args);
    }
}
