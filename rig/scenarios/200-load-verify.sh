#: title Full depth, both ABIs, several queues: every sector is what was written
#: needs platter.elf loadgen.elf
# Would miss: an hour of it; `make sim` has more seeds, this has real rings.

scenario() {
    make_image one.raw 64M
    qemu-img create -q -f qcow2 "$IMAGES/two.qcow2" 64M >&2
    create_storage
    create_load load "$(disk xvda one.raw)" "$(disk xvdb two.qcow2)"
    for words in \
        "abi=64 queues=1 order=0 bs=4k depth=32" \
        "abi=32 queues=1 order=0 bs=64k depth=4" \
        "abi=64 queues=2 order=4 bs=128k depth=16 indirect=1" \
        "abi=32 queues=4 order=2 bs=512 depth=64 indirect=1"; do
        step "load: $words"
        load load "op=randrw verify=1 fill=1 range=16m secs=3 flush=50 discard=40 $words" 200
    done
    xl destroy load
    within 10 no_backends
    qemu-img check -q -f qcow2 "$IMAGES/two.qcow2" >&2 || fail "qemu-img check of two.qcow2"
}
