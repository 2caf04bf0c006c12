#: title Disks from dom0: partitions, LVM volumes and files on ext4 serve as images
#: needs platter.elf
#: timeout 600
# Would miss: NVMe, which 230-nvme has; striped volumes, which storage's tests have.

# The disk is a file behind a loop device: GPT with a raw partition, an LVM group and an ext4.
prepare() {
    truncate -s 512M "$IMAGES/big.raw"
    sgdisk -n 1:0:+96M -c 1:plain -n 2:0:+128M -t 2:8e00 -n 3:0:+160M -c 3:files \
        "$IMAGES/big.raw" >&2
    loop=$(losetup --show -f -P "$IMAGES/big.raw")
    within 10 test -b "${loop}p3" || fail "dom0 has no partitions of $loop"
    pvcreate -qq "${loop}p2" >&2 && vgcreate -qq platter_vg "${loop}p2" >&2
    lvcreate -qq -y -Wn -Zn -L 64M -n volume platter_vg >&2 || fail "lvcreate failed"
    vgchange -qq -an platter_vg >&2
    mkfs.ext4 -q "${loop}p3"
    mount "${loop}p3" /mnt
    qemu-img create -q -f qcow2 -o preallocation=full "$RUN/image.qcow2" 64M
    # Written, not only reserved: platter never turns reserved blocks into written ones.
    dd if="$RUN/image.qcow2" of=/mnt/image.qcow2 bs=1M 2>/dev/null
    umount /mnt
    losetup -d "$loop"
}

scenario() {
    step "a disk with partitions, LVM and ext4"
    prepare
    loop=$(losetup --show -f "$IMAGES/big.raw")
    create_storage "disk=['phy:$loop,xvda,w']"
    within 20 console_has storage "disk 'xvda' is up" || fail "xvda does not come up"
    target="backend=storage,access=w,format=raw,target=/xvda"
    create_guest guest "vdev=xvda,$target/p1" "vdev=xvdb,$target/platter_vg/volume" \
        "vdev=xvdc,$target/files/image.qcow2"
    step "a filesystem on each of them"
    guest_must guest '
        set -e
        dd if=/dev/urandom of=/tmp/data bs=1M count=4 2>/dev/null
        for disk in /dev/xvd[abc]; do
            mkfs.ext4 -q $disk
            mount -t ext4 $disk /mnt
            cp /tmp/data /mnt/file
            umount /mnt
            fsck.ext4 -fn $disk
        done' 240
    inside=$(guest_must guest 'md5sum </tmp/data' | cut -d' ' -f1)
    stop_guest guest
    xl shutdown -w storage >&2
    losetup -d "$loop"

    step "the same from outside"
    loop=$(losetup --show -f -P "$IMAGES/big.raw")
    within 10 test -b "${loop}p3" || fail "dom0 has no partitions of $loop"
    sgdisk -v "$IMAGES/big.raw" >&2
    volumes_on platter_vg
    for place in "${loop}p1" /dev/platter_vg/volume; do
        mount -o ro "$place" /mnt
        expect_equal "md5 on $place" "$inside" "$(md5sum </mnt/file | cut -d' ' -f1)"
        umount /mnt
    done
    volumes_off platter_vg
    e2fsck -fn "${loop}p3" >&2 || fail "e2fsck of the filesystem that holds the image"
    mount -o ro "${loop}p3" /mnt
    qemu-img check -q /mnt/image.qcow2 >&2 || fail "qemu-img check of the image on ext4"
    umount /mnt
    losetup -d "$loop"
}
