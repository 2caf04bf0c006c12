#!/bin/sh
# Installs what the tests need and the machine lacks; says so, and nothing else. Debian and Ubuntu.
# QEMU's system emulator is never installed here: the rig brings its own.
set -eu

missing=
# need COMMAND PACKAGE
need() { command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || missing="$missing $2"; }

need qemu-img qemu-utils
need gcc gcc
need objcopy binutils
need mke2fs e2fsprogs
need python3 python3
python3 -c 'import ensurepip' 2>/dev/null || missing="$missing python3-venv"
need debootstrap debootstrap
need cpio cpio
need depmod kmod
need busybox busybox-static
need xz xz-utils
[ -n "$missing" ] || exit 0

as_root=
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null 2>&1 ||
        {
            echo "missing:$missing; run as root, or install sudo, or install them by hand" >&2
            exit 1
        }
    as_root=sudo
fi
echo "installing:$missing"
$as_root apt-get update -qq
# shellcheck disable=SC2086 # a list of packages
$as_root env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends $missing >/dev/null
