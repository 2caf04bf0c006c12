#: title A Linux guest's own 9p client works on platter-9pfsd, and dom0 runs no QEMU
#: needs platter-9pfsd fsx
#: timeout 400
# The server runs as a user without any right but to the share.
# Would miss: a server that hangs without dying. No storage domain here: the server alone.

scenario() {
    mkdir -p "$IMAGES/share"
    echo secret >"$IMAGES/share/root-only"
    chmod 600 "$IMAGES/share/root-only"
    chown nobody "$IMAGES/share"
    NINEP_USER=nobody
    share='p9=["tag=share,path='$IMAGES/share',security_model=none"]'
    # Where libxl would start QEMU for that, the share is given by hand.
    [ "$SUITE" != bookworm ] || share=
    GUEST_SETTINGS="$share
        extra=\"console=hvc0 quiet loglevel=3 rig.modules=9p\""
    FIO=1 create_guest_only guest
    start_9p_server guest
    [ "$SUITE" != bookworm ] ||
        /usr/lib/platter/platter-9pfsd attach guest share "$IMAGES/share" >&2 ||
        fail "the share cannot be attached"
    wait_guest guest
    said=$(/usr/lib/platter/platter-9pfsd attach guest other /etc 2>&1) &&
        fail "a directory is attached that was not allowed"
    expect_match "the refusal" "the server refuses this share" "$said"
    rights=$(cat "/proc/$(pgrep -x platter-9pfsd)/status")
    expect_match "the server's user" "^Uid:.65534.65534.65534.65534" "$rights"
    expect_match "the server's capabilities" "^CapPrm:.0+$" "$rights"
    step "mount, names, verified random I/O"
    guest_must guest '
        set -e
        # Until the server has taken the share up.
        until mount -t 9p -o trans=xen,version=9p2000.L,msize=262144 share /mnt; do
            sleep 1
        done 2>/dev/null
        mkdir /mnt/folder
        echo one >/mnt/folder/a
        mv /mnt/folder/a /mnt/b
        rmdir /mnt/folder
        [ "$(cat /mnt/b)" = one ]
        [ "$(echo $(ls /mnt))" = "b root-only" ]
        if cat /mnt/root-only 2>/dev/null; then exit 1; fi
        rm /mnt/b
        for name in $(seq 80); do echo "$name" >"/mnt/a-name-that-is-rather-long-$name"; done
        [ "$(ls /mnt | wc -l)" = 81 ]
        [ "$(cat /mnt/a-name* | sort -n | tail -n1)" = 80 ]
        rm /mnt/a-name*
        fio --name=verify --directory=/mnt --size=8m --rw=randwrite --bsrange=512-64k \
            --fsync=32 --verify=crc32c --verify_fatal=1 --randrepeat=1 >/tmp/fio 2>&1 ||
            { cat /tmp/fio; exit 1; }
        sync' 180
    guest_must guest 'md5sum </mnt/verify.0.0' >"$RUN/inside"
    expect_equal "the file from outside" "$(cut -d' ' -f1 <"$RUN/inside")" \
        "$(md5sum <"$IMAGES/share/verify.0.0" | cut -d' ' -f1)"
    cp /usr/lib/platter/fsx "$IMAGES/share/"
    guest_must guest "umount /mnt; $FSX_CONFIG"
    for cache in none mmap loose; do exercise "$cache"; done
    expect_equal "QEMU processes in dom0" "" "$(pgrep qemu || true)"
    xl destroy guest
    nothing_left() { [ -z "$(xenstore-ls -f /local/domain/0/backend | grep 9pfs/)" ]; }
    within 30 nothing_left || fail "of the share is left: $(xenstore-ls /local/domain/0/backend)"
}

# What the exerciser does, and how often. Not punch_hole: the Linux client has no message for it,
# and without a cache it maps nothing into memory.
FSX_CONFIG='
    common="close_open = 5
        read = 10
        write = 10
        truncate = 10
        fsync = 2
        fdatasync = 2
        posix_fallocate = 2
        sendfile = 5
        posix_fadvise = 2
        copy_file_range = 5"
    for cache in none mmap loose; do
        maps="invalidate = 2
            mapread = 10
            mapwrite = 10"
        [ "$cache" != none ] || maps="mapread = 0
            mapwrite = 0"
        printf "flen = 1048576\n[opsize]\nmax = 131072\n[weights]\n%s\n%s\n" "$common" "$maps" \
            >/tmp/fsx-$cache
    done'

# exercise CACHE: random operations on a file, each read compared with what was written, by a client
# that keeps so much to itself.
exercise() {
    step "fsx, cache=$1"
    guest_must guest "
        set -e
        mount -t 9p -o trans=xen,version=9p2000.L,msize=262144,cache=$1 share /mnt
        cp /mnt/fsx /tmp/fsx
        began=\$(date +%s)
        /tmp/fsx -f /tmp/fsx-$1 -S 7 -N 1500 -P /tmp /mnt/exercised >/tmp/out 2>&1 ||
            { tail -n 60 /tmp/out; exit 1; }
        echo \$((\$(date +%s) - began)) s
        md5sum </mnt/exercised
        umount /mnt" 180 >"$RUN/inside"
    expect_equal "the file from outside" "$(cut -d' ' -f1 <"$RUN/inside" | tail -n1)" \
        "$(md5sum <"$IMAGES/share/exercised" | cut -d' ' -f1)"
}
