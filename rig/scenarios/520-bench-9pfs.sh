#: title Bare load generator: platter on platter-9pfsd, platter on QEMU's 9p, dom0's qdisk
#: needs platter.elf loadgen.elf platter-9pfsd
#: set bench
#: suites trixie
#: timeout 3600
# The two 9p servers take turns, round by round, since each would take every share; qdisk has its
# turn beside the first. What counts is the CPU time of dom0 and the storage domain together.
# Would miss: real disks: the images lie in dom0's memory.

. /job/dom0/loadgen.sh

RUNTIME_SECONDS=${RUNTIME_SECONDS:-5}
ROUNDS=${ROUNDS:-3}
BACKENDS=${BACKENDS:-platter qdisk qemu-9p}
WORKS=${WORKS:-$(for op in randread randwrite; do
    for work in 4k,1 4k,8 4k,32 4k,128 64k,1 64k,8 64k,32 64k,128 1024k,1 1024k,8 1024k,32; do
        echo "$op,$work"
    done
done)}

scenario() {
    mount -t tmpfs -o size=400M images "$IMAGES"
    dd if=/dev/zero of="$IMAGES/disk.raw" bs=1M count=64 2>/dev/null
    dd if=/dev/zero of="$IMAGES/qdisk.raw" bs=1M count=64 2>/dev/null
    table=/job/results/$SCENARIO/table
    copying
    for round in $(seq "$ROUNDS"); do
        for server in platter qemu-9p; do one_server "$round" "$server"; done
    done
    umount "$IMAGES" 2>/dev/null || true
}

# copying: what one copy costs this machine. Each byte of a request is copied twice, by dom0's
# kernel between the page cache and the ring and by Xen between the ring and the guest.
copying() {
    step "one copy by dom0's kernel, from the page cache: $(
        dd if="$IMAGES/disk.raw" of=/dev/null bs=1M 2>&1 | tail -n1)"
}

# one_server ROUND BACKEND: all works on a storage domain with that 9p server, and on qdisk too
# where it is platter-9pfsd.
one_server() {
    case " $BACKENDS " in *" $2 "*) ;; *) return 0 ;; esac
    if [ "$2" = qemu-9p ]; then NINEP=qemu; else NINEP=platter; fi
    STORAGE=platter
    create_storage
    set -- "$1" "$2" "$(disk xvda disk.raw)"
    STORAGE=qdisk
    LOADGEN_MEMORY=200 start_loadgen guest serve "$3" "$(disk xvdb qdisk.raw)"
    within "$PATIENCE" console_has guest "waiting for jobs" || fail "the load does not start"
    for number in 1 2; do
        job guest "$number" "disk=xvd$(echo "$number" | tr 12 ab) order=2 count=8 secs=1"
        job_wait guest "$number" >/dev/null
    done
    number=3
    [ -s "$table" ] || measure_idle
    for work in $WORKS; do
        step "round $1 of $ROUNDS: $2 $work"
        measure "$1" "$work" "$2" xvda
        case "$2 $BACKENDS " in
        platter*" qdisk "*) measure "$1" "$work" qdisk xvdb ;;
        esac
    done
    job guest 0 quit
    within 60 domain_is_gone guest || fail "the load does not end"
    stop_9p_server storage
    xl destroy storage
    # What the consoles of the next ones say is theirs.
    rm -f "$CONSOLES"/guest-*.log
}
