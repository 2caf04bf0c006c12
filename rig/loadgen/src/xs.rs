//! xenstore by question and answer: these guests have nothing to do while they wait.

use alloc::string::String;
use alloc::vec::Vec;

use platter_xen::xenstore::{Client, Event, NotQueued, Op, Token, TxId, XsError, decimal, names};
use platter_xen::{Port, Region};

use crate::guest::{Guest, MS_NS, SECOND_NS};

/// How long an answer may take: dom0 is slow on an emulated machine.
const ANSWER_NS: u64 = 30 * SECOND_NS;
/// A sleep that an event should end, in case it was lost.
const NAP_NS: u64 = 200 * MS_NS;

/// The connection.
pub struct XenStore {
    client: Client,
    next: u32,
    changed: bool,
}

impl XenStore {
    /// On the page and the port that the domain was born with.
    pub fn new<G: Guest>(guest: &G, page: Region, port: Port) -> XenStore {
        XenStore { client: Client::new(guest, page, port), next: 1, changed: true }
    }

    /// The event channel to sleep on.
    pub fn port(&self) -> Port {
        self.client.port()
    }

    /// Asks, and waits for the answer.
    pub fn ask<G: Guest>(&mut self, guest: &mut G, op: Op<'_>) -> Result<Vec<u8>, XsError> {
        let token = self.send(guest, op).map_err(|_| XsError::Other)?;
        let until_ns = guest.now_ns() + ANSWER_NS;
        loop {
            guest.take_pending(self.client.port());
            while let Some(event) = self.client.poll(guest) {
                match event {
                    Event::Reply { token: of, result } if of == token => return result,
                    Event::Reply { .. } => {}
                    Event::Watch { .. } => self.changed = true,
                    Event::Reset | Event::Dead(_) => return Err(XsError::Other),
                }
            }
            let now_ns = guest.now_ns();
            if now_ns > until_ns {
                return Err(XsError::Busy);
            }
            guest.sleep_until(&[self.client.port()], now_ns + NAP_NS);
        }
    }

    /// Sends without waiting; the answer, when it comes, is dropped. For those who storm.
    pub fn send<G: Guest>(&mut self, guest: &mut G, op: Op<'_>) -> Result<Token, NotQueued> {
        let token = Token(self.next);
        self.next = self.next.wrapping_add(1);
        let mut queued = self.client.submit(TxId::NONE, op, token);
        while queued == Err(NotQueued::Full) {
            self.drain(guest);
            let until_ns = guest.now_ns() + MS_NS;
            guest.sleep_until(&[self.client.port()], until_ns);
            queued = self.client.submit(TxId::NONE, op, token);
        }
        queued.map(|()| token)
    }

    /// Takes whatever has come.
    pub fn drain<G: Guest>(&mut self, guest: &mut G) {
        guest.take_pending(self.client.port());
        while let Some(event) = self.client.poll(guest) {
            self.changed |= matches!(event, Event::Watch { .. });
        }
    }

    /// A node's text; `None` when there is none to be had.
    pub fn read<G: Guest>(&mut self, guest: &mut G, path: &str) -> Option<String> {
        String::from_utf8(self.ask(guest, Op::Read { path }).ok()?).ok()
    }

    /// A node's number.
    pub fn number<G: Guest>(&mut self, guest: &mut G, path: &str) -> Option<u64> {
        decimal(self.read(guest, path)?.as_bytes())
    }

    /// Writes a node.
    pub fn write<G: Guest>(
        &mut self,
        guest: &mut G,
        path: &str,
        value: &[u8],
    ) -> Result<(), XsError> {
        self.ask(guest, Op::Write { path, value }).map(|_| ())
    }

    /// Removes a node and what is below; that there was none is no fault.
    pub fn remove<G: Guest>(&mut self, guest: &mut G, path: &str) {
        self.ask(guest, Op::Rm { path }).ok();
    }

    /// Names below a node.
    pub fn list<G: Guest>(&mut self, guest: &mut G, path: &str) -> Vec<String> {
        let payload = self.ask(guest, Op::Directory { path }).unwrap_or_default();
        names(&payload).map(String::from).collect()
    }

    /// From now on changes of `path` end a sleep in [`wait_change`](Self::wait_change).
    pub fn watch<G: Guest>(&mut self, guest: &mut G, path: &str) {
        self.ask(guest, Op::Watch { path, watch: Token(1) }).ok();
    }

    /// Whether something watched has changed since the last look.
    pub fn take_change<G: Guest>(&mut self, guest: &mut G) -> bool {
        self.drain(guest);
        core::mem::take(&mut self.changed)
    }

    /// Sleeps until something watched changes, or until then at the latest.
    pub fn wait_change<G: Guest>(&mut self, guest: &mut G, until_ns: u64) {
        while !self.take_change(guest) && guest.now_ns() < until_ns {
            let nap_ns = (guest.now_ns() + NAP_NS).min(until_ns);
            guest.sleep_until(&[self.client.port()], nap_ns);
        }
    }
}
