#: title Disks from dom0: grants that blkback keeps mapped beside grants that it maps each time
#: needs platter.elf loadgen.elf
#: set bench
#: timeout 1200
# The storage domain has two disks of one kind, loop devices over tmpfs; blkback offers to keep the
# grants of the first (`platter`), not of the second (`mapped`). One bare guest floods them in turn.
# Would miss: what a kept grant saves on many processors, where unmapping interrupts all of them.

. /job/dom0/loadgen.sh

RUNTIME_SECONDS=${RUNTIME_SECONDS:-3}
ROUNDS=${ROUNDS:-3}
WORKS=${WORKS:-randread,4k,1 randread,4k,32 randwrite,4k,32 randread,64k,32 randwrite,64k,32}
KEEPS=/sys/module/xen_blkback/parameters/feature_persistent

scenario() {
    mount -t tmpfs -o size=400M images "$IMAGES"
    for image in kept mapped; do
        dd if=/dev/zero of="$IMAGES/$image.raw" bs=1M count=64 2>/dev/null
    done
    create_storage "disk=['phy:$(loop_of kept.raw),xvda,w']"
    within 20 console_has storage "disk 'xvda' is up" || fail "xvda does not come up"
    echo N >"$KEEPS"
    xl block-attach storage "phy:$(loop_of mapped.raw),xvdb,w" >&2 || fail "xvdb is not attached"
    within 20 console_has storage "disk 'xvdb' is up" || fail "xvdb does not come up"
    echo Y >"$KEEPS"
    for disk in 51712:1 51728:0; do
        node=/local/domain/0/backend/vbd/$(xl domid storage)/${disk%:*}/feature-persistent
        expect_equal "$node" "${disk#*:}" "$(xenstore-read "$node")"
    done
    target="backend=storage,access=w,format=raw,target=/xvd"
    start_loadgen guest serve "vdev=xvda,${target}a" "vdev=xvdb,${target}b"
    within "$PATIENCE" console_has guest "waiting for jobs" || fail "the load does not start"
    table=/job/results/$SCENARIO/table
    number=1
    measure_idle
    for round in $(seq "$ROUNDS"); do
        for work in $WORKS; do
            step "round $round of $ROUNDS: $work"
            measure "$round" "$work" platter xvda
            measure "$round" "$work" mapped xvdb
        done
    done
    job guest 0 quit
    within 60 domain_is_gone guest || fail "the load does not end"
    xl destroy storage
    umount "$IMAGES" 2>/dev/null || true
}
