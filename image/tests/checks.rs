//! Every format that can be made: written, discarded, checked and repaired. Repair ends, changes
//! no byte of the disk, and leaves the image sound; a sound image has no leaks.
//!
//! Would miss: damage (each format's own tests make some).

mod foreign;

use foreign::*;
use platter_image::{CheckParams, CreateParams, Format, Repair};
use platter_tool::medium::RamFolder;

const CASES: &[(Format, &[(&str, &str)])] = &[
    (Format::Raw, &[]),
    (Format::Qcow2, &[]),
    (Format::Qcow2, &[("compat", "0.10"), ("cluster_size", "512")]),
    (Format::Qcow2, &[("extended_l2", "on")]),
    (Format::Qcow, &[]),
    (Format::Qed, &[]),
    (Format::Vdi, &[]),
    (Format::Vdi, &[("static", "on")]),
    (Format::Vhd, &[]),
    (Format::Vhd, &[("subformat", "fixed")]),
    (Format::Vhdx, &[]),
    (Format::Vhdx, &[("subformat", "fixed")]),
    (Format::Vmdk, &[]),
    (Format::Vmdk, &[("subformat", "monolithicFlat")]),
    (Format::Vmdk, &[("subformat", "twoGbMaxExtentSparse")]),
    (Format::Vmdk, &[("subformat", "twoGbMaxExtentFlat")]),
];

#[test]
fn a_sound_image_of_any_format_has_no_leaks_and_repair_leaves_it_alone() {
    let sectors = 20_000;
    for &(format, options) in CASES {
        let what = format!("{} {options:?}", format.name());
        let folder = RamFolder::new();
        create(&folder, &CreateParams { options, ..params(format, sectors) });
        let mut model = vec![0; sectors as usize * 512];
        let mut engine = open(&folder, "image", rw(format));
        scribble(&mut engine, &mut model, &mut Rng(3), 40, 300);
        engine.write_zeroes(4096, 4096).unwrap_or_else(|fault| panic!("{what}: {fault}"));
        model[4096 * 512..8192 * 512].fill(0);
        engine.close().unwrap();
        for repair in [Repair::Nothing, Repair::Leaks, Repair::All] {
            for budget_bytes in [0, 1 << 20] {
                let opts = if repair == Repair::Nothing { ro(format) } else { rw(format) };
                let mut engine = open(&folder, "image", opts);
                let params = CheckParams { repair, budget_bytes };
                let report = engine.check(params, |done, total| assert!(done <= total));
                let report = report.unwrap_or_else(|fault| panic!("{what}: {fault}"));
                engine.close().unwrap();
                assert_eq!((report.corruptions, report.leaks), (0, 0), "{what}: {report:#?}");
            }
        }
        assert!(read_all(&mut open(&folder, "image", ro(format))) == model, "{what}");
    }
}
