//! Clusters that count as used before anything is in them, and how they are given back: one for an
//! L2 table where there is no room for it and its data in a row, and those of a longer L1 table.
//!
//! Order guarded: nothing points at them, so they may be given back at once. It must never keep
//! what another request could have had: whoever finds no room gives the spare cluster back.

use crate::fault::FaultKind;
use crate::format::Ctx;
use crate::types::{Step, Stop};

use super::Qcow2;
use super::refcount::{Job, Run};
use super::write::Writer;

/// A cluster for the next new L2 table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Spare {
    None,
    /// No two clusters in a row are free: one is looked for.
    Wanted,
    /// It counts as used.
    Taken(u64),
}

impl Spare {
    pub fn cluster(self) -> Option<u64> {
        if let Spare::Taken(cluster) = self { Some(cluster) } else { None }
    }
}

impl Writer {
    /// Gives the spare cluster back; was there one? There is room for it among the frees.
    fn give_up_spare(&mut self) -> bool {
        let spare = core::mem::replace(&mut self.spare, Spare::None).cluster();
        spare.into_iter().for_each(|cluster| self.space.frees.push(cluster, 1, true));
        spare.is_some()
    }
}

impl Qcow2 {
    /// Free clusters for a plan: for data, and before them for a new L2 table unless there is a
    /// spare one.
    pub(super) fn find_for_plan(&mut self, ctx: &mut Ctx, new_l2: bool, data: u64) -> Step<Run> {
        if new_l2 && self.writer().spare == Spare::Wanted {
            self.take_spare(ctx)?;
        }
        let table = u64::from(new_l2 && self.writer().spare.cluster().is_none());
        let needed = table + data;
        let found = self.find_run(ctx, needed, needed.min(1 + table));
        match found {
            Err(Stop::Fault(fault)) if fault.kind == FaultKind::Full => {
                if table == 1 && data > 0 {
                    self.writer_mut().spare = Spare::Wanted;
                    return self.find_for_plan(ctx, new_l2, data);
                }
                // Without a new table the spare cluster is what there is room for.
                let given = self.writer_mut().give_up_spare();
                Err(if given && !new_l2 { Stop::NeedFlush } else { fault.into() })
            }
            found => found,
        }
    }

    fn take_spare(&mut self, ctx: &mut Ctx) -> Step<()> {
        let found = self.find_run(ctx, 1, 1);
        if let Err(Stop::Fault(_)) = found {
            self.writer_mut().spare = Spare::None;
        }
        let run = found?;
        ctx.meta.reserve(self.file, self.run_place(run))?;
        self.take_run(ctx, run);
        self.writer_mut().spare = Spare::Taken(run.first);
        Ok(())
    }

    /// A growth came to nothing, or the image is closed in the middle of one: its clusters are
    /// given back. There is room for them among the frees.
    pub(super) fn give_up_growth(&mut self) {
        let writer = self.writer_mut();
        if let Some((first, clusters)) = writer.growth.take().map(|growth| growth.place()) {
            writer.space.frees.push(first, clusters, true);
        }
    }

    /// Gives back all that lost its reference or never had one, before the image is closed.
    pub(super) fn finish_unused(&mut self, ctx: &mut Ctx) -> Step<()> {
        self.finish_frees(ctx)?;
        if self.writer.is_none() {
            return Ok(());
        }
        if let Job::Row { .. } = self.writer().space.job {
            // Its blocks may be named already, and count what it takes.
            self.run_job(ctx)?;
        }
        self.writer_mut().give_up_spare();
        self.give_up_growth();
        self.finish_frees(ctx)
    }
}
