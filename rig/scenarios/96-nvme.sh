#: title An NVMe controller of the storage domain's own: a partition and a qcow2 image on it
#: needs platter.elf
#: machine nvme
#: set slow
# Would miss: controllers that behave otherwise than QEMU's; the simulator's model has faults.

scenario() {
    step "dom0 prepares the controller's disk"
    device=$(nvme_for_dom0)
    sgdisk -Z "$device" >&2 || true
    sgdisk -n 1:0:+64M -c 1:plain -n 2:0:+64M -c 2:image "$device" >&2
    partition_nodes "$device"
    qemu-img create -q -f qcow2 "$IMAGES/small.qcow2" 32M >&2
    dd if="$IMAGES/small.qcow2" of="${device}p2" conv=fsync 2>/dev/null
    sync
    nvme_for_domains
    READY_PATTERN="'?nvme0n1'? is up"
    create_storage_on "$CONFIGS/storage-nvme.cfg" "pci=['$NVME_SLOT']"
    create_guest guest "$(on_store xvda /nvme0n1/plain)" \
        "$(on_store xvdb /nvme0n1/p2,format=qcow2)"
    step "write to both, read back"
    guest_must guest '
        set -e
        mkfs.ext4 -q /dev/xvda
        mount -t ext4 /dev/xvda /mnt
        dd if=/dev/urandom of=/mnt/file bs=256k count=16 2>/dev/null
        md5sum </mnt/file
        umount /mnt
        echo 3 >/proc/sys/vm/drop_caches
        fsck.ext4 -fn /dev/xvda >/dev/null 2>&1
        echo image | dd of=/dev/xvdb conv=fsync 2>/dev/null' >"$RUN/md5"
    stop_guest guest
    timeout 20 xl shutdown -w storage >&2 || fail "xl shutdown does not end"
    step "dom0 looks at it"
    device=$(nvme_for_dom0)
    partition_nodes "$device"
    e2fsck -fn "${device}p1" >&2 || fail "e2fsck of partition 1"
    mount -o ro "${device}p1" /mnt
    found=$(md5sum </mnt/file)
    umount /mnt
    expect_equal "md5 of the file" "$(cat "$RUN/md5")" "$found"
    qemu-img check -q -f qcow2 "${device}p2" >&2 || fail "qemu-img check of partition 2"
}
