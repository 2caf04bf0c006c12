//! `platter commit`: what an overlay holds goes into its base, by the engine's own plan. The
//! overlay stays as it is; where a child knows its parent by its content (VHDX, VMDK), it is of
//! no more use and that is said.
//!
//! Order guarded: the overlay is read alone and never as part of a chain, so that no stale table
//! of the base is ever used.

use std::path::PathBuf;

use clap::Args;
use platter_image::{Access, Merge, MergeStep, SECTOR_BYTES, SectorRange};

use super::common::{self, Failure, OpenFlags, Outcome, OutputFlags};
use crate::engine::Engine;
use crate::fault::Fault;
use crate::flow::is_zero;

/// Write what an overlay holds into its base
#[derive(Args)]
pub struct Commit {
    /// The overlay's format
    #[arg(short, value_name = "FMT")]
    format: Option<String>,
    /// Print nothing
    #[arg(short)]
    quiet: bool,
    #[command(flatten)]
    output: OutputFlags,
    #[command(flatten)]
    open: OpenFlags,
    file: PathBuf,
}

impl Commit {
    pub fn run(self) -> Outcome {
        let opened =
            common::open(&self.file, self.format.as_deref(), Access::ReadOnly, &self.open)?;
        let mut chain = opened.engine;
        let layers = chain.image().info();
        let Some(below) = layers.get(1) else {
            let message = format!("{}: it has no base to commit to", self.file.display());
            return Err(Failure::new(message));
        };
        let base_path = self.file.with_file_name(chain.path(below.file));
        let base_format = below.format.name();
        drop(chain);
        let base = common::open(&base_path, Some(base_format), Access::ReadWrite, &self.open)?;
        let mut base = base.engine;
        let known_as = base.image().identity();
        let mut top = common::open_alone(&self.file, opened.format, &self.open)?;
        let told = |fault| common::in_folder(&base_path, fault);
        let sectors = top.sectors();
        if base.sectors() < sectors {
            base.resize(sectors).map_err(told)?;
        }
        let bar = common::progress(
            sectors * SECTOR_BYTES,
            "committing",
            self.quiet || self.output.json(),
        );
        let mut merge = Merge::new();
        loop {
            let step = top.drive(|image| merge.step(image));
            let step = step.map_err(|fault| common::in_folder(&self.file, fault))?;
            let done = match step {
                MergeStep::Done => break,
                MergeStep::Zero { range } => base.write_zeroes(range.start, range.count),
                MergeStep::Copy { range, .. } => {
                    let bytes = read(&mut top, range);
                    let bytes = bytes.map_err(|fault| common::in_folder(&self.file, fault))?;
                    match is_zero(&bytes) {
                        true => base.write_zeroes(range.start, range.count),
                        false => base.write(range.start, &bytes),
                    }
                }
            };
            done.map_err(told)?;
            bar.set_position(merge.done_sectors() * SECTOR_BYTES);
        }
        bar.finish_and_clear();
        base.finish().map_err(told)?;
        let mut text = String::from("Image committed.");
        if base.image().identity() != known_as {
            let overlay = self.file.display();
            text.push_str(&format!("\n{overlay} does not fit its base any more: delete it."));
        }
        let bytes = common::disk_bytes(&mut base);
        common::say_done(&self.output, self.quiet, &text, &base_path, bytes);
        Ok(0)
    }
}

fn read(engine: &mut Engine, range: SectorRange) -> Result<Vec<u8>, Fault> {
    let mut bytes = vec![0; range.bytes() as usize];
    engine.read(range.start, &mut bytes)?;
    Ok(bytes)
}
