//! What the image targets share: one image file of any bytes is opened, read, written, flushed,
//! discarded, checked, made longer, opened again and repaired; its snapshots are listed, and it is
//! gone through as an overlay that is committed. Nothing may panic, whatever it says; what was
//! written must be read back as long as the image takes writes.

pub mod disks;
#[path = "../../xen/src/fake.rs"]
#[allow(dead_code, reason = "unit tests call more of it")]
mod fake;
pub mod ninep;
pub mod nvme;
mod sparse;
pub mod vhdx;
pub mod zstd;

use platter_image::{
    Access, CheckParams, Create, CreateParams, Format, Merge, MergeStep, Options, Repair,
};
use platter_tool::Fault;
use platter_tool::engine::Engine;

use crate::sparse::{Pages, SparseFolder};

/// Largest file that is tried; fewer bytes are the more thorough search.
const FILE_BYTES_MAX: usize = 12 << 20;
/// Largest that the file may grow to: an image can name any place.
const GROWN_BYTES_MAX: u64 = 32 << 20;
/// The step of the script before which an even byte makes the disk longer.
const GROWTH_AT: usize = 4;
/// Longest disk that is checked and repaired, sectors.
const CHECKED_SECTORS_MAX: u64 = 1 << 22;
/// Steps of a commit that are planned, and snapshots that are looked at.
const MERGE_STEPS: usize = 64;
const SNAPSHOTS: u32 = 4;
/// Bytes of a request.
const GUEST_BYTES: usize = 4096;

/// The last bytes of an input say what is done; the rest is the file.
pub fn image(format: &str, input: &[u8]) {
    let Some((file, script)) = input.split_last_chunk::<8>() else { return };
    if file.len() <= FILE_BYTES_MAX {
        exercise(format, Pages::from_bytes(file), None, script);
    }
}

/// Does with a file what the script says; beside it lies the parent it may name.
fn exercise(format: &str, file: Pages, parent: Option<(&str, Pages)>, script: &[u8; 8]) {
    let format = Format::by_name(format).expect("a format of ours");
    let mut folder = SparseFolder::new(GROWN_BYTES_MAX);
    folder.put("top", file);
    if let Some((name, pages)) = parent {
        folder.put(name, pages);
    }
    let options =
        |access| Options { format, access, allow_names: true, budget_bytes: 128 << 10, seed: 7 };
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let options = options(access);
        let Ok(mut engine) = Engine::open(&folder, "top", options.clone()) else { continue };
        check(&mut engine, Repair::Nothing);
        for number in 0..SNAPSHOTS {
            let _ = engine.drive(|image| image.snapshot(number));
        }
        for (at, &place) in script.iter().enumerate() {
            if at == GROWTH_AT && place.is_multiple_of(2) && access == Access::ReadWrite {
                let _ = grow(&mut engine, 1 << (place % 32));
            }
            operate(&mut engine, access, place);
        }
        let _ = engine.close();
        plan_commit(&folder, Options { access: Access::ReadOnly, ..options });
    }
    // A check opens what nothing else does.
    if let Ok(mut engine) = Engine::open_to_check(&folder, "top", options(Access::ReadWrite)) {
        check(&mut engine, Repair::All);
        operate(&mut engine, Access::ReadWrite, script[0]);
        let _ = engine.close();
    }
}

fn check(engine: &mut Engine, repair: Repair) {
    let params = CheckParams { repair, budget_bytes: 64 << 10 };
    if engine.sectors() <= CHECKED_SECTORS_MAX {
        let _ = engine.check(params, |_, _| {});
    }
}

/// Goes through the image as through an overlay that is committed.
fn plan_commit(folder: &SparseFolder, options: Options) {
    let Ok(mut engine) = Engine::open_alone(folder, "top", options) else { return };
    let mut merge = Merge::new();
    for _ in 0..MERGE_STEPS {
        let step = engine.drive(|image| merge.step(image));
        if !matches!(step, Ok(MergeStep::Copy { .. } | MergeStep::Zero { .. })) {
            return;
        }
    }
}

fn grow(engine: &mut Engine, more: u64) -> Result<(), Fault> {
    let wanted = engine.sectors().saturating_add(more);
    engine.resize(wanted)
}

/// One step of the script: a read, and a change where the image takes any.
fn operate(engine: &mut Engine, access: Access, place: u8) {
    let (mut buffer, room) = ([0; GUEST_BYTES], (GUEST_BYTES / 512) as u64);
    let Some(last) = engine.sectors().checked_sub(room) else { return };
    let sector = (last / 255).saturating_mul(u64::from(place)).min(last);
    let _ = engine.read(sector, &mut buffer);
    if access == Access::ReadOnly {
        return;
    }
    let done = match place % 5 {
        0 => engine.discard(sector, room),
        1 => engine.write_zeroes(sector, room),
        2 => engine.flush(),
        _ => engine.write(sector, &[place; GUEST_BYTES]),
    };
    if done.is_ok() && place % 5 > 2 {
        engine.read(sector, &mut buffer).expect("what was just written can be read");
        assert!(buffer == [place; GUEST_BYTES], "what was written reads differently");
    }
}

/// A new image's bytes.
fn made(params: &CreateParams) -> Vec<u8> {
    let mut create = Create::new(params).expect("a plain image");
    let mut file = vec![0; create.files()[0].bytes as usize];
    while let Some(write) = create.next_write() {
        file[write.offset as usize..][..write.bytes.len()].copy_from_slice(write.bytes);
    }
    file
}
