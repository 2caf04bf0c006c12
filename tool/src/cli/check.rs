//! `platter check`: are the tables of an image consistent? Exit codes are qemu-img's: 0 sound,
//! 1 not completed, 2 corrupt, 3 leaked space only, 63 nothing to check.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use platter_image::{Access, CheckParams, CheckReport, Format, Repair};
use serde_json::json;

use super::common::{self, Failure, OpenFlags, Outcome, OutputFlags};

/// Check an image's tables, and repair them if told to
///
/// Exit codes: 0 sound, 1 not completed, 2 corrupt, 3 leaked space only, 63 nothing to check.
#[derive(Args)]
pub struct Check {
    /// The image's format
    #[arg(short, value_name = "FMT")]
    format: Option<String>,
    /// Repair: leaked space, or all that can be mended without losing data
    #[arg(short, long, value_enum, value_name = "WHAT", num_args = 0..=1,
          default_missing_value = "all")]
    repair: Option<What>,
    /// Print nothing but what is wrong
    #[arg(short)]
    quiet: bool,
    #[command(flatten)]
    output: OutputFlags,
    #[command(flatten)]
    open: OpenFlags,
    file: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    Leaks,
    All,
}

impl Check {
    pub fn run(self) -> Outcome {
        let (access, repair) = match self.repair {
            None => (Access::ReadOnly, Repair::Nothing),
            Some(What::Leaks) => (Access::ReadWrite, Repair::Leaks),
            Some(What::All) => (Access::ReadWrite, Repair::All),
        };
        let opened = common::open_to_check(&self.file, self.format.as_deref(), access, &self.open)?;
        if opened.format == Format::Raw {
            let message = format!("{}: a raw disk has no tables to check", self.file.display());
            return Err(Failure::new(message).with_code(63));
        }
        let mut engine = opened.engine;
        let params = CheckParams { repair, budget_bytes: 64 << 20 };
        let bar = common::progress(0, "checking", self.quiet || self.output.json());
        let report = engine.check(params, |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        });
        bar.finish_and_clear();
        let told = |fault| common::in_folder(&self.file, fault);
        let report = report.map_err(told)?;
        if access == Access::ReadWrite {
            engine.close().map_err(told)?;
        }
        match self.output.json() {
            true => self.print_json(&report, opened.format.name()),
            false => self.print(&report),
        }
        let corrupt = report.corruptions.saturating_sub(report.corruptions_fixed);
        let leaks = report.leaks.saturating_sub(report.leaks_fixed);
        Ok(match (corrupt, leaks) {
            (0, 0) => 0,
            (0, _) => 3,
            _ => 2,
        })
    }

    fn print_json(&self, report: &CheckReport, format: &str) {
        let problems: Vec<String> = report.problems.iter().map(|p| p.to_string()).collect();
        common::print_json(&json!({
            "filename": self.file.to_string_lossy(),
            "format": format,
            "check-errors": 0,
            "corruptions": report.corruptions - report.corruptions_fixed,
            "corruptions-fixed": report.corruptions_fixed,
            "leaks": report.leaks - report.leaks_fixed,
            "leaks-fixed": report.leaks_fixed,
            "allocated-clusters": report.allocated,
            "compressed-clusters": report.compressed,
            "total-clusters": report.clusters,
            "image-end-offset": report.end_bytes,
            "problems": problems,
        }));
    }

    fn print(&self, report: &CheckReport) {
        for problem in &report.problems {
            println!("{}: {problem}", self.file.display());
        }
        let hidden = (report.corruptions + report.leaks) as usize
            - report.problems.len().min((report.corruptions + report.leaks) as usize);
        if hidden > 0 {
            println!("... and {hidden} more");
        }
        if report.corruptions_fixed + report.leaks_fixed > 0 {
            let (fixed, freed) = (report.corruptions_fixed, report.leaks_fixed);
            println!("repaired: {fixed} errors, {freed} leaked clusters");
        }
        let corrupt = report.corruptions - report.corruptions_fixed;
        let leaks = report.leaks - report.leaks_fixed;
        if corrupt > 0 {
            println!("{corrupt} errors: data may be wrong; copy it before you repair it");
        }
        if leaks > 0 {
            println!("{leaks} leaked clusters: space is wasted, data is not harmed");
        }
        if self.quiet {
            return;
        }
        if corrupt + leaks == 0 {
            println!("No errors were found on the image.");
        }
        if report.clusters > 0 {
            let percent = report.allocated as f64 * 100.0 / report.clusters as f64;
            let (allocated, clusters) = (report.allocated, report.clusters);
            println!("{allocated}/{clusters} = {percent:.2}% allocated");
        }
        println!("Image end offset: {}", report.end_bytes);
    }
}
