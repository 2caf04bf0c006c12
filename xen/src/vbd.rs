//! The xenstore nodes of a block device, both ends: what a backend publishes, what a frontend
//! asks for, and the reverse for frontends of our own.
//!
//! Guards that hostile strings become numbers within our limits before any of them names a
//! grant or a port. Names and meanings: Xen public/io/blkif.h. Reading goes in two rounds
//! because the first answers say which nodes there are: [`FIRST_KEYS`] → [`Layout::parse`] →
//! [`Layout::keys`] → [`Layout::connect`]. Must never: read a node that the layout does not
//! name (queue directories of an earlier kernel may still lie there).

use alloc::format;
use alloc::string::{String, ToString};

use crate::blkif::{Abi, SECTOR_BYTES};
use crate::ring::RING_PAGES_MAX;
use crate::xenstore::decimal;
use crate::{Gref, Port};

/// The most queues of a disk whose nodes can be named; a backend may serve fewer.
pub const QUEUES_MAX: usize = 8;

/// What a backend says about a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DiskNodes {
    /// Size in 512-byte sectors, whatever `sector_bytes` is.
    pub sectors: u64,
    /// The smallest unit a request may have.
    pub sector_bytes: u32,
    /// What is good for speed; left out when it equals `sector_bytes`.
    pub physical_sector_bytes: u32,
    /// [`crate::blkif::info`].
    pub info: u32,
    /// FLUSH_DISKCACHE works.
    pub flush: bool,
    /// WRITE_BARRIER works; with it and without `flush`, an empty barrier flushes.
    pub barrier: bool,
    /// DISCARD works, in units of so many bytes.
    pub discard_granularity_bytes: Option<u32>,
    /// Where the first such unit begins.
    pub discard_alignment_bytes: u32,
    /// 0: no indirect requests.
    pub indirect_segments_max: u16,
    /// 1: no multi-queue.
    pub queues_max: u32,
    /// 0: single-page rings only.
    pub ring_page_order_max: u32,
}

impl DiskNodes {
    /// All nodes but `state`, few as each counts against the domain's quota. Written before
    /// InitWait: Linux reads limits there and the rest at Connected; nothing differs between.
    pub fn nodes(&self) -> alloc::vec::Vec<(&'static str, String)> {
        let mut nodes = alloc::vec::Vec::from([
            ("sectors", self.sectors.to_string()),
            ("sector-size", self.sector_bytes.to_string()),
            ("info", self.info.to_string()),
        ]);
        let mut number = |name, value: u32| nodes.push((name, value.to_string()));
        if self.physical_sector_bytes != self.sector_bytes {
            number("physical-sector-size", self.physical_sector_bytes);
        }
        if self.flush {
            number("feature-flush-cache", 1);
        }
        if self.barrier {
            number("feature-barrier", 1);
        }
        if let Some(granularity) = self.discard_granularity_bytes {
            // Granularity and alignment: both or neither (blkif.h note 4).
            number("feature-discard", 1);
            number("discard-granularity", granularity);
            number("discard-alignment", self.discard_alignment_bytes);
        }
        if self.indirect_segments_max > 0 {
            number("feature-max-indirect-segments", u32::from(self.indirect_segments_max));
        }
        if self.queues_max > 1 {
            number("multi-queue-max-queues", self.queues_max);
        }
        if self.ring_page_order_max > 0 {
            number("max-ring-page-order", self.ring_page_order_max);
        }
        nodes
    }
}

/// The frontend's nodes that say which others there are.
pub const FIRST_KEYS: [&str; 4] =
    ["protocol", "multi-queue-num-queues", "ring-page-order", "num-ring-pages"];

/// Why a frontend cannot be connected.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ConnectFault {
    /// A word in `protocol` that we do not know.
    Protocol,
    /// `multi-queue-num-queues` is 0, above what we offer, or no number.
    Queues,
    /// `ring-page-order` or `num-ring-pages` is above what we offer, or no number.
    RingOrder,
    /// A ring reference is missing or no number.
    RingRef,
    /// An event channel is missing, 0 or no number.
    EventChannel,
}

impl ConnectFault {
    /// For the console and the counters.
    pub const fn name(self) -> &'static str {
        match self {
            ConnectFault::Protocol => "protocol",
            ConnectFault::Queues => "queues",
            ConnectFault::RingOrder => "ring-order",
            ConnectFault::RingRef => "ring-ref",
            ConnectFault::EventChannel => "event-channel",
        }
    }
}

/// Which nodes describe the rings.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    pub abi: Abi,
    /// Queues, 1 to [`QUEUES_MAX`].
    pub queues: usize,
    /// Pages of each ring, a power of two up to 16.
    pub pages: usize,
    /// The references are numbered (`ring-ref%u`).
    numbered: bool,
}

/// One ring to map and the channel that serves it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Queue {
    /// In order; 1 to 16, a power of two.
    pub grefs: heapless::Vec<Gref, RING_PAGES_MAX>,
    pub port: Port,
}

/// What a frontend asks for, proved.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Connect {
    pub abi: Abi,
    pub queues: heapless::Vec<Queue, QUEUES_MAX>,
}

impl Layout {
    /// From the values of [`FIRST_KEYS`], `None` where a node is missing, against what the
    /// disk's nodes offered.
    pub fn parse(
        values: [Option<&[u8]>; 4],
        queues_max: u32,
        ring_page_order_max: u32,
    ) -> Result<Layout, ConnectFault> {
        let [protocol, queues, order, pages] = values;
        let abi = Abi::from_protocol(protocol).ok_or(ConnectFault::Protocol)?;
        let queues = match queues {
            None => 1,
            Some(text) => decimal(text)
                .filter(|queues| (1..=u64::from(queues_max)).contains(queues))
                .filter(|queues| *queues <= QUEUES_MAX as u64)
                .ok_or(ConnectFault::Queues)?,
        };
        let pages_max = (1u64 << ring_page_order_max).min(RING_PAGES_MAX as u64);
        let pages_wanted = match (order, pages) {
            (None, None) => Some(1),
            (Some(text), _) => decimal(text).filter(|order| *order <= 4).map(|order| 1u64 << order),
            // XenServer's older name, a count.
            (None, Some(text)) => decimal(text).filter(|pages| pages.is_power_of_two()),
        };
        let pages =
            pages_wanted.filter(|pages| *pages <= pages_max).ok_or(ConnectFault::RingOrder)?;
        Ok(Layout {
            abi,
            queues: queues as usize,
            pages: pages as usize,
            numbered: order.is_some() || pages > 1,
        })
    }

    /// Nodes of one queue, in the order of [`keys`](Self::keys).
    fn keys_per_queue(&self) -> usize {
        // A single page may be named either way (blkback looks for both).
        if self.pages == 1 { 3 } else { self.pages + 1 }
    }

    /// The nodes to read next, below the frontend's directory.
    pub fn keys(&self) -> alloc::vec::Vec<String> {
        let mut keys = alloc::vec::Vec::with_capacity(self.queues * self.keys_per_queue());
        for queue in 0..self.queues {
            // One queue lies in the directory itself, also when it was asked for by number.
            let prefix = if self.queues == 1 { String::new() } else { format!("queue-{queue}/") };
            keys.push(format!("{prefix}event-channel"));
            if self.pages == 1 {
                keys.push(format!("{prefix}ring-ref"));
                keys.push(format!("{prefix}ring-ref0"));
            } else {
                (0..self.pages).for_each(|page| keys.push(format!("{prefix}ring-ref{page}")));
            }
        }
        keys
    }

    /// From the values of [`keys`](Self::keys), one for each, `None` where a node is missing.
    pub fn connect<V: AsRef<[u8]>>(&self, values: &[Option<V>]) -> Result<Connect, ConnectFault> {
        assert!(values.len() == self.queues * self.keys_per_queue(), "a value for each key");
        let mut queues = heapless::Vec::new();
        for values in values.chunks_exact(self.keys_per_queue()) {
            let port = number(&values[0]).filter(|port| *port != 0);
            let port = Port(port.ok_or(ConnectFault::EventChannel)?);
            let mut grefs = heapless::Vec::new();
            let mut push = |value| {
                let gref = number(value).ok_or(ConnectFault::RingRef)?;
                grefs.push(Gref(gref)).map_err(|_| ConnectFault::RingRef)
            };
            if self.pages == 1 {
                let (plain, zero) = (&values[1], &values[2]);
                let zero_first = self.numbered && zero.is_some() || plain.is_none();
                push(if zero_first { zero } else { plain })?;
            } else {
                values[1..].iter().try_for_each(push)?;
            }
            queues.push(Queue { grefs, port }).map_err(|_| ConnectFault::Queues)?;
        }
        Ok(Connect { abi: self.abi, queues })
    }
}

fn number<V: AsRef<[u8]>>(value: &Option<V>) -> Option<u32> {
    decimal(value.as_ref()?.as_ref()).and_then(|number| u32::try_from(number).ok())
}

/// For frontends: the nodes to write below our own directory before Initialised.
pub fn front_nodes(connect: &Connect) -> alloc::vec::Vec<(String, String)> {
    let mut nodes = alloc::vec::Vec::new();
    nodes.push((String::from("protocol"), String::from(connect.abi.protocol())));
    let many = connect.queues.len() > 1;
    if many {
        nodes.push((String::from("multi-queue-num-queues"), connect.queues.len().to_string()));
    }
    let pages = connect.queues.first().map_or(1, |queue| queue.grefs.len());
    if pages > 1 {
        nodes.push((String::from("ring-page-order"), pages.ilog2().to_string()));
    }
    for (index, queue) in connect.queues.iter().enumerate() {
        let prefix = if many { format!("queue-{index}/") } else { String::new() };
        nodes.push((format!("{prefix}event-channel"), queue.port.0.to_string()));
        for (page, gref) in queue.grefs.iter().enumerate() {
            let number = if pages > 1 { page.to_string() } else { String::new() };
            nodes.push((format!("{prefix}ring-ref{number}"), gref.0.to_string()));
        }
    }
    nodes
}

/// For frontends: the backend's nodes, to be read once it shows Connected (the limits also at
/// InitWait).
pub const BACK_KEYS: [&str; 12] = [
    "sectors",
    "sector-size",
    "physical-sector-size",
    "info",
    "feature-flush-cache",
    "feature-discard",
    "discard-granularity",
    "feature-max-indirect-segments",
    "multi-queue-max-queues",
    "max-ring-page-order",
    "feature-barrier",
    "discard-alignment",
];

/// Why a backend's nodes are of no use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BackFault {
    /// `sectors` is missing or no number.
    Sectors,
    /// `sector-size` is missing or not a power of two from 512 to 4096.
    SectorSize,
    /// `info` is missing or no number.
    Info,
}

impl DiskNodes {
    /// For frontends: from the values of [`BACK_KEYS`]. Optional nodes that are nonsense count
    /// as missing.
    pub fn parse<V: AsRef<[u8]>>(values: &[Option<V>; 12]) -> Result<DiskNodes, BackFault> {
        let optional = |index: usize| number(&values[index]).unwrap_or(0);
        let sectors = values[0].as_ref().and_then(|text| decimal(text.as_ref()));
        let sector_bytes = number(&values[1])
            .filter(|bytes| bytes.is_power_of_two() && (SECTOR_BYTES..=4096).contains(bytes))
            .ok_or(BackFault::SectorSize)?;
        Ok(DiskNodes {
            sectors: sectors.ok_or(BackFault::Sectors)?,
            sector_bytes,
            physical_sector_bytes: number(&values[2]).unwrap_or(sector_bytes),
            info: number(&values[3]).ok_or(BackFault::Info)?,
            flush: optional(4) == 1,
            barrier: optional(10) == 1,
            discard_alignment_bytes: optional(11),
            discard_granularity_bytes: (optional(5) == 1)
                .then(|| number(&values[6]).filter(|bytes| *bytes > 0).unwrap_or(sector_bytes)),
            indirect_segments_max: optional(7).min(u32::from(u16::MAX)) as u16,
            queues_max: optional(8).clamp(1, QUEUES_MAX as u32),
            ring_page_order_max: optional(9).min(crate::ring::RING_PAGE_ORDER_MAX),
        })
    }
}

#[cfg(test)]
#[path = "vbd_tests.rs"]
mod tests;
