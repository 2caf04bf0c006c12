//! The same operations by platter on one copy and by QEMU on another, then each continues on
//! the image the other wrote; between rounds the images are resized, get overlays, are committed
//! and get internal snapshots. After every round all four readings must agree, with those of
//! other authors' readers where there are any; qemu-img check must find platter's image sound,
//! and platter's check QEMU's.
//!
//! Would miss: what QEMU gets wrong too or cannot do at all (VHD chains, VHDX and VDI
//! differencing, seSparse: the engine's own tests ask other readers there), and crashes (see
//! powercut).

use std::sync::Arc;

use platter_image::Access;
use platter_tool::buffer::Buffer;
use platter_tool::engine::Engine;
use platter_tool::flight::Flight;
use platter_tool::medium::DiskFolder;

use crate::between::{Past, change};
use crate::cases::{Case, Check, Scratch};
use crate::model::{BACKING, INITIAL, Kind, SECTOR, ZERO};
use crate::rng::Rng;
use crate::run::{check, pick_range, seed_options};
use crate::{readers, run};

/// One operation of both sides; writes fill with one byte, as qemu-io does.
struct Step {
    kind: Kind,
    sector: u64,
    count: u64,
    pattern: u8,
}

fn pick_steps(rng: &mut Rng, case: &Case, copies: &[Copy], first_pattern: u8) -> Vec<Step> {
    let sectors = copies[0].model.sets.len() as u64;
    let over = copies.iter().any(|copy| copy.model.backing.is_some());
    let count = 4 + rng.below(9) as u8;
    let steps = (0..count).map(|at| {
        let (sector, count) = pick_range(rng, case.unit, sectors);
        let kinds = [Kind::Write, Kind::Write, Kind::Write, Kind::Zero, Kind::Discard, Kind::Flush];
        let mut kind = rng.pick(&kinds);
        if kind == Kind::Zero && case.format == "qed" && over {
            // QEMU fills a zero cluster that it writes in part with the base's bytes.
            kind = Kind::Write;
        }
        Step { kind, sector, count, pattern: first_pattern + at }
    });
    steps.collect()
}

/// By platter, every second seed past the page cache, with several writes in flight.
fn by_platter(case: &Case, scratch: &Scratch, top: &str, steps: &[Step], seed: u64) {
    let folder = DiskFolder::new(&scratch.path);
    let (folder, depth) = if seed.is_multiple_of(2) { (folder.direct(), 5) } else { (folder, 1) };
    let options = seed_options(case, seed, Access::ReadWrite);
    let engine = Engine::open(&folder, top, options);
    let engine = engine.unwrap_or_else(|fault| panic!("opening: {fault}"));
    let mut flight = Flight::new(engine, depth);
    for step in steps {
        let Step { kind, sector, count, pattern } = *step;
        let result = match kind {
            Kind::Write => {
                let mut bytes = Buffer::new(count as usize * SECTOR);
                bytes.fill(pattern);
                let len = bytes.len();
                flight.write(sector, &Arc::new(bytes), (0, len))
            }
            Kind::Zero => flight.settle().and_then(|engine| engine.write_zeroes(sector, count)),
            Kind::Discard => flight.settle().and_then(|engine| engine.discard(sector, count)),
            Kind::Flush | Kind::Reopen | Kind::Grow => flight.settle().and_then(Engine::flush),
        };
        result.unwrap_or_else(|fault| panic!("{kind:?} {sector}+{count}: {fault}"));
    }
    let closed = flight.settle().and_then(Engine::finish);
    closed.unwrap_or_else(|fault| panic!("closing: {fault}"));
}

/// By QEMU, in one process.
fn by_qemu(case: &Case, scratch: &Scratch, top: &str, steps: &[Step]) {
    let commands: Vec<String> = steps
        .iter()
        .map(|step| {
            let (start, len) = (step.sector * SECTOR as u64, step.count * SECTOR as u64);
            match step.kind {
                Kind::Write => format!("write -P {} {start} {len}", step.pattern),
                Kind::Zero => format!("write -z {start} {len}"),
                Kind::Discard => format!("discard {start} {len}"),
                Kind::Flush | Kind::Reopen | Kind::Grow => String::from("flush"),
            }
        })
        .collect();
    let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
    scratch.qemu_io(case.qemu, top, &commands);
}

/// The disk's bytes as platter reads them, one request at a time and many at once.
fn read_by_platter(case: &Case, scratch: &Scratch, top: &str) -> Vec<u8> {
    let folder = DiskFolder::new(&scratch.path);
    let engine = Engine::open(&folder, top, seed_options(case, 1, Access::ReadOnly));
    let mut engine = engine.unwrap_or_else(|fault| panic!("opening read-only: {fault}"));
    let mut bytes = vec![0xee; engine.sectors() as usize * SECTOR];
    engine.read(0, &mut bytes).unwrap_or_else(|fault| panic!("reading: {fault}"));
    check(&mut engine, false, "of a closed image");
    // Not a multiple of any cluster, so that most requests cover parts of several.
    let piece = 75 * SECTOR;
    let mut flight = Flight::new(engine, 8);
    let hold = |tag: u64, read: &[u8]| {
        let at = tag as usize * piece;
        assert!(bytes[at..at + read.len()] == *read, "piece {tag} reads differently in flight");
    };
    for (tag, wanted) in bytes.chunks(piece).enumerate() {
        while !flight.has_room() {
            let read = flight.next_read().expect("reading").expect("there is no room");
            hold(read.tag, &read.bytes);
        }
        let (tag, sector) = (tag as u64, (tag * piece / SECTOR) as u64);
        let read = flight.read(tag, sector, Buffer::new(wanted.len()));
        if let Some(read) = read.expect("reading") {
            hold(tag, &read.bytes);
        }
    }
    while let Some(read) = flight.next_read().expect("reading") {
        hold(read.tag, &read.bytes);
    }
    bytes
}

/// What the sectors of one copy may read as: a set, and the last pattern written.
pub struct Model {
    pub sets: Vec<(u64, u8)>,
    pub initial: Vec<u8>,
    pub backing: Option<Vec<u8>>,
}

/// Bit of a set: the pattern written.
const WRITTEN: u64 = 8;

impl Model {
    /// A disk that is known to hold these bytes.
    pub fn new(initial: Vec<u8>, backing: Option<Vec<u8>>) -> Model {
        Model { sets: vec![(INITIAL, 0); initial.len() / SECTOR], initial, backing }
    }

    fn apply(&mut self, step: &Step) {
        let range = step.sector as usize..(step.sector + step.count) as usize;
        for (set, pattern) in &mut self.sets[range] {
            match step.kind {
                Kind::Write => (*set, *pattern) = (WRITTEN, step.pattern),
                Kind::Zero => *set = ZERO,
                Kind::Discard => *set |= ZERO | BACKING,
                Kind::Flush | Kind::Reopen | Kind::Grow => {}
            }
        }
    }

    fn hold(&self, who: &str, disk: &[u8]) {
        assert_eq!(disk.len() / SECTOR, self.sets.len(), "{who}: the disk's size");
        for (sector, bytes) in disk.chunks_exact(SECTOR).enumerate() {
            let (set, pattern) = self.sets[sector];
            let at = sector * SECTOR..(sector + 1) * SECTOR;
            let is = |disk: &Vec<u8>| disk.get(at.clone()).is_some_and(|old| old == bytes);
            let good = (set & INITIAL != 0 && is(&self.initial))
                || (set & ZERO != 0 && bytes.iter().all(|&b| b == 0))
                || (set & BACKING != 0 && self.backing.as_ref().is_some_and(is))
                || (set & WRITTEN != 0 && bytes.iter().all(|&b| b == pattern));
            let bytes = &bytes[..16];
            assert!(good, "{who}: sector {sector} holds {bytes:02x?}, not {set:#x} {pattern:#x}");
        }
    }
}

/// One of the two images under test.
pub struct Copy {
    pub scratch: Scratch,
    pub top: String,
    pub model: Model,
    pub past: Past,
}

fn try_seed(case: &Case, seed: u64) {
    if case.qemu.is_empty() {
        return;
    }
    let built = case.build();
    let mut rng = Rng::new(seed ^ 0x6469_6666);
    let mut copies = [0, 1].map(|_| Copy {
        scratch: Scratch::new(case.name),
        top: built.top.clone(),
        model: Model::new(built.initial.clone(), built.backing.clone()),
        past: Past::default(),
    });
    copies.iter().for_each(|copy| copy.scratch.write(&built.files));
    for round in 0..4 {
        // The copy of even rounds is the other's in odd ones.
        let ours = round % 2;
        if round > 0 {
            change(&mut rng, case, &mut copies, ours);
        }
        let steps = pick_steps(&mut rng, case, &copies, 40 + round as u8 * 16);
        by_platter(case, &copies[ours].scratch, &copies[ours].top, &steps, seed);
        by_qemu(case, &copies[1 - ours].scratch, &copies[1 - ours].top, &steps);
        for (at, copy) in copies.iter_mut().enumerate() {
            steps.iter().for_each(|step| copy.model.apply(step));
            let writer = if at == ours { "platter" } else { "QEMU" };
            hold_copy(case, copy, &format!("round {round}, {writer}'s {}", copy.top));
        }
    }
    copies.iter().for_each(|copy| copy.past.hold(&copy.scratch));
}

/// All readers agree on a copy, with each other and the model, and the checks are content. What
/// the disk holds is certain from then on.
fn hold_copy(case: &Case, copy: &mut Copy, who: &str) {
    let Copy { scratch, top, model, .. } = copy;
    let read = read_by_platter(case, scratch, top);
    model.hold(&format!("{who} read by platter"), &read);
    let read_qemu = scratch.read_by_qemu(case.qemu, top);
    assert!(read_qemu.get(..read.len()) == Some(&read), "{who}: QEMU reads something else");
    if case.check != Check::No {
        let (code, text) = scratch.qemu_check(case.qemu, top, false);
        assert!(code == 0, "{who}: qemu-img check says {code}: {text}");
    }
    // No reader knows what follows the end of a shorter base.
    let over = model.backing.is_some();
    let short = case.base.is_some_and(|(_, _, kib)| kib < case.size_kib);
    if !short && model.backing.as_ref().is_none_or(|base| base.len() == read.len()) {
        readers::hold(case, scratch, top, over, &read, who);
    }
    *model = Model::new(read, model.backing.take());
}

fn all(format: &str) {
    run::all(format, 2, "same", try_seed);
}

macro_rules! formats {
    ($($test:ident $format:literal)*) => {
        $(#[test]
        fn $test() {
            all($format);
        })*
    };
}

formats! {
    raw_same "raw"
    qcow2_same "qcow2"
    qcow_same "qcow"
    qed_same "qed"
    vhd_same "vhd"
    vhdx_same "vhdx"
    vmdk_same "vmdk"
    vdi_same "vdi"
}
