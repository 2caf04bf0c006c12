//! Every format against foreign tools and against the power switch.
//!
//! Environment, for more than the bounded set: `PLATTER_SEEDS=n` seeds for each case,
//! `PLATTER_SEED=n` that seed alone or those of `5..90`, `PLATTER_CASE=text` only the cases whose
//! name holds it, `PLATTER_CUTS=n` power cuts tried for each seed, `PLATTER_QEMU=n` of a thousand
//! cuts judged by QEMU too. A failure prints the three that reproduce it.
//! Readers of other authors are asked too if `make readers` has installed them.

mod between;
mod cases;
mod differential;
mod juggle;
mod model;
mod pages;
mod powercut;
mod readers;
mod rng;
mod run;
