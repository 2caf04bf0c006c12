//! One boot of the nested machine: a job folder in, results out, progress while it runs.
//!
//! The job folder is shared with dom0 by virtio-9p. dom0's init runs what /job/list names and
//! appends a line per event to results/progress, which is read here; the serial line is only kept.
//! A machine that falls silent is killed: it must never outlive its time.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::accel::Accelerator;
use crate::command::tail;
use crate::scenario::Scenario;
use crate::suite::{Layout, Suite, text};

/// How long dom0 may take from power-on to its first line, emulated on a busy machine.
const BOOT_SECONDS: u64 = 180;
/// The same on KVM, where it is a matter of two or three seconds, or of never.
const KVM_BOOT_SECONDS: u64 = 30;
/// The most that dom0 multiplies limits by on a busy host.
const SLOWNESS_MAX: u64 = 8;
/// Grace beyond a scenario's own limit, for collecting its logs and cleaning up after it.
const SILENCE_SECONDS: u64 = 120;
/// How often the progress file is looked at.
const POLL: Duration = Duration::from_millis(100);
/// Job folders of earlier boots that are kept for a look.
const KEPT_JOBS: usize = 6;

/// Size of the NVMe device of a machine that has one; its file is sparse.
const NVME_BYTES: u64 = 1 << 30;

const XEN_ARGUMENTS: &str = "console=com1 com1=115200,8n1 dom0_mem=1536M,max:1536M \
    dom0_max_vcpus=1 noreboot spec-ctrl=eager-fpu";
/// Its time stamp counter is called reliable, or Linux finds the emulated one wanting some time
/// after it starts and reads the clock by system calls from then on, which no real dom0 does.
const LINUX_ARGUMENTS: &str = "tsc=reliable console=hvc0 quiet loglevel=4 net.ifnames=0";

/// Boots of this process so far: two may start in the same second.
static BOOTS: AtomicUsize = AtomicUsize::new(0);

/// What dom0 says while it runs; names are scenarios' names.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// dom0 answers; its kernel's release.
    Up(String),
    /// A scenario starts.
    Start(String),
    /// A scenario tells what it does now: name and text.
    Step(String, String),
    /// A detail of what it does: name and text.
    Note(String, String),
    /// A scenario is done: name, whether it passed, seconds.
    Done(String, bool, String),
    /// dom0 cannot go on, and why.
    Broken(String),
    /// All scenarios are done.
    End,
}

/// A line of the progress file, and the seconds since power-on that it was written at.
fn parse_event(line: &str) -> Option<(f32, Event)> {
    let mut words = line.splitn(4, ' ');
    let at = words.next()?.parse().ok()?;
    let kind = words.next()?;
    let name = words.next().unwrap_or("").to_owned();
    let rest = words.next().unwrap_or("").to_owned();
    let event = match kind {
        "up" => Event::Up(name),
        "start" => Event::Start(name),
        "step" => Event::Step(name, rest),
        "note" => Event::Note(name, rest),
        "pass" => Event::Done(name, true, rest),
        "fail" => Event::Done(name, false, rest),
        "broken" => Event::Broken(format!("{name} {rest}")),
        "end" => Event::End,
        _ => return None,
    };
    Some((at, event))
}

/// What one boot runs.
pub struct Job<'a> {
    /// Where the parts lie.
    pub layout: &'a Layout,
    /// Which release is booted.
    pub suite: Suite,
    /// How its processors are run.
    pub accelerator: Accelerator,
    /// The scenarios, in order; they must want the same machine.
    pub scenarios: &'a [Scenario],
    /// Shell assignments for dom0's scripts, beside those that the machine makes itself.
    pub settings: Vec<(String, String)>,
    /// Whether a person gets dom0's shell at the end.
    pub keep: bool,
}

impl Job<'_> {
    /// Boots, runs and waits for the end; `tell` hears every event as it happens, with the results
    /// folder and the seconds since power-on. Hands back the results folder.
    ///
    /// # Errors
    /// When the machine cannot be started, falls silent, or stops before its end; the message
    /// shows the serial line's last words. Failed scenarios are not errors here.
    pub fn run(&self, tell: &mut dyn FnMut(&Path, f32, &Event)) -> Result<PathBuf> {
        let folder = self.prepare().context("cannot prepare the job folder")?;
        let serial = folder.join("serial.log");
        let mut machine = Machine::start(self, &folder, &serial)?;
        let ended = self.follow(&mut machine, &folder, tell);
        let stopped = machine.stop(self.keep && ended.is_ok());
        let results = folder.join("results");
        match ended.and(stopped) {
            Ok(()) => Ok(results),
            Err(error) => bail!("{error:#}{}", tail(&serial)),
        }
    }

    fn prepare(&self) -> Result<PathBuf> {
        let jobs = self.layout.suite(self.suite).join("jobs");
        fs::create_dir_all(&jobs)?;
        prune(&jobs)?;
        let number = BOOTS.fetch_add(1, Ordering::Relaxed);
        let folder = jobs.join(format!("{}-{number}-{}", self.stamp(), std::process::id()));
        fs::create_dir_all(folder.join("results"))?;
        copy_folder(&self.layout.source("rig/dom0"), &folder.join("dom0"))?;
        copy_folder(&self.layout.source("rig/guest"), &folder.join("guest"))?;
        copy_folder(&self.layout.source("rig/scenarios"), &folder.join("scenarios"))?;
        copy_folder(&self.layout.source("xen-config"), &folder.join("xen-config"))?;
        self.copy_files(&folder.join("files"))?;
        let mut settings = format!("SUITE={}\nKEEP={}\n", self.suite.name(), u8::from(self.keep));
        for (name, value) in &self.settings {
            settings.push_str(&format!("{name}='{value}'\n"));
        }
        fs::write(folder.join("settings"), settings)?;
        let line =
            |scenario: &Scenario| format!("{} {}\n", scenario.name, scenario.timeout_seconds);
        fs::write(folder.join("list"), self.scenarios.iter().map(line).collect::<String>())?;
        fs::write(folder.join("results/progress"), "")?;
        File::create(folder.join("nvme.img"))?.set_len(NVME_BYTES)?;
        let latest = self.layout.suite(self.suite).join("latest");
        let _ = fs::remove_file(&latest);
        // Only a convenience for people; two boots at once may race for it.
        let _ = symlink(&folder, &latest);
        Ok(folder)
    }

    fn stamp(&self) -> u64 {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(0, |since| since.as_secs())
    }

    /// Everything that `make` has put into build/: kernels, servers, tools.
    fn copy_files(&self, target: &Path) -> Result<()> {
        fs::create_dir_all(target)?;
        let build = self.layout.source("build");
        for entry in fs::read_dir(&build)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                fs::copy(entry.path(), target.join(entry.file_name()))?;
            }
        }
        Ok(())
    }

    /// Reads progress until the end, a break, or silence.
    fn follow(
        &self,
        machine: &mut Machine,
        folder: &Path,
        tell: &mut dyn FnMut(&Path, f32, &Event),
    ) -> Result<()> {
        let results = folder.join("results");
        let path = results.join("progress");
        let mut read_bytes = 0;
        let mut heard = Instant::now();
        let mut patience = Duration::from_secs(match self.accelerator {
            Accelerator::Tcg => BOOT_SECONDS,
            Accelerator::Kvm => KVM_BOOT_SECONDS,
        });
        loop {
            let ended = machine.has_ended()?;
            let progress = fs::read(&path)?;
            let fresh = progress.get(read_bytes..).unwrap_or_default();
            let whole = fresh.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            read_bytes += whole;
            for line in String::from_utf8_lossy(&fresh[..whole]).lines() {
                let Some((at, event)) = parse_event(line) else { continue };
                tell(&results, at, &event);
                heard = Instant::now();
                match event {
                    Event::End => return Ok(()),
                    Event::Broken(why) => bail!("dom0 gave up: {why}"),
                    Event::Start(name) => patience = self.patience(&name),
                    _ => {}
                }
            }
            if ended {
                bail!("the nested machine stopped before its end");
            }
            if heard.elapsed() > patience {
                bail!("the nested machine said nothing for {} s: killed", patience.as_secs());
            }
            thread::sleep(POLL);
        }
    }

    fn patience(&self, name: &str) -> Duration {
        let scenario = self.scenarios.iter().find(|scenario| scenario.name == name);
        let limit = scenario.map_or(0, |scenario| scenario.timeout_seconds);
        Duration::from_secs(limit * SLOWNESS_MAX + SILENCE_SECONDS)
    }

    /// QEMU's command line, run from its own root by that root's own loader.
    fn qemu(&self, folder: &Path) -> Command {
        let root = self.layout.host_root(self.suite);
        let suite = self.layout.suite(self.suite);
        // However this process ends, QEMU ends with it.
        let mut qemu = Command::new("setpriv");
        qemu.args(["--pdeathsig", "KILL"]).arg(root.join("lib64/ld-linux-x86-64.so.2"));
        let libraries = root.join("usr/lib/x86_64-linux-gnu");
        // Else it looks for its modules, emulation among them, where the host would have them.
        qemu.env("QEMU_MODULE_DIR", libraries.join("qemu"));
        qemu.arg("--library-path").arg(libraries);
        qemu.arg(root.join("usr/bin/qemu-system-x86_64"));
        for firmware in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
            qemu.arg("-L").arg(root.join(firmware));
        }
        qemu.args(["-machine", "q35"]).args(self.accelerator.arguments());
        qemu.args(["-smp", "2", "-m", "4096", "-display", "none", "-nic", "none"]);
        qemu.args(["-serial", "stdio", "-monitor", "none", "-no-reboot"]);
        let linux = format!("{} {LINUX_ARGUMENTS}", text(&suite.join("vmlinuz")));
        qemu.arg("-kernel").arg(suite.join("xen.elf"));
        let has_nvme = self.scenarios.iter().any(|scenario| scenario.machine.contains("nvme"));
        let iommu = if has_nvme { self.suite.iommu_arguments() } else { "iommu=0" };
        qemu.arg("-append").arg(format!("{XEN_ARGUMENTS} {iommu}"));
        qemu.arg("-initrd").arg(format!("{linux},{}", text(&suite.join("dom0-initrd"))));
        let disk = text(&suite.join("dom0.ext4"));
        qemu.arg("-drive").arg(format!("file={disk},if=virtio,format=raw,snapshot=on"));
        // A second copy of dom0's root, /dev/vdb: the root of a Linux driver domain.
        qemu.arg("-drive").arg(format!("file={disk},if=virtio,format=raw,snapshot=on"));
        if has_nvme {
            // Without a fixed slot its number depends on the other devices, and giving away a
            // wrong one takes dom0's own disk.
            let drive = text(&folder.join("nvme.img"));
            qemu.args(["-device", "intel-iommu,intremap=on", "-drive"]);
            qemu.arg(format!("file={drive},if=none,id=nvme,format=raw,cache=unsafe"));
            qemu.args(["-device", "nvme,serial=platter0,drive=nvme,addr=10"]);
        }
        for (tag, path) in [("job", folder.to_owned()), ("guest", self.layout.guest(self.suite))] {
            let path = text(&path);
            let share = format!("local,path={path},mount_tag={tag},security_model=none");
            qemu.arg("-virtfs").arg(share);
        }
        qemu
    }
}

/// Removes the oldest job folders, but none whose process is still there.
fn prune(jobs: &Path) -> Result<()> {
    let mut folders: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(jobs)? {
        let path = entry?.path();
        let name = text(&path);
        let process = name.rsplit('-').next().unwrap_or_default();
        if !Path::new("/proc").join(process).exists() {
            folders.push(path);
        }
    }
    folders.sort();
    let surplus = folders.len().saturating_sub(KEPT_JOBS);
    for folder in &folders[..surplus] {
        let _ = fs::remove_dir_all(folder);
    }
    Ok(())
}

/// Copies the files of a folder; folders in it are not looked at.
fn copy_folder(source: &Path, target: &Path) -> Result<()> {
    fs::create_dir_all(target)?;
    let entries = fs::read_dir(source).with_context(|| format!("no {}", source.display()))?;
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            fs::copy(entry.path(), target.join(entry.file_name()))?;
        }
    }
    Ok(())
}

/// A running QEMU.
struct Machine {
    child: Child,
    input: Option<ChildStdin>,
    /// Set once the terminal belongs to the machine's serial line.
    attached: Arc<AtomicBool>,
    copier: Option<thread::JoinHandle<()>>,
}

impl Machine {
    fn start(job: &Job, folder: &Path, serial: &Path) -> Result<Self> {
        let mut log = File::create(serial)?;
        let mut command = job.qemu(folder);
        // The disks' throw-away layers belong to the job, not to a small /tmp.
        command.env("TMPDIR", folder);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(File::create(folder.join("qemu.log"))?);
        let mut child = command.spawn().context("QEMU does not start; run `rig setup`")?;
        let input = child.stdin.take();
        let mut output = child.stdout.take().context("QEMU has no output")?;
        let attached = Arc::new(AtomicBool::new(false));
        let show = Arc::clone(&attached);
        let copier = thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = output.read(&mut bytes) {
                let _ = log.write_all(&bytes[..count]);
                if show.load(Ordering::Relaxed) {
                    let mut terminal = std::io::stdout();
                    let _ = terminal.write_all(&bytes[..count]).and_then(|()| terminal.flush());
                }
            }
        });
        Ok(Machine { child, input, attached, copier: Some(copier) })
    }

    fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Waits for the power-off: as long as a person likes when `keep`, shortly otherwise.
    fn stop(mut self, keep: bool) -> Result<()> {
        let saved = if keep { self.attach() } else { None };
        let since = Instant::now();
        let limit = Duration::from_secs(SILENCE_SECONDS);
        while !self.has_ended()? && (keep || since.elapsed() < limit) {
            thread::sleep(POLL);
        }
        if let Some(state) = saved {
            let _ = Command::new("stty").arg(state).status();
        }
        let late = !self.has_ended()?;
        if late {
            self.child.kill()?;
            self.child.wait()?;
        }
        if let Some(copier) = self.copier.take() {
            let _ = copier.join();
        }
        if late { bail!("the nested machine did not switch itself off: killed") } else { Ok(()) }
    }

    /// Gives the terminal to the machine; hands back the terminal's settings, when it is one.
    fn attach(&mut self) -> Option<String> {
        let mut input = self.input.take()?;
        let saved = Command::new("stty").arg("-g").stdin(Stdio::inherit()).output().ok()?;
        let _ = Command::new("stty").args(["raw", "-echo"]).status();
        self.attached.store(true, Ordering::Relaxed);
        thread::spawn(move || {
            let mut bytes = [0; 256];
            while let Ok(count @ 1..) = std::io::stdin().read(&mut bytes) {
                if input.write_all(&bytes[..count]).and_then(|()| input.flush()).is_err() {
                    return;
                }
            }
        });
        let state = String::from_utf8_lossy(&saved.stdout).trim().to_owned();
        (!state.is_empty()).then_some(state)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Whatever went wrong on the way, no QEMU is left behind.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    //! Would miss: what dom0 writes in truth; every boot shows that.
    use super::*;

    #[test]
    fn progress_lines_become_events() {
        let step = Event::Step("10-a".into(), "guest g: create".into());
        assert_eq!(parse_event("8.25 step 10-a guest g: create"), Some((8.25, step)));
        let done = Event::Done("10-a".into(), false, "3.1".into());
        assert_eq!(parse_event("9.5 fail 10-a 3.1"), Some((9.5, done)));
        assert_eq!(parse_event("9.5 nonsense"), None);
        assert_eq!(parse_event(""), None);
    }
}
