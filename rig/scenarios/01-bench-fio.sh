#: title fio in a Linux guest: platter on 9p, dom0's qdisk, dom0's blkback over loop
#: needs platter.elf
#: set bench
#: timeout 900
# One guest has one disk of each kind, and each round measures them one after another, so that a
# busy host spoils a round and not a ratio. Results go to a table that `rig bench` sums up.
# Would miss: what platter can do; a guest's own emulated cost bounds the requests per second.

RUNTIME_SECONDS=${RUNTIME_SECONDS:-5}
ROUNDS=${ROUNDS:-3}
BACKENDS=${BACKENDS:-platter qdisk blkback}

scenario() {
    mount -t tmpfs -o size=600M images "$IMAGES"
    FIO=1
    set --
    for backend in $BACKENDS; do
        dd if=/dev/zero of="$IMAGES/$backend.raw" bs=1M count=128 2>/dev/null
        STORAGE=$backend
        create_storage
        set -- "$@" "$(disk "$(vdev_of "$backend")" "$backend.raw")"
    done
    create_guest guest "$@"
    table=/job/results/$SCENARIO/table
    step "what measuring itself costs"
    measure idle 0 "sleep $RUNTIME_SECONDS; echo 3"
    for round in $(seq "$ROUNDS"); do
        for work in randread,4k randwrite,4k read,128k write,128k; do
            step "round $round of $ROUNDS: $work"
            for backend in $BACKENDS; do
                fio_once "$round" "${work%,*}" "${work#*,}" "$backend"
            done
        done
    done
    xl destroy guest
    umount "$IMAGES" 2>/dev/null || true
}

vdev_of() {
    case $1 in
    platter) echo xvda ;;
    qdisk) echo xvdb ;;
    blkback) echo xvdc ;;
    esac
}

# fio_once ROUND WORK BLOCK BACKEND
fio_once() {
    measure "$4" "$1 $2 $3" "
        fio --name=j --filename=/dev/$(vdev_of "$4") --rw=$2 --bs=$3 --direct=1 --ioengine=libaio \
            --iodepth=16 --time_based --runtime=$RUNTIME_SECONDS --size=128M \
            --output-format=terse --terse-version=3 | grep '^3;'"
}

# measure BACKEND LABEL COMMANDS: runs COMMANDS in the guest while dom0 keeps still, and adds a
# line to the table: BACKEND LABEL KIBIBYTES MILLISECONDS CPU_DOM0 CPU_STORAGE (seconds).
measure() {
    before=$(cpu_seconds)
    guest_start guest "$3"
    sleep $((RUNTIME_SECONDS + 1))
    said=$(guest_wait guest) || fail "fio failed: $said"
    # Only now: fio may have started late, and what it used after an earlier look would be lost.
    cpu=$(cpu_since "$before")
    # Terse version 3: KiB and milliseconds stand in fields 6 and 9 for reads, 47 and 50 for writes.
    io=$(echo "$said" | awk -F';' '{ print $6 + $47, ($6 > 0 ? $9 : $50) + 0 }')
    echo "$1 $2 $io $cpu" >>"$table"
}
