//! What happens to the two copies between rounds: the disk grows, an overlay is laid over it, an
//! overlay is committed, an internal snapshot is taken. platter's copy is changed by the
//! `platter` command, the other by qemu-img, as far as that can.

use crate::cases::{Case, Scratch};
use crate::differential::{Copy, Model};
use crate::model::{SECTOR, ZERO};
use crate::rng::Rng;

/// What a copy was before.
#[derive(Default)]
pub struct Past {
    /// The tops below the present one, and what lay below them.
    tops: Vec<(String, Option<Vec<u8>>)>,
    /// File, name and content of internal snapshots.
    snapshots: Vec<(String, String, Vec<u8>)>,
    /// Names given so far.
    count: u32,
}

impl Past {
    /// Whatever was written since, snapshots hold what they held.
    pub fn hold(&self, scratch: &Scratch) {
        for (file, name, held) in &self.snapshots {
            let snapshot = format!("snapshot.name={name}");
            let from = ["convert", "-f", "qcow2", "-l", &snapshot, "-O", "raw", file, "snap.tmp"];
            scratch.qemu_img(&from);
            let bytes = std::fs::read(scratch.path.join("snap.tmp")).expect("qemu-img wrote it");
            assert!(bytes == *held, "snapshot {name} of {file} has changed");
        }
    }
}

/// Changes both copies in the same way, if the format can.
pub fn change(rng: &mut Rng, case: &Case, copies: &mut [Copy; 2], ours: usize) {
    let over = matches!(case.format, "qcow2" | "qcow" | "qed" | "vmdk");
    let packed_up = copies[0].past.snapshots.is_empty() && !case.snapshot;
    match rng.below(5) {
        0 if case.grows() && (packed_up || !case.options.contains("compat=0.10")) => {
            let now = copies[0].model.sets.len() as u64;
            let sectors = now + 1 + rng.below(3000);
            for (at, copy) in copies.iter_mut().enumerate() {
                grow(case, copy, at == ours, sectors);
            }
        }
        1 if over => {
            for (at, copy) in copies.iter_mut().enumerate() {
                lay_over(case, copy, at == ours);
            }
        }
        2 if !copies[0].past.tops.is_empty() => {
            for (at, copy) in copies.iter_mut().enumerate() {
                commit(case, copy, at == ours);
            }
        }
        3 if can_snapshot(case) => {
            copies.iter_mut().for_each(snapshot);
        }
        _ => {}
    }
}

/// Not where clusters cannot be shared: their counts have one bit, or they are the disk itself.
fn can_snapshot(case: &Case) -> bool {
    let alone = ["refcount_bits=1,", "data_file"].iter().any(|word| case.options.contains(word));
    case.format == "qcow2" && !alone
}

fn platter(scratch: &Scratch, args: &[&str]) {
    let output = scratch.run(env!("CARGO_BIN_EXE_platter"), args);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "platter {args:?}: {error}");
}

fn grow(case: &Case, copy: &mut Copy, ours: bool, sectors: u64) {
    let size = (sectors * SECTOR as u64).to_string();
    // The others QEMU only reads.
    if ours || !matches!(case.format, "raw" | "qcow2" | "qed") {
        platter(&copy.scratch, &["resize", "-q", "-f", case.format, &copy.top, &size]);
    } else {
        copy.scratch.qemu_img(&["resize", "-q", "-f", case.qemu, &copy.top, &size]);
    }
    copy.model.sets.resize(sectors as usize, (ZERO, 0));
}

fn lay_over(case: &Case, copy: &mut Copy, ours: bool) {
    copy.past.count += 1;
    let new = format!("over{}.{}", copy.past.count, case.format);
    let old = std::mem::replace(&mut copy.top, new.clone());
    if ours {
        let args = ["snapshot", "-f", case.format, "-O", case.format, "--overlay", &new, &old];
        platter(&copy.scratch, &args);
    } else {
        copy.scratch
            .qemu_img(&["create", "-q", "-f", case.qemu, "-b", &old, "-F", case.qemu, &new]);
    }
    let held = copy.model.initial.clone();
    let model = std::mem::replace(&mut copy.model, Model::new(held.clone(), Some(held)));
    copy.past.tops.push((old, model.backing));
}

fn commit(case: &Case, copy: &mut Copy, ours: bool) {
    let (below, backing) = copy.past.tops.pop().expect("an overlay was made");
    let old = std::mem::replace(&mut copy.top, below);
    if ours {
        platter(&copy.scratch, &["commit", "-q", "-f", case.format, &old]);
    } else {
        copy.scratch.qemu_img(&["commit", "-q", "-d", "-f", case.qemu, &old]);
    }
    std::fs::remove_file(copy.scratch.path.join(&old)).expect("the overlay");
    copy.past.snapshots.retain(|(file, ..)| *file != old);
    copy.model.backing = backing;
}

fn snapshot(copy: &mut Copy) {
    copy.past.count += 1;
    let name = format!("s{}", copy.past.count);
    copy.scratch.qemu_img(&["snapshot", "-c", &name, &copy.top]);
    copy.past.snapshots.push((copy.top.clone(), name, copy.model.initial.clone()));
}
