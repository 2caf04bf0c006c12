#: title 16 MiB are enough for four disks
#: needs platter.elf
# The fourth would need 4 MiB to unpack a cluster: it has none that is packed.
# Would miss: four disks of a format with large tables; those have limits of their own.

scenario() {
    for n in 1 2 3; do make_image disk$n.raw 1G; done
    qemu-img create -q -f qcow2 -o cluster_size=2M "$IMAGES/disk4.qcow2" 1G
    create_storage memory=16
    create_guest guest "$(disk xvda disk1.raw)" "$(disk xvdb disk2.raw)" \
        "$(disk xvdc disk3.raw)" "$(disk xvdd disk4.qcow2)"
    step "write to all four at the same time, to their first and last MiB"
    guest_must guest '
        for disk in xvda xvdb xvdc xvdd; do
            {
                yes $disk | head -c 1048576 >/tmp/$disk
                dd if=/tmp/$disk of=/dev/$disk bs=64k conv=fsync &&
                    dd if=/tmp/$disk of=/dev/$disk bs=64k seek=16368 conv=fsync
            } 2>/dev/null &
        done
        wait
        echo 3 >/proc/sys/vm/drop_caches
        for disk in xvda xvdb xvdc xvdd; do
            head -c 1048576 /dev/$disk | cmp - /tmp/$disk || exit 1
            tail -c 1048576 /dev/$disk | cmp - /tmp/$disk || exit 1
        done'
    expect_equal "the last word of disk3.raw" xvdc "$(tail -c 1048576 "$IMAGES/disk3.raw" |
        head -n1)"
    qemu-img check -q "$IMAGES/disk4.qcow2" >&2 || fail "qemu-img check of the fourth"
}
