//! Giving up what the server does not need: its user, its capabilities, files outside the
//! shares, and all system calls but a file server's.
//!
//! Guards the order: what needs rights is opened before [`enter`], threads start after it. Must
//! never: leave a right because giving it up failed; only an old kernel's lack is passed over.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use landlock::{
    ABI, Access, AccessFs, AccessNet, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus,
};
use rustix::process::{Resource, Rlimit, geteuid, getrlimit, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, set_capabilities, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};
use rustix::{fs::Gid, fs::Uid};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use crate::log::say;
use crate::os;
use crate::session::OPEN_MAX;
use crate::share::Cache;

/// Descriptors of a share beside its files: an event channel device, an io_uring, a wake-up, its
/// root, a directory or two on the way.
const SHARE_DESCRIPTORS: usize = 8;
/// Of the server itself.
const OWN_DESCRIPTORS: usize = 64;

/// Who the server becomes.
#[derive(Debug, PartialEq, Eq)]
pub enum Identity {
    /// Nobody else: it was started by its user, or is to stay root.
    Same,
    User {
        uid: u32,
        gid: u32,
    },
}

impl Identity {
    /// From a name in /etc/passwd, or UID or UID:GID.
    pub fn of(user: &str) -> Result<Identity> {
        if !geteuid().is_root() || user == "root" || user == "0" {
            return Ok(Identity::Same);
        }
        let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
        match Identity::find(user, &users) {
            Some(found) => Ok(found),
            None => bail!("there is no user '{user}': make it, or name another with --user"),
        }
    }

    fn find(user: &str, users: &str) -> Option<Identity> {
        let (uid, gid) = user.split_once(':').unwrap_or((user, user));
        if let (Ok(uid @ 1..), Ok(gid)) = (uid.parse(), gid.parse()) {
            return Some(Identity::User { uid, gid });
        }
        // name:password:uid:gid:...
        let line = users.lines().find(|line| line.split(':').next() == Some(user))?;
        let mut numbers = line.split(':').skip(2).map_while(|number| number.parse().ok());
        Some(Identity::User { uid: numbers.next()?, gid: numbers.next()? })
    }
}

/// Most descriptors that frontends can make the server have.
fn descriptors_max(shares: usize, cache: Cache) -> usize {
    let each = if cache == Cache::Direct { 2 } else { 1 };
    shares * (each * OPEN_MAX + SHARE_DESCRIPTORS) + OWN_DESCRIPTORS
}

/// Makes sure that all files can be open at once that so many shares may have open.
pub fn raise_descriptors(shares: usize, cache: Cache) -> Result<()> {
    let want = descriptors_max(shares, cache) as u64;
    let maximum = getrlimit(Resource::Nofile).maximum;
    let maximum = maximum.filter(|maximum| *maximum < want).map_or(maximum, |_| Some(want));
    let set = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    set.with_context(|| {
        format!("this process may not open {want} files: give it more, or fewer --shares")
    })
}

/// From here on only the shares (and whether they are read-only) can be opened, and system calls
/// that a file server does not make fail. The calling thread must be the only one.
pub fn enter(shares: &[(&Path, bool)], identity: &Identity) -> Result<()> {
    become_user(identity).context("cannot give up the rights of root")?;
    let status = restrict_files(shares).context("cannot set up landlock")?;
    prove_confined(&status, geteuid().is_root())?;
    if status == RulesetStatus::NotEnforced {
        say(format_args!("this kernel has no landlock: files outside the shares stay reachable"));
    }
    restrict_calls().context("cannot set up seccomp")
}

/// Root opens every file there is, unless the kernel keeps it to the shares.
fn prove_confined(status: &RulesetStatus, is_root: bool) -> Result<()> {
    if is_root && *status == RulesetStatus::NotEnforced {
        bail!(
            "this kernel has no landlock, which keeps root to the shares: name another --user, or \
             give --no-sandbox"
        );
    }
    Ok(())
}

fn become_user(identity: &Identity) -> rustix::io::Result<()> {
    // Root opens files of every owner, and can do nothing else that a user cannot.
    let mut keep = CapabilitySet::empty();
    if let Identity::User { uid, gid } = *identity {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        set_thread_groups(&[])?;
        set_thread_res_gid(gid, gid, gid)?;
        set_thread_res_uid(uid, uid, uid)?;
    } else if geteuid().is_root() {
        keep = CapabilitySet::DAC_OVERRIDE;
    }
    let inheritable = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: keep, permitted: keep, inheritable })
}

fn restrict_files(shares: &[(&Path, bool)]) -> Result<RulesetStatus> {
    let (read, all) = (AccessFs::ReadFile | AccessFs::ReadDir, AccessFs::from_all(ABI::V5));
    let write = read
        | AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::MakeReg
        | AccessFs::MakeDir
        | AccessFs::RemoveFile
        | AccessFs::RemoveDir
        | AccessFs::Refer;
    let net = AccessNet::from_all(ABI::V4);
    let mut rules = Ruleset::default().handle_access(all)?.handle_access(net)?.create()?;
    for (share, read_only) in shares {
        let access = if *read_only { read } else { write };
        rules = rules.add_rule(PathBeneath::new(PathFd::new(share)?, access))?;
    }
    Ok(rules.restrict_self()?.ruleset)
}

/// What a file server does with files.
const FILES: [libc::c_long; 29] = [
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_close,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_getdents64,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fstatfs,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fchmod,
    libc::SYS_utimensat,
    libc::SYS_mkdirat,
    libc::SYS_unlinkat,
    libc::SYS_renameat2,
    libc::SYS_fcntl,
    // Of rings that can only read and write open files.
    libc::SYS_io_uring_enter,
];

/// What every program with threads does.
const MEMORY_AND_THREADS: [libc::c_long; 30] = [
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_eventfd2,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_getrusage,
    libc::SYS_getrandom,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_tgkill,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Everything that is not named above fails with EPERM.
fn restrict_calls() -> Result<()> {
    let any = FILES.iter().chain(&MEMORY_AND_THREADS);
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = any.map(|&call| (call, vec![])).collect();
    // Xen's devices, and names of threads.
    let ioctls = os::requests().map(|request| only(1, request)).into_iter();
    rules.insert(libc::SYS_ioctl, ioctls.collect::<Result<_>>()?);
    rules.insert(libc::SYS_prctl, vec![only(0, libc::PR_SET_NAME as u64)?]);
    let (refuse, allow) = (SeccompAction::Errno(libc::EPERM as u32), SeccompAction::Allow);
    let filter = SeccompFilter::new(rules, refuse, allow, TargetArch::x86_64)?;
    let program: BpfProgram = filter.try_into()?;
    seccompiler::apply_filter_all_threads(&program)?;
    Ok(())
}

/// Argument `index` has this value.
fn only(index: u8, value: u64) -> Result<SeccompRule> {
    let (len, equal) = (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq);
    Ok(SeccompRule::new(vec![SeccompCondition::new(index, len, equal, value)?])?)
}

/// Would miss: whether the rights are really gone: `tests/sandbox.rs` tries.
#[cfg(test)]
mod tests {
    use super::*;
    use crate::serving::FRONTEND_BYTES_MAX;

    #[test]
    fn the_unit_grants_what_64_shares_may_take() {
        let unit = include_str!("../platter-9pfsd.service");
        let number = |key: &str| -> usize {
            let value = unit.lines().find_map(|line| line.strip_prefix(key)).expect(key);
            value.replace('G', "000000000").parse().expect("a number")
        };
        assert!(number("LimitNOFILE=") >= descriptors_max(64, Cache::Direct));
        assert!(number("# At most so many MiB for each share: ") << 20 >= FRONTEND_BYTES_MAX);
        // A thread for each, as many workers as there may be, and the one that connects them.
        assert!(number("TasksMax=") > 64 + 64);
    }

    #[test]
    fn root_stays_root_only_where_the_kernel_keeps_it_to_the_shares() {
        let is_ok = |status, is_root| prove_confined(&status, is_root).is_ok();
        assert!(!is_ok(RulesetStatus::NotEnforced, true));
        assert!(is_ok(RulesetStatus::NotEnforced, false));
        assert!(is_ok(RulesetStatus::PartiallyEnforced, true));
        assert!(is_ok(RulesetStatus::FullyEnforced, true));
    }

    #[test]
    fn users_are_found_by_name_and_number() {
        let users = "root:x:0:0:root:/root:/bin/sh\nfiles:x:990:991::/:/bin/false\nodd:x:y\n";
        let user = |uid, gid| Some(Identity::User { uid, gid });
        assert_eq!(Identity::find("files", users), user(990, 991));
        assert_eq!(Identity::find("12", users), user(12, 12));
        assert_eq!(Identity::find("12:13", users), user(12, 13));
        assert_eq!(Identity::find("0:13", users), None, "root has its own word");
        assert_eq!(Identity::find("nobody", users), None);
        assert_eq!(Identity::find("odd", users), None);
    }
}
