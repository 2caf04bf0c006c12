//! `platter map`: where the bytes of a disk lie.

use std::path::PathBuf;

use clap::Args;
use platter_image::{Access, FileNo, Place, SECTOR_BYTES, SectorRange};
use serde_json::{Value, json};

use super::common::{self, Failure, OpenFlags, Outcome, OutputFlags};
use super::size;
use crate::engine::Engine;

/// Show where the bytes of a disk lie in its files
#[derive(Args)]
pub struct Map {
    /// The image's format
    #[arg(short, value_name = "FMT")]
    format: Option<String>,
    /// First byte to show
    #[arg(short, long, value_name = "OFFSET", value_parser = size::parse, default_value = "0")]
    start_offset: u64,
    /// Bytes to show
    #[arg(short = 'l', long, value_name = "LEN", value_parser = size::parse)]
    max_length: Option<u64>,
    #[command(flatten)]
    output: OutputFlags,
    #[command(flatten)]
    open: OpenFlags,
    file: PathBuf,
}

/// A stretch of the disk, in sectors.
struct Stretch {
    start: u64,
    count: u64,
    place: Place,
}

impl Map {
    pub fn run(self) -> Outcome {
        let opened =
            common::open(&self.file, self.format.as_deref(), Access::ReadOnly, &self.open)?;
        let mut engine = opened.engine;
        let sectors = engine.sectors();
        let start = (self.start_offset / SECTOR_BYTES).min(sectors);
        let wanted = self.max_length.map_or(u64::MAX, |len| len.div_ceil(SECTOR_BYTES));
        let end = start.saturating_add(wanted).min(sectors);
        let depths = depths(&mut engine);
        let json = self.output.json();
        if !json {
            println!("{:<16}{:<16}{:<16}File", "Offset", "Length", "Mapped to");
        }
        let mut print = Printer { map: &self, depths, json, first: true };
        let mut last: Option<Stretch> = None;
        let mut at = start;
        while at < end {
            let extent = engine.map(SectorRange::new(at, end - at));
            let extent = extent.map_err(|fault| common::in_folder(&self.file, fault))?;
            let next = Stretch { start: at, count: extent.sectors, place: extent.place };
            at += extent.sectors;
            match &mut last {
                Some(last) if last.continues(&next) => last.count += next.count,
                _ => {
                    if let Some(done) = last.replace(next) {
                        print.stretch(&engine, &done)?;
                    }
                }
            }
        }
        if let Some(done) = last {
            print.stretch(&engine, &done)?;
        }
        if json {
            println!("{}", if print.first { "[]" } else { "]" });
        }
        Ok(0)
    }
}

/// Depth of the layer that owns each file: files are opened layer by layer.
fn depths(engine: &mut Engine) -> Vec<usize> {
    let firsts: Vec<FileNo> = engine.image().info().iter().map(|layer| layer.file).collect();
    let files = engine.paths().len();
    (0..files as u16).map(|file| firsts.iter().filter(|f| f.0 <= file).count() - 1).collect()
}

impl Stretch {
    fn continues(&self, next: &Stretch) -> bool {
        match (self.place, next.place) {
            (Place::Zero, Place::Zero) | (Place::Memory { .. }, Place::Memory { .. }) => true,
            (Place::File { file, offset }, Place::File { file: other, offset: at }) => {
                file == other && offset + self.count * SECTOR_BYTES == at
            }
            _ => false,
        }
    }
}

struct Printer<'a> {
    map: &'a Map,
    depths: Vec<usize>,
    json: bool,
    first: bool,
}

impl Printer<'_> {
    fn stretch(&mut self, engine: &Engine, stretch: &Stretch) -> Result<(), Failure> {
        let start = stretch.start * SECTOR_BYTES;
        let length = stretch.count * SECTOR_BYTES;
        if self.json {
            let mut value = json!({
                "start": start,
                "length": length,
                "zero": stretch.place == Place::Zero,
                "data": stretch.place != Place::Zero,
                "compressed": matches!(stretch.place, Place::Memory { .. }),
            });
            if let Place::File { file, offset } = stretch.place {
                value["depth"] = json!(self.depths[file.0 as usize]);
                value["offset"] = json!(offset);
                value["filename"] = Value::from(self.name(engine, file));
            }
            println!("{}{value}", if self.first { "[" } else { "," });
        } else if let Place::File { file, offset } = stretch.place {
            let name = self.name(engine, file);
            println!("{start:<#16x}{length:<#16x}{offset:<#16x}{name}");
        } else if let Place::Memory { .. } = stretch.place {
            println!("{start:<#16x}{length:<#16x}{:<16}", "(compressed)");
        }
        self.first = false;
        Ok(())
    }

    fn name(&self, engine: &Engine, file: FileNo) -> String {
        self.map.file.with_file_name(engine.path(file)).to_string_lossy().into_owned()
    }
}
