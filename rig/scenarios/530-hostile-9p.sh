#: title A hostile guest attacks platter-9pfsd; the storage domain beside it goes on
#: needs platter.elf loadgen.elf hostile.elf platter-9pfsd
#: set slow
#: timeout 900
# The server must live, with nothing left of the guest: no process memory that grows with attacks,
# no open file, no mapped page. The neighbour's disk lies on the same server and is verified.
# Would miss: what a file system or a disk does to the server.

. /job/dom0/loadgen.sh

NEIGHBOUR="op=randrw bs=4k depth=2 range=1m verify=1"

scenario() {
    mount -t tmpfs -o size=300M images "$IMAGES"
    make_image good.raw 32M
    mkdir "$IMAGES/bad"
    create_storage
    server=$(pgrep -x platter-9pfsd)
    start_loadgen good serve "$(disk xvda good.raw)"
    within "$PATIENCE" console_has good "waiting for jobs" || fail "the neighbour does not start"
    job good 1 "$NEIGHBOUR fill=1 secs=3"
    job_wait good 1 120
    files=$(ls "/proc/$server/fd" | wc -l)
    share='p9=["tag=bad,path='$IMAGES/bad',security_model=none"]'
    # Where libxl would start QEMU for that, the share is given by hand.
    [ "$SUITE" != bookworm ] || share=
    {
        loadgen_config bad hostile "secs=${SECS:-1} slowness=$SLOWNESS linger=10 die=1" |
            grep -v ^disk=
        echo "$share"
    } >"$RUN/bad.cfg"
    step "the hostile guest, and the neighbour meanwhile"
    xl create -p "$RUN/bad.cfg" >&2 || fail "xl create of the hostile guest failed"
    [ "$SUITE" != bookworm ] ||
        /usr/lib/platter/platter-9pfsd attach bad bad "$IMAGES/bad" >&2 ||
        fail "the share cannot be attached"
    xl unpause bad
    number=2
    began=$(uptime_seconds)
    until console_has bad "attacks made|panicked"; do
        job good "$number" "$NEIGHBOUR secs=2"
        job_wait good "$number" 60
        number=$((number + 1))
        console_of bad >"/job/results/$SCENARIO/bad.now"
        # Dom0 and the attacker have the processor for themselves.
        sleep 3
        [ "$(elapsed_since "$began" whole)" -lt $((300 * SLOWNESS)) ] ||
            fail "the attacks do not end: $(console_of bad | grep ' attack ')"
    done
    console_of bad | grep -E " attack |error:"
    step "what is left"
    expect_equal "open files of the server" "$files" "$(ls "/proc/$server/fd" | wc -l)"
    grep -E "VmRSS|Threads" "/proc/$server/status"
    [ "$(awk '/VmRSS/ { print $2 }' "/proc/$server/status")" -lt 65536 ] ||
        fail "the server takes more than 64 MiB"
    within 60 domain_is_gone bad || fail "the hostile guest does not go"
    console_has bad "done job=0 .*status=ok" || fail "$(console_of bad | tail -n3)"
    within 10 nothing_mapped || fail "mappings are left: $(grep -c gntdev "/proc/$server/maps")"
    expect_equal "the server" "$server" "$(pgrep -x platter-9pfsd)"
    job good "$number" "$NEIGHBOUR secs=3"
    job_wait good "$number" 120
    tail -n 20 "$RUN/9p-storage.log"
    [ "$(wc -l <"$RUN/9p-storage.log")" -lt 60 ] || fail "the guest fills the server's log"
    job good 999 quit
    within 60 domain_is_gone good || fail "the neighbour does not go"
    storage_is_well
    umount "$IMAGES" 2>/dev/null || true
}

# nothing_mapped: the server maps the storage domain's rings alone: each has two mappings.
nothing_mapped() {
    [ "$(grep -c gntdev "/proc/$server/maps")" -le 16 ]
}
