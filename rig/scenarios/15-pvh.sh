#: title A PVH guest writes and reads its disk
#: needs platter.elf
#: storage any
# Would miss: PVH on hardware; here its kernel has to do without XSAVE.

scenario() {
    make_image disk.raw 32M
    create_storage
    GUEST_CONFIG=guest-pvh.cfg
    create_guest guest "$(disk xvda disk.raw)"
    step "write and read back"
    guest_must guest '
        set -e
        mkfs.ext4 -q /dev/xvda
        mount -t ext4 /dev/xvda /mnt
        dd if=/dev/urandom of=/mnt/file bs=1M count=4 2>/dev/null
        md5sum </mnt/file >/tmp/before
        umount /mnt
        echo 3 >/proc/sys/vm/drop_caches
        mount -t ext4 /dev/xvda /mnt
        md5sum </mnt/file | cmp - /tmp/before'
    stop_guest guest
    e2fsck -fn "$IMAGES/disk.raw" >&2 || fail "e2fsck in dom0 finds errors"
}
