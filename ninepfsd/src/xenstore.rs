//! dom0's xenstore by /dev/xen/xenbus: requests answered one by one, watch events kept apart.
//!
//! The messages are those of xs_wire.h; the kernel forwards them as they are. Guards that what
//! a frontend writes in a loop is remembered once, its events carry no path, and that it keeps
//! nobody else from being heard.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::ops::Bound;
use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context, Result, bail};
use platter_xen::xenstore::{Token, kind, names, parse_watch_event};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

const HEADER_BYTES: usize = 16;
const PAYLOAD_BYTES_MAX: usize = 4096;

/// The token of watches on what only toolstacks and we write: their events keep their paths.
pub const TRUSTED: u32 = 0;

/// Something changed below a watch: its token, and for [`TRUSTED`] where.
pub type Event = (u32, String);

/// Events that wait, taken in turns: one that comes again and again is taken once a round.
#[derive(Default)]
struct Events {
    waiting: BTreeSet<Event>,
    last: Event,
}

impl Events {
    fn take(&mut self) -> Option<Event> {
        let behind = (Bound::Excluded(&self.last), Bound::Unbounded);
        let next = self.waiting.range(behind).next().or_else(|| self.waiting.first());
        let next = next.cloned()?;
        self.waiting.remove(&next);
        self.last.clone_from(&next);
        Some(next)
    }
}

/// A connection to xenstored.
pub struct Xenstore {
    file: File,
    events: Events,
}

struct Message {
    kind: u32,
    payload: Vec<u8>,
}

impl Xenstore {
    pub fn open() -> Result<Xenstore> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/xen/xenbus")
            .context("cannot open /dev/xen/xenbus: is this a Xen domain with xenstored up?")?;
        Ok(Xenstore { file, events: Events::default() })
    }

    /// The value of a node; `None` when it is missing or may not be read.
    pub fn read(&mut self, path: &str) -> Result<Option<Vec<u8>>> {
        self.optional(kind::READ, &nul(path))
    }

    pub fn read_text(&mut self, path: &str) -> Result<Option<String>> {
        Ok(self.read(path)?.and_then(|value| String::from_utf8(value).ok()))
    }

    pub fn list(&mut self, path: &str) -> Result<Vec<String>> {
        let payload = self.optional(kind::DIRECTORY, &nul(path))?.unwrap_or_default();
        Ok(names(&payload).map(str::to_string).collect())
    }

    /// Writes a node; false when it may not be written or its directory is gone.
    pub fn write(&mut self, path: &str, value: &str) -> Result<bool> {
        let mut payload = nul(path);
        payload.extend_from_slice(value.as_bytes());
        Ok(self.optional(kind::WRITE, &payload)?.is_some())
    }

    /// Lets another domain read (or own) a node: `perms` as xenstored spells them.
    pub fn set_perms(&mut self, path: &str, perms: &[String]) -> Result<bool> {
        let mut payload = nul(path);
        perms.iter().for_each(|perm| payload.extend_from_slice(&nul(perm)));
        Ok(self.optional(kind::SET_PERMS, &payload)?.is_some())
    }

    /// Removes a node and all below it; there may be none.
    pub fn remove(&mut self, path: &str) -> Result<()> {
        self.optional(kind::RM, &nul(path)).map(|_| ())
    }

    /// Has changes told of; false when that may not be, or there are too many watches.
    pub fn watch(&mut self, path: &str, token: u32) -> Result<bool> {
        Ok(self.optional(kind::WATCH, &watch(path, token))?.is_some())
    }

    /// Ends a watch; there may be none.
    pub fn unwatch(&mut self, path: &str, token: u32) -> Result<()> {
        self.optional(kind::UNWATCH, &watch(path, token)).map(|_| ())
    }

    /// Takes an event that came with an answer, or was waited for.
    pub fn event(&mut self) -> Option<Event> {
        self.events.take()
    }

    /// There is an event to be taken.
    pub fn has_event(&self) -> bool {
        !self.events.waiting.is_empty()
    }

    /// Waits for an event and keeps it. Called when the connection is readable.
    pub fn hear(&mut self) -> Result<()> {
        let message = self.receive()?;
        self.keep_event(&message);
        Ok(())
    }

    /// Only one process may serve a domain's shares; false when another does. It ends with the
    /// process.
    pub fn claim(&self) -> Result<bool> {
        match flock(&self.file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(Errno::AGAIN) => Ok(false),
            Err(errno) => Err(errno).context("cannot lock /dev/xen/xenbus"),
        }
    }

    fn optional(&mut self, request: u32, payload: &[u8]) -> Result<Option<Vec<u8>>> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
        for word in [request, 1, 0, payload.len() as u32] {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        bytes.extend_from_slice(payload);
        self.file.write_all(&bytes).context("cannot write to xenstored")?;
        loop {
            let message = self.receive()?;
            if message.kind == request {
                return Ok(Some(message.payload));
            }
            if message.kind == kind::ERROR {
                return Ok(None);
            }
            self.keep_event(&message);
        }
    }

    fn keep_event(&mut self, message: &Message) {
        if message.kind == kind::WATCH_EVENT
            && let Some((path, Token(token))) = parse_watch_event(&message.payload)
        {
            let path = if token == TRUSTED { path.to_string() } else { String::new() };
            self.events.waiting.insert((token, path));
        }
    }

    fn receive(&mut self) -> Result<Message> {
        let mut header = [0; HEADER_BYTES];
        self.file.read_exact(&mut header).context("cannot read from xenstored")?;
        let word = |at: usize| {
            let mut four = [0; 4];
            four.copy_from_slice(&header[at..at + 4]);
            u32::from_ne_bytes(four)
        };
        let len = word(12) as usize;
        if len > PAYLOAD_BYTES_MAX {
            bail!("xenstored sent a message of {len} bytes, the limit is {PAYLOAD_BYTES_MAX}");
        }
        let mut payload = vec![0; len];
        self.file.read_exact(&mut payload).context("cannot read from xenstored")?;
        Ok(Message { kind: word(0), payload })
    }
}

impl AsFd for Xenstore {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn watch(path: &str, token: u32) -> Vec<u8> {
    let mut payload = nul(path);
    payload.extend_from_slice(&nul(&token.to_string()));
    payload
}

fn nul(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

/// Would miss: what xenstored sends, and when.
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_that_always_comes_again_keeps_no_other_waiting() {
        let mut events = Events::default();
        let event = |token| (token, String::new());
        events.waiting.extend([event(3), event(7), event(9)]);
        let mut taken = vec![];
        for _ in 0..6 {
            // The frontend with this token writes its state in a loop.
            events.waiting.insert(event(3));
            taken.push(events.take().expect("one waits").0);
        }
        assert_eq!(taken, [3, 7, 9, 3, 3, 3]);
        assert_eq!(events.take(), None);
    }
}
