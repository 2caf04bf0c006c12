#!/bin/sh
# Makes the LVM vectors with lvm2 2.03.16 on loop devices, as root, without device-mapper:
# nothing is activated. Run in this folder.
set -eu
work=$(mktemp -d)
pvs=
for name in pv0 pv1 pv2; do
    truncate -s 64M "$work/$name.img"
    loop=$(losetup -f --show "$work/$name.img")
    pvs="$pvs $loop"
done
trap 'losetup -d $pvs; rm -r "$work"' EXIT
set -- $pvs
mkdir "$work/lock"
cat > "$work/lvm.conf" <<CONF
devices { obtain_device_list_from_udev=0 use_devicesfile=0
          filter=["a|^$1\$|","a|^$2\$|","a|^$3\$|","r|.*|"] scan=["/dev"] }
activation { udev_sync=0 udev_rules=0 monitoring=0 }
global { use_lvmpolld=0 locking_dir="$work/lock" system_id_source="none" }
backup { backup=0 archive=0 }
CONF
export LVM_SYSTEM_DIR="$work" DM_DISABLE_UDEV=1 LVM_SUPPRESS_FD_WARNINGS=1

lvm pvcreate -q "$1" "$2" "$3"
lvm vgcreate -q -s 1M vg0 "$1" "$2" "$3"
quiet="-q -y -an -Zn -Wn --driverloaded n"
lvm lvcreate $quiet -l 8 -n images vg0 "$1"
lvm lvcreate $quiet -l 5 -n other-1 vg0 "$1"
lvm lvcreate $quiet -l 20 -n grown vg0 "$1"
lvm lvextend -q --driverloaded n -l +10 vg0/grown "$2"
lvm lvcreate $quiet -l 12 -i 3 -I 16k -n striped vg0
lvm lvs -a --driverloaded n -o name,segtype,devices vg0
for name in pv0 pv1 pv2; do
    python3 sparse.py "$work/$name.img" "lvm-$name.sparse"
done
