//! The kinds of store that a storage domain can have, behind one name.

use alloc::boxed::Box;

use platter_storage::any::AnyDevice;
use platter_storage::block_store::BlockStore;
use platter_storage::ninep::Client;
use platter_storage::{Access, Done, FileId, Store, StoreFault, Submit, Tag, Window};
use platter_xen::{Bus, Hypervisor, Port};

/// A 9p share, or a disk of the storage domain itself.
pub enum AnyStore {
    NineP(Box<Client>),
    /// All disks of the domain: a volume may lie on several.
    Block(Box<BlockStore<AnyDevice>>),
}

/// Calls the method of whichever store it is.
macro_rules! each {
    ($self:ident, $store:ident => $call:expr) => {
        match $self {
            AnyStore::NineP($store) => $call,
            AnyStore::Block($store) => $call,
        }
    };
}

impl AnyStore {
    /// The event channels to sleep on.
    pub fn ports(&self, ports: &mut alloc::vec::Vec<Port>) {
        match self {
            AnyStore::NineP(client) => ports.extend(client.ports()),
            AnyStore::Block(store) => {
                ports.extend(store.devices().flat_map(|device| match device {
                    AnyDevice::Blkfront(front) => front.ports(),
                    AnyDevice::Nvme(_) => &[],
                }));
            }
        }
    }
}

impl<H: Hypervisor + Bus> Store<H> for AnyStore {
    fn io_bytes_max(&self) -> u32 {
        match self {
            AnyStore::NineP(store) => Store::<H>::io_bytes_max(&**store),
            AnyStore::Block(store) => Store::<H>::io_bytes_max(&**store),
        }
    }

    fn open(&mut self, hv: &mut H, tag: Tag, path: &str, access: Access) -> Result<(), StoreFault> {
        each!(self, store => store.open(hv, tag, path, access))
    }

    fn close(&mut self, hv: &mut H, file: FileId) {
        each!(self, store => store.close(hv, file));
    }

    fn size(&mut self, hv: &mut H, tag: Tag, file: FileId) -> Result<Submit, StoreFault> {
        each!(self, store => store.size(hv, tag, file))
    }

    fn read(
        &mut self,
        hv: &mut H,
        tag: Tag,
        file: FileId,
        offset: u64,
        len: u32,
    ) -> Result<Submit, StoreFault> {
        each!(self, store => store.read(hv, tag, file, offset, len))
    }

    fn write(
        &mut self,
        hv: &mut H,
        tag: Tag,
        file: FileId,
        offset: u64,
        len: u32,
        fill: &mut dyn FnMut(&mut H, Window) -> bool,
    ) -> Result<Submit, StoreFault> {
        each!(self, store => store.write(hv, tag, file, offset, len, fill))
    }

    fn flush(&mut self, hv: &mut H, tag: Tag, file: FileId) -> Result<Submit, StoreFault> {
        each!(self, store => store.flush(hv, tag, file))
    }

    fn punch(
        &mut self,
        hv: &mut H,
        tag: Tag,
        file: FileId,
        offset: u64,
        len: u64,
    ) -> Result<Submit, StoreFault> {
        each!(self, store => store.punch(hv, tag, file, offset, len))
    }

    /// Over 9p a hole gives the space back; a disk is told and promises nothing.
    fn discard(
        &mut self,
        hv: &mut H,
        tag: Tag,
        file: FileId,
        offset: u64,
        len: u64,
    ) -> Result<Submit, StoreFault> {
        match self {
            AnyStore::NineP(store) => store.punch(hv, tag, file, offset, len),
            AnyStore::Block(store) => store.discard(hv, tag, file, offset, len),
        }
    }

    fn is_deferring(&self) -> bool {
        match self {
            AnyStore::NineP(store) => Store::<H>::is_deferring(&**store),
            AnyStore::Block(store) => Store::<H>::is_deferring(&**store),
        }
    }

    fn push(&mut self, hv: &mut H) {
        each!(self, store => store.push(hv))
    }

    fn void(&mut self, hv: &mut H, tag: Tag) {
        each!(self, store => store.void(hv, tag))
    }

    fn poll_at_ns(&self) -> Option<u64> {
        match self {
            AnyStore::NineP(store) => Store::<H>::poll_at_ns(&**store),
            AnyStore::Block(store) => Store::<H>::poll_at_ns(&**store),
        }
    }

    fn poll(&mut self, hv: &mut H, now_ns: u64) -> Option<Done> {
        each!(self, store => store.poll(hv, now_ns))
    }

    fn release(&mut self, hv: &mut H) {
        each!(self, store => store.release(hv))
    }

    fn made_room(&mut self) -> bool {
        match self {
            AnyStore::NineP(store) => Store::<H>::made_room(&mut **store),
            AnyStore::Block(store) => Store::<H>::made_room(&mut **store),
        }
    }
}
