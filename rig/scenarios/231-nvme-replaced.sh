#: title The storage domain on NVMe is destroyed in mid-write and made anew under a running guest
#: needs platter.elf
#: set slow
#: machine nvme
#: timeout 300
# Would miss: a guest that has the disk mounted; its filesystem is lost to it, as with any disk.

DISK="vdev=xvdb,backend=storage,format=raw,target=/nvme0n1,format=qcow2"

scenario() {
    device=$(nvme_for_dom0)
    qemu-img create -q -f qcow2 "$RUN/image.qcow2" 64M
    dd if="$RUN/image.qcow2" of="$device" conv=fsync 2>/dev/null
    nvme_for_domains
    READY_PATTERN="NVMe controller"
    create_storage_on "$CONFIGS/storage-nvme.cfg" "pci=['$NVME_SLOT']"
    create_guest guest "$DISK"
    guest_must guest '
        dd if=/dev/urandom of=/tmp/data bs=64k count=64 2>/dev/null
        dd if=/tmp/data of=/dev/xvdb bs=64k conv=fsync 2>/dev/null
        md5sum </tmp/data' >"$RUN/md5"
    guest_start guest '
        while dd if=/tmp/data of=/dev/xvdb bs=64k seek=128 conv=fsync 2>/dev/null; do :; done'
    sleep 3
    step "destroy, create"
    destroy_storage
    within 20 domain_is_gone storage || fail "the storage domain does not go"
    create_storage_on "$CONFIGS/storage-nvme.cfg" "pci=['$NVME_SLOT']"
    step "detach the dead disk, attach it from the new domain"
    block_detach guest xvdb
    guest_wait guest 60 >/dev/null || true
    block_attach guest "$(echo "$DISK" | sed s/xvdb/xvdc/)"
    guest_must guest '
        set -e
        tries=0
        until [ -b /dev/xvdc ]; do
            tries=$((tries + 1))
            [ $tries -lt 100 ]
            sleep 0.1
        done
        dd if=/dev/xvdc bs=64k count=64 2>/dev/null | cmp - /tmp/data
        dd if=/tmp/data of=/dev/xvdc bs=64k seek=256 conv=fsync 2>/dev/null'
    stop_guest guest
    xl shutdown -w storage >&2
    within 20 domain_is_gone storage || fail "the storage domain does not go"

    step "the same from outside"
    device=$(nvme_for_dom0)
    qemu-img check -f qcow2 "$device" >&2 || [ $? = 3 ] || fail "qemu-img check of the image"
    qemu-img convert -f qcow2 -O raw "$device" "$RUN/image.raw"
    for place in 0 256; do
        found=$(dd if="$RUN/image.raw" bs=64k skip=$place count=64 2>/dev/null | md5sum)
        expect_equal "md5 of the data at $place" "$(cat "$RUN/md5")" "$found"
    done
    nvme_for_domains
}
