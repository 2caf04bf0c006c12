#: title Bare load generator: platter on 9p, dom0's qdisk, dom0's blkback over loop
#: needs platter.elf loadgen.elf
#: set bench
#: timeout 1800
# One bare guest has one disk of each kind, and each round measures them one after another. What
# counts is the CPU time of the serving domains for a request: dom0 and the storage domain together.
# Would miss: what a request costs its guest, and real disks: the images lie in dom0's memory.

. /job/dom0/loadgen.sh

RUNTIME_SECONDS=${RUNTIME_SECONDS:-5}
ROUNDS=${ROUNDS:-3}
BACKENDS=${BACKENDS:-platter qdisk blkback}
WORKS=${WORKS:-randread,4k,1 randread,4k,32 randread,4k,128 randwrite,4k,32
    randread,64k,1 randread,64k,32 randread,64k,128 randwrite,64k,32}

scenario() {
    mount -t tmpfs -o size=400M images "$IMAGES"
    set --
    for backend in $BACKENDS; do
        dd if=/dev/zero of="$IMAGES/$backend.raw" bs=1M count=64 2>/dev/null
        STORAGE=$backend
        create_storage
        set -- "$@" "$(disk "$(vdev_of "$backend")" "$backend.raw")"
    done
    start_loadgen guest serve "$@"
    within "$PATIENCE" console_has guest "waiting for jobs" || fail "the load does not start"
    table=/job/results/$SCENARIO/table
    number=1
    for backend in $BACKENDS; do
        job guest "$number" "disk=$(vdev_of "$backend") order=2 count=8 secs=1"
        job_wait guest "$number" >/dev/null
        number=$((number + 1))
    done
    measure_idle
    for round in $(seq "$ROUNDS"); do
        for work in $WORKS; do
            step "round $round of $ROUNDS: $work"
            for backend in $BACKENDS; do
                measure "$round" "$work" "$backend" "$(vdev_of "$backend")"
            done
        done
    done
    job guest 0 quit
    within 60 domain_is_gone guest || fail "the load does not end"
    umount "$IMAGES" 2>/dev/null || true
}

vdev_of() {
    case $1 in
    platter) echo xvda ;;
    qdisk) echo xvdb ;;
    blkback) echo xvdc ;;
    esac
}
