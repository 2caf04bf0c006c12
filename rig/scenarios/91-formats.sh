#: title A guest writes to every image format; qemu-img and e2fsck agree with it
#: needs platter.elf
# Would miss: options of a format; the image tests hold every one of them against foreign tools.

FORMATS="qcow2 qcow qed vhd vhdx vmdk vdi"

scenario() {
    set --
    letters="a b c d e f g"
    for format in $FORMATS; do
        qemu-img create -q -f "$(qemu_name "$format")" "$IMAGES/disk.$format" 48M >&2
        letter=${letters%% *}
        letters=${letters#* }
        set -- "$@" "$(disk "xvd$letter" "disk.$format")"
    done
    create_storage memory=64
    create_guest guest "$@"
    step "a filesystem with a file on each"
    guest_must guest '
        set -e
        for disk in a b c d e f g; do
            mkfs.ext4 -q /dev/xvd$disk
            mount -t ext4 /dev/xvd$disk /mnt
            dd if=/dev/urandom of=/mnt/file bs=256k count=8 2>/dev/null
            md5sum </mnt/file
            umount /mnt
            echo 3 >/proc/sys/vm/drop_caches
            fsck.ext4 -fn /dev/xvd$disk >/dev/null 2>&1
        done' >"$RUN/md5"
    stop_guest guest
    within 10 no_backends
    for format in $FORMATS; do
        step "$format from outside"
        check_outside "$format" "$(head -n1 "$RUN/md5")"
        sed -i 1d "$RUN/md5"
    done
}

# qemu_name FORMAT: qemu-img's name for it.
qemu_name() { if [ "$1" = vhd ]; then echo vpc; else echo "$1"; fi; }

# check_outside FORMAT MD5: qemu-img finds no fault with the image, and the guest's file is in it.
check_outside() {
    name=$(qemu_name "$1")
    case $1 in
    qcow | vhd) ;; # qemu-img has no check for these
    *) qemu-img check -q -f "$name" "$IMAGES/disk.$1" >&2 || fail "qemu-img check of $1" ;;
    esac
    qemu-img convert -f "$name" -O raw "$IMAGES/disk.$1" "$IMAGES/flat" >&2
    e2fsck -fn "$IMAGES/flat" >&2 || fail "e2fsck finds errors in $1"
    mount -o loop,ro "$IMAGES/flat" /mnt
    found=$(md5sum </mnt/file)
    umount /mnt
    rm "$IMAGES/flat"
    expect_equal "md5 of the file in $1" "$2" "$found"
}
