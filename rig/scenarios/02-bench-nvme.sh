#: title NVMe: platter against a Linux driver domain with blkback, on the same controller
#: needs platter.elf loadgen.elf
#: set bench
#: machine nvme
#: timeout 1800
# One after the other has the controller, and the same bare guest floods it. Beside the table, the
# time from creation to readiness and the memory are told.
# Would miss: a busy host that is slower for the one than for the other; look at the spread, and
# at a second run.

. /job/dom0/loadgen.sh

RUNTIME_SECONDS=${RUNTIME_SECONDS:-5}
ROUNDS=${ROUNDS:-3}
WORKS=${WORKS:-randread,4k,1 randread,4k,32 randwrite,4k,32 randread,64k,32 randwrite,64k,32}

scenario() {
    table=/job/results/$SCENARIO/table
    nvme_for_dom0 >/dev/null
    nvme_for_domains
    before=$(cpu_seconds)
    sleep $((RUNTIME_SECONDS + 1))
    echo "idle 0 3 0 $(cpu_since "$before")" >>"$table"

    began=$(uptime_seconds)
    READY_PATTERN="NVMe controller"
    create_storage_on "$CONFIGS/storage-nvme.cfg" "pci=['$NVME_SLOT']" "memory=16"
    note "platter: ready after $(elapsed_since "$began") s, $(memory_of_storage) MiB"
    measure_all platter /nvme0n1
    timeout 20 xl shutdown -w storage >&2 || fail "xl shutdown does not end"
    within 10 domain_is_gone storage || fail "the storage domain is still there"

    began=$(uptime_seconds)
    create_linux_driver_domain storage "pci=['$NVME_SLOT']"
    note "Linux: ready after $(elapsed_since "$began") s, $(memory_of_storage) MiB"
    guest_must storage 'until [ -b /dev/nvme0n1 ]; do sleep 0.1; done' >/dev/null
    note "Linux: of it used: $(guest_must storage 'free -m' | awk '/^Mem/ { print $3 }') MiB"
    measure_all linux /dev/nvme0n1
}

memory_of_storage() { xl list storage | awk 'NR == 2 { print $3 }'; }

# measure_all BACKEND TARGET: every round of every work through the domain called storage.
measure_all() {
    # A name of its own: consoles of the same name would be one file.
    load=load-$1
    start_loadgen "$load" serve "vdev=xvda,backend=storage,format=raw,target=$2"
    within "$PATIENCE" console_has "$load" "waiting for jobs" || fail "the load does not start"
    number=1
    job "$load" "$number" "order=2 count=8 secs=1"
    job_wait "$load" "$number" >/dev/null
    for round in $(seq "$ROUNDS"); do
        for work in $WORKS; do
            step "$1, round $round of $ROUNDS: $work"
            number=$((number + 1))
            measure "$1" "$round" "$work"
        done
    done
    job "$load" 0 quit
    within 60 domain_is_gone "$load" || fail "the load does not end"
}

# measure BACKEND ROUND OP,BLOCK,DEPTH: dom0 keeps still meanwhile. A line of the table is
# BACKEND ROUND WORK BLOCK KIBIBYTES MILLISECONDS CPU_DOM0 CPU_STORAGE (seconds).
measure() {
    op=${3%%,*} depth=${3##*,} block=${3#*,}
    block=${block%,*}
    before=$(cpu_seconds)
    job "$load" "$number" "op=$op bs=$block depth=$depth order=2 secs=$RUNTIME_SECONDS"
    sleep $((RUNTIME_SECONDS + 1))
    cpu=$(cpu_since "$before")
    said=$(job_wait "$load" "$number")
    ios=$(echo "$said" | field ios)
    echo "$1 $2 $op/$depth $block $((ios * ${block%k})) $(echo "$said" | field ms) $cpu" >>"$table"
}
