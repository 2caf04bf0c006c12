# What scenarios are written with; sourced in dom0 by scenario.sh, under `set -eu`.
#
# Three kinds of storage can stand behind a guest's disk (STORAGE in /job/settings):
#   platter  the storage domain; a target is /images/NAME
#   qdisk    dom0's QEMU;        blkback  dom0's kernel over a loop device
# The last two prove the rig itself and are what benches compare with. Functions print what a
# person wants to read; everything else goes to the trace on standard error.

STEP="start"
CONSOLES=/var/log/xen/console
IMAGES=/srv/images
CONFIGS=/job/xen-config
RUN=/run/rig
READY_PATTERN="store 'images' is up"
# Seconds for what has no limit of its own: a guest's boot, a job; times SLOWNESS, as all waits.
PATIENCE=100

# --- telling ---------------------------------------------------------------------------------

# step TEXT: what is being done now; shown as progress, and as the place of a failure.
step() {
    STEP=$*
    echo "$(uptime_seconds) $*"
    echo "$(uptime_seconds) step $SCENARIO $*" >>/job/results/progress
}

# note TEXT: a detail worth a line in the demo's story.
note() {
    echo "    $*"
    echo "$(uptime_seconds) note $SCENARIO $*" >>/job/results/progress
}

# fail TEXT: ends the scenario as failed; from inside a command substitution or a pipe too, which
# scenario.sh sees by the file.
fail() {
    echo "FAILED: $*" >&3
    echo "$*" >>"$RUN/failed"
    exit 1
}

# uptime_seconds: without a process of its own, as are the waits below: dom0 has one processor, and
# the guests that it waits for have to share it.
uptime_seconds() {
    local now
    read -r now _ </proc/uptime
    echo "$now"
}

# expect_equal WHAT EXPECTED ACTUAL
expect_equal() {
    [ "$2" = "$3" ] || fail "$1: expected '$2', got '$3'"
}

# expect_match WHAT PATTERN TEXT: TEXT must contain the extended regular expression.
expect_match() {
    printf '%s\n' "$3" | grep -Eq -- "$2" || fail "$1: nothing like '$2' in: $3"
}

# within SECONDS COMMAND...: repeats COMMAND until it succeeds; fails after SECONDS (as many times
# more as the host is slow).
within() {
    local now limit
    read -r now _ </proc/uptime
    limit=$((${now%.*} + $1 * ${SLOWNESS:-1}))
    shift
    until "$@" >/dev/null; do
        read -r now _ </proc/uptime
        [ "${now%.*}" -lt "$limit" ] || return 1
        sleep 0.2
    done
}

# elapsed_since UPTIME [whole]: seconds since then, with two decimals or none.
elapsed_since() {
    local format=%.2f
    if [ "${2:-}" = whole ]; then format=%d; fi
    echo "$1 $(uptime_seconds)" | awk -v f="$format" '{ printf f, $2 - $1 }'
}

# --- images ----------------------------------------------------------------------------------

# make_image NAME SIZE: a sparse raw image.
make_image() { truncate -s "$2" "$IMAGES/$1"; }

# disk VDEV IMAGE [w|r]: the text of a disk line for the storage in use.
disk() {
    local access="${3:-w}"
    case ${STORAGE:-platter} in
    platter) echo "vdev=$1,backend=storage,access=$access,format=raw,target=/images/$2" ;;
    qdisk) echo "vdev=$1,access=$access,backendtype=qdisk,format=raw,target=$IMAGES/$2" ;;
    blkback) echo "vdev=$1,access=$access,backendtype=phy,format=raw,target=$(loop_of "$2")" ;;
    esac
}

# loop_of IMAGE: the loop device over an image, made when there is none.
loop_of() {
    local device
    device=$(losetup -n -O NAME -j "$IMAGES/$1" | head -n1)
    [ -n "$device" ] || device=$(losetup --direct-io=off --show -f "$IMAGES/$1")
    echo "$device"
}

# --- the storage domain ----------------------------------------------------------------------

# create_storage [NAME=VALUE...]: the storage domain, ready to serve; nothing for dom0's storage.
# NAME=VALUE are xl settings that override storage.cfg (the last one of a name counts).
create_storage() {
    [ "${STORAGE:-platter}" = platter ] || return 0
    step "storage domain: create"
    if [ "$(ninep_server) $SUITE" = "platter bookworm" ]; then set -- "$@" "p9=[]"; fi
    create_storage_domain "$CONFIGS/storage.cfg" "$@"
    start_9p_server storage
    step "storage domain: wait until it is ready"
    within 30 console_has storage "$READY_PATTERN" || fail "the storage domain is not ready"
}

# create_storage_on CONFIG [NAME=VALUE...]: the storage domain on other stores than a 9p share.
create_storage_on() {
    step "storage domain: create"
    create_storage_domain "$@"
    [ "$READY_PATTERN" != "store 'images' is up" ] || READY_PATTERN="'xvda' is up"
    within 30 console_has storage "$READY_PATTERN" || fail "the storage domain is not ready"
}

# on_store VDEV TARGET: the text of a disk line for any target.
on_store() { echo "vdev=$1,backend=storage,format=raw,target=$2"; }

# volumes_on VG / volumes_off VG: dom0 itself uses the volumes of a group; it has no udev that would
# make their nodes.
volumes_on() {
    vgchange -q -ay --noudevsync "$1" >&2 || fail "vgchange -ay $1 failed"
    vgmknodes >&2
}
volumes_off() { vgchange -q -an --noudevsync "$1" >&2 || fail "vgchange -an $1 failed"; }

# create_storage_domain CONFIG [NAME=VALUE...]: only the domain, without a 9p server.
create_storage_domain() {
    xl create "$@" >&2 || fail "xl create $1 failed"
}

# ninep_server: who serves 9p shares: platter-9pfsd where it is among the files (unless NINEP names
# another), else QEMU, which libxl of Xen 4.17 starts by itself, and libxl of 4.20 not at all or too
# early.
ninep_server() {
    if [ "${NINEP:-platter}" = platter ] && [ -x /usr/lib/platter/platter-9pfsd ]; then
        echo platter
    elif [ "$SUITE" = bookworm ]; then
        echo libxl
    else
        echo qemu
    fi
}

# start_9p_server DOMAIN: a server for the domain's 9p shares; the one place that knows how.
# NINEP_OPTIONS holds more options of platter-9pfsd.
start_9p_server() {
    case $(ninep_server) in
    libxl) ;;
    platter)
        # One serves all domains; two would fight over each share.
        if ! pgrep -x platter-9pfsd >/dev/null; then
            /usr/lib/platter/platter-9pfsd serve --allow "$IMAGES" --user "${NINEP_USER:-root}" \
                ${NINEP_OPTIONS:-} </dev/null >"$RUN/9p-$1.log" 2>&1 &
        fi
        # There is no p9= line where libxl would start QEMU for it.
        [ "$SUITE" != bookworm ] ||
            /usr/lib/platter/platter-9pfsd attach "$1" images "$IMAGES" >&2 ||
            fail "the share cannot be attached"
        ;;
    qemu)
        /usr/libexec/xen-qemu-system-i386 -xen-domid "$(xl domid "$1")" -no-shutdown -nodefaults \
            -no-user-config -xen-attach -name "$1" -vnc none -display none -nographic \
            -machine xenpv -m 32 </dev/null >"$RUN/9p-$1.log" 2>&1 &
        echo $! >"$RUN/9p-$1.pid"
        ;;
    esac
}

# stop_9p_server DOMAIN: as a crash of the server would.
stop_9p_server() {
    if [ "$(ninep_server)" = platter ]; then
        pkill -9 -x platter-9pfsd
    elif [ -s "$RUN/9p-$1.pid" ]; then
        kill -9 "$(cat "$RUN/9p-$1.pid")"
    else
        pkill -9 -f "xen-domid $(xl domid "$1") "
    fi
}

# destroy_storage: takes it away without asking it.
destroy_storage() { xl destroy storage; }

# console_of DOMAIN: its whole console so far.
console_of() { tr -d '\r' <"$CONSOLES/guest-$1.log" 2>/dev/null || true; }

# console_has DOMAIN PATTERN
console_has() { grep -Eq -- "$2" "$CONSOLES/guest-$1.log" 2>/dev/null; }

# up_count DOMAIN STORE: how often its console says that a store is up. up_more_than DOMAIN STORE
# COUNT: it has come up since.
up_count() { console_of "$1" | grep -c "'$2' is up" || true; }
up_more_than() { [ "$(up_count "$1" "$2")" -gt "$3" ]; }

# store_counters STORE: what the storage domain tells of it.
store_counters() { xenstore-read "/local/domain/$(xl domid storage)/data/store/$1"; }

# domain_is_gone NAME / domain_is_running NAME: as xl sees it; a domain that is dying is not gone.
domain_is_gone() { ! xl list "$1" >/dev/null 2>&1; }
domain_is_running() {
    xl list "$1" 2>/dev/null | awk 'NR == 2 && $5 ~ /^[rb-]-?-?-?-?-?/ && $5 !~ /[scd]/ { ok = 1 }
        END { exit !ok }'
}

# --- the NVMe device of machines that have one ---------------------------------------------------

NVME_SLOT=00:10.0

# nvme_for_dom0: dom0 drives it, to prepare its content; prints its block device.
nvme_for_dom0() {
    xl pci-assignable-remove -r "$NVME_SLOT" >&2 2>/dev/null || true
    modprobe nvme
    [ -e "/sys/bus/pci/devices/0000:$NVME_SLOT/driver" ] ||
        echo "0000:$NVME_SLOT" >/sys/bus/pci/drivers/nvme/bind
    within 10 test -b /dev/nvme0n1 || fail "dom0 has no /dev/nvme0n1"
    echo /dev/nvme0n1
}

# nvme_for_domains: it may be given to a domain.
nvme_for_domains() {
    xl pci-assignable-add "$NVME_SLOT" >&2 || fail "xl pci-assignable-add failed"
}

# --- Linux guests ----------------------------------------------------------------------------

# create_guest NAME DISK...: a Linux guest, up and waiting for jobs. GUEST_CONFIG picks the file in
# xen-config, GUEST_SETTINGS holds one more NAME=VALUE, FIO=1 adds fio to the guest.
create_guest() {
    local before
    before=$(ready_count "$1")
    step "$1: create the guest"
    create_guest_only "$@"
    wait_guest "$1" "$before"
}

# create_guest_only NAME DISK...: as create_guest, without waiting for it to come up.
create_guest_only() {
    rm -f "$RUN/$1.tty"
    guest_config "$@" >"$RUN/$1.cfg"
    xl create "$RUN/$1.cfg" >&2 || fail "xl create of guest $1 failed"
}

# wait_guest NAME [COUNT]: until it is up for more than the COUNT-th time (0).
wait_guest() {
    step "$1: wait until Linux is up"
    within $PATIENCE ready_more_than "$1" "${2:-0}" || fail "guest $1 does not come up"
    rm -f "$RUN/$1.tty"
}

# guest_config NAME DISK...: the guest's file of xen-config with the rig's values after it.
guest_config() {
    cat "$CONFIGS/${GUEST_CONFIG:-guest-pv.cfg}"
    echo "name=\"$1\""
    shift
    if [ $# -gt 0 ]; then echo "disk=[$(printf "'%s'," "$@")]"; else echo "disk=[]"; fi
    if [ "${FIO:-0}" = 1 ]; then
        echo 'ramdisk="/srv/boot/initrd-fio"'
        echo 'memory=640'
    fi
    echo "${GUEST_SETTINGS:-}"
}

ready_count() { grep -c '^@@ready' "$CONSOLES/guest-$1.log" 2>/dev/null || true; }

ready_more_than() {
    local count
    count=$(ready_count "$1")
    [ "${count:-0}" -gt "${2:-0}" ]
}

# guest NAME COMMANDS [SECONDS]: runs COMMANDS in the guest; their output and status are its own.
guest() {
    guest_start "$1" "$2"
    guest_wait "$1" "${3:-$PATIENCE}"
}

# guest_start NAME COMMANDS: sends COMMANDS and returns; guest_wait NAME [SECONDS] hands back the
# output and the status of the last ones sent.
guest_start() {
    local job
    if [ ! -s "$RUN/$1.tty" ]; then
        xenstore-read "/local/domain/$(xl domid "$1")/console/tty" >"$RUN/$1.tty"
    fi
    job=$(($(cat "$RUN/job" 2>/dev/null || echo 0) + 1))
    echo "$job" >"$RUN/job"
    echo "$job" >"$RUN/$1.job"
    printf '%s %s\n' "$job" "$(printf %s "$2" | base64 -w0)" >"$(cat "$RUN/$1.tty")"
}

guest_wait() {
    local job
    job=$(cat "$RUN/$1.job")
    within "${2:-$PATIENCE}" console_has "$1" "^@@done $job " ||
        fail "guest $1 did not finish its job in ${2:-$PATIENCE} s"
    console_of "$1" | awk -v b="@@begin $job" -v d="@@done $job " '
        $0 == b { inside = 1; next }
        index($0, d) == 1 { inside = 0 }
        inside' | sed -e '${/^$/d}'
    return "$(console_of "$1" | sed -n "s/^@@done $job //p" | tail -n1)"
}

# guest_must NAME COMMANDS [SECONDS]: as guest, and a failure of COMMANDS fails the scenario.
guest_must() {
    local said
    said=$(guest "$@") || fail "in guest $1: $said"
    printf '%s\n' "$said"
}

# What a guest does to /dev/xvda while the backend below platter comes and goes. The one that went
# may have had something in its cache: one flush may fail.
WRITE_THROUGH_RESTARTS='
    set -e
    dd if=/dev/urandom of=/tmp/data bs=64k count=384 2>/dev/null
    n=0
    while [ $n -lt 24 ]; do
        dd if=/tmp/data of=/dev/xvda bs=64k skip=$((n * 16)) seek=$((n * 16)) count=16 \
            oflag=direct 2>/dev/null
        n=$((n + 1))
        sleep 0.2
    done
    dd if=/dev/null of=/dev/xvda conv=fsync,notrunc 2>/dev/null || true
    dd if=/dev/null of=/dev/xvda conv=fsync,notrunc 2>/dev/null
    dd if=/dev/xvda bs=64k count=384 iflag=direct 2>/dev/null | cmp - /tmp/data'

# guest_goes_on NAME IMAGE: it reads the "before" that it wrote to /dev/xvda, and its "after" is in
# the raw image when it has stopped.
guest_goes_on() {
    guest_must "$1" '
        set -e
        echo 3 >/proc/sys/vm/drop_caches
        [ "$(head -n1 /dev/xvda)" = before ]
        echo after | dd of=/dev/xvda conv=fsync 2>/dev/null'
    stop_guest "$1"
    expect_equal "the image" after "$(head -n1 "$IMAGES/$2")"
}

# stop_guest NAME: unmounts, syncs and destroys; these guests have no init that could shut down.
stop_guest() {
    guest_must "$1" 'umount /mnt 2>/dev/null; sync' >/dev/null
    xl destroy "$1"
}

# --- the Linux driver domain, platter's peer ----------------------------------------------------

# create_linux_driver_domain NAME [SETTINGS]: Linux with blkback and `xl devd`; jobs work in it as
# in a guest. Its root is /dev/vdb, a copy of dom0's own. A target is a block device in it.
create_linux_driver_domain() {
    local before
    before=$(ready_count "$1")
    step "Linux driver domain $1: create"
    mount -t ext4 /dev/vdb /mnt
    mkdir -p /mnt/rig
    cp /job/guest/*.sh /mnt/rig/
    umount /mnt
    {
        cat "$CONFIGS/guest-pv.cfg"
        printf 'name="%s"\ndisk=["phy:/dev/vdb,xvda,w"]\nmemory=400\ndriver_domain=1\n' "$1"
        printf 'extra="console=hvc0 quiet loglevel=3 rig.root=/dev/xvda"\n%s\n' "${2:-}"
    } >"$RUN/$1.cfg"
    xl create "$RUN/$1.cfg" >&2 || fail "xl create of $1 failed"
    wait_guest "$1" "$before"
}

# --- measuring ---------------------------------------------------------------------------------

# cpu_seconds: processor time that dom0 and the storage domain have used so far, to 0.1 s.
cpu_seconds() {
    xl list | awk '$1 == "Domain-0" { d = $6 } $1 == "storage" { s = $6 }
        END { print d + 0, s + 0 }'
}

# cpu_since THEN: what they have used since cpu_seconds printed THEN.
cpu_since() { echo "$1 $(cpu_seconds)" | awk '{ printf "%.1f %.1f", $3 - $1, $4 - $2 }'; }

# --- disks of running guests -----------------------------------------------------------------

# block_attach GUEST DISK / block_detach GUEST VDEV: must succeed.
block_attach() { xl block-attach "$1" "$2" >&2 || fail "xl block-attach $1 $2 failed"; }
block_detach() { xl block-detach "$1" "$2" >&2 || fail "xl block-detach $1 $2 failed"; }

# guest_config_small NAME DISK...: a domain that is not meant to run: no Linux, a few MiB.
guest_config_small() {
    guest_config "$@"
    printf 'kernel="%s"\nramdisk=""\nmemory=16\n' /usr/lib/platter/platter.elf
}

# hold NAME DISK: a paused domain that holds the disk; its backend is in state 2.
hold() {
    guest_config_small "$@" >"$RUN/$1.cfg"
    xl create -p "$RUN/$1.cfg" >&2 || fail "xl create of $1 failed"
}

# refuse_once TARGET ACCESS: tries to create a guest with this target, which must fail; leaves the
# seconds that it took in $RUN/took. The domain is small so that what is timed is the disk and not
# the loading of a Linux kernel.
refuse_once() {
    local began
    guest_config_small refused \
        "vdev=xvda,access=$2,backend=storage,format=raw,target=$1" >"$RUN/refused.cfg"
    began=$(uptime_seconds)
    if timeout 30 xl create -p "$RUN/refused.cfg" >&2; then
        xl destroy refused
        fail "a guest with target=$1 was created"
    fi
    elapsed_since "$began" >"$RUN/took"
}

# expect_refused TARGET PATTERN [w|r]: a guest with this target must not come to life; xl must say
# so within 2 s (as many times more as the host is slow), and the reason must stand on the storage
# domain's console and in its xenstore.
# The best of six counts: a busy host stops the whole machine for seconds at times.
expect_refused() {
    local seen reason try
    step "refused: $1"
    seen=$(console_of storage | wc -l)
    for try in 1 2 3 4 5 6; do
        refuse_once "$1" "${3:-w}"
        if awk -v s="${SLOWNESS:-1}" '{ exit !($1 < 2 * s) }' "$RUN/took"; then break; fi
        [ "$try" -lt 6 ] || fail "the refusal of $1 took $(cat "$RUN/took") s, six times"
    done
    reason=$(console_of storage | tail -n +"$((seen + 1))")
    expect_match "the console after target=$1" "$2" "$reason"
    reason=$(xenstore-ls -f "/local/domain/$(xl domid storage)/error" 2>/dev/null || true)
    expect_match "error/ in xenstore after target=$1" "$2" "$reason"
}

# no_backends: the storage domain serves no disk and left nothing in its part of xenstore.
no_backends() {
    [ "${STORAGE:-platter}" = platter ] || return 0
    local left
    left=$(xenstore-ls "/local/domain/$(xl domid storage)/backend" 2>/dev/null || true)
    expect_equal "backends left" "" "$(printf %s "$left" | grep 'state =' || true)"
}
