"""Writes the disk that an image holds to standard output, as another author's reader sees it.

usage: read.py READER IMAGE [PARENT ...]
READER is libvhdi (pyvhdi: VHD and VHDX, parents given nearest first) or dissect
(dissect.hypervisor: VHD without parents; VHDX, which finds its parents itself).
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


def dissect(paths):
    if paths[0].endswith(".vhd"):
        from dissect.hypervisor.disk.vhd import VHD

        disk = VHD(open(paths[0], "rb"))
    else:
        from dissect.hypervisor.disk.vhdx import VHDX

        disk = VHDX(Path(paths[0]))
    return disk.size, disk


size, disk = {"libvhdi": libvhdi, "dissect": dissect}[sys.argv[1]](sys.argv[2:])
while size > 0:
    piece = disk.read(min(size, 1 << 20))
    assert piece, "the reader stops before the end of the disk"
    sys.stdout.buffer.write(piece)
    size -= len(piece)
