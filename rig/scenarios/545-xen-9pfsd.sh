#: title platter-9pfsd serves what libxl means for Xen's own server: limits, read-only, a refusal
#: needs platter-9pfsd
#: suites trixie
#: timeout 240
# type=xen_9pfsd is what Xen has from 4.19 on, and the only one with a limit of space. Would miss:
# what the limit costs; no storage domain here, Linux's own client alone.

NINEP_USER=nobody
READ_ONLY=/srv/read-only
NINEP_OPTIONS="--allow-read-only $READ_ONLY --cache direct"

scenario() {
    mkdir -p "$IMAGES/share" "$READ_ONLY"
    chown nobody "$IMAGES/share"
    echo kept >"$READ_ONLY/file"
    start_9p_server guest
    within 30 xenstore-exists /local/domain/0/libxl/xen-9pfs/state || fail "no server registers"
    step "a directory that is not allowed"
    GUEST_SETTINGS=$(shares "$(share secret /etc)")
    guest_config refused >"$RUN/refused.cfg"
    began=$(uptime_seconds)
    xl create "$RUN/refused.cfg" >&2 && fail "a directory is shared that was not allowed"
    took=$(elapsed_since "$began" whole)
    [ "$took" -lt 10 ] || fail "xl create waits for a share that is refused, $took s"
    step "a share with a limit, and one that is read-only"
    GUEST_SETTINGS="$(shares "$(share share "$IMAGES/share" max-space=4), $(share kept $READ_ONLY)")
        extra=\"console=hvc0 quiet loglevel=3 rig.modules=9p\""
    create_guest guest
    guest_must guest '
        set -e
        mkdir /kept
        mount -t 9p -o trans=xen,version=9p2000.L share /mnt
        mount -t 9p -o trans=xen,version=9p2000.L kept /kept
        [ "$(cat /kept/file)" = kept ]
        if echo lost >/kept/file; then exit 1; fi
        if chmod 600 /kept/file; then exit 1; fi
        [ "$(df -k /mnt | tail -n1 | tr -s " " | cut -d" " -f2)" = 4096 ]
        fill() { dd if=/dev/zero of="$1" bs=64k count=96 2>/tmp/dd; }
        if fill /mnt/big; then exit 1; fi
        grep -q "No space" /tmp/dd
        # It has no name, and takes its space as long as it is open.
        exec 3</mnt/big
        rm /mnt/big
        if fill /mnt/other; then exit 1; fi
        [ "$(du -k /mnt/other | cut -f1)" -lt 1024 ]
        exec 3<&-
        rm /mnt/other
        dd if=/dev/zero of=/mnt/fits bs=64k count=48 conv=fsync 2>/dev/null
        chmod 440 /mnt/fits
        [ "$(stat -c %a /mnt/fits)" = 640 ]
        touch -t 200101010000 /mnt/fits
        [ "$(stat -c %Y /mnt/fits)" -lt 1000000000 ]
        if chown 1000 /mnt/fits; then exit 1; fi
        umount /mnt /kept' 120
    expect_equal "the read-only file" kept "$(cat "$READ_ONLY/file")"
    expect_equal "Xen's own server" "" "$(pgrep -x xen-9pfsd || true)"
    xl destroy guest
}

# shares LIST: a p9 setting. share TAG PATH [OPTION]: one of its entries.
shares() { echo "p9=[$1]"; }
share() { echo "\"tag=$1,path=$2,security_model=none,type=xen_9pfsd${3:+,$3}\""; }
