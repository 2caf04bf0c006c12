#: title The rig itself: a Linux driver domain serves a file over loop and blkback
#: set slow
#: storage any
# Not about platter: proves the peer that platter is measured against.

scenario() {
    create_linux_driver_domain storage-linux
    guest_must storage-linux '
        truncate -s 64M /srv/images/disk.raw
        losetup /dev/loop0 /srv/images/disk.raw'
    create_guest guest "vdev=xvda,backend=storage-linux,format=raw,target=/dev/loop0"
    guest_must guest 'echo served | dd of=/dev/xvda conv=fsync 2>/dev/null'
    said=$(guest_must storage-linux 'head -n1 /srv/images/disk.raw')
    expect_equal "the image in the driver domain" served "$said"
    guest_must storage-linux 'grep Mem /proc/meminfo | head -n3'
    stop_guest guest
}
