#: title The storage domain destroyed in mid-write: qcow2 and ext4 survive what was synced
#: needs platter.elf
#: set slow
# Would miss: each single place of a cut; the simulator goes through those.

scenario() {
    qemu-img create -q -f qcow2 "$IMAGES/disk.qcow2" 128M >&2
    create_storage
    create_guest guest "$(disk xvda disk.qcow2)"
    guest_must guest '
        set -e
        mkfs.ext4 -q /dev/xvda
        mount -t ext4 /dev/xvda /mnt
        dd if=/dev/urandom of=/mnt/kept bs=256k count=16 conv=fsync 2>/dev/null
        md5sum </mnt/kept' >"$RUN/md5"
    guest_start guest '
        n=0
        while dd if=/dev/urandom of=/mnt/churn.$((n % 8)) bs=64k count=32 conv=fsync 2>/dev/null
        do
            n=$((n + 1))
        done'
    sleep 3
    step "xl destroy storage"
    destroy_storage
    xl destroy guest >&2 || true
    step "qemu-img check, before anything mends it"
    status=0
    qemu-img check -f qcow2 "$IMAGES/disk.qcow2" >&2 || status=$?
    [ "$status" = 0 ] || [ "$status" = 3 ] || fail "qemu-img check says $status: corruption"
    stop_9p_server storage 2>/dev/null || true
    create_storage
    create_guest next "$(disk xvda disk.qcow2)"
    guest next 'fsck.ext4 -fy /dev/xvda' >&2 || [ $? -le 1 ] || fail "fsck cannot mend the disk"
    guest_must next 'mount -t ext4 /dev/xvda /mnt && md5sum </mnt/kept' >"$RUN/md5.next"
    expect_equal "md5 of the synced file" "$(cat "$RUN/md5")" "$(cat "$RUN/md5.next")"
}
