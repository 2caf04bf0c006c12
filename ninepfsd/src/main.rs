//! `platter-9pfsd`: a 9p server for Xen's 9pfs, for dom0.
//!
//! It knows files and nothing of image formats, rings of disks or guests. One process serves
//! all domains; it opens nothing but regular files and directories below the directories that
//! the administrator names.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use platter_9pfsd::attach;
use platter_9pfsd::backends::{Allowed, Backends, KINDS, Reports};
use platter_9pfsd::device::Devices;
use platter_9pfsd::log::say;
use platter_9pfsd::sandbox::{self, Identity};
use platter_9pfsd::share::{Cache, Policy};
use platter_9pfsd::workers::Workers;
use platter_9pfsd::xenstore::{TRUSTED, Xenstore};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// A small 9p server for Xen domains: serves directories of this domain over 9pfs.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Serve every 9p share of every domain, until stopped.
    Serve(Serve),
    /// Give a share to a domain that is running, without a `p9=` line and without QEMU.
    Attach {
        /// Name or number of the domain.
        domain: String,
        /// The share's tag.
        tag: String,
        /// The directory, absolute.
        path: String,
        /// The space that its files may take together, in MiB; 0 for no limit.
        #[arg(long, value_name = "MIB", default_value_t = 0)]
        max_space: u32,
    },
}

#[derive(Args)]
struct Serve {
    /// A directory below which shares may lie; may be given several times.
    #[arg(long, required_unless_present = "allow_read_only", value_name = "DIRECTORY")]
    allow: Vec<PathBuf>,
    /// As --allow, and nothing there is ever changed. Neither kind lies in the other.
    #[arg(long, value_name = "DIRECTORY")]
    allow_read_only: Vec<PathBuf>,
    /// The largest size that a file may be given, in bytes; 0 for no limit.
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    file_bytes_max: u64,
    /// The space that the files of each share may take together, in bytes, as the file system
    /// counts it; 0 for no limit. `max-space=` (MiB) in a domain's `p9=` line can only be less.
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    share_bytes_max: u64,
    /// What becomes of files' bytes in the page cache.
    #[arg(long, value_enum, default_value_t)]
    cache: Cache,
    /// The user that files are opened as, by name or number, when started as root. `root` stays
    /// root and may open files of every owner below the directories.
    #[arg(long, default_value = "platter-9pfsd")]
    user: String,
    /// Shares that may be in use at once.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=1024))]
    shares: u16,
    /// Threads that wait for disks; one share has half of those at most that no other has.
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u8).range(1..=64))]
    workers: u8,
    /// Keep the rights that the server does not need; for finding faults.
    #[arg(long)]
    no_sandbox: bool,
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Action::Serve(arguments) => serve(&arguments),
        Action::Attach { domain, tag, path, max_space } => {
            let mut xs = Xenstore::open()?;
            let home = home(&mut xs)?;
            attach::attach(&mut xs, &home, &domain, &tag, (&path, max_space))
        }
    }
}

fn serve(arguments: &Serve) -> Result<()> {
    let allowed = allowed(arguments)?;
    let identity = Identity::of(&arguments.user)?;
    let mut xs = Xenstore::open()?;
    let home = home(&mut xs)?;
    claim(&mut xs, &home)?;
    sandbox::raise_descriptors(arguments.shares.into(), arguments.cache)?;
    let devices = Devices::open(arguments.shares.into())?;
    if !arguments.no_sandbox {
        let open: Vec<_> =
            allowed.iter().map(|one| (one.directory.as_path(), one.policy.read_only)).collect();
        sandbox::enter(&open, &identity)?;
    }
    for kind in KINDS {
        let tree = format!("{home}/backend/{kind}");
        if !xs.watch(&tree, TRUSTED)? {
            bail!("xenstored refuses a watch on {tree}");
        }
    }
    let workers = Workers::start(arguments.workers.into()).context("cannot start threads")?;
    let reports = Arc::new(Reports::new()?);
    let mut backends = Backends::new(home, allowed, devices, workers, Arc::clone(&reports));
    backends.look(&mut xs)?;
    say(format_args!("serving"));
    loop {
        // One at a time: as long as frontends cause events there may always be another.
        if let Some(event) = xs.event() {
            backends.heard(&mut xs, &event)?;
        }
        for report in reports.take() {
            backends.told(&mut xs, &report)?;
        }
        let mut fds = [PollFd::new(&xs, PollFlags::IN), PollFd::new(&*reports, PollFlags::IN)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        match poll(&mut fds, xs.has_event().then_some(&at_once)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno).context("cannot wait for xenstored"),
        }
        if !fds[0].revents().is_empty() {
            xs.hear()?;
        }
    }
}

fn allowed(arguments: &Serve) -> Result<Vec<Allowed>> {
    let Serve { file_bytes_max, share_bytes_max, cache, .. } = *arguments;
    let both = [
        ("--allow-read-only", &arguments.allow_read_only, true),
        ("--allow", &arguments.allow, false),
    ];
    let mut allowed = Vec::new();
    for (option, directories, read_only) in both {
        for directory in directories {
            if !directory.is_absolute() || !directory.is_dir() {
                let what = directory.display();
                bail!("{option} wants the absolute path of a directory, not '{what}'");
            }
            let policy = Policy { read_only, file_bytes_max, share_bytes_max, cache };
            allowed.push(Allowed { directory: directory.clone(), policy });
        }
    }
    prove_apart(&allowed)?;
    Ok(allowed)
}

/// A share of the outer directory would have what the inner one's rule forbids, or the other way
/// round.
fn prove_apart(allowed: &[Allowed]) -> Result<()> {
    let real = |one: &Allowed| {
        let directory = one.directory.canonicalize();
        let directory = directory.with_context(|| format!("'{}'", one.directory.display()))?;
        Ok((directory, one.policy.read_only))
    };
    let real = allowed.iter().map(real).collect::<Result<Vec<_>>>()?;
    for (inner, read_only) in &real {
        for (outer, _) in real.iter().filter(|(_, other)| other != read_only) {
            if inner.starts_with(outer) {
                bail!(
                    "'{}' lies in '{}' and only one of them is read-only: allow directories that \
                     lie beside each other",
                    inner.display(),
                    outer.display()
                );
            }
        }
    }
    Ok(())
}

/// Becomes the one server of this domain's shares. libxl (4.19 and later) takes it for
/// type=xen_9pfsd then.
fn claim(xs: &mut Xenstore, home: &str) -> Result<()> {
    let node = |name| format!("{home}/libxl/xen-9pfs/{name}");
    let pid = xs.read_text(&node("pid"))?.unwrap_or_default();
    if !xs.claim()? {
        bail!("another platter-9pfsd, process {pid}, serves this domain's shares already");
    }
    let program = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    if pid.parse::<u32>().is_ok() && program.trim() == "xen-9pfsd" {
        bail!("Xen's own xen-9pfsd, process {pid}, serves this domain's shares already");
    }
    xs.write(&node("pid"), &std::process::id().to_string())?;
    xs.write(&node("state"), "running")?;
    Ok(())
}

/// `/local/domain/N` of the domain that we run in.
fn home(xs: &mut Xenstore) -> Result<String> {
    let domid = xs.read_text("domid")?.unwrap_or_else(|| "0".to_string());
    Ok(format!("/local/domain/{domid}"))
}

/// Would miss: file systems mounted in two places.
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_only_lies_in_nothing_that_is_not_nor_the_other_way_round() {
        let top = std::env::temp_dir().join(format!("platter-9pfsd-main-{}", std::process::id()));
        std::fs::create_dir_all(top.join("images/base")).expect("directories");
        std::fs::create_dir_all(top.join("images-base")).expect("a directory");
        std::os::unix::fs::symlink("images/base", top.join("link")).expect("a link");
        let allow = |directory: &str, read_only| {
            let policy = Policy { read_only, ..Policy::default() };
            Allowed { directory: top.join(directory), policy }
        };
        for (one, other, is_apart) in [
            ("images", "images-base", true),
            ("images", "images/base", false),
            ("images", "images", false),
            ("images", "link", false),
        ] {
            for read_only in [false, true] {
                let two = [allow(one, read_only), allow(other, !read_only)];
                assert_eq!(prove_apart(&two).is_ok(), is_apart, "{one} {other}");
                let alike = [allow(one, read_only), allow(other, read_only)];
                assert!(prove_apart(&alike).is_ok(), "{one} {other}");
            }
        }
        std::fs::remove_dir_all(&top).expect("removed");
    }
}
