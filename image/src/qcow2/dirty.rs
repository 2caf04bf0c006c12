//! A dirty image (lazy refcounts, and a writer that ended early), before it is written: its
//! refcounts are made right, by the check.
//!
//! Order guarded as for a repair. It must never keep the caller for long: it stops after a bounded
//! number of steps, so that others are served, and goes on where it was. What is not sound after it
//! stays dirty, and writes are refused.

use crate::check::{CheckParams, CheckProgress, Repair};
use crate::format::Ctx;
use crate::types::{Step, Stop};

use super::Qcow2;
use super::header::{INCOMPATIBLE_CORRUPT, INCOMPATIBLE_DIRTY};

/// Memory for it, or less where there is less; given back after it (ours).
const REBUILD_BYTES: usize = 1 << 20;
/// Steps of the check in one call (ours: some milliseconds).
const STEPS_AT_ONCE: usize = 32;

impl Qcow2 {
    pub(super) fn rebuild(&mut self, ctx: &mut Ctx) -> Step<()> {
        let dirty = self.header.incompatible & INCOMPATIBLE_DIRTY != 0;
        let corrupt = self.header.incompatible & INCOMPATIBLE_CORRUPT != 0;
        if self.writer.is_none() || !dirty || corrupt || self.rebuilt {
            return Ok(());
        }
        if self.checker.is_none() {
            let params = CheckParams { repair: Repair::All, budget_bytes: REBUILD_BYTES };
            self.begin_check(ctx, params, false)?;
        }
        for _ in 0..STEPS_AT_ONCE {
            if let CheckProgress::Done(_) = self.step_check(ctx)? {
                self.rebuilt = true;
                return if ctx.meta.is_dirty() { Err(Stop::NeedFlush) } else { Ok(()) };
            }
        }
        // The flush is what the caller waits for while others have their turn.
        Err(Stop::NeedFlush)
    }
}
