#: title A disk from dom0 on device mapper: its backend restarts under writes, then the disk grows
#: needs platter.elf
#: set slow
#: timeout 400
# Would miss: a backend domain that dies, which 223-driver-domain-dies has.

# Two loop devices joined by dm-linear; the second only from the growth on.
scenario() {
    make_image one.img 96M
    make_image two.img 32M
    one=$(losetup --show -f "$IMAGES/one.img")
    two=$(losetup --show -f "$IMAGES/two.img")
    sectors=$((96 * 2048))
    echo "0 $sectors linear $one 0" | dmsetup create --noudevsync joined >&2 ||
        fail "dmsetup create failed"
    dmsetup mknodes joined >&2
    READY_PATTERN="'xvda' is up"
    create_storage_on "$CONFIGS/storage-disk.cfg" "disk=['phy:/dev/mapper/joined,xvda,w']"
    device=vbd-$(xl domid storage)-51712
    backend=/local/domain/0/backend/vbd/$(xl domid storage)/51712
    note "queues: $(xenstore-read "/local/domain/$(xl domid storage)/device/vbd/51712/\
multi-queue-num-queues" 2>/dev/null || echo 1)"
    create_guest guest "$(on_store xvda /xvda)"
    taken_away
    closed
    grows
    stop_guest guest
    timeout 20 xl shutdown -w storage >&2 || fail "xl shutdown does not end"
    e2fsck -fn /dev/mapper/joined >&2 || fail "e2fsck of the disk"
    mount -o ro /dev/mapper/joined /mnt
    expect_equal "md5 of the files" "$(cat "$RUN/md5")" "$(md5sum /mnt/file.*)"
    umount /mnt
    dmsetup remove --noudevsync joined >&2
    losetup -d "$one" "$two"
}

taken_away() {
    step "blkback is taken off the disk and put back, three times, under writes"
    guest_start guest "$WRITE_THROUGH_RESTARTS"
    for _ in 1 2 3; do
        sleep 1
        echo "$device" >/sys/bus/xen-backend/drivers/vbd/unbind
        sleep 1
        echo "$device" >/sys/bus/xen-backend/drivers/vbd/bind
        within 20 disk_is_up || fail "the disk does not come up again"
    done
    said=$(guest_wait guest 240) || fail "the guest's writes failed: $said"
    note "$(store_counters xvda)"
}

# In order: the toolstack asks it to close, and it starts anew by itself.
closed() {
    step "the backend closes in order, three times, under a filesystem that syncs"
    guest_must guest '
        set -e
        mkfs.ext4 -q /dev/xvda
        mount -t ext4 /dev/xvda /mnt' 120
    guest_start guest '
        set -e
        for n in 1 2 3 4 5 6 7 8; do
            dd if=/dev/urandom of=/mnt/file.$n bs=64k count=48 conv=fsync 2>/dev/null
        done
        md5sum /mnt/file.*'
    for _ in 1 2 3; do
        sleep 1
        xenstore-write "$backend/state" 5
        within 20 disk_is_up || fail "the disk does not come up again"
    done
    guest_wait guest 240 >"$RUN/md5" || fail "the guest's writes failed: $(cat "$RUN/md5")"
    counters=$(store_counters xvda)
    note "$counters"
    expect_match "cycles of the backend" "connects=([4-9]|1[0-9])" "$counters"
    expect_match "errors" "errors=0" "$counters"
}

grows() {
    step "the disk grows"
    printf '%s\n' "0 $sectors linear $one 0" "$sectors $((32 * 2048)) linear $two 0" |
        dmsetup reload joined
    dmsetup suspend joined && dmsetup resume --noudevsync joined >&2
    # blkback looks at the size when a request comes.
    guest_must guest '
        set -e
        tries=0
        until [ "$(cat /sys/block/xvda/size)" = 262144 ]; do
            dd if=/dev/xvda of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null
            tries=$((tries + 1))
            [ $tries -lt 100 ]
            sleep 0.1
        done
        dd if=/dev/urandom of=/mnt/last bs=64k count=16 conv=fsync 2>/dev/null
        umount /mnt' 60
}

# Both ends say so.
disk_is_up() {
    [ "$(xenstore-read "$backend/state")" = 4 ] &&
        [ "$(xenstore-read "/local/domain/$(xl domid storage)/device/vbd/51712/state")" = 4 ]
}
