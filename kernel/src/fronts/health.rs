//! How the storage domain's own disks fare, for people and monitors: one node for each device,
//! `data/store/NAME`.
//!
//! Must never: be written more often than every [`STATS_NS`], or when nothing changed.

use alloc::format;
use alloc::string::String;

use platter_storage::any::AnyDevice;
use platter_storage::blkfront::Blkfront;
use platter_storage::block_store::Growth;
use platter_storage::nvme::Nvme;

use super::{Drive, FrontSlot};
use crate::engine::Engine;
use crate::limits::STATS_NS;
use crate::stores::AnyStore;
use crate::xs::{Purpose, Xs};

/// What was said of a device so far.
#[derive(Default)]
pub(super) struct Said {
    text: String,
    /// Changes under open disks that were not followed.
    refused: u64,
    /// Images on another disk than they were opened on.
    strange: u64,
    /// Pages that cannot be used.
    lost_pages: usize,
}

impl FrontSlot {
    /// Shows the counters of the devices behind this slot when they changed.
    pub(super) fn show_stats(&mut self, engine: &Engine<AnyStore>, xs: &mut Xs, now_ns: u64) {
        if now_ns.saturating_sub(self.stats_ns) < STATS_NS {
            return;
        }
        self.stats_ns = now_ns;
        match &mut self.drive {
            Drive::Disk { device, .. } => {
                let Some((AnyDevice::Blkfront(front), growth)) = engine.device(*device) else {
                    return;
                };
                self.said.show(xs, &self.name, disk_text(front), growth);
            }
            Drive::Pci(pci) => {
                for (number, (index, said)) in pci.controllers().enumerate() {
                    let Some((AnyDevice::Nvme(nvme), growth)) = engine.device(index) else {
                        continue;
                    };
                    said.show(xs, &format!("nvme{number}"), nvme_text(nvme), growth);
                }
            }
            Drive::Unread | Drive::Share { .. } => {}
        }
    }
}

impl Said {
    fn show(&mut self, xs: &mut Xs, name: &str, text: String, growth: Growth) {
        let Growth { grown, refused, why, strange, lost_pages } = growth;
        if core::mem::replace(&mut self.strange, strange) != strange {
            let why = why.unwrap_or("");
            log::warn!("an image on '{name}' is not served any more, attach it anew: {why}");
        }
        if core::mem::replace(&mut self.refused, refused) != refused {
            let why = why.unwrap_or("");
            log::warn!(
                "a partition or volume on '{name}' changed in use and is served as it was: {why}"
            );
        }
        if core::mem::replace(&mut self.lost_pages, lost_pages) < lost_pages {
            log::warn!(
                "'{name}' was left and may still write to {lost_pages} pages: kept from use"
            );
        }
        let text = format!(
            "{text} grown={grown} not_grown={refused} strange={strange} lost_pages={lost_pages}"
        );
        if self.text != text {
            xs.write(&format!("data/store/{name}"), &text, Purpose::None);
            self.text = text;
        }
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
    let another = if nvme.is_another() { " another_controller=1" } else { "" };
    let ours = format!(
        "up={up}{another} timeouts={} aborts={} resets={} errors={} retries={} last_status={:#x}",
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
