//! `rig test`: chosen scenarios in as few boots as possible, told as they land.

use std::collections::BTreeMap;
use std::fs;
use std::io::{IsTerminal, Write};
use std::path::Path;

use anyhow::Result;

use crate::accel;
use crate::machine::{Event, Job};
use crate::scenario::Scenario;
use crate::suite::{Layout, Suite};

/// How many last lines of a log a failure shows.
const SHOWN_LINES: usize = 40;
/// The same for logs that say little: Xen's boot is the greater part of its own.
const FEW_LINES: usize = 15;

/// What one run counted.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Count {
    /// Scenarios that passed.
    pub passed: usize,
    /// Scenarios that failed, could not run, or were not reached.
    pub failed: usize,
}

/// Runs the scenarios, each kind of machine in a boot of its own.
///
/// # Errors
/// Only when the rig itself cannot work; failed scenarios are counted.
pub fn run(
    layout: &Layout,
    suite: Suite,
    scenarios: Vec<Scenario>,
    settings: &[(String, String)],
) -> Result<Count> {
    let mut count = Count::default();
    let mut boots: BTreeMap<Vec<String>, Vec<Scenario>> = BTreeMap::new();
    for scenario in scenarios {
        let missing = |file: &&String| !layout.source("build").join(file.as_str()).exists();
        if let Some(file) = scenario.needs.iter().find(missing) {
            println!("fail  {}: build/{file} is missing; make builds it", scenario.name);
            count.failed += 1;
            continue;
        }
        let machine = scenario.machine.iter().cloned().collect();
        boots.entry(machine).or_default().push(scenario);
    }
    for scenarios in boots.values() {
        let settings = settings.to_vec();
        let accelerator = accel::choose(layout, suite)?;
        let job = Job { layout, suite, accelerator, scenarios, settings, keep: false };
        let boot = boot(&job);
        count.passed += boot.passed;
        count.failed += boot.failed;
    }
    Ok(count)
}

/// One boot; what was not reached because the machine broke counts as failed.
fn boot(job: &Job) -> Count {
    println!("rig: booting {} with {} scenarios", job.suite.name(), job.scenarios.len());
    let mut outcomes: BTreeMap<String, bool> = BTreeMap::new();
    let mut failed = Vec::new();
    let ended = job.run(&mut |results, at, event| match event {
        Event::Up(kernel) => println!("rig: {at:6.1} s  dom0 is up, Linux {kernel}"),
        Event::Step(name, text) => show_step(at, name, text),
        Event::Done(name, passed, seconds) => {
            let title = job.scenarios.iter().find(|scenario| scenario.name == *name);
            let title = title.map_or("", |scenario| scenario.title.as_str());
            let word = if *passed { "ok  " } else { "fail" };
            clear_step();
            println!("{word}  {name}  {title}  ({seconds} s)");
            outcomes.insert(name.clone(), *passed);
            if !passed {
                failed.push(name.clone());
                show_failure(&results.join(name));
            }
        }
        _ => {}
    });
    clear_step();
    if let Err(error) = ended {
        println!("rig: {error:#}");
    }
    let passed = outcomes.values().filter(|passed| **passed).count();
    for scenario in job.scenarios {
        if !outcomes.contains_key(&scenario.name) {
            println!("fail  {}: not finished", scenario.name);
        }
    }
    Count { passed, failed: job.scenarios.len() - passed }
}

/// On a terminal the current step is a line that the next one overwrites.
fn show_step(at: f32, name: &str, text: &str) {
    if std::io::stdout().is_terminal() {
        let line: String = format!("{at:6.1} s  {name}: {text}").chars().take(99).collect();
        print!("\r\x1b[K{line}");
        let _ = std::io::stdout().flush();
    }
}

fn clear_step() {
    if std::io::stdout().is_terminal() {
        print!("\r\x1b[K");
    }
}

/// Prints what explains a failure, the most telling first.
pub fn show_failure(results: &Path) {
    let mut names: Vec<String> = ["output", "trace"].map(str::to_owned).to_vec();
    if let Ok(entries) = fs::read_dir(results) {
        let mut logs: Vec<String> = entries
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| name.starts_with("guest-") || name.starts_with("toolstack-"))
            .collect();
        logs.sort();
        names.extend(logs);
    }
    names.extend(["xl-list", "xl-dmesg", "xenstore"].map(str::to_owned));
    for name in names {
        let Ok(bytes) = fs::read(results.join(&name)) else { continue };
        let body = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = body.lines().filter(|line| !line.trim().is_empty()).collect();
        let shown = if name == "xenstore" {
            lines.iter().copied().filter(|line| about_disks(line)).collect()
        } else {
            lines
        };
        if shown.is_empty() {
            continue;
        }
        println!("  ---- {name}");
        let few = name.starts_with("toolstack-") || name == "xl-dmesg" || name == "trace";
        let limit = if few { FEW_LINES } else { SHOWN_LINES };
        for line in &shown[shown.len().saturating_sub(limit)..] {
            println!("  | {}", line.trim_end());
        }
    }
    println!("  ---- all of it: {}", results.display());
}

/// Whether a line of xenstore-ls belongs to a disk, a 9p share or an error.
fn about_disks(line: &str) -> bool {
    ["/vbd", "/9pfs", "/qdisk", "/error", "/platter"].iter().any(|part| line.contains(part))
}
