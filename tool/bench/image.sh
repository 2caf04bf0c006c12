#!/bin/sh
# platter bench and convert beside qemu-img's, on the same files: seconds of each, five rounds in
# turn, then the ratio of the medians (above 1: platter is faster). All from the page cache.
# usage: image.sh PLATTER [FOLDER]
set -eu
platter=$(realpath "$1")
cd "${2:-$(mktemp -d)}"
rounds=5

if [ ! -e d50.qcow2 ]; then
    qemu-img create -q -f qcow2 d1.qcow2 1G
    for n in $(seq 0 15); do
        qemu-io -f qcow2 -c "write -P $((n + 1)) $((n * 64))M 64M" d1.qcow2 >/dev/null
    done
    base=d1.qcow2
    for n in $(seq 2 50); do
        qemu-img create -q -f qcow2 -b "$base" -F qcow2 "d$n.qcow2"
        qemu-io -f qcow2 -c "write -P $n $((n * 20))M 1M" "d$n.qcow2" >/dev/null
        base="d$n.qcow2"
    done
    head -c 200000000 /dev/urandom | base64 | head -c 256M >text.raw
    qemu-img convert -c -f raw -O qcow2 text.raw packed.qcow2
fi

seconds() {
    start=$(date +%s%N)
    "$@" >/dev/null
    end=$(date +%s%N)
    echo "$(((end - start) / 1000)) " | awk '{ printf "%.4f\n", $1 / 1e6 }'
}

# row NAME PLATTER-COMMAND -- QEMU-COMMAND
row() {
    name=$1
    shift
    ours= theirs= two=
    for word in "$@"; do
        if [ "$word" = -- ]; then two=1; elif [ -z "$two" ]; then ours="$ours $word"; else
            theirs="$theirs $word"
        fi
    done
    : >ours.txt
    : >theirs.txt
    for _ in $(seq $rounds); do
        seconds $ours >>ours.txt
        seconds $theirs >>theirs.txt
    done
    sort -n ours.txt >a.txt
    sort -n theirs.txt >b.txt
    paste a.txt b.txt | awk -v name="$name" '{ a[NR] = $1; b[NR] = $2 }
        END { m = int((NR + 1) / 2)
              printf "%-28s platter %.3f s (%.3f-%.3f)  qemu-img %.3f s (%.3f-%.3f)  x %.2f\n",
                  name, a[m], a[1], a[NR], b[m], b[1], b[NR], b[m] / a[m] }'
}

# Steps of a prime number of pages stand for chance: qemu-img bench has only steps.
step=$((4096 * 10007))
for image in d1 d50; do
    common="-f qcow2 -s 4096 -S $step -c 100000 $image.qcow2"
    row "4k scattered read, $image" $platter bench $common -- qemu-img bench -U -d 32 $common
    common="-f qcow2 -s 1048576 -c 2000 $image.qcow2"
    row "1M sequential read, $image" $platter bench $common -- qemu-img bench -U -d 4 $common
done
common="-w -f qcow2 -s 4096 -S $step -c 50000 d1.qcow2"
row "4k scattered write, d1" $platter bench $common -- qemu-img bench -d 32 $common
common="-w -f qcow2 -s 1048576 -c 1000 d1.qcow2"
row "1M sequential write, d1" $platter bench $common -- qemu-img bench -d 4 $common
common="-f qcow2 -s 65536 -c 4000 packed.qcow2"
row "64k compressed read" $platter bench $common -- qemu-img bench -U -d 32 $common
row "convert to qcow2" $platter convert -q --force d1.qcow2 x.qcow2 -- \
    qemu-img convert -t writeback -f qcow2 -O qcow2 d1.qcow2 y.qcow2
row "convert to raw" $platter convert -q --force d50.qcow2 x.raw -- \
    qemu-img convert -t writeback -f qcow2 -O raw d50.qcow2 y.raw
