#: title Every writable image format serves a filesystem, and foreign tools agree with it
#: needs platter.elf
#: timeout 600
# Would miss: formats with parents but qcow2; the image tests have those.

FORMATS="qcow2 qcow qed vhd vhdx vmdk vdi"

# qemu_name FORMAT: what qemu-img calls it.
qemu_name() {
    case $1 in vhd) echo vpc ;; *) echo "$1" ;; esac
}

scenario() {
    step "images made by qemu-img"
    set --
    letter=a
    for format in $FORMATS; do
        options=
        if [ "$format" = vhd ]; then options="-o force_size=on"; fi
        # shellcheck disable=SC2086 # options are words
        qemu-img create -q -f "$(qemu_name "$format")" $options "$IMAGES/disk.$format" 96M
        set -- "$@" "$(disk "xvd$letter" "disk.$format")"
        letter=$(printf %s "$letter" | tr 'a-y' 'b-z')
    done
    qemu-img create -q -f qcow2 -b disk.qcow2 -F qcow2 "$IMAGES/overlay.qcow2"
    create_storage
    create_guest guest "$@"
    step "a filesystem on each of them"
    guest_must guest '
        set -e
        dd if=/dev/urandom of=/tmp/data bs=1M count=6 2>/dev/null
        for disk in /dev/xvd[a-g]; do
            mkfs.ext4 -q $disk
            mount -t ext4 $disk /mnt
            cp /tmp/data /mnt/file
            umount /mnt
        done
        echo 3 >/proc/sys/vm/drop_caches
        for disk in /dev/xvd[a-g]; do
            fsck.ext4 -fn $disk
            mount -t ext4 -o ro $disk /mnt
            cmp /tmp/data /mnt/file
            umount /mnt
        done' 240
    inside=$(guest_must guest 'md5sum </tmp/data' | cut -d' ' -f1)
    stop_guest guest

    step "foreign tools read the same"
    for format in $FORMATS; do
        image=$IMAGES/disk.$format
        name=$(qemu_name "$format")
        case $format in
        qcow2 | qed | vhdx | vmdk | vdi)
            qemu-img check -q -f "$name" "$image" >&2 || fail "qemu-img check of $format"
            ;;
        esac
        qemu-img convert -f "$name" -O raw "$image" "$RUN/$format.raw"
        mount -o loop,ro "$RUN/$format.raw" /mnt
        outside=$(md5sum </mnt/file | cut -d' ' -f1)
        umount /mnt
        rm "$RUN/$format.raw"
        expect_equal "md5 of the file in $format" "$inside" "$outside"
    done

    step "an overlay over what was written"
    create_guest second "$(disk xvda overlay.qcow2)"
    guest_must second '
        set -e
        mount -t ext4 /dev/xvda /mnt
        echo more >/mnt/more
        umount /mnt'
    stop_guest second
    qemu-img check -q -f qcow2 "$IMAGES/overlay.qcow2" >&2 || fail "check of the overlay"
}
