//! Frontends by their habits: how each of them opens a disk, uses it, and leaves it.
//!
//! A backend has to bear every one of these cycles, one after another on the same disk
//! (Xen docs: misc/xenstore-paths, io/xenbus.h; what the frontends' own sources do). After each
//! cycle all our pages must be ours again, and between them a sector is written and read back, so
//! that a backend which only says Connected does not pass.

use alloc::format;
use alloc::string::{String, ToString};

use platter_xen::blkif::{Abi, Segment, Status, emit_transfer, op};
use platter_xen::ring::FrontRing;
use platter_xen::xenstore::Op;
use platter_xen::{Gref, Region};

use crate::front::{
    CLOSED, CLOSING, CONNECTED, Disk, INIT_WAIT, INITIALISED, INITIALISING, STEP_NS, Shape, Wires,
    connect, disconnect, free_granted, grant_all,
};
use crate::guest::{Guest, SECOND_NS};
use crate::stamp::{STAMP_BYTES, Stamp};
use crate::xs::XenStore;

/// All habits, in the order in which `all` plays them.
pub const NAMES: [&str; 8] =
    ["pvgrub2", "minios", "ovmf", "xenvbd", "kexec", "stale", "missing", "reload"];

/// How long an answer may take.
const ANSWER_NS: u64 = 20 * SECOND_NS;
/// How long a backend is watched for what it must not do.
const QUIET_NS: u64 = SECOND_NS / 2;

const ONE_PAGE: Shape = Shape { abi: Abi::X86_64, queues: 1, order: 0 };

/// Who plays, on what.
pub struct Stage<'a, G> {
    pub guest: &'a mut G,
    pub xs: &'a mut XenStore,
    pub disk: &'a Disk,
    /// Raised with each sector written, so that a stale one shows.
    pub generation: u32,
}

/// A result with a sentence about what went wrong.
pub type Outcome = Result<(), String>;

impl<G: Guest> Stage<'_, G> {
    /// Plays one habit once, or all of them.
    ///
    /// # Errors
    /// Where the backend did not do what that frontend needs.
    pub fn play(&mut self, name: &str) -> Outcome {
        let done = match name {
            "pvgrub2" => self.pvgrub2(),
            "minios" => self.minios(),
            "ovmf" => self.ovmf(),
            "xenvbd" => self.xenvbd(),
            "kexec" => self.kexec(),
            "stale" => self.stale(),
            "missing" => self.missing(),
            "reload" => self.reload(),
            "linux" => self.linux(ONE_PAGE),
            _ => Err("nobody of this name".to_string()),
        };
        done.map_err(|why| format!("{name}: {why}"))
    }

    fn show(&mut self, state: u8) {
        self.disk.show(self.guest, self.xs, state);
    }

    fn wait(&mut self, states: &[u8]) -> Result<u8, String> {
        self.disk.wait_for(self.guest, self.xs, states, STEP_NS)
    }

    fn remove(&mut self, key: &str) {
        self.xs.remove(self.guest, &format!("{}/{key}", self.disk.front));
    }

    fn write(&mut self, key: &str, value: &str) {
        let path = format!("{}/{key}", self.disk.front);
        self.xs.write(self.guest, &path, value.as_bytes()).ok();
    }

    fn wires(&mut self) -> Result<Wires, String> {
        let wires = Wires::make(self.guest, self.disk.back_id, ONE_PAGE)?;
        self.disk.describe(self.guest, self.xs, &wires);
        Ok(wires)
    }

    fn free(&mut self, wires: Wires) -> Outcome {
        if wires.free(self.guest) { Ok(()) } else { Err("the backend keeps our pages".into()) }
    }

    /// Writes the first sectors and reads them back over these rings.
    fn use_rings(&mut self, wires: &mut Wires) -> Outcome {
        let page = self.guest.frames_alloc(1).ok_or("no memory")?;
        let grefs = grant_all(self.guest, self.disk.back_id, page, true)?;
        let mut outcome = Ok(());
        for (queue, ring) in wires.rings.iter_mut().enumerate() {
            self.generation += 1;
            let stamp = Stamp { sector: queue as u64, generation: self.generation };
            self.guest.write(page, 0, &stamp.emit());
            let sector = queue as u64 * 8;
            let port = wires.ports[queue];
            outcome = outcome
                .and_then(|()| exchange(self.guest, ring, port, op::WRITE, sector, grefs[0]));
            self.guest.zero(page, 0, page.bytes());
            outcome =
                outcome.and_then(|()| exchange(self.guest, ring, port, op::READ, sector, grefs[0]));
            if outcome.is_ok() && !self.holds(page, &stamp) {
                outcome = Err("a sector does not hold what was written".to_string());
            }
        }
        if !free_granted(self.guest, page, &grefs) {
            return outcome.and(Err("the backend keeps a data page".to_string()));
        }
        outcome
    }

    fn holds(&self, page: Region, stamp: &Stamp) -> bool {
        let mut seen = [0; STAMP_BYTES];
        self.guest.read(page, 0, &mut seen);
        Stamp::parse(&seen).as_ref() == Some(stamp)
    }

    /// As a Linux guest: what every other habit must leave possible.
    pub fn linux(&mut self, shape: Shape) -> Outcome {
        let mut link = connect(self.guest, self.xs, self.disk, shape)?;
        let used = self.use_rings(&mut link.wires);
        let closed = disconnect(self.guest, self.xs, self.disk, link);
        self.show(INITIALISING);
        used.and(closed)
    }

    /// GRUB's xen disk: shows Initialised without a look at the backend, takes anything but
    /// InitWait for connected, leaves by Closed at once, and does not remove `protocol`.
    fn pvgrub2(&mut self) -> Outcome {
        self.wait(&[INIT_WAIT])?;
        let mut wires = self.wires()?;
        self.show(INITIALISED);
        let state = self.wait(&[0, 1, 3, 4, 5, 6, 7, 8])?;
        if state != CONNECTED {
            return Err(format!("took {state} for connected"));
        }
        let used = self.use_rings(&mut wires);
        self.show(CLOSED);
        self.wait(&[CLOSED, 0])?;
        self.disk.forget(self.guest, self.xs, &wires, true);
        self.free(wires)?;
        self.show(INITIALISING);
        used
    }

    /// mini-os and pv-grub: straight to Connected; leaves step by step.
    fn minios(&mut self) -> Outcome {
        let mut wires = self.wires()?;
        self.show(CONNECTED);
        self.wait(&[CONNECTED])?;
        let used = self.use_rings(&mut wires);
        self.show(CLOSING);
        self.wait(&[CLOSING, CLOSED])?;
        self.show(CLOSED);
        self.wait(&[CLOSED])?;
        self.show(INITIALISING);
        self.wait(&[INIT_WAIT, INITIALISED, CONNECTED, CLOSING])?;
        self.disk.forget(self.guest, self.xs, &wires, false);
        self.free(wires)?;
        used
    }

    /// OVMF: straight to Connected, any later state is an error; must see Closing itself.
    fn ovmf(&mut self) -> Outcome {
        let mut wires = self.wires()?;
        self.show(CONNECTED);
        let state = self.wait(&[CONNECTED, CLOSING, CLOSED, 7, 8])?;
        if state > CONNECTED {
            return Err(format!("the backend went to {state}"));
        }
        let used = self.use_rings(&mut wires);
        self.show(CLOSING);
        let state = self.wait(&[CLOSING, CLOSED])?;
        if state != CLOSING {
            return Err("Closing was not to be seen".to_string());
        }
        self.show(CLOSED);
        self.wait(&[CLOSED])?;
        self.show(INITIALISING);
        self.wait(&[0, INITIALISING, INIT_WAIT, CLOSED])?;
        self.disk.forget(self.guest, self.xs, &wires, false);
        self.free(wires)?;
        used
    }

    /// Windows' xenvbd: closes before it ever opens.
    fn xenvbd(&mut self) -> Outcome {
        self.wait(&[0, 2, 3, 4, 5, 6])?;
        self.show(CLOSING);
        self.wait(&[CLOSING, CLOSED])?;
        self.show(CLOSED);
        self.wait(&[CLOSED])?;
        self.show(INITIALISING);
        let state = self.wait(&[0, INIT_WAIT, INITIALISED, CONNECTED, CLOSING])?;
        if state != INIT_WAIT {
            return Err(format!("InitWait was expected, and {state} seen"));
        }
        for key in ["feature-surprise-remove", "feature-online-resize", "target-id"] {
            self.write(key, "1");
        }
        self.linux(ONE_PAGE)
    }

    /// kexec, or a crash kernel: the new kernel starts at Initialising, nothing was closed, and
    /// requests were under way.
    fn kexec(&mut self) -> Outcome {
        let old_shape = Shape { order: 2, queues: 2, ..ONE_PAGE };
        let mut link = connect(self.guest, self.xs, self.disk, old_shape)?;
        let page = self.guest.frames_alloc(1).ok_or("no memory")?;
        let grefs = grant_all(self.guest, self.disk.back_id, page, true)?;
        let segment = Segment { gref: grefs[0], first_sect: 0, last_sect: 7 };
        for (ring, port) in link.wires.rings.iter_mut().zip(&link.wires.ports) {
            for id in 0..32 {
                ring.put(self.guest, &emit_transfer(ring.abi(), op::READ, id, 0, 64, &[segment]));
            }
            ring.publish(self.guest);
            self.guest.notify(*port);
        }
        self.show(INITIALISING);
        self.wait(&[INIT_WAIT])?;
        let old = link.wires;
        // The old kernel's queue directories stay where they are, as after a real kexec.
        self.remove("multi-queue-num-queues");
        self.remove("ring-page-order");
        self.linux(ONE_PAGE)?;
        self.free(old)?;
        if !free_granted(self.guest, page, &grefs) {
            return Err("the backend keeps a data page".to_string());
        }
        self.remove("queue-0");
        self.remove("queue-1");
        Ok(())
    }

    /// Nodes of an earlier kernel that name nothing any more.
    fn stale(&mut self) -> Outcome {
        for queue in 0..4 {
            self.write(&format!("queue-{queue}/ring-ref"), "4000000");
            self.write(&format!("queue-{queue}/event-channel"), "3999");
        }
        for page in 0..16 {
            self.write(&format!("ring-ref{page}"), "4000001");
        }
        self.linux(ONE_PAGE)?;
        for key in ["queue-0", "queue-1", "queue-2", "queue-3"] {
            self.remove(key);
        }
        (0..16).for_each(|page| self.remove(&format!("ring-ref{page}")));
        Ok(())
    }

    /// Initialised without a ring: to be refused, and nothing more.
    fn missing(&mut self) -> Outcome {
        self.wait(&[INIT_WAIT])?;
        self.remove("ring-ref");
        self.remove("event-channel");
        self.show(INITIALISED);
        let gone = self.disk.wait_for(self.guest, self.xs, &[0, CONNECTED], QUIET_NS);
        if let Ok(state) = gone {
            return Err(format!("the backend went to {state} without a ring"));
        }
        self.show(CLOSED);
        self.wait(&[CLOSED])?;
        self.show(INITIALISING);
        self.linux(ONE_PAGE)
    }

    /// A driver that is loaded and unloaded, in another shape each time.
    fn reload(&mut self) -> Outcome {
        for (abi, queues, order) in
            [(Abi::X86_64, 1, 0), (Abi::X86_32, 2, 1), (Abi::X86_64, 4, 4), (Abi::X86_32, 1, 0)]
        {
            self.linux(Shape { abi, queues, order })?;
        }
        Ok(())
    }

    /// Whether the disk can still be had and used: after what should not have harmed it.
    pub fn is_alive(&mut self) -> Outcome {
        let path = format!("{}/state", self.disk.front);
        if self.xs.ask(self.guest, Op::Read { path: &path }).is_err() {
            self.show(CLOSED);
        }
        self.linux(ONE_PAGE)
    }
}

/// One request of one page, waited for.
///
/// # Errors
/// When it is refused, or not answered.
pub fn exchange<G: Guest>(
    guest: &mut G,
    ring: &mut FrontRing,
    port: platter_xen::Port,
    operation: u8,
    sector: u64,
    gref: Gref,
) -> Outcome {
    let segment = Segment { gref, first_sect: 0, last_sect: 7 };
    let raw = emit_transfer(ring.abi(), operation, 7, 0, sector, &[segment]);
    if !ring.put(guest, &raw) {
        return Err("the ring is full".to_string());
    }
    if ring.publish(guest) {
        guest.notify(port);
    }
    let until_ns = guest.now_ns() + ANSWER_NS;
    loop {
        guest.take_pending(port);
        match ring.take(guest) {
            Ok(Some(response)) if response.status == Status::Okay.wire() => return Ok(()),
            Ok(Some(response)) => return Err(format!("refused with {}", response.status)),
            Err(broken) => return Err(format!("{broken:?}")),
            Ok(None) => {}
        }
        let now_ns = guest.now_ns();
        if now_ns > until_ns {
            return Err("no answer".to_string());
        }
        if !ring.final_check(guest).unwrap_or(true) {
            guest.sleep_until(&[port], (now_ns + SECOND_NS).min(until_ns));
        }
    }
}
