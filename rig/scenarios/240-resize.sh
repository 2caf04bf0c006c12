#: title A disk grows under a running guest
#: needs platter.elf
# Would miss: what filesystems do with it.

scenario() {
    make_image disk.raw 32M
    qemu-img create -q -f qcow2 "$IMAGES/disk.qcow2" 32M
    create_storage
    create_guest guest "$(disk xvda disk.raw)" "$(disk xvdb disk.qcow2)"
    step "grow the raw file; ask for a larger qcow2"
    truncate -s 48M "$IMAGES/disk.raw"
    be=/local/domain/$(xl domid storage)/backend/vbd/$(xl domid guest)/51728
    xenstore-write "$be/resize" $((48 * 1024 * 1024))
    guest_must guest '
        tries=0
        for disk in xvda xvdb; do
            until [ "$(cat /sys/block/$disk/size)" = 98304 ]; do
                tries=$((tries + 1))
                [ $tries -lt 100 ] || exit 1
                sleep 0.1
            done
            dd if=/dev/zero of=/dev/$disk bs=1M seek=40 count=8 conv=fsync 2>/dev/null
        done'
    stop_guest guest
    qemu-img check -q "$IMAGES/disk.qcow2" >&2 || fail "qemu-img check after the growth"
    expect_match "its size" '48 MiB' "$(qemu-img info "$IMAGES/disk.qcow2")"
}
