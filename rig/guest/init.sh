#!/bin/sh
# The whole userspace of a Linux guest: brings up devices and modules, then runs jobs.
# rig.modules=GROUP,... loads more modules; rig.root=DEVICE goes on in that root instead.
export PATH=/bin HOME=/
/bin/busybox --install -s /bin
mkdir -p /dev /proc /sys /tmp /run /mnt /etc
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
ln -sf /proc/mounts /etc/mtab
exec </dev/hvc0 >/dev/hvc0 2>&1
stty -echo -icanon -opost
groups=base
root=
for word in $(cat /proc/cmdline); do
    case $word in
    rig.modules=*) groups="base $(echo "${word#*=}" | tr , ' ')" ;;
    rig.root=*) root=${word#*=} ;;
    esac
done
for group in $groups; do
    while read -r module; do insmod "$module" || true; done <"/modules/$group"
done
if [ -n "$root" ]; then
    mkdir /root
    mount -t ext4 "$root" /root
    mount -t devtmpfs dev /root/dev
    exec switch_root /root /bin/sh /rig/driver-domain.sh
fi
. /jobs.sh
