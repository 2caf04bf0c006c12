# Bare guests for scenarios: the load generator and the hostile guest; sourced after lib.sh.

# loadgen_config NAME KERNEL WORDS DISK...: a bare guest's file, on standard output.
loadgen_config() {
    printf 'name="%s"\ntype="pv"\nkernel="/usr/lib/platter/%s.elf"\nextra="%s"\n' "$1" "$2" "$3"
    shift 3
    printf 'memory=%s\nvcpus=1\ntsc_mode="native"\n' "${LOADGEN_MEMORY:-96}"
    printf 'on_poweroff="destroy"\non_reboot="destroy"\non_crash="preserve"\n'
    [ $# -eq 0 ] || printf 'disk=[%s]\n' "$(printf "'%s'," "$@")"
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

# measure_idle: what measuring itself costs, a line of the table.
measure_idle() {
    step "what measuring itself costs"
    before=$(cpu_seconds)
    sleep $((RUNTIME_SECONDS + 1))
    echo "idle 0 3 0 $(cpu_since "$before")" >>"$table"
}

# measure ROUND OP,BLOCK,DEPTH BACKEND VDEV: the disk under load, by job $number of `guest`; dom0
# keeps still meanwhile. Adds a line to the table:
# BACKEND ROUND WORK BLOCK KIBIBYTES MILLISECONDS CPU_DOM0 CPU_STORAGE (seconds).
measure() {
    op=${2%%,*} depth=${2##*,} block=${2#*,}
    block=${block%,*}
    before=$(cpu_seconds)
    job guest "$number" "disk=$4 op=$op bs=$block depth=$depth order=2 secs=$RUNTIME_SECONDS"
    sleep $((RUNTIME_SECONDS + 1))
    cpu=$(cpu_since "$before")
    said=$(job_wait guest "$number")
    number=$((number + 1))
    echo "$said" | sed "s/.* ms=/    $3 $2 ms=/; s/reads=.*//"
    ios=$(echo "$said" | field ios)
    echo "$3 $1 $op/$depth $block $((ios * ${block%k})) $(echo "$said" | field ms) $cpu" >>"$table"
}

# disk_counters GUEST_ID VDEV_NUMBER: platter's counters of a disk, as one line.
disk_counters() {
    xenstore-read "/local/domain/$(xl domid storage)/data/disk/vbd-$1-$2" 2>/dev/null || true
}

# pages_held_of DOMID: pages of that domain that the storage domain has mapped or is copying, as
# Xen's own table of active grants says (debug key g).
pages_held_of() {
    xen_says g | awk -v of="$1" -v by="$(xl domid storage)" '
        /grant-table for remote/ { inside = ($0 ~ "remote d" of " ") }
        inside && /\[0x/ { sub(/.*\[/, "["); if ($2 == by) count++ }
        END { print count + 0 }'
}

# storage_ports: event channels of the storage domain (debug key e).
storage_ports() {
    xen_says e | awk -v of="$(xl domid storage)" '
        /information for domain|domain [0-9]+:/ { inside = ($0 ~ "domain " of ":") }
        /information for d[0-9]+/ { inside = ($0 ~ "for d" of "[: ]") }
        inside && /\[[01]\/[01]\// { count++ }
        END { print count + 0 }'
}

# xen_says KEY: what Xen prints for a debug key.
xen_says() {
    xl dmesg -c >/dev/null
    xl debug-keys "$1"
    sleep 0.5
    xl dmesg -c
}

# storage_is_well: the storage domain serves nothing, and says nothing of a crash.
storage_is_well() {
    domain_is_running storage || fail "the storage domain is not running"
    console_has storage "panicked|exception" && fail "the storage domain crashed"
    return 0
}
