//! Giving up what the server does not need: files outside the shares, and system calls that a
//! file server never makes.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use landlock::{
    ABI, Access, AccessFs, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr,
};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

/// From here on only the shares and Xen's devices can be opened, and refused system calls fail.
/// An old kernel without landlock is served as it is, with a line that says so.
pub fn enter(shares: &[&Path]) -> Result<()> {
    let status = restrict_files(shares).context("cannot set up landlock")?;
    if status.ruleset == landlock::RulesetStatus::NotEnforced {
        eprintln!("this kernel has no landlock: files outside the shares stay reachable");
    }
    restrict_calls().context("cannot set up seccomp")
}

fn restrict_files(shares: &[&Path]) -> Result<landlock::RestrictionStatus> {
    let all = AccessFs::from_all(ABI::V3);
    let mut rules = Ruleset::default().handle_access(all)?.create()?;
    for share in shares {
        rules = rules.add_rule(PathBeneath::new(PathFd::new(share)?, all))?;
    }
    let devices = AccessFs::ReadFile | AccessFs::WriteFile;
    rules = rules.add_rule(PathBeneath::new(PathFd::new("/dev/xen")?, devices))?;
    Ok(rules.restrict_self()?)
}

/// What a file server has no use for is refused with EPERM, and would show in a log: starting
/// programs, networks, other processes, the kernel itself. Unix socket pairs stay.
fn restrict_calls() -> Result<()> {
    const REFUSED: [libc::c_long; 24] = [
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_fork,
        libc::SYS_vfork,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_socket,
        libc::SYS_connect,
        libc::SYS_bind,
        libc::SYS_listen,
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_pivot_root,
        libc::SYS_chroot,
        libc::SYS_setns,
        libc::SYS_unshare,
        libc::SYS_bpf,
        libc::SYS_perf_event_open,
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_kexec_load,
        libc::SYS_reboot,
        libc::SYS_userfaultfd,
    ];
    let rules: BTreeMap<i64, Vec<seccompiler::SeccompRule>> =
        REFUSED.iter().map(|&call| (call, Vec::new())).collect();
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EPERM as u32),
        TargetArch::x86_64,
    )?;
    let program: BpfProgram = filter.try_into()?;
    seccompiler::apply_filter_all_threads(&program)?;
    Ok(())
}
