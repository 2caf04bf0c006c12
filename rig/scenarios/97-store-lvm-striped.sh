#: title Logical volumes over two disks of dom0, and a partition, grow under a running guest
#: needs platter.elf
#: set slow
# Would miss: RAID, thin pools, snapshots: they are refused by name, which the unit tests show.

scenario() {
    for n in 1 2; do
        make_image pv$n.img 192M
        eval "device$n=$(losetup --show -f "$IMAGES/pv$n.img")"
    done
    pvcreate -q "$device1" >&2
    # With a second text at its end.
    pvcreate -q --metadatacopies 2 "$device2" >&2
    vgcreate -q vg "$device1" "$device2" >&2
    lvcreate -q -an -Zn -n striped -i 2 -I 64k -L 96M vg >&2
    lvcreate -q -an -Zn -n linear -L 96M vg >&2
    volumes_off vg
    make_image table.img 128M
    sgdisk -n 1:0:+64M -c 1:grows "$IMAGES/table.img" >&2
    device3=$(losetup --show -f "$IMAGES/table.img")
    READY_PATTERN="'xvdc' is up"
    create_storage_on "$CONFIGS/storage-disk.cfg" \
        "disk=['phy:$device1,xvda,w','phy:$device2,xvdb,w','phy:$device3,xvdc,w']"
    create_guest guest "$(on_store xvda /xvda/vg/striped)" "$(on_store xvdb /xvdb/vg/linear)" \
        "$(on_store xvdc /xvdc/grows)"
    guest_must guest '
        set -e
        mkfs.ext4 -q /dev/xvda
        mount -t ext4 /dev/xvda /mnt
        dd if=/dev/urandom of=/mnt/file bs=256k count=64 2>/dev/null
        md5sum </mnt/file
        umount /mnt
        echo linear | dd of=/dev/xvdb conv=fsync 2>/dev/null' 240 >"$RUN/md5"
    grows
    stop_guest guest
    timeout 20 xl shutdown -w storage >&2 || fail "xl shutdown does not end"
    volumes_on vg
    expect_equal "the linear volume" linear "$(head -n1 /dev/mapper/vg-linear)"
    e2fsck -fn /dev/mapper/vg-striped >&2 || fail "e2fsck of the striped volume"
    mount -o ro /dev/mapper/vg-striped /mnt
    found=$(md5sum </mnt/file)
    umount /mnt
    expect_equal "md5 of the file" "$(cat "$RUN/md5")" "$found"
    losetup -d "$device3"
    device3=$(losetup --show -f -P "$IMAGES/table.img")
    within 10 test -b "${device3}p1" || fail "dom0 has no partition of $device3"
    for place in /dev/mapper/vg-linear "${device3}p1"; do
        expect_equal "what was written behind the old end of $place" behind \
            "$(dd if="$place" bs=1M skip=100 count=1 2>/dev/null | head -n1)"
    done
    volumes_off vg
}

grows() {
    step "lvextend, sgdisk"
    lvextend -q -L 112M vg/striped >&2 || fail "lvextend of the striped volume"
    lvextend -q -L 112M vg/linear "$device1" >&2 || fail "lvextend of the linear volume"
    sgdisk -d 1 -n 1:0:+112M -c 1:grows "$device3" >&2
    guest_must guest '
        for disk in xvda xvdb xvdc; do
            tries=0
            until [ "$(cat /sys/block/$disk/size)" = 229376 ]; do
                tries=$((tries + 1))
                [ $tries -lt 200 ] || exit 1
                sleep 0.1
            done
        done
        for disk in xvdb xvdc; do
            echo behind | dd of=/dev/$disk bs=1M seek=100 conv=fsync 2>/dev/null
        done'
    expect_match "its statistics" 'grown=[12] not_grown=0' \
        "$(store_counters xvda)"
    step "a volume that is not there any more is served as it was"
    lvrename -q vg linear other >&2 || fail "lvrename"
    within 20 console_has storage "changed in use" || fail "nothing is said"
    guest_must guest 'echo linear | dd of=/dev/xvdb conv=fsync 2>/dev/null'
    lvrename -q vg other linear >&2 || fail "lvrename back"
}
