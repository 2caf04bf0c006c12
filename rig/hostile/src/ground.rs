//! What every attack stands on: the disks, a way in, a way out, and a count of what came back.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use platter_loadgen::Guest;
use platter_loadgen::front::{
    CLOSED, CLOSING, Disk, INITIALISING, Link, STEP_NS, Shape, connect, free_granted, grant_all,
};
use platter_loadgen::guest::{MS_NS, SECOND_NS};
use platter_loadgen::play::Stage;
use platter_loadgen::random::Random;
use platter_loadgen::xs::XenStore;
use platter_xen::blkif::{Abi, RawRequest, Response, Segment, Status};
use platter_xen::{DomId, Gref, Region};

/// How long the answers to one batch may take.
const ANSWERS_NS: u64 = 20 * SECOND_NS;

/// One ring page, the layout of a 64-bit guest.
pub const PLAIN: Shape = Shape { abi: Abi::X86_64, queues: 1, order: 0 };
/// As much ring as there is.
pub const WIDE: Shape = Shape { abi: Abi::X86_64, queues: 2, order: 4 };

/// What an attack came to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Bad things done.
    pub tried: u64,
    /// Answers ERROR.
    pub errors: u64,
    /// Answers EOPNOTSUPP.
    pub unsupported: u64,
    /// Answers OKAY.
    pub okay: u64,
    /// Times the backend closed the disk.
    pub closed: u64,
    /// OKAY to what must be refused.
    pub served: u64,
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tally { tried, errors, unsupported, okay, closed, served } = self;
        write!(f, "tried={tried} errors={errors} unsupported={unsupported} ")?;
        write!(f, "okay={okay} closed={closed} served={served}")
    }
}

impl Tally {
    /// Counts an answer.
    pub fn note(&mut self, response: &Response) {
        let count = match response.status {
            status if status == Status::Okay.wire() => &mut self.okay,
            status if status == Status::Unsupported.wire() => &mut self.unsupported,
            _ => &mut self.errors,
        };
        *count += 1;
    }
}

/// A data page with its grant.
pub struct Page {
    pub region: Region,
    pub gref: Gref,
}

impl Page {
    /// All of it, as a segment.
    pub fn segment(&self) -> Segment {
        Segment { gref: self.gref, first_sect: 0, last_sect: 7 }
    }
}

/// The attacker and what it has.
pub struct Ground<'a, G> {
    pub guest: &'a mut G,
    pub xs: &'a mut XenStore,
    /// Our own number.
    pub own: DomId,
    /// The disk that is attacked.
    pub disk: &'a Disk,
    /// A disk that must not be written, when there is one.
    pub read_only: Option<&'a Disk>,
    pub random: Random,
    /// How long an attack that could go on for ever goes on.
    pub attack_ns: u64,
}

impl<G: Guest> Ground<'_, G> {
    /// Connects as an honest frontend.
    ///
    /// # Errors
    /// When the backend does not let us.
    pub fn open(&mut self, shape: Shape) -> Result<Link, String> {
        connect(self.guest, self.xs, self.disk, shape)
    }

    /// Leaves as an honest frontend, from whatever state the attack left.
    ///
    /// # Errors
    /// When the backend does not follow, or keeps our pages.
    pub fn leave(&mut self, link: Link) -> Result<(), String> {
        let left = platter_loadgen::front::disconnect(self.guest, self.xs, self.disk, link);
        self.show(INITIALISING);
        left
    }

    /// Shows a state.
    pub fn show(&mut self, state: u8) {
        self.disk.show(self.guest, self.xs, state);
    }

    /// Waits for a state of the backend.
    ///
    /// # Errors
    /// When it does not come.
    pub fn wait(&mut self, states: &[u8]) -> Result<u8, String> {
        self.disk.wait_for(self.guest, self.xs, states, STEP_NS)
    }

    /// Whether the backend leaves Connected within `patience_ns`.
    pub fn is_closed_within(&mut self, patience_ns: u64) -> bool {
        let states = [0, CLOSING, CLOSED];
        self.disk.wait_for(self.guest, self.xs, &states, patience_ns).is_ok()
    }

    /// A zeroed page, granted to the backend.
    ///
    /// # Errors
    /// When we have no memory or grants.
    pub fn page(&mut self, writable: bool) -> Result<Page, String> {
        let region = self.guest.frames_alloc(1).ok_or("no memory")?;
        let grefs = grant_all(self.guest, self.disk.back_id, region, writable)?;
        Ok(Page { region, gref: grefs[0] })
    }

    /// Gives a page back.
    ///
    /// # Errors
    /// When the backend keeps it.
    pub fn free(&mut self, page: Page) -> Result<(), String> {
        match free_granted(self.guest, page.region, &[page.gref]) {
            true => Ok(()),
            false => Err("the backend keeps a data page".to_string()),
        }
    }

    /// Puts requests on queue 0 and tells the backend, asked for or not.
    pub fn put(&mut self, link: &mut Link, requests: &[RawRequest]) -> u64 {
        let ring = &mut link.wires.rings[0];
        let put = requests.iter().take_while(|raw| ring.put(self.guest, raw)).count();
        ring.publish(self.guest);
        self.guest.notify(link.wires.ports[0]);
        put as u64
    }

    /// Takes answers of queue 0 until `count` have come, or the time is up.
    pub fn answers(&mut self, link: &mut Link, count: u64) -> Tally {
        self.answers_within(link, count, ANSWERS_NS)
    }

    /// As [`answers`](Self::answers), within `patience_ns`.
    pub fn answers_within(&mut self, link: &mut Link, count: u64, patience_ns: u64) -> Tally {
        let mut tally = Tally::default();
        let until_ns = self.guest.now_ns() + patience_ns;
        let port = link.wires.ports[0];
        let ring = &mut link.wires.rings[0];
        let mut seen = 0;
        while seen < count && self.guest.now_ns() < until_ns {
            self.guest.take_pending(port);
            match ring.take(self.guest) {
                Ok(Some(response)) => {
                    tally.note(&response);
                    seen += 1;
                }
                Ok(None) => {
                    if !ring.final_check(self.guest).unwrap_or(false) {
                        let nap_ns = (self.guest.now_ns() + 100 * MS_NS).min(until_ns);
                        self.guest.sleep_until(&[port], nap_ns);
                    }
                }
                Err(_) => break,
            }
        }
        tally
    }

    /// Puts requests that must all be refused, and counts those that were not.
    ///
    /// # Errors
    /// When one is not answered.
    pub fn must_refuse(
        &mut self,
        link: &mut Link,
        requests: &[RawRequest],
    ) -> Result<Tally, String> {
        let mut sum = Tally::default();
        for batch in requests.chunks(16) {
            let put = self.put(link, batch);
            let tally = self.answers(link, put);
            if tally.okay + tally.errors + tally.unsupported < put {
                return Err("a request was never answered".to_string());
            }
            sum.tried += put;
            sum.errors += tally.errors;
            sum.unsupported += tally.unsupported;
            sum.served += tally.okay;
        }
        Ok(sum)
    }

    /// An honest write and read: the disk is served as if nothing had happened.
    ///
    /// # Errors
    /// When it is not.
    pub fn is_served(&mut self) -> Result<(), String> {
        let mut stage = Stage { guest: self.guest, xs: self.xs, disk: self.disk, generation: 1 };
        stage.is_alive()
    }

    /// Random bytes.
    pub fn noise(&mut self, into: &mut [u8]) {
        for part in into.chunks_mut(8) {
            let bits = self.random.bits().to_le_bytes();
            part.copy_from_slice(&bits[..part.len()]);
        }
    }

    /// Frees several pages.
    ///
    /// # Errors
    /// When the backend keeps one.
    pub fn free_all(&mut self, pages: Vec<Page>) -> Result<(), String> {
        pages.into_iter().try_for_each(|page| self.free(page))
    }
}
