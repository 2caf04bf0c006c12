#: title A filesystem made in a PV guest holds its files across a remount
#: needs platter.elf
#: storage any
# Would miss: what a crash does; 30-destroyed-guest has that.

scenario() {
    make_image disk.raw 64M
    create_storage
    create_guest guest "$(disk xvda disk.raw)"
    step "mkfs, write, remount, read back"
    guest_must guest '
        set -e
        mkfs.ext4 -q /dev/xvda
        mount -t ext4 /dev/xvda /mnt
        dd if=/dev/urandom of=/mnt/file bs=1M count=8 2>/dev/null
        md5sum </mnt/file >/tmp/before
        umount /mnt
        echo 3 >/proc/sys/vm/drop_caches
        fsck.ext4 -fn /dev/xvda
        mount -t ext4 /dev/xvda /mnt
        md5sum </mnt/file >/tmp/after
        cmp /tmp/before /tmp/after'
    inside=$(guest_must guest 'cat /tmp/after' | cut -d' ' -f1)
    stop_guest guest

    step "the same bytes from outside"
    e2fsck -fn "$IMAGES/disk.raw" >&2 || fail "e2fsck in dom0 finds errors"
    mount -o loop,ro "$IMAGES/disk.raw" /mnt
    outside=$(md5sum </mnt/file | cut -d' ' -f1)
    umount /mnt
    expect_equal "md5 of the file" "$inside" "$outside"
}
