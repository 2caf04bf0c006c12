//! dom0's toolstack as libxl does it: the keys of a new disk in one transaction, the wait for
//! `state` to be exactly 2, removal in its steps, each with its timeout. Sources: Xen's
//! libxl_disk.c (device_disk_add) and libxl_device.c (libxl__initiate_device_generic_remove,
//! device_hotplug).
//!
//! Guards nothing; it judges: what libxl would tell its user is kept in [`Toolstack::verdicts`].
//! Must never: see a state that was overwritten before it looked.

use crate::xenstore::Xenstore;

const S: &str = "/local/domain/1";
/// `LIBXL_INIT_TIMEOUT` and `LIBXL_DESTROY_TIMEOUT`.
const TIMEOUT_NS: u64 = 10_000_000_000;
/// `LIBXL_QEMU_BODGE_TIMEOUT`.
const BODGE_NS: u64 = 2_000_000_000;

/// Which backend directory libxl chooses.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Carrier {
    Vbd,
    Qdisk,
}

/// A disk line.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskLine {
    pub guest: u16,
    pub devid: u32,
    pub carrier: Carrier,
    /// `params` as they will stand in xenstore.
    pub params: String,
    pub writable: bool,
    pub cdrom: bool,
    /// Written for PV guests only.
    pub protocol: Option<&'static str>,
}

impl DiskLine {
    pub fn be(&self) -> String {
        let kind = if self.carrier == Carrier::Vbd { "vbd" } else { "qdisk" };
        format!("{S}/backend/{kind}/{}/{}", self.guest, self.devid)
    }

    pub fn fe(&self) -> String {
        format!("/local/domain/{}/device/vbd/{}", self.guest, self.devid)
    }
}

/// What libxl reports of one operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    Done,
    /// The state node vanished: an error at once.
    Removed,
    TimedOut,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Verdict {
    pub line: DiskLine,
    pub attach: bool,
    pub outcome: Outcome,
    pub took_ns: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    WaitInitWait,
    /// Of a qdisk whose guest is dying: nothing is written for two seconds.
    Bodge,
    WaitClosed,
    WaitGone,
}

#[derive(Clone, Debug)]
struct Job {
    line: DiskLine,
    phase: Phase,
    began_ns: u64,
    deadline_ns: u64,
    force: bool,
}

#[derive(Default)]
pub struct Toolstack {
    jobs: Vec<Job>,
    pub verdicts: Vec<Verdict>,
}

impl Toolstack {
    pub fn new(xs: &mut Xenstore) -> Toolstack {
        xs.watch(TOOLSTACK, &format!("{S}/backend"));
        Toolstack::default()
    }

    pub fn is_busy(&self) -> bool {
        !self.jobs.is_empty()
    }

    /// The last verdict on an attach (or detach) of a disk.
    pub fn verdict(&self, line: &DiskLine, attach: bool) -> Option<&Verdict> {
        self.verdicts.iter().rev().find(|v| v.line == *line && v.attach == attach)
    }

    pub fn attach(&mut self, xs: &mut Xenstore, line: &DiskLine, now_ns: u64) {
        let (be, fe) = (line.be(), line.fe());
        let flag = |yes: bool| if yes { "1" } else { "0" }.to_string();
        let kind = if line.cdrom { "cdrom" } else { "disk" };
        let front = [
            ("backend", be.clone()),
            ("backend-id", "1".to_string()),
            ("state", "1".to_string()),
            ("virtual-device", line.devid.to_string()),
            ("device-type", kind.to_string()),
            ("trusted", "1".to_string()),
        ];
        let vbd = line.carrier == Carrier::Vbd;
        let back = [
            ("frontend", fe.clone()),
            ("params", line.params.clone()),
            ("frontend-id", line.guest.to_string()),
            ("online", "1".to_string()),
            ("removable", "0".to_string()),
            ("bootable", "1".to_string()),
            ("state", "1".to_string()),
            ("dev", format!("xvd{}", line.devid)),
            ("type", if vbd { "phy" } else { "qdisk" }.to_string()),
            ("mode", if line.writable { "w" } else { "r" }.to_string()),
            ("device-type", kind.to_string()),
            ("discard-enable", flag(line.writable)),
            ("specification", "xen".to_string()),
        ];
        // One transaction: watches fire when all of it stands.
        let mut quiet: Vec<(String, String)> = vec![];
        quiet.extend(front.map(|(key, value)| (format!("{fe}/{key}"), value)));
        quiet.extend(line.protocol.map(|p| (format!("{fe}/protocol"), p.to_string())));
        quiet.extend(back.map(|(key, value)| (format!("{be}/{key}"), value)));
        xs.transaction(&quiet, &[(be, 1, line.guest), (fe, line.guest, 1)]);
        let job = Job {
            line: line.clone(),
            phase: Phase::WaitInitWait,
            began_ns: now_ns,
            deadline_ns: now_ns + TIMEOUT_NS,
            force: false,
        };
        match vbd {
            true => self.jobs.push(job),
            // dom0 waits for nothing.
            false => self.end(&job, true, Outcome::Done, now_ns),
        }
    }

    /// `xl block-detach`, with `--force` or for a guest that is being destroyed.
    pub fn detach(&mut self, xs: &mut Xenstore, line: &DiskLine, force: bool, now_ns: u64) {
        let mut job = Job {
            line: line.clone(),
            phase: Phase::WaitClosed,
            began_ns: now_ns,
            deadline_ns: now_ns + TIMEOUT_NS,
            force,
        };
        let be = line.be();
        if force && line.carrier == Carrier::Qdisk {
            job.phase = Phase::Bodge;
            job.deadline_ns = now_ns + BODGE_NS;
            self.jobs.push(job);
            return;
        }
        if force {
            let _ = xs.remove(0, &line.fe());
        }
        match xs.text(0, &format!("{be}/state")) {
            None => {
                self.clean(xs, line);
                self.end(&job, false, Outcome::Done, now_ns);
            }
            Some(state) => {
                let mut nodes = vec![(format!("{be}/online"), "0".to_string())];
                if state != "6" {
                    nodes.push((format!("{be}/state"), "5".to_string()));
                }
                xs.transaction(&nodes, &[]);
                self.jobs.push(job);
            }
        }
    }

    fn end(&mut self, job: &Job, attach: bool, outcome: Outcome, now_ns: u64) {
        let took_ns = now_ns - job.began_ns;
        self.verdicts.push(Verdict { line: job.line.clone(), attach, outcome, took_ns });
    }

    /// `libxl__device_destroy`: both directories, and parents that are empty then.
    fn clean(&self, xs: &mut Xenstore, line: &DiskLine) {
        for path in [line.fe(), line.be()] {
            let _ = xs.remove(0, &path);
            let mut at = path.as_str();
            for _ in 0..3 {
                at = at.rsplit_once('/').map_or("", |(above, _)| above);
                let empty = xs.list(0, at).is_ok_and(|names| names.is_empty());
                if !empty {
                    break;
                }
                let _ = xs.remove(0, at);
            }
        }
    }

    /// Looks at every job. When it must look again without an event.
    pub fn run(&mut self, xs: &mut Xenstore, now_ns: u64) -> Option<u64> {
        let mut index = 0;
        while index < self.jobs.len() {
            let mut job = self.jobs[index].clone();
            match self.step(xs, &mut job, now_ns) {
                Some((attach, outcome)) => {
                    self.jobs.remove(index);
                    self.end(&job, attach, outcome, now_ns);
                    if !attach && job.force {
                        self.clean(xs, &job.line);
                    }
                }
                None => {
                    self.jobs[index] = job;
                    index += 1;
                }
            }
        }
        self.jobs.iter().map(|job| job.deadline_ns).min()
    }

    fn step(&self, xs: &mut Xenstore, job: &mut Job, now_ns: u64) -> Option<(bool, Outcome)> {
        let be = job.line.be();
        let state = xs.text(0, &format!("{be}/state"));
        let late = now_ns >= job.deadline_ns;
        match job.phase {
            Phase::WaitInitWait => match state.as_deref() {
                Some("2") => Some((true, Outcome::Done)),
                None => Some((true, Outcome::Removed)),
                _ if late => Some((true, Outcome::TimedOut)),
                _ => None,
            },
            Phase::Bodge if late => {
                if state.is_some_and(|state| state != "6") {
                    let path = format!("{be}/state");
                    xs.write(0, &path, b"6").expect("dom0 may write");
                }
                (job.phase, job.deadline_ns) = (Phase::WaitGone, now_ns + TIMEOUT_NS);
                self.step(xs, job, now_ns)
            }
            Phase::Bodge => None,
            Phase::WaitClosed => match state.as_deref() {
                Some("6") => {
                    (job.phase, job.deadline_ns) = (Phase::WaitGone, now_ns + TIMEOUT_NS);
                    self.step(xs, job, now_ns)
                }
                None => Some((false, Outcome::Removed)),
                _ if late => Some((false, Outcome::TimedOut)),
                _ => None,
            },
            Phase::WaitGone if !xs.exists(&be) => {
                self.clean(xs, &job.line);
                Some((false, Outcome::Done))
            }
            Phase::WaitGone if late => Some((false, Outcome::TimedOut)),
            Phase::WaitGone => None,
        }
    }
}

/// The toolstack's name as a watcher; it acts as domain 0.
pub const TOOLSTACK: u16 = 32001;
