//! Event channels: the operations, each one hypercall, but for events that leave together with
//! the sleep that follows them. The pending bits are in [`crate::shared`].

use platter_xen::{DomId, Port, Refusal};

use crate::hypercall::{self, DOMID_SELF, event_channel_op};

/// Events that wait for each other.
const WAITING_MAX: usize = 16;

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

/// Events that are still to be sent. With few requests under way each is followed by a sleep:
/// both in one call save half of the ways into Xen and back.
pub(crate) struct Outbox {
    waiting: [xen_sys::evtchn_send; WAITING_MAX],
    count: usize,
}

impl Outbox {
    pub(crate) const fn new() -> Outbox {
        Outbox { waiting: [xen_sys::evtchn_send { port: 0 }; WAITING_MAX], count: 0 }
    }

    /// Keeps an event until the next [`Outbox::send`] or [`Outbox::sleep`]; one of the same port
    /// that waits already serves for both.
    pub(crate) fn put(&mut self, port: Port) {
        if self.waiting[..self.count].iter().any(|waiting| waiting.port == port.0) {
            return;
        }
        if self.count == WAITING_MAX {
            self.send();
        }
        self.waiting[self.count].port = port.0;
        self.count += 1;
    }

    /// Sends what waits.
    pub(crate) fn send(&mut self) {
        for event in &self.waiting[..core::mem::take(&mut self.count)] {
            send(Port(event.port));
        }
    }

    /// Sends what waits and then sleeps until one of `ports` is pending or the system time is
    /// `timeout_ns`; 0 is for ever. Xen looks at the ports after it has sent: an answer that
    /// comes at once ends the sleep.
    pub(crate) fn sleep(&mut self, ports: &mut [u32], timeout_ns: u64) {
        if self.count == 0 {
            return hypercall::sched_poll(ports, timeout_ns);
        }
        let mut poll = hypercall::poll_of(ports, timeout_ns);
        let (number, command) = (xen_sys::__HYPERVISOR_sched_op, xen_sys::SCHEDOP_poll);
        let sleep = hypercall::call(number, command, &raw mut poll as u64);
        let mut calls = [sleep; WAITING_MAX + 1];
        let count = core::mem::take(&mut self.count);
        let (number, command) = (xen_sys::__HYPERVISOR_event_channel_op, xen_sys::EVTCHNOP_send);
        for (call, event) in calls.iter_mut().zip(&mut self.waiting[..count]) {
            *call = hypercall::call(number, command, &raw mut *event as u64);
        }
        // SAFETY: each struct is its command's and lives until the calls return, and so do the
        // ports that the last one names.
        unsafe { hypercall::multicall(&mut calls[..=count]) };
        let slept = calls[count].result as i64;
        assert!(slept == 0, "SCHEDOP_poll of {} ports failed: {slept}", ports.len());
    }
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
