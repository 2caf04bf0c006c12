#: title Two queues, 16 pages, 32 segments, both layouts: every sector checked
#: needs platter.elf loadgen.elf
#: timeout 600
# A bare guest floods its disks with as much as the protocol allows and checks each sector it
# reads, over a new connection too; SECS=60 for a long look.
# Would miss: content between the two stamps of a sector.

. /job/dom0/loadgen.sh

scenario() {
    secs=${SECS:-3}
    mount -t tmpfs -o size=400M images "$IMAGES"
    make_image wide.raw 96M
    make_image narrow.raw 64M
    create_storage
    wide="op=randrw bs=128k depth=64 queues=2 order=4 indirect=1 fill=1 verify=1 range=16m"
    run_loadgen wide "$wide secs=$secs flush=50 discard=40" "$(disk xvda wide.raw)"
    run_loadgen narrow "op=randrw bs=4k depth=64 abi=32 fill=1 verify=1 range=2m secs=$secs \
barrier=30 flush=64" "$(disk xvda narrow.raw)"
    run_loadgen odd "op=randrw bs=512 depth=16 abi=32 queues=2 order=1 indirect=1 verify=1 \
range=1m secs=1" "$(disk xvda narrow.raw)"
    run_loadgen check "op=check bs=44k depth=8 range=2m" "$(disk xvda narrow.raw)"
    storage_is_well
    no_backends
    umount "$IMAGES" 2>/dev/null || true
}
