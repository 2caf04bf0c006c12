#: title When the 9p server dies, disks report errors and the storage domain lives
#: needs platter.elf
# Would miss: a server that hangs without dying, which is server-hangs.

scenario() {
    make_image disk.raw 16M
    create_storage
    create_guest guest "$(disk xvda disk.raw)"
    guest_must guest 'echo before | dd of=/dev/xvda conv=fsync 2>/dev/null'
    step "kill the server"
    stop_9p_server storage
    step "the guest's I/O ends with an error"
    if guest guest 'dd if=/dev/zero of=/dev/xvda bs=4k count=4 seek=8 conv=fsync' 90 >&2; then
        fail "a write succeeded without a server"
    fi
    domain_is_running storage || fail "the storage domain died with its server"
    xl destroy guest >&2 || fail "the guest cannot be destroyed"
    step "the storage domain still answers"
    timeout 20 xl shutdown -w storage >&2 || fail "xl shutdown does not end"
    expect_equal "the image" before "$(head -n1 "$IMAGES/disk.raw")"
}
