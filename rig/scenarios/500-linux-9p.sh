#: title A Linux guest's own 9p client works on platter-9pfsd, and dom0 runs no QEMU
#: needs platter-9pfsd
#: suites trixie
#: timeout 300
# Would miss: a server that hangs without dying. No storage domain here: the server alone.

scenario() {
    mkdir -p "$IMAGES/share"
    GUEST_SETTINGS='p9=["tag=share,path='$IMAGES/share',security_model=none"]
        extra="console=hvc0 quiet loglevel=3 rig.modules=9p"'
    FIO=1 create_guest_only guest
    start_9p_server guest
    wait_guest guest
    step "mount, names, verified random I/O"
    guest_must guest '
        set -e
        mount -t 9p -o trans=xen,version=9p2000.L,msize=262144 share /mnt
        mkdir /mnt/folder
        echo one >/mnt/folder/a
        mv /mnt/folder/a /mnt/b
        rmdir /mnt/folder
        [ "$(cat /mnt/b)" = one ]
        [ "$(ls /mnt)" = b ]
        rm /mnt/b
        fio --name=verify --directory=/mnt --size=8m --rw=randwrite --bsrange=512-64k \
            --fsync=32 --verify=crc32c --verify_fatal=1 --randrepeat=1 >/tmp/fio 2>&1 ||
            { cat /tmp/fio; exit 1; }
        sync' 180
    guest_must guest 'md5sum </mnt/verify.0.0' >"$RUN/inside"
    expect_equal "the file from outside" "$(cut -d' ' -f1 <"$RUN/inside")" \
        "$(md5sum <"$IMAGES/share/verify.0.0" | cut -d' ' -f1)"
    expect_equal "QEMU processes in dom0" "" "$(pgrep qemu || true)"
}
