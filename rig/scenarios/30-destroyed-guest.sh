#: title A guest destroyed in mid-write leaves its disk good for the next guest
#: needs platter.elf
#: storage any
# Would miss: a crash of the storage domain itself; the simulator cuts its power at every write.

scenario() {
    make_image disk.raw 96M
    create_storage
    create_guest first "$(disk xvda disk.raw)"
    step "a synced file, then writing without an end"
    guest_must first '
        set -e
        mkfs.ext4 -q /dev/xvda
        mount -t ext4 /dev/xvda /mnt
        dd if=/dev/urandom of=/mnt/kept bs=1M count=4 conv=fsync 2>/dev/null
        md5sum </mnt/kept' >"$RUN/md5"
    guest_start first '
        n=0
        while :; do
            dd if=/dev/urandom of=/mnt/churn.$((n % 8)) bs=64k count=64 conv=fsync 2>/dev/null
            n=$((n + 1))
        done'
    sleep 2
    step "destroy"
    xl destroy first || fail "xl destroy does not get rid of the guest"
    within 15 domain_is_gone first || fail "the destroyed guest is still there"
    no_backends
    create_guest next "$(disk xvda disk.raw)"
    step "the next guest finds the synced file"
    guest next 'fsck.ext4 -fy /dev/xvda' >&2 || [ $? -le 1 ] || fail "fsck cannot mend the disk"
    guest_must next 'mount -t ext4 /dev/xvda /mnt && md5sum </mnt/kept' >"$RUN/md5.next"
    expect_equal "md5 of the synced file" "$(cat "$RUN/md5")" "$(cat "$RUN/md5.next")"
}
