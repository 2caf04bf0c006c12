//! `rig test`: chosen scenarios in as few boots as possible, told as they land.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::Result;

use crate::accel;
use crate::machine::{Event, Job};
use crate::scenario::Scenario;
use crate::suite::{Layout, Suite};

/// How many last lines of a log a failure shows.
const SHOWN_LINES: usize = 40;
/// The same for logs that say little: Xen's boot is the greater part of its own.
const FEW_LINES: usize = 15;

/// Fewer scenarios than this are not worth another boot beside the first.
const SCENARIOS_WORTH_A_BOOT: usize = 3;

/// What one run counted.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Count {
    /// Scenarios that passed.
    pub passed: usize,
    /// Scenarios that failed, could not run, or were not reached.
    pub failed: usize,
}

impl Count {
    fn add(&mut self, other: Count) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

/// Runs the scenarios: each kind of machine in boots of its own, as many at a time as `at_once`.
///
/// # Errors
/// Only when the rig itself cannot work; failed scenarios are counted.
pub fn run(
    layout: &Layout,
    suite: Suite,
    scenarios: Vec<Scenario>,
    settings: &[(String, String)],
    at_once: usize,
) -> Result<Count> {
    let missing = |scenario: &Scenario| {
        let mut needs = scenario.needs.iter();
        needs.find(|file| !layout.source("build").join(file.as_str()).exists()).cloned()
    };
    let (runnable, lacking): (Vec<_>, Vec<_>) =
        scenarios.into_iter().partition(|scenario| missing(scenario).is_none());
    for scenario in &lacking {
        let file = missing(scenario).unwrap_or_default();
        println!("fail  {}: build/{file} is missing; make builds it", scenario.name);
    }
    let accelerator = accel::choose(layout, suite)?;
    let boots = Mutex::new(plan(runnable, at_once));
    let next = || boots.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    let work = || {
        let mut count = Count::default();
        while let Some(scenarios) = next() {
            let settings = settings.to_vec();
            let scenarios = &scenarios;
            count.add(boot(&Job { layout, suite, accelerator, scenarios, settings, keep: false }));
        }
        count
    };
    let mut count = Count { passed: 0, failed: lacking.len() };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..at_once).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            match worker.join() {
                Ok(done) => count.add(done),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
    });
    Ok(count)
}

/// The boots: scenarios that want the same machine share one, or `at_once` of them when that is
/// what keeps every worker busy.
fn plan(scenarios: Vec<Scenario>, at_once: usize) -> VecDeque<Vec<Scenario>> {
    let mut kinds: BTreeMap<Vec<String>, Vec<Scenario>> = BTreeMap::new();
    for scenario in scenarios {
        let machine = scenario.machine.iter().cloned().collect();
        kinds.entry(machine).or_default().push(scenario);
    }
    let mut boots = VecDeque::new();
    for scenarios in kinds.into_values() {
        let parts = at_once.min(scenarios.len() / SCENARIOS_WORTH_A_BOOT).max(1);
        let mut shares = vec![Vec::new(); parts];
        for (index, scenario) in scenarios.into_iter().enumerate() {
            shares[index % parts].push(scenario);
        }
        boots.extend(shares);
    }
    boots
}

/// One boot; what was not reached because the machine broke counts as failed.
fn boot(job: &Job) -> Count {
    println!("rig: booting {} with {} scenarios", job.suite.name(), job.scenarios.len());
    let mut outcomes: BTreeMap<String, bool> = BTreeMap::new();
    let ended = job.run(&mut |results, at, event| match event {
        Event::Up(kernel) => println!("rig: {at:6.1} s  dom0 is up, Linux {kernel}"),
        Event::Step(name, text) => show_step(at, name, text),
        Event::Done(name, passed, seconds) => {
            let title = job.scenarios.iter().find(|scenario| scenario.name == *name);
            let title = title.map_or("", |scenario| scenario.title.as_str());
            let word = if *passed { "ok  " } else { "fail" };
            outcomes.insert(name.clone(), *passed);
            // In one piece: another boot may have something to say at the same time.
            let why = if *passed { String::new() } else { failure(&results.join(name)) };
            clear_step();
            print!("{word}  {name}  {title}  ({seconds} s)\n{why}");
        }
        _ => {}
    });
    clear_step();
    if let Err(error) = ended {
        println!("rig: {error:#}");
    }
    for scenario in job.scenarios {
        if !outcomes.contains_key(&scenario.name) {
            println!("fail  {}: not finished", scenario.name);
        }
    }
    let passed = outcomes.values().filter(|passed| **passed).count();
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

/// What explains a failure, the most telling first.
pub fn failure(results: &Path) -> String {
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
    let mut text = String::new();
    for name in names {
        let Ok(bytes) = fs::read(results.join(&name)) else { continue };
        let body = String::from_utf8_lossy(&bytes);
        let told =
            |line: &&str| !line.trim().is_empty() && (name != "xenstore" || is_about_disks(line));
        let lines: Vec<&str> = body.lines().filter(told).collect();
        if lines.is_empty() {
            continue;
        }
        let few = name.starts_with("toolstack-") || name == "xl-dmesg" || name == "trace";
        let limit = if few { FEW_LINES } else { SHOWN_LINES };
        text.push_str(&format!("  ---- {name}\n"));
        for line in &lines[lines.len().saturating_sub(limit)..] {
            text.push_str(&format!("  | {}\n", line.trim_end()));
        }
    }
    text.push_str(&format!("  ---- all of it: {}\n", results.display()));
    text
}

/// Whether a line of xenstore-ls tells of a disk or an error, and not what libxl copied of it.
fn is_about_disks(line: &str) -> bool {
    let about = ["/vbd", "/qdisk", "/error", "/data/"].iter().any(|part| line.contains(part));
    about && !line.starts_with("/libxl") && !line.contains("= \"\"")
}

#[cfg(test)]
mod tests {
    //! Would miss: two machines that disturb each other; nothing but files of its own is written.
    use super::*;

    #[test]
    fn boots_are_shared_by_kind_and_split_for_the_workers() {
        let scenario = |name: &str, machine: &[&str]| Scenario {
            machine: machine.iter().map(|part| part.to_string()).collect(),
            ..Scenario::parse(name, "#: title t\n").unwrap()
        };
        let names = ["1", "2", "3", "4", "5", "6"].map(|name| scenario(name, &[]));
        let mut scenarios = names.to_vec();
        scenarios.push(scenario("n", &["nvme"]));
        let boots = plan(scenarios.clone(), 2);
        let sizes: Vec<usize> = boots.iter().map(Vec::len).collect();
        assert_eq!(sizes, [3, 3, 1]);
        assert_eq!(plan(scenarios, 1).len(), 2);
        assert!(plan(Vec::new(), 2).is_empty());
    }
}
