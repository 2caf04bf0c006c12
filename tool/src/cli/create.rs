//! `platter create`: a new image, alone or over a base.

use std::path::{Path, PathBuf};

use clap::Args;
use platter_image::{Access, Backing, CreateParams, Format, SECTOR_BYTES};

use super::common::{self, Failure, OpenFlags, Outcome, OutputFlags};
use super::size::{self, Bytes};
use crate::create::{Replace, carry_out};
use crate::engine::Engine;
use crate::made::Made;

/// Make a new image
#[derive(Args)]
pub struct Create {
    /// The new image's format
    #[arg(short, value_name = "FMT")]
    format: Option<String>,
    /// The base that it is laid over, as it shall stand in the image: relative to its folder
    #[arg(short = 'b', long, value_name = "FILE")]
    backing: Option<String>,
    /// The base's format
    #[arg(short = 'F', long, value_name = "FMT")]
    backing_format: Option<String>,
    /// Options of the format: cluster_size=64k,compat=0.10,...
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,
    /// Replace a file that is there already
    #[arg(long)]
    force: bool,
    /// Print nothing
    #[arg(short)]
    quiet: bool,
    #[command(flatten)]
    output: OutputFlags,
    #[command(flatten)]
    open: OpenFlags,
    file: PathBuf,
    /// Size of the disk, like 20G; the base's size if there is one
    size: Option<String>,
}

/// The options of a format as a user wrote them.
#[derive(Default)]
pub struct FormatOptions {
    pub cluster_bytes: u64,
    pub backing: Option<String>,
    pub backing_format: Option<String>,
    pub size: Option<String>,
    pub rest: Vec<(String, String)>,
}

impl FormatOptions {
    /// Parses `name=value,name=value` lists.
    pub fn parse(lists: &[String]) -> Result<FormatOptions, Failure> {
        let mut options = FormatOptions::default();
        for item in lists.iter().flat_map(|list| list.split(',')).filter(|item| !item.is_empty()) {
            let Some((name, value)) = item.split_once('=') else {
                let message = format!("-o {item}: options are written name=value");
                return Err(Failure::new(message));
            };
            let value = String::from(value);
            match name {
                "cluster_size" | "block_size" => {
                    let bytes = size::parse(&value);
                    options.cluster_bytes =
                        bytes.map_err(|why| Failure::new(format!("-o {item}: {why}")))?;
                }
                "backing_file" => options.backing = Some(value),
                "backing_fmt" => options.backing_format = Some(value),
                "size" => options.size = Some(value),
                _ => options.rest.push((String::from(name), value)),
            }
        }
        Ok(options)
    }

    pub fn pairs(&self) -> Vec<(&str, &str)> {
        self.rest.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect()
    }
}

/// A base as a new image will name it, open and locked until that is made.
pub struct Base {
    pub name: String,
    pub format: Format,
    pub identity: Option<u128>,
    pub sectors: u64,
    files: Vec<PathBuf>,
    _engine: Engine,
}

impl Base {
    /// Opens a base, named relative to the folder of `image`, to learn what a child must know.
    pub fn look(
        image: &Path,
        name: &str,
        format: Option<&str>,
        flags: &OpenFlags,
    ) -> Result<Base, Failure> {
        let path = common::beside(image, name);
        let opened = common::open(&path, format, Access::ReadOnly, flags)?;
        let mut engine = opened.engine;
        let (identity, sectors) = (engine.image().identity(), engine.sectors());
        let (name, format) = (String::from(name), opened.format);
        let files = common::files_of(&path, &engine);
        Ok(Base { name, format, identity, sectors, files, _engine: engine })
    }

    pub fn backing(&self) -> Backing<'_> {
        let Base { name, format, identity, sectors, .. } = self;
        Backing { name, format: *format, identity: *identity, sectors: *sectors }
    }
}

/// What is asked for, whoever asks.
pub struct NewImage<'a> {
    pub path: &'a Path,
    pub format: Format,
    pub sectors: u64,
    pub options: &'a FormatOptions,
    pub base: Option<&'a Base>,
    pub replace: Replace,
}

impl NewImage<'_> {
    /// Makes its files, which go again unless the caller keeps them.
    pub fn make(self) -> Result<Made, Failure> {
        let pairs = self.options.pairs();
        let name = self.path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        let params = CreateParams {
            format: self.format,
            name: &name,
            sectors: self.sectors,
            cluster_bytes: self.options.cluster_bytes,
            options: &pairs,
            backing: self.base.map(Base::backing),
            seed: common::seed(),
            unix_seconds: common::unix_seconds(),
        };
        let plan = platter_image::Create::new(&params);
        let refused = |why| Failure::new(format!("{}: {why}", self.path.display()));
        let mut plan = plan.map_err(refused)?;
        let below = self.base.map_or(&[][..], |base| &base.files);
        Ok(carry_out(&mut plan, self.path, &self.replace.but(below))?)
    }
}

impl Create {
    pub fn run(self) -> Outcome {
        let format = common::format_of(&self.file, self.format.as_deref())?;
        let options = FormatOptions::parse(&self.options)?;
        let name = self.backing.as_ref().or(options.backing.as_ref());
        let base_format = self.backing_format.as_ref().or(options.backing_format.as_ref());
        let look = |name: &String| {
            Base::look(&self.file, name, base_format.map(String::as_str), &self.open)
        };
        let base = name.map(look).transpose()?;
        let sectors = match (self.size.as_ref().or(options.size.as_ref()), &base) {
            (Some(text), _) => size::parse_disk(text).map_err(Failure::new)? / SECTOR_BYTES,
            (None, Some(base)) => base.sectors,
            (None, None) => {
                let message = format!("{}: give the size of the disk", self.file.display());
                return Err(Failure::new(message));
            }
        };
        let new = NewImage {
            path: &self.file,
            format,
            sectors,
            options: &options,
            base: base.as_ref(),
            replace: Replace::when(self.force),
        };
        new.make()?.keep();
        let bytes = sectors * SECTOR_BYTES;
        let text = format!("Created {}: {}, {}", self.file.display(), format.name(), Bytes(bytes));
        common::say_done(&self.output, self.quiet, &text, &self.file, bytes);
        Ok(0)
    }
}
