//! Several plans in flight at once, committed in any order or abandoned: shared clusters and
//! tables make a second plan wait, no byte of an abandoned one shows.
//!
//! Would miss: data races of a caller that does not keep to the plans.

use super::*;
use platter_image::{Access, FileNo, Step};
use platter_image::{FlushStep, Image, OpenStep, Place, Prelude, SectorRange, Stop, WritePlan};
use platter_tool::medium::Folder;

/// An image of one file, driven by hand.
struct Flight {
    folder: RamFolder,
    image: Image,
}

impl Flight {
    fn new(params: &CreateParams) -> Flight {
        let folder = RamFolder::new();
        create(&folder, params);
        let (_, info) = folder.open(params.name, Access::ReadWrite).unwrap();
        let image = Image::begin(params.name, info, rw(params.format));
        let mut flight = Flight { folder, image };
        assert!(matches!(flight.ask(Image::open_step), Ok(OpenStep::Ready)));
        flight
    }

    fn medium(&self) -> std::sync::Arc<dyn platter_tool::medium::Medium> {
        self.folder.open(&self.folder.names()[0], Access::ReadWrite).unwrap().0
    }

    /// Calls a planner until it answers or has to wait for a plan.
    fn ask<T>(&mut self, mut call: impl FnMut(&mut Image) -> Step<T>) -> Step<T> {
        loop {
            match call(&mut self.image) {
                Err(Stop::Miss(block)) => {
                    let mut bytes = vec![0; block.len as usize];
                    self.medium().read_at(block.offset, &mut bytes).unwrap();
                    self.image.fill(block, &bytes);
                }
                Err(Stop::NeedFlush) => self.flush(),
                other => return other,
            }
        }
    }

    fn flush(&mut self) {
        let medium = self.medium();
        self.image.flush_begin();
        while let step @ (FlushStep::Write { .. } | FlushStep::Sync { .. }) =
            self.image.flush_step()
        {
            if let FlushStep::Write { offset, bytes, .. } = step {
                medium.write_at(offset, bytes).unwrap();
            }
        }
        self.image.flush_end(true);
    }

    fn prepare(&mut self, start: u64, count: u64) -> Step<WritePlan> {
        self.ask(|image| image.prepare_write(SectorRange::new(start, count)))
    }

    fn read(&mut self, start: u64, count: u64) -> Vec<u8> {
        let mut disk = Vec::new();
        while (disk.len() as u64) < count * 512 {
            let at = start + disk.len() as u64 / 512;
            let range = SectorRange::new(at, start + count - at);
            let extent = self.ask(|image| image.map_read(range)).unwrap();
            let mut piece = vec![0; extent.sectors as usize * 512];
            if let Place::File { offset, .. } = extent.place {
                self.medium().read_at(offset, &mut piece).unwrap();
            }
            disk.extend(piece);
        }
        disk
    }

    /// Carries a plan out with one byte value, without committing it.
    fn write(&mut self, plan: &WritePlan, byte: u8) {
        let medium = self.medium();
        for prelude in &plan.preludes {
            match *prelude {
                Prelude::Zero { offset, len, .. } => medium.zero(offset, len).unwrap(),
                Prelude::Copy { .. } => panic!("no copies in these formats"),
            }
        }
        assert_eq!(plan.file, FileNo(0));
        medium.write_at(plan.offset, &vec![byte; plan.sectors as usize * 512]).unwrap();
        if let Some(head) = plan.head {
            let bytes = self.read(head.start, head.count);
            medium.write_at(plan.offset - head.bytes(), &bytes).unwrap();
        }
        if let Some(tail) = plan.tail {
            let bytes = self.read(tail.start, tail.count);
            medium.write_at(plan.offset + plan.sectors * 512, &bytes).unwrap();
        }
    }

    fn commit(&mut self, plan: WritePlan, byte: u8) {
        self.write(&plan, byte);
        self.image.commit(plan.prepared);
    }
}

/// The formats and the sectors in a cluster of each.
fn formats() -> [(CreateParams<'static>, u64); 4] {
    let of = |format| CreateParams { ..params(format, 40_000) };
    [
        (of(Format::Qed), 128),
        (of(Format::Vdi), 2048),
        (of(Format::Qcow), 8),
        (of(Format::Vmdk), 128),
    ]
}

#[test]
fn one_cluster_has_one_plan_at_a_time() {
    for (params, cluster) in formats() {
        let mut flight = Flight::new(&params);
        // The first plan brings a table where there is none yet: others of it wait.
        let first = flight.prepare(1, 2).unwrap();
        assert!(matches!(flight.prepare(4, 1), Err(Stop::Busy)), "{:?}", params.format);
        flight.commit(first, 1);
        let second = flight.prepare(cluster + 1, 2).unwrap();
        let third = flight.prepare(2 * cluster, 2 * cluster).unwrap();
        assert!(matches!(flight.prepare(cluster, 1), Err(Stop::Busy)));
        assert!(matches!(flight.prepare(4 * cluster - 1, 1), Err(Stop::Busy)));
        // A range that runs into a plan in flight stops before it.
        let fourth = flight.prepare(3, cluster - 3).unwrap();
        assert!(second.offset != third.offset);
        flight.commit(third, 3);
        flight.flush();
        flight.commit(second, 2);
        flight.commit(fourth, 4);
        let disk = flight.read(0, 4 * cluster);
        let byte = |sector: u64| disk[sector as usize * 512];
        assert_eq!([byte(0), byte(1), byte(2), byte(3), byte(cluster - 1)], [0, 1, 1, 4, 4]);
        assert_eq!([byte(cluster), byte(cluster + 1), byte(cluster + 3)], [0, 2, 0]);
        assert!(disk[2 * cluster as usize * 512..].iter().all(|&b| b == 3));
    }
}

#[test]
fn nothing_of_an_abandoned_plan_shows_in_what_takes_its_place() {
    for (params, cluster) in formats() {
        let mut flight = Flight::new(&params);
        let plan = flight.prepare(0, 2 * cluster).unwrap();
        let place = plan.offset;
        flight.write(&plan, 0xaa);
        flight.image.abandon(plan.prepared);
        assert!(flight.read(0, 2 * cluster).iter().all(|&b| b == 0));
        let plan = flight.prepare(cluster + 1, 1).unwrap();
        assert_eq!(plan.offset - 512, place, "the space is taken again");
        flight.commit(plan, 5);
        let disk = flight.read(0, 3 * cluster);
        let at = (cluster as usize + 1) * 512;
        assert!(disk[at..at + 512].iter().all(|&b| b == 5));
        assert_eq!(disk.iter().filter(|&&b| b != 0).count(), 512);
        flight.flush();
        let name = flight.folder.names()[0].clone();
        let folder = RamFolder::new();
        folder.put(&name, flight.folder.bytes(&name).unwrap());
        let mut engine = open(&folder, &name, ro(params.format));
        assert!(read_all(&mut engine)[..disk.len()] == disk);
        assert!(check_all(&mut engine).is_sound());
    }
}

/// Plans are given up out of order, tables among them: no space is lost, so the file ends up as
/// long as one that was written in peace.
#[test]
fn space_that_plans_gave_up_is_used_before_the_file_grows() {
    let small = [("table_size", "2")];
    let of =
        |format, options| CreateParams { cluster_bytes: 4096, options, ..params(format, 40_000) };
    for params in [of(Format::Qed, &small[..]), of(Format::Qcow, &[]), of(Format::Vmdk, &[])] {
        let run = |give_up: bool| {
            let mut flight = Flight::new(&params);
            // Each of the first three has a table of its own (not in VMDK).
            let starts = [0, 8192, 16384, 8 * 20, 8 * 40, 8192 + 16];
            let mut plans = starts.map(|start| flight.prepare(start, 16).ok()).map(Some);
            if give_up {
                for index in [3, 0, 1, 4] {
                    if let Some(plan) = plans[index].take().flatten() {
                        flight.image.abandon(plan.prepared);
                    }
                }
            }
            for plan in plans.into_iter().flatten().flatten() {
                flight.commit(plan, 1);
            }
            for start in starts {
                let plan = flight.prepare(start, 16).unwrap();
                flight.commit(plan, 2);
            }
            flight.flush();
            let name = flight.folder.names()[0].clone();
            let bytes = flight.folder.bytes(&name).unwrap();
            let folder = RamFolder::new();
            folder.put(&name, bytes.clone());
            let mut engine = open(&folder, &name, ro(params.format));
            let disk = read_all(&mut engine);
            assert_eq!(disk.iter().filter(|&&b| b == 2).count(), starts.len() * 16 * 512);
            let report = check_all(&mut engine);
            assert!(report.is_sound() && report.leaks == 0, "{report:#?}");
            bytes.len()
        };
        assert_eq!(run(true), run(false), "{:?}", params.format);
    }
}

#[test]
fn a_store_of_fixed_size_is_full_or_refused_and_says_so() {
    for (params, _) in formats() {
        let mut flight = Flight::new(&params);
        let (_, info) = flight.folder.open("image", Access::ReadWrite).unwrap();
        let info = platter_image::FileInfo { can_grow: false, ..info };
        flight.image = Image::begin("image", info, rw(params.format));
        // Only a VDI tells where its used part ends.
        let stop = match params.format {
            Format::Vdi => {
                flight.ask(Image::open_step).unwrap();
                flight.prepare(0, 1).unwrap_err()
            }
            _ => flight.ask(Image::open_step).unwrap_err(),
        };
        let Stop::Fault(fault) = stop else { panic!("{stop:?}") };
        let said = fault.to_string();
        assert!(said.starts_with("no room: a new cluster") || said.contains("give it a file"));
        assert_eq!(said.contains("give it a file"), params.format != Format::Vdi, "{said}");
    }
}

/// One set of eight blocks: what a step needs at once must fit, whatever else is dirty.
#[test]
fn the_smallest_cache_is_enough() {
    let split = [("subformat", "twoGbMaxExtentSparse")];
    let mut all: Vec<_> = formats().map(|(params, _)| params).to_vec();
    all.push(CreateParams { options: &split, ..params(Format::Vmdk, 40_000) });
    for params in all {
        let folder = RamFolder::new();
        create(&folder, &params);
        let mut options = rw(params.format);
        options.budget_bytes = 1;
        let mut model = vec![0; 40_000 * 512];
        let mut engine = open(&folder, "image", options);
        scribble(&mut engine, &mut model, &mut Rng(4), 120, 900);
        assert!(check_all(&mut engine).is_sound());
        engine.close().unwrap();
        assert!(read_all(&mut open(&folder, "image", ro(params.format))) == model);
    }
    let mut text = String::from("# Disk DescriptorFile\nCID=1\n");
    text += &"RW 1 ZERO\n".repeat(900);
    text += &"# padding\n".repeat(1200);
    let folder = RamFolder::new();
    folder.put("image", text.into_bytes());
    assert_eq!(open(&folder, "image", ro(Format::Vmdk)).sectors(), 900);
    let mut options = ro(Format::Vmdk);
    options.budget_bytes = 1;
    let fault = Engine::open(&folder, "image", options).err().unwrap().to_string();
    assert!(fault.contains("bytes of a VMDK descriptor"), "{fault}");
}
