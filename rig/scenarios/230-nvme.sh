#: title An NVMe controller of the storage domain's own serves partitions and images
#: needs platter.elf
#: set slow
#: machine nvme
#: timeout 300
# Would miss: errors and resets of the controller, which storage's model tests have.

scenario() {
    step "two partitions, one with a qcow2 image in it"
    device=$(nvme_for_dom0)
    sgdisk -Z "$device" >&2 || true
    sgdisk -n 1:0:+96M -c 1:plain -n 2:0:+96M -c 2:image "$device" >&2
    within 10 test -b "${device}p2" || fail "dom0 has no partitions of $device"
    qemu-img create -q -f qcow2 "$RUN/image.qcow2" 64M
    dd if="$RUN/image.qcow2" of="${device}p2" conv=fsync 2>/dev/null
    nvme_for_domains
    create_storage "pci=['$NVME_SLOT']"
    within 20 console_has storage "NVMe controller" || fail "no NVMe controller is found"
    target="backend=storage,access=w,format=raw,target=/nvme0n1"
    create_guest guest "vdev=xvda,$target/plain" "vdev=xvdb,$target/image,format=qcow2"
    step "a filesystem on each of them"
    guest_must guest '
        set -e
        dd if=/dev/urandom of=/tmp/data bs=1M count=4 2>/dev/null
        for disk in /dev/xvd[ab]; do
            mkfs.ext4 -q $disk
            mount -t ext4 $disk /mnt
            cp /tmp/data /mnt/file
            umount /mnt
            fsck.ext4 -fn $disk
        done' 240
    inside=$(guest_must guest 'md5sum </tmp/data' | cut -d' ' -f1)
    stop_guest guest
    xl shutdown -w storage >&2
    # The device is free when the domain is destroyed, a moment after it has shut down.
    within 20 domain_is_gone storage || fail "the storage domain does not go"

    step "the same from outside"
    device=$(nvme_for_dom0)
    within 10 test -b "${device}p2" || fail "dom0 has no partitions of $device"
    mount -o ro "${device}p1" /mnt
    expect_equal "md5 on the partition" "$inside" "$(md5sum </mnt/file | cut -d' ' -f1)"
    umount /mnt
    dd if="${device}p2" of="$RUN/image.qcow2" bs=1M 2>/dev/null
    qemu-img check -q "$RUN/image.qcow2" >&2 || fail "qemu-img check of the image"
    nvme_for_domains
}
