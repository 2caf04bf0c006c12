//! `platter commit`: what an overlay holds goes into its base. The overlay stays as it is; where
//! a child knows its parent by its content (VHDX, VMDK), it is of no more use and that is said.
//!
//! Order guarded: first the chain is read while the base is untouched, to learn which stretches
//! differ; then they are written, read from the overlay alone, so that no stale table of the
//! base is ever used.

use std::path::PathBuf;

use clap::Args;
use platter_image::{Access, FileNo, Place, SECTOR_BYTES, SectorRange};

use super::common::{self, Failure, OpenFlags, Outcome};
use crate::engine::Engine;
use crate::fault::Fault;
use crate::flow::{PIECE_BYTES, is_zero};

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
    open: OpenFlags,
    file: PathBuf,
}

/// A stretch of sectors that the base must take over.
struct Stretch {
    sector: u64,
    count: u64,
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
        let base_at = below.file;
        let sectors = chain.sectors();
        let base = common::open(&base_path, Some(base_format), Access::ReadWrite, &self.open)?;
        let mut base = base.engine;
        let known_as = base.image().identity();
        let told = |fault| common::in_folder(&self.file, fault);
        let stretches = differing(&mut chain, &mut base, base_at, sectors).map_err(told)?;
        drop(chain);
        let mut top = common::open_alone(&self.file, opened.format, &self.open)?;
        let told = |fault| common::in_folder(&base_path, fault);
        if base.sectors() < sectors {
            base.resize(sectors).map_err(told)?;
        }
        let total = stretches.iter().map(|stretch| stretch.count).sum::<u64>();
        let bar = common::progress(total * SECTOR_BYTES, "committing", self.quiet);
        for stretch in &stretches {
            let bytes = read(&mut top, stretch);
            let bytes = bytes.map_err(|fault| common::in_folder(&self.file, fault))?;
            let written = match is_zero(&bytes) {
                true => base.write_zeroes(stretch.sector, stretch.count),
                false => base.write(stretch.sector, &bytes),
            };
            written.map_err(told)?;
            bar.inc(stretch.count * SECTOR_BYTES);
        }
        bar.finish_and_clear();
        base.finish().map_err(told)?;
        if !self.quiet {
            println!("Image committed.");
            if base.image().identity() != known_as {
                println!("{} does not fit its base any more: delete it.", self.file.display());
            }
        }
        Ok(0)
    }
}

/// The stretches whose bytes are not the base's, none longer than a piece.
fn differing(
    chain: &mut Engine,
    base: &mut Engine,
    base_at: FileNo,
    sectors: u64,
) -> Result<Vec<Stretch>, Fault> {
    let mut found: Vec<Stretch> = Vec::new();
    let base_sectors = base.sectors();
    let most = PIECE_BYTES as u64 / SECTOR_BYTES;
    let mut at = 0;
    while at < sectors {
        let extent = chain.map(SectorRange::new(at, (sectors - at).min(most)))?;
        let stretch = Stretch { sector: at, count: extent.sectors };
        at += extent.sectors;
        let differs = match extent.place {
            // A file of the base, or of what lies below it.
            Place::File { file, .. } if file >= base_at => false,
            _ => read(chain, &stretch)? != read_short(base, &stretch, base_sectors)?,
        };
        match found.last_mut() {
            _ if !differs => {}
            Some(last)
                if last.sector + last.count == stretch.sector
                    && last.count + stretch.count <= most =>
            {
                last.count += stretch.count;
            }
            _ => found.push(stretch),
        }
    }
    Ok(found)
}

fn read(engine: &mut Engine, stretch: &Stretch) -> Result<Vec<u8>, Fault> {
    let mut bytes = vec![0; (stretch.count * SECTOR_BYTES) as usize];
    engine.read(stretch.sector, &mut bytes)?;
    Ok(bytes)
}

/// Like `read`, with zeros past the end of a shorter disk.
fn read_short(engine: &mut Engine, stretch: &Stretch, sectors: u64) -> Result<Vec<u8>, Fault> {
    let mut bytes = vec![0; (stretch.count * SECTOR_BYTES) as usize];
    let count = sectors.saturating_sub(stretch.sector).min(stretch.count);
    if count > 0 {
        engine.read(stretch.sector, &mut bytes[..(count * SECTOR_BYTES) as usize])?;
    }
    Ok(bytes)
}
