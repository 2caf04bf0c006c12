#: title the load generator: platter on 9p, dom0's qdisk, dom0's blkback over loop
#: needs platter.elf loadgen.elf
#: set bench
#: timeout 1200
# A bare guest without Linux's own cost, so that the backends are what is measured. Each round
# measures them one after another; the table is the one of 01-bench-fio.
# Would miss: what a real guest sees; 01-bench-fio has that.

SECONDS_EACH=${RUNTIME_SECONDS:-4}
ROUNDS=${ROUNDS:-3}
BACKENDS=${BACKENDS:-platter qdisk blkback}

scenario() {
    mount -t tmpfs -o size=600M images "$IMAGES"
    table=/job/results/$SCENARIO/table
    for backend in $BACKENDS; do
        dd if=/dev/zero of="$IMAGES/$backend.raw" bs=1M count=64 2>/dev/null
        STORAGE=$backend
        create_storage
        create_load "$backend" "$(disk xvda "$backend.raw")"
        load "$backend" "op=rw bs=64k depth=8 secs=1" >&2
    done
    step "what measuring itself costs"
    before=$(cpu_seconds)
    sleep $((SECONDS_EACH + 1))
    echo "idle 0 0 0 $(cpu_since "$before")" >>"$table"
    for round in $(seq "$ROUNDS"); do
        for depth in 1 32 128; do
            for block in 4k 64k; do
                step "round $round of $ROUNDS: $block, depth $depth"
                for backend in $BACKENDS; do
                    measure "$round" randread "$block" "$depth" "$backend"
                    measure "$round" randwrite "$block" "$depth" "$backend"
                done
            done
        done
    done
    for backend in $BACKENDS; do xl destroy "$backend"; done
    umount "$IMAGES" 2>/dev/null || true
}

# measure ROUND OP BLOCK DEPTH BACKEND: dom0 keeps still while it runs.
measure() {
    before=$(cpu_seconds)
    load_start "$5" "op=$2 bs=$3 depth=$4 order=4 secs=$SECONDS_EACH"
    sleep $((SECONDS_EACH + 1))
    cpu=$(cpu_since "$before")
    said=$(load_wait "$5") || fail "the load on $5 failed"
    kib=$(($(value_of ios "$said") * ${3%k}))
    echo "$5 $1 $2-d$4 $3 $kib $(value_of ms "$said") $cpu" >>"$table"
}
