#: title pvgrub2 reads a guest's kernel from the disk that is served; the guest then uses it
#: needs platter.elf
#: storage any
#: set slow
#: timeout 600
# The boot loader opens the disk, reads 65 MiB in its own small requests, closes it, and Linux opens
# it again, in one domain: the only guest of the rig that dom0 hands no kernel.
# Would miss: pvgrub2 of 32-bit guests.

scenario() {
    step "make a disk with a boot folder"
    root=$RUN/root
    mkdir -p "$root/boot/grub"
    cp /srv/boot/vmlinux /srv/boot/initrd "$root/boot/"
    cat >"$root/boot/grub/grub.cfg" <<'END'
echo "grub: loading"
linux /boot/vmlinux console=hvc0 quiet loglevel=3
initrd /boot/initrd
echo "grub: booting"
boot
END
    mke2fs -q -t ext4 -d "$root" "$IMAGES/disk.raw" 200M >&2 || fail "mke2fs failed"
    rm -r "$root"
    create_storage
    GUEST_SETTINGS='kernel="/usr/lib/grub-xen/grub-x86_64-xen.bin"
ramdisk=""
extra=""'
    create_guest guest "$(disk xvda disk.raw)"
    expect_match "the guest's console" "grub: booting" "$(console_of guest)"
    step "the guest mounts the disk that it came from"
    guest_must guest '
        set -e
        mount -t ext4 /dev/xvda /mnt
        cp /mnt/boot/initrd /mnt/copy
        umount /mnt
        echo 3 >/proc/sys/vm/drop_caches
        mount -t ext4 /dev/xvda /mnt
        cmp /mnt/copy /mnt/boot/initrd'
    stop_guest guest
    e2fsck -fn "$IMAGES/disk.raw" >&2 || fail "e2fsck in dom0 finds errors"
    rm "$IMAGES/disk.raw"
}
