#!/bin/sh
# Fills corpus/ with real images of every format, small and with something in them, each followed
# by eight bytes that say what the target does with it. Needs qemu-img and qemu-io.
set -eu
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# image FORMAT(ours) FORMAT(qemu's) NAME OPTIONS SIZE
image() {
    rm -f "$work/i"
    qemu-img create -q -f "$2" ${4:+-o "$4"} "$work/i" "$5"
    qemu-io -f "$2" -c "write -P 1 0 20k" -c "write -P 2 100k 3k" "$work/i" >/dev/null
    mkdir -p "corpus/image_$1"
    { cat "$work/i"; printf '\003\000\001\002\010\100\377\007'; } >"corpus/image_$1/$3"
}

image qcow2 qcow2 plain "" 1M
image qcow2 qcow2 small cluster_size=512 256k
image qcow2 qcow2 old compat=0.10,cluster_size=4k 1M
image qcow2 qcow2 extended extended_l2=on,cluster_size=16k 1M
image qcow2 qcow2 lazy lazy_refcounts=on,cluster_size=4k 1M
image qcow2 qcow2 wide refcount_bits=64,cluster_size=512 256k
image qcow2 qcow2 narrow refcount_bits=1,cluster_size=512 256k
qemu-img create -q -f qcow2 -o cluster_size=4k "$work/p" 256k
qemu-io -f qcow2 -c "write -P 3 0 64k" "$work/p" >/dev/null
for kind in zlib zstd; do
    qemu-img convert -c -f qcow2 -O qcow2 -o cluster_size=4k,compression_type=$kind \
        "$work/p" "$work/c"
    { cat "$work/c"; printf '\003\000\001\002\010\100\377\007'; } >"corpus/image_qcow2/$kind"
done
qemu-img snapshot -c one "$work/p"
{ cat "$work/p"; printf '\003\000\001\002\010\100\377\007'; } >corpus/image_qcow2/snapshot
image qcow qcow plain "" 1M
image qed qed plain cluster_size=4k,table_size=2 1M
image qed qed large "" 1M
image vhd vpc dynamic "" 1M
image vhd vpc fixed subformat=fixed 512k
image vhdx vhdx dynamic block_size=1M,log_size=1M 1M
image vmdk vmdk sparse "" 1M
image vmdk vmdk zeroed zeroed_grain=on 1M
image vdi vdi dynamic "" 1M
image vdi vdi static static=on 512k
