#: title Partitions, logical volumes and ext4 files on a disk that dom0 lends
#: needs platter.elf
# Would miss: two disks; 97-store-lvm-striped has those.

scenario() {
    make_image store.img 512M
    step "a disk with a GPT: raw, qcow2, LVM, ext4"
    sgdisk -n 1:0:+64M -c 1:plain -n 2:0:+64M -c 2:image -n 3:0:+128M -c 3:lvm -t 3:8e00 \
        -n 4:0:0 -c 4:files "$IMAGES/store.img" >&2
    device=$(losetup -P --show -f "$IMAGES/store.img")
    partition_nodes "$device"
    qemu-img create -q -f qcow2 "$IMAGES/small.qcow2" 32M >&2
    dd if="$IMAGES/small.qcow2" of="${device}p2" conv=fsync 2>/dev/null
    pvcreate -q "${device}p3" >&2
    vgcreate -q vg "${device}p3" >&2
    lvcreate -q -an -Zn -n volume -L 64M vg >&2
    mke2fs -q -t ext4 "${device}p4" >&2
    mount "${device}p4" /mnt
    dd if=/dev/zero of=/mnt/disk.raw bs=1M count=48 conv=fsync 2>/dev/null
    mkdir /mnt/folder
    dd if=/dev/zero of=/mnt/folder/other.raw bs=1M count=16 conv=fsync 2>/dev/null
    umount /mnt
    vgchange -q -an vg >&2
    create_storage_on "$CONFIGS/storage-disk.cfg" "disk=['phy:$device,xvda,w']"
    create_guest guest "$(on_store xvda /xvda/p1)" "$(on_store xvdb /xvda/image,format=qcow2)" \
        "$(on_store xvdc /xvda/vg/volume)" "$(on_store xvdd /xvda/p4/disk.raw)" \
        "$(on_store xvde /xvda/files/folder/other.raw)"
    step "a name of its own written to each"
    guest_must guest '
        for disk in xvda xvdb xvdc xvdd xvde; do
            yes $disk | head -c 4194304 | dd of=/dev/$disk bs=64k conv=fsync 2>/dev/null || exit 1
        done
        echo 3 >/proc/sys/vm/drop_caches
        for disk in xvda xvdb xvdc xvdd xvde; do
            yes $disk | head -c 4194304 | cmp -n 4194304 - /dev/$disk || exit 1
        done'
    stop_guest guest
    expect_refused /xvda/p9 'p9'
    expect_refused /xvda/vg/none 'vg/none'
    expect_refused /xvda/p4/missing.raw 'missing\.raw'
    timeout 20 xl shutdown -w storage >&2 || fail "xl shutdown does not end"
    step "each found where it belongs, by Linux"
    expect_equal "partition 1" xvda "$(head -n1 "${device}p1")"
    qemu-img check -q -f qcow2 "${device}p2" >&2 || fail "qemu-img check of partition 2"
    expect_equal "partition 2" xvdb \
        "$(qemu-img dd -f qcow2 -O raw bs=64k count=1 if="${device}p2" of=/tmp/two >&2
            head -n1 /tmp/two)"
    vgchange -q -ay vg >&2
    expect_equal "the logical volume" xvdc "$(head -n1 /dev/mapper/vg-volume)"
    vgchange -q -an vg >&2
    e2fsck -fn "${device}p4" >&2 || fail "e2fsck of partition 4"
    mount -o ro "${device}p4" /mnt
    expect_equal "the file" xvdd "$(head -n1 /mnt/disk.raw)"
    expect_equal "the file in a folder" xvde "$(head -n1 /mnt/folder/other.raw)"
    umount /mnt
}
