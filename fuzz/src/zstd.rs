//! The zstd decoder, reached as a guest's image reaches it: the input is the stream of a compressed
//! cluster of a qcow2. Whatever it says, the read ends, with a cluster or a fault.

use std::sync::OnceLock;

use platter_image::{Access, CreateParams, Format, Options};
use platter_tool::engine::Engine;
use platter_tool::medium::RamFolder;

const CLUSTER_BYTES: usize = 64 << 10;
/// Bits of a compressed entry that are the stream's place (qcow2, "Compressed Clusters
/// Descriptor"): 62 less the cluster's bits above 8.
const PLACE_BITS: u32 = 62 - (16 - 8);
const COMPRESSED: u64 = 1 << 62;

/// An image whose first cluster is compressed, and where its stream stands.
fn template() -> &'static (Vec<u8>, usize) {
    static IMAGE: OnceLock<(Vec<u8>, usize)> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let options = [("compression_type", "zstd")];
        let params = CreateParams {
            format: Format::Qcow2,
            name: "top",
            sectors: (CLUSTER_BYTES / 512) as u64,
            cluster_bytes: CLUSTER_BYTES as u64,
            options: &options,
            backing: None,
            seed: 1,
            unix_seconds: 0,
        };
        let folder = RamFolder::new();
        folder.put("top", crate::made(&params));
        let mut engine = open(&folder, Access::ReadWrite);
        engine.write(0, &[7; CLUSTER_BYTES]).expect("a write");
        engine.close().expect("a flush");
        let mut file = folder.bytes("top").expect("it was put there");
        let u64_at = |file: &[u8], at: usize| {
            u64::from_be_bytes(file[at..at + 8].try_into().expect("eight bytes"))
        };
        let place = |entry: u64| (entry & 0x00ff_ffff_ffff_fe00) as usize;
        let l1 = u64_at(&file, 40) as usize;
        let l2 = place(u64_at(&file, l1));
        let stream = place(u64_at(&file, l2));
        let more = (CLUSTER_BYTES / 512 - 1) as u64;
        let entry = COMPRESSED | more << PLACE_BITS | stream as u64;
        file[l2..l2 + 8].copy_from_slice(&entry.to_be_bytes());
        (file, stream)
    })
}

fn open(folder: &RamFolder, access: Access) -> Engine {
    let format = Format::Qcow2;
    let options = Options { format, access, allow_names: false, budget_bytes: 64 << 10, seed: 7 };
    Engine::open(folder, "top", options).expect("the image around the stream is sound")
}

pub fn zstd(stream: &[u8]) {
    let (file, at) = template();
    let (mut file, len) = (file.clone(), stream.len().min(CLUSTER_BYTES));
    file[*at..at + CLUSTER_BYTES].fill(0);
    file[*at..at + len].copy_from_slice(&stream[..len]);
    let folder = RamFolder::new();
    folder.put("top", file);
    let _ = open(&folder, Access::ReadOnly).read(0, &mut [0; CLUSTER_BYTES]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_unpacked() {
        let (file, at) = template();
        // One raw block, last: magic, a frame of one segment of 64 KiB, block header.
        let mut stream = vec![0x28, 0xb5, 0x2f, 0xfd, 0x60, 0x00, 0xff];
        stream.extend(((CLUSTER_BYTES as u32) << 3 | 1 << 1 | 1).to_le_bytes()[..3].iter());
        stream.push(9);
        let mut file = file.clone();
        file[*at..at + stream.len()].copy_from_slice(&stream);
        let folder = RamFolder::new();
        folder.put("top", file);
        let mut cluster = vec![0; CLUSTER_BYTES];
        open(&folder, Access::ReadOnly).read(0, &mut cluster).unwrap();
        assert!(cluster.iter().all(|&b| b == 9));
    }
}
