#!/usr/bin/env python3
"""Keeps the sectors of an image that are not zero: the number (u64 LE) and the 512 bytes, or
with bit 63 set the one byte that fills the sector."""
import struct, sys

with open(sys.argv[1], "rb") as image, open(sys.argv[2], "wb") as out:
    number = 0
    while sector := image.read(512):
        if len(set(sector)) == 1 and sector[0]:
            out.write(struct.pack("<QB", number | 1 << 63, sector[0]))
        elif sector.strip(b"\0"):
            out.write(struct.pack("<Q", number) + sector.ljust(512, b"\0"))
        number += 1
