//! Event channels: the operations, each one hypercall. The pending bits are in [`crate::shared`].

use platter_xen::{DomId, Port, Refusal};

use crate::hypercall::{DOMID_SELF, event_channel_op};

/// EVTCHNOP_status on an unbound port (Xen public/event_channel.h, `struct evtchn_status`).
#[repr(C)]
struct Status {
    dom: u16,
    port: u32,
    status: u32,
    vcpu: u32,
    /// For an unbound port: the domain that may bind it, and padding of the union.
    remote_dom: u16,
    rest: [u16; 3],
}

const _: () = assert!(size_of::<Status>() == size_of::<xen_sys::evtchn_status>());

pub(crate) fn bind_interdomain(domid: DomId, remote: Port) -> Result<Port, Refusal> {
    let mut op = xen_sys::evtchn_bind_interdomain {
        remote_dom: domid.0,
        remote_port: remote.0,
        local_port: 0,
    };
    // SAFETY: the struct is the command's.
    let result = unsafe { event_channel_op(xen_sys::EVTCHNOP_bind_interdomain, &mut op) };
    result.map(|()| Port(op.local_port)).map_err(Refusal::Errno)
}

pub(crate) fn alloc_unbound(domid: DomId) -> Result<Port, Refusal> {
    let mut op = xen_sys::evtchn_alloc_unbound { dom: DOMID_SELF, remote_dom: domid.0, port: 0 };
    // SAFETY: the struct is the command's.
    let result = unsafe { event_channel_op(xen_sys::EVTCHNOP_alloc_unbound, &mut op) };
    result.map(|()| Port(op.port)).map_err(Refusal::Errno)
}

pub(crate) fn close(port: Port) {
    let mut op = xen_sys::evtchn_close { port: port.0 };
    // SAFETY: the struct is the command's.
    let result = unsafe { event_channel_op(xen_sys::EVTCHNOP_close, &mut op) };
    assert!(result.is_ok(), "closing port {} failed: {result:?}", port.0);
}

/// Notifies the other end. Fails only when that end is gone, which is not our trouble.
pub(crate) fn send(port: Port) {
    let mut op = xen_sys::evtchn_send { port: port.0 };
    // SAFETY: the struct is the command's.
    let _ = unsafe { event_channel_op(xen_sys::EVTCHNOP_send, &mut op) };
}

/// Our own domain number: Xen writes it where a port is offered to DOMID_SELF.
pub(crate) fn own_domid() -> DomId {
    let port = alloc_unbound(DomId(DOMID_SELF)).expect("a port for ourselves");
    let mut op =
        Status { dom: DOMID_SELF, port: port.0, status: 0, vcpu: 0, remote_dom: 0, rest: [0; 3] };
    // SAFETY: the struct has the command's layout.
    let result = unsafe { event_channel_op(xen_sys::EVTCHNOP_status, &mut op) };
    assert!(result.is_ok(), "EVTCHNOP_status failed: {result:?}");
    close(port);
    DomId(op.remote_dom)
}
