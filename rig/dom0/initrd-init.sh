#!/bin/sh
# First process of dom0: finds dom0's root and the shares, and hands over to init.sh on the share.
# It must not know anything about Xen or about scenarios: those are read anew at each boot.
export PATH=/bin
/bin/busybox --install -s /bin
mkdir -p /dev /proc /sys /root
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
while read -r module; do insmod "$module"; done </modules/base
tries=0
until [ -b /dev/vda ] || [ "$tries" -ge 100 ]; do
    tries=$((tries + 1))
    sleep 0.1
done
mount -t ext4 /dev/vda /root || exec poweroff -f
for share in job guest; do
    mkdir -p "/root/$share"
    mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000 "$share" "/root/$share" ||
        exec poweroff -f
done
umount /proc /sys
mount -t devtmpfs dev /root/dev
exec switch_root /root /bin/sh /job/dom0/init.sh
