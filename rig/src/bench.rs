//! `rig bench`: backends side by side in one boot, as medians, spreads and ratios.
//!
//! The machine is emulated, so absolute figures mean little: what counts is the CPU time that the
//! serving domains use for a request, and how the backends compare within a round.

use std::collections::BTreeMap;
use std::fs;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use crate::machine::{Event, Job};
use crate::scenario::{self, Scenario, Set};
use crate::suite::{Layout, Suite};
use crate::{accel, setup, test};

/// The backend that the others are compared with.
const BASELINE: &str = "platter";

/// Variables of the environment that the bench scenarios know.
const KNOBS: [&str; 4] = ["BACKENDS", "ROUNDS", "RUNTIME_SECONDS", "WORKS"];

/// One line of the table that the bench scenario leaves.
#[derive(Debug, Clone, PartialEq)]
struct Sample {
    backend: String,
    /// The kind of load, such as `randread 4k`.
    work: String,
    requests: f64,
    seconds: f64,
    cpu_dom0_seconds: f64,
    cpu_storage_seconds: f64,
}

/// Reads the table; CPU times are without what measuring itself costs.
fn parse_table(table: &str) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    let mut idle_seconds = [0.0; 2];
    for line in table.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let ["idle", _, _, _, dom0, storage] = words[..] {
            idle_seconds = [dom0.parse()?, storage.parse()?];
            continue;
        }
        let [backend, _round, work, block, kib, ms, dom0, storage] = words[..] else {
            bail!("a line of the table is unknown: {line}");
        };
        let block_kib: f64 = block.trim_end_matches('k').parse()?;
        let cpu = |text: &str, idle: f64| Ok::<_, anyhow::Error>(text.parse::<f64>()? - idle);
        samples.push(Sample {
            backend: backend.to_owned(),
            work: format!("{work} {block}"),
            requests: kib.parse::<f64>()? / block_kib,
            seconds: ms.parse::<f64>()? / 1000.0,
            cpu_dom0_seconds: cpu(dom0, idle_seconds[0])?.max(0.0),
            cpu_storage_seconds: cpu(storage, idle_seconds[1])?.max(0.0),
        });
    }
    Ok(samples)
}

/// The median of some values and half the distance between the least and the greatest.
fn summary(mut values: Vec<f64>) -> (f64, f64) {
    values.sort_by(f64::total_cmp);
    let (Some(least), Some(greatest)) = (values.first(), values.last()) else { return (0.0, 0.0) };
    let half_range = (greatest - least) / 2.0;
    // The mean of the two in the middle, which are one and the same when the count is odd.
    let middle = (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0;
    (middle, half_range)
}

/// `MEDIAN ± HALF-RANGE`; one measurement has no spread, and must not look as if it had none to
/// speak of.
fn spread_of(median: f64, half_range: f64, samples: usize, digits: usize) -> String {
    match samples {
        0 | 1 => format!("{median:.digits$} (once)"),
        _ => format!("{median:.digits$} ± {half_range:.digits$}"),
    }
}

/// The table for people: a line for each work and backend.
fn report(samples: &[Sample]) -> String {
    let mut groups: BTreeMap<(&str, &str), Vec<&Sample>> = BTreeMap::new();
    for sample in samples {
        groups.entry((&sample.work, &sample.backend)).or_default().push(sample);
    }
    let over = |key: (&str, &str), value: fn(&Sample) -> f64| {
        let group = groups.get(&key).map(Vec::as_slice).unwrap_or_default();
        summary(group.iter().map(|sample| value(sample)).collect())
    };
    let rate = |sample: &Sample| sample.requests / sample.seconds;
    let dom0 = |sample: &Sample| sample.cpu_dom0_seconds * 1e6 / sample.requests;
    let storage = |sample: &Sample| sample.cpu_storage_seconds * 1e6 / sample.requests;
    let both = |sample: &Sample| {
        (sample.cpu_dom0_seconds + sample.cpu_storage_seconds) * 1e6 / sample.requests
    };
    let mut text = format!(
        "{:16} {:9} {:>16} {:>24} {:>7} {:>8} {:>7} {:>7}\n",
        "work", "backend", "requests/s", "CPU s/million requests", "dom0", "storage", "rate", "CPU"
    );
    for (work, backend) in groups.keys() {
        let key = (*work, *backend);
        let base = (*work, BASELINE);
        let (rate_median, rate_spread) = over(key, rate);
        let (cpu_median, cpu_spread) = over(key, both);
        let ratio = |value: f64, base: f64| {
            if base > 0.0 { format!("{:.2}", value / base) } else { "-".to_owned() }
        };
        text.push_str(&format!(
            "{work:16} {backend:9} {:>16} {:>24} {:>7.0} {:>8.0} {:>7} {:>7}\n",
            spread_of(rate_median, rate_spread, groups[&key].len(), 0),
            spread_of(cpu_median, cpu_spread, groups[&key].len(), 0),
            over(key, dom0).0,
            over(key, storage).0,
            ratio(rate_median, over(base, rate).0),
            ratio(cpu_median, over(base, both).0),
        ));
    }
    text
}

/// Boots, measures and prints.
///
/// # Errors
/// When the machine cannot be built or booted, or its table cannot be read.
pub fn run(layout: &Layout, suite: Suite, names: &[String]) -> Result<ExitCode> {
    setup::setup(layout, suite)?;
    let all = scenario::all(&layout.source("rig/scenarios"))?;
    let scenarios = scenario::choose(all, names, &[Set::Bench])?;
    println!("rig: the machine emulates its processor: only ratios within one boot mean anything");
    let mut good = true;
    for scenario in &scenarios {
        good &= bench(layout, suite, scenario)?;
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn bench(layout: &Layout, suite: Suite, scenario: &Scenario) -> Result<bool> {
    println!("rig: {}: {}", scenario.name, scenario.title);
    let knob = |name: &&str| Some(((*name).to_owned(), std::env::var(name).ok()?));
    let settings = KNOBS.iter().filter_map(knob).collect();
    let scenarios = std::slice::from_ref(scenario);
    let accelerator = accel::choose(layout, suite)?;
    let job = Job { layout, suite, accelerator, scenarios, settings, keep: false };
    let mut good = false;
    let results = job.run(&mut |_, at, event| match event {
        Event::Step(_, text) | Event::Note(_, text) => println!("rig: {at:6.1} s  {text}"),
        Event::Done(_, passed, _) => good = *passed,
        _ => {}
    })?;
    let results = results.join(&scenario.name);
    if !good {
        print!("{}", test::failure(&results));
    }
    let table = fs::read_to_string(results.join("table")).unwrap_or_default();
    let samples = parse_table(&table).context("the bench's table cannot be read")?;
    println!("\nMedian ± half the range; the last columns are ratios to {BASELINE}.");
    print!("{}", report(&samples));
    Ok(good && !samples.is_empty())
}

#[cfg(test)]
mod tests {
    //! Would miss: a table whose figures are wrong; the scenario's own numbers are taken as given.
    use super::*;

    #[test]
    fn a_table_becomes_rates_and_cpu_per_request() {
        let table = "idle 0 3 0 0.5 0.0\n\
                     platter 1 randread 4k 40000 5000 1.5 0.5\n\
                     qdisk 1 randread 4k 20000 5000 2.5 0.0\n";
        let samples = parse_table(table).unwrap();
        assert_eq!(samples[0].requests, 10_000.0);
        assert_eq!(samples[0].cpu_dom0_seconds, 1.0);
        let text = report(&samples);
        let qdisk = text.lines().find(|line| line.contains("qdisk")).unwrap();
        // 1000/s against 2000/s; 400 s per million requests against 150 s.
        assert!(qdisk.contains("1000 (once)") && qdisk.contains("400 (once)"), "{qdisk}");
        assert_eq!(spread_of(2.0, 0.5, 3, 1), "2.0 ± 0.5");
        assert!(qdisk.contains("0.50") && qdisk.contains("2.67"), "{qdisk}");
        assert!(parse_table("nonsense\n").is_err());
    }

    #[test]
    fn a_median_of_an_even_count_lies_between_the_two_in_the_middle() {
        assert_eq!(summary(vec![4.0, 2.0]), (3.0, 1.0));
        assert_eq!(summary(vec![9.0, 1.0, 2.0]), (2.0, 4.0));
        assert_eq!(summary(Vec::new()), (0.0, 0.0));
    }
}
