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
    step "kill -9, and start again"
    stop_9p_server storage
    ups=$(up_count storage images)
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
}
