#!/bin/sh
# Makes the partition vectors with gdisk 1.0.9 and util-linux 2.38. Run in this folder.
set -eu
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT

truncate -s 64M "$work/gpt.img"
sgdisk -U 11111111-2222-3333-4444-555555555555 \
    -n 1:2048:4095 -c 1:boot -u 1:0FC63DAF-8483-4772-8E79-3D69D8477DE4 \
    -n 2:8192:+16M -c 2:images -u 2:DEADBEEF-0123-4567-89AB-CDEF01234567 \
    -n 7:65536:0 -c 7:Grüße -u 7:01234567-89AB-CDEF-0123-456789ABCDEF "$work/gpt.img"
python3 sparse.py "$work/gpt.img" gpt.sparse

truncate -s 64M "$work/mbr.img"
sfdisk "$work/mbr.img" <<TABLE
label: dos
label-id: 0x12345678
start=2048, size=2048, type=83
start=4096, size=16384, type=5
start=32768, size=4096, type=83
start=5120, size=1024, type=83
start=8192, size=2048, type=83
start=12288, size=8192, type=8e
TABLE
python3 sparse.py "$work/mbr.img" mbr.sparse

# A disk with blocks of 4096 bytes needs a loop device, and so root.
truncate -s 64M "$work/gpt-4kn.img"
loop=$(losetup -b 4096 -f --show "$work/gpt-4kn.img")
sgdisk -U 11111111-2222-3333-4444-555555555555 \
    -n 1:256:1023 -c 1:boot -u 1:0FC63DAF-8483-4772-8E79-3D69D8477DE4 \
    -n 2:1024:+32M -c 2:images -u 2:DEADBEEF-0123-4567-89AB-CDEF01234567 "$loop"
losetup -d "$loop"
python3 sparse.py "$work/gpt-4kn.img" gpt-4kn.sparse
