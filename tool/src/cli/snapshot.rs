//! `platter snapshot`: lists the snapshots in an image, or lays an overlay over it, after which
//! the image is a base that must not change.

use std::path::PathBuf;

use clap::{ArgGroup, Args};
use platter_image::{Format, SECTOR_BYTES, SnapshotInfo};
use serde_json::Value;

use super::common::{self, OpenFlags, Outcome, OutputFlags};
use super::create::{Base, FormatOptions, NewImage};
use super::info;
use super::size::Bytes;
use crate::create::Replace;

/// List the snapshots in an image, or lay an overlay over it
#[derive(Args)]
#[command(group = ArgGroup::new("what").required(true))]
pub struct Snapshot {
    /// The image's format
    #[arg(short, value_name = "FMT")]
    format: Option<String>,
    /// List the snapshots in the image
    #[arg(short, group = "what")]
    list: bool,
    /// Make this overlay, in the image's folder; write to it from now on, not to the image
    #[arg(long, value_name = "NEW", group = "what")]
    overlay: Option<PathBuf>,
    /// The overlay's format
    #[arg(short = 'O', value_name = "FMT", requires = "overlay")]
    output_format: Option<String>,
    /// Options of the overlay's format
    #[arg(short, value_name = "OPTIONS", requires = "overlay")]
    options: Vec<String>,
    #[command(flatten)]
    output: OutputFlags,
    #[command(flatten)]
    open: OpenFlags,
    file: PathBuf,
}

impl Snapshot {
    pub fn run(self) -> Outcome {
        match &self.overlay {
            Some(overlay) => self.make(overlay),
            None => self.show(),
        }
    }

    fn show(&self) -> Outcome {
        let format = common::format_of_image(&self.file, self.format.as_deref())?;
        let mut engine = common::open_alone(&self.file, format, &self.open)?;
        let snapshots = info::snapshots(&self.file, &mut engine)?;
        if self.output.json() {
            let list = snapshots.iter().map(info::snapshot_json).collect();
            common::print_json(&Value::Array(list));
        } else if !snapshots.is_empty() {
            println!("{:<8}{:<24}{:>12}{:>14}{:>14}", "ID", "TAG", "DISK", "VM STATE", "UNIX TIME");
            snapshots.iter().for_each(|snapshot| println!("{}", line(snapshot)));
        }
        Ok(0)
    }

    fn make(&self, overlay: &std::path::Path) -> Outcome {
        let base_format = common::format_of_image(&self.file, self.format.as_deref())?;
        let format = match &self.output_format {
            Some(name) => common::format_of(overlay, Some(name))?,
            None => Format::by_suffix(&overlay.to_string_lossy()).unwrap_or(base_format),
        };
        let same = overlay.parent() == self.file.parent();
        let name = self.file.file_name().map(|name| name.to_string_lossy());
        let Some(name) = name.filter(|_| same) else {
            let message = format!(
                "{}: an overlay must lie in the folder of its base, {}",
                overlay.display(),
                self.file.display()
            );
            return Err(common::Failure::new(message));
        };
        let base = Base::look(overlay, &name, Some(base_format.name()), &self.open)?;
        let new = NewImage {
            path: overlay,
            format,
            sectors: base.sectors,
            options: &FormatOptions::parse(&self.options)?,
            base: Some(&base),
            replace: Replace::default(),
        };
        new.make()?.keep();
        let text = format!("Created {} over {}", overlay.display(), self.file.display());
        common::say_done(&self.output, false, &text, overlay, base.sectors * SECTOR_BYTES);
        Ok(0)
    }
}

/// One line of a list.
pub fn line(snapshot: &SnapshotInfo) -> String {
    let SnapshotInfo { id, name, sectors, unix_seconds, vm_state_bytes } = snapshot;
    let disk = Bytes(sectors.saturating_mul(512)).to_string();
    let state = Bytes(*vm_state_bytes).to_string();
    format!("{id:<8}{name:<24}{disk:>12}{state:>14}{unix_seconds:>14}")
}
