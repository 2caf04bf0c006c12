"""Writes the disk that an image holds to standard output, as another author's reader sees it.

usage: read.py READER IMAGE [PARENT ...]
READER is libvhdi (pyvhdi: VHD and VHDX), libvmdk (pyvmdk), libqcow (pyqcow), each with parents
given nearest first, or dissect (dissect.hypervisor: VHD without parents; VDI with one; VHDX,
VMDK and qcow2, which find their parents themselves).
"""
import sys
from pathlib import Path


def libvhdi(paths):
    import pyvhdi

    below = None
    for path in reversed(paths):
        image = pyvhdi.file()
        image.open(path)
        if below is not None:
            image.set_parent(below)
        below = image
    return below.get_media_size(), below


def libvmdk(paths):
    import pyvmdk

    below = None
    for path in reversed(paths):
        image = pyvmdk.handle()
        image.open(path)
        image.open_extent_data_files()
        if below is not None:
            image.set_parent(below)
        below = image
    return below.get_media_size(), below


def libqcow(paths):
    import pyqcow

    image = pyqcow.file()
    image.open(paths[0])
    return image.get_media_size(), image


def dissect(paths):
    if paths[0].endswith(".vdi"):
        from dissect.hypervisor.disk.vdi import VDI

        below = None
        for path in reversed(paths):
            image = VDI(open(path, "rb"), below)
            below = image.open()
        return image.size, below
    if paths[0].endswith(".vmdk"):
        from dissect.hypervisor.disk.vmdk import VMDK

        disk = VMDK(Path(paths[0]))
        # It would look behind a disk that ends within its 8 KiB.
        disk.align = 512
    elif paths[0].endswith(".qcow2"):
        from dissect.hypervisor.disk.qcow2 import QCow2

        image = QCow2(Path(paths[0]))
        return image.size, image.open()
    elif paths[0].endswith(".vhd"):
        from dissect.hypervisor.disk.vhd import VHD

        disk = VHD(open(paths[0], "rb"))
    else:
        from dissect.hypervisor.disk.vhdx import VHDX

        disk = VHDX(Path(paths[0]))
    return disk.size, disk


readers = {"libvhdi": libvhdi, "libvmdk": libvmdk, "libqcow": libqcow, "dissect": dissect}
size, disk = readers[sys.argv[1]](sys.argv[2:])
while size > 0:
    piece = disk.read(min(size, 1 << 20))
    assert piece, "the reader stops before the end of the disk"
    sys.stdout.buffer.write(piece)
    size -= len(piece)
