#: title A guest reboots and finds its disk as it left it
#: needs platter.elf
#: storage any
# Would miss: kexec, where the frontend comes back without closing.

scenario() {
    make_image disk.raw 32M
    create_storage
    create_guest guest "$(disk xvda disk.raw)"
    guest_must guest '
        mkfs.ext4 -q /dev/xvda && mount -t ext4 /dev/xvda /mnt &&
        echo kept >/mnt/file && umount /mnt'
    old=$(xl domid guest)
    step "reboot"
    guest_start guest 'reboot -f'
    wait_guest guest 1
    [ "$(xl domid guest)" != "$old" ] || fail "the guest has the same domid as before"
    said=$(guest_must guest 'mount -t ext4 /dev/xvda /mnt && cat /mnt/file')
    expect_equal "the file" kept "$said"
}
