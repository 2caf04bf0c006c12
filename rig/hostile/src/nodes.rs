//! Attacks through xenstore: what a frontend may write about itself, and how fast.

use alloc::format;
use alloc::string::{String, ToString};

use platter_loadgen::Guest;
use platter_loadgen::front::{
    CLOSED, CLOSING, CONNECTED, INIT_WAIT, INITIALISED, INITIALISING, Shape, Wires,
};
use platter_loadgen::guest::{MS_NS, SECOND_NS};
use platter_xen::blkif::Abi;
use platter_xen::xenstore::Op;

use crate::ground::{Ground, PLAIN, Tally};

/// How long a backend may take to refuse what it is shown: nothing is to be seen when it does.
const REFUSAL_NS: u64 = SECOND_NS / 2;

/// Nodes that no frontend writes; each replaces a good one of a single-page, single-queue ring.
const NONSENSE: [(&str, &str); 22] = [
    ("protocol", "sparc-abi"),
    ("protocol", ""),
    ("ring-ref", "-1"),
    ("ring-ref", "0"),
    ("ring-ref", "4294967295"),
    ("ring-ref", "4294967296"),
    ("ring-ref", "99999999999999999999999999"),
    ("ring-ref", "8 "),
    ("ring-ref", "../../../0/name"),
    ("event-channel", "0"),
    ("event-channel", "4000000000"),
    ("event-channel", "1"),
    ("event-channel", "x"),
    ("ring-page-order", "5"),
    ("ring-page-order", "4"),
    ("ring-page-order", "18446744073709551615"),
    ("num-ring-pages", "3"),
    ("num-ring-pages", "0"),
    ("multi-queue-num-queues", "0"),
    ("multi-queue-num-queues", "2"),
    ("multi-queue-num-queues", "65536"),
    ("multi-queue-num-queues", "-2"),
];

/// One nonsense after another: none of them may connect.
pub fn nonsense<G: Guest>(ground: &mut Ground<'_, G>) -> Result<Tally, String> {
    let mut tally = Tally::default();
    for (key, value) in NONSENSE {
        tally.tried += 1;
        let connected = show_ring(ground, PLAIN, |ground, front| {
            let path = format!("{front}/{key}");
            ground.xs.write(ground.guest, &path, value.as_bytes()).ok();
        })?;
        if connected {
            log::warn!("connected with {key}={value:?}");
            tally.served += 1;
        }
        let path = format!("{}/{key}", ground.disk.front);
        ground.xs.remove(ground.guest, &path);
    }
    // A value as long as xenstore takes it, and one that is no text.
    for value in [&[b'1'; 2000][..], &[0xff, 0xfe, 0, 1]] {
        tally.tried += 1;
        let connected = show_ring(ground, PLAIN, |ground, front| {
            let path = format!("{front}/ring-ref");
            ground.xs.write(ground.guest, &path, value).ok();
        })?;
        tally.served += u64::from(connected);
    }
    // Two queues with one event channel: the second cannot be bound, the first must be undone.
    tally.tried += 1;
    let two = Shape { abi: Abi::X86_32, queues: 2, order: 2 };
    let connected = show_ring(ground, two, |ground, front| {
        let port = ground.xs.read(ground.guest, &format!("{front}/queue-0/event-channel"));
        let path = format!("{front}/queue-1/event-channel");
        ground.xs.write(ground.guest, &path, port.unwrap_or_default().as_bytes()).ok();
    })?;
    tally.served += u64::from(connected);
    Ok(tally)
}

/// Shows rings, spoilt by `spoil`; whether the backend connected to them. Closes again.
fn show_ring<G: Guest>(
    ground: &mut Ground<'_, G>,
    shape: Shape,
    spoil: impl FnOnce(&mut Ground<'_, G>, &str),
) -> Result<bool, String> {
    ground.wait(&[INIT_WAIT])?;
    let wires = Wires::make(ground.guest, ground.disk.back_id, shape)?;
    let front = ground.disk.front.clone();
    ground.disk.describe(ground.guest, ground.xs, &wires);
    spoil(ground, &front);
    ground.show(INITIALISED);
    let states = [CONNECTED];
    let connected = ground.disk.wait_for(ground.guest, ground.xs, &states, REFUSAL_NS).is_ok();
    ground.show(CLOSED);
    ground.wait(&[CLOSED, 0])?;
    ground.disk.forget(ground.guest, ground.xs, &wires, false);
    let ours = wires.free(ground.guest);
    ground.show(INITIALISING);
    if ours { Ok(connected) } else { Err("a ring of a refused frontend is kept".to_string()) }
}

/// Our own state and other nodes of our directory, written as fast as xenstored takes it
/// (XSA-349).
pub fn storm<G: Guest>(ground: &mut Ground<'_, G>) -> Result<Tally, String> {
    let mut tally = Tally::default();
    let link = ground.open(PLAIN)?;
    let state = format!("{}/state", ground.disk.front);
    let until_ns = ground.guest.now_ns() + ground.attack_ns;
    while ground.guest.now_ns() < until_ns {
        for _ in 0..8 {
            let op = Op::Write { path: &state, value: b"4" };
            ground.xs.send(ground.guest, op).ok();
        }
        let name = format!("{}/storm-{}", ground.disk.front, ground.random.below(64));
        ground.xs.send(ground.guest, Op::Write { path: &name, value: &[b'x'; 512] }).ok();
        tally.tried += 9;
    }
    for number in 0..64 {
        ground.xs.remove(ground.guest, &format!("{}/storm-{number}", ground.disk.front));
    }
    ground.leave(link)?;
    Ok(tally)
}

/// The backend may not read our nodes any more; then they are gone; then they are back.
pub fn hidden<G: Guest>(ground: &mut Ground<'_, G>) -> Result<Tally, String> {
    let mut tally = Tally::default();
    let state = format!("{}/state", ground.disk.front);
    let own = format!("n{}", ground.own.0);
    let reader = format!("r{}", ground.disk.back_id.0);
    let both: [&str; 2] = [&own, &reader];
    let link = ground.open(PLAIN)?;
    ground.xs.ask(ground.guest, Op::SetPerms { path: &state, perms: &both[..1] }).ok();
    ground.show(CONNECTED);
    tally.closed += u64::from(ground.is_closed_within(ground.attack_ns));
    ground.xs.ask(ground.guest, Op::SetPerms { path: &state, perms: &both }).ok();
    tally.tried += 1;
    ground.leave(link)?;
    let link = ground.open(PLAIN)?;
    ground.xs.remove(ground.guest, &state);
    tally.closed += u64::from(ground.is_closed_within(ground.attack_ns));
    tally.tried += 1;
    ground.show(CLOSED);
    ground.xs.ask(ground.guest, Op::SetPerms { path: &state, perms: &both }).ok();
    ground.leave(link)?;
    Ok(tally)
}

/// States in no order at all, and what is no state.
pub fn flap<G: Guest>(ground: &mut Ground<'_, G>) -> Result<Tally, String> {
    let mut tally = Tally::default();
    let wires = Wires::make(ground.guest, ground.disk.back_id, PLAIN)?;
    ground.disk.describe(ground.guest, ground.xs, &wires);
    let state = format!("{}/state", ground.disk.front);
    let words: [&[u8]; 6] = [b"", b"44", b"-1", b" 4", b"4\n", &[b'4'; 2000]];
    let until_ns = ground.guest.now_ns() + ground.attack_ns;
    while ground.guest.now_ns() < until_ns {
        let digit = [b'0' + ground.random.below(9) as u8];
        let value = match ground.random.below(12) {
            index if (index as usize) < words.len() => words[index as usize],
            _ => &digit[..],
        };
        ground.xs.send(ground.guest, Op::Write { path: &state, value }).ok();
        tally.tried += 1;
        if ground.random.below(4) == 0 {
            // Long enough for the backend to act on one.
            let nap_ns = ground.guest.now_ns() + ground.random.below(60) * MS_NS;
            ground.guest.sleep_until(&[], nap_ns);
        }
    }
    settle(ground, wires)?;
    Ok(tally)
}

/// Opens and closes without ever waiting for the backend (XSA-350).
pub fn churn<G: Guest>(ground: &mut Ground<'_, G>) -> Result<Tally, String> {
    let mut tally = Tally::default();
    let wires = Wires::make(ground.guest, ground.disk.back_id, PLAIN)?;
    ground.disk.describe(ground.guest, ground.xs, &wires);
    let state = format!("{}/state", ground.disk.front);
    let until_ns = ground.guest.now_ns() + ground.attack_ns;
    while ground.guest.now_ns() < until_ns {
        for step in [INITIALISING, INITIALISED, CONNECTED, CLOSING, CLOSED] {
            let value = [b'0' + step];
            ground.xs.send(ground.guest, Op::Write { path: &state, value: &value }).ok();
        }
        tally.tried += 1;
        let nap_ns = ground.guest.now_ns() + ground.random.below(30) * MS_NS;
        ground.guest.sleep_until(&[], nap_ns);
    }
    settle(ground, wires)?;
    Ok(tally)
}

/// From any state to a fresh start; the rings must be ours again.
fn settle<G: Guest>(ground: &mut Ground<'_, G>, wires: Wires) -> Result<(), String> {
    ground.show(CLOSED);
    ground.wait(&[CLOSED, 0])?;
    ground.disk.forget(ground.guest, ground.xs, &wires, false);
    ground.show(INITIALISING);
    ground.wait(&[INIT_WAIT])?;
    if wires.free(ground.guest) { Ok(()) } else { Err("a ring is kept".to_string()) }
}
