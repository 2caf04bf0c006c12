#: title The domain that serves platter's own disk dies in mid-write, and another takes its place
#: needs platter.elf
#: set slow
#: timeout 300
# Another platter is that domain: it starts in no time. Would miss: the death of a Linux driver
# domain, which takes longer to come back than operations wait for.

LOWER="vdev=xvda,backend=lower,format=raw,target=/images/disk.raw"

scenario() {
    make_image disk.raw 64M
    qemu-img create -q -f qcow2 "$RUN/image.qcow2" 48M
    dd if="$RUN/image.qcow2" of="$IMAGES/disk.raw" conv=notrunc 2>/dev/null
    create_lower
    create_storage_on "$CONFIGS/storage-disk.cfg" "disk=['$LOWER']"
    create_guest guest "$(on_store xvda /xvda,format=qcow2)"
    guest_start guest "$WRITE_THROUGH_RESTARTS
        md5sum </tmp/data"
    for _ in 1 2; do
        sleep 2
        ups=$(up_count storage xvda)
        step "the lower domain dies"
        xl destroy lower
        xl block-detach storage xvda >&2 || true
        create_lower
        block_attach storage "$LOWER"
        within 20 up_more_than storage xvda "$ups" || fail "the disk does not come up again"
    done
    guest_wait guest 240 >"$RUN/md5" || fail "the guest's writes failed: $(cat "$RUN/md5")"
    sleep 3
    counters=$(store_counters xvda)
    note "$counters"
    expect_match "cycles" "connects=3" "$counters"
    stop_guest guest
    timeout 20 xl shutdown -w storage >&2 || fail "xl shutdown does not end"
    timeout 20 xl shutdown -w lower >&2 || fail "xl shutdown of the lower domain does not end"

    step "the image from outside"
    qemu-img check -f qcow2 "$IMAGES/disk.raw" >&2 || fail "qemu-img check of the image"
    qemu-img convert -f qcow2 -O raw "$IMAGES/disk.raw" "$RUN/image.raw"
    found=$(head -c $((384 * 65536)) "$RUN/image.raw" | md5sum)
    expect_equal "md5 of the data" "$(cat "$RUN/md5")" "$found"
}

# The domain that has the image: a platter on a share of dom0.
create_lower() {
    step "the lower domain: create"
    ups_of_lower=$(up_count lower images)
    set --
    if [ "$(ninep_server) $SUITE" = "platter bookworm" ]; then set -- "p9=[]"; fi
    create_storage_domain "$CONFIGS/storage.cfg" 'name="lower"' "$@"
    start_9p_server lower
    within 30 up_more_than lower images "$ups_of_lower" || fail "the lower domain is not ready"
}
