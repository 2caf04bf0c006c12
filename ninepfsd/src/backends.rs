//! The xenbus half: which shares exist, who wants them, and when to connect and let go.
//!
//! Level-triggered, like platter's own backend: at each event both ends are read anew. After a
//! restart of the server every frontend is offered the share again, whatever state it was in.
//! Guards that a frontend that writes its nodes in a loop costs one look at a time and few lines
//! of log; and that it is told that it may use its pages for another connection only when nobody
//! here touches them, nor its files for the old one. Must never: wait for a device's thread, nor
//! look at a share's files.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::Result;
use platter_xen::ninepfs::{ORDER_MAX, RINGS_MAX, VERSION, parse_front_nodes};
use platter_xen::xenbus::XenbusState;

use crate::bell::Bell;
use crate::device::{Device, Devices, Told};
use crate::log::say;
use crate::share::{Policy, Share};
use crate::usage::{FILES_MAX, Usage};
use crate::workers::Workers;
use crate::xenstore::{Event, TRUSTED, Xenstore};

/// libxl's two names for a 9p backend: of QEMU, and of Xen's own server.
pub const KINDS: [&str; 2] = ["9pfs", "xen_9pfs"];
/// Shares served at once.
const BACKENDS_MAX: usize = 1024;
/// Lines of log that one share may cause: its frontend decides how many there would be.
const LINES_MAX: u32 = 32;
const FREE: &str = "nobody panics with it in hand";

/// A directory that may be shared, and how.
#[derive(Clone, Debug)]
pub struct Allowed {
    pub directory: PathBuf,
    pub policy: Policy,
}

struct Backend {
    /// The frontend's directory, watched with this token.
    fe: String,
    token: u32,
    /// Lines of log so far.
    lines: u32,
    /// Why it was last refused.
    refusal: String,
    state: XenbusState,
    /// Kept from one connection to the next: its frontend decides how many there are.
    _usage: Option<Arc<Usage>>,
    device: Option<Device>,
    /// Which of all devices that one is.
    number: u64,
}

/// What the thread of one device says.
pub struct Report {
    be: String,
    /// Which of all devices it is.
    number: u64,
    told: Told,
}

/// Where the threads of devices say what they have to; readable once one has.
pub struct Reports {
    list: Mutex<Vec<Report>>,
    bell: Bell,
}

impl Reports {
    pub fn new() -> std::io::Result<Reports> {
        Ok(Reports { list: Mutex::default(), bell: Bell::new()? })
    }

    fn put(&self, report: Report) {
        self.list.lock().expect(FREE).push(report);
        self.bell.ring();
    }

    /// All since the last time.
    pub fn take(&self) -> Vec<Report> {
        self.bell.silence();
        std::mem::take(&mut *self.list.lock().expect(FREE))
    }
}

impl AsFd for Reports {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

pub struct Backends {
    /// `/local/domain/N` of the domain that we run in.
    home: String,
    allowed: Vec<Allowed>,
    devices: Devices,
    workers: Workers,
    reports: Arc<Reports>,
    known: HashMap<String, Backend>,
    /// Shares with a thread that has not ended, also when it was told to, or the share is gone.
    running: HashSet<String>,
    /// Devices started, and shares seen, so far.
    started: u64,
    seen: u32,
}

impl Backends {
    pub fn new(
        home: String,
        allowed: Vec<Allowed>,
        devices: Devices,
        workers: Workers,
        reports: Arc<Reports>,
    ) -> Backends {
        let (known, running) = (HashMap::new(), HashSet::new());
        let (started, seen) = (0, 0);
        Backends { home, allowed, devices, workers, reports, known, running, started, seen }
    }

    /// Something changed in xenstore.
    pub fn heard(&mut self, xs: &mut Xenstore, (token, path): &Event) -> Result<()> {
        let is_it = |(be, backend): &(&String, &Backend)| match *token {
            TRUSTED => path.strip_prefix(be.as_str()).is_some_and(|rest| rest.starts_with('/')),
            token => token == backend.token,
        };
        match self.known.iter().find(is_it).map(|(be, _)| be.clone()) {
            Some(be) => self.look_at(xs, &be),
            None if *token == TRUSTED => self.look(xs),
            // Of a share that has gone.
            None => Ok(()),
        }
    }

    /// Looks at every share there is.
    pub fn look(&mut self, xs: &mut Xenstore) -> Result<()> {
        let mut there = Vec::new();
        for kind in KINDS {
            let tree = format!("{}/backend/{kind}", self.home);
            for domid in xs.list(&tree)? {
                for number in xs.list(&format!("{tree}/{domid}"))? {
                    let be = format!("{tree}/{domid}/{number}");
                    self.look_at(xs, &be)?;
                    there.push(be);
                }
            }
        }
        for (be, backend) in self.known.extract_if(|be, _| !there.contains(be)) {
            xs.unwatch(&format!("{}/state", backend.fe), backend.token)?;
            say(format_args!("{be}: removed"));
        }
        Ok(())
    }

    /// A device's thread has something to say. When it has ended that was as it was told to, or
    /// because its frontend broke the protocol.
    pub fn told(&mut self, xs: &mut Xenstore, report: &Report) -> Result<()> {
        let Report { be, number, told } = report;
        let is_it = |backend: &&mut Backend| backend.device.is_some() && backend.number == *number;
        let backend = self.known.get_mut(be).filter(is_it);
        match told {
            Told::Uncounted(errno) => {
                if let Some(backend) = backend {
                    let what = format!("what it holds ({FILES_MAX} files at most)");
                    backend
                        .say(be, &format!("{what} cannot be counted against its limit: {errno}"));
                }
                Ok(())
            }
            Told::Ended(why) => {
                if let Some(backend) = backend {
                    backend.device = None;
                    backend.say(be, why);
                    write_state(xs, be, backend, XenbusState::Closing)?;
                }
                self.running.remove(be);
                // What waited for that.
                self.look_at(xs, be)
            }
        }
    }

    fn look_at(&mut self, xs: &mut Xenstore, be: &str) -> Result<()> {
        let Some(backend) = self.known.get(be) else { return self.offer_new(xs, be) };
        let (fe, known) = (backend.fe.clone(), backend.state);
        let own = state(xs, be)?;
        if own == XenbusState::Unknown {
            // Its directory is going.
            return Ok(());
        }
        let front = state(xs, &fe)?;
        let online = xs.read_text(&format!("{be}/online"))?.as_deref() != Some("0");
        let next = match next(known, own, front, online, self.running.contains(be)) {
            Next::Rest => return Ok(()),
            Next::Connect => return self.connect(xs, be, &fe),
            Next::Stop => {
                self.known.get_mut(be).expect("just looked at").device = None;
                return Ok(());
            }
            Next::Anew => {
                let token = self.known.remove(be).expect("just looked at").token;
                xs.unwatch(&format!("{fe}/state"), token)?;
                return self.offer_new(xs, be);
            }
            Next::Become(next) => next,
        };
        let Some(mut backend) = self.known.remove(be) else { return Ok(()) };
        backend.device = None;
        let done = match next {
            XenbusState::InitWait => self.offer(xs, be, &mut backend),
            next => write_state(xs, be, &mut backend, next),
        };
        self.known.insert(be.to_string(), backend);
        done
    }

    /// Offers a share to its frontend, or closes it when it cannot be served now.
    fn offer(&self, xs: &mut Xenstore, be: &str, backend: &mut Backend) -> Result<()> {
        match self.share(xs, be)? {
            Ok(share) => {
                backend._usage = share.usage();
                xs.write(&format!("{be}/versions"), VERSION)?;
                xs.write(&format!("{be}/max-rings"), &RINGS_MAX.to_string())?;
                xs.write(&format!("{be}/max-ring-page-order"), &ORDER_MAX.to_string())?;
                write_state(xs, be, backend, XenbusState::InitWait)
            }
            Err(why) => {
                if backend.refusal != why {
                    backend.say(be, &why);
                    backend.refusal = why;
                }
                if hears_no_refusal(be, backend.state, state(xs, be)?) {
                    backend.state = XenbusState::Closed;
                    return xs.remove(&format!("{be}/state"));
                }
                // Written once more it would make us look once more.
                match backend.state {
                    XenbusState::Closed => Ok(()),
                    _ => write_state(xs, be, backend, XenbusState::Closed),
                }
            }
        }
    }

    /// A share that we have not seen before, or one that another server left behind.
    fn offer_new(&mut self, xs: &mut Xenstore, be: &str) -> Result<()> {
        let Some(domid) = domid_of(be) else { return Ok(()) };
        let Some(fe) = xs.read_text(&format!("{be}/frontend"))? else { return Ok(()) };
        let is_its = fe.starts_with(&format!("/local/domain/{domid}/"));
        // One that was here before is looked at again when its thread has ended.
        if !is_its || self.known.len() >= BACKENDS_MAX || self.running.contains(be) {
            return Ok(());
        }
        // Whoever makes a share without a transaction (`attach`) writes its state last.
        if state(xs, be)? == XenbusState::Unknown {
            return Ok(());
        }
        self.seen += 1;
        let token = TRUSTED + self.seen;
        let mut backend = Backend {
            fe,
            token,
            lines: 0,
            refusal: String::new(),
            state: XenbusState::Unknown,
            _usage: None,
            device: None,
            number: 0,
        };
        if xs.watch(&format!("{}/state", backend.fe), token)? {
            self.offer(xs, be, &mut backend)?;
        } else {
            backend.say(be, "xenstored refuses to tell of its frontend");
            write_state(xs, be, &mut backend, XenbusState::Closed)?;
        }
        self.known.insert(be.to_string(), backend);
        Ok(())
    }

    /// The share that a backend's nodes ask for.
    fn share(&self, xs: &mut Xenstore, be: &str) -> Result<Result<Share, String>> {
        let path = xs.read_text(&format!("{be}/path"))?.unwrap_or_default();
        // As libxl writes it for a `p9=` line: MiB, 0 for none.
        let mib = xs.read_text(&format!("{be}/max-space"))?.and_then(|text| text.parse().ok());
        let bytes = mib.unwrap_or(0u64).saturating_mul(1 << 20);
        Ok(self.share_at(Path::new(&path), bytes))
    }

    fn share_at(&self, path: &Path, bytes_max: u64) -> Result<Share, String> {
        let Some(allowed) = allowed_for(&self.allowed, path) else {
            return Err(format!(
                "'{}' is refused: it is below no directory that was allowed with --allow",
                path.display()
            ));
        };
        let fault = |fault| format!("'{}' cannot be shared: {fault}", path.display());
        let below = path.strip_prefix(&allowed.directory).expect("it was just found to be");
        let policy = allowed.policy.within(bytes_max);
        Share::open_below(&allowed.directory, below, policy).map_err(fault)
    }

    fn connect(&mut self, xs: &mut Xenstore, be: &str, fe: &str) -> Result<()> {
        let path = xs.read_text(&format!("{be}/path"))?.unwrap_or_default();
        let share = self.share(xs, be)?;
        let domid = domid_of(be).expect("shares are known by a directory that says it");
        let rings = parse_front_nodes(
            |name| xs.read(&format!("{fe}/{name}")).ok().flatten(),
            RINGS_MAX as u32,
        );
        self.started += 1;
        let number = self.started;
        let started = rings
            .map_err(|fault| format!("its nodes are refused: {fault:?}"))
            .and_then(|rings| Ok((rings, share?)))
            .and_then(|(rings, share)| {
                let (reports, be) = (Arc::clone(&self.reports), be.to_string());
                let tell = move |told| reports.put(Report { be: be.clone(), number, told });
                let with = (&self.devices, &self.workers);
                Device::start(domid, &rings, share, with, tell)
                    .map_err(|fault| format!("cannot connect: {fault:#}"))
            });
        let Some(backend) = self.known.get_mut(be) else { return Ok(()) };
        let next = match started {
            Ok(device) => {
                backend.say(be, &format!("domain {domid} uses '{path}'"));
                (backend.device, backend.number) = (Some(device), number);
                self.running.insert(be.to_string());
                XenbusState::Connected
            }
            Err(why) => {
                backend.say(be, &why);
                XenbusState::Closing
            }
        };
        write_state(xs, be, backend, next)
    }
}

impl Backend {
    /// Tells people, unless its frontend has made us say too much already.
    fn say(&mut self, be: &str, what: &str) {
        self.lines = self.lines.saturating_add(1);
        match self.lines {
            ..LINES_MAX => say(format_args!("{be}: {what}")),
            LINES_MAX => {
                say(format_args!("{be}: {what}; no more will be said of this share"));
            }
            _ => {}
        }
    }
}

/// What is to be done about a share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Rest,
    Connect,
    /// Its thread is told to end, and what follows waits for that.
    Stop,
    /// The toolstack has taken it away and made it again in the meantime.
    Anew,
    Become(XenbusState),
}

/// From the state that we wrote last, and what both ends show now; a toolstack that takes a share
/// away says `online` 0, or writes Closing itself. We never write Initialising. `runs`: a thread
/// of the last connection has not let go of its pages and files. A frontend that sees Closed or
/// InitWait uses the same ones anew; Closed at a removal has the toolstack take the rest away.
fn next(
    known: XenbusState,
    own: XenbusState,
    front: XenbusState,
    online: bool,
    runs: bool,
) -> Next {
    use XenbusState::{Closed, Closing, Connected, InitWait, Initialised, Initialising, Unknown};
    let removed = !online || own == Closing && known != Closing;
    let next = match (known, front) {
        (Closed, _) if removed => return Next::Rest,
        _ if removed => return Next::Become(Closed),
        _ if own == Initialising => Next::Anew,
        (InitWait, Initialised) => Next::Connect,
        (Connected, Closing) => Next::Become(Closing),
        (Connected | Closing, Closed | Unknown) => Next::Become(Closed),
        (Connected | Closing | Closed, Initialising) => Next::Become(InitWait),
        _ => Next::Rest,
    };
    match next {
        Next::Connect | Next::Anew | Next::Become(Closed | InitWait) if runs => Next::Stop,
        next => next,
    }
}

/// libxl waits for the answer to a share that it has just made as xen_9pfs, and of all refusals
/// understands only that the state is missing.
fn hears_no_refusal(be: &str, known: XenbusState, own: XenbusState) -> bool {
    let is_new = (known, own) == (XenbusState::Unknown, XenbusState::Initialising);
    is_new && be.rsplit('/').nth(2) == Some("xen_9pfs")
}

/// What was allowed of a directory. Compared by names: `..` would lead elsewhere.
fn allowed_for<'a>(all: &'a [Allowed], path: &Path) -> Option<&'a Allowed> {
    let leads_up = path.components().any(|part| part == Component::ParentDir);
    let is_plain = path.is_absolute() && !leads_up;
    all.iter().find(|allowed| is_plain && path.starts_with(&allowed.directory))
}

/// The frontend's domain: the last but one part of a backend's directory.
fn domid_of(be: &str) -> Option<u16> {
    be.rsplit('/').nth(1)?.parse().ok()
}

/// What one end of a device shows.
pub fn state(xs: &mut Xenstore, directory: &str) -> Result<XenbusState> {
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

/// Would miss: xenstore and domains that come and go, which the rig's scenarios have.
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_allowed_is_below_a_directory_that_was_named() {
        let allowed = |directory: &str, read_only| Allowed {
            directory: PathBuf::from(directory),
            policy: Policy { read_only, ..Policy::default() },
        };
        let all = [allowed("/srv/base", true), allowed("/srv/images", false)];
        let read_only =
            |path: &str| allowed_for(&all, Path::new(path)).map(|allowed| allowed.policy.read_only);
        assert_eq!(read_only("/srv/images"), Some(false));
        assert_eq!(read_only("/srv/images/a/./b/"), Some(false));
        assert_eq!(read_only("/srv/base/one"), Some(true));
        for path in [
            "",
            "srv/images",
            "/srv",
            "/srv/images2",
            "/etc",
            "/srv/images/../../etc",
            "/srv/base/../images",
            "/srv/images/..",
        ] {
            assert_eq!(read_only(path), None, "{path}");
        }
    }

    #[test]
    fn what_both_ends_show_decides() {
        use XenbusState::*;
        // (as we know it, as it is, the frontend, online), what follows, and what as long as a
        // thread of the last connection runs.
        let stop = Some(Next::Stop);
        for (known, own, front, online, expected, meanwhile) in [
            (InitWait, InitWait, Initialising, true, Next::Rest, None),
            (InitWait, InitWait, Initialised, true, Next::Connect, stop),
            (Connected, Connected, Connected, true, Next::Rest, None),
            (Connected, Connected, Closing, true, Next::Become(Closing), None),
            (Closing, Closing, Closed, true, Next::Become(Closed), stop),
            (Connected, Connected, Closed, true, Next::Become(Closed), stop),
            (Connected, Connected, Unknown, true, Next::Become(Closed), stop),
            (Connected, Connected, Initialising, true, Next::Become(InitWait), stop),
            (Closed, Closed, Initialising, true, Next::Become(InitWait), stop),
            // The toolstack takes it away: either way, and once.
            (Connected, Closing, Connected, true, Next::Become(Closed), None),
            (Connected, Connected, Connected, false, Next::Become(Closed), None),
            (Closed, Closed, Initialising, false, Next::Rest, None),
            // Taken away and made again before we looked.
            (Connected, Initialising, Initialising, true, Next::Anew, stop),
            (Closed, Initialising, Initialising, true, Next::Anew, stop),
        ] {
            let which = (known, own, front, online);
            assert_eq!(next(known, own, front, online, false), expected, "{which:?}");
            let meanwhile = meanwhile.unwrap_or(expected);
            assert_eq!(next(known, own, front, online, true), meanwhile, "{which:?}, it runs");
        }
    }

    #[test]
    fn a_refusal_is_told_as_whoever_waits_for_it_understands() {
        use XenbusState::{Connected, InitWait, Initialising, Unknown};
        let (old, new) =
            ("/local/domain/0/backend/9pfs/7/0", "/local/domain/0/backend/xen_9pfs/7/0");
        assert!(hears_no_refusal(new, Unknown, Initialising));
        assert!(!hears_no_refusal(old, Unknown, Initialising), "nobody waits, or `attach`");
        // After a restart of the server, and to a frontend that comes back.
        assert!(!hears_no_refusal(new, Unknown, Connected));
        assert!(!hears_no_refusal(new, InitWait, Initialising));
    }

    #[test]
    fn the_frontends_domain_stands_in_the_path() {
        assert_eq!(domid_of("/local/domain/0/backend/9pfs/7/0"), Some(7));
        assert_eq!(domid_of("/local/domain/0/backend/9pfs/x/0"), None);
        assert_eq!(domid_of("7"), None);
    }
}
