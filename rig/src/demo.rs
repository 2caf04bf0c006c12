//! `rig demo`: one boot, told step by step with the time since the command was given.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::machine::{Event, Job};
use crate::scenario::{self, Set};
use crate::suite::{Layout, Suite};
use crate::{accel, setup, test};

/// Builds what is missing, boots, tells; with `keep`, ends in a dom0 shell.
///
/// # Errors
/// When the machine cannot be built or booted; a story that goes wrong is a failing exit code.
pub fn run(layout: &Layout, suite: Suite, keep: bool) -> Result<ExitCode> {
    let began = Instant::now();
    let tell = |text: &str| println!("{:7.1} s  {text}", began.elapsed().as_secs_f32());
    setup::setup(layout, suite)?;
    let scenarios =
        scenario::choose(scenario::all(&layout.source("rig/scenarios"))?, &[], &[Set::Demo])?;
    for file in scenarios.iter().flat_map(|scenario| &scenario.needs) {
        let found = layout.source("build").join(file).exists();
        found.then_some(()).with_context(|| format!("build/{file} is missing: run make"))?;
    }
    tell(&format!("QEMU: power on, Xen {} boots", suite.xen_version()));
    let settings = vec![("STORAGE".to_owned(), "platter".to_owned())];
    let accelerator = accel::choose(layout, suite)?;
    let job = Job { layout, suite, accelerator, scenarios: &scenarios, settings, keep };
    let mut good = false;
    job.run(&mut |results, _, event| match event {
        Event::Up(kernel) => tell(&format!("dom0 is up, Linux {kernel}")),
        Event::Step(_, text) => tell(text),
        Event::Note(_, text) => println!("           {text}"),
        Event::Done(name, passed, _) => {
            good = *passed;
            tell(if good { "done" } else { "the story went wrong" });
            if !good {
                print!("{}", test::failure(&results.join(name)));
            }
        }
        _ => {}
    })?;
    println!();
    println!("{}", if good { "It works." } else { "It does not work." });
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
