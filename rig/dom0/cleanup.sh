#!/bin/sh
# After each scenario: no domain, no server, no loop device, no image is left for the next one.
# Guests go before the storage domains, so that nothing waits for a backend that is gone.
xl list | awk 'NR > 1 && $2 != 0 { print $2, $1 }' | sort -rn >/run/rig/domains
grep -v ' storage' /run/rig/domains | while read -r id _; do timeout 30 xl destroy "$id"; done
grep ' storage' /run/rig/domains | while read -r id _; do timeout 30 xl destroy "$id"; done
pkill -x platter-9pfsd
for pid in $(cat /run/rig/*.pid 2>/dev/null); do kill "$pid" 2>/dev/null; done
for device in $(pvs --noheadings -o vg_name 2>/dev/null); do vgchange -an "$device"; done
losetup -D
if [ -b /dev/xvda ]; then echo "a disk of dom0 was left: $(ls /dev/xvd*)"; fi
umount /mnt 2>/dev/null
xenstore-rm /local/domain/0/error 2>/dev/null
rm -rf /srv/images /run/rig /var/log/xen/console /var/log/xen/*.log
mkdir -p /srv/images /run/rig /var/log/xen/console
# xenconsoled keeps its log files open by domain, so an emptied folder is safe here: every domain
# that it had a log for is gone.
exit 0
