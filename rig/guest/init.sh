#!/bin/sh
# The whole userspace of a Linux guest: reads jobs from its console and runs them one at a time.
#
# A job is a line "ID BASE64"; the text between "@@begin ID" and "@@done ID STATUS" is its output.
# Markers stand alone on a line, so kernel messages in between do no harm.
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
for word in $(cat /proc/cmdline); do
    case $word in
    rig.modules=*) groups="base $(echo "${word#*=}" | tr , ' ')" ;;
    esac
done
for group in $groups; do
    while read -r module; do insmod "$module" || true; done <"/modules/$group"
done
printf '\n@@ready %s\n' "$(cut -d' ' -f1 /proc/uptime)"
while read -r id job; do
    [ -n "$job" ] || continue
    echo "$job" | base64 -d >"/tmp/job.$id"
    printf '\n@@begin %s\n' "$id"
    sh "/tmp/job.$id" </dev/null
    printf '\n@@done %s %s\n' "$id" "$?"
done
