#!/bin/sh
# Init of a Linux driver domain, platter's peer: blkback and `xl devd` in a root like dom0's, then
# jobs from the console as in any guest.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C
mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir -p /dev/pts
ln -sf /proc/self/fd /dev/fd
ln -sf fd/0 /dev/stdin
ln -sf fd/1 /dev/stdout
ln -sf fd/2 /dev/stderr
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
mkdir -p /run/lock /run/xen /var/log/xen /srv/images
exec </dev/hvc0 >/dev/hvc0 2>&1
stty -echo -icanon -opost
for module in xen-evtchn xen-gntdev xen-gntalloc xen-privcmd xen-blkback xenfs loop \
    xen-pcifront nvme; do
    modprobe "$module" || true
done
mount -t xenfs xenfs /proc/xen
xl devd -F >/run/devd.log 2>&1 &
. /rig/jobs.sh
