#: title A chain of backing files is served, its lower layers untouched; backing=deny refuses it
#: needs platter.elf
# Would miss: long chains; the image tests go to hundreds of layers.

scenario() {
    make_image base.raw 64M
    mke2fs -q -t ext4 "$IMAGES/base.raw" >&2
    mount -o loop "$IMAGES/base.raw" /mnt
    echo below >/mnt/file
    umount /mnt
    (
        cd "$IMAGES"
        qemu-img create -q -f vmdk middle.vmdk 64M
        qemu-img convert -f raw -O vmdk base.raw middle.vmdk
        qemu-img create -q -f qcow2 -F vmdk -b middle.vmdk lower.qcow2
        qemu-img create -q -f qcow2 -F qcow2 -b lower.qcow2 top.qcow2
        qemu-img create -q -u -f qcow2 -F raw -b ../outside.raw escape.qcow2 64M
    ) >&2
    before=$(cat "$IMAGES/middle.vmdk" "$IMAGES/lower.qcow2" | md5sum)
    create_storage
    create_guest guest "$(disk xvda top.qcow2)"
    step "read through the chain, write to its top"
    guest_must guest '
        set -e
        mount -t ext4 /dev/xvda /mnt
        [ "$(cat /mnt/file)" = below ]
        echo above >/mnt/file
        umount /mnt'
    stop_guest guest
    expect_equal "the lower layers" "$before" \
        "$(cat "$IMAGES/middle.vmdk" "$IMAGES/lower.qcow2" | md5sum)"
    qemu-img check -q "$IMAGES/top.qcow2" >&2 || fail "qemu-img check of the top"
    qemu-img convert -O raw "$IMAGES/top.qcow2" "$IMAGES/flat" >&2
    mount -o loop,ro "$IMAGES/flat" /mnt
    said=$(cat /mnt/file)
    umount /mnt
    expect_equal "the file in the top" above "$said"
    expect_refused /images/top.qcow2,backing=deny 'names another file.*denie'
    expect_refused /images/escape.qcow2 '(\.\.|outside)'
}
