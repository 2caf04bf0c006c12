//! `platter-sim --seeds N [--seed S]`: runs seeds S to S + N - 1 and prints a line for each that
//! fails; the line says how to run it again.
//!
//! Seeds run in child processes, because a panic of the server ends its process: that is what
//! it does under Xen too.

use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};

use platter_sim::swarm;

/// The server's words, with `PLATTER_SIM_LOG` set.
struct Talk;

impl log::Log for Talk {
    fn enabled(&self, _: &log::Metadata) -> bool {
        true
    }
    fn log(&self, record: &log::Record) {
        eprintln!("{}: {}", record.level(), record.args());
    }
    fn flush(&self) {}
}

fn main() -> ExitCode {
    if std::env::var_os("PLATTER_SIM_LOG").is_some() && log::set_logger(&Talk).is_ok() {
        log::set_max_level(log::LevelFilter::Trace);
    }
    let (mut seeds, mut first) = (None, None);
    let mut worker = false;
    let mut args = std::env::args().skip(1);
    while let Some(word) = args.next() {
        let mut number = || args.next().and_then(|text| text.parse().ok());
        let value = match word.as_str() {
            "--worker" => {
                worker = true;
                Some(0)
            }
            "--seeds" => number().inspect(|value| seeds = Some(*value)),
            "--seed" => number().inspect(|value| first = Some(*value)),
            _ => None,
        };
        if value.is_none() {
            eprintln!("usage: platter-sim [--seeds N] [--seed S]");
            return ExitCode::from(2);
        }
    }
    // A seed alone is run alone.
    let seeds: u64 = seeds.unwrap_or(if first.is_some() { 1 } else { 100 });
    let first = first.unwrap_or(1);
    if worker {
        for seed in first..first + seeds {
            println!("at {seed}");
            swarm::run(seed);
        }
        return ExitCode::SUCCESS;
    }
    supervise(first, seeds)
}

/// Runs the seeds in children, two at a time; a child that dies is followed by another.
fn supervise(first: u64, seeds: u64) -> ExitCode {
    let half = seeds.div_ceil(2);
    let second = first + half;
    let other = std::thread::spawn(move || run_all(second, seeds - half));
    let mut failed = run_all(first, half);
    failed.extend(other.join().expect("a supervisor"));
    failed.sort_unstable();
    for (seed, why) in &failed {
        println!("FAIL seed {seed}: {why}\n  again: platter-sim --seed {seed}");
    }
    println!("{seeds} seeds from {first}: {} failed", failed.len());
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run_all(first: u64, seeds: u64) -> Vec<(u64, String)> {
    let mut failed = vec![];
    let end = first + seeds;
    let mut next = first;
    while next < end {
        // A fresh process now and then: what a cut leaves behind is never freed.
        let count = (end - next).min(200);
        let (reached, why) = run_child(next, count);
        match why {
            None => next += count,
            Some(why) => {
                failed.push((reached, why));
                next = reached + 1;
            }
        }
    }
    failed
}

/// Runs a child; the seed it reached, and why it died if it did.
fn run_child(first: u64, count: u64) -> (u64, Option<String>) {
    let program = std::env::current_exe().expect("our own path");
    let mut child = Command::new(program)
        .args(["--worker", "--seeds", &count.to_string(), "--seed", &first.to_string()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("a child can be started");
    let stderr = child.stderr.take().expect("piped");
    let errors = std::thread::spawn(move || {
        BufReader::new(stderr).lines().map_while(Result::ok).collect::<Vec<_>>()
    });
    let mut reached = first;
    let stdout = BufReader::new(child.stdout.take().expect("piped"));
    for line in stdout.lines().map_while(Result::ok) {
        if let Some(seed) = line.strip_prefix("at ").and_then(|seed| seed.parse().ok()) {
            reached = seed;
        }
    }
    let status = child.wait().expect("a child ends");
    let errors = errors.join().expect("a reader");
    if status.success() {
        return (reached, None);
    }
    let at = errors.iter().position(|line| line.contains("panicked at")).unwrap_or(0);
    let why: Vec<&str> = errors.iter().skip(at).take(2).map(String::as_str).collect();
    (reached, Some(why.join(" ")))
}
