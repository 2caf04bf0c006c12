//! `rig`: nested Xen under QEMU, for platter's demo, scenarios and benches.
//!
//! It builds a machine from Debian packages below build/rig, boots Xen in it, and lets dom0 run
//! shell scenarios against real guests. It must never install QEMU on the host, nor leave one
//! running.

#![forbid(unsafe_code)]

mod accel;
mod bench;
mod command;
mod cpio;
mod demo;
mod initrd;
mod machine;
mod mirror;
mod scenario;
mod setup;
mod suite;
mod test;
mod vmlinux;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand, ValueEnum};

use crate::scenario::Set;
use crate::suite::{Layout, Suite};

/// Nested Xen under QEMU: platter's demo, scenarios and benches.
#[derive(Parser)]
#[command(name = "rig", max_term_width = 100)]
struct Arguments {
    /// Debian release whose Xen is booted.
    #[arg(long, global = true, env = "SUITE", value_enum, default_value = "trixie")]
    suite: Suite,
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Build the nested machine's parts; the other commands do it too.
    Setup,
    /// Tell platter's story: a guest, its disk, the file behind it.
    Demo {
        /// Leave a dom0 shell on the terminal when the story is told.
        #[arg(long, env = "KEEP", value_parser = clap::builder::FalseyValueParser::new())]
        keep: bool,
    },
    /// Measure platter beside dom0's own backends, in one boot.
    Bench {
        /// Bench scenarios, by name; all without any.
        names: Vec<String>,
    },
    /// List the scenarios.
    List,
    /// Run scenarios; without names, the default ones.
    Test {
        /// Scenarios, by name, number, or name without its number.
        names: Vec<String>,
        /// The slow ones too.
        #[arg(long)]
        all: bool,
        /// Machines that run at the same time; each takes up to 4 GiB.
        #[arg(long, env = "RIG_JOBS", default_value = "2")]
        jobs: NonZeroUsize,
        /// What stands behind the guests' disks.
        #[arg(long, value_enum, default_value = "platter")]
        storage: Storage,
    },
}

/// What stands behind the guests' disks; dom0's own storage serves to prove the rig.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Storage {
    Platter,
    Qdisk,
    Blkback,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("rig: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    let layout = Layout::new(repository()?);
    let suite = arguments.suite;
    match &arguments.command {
        Action::Setup => setup::setup(&layout, suite)?,
        Action::Demo { keep } => return demo::run(&layout, suite, *keep),
        Action::Bench { names } => return bench::run(&layout, suite, names),
        Action::List => {
            for scenario in scenario::all(&layout.source("rig/scenarios"))? {
                println!("{:24} {}", scenario.name, scenario.title);
            }
        }
        Action::Test { names, all, jobs, storage } => {
            setup::setup(&layout, suite)?;
            return test(&layout, suite, names, *all, *jobs, *storage);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn test(
    layout: &Layout,
    suite: Suite,
    names: &[String],
    all: bool,
    jobs: NonZeroUsize,
    storage: Storage,
) -> Result<ExitCode> {
    let sets: &[Set] = if all { &[Set::Default, Set::Slow] } else { &[Set::Default] };
    let scenarios = scenario::all(&layout.source("rig/scenarios"))?;
    let mut scenarios = scenario::choose(scenarios, names, sets)?;
    scenarios.retain(|scenario| {
        scenario.suites.is_empty() || scenario.suites.iter().any(|name| name == suite.name())
    });
    if storage != Storage::Platter {
        scenarios.retain(|scenario| scenario.any_storage);
        scenarios.iter_mut().for_each(|scenario| scenario.needs.clear());
    }
    let word = storage.to_possible_value().context("a storage has no name")?;
    let settings = [("STORAGE".to_owned(), word.get_name().to_owned())];
    let count = test::run(layout, suite, scenarios, &settings, jobs.get())?;
    println!("{} passed, {} failed", count.passed, count.failed);
    let good = count.failed == 0 && count.passed > 0;
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The checkout: where the command was started or a folder above it.
fn repository() -> Result<PathBuf> {
    let here = std::env::current_dir()?;
    let marked = |folder: &&Path| folder.join("rig/scenarios").is_dir();
    let found = here.ancestors().find(marked).context("run rig inside platter's checkout")?;
    Ok(found.to_owned())
}
