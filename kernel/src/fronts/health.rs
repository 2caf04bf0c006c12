//! How the storage domain's own disks fare, for people and monitors: one node for each device,
//! `data/store/NAME`.
//!
//! Must never: be written more often than every [`STATS_NS`], or when nothing changed.

use alloc::format;
use alloc::string::String;

use platter_storage::any::AnyDevice;
use platter_storage::blkfront::Blkfront;
use platter_storage::nvme::Nvme;

use super::{Drive, FrontSlot};
use crate::engine::Engine;
use crate::limits::STATS_NS;
use crate::stores::AnyStore;
use crate::xs::{Purpose, Xs};

impl FrontSlot {
    /// Shows the counters of the devices behind this slot when they changed.
    pub(super) fn show_stats(&mut self, engine: &Engine<AnyStore>, xs: &mut Xs, now_ns: u64) {
        if now_ns.saturating_sub(self.stats_ns) < STATS_NS {
            return;
        }
        self.stats_ns = now_ns;
        match &mut self.drive {
            Drive::Disk { device, .. } => {
                let Some(AnyDevice::Blkfront(front)) = engine.device(*device) else { return };
                show(xs, &self.name, &mut self.stats_shown, disk_text(front));
            }
            Drive::Pci(pci) => {
                for (number, (index, shown)) in pci.controllers().enumerate() {
                    let Some(AnyDevice::Nvme(nvme)) = engine.device(index) else { continue };
                    show(xs, &format!("nvme{number}"), shown, nvme_text(nvme));
                }
            }
            Drive::Unread | Drive::Share { .. } => {}
        }
    }
}

fn show(xs: &mut Xs, name: &str, shown: &mut String, text: String) {
    if *shown != text {
        xs.write(&format!("data/store/{name}"), &text, Purpose::None);
        *shown = text;
    }
}

fn disk_text(front: &Blkfront) -> String {
    let counters = front.counters();
    let up = u8::from(front.is_connected());
    format!(
        "up={up} connects={} resends={} errors={} broken={}",
        counters.connects, counters.resends, counters.errors, counters.broken
    )
}

/// Counters of ours, then what the drive says of itself (NVMe 1.4, 5.14.1.2).
fn nvme_text(nvme: &Nvme) -> String {
    let counters = nvme.counters();
    let up = u8::from(nvme.is_ready());
    let ours = format!(
        "up={up} timeouts={} aborts={} resets={} errors={} retries={} last_status={:#x}",
        counters.timeouts,
        counters.aborts,
        counters.resets,
        counters.errors,
        counters.retries,
        counters.last_status
    );
    let Some(health) = nvme.health() else { return ours };
    let celsius = i32::from(health.temperature_kelvin) - 273;
    format!(
        "{ours} warning={:#x} celsius={celsius} spare={} used={} media_errors={} log_entries={} \
         unsafe_shutdowns={}",
        health.critical_warning,
        health.spare_percent,
        health.used_percent,
        health.media_errors,
        health.error_log_entries,
        health.unsafe_shutdowns
    )
}
