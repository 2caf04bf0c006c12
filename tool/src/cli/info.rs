//! `platter info`: what an image says of itself and of its chain.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use clap::Args;
use platter_image::{Access, LayerInfo, SECTOR_BYTES, SnapshotInfo};
use serde_json::{Value, json};

use super::common::{self, Failure, OpenFlags, Outcome, OutputFlags};
use super::size::Bytes;
use crate::engine::Engine;

/// Show what an image is
#[derive(Args)]
pub struct Info {
    /// The image's format
    #[arg(short, value_name = "FMT")]
    format: Option<String>,
    /// Show every layer of the chain
    #[arg(long)]
    backing_chain: bool,
    #[command(flatten)]
    output: OutputFlags,
    #[command(flatten)]
    open: OpenFlags,
    file: PathBuf,
}

impl Info {
    pub fn run(self) -> Outcome {
        let format = common::format_of_image(&self.file, self.format.as_deref())?;
        let mut engine = match self.backing_chain {
            true => {
                common::open(&self.file, Some(format.name()), Access::ReadOnly, &self.open)?.engine
            }
            false => common::open_alone(&self.file, format, &self.open)?,
        };
        let snapshots = snapshots(&self.file, &mut engine)?;
        let layers = engine.image().info();
        let layers = if self.backing_chain { &layers[..] } else { &layers[..1] };
        let mut described = Vec::new();
        for (at, layer) in layers.iter().enumerate() {
            let path = self.file.with_file_name(engine.path(layer.file));
            let snapshots = if at == 0 { &snapshots[..] } else { &[] };
            described.push(Layer { layer, path, snapshots });
        }
        if !self.output.json() {
            let texts: Vec<String> = described.iter().map(Layer::text).collect();
            print!("{}", texts.join("\n"));
        } else if self.backing_chain {
            common::print_json(&Value::Array(described.iter().map(Layer::json).collect()));
        } else {
            common::print_json(&described[0].json());
        }
        Ok(0)
    }
}

/// All internal snapshots of the top layer.
pub fn snapshots(path: &Path, engine: &mut Engine) -> Result<Vec<SnapshotInfo>, Failure> {
    let mut found = Vec::new();
    loop {
        let number = found.len() as u32;
        let next = engine.drive(|image| image.snapshot(number));
        match next.map_err(|fault| common::in_folder(path, fault))? {
            Some(snapshot) => found.push(snapshot),
            None => return Ok(found),
        }
    }
}

pub fn snapshot_json(snapshot: &SnapshotInfo) -> Value {
    json!({
        "id": snapshot.id,
        "name": snapshot.name,
        "virtual-size": snapshot.sectors.saturating_mul(SECTOR_BYTES),
        "date-sec": snapshot.unix_seconds,
        "vm-state-size": snapshot.vm_state_bytes,
    })
}

struct Layer<'a> {
    layer: &'a LayerInfo,
    path: PathBuf,
    snapshots: &'a [SnapshotInfo],
}

impl Layer<'_> {
    /// Bytes that the file takes on its disk.
    fn actual_size(&self) -> u64 {
        fs::metadata(&self.path).map_or(0, |meta| meta.blocks() * 512)
    }

    fn json(&self) -> Value {
        let LayerInfo { format, sectors, details, .. } = self.layer;
        let mut value = json!({
            "filename": self.path.to_string_lossy(),
            "format": format.name(),
            "virtual-size": sectors.saturating_mul(SECTOR_BYTES),
            "actual-size": self.actual_size(),
            "dirty-flag": details.dirty,
        });
        let object = value.as_object_mut().expect("made as an object");
        if details.cluster_bytes > 0 {
            object.insert("cluster-size".into(), json!(details.cluster_bytes));
        }
        if let Some((name, format)) = &self.layer.backing {
            object.insert("backing-filename".into(), json!(name));
            if let Some(format) = format {
                object.insert("backing-filename-format".into(), json!(format.name()));
            }
        }
        if !self.snapshots.is_empty() {
            let snapshots = self.snapshots.iter().map(snapshot_json).collect();
            object.insert("snapshots".into(), Value::Array(snapshots));
        }
        let mut data = json!({ "corrupt": details.corrupt, "features": details.features });
        let map = data.as_object_mut().expect("made as an object");
        if !details.variant.is_empty() {
            map.insert("variant".into(), json!(details.variant));
        }
        if let Some(identity) = self.layer.identity {
            map.insert("identity".into(), json!(format!("{identity:032x}")));
        }
        for (name, figure) in &details.figures {
            map.insert((*name).into(), json!(figure));
        }
        for (name, text) in &details.names {
            map.insert((*name).into(), json!(text));
        }
        if let Some(note) = self.layer.note {
            map.insert("note".into(), json!(note));
        }
        let specific = json!({ "type": format.name(), "data": data });
        object.insert("format-specific".into(), specific);
        value
    }

    fn text(&self) -> String {
        let LayerInfo { format, sectors, details, .. } = self.layer;
        let bytes = sectors.saturating_mul(SECTOR_BYTES);
        let mut lines = vec![
            format!("image: {}", self.path.display()),
            format!("file format: {}", format.name()),
            format!("virtual size: {} ({bytes} bytes)", Bytes(bytes)),
            format!("disk size: {}", Bytes(self.actual_size())),
        ];
        if details.cluster_bytes > 0 {
            lines.push(format!("cluster_size: {}", details.cluster_bytes));
        }
        if let Some((name, format)) = &self.layer.backing {
            lines.push(format!("backing file: {name}"));
            let format = format.map_or("not given", |format| format.name());
            lines.push(format!("backing file format: {format}"));
        }
        if !self.snapshots.is_empty() {
            lines.push(String::from("Snapshot list:"));
            lines.extend(self.snapshots.iter().map(super::snapshot::line));
        }
        lines.push(String::from("Format specific information:"));
        if !details.variant.is_empty() {
            lines.push(format!("    variant: {}", details.variant));
        }
        lines.extend(details.figures.iter().map(|(name, n)| format!("    {name}: {n}")));
        lines.extend(details.names.iter().map(|(name, text)| format!("    {name}: {text}")));
        if !details.features.is_empty() {
            lines.push(format!("    features: {}", details.features.join(", ")));
        }
        if let Some(identity) = self.layer.identity {
            lines.push(format!("    identity: {identity:032x}"));
        }
        lines.push(format!("    dirty: {}", details.dirty));
        lines.push(format!("    corrupt: {}", details.corrupt));
        if let Some(note) = self.layer.note {
            lines.push(format!("    note: {note}"));
        }
        lines.join("\n") + "\n"
    }
}
