#: title A striped logical volume over two disks of dom0
#: needs platter.elf
#: set slow
# Would miss: RAID, thin pools, snapshots: they are refused by name, which the unit tests show.

scenario() {
    for n in 1 2; do
        make_image pv$n.img 128M
        eval "device$n=$(losetup --show -f "$IMAGES/pv$n.img")"
    done
    pvcreate -q "$device1" "$device2" >&2
    vgcreate -q vg "$device1" "$device2" >&2
    lvcreate -q -an -Zn -n striped -i 2 -I 64k -L 96M vg >&2
    lvcreate -q -an -Zn -n linear -L 96M vg >&2
    volumes_off vg
    READY_PATTERN="'xvdb' is up"
    create_storage_on "$CONFIGS/storage-disk.cfg" \
        "disk=['phy:$device1,xvda,w','phy:$device2,xvdb,w']"
    create_guest guest "$(on_store xvda /xvda/vg/striped)" "$(on_store xvdb /xvdb/vg/linear)"
    guest_must guest '
        set -e
        mkfs.ext4 -q /dev/xvda
        mount -t ext4 /dev/xvda /mnt
        dd if=/dev/urandom of=/mnt/file bs=256k count=64 2>/dev/null
        md5sum </mnt/file
        umount /mnt
        echo linear | dd of=/dev/xvdb conv=fsync 2>/dev/null' 240 >"$RUN/md5"
    stop_guest guest
    timeout 20 xl shutdown -w storage >&2 || fail "xl shutdown does not end"
    volumes_on vg
    expect_equal "the linear volume" linear "$(head -n1 /dev/mapper/vg-linear)"
    e2fsck -fn /dev/mapper/vg-striped >&2 || fail "e2fsck of the striped volume"
    mount -o ro /dev/mapper/vg-striped /mnt
    found=$(md5sum </mnt/file)
    umount /mnt
    volumes_off vg
    expect_equal "md5 of the file" "$(cat "$RUN/md5")" "$found"
}
