//! The sandbox on this kernel: what a share needs works inside it, what else there is does not.
//! One test, for it cannot be left again.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::net::TcpListener;
use std::sync::Arc;

use platter_9pfsd::frontend::Frontend;
use platter_9pfsd::os::uring::Uring;
use platter_9pfsd::sandbox::{self, Identity};
use platter_9pfsd::serving::Serving;
use platter_9pfsd::share::{Cache, Policy, Share};
use platter_9pfsd::workers::{Mailbox, Workers};
use platter_storage::ninep::message::{Request, SETATTR_SIZE, VERSION_PLATTER, open};

#[test]
fn a_share_is_served_and_nothing_else_is_possible() {
    let directory = std::env::temp_dir().join(format!("platter-sandbox-{}", std::process::id()));
    let read_only = directory.join("read-only");
    let served = directory.join("served");
    fs::create_dir_all(&read_only).expect("a directory");
    // Directories are walked through, since there is a limit of space.
    fs::create_dir_all(served.join("one/two")).expect("directories");
    fs::write(read_only.join("file"), b"old").expect("a file");
    fs::write(served.join("file"), [0; 4096]).expect("a file");
    fs::write(directory.join("outside"), b"secret").expect("a file");

    // Memory of Xen's devices is not made with memfd_create, this is.
    let (mut front, ring) = Frontend::pair(6, 0).expect("memory");
    let uring = Uring::open();
    let inside = [(read_only.as_path(), true), (served.as_path(), false)];
    // The harness's main thread keeps its rights; this one and its children have lost them.
    sandbox::enter(&inside, &Identity::Same).expect("this kernel can");

    // O_DIRECT, where the file system has it: by io_uring, where the kernel has that.
    let policy = Policy { cache: Cache::Direct, share_bytes_max: 1 << 30, ..Policy::default() };
    let share = Share::open(&served, policy).expect("the share");
    let workers = Workers::start(2).expect("threads");
    let mailbox = Arc::new(Mailbox::new().expect("a mailbox"));
    let mut serving = Serving::new(vec![ring], share, workers, mailbox);
    serving.set_uring(uring);
    let mut must = |request: &Request, data: &[u8]| {
        front.ask(1, request, data);
        let head = loop {
            serving.turn().expect("a sound ring");
            if let Some((head, _)) = front.take(&mut []) {
                break head;
            }
        };
        assert_eq!(head.id, request.id() + 1, "{request:?}");
    };
    must(&Request::Version { msize: 65536, version: VERSION_PLATTER }, &[]);
    let (uname, aname) = ("", "");
    must(&Request::Attach { fid: 0, afid: u32::MAX, uname, aname, n_uname: 0 }, &[]);
    let names = ["file"].into_iter().collect();
    must(&Request::Walk { fid: 0, newfid: 1, names }, &[]);
    must(&Request::Getattr { fid: 1, mask: 0 }, &[]);
    must(&Request::Lopen { fid: 1, flags: open::READ_WRITE }, &[]);
    must(&Request::Write { fid: 1, offset: 0, count: 4 }, b"data");
    must(&Request::Read { fid: 1, offset: 0, count: 4 }, &[]);
    must(&Request::Write { fid: 1, offset: 4096, count: 4096 }, &[1; 4096]);
    must(&Request::Read { fid: 1, offset: 4096, count: 4096 }, &[]);
    must(&Request::Fsync { fid: 1, datasync: 0 }, &[]);
    must(&Request::Setattr { fid: 1, valid: SETATTR_SIZE, size: 1 << 20 }, &[]);
    // Mode and modification time.
    must(&Request::Setattr { fid: 1, valid: 0x21, size: 0 }, &[]);
    must(&Request::Extents { fid: 1, offset: 0, len: 1 << 20 }, &[]);
    must(&Request::Clunk { fid: 1 }, &[]);

    assert_eq!(fs::read(read_only.join("file")).expect("it may be read"), b"old");
    let denied = |result: Result<(), std::io::Error>, what: &str| {
        let kind = result.map_err(|fault| fault.kind());
        assert_eq!(kind, Err(ErrorKind::PermissionDenied), "{what}");
    };
    denied(File::create(read_only.join("file")).map(drop), "a file that is read-only");
    denied(File::open(directory.join("outside")).map(drop), "a file beside the shares");
    denied(File::open("/dev/null").map(drop), "a device");
    denied(TcpListener::bind("127.0.0.1:0").map(drop), "the network");
    denied(std::process::Command::new("/bin/true").status().map(drop), "programs");
    denied(std::os::unix::fs::symlink("/", served.join("link")), "links");
}
