#!/bin/sh
# Puts what explains a scenario's outcome beside its result: console logs always; xenstore, Xen's
# own log and the toolstack's only after a failure, because they take a second to gather.
results=$1 status=$2
cp /var/log/xen/console/*.log "$results/" 2>/dev/null
[ "$status" -eq 0 ] && exit 0
timeout 10 xl list >"$results/xl-list" 2>&1
timeout 10 xenstore-ls -fp >"$results/xenstore" 2>&1
timeout 10 xl dmesg >"$results/xl-dmesg" 2>&1
dmesg >"$results/dom0-dmesg" 2>&1
for log in /var/log/xen/*.log /run/rig/*.log; do
    [ -s "$log" ] && cp "$log" "$results/toolstack-${log##*/}"
done
exit 0
