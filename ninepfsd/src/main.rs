//! `platter-9pfsd`: a 9p server for Xen's 9pfs, for dom0 (or any Linux backend domain).
//!
//! It knows files and nothing of image formats, rings of disks or guests. One process serves
//! all domains; it opens nothing but regular files and directories below the directories that
//! the administrator names.

use std::path::PathBuf;
use std::sync::mpsc::channel;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use platter_9pfsd::backends::{Allowed, Backends, KINDS};
use platter_9pfsd::device::Devices;
use platter_9pfsd::share::Policy;
use platter_9pfsd::workers::Workers;
use platter_9pfsd::xenstore::Xenstore;
use platter_9pfsd::{attach, sandbox};

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
    Serve {
        /// A directory below which shares may lie; may be given several times.
        #[arg(long, required = true, value_name = "DIRECTORY")]
        allow: Vec<PathBuf>,
        /// As --allow, and nothing there is ever changed.
        #[arg(long, value_name = "DIRECTORY")]
        allow_read_only: Vec<PathBuf>,
        /// The largest size that a file may be given, in bytes.
        #[arg(long, value_name = "BYTES", default_value_t = 0)]
        file_bytes_max: u64,
        /// Threads that read and write files.
        #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=64))]
        workers: u8,
        /// Shares that may be in use at once.
        #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=1024))]
        shares: u16,
        /// Keep the rights that the server does not need; for finding faults.
        #[arg(long)]
        no_sandbox: bool,
    },
    /// Give a share to a domain that is running, without a `p9=` line and without QEMU.
    Attach {
        /// Name or number of the domain.
        domain: String,
        /// The share's tag.
        tag: String,
        /// The directory, absolute.
        path: String,
    },
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Action::Serve { allow, allow_read_only, file_bytes_max, workers, shares, no_sandbox } => {
            let rights = |read_only| Policy { read_only, file_bytes_max };
            let allowed = allow_read_only
                .into_iter()
                .map(|directory| Allowed { directory, policy: rights(true) })
                .chain(
                    allow.into_iter().map(|directory| Allowed { directory, policy: rights(false) }),
                )
                .collect();
            serve(allowed, workers.into(), shares.into(), !no_sandbox)
        }
        Action::Attach { domain, tag, path } => {
            let mut xs = Xenstore::open()?;
            let home = home(&mut xs)?;
            attach::attach(&mut xs, &home, &domain, &tag, &path)
        }
    }
}

fn serve(allowed: Vec<Allowed>, workers: usize, shares: usize, sandboxed: bool) -> Result<()> {
    for Allowed { directory, .. } in &allowed {
        if !directory.is_absolute() || !directory.is_dir() {
            bail!("--allow wants the absolute path of a directory, not '{}'", directory.display());
        }
    }
    let mut xs = Xenstore::open()?;
    let home = home(&mut xs)?;
    // libxl (4.19 and later) takes a server that says it is running for type=xen_9pfsd.
    xs.write(&format!("{home}/libxl/xen-9pfs/pid"), &std::process::id().to_string())?;
    xs.write(&format!("{home}/libxl/xen-9pfs/state"), "running")?;
    for kind in KINDS {
        xs.watch(&format!("{home}/backend/{kind}"))?;
    }
    xs.watch("/local/domain")?;
    let devices = Devices::open(shares)?;
    if sandboxed {
        let open: Vec<_> = allowed.iter().map(|allowed| allowed.directory.as_path()).collect();
        sandbox::enter(&open)?;
    }
    let workers = Workers::start(workers).context("cannot start the worker threads")?;
    let (ended, ends) = channel();
    let mut backends = Backends::new(home, allowed, devices, workers, ended);
    eprintln!("serving");
    loop {
        backends.look(&mut xs)?;
        while let Ok(ended) = ends.try_recv() {
            backends.device_ended(&mut xs, &ended)?;
        }
        wait(&mut xs)?;
    }
}

/// Until something of interest changes in xenstore, and nothing more is told at once; a second
/// at most, for threads that ended.
fn wait(xs: &mut Xenstore) -> Result<()> {
    let mut patience = Timespec { tv_sec: 1, tv_nsec: 0 };
    loop {
        if !xs.has_event() {
            let mut fds = [PollFd::new(&*xs, PollFlags::IN)];
            match poll(&mut fds, Some(&patience)) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(errno) => return Err(errno).context("cannot wait for xenstored"),
            }
        }
        // Everything of every domain changes all the time; only 9p shares matter.
        if xs.event()?.contains("9pfs") {
            patience = Timespec { tv_sec: 0, tv_nsec: 0 };
        }
    }
}

/// `/local/domain/N` of the domain that we run in.
fn home(xs: &mut Xenstore) -> Result<String> {
    let domid = xs.read_text("domid")?.unwrap_or_else(|| "0".to_string());
    Ok(format!("/local/domain/{domid}"))
}
