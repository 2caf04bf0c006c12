#: title platter-9pfsd killed and started again loses nothing that was flushed
#: needs platter.elf platter-9pfsd
#: timeout 240
# Would miss: a cut of power to the host, which is the file system's matter.

scenario() {
    make_image disk.raw 16M
    create_storage
    [ "$(ninep_server)" = platter ] || fail "the server is $(ninep_server)"
    create_guest guest "$(disk xvda disk.raw)"
    guest_must guest 'echo before | dd of=/dev/xvda conv=fsync 2>/dev/null'
    step "kill -9 under load, and start again"
    # Each block is flushed before the next is written; an error ends it.
    guest_start guest '
        n=1
        while echo "flushed $n" | dd of=/dev/xvda bs=4k seek=$n conv=fsync 2>/dev/null; do
            echo $n >/tmp/flushed
            n=$((n + 1))
        done'
    within 60 eval '[ "$(block 8)" = "flushed 8" ]' || fail "the load does not start"
    stop_9p_server storage
    ups=$(up_count storage images)
    guest_wait guest 90 >&2 || fail "the load does not end"
    flushed=$(guest_must guest 'cat /tmp/flushed')
    # Started alone: the share is attached already, also on the release where that is done by hand.
    within 10 eval '! pgrep -x platter-9pfsd' || fail "the server does not die"
    /usr/lib/platter/platter-9pfsd serve --user root --allow "$IMAGES" </dev/null \
        >"$RUN/again.log" 2>&1 &
    within 60 up_more_than storage images "$ups" || fail "the store does not come up again"
    step "a second one is refused"
    if said=$(timeout 10 /usr/lib/platter/platter-9pfsd serve --user root --allow "$IMAGES" 2>&1)
    then fail "a second server runs"; fi
    expect_match "the refusal" "process [0-9]+, serves this domain's shares already" "$said"
    step "the guest goes on"
    guest_goes_on guest disk.raw
    step "$flushed blocks that were flushed are there"
    for n in $(seq "$flushed"); do
        expect_equal "block $n" "flushed $n" "$(block "$n")"
    done
}

# block N: the first line of the image's block of 4 KiB.
block() {
    dd if="$IMAGES/disk.raw" bs=4k skip="$1" count=1 2>/dev/null | tr -d '\0' | head -n1
}
