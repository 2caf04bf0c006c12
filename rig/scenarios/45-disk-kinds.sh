#: title 4096-byte sectors, a frontend that trusts nobody, a CD, a qcow2 that discard shrinks
#: needs platter.elf
# Would miss: several kinds on one disk.

scenario() {
    make_image large-sectors.raw 32M
    make_image untrusted.raw 32M
    mke2fs -q -t ext4 -L the-cd "$IMAGES/cd.raw" 8M >&2
    qemu-img create -q -f qcow2 "$IMAGES/thin.qcow2" 96M
    create_storage
    step "guest: create the guest"
    guest_config guest \
        "$(disk xvda large-sectors.raw | sed 's/$/,sector=4096/')" \
        "$(disk xvdb untrusted.raw)" \
        "devtype=cdrom,$(disk xvdc cd.raw r)" \
        "$(disk xvdd thin.qcow2)" >"$RUN/guest.cfg"
    xl create -p "$RUN/guest.cfg" >&2 || fail "xl create of the guest failed"
    # xl has no word for it; libxl writes 1.
    xenstore-write "/local/domain/$(xl domid guest)/device/vbd/51728/trusted" 0
    xl unpause guest
    wait_guest guest
    step "4096-byte sectors, and an untrusted backend"
    expect_equal "the logical block size" 4096 \
        "$(guest_must guest 'cat /sys/block/xvda/queue/logical_block_size')"
    guest_must guest '
        set -e
        dd if=/dev/urandom of=/tmp/data bs=1M count=4 2>/dev/null
        for disk in xvda xvdb; do
            mkfs.ext4 -q /dev/$disk
            mount -t ext4 /dev/$disk /mnt
            cp /tmp/data /mnt/file
            umount /mnt
        done
        echo 3 >/proc/sys/vm/drop_caches
        for disk in xvda xvdb; do
            fsck.ext4 -fn /dev/$disk
            mount -t ext4 -o ro /dev/$disk /mnt
            cmp /tmp/data /mnt/file
            umount /mnt
        done' 240
    step "the CD"
    expect_equal "the CD's type in xenstore" cdrom "$(xenstore-read \
        "/local/domain/$(xl domid storage)/backend/vbd/$(xl domid guest)/51744/device-type")"
    guest_must guest '
        set -e
        mount -t ext4 -o ro,noload /dev/xvdc /mnt
        umount /mnt
        ! dd if=/dev/zero of=/dev/xvdc bs=4k count=1 conv=fsync 2>/dev/null'
    step "the qcow2 grows by writes and shrinks by discard"
    guest_must guest '
        set -e
        mkfs.ext4 -q /dev/xvdd
        mount -t ext4 /dev/xvdd /mnt
        dd if=/dev/urandom of=/mnt/file bs=1M count=32 2>/dev/null
        sync'
    full=$(du -k "$IMAGES/thin.qcow2" | cut -f1)
    guest_must guest 'rm /mnt/file && sync && fstrim /mnt && umount /mnt && sync'
    thin=$(du -k "$IMAGES/thin.qcow2" | cut -f1)
    echo "the qcow2 occupied $full KiB with a file of 32 MiB, $thin KiB without it"
    [ "$full" -ge 32768 ] || fail "the qcow2 holds less than was written: $full KiB"
    [ "$((thin + 30000))" -lt "$full" ] || fail "the qcow2 does not shrink: $full to $thin KiB"
    stop_guest guest
    qemu-img check -q "$IMAGES/thin.qcow2" >&2 || fail "qemu-img check after the discards"
    for image in large-sectors untrusted; do
        e2fsck -fn "$IMAGES/$image.raw" >&2 || fail "e2fsck of $image.raw finds errors"
    done
}
