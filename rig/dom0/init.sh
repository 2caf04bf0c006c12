#!/bin/sh
# dom0's init: starts what Xen needs, runs the scenarios of /job/list one after another, and
# switches the machine off. Order: devices and mounts, modules, xenstored, xen-init-dom0,
# xenconsoled; whatever happens, the machine must end by poweroff, or the host waits in vain.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C
. /job/settings

progress() { echo "$(cut -d' ' -f1 /proc/uptime) $*" >>/job/results/progress; }

give_up() {
    progress "broken $*"
    busybox poweroff -f
}

mounts() {
    mount -t proc proc /proc
    mount -t sysfs sys /sys
    mkdir -p /dev/pts /dev/shm
    mount -t devpts devpts /dev/pts
    # Without these links the block hotplug script waits for ever.
    ln -sf /proc/self/fd /dev/fd
    ln -sf fd/0 /dev/stdin
    ln -sf fd/1 /dev/stdout
    ln -sf fd/2 /dev/stderr
    mount -t tmpfs run /run
    mount -t tmpfs tmp /tmp
    mkdir -p /run/lock /run/xen /run/xenstored /run/rig /run/lvm /var/lib/xenstored \
        /var/lib/xen /var/log/xen/console /srv/images /srv/boot /usr/lib/platter
    ip link set lo up
}

modules() {
    for module in xen-evtchn xen-gntdev xen-gntalloc xen-privcmd xen-blkback xen-blkfront \
        xen-pciback loop xenfs dm-mod nbd; do
        modprobe "$module" || true
    done
    mount -t xenfs xenfs /proc/xen
}

services() {
    xen_bin=$(echo /usr/lib/xen-4.*/bin)
    "$xen_bin/xenstored" --pid-file /run/xen/xenstored.pid
    tries=0
    until xenstore-exists / 2>/dev/null; do
        tries=$((tries + 1))
        [ "$tries" -lt 100 ] || give_up "xenstored does not answer"
        sleep 0.1
    done
    "$xen_bin/xen-init-dom0"
    "$xen_bin/xenconsoled" --pid-file=/run/xen/xenconsoled.pid --log=guest \
        --log-dir=/var/log/xen/console --timestamp=none
}

# What guests boot from is read from the share once.
boot_files() {
    cp /guest/* /srv/boot/
    for file in /job/files/*; do
        if [ -e "$file" ]; then cp "$file" /usr/lib/platter/; fi
    done
}

# How much slower than an idle host this one is, by what the start took: 1 to 8. All limits of time
# are multiplied by it, but those that a scenario is about.
slowness() {
    awk '{ n = int($1 / 6); print (n < 1 ? 1 : (n > 8 ? 8 : n)) }' /proc/uptime
}

# Runs one scenario and leaves its outcome and its logs under /job/results.
run_scenario() {
    name=$1 seconds=$2
    results=/job/results/$name
    mkdir -p "$results"
    progress "start $name"
    began=$(cut -d' ' -f1 /proc/uptime)
    timeout -k 5 $((seconds * SLOWNESS)) sh /job/dom0/scenario.sh "$name" \
        >"$results/output" 2>"$results/trace" </dev/null
    status=$?
    ended=$(cut -d' ' -f1 /proc/uptime)
    took=$(echo "$began $ended" | awk '{ printf "%.1f", $2 - $1 }')
    if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
        echo "FAILED: not done after $seconds s times $SLOWNESS (status $status)" \
            >>"$results/output"
    fi
    sh /job/dom0/collect.sh "$results" "$status" >"$results/collect.log" 2>&1
    [ "$KEEP" = 1 ] || sh /job/dom0/cleanup.sh >"$results/cleanup.log" 2>&1
    if [ "$status" -eq 0 ]; then progress "pass $name $took"; else progress "fail $name $took"; fi
}

mounts
exec >/run/init.log 2>&1
modules
services
boot_files
SLOWNESS=$(slowness)
export SLOWNESS
progress "up $(uname -r)"
while read -r scenario seconds; do
    run_scenario "$scenario" "$seconds"
done </job/list
cp /run/init.log /job/results/init.log
xl dmesg >/job/results/xl-dmesg.log 2>&1
progress "end"
if [ "$KEEP" = 1 ]; then
    exec </dev/hvc0 >/dev/hvc0 2>&1
    sh /job/dom0/keep.sh
fi
sync
busybox poweroff -f
