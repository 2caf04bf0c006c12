#: title Frontends that open, leave and return in their own ways: pvgrub2, mini-os, OVMF, Windows...
#: needs platter.elf loadgen.elf
# Would miss: those frontends themselves; here the load generator replays what they do.

scenario() {
    make_image disk.raw 16M
    create_storage
    create_load load "$(disk xvda disk.raw)"
    step "every habit twice"
    load load "play=all cycles=2" 240
    console_of load | grep 'play ' || true
    step "an ordinary run after them"
    load load "op=randrw verify=1 fill=1 range=4m bs=4k depth=8 secs=2"
}
