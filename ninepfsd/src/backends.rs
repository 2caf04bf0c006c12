//! The xenbus half: which shares exist, who wants them, and when to connect and let go.
//!
//! Level-triggered, like platter's own backend: at each event both ends are read anew. After a
//! restart of the server every frontend is offered the share again, whatever state it was in.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;

use anyhow::Result;
use platter_xen::ninepfs::{ORDER_MAX, RINGS_MAX, VERSION, parse_front_nodes};
use platter_xen::xenbus::XenbusState;

use crate::device::{Device, Devices};
use crate::share::{Policy, Share};
use crate::workers::Workers;
use crate::xenstore::Xenstore;

/// libxl's two names for a 9p backend: of QEMU, and of Xen's own server.
pub const KINDS: [&str; 2] = ["9pfs", "xen_9pfs"];
/// Shares served at once.
const BACKENDS_MAX: usize = 1024;

/// A directory that may be shared, and how.
#[derive(Clone, Debug)]
pub struct Allowed {
    pub directory: PathBuf,
    pub policy: Policy,
}

struct Backend {
    state: XenbusState,
    device: Option<Device>,
    /// Which of all devices that one is.
    number: u64,
}

/// A device's thread that ended by itself: its backend's directory, and which device it was of
/// all that ever were.
pub type Ended = (String, u64);

pub struct Backends {
    /// `/local/domain/N` of the domain that we run in.
    home: String,
    allowed: Vec<Allowed>,
    devices: Devices,
    workers: Workers,
    ended: Sender<Ended>,
    known: HashMap<String, Backend>,
    /// Devices started so far.
    started: u64,
}

impl Backends {
    pub fn new(
        home: String,
        allowed: Vec<Allowed>,
        devices: Devices,
        workers: Workers,
        ended: Sender<Ended>,
    ) -> Backends {
        let known = HashMap::new();
        Backends { home, allowed, devices, workers, ended, known, started: 0 }
    }

    /// Looks at every share there is.
    pub fn look(&mut self, xs: &mut Xenstore) -> Result<()> {
        let mut seen = Vec::new();
        for kind in KINDS {
            let tree = format!("{}/backend/{kind}", self.home);
            for domid in xs.list(&tree)? {
                for number in xs.list(&format!("{tree}/{domid}"))? {
                    let be = format!("{tree}/{domid}/{number}");
                    if let Ok(domid) = domid.parse() {
                        self.look_at(xs, &be, domid)?;
                        seen.push(be);
                    }
                }
            }
        }
        self.known.retain(|be, _| seen.contains(be));
        Ok(())
    }

    /// A device's thread ended by itself: its frontend broke the protocol.
    pub fn device_ended(&mut self, xs: &mut Xenstore, (be, number): &Ended) -> Result<()> {
        let Some(backend) = self.known.get_mut(be) else { return Ok(()) };
        if backend.device.take_if(|_| backend.number == *number).is_some() {
            write_state(xs, be, backend, XenbusState::Closing)?;
        }
        Ok(())
    }

    fn look_at(&mut self, xs: &mut Xenstore, be: &str, domid: u16) -> Result<()> {
        let Some(fe) = xs.read_text(&format!("{be}/frontend"))? else { return Ok(()) };
        if !fe.starts_with(&format!("/local/domain/{domid}/")) {
            return Ok(());
        }
        if !self.known.contains_key(be) {
            return self.offer_new(xs, be);
        }
        let front = state(xs, &fe)?;
        let own = state(xs, be)?;
        let online = xs.read_text(&format!("{be}/online"))?.as_deref() != Some("0");
        let known = self.known.get(be).map_or(XenbusState::Unknown, |backend| backend.state);
        let removed = !online || own == XenbusState::Closing && known != XenbusState::Closing;
        use XenbusState::{
            Closed, Closing, Connected, InitWait, Initialised, Initialising, Unknown,
        };
        let next = match (known, front) {
            (Closed, _) if removed => return Ok(()),
            _ if removed => Closed,
            (InitWait, Initialised) => return self.connect(xs, be, &fe, domid),
            (Connected, Closing) => Closing,
            (Connected | Closing, Closed | Unknown) => Closed,
            (Connected | Closing | Closed, Initialising) => InitWait,
            _ => return Ok(()),
        };
        let Some(backend) = self.known.get_mut(be) else { return Ok(()) };
        if next != Connected {
            backend.device = None;
        }
        write_state(xs, be, backend, next)
    }

    /// A share that we have not seen before, or one that another server left behind.
    fn offer_new(&mut self, xs: &mut Xenstore, be: &str) -> Result<()> {
        if self.known.len() >= BACKENDS_MAX {
            return Ok(());
        }
        let path = xs.read_text(&format!("{be}/path"))?.unwrap_or_default();
        let mut backend = Backend { state: XenbusState::Unknown, device: None, number: 0 };
        let next = match self.share(&path) {
            Ok(_) => {
                xs.write(&format!("{be}/versions"), VERSION)?;
                xs.write(&format!("{be}/max-rings"), &RINGS_MAX.to_string())?;
                xs.write(&format!("{be}/max-ring-page-order"), &ORDER_MAX.to_string())?;
                XenbusState::InitWait
            }
            Err(why) => {
                eprintln!("{be}: {why}");
                XenbusState::Closed
            }
        };
        write_state(xs, be, &mut backend, next)?;
        self.known.insert(be.to_string(), backend);
        Ok(())
    }

    fn share(&self, path: &str) -> Result<Share, String> {
        let path = Path::new(path);
        let allowed = self.allowed.iter().find(|allowed| path.starts_with(&allowed.directory));
        let Some(allowed) = allowed.filter(|_| path.is_absolute()) else {
            return Err(format!(
                "'{}' is refused: it is below no directory that was allowed with --allow",
                path.display()
            ));
        };
        Share::open(path, allowed.policy)
            .map_err(|fault| format!("'{}' cannot be shared: {fault}", path.display()))
    }

    fn connect(&mut self, xs: &mut Xenstore, be: &str, fe: &str, domid: u16) -> Result<()> {
        let path = xs.read_text(&format!("{be}/path"))?.unwrap_or_default();
        let rings = parse_front_nodes(
            |name| xs.read(&format!("{fe}/{name}")).ok().flatten(),
            RINGS_MAX as u32,
        );
        let started = rings
            .map_err(|fault| format!("its nodes are refused: {fault:?}"))
            .and_then(|rings| Ok((rings, self.share(&path)?)))
            .and_then(|(rings, share)| {
                self.started += 1;
                let (ended, name) = (self.ended.clone(), (be.to_string(), self.started));
                let on_end = move |why| {
                    eprintln!("{why}");
                    // The main thread ends with the process.
                    let _ = ended.send(name);
                };
                let with = (&self.devices, &self.workers);
                Device::start(be, domid, &rings, share, with, on_end)
                    .map_err(|fault| format!("{fault:#}"))
            });
        let Some(backend) = self.known.get_mut(be) else { return Ok(()) };
        let next = match started {
            Ok(device) => {
                eprintln!("domain {domid} uses '{path}'");
                (backend.device, backend.number) = (Some(device), self.started);
                XenbusState::Connected
            }
            Err(why) => {
                eprintln!("{be}: cannot connect: {why}");
                XenbusState::Closing
            }
        };
        write_state(xs, be, backend, next)
    }
}

fn state(xs: &mut Xenstore, directory: &str) -> Result<XenbusState> {
    let text = xs.read(&format!("{directory}/state"))?;
    Ok(text.and_then(|text| XenbusState::parse(&text)).unwrap_or(XenbusState::Unknown))
}

fn write_state(
    xs: &mut Xenstore,
    be: &str,
    backend: &mut Backend,
    state: XenbusState,
) -> Result<()> {
    backend.state = state;
    xs.write(&format!("{be}/state"), &state.number().to_string()).map(|_| ())
}
