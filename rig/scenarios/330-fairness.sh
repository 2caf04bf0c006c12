#: title A guest that floods a ring of 16 pages costs another no more than an equal neighbour does
#: needs platter.elf loadgen.elf
#: set slow
#: timeout 500
# Latency of single 4 KiB reads: alone, beside one who does the same, beside a flood of small
# requests, beside a flood of large ones. A server with one processor halves between two guests
# whatever they do, so the bound is on the medians beside the floods against the median beside an
# equal: twice that is what is wanted, half as much again is left to a busy host.
# Would miss: three and more guests.

. /job/dom0/loadgen.sh

scenario() {
    mount -t tmpfs -o size=300M images "$IMAGES"
    for image in quiet flood; do
        dd if=/dev/zero of="$IMAGES/$image.raw" bs=1M count=32 2>/dev/null
    done
    create_storage
    secs=${SECS:-6}
    start_loadgen quiet serve "$(disk xvda quiet.raw)"
    start_loadgen flood serve "$(disk xvda flood.raw)"
    for name in quiet flood; do
        within "$PATIENCE" console_has "$name" "waiting for jobs" || fail "$name does not start"
    done
    number=1
    single="op=randread bs=4k depth=1 range=16m secs=$secs"
    latency alone ""
    latency beside-one "$single"
    latency beside-small "op=randread bs=4k depth=512 order=4 range=16m secs=$((secs + 4))"
    latency beside-large "op=randrw bs=128k depth=128 order=4 indirect=1 range=16m \
secs=$((secs + 4))"
    for flood in beside-small beside-large; do
        ratio=$(echo "$(cat "$RUN/$flood") $(cat "$RUN/beside-one") $(cat "$RUN/alone")" |
            awk '{ printf "%.2f %.2f", $1 / $2, $1 / $3 }')
        echo "$flood: median ${ratio% *} times that beside an equal, ${ratio#* } times alone"
        echo "$ratio" | awk '{ exit !($1 <= 3) }' || fail "$flood: $ratio"
    done
    for name in quiet flood; do job "$name" 999 quit; done
    for name in quiet flood; do
        within 60 domain_is_gone "$name" || fail "$name does not go"
    done
    storage_is_well
    umount "$IMAGES" 2>/dev/null || true
}

# latency NAME WORDS: the quiet guest's figures while the other one does WORDS.
latency() {
    step "$1"
    if [ -n "$2" ]; then
        job flood "$number" "$2"
        sleep 2
    fi
    job quiet "$number" "$single"
    said=$(job_wait quiet "$number" 120)
    echo "$said" | field p50_us >"$RUN/$1"
    echo "$1: $(echo "$said" | sed 's/.* ios=/ios=/; s/reads=.*//')"
    if [ -n "$2" ]; then
        echo "    the other: $(job_wait flood "$number" 120 | sed 's/.* ios=/ios=/; s/reads=.*//')"
    fi
    number=$((number + 1))
}
