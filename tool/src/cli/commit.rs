//! `platter commit`: what an overlay holds goes into its base, by the engine's own plan. The
//! overlay stays as it is; where a child knows its parent by its content (VHDX, VMDK), it is of
//! no more use and that is said. Such a chain cannot be opened after a commit that was stopped,
//! for its base has changed: `--again` takes the base by its name alone.
//!
//! Order guarded: the overlay is read alone and never as part of a chain, so that no stale table
//! of the base is ever used.

use std::path::PathBuf;

use clap::Args;
use platter_image::{Access, Format, Merge, MergeStep, SECTOR_BYTES, SectorRange};

use super::common::{self, Failure, OpenFlags, Outcome, OutputFlags};
use crate::engine::Engine;
use crate::fault::Fault;
use crate::flow::is_zero;
use crate::medium::{DiskFolder, Folder};

/// Write what an overlay holds into its base
#[derive(Args)]
pub struct Commit {
    /// The overlay's format
    #[arg(short, value_name = "FMT")]
    format: Option<String>,
    /// Print nothing
    #[arg(short)]
    quiet: bool,
    /// Go on with a commit that was stopped: the base has changed, and nothing else wrote to it
    #[arg(long)]
    again: bool,
    #[command(flatten)]
    output: OutputFlags,
    #[command(flatten)]
    open: OpenFlags,
    file: PathBuf,
}

impl Commit {
    pub fn run(self) -> Outcome {
        let format = common::format_of_image(&self.file, self.format.as_deref())?;
        // Any other chain opens as before, and is looked at as a whole.
        let (base_path, base_format) = match self.again && knows_state(format) {
            true => self.named_base(format)?,
            false => self.base(format)?,
        };
        let base_format = Some(base_format.name());
        let base = common::open(&base_path, base_format, Access::ReadWrite, &self.open)?;
        let mut base = base.engine;
        let known_as = base.image().identity();
        let mut top = common::open_alone(&self.file, format, &self.open)?;
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

    /// The base that the chain is opened with.
    fn base(&self, format: Format) -> Result<(PathBuf, Format), Failure> {
        let opened = common::open(&self.file, Some(format.name()), Access::ReadOnly, &self.open);
        let mut chain = opened.map_err(|failure| self.hint(format, failure))?.engine;
        let layers = chain.image().info();
        let below = layers.get(1).ok_or_else(|| self.no_base())?;
        Ok((common::beside(&self.file, chain.path(below.file)), below.format))
    }

    /// The base by its name, whatever state it is in.
    fn named_base(&self, format: Format) -> Result<(PathBuf, Format), Failure> {
        let mut top = common::open_alone(&self.file, format, &self.open)?;
        let layers = top.image().info();
        let (name, format) = layers[0].backing.clone().ok_or_else(|| self.no_base())?;
        let told = |error| Failure::from(Fault::io(&name, "open", error));
        let (folder, _) = DiskFolder::of(&self.file).map_err(told)?;
        folder.open_named(&name, Access::ReadOnly).map_err(told)?;
        let format = format.or_else(|| Format::by_suffix(&name));
        let path = common::beside(&self.file, &name);
        let why = || Failure::new(format!("{}: its base's format is not known", path.display()));
        Ok((path.clone(), format.ok_or_else(why)?))
    }

    fn no_base(&self) -> Failure {
        Failure::new(format!("{}: it has no base to commit to", self.file.display()))
    }

    /// Where children know their parents by content, a commit that was stopped is the likely reason
    /// for a chain that does not open.
    fn hint(&self, format: Format, failure: Failure) -> Failure {
        if !knows_state(format) {
            return failure;
        }
        let message = failure.message;
        Failure { message: format!("{message}; go on with a stopped commit by --again"), ..failure }
    }
}

/// Does a child of this format know its parent by the state that it was made on?
fn knows_state(format: Format) -> bool {
    matches!(format, Format::Vhdx | Format::Vmdk)
}

fn read(engine: &mut Engine, range: SectorRange) -> Result<Vec<u8>, Fault> {
    let mut bytes = vec![0; range.bytes() as usize];
    engine.read(range.start, &mut bytes)?;
    Ok(bytes)
}
