//! Whether this host's KVM can run the nested machine: found out by trying, once.
//!
//! /dev/kvm may be there and still be of no use: on a paravirtual KVM, Xen does not boot. So one
//! boot without scenarios decides, and its outcome is kept in build/rig/accelerator. Emulation
//! always works.

use std::fs::{self, OpenOptions};

use anyhow::{Result, bail};

use crate::machine::Job;
use crate::suite::{Layout, Suite};

/// How QEMU runs the machine's processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// Emulation.
    Tcg,
    /// The host's own processor.
    Kvm,
}

impl Accelerator {
    /// QEMU's arguments. SMAP slows an emulated dom0 down or, with older QEMU, crashes it; RDTSCP
    /// breaks emulated PVH guests there. ERMS and FSRM promise that `rep movsb` is fast, where the
    /// emulator copies byte by byte: without them Linux and Xen copy by words, three times as fast.
    pub fn arguments(self) -> [&'static str; 4] {
        match self {
            Accelerator::Tcg => {
                ["-accel", "tcg,thread=multi", "-cpu", "max,-smap,-rdtscp,-erms,-fsrm"]
            }
            Accelerator::Kvm => ["-accel", "kvm", "-cpu", "host"],
        }
    }

    fn name(self) -> &'static str {
        match self {
            Accelerator::Tcg => "tcg",
            Accelerator::Kvm => "kvm",
        }
    }

    fn named(name: &str) -> Option<Self> {
        [Accelerator::Tcg, Accelerator::Kvm].into_iter().find(|one| one.name() == name.trim())
    }
}

/// What `RIG_ACCEL` says (`tcg`, `kvm`), or what was found out before, or what a trial shows.
///
/// # Errors
/// When `RIG_ACCEL` is something else, or the outcome cannot be kept.
pub fn choose(layout: &Layout, suite: Suite) -> Result<Accelerator> {
    if let Ok(name) = std::env::var("RIG_ACCEL") {
        let Some(chosen) = Accelerator::named(&name) else {
            bail!("RIG_ACCEL={name} is neither tcg nor kvm");
        };
        return Ok(chosen);
    }
    let kept = layout.rig().join("accelerator");
    if let Some(known) = fs::read_to_string(&kept).ok().and_then(|name| Accelerator::named(&name)) {
        return Ok(known);
    }
    let has_kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    let found = if has_kvm { trial(layout, suite) } else { Accelerator::Tcg };
    fs::write(&kept, found.name())?;
    Ok(found)
}

fn trial(layout: &Layout, suite: Suite) -> Accelerator {
    println!("rig: this host has KVM; trying whether Xen boots on it");
    let accelerator = Accelerator::Kvm;
    let settings = Vec::new();
    let job = Job { layout, suite, accelerator, scenarios: &[], settings, keep: false };
    let found = match job.run(&mut |_, _, _| {}) {
        Ok(_) => Accelerator::Kvm,
        Err(_) => Accelerator::Tcg,
    };
    println!("rig: {}", if found == accelerator { "it does" } else { "it does not: emulating" });
    found
}
