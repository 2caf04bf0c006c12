#: title A Linux guest's disk is an image file that platter serves
#: needs platter.elf
#: set demo
# The story that `make demo` tells. Each step does what the scenarios do one by one.

scenario() {
    make_image guest.raw 256M
    note "a sparse file of 256 MiB: /srv/images/guest.raw"
    create_storage
    note "xl create storage.cfg: $(xl list storage | awk 'NR == 2 { print $3 }') MiB," \
        "$(ninep_server_in_words)"
    console_of storage | grep platter: | head -n 4 | while read -r line; do note "$line"; done
    disk=$(disk xvda guest.raw)
    note "disk = [ '$disk' ]"
    create_guest guest "$disk"
    step "guest: make a filesystem, write 8 MiB, remount, read back"
    guest_must guest '
        set -e
        mkfs.ext4 -q /dev/xvda
        mount -t ext4 /dev/xvda /mnt
        dd if=/dev/urandom of=/mnt/file bs=1M count=8 conv=fsync 2>/dev/null
        md5sum </mnt/file >/tmp/before
        umount /mnt
        echo 3 >/proc/sys/vm/drop_caches
        mount -t ext4 /dev/xvda /mnt
        md5sum </mnt/file | cmp - /tmp/before'
    inside=$(guest_must guest 'cat /tmp/before' | cut -d' ' -f1)
    note "md5 in the guest $inside"
    guest_must guest 'umount /mnt' >/dev/null
    if [ "$(ninep_server)" = platter ]; then
        expect_equal "QEMU processes in dom0" "" "$(pgrep qemu || true)"
        note "no QEMU runs in dom0"
    fi
    step "dom0: detach the disk"
    block_detach guest xvda
    within 5 no_backends || fail "the storage domain keeps something of the disk"
    note "the guest runs on without it; nothing of it is left in xenstore"
    step "dom0: look at the file from outside"
    e2fsck -fn "$IMAGES/guest.raw" >&2 || fail "e2fsck finds errors"
    mount -o loop,ro "$IMAGES/guest.raw" /mnt
    outside=$(md5sum </mnt/file | cut -d' ' -f1)
    umount /mnt
    note "md5 in dom0      $outside, e2fsck is content"
    expect_equal "md5 of the file" "$inside" "$outside"
    if [ "$KEEP" = 1 ]; then
        step "dom0: attach it again, for you"
        block_attach guest "$disk"
    else
        step "dom0: xl destroy guest, xl shutdown storage"
        xl destroy guest
        timeout 20 xl shutdown -w storage >&2 || fail "xl shutdown does not end"
    fi
}

# Who serves the 9p share; on Xen 4.20 as Debian ships it, nobody would.
ninep_server_in_words() {
    case $(ninep_server) in
    platter) echo "its share served by platter-9pfsd" ;;
    libxl) echo "its share served by the QEMU that libxl started" ;;
    *) echo "its share served by a QEMU started by hand (libxl of Xen 4.20 starts none)" ;;
    esac
}
