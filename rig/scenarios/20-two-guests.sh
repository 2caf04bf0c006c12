#: title Two guests with two disks each write and verify at the same time
#: needs platter.elf
#: storage any
# Would miss: many guests, long runs; the load generator's scenarios have those.

scenario() {
    for image in a1 a2 b1 b2; do make_image $image.raw 48M; done
    create_storage
    create_guest_only a "$(disk xvda a1.raw)" "$(disk xvdb a2.raw)"
    create_guest_only b "$(disk xvda b1.raw)" "$(disk xvdb b2.raw)"
    wait_guest a
    wait_guest b
    step "four disks filled at the same time"
    # Each 1 MiB block holds its disk's name and its own number, so that a block in a wrong place
    # or on a wrong disk shows.
    fill='
        fill() {
            for n in $(seq 0 7); do yes "$1 $n" | head -c 1048576; done
        }
        for disk in xvda xvdb; do
            { fill "$ME $disk" | dd of=/dev/$disk bs=64k conv=fsync 2>/dev/null; } &
        done
        wait
        echo 3 >/proc/sys/vm/drop_caches
        for disk in xvda xvdb; do
            fill "$ME $disk" | cmp -n 8388608 - /dev/$disk || exit 1
        done'
    guest_start a "ME=a; $fill"
    guest_start b "ME=b; $fill"
    guest_wait a || fail "guest a reads what it did not write"
    guest_wait b || fail "guest b reads what it did not write"
    step "each image holds its own guest's words"
    expect_equal "a1.raw" "a xvda 0" "$(head -n1 "$IMAGES/a1.raw")"
    expect_equal "a2.raw" "a xvdb 0" "$(head -n1 "$IMAGES/a2.raw")"
    expect_equal "b1.raw" "b xvda 0" "$(head -n1 "$IMAGES/b1.raw")"
    expect_equal "b2.raw" "b xvdb 0" "$(head -n1 "$IMAGES/b2.raw")"
}
