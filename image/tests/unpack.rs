//! Compressed clusters as QEMU makes them, read with a planner driven by hand: what is served is
//! what was packed, and serving takes no memory once the image is open.
//!
//! Would miss: broken streams (the units of the decoders and the hostile images have them).

mod foreign;

use allocation_counter::measure;
use foreign::*;
use platter_image::{Access, Format, Image, OpenStep, Place, SectorRange, Stop};
use platter_tool::medium::{Folder, Medium, RamFolder};

/// Text, noise, zeros and repetitions, `len` bytes.
fn contents(len: usize) -> Vec<u8> {
    let mut rng = Rng(77);
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let count = 1000 + rng.below(90_000) as usize;
        let start = bytes.len();
        match rng.below(4) {
            0 => bytes.resize(start + count, 0),
            1 => bytes.extend((0..count).map(|_| rng.next() as u8)),
            2 => bytes.extend((0..count).map(|_| b"in the beginning"[rng.below(16) as usize])),
            _ => bytes.extend((0..count).map(|n| (n % 1013 / 4) as u8)),
        }
    }
    bytes.truncate(len);
    bytes
}

fn fill(image: &mut Image, medium: &dyn Medium, buffer: &mut [u8], stop: Stop) {
    let Stop::Miss(block) = stop else { panic!("{stop:?}") };
    let bytes = &mut buffer[..block.len as usize];
    medium.read_at(block.offset, bytes).unwrap();
    image.fill(block, bytes);
}

#[test]
fn unpacking_takes_no_memory_after_the_open() {
    let scratch = Scratch::new("unpack");
    let model = contents(12 << 20);
    scratch.put("a.raw", &model);
    let mut buffer = vec![0; 64 << 10];
    for option in ["", ",cluster_size=4k", ",cluster_size=2M"] {
        for codec in ["zstd", "zlib"] {
            let options = format!("compression_type={codec}{option}");
            let convert = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options];
            scratch.ok("qemu-img", &[&convert[..], &["a.raw", "a.qcow2"]].concat());
            let folder = RamFolder::new();
            folder.put("a.qcow2", scratch.get("a.qcow2"));
            let (medium, info) = folder.open("a.qcow2", Access::ReadOnly).unwrap();
            let mut image = Image::begin("a.qcow2", info, ro(Format::Qcow2));
            loop {
                match image.open_step() {
                    Ok(OpenStep::Ready) => break,
                    Ok(other) => panic!("{other:?}"),
                    Err(stop) => fill(&mut image, &*medium, &mut buffer, stop),
                }
            }
            let (mut at, mut unpacked) = (0, 0);
            let sectors = model.len() as u64 / 512;
            let taken = measure(|| {
                while at < sectors {
                    let range = SectorRange::new(at, (sectors - at).min(128));
                    let extent = match image.map_read(range) {
                        Ok(extent) => extent,
                        Err(stop) => {
                            fill(&mut image, &*medium, &mut buffer, stop);
                            continue;
                        }
                    };
                    let len = extent.sectors as usize * 512;
                    let wanted = &model[at as usize * 512..][..len];
                    match extent.place {
                        Place::Zero => assert!(wanted.iter().all(|&byte| byte == 0)),
                        Place::Memory { offset } => {
                            assert!(image.bytes(offset, len) == wanted, "{options} at {at}");
                            unpacked += len;
                        }
                        Place::File { offset, .. } => {
                            medium.read_at(offset, &mut buffer[..len]).unwrap();
                            assert!(buffer[..len] == *wanted, "{options} at {at}");
                        }
                    }
                    at += extent.sectors;
                }
            });
            assert!(unpacked > 3 << 20, "{options}: {unpacked} bytes were packed");
            assert_eq!(taken.count_total, 0, "{options}: allocations while serving");
        }
    }
}
