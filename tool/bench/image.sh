#!/bin/bash
# platter bench and convert beside qemu-img's, and beside the Rust crates imago and qcow2-rs, on
# the same files, all from the page cache: medians of some rounds in turn, of seconds on the clock
# and of the processor, and their ratios with the spread over the rounds (above 1: platter is
# faster).
# usage: image.sh PLATTER [PEERS [FOLDER [ROUNDS]]]
set -eu
platter=$(realpath "$1")
peers=${2:+$(realpath "$2")}
cd "${3:-$(mktemp -d)}"
rounds=${4:-5}
TIMEFORMAT='%R %U %S'

if [ ! -e d500.qcow2 ]; then
    qemu-img create -q -f qcow2 d1.qcow2 1G
    for n in $(seq 0 15); do
        qemu-io -f qcow2 -c "write -P $((n + 1)) $((n * 64))M 64M" d1.qcow2 >/dev/null
    done
    base=d1.qcow2
    for n in $(seq 2 500); do
        "$platter" snapshot --overlay "d$n.qcow2" "$base" >/dev/null
        "$platter" bench -w -c 1 -s 512k -o "$((n * 2))M" "d$n.qcow2" >/dev/null
        base="d$n.qcow2"
    done
    head -c 200000000 /dev/urandom | base64 | head -c 256M >text.raw
    for kind in zlib zstd; do
        qemu-img convert -c -f raw -O qcow2 -o compression_type=$kind text.raw $kind.qcow2
    done
fi

# run COMMAND...: seconds on the clock and of the processor
run() {
    { time "$@" >/dev/null 2>&1; } 2>&1 | awk '{ printf "%.4f %.4f\n", $1, $2 + $3 }'
}

# row NAME PLATTER-COMMAND -- OTHER-COMMAND
row() {
    local name=$1 ours=() theirs=() two=
    shift
    for word in "$@"; do
        if [ "$word" = -- ]; then two=1; elif [ -z "$two" ]; then ours+=("$word"); else
            theirs+=("$word")
        fi
    done
    : >rounds.txt
    for _ in $(seq "$rounds"); do
        echo "$(run "${ours[@]}") $(run "${theirs[@]}")" >>rounds.txt
    done
    awk -v name="$name" '
        function median(v, n,  i, j, t) {
            for (i = 1; i < n; i++) for (j = i + 1; j <= n; j++)
                if (v[j] < v[i]) { t = v[i]; v[i] = v[j]; v[j] = t }
            return n % 2 ? v[(n + 1) / 2] : (v[n / 2] + v[n / 2 + 1]) / 2
        }
        { a[NR] = $1; b[NR] = $3; p[NR] = $2; q[NR] = $4
          r[NR] = $3 / $1; s[NR] = $4 / ($2 > 0 ? $2 : 0.001) }
        END { x = median(a, NR); y = median(b, NR); u = median(p, NR); v = median(q, NR)
              m = median(r, NR); k = median(s, NR)
              printf "| %s | %.3f | %.3f | %.2f (%.2f-%.2f) | %.3f | %.3f | %.2f (%.2f-%.2f) |\n",
                  name, x, y, m, r[1], r[NR], u, v, k, s[1], s[NR] }' rounds.txt
}

echo "| Row | platter | other | ratio | processor | other's | ratio |"
echo "|---|---|---|---|---|---|---|"
# Steps of a prime number of pages stand for chance: qemu-img bench has only steps.
step=$((4096 * 10007))
for image in d1 d50 d500; do
    # QEMU goes down the chain for each request.
    count=$([ $image = d500 ] && echo 300 || echo 50000)
    c=(-f qcow2 -s 4096 -S $step -c "$count" $image.qcow2)
    row "4k scattered read, ${image#d} deep" "$platter" bench -d 32 "${c[@]}" -- \
        qemu-img bench -U -d 32 "${c[@]}"
done
for image in d1 d50; do
    c=(-f qcow2 -s 1048576 -c 2000 $image.qcow2)
    row "1 MiB sequential read, ${image#d} deep" "$platter" bench -d 4 "${c[@]}" -- \
        qemu-img bench -U -d 4 "${c[@]}"
done
for kind in zlib zstd; do
    c=(-f qcow2 -s 65536 -c 4000 $kind.qcow2)
    row "64k read, $kind" "$platter" bench -d 32 "${c[@]}" -- qemu-img bench -U -d 32 "${c[@]}"
    c=(-f qcow2 -s 4096 -S $step -c 2000 $kind.qcow2)
    row "4k scattered read, $kind" "$platter" bench -d 32 "${c[@]}" -- \
        qemu-img bench -U -d 32 "${c[@]}"
done
for image in d1 d50; do
    "$platter" snapshot --overlay w.qcow2 $image.qcow2 >/dev/null
    c=(-w -f qcow2 -s 4096 -S $step -c 30000 w.qcow2)
    row "4k scattered write, over ${image#d}" "$platter" bench -d 32 "${c[@]}" -- \
        qemu-img bench -d 32 "${c[@]}"
    rm w.qcow2
done
# Not zeros: the rows after this one copy what it leaves.
c=(-w --pattern=7 -f qcow2 -s 1048576 -c 1000 d1.qcow2)
row "1 MiB sequential write" "$platter" bench -d 4 "${c[@]}" -- qemu-img bench -d 4 "${c[@]}"
row "convert qcow2 to qcow2" "$platter" convert -q --force d1.qcow2 x.qcow2 -- \
    qemu-img convert -t writeback -f qcow2 -O qcow2 d1.qcow2 y.qcow2
row "compare" "$platter" compare -q d1.qcow2 x.qcow2 -- \
    qemu-img compare -q -f qcow2 -F qcow2 d1.qcow2 x.qcow2
row "convert raw to qcow2" "$platter" convert -q --force text.raw x.qcow2 -- \
    qemu-img convert -t writeback -f raw -O qcow2 text.raw y.qcow2
row "convert qcow2 to raw, 50 deep" "$platter" convert -q --force d50.qcow2 x.raw -- \
    qemu-img convert -t writeback -f qcow2 -O raw d50.qcow2 y.raw
row "convert zlib to raw" "$platter" convert -q --force zlib.qcow2 x.raw -- \
    qemu-img convert -t writeback -f qcow2 -O raw zlib.qcow2 y.raw
row "convert -c raw to qcow2" "$platter" convert -q --force -c text.raw x.qcow2 -- \
    qemu-img convert -t writeback -c -f raw -O qcow2 text.raw y.qcow2
row "convert -c raw to qcow2, zstd" \
    "$platter" convert -q --force -c -o compression_type=zstd text.raw x.qcow2 -- \
    qemu-img convert -t writeback -c -f raw -O qcow2 -o compression_type=zstd text.raw y.qcow2
row "convert to streamOptimized" \
    "$platter" convert -q --force -o subformat=streamOptimized text.raw x.vmdk -- \
    qemu-img convert -t writeback -f raw -O vmdk -o subformat=streamOptimized text.raw y.vmdk
rm -f x.* y.*

# What a request costs once all is warm: a longer run less a shorter one.
warm() {
    local few many
    few=$(run "$platter" bench --random 1 -d 1 -c 100000 "$1" | cut -d' ' -f2)
    many=$(run "$platter" bench --random 1 -d 1 -c 500000 "$1" | cut -d' ' -f2)
    echo "$few $many" | awk '{ printf "%.3f\n", ($2 - $1) / 0.4 }'
}
for _ in $(seq "$rounds"); do
    echo "warm 4k random read, processor us: 1 deep $(warm d1.qcow2), 500 deep $(warm d500.qcow2)"
done

[ -n "$peers" ] || exit 0
for depth in 1 32; do
    library=$([ $depth = 1 ] && echo imago || echo qcow2-rs)
    for image in d1 d50; do
        row "$library: 4k random read, ${image#d} deep" \
            "$platter" bench --random 1 -d $depth -c 50000 $image.qcow2 -- \
            "$peers" $library read 4096 0 50000 $depth $image.qcow2
    done
    row "$library: 1 MiB sequential read" \
        "$platter" bench -d $depth -s 1M -c 1000 d1.qcow2 -- \
        "$peers" $library read 1048576 1048576 1000 $depth d1.qcow2
    row "$library: 64k read, zlib" "$platter" bench -d $depth -s 64k -c 2000 zlib.qcow2 -- \
        "$peers" $library read 65536 65536 2000 $depth zlib.qcow2
    row "$library: 4k random write" "$platter" bench -w --random 1 -d $depth -c 30000 d1.qcow2 -- \
        "$peers" $library write 4096 0 30000 $depth d1.qcow2
done
