#: title A hostile guest attacks its disks; its neighbour reads what it wrote, in time
#: needs platter.elf loadgen.elf hostile.elf
#: set slow
#: timeout 900
# The neighbour's median latency must not double; a guest that takes its half of a processor does as
# much, and the host's own load is in it: starvation is what fails.
# SECS: how long each attack that could go on for ever goes on.
# Would miss: attacks that need two guests who act together.

. /job/dom0/loadgen.sh

NEIGHBOUR="op=randrw bs=4k depth=2 range=1m verify=1"

scenario() {
    mount -t tmpfs -o size=300M images "$IMAGES"
    for image in good bad read-only; do make_image $image.raw 32M; done
    create_storage
    start_loadgen good serve "$(disk xvda good.raw)"
    within "$PATIENCE" console_has good "waiting for jobs" || fail "the neighbour does not start"
    job good 1 "$NEIGHBOUR fill=1 secs=${ALONE_SECS:-5}"
    alone=$(job_wait good 1 120)
    ports=$(storage_ports)
    start_bare bad hostile "secs=${SECS:-1} linger=20 die=1" "$(disk xvda bad.raw)" \
        "$(disk xvdb read-only.raw r)"
    bad=$(xl domid bad)
    step "the neighbour meanwhile"
    number=2
    : >"$RUN/beside"
    until console_has bad "attacks made|panicked"; do
        job good "$number" "$NEIGHBOUR secs=5"
        job_wait good "$number" 180 >>"$RUN/beside"
        number=$((number + 1))
        console_of bad >"/job/results/$SCENARIO/bad.now"
        [ "$number" -lt 100 ] || fail "the attacks do not end"
    done
    step "what is left at idle"
    console_of bad | grep " attack "
    sleep 5
    counters=$(disk_counters "$bad" 51712)
    echo "$counters"
    disk_counters "$bad" 51728
    for name in unknown-operation segments-none segments-too-many segment-empty \
        segment-beyond-page sector-overflow beyond-end discard-empty indirect-operation \
        bad-grant ring-broken connect-refused; do
        expect_match "the counters of the attacked disk" " $name=[1-9]" "$counters"
    done
    expect_match "the counters of the disk that is read-only" " read-only=[1-9]" \
        "$(disk_counters "$bad" 51728)"
    # The meter shows what is mapped: the neighbour's ring.
    [ "$(pages_held_of "$(xl domid good)")" -ge 1 ] || fail "the neighbour's ring is not seen"
    expect_equal "pages held of the hostile guest" 0 "$(pages_held_of "$bad")"
    # An image that is open needs a port for nothing: only rings do.
    expect_equal "event channels of the storage domain" "$ports" "$(storage_ports)"
    console_has bad "panicked|error:" && fail "$(console_of bad | grep -E 'error:|panicked')"
    within 60 domain_is_gone bad || fail "the hostile guest does not go"
    step "what the neighbour saw"
    echo "alone:  $(echo "$alone" | sed 's/.* ms=/ms=/; s/reads=.*//')"
    sed 's/.* ms=/beside: ms=/; s/reads=.*//' "$RUN/beside"
    ratio=$(echo "$(tr ' ' '\n' <"$RUN/beside" | sed -n 's/^p50_us=//p' | sort -n |
        awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }') $(echo "$alone" | field p50_us)" |
        awk '{ printf "%.2f", $1 / $2 }')
    echo "the neighbour's median latency: $ratio times that of alone"
    echo "$ratio" | awk '{ exit !($1 <= 4) }' || fail "the neighbour starves: $ratio"
    job good 999 quit
    within 60 domain_is_gone good || fail "the neighbour does not go"
    storage_is_well
    no_backends
    umount "$IMAGES" 2>/dev/null || true
}
