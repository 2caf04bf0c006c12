//! `platter compare`: do two disks read the same? Exit codes are qemu-img's: 0 identical, 1 not,
//! more on failure.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use clap::Args;
use platter_image::{Access, SECTOR_BYTES};
use serde_json::json;

use super::common::{self, Failure, OpenFlags, Outcome, OutputFlags};
use crate::buffer::Buffer;
use crate::engine::Engine;
use crate::fault::Fault;
use crate::flow::{Flow, Piece, is_zero};

/// Tell whether two disks hold the same bytes
///
/// Exit codes: 0 identical, 1 different, 2 or more not compared.
#[derive(Args)]
pub struct Compare {
    /// The first image's format
    #[arg(short, value_name = "FMT")]
    format: Option<String>,
    /// The second image's format
    #[arg(short = 'F', value_name = "FMT")]
    second_format: Option<String>,
    /// Disks of different sizes differ, even if the rest is zeros
    #[arg(short)]
    strict: bool,
    /// Print nothing
    #[arg(short)]
    quiet: bool,
    #[command(flatten)]
    output: OutputFlags,
    #[command(flatten)]
    open: OpenFlags,
    first: PathBuf,
    second: PathBuf,
}

type Pieces = Receiver<Result<Piece, Fault>>;

impl Compare {
    pub fn run(self) -> Outcome {
        let open = |path: &PathBuf, format: &Option<String>| {
            let opened = common::open(path, format.as_deref(), Access::ReadOnly, &self.open);
            opened.map(|opened| opened.engine).map_err(|failure| failure.with_code(2))
        };
        let mut first = open(&self.first, &self.format)?;
        let mut second = open(&self.second, &self.second_format)?;
        let sizes = (first.sectors(), second.sectors());
        if sizes.0 != sizes.1 {
            if self.strict {
                self.say("Strict mode: Image size mismatch!");
                self.tell(sizes, false, None);
                return Ok(1);
            }
            self.say("Warning: Image size mismatch!");
        }
        let common = sizes.0.min(sizes.1);
        let quiet = self.quiet || self.output.json();
        let bar = common::progress(sizes.0.max(sizes.1) * SECTOR_BYTES, "comparing", quiet);
        let differs = thread::scope(|scope| {
            let (tx, pieces) = sync_channel(2);
            let (spares, spares_rx) = sync_channel(4);
            scope.spawn(move || send_all(first, sizes.0, &tx, &spares_rx));
            let left = Side { pieces, spares, path: &self.first, piece: None };
            let (tx, pieces) = sync_channel(2);
            let (spares, spares_rx) = sync_channel(4);
            scope.spawn(move || send_all(second, sizes.1, &tx, &spares_rx));
            let right = Side { pieces, spares, path: &self.second, piece: None };
            self.compare(left, right, common, |done| bar.set_position(done * SECTOR_BYTES))
        });
        bar.finish_and_clear();
        let differs = differs?;
        self.tell(sizes, differs.is_none(), differs);
        match differs {
            Some(byte) => {
                self.say(&format!("Content mismatch at offset {byte}!"));
                Ok(1)
            }
            None => {
                self.say("Images are identical.");
                Ok(0)
            }
        }
    }

    fn say(&self, text: &str) {
        if !self.quiet && !self.output.json() {
            println!("{text}");
        }
    }

    /// The same as JSON.
    fn tell(&self, sizes: (u64, u64), identical: bool, offset: Option<u64>) {
        if self.output.json() {
            common::print_json(&json!({
                "identical": identical,
                "offset": offset,
                "virtual-sizes": [sizes.0 * SECTOR_BYTES, sizes.1 * SECTOR_BYTES],
            }));
        }
    }

    /// The first byte that differs.
    fn compare(
        &self,
        mut left: Side,
        mut right: Side,
        common: u64,
        progress: impl Fn(u64),
    ) -> Result<Option<u64>, Failure> {
        let mut at = 0;
        loop {
            let (a, b) = (left.view(at)?, right.view(at)?);
            let count = match (&a, &b) {
                (None, None) => return Ok(None),
                // Past the end of one disk, the other must be zeros.
                (Some(only), None) | (None, Some(only)) => only.count,
                (Some(a), Some(b)) => a.count.min(b.count),
            };
            assert!(count > 0 && (at >= common || at + count <= common), "pieces end at ends");
            let a = a.and_then(|view| view.bytes(count));
            let b = b.and_then(|view| view.bytes(count));
            if let Some(byte) = first_difference(a, b) {
                return Ok(Some(at * SECTOR_BYTES + byte));
            }
            at += count;
            progress(at);
        }
    }
}

/// Sends all pieces and the fault that ended them; ends quietly when nobody listens.
fn send_all(
    engine: Engine,
    sectors: u64,
    pieces: &SyncSender<Result<Piece, Fault>>,
    spares: &Receiver<Buffer>,
) {
    let mut flow = Flow::new(engine, sectors);
    while let Some(piece) = flow.next(spares.try_recv().ok()).transpose() {
        let last = piece.is_err();
        if pieces.send(piece).is_err() || last {
            return;
        }
    }
}

struct Side<'a> {
    pieces: Pieces,
    /// Buffers to be used again.
    spares: SyncSender<Buffer>,
    path: &'a PathBuf,
    piece: Option<Piece>,
}

/// What a disk holds from a sector on.
struct View<'a> {
    count: u64,
    bytes: Option<&'a [u8]>,
}

impl<'a> View<'a> {
    fn bytes(self, count: u64) -> Option<&'a [u8]> {
        self.bytes.map(|bytes| &bytes[..(count * SECTOR_BYTES) as usize])
    }
}

impl Side<'_> {
    fn view(&mut self, sector: u64) -> Result<Option<View<'_>>, Failure> {
        let over = |piece: &Piece| piece.sector + piece.count <= sector;
        if self.piece.as_ref().is_none_or(over) {
            if let Some(bytes) = self.piece.take().and_then(|piece| piece.bytes) {
                // A full pool is as good.
                let _ = self.spares.try_send(bytes);
            }
            self.piece = match self.pieces.recv() {
                Ok(piece) => {
                    let told = |fault| common::in_folder(self.path, fault).with_code(3);
                    Some(piece.map_err(told)?)
                }
                Err(_) => None,
            };
        }
        Ok(self.piece.as_ref().map(|piece| {
            let done = sector - piece.sector;
            let bytes = piece.bytes.as_ref().map(|b| &b[(done * SECTOR_BYTES) as usize..]);
            View { count: piece.count - done, bytes }
        }))
    }
}

/// First byte that differs, `None` for zeros on either side.
fn first_difference(a: Option<&[u8]>, b: Option<&[u8]>) -> Option<u64> {
    let at = match (a, b) {
        (None, None) => None,
        (Some(a), Some(b)) if a == b => None,
        (Some(a), Some(b)) => a.iter().zip(b).position(|(a, b)| a != b),
        (Some(only), None) | (None, Some(only)) if is_zero(only) => None,
        (Some(only), None) | (None, Some(only)) => only.iter().position(|&b| b != 0),
    };
    at.map(|at| at as u64)
}
