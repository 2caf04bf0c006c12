//! Disk image formats as planners: they say where guest bytes lie and what must be written in
//! which order; they never do I/O, take time, probe a format, or panic on any input.
//!
//! One [`Image`] is a chain of layers. The caller drives it: [`Image::open_step`] until ready,
//! then [`Image::map_read`], [`Image::prepare_write`] with [`Image::commit`], and flushes by
//! [`Image::flush_begin`], [`Image::flush_step`], [`Image::flush_end`]. Whenever a planner
//! stops with [`Stop::Miss`], the caller reads that block, fills it in and calls again.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod append;
mod check;
mod create;
mod fault;
mod files;
mod format;
mod image;
mod info;
mod memory;
mod merge;
mod meta;
mod path;
mod qcow;
mod qcow2;
mod qed;
mod raw;
mod resolve;
mod types;
mod unpack;
mod vdi;
mod vhd;
mod vhdx;
mod vmdk;
mod zstd;

pub use check::{CheckParams, CheckProgress, CheckReport, PROBLEMS_MAX, Repair};
pub use create::{
    Backing, CREATE_WRITE_BYTES_MAX, Create, CreateFault, CreateFile, CreateParams, CreateWrite,
    Reserve,
};
pub use fault::{FaultKind, FaultName, ImageFault};
pub use files::{Access, FileInfo};
pub use format::Format;
pub use image::{DEPTH_MAX, Image, OpenStep, Options, PLANS_MAX};
pub use info::{Details, LayerInfo, SnapshotInfo};
pub use merge::{Merge, MergeStep, TopExtent};
pub use qcow2::Qcow2Stream;
pub use types::{
    BlockRef, DiscardPlan, Extent, FileNo, FlushStep, PRELUDES_MAX, Place, Prelude, Prepared,
    ResizePlan, SECTOR_BYTES, SectorRange, Step, Stop, WritePlan,
};
pub use unpack::{Apart, Decoders, PackedCluster};
pub use vmdk::VmdkStream;
