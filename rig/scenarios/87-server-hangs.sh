#: title When files hang, their disks report errors, and nothing old lands once they answer
#: needs platter.elf platter-9pfsd
#: suites trixie
#: timeout 300
# The server's file system is frozen: a write hangs in the kernel with the ring's pages in hand. The
# storage domain would connect again on the same pages.
# Would miss: a file system that loses what it was given.

scenario() {
    mkdir /tmp/frozen
    mount -t tmpfs -o size=64M frozen /tmp/frozen
    truncate -s 48M /tmp/frozen/image
    mkfs.ext4 -q /tmp/frozen/image
    mount -o loop /tmp/frozen/image "$IMAGES"
    make_image disk.raw 16M
    create_storage
    [ "$(ninep_server)" = platter ] || fail "the server is $(ninep_server)"
    create_guest guest "$(disk xvda disk.raw)"
    guest_must guest 'echo before | dd of=/dev/xvda conv=fsync 2>/dev/null'
    step "the files hang: the guest's I/O ends with an error"
    state=/local/domain/0/backend/9pfs/$(xl domid storage)/0/state
    ups=$(up_count storage images)
    fsfreeze -f "$IMAGES"
    if guest guest "$(write_of old)" 120 >&2; then fail "a write succeeded in a frozen file"; fi
    within 60 console_has storage "store 'images' (is given up|lost its server)" ||
        fail "the store is not given up"
    # The pages and the file are still in use.
    sleep 3
    expect_match "the share's state" "[45]" "$(xenstore-read "$state")"
    expect_equal "ups" "$ups" "$(up_count storage images)"
    step "they answer: the store comes up again"
    fsfreeze -u "$IMAGES"
    within 60 up_more_than storage images "$ups" || fail "the store does not come up again"
    guest_must guest "$(write_of new)"
    guest_goes_on guest disk.raw
    expect_equal "the range" "16384 new" \
        "$(dd if="$IMAGES/disk.raw" bs=64k skip=1 count=1 2>/dev/null | uniq -c | xargs)"
    xl destroy storage
    pkill -x platter-9pfsd
    within 10 umount "$IMAGES" || fail "files are still open"
}

# write_of WORD: 64 KiB of it, past the guest's cache.
write_of() {
    echo "yes $1 | dd of=/dev/xvda bs=64k seek=1 count=1 iflag=fullblock oflag=direct 2>/dev/null"
}
