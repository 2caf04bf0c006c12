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
image vmdk vmdk sparse "" 1M
image vmdk vmdk zeroed zeroed_grain=on 1M
qemu-img convert -f qcow2 -O vmdk -o subformat=streamOptimized "$work/p" "$work/c"
{ cat "$work/c"; printf '\003\000\001\002\010\100\377\007'; } >corpus/image_vmdk/stream
for sample in open-vmdk vmdkstream; do
    { bunzip2 -c ../tool/tests/samples/$sample.vmdk.bz2
        printf '\003\000\001\002\010\100\377\007'; } >corpus/image_vmdk/$sample
done
image vdi vdi dynamic "" 1M
image vdi vdi static static=on 512k

# The zstd target takes the streams themselves.
mkdir -p corpus/image_zstd
for level in 1 3 19; do
    head -c 65536 corpus.sh ../image/src/zstd/mod.rs ../image/src/meta.rs | head -c 65536 >"$work/z"
    zstd -q -f -$level "$work/z" -o corpus/image_zstd/text$level || true
done

# VHDX as records: number of a sector and the sector, of those that are not zeros; then the file's
# sectors and the script. One of them with a log that waits to be replayed.
mkdir -p corpus/image_vhdx
sparse() {
    python3 - "$1" "$2" <<'PYTHON'
import bz2, struct, sys

source, target = sys.argv[1:]
data = (bz2.open if source.endswith(".bz2") else open)(source, "rb").read()[: 24 << 20]
# What lies beyond is the guest's.
tables = data[: 5 << 20]
with open(target, "wb") as out:
    for at in range(0, len(tables), 512):
        sector = tables[at:at + 512]
        if any(sector):
            out.write(struct.pack("<H", at // 512) + sector.ljust(512, b"\0"))
    out.write(struct.pack("<H", len(data) // 512) + b"\3\0\1\2\10\100\377\7")
PYTHON
}
for block in 1 2; do
    rm -f "$work/i"
    qemu-img create -q -f vhdx -o block_size=${block}M,log_size=1M "$work/i" 3M
    qemu-io -f vhdx -c "write -P 1 0 5k" -c "write -P 2 2M 3k" "$work/i" >/dev/null
    sparse "$work/i" corpus/image_vhdx/block$block
done
sparse ../tool/tests/samples/iotest-dirtylog-10G-4M.vhdx.bz2 corpus/image_vhdx/dirty
printf '\000\060\003\000\001\002\010\100\377\207' >corpus/image_vhdx/child
platter=../target/release/platter
$platter create -q -f vhdx -o block_size=1M,logical_sector_size=4096 "$work/k.vhdx" 3M
sparse "$work/k.vhdx" corpus/image_vhdx/large-sectors

# Disks by sfdisk, lvm2 and mke2fs, from the storage crate's vectors: a mode byte, then records.
vectors=../storage/vectors
mkdir -p corpus/disk_paths corpus/disk_structures corpus/disk_backend
for name in gpt mbr gpt-4kn ext4-default ext4-1k ext4-maps; do
    case $name in *4kn) mode='\001' ;; *) mode='\000' ;; esac
    { printf "$mode"; cat "$vectors/$name.sparse"; } >"corpus/disk_paths/$name"
done
python3 - "$vectors" corpus <<'PYTHON'
import struct, sys

def records(path):
    data, at = open(path, "rb").read(), 0
    while at + 8 <= len(data):
        number = struct.unpack_from("<Q", data, at)[0]
        size = 1 if number >> 63 else 512
        yield number, data[at + 8:at + 8 + size]
        at += 8 + size

vectors, corpus = sys.argv[1:]
group = bytearray(b"\0")
for disk in range(3):
    for number, body in records(f"{vectors}/lvm-pv{disk}.sparse"):
        group += struct.pack("<Q", number | disk << 56) + body
open(f"{corpus}/disk_paths/lvm", "wb").write(group)
disk = b"".join(body for _, body in records(f"{vectors}/lvm-pv0.sparse") if len(body) == 512)
for start in (at for at in range(0, len(disk), 512) if disk[at:at + 512].find(b" {\n") > 0):
    end = disk.find(b"\0", start)
    open(f"{corpus}/disk_structures/text{start}", "wb").write(disk[start:end])
for name in ("default", "1k", "maps"):
    blocks = dict(records(f"{vectors}/ext4-{name}.sparse"))
    image = b"".join(blocks.get(at, b"").ljust(512, b"\0") for at in range(2, 130))
    open(f"{corpus}/disk_structures/ext4-{name}", "wb").write(image)
nodes = ["2", "131072", "512", "4096", "0", "1", "1", "512", "32", "4", "4", "1", "0"]
answer = bytes([4]) + bytes(8) + b"\0" * 4 + bytes([0]) + struct.pack("<I", 1)
for order in ("0", "4"):
    nodes[10] = order
    text = "\n".join(nodes).encode()
    open(f"{corpus}/disk_backend/order{order}", "wb").write(text + b"\n" + answer * 8)
PYTHON
