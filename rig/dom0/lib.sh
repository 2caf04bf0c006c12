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
READY_PATTERN='ready'

# --- telling ---------------------------------------------------------------------------------

# step TEXT: what is being done now; shown as progress, and as the place of a failure.
step() {
    STEP=$*
    echo "$(uptime_seconds) $*"
    echo "$(uptime_seconds) step $SCENARIO $*" >>/job/results/progress
}

# fail TEXT: ends the scenario as failed; from inside a command substitution or a pipe too, which
# scenario.sh sees by the file.
fail() {
    echo "FAILED: $*" >&3
    echo "$*" >>"$RUN/failed"
    exit 1
}

uptime_seconds() { cut -d' ' -f1 /proc/uptime; }

# expect_equal WHAT EXPECTED ACTUAL
expect_equal() {
    [ "$2" = "$3" ] || fail "$1: expected '$2', got '$3'"
}

# expect_match WHAT PATTERN TEXT: TEXT must contain the extended regular expression.
expect_match() {
    printf '%s\n' "$3" | grep -Eq -- "$2" || fail "$1: nothing like '$2' in: $3"
}

# within SECONDS COMMAND...: repeats COMMAND until it succeeds; fails after SECONDS.
within() {
    limit=$1
    shift
    since=$(uptime_seconds)
    until "$@" >/dev/null; do
        [ "$(elapsed_since "$since" whole)" -lt "$limit" ] || return 1
        sleep 0.1
    done
}

# elapsed_since UPTIME [whole]: seconds since then, with two decimals or none.
elapsed_since() {
    format=%.2f
    if [ "${2:-}" = whole ]; then format=%d; fi
    echo "$1 $(uptime_seconds)" | awk -v f="$format" '{ printf f, $2 - $1 }'
}

# --- images ----------------------------------------------------------------------------------

# make_image NAME SIZE: a sparse raw image.
make_image() { truncate -s "$2" "$IMAGES/$1"; }

# disk VDEV IMAGE [w|r]: the text of a disk line for the storage in use.
disk() {
    access=${3:-w}
    case ${STORAGE:-platter} in
    platter) echo "vdev=$1,backend=storage,access=$access,format=raw,target=/images/$2" ;;
    qdisk) echo "vdev=$1,access=$access,backendtype=qdisk,format=raw,target=$IMAGES/$2" ;;
    blkback) echo "vdev=$1,access=$access,backendtype=phy,format=raw,target=$(loop_of "$2")" ;;
    esac
}

# loop_of IMAGE: the loop device over an image, made when there is none.
loop_of() {
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
    create_storage_domain "$CONFIGS/storage.cfg" "$@"
    start_9p_server storage
    step "storage domain: wait until it is ready"
    within 20 console_has storage "$READY_PATTERN" || fail "the storage domain is not ready"
}

# create_storage_domain CONFIG [NAME=VALUE...]: only the domain, without a 9p server.
create_storage_domain() {
    xl create "$@" >&2 || fail "xl create $1 failed"
}

# start_9p_server DOMAIN: a server for the domain's 9p shares. The one place that knows which.
# With platter-9pfsd among the files it is that one. Else QEMU: libxl of Xen 4.17 starts it by
# itself; libxl of 4.20 does not, or too early, so there it is started by hand after creation.
start_9p_server() {
    domid=$(xl domid "$1")
    if [ -x /usr/lib/platter/platter-9pfsd ] && [ "${NINEPFSD:-1}" = 1 ]; then
        start_9pfsd "$domid"
    elif [ "$SUITE" = trixie ]; then
        /usr/libexec/xen-qemu-system-i386 -xen-domid "$domid" -no-shutdown -nodefaults \
            -no-user-config -xen-attach -name "$1" -vnc none -display none -nographic \
            -machine xenpv -m 32 </dev/null >"$RUN/9p-$1.log" 2>&1 &
        echo $! >"$RUN/9p-$1.pid"
    fi
}

# stop_9p_server DOMAIN: as a crash of the server would.
stop_9p_server() {
    if [ -s "$RUN/9p-$1.pid" ]; then
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
console_has() { console_of "$1" | grep -Eq -- "$2"; }

# --- Linux guests ----------------------------------------------------------------------------

# create_guest NAME DISK...: a Linux guest, up and waiting for jobs. GUEST_CONFIG picks the file in
# xen-config, GUEST_SETTINGS holds one more NAME=VALUE, FIO=1 adds fio to the guest.
create_guest() {
    name=$1
    step "guest $name: create"
    create_guest_quietly "$@"
    step "guest $name: wait until it is up"
    within 60 ready_more_than "$name" "$ready_before" || fail "guest $name does not come up"
}

# create_guest_quietly NAME DISK...: as create_guest, without waiting for it to come up.
create_guest_quietly() {
    name=$1
    shift
    ready_before=$(ready_count "$name")
    rm -f "$RUN/$name.tty"
    guest_config "$name" "$@" >"$RUN/$name.cfg"
    xl create "$RUN/$name.cfg" >&2 || fail "xl create of guest $name failed"
}

# guest_config NAME DISK...: the guest's file of xen-config with the rig's values after it.
guest_config() {
    config_name=$1
    shift
    cat "$CONFIGS/${GUEST_CONFIG:-guest-pv.cfg}"
    echo "name=\"$config_name\""
    echo "disk=[$(printf "'%s'," "$@")]"
    if [ "${FIO:-0}" = 1 ]; then
        echo 'ramdisk="/srv/boot/initrd-fio"'
        echo 'memory=640'
    fi
    echo "${GUEST_SETTINGS:-}"
}

ready_count() { console_of "$1" | grep -c '^@@ready' || true; }

ready_more_than() { [ "$(ready_count "$1")" -gt "$2" ]; }

# guest NAME COMMANDS [SECONDS]: runs COMMANDS in the guest; their output and status are its own.
guest() {
    guest_start "$1" "$2"
    guest_wait "$1" "${3:-60}"
}

# guest_start NAME COMMANDS: sends COMMANDS and returns; guest_wait NAME [SECONDS] hands back the
# output and the status of the last ones sent.
guest_start() {
    if [ ! -s "$RUN/$1.tty" ]; then
        xenstore-read "/local/domain/$(xl domid "$1")/console/tty" >"$RUN/$1.tty"
    fi
    job=$(($(cat "$RUN/job" 2>/dev/null || echo 0) + 1))
    echo "$job" >"$RUN/job"
    echo "$job" >"$RUN/$1.job"
    printf '%s %s\n' "$job" "$(printf %s "$2" | base64 -w0)" >"$(cat "$RUN/$1.tty")"
}

guest_wait() {
    job=$(cat "$RUN/$1.job")
    within "${2:-60}" console_has "$1" "^@@done $job " ||
        fail "guest $1 did not finish its job in ${2:-60} s"
    console_of "$1" | awk -v b="@@begin $job" -v d="@@done $job " '
        $0 == b { inside = 1; next }
        index($0, d) == 1 { inside = 0 }
        inside' | sed -e '${/^$/d}'
    return "$(console_of "$1" | sed -n "s/^@@done $job //p" | tail -n1)"
}

# guest_must NAME COMMANDS [SECONDS]: as guest, and a failure of COMMANDS fails the scenario.
guest_must() {
    said=$(guest "$@") || fail "in guest $1: $said"
    printf '%s\n' "$said"
}

# stop_guest NAME: unmounts, syncs and destroys; these guests have no init that could shut down.
stop_guest() {
    guest_must "$1" 'umount /mnt 2>/dev/null; sync' >/dev/null
    xl destroy "$1"
}

# --- disks of running guests -----------------------------------------------------------------

# block_attach GUEST DISK / block_detach GUEST VDEV: must succeed.
block_attach() { xl block-attach "$1" "$2" >&2 || fail "xl block-attach $1 $2 failed"; }
block_detach() { xl block-detach "$1" "$2" >&2 || fail "xl block-detach $1 $2 failed"; }

# expect_refused TARGET PATTERN: a guest with this target must not come to life; xl must say so
# within 2 s, and the reason must stand on the storage domain's console and in its xenstore.
expect_refused() {
    step "refused: $1 ($2)"
    seen=$(console_of storage | wc -l)
    guest_config refused "vdev=xvda,backend=storage,format=raw,target=$1" >"$RUN/refused.cfg"
    # A domain of a few MiB: what is timed is the disk, not the loading of a Linux kernel.
    printf 'kernel="%s"\nramdisk=""\nmemory=16\n' /usr/lib/platter/platter.elf \
        >>"$RUN/refused.cfg"
    since=$(uptime_seconds)
    if timeout 30 xl create -p "$RUN/refused.cfg" >&2; then
        xl destroy refused
        fail "a guest with target=$1 was created"
    fi
    took=$(elapsed_since "$since")
    [ "${took%.*}" -lt 2 ] || fail "the refusal of $1 took $took s"
    reason=$(console_of storage | tail -n +"$((seen + 1))")
    expect_match "console after target=$1" "$2" "$reason"
    domid=$(xl domid storage)
    reason=$(xenstore-ls "/local/domain/$domid/error" 2>/dev/null || true)
    expect_match "xenstore's error/ after target=$1" "$2" "$reason"
}
