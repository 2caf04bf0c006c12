#: title Disks come to a running guest and go again
#: needs platter.elf
#: storage any
# Would miss: a guest that holds a disk open while it is detached.

scenario() {
    make_image one.raw 16M
    make_image two.raw 24M
    create_storage
    create_guest guest
    for image in one two; do
        step "attach $image.raw"
        block_attach guest "$(disk xvdb $image.raw)"
        guest_must guest "
            tries=0
            until [ -b /dev/xvdb ]; do
                tries=\$((tries + 1))
                [ \$tries -lt 50 ] || exit 1
                sleep 0.1
            done
            yes $image | dd of=/dev/xvdb bs=64k count=16 iflag=fullblock conv=fsync 2>/dev/null
            echo 3 >/proc/sys/vm/drop_caches
            [ \"\$(head -n1 /dev/xvdb)\" = $image ]"
        step "detach $image.raw"
        began=$(uptime_seconds)
        block_detach guest xvdb
        took=$(elapsed_since "$began" whole)
        [ "$took" -lt $((5 * SLOWNESS)) ] || fail "block-detach took $took s"
        guest_must guest '[ ! -e /dev/xvdb ]'
        expect_equal "$image.raw" "$image" "$(head -n1 "$IMAGES/$image.raw")"
        no_backends
    done
    if [ "${STORAGE:-platter}" = platter ]; then refused_attach; fi
}

# An attach that cannot be served fails at once, leaves its reason, and spoils nothing.
refused_attach() {
    step "attach a missing image"
    began=$(uptime_seconds)
    if xl block-attach guest "$(disk xvdb missing.raw)" >&2; then
        fail "a missing image was attached"
    fi
    # libxl gives up by itself after 10 s; 60-refused is strict about the time.
    took=$(elapsed_since "$began" whole)
    [ "$took" -lt $((5 * SLOWNESS)) ] || fail "the refusal took $took s"
    xl block-detach guest xvdb >&2 || true
    step "attach a good one after it"
    block_attach guest "$(disk xvdb one.raw)"
    guest_must guest 'sleep 1; head -n1 /dev/xvdb | grep -q one'
}
