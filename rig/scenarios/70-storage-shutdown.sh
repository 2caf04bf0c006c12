#: title xl shutdown and xl reboot are answered by the storage domain
#: needs platter.elf
# Would miss: a shutdown while a store does not answer.

scenario() {
    make_image disk.raw 16M
    create_storage 'on_reboot="restart"'
    create_guest guest "$(disk xvda disk.raw)"
    guest_must guest 'echo written | dd of=/dev/xvda conv=fsync 2>/dev/null'
    xl destroy guest
    step "xl reboot"
    before=$(console_of storage | grep -c "$READY_PATTERN")
    old=$(xl domid storage)
    xl reboot storage >&2 || fail "xl reboot failed"
    within 20 other_domid storage "$old" || fail "the storage domain did not come back"
    start_9p_server storage
    within 20 ready_again "$before" || fail "the storage domain is not ready after its reboot"
    create_guest guest "$(disk xvda disk.raw)"
    guest_must guest '[ "$(head -n1 /dev/xvda)" = written ]'
    step "xl shutdown under a running guest"
    began=$(uptime_seconds)
    timeout 20 xl shutdown -w storage >&2 || fail "xl shutdown does not end"
    echo "shut down in $(elapsed_since "$began") s"
    within 10 domain_is_gone storage || fail "the storage domain is still there"
    expect_equal "the image" written "$(head -n1 "$IMAGES/disk.raw")"
}

other_domid() { now=$(xl domid "$1" 2>/dev/null) && [ "$now" != "$2" ]; }

ready_again() { [ "$(console_of storage | grep -c "$READY_PATTERN")" -gt "$1" ]; }
