#: title systemd runs platter-9pfsd by its unit, without rights, and starts it again when it dies
#: needs platter.elf platter-9pfsd platter-9pfsd.service platter-9pfsd.sysusers
#: suites trixie
#: timeout 240
# dom0 has a small init of its own here, so systemd is the first process of a container in it: a PID
# namespace, its own mounts, dom0's devices. Would miss: in what order a whole boot starts things.

UNITS=/run/systemd/system
UNIT=platter-9pfsd.service
# Where libxl looks for a server.
REGISTERED=/local/domain/0/libxl/xen-9pfs/state

scenario() {
    make_image disk.raw 16M
    step "what systemd says of the unit"
    systemd-sysusers /usr/lib/platter/platter-9pfsd.sysusers >&2
    chown -R platter-9pfsd "$IMAGES"
    expect_equal "systemd-analyze verify" "" \
        "$(systemd-analyze verify "/usr/lib/platter/$UNIT" 2>&1)"
    systemd-analyze security --offline=true --threshold=25 \
        "/usr/lib/platter/$UNIT" >"$RUN/security" ||
        fail "the unit leaves the server more than it needs: $(tail -n1 "$RUN/security")"
    step "systemd in a container"
    mountpoint -q /sys/fs/cgroup || mount -t cgroup2 cgroup /sys/fs/cgroup
    unshare --fork --kill-child --pid --mount --propagation private \
        sh -c "$(start_script)" </dev/null >"$RUN/systemd.log" 2>&1 &
    echo $! >"$RUN/systemd.pid"
    within 60 is_active || fail "the unit does not start: $(inside systemctl status "$UNIT")"
    inside systemctl show "$UNIT" -p MainPID -p NRestarts
    step "what it may do"
    status=$(cat "/proc/$(pgrep -x platter-9pfsd)/status")
    expect_match "its user" "^Uid:.$(id -u platter-9pfsd)." "$status"
    expect_match "its capabilities" "^CapPrm:.0+$" "$status"
    expect_match "no new privileges" "^NoNewPrivs:.1$" "$status"
    expect_match "seccomp filters" "^Seccomp:.2$" "$status"
    create_storage
    create_guest guest "$(disk xvda disk.raw)"
    guest_must guest 'echo before | dd of=/dev/xvda conv=fsync 2>/dev/null'
    step "it dies, and systemd starts it again"
    ups=$(up_count storage images)
    pkill -9 -x platter-9pfsd
    within 60 up_more_than storage images "$ups" || fail "the store does not come up again"
    guest_goes_on guest disk.raw
    xenstore-exists "$REGISTERED" || fail "libxl would start another server"
    expect_equal "restarts" NRestarts=1 "$(inside systemctl show "$UNIT" -p NRestarts)"
    step "it is stopped"
    inside systemctl stop "$UNIT" || fail "systemctl stop fails"
    expect_equal "servers" "" "$(pgrep -x platter-9pfsd || true)"
    xenstore-exists "$REGISTERED" && fail "libxl would not start Xen's own server"
    xl destroy storage
}

# inside COMMAND...: in the container.
inside() {
    nsenter -t "$(pgrep -P "$(cat "$RUN/systemd.pid")")" -p -m "$@" 2>&1
}

is_active() { [ "$(inside systemctl is-active "$UNIT")" = active ]; }

# start_script: the container's mounts and units. What a boot would do to the machine is masked.
start_script() {
    cat <<END
set -e
mount -t proc proc /proc
mount -t tmpfs run /run
mkdir -p $UNITS/rig.target.wants
for unit in /usr/lib/systemd/system/sysinit.target.wants/*; do
    case \$unit in
    *journald*) ;;
    *) ln -s /dev/null $UNITS/\${unit##*/} ;;
    esac
done
cp /usr/lib/platter/$UNIT $UNITS/
echo '[Unit]' >$UNITS/rig.target
ln -s ../$UNIT $UNITS/rig.target.wants/
exec env container=rig /usr/lib/systemd/systemd --unit=rig.target --log-target=console
END
}
