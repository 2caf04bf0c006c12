#: title A read-only disk is read and refuses writes
#: needs platter.elf
#: storage any
# Would miss: a frontend that ignores its read-only flag; the hostile guest's scenario has that.

scenario() {
    make_image disk.raw 32M
    mke2fs -q -t ext4 "$IMAGES/disk.raw" >&2
    mount -o loop "$IMAGES/disk.raw" /mnt
    echo kept >/mnt/file
    umount /mnt
    before=$(md5sum <"$IMAGES/disk.raw")
    create_storage
    create_guest guest "$(disk xvda disk.raw r)"
    step "read, then try to write"
    expect_equal "the read-only flag" 1 "$(guest_must guest 'cat /sys/block/xvda/ro')"
    said=$(guest_must guest 'mount -t ext4 -o ro,noload /dev/xvda /mnt && cat /mnt/file')
    expect_equal "the file" kept "$said"
    if guest guest 'umount /mnt; dd if=/dev/zero of=/dev/xvda bs=4k count=1 conv=fsync' >&2; then
        fail "a write to a read-only disk succeeded"
    fi
    stop_guest guest
    expect_equal "md5 of the image" "$before" "$(md5sum <"$IMAGES/disk.raw")"
}
