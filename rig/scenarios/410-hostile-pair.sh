#: title Two hostile guests attack at once, on one image read-only and on one each
#: needs platter.elf loadgen.elf hostile.elf
#: set slow
#: timeout 900
# Their attacks interleave as they come; a neighbour reads what it wrote meanwhile.
# Would miss: two who time their steps with each other.

. /job/dom0/loadgen.sh

scenario() {
    mount -t tmpfs -o size=300M images "$IMAGES"
    for image in good one two shared; do make_image $image.raw 32M; done
    create_storage
    start_loadgen good serve "$(disk xvda good.raw)"
    within "$PATIENCE" console_has good "waiting for jobs" || fail "the neighbour does not start"
    job good 1 "op=randrw bs=4k depth=2 range=1m verify=1 fill=1 secs=3"
    job_wait good 1 120
    ports=$(storage_ports)
    for bad in one two; do
        start_bare "$bad" hostile "secs=${SECS:-1} linger=600" "$(disk xvda $bad.raw)" \
            "$(disk xvdb shared.raw r)"
    done
    step "the neighbour meanwhile"
    number=2
    until console_has one "attacks made|panicked" && console_has two "attacks made|panicked"; do
        job good "$number" "op=randrw bs=4k depth=2 range=1m verify=1 secs=5"
        job_wait good "$number" 240
        number=$((number + 1))
        [ "$number" -lt 100 ] || fail "the attacks do not end"
    done
    step "what is left at idle"
    sleep 5
    for bad in one two; do
        console_has "$bad" "panicked|error:" &&
            fail "$(console_of "$bad" | grep -E 'error:|panicked')"
        counters=$(disk_counters "$(xl domid "$bad")" 51712)
        echo "$bad: $counters"
        expect_match "the counters of $bad" " bad-grant=[1-9]" "$counters"
        expect_equal "pages held of $bad" 0 "$(pages_held_of "$(xl domid "$bad")")"
    done
    expect_equal "event channels of the storage domain" "$ports" "$(storage_ports)"
    for bad in one two; do xl destroy "$bad"; done
    job good 999 quit
    within 60 domain_is_gone good || fail "the neighbour does not go"
    storage_is_well
    no_backends
    umount "$IMAGES" 2>/dev/null || true
}
