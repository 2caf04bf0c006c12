#!/bin/sh
# Makes the ext4 vectors with e2fsprogs 1.47, without root. Run in this folder. A file's block n
# is filled with the letter 'A' + n % 26, so that a wrong extent shows.
set -eu
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT

# fill NAME BLOCKS BLOCK_BYTES
fill() {
    python3 -c "
import sys
blocks, size = int(sys.argv[2]), int(sys.argv[3])
open(sys.argv[1], 'wb').write(b''.join(bytes([65 + n % 26]) * size for n in range(blocks)))
" "$work/$1" "$2" "$3"
}

# make NAME BLOCK_BYTES MEGABYTES FRAGMENTS MKE2FS_OPTIONS...
make() {
    name=$1 block=$2 size=$3 fragments=$4
    shift 4
    rm -f "$work/fs.img"
    truncate -s "${size}M" "$work/fs.img"
    mke2fs -q -F -t ext4 -b "$block" -U 12345678-1234-1234-1234-123456789abc \
        -E hash_seed=12345678-1234-1234-1234-123456789abc "$@" "$work/fs.img"
    fill plain 5 "$block"
    fill holes 9 "$block"
    fill fragments "$fragments" "$block"
    # Fragments: fill the disk with one-block files, free every other one, write.
    {
        echo "mkdir images"
        echo "cd images"
        echo "write $work/plain plain.raw"
        echo "mkdir sub"
        echo "symlink link plain.raw"
        for n in $(seq $((2 * fragments + 20))); do echo "write $work/one spacer$n"; done
        for n in $(seq 1 2 $((2 * fragments + 19))); do echo "rm spacer$n"; done
        echo "write $work/fragments fragments.raw"
        echo "write $work/holes holes.raw"
        echo "punch holes.raw 3 5"
        echo "write $work/plain unwritten.raw"
        echo "fallocate unwritten.raw 5 9"
        echo "sif unwritten.raw size $((10 * block))"
    } > "$work/commands"
    head -c "$block" /dev/zero | tr '\0' z > "$work/one"
    debugfs -w -f "$work/commands" "$work/fs.img" > /dev/null 2>&1
    e2fsck -fn "$work/fs.img" > /dev/null
    debugfs -R "stat images/fragments.raw" "$work/fs.img" 2> /dev/null | tail -3
    python3 sparse.py "$work/fs.img" "ext4-$name.sparse"
}

make default 4096 8 40 -N 256 -O ^has_journal,^resize_inode
make 1k 1024 4 300 -N 1024 -O ^has_journal,^resize_inode,^64bit,^metadata_csum,uninit_bg
make maps 1024 4 300 -N 1024 -O ^has_journal,^resize_inode,^extents,^64bit,^metadata_csum,^flex_bg
