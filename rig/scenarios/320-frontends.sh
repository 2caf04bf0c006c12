#: title Every frontend's way to open and close: pvgrub2, mini-os, OVMF, xenvbd, kexec, stale nodes
#: needs platter.elf loadgen.elf
#: timeout 400
# Would miss: what those frontends do to the data; the guests of other scenarios show that.

. /job/dom0/loadgen.sh

scenario() {
    make_image disk.raw 16M
    create_storage
    start_loadgen habits "play=all cycles=${CYCLES:-2}" "$(disk xvda disk.raw)"
    wait_loadgen habits 300
    storage_is_well
    no_backends
}
