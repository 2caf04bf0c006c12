//! `platter convert`: one image into another. Pieces are read ahead while this thread writes;
//! zeros and holes are left out.

use std::path::PathBuf;

use clap::Args;
use indicatif::ProgressBar;
use platter_image::{Access, CreateParams, FileNo, Format, SECTOR_BYTES};

use super::common::{self, Failure, OpenFlags, Outcome, OutputFlags};
use super::create::{Base, FormatOptions, NewImage};
use super::{size, stream};
use crate::create::Replace;
use crate::engine::Engine;
use crate::fault::Fault;
use crate::flow::{Flow, Piece};
use crate::made::Made;
use crate::writeback::Writeback;

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
        let (made, has_base) = self.make_target(&reader, sectors)?;
        self.copy(reader, sectors, has_base)?;
        made.keep();
        Ok(self.done(0, sectors))
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
        let replace = self.replace(&reader);
        let quiet = (self.quiet || self.output.json()) && !self.progress;
        let bar = common::progress(sectors * SECTOR_BYTES, "converting", quiet);
        let result = stream::write(reader, &params, (&self.target, &replace), &bar);
        bar.finish_and_clear();
        result.map(|()| 0)
    }

    fn replace(&self, reader: &Engine) -> Replace {
        Replace::when(self.force).but(&common::files_of(&self.source, reader))
    }

    /// Makes the empty target and says whether it has a base.
    fn make_target(&self, reader: &Engine, sectors: u64) -> Result<(Made, bool), Failure> {
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
            replace: self.replace(reader),
        };
        Ok((new.make()?, base.is_some()))
    }

    fn copy(&self, reader: Engine, sectors: u64, has_base: bool) -> Result<(), Failure> {
        let format = self.output_format.as_deref();
        let target = common::open(&self.target, format, Access::ReadWrite, &self.open)?;
        let mut writer = target.engine;
        writer.hurry();
        let quiet = (self.quiet || self.output.json()) && !self.progress;
        let bar = common::progress(sectors * SECTOR_BYTES, "converting", quiet);
        let mut flow = Flow::new(reader, sectors).looking_for_zeros(self.sparse as usize);
        let files = (0..writer.paths().len() as u16).map(FileNo);
        let writeback = Writeback::new(files.map(|file| writer.medium(file)).collect());
        let grain = self.sparse as usize;
        let mut sink = Sink { engine: &mut writer, grain, has_base, writeback };
        let moved = self.move_pieces(&mut flow, &mut sink, &bar);
        bar.finish_and_clear();
        moved?;
        let synced = sink.writeback.finish();
        synced.map_err(|error| Fault::io(&self.target.to_string_lossy(), "sync", error))?;
        writer.finish().map_err(|fault| common::in_folder(&self.target, fault))
    }

    fn move_pieces(
        &self,
        flow: &mut Flow,
        sink: &mut Sink,
        bar: &ProgressBar,
    ) -> Result<(), Failure> {
        let mut spare = None;
        loop {
            let piece = flow.next(spare.take());
            let piece = piece.map_err(|fault| common::in_folder(&self.source, fault))?;
            let Some(piece) = piece else { return Ok(()) };
            let written = sink.write(&piece);
            written.map_err(|fault| common::in_folder(&self.target, fault))?;
            bar.inc(piece.count * SECTOR_BYTES);
            spare = piece.bytes;
        }
    }
}

/// Where the pieces go. One thread writes: writes to one file take turns in the kernel anyway.
struct Sink<'a> {
    engine: &'a mut Engine,
    /// Zeros at least so long are left out; 0: none.
    grain: usize,
    /// The target shows a base where it holds nothing: zeros must be written.
    has_base: bool,
    writeback: Writeback,
}

impl Sink<'_> {
    fn write(&mut self, piece: &Piece) -> Result<(), Fault> {
        let &Piece { sector, count, ref bytes, ref runs } = piece;
        let Some(bytes) = bytes else {
            if self.has_base || self.grain == 0 {
                self.engine.write_zeroes(sector, count)?;
            }
            return Ok(());
        };
        if self.grain == 0 {
            self.writeback.wrote(bytes.len() as u64);
            return self.engine.write(sector, bytes);
        }
        let mut done = 0;
        for &(start, len) in runs {
            self.gap(sector, done, start)?;
            let at = sector + start as u64 / SECTOR_BYTES;
            self.engine.write(at, &bytes[start..start + len])?;
            self.writeback.wrote(len as u64);
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
        self.engine.write_zeroes(at, (to - from) as u64 / SECTOR_BYTES)
    }
}
