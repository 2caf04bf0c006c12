#: title Disks from dom0 on dm-linear, DRBD and md RAID1: the storage domain dies in mid-write
#: needs platter.elf
#: set slow
#: timeout 400
# Would miss: DRBD's peer on another machine; here both ends of the pair are in dom0, over the
# loopback network.

DRBD=/usr/lib/drbd/drbdsetup-84
MEMBERS="linear drbd0 drbd1 md0 md1"

scenario() {
    replicas
    disks="'phy:/dev/mapper/linear,xvda,w','phy:/dev/drbd0,xvdb,w','phy:/dev/md0,xvdc,w'"
    READY_PATTERN="'xvdc' is up"
    create_storage_on "$CONFIGS/storage-disk.cfg" "disk=[$disks]"
    create_guest guest "$(on_store xvda /xvda)" "$(on_store xvdb /xvdb,format=qcow2)" \
        "$(on_store xvdc /xvdc)"
    step "a file on each of them, synced; then writes without end"
    guest_must guest '
        set -e
        dd if=/dev/urandom of=/tmp/kept bs=64k count=32 2>/dev/null
        for disk in xvda xvdb xvdc; do
            mkfs.ext4 -q /dev/$disk
            mkdir -p /tmp/$disk
            mount -t ext4 /dev/$disk /tmp/$disk
            dd if=/tmp/kept of=/tmp/$disk/kept bs=64k conv=fsync 2>/dev/null
        done
        md5sum </tmp/kept' 240 >"$RUN/md5"
    guest_start guest '
        for disk in xvda xvdb xvdc; do
            n=0
            while dd if=/tmp/kept of=/tmp/$disk/churn.$((n % 8)) bs=64k conv=fsync 2>/dev/null
            do
                n=$((n + 1))
            done &
        done
        wait'
    sleep 4
    step "xl destroy storage"
    destroy_storage
    xl destroy guest >&2 || true
    from_outside
}

# Five loop devices: one below dm-linear, two below a DRBD pair, two below a mirror.
replicas() {
    step "dm-linear, DRBD and md RAID1 over loop devices"
    for member in $MEMBERS; do
        make_image "$member.img" 64M
        eval "$member=$(losetup --show -f "$IMAGES/$member.img")"
    done
    echo "0 $((64 * 2048)) linear $linear 0" | dmsetup create --noudevsync linear >&2 ||
        fail "dmsetup create failed"
    dmsetup mknodes linear >&2
    drbd_pair
    mdadm --create /dev/md0 --run --level=1 --metadata=1.0 --assume-clean --raid-devices=2 \
        "$md0" "$md1" >&2 || fail "mdadm --create failed"
    qemu-img create -q -f qcow2 "$RUN/image.qcow2" 48M
    dd if="$RUN/image.qcow2" of=/dev/drbd0 conv=fsync 2>/dev/null || fail "DRBD takes no writes"
}

# Two resources of one disk each, connected with each other; the first is primary.
drbd_pair() {
    modprobe drbd || fail "dom0's kernel has no DRBD"
    eval "set -- $drbd0 $drbd1"
    for minor in 0 1; do
        drbdmeta --force $minor v08 "$1" internal create-md >&2 || fail "drbdmeta failed"
        $DRBD new-resource pair$minor >&2
        $DRBD new-minor pair$minor $minor 0 >&2
        $DRBD attach $minor "$1" "$1" internal >&2 || fail "DRBD does not attach $1"
        shift
    done
    $DRBD connect pair0 ipv4:127.0.0.1:7788 ipv4:127.0.0.1:7789 --protocol=C >&2
    $DRBD connect pair1 ipv4:127.0.0.1:7789 ipv4:127.0.0.1:7788 --protocol=C >&2
    within 30 drbd_says 0 Connected || fail "the DRBD pair does not connect"
    # Both are empty: nothing needs to be copied.
    $DRBD new-current-uuid 0 --clear-bitmap >&2
    $DRBD primary 0 >&2 || fail "DRBD does not become primary"
    note "DRBD: $(sed -n 's/^ *0: //p' /proc/drbd)"
}

drbd_says() { grep -q "^ *$1: cs:$2" /proc/drbd; }

# What was synced is there, on the device and on its replica, and nothing is damaged.
from_outside() {
    step "the disks from outside"
    qemu-img check -f qcow2 /dev/drbd0 >&2 || [ $? = 3 ] || fail "qemu-img check of DRBD's disk"
    drbd_says 0 Connected || fail "the DRBD pair fell apart: $(cat /proc/drbd)"
    $DRBD down pair0 >&2 && $DRBD down pair1 >&2
    for member in "$drbd0" "$drbd1"; do
        qemu-img convert -f qcow2 -O raw "$member" "$RUN/image.raw" >&2 ||
            fail "the image on $member cannot be read"
        md5sum <"$RUN/image.raw" >>"$RUN/replicas"
        sound "$RUN/image.raw" loop
    done
    expect_equal "contents of the DRBD pair" 1 "$(sort -u "$RUN/replicas" | wc -l)"
    sound /dev/mapper/linear
    sound /dev/md0
    mdadm --stop /dev/md0 >&2
    # Metadata 1.0 lies at the end: each half is a filesystem by itself.
    for member in "$md0" "$md1"; do sound "$member"; done
    dmsetup remove --noudevsync linear >&2
}

# sound DISK [loop]: its filesystem can be mended, and holds the file that was synced.
sound() {
    e2fsck -fy "$1" >&2 || [ $? -le 1 ] || fail "e2fsck cannot mend $1"
    mount -t ext4 -o "ro${2:+,$2}" "$1" /mnt || fail "$1 cannot be mounted"
    expect_equal "md5 of the file on $1" "$(cat "$RUN/md5")" "$(md5sum </mnt/kept)"
    umount /mnt
}
