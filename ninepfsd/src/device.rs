//! One connected frontend under Xen: its rings mapped, its event channels, and a thread that
//! serves them.
//!
//! The thread sleeps on the event channels and on the workers' answers, and only when both had
//! nothing after the channels were unmasked. Guards that it reports its end when it has let go of
//! everything: pages, files, and requests that others do for it. Must never: make anybody wait
//! for that, since a file system may take for ever.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use platter_xen::{Gref, Port};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::os::evtchn::Evtchn;
use crate::os::gntdev::Gntdev;
use crate::os::uring::Uring;
use crate::ring::{Fault, Ring};
use crate::serving::Serving;
use crate::share::Share;
use crate::workers::{Mailbox, Workers};

/// When a full ring is looked at whose frontend does not say that it made room, which Linux does
/// not: soon, and then after twice the time each time that there is none.
const ROOM_PATIENCE_MIN: Duration = Duration::from_millis(2);
const ROOM_PATIENCE_MAX: Duration = Duration::from_millis(64);

/// Xen's devices, all opened at the start: later there is no right to.
#[derive(Clone)]
pub struct Devices {
    gntdev: Gntdev,
    for_each: Arc<Mutex<Vec<ForEach>>>,
}

/// For one frontend; without io_uring where the kernel lacks or forbids it.
type ForEach = (Evtchn, Option<Uring>);

/// What a device's thread says.
pub enum Told {
    /// What the share holds cannot be counted: nothing that takes space is admitted.
    Uncounted(Errno),
    /// Why it has ended. It has let go of everything.
    Ended(String),
}

/// A frontend being served; dropped, its thread is told to end.
pub struct Device {
    mailbox: Arc<Mailbox>,
}

/// What goes back to the others when its frontend has gone.
struct Lent {
    evtchn: Option<Evtchn>,
    uring: Option<Uring>,
    devices: Devices,
}

const FREE: &str = "nobody panics with it in hand";

impl Devices {
    /// For so many frontends.
    pub fn open(frontends: usize) -> Result<Devices> {
        let gntdev = Gntdev::open().context("cannot open /dev/xen/gntdev")?;
        let one = |_| Ok((Evtchn::open()?, Uring::open()));
        let for_each: std::io::Result<_> = (0..frontends).map(one).collect();
        let for_each = for_each.context("cannot open /dev/xen/evtchn")?;
        Ok(Devices { gntdev, for_each: Arc::new(Mutex::new(for_each)) })
    }

    fn lend(&self) -> Result<Lent> {
        let lent = self.for_each.lock().expect(FREE).pop();
        let (evtchn, uring) = lent.context("too many shares are in use: see --shares")?;
        Ok(Lent { evtchn: Some(evtchn), uring, devices: self.clone() })
    }
}

impl Lent {
    fn get(&mut self) -> &mut Evtchn {
        self.evtchn.as_mut().expect("there until it is dropped")
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(mut evtchn) = self.evtchn.take() {
            evtchn.unbind();
            self.devices.for_each.lock().expect(FREE).push((evtchn, self.uring.take()));
        }
    }
}

impl Device {
    /// Maps the rings and starts serving; a share whose space is limited is counted first.
    pub fn start(
        domid: u16,
        rings: &[(Gref, Port)],
        share: Share,
        (devices, workers): (&Devices, &Workers),
        tell: impl Fn(Told) + Send + 'static,
    ) -> Result<Device> {
        let mut lent = devices.lend()?;
        let mut mapped = Vec::new();
        for (gref, port) in rings {
            let port = lent.get().bind(domid, port.0).context("cannot bind an event channel")?;
            let ring = Ring::map(&devices.gntdev, domid, *gref, port);
            mapped.push(ring.map_err(|fault| anyhow!("cannot map a ring: {fault}"))?);
        }
        let mailbox = Arc::new(Mailbox::new()?);
        let (theirs, workers) = (Arc::clone(&mailbox), workers.clone());
        std::thread::Builder::new().name("9pfs".to_string()).spawn(move || {
            if let Some(Err(errno)) = share.usage_now() {
                tell(Told::Uncounted(errno));
            }
            let mut serving = Serving::new(mapped, share, workers, Arc::clone(&theirs));
            serving.set_uring(lent.uring.take());
            let why = match run(&mut serving, lent.get(), &theirs) {
                Ok(()) => "stopped".to_string(),
                Err(fault) => fault.to_string(),
            };
            lent.uring = serving.take_uring();
            drop((serving, lent));
            tell(Told::Ended(why));
        })?;
        Ok(Device { mailbox })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.mailbox.stop();
    }
}

/// Until told to stop.
fn run(serving: &mut Serving, evtchn: &mut Evtchn, mailbox: &Mailbox) -> Result<(), Fault> {
    let mut patience = ROOM_PATIENCE_MIN;
    while !mailbox.is_stopped() {
        let worked = serving.turn()?;
        if worked || !serving.waits_for_room() {
            patience = ROOM_PATIENCE_MIN;
        }
        for port in serving.bells() {
            evtchn.notify(port)?;
        }
        // A channel stays masked while there is work anyway.
        if !worked && !evtchn.unmask()? && mailbox.go_to_sleep() {
            sleep(serving, evtchn, mailbox, patience)?;
            patience = (patience * 2).min(ROOM_PATIENCE_MAX);
        }
    }
    Ok(())
}

/// Waits for the frontend, the workers or the kernel; for room in a ring not longer than that.
fn sleep(
    serving: &Serving,
    evtchn: &mut Evtchn,
    mailbox: &Mailbox,
    patience: Duration,
) -> std::io::Result<()> {
    let mut fds = heapless::Vec::<_, 3>::from([
        PollFd::new(evtchn, PollFlags::IN),
        PollFd::new(mailbox, PollFlags::IN),
    ]);
    fds.extend(serving.uring().map(|uring| PollFd::new(uring, PollFlags::IN)));
    let patience = Timespec { tv_sec: 0, tv_nsec: patience.subsec_nanos().into() };
    match poll(&mut fds, serving.waits_for_room().then_some(&patience)) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    let [events, rang] = [0, 1].map(|index| fds[index].revents().contains(PollFlags::IN));
    drop(fds);
    mailbox.wake_up(rang);
    if events {
        evtchn.take()?;
    }
    Ok(())
}
