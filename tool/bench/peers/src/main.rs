//! The requests of `platter bench`, made by the Rust crates imago and qcow2-rs on the same file,
//! from the page cache. imago has one request in flight, qcow2-rs as many as are asked for.
//! usage: platter-bench-peers imago|qcow2-rs read|write SIZE STEP COUNT DEPTH IMAGE
//! STEP 0 means places by chance, those of `platter bench --random 1`.

use std::path::Path;

use futures::stream::{FuturesUnordered, StreamExt};
use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};
use qcow2_rs::dev::Qcow2DevParams;
use qcow2_rs::helpers::Qcow2IoBuf;
use qcow2_rs::utils::qcow2_setup_dev_tokio;

/// What to do, as on the command line.
struct Work {
    write: bool,
    size: u64,
    step: u64,
    count: u64,
    depth: usize,
    image: String,
}

impl Work {
    fn places(&self, disk: u64) -> impl Iterator<Item = u64> {
        let (size, step) = (self.size, self.step);
        let (mut state, mut next) = (1u64, 0);
        (1..=self.count).map(move |number| {
            if step == 0 {
                state = (state ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                state ^= state >> 29;
                return state % ((disk - size) / size + 1) * size;
            }
            let at = next;
            next = (next + step) % disk;
            if next > disk - size {
                next = 0;
            }
            at
        })
    }
}

fn imago(work: &Work) -> Result<(), Box<dyn std::error::Error>> {
    let builder = Qcow2::<File>::builder_path(&work.image).write(work.write);
    let disk = FormatAccess::new(builder.open(PermissiveImplicitOpenGate::default())?);
    let mut buffer = vec![0; work.size as usize];
    for at in work.places(disk.size()) {
        match work.write {
            true => disk.write(&buffer, at)?,
            false => disk.read(&mut buffer, at)?,
        }
    }
    if work.write {
        disk.flush()?;
        disk.sync()?;
    }
    Ok(())
}

async fn qcow2_rs(work: &Work) -> Result<(), Box<dyn std::error::Error>> {
    let params = Qcow2DevParams::new(9, None, None, !work.write, false);
    let disk = qcow2_setup_dev_tokio(Path::new(&work.image), &params).await?;
    let size = work.size as usize;
    let request = async |at: u64, mut buffer: Qcow2IoBuf<u8>| {
        match work.write {
            true => disk.write_at(&buffer, at).await.map_err(|e| e.to_string())?,
            false => {
                disk.read_at(&mut buffer, at).await.map_err(|e| e.to_string())?;
            }
        }
        Ok::<_, String>(buffer)
    };
    let mut flight = FuturesUnordered::new();
    let mut spare: Vec<Qcow2IoBuf<u8>> = (0..work.depth).map(|_| Qcow2IoBuf::new(size)).collect();
    for at in work.places(disk.info.virtual_size()) {
        if spare.is_empty() {
            spare.extend(flight.next().await.transpose()?);
        }
        flight.push(request(at, spare.pop().expect("one has come back")));
    }
    while flight.next().await.transpose()?.is_some() {}
    drop(flight);
    if work.write {
        disk.flush_meta().await?;
        std::fs::File::open(&work.image)?.sync_data()?;
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [library, what, size, step, count, depth, image] = &args[..] else {
        return Err("imago|qcow2-rs read|write SIZE STEP COUNT DEPTH IMAGE".into());
    };
    let work = Work {
        write: what == "write",
        size: size.parse()?,
        step: step.parse()?,
        count: count.parse()?,
        depth: depth.parse()?,
        image: image.clone(),
    };
    match library.as_str() {
        "imago" => imago(&work),
        _ => tokio::runtime::Builder::new_current_thread().build()?.block_on(qcow2_rs(&work)),
    }
}
