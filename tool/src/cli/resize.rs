//! `platter resize`: a longer disk. Images never shrink: what lies at the end would be lost.

use std::path::PathBuf;

use clap::Args;
use platter_image::{Access, SECTOR_BYTES};

use super::common::{self, Failure, OpenFlags, Outcome, OutputFlags};
use super::size::{self, Bytes};

/// Make a disk longer
#[derive(Args)]
pub struct Resize {
    /// The image's format
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
    /// The new size, or +SIZE to add
    size: String,
}

impl Resize {
    pub fn run(self) -> Outcome {
        let (added, text) = match self.size.strip_prefix('+') {
            Some(text) => (true, text),
            None => (false, self.size.as_str()),
        };
        let bytes = size::parse_disk(text).map_err(Failure::new)?;
        let opened =
            common::open(&self.file, self.format.as_deref(), Access::ReadWrite, &self.open)?;
        let mut engine = opened.engine;
        let now = common::disk_bytes(&mut engine);
        let name = self.file.display();
        let Some(wanted) = (if added { now.checked_add(bytes) } else { Some(bytes) }) else {
            return Err(Failure::new(format!("{name}: the new size is beyond 2^64 bytes")));
        };
        if wanted < now {
            let message = format!(
                "{name}: the disk has {now} bytes and cannot shrink to {wanted}: convert what is \
                 to be kept into a new image"
            );
            return Err(Failure::new(message));
        }
        let told = |fault| common::in_folder(&self.file, fault);
        if wanted > now {
            engine.resize(wanted / SECTOR_BYTES).map_err(told)?;
        }
        engine.close().map_err(told)?;
        let text = format!("{name}: {} ({wanted} bytes)", Bytes(wanted));
        common::say_done(&self.output, self.quiet, &text, &self.file, wanted);
        Ok(0)
    }
}
