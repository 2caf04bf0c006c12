#: title A store that appears after the storage domain has started is taken up
#: needs platter.elf
#: suites trixie
# Would miss: a store that appears after minutes; the wait is the same.
# On Xen 4.17 libxl starts the 9p server before the domain runs, so it cannot be late there.

scenario() {
    make_image disk.raw 16M
    step "a storage domain without its 9p server"
    create_storage_domain "$CONFIGS/storage.cfg"
    sleep 2
    domain_is_running storage || fail "the storage domain did not wait for its store"
    step "a guest meanwhile is kept waiting or refused, within libxl's 10 s"
    guest_config_small early "$(disk xvda disk.raw)" >"$RUN/early.cfg"
    began=$(uptime_seconds)
    timeout 30 xl create -p "$RUN/early.cfg" >&2 || true
    took=$(elapsed_since "$began" whole)
    [ "$took" -lt 13 ] || fail "xl create without a store took $took s"
    xl destroy early >&2 || true
    start_9p_server storage
    within 20 console_has storage "$READY_PATTERN" || fail "the late store was not taken up"
    create_guest guest "$(disk xvda disk.raw)"
    guest_must guest 'echo late | dd of=/dev/xvda conv=fsync 2>/dev/null'
    expect_equal "the image" late "$(head -n1 "$IMAGES/disk.raw")"
}
