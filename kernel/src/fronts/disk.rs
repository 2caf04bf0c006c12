//! A disk that another domain serves to us: its name is the first word of a disk's path.

use alloc::boxed::Box;
use alloc::string::String;

use platter_storage::any::AnyDevice;
use platter_storage::blkfront::{BackNodes, Blkfront, FrontStep};
use platter_xen::vbd;
use platter_xen::xenbus::XenbusState;
use platter_xen::{DomId, Hypervisor};

use super::{Drive, FrontSlot, block_store};
use crate::engine::Engine;
use crate::stores::AnyStore;
use crate::xs::Xs;

/// `params` and `state`, then [`vbd::BACK_KEYS`].
pub(super) const BACK_KEYS: [&str; 14] = {
    let mut keys = ["params", "state", "", "", "", "", "", "", "", "", "", "", "", ""];
    let mut index = 0;
    while index < vbd::BACK_KEYS.len() {
        keys[index + 2] = vbd::BACK_KEYS[index];
        index += 1;
    }
    keys
};

/// What is read of our own directory once it is known: it may be gone, or made anew.
pub(super) const OWN_KEYS: [&str; 3] = ["backend", "backend-id", "state"];

impl FrontSlot {
    pub(super) fn take_disk<H: Hypervisor>(
        &mut self,
        engine: &mut Engine<AnyStore>,
        hv: &mut H,
        domid: DomId,
    ) -> Result<(), &'static str> {
        let number = self.fe.rsplit('/').next().unwrap_or("");
        let number: u32 = number.parse().map_err(|_| "its number is no number")?;
        self.name = disk_name(number);
        // Requests carry only the low half of the number, and no backend looks at it.
        let device = AnyDevice::Blkfront(Box::new(Blkfront::new(domid, number as u16)));
        let store = block_store(engine, hv, self.frames_max)?;
        let device = store.attach(&self.name, device);
        self.drive = Drive::Disk { device, was_up: false };
        log::info!("disk '{}' waits for its backend", self.name);
        Ok(())
    }

    /// Says when the disk comes and goes, and looks again when its backend broke the ring.
    pub(super) fn notice_disk(&mut self, engine: &Engine<AnyStore>) {
        let Drive::Disk { device, was_up } = &mut self.drive else { return };
        let Some((AnyDevice::Blkfront(front), _)) = engine.device(*device) else { return };
        let up = front.is_connected();
        if up != core::mem::replace(was_up, up) {
            let state = if up { "is up" } else { "lost its backend; requests wait for it" };
            log::info!("disk '{}' {state}", self.name);
        }
        self.look |= front.is_broken();
    }

    /// Our own directory was read again. It is gone: the disk was taken away, or its backend
    /// died and another will come. It is new: that other has come.
    pub(super) fn own_read<H: Hypervisor>(
        &mut self,
        engine: &mut Engine<AnyStore>,
        xs: &mut Xs,
        hv: &mut H,
    ) {
        let Drive::Disk { device, .. } = self.drive else { return };
        let backend = self.named_backend();
        let fresh = self.value("state") == Some(b"1");
        let Ok(store) = block_store(engine, hv, self.frames_max) else { return };
        let (AnyDevice::Blkfront(front), pool) = store.device_mut(device) else { return };
        let Some((be, domid)) = backend else {
            front.unplug();
            self.unwritten.clear();
            self.forget_backend(xs);
            log::info!("disk '{}' was taken away", self.name);
            return;
        };
        self.look = true;
        let known = be == self.be;
        if known && !(fresh && front.own_state() != XenbusState::Initialising) {
            return;
        }
        front.replug(hv, pool, domid);
        self.unwritten.clear();
        log::info!("disk '{}' has a new backend", self.name);
        if !known {
            self.forget_backend(xs);
            self.be = be;
            self.watch_backend(xs);
        }
    }

    /// Our domain ends: true when the backend has let go.
    pub(super) fn leave_disk(&mut self, engine: &mut Engine<AnyStore>) -> bool {
        let Drive::Disk { device, .. } = self.drive else { return true };
        let Some(AnyDevice::Blkfront(front)) = engine.device_mut(device) else { return true };
        self.look |= front.close();
        front.is_closed()
    }

    pub(super) fn disk_read<H: Hypervisor>(&mut self, engine: &mut Engine<AnyStore>, hv: &mut H) {
        let Drive::Disk { device, .. } = self.drive else { return };
        let step = {
            let values = vbd::BACK_KEYS.map(|key| self.value(key));
            let (state, params) = (self.value("state"), self.value("params"));
            let back = BackNodes { state, params, values: &values };
            let Ok(store) = block_store(engine, hv, self.frames_max) else { return };
            let (AnyDevice::Blkfront(front), pool) = store.device_mut(device) else { return };
            front.update(hv, pool, back)
        };
        match step {
            FrontStep::Wait => {}
            FrontStep::Write(nodes) => self.write(nodes),
            FrontStep::Refused(fault) => {
                log::warn!("disk '{}' cannot be connected: {fault:?}", self.name);
            }
        }
    }
}

/// The name of a virtual device number (Xen docs/man/xen-vbd-interface): `xvda` is 202 << 8, 16
/// numbers a disk; from `xvdq` on, bit 28 and 256 numbers a disk.
fn disk_name(number: u32) -> String {
    const EXTENDED: u32 = 1 << 28;
    let index = match number {
        n if n & EXTENDED != 0 => (n & !EXTENDED) >> 8,
        n if n >> 8 == 202 => (n & 0xff) >> 4,
        n => return alloc::format!("disk{n}"),
    };
    let mut letters = heapless::Vec::<u8, 8>::new();
    let mut rest = index + 1;
    while rest > 0 && !letters.is_full() {
        rest -= 1;
        letters.push(b'a' + (rest % 26) as u8).expect("looked for room");
        rest /= 26;
    }
    let mut name = String::from("xvd");
    name.extend(letters.iter().rev().map(|&letter| letter as char));
    name
}

/// Would miss: the handshake itself, which storage tests against a model.
#[cfg(test)]
mod tests {
    use super::disk_name;

    #[test]
    fn names_follow_the_vbd_interface() {
        for (number, name) in [
            (51712, "xvda"),
            (51728, "xvdb"),
            (51952, "xvdp"),
            (268439552, "xvdq"),
            ((1 << 28) | (26 << 8), "xvdaa"),
            (768, "disk768"),
        ] {
            assert_eq!(disk_name(number), name, "{number}");
        }
    }
}
