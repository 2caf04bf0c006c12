//! A server that falls silent.
//!
//! Guards that no operation waits for ever: for a server that answers nothing, nor for the rest of
//! an answer that it began on one ring while it answers on others. Must never: give up a server
//! that is merely slow with one request of many.

use super::client::Client;
use super::session::Session;

/// Without a single answer for so long, while something is asked, the server counts as dead:
/// as long as Linux waits for a disk. So it does when an answer stays incomplete for so long.
pub const STALL_NS: u64 = 30_000_000_000;

impl Client {
    pub(super) fn watch_the_clock(&mut self, now_ns: u64) {
        let waiting = self.lanes.iter().any(|lane| lane.in_flight > 0);
        let waiting = waiting || self.session.waits_for_answer();
        // Requests are sent without a clock: their wait begins at the poll that finds them.
        if !core::mem::replace(&mut self.waited, waiting) {
            self.alive_ns = now_ns;
        } else if waiting && now_ns.saturating_sub(self.alive_ns) > STALL_NS {
            self.lose(Session::Broken("the 9p server does not answer"));
        }
        if self.session.is_connected() && self.has_partial_answer(now_ns) {
            self.lose(Session::Broken("the 9p server does not end its answer"));
        }
    }

    /// Some answer began long ago and is not whole.
    fn has_partial_answer(&mut self, now_ns: u64) -> bool {
        let mut late = false;
        for lane in &mut self.lanes {
            let before = lane.partial;
            lane.partial = lane.ring.begun().map(|(_, index)| match before {
                Some((begun, since_ns)) if begun == index => (index, since_ns),
                _ => (index, now_ns),
            });
            late |= lane
                .partial
                .is_some_and(|(_, since_ns)| now_ns.saturating_sub(since_ns) > STALL_NS);
        }
        late
    }
}
