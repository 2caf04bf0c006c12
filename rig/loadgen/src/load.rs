//! Load: as many blocks under way as asked for, on every ring of every disk, until the time is up.
//!
//! Blocks of one run never overlap while they are under way, so that what a sector must hold is
//! always known. A run that verifies ends with a new connection and a look at every sector.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use platter_xen::Port;
use platter_xen::blkif::SEGMENTS_DIRECT_MAX;

use crate::front::{CONNECTED, Disk, Link, connect, disconnect};
use crate::guest::{Guest, MS_NS, SECOND_NS};
use crate::lane::Lane;
use crate::options::Options;
use crate::pool::{Pool, PoolShape};
use crate::report::Report;
use crate::stamp::Model;
use crate::xs::XenStore;

/// How long the last answers may take.
const LAST_NS: u64 = 30 * SECOND_NS;
/// A sleep that an event should end, in case it was lost: it is counted then.
const NAP_NS: u64 = SECOND_NS;
/// Segments that a request of ours has at most.
const SEGMENTS_MAX: usize = 256;

/// One pass over a disk.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    pub random: bool,
    pub read_percent: u64,
    /// Commands among the blocks; only the run proper has them.
    pub commands: bool,
    /// Every block once instead of for a time.
    pub once: bool,
    /// Unknown sectors must name themselves or be zero.
    pub strict: bool,
}

/// A disk and what we know of it.
pub struct Unit {
    pub disk: Disk,
    link: Option<Link>,
    pool: Option<Pool>,
    model: Option<Model>,
}

/// All disks of the domain, from run to run.
pub struct Session {
    pub units: Vec<Unit>,
}

impl Session {
    /// Finds the disks.
    pub fn new<G: Guest>(guest: &mut G, xs: &mut XenStore) -> Session {
        let unit = |disk| Unit { disk, link: None, pool: None, model: None };
        Session { units: Disk::all(guest, xs).into_iter().map(unit).collect() }
    }

    /// Runs on the disks that `options` names, all at once; a report for each.
    ///
    /// # Errors
    /// A sentence, when a disk cannot be had.
    pub fn run<G: Guest>(
        &mut self,
        guest: &mut G,
        xs: &mut XenStore,
        options: &Options,
    ) -> Result<Vec<(String, Report)>, String> {
        let wanted =
            |unit: &&mut Unit| options.disks.is_empty() || options.disks.contains(&unit.disk.vdev);
        let mut units: Vec<&mut Unit> = self.units.iter_mut().filter(wanted).collect();
        if units.is_empty() || units.len() < options.disks.len() {
            return Err(format!("no such disk: {:?}", options.disks));
        }
        for unit in &mut units {
            unit.prepare(guest, xs, options)?;
        }
        let main = Pass {
            random: options.random,
            read_percent: options.read_percent,
            commands: true,
            once: options.check,
            strict: options.check,
        };
        let fill = Pass { random: false, read_percent: 0, commands: false, once: true, ..main };
        let mut others = Vec::new();
        if options.fill {
            others.push(pass(guest, xs, &mut units, options, fill)?);
        }
        let mut reports = pass(guest, xs, &mut units, options, main)?;
        if options.verify {
            for unit in &mut units {
                unit.close(guest, xs)?;
                unit.prepare(guest, xs, options)?;
            }
            let back = Pass { read_percent: 100, ..fill };
            others.push(pass(guest, xs, &mut units, options, back)?);
        }
        for other in &others {
            reports.iter_mut().zip(other).for_each(|(report, other)| report.blame(other));
        }
        let names = units.iter().map(|unit| unit.disk.vdev.clone());
        Ok(names.zip(reports).collect())
    }

    /// Closes every disk; nothing of ours may be mapped then.
    ///
    /// # Errors
    /// The first that fails.
    pub fn close<G: Guest>(&mut self, guest: &mut G, xs: &mut XenStore) -> Result<(), String> {
        self.units.iter_mut().try_for_each(|unit| unit.close(guest, xs))
    }
}

impl Unit {
    /// Connects in the right shape, with buffers for the load.
    fn prepare<G: Guest>(
        &mut self,
        guest: &mut G,
        xs: &mut XenStore,
        options: &Options,
    ) -> Result<(), String> {
        if let Some(link) = &self.link {
            let fitting = self.disk.fitting(guest, xs, options.shape);
            if link.wires.shape != fitting {
                self.close(guest, xs)?;
            }
        }
        if self.link.is_none() {
            self.link = Some(connect(guest, xs, &self.disk, options.shape)?);
        }
        let Some(link) = &self.link else { return Ok(()) };
        let offered = usize::from(link.nodes.indirect_segments_max);
        let indirect = options.indirect && offered > 0;
        let pages = (options.block_bytes as usize).div_ceil(4096);
        let segments_max = match offered {
            more if indirect || pages > SEGMENTS_DIRECT_MAX && more > SEGMENTS_DIRECT_MAX => {
                more.min(SEGMENTS_MAX)
            }
            _ => SEGMENTS_DIRECT_MAX,
        };
        let shape = PoolShape {
            to: self.disk.back_id,
            slots: options.depth,
            block_bytes: options.block_bytes,
            segments_max,
            indirect,
        };
        if self.pool.as_ref().is_none_or(|pool| pool.shape != shape) {
            if self.pool.take().is_some_and(|pool| !pool.free(guest)) {
                return Err(format!("{}: the backend keeps our pages", self.disk.vdev));
            }
            self.pool = Some(Pool::make(guest, shape)?);
        }
        if (options.verify || options.check) && self.model.is_none() {
            let sectors = link.nodes.sectors.min(options.range_bytes / 512);
            self.model = Some(Model::new(sectors as usize));
        }
        Ok(())
    }

    fn close<G: Guest>(&mut self, guest: &mut G, xs: &mut XenStore) -> Result<(), String> {
        match self.link.take() {
            Some(link) => disconnect(guest, xs, &self.disk, link),
            None => Ok(()),
        }
    }

    /// `None` before [`prepare`](Self::prepare).
    fn lane<'a>(&'a mut self, options: &'a Options, pass: Pass, now_ns: u64) -> Option<Lane<'a>> {
        let (link, pool) = (self.link.as_mut()?, self.pool.as_ref()?);
        // What is not verified needs no model, and what is written then voids the one there is.
        if !options.verify && !options.check {
            self.model = None;
        }
        Some(Lane::new(link, pool, self.model.as_mut(), options, pass, now_ns))
    }
}

/// One pass over all disks at once.
fn pass<G: Guest>(
    guest: &mut G,
    xs: &mut XenStore,
    units: &mut [&mut Unit],
    options: &Options,
    pass: Pass,
) -> Result<Vec<Report>, String> {
    let disks: Vec<Disk> = units.iter().map(|unit| unit.disk.clone()).collect();
    let start_ns = guest.now_ns();
    let lanes = units.iter_mut().map(|unit| unit.lane(options, pass, start_ns));
    let mut lanes: Vec<Lane> = lanes.collect::<Option<_>>().ok_or("a disk is not connected")?;
    let mut ports: Vec<Port> = lanes.iter().flat_map(|lane| lane.ports()).collect();
    ports.push(xs.port());
    let mut heard_ns = start_ns;
    loop {
        ports.iter().for_each(|port| {
            if *port != xs.port() {
                guest.take_pending(*port);
            }
        });
        let went_on = lanes.iter_mut().fold(false, |any, lane| lane.turn(guest) | any);
        let now_ns = guest.now_ns();
        if went_on {
            heard_ns = now_ns;
            continue;
        }
        if lanes.iter().all(|lane| lane.is_done()) {
            break;
        }
        if now_ns > heard_ns + LAST_NS {
            lanes.iter_mut().for_each(Lane::give_up);
            break;
        }
        if xs.take_change(guest) {
            for disk in &disks {
                let state = disk.back_state(guest, xs);
                if state != Some(CONNECTED) {
                    return Err(format!("{}: the backend went to {state:?}", disk.vdev));
                }
            }
        }
        if !lanes.iter_mut().fold(false, |any, lane| lane.look_again(guest) | any) {
            guest.sleep_until(&ports, now_ns + NAP_NS);
        }
    }
    let reports: Vec<Report> = lanes.into_iter().map(|lane| lane.finish(guest)).collect();
    if !pass.commands {
        let ms = (guest.now_ns() - start_ns) / MS_NS;
        log::info!("pass percent={} once={} ms={ms}", pass.read_percent, pass.once);
    }
    Ok(reports)
}
