#: title The storage domain is destroyed and made anew under a running guest
#: needs platter.elf
#: set slow
# Would miss: a guest that has the disk mounted; its filesystem is lost to it, as with any disk.

scenario() {
    make_image disk.raw 32M
    create_storage
    create_guest guest "$(disk xvda disk.raw)"
    guest_must guest 'echo before | dd of=/dev/xvda conv=fsync 2>/dev/null'
    step "destroy, create"
    destroy_storage
    stop_9p_server storage 2>/dev/null || true
    create_storage
    step "detach the dead disk, attach it from the new domain"
    block_detach guest xvda
    block_attach guest "$(disk xvdb disk.raw)"
    guest_must guest '
        tries=0
        until [ -b /dev/xvdb ]; do
            tries=$((tries + 1))
            [ $tries -lt 100 ] || exit 1
            sleep 0.1
        done
        [ "$(head -n1 /dev/xvdb)" = before ] &&
            echo after | dd of=/dev/xvdb conv=fsync 2>/dev/null'
    expect_equal "the image" after "$(head -n1 "$IMAGES/disk.raw")"
}
