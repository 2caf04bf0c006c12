#: title The rig itself: a Linux guest reads its NVMe device
#: set slow
#: storage any
#: machine nvme
# Not about platter: proves the machine that platter's NVMe scenarios run on.

scenario() {
    device=$(nvme_for_dom0)
    echo hello | dd of="$device" conv=fsync 2>/dev/null
    nvme_for_domains
    GUEST_SETTINGS='pci=["'$NVME_SLOT'"]
        extra="console=hvc0 quiet loglevel=3 rig.modules=pci"'
    create_guest guest
    guest_must guest '
        tries=0
        until [ -b /dev/nvme0n1 ]; do
            tries=$((tries + 1))
            [ $tries -lt 100 ] || exit 1
            sleep 0.1
        done'
    expect_equal "the first line" hello "$(guest_must guest 'head -n1 /dev/nvme0n1')"
}
