#: title One guest's flood does not starve its neighbour
#: needs platter.elf loadgen.elf
#: set slow
# Would miss: the exact bound; on an emulated machine with other load only a gross unfairness shows.

scenario() {
    make_image flood.raw 32M
    make_image calm.raw 32M
    create_storage
    create_load flood "$(disk xvda flood.raw)"
    create_load calm "$(disk xvda calm.raw)"
    words="op=randread bs=4k depth=1 range=16m secs=5"
    step "the calm one alone, after a warm-up"
    load calm "$words" >&2
    alone=$(load calm "$words")
    step "the calm one beside a flood"
    load_start flood "op=randread bs=4k depth=128 order=4 range=16m secs=12"
    sleep 2
    beside=$(load calm "$words")
    load_wait flood
    alone=$(value_of p50_us "$alone")
    beside=$(value_of p50_us "$beside")
    note "median latency $alone us alone, $beside us beside the flood"
    # Both guests, dom0 and platter share two emulated processors: the flood takes its share of
    # those whatever platter does.
    [ "$beside" -lt $((alone * 6)) ] || fail "the flood delays its neighbour too much"
}
