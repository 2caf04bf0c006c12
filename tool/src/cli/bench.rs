//! `platter bench`: requests of one size, as fast as they go, like `qemu-img bench`; the time it
//! takes is printed the same way.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use clap::{Args, ValueEnum};
use platter_image::{Access, SECTOR_BYTES};
use serde_json::json;

use super::common::{self, Failure, OpenFlags, Outcome, OutputFlags};
use super::size;
use crate::buffer::Buffer;
use crate::engine::Engine;
use crate::fault::Fault;
use crate::flight::{DEPTH_MAX, Flight};

/// How writes become durable, by qemu-img's names.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum CacheMode {
    /// Past the page cache
    None,
    /// In the page cache until a flush
    Writeback,
    /// In the page cache, a flush after each write
    Writethrough,
    /// Past the page cache, a flush after each write
    Directsync,
    /// In the page cache; flushes do nothing
    Unsafe,
}

/// Measure reads or writes of one size
#[derive(Args)]
pub struct Bench {
    /// The image's format
    #[arg(short, value_name = "FMT")]
    format: Option<String>,
    /// Requests to make
    #[arg(short, value_name = "COUNT", default_value = "75000")]
    count: u64,
    /// Requests in flight at once
    #[arg(short, long, value_name = "DEPTH", default_value = "64")]
    depth: usize,
    /// Bytes in a request
    #[arg(short = 's', value_name = "SIZE", value_parser = size::parse, default_value = "4k")]
    buffer: u64,
    /// Bytes from one request to the next (default: the request's size)
    #[arg(short = 'S', value_name = "STEP", value_parser = size::parse)]
    step: Option<u64>,
    /// Byte of the disk where the first request goes
    #[arg(short = 'o', value_name = "OFFSET", value_parser = size::parse, default_value = "0")]
    offset: u64,
    /// Places drawn by chance from this seed, the same in each run, instead of steps
    #[arg(long, value_name = "SEED")]
    random: Option<u64>,
    /// Write instead of read
    #[arg(short)]
    write: bool,
    /// How writes become durable
    #[arg(short = 't', value_name = "MODE", value_enum, default_value = "writeback")]
    cache_mode: CacheMode,
    /// Byte to write
    #[arg(long, default_value = "0")]
    pattern: u8,
    /// Flush after so many writes (0: only at the end)
    #[arg(long, default_value = "0", value_name = "COUNT")]
    flush_interval: u64,
    #[command(flatten)]
    output: OutputFlags,
    #[command(flatten)]
    open: OpenFlags,
    file: PathBuf,
}

impl Bench {
    pub fn run(mut self) -> Outcome {
        let mode = self.cache_mode;
        self.open.direct = matches!(mode, CacheMode::None | CacheMode::Directsync);
        if matches!(mode, CacheMode::Writethrough | CacheMode::Directsync) {
            self.flush_interval = 1;
        }
        let access = if self.write { Access::ReadWrite } else { Access::ReadOnly };
        let mut engine =
            common::open(&self.file, self.format.as_deref(), access, &self.open)?.engine;
        if mode == CacheMode::Unsafe {
            engine.hurry();
        }
        let step = self.step.unwrap_or(self.buffer);
        let bytes = common::disk_bytes(&mut engine);
        let whole = |value: u64| value.is_multiple_of(SECTOR_BYTES);
        if self.buffer == 0 || !whole(self.buffer) || !whole(step) || !whole(self.offset) {
            return Err(Failure::new("-s, -S and -o take multiples of 512"));
        }
        if self.buffer > 1 << 30 || self.buffer > bytes || self.offset > bytes - self.buffer {
            return Err(Failure::new("the first request would end beyond the disk"));
        }
        if self.depth == 0 || self.depth > DEPTH_MAX {
            return Err(Failure::new(format!("-d takes 1 to {DEPTH_MAX}")));
        }
        let told = |fault| common::in_folder(&self.file, fault);
        let mut flight = Flight::new(engine, self.depth);
        let places = self.places(step, bytes);
        let start = Instant::now();
        let done = match self.write {
            true => self.writes(&mut flight, places),
            false => self.reads(&mut flight, places),
        };
        done.map_err(told)?;
        let seconds = start.elapsed().as_secs_f64();
        if self.write {
            flight.settle().and_then(Engine::finish).map_err(told)?;
        }
        if self.output.json() {
            common::print_json(&json!({
                "seconds": seconds,
                "requests": self.count,
                "requests-per-second": self.count as f64 / seconds,
                "bytes-per-second": (self.count * self.buffer) as f64 / seconds,
            }));
        } else {
            println!("Run completed in {seconds:.3} seconds.");
        }
        Ok(0)
    }

    /// The places of the requests, in bytes.
    fn places(&self, step: u64, bytes: u64) -> impl Iterator<Item = u64> {
        let places = (bytes - self.buffer) / self.buffer + 1;
        let (buffer, random) = (self.buffer, self.random);
        let mut state = random.unwrap_or(0);
        let mut next = self.offset;
        (1..=self.count).map(move |number| {
            if random.is_some() {
                // xorshift-multiply steps: a place by chance is all that is wanted.
                state = (state ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                state ^= state >> 29;
                return state % places * buffer;
            }
            let at = next;
            // As qemu-img bench goes on past the end: the rest counts from the start.
            next = (next + step % bytes) % bytes;
            if next > bytes - buffer {
                next = 0;
            }
            at
        })
    }

    fn reads(&self, flight: &mut Flight, places: impl Iterator<Item = u64>) -> Result<(), Fault> {
        let mut spares: Vec<Buffer> = Vec::new();
        for (at, number) in places.zip(0..) {
            while !flight.has_room() {
                spares.extend(flight.next_read()?.map(|read| read.bytes));
            }
            let buffer = spares.pop().unwrap_or_else(|| Buffer::new(self.buffer as usize));
            let read = flight.read(number, at / SECTOR_BYTES, buffer)?;
            spares.extend(read.map(|read| read.bytes));
        }
        while flight.next_read()?.is_some() {}
        Ok(())
    }

    fn writes(&self, flight: &mut Flight, places: impl Iterator<Item = u64>) -> Result<(), Fault> {
        let mut buffer = Buffer::new(self.buffer as usize);
        buffer.fill(self.pattern);
        let buffer = Arc::new(buffer);
        for (at, number) in places.zip(1..) {
            flight.write(at / SECTOR_BYTES, &buffer, (0, buffer.len()))?;
            if self.flush_interval > 0 && number % self.flush_interval == 0 {
                flight.settle()?.flush()?;
            }
        }
        flight.settle()?.flush()
    }
}
