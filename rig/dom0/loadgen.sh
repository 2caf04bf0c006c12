# Bare guests for scenarios: the load generator and the hostile guest; sourced after lib.sh.

# loadgen_config NAME KERNEL WORDS DISK...: a bare guest's file, on standard output.
loadgen_config() {
    printf 'name="%s"\ntype="pv"\nkernel="/usr/lib/platter/%s.elf"\nextra="%s"\n' "$1" "$2" "$3"
    shift 3
    printf 'memory=%s\nvcpus=1\ntsc_mode="native"\n' "${LOADGEN_MEMORY:-96}"
    printf 'on_poweroff="destroy"\non_reboot="destroy"\non_crash="preserve"\n'
    printf 'disk=[%s]\n' "$(printf "'%s'," "$@")"
}

# start_bare NAME KERNEL WORDS DISK...: creates it and returns.
start_bare() {
    step "$2 $1: ${3:-}"
    loadgen_config "$@" >"$RUN/$1.cfg"
    xl create "$RUN/$1.cfg" >&2 || fail "xl create of $1 failed"
}

# start_loadgen NAME WORDS DISK...: creates it and returns.
start_loadgen() {
    local name=$1 words=$2
    shift 2
    start_bare "$name" loadgen "$words" "$@"
}

# wait_loadgen NAME [SECONDS]: until its run is done; its result lines are printed. A run that
# went wrong fails the scenario.
wait_loadgen() {
    within "${2:-$PATIENCE}" console_has "$1" "done job=|panicked|crash" ||
        fail "$1 is not done in ${2:-$PATIENCE} s: $(console_of "$1" | tail -n3)"
    console_of "$1" | grep -E ' (result|play) ' || true
    console_has "$1" "done job=.*status=ok" || fail "$1: $(console_of "$1" | tail -n4)"
    within 30 domain_is_gone "$1" || fail "$1 did not switch itself off"
}

# run_loadgen NAME WORDS DISK...: a whole life of it.
run_loadgen() {
    start_loadgen "$@"
    wait_loadgen "$1"
}

# job NAME NUMBER WORDS: gives a load generator in `serve` mode its next run.
job() { xenstore-write "/local/domain/$(xl domid "$1")/data/job" "$2 $3"; }

# job_wait NAME NUMBER [SECONDS]: until that run is done; prints its result lines.
job_wait() {
    within "${3:-60}" console_has "$1" "done job=$2 " || fail "$1: job $2 is not done"
    console_of "$1" | grep " result job=$2 " || true
    console_has "$1" "done job=$2 status=ok" || fail "$1: job $2: $(console_of "$1" | tail -n3)"
}

# field NAME: the value of a word NAME=VALUE of the result line on standard input.
field() { tr ' ' '\n' | sed -n "s/^$1=//p" | head -n1; }

# disk_counters GUEST_ID VDEV_NUMBER: platter's counters of a disk, as one line.
disk_counters() {
    xenstore-read "/local/domain/$(xl domid storage)/data/disk/vbd-$1-$2" 2>/dev/null || true
}

# storage_memory_is_steady: what Xen counts of the storage domain's grants in use; printed for a
# comparison of before and after. (Debug key g prints each domain's active grant entries.)
storage_grants() {
    xl debug-keys g
    xl dmesg | tac | awk -v id="$(xl domid storage)" '
        /gnttab_usage_print_all \[/ { exit } { print }' | tac |
        awk -v want="$1" '$0 ~ "grant-table for remote d" want " " { inside = 1; next }
            /grant-table for remote/ { inside = 0 }
            inside && /\[/ { count++ }
            END { print count + 0 }'
}

# quiet_storage: the storage domain serves nothing, and says nothing of a crash.
storage_is_well() {
    domain_is_running storage || fail "the storage domain is not running"
    console_has storage "panicked|exception" && fail "the storage domain crashed"
    return 0
}
