//! The PV console: a ring in a page that xenconsoled reads (Xen public/io/console.h).
//!
//! Output only. What does not fit into the ring waits in a backlog of our own, which each line
//! and each sleep move on, so logging does not wait for dom0. Only a full backlog makes a writer
//! wait, for at most [`WAIT_NS_MAX`]; then it drops and says later how much, because a stuck
//! console in dom0 must not stop a disk. Callers bound how often they log. Nothing here
//! allocates, for a crash report goes through here.

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

/// Room for some 200 lines.
const BACKLOG_BYTES: usize = 16 << 10;

/// Longest wait for room, in ns of system time: xenconsoled reads a domain at most 30 times in
/// 200 ms (Xen tools/console/daemon/io.c, RATE_LIMIT_PERIOD), so a living one has read by then.
const WAIT_NS_MAX: u64 = 250_000_000;
/// Longest wait for the last lines to be read before the domain ends.
const LAST_WAIT_NS_MAX: u64 = 1_000_000_000;
/// One look at the ring and the next, while waiting; and how many, should the clock stand still.
const PAUSE_NS: u64 = 1_000_000;
const TURNS_MAX: u32 = 5000;

/// Bytes that the ring has no room for yet, oldest first.
struct Backlog {
    bytes: [u8; BACKLOG_BYTES],
    start: usize,
    len: usize,
}

impl Backlog {
    const fn new() -> Backlog {
        Backlog { bytes: [0; BACKLOG_BYTES], start: 0, len: 0 }
    }

    /// False when it is full.
    fn push(&mut self, byte: u8) -> bool {
        let fits = self.len < BACKLOG_BYTES;
        if fits {
            self.bytes[(self.start + self.len) % BACKLOG_BYTES] = byte;
            self.len += 1;
        }
        fits
    }

    fn pop(&mut self) -> Option<u8> {
        self.len = self.len.checked_sub(1)?;
        let byte = self.bytes[self.start];
        self.start = (self.start + 1) % BACKLOG_BYTES;
        Some(byte)
    }
}

/// The ring, and what became of the output so far.
struct Console {
    /// Address of the ring page; 0 until it is known.
    page: u64,
    port: Port,
    backlog: Backlog,
    /// Set when a wait was in vain, until there is room again: only one line pays for it.
    stalled: bool,
    /// Longest wait for room, longer once the domain is about to end.
    wait_ns_max: u64,
    /// Set when the last byte kept did not end a line: a crash in the middle of a line, or what
    /// comes after a loss, begins a new one.
    mid_line: bool,
    bytes_lost: u64,
}

static CONSOLE: Mutex<Console> = Mutex::new(Console {
    page: 0,
    port: Port(0),
    backlog: Backlog::new(),
    stalled: false,
    wait_ns_max: WAIT_NS_MAX,
    mid_line: false,
    bytes_lost: 0,
});

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
    fn room(&self, prod: u32) -> u32 {
        OUT_BYTES.saturating_sub(prod.wrapping_sub(self.index(OUT_CONS)))
    }

    /// Moves what fits from the backlog to the ring, and tells dom0.
    fn drain(&mut self) {
        if self.page == 0 || self.backlog.len == 0 {
            return;
        }
        let mut prod = self.index(OUT_PROD);
        let room = self.room(prod);
        for byte in core::iter::from_fn(|| self.backlog.pop()).take(room as usize) {
            let slot = self.page + OUT + u64::from(prod % OUT_BYTES);
            // SAFETY: the slot lies in the ring's output part.
            unsafe { ptr::write_volatile(slot as *mut u8, byte) };
            prod = prod.wrapping_add(1);
        }
        fence(Ordering::Release);
        // SAFETY: the index lies in the page, aligned.
        unsafe { ptr::write_volatile((self.page + OUT_PROD) as *mut u32, prod) };
        fence(Ordering::SeqCst);
        if room > 0 {
            self.stalled = false;
            events::send(self.port);
        }
    }

    /// Bytes that dom0 has not read.
    fn unread(&self) -> usize {
        let ring = self.index(OUT_PROD).wrapping_sub(self.index(OUT_CONS)).min(OUT_BYTES);
        self.backlog.len + ring as usize
    }

    /// Lets dom0 read until at most `bytes` are left, or the time is up.
    fn drain_to(&mut self, bytes: usize) {
        let start_ns = shared::now_ns();
        let mut turns = 0;
        loop {
            self.drain();
            let waited_ns = shared::now_ns().saturating_sub(start_ns);
            let late = waited_ns > self.wait_ns_max || turns == TURNS_MAX;
            if self.unread() <= bytes || late {
                break;
            }
            self.pause();
            turns += 1;
        }
    }

    /// Waits for dom0 to read, or for a millisecond. Before there is a clock, only yields.
    fn pause(&self) {
        if !shared::is_mapped() {
            return hypercall::sched_yield();
        }
        shared::take_pending(self.port);
        hypercall::sched_poll(&mut [self.port.0], shared::now_ns() + PAUSE_NS);
    }

    fn put(&mut self, byte: u8) {
        let mut kept = self.backlog.push(byte);
        if !kept && !self.stalled {
            self.drain_to(BACKLOG_BYTES / 2);
            kept = self.backlog.push(byte);
        }
        if kept {
            self.mid_line = byte != b'\n';
        } else {
            self.stalled = true;
            self.bytes_lost += 1;
        }
    }

    fn line(&mut self, level: Level, args: fmt::Arguments) {
        let name = NAME.try_lock().map(|name| *name).unwrap_or_default();
        if self.mid_line {
            self.end_line();
        }
        if self.bytes_lost > 0 && !self.stalled {
            let lost = core::mem::take(&mut self.bytes_lost);
            write!(self, "{name}: warning: {lost} bytes of console output were lost").ok();
            self.end_line();
        }
        let mark = match level {
            Level::Error => "error: ",
            Level::Warn => "warning: ",
            _ => "",
        };
        write!(self, "{name}: {mark}{args}").ok();
        self.end_line();
        self.drain();
    }

    /// Both characters: `xl console` puts the terminal into raw mode.
    fn end_line(&mut self) {
        self.put(b'\r');
        self.put(b'\n');
    }
}

impl Write for Console {
    /// A record is one line whatever a guest's words in it are: nobody else ends a line here, or
    /// sends a terminal its commands.
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            self.put(match byte {
                b'\n' => b' ',
                0..b' ' | 0x7f => b'?',
                byte => byte,
            });
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

/// Moves the backlog on, before a sleep. While some is left, dom0's reading is worth waking up
/// for: the port to wait for as well.
pub(crate) fn before_sleep() -> Option<Port> {
    let mut console = CONSOLE.try_lock().expect(NESTED);
    if console.backlog.len == 0 {
        return None;
    }
    // Cleared before the look at the ring: what dom0 reads after it is a new event.
    shared::take_pending(console.port);
    console.drain();
    (console.backlog.len > 0).then_some(console.port)
}

/// The console for those who never come back, even when the crash came from inside it.
fn with_last_words(act: impl FnOnce(&mut Console)) {
    if CONSOLE.is_locked() {
        // SAFETY: the holder is below us on the stack and is never returned to.
        unsafe { CONSOLE.force_unlock() };
    }
    if let Some(mut console) = CONSOLE.try_lock().filter(|console| console.page != 0) {
        // Only the first of them gets the benefit of the doubt.
        if console.wait_ns_max != LAST_WAIT_NS_MAX {
            console.wait_ns_max = LAST_WAIT_NS_MAX;
            console.stalled = false;
        }
        act(&mut console);
    }
}

/// A line of a crash report.
pub(crate) fn last_words(args: fmt::Arguments) {
    with_last_words(|console| console.line(Level::Error, args));
}

/// Waits until dom0 has read all that was written: with the domain, its ring goes too.
pub(crate) fn flush() {
    with_last_words(|console| console.drain_to(0));
}

/// What they would miss: a reader that reads slowly, or never.
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_backlog_keeps_order_across_its_end_and_refuses_what_does_not_fit() {
        let mut backlog = Backlog::new();
        let mut pushed = 0u32;
        let mut popped = 0u32;
        for round in 0..50 {
            while backlog.push(pushed as u8) {
                pushed += 1;
            }
            assert_eq!((pushed - popped) as usize, BACKLOG_BYTES);
            for _ in 0..round * 331 {
                assert_eq!(backlog.pop(), Some(popped as u8));
                popped += 1;
            }
        }
        while let Some(byte) = backlog.pop() {
            assert_eq!(byte, popped as u8);
            popped += 1;
        }
        assert_eq!(pushed, popped);
    }
}
