//! Building the nested machine's parts from Debian packages: `rig setup`.
//!
//! Each step has a stamp that holds its recipe: a step whose recipe, or whose input, changed is
//! made again, the others are kept, and an interrupted one starts over. Nothing is installed on
//! the host but the few tools that are missing; QEMU above all is run from its own root, because a
//! host's own QEMU packages may refuse to go along with it.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

use crate::command::{Run, exists};
use crate::initrd;
use crate::mirror::Mirror;
use crate::suite::{Layout, Suite, text};
use crate::vmlinux;

/// Commands that the set-up runs on the host, each with the package that has it.
const HOST_TOOLS: [(&str, &str); 4] =
    [("debootstrap", "debootstrap"), ("mke2fs", "e2fsprogs"), ("xz", "xz-utils"), ("gpgv", "gpgv")];

/// What a QEMU that boots Xen needs; seabios and ipxe hold its firmware and option ROMs.
const HOST_PACKAGES: &str = "qemu-system-x86,seabios,ipxe-qemu,qemu-utils";

/// Size of dom0's disk; the file is sparse and each boot writes to a throw-away layer.
const DOM0_IMAGE_SIZE: &str = "8G";

/// Parts of the kernel's modules and of the packages that no nested machine looks at.
const UNUSED: &str = "usr/share/doc usr/share/man usr/share/locale usr/share/info \
    usr/lib/modules/*/kernel/drivers/gpu usr/lib/modules/*/kernel/drivers/media \
    usr/lib/modules/*/kernel/drivers/net usr/lib/modules/*/kernel/sound \
    usr/lib/modules/*/kernel/drivers/infiniband usr/lib/modules/*/kernel/drivers/iio \
    usr/lib/modules/*/kernel/drivers/staging usr/share/qemu/*.fd usr/share/qemu/edk2-*";

/// Makes one suite ready to boot, doing what is not done yet.
///
/// # Errors
/// When a tool cannot be had or a step fails; the message says which and shows the log's end.
pub fn setup(layout: &Layout, suite: Suite) -> Result<()> {
    let _alone = Lock::take(&layout.rig())?;
    host_tools(layout)?;
    let maker = Maker { layout, suite, started: Instant::now() };
    maker.host_root()?;
    let root = maker.dom0_root()?;
    let kernel = maker.kernel(&root)?;
    maker.guest(&kernel)?;
    maker.dom0_initrd(&kernel)?;
    maker.dom0_image(&kernel)?;
    Ok(())
}

/// Keeps two set-ups from working in the same folder: a file that holds the owner's process id.
struct Lock {
    file: PathBuf,
}

impl Lock {
    /// Waits for another set-up to end; the file of one that died is taken over.
    fn take(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", text(folder)))?;
        let file = folder.join("setup.lock");
        let mut told = false;
        loop {
            let made = File::options().write(true).create_new(true).open(&file);
            match made {
                Ok(mut lock) => {
                    write!(lock, "{}", std::process::id())?;
                    return Ok(Lock { file });
                }
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error).context(format!("cannot make {}", text(&file))),
            }
            let owner = fs::read_to_string(&file).unwrap_or_default();
            if !owner.is_empty() && !Path::new("/proc").join(owner.trim()).exists() {
                let _ = fs::remove_file(&file);
                continue;
            }
            if !told {
                println!("rig: another set-up is at work (process {}); waiting", owner.trim());
                told = true;
            }
            thread::sleep(Duration::from_millis(500));
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.file);
    }
}

/// Installs the commands that are missing.
fn host_tools(layout: &Layout) -> Result<()> {
    let missing: Vec<_> = HOST_TOOLS.iter().filter(|(command, _)| !exists(command)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let packages: Vec<&str> = missing.iter().map(|(_, package)| *package).collect();
    println!("rig: installing {}", packages.join(" "));
    fs::create_dir_all(layout.rig())?;
    let log = layout.rig().join("host-tools.log");
    let failed = || format!("could not install {} on the host", packages.join(", "));
    Run::new("apt-get update -q").root().log(&log).run().with_context(failed)?;
    let mut install = Run::new("apt-get install -y -q --no-install-recommends").root().log(&log);
    for package in &packages {
        install = install.arg(*package);
    }
    install.env("DEBIAN_FRONTEND", "noninteractive").run().with_context(failed)
}

/// Proof that a step is done: changes whenever the step is made again.
struct Made(String);

struct Maker<'a> {
    layout: &'a Layout,
    suite: Suite,
    started: Instant,
}

impl Maker<'_> {
    /// Runs `make` unless its stamp says that this very recipe was followed already.
    fn step(
        &self,
        folder: &Path,
        name: &str,
        recipe: &str,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<Made> {
        let stamps = folder.join("stamps");
        fs::create_dir_all(&stamps).with_context(|| format!("cannot make {}", text(&stamps)))?;
        let stamp = stamps.join(name);
        let kept = fs::read_to_string(&stamp).unwrap_or_default();
        if let Some((old, made)) = kept.rsplit_once("\nmade ")
            && old == recipe
        {
            return Ok(Made(made.to_owned()));
        }
        if stamp.exists() {
            fs::remove_file(&stamp)?;
        }
        println!("rig: {:5.1} s  {name} ...", self.started.elapsed().as_secs_f32());
        let log = folder.join(format!("{name}.log"));
        fs::write(&log, "")?;
        make(&log).with_context(|| format!("the set-up step {name} failed"))?;
        let made = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos().to_string();
        fs::write(&stamp, format!("{recipe}\nmade {made}"))?;
        Ok(Made(made))
    }

    /// Nothing is made from it: QEMU is run out of it.
    fn host_root(&self) -> Result<Made> {
        let recipe = format!("debootstrap {} {HOST_PACKAGES}", self.suite.name());
        self.step(&self.layout.suite(self.suite), "host-root", &recipe, |log| {
            let root = self.layout.host_root(self.suite);
            debootstrap(self.suite.name(), HOST_PACKAGES, &root, log)
        })
    }

    fn dom0_root(&self) -> Result<Made> {
        let packages = self.suite.dom0_packages();
        let recipe = format!("debootstrap {} {packages}", self.suite.name());
        self.step(&self.layout.suite(self.suite), "dom0-root", &recipe, |log| {
            debootstrap(self.suite.name(), &packages, &self.layout.dom0_root(self.suite), log)
        })
    }

    /// Xen and Linux are unpacked, not installed: their maintainer scripts want a boot loader.
    fn kernel(&self, root: &Made) -> Result<Made> {
        let recipe = format!("xen {} linux, without {UNUSED}, root {}", self.suite.name(), root.0);
        self.step(&self.layout.suite(self.suite), "kernel", &recipe, |log| {
            let folder = self.layout.suite(self.suite);
            let root = self.layout.dom0_root(self.suite);
            let unpacked = folder.join("unpacked");
            remove(&unpacked, log)?;
            let script = format!(
                "set -e; export LC_ALL=C DEBIAN_FRONTEND=noninteractive
                apt-get update -q
                linux=$(apt-cache depends linux-image-amd64 | sed -n 's/.*Depends: //p' | head -n1)
                rm -rf /var/tmp/debs; mkdir -p /var/tmp/debs; cd /var/tmp/debs
                apt-get download -q -o APT::Sandbox::User=root \
                    xen-hypervisor-{}-amd64 \"$linux\"",
                self.suite.xen_version()
            );
            let fetch = Run::new("chroot").path(&root).arg("sh").arg("-c").arg(script);
            fetch.root().log(log).run().context("Xen or Linux could not be downloaded")?;
            let script = "set -e; cd \"$1\"
                mkdir -p \"$2\"
                for deb in var/tmp/debs/*.deb; do dpkg-deb -x \"$deb\" \"$2\"; done
                rm -rf usr/lib/modules
                for modules in \"$2\"/lib/modules \"$2\"/usr/lib/modules; do
                    if [ -d \"$modules\" ]; then mv \"$modules\" usr/lib/modules; fi
                done
                cp \"$2\"/boot/vmlinuz-* \"$2\"/../vmlinuz
                zcat \"$2\"/boot/xen-*-amd64.gz >\"$2\"/../xen.elf
                chmod a+r \"$2\"/../vmlinuz
                rm -rf \"$2\" var/tmp/debs var/cache/apt var/lib/apt/lists/* $3
                for v in usr/lib/modules/*; do chroot . depmod \"${v##*/}\"; done";
            let unpack = Run::new("sh -c").arg(script).arg("unpack").path(&root).path(&unpacked);
            unpack.arg(UNUSED).root().log(log).run()
        })
    }

    fn guest(&self, kernel: &Made) -> Result<Made> {
        let sources = initrd::guest_sources(self.layout)?;
        let recipe = format!("guest initrd and vmlinux, kernel {}\n{sources}", kernel.0);
        self.step(&self.layout.suite(self.suite), "guest", &recipe, |log| {
            let folder = self.layout.guest(self.suite);
            remove(&folder, log)?;
            fs::create_dir_all(&folder)?;
            let vmlinuz = folder.join("vmlinuz");
            fs::copy(self.layout.suite(self.suite).join("vmlinuz"), &vmlinuz)?;
            vmlinux::unpack(&vmlinuz, &folder.join("vmlinux"))?;
            initrd::guest(self.layout, self.suite, &folder)
        })
    }

    fn dom0_initrd(&self, kernel: &Made) -> Result<Made> {
        let sources = initrd::dom0_sources(self.layout)?;
        let recipe = format!("dom0 initrd, kernel {}\n{sources}", kernel.0);
        self.step(&self.layout.suite(self.suite), "dom0-initrd", &recipe, |_| {
            let file = self.layout.suite(self.suite).join("dom0-initrd");
            initrd::dom0(self.layout, self.suite, &file)
        })
    }

    fn dom0_image(&self, kernel: &Made) -> Result<Made> {
        let recipe = format!("ext4 image of {DOM0_IMAGE_SIZE}, kernel {}", kernel.0);
        self.step(&self.layout.suite(self.suite), "dom0-image", &recipe, |log| {
            let image = self.layout.suite(self.suite).join("dom0.ext4");
            let partial = image.with_extension("partial");
            remove(&partial, log)?;
            let make = Run::new("mke2fs -q -F -t ext4 -m 0 -O ^has_journal -E lazy_itable_init=1");
            make.arg("-d")
                .path(&self.layout.dom0_root(self.suite))
                .path(&partial)
                .arg(DOM0_IMAGE_SIZE)
                .root()
                .log(log)
                .run()?;
            Run::new("chmod a+r").path(&partial).root().log(log).run()?;
            Run::new("mv -f").path(&partial).path(&image).root().log(log).run()
        })
    }
}

/// A Debian root at `target`, made beside it and moved there when complete.
fn debootstrap(suite: &str, packages: &str, target: &Path, log: &Path) -> Result<()> {
    let partial: PathBuf = target.with_extension("partial");
    remove(&partial, log)?;
    remove(target, log)?;
    if let Some(parent) = partial.parent() {
        fs::create_dir_all(parent)?;
    }
    let mirror = Mirror::of_host()?;
    let mut make = Run::new("debootstrap --variant=minbase");
    make = make.arg(format!("--include={packages}"));
    // Another release's keys, or a script for a younger release, may be missing on the host.
    let keyring = Path::new("/usr/share/keyrings/debian-archive-keyring.gpg");
    if !keyring.exists() {
        let install = "apt-get install -y -q --no-install-recommends debian-archive-keyring";
        let install = Run::new(install).root().log(log).run();
        install.context("Debian's signing keys are missing: install debian-archive-keyring")?;
    }
    make = make.arg(format!("--keyring={}", text(keyring))).arg(suite).path(&partial);
    if !mirror.address.is_empty() {
        make = make.arg(mirror.address.as_str());
    }
    let script = Path::new("/usr/share/debootstrap/scripts").join(suite);
    if !script.exists() {
        if mirror.address.is_empty() {
            bail!("this debootstrap does not know {suite}; set DEBIAN_MIRROR to a Debian mirror");
        }
        make = make.arg("/usr/share/debootstrap/scripts/sid");
    }
    if let Some(proxy) = &mirror.proxy {
        make = make.env("http_proxy", proxy);
    }
    let from = if mirror.address.is_empty() { "Debian's default mirror" } else { &mirror.address };
    make.env("DEBIAN_FRONTEND", "noninteractive")
        .root()
        .log(log)
        .run()
        .with_context(|| format!("Debian {suite} could not be had from {from}"))?;
    Run::new("chmod a+rx").path(&partial).root().log(log).run()?;
    Run::new("mv -T").path(&partial).path(target).root().log(log).run()
}

/// Removes what an earlier run left, which may be root's and may still have /proc mounted in it.
fn remove(path: &Path, log: &Path) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    let script = "for m in proc sys dev/pts dev; do
            if mountpoint -q \"$1/$m\"; then umount -l \"$1/$m\"; fi
        done; rm -rf --one-file-system \"$1\"";
    Run::new("sh -c").arg(script).arg("remove").path(path).root().log(log).run()
}
