//! `platter convert`: one image into another. A reader and a writer run side by side; zeros and
//! holes are left out.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use clap::Args;
use indicatif::ProgressBar;
use platter_image::{Access, CreateParams, Format, SECTOR_BYTES};

use super::common::{self, Failure, OpenFlags, Outcome, OutputFlags};
use super::create::{Base, FormatOptions, NewImage};
use super::{size, stream};
use crate::buffer::Buffer;
use crate::engine::Engine;
use crate::fault::Fault;
use crate::flight::Flight;
use crate::flow::{Flow, Piece, data_runs};

/// Pieces under way between reader and writer.
const PIECES_MAX: usize = 1;
/// Writes in flight: those to one file take turns in the kernel anyway.
const WRITES_MAX: usize = 1;

/// Turn an image into another
#[derive(Args)]
pub struct Convert {
    /// The source's format
    #[arg(short, value_name = "FMT")]
    format: Option<String>,
    /// The target's format
    #[arg(short = 'O', value_name = "FMT")]
    output_format: Option<String>,
    /// Options of the target's format
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,
    /// A base of the target: what reads the same there is still written
    #[arg(short = 'B', value_name = "FILE")]
    backing: Option<String>,
    /// The base's format
    #[arg(short = 'F', value_name = "FMT", requires = "backing")]
    backing_format: Option<String>,
    /// Zeros at least this long are left out (512 to 2M, 0: write all)
    #[arg(short = 'S', value_name = "SIZE", value_parser = size::parse, default_value = "4k")]
    sparse: u64,
    /// Compress (qcow2: by zlib, QEMU's default)
    #[arg(short, conflicts_with = "backing")]
    compress: bool,
    /// Show progress even if the output is not a terminal
    #[arg(short)]
    progress: bool,
    /// Print nothing
    #[arg(short)]
    quiet: bool,
    /// Replace a target that is there already
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    output: OutputFlags,
    #[command(flatten)]
    open: OpenFlags,
    source: PathBuf,
    target: PathBuf,
}

impl Convert {
    pub fn run(self) -> Outcome {
        let sparse_good = self.sparse == 0
            || (self.sparse.is_power_of_two() && (512..=2 << 20).contains(&self.sparse));
        if !sparse_good {
            return Err(Failure::new("-S takes 0 or a power of two from 512 to 2M"));
        }
        let source =
            common::open(&self.source, self.format.as_deref(), Access::ReadOnly, &self.open)?;
        let mut reader = source.engine;
        let sectors = reader.sectors();
        if let Some(format) = self.stream_format()? {
            return self.stream(reader, format, sectors).map(|code| self.done(code, sectors));
        }
        let has_base = self.make_target(sectors)?;
        let result = self.copy(reader, sectors, has_base);
        if result.is_err() && !has_base {
            // What is half made is of no use; its extents, if any, are named after it.
            let _ = std::fs::remove_file(&self.target);
        }
        result.map(|code| self.done(code, sectors))
    }

    fn done(&self, code: u8, sectors: u64) -> u8 {
        common::say_done(&self.output, self.quiet, "", &self.target, sectors * SECTOR_BYTES);
        code
    }

    /// The target's format if it is one that is written once, from front to end.
    fn stream_format(&self) -> Result<Option<Format>, Failure> {
        let format = common::format_of(&self.target, self.output_format.as_deref())?;
        let options = FormatOptions::parse(&self.options)?;
        let subformat = ("subformat", "streamOptimized");
        let is_stream = match format {
            Format::Qcow2 => self.compress,
            Format::Vmdk => options.pairs().into_iter().any(|pair| pair == subformat),
            _ => false,
        };
        if self.compress && !is_stream {
            let why = "-c is for qcow2, and for vmdk with -o subformat=streamOptimized";
            return Err(Failure::new(why));
        }
        Ok(is_stream.then_some(format))
    }

    fn stream(&self, reader: Engine, format: Format, sectors: u64) -> Outcome {
        if self.backing.is_some() {
            return Err(Failure::new("a compressed target has no backing file"));
        }
        let options = FormatOptions::parse(&self.options)?;
        let pairs = options.pairs();
        let name = self.target.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        let params = CreateParams {
            format,
            name: &name,
            sectors,
            cluster_bytes: options.cluster_bytes,
            options: &pairs,
            backing: None,
            seed: common::seed(),
            unix_seconds: common::unix_seconds(),
        };
        let replace = self.force && !same_file(&self.source, &self.target);
        let quiet = (self.quiet || self.output.json()) && !self.progress;
        let bar = common::progress(sectors * SECTOR_BYTES, "converting", quiet);
        let result = stream::write(reader, &params, (&self.target, replace), &bar);
        bar.finish_and_clear();
        result.map(|()| 0)
    }

    /// Makes the empty target and says whether it has a base.
    fn make_target(&self, sectors: u64) -> Result<bool, Failure> {
        let format = common::format_of(&self.target, self.output_format.as_deref())?;
        let options = FormatOptions::parse(&self.options)?;
        let name = self.backing.as_ref().or(options.backing.as_ref());
        let base_format = self.backing_format.as_ref().or(options.backing_format.as_ref());
        let look = |name: &String| {
            Base::look(&self.target, name, base_format.map(String::as_str), &self.open)
        };
        let base = name.map(look).transpose()?;
        let new = NewImage {
            path: &self.target,
            format,
            sectors,
            options: &options,
            base: base.as_ref(),
            replace: self.force && !same_file(&self.source, &self.target),
        };
        new.make()?;
        Ok(base.is_some())
    }

    fn copy(&self, reader: Engine, sectors: u64, has_base: bool) -> Outcome {
        let format = self.output_format.as_deref();
        let target = common::open(&self.target, format, Access::ReadWrite, &self.open)?;
        let mut writer = target.engine;
        writer.hurry();
        let mut flight = Flight::new(writer, WRITES_MAX);
        let quiet = (self.quiet || self.output.json()) && !self.progress;
        let bar = common::progress(sectors * SECTOR_BYTES, "converting", quiet);
        let (full_tx, full_rx) = sync_channel(PIECES_MAX);
        let (spare_tx, spare_rx) = sync_channel(PIECES_MAX);
        let result = thread::scope(|scope| {
            let reading = scope.spawn(move || read_all(reader, sectors, &full_tx, &spare_rx));
            let (grain, used) = (self.sparse, VecDeque::new());
            let mut sink = Sink { flight: &mut flight, grain, has_base, bar: &bar, used };
            let written = sink.write_all(&full_rx, &spare_tx);
            drop((full_rx, spare_tx));
            let read = reading.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            read.map_err(|fault| common::in_folder(&self.source, fault))?;
            written.map_err(|fault| common::in_folder(&self.target, fault))
        });
        bar.finish_and_clear();
        result?;
        let closed = flight.settle().and_then(Engine::finish);
        closed.map_err(|fault| common::in_folder(&self.target, fault))?;
        Ok(0)
    }
}

fn same_file(a: &Path, b: &Path) -> bool {
    match (a.canonicalize(), b.canonicalize()) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    }
}

/// Sends all pieces of a disk; ends quietly when the writer is gone.
fn read_all(
    engine: Engine,
    sectors: u64,
    pieces: &SyncSender<Piece>,
    spares: &Receiver<Buffer>,
) -> Result<(), Fault> {
    let mut flow = Flow::new(engine, sectors);
    while let Some(piece) = flow.next(spares.try_recv().ok())? {
        if pieces.send(piece).is_err() {
            break;
        }
    }
    Ok(())
}

struct Sink<'a> {
    flight: &'a mut Flight,
    /// Zeros at least so long are left out; 0: none.
    grain: u64,
    /// The target shows a base where it holds nothing: zeros must be written.
    has_base: bool,
    bar: &'a ProgressBar,
    /// Buffers that are being written, the oldest first.
    used: VecDeque<Arc<Buffer>>,
}

impl Sink<'_> {
    fn write_all(
        &mut self,
        pieces: &Receiver<Piece>,
        spares: &SyncSender<Buffer>,
    ) -> Result<(), Fault> {
        while let Ok(piece) = pieces.recv() {
            let count = piece.count;
            self.write(piece)?;
            while let Some(buffer) = self.used.pop_front() {
                match Arc::try_unwrap(buffer) {
                    // A full pool is as good.
                    Ok(buffer) => drop(spares.try_send(buffer)),
                    Err(busy) => {
                        self.used.push_front(busy);
                        break;
                    }
                }
            }
            self.bar.inc(count * SECTOR_BYTES);
        }
        Ok(())
    }

    fn write(&mut self, piece: Piece) -> Result<(), Fault> {
        let Piece { sector, count, bytes } = piece;
        let Some(bytes) = bytes else {
            if self.has_base || self.grain == 0 {
                self.flight.settle()?.write_zeroes(sector, count)?;
            }
            return Ok(());
        };
        let bytes = Arc::new(bytes);
        self.used.push_back(Arc::clone(&bytes));
        if self.grain == 0 {
            return self.flight.write(sector, &bytes, (0, bytes.len()));
        }
        let mut done = 0;
        for (start, len) in data_runs(&bytes, self.grain as usize) {
            self.gap(sector, done, start)?;
            let at = sector + start as u64 / SECTOR_BYTES;
            self.flight.write(at, &bytes, (start, start + len))?;
            done = start + len;
        }
        self.gap(sector, done, bytes.len())
    }

    /// Zeros from byte `from` to `to` of a piece.
    fn gap(&mut self, sector: u64, from: usize, to: usize) -> Result<(), Fault> {
        if !self.has_base || from == to {
            return Ok(());
        }
        let at = sector + from as u64 / SECTOR_BYTES;
        self.flight.settle()?.write_zeroes(at, (to - from) as u64 / SECTOR_BYTES)
    }
}
